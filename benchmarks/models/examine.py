"""What Taps gives for one model, compared with what the model itself computes.

The lens of a layer is right if the head's logits of it are those of the model itself in a forward
whose last layer returns that layer's hidden states. Attention is right if softmax of the captured
queries and keys is what eager attention returns.

Errors are the largest difference over the largest value.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oisd.models import Taps, UnsupportedModelError, last_logits_only
from oisd.models.probe import first_tensor
from oisd.schema import one_line

LENGTH, SHORT = 12, 9
BOUND = 1e-3  # float32, at weights ten times as wide as usual
Row = dict[str, Any]


def error(x: Tensor, wanted: Tensor) -> float:
    x, wanted = x.detach().double(), wanted.detach().double()
    if x.shape != wanted.shape:
        return float("inf")
    return float((x - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def logits_of(hidden: Tensor, taps: Taps) -> Tensor:
    head = taps.unembedding
    logits = hidden.to(head.weight.dtype) @ head.weight.T
    logits = logits if head.bias is None else logits + head.bias
    cap = head.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def texts(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    most = model.get_input_embeddings().weight.shape[0]
    return torch.randint(3, min(most, 100), (2, LENGTH), generator=generator)


@contextmanager
def watched(layer: nn.Module, keep: Callable[[Any], Any]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda _, __, out: keep(out))
    try:
        yield
    finally:
        handle.remove()


def replaced(output: Any, hidden: Tensor) -> Any:
    """A layer's output with other hidden states in it."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)([hidden, *output[1:]])


def layer_states(model: Any, layer: nn.Module, ids: Tensor) -> tuple[Tensor, float | None]:
    """What a layer returns, last, and how far transformers' own hidden states are from it.

    Their place in `hidden_states` is not relied on: RWKV's begin after the first layer, and loops
    have more of them.
    """
    seen: list[Any] = []
    with torch.no_grad(), watched(layer, lambda out: seen.append(first_tensor(out)) or None):
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    own = [x for x in getattr(out, "hidden_states", None) or () if x.shape == seen[-1].shape]
    return seen[-1], min((error(x, seen[-1]) for x in own), default=None)


def examine_lens(model: Any, taps: Taps, student: int, row: Row) -> None:
    ids, layers = texts(model), taps._layout.layers
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    with taps, torch.no_grad():
        out = model(input_ids=ids, use_cache=False).logits
        row["changed"] = error(out, plain)
        row["logits"] = error(logits_of(taps.final_hidden(), taps), plain)
        mine, final = logits_of(taps.student_hidden()[0], taps), taps.final_hidden()
        model(input_ids=ids, use_cache=False, **last_logits_only(model, ids))
        row["last_logits_only"] = error(taps.final_hidden(), final)
        model(
            input_ids=ids,
            use_cache=False,
            **({"logits_to_keep": 1} if last_logits_only(model, ids) else {}),
        )
        row["logits_to_keep"] = error(taps.final_hidden(), final)
    layer = layers[taps._read_from[student] - 1]
    hidden, row["hidden_states"] = layer_states(model, layer, ids)
    ran = [n for n, runs in enumerate(taps._layout.runs) if runs]
    with torch.no_grad(), watched(layers[ran[-1]], lambda out: replaced(out, hidden)):
        row["lens"] = error(mine, model(input_ids=ids, use_cache=False).logits)
    row["far"] = error(mine, plain)  # of the two, so that an error of 0 means something
    examine_padding(model, taps, ids, row)
    examine_gradients(model, taps, student, ids, row)


def examine_padding(model: Any, taps: Taps, ids: Tensor, row: Row) -> None:
    """Whether a row padded on the right, and two packed rows, are as each row alone."""
    short = ids[1:, :SHORT]
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, SHORT:], mask[1, SHORT:] = 0, 0
    with taps, torch.no_grad():
        model(input_ids=short, use_cache=False)
        alone, student = taps.final_hidden()[0], taps.student_hidden()[:, 0]
        model(input_ids=padded, attention_mask=mask, use_cache=False)
        row["padded"] = max(
            error(taps.final_hidden()[1, :SHORT], alone),
            error(taps.student_hidden()[:, 1, :SHORT], student),
        )
        packed = torch.cat([ids[:1, :5], short], 1)
        positions = torch.cat([torch.arange(5), torch.arange(SHORT)])[None]
        try:
            out = model(input_ids=packed, position_ids=positions, use_cache=False)
        except Exception:  # a model without positions
            row["packed"] = None
            return
        row["packed"] = error(taps.final_hidden()[0, 5:], alone)
        row["packed_logits"] = error(logits_of(taps.final_hidden(), taps), out.logits)


def examine_gradients(model: Any, taps: Taps, student: int, ids: Tensor, row: Row) -> None:
    layers = taps._layout.layers
    model.zero_grad()
    with taps:
        model(input_ids=ids, use_cache=False)
        taps.student_hidden().float().square().mean().backward()
    below = {p for layer in layers[:student] for p in layer.parameters()}

    def reached(layer: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())

    def above(layer: nn.Module) -> bool:
        own = [p for p in layer.parameters() if p not in below]
        return any(p.grad is not None and bool(p.grad.any()) for p in own)

    row["reaches"] = all(
        reached(layer) for layer, n in zip(layers[:student], taps._layout.runs, strict=False) if n
    )
    looped = taps._layout.runs[student - 1] > 1  # then earlier passes ran through layers above
    row["leaks"] = [
        n
        for n, layer in enumerate(layers[student:], student + 1)
        if above(layer) and not (looped and taps._layout.runs[n - 1] > 1)
    ]
    model.zero_grad()


def examine_attention(model: Any, taps: Taps, row: Row) -> None:
    ids = texts(model)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    with taps, torch.no_grad():
        row["attention_changed"] = error(model(input_ids=ids, use_cache=False).logits, plain)
        pair = taps.attention()[0]
    eager = None
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=False, output_attentions=True)
        # Falcon's attention is another one, and not causal, where it returns its maps.
        eager = out.attentions if error(out.logits, plain) < BOUND else None
    except Exception:
        eager = None
    finally:
        model.set_attn_implementation(before)
    shape = pair.q.shape[0], pair.q.shape[2], LENGTH, LENGTH
    maps = [a for a in eager or () if isinstance(a, Tensor) and a.shape == shape]
    if not maps:
        row["attention"] = None
        return
    own = distribution(pair, pair.q, pair.k, pair.scale, pair.sink)
    last = distribution(pair, pair.q_teacher, pair.k_teacher, pair.scale_teacher, pair.sink_teacher)
    students, teachers = (min(map_error(mine, a, pair) for a in maps) for mine in (own, last))
    row["attention"] = max(students, teachers)


def map_error(mine: Tensor, eager: Tensor, pair: Any) -> float:
    """Granite's eager maps leave out the sink, by which it scales the sum of values."""
    if float((eager.sum(-1) - 1).abs().max()) < 1e-5:
        mine = mine / mine.sum(-1, keepdim=True)
    return error(mine, of(eager, pair))


def seen_by(pair: Any) -> Tensor:
    place = torch.arange(LENGTH)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < (pair.window or LENGTH))


def distribution(pair: Any, q: Tensor, k: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """[B, H, T, T] over the keys that both layers see; the sink, where there is one, left out."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * q @ k.mT
    if pair.softcap is not None:
        scores = pair.softcap * torch.tanh(scores / pair.softcap)
    scores = scores.masked_fill(~seen_by(pair), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :-1]
    return scores.softmax(-1)


def of(eager: Tensor, pair: Any) -> Tensor:
    """Eager attention over the keys that both layers see, and the share of its sink."""
    kept = eager * seen_by(pair)
    sink = 1 - eager.sum(-1, keepdim=True)
    return kept / (kept.sum(-1, keepdim=True) + sink.where(sink > 1e-5, 0))  # less is rounding


def examine(model: Any, row: Row) -> None:
    """Adds to the row: `lens` and `attention` "works", "refused", "wrong" or "broken", with why."""
    depth = 0
    try:
        with torch.no_grad():
            model(input_ids=texts(model), use_cache=False)
    except Exception as exception:
        row["not_run"] = f"{type(exception).__name__}: {one_line(exception)[:300]}"
    for part, attention in (("lens", False), ("attention", True)):
        row[part + "_errors"] = errors = {}
        try:
            depth = depth or Taps(model, [], attention=False).num_layers
            student = max(1, depth // 2)
            taps = Taps(model, [student], attention=attention)
            if attention:
                examine_attention(model, taps, errors)
            else:
                examine_lens(model, taps, student, errors)
            wrong = faults(errors)
            row[part] = "wrong" if wrong else "works"
            row[part + "_why"] = wrong
        except UnsupportedModelError as refusal:
            row[part], row[part + "_why"] = "refused", one_line(refusal)[:300]
        except Exception as exception:
            row[part], row[part + "_why"] = (
                "broken",
                f"{type(exception).__name__}: {one_line(exception)[:300]}",
            )
            row[part + "_trace"] = traceback.format_exc()[-1500:]
    row["layers"] = depth


def faults(errors: Row) -> str:
    """What is wrong of Taps' own doing; padding and packing are the model's."""
    names = (
        "changed", "logits", "last_logits_only", "logits_to_keep", "lens", "packed_logits",
        "hidden_states", "attention", "attention_changed",
    )  # fmt: skip
    found = [f"{n} {errors[n]:.1e}" for n in names if (errors.get(n) or 0) > BOUND]
    if errors.get("far", 1) < BOUND:
        found.append(f"lens equals the last layer's to {errors['far']:.1e}")
    if errors.get("reaches") is False:
        found.append("the gradient does not reach every layer below")
    if errors.get("leaks"):
        found.append(f"the gradient reaches layers {errors['leaks']}")
    return "; ".join(found)
