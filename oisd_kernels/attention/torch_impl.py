"""Attention, its divergence and both their gradients in blocks, in torch: for CPUs above all.

The functions of `implementation`, which says what they are given, in plain tensor operations on
blocks of queries x keys, never a map of a whole sequence. The gradient to the scores is P * (dP -
delta + E), delta = <out, d_out> - d_lse, where E is `_Pull`'s; with a softcap c it is multiplied by
1 - tanh(scores / c)^2. Matmuls are float32 (float64 where an input is), whatever the inputs' dtype.
Asks the device for the sequences' lengths and for the rows that are kept. Deterministic.

Letters: N tokens, H query heads, J key heads, K head dimension, S student layers; those of a block
as in `torch_blocks`.
"""

import math

import torch
from torch import Tensor

from oisd_kernels.attention.spec import Alignment, Geometry, Layer, Plain
from oisd_kernels.attention.torch_blocks import Block, Group, Scratch, Tile, groups
from oisd_kernels.checks import compute_dtype
from oisd_kernels.divergences_torch import gradient_factor, inner, row_terms


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    scale: float,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    return out, _softmax_pass(q, k, v, out, geometry, scale, sink=sink)


def logsumexp(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, keep: Tensor | None = None
) -> Tensor:
    return _softmax_pass(q, k, None, None, geometry, scale, keep)


def statistics(
    student: Layer,
    teacher: Layer,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """A block of the teacher's scores serves all S layers."""
    q, k, lse, scale, _ = student
    tokens, heads, _ = teacher.q.shape
    compute = compute_dtype(q, k, teacher.q, teacher.k)
    value = teacher.q.new_zeros(len(q), tokens, dtype=compute)
    has_statistic = divergence != "forward_kl"
    statistic = value.new_zeros((len(q), heads, tokens) if has_statistic else (len(q), 0, 0))
    scratch = Scratch(compute, value.device)
    for group in groups(geometry, heads):
        kept = None if keep is None else keep[group.index] & group.exists
        if kept is not None and not kept.any():
            continue
        keys = [group.gather(x, None, compute) for x in (*k, teacher.k)]
        for tile in group.rows(kept).tiles():
            layers = [
                _Scores(tile, *one, scale, compute) for one in zip(q, keys[:-1], lse, strict=True)
            ]
            other = _Scores(tile, teacher.q, keys[-1], teacher.lse, teacher.scale, compute)
            sums, means = value.new_zeros(2, len(q), *other.q.shape[:-1]).unbind()  # [S, B, H, r]
            for block in tile.blocks():
                lp = other.log_probabilities(block, scratch, "lp")
                p = torch.exp(lp, out=scratch("p", lp.shape))
                for s, layer in enumerate(layers):
                    lq = layer.log_probabilities(block, scratch, "lq")
                    q_block = torch.exp(lq, out=scratch("q", lq.shape))
                    d = torch.sub(lp, lq, out=lq)
                    out, t = scratch("out", d.shape), scratch("t", d.shape)
                    terms = row_terms(out, q_block, d, p, t, divergence, beta, has_statistic)
                    sums[s] += terms[0]
                    means[s] += terms[1]
            if divergence == "reverse_kl":
                means.neg_()
            for s in range(len(q)):
                if has_statistic:
                    tile.put_statistic(statistic[s], means[s][..., None])
                tile.put_row(value[s], sums[s].mean(1)[:, None, :, None])
    return value, statistic


def backward(
    student: Layer, geometry: Geometry, plain: Plain | None, alignment: Alignment | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, lse, scale, _ = student
    v = None if plain is None else plain.v
    compute = compute_dtype(q, k, v, None if plain is None else plain.d_out)
    dq, dk = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    dv = None if v is None else torch.zeros_like(v, memory_format=torch.contiguous_format)
    scratch = Scratch(compute, q.device)
    delta_rows = None if plain is None else delta(plain, compute)
    keep = None if alignment is None else alignment.row_weight != 0
    for group in groups(geometry, q.shape[1]):
        kept = None if keep is None else keep[group.index] & group.exists
        aligned = kept is not None and bool(kept.any())
        if v is None and not aligned:
            continue
        # A key that no kept row sees may hold NaN, and 0 * NaN would reach its neighbours.
        seen = group.seen(kept) if kept is not None and aligned else None
        keys = group.gather(k, seen if v is None else None, compute)
        values = None if v is None else group.gather(v, None, compute)
        other = None
        if alignment is not None and aligned:
            other = group.gather(alignment.teacher.k, seen, compute)
        d_keys = torch.zeros_like(keys)
        d_values = None if values is None else torch.zeros_like(values)
        for tile in group.rows(kept if v is None else None).tiles():
            layer = _Scores(tile, q, keys, lse, scale, compute)
            own = None
            if plain is not None and values is not None and d_values is not None:
                assert delta_rows is not None
                own = _Own(tile, values, d_values, plain.d_out, delta_rows, compute)
            pull = None
            if alignment is not None and other is not None:
                pull = _Pull(tile, alignment, other, compute)
            d_tile = _tile_gradient(tile, layer, d_keys, own, pull, scratch)
            tile.put(dq, d_tile.mul_(scale))
        _put_keys(group, dk, d_keys)
        if dv is not None and d_values is not None:
            _put_keys(group, dv, d_values)
    return dq, dk, dv


def delta(plain: Plain, compute: torch.dtype) -> Tensor:
    """<out, d_out> - d_lse, [H, N]."""
    if plain.delta is not None:
        return plain.delta.to(compute)
    found = (plain.out.to(compute) * plain.d_out.to(compute)).sum(-1).T
    return found if plain.d_lse is None else found - plain.d_lse


class _Scores:
    """A tile's queries of one layer, its keys, and their scores."""

    def __init__(
        self,
        tile: Tile,
        q: Tensor,
        keys: Tensor,  # [B, J, T, K]
        lse: Tensor | None,
        scale: float,
        compute: torch.dtype,
        keep: Tensor | None = None,  # [B, r]
    ):
        self.softcap = tile.group.geometry.softcap
        self.heads, self.keys = q.shape[1], keys
        self.q = tile.take(q, compute, keep).mul_(scale)  # [B, H, r, K]
        self.lse = None if lse is None else tile.take_statistic(lse, compute, keep)
        self.lowest = torch.finfo(compute).min

    def scores(self, block: Block, scratch: Scratch, name: str) -> Tensor:
        """[B, H, r, c], scaled and capped; masked ones as they come."""
        out = scratch(name, (*self.q.shape[:-1], block.keys.stop - block.keys.start))
        torch.bmm(_by_key_head(self.q, self.keys), _flat(self.keys, block).mT, out=_like(out, self))
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def log_probabilities(self, block: Block, scratch: Scratch, name: str) -> Tensor:
        """As `scores`, less logsumexp; -inf and masked ones are the lowest finite number."""
        assert self.lse is not None
        out = self.scores(block, scratch, name).sub_(self.lse).clamp_min_(self.lowest)
        return out if block.hidden is None else out.masked_fill_(block.hidden, self.lowest)


def _by_key_head(x: Tensor, keys: Tensor) -> Tensor:
    """x [B, H, r, K] -> [B*J, H/J*r, K]: the rows that read the same key head, one matmul's."""
    return x.reshape(keys.shape[0] * keys.shape[1], -1, x.shape[-1])


def _flat(keys: Tensor, block: Block) -> Tensor:
    """keys [B, J, T, K] -> a block's [B*J, c, K]."""
    return keys.flatten(0, 1)[:, block.keys]


def _like(x: Tensor, layer: _Scores) -> Tensor:
    return _by_key_head(x, layer.keys)


class _Own:
    """What attention's own gradient needs of a tile."""

    def __init__(
        self,
        tile: Tile,
        values: Tensor,
        d_values: Tensor,
        d_out: Tensor,
        delta: Tensor,
        compute: torch.dtype,
    ):
        self.values, self.d_values = values, d_values
        self.d_out = tile.take(d_out, compute)
        self.delta = tile.take_statistic(delta, compute)

    def add_to_values(self, p: Tensor, block: Block) -> None:
        d_out = _by_key_head(self.d_out, self.values)
        _flat(self.d_values, block).baddbmm_(_by_key_head(p, self.values).mT, d_out)

    def gradient(self, block: Block, out: Tensor) -> Tensor:
        """dP - delta."""
        d_out = _by_key_head(self.d_out, self.values)
        torch.bmm(d_out, _flat(self.values, block).mT, out=_by_key_head(out, self.values))
        return out.sub_(self.delta)


class _Pull:
    """What the divergence's gradient needs of a tile; rows of weight 0 hold 0."""

    def __init__(self, tile: Tile, alignment: Alignment, keys: Tensor, compute: torch.dtype):
        self.divergence, self.beta = alignment.divergence, alignment.beta
        keep = alignment.row_weight[tile.index] != 0
        self.any = bool(keep.any())
        if not self.any:
            return
        teacher = alignment.teacher
        self.layer = _Scores(tile, teacher.q, keys, teacher.lse, teacher.scale, compute, keep)
        self.weight = tile.take_row(alignment.row_weight.to(compute), keep)
        if self.divergence != "forward_kl":
            statistic = tile.take_statistic(alignment.statistic, compute, keep)
            self.mean = statistic if self.divergence == "jsd" else -statistic
            self.factor = gradient_factor(self.divergence, self.beta) * self.weight

    def gradient(self, lq: Tensor, block: Block, scratch: Scratch) -> Tensor:
        """E of a block; for the forward KL, whose gradient is weight * (P - T), weight * T."""
        lp = self.layer.log_probabilities(block, scratch, "lp")
        if self.divergence == "forward_kl":
            return lp.exp_().mul_(self.weight)
        d = inner(lp.sub_(lq), scratch("t", lp.shape), self.divergence, self.beta)
        return d.sub_(self.mean).mul_(self.factor)


def _tile_gradient(
    tile: Tile,
    layer: _Scores,
    d_keys: Tensor,  # [B, J, T, K], added to
    own: _Own | None,
    pull: _Pull | None,
    scratch: Scratch,
) -> Tensor:
    """Gradient to the tile's queries, still to be multiplied by the scale."""
    d_tile = torch.zeros_like(layer.q)
    d_rows, q_rows = _by_key_head(d_tile, layer.keys), _by_key_head(layer.q, layer.keys)
    pull = pull if pull is not None and pull.any else None
    if own is None and pull is None:
        return d_tile
    for block in tile.blocks():
        lq = layer.log_probabilities(block, scratch, "lq")
        p = torch.exp(lq, out=scratch("p", lq.shape))
        if own is not None:
            own.add_to_values(p, block)
        d = _score_gradient(lq, p, block, own, pull, scratch)
        if layer.softcap is not None:
            # A masked score is the lowest number, whose slope would be infinite; d is 0 there.
            assert layer.lse is not None
            capped = lq.add_(layer.lse).clamp_min_(-layer.softcap)
            d.mul_(capped.div_(layer.softcap).square_().neg_().add_(1))
        d = _by_key_head(d, layer.keys)
        d_rows.baddbmm_(d, _flat(layer.keys, block))
        _flat(d_keys, block).baddbmm_(d.mT, q_rows)
    return d_tile


def _score_gradient(
    lq: Tensor,
    p: Tensor,
    block: Block,
    own: _Own | None,
    pull: _Pull | None,
    scratch: Scratch,
) -> Tensor:
    """dS of a block, before the softcap's slope."""
    d = None if own is None else own.gradient(block, scratch("d", p.shape))
    if pull is None:
        assert d is not None
        return d.mul_(p)
    pulled = pull.gradient(lq, block, scratch)
    if pull.divergence == "forward_kl":
        d = pull.weight if d is None else d.add_(pull.weight)
        return torch.mul(p, d, out=scratch("d", p.shape)).sub_(pulled)
    return (pulled if d is None else d.add_(pulled)).mul_(p)


def _softmax_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    out: Tensor | None,
    geometry: Geometry,
    scale: float,
    keep: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """lse [H, N] of the keys; fills `out` where there are values."""
    compute = compute_dtype(q, k, v)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=compute)
    scratch = Scratch(compute, q.device)
    for group in groups(geometry, q.shape[1]):
        kept = None if keep is None else keep[group.index] & group.exists
        keys = group.gather(k, None, compute)
        values = None if v is None else group.gather(v, None, compute)
        for tile in group.rows(kept).tiles():
            layer = _Scores(tile, q, keys, None, scale, compute)
            largest = torch.full_like(layer.q[..., :1], layer.lowest)
            total, mixed = torch.zeros_like(largest), torch.zeros_like(layer.q)
            for block in tile.blocks():
                s = layer.scores(block, scratch, "lq")
                if block.hidden is not None:
                    s.masked_fill_(block.hidden, -math.inf)
                new = torch.maximum(largest, s.amax(-1, keepdim=True))
                s.sub_(new).exp_()
                shrink = largest.sub_(new).exp_()
                total.mul_(shrink).add_(s.sum(-1, keepdim=True))
                largest = new
                if values is not None:
                    rows = _by_key_head(mixed.mul_(shrink), values)
                    rows.baddbmm_(_by_key_head(s, values), _flat(values, block))
            tile.put_statistic(lse, largest + total.log())
            if out is not None:
                own = 0 if sink is None else (sink.to(compute)[:, None, None] - largest).exp_()
                tile.put(out, mixed.div_(total + own).masked_fill_(total == 0, 0))
    return lse


def _put_keys(group: Group, x: Tensor, values: Tensor) -> None:
    """values [B, J, T, K] to their rows of x [N, J, K]."""
    values = values.transpose(1, 2)
    if group.size == 1:
        x[group.start : group.start + group.length] = values[0].to(x.dtype)
    else:
        x[group.index[group.exists]] = values[group.exists].to(x.dtype)
