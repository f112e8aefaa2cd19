"""The attention divergence over sampled keys, renormalised over them, in torch.

`sampled_triton` is the same in Triton. Rows are taken in blocks, each with its own keys gathered; a
row's M scores are in memory at once, so that nothing need be kept for the backward. Of the M slots
of a row those count that are not -1, not hidden by the masks and not a duplicate. Matmuls are
float32 (float64 where an input is). The gradient to the keys is a sum by `index_add_`:
deterministic on a CPU, on a GPU only under `torch.use_deterministic_algorithms`.

Letters: N tokens, H query heads, J key heads, K head dimension, M slots, R rows of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from oisd_kernels.attention.spec import Alignment, Geometry, Layer, SampledStatistics
from oisd_kernels.checks import compute_dtype
from oisd_kernels.divergences_torch import row_gradient, row_terms

# Elements of a block's gathered keys.
BLOCK = 1 << 19


def statistics(
    student: Layer,
    teacher: Layer,
    key_index: Tensor,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
) -> SampledStatistics:
    q, k = student.q, student.k
    compute = compute_dtype(q, k, teacher.q, teacher.k)
    sinks = [None] * len(q) if student.sink is None else student.sink.unbind(0)
    has_sink = student.sink is not None or teacher.sink is not None
    value = teacher.q.new_zeros(len(q), len(key_index), dtype=compute)
    size = max(x.shape[-2] * x.shape[-1] for x in (k, teacher.k))
    for block in _blocks(key_index, keep, geometry, size):
        lp = block.log_probabilities(teacher, geometry.softcap, compute, has_sink)
        p = lp.exp()
        for s, (queries, keys, sink) in enumerate(zip(q, k, sinks, strict=True)):
            layer = Layer(queries, keys, student.lse, student.scale, sink)
            lq = block.log_probabilities(layer, geometry.softcap, compute, has_sink)
            q_block = lq.exp()
            d = torch.sub(lp, lq, out=lq)
            out, t = torch.empty_like(d), torch.empty_like(d)
            total, _ = row_terms(out, q_block, d, p, t, divergence, beta, False)
            value[s, block.rows] = total.mean(1)
    nothing = (value.new_zeros([0] * dims) for dims in (3, 2, 3))
    return SampledStatistics(value, *nothing)


def backward(
    student: Layer, alignment: Alignment, key_index: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dk, dsink; finds both logsumexps and the statistic again."""
    q, k, _, scale, sink = student
    teacher, row_weight, _, divergence, beta = alignment
    compute = compute_dtype(q, k, teacher.q, teacher.k)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=compute, device=k.device)
    dsink = None if sink is None else dk.new_zeros(q.shape[1])
    has_sink = sink is not None or teacher.sink is not None
    size = max(x.shape[-2] * x.shape[-1] for x in (k, teacher.k))
    for block in _blocks(key_index, row_weight != 0, geometry, size):
        lp = block.log_probabilities(teacher, geometry.softcap, compute, has_sink)
        lq = block.log_probabilities(student, geometry.softcap, compute, has_sink)
        p, q_block = lp.exp(), lq.exp()
        inner = torch.sub(lp, lq, out=lp)
        d = torch.empty_like(lq)
        _, mean = row_terms(d, q_block, inner, p, lq, divergence, beta, True)
        row_gradient(d, q_block, inner, mean, divergence, beta)
        d.mul_(row_weight.to(compute)[block.rows, None, None])
        keys_d = d[..., :-1] if has_sink else d
        if dsink is not None:
            # A row sums to 0: where nearly all mass is on the sink, its own entry has cancelled.
            own = torch.where(q_block[..., -1] > 0.5, -keys_d.sum(-1), d[..., -1])
            dsink += own.sum(0)
        d = keys_d
        queries, keys = block.gather(q, k, compute)
        if geometry.softcap is not None:
            scores = block.scores(queries, keys, scale, geometry.softcap)
            d = d.mul_(1 - (scores / geometry.softcap).square())
        d = d.mul_(scale).reshape(*queries.shape[:3], -1)  # [R, J, H/J, M]
        dq[block.rows] = (d @ keys).flatten(1, 2).to(dq.dtype)
        d_keys = (d.mT @ queries).transpose(1, 2)  # [R, M, J, K]
        # A key that no row sees may hold NaN, but what it is given is 0.
        dk.index_add_(0, block.keys.flatten(), d_keys.flatten(0, 1))
    return dq, dk.to(k.dtype), dsink


class _Block(NamedTuple):
    rows: Tensor  # [R], into N
    keys: Tensor  # [R, M], into N
    hidden: Tensor  # [R, M]: slots that do not count

    def gather(self, q: Tensor, k: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        """queries [R, J, H/J, K], keys [R, J, M, K], which are 0 where they do not count."""
        keys = k.index_select(0, self.keys.flatten()).to(compute)
        keys = keys.view(*self.keys.shape, *k.shape[1:])
        keys = keys.masked_fill_(self.hidden[..., None, None], 0).transpose(1, 2)
        queries = q.index_select(0, self.rows).to(compute)
        return queries.unflatten(1, (k.shape[1], -1)), keys

    def scores(self, queries: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
        """[R, H, M], scaled and capped."""
        scores = (queries @ keys.mT).mul_(scale).flatten(1, 2)
        return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)

    def log_probabilities(
        self, layer: Layer, softcap: float | None, compute: torch.dtype, has_sink: bool
    ) -> Tensor:
        """[R, H, M]; slots that do not count hold the lowest finite number.

        has_sink: with one column more, of the layer's sink, which without one does not count.
        """
        lowest = torch.finfo(compute).min
        hidden = self.hidden[:, None]
        scores = self.scores(*self.gather(layer.q, layer.k, compute), layer.scale, softcap)
        if has_sink:
            own = scores.new_zeros(1) if layer.sink is None else layer.sink.to(compute)
            scores = torch.cat([scores, own[:, None].expand(*scores.shape[:-1], 1)], -1)
            hidden = torch.nn.functional.pad(hidden, (0, 1), value=layer.sink is None)
        scores.masked_fill_(hidden, lowest)
        scores.sub_(scores.amax(-1, keepdim=True))
        scores.sub_(scores.logsumexp(-1, keepdim=True)).clamp_min_(lowest)
        return scores.masked_fill_(hidden, lowest)


def _blocks(
    key_index: Tensor, keep: Tensor | None, geometry: Geometry, size: int
) -> Iterator[_Block]:
    """Blocks of the rows that are kept and have a key; `size` elements has a key at most."""
    tokens, slots = key_index.shape
    if tokens == 0 or slots == 0:
        return
    rows = torch.arange(tokens, device=key_index.device) if keep is None else keep.nonzero()[:, 0]
    for part in rows.split(max(BLOCK // (slots * size), 1)):
        index, hidden = slots_of(key_index, part, geometry)
        seeing = ~hidden.all(1)
        if seeing.any():
            yield _Block(part[seeing], index[seeing], hidden[seeing])


def slots_of(key_index: Tensor, rows: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Tokens of the slots of some rows [R, M], in order, and which do not count: then any token."""
    cu_seqlens = geometry.cu_seqlens.long()
    start = cu_seqlens[torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)]
    slot = key_index[rows].sort(1).values
    hidden = (slot < 0) | torch.cat([slot[:, :1] < 0, slot[:, 1:] == slot[:, :-1]], 1)
    ahead = slot - (rows - start)[:, None]
    if geometry.causal:
        hidden |= ahead > 0
    if geometry.window is not None:
        hidden |= ahead.abs() >= geometry.window
    return torch.where(hidden, rows[:, None], start[:, None] + slot), hidden
