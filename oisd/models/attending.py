"""Which layers of a model attend by softmax, and which two of them the attention term compares.

The paper compares layer l with the last layer. A hybrid model has layers without softmax attention
(linear attention, state spaces, convolutions); there the term compares the nearest layer at or
below l that has it with the last one of the model that has it. This is an extension of the paper.

A layer attends if a forward of four tokens sees it compute one causal softmax over all or a window
of its keys, through transformers' interface (`oisd.models.attention`) or by itself
(`oisd.models.inline`). Labels of the config only exclude layers: keys that are selected, compressed
or cut into chunks look complete in a short text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oisd.models.attention import AttentionCall, tapped
from oisd.models.inline import watched
from oisd.models.layout import (
    Layout,
    attended,
    find_layout,
    is_causal_softmax,
    learned_positions,
    refuse_variants,
    unwrap,
)
from oisd.models.probe import eval_mode, probe_ids
from oisd.models.refusals import WITHOUT_ATTENTION, Remedy, UnsupportedModelError

# "attention" is the legacy name of full attention; "hybrid" has one attention beside a Mamba.
_KINDS = ("full_attention", "sliding_attention", "attention", "hybrid")
_WINDOWS = ("window_size", "attention_window_size", "sliding_window")


class Found(NamedTuple):
    """What the probe found in one layer."""

    calls: list[AttentionCall]
    inline: bool  # whether the layer computes its attention itself
    apart: str  # how it attends otherwise than over all or a window of its keys; "" if it does not
    problem: UnsupportedModelError | None  # why Taps cannot take its attention

    @property
    def attends(self) -> bool:
        return not self.apart


class Pairs(NamedTuple):
    """The layers that the attention term compares, for each student layer."""

    layers: tuple[tuple[int, int], ...]  # of the student's and the teacher's attention
    words: str  # says so where it is not the student layer itself and the last layer; else ""


@contextmanager
def reading(
    layout: Layout,
    layer: int,
    inline: bool,
    record: Callable[[AttentionCall], None],
    active: Callable[[], bool] = lambda: True,
    with_bias: bool = True,
) -> Iterator[None]:
    """Records the attention of a layer, the way it computes it."""
    module = layout.layers[layer - 1]
    if inline:
        with watched(module, record, active, with_bias):
            yield
    else:
        with tapped(module, record, layer):
            yield


@torch.no_grad()
def _calls(layout: Layout, layers: Sequence[int], inline: bool, ids: Tensor) -> Any:
    calls: dict[int, list[AttentionCall]] = {layer: [] for layer in layers}
    with eval_mode(layout.model), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(reading(layout, layer, inline, calls[layer].append))
        layout.model(input_ids=ids, use_cache=False)
    return calls


def find_attention(layout: Layout) -> dict[int, Found]:
    """What each layer's attention is, by one forward of four tokens or two."""
    ids, numbers = probe_ids(layout.model), range(1, len(layout.layers) + 1)
    calls = _calls(layout, numbers, False, ids)
    silent = [layer for layer in numbers if not calls[layer]]
    inline = _calls(layout, silent, True, ids) if silent else {}
    text = _text_config(layout)
    kinds = getattr(text, "layer_types", None) or []
    if len(kinds) != len(numbers):  # it counts other layers
        kinds = [None] * len(numbers)
    windows = _windows(layout, [n for n in inline if len(inline[n]) == 1])
    found = {}
    for layer, kind in zip(numbers, kinds, strict=True):
        own = calls[layer] or inline.get(layer, [])
        if len(own) == 1 and layer in windows:
            own = [own[0]._replace(window=windows[layer])]
        apart = _apart(layout.layers[layer - 1], kind, own)
        problem = None if apart else _problem(layout, layer, kind, own)
        found[layer] = Found(own, not calls[layer], apart, problem)
    return found


def _text_config(layout: Layout) -> Any:
    config: Any = getattr(layout.decoder, "config", None)
    config = config if hasattr(config, "get_text_config") else layout.model.config
    return config.get_text_config()


def _windows(layout: Layout, layers: Sequence[int]) -> dict[int, int | None]:
    """The windows of layers that compute their attention themselves, where their config names one.

    Their masks are not asked: a text a little longer than the window shows it.
    """
    config = _text_config(layout)
    named = {getattr(config, name, None) for name in _WINDOWS}
    most = learned_positions(layout.model)
    wide = sorted(w for w in named if isinstance(w, int) and w > 1)
    wide = [w for w in wide if most is None or w + 8 <= most]
    if not layers or not wide:
        return {}
    ids = probe_ids(layout.model)
    text = torch.arange(wide[-1] + 8, device=ids.device)[None] % 97 + 3
    calls = _calls(layout, layers, True, text % layout.model.get_input_embeddings().weight.shape[0])
    windows = {}
    for layer in layers:
        (call,) = calls[layer]

        def error(window: int | None, call: AttentionCall = call) -> float:
            out, _ = attended(call._replace(window=window))
            return float((call.out.float() - out).abs().max())

        windows[layer] = min([None, *wide], key=error)
    return windows


def _apart(module: nn.Module, kind: str | None, calls: Sequence[AttentionCall]) -> str:
    """How a layer attends otherwise than over all or a window of its keys, or ""."""
    known = f" (its type is {kind!r})" if kind else ""
    if any("indexer" in name.lower() for name, _ in module.named_modules()):
        return "attends to keys that an indexer selects"
    if "index" in (kind or "") or "sparse" in (kind or ""):
        return f"attends to keys that it selects{known}"
    if not calls:
        return f"has no softmax attention that can be read{known}"
    if "compressed" in (kind or ""):
        return f"attends to compressed keys{known}"
    if "chunk" in (kind or ""):
        return f"attends within chunks of its keys{known}"
    return "" if kind is None or kind in _KINDS else f"attends in an unknown way{known}"


def _problem(
    layout: Layout, layer: int, kind: str | None, calls: Sequence[AttentionCall]
) -> UnsupportedModelError | None:
    """Why Taps cannot take a layer's attention, or None."""
    names = [name for name, _ in layout.layers[layer - 1].named_parameters()]
    if len(calls) > 1 or any(".lambda_" in name for name in names):
        count = len(calls) if len(calls) > 1 else "several"
        return UnsupportedModelError(
            f"Taps: layer {layer} must attend once over all or a window of its keys, and it "
            f"computes {count} attentions",
            WITHOUT_ATTENTION,
        )
    (call,) = calls
    try:
        refuse_variants(layer, call)
    except UnsupportedModelError as error:
        return error.with_traceback(None)
    if kind == "sliding_attention" and call.window is None:
        return UnsupportedModelError(
            f"Taps: layer {layer} does not say how wide its window is", WITHOUT_ATTENTION
        )
    if not is_causal_softmax(call):
        return UnsupportedModelError(
            f"Taps: layer {layer}'s attention ({call.implementation}) is not the causal softmax of "
            f"its queries and keys; it has a mask, bias or factor of its own",
            WITHOUT_ATTENTION,
        )
    return None


def mismatch(
    found: Mapping[int, Found], student: int, teacher: int
) -> UnsupportedModelError | None:
    """Why two layers cannot be compared, or None."""
    for layer in (teacher, student):
        if found[layer].apart:
            return UnsupportedModelError(
                f"Taps: layer {layer} {found[layer].apart}", WITHOUT_ATTENTION
            )
        if problem := found[layer].problem:
            return problem
    own, last = found[student].calls[0], found[teacher].calls[0]
    heads, wanted = own.q.shape[1], last.q.shape[1]
    if heads != wanted:
        same = [n for n in _attending(found) if found[n].calls[0].q.shape[1] == heads]
        return UnsupportedModelError(
            f"Taps: layer {student} has {heads} query heads and layer {teacher}, the teacher, "
            f"{wanted}: heads are compared one to one; choose layers of equal numbers by "
            f"attention_student or attention_teacher (layers with {heads}: {_listed(same)})",
            WITHOUT_ATTENTION,
        )
    if own.softcap != last.softcap:
        return UnsupportedModelError(
            f"Taps: layer {student} must have the softcap of layer {teacher}, the teacher, got "
            f"{own.softcap} and {last.softcap}",
            WITHOUT_ATTENTION,
        )
    return None


def _attending(found: Mapping[int, Found]) -> list[int]:
    return [layer for layer in found if found[layer].attends]


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:12]))
    return f"{shown} and {len(layers) - 12} more" if len(layers) > 12 else shown or "none"


def choose_pairs(
    found: Mapping[int, Found],
    students: Sequence[int],
    attention_student: Sequence[int] | None = None,
    attention_teacher: int | None = None,
) -> Pairs:
    """The layers that the attention term compares.

    students: the student layers.
    attention_student: the layer of each one's attention; by default the nearest that attends, at or
        below it.
    attention_teacher: by default the last layer that attends.

    Raises ValueError for a choice out of range, UnsupportedModelError for layers whose attention
    cannot be compared; names the nearest that can.
    """
    depth = len(found)
    teacher = attention_teacher or _teacher(found)
    chosen = attention_student or [_nearest(found, n, teacher) for n in students]
    pairs = tuple((layer, teacher) for layer in chosen)
    for student, _ in pairs:
        if problem := mismatch(found, student, teacher):
            raise problem
    usual = all(pair == (n, depth) for pair, n in zip(pairs, students, strict=True))
    return Pairs(pairs, "" if usual else _words(found, students, pairs))


def _teacher(found: Mapping[int, Found]) -> int:
    able, depth = _attending(found), len(found)
    if not able:
        raise UnsupportedModelError(
            f"Taps: no layer attends by one softmax over all or a window of its keys: layer "
            f"{depth} {found[depth].apart}",
            WITHOUT_ATTENTION,
        )
    return able[-1]


class Probe:
    """What short forwards find out about a model, each run once, for any number of `Taps`.

    model: what `Taps` takes. Raises UnsupportedModelError for a layout that is not understood.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = find_layout(unwrap(model))

    @cached_property
    def attention(self) -> dict[int, Found]:
        return find_attention(self.layout)

    def comparable(self, layers: Sequence[int]) -> tuple[list[int], int]:
        """Those of `layers` whose attention can be compared with the teacher's, and its layer.

        Layers outside 1..L-1 are kept, for `Taps` to refuse. Raises UnsupportedModelError if there
        is none, with the reason of the last one asked for.
        """
        teacher = _teacher(self.attention)
        known = [layer for layer in layers if layer in range(1, len(self.layout.layers))]
        below = [layer for layer in known if layer < teacher]
        able = [layer for layer in below if not mismatch(self.attention, layer, teacher)]
        if below and not able:
            raise mismatch(self.attention, below[-1], teacher) or AssertionError
        return [layer for layer in layers if layer in able or layer not in known], teacher


def refuse_lone_sinks(found: Mapping[int, Found], pairs: Pairs, divergence: str) -> None:
    """A KL is infinite where its first layer alone has a sink: raises UnsupportedModelError."""
    for student, teacher in pairs.layers:
        own, last = (found[layer].calls[0].sink is not None for layer in (student, teacher))
        if own != last and divergence == ("reverse_kl" if own else "forward_kl"):
            raise UnsupportedModelError(
                f"Taps: layers {student} and {teacher} must both have an attention sink or "
                f"neither, as {divergence} is infinite otherwise, got one at layer "
                f"{student if own else teacher} alone",
                Remedy("divergence", "jsd"),
            )


def check_choice(
    depth: int,
    students: Sequence[int],
    attention_student: Sequence[int] | None,
    attention_teacher: int | None,
) -> None:
    """Raise ValueError for a choice out of range, for a model of `depth` layers."""
    teacher = depth if attention_teacher is None else attention_teacher
    if isinstance(teacher, bool) or teacher not in range(2, depth + 1):
        raise ValueError(f"attention_teacher must lie in 2..{depth}, got {attention_teacher}")
    chosen = list(students if attention_student is None else attention_student)
    if len(chosen) != len(students):
        raise ValueError(
            f"attention_student must have one layer for each of the student layers "
            f"{[*students]}, got {chosen}"
        )
    for layer in chosen if attention_student is not None else ():
        if isinstance(layer, bool) or layer not in range(1, teacher):
            raise ValueError(
                f"attention_student must lie in 1..{teacher - 1}, below the teacher's layer "
                f"{teacher}, got {layer}"
            )


def _nearest(found: Mapping[int, Found], student: int, teacher: int) -> int:
    """The nearest layer at or below the student's that attends; it must lie below the teacher's."""
    able = _attending(found)
    below = [layer for layer in able if layer <= student]
    if below and below[-1] < teacher:
        return below[-1]
    if below:
        reason = f"the nearest one, layer {below[-1]}, is not below the teacher's, layer {teacher}"
    else:
        reason = f"layer {student} {found[student].apart}"
    others = [layer for layer in able if layer < teacher]
    near = min(others, key=lambda layer: abs(layer - student), default=None)
    remedy = f"the nearest possible is layer {near}, by attention_student; " if near else ""
    raise UnsupportedModelError(
        f"Taps: layer {student} must attend once by softmax over all or a window of its keys, or "
        f"one below it must: {reason}; {remedy}choose another student layer",
        WITHOUT_ATTENTION,
    )


def _words(
    found: Mapping[int, Found], students: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> str:
    """What the attention term compares, in a sentence."""
    teacher = pairs[0][1]
    parts = []
    for layer, (own, _) in zip(students, pairs, strict=True):
        why = f" (layer {layer} {found[layer].apart})" if found[layer].apart else ""
        parts.append(f"{own} for student layer {layer}{why}" if own != layer else f"{own}")
    return (
        f"The attention term compares layer {' and '.join(parts)} with layer {teacher}, of "
        f"{len(found)} layers; this extends the paper, whose layers all attend."
    )


def words_on_shared_weights(layout: Layout, pairs: Pairs) -> str:
    """Says that layers which are compared have weights in common, as a shared block has, or ""."""
    for student, teacher in pairs.layers:
        own = set(layout.layers[student - 1].parameters())
        if own & set(layout.layers[teacher - 1].parameters()):
            return (
                f"Layers {student} and {teacher} share weights, so that the attention term moves "
                f"the teacher's attention too."
            )
    return ""
