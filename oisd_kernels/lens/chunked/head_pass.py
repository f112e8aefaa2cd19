"""One chunked pass over the unembedding: final-layer statistics, divergences, gradients.

`logit_lens_divergence`, `linear_logprob`, `policy_head` and `distillation_divergence` are this op
with parts left out. The final logits of a chunk are computed once; each layer's logits become their
gradient in place. With G = one 2*N*D*V matmul the cost is

    1 + S           values
    + S, + 1        gradient to `hidden`, to `final`
    + S, + 1        gradient to `weight` through `hidden`, through `final`

The gradient is computed in the forward where that is exact: to `hidden` and `final` always, because
an upstream gradient scales their rows; to `weight` where the upstream gradient is one number, which
is so for a reduced divergence and for the policy loss. Otherwise the backward runs the pass again
with the upstream gradient folded into the factors.

A teacher may have a head of its own, of another width: its logits then come through a projection of
their own, and receive no gradient. A logit scale s needs no arithmetic: cap_c(s z) / tau =
cap_(c/s)(z) / (tau/s). Where two heads differ in bias, softcap or temperature, their scores are
made before the row functions see them, in the memory of the logits, and the softcap's slope is kept
beside.

Letters: S student layers, N tokens, D width, V vocabulary, C tokens and R student rows of a chunk.
"""

import os
from typing import Any

import torch
from torch import Tensor

from oisd_kernels.lens.chunked import chunks, rows_torch
from oisd_kernels.lens.chunked.chunks import Chunk
from oisd_kernels.lens.chunked.projection import Projection
from oisd_kernels.lens.chunked.record import HeadCall, HeadResult, allocate
from oisd_kernels.lens.chunked.rows import FinalRows, RowMath, Rows
from oisd_kernels.lens.chunked.workspace import logits_buffer
from oisd_kernels.lens.policy_loss import policy_loss, policy_slope
from oisd_kernels.op import custom_op, keep, kept, without_tensors
from oisd_kernels.reference import with_masked_labels

# Whether the Triton row kernels are those of `rows_split`, which read each logit from memory once,
# instead of `rows_triton`. Until a GPU has measured both: False.
SPLIT_ROWS = False


def row_functions(device: torch.device) -> Rows:
    """The Triton row kernels on a GPU and under the interpreter, torch elsewhere."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return rows_torch
    from oisd_kernels.lens.chunked import rows_triton  # Triton may be missing on CPU-only machines

    return rows_triton


def split_rows(call: HeadCall, operand: torch.dtype) -> Any:
    """The row functions of a chunk with student rows where `SPLIT_ROWS` wants others, or None.

    Also None where the spare rows, at most a few dozen, would be more than an eighth of the budget.
    """
    if not SPLIT_ROWS or call.group or row_functions(call.weight.device) is rows_torch:
        return None
    from oisd_kernels.lens.chunked import rows_split

    layers, tokens, _ = call.hidden.shape
    gradient = operand if call.hidden_grad or call.hidden_weight_grad else None
    vocabulary, device = len(call.weight), call.weight.device
    if layers == 0 or vocabulary > rows_split.LARGEST_VOCABULARY:
        return None
    rows = rows_split.SplitRows(layers, tokens, vocabulary, call.compute, gradient, device)
    return None if 8 * rows.spare > call.capacity else rows


def parallel_rows(call: HeadCall) -> Any:
    """Those of a vocabulary in parts; torch.distributed is not in every build."""
    from torch._C._distributed_c10d import _resolve_process_group

    from oisd_kernels.lens.chunked.rows_parallel import ParallelRows

    return ParallelRows(_resolve_process_group(call.group), call.start)  # type: ignore[arg-type]


class _Pass:
    """The state of one pass: record, results, projections, the buffer of logits."""

    def __init__(self, call: HeadCall):
        self.call, self.out = call, allocate(call)
        self.compute = call.compute
        self.parallel = parallel_rows(call) if call.group else None
        self.rows: Rows = self.parallel or row_functions(call.weight.device)
        self.bias, teacher_bias = (
            None if x is None else x.to(self.compute) for x in (call.bias, call.teacher_bias)
        )
        self.row_bias = self.bias
        self.math = RowMath(call.divergence, call.beta, call.temperature, call.softcap)
        self.final_math = self.math._replace(temperature=call.final_temperature)
        self.buffer = call.weight.new_empty(0, dtype=self.compute)
        self.teacher = self.scores_apart = None
        dtypes = {call.hidden.dtype}
        if call.teacher_weight is None:
            dtypes.add(call.final.dtype)
        else:
            self.teacher = Projection(call.teacher_weight, {call.final.dtype}, self.compute)
            theirs = self.math._replace(
                temperature=call.teacher_temperature, softcap=call.teacher_softcap
            )
            if self.bias is not None or teacher_bias is not None or theirs != self.math:
                self.scores_apart = (self.math, self.bias), (theirs, teacher_bias)
                self.math, self.row_bias = self.math._replace(temperature=1.0, softcap=None), None
        self.project = Projection(call.weight, dtypes, self.compute)
        self.split = split_rows(call, self.project.operand)
        # Rows of memory behind the logits of a chunk.
        self.spare = 0 if self.split is None else self.split.spare
        self.capacity = call.capacity - self.spare
        layers, tokens, _ = call.hidden.shape
        factor = call.factor if call.drop else None
        every_token = call.labels is not None
        device = call.hidden.device
        self.plan = chunks.plan(layers, tokens, factor, every_token, self.capacity, device)

    def chunk(self, chunk: Chunk) -> None:
        call, plan, out = self.call, self.plan, self.out
        index = plan.token_index
        where = chunk.tokens if index is None else index[chunk.tokens]
        count = chunk.tokens.stop - chunk.tokens.start
        parts = list(chunks.runs(chunk.rows, max(self.capacity - count, 1)))
        final_states, states, logits = self._first_logits(where, count, parts)
        z_final = logits[:count]
        labels = None if call.labels is None else call.labels[where]
        final_stats = call.stats and self.teacher is None
        # The teacher's statistics first where they are others than the policy's.
        twice = bool(parts) and labels is not None and self.math != self.final_math
        first = self.math if labels is None or twice else self.final_math
        rows: Rows = self.split if self.split is not None and parts else self.rows
        final = rows.final_rows(
            z_final, self.row_bias, None if twice else labels, first, final_stats,
            final_stats and bool(parts),
        )  # fmt: skip
        for part in parts:
            size = part.stop - part.start
            z, slope = logits[count : count + size], logits[count + size + self.spare :]
            if part != parts[0]:
                states = self._states(part)
                self.project.logits(states, z)
            self._students(part, states, z, slope, z_final, final, chunk.tokens.start, rows)
        out.teacher_entropy[where] = final.entropy
        if final_stats and parts:
            out.final_top1[where] = final.top1
            out.final_top_logprob[where] = final.top_logprob
        if twice and labels is not None:
            final = self.rows.final_rows_again(
                z_final, final, self.row_bias, labels, self.math, self.final_math, final_stats
            )
        out.final_entropy[where] = final.entropy
        out.logsumexp[where] = final.logsumexp
        if labels is None:
            return
        final = final._replace(logprob=with_masked_labels(final.logprob))
        out.logprob[where] = final.logprob
        factor = self._final_factor(where, final.logprob)
        if not (call.final_grad or call.final_weight_grad):
            return
        d_logits, scale = self.rows.final_gradient(
            z_final, final, self.row_bias, labels, factor, self.final_math, self.project.operand
        )
        wanted = call.final_grad, call.final_weight_grad
        gradient = self._gradients(d_logits, scale, final_states, *wanted)
        if gradient is not None:
            _store(gradient, out.d_final, out.d_final_scale, where)

    def _first_logits(
        self, where: slice | Tensor, count: int, parts: list[slice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States of the final rows and of the first student rows, and the logits of both.

        One matmul for both, because few rows alone are slow, unless the teacher has its own head:
        then the student rows are one part, and the softcap's slope may follow them in memory.
        """
        final = self.call.final[where]
        if self.teacher is None:
            states = final.to(self.project.operand)
            if parts:
                states = torch.cat([states, self._states(parts[0])])
            logits = self._logits_buffer(len(states))
            self.project.logits(states, logits[: len(states)])
            return states[:count], states[count:], logits
        final, states = final.to(self.teacher.operand), self._states(parts[0])
        capped = self.scores_apart is not None and self.call.softcap is not None
        logits = self._logits_buffer(count * (3 if capped else 2))
        self.teacher.logits(final, logits[:count])
        self.project.logits(states, logits[count : 2 * count])
        if self.scores_apart is not None:
            math_, bias = self.scores_apart[1]
            rows_torch.scores(logits[:count], bias, math_)
        return final, states, logits

    def _students(
        self,
        part: slice,
        states: Tensor,  # [R, D]
        z: Tensor,  # [R, V]
        slope: Tensor,  # [R, V], where it is needed
        z_final: Tensor,  # [C, V]
        final: FinalRows,
        first_token: int,
        rows: Rows,
    ) -> None:
        call, plan, out = self.call, self.plan, self.out
        where = plan.layer_of_row[part], plan.token_of_row[part]
        factor = z.new_ones(len(z)) if call.factor is None else call.factor[where]
        capped = False
        if self.scores_apart is not None:
            math_, bias = self.scores_apart[0]
            capped = math_.softcap is not None
            rows_torch.scores(z, bias, math_, slope if capped else None)
            factor = factor / math_.temperature
        got = rows.student_rows(
            z,
            z_final,
            final,
            self.row_bias,
            plan.slot_of_row[part] - first_token,
            factor,
            self.math,
            call.hidden_grad or call.hidden_weight_grad,
            call.stats,
            self.project.operand,
        )
        out.divergence[where] = got.divergence
        out.student_entropy[where] = got.entropy
        out.agreement[where] = got.agreement
        if call.stats:
            out.student_top1[where] = got.top1
            out.student_top_logprob[where] = got.top_logprob
        if got.d_logits is None:
            return
        if capped:
            got.d_logits.mul_(slope)
        wanted = call.hidden_grad, call.hidden_weight_grad
        gradient = self._gradients(got.d_logits, got.scale, states, *wanted)
        if gradient is not None:
            _store(gradient, out.d_hidden, out.d_hidden_scale, where)

    def _final_factor(self, where: slice | Tensor, logprob: Tensor) -> Tensor:
        """What the gradient of a log-probability is multiplied by; adds up the policy loss."""
        if self.call.policy_advantage is not None:
            terms = self.call.policy_terms(where, logprob.dtype)
            self.out.policy_loss.add_(policy_loss(logprob, terms).loss.sum())
            return policy_slope(logprob, terms)
        if self.call.final_factor is None:
            return torch.ones_like(logprob)
        return self.call.final_factor[where]

    def _states(self, part: slice) -> Tensor:
        """Student rows as the matmul reads them, [R, D]."""
        where = self.plan.layer_of_row[part], self.plan.token_of_row[part]
        return self.call.hidden[where].to(self.project.operand)

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
        gradient = gradient if scale.numel() == 0 else gradient * scale[:, None]
        return gradient if self.parallel is None else self.parallel.sum(gradient)

    def _logits_buffer(self, rows: int) -> Tensor:
        """So many rows, and the spare ones."""
        vocabulary, rows = len(self.call.weight), rows + self.spare
        if len(self.buffer) < rows:
            # The old one goes first: two would be over the budget.
            self.buffer = self.buffer.new_empty(0)
            columns = chunks.padded(vocabulary)
            self.buffer = logits_buffer(rows, columns, self.compute, self.buffer.device)
        return self.buffer[:rows, :vocabulary]


def _store(gradient: Tensor, d_rows: Tensor, d_scale: Tensor, where: Any) -> None:
    """Rounds rows of gradient; float16 holds them at a power of two that brings them near 1."""
    if d_rows.dtype == torch.float16:
        _, exponent = torch.frexp(gradient.abs().amax(-1))
        d_scale[where] = torch.ldexp(torch.ones_like(d_scale[where]), exponent)
        gradient = torch.ldexp(gradient, -exponent[:, None])
    d_rows[where] = gradient.to(d_rows.dtype)


# The op and its autograd.


def _run(call: HeadCall) -> HeadResult:
    two_losses = call.policy_advantage is not None and call.hidden_weight_grad
    assert not two_losses, "two upstream gradients, one d_weight"
    pass_ = _Pass(call)
    for chunk in pass_.plan.chunks:
        pass_.chunk(chunk)
    out, factor = pass_.out, call.factor
    rows = out.divergence.clone() if factor is None else out.divergence * factor
    return out._replace(loss=rows.sum() if call.reduce else rows)


def _save(ctx: Any, call: HeadCall, out: HeadResult) -> None:
    differentiable = "loss", "logprob" if call.policy_advantage is None else "policy_loss"
    ctx.mark_non_differentiable(
        *(x for name, x in out._asdict().items() if name not in differentiable)
    )
    # `_again` needs no terms of the policy loss, whose gradient never waits for the backward.
    call = call._replace(
        policy_advantage=None, policy_weight=None, policy_old_logprob=None,
        policy_rollout_logprob=None, policy_ref_logprob=None,
    )  # fmt: skip
    later = call.hidden_later or call.final_later
    gradients: Any = (x if n.startswith("d_") else None for n, x in out._asdict().items())
    keep(ctx, call if later else without_tensors(call), HeadResult(*gradients))


def _backward(ctx: Any, g: HeadResult) -> dict[str, Tensor | None]:
    call, out = kept(ctx)
    grad: dict[str, Tensor | None] = {}
    if g.loss is not None and not call.hidden_later:
        grad["hidden"] = _scale_rows(out.d_hidden, out.d_hidden_scale, g.loss)
        if call.hidden_weight_grad:
            grad |= {"weight": out.d_weight * g.loss, "bias": out.d_bias * g.loss}
    g_final = g.policy_loss if g.logprob is None else g.logprob
    if g_final is not None and not call.final_later:
        grad["final"] = _scale_rows(out.d_final, out.d_final_scale, g_final)
        if call.final_weight_grad:
            grad |= {"weight": out.d_weight * g_final, "bias": out.d_bias * g_final}
    hidden_later = g.loss is not None and call.hidden_later
    final_later = g.logprob is not None and call.final_later
    if hidden_later or final_later:
        again = _again(call, g, hidden_later, final_later, ctx.wanted)
        if hidden_later:
            grad["hidden"] = _scale_rows(again.d_hidden, again.d_hidden_scale, None)
        if final_later:
            grad["final"] = _scale_rows(again.d_final, again.d_final_scale, None)
        grad["weight"] = _sum(grad.get("weight"), again.d_weight)
        grad["bias"] = _sum(grad.get("bias"), again.d_bias)
    return grad


def _again(
    call: HeadCall, g: HeadResult, hidden_later: bool, final_later: bool, wanted: HeadCall
) -> HeadResult:
    """The pass with the upstream gradients folded into its factors."""
    hidden, factor = call.hidden, None
    if hidden_later:
        factor = g.loss.expand(hidden.shape[:-1])
        factor = factor if call.factor is None else factor * call.factor
    else:
        hidden = hidden[:0]
    to_weight = bool(wanted.weight or wanted.bias)
    again = call._replace(
        hidden=hidden,
        factor=factor,
        labels=call.labels if final_later else None,
        final_factor=g.logprob if final_later else None,
        drop=call.drop and hidden_later,
        reduce=False,
        hidden_grad=wanted.hidden and hidden_later,
        final_grad=wanted.final and final_later,
        hidden_weight_grad=to_weight and hidden_later,
        final_weight_grad=to_weight and final_later,
        hidden_later=False,
        final_later=False,
        stats=False,
    )
    return HeadResult(*head_pass(*again))


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


head_pass = custom_op("head_pass", HeadCall, HeadResult, _run, allocate, _save, _backward)
