"""Divergence between a student layer's and the final layer's next-token distributions.

    q = softmax(cap(hidden @ weight.T + bias) / temperature)                    student
    p = softmax(cap(teacher_hidden @ weight.T + bias) / temperature)            teacher, detached
    loss = token_weight * divergence(p, q)

cap(z) = c * tanh(z / c) where logit_softcap = c is given, else z. The divergences are those of
`oisd_kernels.reference`; jsd with beta = 1/2 is eq. 7 of arXiv 2605.29089, and the projection is
its eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.head_loop import HeadPass
from oisd_kernels.lens.chunked.head_pass import NO_POLICY, head_pass
from oisd_kernels.lens.vocab_parallel import Part
from oisd_kernels.reference import LensStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "logit_lens_divergence"
NAMES = ("reference", "chunked", "tiled")


class LensTop(NamedTuple):
    """What the pass over the rows sees of their likeliest tokens; the first of equals."""

    student_token: Tensor  # [S, N] int64
    student_logprob: Tensor  # [S, N]
    teacher_token: Tensor  # [N] int64
    teacher_logprob: Tensor  # [N]


def _chunked_pass(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    token_weight: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    logit_softcap: float | None,
    reduction: str,
    grad_weight: bool,
    return_stats: bool,
    max_bytes: int | None,
    part: Part | None = None,
) -> HeadPass:
    compute = compute_dtype(hidden, teacher_hidden, weight, bias)
    part = part or vocab_parallel.whole(weight, bias)
    capacity = chunks.row_capacity(
        OP, max_bytes, hidden.device, part.largest, weight.shape[1], compute.itemsize, 2,
        bool(part.group),
    )  # fmt: skip
    layers = hidden if hidden.dim() == 3 else hidden[None]
    factor = None
    if token_weight is not None:
        factor = token_weight.detach().to(compute).expand(layers.shape[:-1])
    if not grad_weight:
        weight, bias = weight.detach(), None if bias is None else bias.detach()

    recording = torch.is_grad_enabled()
    to_weight = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    reduce = reduction != "none"
    later = to_weight and not reduce
    return HeadPass(
        *head_pass(
            layers,
            teacher_hidden.detach(),
            weight,
            bias,
            labels=None,
            factor=factor,
            final_factor=None,
            **NO_POLICY,
            divergence=divergence,
            beta=float(beta),
            temperature=float(temperature),
            final_temperature=float(temperature),
            softcap=None if logit_softcap is None else float(logit_softcap),
            capacity=capacity,
            drop=factor is not None,
            reduce=reduce,
            hidden_grad=recording and hidden.requires_grad and not later,
            final_grad=False,
            hidden_weight_grad=to_weight and not later,
            final_weight_grad=False,
            hidden_later=later,
            final_later=False,
            stats=return_stats,
            group=part.group,
            start=part.start,
        )
    )


def _chunked(
    hidden: Tensor,
    *inputs: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    return_stats: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, LensStats]:
    out = _chunked_pass(
        hidden,
        *inputs,
        token_weight=token_weight,
        reduction=reduction,
        return_stats=return_stats,
        **options,
    )
    rows = hidden.shape[:-1]
    loss = out.loss if reduction != "none" else out.loss.view(rows)
    if reduction == "mean":
        count = max(rows.numel(), 1)
        if token_weight is not None:
            count = (token_weight.to(loss.dtype) != 0).expand(rows).sum().clamp_min(1)
        loss = loss / count
    return (loss, _stats(out, rows)) if return_stats else loss


def _stats(out: HeadPass, rows: torch.Size) -> LensStats:
    return LensStats(
        out.student_entropy.view(rows),
        out.final_entropy,
        out.agreement.view(rows),
        out.divergence.view(rows),
    )


def _tiled(*inputs: Tensor, **options: Any) -> Tensor | tuple[Tensor, LensStats]:
    from oisd_kernels.lens.tiled.op import (
        lens_divergence_tiled,  # triton is not to be had on every CPU
    )

    return lens_divergence_tiled(*inputs, **options)


# In order of preference: "auto" takes the first. Each takes every argument but `impl`.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "chunked": _chunked,
    "reference": reference.logit_lens_divergence,
    "tiled": _tiled,
}


@overload
def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: Literal[False] = False,
    impl: str = "auto",
    max_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor: ...


@overload
def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: Literal[True],
    impl: str = "auto",
    max_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> tuple[Tensor, LensStats]: ...


def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    grad_weight: bool = False,
    return_stats: bool = False,
    impl: str = "auto",
    max_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, LensStats]:
    """Signed, weighted divergence of logit-lens distributions from the final layer's, per token.

    Args:
        hidden: [S, N, D] or [N, D], student hidden states after the final norm. Receives gradient.
        teacher_hidden: [N, D], final hidden state after the final norm. Receives none.
        weight: [V, D], the unembedding.
        bias: [V].
        token_weight: [N] or [S, N], signed, any float dtype; receives no gradient. Rows of weight 0
            are dropped before any matmul: they cost nothing, give 0 and pass no gradient on, even
            if they hold NaN.
        divergence: "jsd", "forward_kl" = KL(teacher||student), "reverse_kl" = KL(student||teacher).
        beta: the teacher's share of the mixture of "jsd", in (0, 1).
        temperature: divides the logits, above 0.
        logit_softcap: c of c * tanh(logits / c), above 0, applied before the temperature.
        reduction: "none"; "sum"; "mean", which divides by the number of rows of weight other than 0
            (the result is 0 if there is none).
        grad_weight: let the student branch pass gradient to `weight` and `bias`.
        return_stats: also return `LensStats`.
        impl: "chunked", which "auto" takes: a chunk of tokens at a time, 2S+1 matmuls of 2*N*D*V
            with gradient to `hidden`, 3S+1 with `grad_weight`, but 4S+2 for reduction="none" with
            `grad_weight`, whose backward runs again. Its gradient cannot be differentiated. Waits
            once for the device where there is a `token_weight`. "reference": all logits in memory,
            plain autograd. "tiled": projection and divergence in one Triton kernel, no logits in
            memory whatever N and V. Its values take 3S+1 matmuls for "jsd" and 2S for the KLs, its
            gradient 3S more to `hidden`, 4S with a float32 `weight` besides, 6S with one in half
            precision. Never waits for the device; an error on a CPU.
        max_bytes: workspace budget of "chunked" and "tiled" in bytes, beside inputs, outputs and
            their gradients. Default for "chunked" 1.25 GiB on CUDA, 96 MiB on a CPU, or one token
            where that is more; for "tiled" 32 MiB.
        tp_group: the process group that has the vocabulary in parts; `weight` and `bias` are then
            this rank's rows, [rows, D] and [rows], in the group's order, of any number. A DTensor
            with Shard(0) over a mesh dimension named "tp" needs no `tp_group`, see
            `oisd_kernels.lens.vocab_parallel`. The other arguments must be the same on every rank.
            So are the results and the gradient to `hidden`, which is summed over the ranks; that to
            `weight` and `bias` is of this rank's rows. "chunked" alone; torch.compile breaks its
            graph here.

    Returns:
        token_weight * divergence in nats, [S, N] (or [N], as `hidden`), or a scalar. float32;
        float64 if hidden, teacher_hidden, weight or bias is. With `return_stats`, (loss, stats).

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: arXiv 2605.29089, eq. 6 and 7; the weight is its clipped advantage.
    """
    _check_states(hidden, teacher_hidden)
    if token_weight is not None:
        *layers, tokens, _ = hidden.shape
        checks.check_dims(OP, "token_weight", token_weight, {1: "[N]", 2: "[S, N]"})
        per_layer = bool(layers) and token_weight.dim() == 2
        layout, sizes = ("[S, N]", (*layers, tokens)) if per_layer else ("[N]", (tokens,))
        checks.check_tensor(OP, "token_weight", token_weight, layout, sizes, device=hidden.device)
    checks.check_divergence(OP, divergence, beta)
    checks.check_positive(OP, "temperature", temperature)
    checks.check_positive(OP, "logit_softcap", logit_softcap, optional=True)
    checks.check_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    checks.check_flag(OP, "grad_weight", grad_weight)
    checks.check_flag(OP, "return_stats", return_stats)
    checks.check_count(OP, "max_bytes", max_bytes)
    run = checks.choose(OP, impl, IMPLEMENTATIONS, NAMES)
    part = vocab_parallel.part(OP, hidden, weight, bias, tp_group, grad_weight)
    return vocab_parallel.bind(OP, impl, run, part)(
        hidden,
        teacher_hidden,
        part.weight,
        bias=part.bias,
        token_weight=token_weight,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        logit_softcap=logit_softcap,
        reduction=reduction,
        grad_weight=grad_weight,
        return_stats=return_stats,
        max_bytes=max_bytes,
    )


def _check_states(hidden: Tensor, teacher_hidden: Tensor) -> None:
    checks.check_dims(OP, "hidden", hidden, {2: "[N, D]", 3: "[S, N, D]"})
    *layers, tokens, width = hidden.shape
    shape = "[S, N, D]" if layers else "[N, D]"
    checks.check_tensor(OP, "hidden", hidden, shape, hidden.shape)
    checks.check_tensor(
        OP, "teacher_hidden", teacher_hidden, "[N, D]", (tokens, width), device=hidden.device
    )


@torch.no_grad()
def lens_with_top(
    hidden: Tensor,  # [S, N, D]
    teacher_hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,  # [V]
    divergence: str = "jsd",
    beta: float = 0.5,
    logit_softcap: float | None = None,
) -> tuple[LensStats, LensTop]:
    """The statistics of `logit_lens_divergence` and, from the same pass, the likeliest tokens."""
    _check_states(hidden, teacher_hidden)
    checks.check_divergence(OP, divergence, beta)
    checks.check_positive(OP, "logit_softcap", logit_softcap, optional=True)
    part = vocab_parallel.part(OP, hidden, weight, bias, None, False)
    out = _chunked_pass(
        hidden, teacher_hidden, part.weight, bias=part.bias, token_weight=None,
        divergence=divergence, beta=beta, temperature=1.0, logit_softcap=logit_softcap,
        reduction="none", grad_weight=False, return_stats=True, max_bytes=None, part=part,
    )  # fmt: skip
    top = out.student_top1, out.student_top_logprob, out.final_top1, out.final_top_logprob
    return _stats(out, hidden.shape[:-1]), LensTop(*top)
