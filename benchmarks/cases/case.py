"""What a benchmark case is: inputs, implementations, least work, truth and bounds. Data only.

Letters: S student layers, N tokens, D width, V vocabulary, T queries, H query heads, J key heads,
K head dimension.

Rows of the inputs repeat with a prime period, so the float64 truth of one period holds for every
row: an error in any chunk shows, and truth stays affordable at any N. An implementation whose
result is out of bounds is reported as wrong and never timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Result = dict[str, Tensor]
Run = Callable[[], Result]

PERIOD = 127  # rows of the inputs that are distinct
QUICK, FULL = frozenset({"quick", "full"}), frozenset({"full"})  # suites that a case belongs to


class Absent(Exception):
    """An implementation cannot run here, which it finds out when it is run; says why."""


@dataclass(frozen=True)
class Bound:
    """Largest relative error ||x - truth|| / ||truth|| that counts as correct."""

    loss: float
    gradient: float
    nats: float = 1e-6  # a loss is also correct if no token's error exceeds this


# Ours, for float32 and bfloat16 inputs.
EXACT = {torch.float32: Bound(1e-5, 1e-4), torch.bfloat16: Bound(1e-4, 5e-3)}
# What a peer's arithmetic can reach: log-softmax autograd in float32; logits rounded to bf16, which
# costs 3-14 % of the gradient. The table shows the error beside the time.
PEER = {torch.float32: Bound(1e-3, 5e-2), torch.bfloat16: Bound(5e-2, 2.5e-1)}


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case."""

    name: str
    make: Callable[[Inputs], Run]
    """Binds the inputs; the function that it returns does the work once, gradients included."""
    absent: str | None = None
    """Why it cannot run here."""
    bound: Bound | None = None
    """Its own bound; None: the case's."""
    weighted: bool = True
    """Whether it takes a weight per token; one that does not is held to the unweighted truth."""
    needs: float = 0.0
    """Bytes that it is expected to take, if so many might get the process killed."""
    compiles: bool = False
    """Uses torch.compile, which takes minutes on some machines: left out of --quick."""
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A target: `metric` of `implementation` is at most `at_most` times that of `against`."""

    implementation: str
    metric: str  # "median_s", "peak_mib" or "workspace_mib", which excludes outputs
    at_most: float
    against: str | None = None  # None: `at_most` is absolute
    case: str | None = None  # of `against`, where it is another case


@dataclass(frozen=True)
class Yardstick:
    """A bare matmul of known size at the shapes of the case, timed in the same rounds."""

    run: Callable[[], object]
    flops: float


@dataclass(frozen=True)
class Case:
    """A piece of work that several implementations do."""

    name: str
    family: str
    device: str
    dtype: torch.dtype
    shape: Mapping[str, int]
    regime: str
    inputs: Callable[[], Inputs]
    truth: Callable[[Inputs], Result]
    implementations: Sequence[Implementation]
    yardstick: Callable[[Inputs], Yardstick]
    flops: float
    """Of the fewest matmuls that give the result."""
    bytes: float
    """Every input read and every output written once."""
    bound: Bound
    suites: frozenset[str] = FULL
    bars: Sequence[Bar] = ()
    seed: int = 0
    whole: bool = False
    """Peak memory includes the inputs (a model and its optimizer)."""
    check_inputs: Callable[[Inputs], Inputs] | None = None
    """Smaller inputs for the correctness check, if truth is too expensive at the case's own."""
    compiled: bool = False
    """Whether --quick includes implementations that compile, on a GPU."""
    checked_at: str = ""
    """What `check_inputs` made smaller."""


def gradients(loss: Tensor, upstream: Tensor | float, **leaves: Tensor) -> Result:
    """d_<name> of sum(loss * upstream) for each leaf."""
    found = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()))
    return {f"d_{name}": g for name, g in zip(leaves, found, strict=True)}


def forward_backward(
    forward: Callable[[], Tensor], upstream: Tensor | float = 1.0, **leaves: Tensor
) -> Run:
    """Runs `forward`, then its backward to the leaves, if there are any."""

    def run() -> Result:
        loss = forward()
        found = {"loss": loss.detach()}
        return found | gradients(loss, upstream, **leaves) if leaves else found

    return run


def own(op: Callable[..., Any], *arguments: Any, impl: str, **options: Any) -> Any:
    """An op of ours with `impl`; raises Absent with the op's message if that cannot run here."""
    try:
        return op(*arguments, impl=impl, **options)
    except ValueError as error:
        if "impl" not in str(error):
            raise
        raise Absent(str(error)) from error


def formula(
    ours: Callable[..., Run],
    impls: Sequence[str],
    eager: Callable[..., Run],
    dtype: torch.dtype,
    needs: float,
    compiled_needs: float,
) -> list[Implementation]:
    """Ours by each `impl`, and the formula in eager PyTorch, as it is and compiled."""
    return [
        *(Implementation(f"ours: {impl}", partial(ours, impl=impl),
                         needs=needs if impl == "reference" else 0.0) for impl in impls),
        Implementation("eager", partial(eager, compiled=False), bound=PEER[dtype], needs=needs),
        Implementation("torch.compile(eager)", partial(eager, compiled=True), bound=PEER[dtype],
                       needs=compiled_needs, compiles=True),
    ]  # fmt: skip


def leaves_of(
    given: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype | None
) -> dict[str, Any]:
    """A copy in float64 (or as it is) whose `names` receive gradient; weights stay float32."""
    out = {
        name: x if dtype is None or not x.is_floating_point() else x.to(dtype)
        for name, x in given.items()
    }
    return out | {name: out[name].detach().clone().requires_grad_() for name in names}


def seeded(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def periodic(rows: Tensor, count: int) -> Tensor:
    """rows [..., P, D] repeated to [..., count, D]."""
    index = torch.arange(count, device=rows.device) % rows.shape[-2]
    return rows.index_select(-2, index)


def period(count: int) -> int:
    return min(PERIOD, count)


REGIMES = ("random", "near", "peaked", "saturated")


def hidden_states(
    regime: str, layers: int, tokens: int, width: int, vocabulary: int, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Student [S, N, D], final [N, D] and unembedding [V, D] in float32, with realistic logits.

    random: logits of standard deviation 2. near: student 10 % away from the final layer.
    peaked: standard deviation 8, student and teacher disagree. saturated: a peaked teacher and a
    student within 3 % of the uniform entropy, as is typical of an early layer.
    """
    generator = seeded(seed, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows = period(tokens)
    weight = normal(vocabulary, width).mul_(width**-0.5)
    final, noise = normal(rows, width), normal(layers, rows, width)
    # Entropy of softmax over Gaussian logits is log V - variance / 2.
    flat = math.sqrt(2 * 0.027 * math.log(vocabulary))
    student, teacher = {
        "random": (2 * noise, 2 * final),
        "near": (4 * final + 0.4 * noise, 4 * final),
        "peaked": (8 * noise, 8 * final),
        "saturated": (flat * noise, 6 * final),
    }[regime]
    return periodic(student, tokens), periodic(teacher, tokens), weight


def token_weights(tokens: int, device: str, seed: int, dropped: float = 0.0) -> Tensor:
    """Signed weights [N] like GRPO's advantages; the share `dropped` of them is 0."""
    generator = seeded(seed + 1, device)
    weight = torch.randn(tokens, generator=generator, device=device)
    weight = weight.sign() * weight.abs().clamp_min(0.1)
    drop = torch.rand(tokens, generator=generator, device=device) < dropped
    return weight.masked_fill(drop, 0.0)


def errors(found: Result, truth: Result) -> dict[str, float]:
    """Relative error of each result; NaN if it is not finite, or if the truth is 0 or of another
    shape."""
    out = {}
    for name, x in found.items():
        want = truth[name]
        x = x.detach().to(want.dtype)
        if name == "loss" and x.dim() == 0 and want.dim() > 0:
            x, want, scale = x, want.sum(), want.abs().sum()
        else:
            scale = want.norm()
        same = x.shape == want.shape and bool(x.isfinite().all()) and float(scale) > 0
        out[name] = float((x - want).norm() / scale) if same else math.nan
    return out


def worst_nats(found: Result, truth: Result) -> float:
    """Largest difference of a token's loss in nats; infinite where losses are not by token."""
    x, want = found.get("loss"), truth["loss"]
    if x is None or x.shape != want.shape or x.dim() == 0:
        return math.inf
    return float((x.detach().to(want.dtype) - want).abs().max()) if x.numel() else 0.0


def expected(truth: Result, weighted: bool, factor: Tensor | None) -> Result:
    """Truth as an implementation should return it: rows times their weight, if it takes weights.

    The weighted truth of a sum over rows is under "weighted <name>".
    """
    plain = {name: x for name, x in truth.items() if not name.startswith("weighted ")}
    if factor is None or not weighted:
        return plain
    out = {}
    for name, x in plain.items():
        if f"weighted {name}" in truth:
            out[name] = truth[f"weighted {name}"]
        else:
            per_token = factor.to(x.dtype)
            out[name] = x * (per_token[:, None] if name.startswith("d_") else per_token)
    return out


def verdict(found: Result, truth: Result, bound: Bound) -> tuple[dict[str, float], str]:
    """(relative errors, what is wrong or "")."""
    if not found:
        return {}, "returned nothing to check"
    measured = errors(found, truth)
    for name, error in measured.items():
        limit = bound.gradient if name.startswith("d_") else bound.loss
        if error <= limit:  # NaN is not
            continue
        if name == "loss" and worst_nats(found, truth) <= bound.nats:
            continue
        return measured, f"{name} is {error:.1e} off (relative), bound {limit:.0e}"
    return measured, ""


def size(tensors: Iterable[Any]) -> float:
    """Bytes of the tensors among `tensors`."""
    return float(sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor)))
