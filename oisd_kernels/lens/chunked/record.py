"""What goes into a pass over the unembedding, and what comes out: see `head_pass`.

Letters: S student layers, N tokens, D width, E the width of a teacher with a head of its own,
V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.policy_loss import PolicyTerms
from oisd_kernels.lens.vocab_parallel import Part


class HeadCall(NamedTuple):
    """The arguments of the op. A public function names the first half; `complete` adds the rest."""

    hidden: Tensor  # [S, N, D]
    final: Tensor  # [N, D]; [N, E] with a teacher's weight
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    # The teacher's own head; without labels then. Logits and scores of `final` are made with it.
    teacher_weight: Tensor | None = None  # [V, E]
    teacher_bias: Tensor | None = None  # [V]
    teacher_temperature: float = 1.0
    teacher_softcap: float | None = None
    labels: Tensor | None = None  # [N]
    factor: Tensor | None = None  # [S, N] of the divergence; None for ones
    final_factor: Tensor | None = None  # [N] of the log-probability; None for ones
    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0  # of the divergence
    final_temperature: float = 1.0  # of the log-probability
    softcap: float | None = None
    reduce: bool = False  # loss is a sum
    stats: bool = False  # entropies, agreement, likeliest tokens; not of a teacher's own head
    # The fields of `PolicyTerms`, [N] each, or no advantage.
    policy_advantage: Tensor | None = None
    policy_weight: Tensor | None = None
    policy_old_logprob: Tensor | None = None
    policy_rollout_logprob: Tensor | None = None
    policy_ref_logprob: Tensor | None = None
    policy_clip_low: float = 0.2
    policy_clip_high: float = 0.2
    policy_dual_clip: float | None = None
    policy_tis_cap: float = 2.0
    policy_kl_coef: float = 0.0
    # Of the implementation.
    capacity: int = 2  # rows of logits in memory
    drop: bool = False  # leave out rows whose factor is 0
    hidden_grad: bool = False
    final_grad: bool = False
    hidden_weight_grad: bool = False  # d_weight through `hidden`
    final_weight_grad: bool = False  # d_weight through `final`
    hidden_later: bool = False  # the backward runs the pass again for d_hidden and d_weight
    final_later: bool = False  # the same for d_final and d_weight
    group: str = ""  # name of the process group that has the vocabulary in parts; "" for none
    start: int = 0  # this rank's first row of `weight` among all; `labels` count from the first

    def complete(self, op: str, part: Part, max_bytes: int | None, grad_weight: bool) -> "HeadCall":
        """The record with all that follows from the budget, the part and what requires gradient.

        grad_weight: whether the unembedding receives gradient through the divergence.

        Raises ValueError where `max_bytes` holds no token.
        """
        recording = torch.is_grad_enabled()
        bias_grad = self.bias is not None and self.bias.requires_grad
        to_weight = recording and (self.weight.requires_grad or bias_grad)
        through_hidden = to_weight and grad_weight
        through_final = to_weight and self.labels is not None
        # The gradient to the unembedding is computed in the forward where the upstream gradient
        # will be one number.
        hidden_later = through_hidden and not self.reduce
        final_later = through_final and self.policy_advantage is None
        return self._replace(
            capacity=self._row_capacity(op, part, max_bytes),
            drop=self.factor is not None,
            hidden_grad=recording and self.hidden.requires_grad and not hidden_later,
            final_grad=recording and self.final.requires_grad and not final_later,
            hidden_weight_grad=through_hidden and not hidden_later,
            final_weight_grad=through_final and not final_later,
            hidden_later=hidden_later,
            final_later=final_later,
            group=part.group,
            start=part.start,
        )

    def _row_capacity(self, op: str, part: Part, max_bytes: int | None) -> int:
        rows, width = 2, max(self.hidden.shape[-1], self.final.shape[-1])
        if self.labels is not None and self.hidden.shape[0] == 0:
            rows = 1
        own_head = self.teacher_weight is not None
        if own_head and self.softcap is not None:
            rows = 3  # the slope of the softcap, which is no row to the plan
        capacity = chunks.row_capacity(
            op, max_bytes, self.hidden.device, part.largest, width, self.compute.itemsize, rows,
            bool(part.group),
        )  # fmt: skip
        return 2 * (capacity // rows) if own_head else capacity

    @property
    def compute(self) -> torch.dtype:
        heads = self.weight, self.bias, self.teacher_weight, self.teacher_bias
        return compute_dtype(self.hidden, self.final, *heads)

    def policy_terms(self, where: slice | Tensor, dtype: torch.dtype) -> PolicyTerms:
        """Those of some tokens."""
        terms: dict[str, Any] = {}
        for name in PolicyTerms._fields:
            x = getattr(self, f"policy_{name}")
            terms[name] = x[where].to(dtype) if isinstance(x, Tensor) else x
        return PolicyTerms(**terms)


def policy_fields(terms: PolicyTerms | None) -> dict[str, Any]:
    """Those of `HeadCall`, for a loss with these terms, or none."""
    return {f"policy_{name}": x for name, x in (terms._asdict() if terms else {}).items()}


class HeadResult(NamedTuple):
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
    # the rows' dtype, still to be multiplied by a scale where that dtype is float16. (Beside a
    # teacher's own head d_hidden is in the compute dtype instead, and has no scale.)
    d_hidden: Tensor  # [S, N, D]
    d_hidden_scale: Tensor  # [S, N]
    d_final: Tensor  # [N, D]
    d_final_scale: Tensor  # [N]
    d_weight: Tensor  # [V, D]
    d_bias: Tensor  # [V]


def allocate(call: HeadCall) -> HeadResult:
    hidden, final, compute = call.hidden, call.final, call.compute
    layers, tokens, width = hidden.shape

    def zeros(*shape: int, wanted: bool = True, dtype: torch.dtype = compute) -> Tensor:
        return hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    half, final_half = hidden.dtype == torch.float16, final.dtype == torch.float16
    own_head = call.teacher_weight is not None
    to_weight = call.hidden_weight_grad or call.final_weight_grad
    rows_dtype = compute if half and own_head else hidden.dtype
    return HeadResult(
        loss=zeros() if call.reduce else zeros(layers, tokens),
        divergence=zeros(layers, tokens),
        student_entropy=zeros(layers, tokens),
        final_entropy=zeros(tokens),
        agreement=zeros(layers, tokens),
        logsumexp=zeros(tokens),
        logprob=zeros(tokens, wanted=call.labels is not None),
        teacher_entropy=zeros(tokens),
        policy_loss=zeros(),
        student_top1=zeros(layers, tokens, wanted=call.stats, dtype=torch.int64),
        student_top_logprob=zeros(layers, tokens, wanted=call.stats),
        final_top1=zeros(tokens, wanted=call.stats, dtype=torch.int64),
        final_top_logprob=zeros(tokens, wanted=call.stats),
        d_hidden=zeros(layers, tokens, width, wanted=call.hidden_grad, dtype=rows_dtype),
        d_hidden_scale=zeros(layers, tokens, wanted=call.hidden_grad and half and not own_head),
        d_final=zeros(tokens, width, wanted=call.final_grad, dtype=final.dtype),
        d_final_scale=zeros(tokens, wanted=call.final_grad and final_half),
        d_weight=zeros(*call.weight.shape, wanted=to_weight),
        d_bias=zeros(len(call.weight), wanted=to_weight and call.bias is not None),
    )
