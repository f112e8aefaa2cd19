"""The tiled kernels' value passes: losses, and the row statistics that gradients want.

Tokens are taken in slabs, and the vocabulary is split over programs where a slab has too few rows
to fill the machine, both such that the workspace beyond the outputs stays bounded whatever N and V.
Rows that are not wanted are sorted to the end of a slab, where programs return at once: the host
never waits for their number.

Letters: S student layers, N tokens, T of them in a slab, R = S*T rows, D width, V vocabulary,
K splits.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks
from oisd_kernels.gpu import TL, row_strides
from oisd_kernels.lens.tiled.kernels import (
    tiled_jsd_kernel,
    tiled_kl_kernel,
    tiled_statistics_kernel,
)
from oisd_kernels.lens.tiled.tiles import (
    ROW_BYTES,
    WORKSPACE,
    Head,
    Scores,
    Work,
    launch_tile,
)
from oisd_kernels.reference import with_masked_labels

FIELDS = 9  # of a row and a split, 4 bytes each: the most that a kernel leaves behind


class LensValues(NamedTuple):
    """Rows that are not wanted hold 0, as does what was not asked for."""

    divergence: Tensor  # [S, N]
    student_entropy: Tensor  # [S, N]
    teacher_entropy: Tensor  # [N]
    agreement: Tensor  # [S, N]
    # For the gradient:
    lse_q: Tensor  # [S, N]: logsumexp of the student
    lse_p: Tensor  # [N]: of the teacher
    centre: Tensor  # [S, N]: <q, inner>, see `divergences`


def lens_values(
    head: Head,  # states: hidden [S, N, D], teacher [1, N, D]
    keep: Tensor,  # [S, N]
    divergence: str,
    beta: float,
    scores: Scores,
    stats: bool,
    gradient: bool,
    budget: int | None,
) -> LensValues:
    S, N = keep.shape
    slab = slab_tokens("logit_lens_divergence", S + 1, head.compute, budget)
    out = allocate_lens_values(keep, head.compute, gradient)
    for start in range(0, N, slab):
        tokens = slice(start, min(start + slab, N))
        run = _LensSlab(head, tokens, keep[:, tokens], scores, stats, gradient)
        got = run.jsd(beta) if divergence == "jsd" else run.kl(divergence == "forward_kl")
        for whole, part in zip(out, got, strict=True):
            if part is not None and whole.numel() > 0:
                whole[..., tokens] = part
    return out


def allocate_lens_values(keep: Tensor, compute: torch.dtype, gradient: bool) -> LensValues:
    layers, tokens = keep.shape

    def zeros(*shape: int, wanted: bool = True) -> Tensor:
        return keep.new_zeros(shape if wanted else (0,), dtype=compute)

    rows = layers, tokens
    return LensValues(
        *(zeros(*shape) for shape in (rows, rows, (tokens,), rows)),
        *(zeros(*shape, wanted=gradient) for shape in (rows, (tokens,), rows)),
    )


def logprob_values(
    head: Head,  # states: hidden [1, N, D]
    labels: Tensor,  # [N]
    scores: Scores,
    budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the labels, entropy, logsumexp, each [N]."""
    N = len(labels)
    slab = slab_tokens("linear_logprob", 1, head.compute, budget)
    logprob, entropy, logsumexp = (head.weight.new_empty(N, dtype=head.compute) for _ in range(3))
    for start in range(0, N, slab):
        tokens = slice(start, min(start + slab, N))
        keep = torch.ones_like(labels[None, tokens], dtype=torch.bool)
        run = _Slab(head, Work.of(keep), scores, True)
        fields, top1 = run.statistics(head.states[0][:, tokens], run.rows, labels[tokens])
        others = _Splits(fields[0], fields[1], top1)
        score = fields[3].amax(0).double() - others.largest
        own = score.exp()
        log_total = (others.total + own).log()
        # Without a label, 0 * -inf.
        moment = others.moment(fields[2]) + torch.where(own > 0, own * score, 0)
        logprob[tokens] = with_masked_labels(run.put(score - log_total)[0])
        entropy[tokens] = run.put(log_total - moment / (others.total + own))[0]
        logsumexp[tokens] = run.put(others.largest + log_total)[0]
    return logprob, entropy, logsumexp


def slab_tokens(op: str, rows: int, compute: torch.dtype, budget: int | None) -> int:
    """Tokens of so many rows each whose workspace keeps to the budget."""
    budget = WORKSPACE if budget is None else budget
    token = rows * (ROW_BYTES + FIELDS * compute.itemsize)
    if budget < token:
        wanted = f'be at least {token} with impl="tiled"'
        remedy = f"the {rows} rows of one token take so much"
        raise checks.argument_error(op, "max_bytes", wanted, budget, remedy)
    return budget // token


class _Slab:
    """Rows that are worked on at once: the wanted first."""

    def __init__(self, head: Head, rows: Work, scores: Scores, stats: bool):
        self.head, self.rows, self.stats = head, rows, stats
        self.scalars = scores.scalars()
        self.capped = scores.softcap is not None

    def statistics(
        self, x: Tensor, rows: Work, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """m, l, moment, score of the label [4, K, R]; likeliest token [K, R]."""
        constants = {"STATS": self.stats, "LABELS": labels is not None}
        given = (rows.order if labels is None else labels,)
        out, top1 = self.launch(tiled_statistics_kernel, 1, 4, (x,), rows, given, constants)
        return out, top1[0]

    def launch(
        self,
        kernel: Any,
        accumulators: int,
        fields: int,
        states: tuple[Tensor, ...],  # [S, T, D] or [1, T, D] each
        rows: Work,
        row_values: tuple[Tensor, ...],
        constants: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Fields [F, K, R] and tokens [accumulators, K, R], rows in the order of work."""
        head, R, T = self.head, rows.keep.numel(), rows.keep.shape[1]
        V, D = head.weight.shape
        plain = not (any(constants.values()) or self.capped or head.bias is not None)
        tile = launch_tile(head.capability, accumulators, head.operand, head.aligned, plain)
        blocks, tiles = -(-R // tile.n), -(-V // tile.v)
        span = -(-tiles // min(tiles, max(head.programs // blocks, 1)))
        K = -(-tiles // span)
        out = head.weight.new_empty(fields, K, R, dtype=head.compute)
        top1 = head.weight.new_empty(accumulators, K, R, dtype=torch.int32)
        outputs = (out,) if kernel is tiled_jsd_kernel else (out, top1)
        strides = [stride for x in states for stride in row_strides(x)]
        kernel[(blocks, K)](
            *states, head.weight, head.bias, rows.order, rows.wanted, *row_values, *outputs,
            T, D, V, R, span * tile.v, *self.scalars, *strides, head.weight.stride(0),
            HAS_BIAS=head.bias is not None, SOFTCAP=self.capped, **constants,
            BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_D=tile.d,
            OPERAND=TL[head.operand], ACC=TL[head.compute],
            PRECISION=head.precision(head.operand),
            **tile.options(),
        )  # fmt: skip
        return out, top1

    def put(self, values: Tensor, rows: Work | None = None) -> Tensor:
        """values [R] in the order of work -> [S, T] (or as `rows`), 0 where not wanted."""
        rows = self.rows if rows is None else rows
        dtype = values.dtype if values.dtype == torch.int64 else self.head.compute
        out = values.new_zeros(rows.keep.numel(), dtype=dtype)
        out[rows.order] = values.to(dtype)
        return torch.where(rows.keep, out.view(rows.keep.shape), 0)


class _LensSlab(_Slab):
    def __init__(
        self,
        head: Head,
        tokens: slice,
        keep: Tensor,  # [S, T]
        scores: Scores,
        stats: bool,
        gradient: bool,
    ):
        super().__init__(head, Work.of(keep), scores, stats)
        self.hidden, self.teacher = (x[:, tokens] for x in head.states)
        self.gradient = gradient

    def kl(self, forward: bool) -> tuple[Tensor | None, ...]:
        """KL(a||b), where a is the teacher if `forward`."""
        a, b = (self.teacher, self.hidden) if forward else (self.hidden, self.teacher)
        constants = {"STATS": self.stats}
        out, top1 = self.launch(tiled_kl_kernel, 2, 7, (a, b), self.rows, (), constants)
        a, b = _Splits(out[0], out[1], top1[0]), _Splits(out[2], out[3], top1[1])
        kl_sum = out[4].double()
        # Over all splits: what a maximum lacks to the largest belongs to the sum.
        kl_sum = (a.share * (kl_sum + (a.deficit - b.deficit) * a.l)).sum(0)
        value = self.put(kl_sum / a.total + (b.total / a.total).log())
        got: list[Tensor | None] = [value] + [None] * 6
        teacher, student = (a, b) if forward else (b, a)
        if self.stats:
            p_moment, q_moment = (out[5], out[6]) if forward else (out[6], out[5])
            got[1] = self.put(student.entropy(q_moment))
            got[2] = self._of_token(self.put(teacher.entropy(p_moment)))
            got[3] = self.put((a.top1() == b.top1()).double())
        if self.gradient:
            got[4] = self.put(student.logsumexp())
            got[5] = self._of_token(self.put(teacher.logsumexp()))
            got[6] = -value
        return tuple(got)

    def jsd(self, beta: float) -> tuple[Tensor | None, ...]:
        kept = Work.of(self.rows.keep.any(0, keepdim=True)) if len(self.hidden) > 1 else self.rows
        p_out, p_top = self.statistics(self.teacher, kept)
        q_out, q_top = self.statistics(self.hidden, self.rows)
        p, q = _Splits(p_out[0], p_out[1], p_top), _Splits(q_out[0], q_out[1], q_top)
        lse_p = self.put(p.logsumexp(), kept)
        lse_q = self.put(q.logsumexp())
        constants = {
            "BETA": beta,
            "LOG_BETA": math.log(beta),
            "LOG_1M_BETA": math.log1p(-beta),
            "GRADIENT": self.gradient,
        }
        states = self.teacher, self.hidden
        out, _ = self.launch(tiled_jsd_kernel, 2, 2, states, self.rows, (lse_p, lse_q), constants)
        got: list[Tensor | None] = [self.put(out[0].double().sum(0))] + [None] * 6
        if self.stats:
            got[1] = self.put(q.entropy(q_out[2]))
            got[2] = self.put(p.entropy(p_out[2]), kept)[0]
            p_top1, q_top1 = self.put(p.top1(), kept), self.put(q.top1())
            got[3] = torch.where(self.rows.keep & (p_top1 == q_top1), 1.0, 0.0)
        if self.gradient:
            got[4:] = lse_q, lse_p[0], self.put(out[1].double().sum(0))
        return tuple(got)

    def _of_token(self, x: Tensor) -> Tensor:
        """What all wanted rows of a token agree on, [S, T] -> [T]."""
        largest = x.masked_fill(~self.rows.keep, -torch.inf).amax(0)
        return torch.where(self.rows.keep.any(0), largest, 0)


class _Splits:
    """Sums of a softmax over splits of the vocabulary, in float64: m, l [K, R]."""

    def __init__(self, m: Tensor, l: Tensor, top1: Tensor):  # noqa: E741
        self.m, self.l, self.place = m.double(), l.double(), top1
        self.largest = self.m.amax(0)
        self.deficit = self.m - self.largest
        self.share = self.deficit.exp()
        self.total = (self.share * self.l).sum(0)

    def logsumexp(self) -> Tensor:
        return self.largest + self.total.log()

    def entropy(self, moment: Tensor) -> Tensor:
        return self.total.log() - self.moment(moment) / self.total

    def moment(self, moment: Tensor) -> Tensor:
        """Of all splits about the largest score."""
        return (self.share * (moment.double() + self.deficit * self.l)).sum(0)

    def top1(self) -> Tensor:
        """The first token of the largest score."""
        beyond = torch.iinfo(torch.int32).max
        return torch.where(self.deficit == 0, self.place, beyond).amin(0).long()
