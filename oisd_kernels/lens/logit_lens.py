"""Divergence between a student layer's and the final layer's next-token distributions.

    q = softmax(cap(hidden @ weight.T + bias) / temperature)                    student
    p = softmax(cap(teacher_hidden @ weight.T + bias) / temperature)            teacher, detached
    loss = token_weight * divergence(p, q)

cap(z) = c * tanh(z / c) where logit_softcap = c is given, else z. The divergences are those of
`oisd_kernels.reference`; jsd with beta = 1/2 is eq. 7 of arXiv 2605.29089, and the projection is
its eq. 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked.head_pass import head_pass
from oisd_kernels.lens.chunked.record import HeadCall, HeadResult
from oisd_kernels.lens.token_weight import row_count, row_weight
from oisd_kernels.op import untransformed
from oisd_kernels.reference import LensStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from oisd_kernels.lens.tiled.values import LensValues

OP = "logit_lens_divergence"
IMPLEMENTATIONS = ("auto", "chunked", "reference", "tiled")


class LensTop(NamedTuple):
    """What the pass over the rows sees of their likeliest tokens; the first of equals."""

    student_token: Tensor  # [S, N] int64
    student_logprob: Tensor  # [S, N]
    teacher_token: Tensor  # [N] int64
    teacher_logprob: Tensor  # [N]


@overload
def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def logit_lens_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[Tensor, LensStats]: ...


def logit_lens_divergence(  # pyright: ignore[reportInconsistentOverload]  # shorter
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
        logit_softcap: c of c * tanh(logits / c), applied before the temperature; at least 0.01, and
            0.01 of the temperature.
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
    checks.check_token_weight(OP, token_weight, hidden)
    checks.check_divergence(OP, divergence, beta)
    checks.check_positive(OP, "temperature", temperature)
    checks.check_softcap(OP, "logit_softcap", logit_softcap, temperature)
    checks.check_choice(OP, "reduction", reduction, checks.REDUCTIONS)
    checks.check_flag(OP, "grad_weight", grad_weight)
    checks.check_flag(OP, "return_stats", return_stats)
    checks.check_count(OP, "max_bytes", max_bytes)
    checks.check_choice(OP, "impl", impl, IMPLEMENTATIONS)
    part = vocab_parallel.part(OP, hidden, weight, bias, tp_group, grad_weight)
    part.check_impl(OP, impl)
    if impl == "reference":
        return reference.logit_lens_divergence(
            hidden, teacher_hidden, part.weight, bias=part.bias, token_weight=token_weight,
            divergence=divergence, beta=beta, temperature=temperature, logit_softcap=logit_softcap,
            reduction=reduction, grad_weight=grad_weight, return_stats=return_stats,
        )  # fmt: skip
    if not grad_weight:
        part = part.detach()
    layers, teacher = hidden if hidden.dim() == 3 else hidden[None], teacher_hidden.detach()
    compute = checks.compute_dtype(hidden, teacher, part.weight, part.bias)
    weight_of_row = row_weight(token_weight, layers, compute)
    reduce = reduction != "none"
    if impl == "tiled":
        # Triton may be missing on CPU-only machines.
        from oisd_kernels.lens.tiled import op as tiled

        tiled.check(OP, hidden, compute)
        recording = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (hidden, part.weight, part.bias)
        )
        call = tiled.LensCall(
            layers, teacher, part.weight, part.bias, weight_of_row, divergence, beta, temperature,
            logit_softcap, max_bytes, return_stats, recording,
        )  # fmt: skip
        out = tiled.LensValues(*tiled.tiled_lens(*untransformed(call)))
        loss = out.divergence
        if weight_of_row is not None:  # 0 * inf is NaN
            loss = torch.where(weight_of_row != 0, weight_of_row * loss, 0)
        loss = loss.sum() if reduce else loss
    else:
        call = HeadCall(
            layers, teacher, part.weight, part.bias, factor=weight_of_row, divergence=divergence,
            beta=beta, temperature=temperature, softcap=logit_softcap, reduce=reduce,
            stats=return_stats,
        ).complete(OP, part, max_bytes, grad_weight)  # fmt: skip
        out = HeadResult(*head_pass(*untransformed(call)))
        loss = out.loss
    if not reduce:
        loss = loss.view(hidden.shape[:-1])
    if reduction == "mean":
        loss = loss / row_count(weight_of_row, layers)
    return (loss, lens_stats(out, hidden)) if return_stats else loss


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
    checks.check_softcap(OP, "logit_softcap", logit_softcap, 1.0)
    part = vocab_parallel.part(OP, hidden, weight, bias, None, False)
    call = HeadCall(
        hidden, teacher_hidden, part.weight, part.bias, divergence=divergence, beta=beta,
        softcap=logit_softcap, stats=True,
    ).complete(OP, part, None, False)  # fmt: skip
    out = HeadResult(*head_pass(*untransformed(call)))
    top = out.student_top1, out.student_top_logprob, out.final_top1, out.final_top_logprob
    return lens_stats(out, hidden), LensTop(*top)


def lens_stats(out: HeadResult | LensValues, hidden: Tensor) -> LensStats:
    rows = hidden.shape[:-1]
    return LensStats(
        out.student_entropy.view(rows),
        out.teacher_entropy,
        out.agreement.view(rows),
        out.divergence.detach().view(rows),
    )


def _check_states(hidden: Tensor, teacher_hidden: Tensor) -> None:
    checks.check_layers(OP, "hidden", hidden)
    sizes, device = hidden.shape[-2:], hidden.device
    checks.check_tensor(OP, "teacher_hidden", teacher_hidden, "[N, D]", sizes, device=device)
