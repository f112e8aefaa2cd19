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
from oisd_kernels.op import custom_op, keep, kept
from oisd_kernels.reference import LinearLogprob

LENS, LOGPROB = "logit_lens_divergence", "linear_logprob"


def check(op: str, hidden: Tensor, compute: torch.dtype) -> None:
    """Raises ValueError on a CPU without TRITON_INTERPRET=1, and for float64 outside of it."""
    if hidden.is_cuda:
        if compute == torch.float64:
            wanted = 'have no float64 beside it with impl="tiled"'
            remedy = 'cast them to float32, or use impl="chunked"'
            raise checks.argument_error(op, "hidden", wanted, "float64", remedy)
    elif hidden.device.type == "cpu" and not INTERPRETED_KERNELS:
        remedy = "set TRITON_INTERPRET=1 before Triton is imported to try it on a CPU"
        wanted = 'be on a GPU with impl="tiled"'
        raise checks.argument_error(op, "hidden", wanted, hidden.device, remedy)


# The divergence of all rows.


class LensCall(NamedTuple):
    hidden: Tensor  # [S, N, D]
    teacher: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    row_weight: Tensor | None  # [S, N]: rows of 0 are left out
    divergence: str
    beta: float
    temperature: float
    softcap: float | None
    max_bytes: int | None
    stats: bool
    gradient: bool  # one will be wanted


def _run_lens(call: LensCall) -> LensValues:
    head = Head([call.hidden, call.teacher[None]], call.weight, call.bias, _lens_dtype(call))
    wanted = call.hidden.new_ones((), dtype=torch.bool)
    if call.row_weight is not None:
        wanted = call.row_weight != 0
    wanted, scores = wanted.expand(call.hidden.shape[:-1]), Scores(call.temperature, call.softcap)
    return lens_values(
        head, wanted, call.divergence, call.beta, scores, call.stats, call.gradient, call.max_bytes
    )


def _allocate_lens(call: LensCall) -> LensValues:
    rows = call.hidden.new_empty(call.hidden.shape[:-1], dtype=torch.bool)
    return allocate_lens_values(rows, _lens_dtype(call), call.gradient)


def _lens_dtype(call: LensCall) -> torch.dtype:
    return compute_dtype(call.hidden, call.teacher, call.weight, call.bias)


def _save_lens(ctx: Any, call: LensCall, out: LensValues) -> None:
    ctx.mark_non_differentiable(*out[1:])
    keep(ctx, call, (out.lse_q, out.lse_p, out.centre))


def _lens_backward(ctx: Any, upstream: LensValues) -> dict[str, Tensor | None]:
    call, (lse_q, lse_p, centre) = kept(ctx)
    return _gradients(
        GradientCall(
            LENS, upstream.divergence, call.hidden, call.teacher, call.weight, call.bias,
            call.row_weight, None, lse_q, lse_p, centre, None, call.divergence, call.beta,
            call.temperature, call.softcap, call.max_bytes, ctx.wanted.hidden, ctx.wanted.weight,
            ctx.wanted.bias,
        )
    )  # fmt: skip


tiled_lens = custom_op(
    "tiled_lens", LensCall, LensValues, _run_lens, _allocate_lens, _save_lens, _lens_backward
)


# The log-probability of labels.


class LogprobCall(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]; one outside [0, V) gives -inf
    temperature: float
    softcap: float | None
    max_bytes: int | None


def _run_logprob(call: LogprobCall) -> LinearLogprob:
    compute = compute_dtype(call.hidden, call.weight, call.bias)
    head = Head([call.hidden[None]], call.weight, call.bias, compute)
    scores = Scores(call.temperature, call.softcap)
    return LinearLogprob(*logprob_values(head, call.labels, scores, call.max_bytes))


def _allocate_logprob(call: LogprobCall) -> LinearLogprob:
    compute, tokens = compute_dtype(call.hidden, call.weight, call.bias), len(call.hidden)
    return LinearLogprob(*(call.hidden.new_empty(tokens, dtype=compute) for _ in range(3)))


def _save_logprob(ctx: Any, call: LogprobCall, out: LinearLogprob) -> None:
    ctx.mark_non_differentiable(out.entropy, out.logsumexp)
    keep(ctx, call, (out.logsumexp, out.logprob))


def _logprob_backward(ctx: Any, upstream: LinearLogprob) -> dict[str, Tensor | None]:
    call, (logsumexp, logprob) = kept(ctx)
    got = _gradients(
        GradientCall(
            LOGPROB, upstream.logprob[None], call.hidden[None], None, call.weight, call.bias,
            None, call.labels, logsumexp[None], None, None, logprob, "", 0.0, call.temperature,
            call.softcap, call.max_bytes, ctx.wanted.hidden, ctx.wanted.weight, ctx.wanted.bias,
        )
    )  # fmt: skip
    d_hidden = got["hidden"]
    return got if d_hidden is None else got | {"hidden": d_hidden[0]}


tiled_logprob = custom_op(
    "tiled_logprob",
    LogprobCall,
    LinearLogprob,
    _run_logprob,
    _allocate_logprob,
    _save_logprob,
    _logprob_backward,
)


# The gradient of both.


class GradientCall(NamedTuple):
    op: str  # for messages
    factor: Tensor  # [S, N]: upstream gradient; rows of 0 are left out
    hidden: Tensor  # [S, N, D]
    teacher: Tensor | None  # [N, D]; None for the log-probability
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    row_weight: Tensor | None  # [S, N]: rows of 0 are left out too
    labels: Tensor | None  # [N], of the log-probability
    lse_q: Tensor  # [S, N], of `hidden`
    lse_p: Tensor | None  # [N], of `teacher`
    centre: Tensor | None  # [S, N], as `LensValues` has it
    logprob: Tensor | None  # [N], of the labels
    divergence: str
    beta: float
    temperature: float
    softcap: float | None
    max_bytes: int | None
    to_hidden: bool
    to_weight: bool
    to_bias: bool


def _run_gradient(call: GradientCall) -> Gradients:
    if call.labels is not None:
        assert call.logprob is not None
        loss = LogprobLoss(call.labels, call.lse_q[0], -call.logprob.expm1())
        states = [call.hidden]
    else:
        assert call.teacher is not None and call.lse_p is not None and call.centre is not None
        states = [call.hidden, call.teacher[None]]
        loss = LensLoss(call.divergence, call.beta, call.lse_p, call.lse_q, call.centre)
    head, out = Head(states, call.weight, call.bias, call.lse_q.dtype), _allocate_gradient(call)
    scores = Scores(call.temperature, call.softcap)
    Backward(call.op, head, loss, call.factor, call.row_weight, scores, out, call.max_bytes).run()
    return out


def _allocate_gradient(call: GradientCall) -> Gradients:
    wanted = call.to_hidden, call.to_weight, call.to_bias
    return allocate_gradients(call.hidden, call.weight, call.lse_q.dtype, wanted)


tiled_gradient = custom_op(
    "tiled_gradient", GradientCall, Gradients, _run_gradient, _allocate_gradient
)


def _gradients(call: GradientCall) -> dict[str, Tensor | None]:
    got = Gradients(*tiled_gradient(*call))
    return {
        "hidden": got.hidden if call.to_hidden else None,
        "weight": got.weight if call.to_weight else None,
        "bias": got.bias if call.to_bias else None,
    }
