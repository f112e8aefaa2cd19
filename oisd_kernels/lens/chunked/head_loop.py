"""The loop over chunks behind `head_pass`: its outputs, its state, what is done to a chunk.

Letters: S student layers, N tokens, D width, V vocabulary, C tokens and R student rows of a chunk.
"""

import os
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens.chunked import chunks, rows_torch
from oisd_kernels.lens.chunked.chunks import Chunk, Plan
from oisd_kernels.lens.chunked.projection import Projection
from oisd_kernels.lens.chunked.rows_torch import RowMath
from oisd_kernels.lens.policy_loss import PolicyTerms, policy_loss, policy_slope

if TYPE_CHECKING:
    from oisd_kernels.lens.chunked.rows_parallel import ParallelRows


class HeadPass(NamedTuple):
    """Outputs of the op. Dropped rows hold 0; gradients that were not asked for are empty."""

    loss: Tensor  # factor * divergence: [S, N], or its sum
    divergence: Tensor  # [S, N]
    student_entropy: Tensor  # [S, N]
    final_entropy: Tensor  # [N]
    agreement: Tensor  # [S, N]
    logsumexp: Tensor  # [N], of the final layer
    logprob: Tensor  # [N], of the labels; empty without labels
    teacher_entropy: Tensor  # [N], `final_entropy` at the temperature of the divergence
    policy_loss: Tensor  # [], a sum over tokens; 0 without an advantage
    # The likeliest tokens and their log-probabilities at the temperature of the divergence, empty
    # without statistics. Those of the final layer are 0 where a chunk has no student rows.
    student_top1: Tensor  # [S, N]
    student_top_logprob: Tensor  # [S, N]
    final_top1: Tensor  # [N]
    final_top_logprob: Tensor  # [N]
    # Gradients of sum(loss), and of policy_loss or sum(final_factor * logprob); those to rows in
    # the rows' dtype, still to be multiplied by a scale where that dtype is float16.
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
    from oisd_kernels.lens.chunked import rows_triton  # triton is not to be had on every CPU

    return rows_triton


def parallel_rows(group: Any, start: int) -> "ParallelRows":
    """Those of a vocabulary in parts; `group` as in `head_pass`."""
    from torch._C._distributed_c10d import _resolve_process_group  # torch.distributed is optional

    from oisd_kernels.lens.chunked.rows_parallel import ParallelRows

    return ParallelRows(_resolve_process_group(group), start)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class HeadLoop:
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
        terms: PolicyTerms | None,
        math_: RowMath,
        final_temperature: float,
        plan: Plan,
        out: HeadPass,
        group: str,
        start: int,
    ):
        self.hidden, self.final, self.labels = hidden, final, labels
        self.factor, self.final_factor, self.terms = factor, final_factor, terms
        self.math, self.plan, self.out = math_, plan, out
        self.final_math = math_._replace(temperature=final_temperature)
        self.compute = out.divergence.dtype
        self.bias = None if bias is None else bias.to(self.compute)
        self.project = Projection(weight, {hidden.dtype, final.dtype}, self.compute)
        self.parallel = parallel_rows(group, start) if group else None
        self.functions: Any = self.parallel or row_functions(weight.device)
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
        count = chunk.tokens.stop - chunk.tokens.start
        parts = list(chunks.runs(chunk.rows, max(capacity - count, 1)))
        states = self.final[where].to(self.project.operand)  # [C, D]
        if parts:  # one matmul for the final rows and the first student rows: few alone are slow
            states = torch.cat([states, self._states(parts[0])])
        logits = self._logits_buffer(len(states))
        z_final = logits[:count]
        self.project.logits(states, logits[: len(states)])
        labels = None if self.labels is None else self.labels[where]
        # The teacher's statistics first where they are others than the policy's.
        twice = bool(parts) and labels is not None and self.math != self.final_math
        first = self.math if labels is None or twice else self.final_math
        final = self.functions.final_rows(
            z_final, self.bias, None if twice else labels, first, stats, stats and bool(parts)
        )
        out.teacher_entropy[where] = final.entropy
        if stats and parts:
            out.final_top1[where] = final.top1
            out.final_top_logprob[where] = final.top_logprob
        for part in parts:
            z = logits[count : count + part.stop - part.start]
            rows = states[count:]
            if part != parts[0]:
                rows = self._states(part)
                self.project.logits(rows, z)
            self._students(part, rows, z, z_final, final, chunk.tokens.start, student_grad, stats)
        if twice:
            final = self.functions.final_rows_again(
                z_final, final, self.bias, labels, self.math, self.final_math, stats
            )
        out.final_entropy[where] = final.entropy
        out.logsumexp[where] = final.logsumexp
        if labels is None:
            return
        out.logprob[where] = final.logprob
        factor = self._final_factor(where, final.logprob)
        if not any(final_grad):
            return
        d_logits, scale = self.functions.final_gradient(
            z_final, final, self.bias, labels, factor, self.final_math, self.project.operand
        )
        gradient = self._gradients(d_logits, scale, states[:count], *final_grad)
        if gradient is not None:
            _store(gradient, out.d_final, out.d_final_scale, where)

    def _final_factor(self, where: slice | Tensor, logprob: Tensor) -> Tensor:
        """What the gradient of a log-probability is multiplied by; adds up the policy loss."""
        if self.terms is not None:
            terms = self.terms._replace(
                **{
                    name: x[where].to(logprob.dtype)
                    for name, x in self.terms._asdict().items()
                    if isinstance(x, Tensor)
                }
            )
            self.out.policy_loss.add_(policy_loss(logprob, terms).loss.sum())
            return policy_slope(logprob, terms)
        if self.final_factor is None:
            return torch.ones_like(logprob)
        return self.final_factor[where]

    def _states(self, part: slice) -> Tensor:
        """Student rows as the matmul reads them, [R, D]."""
        where = self.plan.layer_of_row[part], self.plan.token_of_row[part]
        return self.hidden[where].to(self.project.operand)

    def _students(
        self,
        part: slice,
        states: Tensor,
        z: Tensor,
        z_final: Tensor,
        final: rows_torch.FinalRows,
        first_token: int,
        gradients: tuple[bool, bool],
        stats: bool,
    ) -> None:
        plan, out = self.plan, self.out
        where = plan.layer_of_row[part], plan.token_of_row[part]
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
        if stats:
            out.student_top1[where] = got.top1
            out.student_top_logprob[where] = got.top_logprob
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
        gradient = gradient if scale.numel() == 0 else gradient * scale[:, None]
        return gradient if self.parallel is None else self.parallel.sum(gradient)

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


def allocate(
    hidden: Tensor,
    final: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    reduce: bool,
    hidden_grad: bool,
    final_grad: bool,
    weight_grad: bool,
    stats: bool,
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
        teacher_entropy=zeros(tokens),
        policy_loss=zeros(),
        student_top1=zeros(layers, tokens, wanted=stats, dtype=torch.int64),
        student_top_logprob=zeros(layers, tokens, wanted=stats),
        final_top1=zeros(tokens, wanted=stats, dtype=torch.int64),
        final_top_logprob=zeros(tokens, wanted=stats),
        d_hidden=zeros(layers, tokens, width, wanted=hidden_grad, dtype=hidden.dtype),
        d_hidden_scale=zeros(layers, tokens, wanted=scaled_hidden),
        d_final=zeros(tokens, width, wanted=final_grad, dtype=final.dtype),
        d_final_scale=zeros(tokens, wanted=scaled_final),
        d_weight=zeros(*weight.shape, wanted=weight_grad),
        d_bias=zeros(len(weight), wanted=weight_grad and bias is not None),
    )
