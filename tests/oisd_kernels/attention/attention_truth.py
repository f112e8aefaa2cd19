"""Attention and its alignment in float64 autograd through the reference; the kernels' own chain."""

import math

import torch
from torch import Tensor

from oisd_kernels import reference
from oisd_kernels.attention import triton_impl
from oisd_kernels.attention.spec import Alignment, Geometry, Layer
from tests.oisd_kernels.test_reference import assert_gradient_close, leaf, normal

SCALE, SCALE_T = 0.4, 0.25


def geometry(lengths, form=(True, None, None)) -> Geometry:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return Geometry(offsets, len(lengths), None, *form)


def inputs(N, H=2, J=1, Jt=2, K=6, Kt=20, dtype=torch.float64, spread=1.5):
    """Student q, k, v and teacher q, k, packed."""
    shapes = ((H, K), (J, K), (J, K), (H, Kt), (Jt, Kt))
    return [(spread * normal(N, *x, seed=seed)).to(dtype) for seed, x in enumerate(shapes)]


def eager(q, k, v, geometry, scale) -> tuple[Tensor, Tensor]:
    """out [N, H, K], lse [H, N], sequence by sequence."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outs, lses = [], []
    offsets = geometry.cu_seqlens.tolist()
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        rows = slice(begin, end)
        scores = scale * torch.einsum("ihk,jhk->hij", q[rows], k[rows])
        if geometry.softcap is not None:
            scores = geometry.softcap * torch.tanh(scores / geometry.softcap)
        ahead = torch.arange(end - begin)[None] - torch.arange(end - begin)[:, None]
        hidden = ahead > 0 if geometry.causal else torch.zeros_like(ahead, dtype=torch.bool)
        if geometry.window is not None:
            hidden = hidden | (ahead.abs() >= geometry.window)
        scores = scores.masked_fill(hidden, -math.inf)
        outs.append(torch.einsum("hij,jhk->ihk", scores.softmax(-1), v[rows]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def row_loss(q, k, qt, kt, geometry, divergence, beta, token_weight=None) -> Tensor:
    return reference.attention_divergence(
        q, k, qt, kt, token_weight=token_weight, cu_seqlens=geometry.cu_seqlens,
        causal=geometry.causal, window=geometry.window, softcap=geometry.softcap,
        scale=SCALE, scale_teacher=SCALE_T, divergence=divergence, beta=beta,
    )  # fmt: skip


class Truth:
    """Float64 autograd on the same inputs: plain gradient, that of the alignment."""

    def __init__(self, q, k, v, qt, kt, geometry, d_out=None, d_lse=None):
        self.q, self.k, self.v = (leaf(x.double()) for x in (q, k, v))
        self.qt, self.kt, self.geometry = qt.double(), kt.double(), geometry
        self.out, self.lse = eager(self.q, self.k, self.v, geometry, SCALE)

    def plain(self, d_out, d_lse):
        total = (self.out * d_out.double()).sum() + (self.lse * d_lse.double()).sum()
        return torch.autograd.grad(total, (self.q, self.k, self.v), retain_graph=True)

    def alignment(self, weight, divergence, beta):
        rows = row_loss(
            self.q, self.k, self.qt, self.kt, self.geometry, divergence, beta, weight.double()
        )
        return rows.detach(), torch.autograd.grad(rows.sum(), (self.q, self.k))


def statistics(student: Layer, *settings) -> tuple[Tensor, Tensor]:
    """Value [N] and statistic [H, N] of one student layer."""
    layers = Layer(*(x[None] for x in student[:3]), student.scale)
    value, statistic = triton_impl.statistics(layers, *settings)
    return value[0], statistic[0]


def aligned(q, k, qt, kt, geometry, divergence, beta, weight):
    """Value, statistic, lse and the alignment for a backward, all by the kernels."""
    lse = triton_impl.logsumexp(q, k, geometry, SCALE)
    teacher = Layer(qt, kt, triton_impl.logsumexp(qt, kt, geometry, SCALE_T), SCALE_T)
    keep = weight != 0
    student = Layer(q, k, lse, SCALE)
    value, statistic = statistics(student, teacher, keep, divergence, beta, geometry)
    alignment = Alignment(teacher, weight / q.shape[1], statistic, divergence, beta)
    return value, lse, alignment


def signed_weights(N, dtype=torch.float64) -> Tensor:
    """Of both signs, some 0."""
    weight = normal(N, seed=9).to(dtype)
    weight[::4] = 0
    return weight


def check_alignment(got, truth, bound, floor=1e-6):
    for a, b in zip(got, truth, strict=True):
        assert_gradient_close(a, b, bound, floor)
