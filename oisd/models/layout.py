"""Where a causal language model keeps what Taps needs: found by a probe, not by its name.

A forward of four tokens finds the layout:

* The layers are the ModuleList that has as many modules as the config has layers, and that runs.
* The tail leads from the last layer's output to the head's input (`oisd.models.tail`).
* The head's output must be linear in its input; what the model does to logits afterwards is read
  from its answer to a known ramp put in place of the head's output (`oisd.models.head`).

A model that does anything else is refused with what it does. `oisd.models.attention` takes the
queries and keys.

B batch, T positions, D width, V vocabulary, H query heads, J key heads, K head dimension.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oisd.models.attention import PLAN, AttentionCall, FusedPlan, tapped
from oisd.models.head import (
    HeadForm,
    close,
    config_numbers,
    head_parameters,
    is_partitioned,
    scale_and_softcap,
    softcapped,
)
from oisd.models.probe import (
    Probe,
    decoder_of,
    depth_of,
    eval_mode,
    first_tensor,
    lists_of,
    lists_that_run,
    probe_ids,
    run_probe,
)
from oisd.models.refusals import EAGER, WITHOUT_ATTENTION, Remedy, UnsupportedModelError
from oisd.models.tail import Replay, Step, Tail, find_steps
from oisd.schema import one_line

_POSITIONS = re.compile("wpe|embed_positions|positions_embed|position_embeddings?|pos_emb.*")


class Layout(NamedTuple):
    """The parts of a model from its layers to its logits."""

    model: Any
    decoder: Any
    layers: nn.ModuleList
    tail: Tail
    head: HeadForm
    runs: tuple[int, ...]  # how often each layer runs in a forward of text
    plain: bool  # whether layers return [B, T, D] as the head reads it, rather than streams

    @property
    def scale(self) -> float:
        return self.head.scale

    @property
    def softcap(self) -> float | None:
        return self.head.softcap


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of PEFT, DDP and torch.compile."""
    while not isinstance(model, PreTrainedModel):
        adapters = getattr(model, "peft_config", {})
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            raise UnsupportedModelError("Taps: prompt learning prepends positions; use LoRA")
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # pyright: ignore
        else:
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise UnsupportedModelError(
                f"Taps: model must be a transformers PreTrainedModel or a wrapper of one, "
                f"got {type(model).__name__}"
            )
        model = inner
    return model


def last_logits_only(model: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    """Arguments under which a forward keeps all hidden states and makes one position's logits.

    They are an index, not a number: Gemma 4 with shared keys and values runs its last layers on
    the last positions alone where `logits_to_keep` is a number. Empty if the model takes neither.

    model: what `Taps` takes. input_ids: [B, T].
    """
    if "logits_to_keep" not in inspect.signature(unwrap(model).forward).parameters:
        return {}
    length = input_ids.shape[1]
    return {"logits_to_keep": torch.arange(length - 1, length, device=input_ids.device)}


def learned_positions(model: Any) -> int | None:
    """The longest text that the model has positions for; None where they are computed.

    Positions are an embedding or a table of their own, or (MPT) fixed in the config. Those of
    towers for images or sounds count for no text.
    """
    limits = []
    kinds = {model.config.model_type, model.config.get_text_config().model_type}
    towers = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type not in kinds
    )
    for name, module in model.named_modules():
        if name.startswith(towers):
            continue
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rsplit(".", 1)[-1]):
            # The first rows may belong to padding.
            padding = -1 if module.padding_idx is None else module.padding_idx
            limits.append(module.num_embeddings - getattr(module, "offset", padding + 1))
    for name, table in model.named_buffers():
        last = name.rsplit(".", 1)[-1]
        if last in ("embed_positions", "pos_encoding") and not name.startswith(towers):
            limits.append(table.shape[0])
    if "mpt" in kinds:
        limits.append(model.config.get_text_config().max_seq_len)
    return min(limits, default=None)


def find_layout(model: Any) -> Layout:
    """The parts of `model` between its last layer and its logits, each verified by the probe."""

    def refuse(what: str, *remedies: Remedy) -> UnsupportedModelError:
        what = f"Taps: {type(model).__name__} is not understood: {what}"
        return UnsupportedModelError(what, *remedies)

    head, depth = model.get_output_embeddings(), depth_of(model)
    if model.config.is_encoder_decoder or not isinstance(head, nn.Module):
        raise refuse("it must have a decoder (get_decoder) and a head (get_output_embeddings)")
    head_parameters(model)
    try:
        lists, why = lists_of(model, depth), ""
        if not lists:
            lists, why = lists_that_run(model, depth)
        if not lists:
            raise refuse(f"the decoder must have one ModuleList of {depth} layers, got 0{why}")
        decoders = {each: decoder_of(model, each) for each in lists}
        numbers = config_numbers(model.config)
        first = next((d for d in decoders.values() if d is not None), model)
        probe = run_probe(model, first, lists, numbers)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model wants that is no plain text
        what = f"its forward of four tokens ends in {type(error).__name__}: {one_line(error)[:200]}"
        implementation = getattr(model.config, "_attn_implementation", None)
        lacks = f"`{implementation}` attention does not support" in str(error)  # transformers 5.24
        raise refuse(what, *([EAGER] if lacks else [])) from error
    found = {} if probe is None else probe.layers
    ran = [each for each in lists if decoders[each] is first and any(m in found for m in each)]
    if probe is None or not ran:
        raise refuse("its forward does not call its decoder, last layer and output embeddings")
    if len(ran) > 1:
        raise refuse(f"the decoder must have one ModuleList of {depth} layers, got {len(ran)}")
    layers = ran[0]
    if probe.head is None:
        raise refuse("the head's output is not its input @ weight.T + bias")

    tail, last = _find_tail(probe, first, layers, numbers, refuse)
    form = probe.head
    given, logits = probe.ramp, probe.logits
    rows = logits.shape[-1]
    if logits.shape[:-1] != given.shape[:-1] or rows > given.shape[-1]:
        raise refuse(f"the logits have shape {[*logits.shape]}, the head's output {[*given.shape]}")
    if rows < given.shape[-1]:
        form, given = form._replace(rows=rows), given[..., :rows]
    bent = scale_and_softcap(given, logits, numbers)
    if bent is None:
        raise refuse(
            f"it turns the head's output {given[0, 0, -1]:.4g} into the logit "
            f"{logits[0, 0, -1]:.4g}, which no scale or softcap explains"
        )
    form = form._replace(scale=bent[0], softcap=bent[1])
    runs = tuple(len(probe.layers.get(layer, ())) for layer in layers)
    plain = last.ndim == 3 and last.shape[-1] == probe.given.shape[-1]
    return Layout(model, first, layers, tail, form, runs, plain)


def _find_tail(
    probe: Probe,
    decoder: nn.Module,
    layers: nn.ModuleList,
    numbers: list[float],
    refuse: Callable[[str], UnsupportedModelError],
) -> tuple[Tail, Tensor]:
    """The tail, and what the last layer returned."""
    last_layer = [layer for layer in layers if layer in probe.layers][-1]
    out = probe.layers[last_layer][-1]
    last, wanted = first_tensor(out), probe.given
    found = find_steps(last, wanted, probe.calls, numbers)
    if found is not None:
        steps, factor = found
        inside = set(decoder.modules())
        computed = sum(step.module in inside for step in steps)
        source = steps[computed - 1].module if computed else last_layer
        return Tail(steps, factor, computed, source), last
    length = probe_ids(probe.model).shape[1]
    if wanted.shape[1] == length and length not in last.shape[:-1]:
        raise refuse(f"its layers see {last.shape[-2]} positions in a text of {length} tokens")
    if any(is_partitioned(p) for p in decoder.parameters()):
        raise refuse("under ZeRO-3, the final norm must read the last layer's output")
    # The decoder's own forward, from its last layer on.
    again = Replay(decoder, layers, last_layer, 0 if isinstance(out, Tensor) else len(out))
    with torch.no_grad(), eval_mode(again):
        same = probe.decoded is not None and again.gives(last, probe.decoded)
    if probe.decoded is not None and same:
        rest = find_steps(probe.decoded, wanted, probe.calls, numbers)
        if rest is not None:
            return Tail((Step(1.0, again), *rest[0]), rest[1], 1, decoder), last
    if last.shape[-1] != wanted.shape[-1]:
        raise refuse(
            f"its head reads {wanted.shape[-1]} values a token, and its layers return "
            f"{last.shape[-1]}"
        )
    raise refuse(
        "no final norm or other function of the last layer's output, on each token alone, gives "
        "what its head reads"
    )


def refuse_variants(layer: int, call: AttentionCall) -> None:
    """Raises UnsupportedModelError unless the call is a softmax over keys and one sink a head."""
    heads = call.q.shape[1]
    if call.sink is not None and call.sink.shape != (heads,):
        raise UnsupportedModelError(
            f"Taps: layer {layer}'s attention sink must be one number a head, [{heads}], got "
            f"{[*call.sink.shape]}",
            WITHOUT_ATTENTION,
        )
    ignored = ""
    if call.softcap is not None:
        ignored = f"the softcap {call.softcap} of layer {layer}'s attention scores"
    elif call.sink is not None:
        ignored = f"the learned sink of layer {layer}'s attention"
    if ignored and "sdpa" in call.implementation:
        raise UnsupportedModelError(f"Taps: SDPA ignores {ignored}", EAGER, WITHOUT_ATTENTION)


def attended(call: AttentionCall) -> tuple[Tensor, float]:
    """[B, T, H, K] causal softmax attention by a call's own arguments, and its largest score."""
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (call.k, call.v))
    scores = softcapped(call.scale * call.q.float() @ k.mT, call.softcap)
    if call.bias is not None:
        scores = scores + call.bias[:, :, None].float()
    distance = torch.arange(scores.shape[-1], device=k.device)
    distance = distance[:, None] - distance
    keep = (distance >= 0) & (distance < (call.window or len(distance)))
    largest = float(scores.abs().max())
    scores = scores.masked_fill(~keep, -torch.inf)
    if call.sink is None:
        weights = scores.softmax(-1)
    else:
        own = call.sink.float()[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, own], -1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2), largest


def is_causal_softmax(call: AttentionCall) -> bool:
    """Whether `out` is causal softmax attention by the call's own q, k, v and arguments."""
    out, largest = attended(call)
    # Eager attention rounds its scores, at least to TF32, which shifts them by up to eps * |score|.
    eps = max(torch.finfo(call.out.dtype).eps, 2**-11)
    return close(call.out, out, slack=min(2 * eps * largest, 8.0))


@contextmanager
def planned(layout: Layout, make: Callable[[Mapping[str, Any]], FusedPlan]) -> Iterator[None]:
    """Context in which each forward of the decoder passes on a plan, made from its arguments."""
    signature = inspect.signature(layout.decoder.forward)

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        return args, {**kwargs, PLAN: make(arguments)}

    hook = layout.decoder.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def takes_plans(layout: Layout, layers: Sequence[int]) -> bool:
    """Whether an extra argument of the decoder reaches these layers' attention."""
    calls: list[AttentionCall] = []
    with torch.no_grad(), eval_mode(layout.model), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(tapped(layout.layers[layer - 1], calls.append))
        stack.enter_context(planned(layout, lambda _: FusedPlan("auto", {}, {})))
        try:
            layout.model(input_ids=probe_ids(layout.model), use_cache=False)
        except TypeError:  # the decoder does not accept the argument
            return False
    return all(call.planned for call in calls)
