"""Argument checks shared by all ops: every message names op, argument, wanted, got and remedy.

Checks read shapes, dtypes and devices alone. Those that need a tensor's values (labels, offsets,
key positions) run on CPU tensors only: on an accelerator they would stall the caller's stream.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64,)
OFFSET_DTYPES = (torch.int32, torch.int64)
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
REDUCTIONS = ("none", "sum", "mean")
SMALLEST, LARGEST = 1e-20, 1e20  # factors of logits; float32 ends at 1.2e-38 and 3.4e38
# A softcap below this, or below this times the temperature, leaves float32 no digits of its slope.
LEAST_SOFTCAP = 0.01
LARGEST_COUNT = 2**63 - 1  # what an op's schema takes for an integer
GATHER = "call the op inside the wrapped forward, where FSDP2 has the parameter whole"


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What an op computes in, whatever its inputs mix: float32, or float64 where one of them is."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def argument_error(
    op: str, argument: str, wanted: str, got: object, remedy: str = ""
) -> ValueError:
    """The one form of our errors: `op: argument must <wanted>, got <got>; <remedy>`."""
    message = f"{op}: {argument} must {wanted}, got {got}"
    return ValueError(f"{message}; {remedy}" if remedy else message)


def is_dtensor(x: Any) -> bool:
    """By the type's module: torch.distributed is not in every build."""
    return isinstance(x, Tensor) and type(x).__module__.startswith("torch.distributed.tensor")


def how_to_gather(argument: str, x: Any) -> str:
    """The remedy for a DTensor where its whole is wanted."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return f"pass {argument}.full_tensor(), or {GATHER}"
    # `full_tensor` alone takes the gradient to be the same on all ranks, and keeps this rank's.
    return (
        f"pass {argument}.full_tensor(grad_placements=...) with Partial() or, as FSDP2 does, "
        f'Partial("avg") over dimensions whose ranks have other tokens, or {GATHER}'
    )


def check_tensor(
    op: str,
    argument: str,
    x: Any,
    layout: str,
    sizes: Sequence[int | None],
    *,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    device: torch.device | None = None,
    remedy: str = "",
) -> None:
    """`x` is a tensor of shape `sizes` (None = any), of one of `dtypes`, on `device`.

    `layout` is that shape in the letters of the op's docstring, as "[N, D]".
    """
    _check_dense(op, argument, x)
    if is_dtensor(x):
        got, remedy = f"a {type(x).__name__}", how_to_gather(argument, x)
        raise argument_error(op, argument, "be a plain tensor", got, remedy)
    fits = x.dim() == len(sizes) and all(
        want is None or have == want for have, want in zip(x.shape, sizes, strict=True)
    )
    if not fits:
        numbers = ", ".join("*" if size is None else str(size) for size in sizes)
        wanted = f"have shape {layout} = [{numbers}]"
        raise argument_error(op, argument, wanted, list(x.shape), remedy)
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise argument_error(
            op, argument, f"have dtype {names}", x.dtype, "cast it with .to(dtype)"
        )
    if device is not None and x.device != device:
        raise argument_error(op, argument, f"be on {device}", x.device, f"move it to {device}")


def check_dims(op: str, argument: str, x: Any, layouts: Mapping[int, str]) -> None:
    """`x` is a tensor whose number of dimensions is a key of `layouts`."""
    _check_dense(op, argument, x)
    if x.dim() not in layouts:
        wanted = "have shape " + " or ".join(layouts.values())
        raise argument_error(op, argument, wanted, list(x.shape))


def _check_dense(op: str, argument: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise argument_error(op, argument, "be a torch.Tensor", type(x).__name__)
    if x.is_nested or x.layout != torch.strided:
        got = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise argument_error(op, argument, "be a dense tensor", got)


def check_rows(op: str, argument: str, x: Any, layout: str = "[N, D]") -> None:
    """Hidden states of any number of tokens and any width."""
    check_dims(op, argument, x, {2: layout})
    check_tensor(op, argument, x, layout, x.shape)


def check_layers(op: str, argument: str, x: Any, like: Tensor | None = None) -> None:
    """Hidden states of one or more layers; with `like` [N, D] given, as many, as wide as that."""
    check_dims(op, argument, x, {2: "[N, D]", 3: "[S, N, D]"})
    *layers, _, _ = x.shape
    sizes = x.shape if like is None else (*layers, *like.shape)
    device = None if like is None else like.device
    check_tensor(op, argument, x, "[S, N, D]" if layers else "[N, D]", sizes, device=device)


def check_token_weight(op: str, token_weight: Any, hidden: Tensor) -> None:
    """None, or a weight for each row of `hidden` [S, N, D] or [N, D], or for each token."""
    if token_weight is None:
        return
    *layers, tokens, _ = hidden.shape
    check_dims(op, "token_weight", token_weight, {1: "[N]", 2: "[S, N]"})
    per_layer = bool(layers) and token_weight.dim() == 2
    layout, sizes = ("[S, N]", (*layers, tokens)) if per_layer else ("[N]", (tokens,))
    check_tensor(op, "token_weight", token_weight, layout, sizes, device=hidden.device)


def check_labels(op: str, labels: Any, hidden: Tensor) -> None:
    """One for each row of `hidden` [N, D]; their values are checked by `check_label_values`."""
    sizes, device = hidden.shape[:1], hidden.device
    check_tensor(op, "labels", labels, "[N]", sizes, dtypes=INDEX_DTYPES, device=device)


def check_label_values(op: str, labels: Tensor, vocabulary: int) -> None:
    remedy = "leave rows without a label out, or label them 0 and weight them by 0 in the loss"
    check_values(op, "labels", labels, 0, vocabulary, remedy)


def check_head(
    op: str, hidden: Tensor, weight: Any, bias: Any, *, empty: bool = False, prefix: str = ""
) -> None:
    """The unembedding that maps `hidden` [..., D] to V logits; with `empty` V may be 0.

    prefix: of the names of `weight` and `bias`; with "teacher_" the width is E.
    """
    name, layout = f"{prefix}weight", "[V, E]" if prefix else "[V, D]"
    check_dims(op, name, weight, {2: layout})
    sizes = (weight.shape[0], hidden.shape[-1])
    check_tensor(op, name, weight, layout, sizes, device=hidden.device)
    if weight.shape[0] == 0 and not empty:
        raise argument_error(op, name, "have at least one row", list(weight.shape))
    if bias is not None:
        check_tensor(op, f"{prefix}bias", bias, "[V]", sizes[:1], device=hidden.device)


def check_values(
    op: str, argument: str, x: Tensor, low: int, high: int | Tensor, remedy: str
) -> None:
    """Integers of a CPU tensor lie in [low, high); `high` may be a tensor that broadcasts."""
    if x.device.type != "cpu" or x.numel() == 0 or not _has_values(x):
        return
    bad = (x < low) | (x >= high)
    if bad.any():
        bound = high if isinstance(high, int) else "its sequence's length"
        raise argument_error(op, argument, f"lie in [{low}, {bound})", x[bad][0].item(), remedy)


def _has_values(x: Tensor) -> bool:
    """Whether the host may read them: not of a traced graph, among fake tensors or in a vmap."""
    traced = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x)
    return not traced and detect_fake_mode(x) is None


def check_choice(op: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise argument_error(op, argument, f"be one of {_quoted(choices)}", repr(value))


def check_flag(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise argument_error(op, argument, "be True or False", repr(value))


def check_divergence(op: str, divergence: Any, beta: Any) -> None:
    check_choice(op, "divergence", divergence, DIVERGENCES)
    if not _is_number(beta) or not 0.0 < beta < 1.0:
        remedy = 'for a pure KL use divergence="forward_kl" or "reverse_kl"'
        raise argument_error(op, "beta", "lie in (0, 1)", repr(beta), remedy)


def check_positive(
    op: str,
    argument: str,
    value: Any,
    *,
    optional: bool = False,
    none: str = "None switches it off",
) -> None:
    """A finite number above 0; with `optional`, None as well, which does what `none` says.

    Not so small or large that float32 loses logits which are multiplied or divided by it.
    """
    if optional and value is None:
        return
    # Comparisons alone, which torch.compile can guard on; NaN fails them.
    wanted = ""
    if not _is_number(value) or not 0 < value < math.inf:
        wanted = "be a finite number above 0"
    elif not SMALLEST <= value <= LARGEST:
        wanted = f"lie between {SMALLEST:g} and {LARGEST:g}"
    if wanted:
        raise argument_error(op, argument, wanted, repr(value), none if optional else "")


def check_softcap(
    op: str, argument: str, value: Any, temperature: float, *others: float | None
) -> None:
    """None, or a number above 0 that leaves the softcap a slope, at each of the temperatures."""
    check_positive(op, argument, value, optional=True)
    if value is None:
        return
    least = LEAST_SOFTCAP * max([1.0, temperature, *(t for t in others if t is not None)])
    if value < least:
        wanted = f"be at least {LEAST_SOFTCAP:g}, and {LEAST_SOFTCAP:g} of the temperature"
        raise argument_error(op, argument, wanted, repr(value), "None switches it off")


def check_above(op: str, argument: str, value: Any, bound: float, *, least: bool = False) -> None:
    """A number above `bound`, perhaps infinite; with `least`, or `bound` itself."""
    # Comparisons alone, as in `check_positive`.
    if not _is_number(value) or not (value > bound or (least and value == bound)):
        wanted = f"be a number {'of at least' if least else 'above'} {bound:g}"
        raise argument_error(op, argument, wanted, repr(value))


def check_count(op: str, argument: str, value: Any) -> None:
    """None, or an integer of at least 1."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        remedy = "None leaves it unset"
        raise argument_error(op, argument, "be an integer of at least 1", repr(value), remedy)
    if value > LARGEST_COUNT:
        raise argument_error(op, argument, f"be at most {LARGEST_COUNT}", repr(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
