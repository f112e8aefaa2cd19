"""impl="tiled" of the lens divergence and of the log-probability: no logits in memory at all.

    lens, kl's      one pass over the vocabulary                                       2S G
    lens, jsd       logsumexp of the teacher and of S students, then the divergence    3S + 1 G
    log-prob        one pass                                                           1 G
    gradients       logits again: 3S G to hidden, 2 G of log-prob; more with the weight's,
                    see `oisd_kernels.lens.tiled.gradient`

with G = one 2*N*D*V matmul: the JSD with its gradient to hidden takes 6S + 1, the chunked pass
2S + 1. It is for memory: the workspace is `max_bytes`, 32 MB by default, whatever N and V. Beside
it live the outputs, to which belong, where a gradient is wanted, two numbers a row and one a token
that the backward needs: both logsumexp and `<q, inner>`, 12 bytes a token at S = 1, where its
hidden state has 2*D. Rows of weight 0, and in the backward rows whose upstream gradient is 0, are
sorted to the end of a slab, where programs return at once: the host never waits for their number.
Deterministic.

Half precision goes to the tensor cores as it is, float32 (and mixed dtypes) as three tf32 products;
float64 has no tensor core here and runs in the interpreter alone.

Letters: S student layers, N tokens, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens.tiled.gradient import (
    Backward,
    Gradients,
    LensLoss,
    LogprobLoss,
    allocate_gradients,
)
from oisd_kernels.lens.tiled.tiles import INTERPRETED_KERNELS, Head, Scores
from oisd_kernels.lens.tiled.values import (
    LensValues,
    allocate_lens_values,
    lens_values,
    logprob_values,
)
from oisd_kernels.reference import LensStats, LinearLogprob

LENS, LOGPROB = "logit_lens_divergence", "linear_logprob"


def lens_divergence_tiled(
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
    max_bytes: int | None = None,
) -> Tensor | tuple[Tensor, LensStats]:
    """`oisd_kernels.logit_lens_divergence` without logits in memory; arguments as there.

    max_bytes: workspace beyond the outputs, 32 MB by default, and some 10 MB more that do not grow.
        A tensor whose last dimension is not contiguous is copied on top of it.

    Raises:
        ValueError: the tensors are on a CPU without TRITON_INTERPRET=1, one is float64 outside the
            interpreter, or the budget is too small for one token.
    """
    _check(LENS, hidden, teacher_hidden, weight, bias)
    compute = compute_dtype(hidden, teacher_hidden, weight, bias)
    layers = hidden if hidden.dim() == 3 else hidden[None]
    if not grad_weight:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    row_weight = None
    if token_weight is not None:
        row_weight = token_weight.detach().to(compute).expand(layers.shape[:-1])
    recording = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    rows = LensValues(
        *tiled_lens(
            layers,
            teacher_hidden.detach(),
            weight,
            bias,
            row_weight,
            divergence,
            float(beta),
            float(temperature),
            None if logit_softcap is None else float(logit_softcap),
            return_stats,
            recording,
            max_bytes,
        )
    )
    shape = hidden.shape[:-1]
    loss = rows.divergence
    if row_weight is not None:  # 0 * inf is NaN
        loss = torch.where(row_weight != 0, row_weight * loss, 0)
    loss = loss.view(shape)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        count = (
            max(shape.numel(), 1) if row_weight is None else (row_weight != 0).sum().clamp_min(1)
        )
        loss = loss / count
    if not return_stats:
        return loss
    per_row = (rows.student_entropy, rows.agreement, rows.divergence.detach())
    student_entropy, agreement, value = (x.view(shape) for x in per_row)
    return loss, LensStats(student_entropy, rows.teacher_entropy, agreement, value)


def linear_logprob_tiled(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    max_bytes: int | None = None,
) -> LinearLogprob:
    """`oisd_kernels.linear_logprob` without logits in memory; arguments as there.

    `max_bytes` and errors as in `lens_divergence_tiled`. A label outside [0, V) gives -inf.
    """
    _check(LOGPROB, hidden, hidden, weight, bias)
    softcap = None if logit_softcap is None else float(logit_softcap)
    got = tiled_logprob(hidden, weight, bias, labels, float(temperature), softcap, max_bytes)
    return LinearLogprob(*got)


def _check(op: str, hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.is_cuda:
        if compute_dtype(hidden, teacher, weight, bias) == torch.float64:
            wanted = 'have no float64 beside it with impl="tiled"'
            remedy = 'cast them to float32, or use impl="chunked"'
            raise checks.argument_error(op, "hidden", wanted, "float64", remedy)
    elif hidden.device.type == "cpu" and not INTERPRETED_KERNELS:
        remedy = "set TRITON_INTERPRET=1 before Triton is imported to try it on a CPU"
        wanted = 'be on a GPU with impl="tiled"'
        raise checks.argument_error(op, "hidden", wanted, hidden.device, remedy)


# The divergence of all rows, and its autograd.


@torch.library.custom_op("oisd_kernels::tiled_lens", mutates_args=())
def tiled_lens(
    hidden: Tensor,  # [S, N, D]
    teacher: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    row_weight: Tensor | None,  # [S, N]: rows of 0 are left out
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    stats: bool,
    gradient: bool,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`LensValues`."""
    compute = compute_dtype(hidden, teacher, weight, bias)
    with torch.no_grad():
        keep = hidden.new_ones((), dtype=torch.bool) if row_weight is None else row_weight != 0
        return lens_values(
            Head([hidden, teacher[None]], weight, bias, compute),
            keep.expand(hidden.shape[:-1]),
            divergence,
            beta,
            Scores(temperature, softcap),
            stats,
            gradient,
            max_bytes,
        )


@tiled_lens.register_fake
def _(
    hidden, teacher, weight, bias, row_weight, divergence, beta, temperature, softcap, stats,
    gradient, max_bytes,
):  # fmt: skip
    keep = hidden.new_empty(hidden.shape[:-1], dtype=torch.bool)
    return allocate_lens_values(keep, compute_dtype(hidden, teacher, weight, bias), gradient)


class _LensCall(NamedTuple):
    """The arguments of `tiled_lens`."""

    hidden: Tensor
    teacher: Tensor
    weight: Tensor
    bias: Tensor | None
    row_weight: Tensor | None
    divergence: str
    beta: float
    temperature: float
    softcap: float | None
    stats: bool
    gradient: bool
    max_bytes: int | None


def _setup_lens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, out = _LensCall(*inputs), LensValues(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*out[1:])
    ctx.save_for_backward(*call[:5], out.lse_q, out.lse_p, out.centre)
    ctx.options = call[5:]


def _lens_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_second_order()
    unused = [None] * (len(_LensCall._fields) - 4)
    if upstream[0] is None:
        return None, None, None, None, *unused
    *inputs, lse_q, lse_p, centre = ctx.saved_tensors
    call, wanted = _LensCall(*inputs, *ctx.options), ctx.needs_input_grad
    wanted = wanted[0], wanted[2], wanted[3]
    got = tiled_lens_gradient(
        upstream[0], *inputs, lse_q, lse_p, centre, call.divergence, call.beta,
        call.temperature, call.softcap, *wanted, call.max_bytes,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = _wanted(Gradients(*got), call.bias, wanted)
    return d_hidden, None, d_weight, d_bias, *unused


tiled_lens.register_autograd(_lens_backward, setup_context=_setup_lens)


@torch.library.custom_op("oisd_kernels::tiled_lens_gradient", mutates_args=())
def tiled_lens_gradient(
    factor: Tensor,  # [S, N]: upstream gradient; rows of 0 are left out
    hidden: Tensor,  # [S, N, D]
    teacher: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    row_weight: Tensor | None,  # [S, N]: rows of 0 are left out too
    lse_q: Tensor,  # [S, N]
    lse_p: Tensor,  # [N]
    centre: Tensor,  # [S, N]
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    to_hidden: bool,
    to_weight: bool,
    to_bias: bool,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Gradients` of sum(factor * divergence)."""
    head = Head([hidden, teacher[None]], weight, bias, lse_q.dtype)
    out = allocate_gradients(hidden, weight, lse_q.dtype, (to_hidden, to_weight, to_bias))
    loss, scores = LensLoss(divergence, beta, lse_p, lse_q, centre), Scores(temperature, softcap)
    with torch.no_grad():
        Backward(LENS, head, loss, factor, row_weight, scores, out, max_bytes).run()
    return out


@tiled_lens_gradient.register_fake
def _(
    factor, hidden, teacher, weight, bias, row_weight, lse_q, lse_p, centre, divergence, beta,
    temperature, softcap, to_hidden, to_weight, to_bias, max_bytes,
):  # fmt: skip
    return allocate_gradients(hidden, weight, lse_q.dtype, (to_hidden, to_weight, to_bias))


# The log-probability of labels, and its autograd.


@torch.library.custom_op("oisd_kernels::tiled_logprob", mutates_args=())
def tiled_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    temperature: float,
    softcap: float | None,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy, logsumexp, each [N]."""
    head = Head([hidden[None]], weight, bias, compute_dtype(hidden, weight, bias))
    with torch.no_grad():
        return logprob_values(head, labels, Scores(temperature, softcap), max_bytes)


@tiled_logprob.register_fake
def _(hidden, weight, bias, labels, temperature, softcap, max_bytes):
    compute = compute_dtype(hidden, weight, bias)
    return tuple(hidden.new_empty(len(hidden), dtype=compute) for _ in range(3))


def _setup_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, labels, output[2])
    ctx.options = options


def _logprob_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_second_order()
    unused = [None] * 4
    if upstream[0] is None:
        return None, None, None, *unused
    hidden, weight, bias, labels, logsumexp = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    temperature, softcap, max_bytes = ctx.options
    got = tiled_logprob_gradient(
        upstream[0], hidden, weight, bias, labels, logsumexp, temperature, softcap, *wanted,
        max_bytes,
    )  # fmt: skip
    return *_wanted(Gradients(*got), bias, wanted), *unused


tiled_logprob.register_autograd(_logprob_backward, setup_context=_setup_logprob)


@torch.library.custom_op("oisd_kernels::tiled_logprob_gradient", mutates_args=())
def tiled_logprob_gradient(
    factor: Tensor,  # [N]: upstream gradient; rows of 0 are left out
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    logsumexp: Tensor,  # [N]
    temperature: float,
    softcap: float | None,
    to_hidden: bool,
    to_weight: bool,
    to_bias: bool,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Gradients` of sum(factor * logprob)."""
    head = Head([hidden[None]], weight, bias, logsumexp.dtype)
    wanted = to_hidden, to_weight, to_bias
    out = allocate_gradients(hidden[None], weight, logsumexp.dtype, wanted)
    loss, scores = LogprobLoss(labels, logsumexp), Scores(temperature, softcap)
    with torch.no_grad():
        Backward(LOGPROB, head, loss, factor[None], None, scores, out, max_bytes).run()
    return out._replace(hidden=out.hidden.view(hidden.shape if to_hidden else (0,)))


@tiled_logprob_gradient.register_fake
def _(
    factor, hidden, weight, bias, labels, logsumexp, temperature, softcap, to_hidden, to_weight,
    to_bias, max_bytes,
):  # fmt: skip
    return allocate_gradients(hidden, weight, logsumexp.dtype, (to_hidden, to_weight, to_bias))


def _wanted(
    got: Gradients, bias: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        got.hidden if wanted[0] else None,
        got.weight if wanted[1] else None,
        got.bias.to(bias.dtype) if bias is not None and wanted[2] else None,
    )


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "oisd_kernels: the gradient of a fused loss cannot itself be differentiated "
            '(create_graph=True); use impl="reference"'
        )
