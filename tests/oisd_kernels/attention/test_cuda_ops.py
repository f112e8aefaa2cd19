"""impl="cuda" of the public operations, by each engine; what only a GPU can show, on one.

Emulated, the forward is torch's, because csrc/ has none.
"""

import math

import pytest
import torch
from torch import Tensor

from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention, reference
from oisd_kernels.attention import cuda_impl, implementation, torch_impl
from tests.oisd_kernels.cuda.csrc_cases import (
    BF16,
    GRADIENT_BOUND,
    MACHINES,
    by_engine,
    check_close,
    guarded,
    set_up,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def set_up_ops(machine: str, monkeypatch, gpu: tuple[int, str]) -> None:
    set_up(machine, monkeypatch, *gpu)
    if machine == "cpu":
        for name in ("forward", "logsumexp"):
            monkeypatch.setattr(cuda_impl, name, getattr(torch_impl, name))
        monkeypatch.setattr(implementation, "choose", lambda op, impl, *rest: impl)


class Given:
    """Tensors of one call, packed; `gradients` of both terms at once."""

    def __init__(self, machine: str, lengths=(67, 5), heads=(4, 2, 1), head=128, seed=0) -> None:
        torch.manual_seed(seed)
        N, (H, J, Jt) = sum(lengths), heads
        make = lambda heads, factor=1.0: factor * torch.randn(N, heads, head)  # noqa: E731
        tensors = (make(H, 2.0), make(J), make(J), make(H), make(Jt), 1e-3 * make(H))
        tensors = [guarded(x.to(BF16).to(machine)) for x in tensors]
        self.q, self.k, self.v, self.q_teacher, self.k_teacher, self.d_out = tensors
        self.weight = 1e-2 * torch.randn(N)
        self.weight[::3] = 0
        self.weight = self.weight.to(machine)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(machine)

    def fused(self, *sinks: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k, v with the alignment inside attention's backward.

        sinks: the student's, whose gradient is last, and the teacher's; or none.
        """
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, *sinks[:1])]
        alignment = AttentionAlignment()
        out, _ = flash_attention(
            *leaves[:3], sink=leaves[3] if sinks else None, cu_seqlens=self.cu_seqlens,
            alignment=alignment, impl="cuda",
        )  # fmt: skip
        rows = alignment.loss(
            self.q_teacher, self.k_teacher, token_weight=self.weight,
            sink_teacher=sinks[1] if sinks else None,
        )  # fmt: skip
        upstream = [self.d_out, torch.ones_like(rows)]
        return torch.autograd.grad([out, rows], leaves, upstream)

    def divergence(self, function=attention_divergence, **options) -> tuple[Tensor, ...]:
        """Loss of each row and gradients of q and k, of two student layers."""
        layers = [torch.stack((x, 0.5 * x)) for x in (self.q, self.k)]
        teacher = [self.q_teacher, self.k_teacher]
        if function is not attention_divergence:
            layers, teacher = [x.double() for x in layers], [x.double() for x in teacher]
        leaves = [x.requires_grad_() for x in layers]
        given = {"cu_seqlens": self.cu_seqlens, "token_weight": self.weight}
        rows = function(*leaves, *teacher, **given, **options)
        return rows.detach(), *torch.autograd.grad(rows.sum(), leaves)

    def wanted(self, *sinks: Tensor) -> tuple[Tensor, ...]:
        """`fused` in float64."""
        tensors = self.q, self.k, self.v, *sinks[:1]
        leaves = [x.detach().double().requires_grad_() for x in tensors]
        own, last = (leaves[3], sinks[1].double()) if sinks else (None, None)
        out, _ = reference.attention(*leaves[:3], sink=own, cu_seqlens=self.cu_seqlens)
        teacher = self.q_teacher.double(), self.k_teacher.double()
        rows = reference.attention_divergence(
            *leaves[:2], *teacher, cu_seqlens=self.cu_seqlens, token_weight=self.weight,
            sink=own, sink_teacher=last,
        )  # fmt: skip
        return torch.autograd.grad((out * self.d_out.double()).sum() + rows.sum(), leaves)


@by_engine
@pytest.mark.parametrize("machine", MACHINES)
def test_attention_with_its_alignment(machine, gpu, monkeypatch):
    set_up_ops(machine, monkeypatch, gpu)
    given = Given(machine)
    for name, got, wanted in zip(("dq", "dk", "dv"), given.fused(), given.wanted(), strict=True):
        assert got.dtype == BF16
        check_close(got, wanted, GRADIENT_BOUND, name)


@by_engine
@pytest.mark.parametrize("machine", MACHINES)
def test_sinks(machine, gpu, monkeypatch):
    """Elementwise beside the kernels: nothing of them is in csrc/."""
    set_up_ops(machine, monkeypatch, gpu)
    given = Given(machine, lengths=(65, 3))
    sinks = (torch.linspace(-1, 3, 4, device=machine), torch.linspace(2, 0, 4, device=machine))
    names = ("dq", "dk", "dv", "dsink")
    for name, got, wanted in zip(names, given.fused(*sinks), given.wanted(*sinks), strict=True):
        check_close(got, wanted, GRADIENT_BOUND, name)


@by_engine
@pytest.mark.parametrize("machine", MACHINES)
def test_two_layers_against_one(machine, gpu, monkeypatch):
    set_up_ops(machine, monkeypatch, gpu)
    given = Given(machine, lengths=(65, 3))
    wanted = given.divergence(reference.attention_divergence)
    got = given.divergence(impl="cuda")
    bounds = (1e-4, GRADIENT_BOUND, GRADIENT_BOUND)
    for name, x, y, bound in zip(("rows", "dq", "dk"), got, wanted, bounds, strict=True):
        check_close(x, y, bound, name)


# What only a GPU shows


@needs_gpu
@by_engine
def test_the_current_stream(gpu, monkeypatch):
    """Where another stream is current, what it is given is not there before that stream is."""
    set_up("cuda", monkeypatch, *gpu)
    given = Given("cuda")
    wanted = given.fused()
    late = Given("cuda", seed=1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for name in ("q", "k", "v", "q_teacher", "k_teacher", "d_out", "weight"):
            getattr(late, name).copy_(getattr(given, name))
        got = late.fused()
    torch.cuda.synchronize()
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


@needs_gpu
@by_engine
def test_a_captured_graph(gpu, monkeypatch):
    set_up("cuda", monkeypatch, *gpu)
    given, other = Given("cuda"), Given("cuda", seed=1)
    wanted = other.fused()
    given.fused()  # what is loaded at first use is not to be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = given.fused()
    for name in ("q", "k", "v", "q_teacher", "k_teacher", "d_out", "weight"):
        getattr(given, name).copy_(getattr(other, name))
    for _ in range(2):
        for x in got:
            x.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)


@needs_gpu
@by_engine
def test_more_than_two_to_the_31_elements(gpu, monkeypatch):
    set_up("cuda", monkeypatch, *gpu)
    H, J, K, length = 64, 2, 128, 128
    sequences = (1 << 31) // (H * K * length) + 8
    if torch.cuda.mem_get_info()[0] < 10 * 2 * sequences * length * H * K:
        pytest.skip("not enough memory on the GPU")
    given = Given("cuda", lengths=(length,), heads=(H, J, J))
    names = ("q", "k", "v", "q_teacher", "k_teacher", "d_out", "weight")
    for name in names:  # the last sequence alone is not 0
        last = getattr(given, name)
        many = last.new_zeros((sequences * length, *last.shape[1:]))
        many[-length:] = last
        setattr(given, name, many)
    given.weight[:-length] = 1e-2
    given.cu_seqlens = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * length
    got = [x[-length:].clone() for x in given.fused()]
    for name in names:
        setattr(given, name, getattr(given, name)[-length:].clone())
    torch.cuda.empty_cache()
    given.cu_seqlens = torch.tensor([0, length], device="cuda", dtype=torch.int32)
    for x, y in zip(got, given.fused(), strict=True):
        assert x.norm() > 0 and torch.equal(x, y)


@needs_gpu
@by_engine
def test_another_device(gpu, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    set_up("cuda", monkeypatch, *gpu)
    first, second = Given("cuda:0").fused(), Given("cuda:1").fused()
    assert torch.cuda.current_device() == 0
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y.to(x.device))
