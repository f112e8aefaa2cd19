"""The attention divergence over sampled keys by Triton kernels: launches and tiles.

Beside its results it keeps what `_slots` holds: 4 bytes a slot, and 16 more while the gradient to
the keys is computed. Each student layer gathers the teacher's keys again. Nothing waits for the
device; deterministic. Dtypes as in `triton_impl`.

Letters: S student layers, N tokens, H query heads, J key heads, K head dimension, M slots.
"""

# pyright: reportCallIssue=false
# (a launch has keywords and unpacked tuples that the kernel's signature does not show)

import math
from typing import Any

import torch
from torch import Tensor

from oisd_kernels.attention.launch import (
    RowTerms,
    arithmetic,
    capability_of,
    common_dtype,
    compute_of,
    ds_scale_of,
    ready,
    rounded_up,
    rows_of,
    strides_of,
)
from oisd_kernels.attention.sampled_kernels import (
    sampled_dk_kernel,
    sampled_dq_kernel,
    sampled_statistics_kernel,
)
from oisd_kernels.attention.sampled_torch import slots_of
from oisd_kernels.attention.spec import Alignment, Geometry, Layer, SampledStatistics
from oisd_kernels.attention.tiles import launch_tile

# Elements of key_index that are sorted at once.
SORTED = 1 << 24


def statistics(
    student: Layer,
    teacher: Layer,
    key_index: Tensor,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    geometry: Geometry,
    capability: int | None = None,
) -> SampledStatistics:
    q, k, _, scale, sink = student
    dtype = common_dtype(q, k, teacher.q, teacher.k)
    compute = compute_of(dtype)
    S, N, H, _ = q.shape
    value = q.new_zeros(S, H, N, dtype=compute)
    lse, lse_t = torch.zeros_like(value), torch.zeros_like(value[0])
    statistic = value.new_empty(S, 0, 0) if divergence == "forward_kl" else torch.zeros_like(value)
    sink_t = None if teacher.sink is None else rows_of(teacher.sink, compute)
    if N > 0:
        slots = _slots(key_index, geometry)
        kept = None if keep is None else keep.to(torch.uint8)
        for n in range(S):
            call = _Call(q[n], k[n], scale, teacher, dtype, geometry, capability)
            tile = launch_tile(call.capability, "sampled", dtype, call.width, geometry)
            sampled_statistics_kernel[(N, H // call.heads)](
                *call.tensors, None if sink is None else rows_of(sink[n], compute), sink_t,
                slots, kept, value[n], lse[n], lse_t, statistic[n],
                N, slots.shape[1], *call.groups, *call.strides,
                HAS_KEEP=kept is not None, DIVERGENCE=divergence, BETA=beta,
                LOG_BETA=math.log(beta), LOG_1M_BETA=math.log1p(-beta),
                **call.options, **call.products, HEADS=call.heads, BLOCK=tile.n, **tile.options(),
            )  # fmt: skip
    return SampledStatistics(value.mean(1), lse, lse_t, statistic)


def backward(
    student: Layer,
    alignment: Alignment,
    key_index: Tensor,
    geometry: Geometry,
    capability: int | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, lse, scale, _ = student
    teacher = alignment.teacher
    dtype = common_dtype(q, k, teacher.q, teacher.k)
    compute = compute_of(dtype)
    width = q.shape[-1]
    N, H = q.shape[:2]
    call = _Call(q, k, scale, teacher, dtype, geometry, capability)
    dq, dk = (x.new_zeros(y.shape) for x, y in zip((q, k), call.tensors[:2], strict=True))
    if N > 0:
        terms = RowTerms.of(lse.to(compute), None, alignment)
        rows = terms.lse, terms.lse_t, terms.factor, terms.shift
        log_odds = math.log(alignment.beta) - math.log1p(-alignment.beta)
        options = {"DIVERGENCE": alignment.divergence, "LOG_ODDS": log_odds, **call.options}
        slots = _slots(key_index, geometry)
        ds_scale = ds_scale_of(dtype, None, alignment, q)
        kind = dtype, call.width, geometry
        tile = launch_tile(call.capability, "sampled", *kind)
        sampled_dq_kernel[(N, H // call.heads)](
            *call.tensors, slots, *rows, ds_scale, dq,
            N, slots.shape[1], *call.groups, *call.strides, *strides_of(dq),
            SCALE_DS=ds_scale is not None, **options, **call.products, HEADS=call.heads,
            BLOCK=tile.n, **tile.options(),
        )  # fmt: skip
        tile = launch_tile(call.capability, "sampled dk", *kind)
        sampled_dk_kernel[(N, k.shape[1])](
            *call.tensors, *_queries_of(slots, terms.factor), *rows, dk,
            N, *call.groups, *call.strides, *strides_of(dk),
            **options, BLOCK=tile.m, **tile.options(),
        )  # fmt: skip
    return dq[..., :width].contiguous(), dk[..., :width].contiguous()


class _Call:
    """What the launches of one student layer share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        teacher: Layer,
        dtype: torch.dtype,
        geometry: Geometry,
        capability: int | None,
    ):
        self.tensors = q, k, qt, kt = [ready(x, dtype) for x in (q, k, teacher.q, teacher.k)]
        self.capability = capability_of(q, capability)
        H, K, Kt = q.shape[1], q.shape[2], qt.shape[2]
        self.groups = H // k.shape[1], H // kt.shape[1]
        self.heads = math.gcd(*self.groups)
        self.width = max(K, Kt)
        self.strides = strides_of(*self.tensors)
        numbers = arithmetic(q, dtype, self.capability)
        self.options: dict[str, Any] = {
            "SCALE": scale, "SCALE_T": teacher.scale, "SOFTCAP": geometry.softcap,
            "HEAD_DIM": K, "HEAD_DIM_T": Kt, "BLOCK_K": rounded_up(K), "BLOCK_KT": rounded_up(Kt),
            "ACC": numbers.pop("ACC"),
        }  # fmt: skip
        # Of the kernels that multiply matrices.
        self.products = numbers | {"ROWS": rounded_up(self.heads)}


def _slots(key_index: Tensor, geometry: Geometry) -> Tensor:
    """[N, M] int32: the token of a slot; -1 of one that does not count."""
    N, M = key_index.shape
    slots = torch.empty(N, M, dtype=torch.int32, device=key_index.device)
    size = max(SORTED // max(M, 1), 1)
    for first in range(0, N, size):
        rows = torch.arange(first, min(first + size, N), device=key_index.device)
        index, hidden = slots_of(key_index, rows, geometry)
        slots[first : first + size] = index.masked_fill_(hidden, -1)
    return slots


def _queries_of(slots: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Where each key's queries begin [N + 1], and the queries [N * M], of factor other than 0."""
    N, M = slots.shape
    counted = (slots >= 0) & (factor != 0)[:, None]
    keys, order = torch.where(counted, slots, N).flatten().sort(stable=True)
    places = torch.arange(N + 1, device=slots.device, dtype=torch.int32)
    return torch.searchsorted(keys, places), (order // max(M, 1)).int()
