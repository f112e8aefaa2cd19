"""The head: which weight and bias it applies, and what the model does to logits afterwards.

Nothing is known by name. A probe compares what the head returns with `hidden @ weight.T + bias`,
and reads scale and softcap from the model's answer to a known ramp in place of the head's output.

D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oisd.models.refusals import UnsupportedModelError


class HeadForm(NamedTuple):
    """How the model's logits come from its head; the default is one linear layer and no more."""

    gain: str | None = None  # a parameter [V] of the head that multiplies the logits of each token
    gain_factor: float = 1.0  # which multiplies it
    rows: int | None = None  # the model leaves out the tokens from here on
    scale: float = 1.0  # logits = softcap(scale * head(hidden))
    softcap: float | None = None


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned the parameter, so that it is whole only in its module."""
    return hasattr(parameter, "ds_id")


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Context in which the module and its children run without their hooks."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    kept = [(m, name, getattr(m, name)) for m in module.modules() for name in names]
    try:
        for inner, name, hooks in kept:
            setattr(inner, name, type(hooks)())
        yield
    finally:
        for inner, name, hooks in kept:
            setattr(inner, name, hooks)


def _is_packed(weight: Tensor) -> bool:
    """Whether the entries are codes: bitsandbytes may store 4-bit ones in a float dtype."""
    coded = getattr(weight, "quant_state", None) is not None
    return coded or weight.dim() != 2 or not weight.is_floating_point()


def _linear(head: Any) -> Any:
    """The one module of a head that has parameters, if it wraps a linear layer."""
    if not isinstance(head, nn.Module) or isinstance(getattr(head, "weight", None), Tensor):
        return head
    owners = [m for m in head.modules() if any(True for _ in m.parameters(recurse=False))]
    return owners[0] if len(owners) == 1 and isinstance(owners[0], nn.Linear) else head


def head_parameters(model: Any, form: HeadForm | None = None) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, D] and bias.

    Raises UnsupportedModelError for an adapter, which `weight` leaves out, and a quantised weight.
    """
    form = form or HeadForm()
    outer = model.get_output_embeddings()
    head = _linear(outer)
    # PEFT's modules_to_save trains a copy of the whole head; `weight` is then the active copy's.
    whole = getattr(head, "modules_to_save", None)
    plain = list(whole.values()) if isinstance(whole, nn.ModuleDict) else [head]
    weight = getattr(head, "weight", None)
    if any(True for module in plain for _ in module.children()) or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"Taps: the output embeddings must be one linear layer without adapters, got "
            f"{type(outer).__name__}; leave the head out of the adapter's target modules, or list "
            f"it in modules_to_save"
        )
    if not is_partitioned(weight) and _is_packed(weight):
        raise UnsupportedModelError(
            f"Taps: the output embeddings must not be quantised, got {type(head).__name__} with a "
            f"weight of {weight.dtype} {[*weight.shape]}; leave them out (llm_int8_skip_modules of "
            f"bitsandbytes)"
        )
    bias = getattr(head, "bias", None)
    if form.gain is not None:
        gain = form.gain_factor * head.get_parameter(form.gain)
        weight, bias = weight * gain[:, None], None if bias is None else bias * gain
    if form.rows is not None:
        weight, bias = weight[: form.rows], None if bias is None else bias[: form.rows]
    return weight, bias


def close(x: Tensor, ref: Tensor, slack: float = 0) -> bool:
    """Equal to a few roundings of the coarser dtype, at the scale of the largest element."""
    if x.shape != ref.shape:
        return False
    bound = 16 * max(torch.finfo(x.dtype).eps, torch.finfo(ref.dtype).eps) + slack
    x, ref = x.float(), ref.to(x.device).float()
    return bool((x - ref).abs().max() <= bound * ref.abs().max())


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def config_numbers(config: Any) -> list[float]:
    """The numbers of a config and of the configs in it, and their reciprocals; none is 0."""
    values, inner = [], [config]
    while inner:
        for value in vars(inner.pop()).values():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                values += [float(value), 1 / float(value)]
            elif hasattr(value, "model_type"):
                inner.append(value)
    return [v for v in values if math.isfinite(v)]


def snapped(value: float, numbers: list[float], within: float) -> float:
    """The nearest of the numbers, or 1, if it is that close; else the value itself."""
    nearest = min([1.0, *numbers], key=lambda number: abs(number - value))
    return nearest if abs(nearest - value) <= within * abs(value) else value


def gain_of(head: Any, given: Tensor, out: Tensor, numbers: list[float]) -> HeadForm | None:
    """The form of a head that returns `out` [1, T, V] for `given` [1, T, D]; None if it has none.

    Called while the head runs: under FSDP2 its weight is whole only then.
    """
    linear = _linear(head)
    weight, bias = linear.weight, getattr(linear, "bias", None)
    plain = F.linear(given.to(weight.dtype), weight, bias)
    if close(out, plain):
        return HeadForm()
    if plain.shape != out.shape:
        return None
    ratio = (plain.double() * out.double()).sum((0, 1)) / plain.double().square().sum((0, 1))
    for name, gain in linear.named_parameters(recurse=False):
        if name in ("weight", "bias") or gain.shape != ratio.shape:
            continue
        factor = float((ratio * gain.double()).sum() / gain.double().square().sum())
        factor = snapped(factor, numbers, within=1e-3)
        if close(out, plain * (factor * gain)):
            return HeadForm(gain=name, gain_factor=factor)
    return None


def ramp(like: Tensor) -> Tensor:
    """Known values in place of logits: -2048 to 2048, dense near 0, none of them 0."""
    count = like.shape[-1]
    up = torch.logspace(-6, 11, count - count // 2, base=2.0, dtype=torch.float64)
    values = torch.cat([-up[: count // 2].flip(0), up])
    return values.to(like).expand_as(like)


def _agrees(logits: Tensor, given: Tensor, scale: float, cap: float | None) -> bool:
    """Each logit to a few roundings of its own size."""
    wanted = softcapped(scale * given.double(), cap)
    eps = max(torch.finfo(given.dtype).eps, torch.finfo(logits.dtype).eps)
    return bool(((logits.double() - wanted).abs() <= 8 * eps * wanted.abs()).all())


def scale_and_softcap(
    given: Tensor, logits: Tensor, numbers: list[float]
) -> tuple[float, float | None] | None:
    """(s, c) with logits = c tanh(s given / c), or s given; None if there are none.

    given, logits: [..., V], a `ramp` and the model's answer. A value that a number of the config
    explains is exactly that number.
    """
    if not bool(logits.isfinite().all()):
        return None
    within = 16 * max(torch.finfo(given.dtype).eps, torch.finfo(logits.dtype).eps)

    def nearby(value: float) -> list[float]:
        return [*dict.fromkeys([snapped(value, numbers, within), value])]

    x, y = (z.flatten(0, -2)[0].double() for z in (given, logits))
    x, y = x[x > 0], y[x > 0]
    first = float(y[0] / x[0])  # the ramp's smallest
    for scale in nearby(first):
        if _agrees(logits, given, scale, None):
            return scale, None
    # The softcap bends the ramp: take a point where it has bent by half, and another below.
    far = int((y / x / first - 0.5).abs().argmin())
    near = int((x - x[far] / 4).abs().argmin())
    x1, y1, x2, y2 = (float(v) for v in (x[near], y[near], x[far], y[far]))
    if not 0 < y1 < y2:
        return None
    low, high = math.log(y2 * (1 + 1e-9)), math.log(1e6 * y2)
    cap = y2
    for _ in range(100):  # bisection: the larger the cap, the larger what it predicts at x2
        middle = (low + high) / 2
        cap = math.exp(middle)
        predicted = cap * math.tanh(math.atanh(y1 / cap) * x2 / x1)
        low, high = (middle, high) if predicted < y2 else (low, middle)
    for c in nearby(cap):
        for s in nearby(c * math.atanh(min(y1 / c, 1 - 1e-12)) / x1):
            if _agrees(logits, given, s, c):
                return s, c
    return None
