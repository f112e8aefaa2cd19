"""Row arithmetic of a chunk in place, in torch: `rows_triton` for machines without a GPU.

Rows are taken a few at a time, such that the scratch stays in the processor's cache, and student
rows of one token together, so that the teacher's exponentials are taken once. The formulas are
those of `divergences_torch`, whose docstring names the letters.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from oisd_kernels.divergences_torch import exp, exp_, row_gradient, row_terms
from oisd_kernels.lens.chunked.chunks import SCRATCH_ROWS, tile_rows
from oisd_kernels.lens.chunked.rows import FinalRows, RowMath, StudentRows

BLOCK = 128  # entries of a row whose maximum is taken at once where its place is wanted


# The functions of `rows.Rows`, which says what the arguments are.


def final_rows(
    z: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    math_: RowMath,
    entropies: bool,
    top1s: bool,
) -> FinalRows:
    logsumexp, entropy, top_logprob = (z.new_zeros(len(z)) for _ in range(3))
    logprob = z.new_zeros(0 if labels is None else len(z))
    top1 = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for tile, (e,) in tiles(z, 1):
        scores(z[tile], bias, math_)
        if top1s:
            largest, top1[tile] = likeliest(z[tile])
        else:
            largest = z[tile].amax(-1)
        exp(z[tile].sub_(largest[:, None]), e)
        label = None if labels is None else labels[tile, None]
        own = torch.zeros_like(largest) if label is None else take_out(e, label)
        others = e.sum(-1)
        sums = others + own
        log_sums = sums.log()
        subtract_log(z[tile], log_sums)
        logsumexp[tile], top_logprob[tile] = largest + log_sums, -log_sums
        if entropies:
            entropy[tile] = -e.mul_(z[tile]).sum(-1) / sums
        if label is not None:
            taken = z[tile].gather(1, label)[:, 0]
            logprob[tile] = label_logprob(own, others, taken)
            if entropies:
                entropy[tile] -= logprob[tile].exp() * logprob[tile]
    return FinalRows(logsumexp, entropy, top1, logprob, top_logprob)


def final_rows_again(
    z: Tensor,
    final: FinalRows,
    bias: Tensor | None,
    labels: Tensor,
    old: RowMath,
    new: RowMath,
    entropies: bool,
) -> FinalRows:
    del bias  # it is in the log-probabilities
    z.add_(final.logsumexp[:, None]).mul_(old.temperature)
    return final_rows(z, None, labels, new._replace(softcap=None), entropies, False)


def final_gradient(
    z: Tensor,
    final: FinalRows,
    bias: Tensor | None,
    labels: Tensor,
    factor: Tensor,
    math_: RowMath,
    operand: torch.dtype,
) -> tuple[Tensor, Tensor]:
    del bias, operand
    row_factor = (factor / math_.temperature)[:, None]
    rest = -final.logprob.expm1()[:, None]  # 1 - p of the label, with all its digits
    for tile, (cap_slope,) in tiles(z, 1):
        tile_z = z[tile]
        if math_.softcap is not None:
            slope(torch.add(tile_z, final.logsumexp[tile, None], out=cap_slope), math_)
        exp_(tile_z).mul_(-row_factor[tile])
        tile_z.scatter_(1, labels[tile, None], rest[tile] * row_factor[tile])
        if math_.softcap is not None:
            tile_z.mul_(cap_slope)
    return z, z.new_zeros(0)


def student_rows(
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
    del operand
    divergence, entropy, log_sums = (z.new_zeros(len(z)) for _ in range(3))
    top1 = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    row_factor = (factor / math_.temperature)[:, None]
    kind = math_.divergence, math_.beta
    capped = gradient and math_.softcap is not None
    step, scratch = tile_scratch(z, SCRATCH_ROWS)
    p_of = None  # the teacher rows whose exponentials the scratch holds
    jsd = math_.divergence == "jsd"
    for tile, teachers in _pieces(slot, step):
        tile_z = z[tile]
        q, d, p, t, cap_slope = scratch[:, : len(tile_z)].unbind()
        scores(tile_z, bias, math_)
        if capped:
            slope(cap_slope.copy_(tile_z), math_)
        if stats:
            largest, top1[tile] = likeliest(tile_z)
        else:
            largest = tile_z.amax(-1)
        log_sums[tile], sums = _log_softmax(tile_z, largest, q)
        if jsd:
            q.mul_(sums.reciprocal_()[:, None])  # its terms forgive what `tile_z` is rounded by
        else:
            torch.exp(tile_z, out=q)  # of the rounded logarithm: the terms of a KL rely on that
        if teachers is None:
            lp = torch.index_select(z_final, 0, slot[tile], out=d)
        else:
            lp = z_final[teachers]
            p = p[: len(lp)]
        if teachers is None or teachers != p_of:
            exp(lp, p) if jsd else torch.exp(lp, out=p)
        p_of = teachers
        torch.sub(lp, tile_z, out=d)  # D
        if stats:
            entropy[tile] = -tile_z.mul_(q).sum(-1)
        divergence[tile], mean = row_terms(tile_z, q, d, p, t, *kind, gradient)
        if gradient:
            row_gradient(tile_z, q, d, mean, *kind)
            tile_z.mul_(row_factor[tile])
            if capped:
                tile_z.mul_(cap_slope)
    agreement = (top1 == final.top1[slot]).to(z.dtype) if stats else torch.zeros_like(divergence)
    d_logits = z if gradient else None
    return StudentRows(divergence, entropy, agreement, top1, -log_sums, d_logits, z.new_zeros(0))


def _pieces(slot: Tensor, step: int) -> Iterator[tuple[slice, slice | None]]:
    """At most `step` rows at a time, and their teachers: one, a row each, or None if scattered."""
    start = row = 0
    place = slot.tolist()

    def own(stop: int) -> Iterator[tuple[slice, slice | None]]:
        if stop > start:
            first, last = place[start], place[stop - 1]
            together = last - first == stop - start - 1  # they ascend
            yield slice(start, stop), slice(first, last + 1) if together else None

    for teacher, students in itertools.groupby(place):
        count = len(list(students))
        if count > 1 or row - start == step:
            yield from own(row)
            start = row
        if count > 1:
            for first in range(row, row + count, step):
                yield slice(first, min(first + step, row + count)), slice(teacher, teacher + 1)
            start = row + count
        row += count
    yield from own(row)


def tiles(z: Tensor, scratch: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of rows, with scratch of their shape."""
    step, buffers = tile_scratch(z, scratch)
    for start in range(0, len(z), step):
        stop = min(start + step, len(z))
        yield slice(start, stop), [buffer[: stop - start] for buffer in buffers]


def tile_scratch(z: Tensor, scratch: int) -> tuple[int, Tensor]:
    rows, vocabulary = z.shape
    step = tile_rows(z.device, vocabulary, rows)
    return step, z.new_empty(scratch, min(step, max(rows, 1)), vocabulary)


def likeliest(z: Tensor) -> tuple[Tensor, Tensor]:
    """`z.max(-1)` of [R, V]: the first of the largest entries of a row, the first NaN if any.

    torch looks for a place entry by entry, on a CPU, and for a maximum in wide registers; so the
    places looked at are those of the maxima of blocks, and of one block.
    """
    vocabulary = z.shape[1]
    if z.device.type != "cpu" or vocabulary < 2 * BLOCK:
        largest, place = z.max(-1)
        return largest, place
    whole = vocabulary - vocabulary % BLOCK
    maxima = z[:, :whole].unflatten(-1, (-1, BLOCK)).amax(-1)
    if whole < vocabulary:
        maxima = torch.cat([maxima, z[:, whole:].amax(-1, keepdim=True)], -1)
    # The last block may overlap the one before it, which comes first where it has the maximum.
    start = (maxima.argmax(-1, keepdim=True) * BLOCK).clamp_max_(vocabulary - BLOCK)
    largest, place = z.gather(-1, start + torch.arange(BLOCK)).max(-1)
    return largest, start[:, 0] + place


def scores(z: Tensor, bias: Tensor | None, math_: RowMath, slope_out: Tensor | None = None) -> None:
    """Logits to scores, in place; `slope_out` receives the derivative of the softcap."""
    if bias is not None:
        z.add_(bias)
    if math_.softcap is not None:
        z.div_(math_.softcap).tanh_()
        if slope_out is not None:
            torch.mul(z, z, out=slope_out).neg_().add_(1)
        z.mul_(math_.softcap)
    if math_.temperature != 1.0:
        z.div_(math_.temperature)


def slope(z: Tensor, math_: RowMath) -> None:
    """Scores to the derivative of the softcap, in place: 1 - tanh(logits / c)^2."""
    assert math_.softcap is not None
    z.mul_(math_.temperature / math_.softcap).square_().neg_().add_(1)


def _log_softmax(z: Tensor, largest: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Scores to log-probabilities, in place; e = exp(scores - largest) -> (log of its sum, sum)."""
    sums = exp(z.sub_(largest[:, None]), e).sum(-1)
    log_sums = sums.log()
    subtract_log(z, log_sums)
    return log_sums, sums


def subtract_log(z: Tensor, log_sums: Tensor) -> None:
    """Scores less their largest to log-probabilities, in place; finite where they are 0."""
    z.sub_(log_sums[:, None]).clamp_min_(torch.finfo(z.dtype).min)


def take_out(e: Tensor, label: Tensor) -> Tensor:
    """Entries [R] of e [R, V] at label [R, 1]; e holds 0 there afterwards."""
    own = e.gather(1, label)[:, 0]
    e.scatter_(1, label, 0)
    return own


def label_logprob(own: Tensor, others: Tensor, logprob: Tensor) -> Tensor:
    """log(own / (own + others)) with all its digits near 0 too, where `logprob` has none left."""
    return torch.where(others < own, -torch.log1p(others / own), logprob)
