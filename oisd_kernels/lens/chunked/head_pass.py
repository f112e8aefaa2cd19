"""One chunked pass over the unembedding: final-layer statistics, divergences, gradients.

`logit_lens_divergence`, `linear_logprob` and `policy_head` are this op with parts left out. The
final logits of a chunk are computed once; each layer's logits become their gradient in place. With
G = one 2*N*D*V matmul the cost is

    1 + S           values
    + S, + 1        gradient to `hidden`, to `final`
    + S, + 1        gradient to `weight` through `hidden`, through `final`

The gradient is computed in the forward where that is exact: to `hidden` and `final` always, because
an upstream gradient scales their rows; to `weight` where the upstream gradient is one number, which
is so for a reduced divergence and for the policy loss. Otherwise the backward runs the pass again
with the upstream gradient folded into the factors.

Letters: S student layers, N tokens, D width, V vocabulary, C tokens and R student rows of a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.head_loop import HeadLoop, HeadPass, allocate
from oisd_kernels.lens.chunked.rows_torch import RowMath
from oisd_kernels.lens.policy_loss import PolicyTerms

NO_POLICY: dict[str, Any] = {
    "advantage": None,
    "loss_weight": None,
    "old_logprob": None,
    "rollout_logprob": None,
    "ref_logprob": None,
    "policy_options": (),
}


@torch.library.custom_op("oisd_kernels::head_pass", mutates_args=())
def head_pass(
    hidden: Tensor,  # [S, N, D]
    final: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [N]
    factor: Tensor | None,  # [S, N]; None for ones
    final_factor: Tensor | None,  # [N]; None for ones
    advantage: Tensor | None,  # [N], and with it the terms of `policy_loss`, [N] each
    loss_weight: Tensor | None,
    old_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    policy_options: Sequence[float],  # clip_low, clip_high, dual_clip, tis_cap, kl_coef
    divergence: str,
    beta: float,
    temperature: float,  # of the divergence
    final_temperature: float,  # of the log-probability
    softcap: float | None,
    capacity: int,  # rows of logits in memory
    drop: bool,  # leave out rows whose factor is 0
    reduce: bool,  # loss is a sum
    hidden_grad: bool,
    final_grad: bool,
    hidden_weight_grad: bool,  # d_weight through `hidden`
    final_weight_grad: bool,  # d_weight through `final`
    hidden_later: bool,  # the backward runs the pass again for d_hidden and d_weight
    final_later: bool,  # the same for d_final and d_weight
    stats: bool,  # entropies, agreement, likeliest tokens
    group: str = "",  # name of the process group that has the vocabulary in parts; "" for none
    start: int = 0,  # this rank's first row of `weight` among all; `labels` count from the first
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    del hidden_later, final_later
    assert advantage is None or not hidden_weight_grad, "two upstream gradients, one d_weight"
    math_ = RowMath(divergence, beta, temperature, softcap)
    terms = None
    if advantage is not None:
        assert loss_weight is not None
        clip_low, clip_high, dual_clip, tis_cap, kl_coef = policy_options
        terms = PolicyTerms(
            advantage, loss_weight, old_logprob, rollout_logprob, ref_logprob, clip_low, clip_high,
            dual_clip, tis_cap, kl_coef,
        )  # fmt: skip
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        out = allocate(
            hidden, final, weight, bias, labels, reduce, hidden_grad, final_grad,
            hidden_weight_grad or final_weight_grad, stats,
        )  # fmt: skip
        layers, tokens, _ = hidden.shape
        dropping = factor if drop else None
        plan = chunks.plan(layers, tokens, dropping, labels is not None, capacity)
        run = HeadLoop(
            hidden, final, weight, bias, labels, factor, final_factor, terms, math_,
            final_temperature, plan, out, group, start,
        )  # fmt: skip
        student_grad = hidden_grad, hidden_weight_grad
        for chunk in plan.chunks:
            run.chunk(chunk, capacity, student_grad, (final_grad, final_weight_grad), stats)
        rows = out.divergence if factor is None else out.divergence * factor
        loss = rows.sum() if reduce else rows.clone() if rows is out.divergence else rows
        return out._replace(loss=loss)


@head_pass.register_fake
def _(
    hidden, final, weight, bias, labels, factor, final_factor, advantage, loss_weight, old_logprob,
    rollout_logprob, ref_logprob, policy_options, divergence, beta, temperature, final_temperature,
    softcap, capacity, drop, reduce, hidden_grad, final_grad, hidden_weight_grad,
    final_weight_grad, hidden_later, final_later, stats, group="", start=0,
):  # fmt: skip
    weight_grad = hidden_weight_grad or final_weight_grad
    return allocate(
        hidden, final, weight, bias, labels, reduce, hidden_grad, final_grad, weight_grad, stats
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, out = _Call(*inputs), HeadPass(*output)
    ctx.set_materialize_grads(False)  # zeros for d_weight would be as large as it
    ctx.mark_non_differentiable(
        *(x for name, x in out._asdict().items() if name not in _differentiable(call))
    )
    later = call.hidden_later or call.final_later
    tensors = call[:7] if later else (None,) * 7
    ctx.save_for_backward(*tensors, *out[_FIRST_GRADIENT:])
    # `_again` needs no terms of the policy loss, whose gradient never waits for the backward.
    ctx.options = call._replace(**NO_POLICY)[7:]
    ctx.dtypes = call.weight.dtype, None if call.bias is None else call.bias.dtype


def _differentiable(call: "_Call") -> tuple[str, str]:
    return "loss", "logprob" if call.advantage is None else "policy_loss"


def _backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "oisd_kernels: the gradient of a fused loss cannot itself be differentiated "
            '(create_graph=True); use impl="reference"'
        )
    saved = ctx.saved_tensors
    call = _Call(*saved[:7], *ctx.options)
    g = HeadPass(*upstream)  # None where nothing flows
    unsaved: Any = [None] * _FIRST_GRADIENT
    out = HeadPass(*unsaved, *saved[7:])
    grad = _Gradients()
    if g.loss is not None and not call.hidden_later:
        grad.hidden = _scale_rows(out.d_hidden, out.d_hidden_scale, g.loss)
        if call.hidden_weight_grad:
            grad.weight, grad.bias = out.d_weight * g.loss, out.d_bias * g.loss
    g_final = g.policy_loss if g.logprob is None else g.logprob
    if g_final is not None and not call.final_later:
        grad.final = _scale_rows(out.d_final, out.d_final_scale, g_final)
        if call.final_weight_grad:
            grad.weight, grad.bias = out.d_weight * g_final, out.d_bias * g_final
    hidden_later = g.loss is not None and call.hidden_later
    final_later = g.logprob is not None and call.final_later
    if hidden_later or final_later:
        again = _again(call, g, hidden_later, final_later, ctx.needs_input_grad)
        if hidden_later:
            grad.hidden = _scale_rows(again.d_hidden, again.d_hidden_scale, None)
        if final_later:
            grad.final = _scale_rows(again.d_final, again.d_final_scale, None)
        grad.weight = _sum(grad.weight, again.d_weight)
        grad.bias = _sum(grad.bias, again.d_bias)
    weight_dtype, bias_dtype = ctx.dtypes
    wanted = ctx.needs_input_grad
    return (
        grad.hidden if wanted[0] else None,
        grad.final if wanted[1] else None,
        grad.weight.to(weight_dtype) if wanted[2] and grad.weight is not None else None,
        grad.bias.to(bias_dtype) if wanted[3] and grad.bias is not None else None,
        *[None] * (len(_Call._fields) - 4),
    )


def _again(
    call: "_Call", g: HeadPass, hidden_later: bool, final_later: bool, wanted: tuple[bool, ...]
) -> HeadPass:
    """The pass with the upstream gradients folded into its factors."""
    hidden, factor = call.hidden, None
    if hidden_later:
        factor = g.loss.expand(hidden.shape[:-1])
        factor = factor if call.factor is None else factor * call.factor
    else:
        hidden = hidden[:0]
    weight_wanted = wanted[2] or wanted[3]
    again = call._replace(
        hidden=hidden,
        factor=factor,
        labels=call.labels if final_later else None,
        final_factor=g.logprob if final_later else None,
        drop=call.drop and hidden_later,
        reduce=False,
        hidden_grad=wanted[0] and hidden_later,
        final_grad=wanted[1] and final_later,
        hidden_weight_grad=weight_wanted and hidden_later,
        final_weight_grad=weight_wanted and final_later,
        hidden_later=False,
        final_later=False,
        stats=False,
    )
    return HeadPass(*head_pass(*again))


def _scale_rows(d_rows: Tensor, scale: Tensor, g: Tensor | None) -> Tensor:
    """d_rows [..., D] times scale [...] and the upstream gradient [...], or one number."""
    if scale.numel() > 0:
        g = scale if g is None else scale * g
    if g is None:
        return d_rows
    g = g if g.dim() == 0 else g[..., None]
    return torch.mul(d_rows, g, out=torch.empty_like(d_rows)) if d_rows.numel() else d_rows.clone()


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


class _Gradients:
    hidden: Tensor | None = None
    final: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class _Call(NamedTuple):
    """The arguments of `head_pass`."""

    hidden: Tensor
    final: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    factor: Tensor | None
    final_factor: Tensor | None
    advantage: Tensor | None
    loss_weight: Tensor | None
    old_logprob: Tensor | None
    rollout_logprob: Tensor | None
    ref_logprob: Tensor | None
    policy_options: Sequence[float]
    divergence: str
    beta: float
    temperature: float
    final_temperature: float
    softcap: float | None
    capacity: int
    drop: bool
    reduce: bool
    hidden_grad: bool
    final_grad: bool
    hidden_weight_grad: bool
    final_weight_grad: bool
    hidden_later: bool
    final_later: bool
    stats: bool
    group: str = ""
    start: int = 0


_FIRST_GRADIENT = HeadPass._fields.index("d_hidden")
head_pass.register_autograd(_backward, setup_context=_setup_context)
