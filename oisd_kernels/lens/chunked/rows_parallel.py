"""Row arithmetic of a chunk whose vocabulary lies in parts on the ranks of a process group.

The functions of `rows.Rows`, which says what the arguments are; V is the number of entries on this
rank and may be 0. Of the other ranks a row needs a few numbers: its maximum, the sum of its
exponentials, then the sums of the divergence's terms, of the entropy's and `<q, inner>`. They are
reduced for the whole chunk at once. The elementwise terms are computed once for the sums and, for a
gradient, once more: keeping them would take as much memory as the logits.

Letters: C final rows, R student rows, V vocabulary of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from oisd_kernels.divergences_torch import row_gradient, row_terms
from oisd_kernels.lens.chunked.chunks import SCRATCH_ROWS
from oisd_kernels.lens.chunked.rows import FinalRows, RowMath, StudentRows, in_place
from oisd_kernels.lens.chunked.rows_torch import (
    label_logprob,
    likeliest,
    scores,
    slope,
    subtract_log,
    tiles,
)

NOWHERE = torch.iinfo(torch.int64).max  # the place of a maximum on a rank that does not hold it


class ParallelRows:
    """The row functions for the entries from `start` on of a vocabulary in the parts of `group`."""

    def __init__(self, group: dist.ProcessGroup, start: int):
        self.group, self.start = group, start

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def final_rows(
        self,
        z: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        math_: RowMath,
        entropies: bool,
        top1s: bool,
    ) -> FinalRows:
        *values, sums = self._log_softmax(z, bias, math_, top1s, labels)
        logsumexp, top1, top_logprob = values
        partial = z.new_zeros(2, len(z))
        if entropies:
            for tile, (e,) in tiles(z, 1):
                partial[0, tile] = -torch.exp(z[tile], out=e).mul_(z[tile]).sum(-1)
        if labels is not None:
            here, place = self._labels_here(labels, z)
            if z.shape[1]:
                taken = z.gather(-1, place[:, None])[:, 0]
                partial[1] = torch.where(here, taken, 0.0)
        if entropies or labels is not None:
            self.sum(partial)
        entropy, logprob = partial
        logprob = z.new_zeros(0) if labels is None else label_logprob(sums[0], sums[1], logprob)
        return FinalRows(logsumexp, entropy, top1, logprob, top_logprob)

    def final_rows_again(
        self,
        z: Tensor,
        final: FinalRows,
        bias: Tensor | None,
        labels: Tensor,
        old: RowMath,
        new: RowMath,
        entropies: bool,
    ) -> FinalRows:
        del bias
        z.add_(final.logsumexp[:, None]).mul_(old.temperature)
        return self.final_rows(z, None, labels, new._replace(softcap=None), entropies, False)

    def final_gradient(
        self,
        z: Tensor,
        final: FinalRows,
        bias: Tensor | None,
        labels: Tensor,
        factor: Tensor,
        math_: RowMath,
        operand: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        del bias
        d_logits, scale = in_place(z, operand)
        row_factor = (factor / math_.temperature)[:, None]
        own = -final.logprob.expm1() * row_factor[:, 0]  # 1 - p of the label, with all its digits
        here, place = self._labels_here(labels, z)
        for tile, (cap_slope,) in tiles(z, 1):
            tile_z = z[tile]
            if math_.softcap is not None:
                slope(torch.add(tile_z, final.logsumexp[tile, None], out=cap_slope), math_)
            tile_z.exp_().mul_(-row_factor[tile])
            if z.shape[1]:
                at = place[tile, None]
                value = torch.where(here[tile, None], own[tile, None], tile_z.gather(1, at))
                tile_z.scatter_(1, at, value)
            if math_.softcap is not None:
                tile_z.mul_(cap_slope)
            _round(tile_z, cap_slope, d_logits[tile], scale[tile])
        return d_logits, scale

    def student_rows(
        self,
        z: Tensor,
        z_final: Tensor,
        final: FinalRows,
        bias: Tensor | None,
        slot: Tensor,
        factor: Tensor,
        math_: RowMath,
        gradient: bool,
        stats: bool,
        operand: torch.dtype,
    ) -> StudentRows:
        logsumexp, top1, top_logprob, _ = self._log_softmax(z, bias, math_, stats)
        kind = math_.divergence, math_.beta
        # Of each row the divergence, <q, inner> and the entropy.
        partial = z.new_zeros(3, len(z))
        pieces = list(tiles(z, SCRATCH_ROWS))  # one scratch for both turns
        for tile, (q, d, p, t, out) in pieces:
            _probabilities(z[tile], z_final, slot[tile], q, d, p)
            if stats:
                partial[2, tile] = -torch.mul(z[tile], q, out=t).sum(-1)
            partial[0, tile], partial[1, tile] = row_terms(out, q, d, p, t, *kind, gradient)
        divergence, mean, entropy = self.sum(partial)
        agreement = (top1 == final.top1[slot]).to(z.dtype) if stats else torch.zeros_like(mean)
        values = divergence, entropy, agreement, top1, top_logprob
        if not gradient:
            return StudentRows(*values, None, z.new_zeros(0))
        d_logits, scale = in_place(z, operand)
        row_factor = (factor / math_.temperature)[:, None]
        for tile, (q, d, p, t, cap_slope) in pieces:
            tile_z = z[tile]
            if math_.softcap is not None:
                slope(torch.add(tile_z, logsumexp[tile, None], out=cap_slope), math_)
            _probabilities(tile_z, z_final, slot[tile], q, d, p)
            row_terms(tile_z, q, d, p, t, *kind, False)
            row_gradient(tile_z, q, d, mean[tile], *kind)
            tile_z.mul_(row_factor[tile])
            if math_.softcap is not None:
                tile_z.mul_(cap_slope)
            _round(tile_z, t, d_logits[tile], scale[tile])
        return StudentRows(*values, d_logits, scale)

    def _log_softmax(
        self,
        z: Tensor,
        bias: Tensor | None,
        math_: RowMath,
        top1s: bool,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw logits to log-probabilities, in place.

        -> (logsumexp, likeliest token, its log-probability), each [R], and [2, R] the exponentials
        that the sum is made of: the label's, 0 without labels, and the sum of the others.
        """
        largest = z.new_full((len(z),), -torch.inf)
        place = torch.full_like(largest, NOWHERE, dtype=torch.int64)
        for tile, _ in tiles(z, 0):
            scores(z[tile], bias, math_)
            if z.shape[1]:
                largest[tile], where = likeliest(z[tile])
                place[tile] = where + self.start
        largest.masked_fill_(largest.isnan(), torch.inf)  # a maximum that every reduction keeps
        local = largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        if top1s:
            place.masked_fill_(local != largest, NOWHERE)
            dist.all_reduce(place, dist.ReduceOp.MIN, self.group)
        sums = z.new_zeros(2, len(z))
        for tile, (e,) in tiles(z, 1):
            torch.exp(z[tile].sub_(largest[tile, None]), out=e)
            if labels is not None and z.shape[1]:
                here, at = self._labels_here(labels[tile], z)
                taken = e.gather(1, at[:, None])[:, 0]
                sums[0, tile] = own = torch.where(here, taken, 0.0)
                e.scatter_(1, at[:, None], (taken - own)[:, None])
            sums[1, tile] = e.sum(-1)
        log_sums = self.sum(sums).sum(0).log()
        for tile, _ in tiles(z, 0):
            subtract_log(z[tile], log_sums[tile])
        return largest + log_sums, place, -log_sums, sums

    def _labels_here(self, labels: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Which labels this rank holds, and where; a place that can be read for the others."""
        place = labels - self.start
        here = (place >= 0) & (place < z.shape[1])
        return here, torch.where(here, place, 0)


def _probabilities(
    lq: Tensor, z_final: Tensor, slot: Tensor, q: Tensor, d: Tensor, p: Tensor
) -> None:
    torch.exp(lq, out=q)  # of the rounded logarithm: the terms of a KL rely on that
    torch.index_select(z_final, 0, slot, out=d)
    torch.exp(d, out=p)
    d.sub_(lq)


def _round(gradient: Tensor, scratch: Tensor, out: Tensor, scale: Tensor) -> None:
    """Rows of gradient to the operands' dtype, in the same memory; float16 near 1."""
    if out.dtype == gradient.dtype:
        return
    scratch.copy_(gradient)
    if out.dtype == torch.float16 and scratch.shape[1]:
        _, exponent = torch.frexp(scratch.abs().amax(-1))
        torch.ldexp(scratch, -exponent[:, None], out=scratch)
        scale.copy_(torch.ldexp(torch.ones_like(scale), exponent))
    elif out.dtype == torch.float16:
        scale.fill_(1)
    out.copy_(scratch)
