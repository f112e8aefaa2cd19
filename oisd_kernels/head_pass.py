"""One chunked pass over the unembedding: final-layer statistics, divergences, gradients.

`logit_lens_divergence`, `linear_logprob` and `policy_head` are this op with parts left out. The
final logits of a chunk are computed once; each student layer's logits become their gradient in
place. With G = one 2*N*D*V matmul the cost is

    1 + S           values
    + S, + 1        gradient to `hidden`, to `final`
    + S, + 1        gradient to `weight` through `hidden`, through `final`

The gradient is computed in the forward where that is exact: to `hidden` and `final` always, because
an upstream gradient scales their rows; to `weight` where the upstream gradient is one number, which
is so for a reduced divergence. Otherwise the backward runs the pass again with the upstream
gradient folded into the factors.

Letters: S student layers, N tokens, D width, V vocabulary, C tokens and R student rows of a chunk.
"""

import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import chunks, rows_torch
from oisd_kernels.chunks import Chunk, Plan
from oisd_kernels.projection import Projection
from oisd_kernels.rows_torch import RowMath


class HeadPass(NamedTuple):
    """Outputs of the op. Dropped rows hold 0; gradients that were not asked for are empty."""

    loss: Tensor  # factor * divergence: [S, N], or its sum
    divergence: Tensor  # [S, N]
    student_entropy: Tensor  # [S, N]
    final_entropy: Tensor  # [N]
    agreement: Tensor  # [S, N]
    logsumexp: Tensor  # [N], of the final layer
    logprob: Tensor  # [N], of the labels; empty without labels
    # Gradients of sum(loss) and sum(final_factor * logprob); those to rows in the rows' dtype,
    # still to be multiplied by a scale where that dtype is float16.
    d_hidden: Tensor  # [S, N, D]
    d_hidden_scale: Tensor  # [S, N]
    d_final: Tensor  # [N, D]
    d_final_scale: Tensor  # [N]
    d_weight: Tensor  # [V, D]
    d_bias: Tensor  # [V]


def row_functions(device: torch.device) -> ModuleType:
    """The Triton row kernels on a GPU and under the interpreter, torch elsewhere."""
    if device.type == "cpu" and not _interpreting():
        return rows_torch
    from oisd_kernels import rows_triton  # triton is not to be had on every CPU

    return rows_triton


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("oisd_kernels::head_pass", mutates_args=())
def head_pass(
    hidden: Tensor,  # [S, N, D]
    final: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [N]
    factor: Tensor | None,  # [S, N]; None for ones
    final_factor: Tensor | None,  # [N]; None for ones
    divergence: str,
    beta: float,
    temperature: float,
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
    stats: bool,  # entropies and agreement
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    del hidden_later, final_later
    math_ = RowMath(divergence, beta, temperature, softcap)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        out = _allocate(
            hidden, final, weight, bias, labels, reduce, hidden_grad, final_grad,
            hidden_weight_grad or final_weight_grad,
        )  # fmt: skip
        layers, tokens, _ = hidden.shape
        dropping = factor if drop else None
        plan = chunks.plan(layers, tokens, dropping, labels is not None, capacity)
        run = _Run(hidden, final, weight, bias, labels, factor, final_factor, math_, plan, out)
        student_grad = hidden_grad, hidden_weight_grad
        for chunk in plan.chunks:
            run.chunk(chunk, capacity, student_grad, (final_grad, final_weight_grad), stats)
        rows = out.divergence if factor is None else out.divergence * factor
        loss = rows.sum() if reduce else rows.clone() if rows is out.divergence else rows
        return out._replace(loss=loss)


@head_pass.register_fake
def _(
    hidden, final, weight, bias, labels, factor, final_factor, divergence, beta, temperature,
    softcap, capacity, drop, reduce, hidden_grad, final_grad, hidden_weight_grad,
    final_weight_grad, hidden_later, final_later, stats,
):  # fmt: skip
    weight_grad = hidden_weight_grad or final_weight_grad
    return _allocate(
        hidden, final, weight, bias, labels, reduce, hidden_grad, final_grad, weight_grad
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, out = _Call(*inputs), HeadPass(*output)
    ctx.set_materialize_grads(False)  # zeros for d_weight would be as large as it
    ctx.mark_non_differentiable(
        *(x for name, x in out._asdict().items() if name not in ("loss", "logprob"))
    )
    later = call.hidden_later or call.final_later
    tensors = call[:7] if later else (None,) * 7
    ctx.save_for_backward(*tensors, *out[_FIRST_GRADIENT:])
    ctx.options = call[7:]
    ctx.dtypes = call.weight.dtype, None if call.bias is None else call.bias.dtype


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
    if g.logprob is not None and not call.final_later:
        grad.final = _scale_rows(out.d_final, out.d_final_scale, g.logprob)
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
    divergence: str
    beta: float
    temperature: float
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


_FIRST_GRADIENT = HeadPass._fields.index("d_hidden")
head_pass.register_autograd(_backward, setup_context=_setup_context)


class _Run:
    """The state of one pass: inputs, outputs, the buffer of logits."""

    def __init__(
        self,
        hidden: Tensor,
        final: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        factor: Tensor | None,
        final_factor: Tensor | None,
        math_: RowMath,
        plan: Plan,
        out: HeadPass,
    ):
        self.hidden, self.final, self.labels = hidden, final, labels
        self.factor, self.final_factor = factor, final_factor
        self.math, self.plan, self.out = math_, plan, out
        self.compute = out.divergence.dtype
        self.bias = None if bias is None else bias.to(self.compute)
        self.project = Projection(weight, {hidden.dtype, final.dtype}, self.compute)
        self.functions = row_functions(weight.device)
        self.vocabulary = weight.shape[0]
        self.buffer = weight.new_empty(0, dtype=self.compute)

    def chunk(
        self,
        chunk: Chunk,
        capacity: int,
        student_grad: tuple[bool, bool],
        final_grad: tuple[bool, bool],
        stats: bool,
    ) -> None:
        plan, out = self.plan, self.out
        token_index = plan.token_index
        where = chunk.tokens if token_index is None else token_index[chunk.tokens]
        states = self.final[where].to(self.project.operand)  # [C, D]
        count, rows = len(states), chunk.rows.stop - chunk.rows.start
        at_once = min(rows, max(capacity - count, 1))
        logits = self._logits_buffer(count + at_once)
        z_final = logits[:count]
        self.project.logits(states, z_final)
        labels = None if self.labels is None else self.labels[where]
        final = self.functions.final_rows(
            z_final, self.bias, labels, self.math, stats, stats and rows > 0
        )
        out.final_entropy[where] = final.entropy
        out.logsumexp[where] = final.logsumexp
        if labels is not None:
            out.logprob[where] = final.logprob
        for part in chunks.runs(chunk.rows, at_once):
            z = logits[count : count + part.stop - part.start]
            self._students(part, z, z_final, final, chunk.tokens.start, student_grad, stats)
        if labels is None or not any(final_grad):
            return
        factor = self.final_factor
        factor = z_final.new_ones(count) if factor is None else factor[where]
        d_logits, scale = self.functions.final_gradient(
            z_final, final, self.bias, labels, factor, self.math, self.project.operand
        )
        gradient = self._gradients(d_logits, scale, states, *final_grad)
        if gradient is not None:
            _store(gradient, out.d_final, out.d_final_scale, where)

    def _students(
        self,
        part: slice,
        z: Tensor,
        z_final: Tensor,
        final: rows_torch.FinalRows,
        first_token: int,
        gradients: tuple[bool, bool],
        stats: bool,
    ) -> None:
        plan, out = self.plan, self.out
        where = plan.layer_of_row[part], plan.token_of_row[part]
        states = self.hidden[where].to(self.project.operand)  # [R, D]
        self.project.logits(states, z)
        got = self.functions.student_rows(
            z,
            z_final,
            final,
            self.bias,
            plan.slot_of_row[part] - first_token,
            z.new_ones(len(z)) if self.factor is None else self.factor[where],
            self.math,
            any(gradients),
            stats,
            self.project.operand,
        )
        out.divergence[where] = got.divergence
        out.student_entropy[where] = got.entropy
        out.agreement[where] = got.agreement
        if got.d_logits is None:
            return
        gradient = self._gradients(got.d_logits, got.scale, states, *gradients)
        if gradient is not None:
            _store(gradient, out.d_hidden, out.d_hidden_scale, where)

    def _gradients(
        self, d_logits: Tensor, scale: Tensor, states: Tensor, to_rows: bool, to_weight: bool
    ) -> Tensor | None:
        """Adds to the gradients of weight and bias; returns that of the rows."""
        if to_weight:
            self.project.add_to_weight(self.out.d_weight, d_logits, scale, states)
            if self.bias is not None:
                self.project.add_to_bias(self.out.d_bias, d_logits, scale)
        if not to_rows:
            return None
        gradient = self.project.to_hidden(d_logits)
        return gradient if scale.numel() == 0 else gradient * scale[:, None]

    def _logits_buffer(self, rows: int) -> Tensor:
        if len(self.buffer) < rows:
            # The old one goes first: two would be over the budget.
            self.buffer = self.buffer.new_empty(0)
            self.buffer = self.buffer.new_empty(rows, chunks.padded(self.vocabulary))
        return self.buffer[:rows, : self.vocabulary]


def _store(gradient: Tensor, d_rows: Tensor, d_scale: Tensor, where: Any) -> None:
    """Rounds rows of gradient; float16 holds them at a power of two that brings them near 1."""
    if d_rows.dtype == torch.float16:
        _, exponent = torch.frexp(gradient.abs().amax(-1))
        d_scale[where] = torch.ldexp(torch.ones_like(d_scale[where]), exponent)
        gradient = torch.ldexp(gradient, -exponent[:, None])
    d_rows[where] = gradient.to(d_rows.dtype)


def _allocate(
    hidden: Tensor,
    final: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    reduce: bool,
    hidden_grad: bool,
    final_grad: bool,
    weight_grad: bool,
) -> HeadPass:
    compute = compute_dtype(hidden, final, weight, bias)
    layers, tokens, width = hidden.shape

    def zeros(*shape: int, wanted: bool = True, dtype: torch.dtype = compute) -> Tensor:
        return hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    scaled_hidden = hidden_grad and hidden.dtype == torch.float16
    scaled_final = final_grad and final.dtype == torch.float16
    return HeadPass(
        loss=zeros() if reduce else zeros(layers, tokens),
        divergence=zeros(layers, tokens),
        student_entropy=zeros(layers, tokens),
        final_entropy=zeros(tokens),
        agreement=zeros(layers, tokens),
        logsumexp=zeros(tokens),
        logprob=zeros(tokens, wanted=labels is not None),
        d_hidden=zeros(layers, tokens, width, wanted=hidden_grad, dtype=hidden.dtype),
        d_hidden_scale=zeros(layers, tokens, wanted=scaled_hidden),
        d_final=zeros(tokens, width, wanted=final_grad, dtype=final.dtype),
        d_final_scale=zeros(tokens, wanted=scaled_final),
        d_weight=zeros(*weight.shape, wanted=weight_grad),
        d_bias=zeros(len(weight), wanted=weight_grad and bias is not None),
    )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32
