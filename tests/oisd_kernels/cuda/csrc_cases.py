"""Cases for the kernels of csrc/, their inputs, and float64's answers."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from oisd_kernels import reference
from oisd_kernels.attention import cuda_impl
from oisd_kernels.attention.spec import Alignment, Geometry, Layer, Plain
from oisd_kernels.cuda import build
from tests.oisd_kernels.cuda import emulation

KIB = 1024
WIDE, NARROW = (163 * KIB, "WARP_ENGINE"), (99 * KIB, "WARP_ENGINE")
HOPPER, SPECIALIZED = (227 * KIB, "WARPGROUP_ENGINE"), (227 * KIB, "SPECIALIZED_ENGINE")
GPUS = {"wide": WIDE, "hopper": HOPPER, "specialized": SPECIALIZED}  # one for each engine
by_engine = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 5e-3
STEEP_BOUND = 1e-4  # of a loss from scores of some hundred, whose own rounding is 1e-5
TINY = 1e-6  # nats a token: where the loss itself is that small
ODD = (1, 2, 127, 0, 128, 129)

needs_emulation = pytest.mark.skipif(
    emulation.compiler() is None, reason="no g++ for the emulation"
)
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")
MACHINES = [
    pytest.param("cpu", id="emulated", marks=needs_emulation),
    pytest.param(
        "cuda", id="gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    ),
]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    head: int
    gpu: tuple[int, str]  # shared memory of a block, engine
    divergence: str
    beta: float = 0.5
    causal: bool = True
    window: int | None = None
    heads: tuple[int, int, int] = (2, 1, 1)  # H, J, the teacher's J
    lengths: tuple[int, ...] = ODD

    def __str__(self) -> str:
        tile = cuda_impl.choose_tile(self.head, 3, *self.gpu)
        band = ("causal" if self.causal else "full") + f"-window{self.window}" * bool(self.window)
        dtype = str(self.dtype).removeprefix("torch.")
        heads = "x".join(map(str, self.heads))
        return f"{dtype}-{tile.name}{self.head}-{self.divergence}{self.beta}-{band}-{heads}"


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case(BF16, 128, WIDE, "jsd"),
    Case(BF16, 128, WIDE, "jsd", 0.25, causal=False, window=40, heads=(2, 2, 1), lengths=(3, 150)),
    Case(BF16, 64, WIDE, "reverse_kl", heads=(4, 2, 1)),
    Case(FP16, 128, NARROW, "forward_kl", causal=False),
    Case(FP16, 128, NARROW, "forward_kl", window=33, heads=(8, 1, 1), lengths=(129, 40)),
    Case(BF16, 128, HOPPER, "jsd", heads=(4, 2, 1)),
    Case(FP16, 64, HOPPER, "reverse_kl", causal=False, window=70, lengths=(129, 200)),
    Case(BF16, 128, SPECIALIZED, "jsd", heads=(4, 2, 1)),
    Case(FP16, 64, SPECIALIZED, "reverse_kl", causal=False, window=70, lengths=(129, 200)),
    Case(BF16, 128, SPECIALIZED, "forward_kl", window=33, heads=(4, 1, 1), lengths=(129, 40)),
]
ON_HOPPER = [case for case in CASES if case.gpu[1] != "WARP_ENGINE"]
SWEEP = [
    Case(dtype, head, gpu, divergence, beta, causal, window, heads)
    for dtype in (BF16, FP16)
    for head, gpu in (
        *((64, WIDE), (128, WIDE), (128, NARROW), (64, HOPPER), (128, HOPPER)),
        *((64, SPECIALIZED), (128, SPECIALIZED)),
    )
    for divergence, beta in (("jsd", 0.5), ("jsd", 0.9), ("forward_kl", 0.5), ("reverse_kl", 0.5))
    for causal, window, heads in ((True, None, (4, 1, 1)), (False, 65, (4, 4, 2)))
]


def emulate(
    monkeypatch: pytest.MonkeyPatch, limit: int = WIDE[0], engine: str = WIDE[1]
) -> emulation.Emulator:
    """The host's code launches on the CPU instead."""
    run = emulation.Emulator()
    monkeypatch.setattr(cuda_impl, "run", run)
    monkeypatch.setattr(cuda_impl, "tensor_map", emulation.tensor_map)
    monkeypatch.setattr(cuda_impl, "device_type", lambda: "cpu")
    monkeypatch.setattr(cuda_impl, "shared_limit", lambda device: limit)
    monkeypatch.setattr(cuda_impl, "engine", lambda device: engine)
    return run


def set_up(
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
    limit: int = WIDE[0],
    engine: str = WIDE[1],
) -> None:
    if machine == "cpu":
        emulate(monkeypatch, limit, engine)
    elif engine != WIDE[1] and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    monkeypatch.setattr(cuda_impl, "shared_limit", lambda device: limit)
    monkeypatch.setattr(cuda_impl, "engine", lambda device: engine)


def guarded(x: Tensor) -> Tensor:
    """A copy in the middle of NaN, with strides that are no tensor's own."""
    rows, heads, head = x.shape
    around = x.new_full((rows + 4, heads + 2, head + 8), math.nan)
    inside = around[2:-2, 1:-1, :head]
    inside.copy_(x)
    return inside


class Inputs:
    """What a case is computed from, and float64's answers to the same rounded numbers."""

    def __init__(
        self, case: Case, machine: str = "cpu", seed: int = 0, spread: float = 2.0
    ) -> None:
        torch.manual_seed(seed)
        N, K, (H, J, Jt) = sum(case.lengths), case.head, case.heads
        make = lambda heads, factor=1.0: factor * torch.randn(N, heads, K)  # noqa: E731
        self.case, self.scale, self.scale_teacher = case, K**-0.5, 1.3 * K**-0.5
        half = (make(H, spread), make(J), make(J), make(H), make(Jt), 1e-3 * make(H))
        half = [guarded(x.to(case.dtype).to(machine)) for x in half]
        self.q, self.k, self.v, self.q_teacher, self.k_teacher, self.d_out = half
        self.weight = 1e-2 * torch.randn(N)
        self.weight[::5] = 0
        self.weight[N - N // 3 :] = 0  # whole tiles, and at least one sequence of ODD
        self.d_lse = 1e-3 * torch.randn(H, N)
        self.weight, self.d_lse = self.weight.to(machine), self.d_lse.to(machine)
        self.cu_seqlens = torch.tensor([0, *case.lengths], device=machine).cumsum(0).int()

    def geometry(self) -> Geometry:
        case = self.case
        return Geometry(
            self.cu_seqlens, len(case.lengths), None, case.causal, case.window, softcap=None
        )

    def eager(
        self, all_q: Tensor, all_k: Tensor, all_v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention in the inputs' dtype, one sequence at a time: out [N, H, K], lse [H, N]."""
        outs, lses = [], []
        sequences = (x.split(self.case.lengths) for x in (all_q, all_k, all_v))
        for q, k, v in zip(*sequences, strict=True):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            position = torch.arange(len(q), device=q.device)
            ahead = position - position[:, None]  # key minus query
            visible = ahead <= 0 if self.case.causal else ahead.abs() < len(q)
            if self.case.window is not None:
                visible &= ahead.abs() < self.case.window
            scores = scale * torch.einsum("ihk,jhk->hij", q, k)
            scores = scores.masked_fill(~visible, -math.inf)
            lses.append(scores.logsumexp(-1))
            outs.append(torch.einsum("hij,jhk->ihk", scores.softmax(-1), v))
        return torch.cat(outs), torch.cat(lses, 1)

    def answers(self) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Everything in float64."""
        case = self.case
        q, k, v = (x.double().requires_grad_() for x in (self.q, self.k, self.v))
        q_teacher, k_teacher = self.q_teacher.double(), self.k_teacher.double()
        out, lse = self.eager(q, k, v, self.scale)
        _, lse_teacher = self.eager(q_teacher, k_teacher, k_teacher, self.scale_teacher)
        value = reference.attention_divergence(
            q,
            k,
            q_teacher,
            k_teacher,
            cu_seqlens=self.cu_seqlens,
            causal=case.causal,
            window=case.window,
            scale=self.scale,
            scale_teacher=self.scale_teacher,
            divergence=case.divergence,
            beta=case.beta,
        )
        plain = (out * self.d_out.double()).sum() + (lse * self.d_lse.double()).sum()
        align = (self.weight.double() * value).sum()
        plain_gradient = torch.autograd.grad(plain, (q, k, v), retain_graph=True)
        align_gradient = torch.autograd.grad(align, (q, k))
        both = [a + b for a, b in zip(plain_gradient, align_gradient, strict=False)]
        return {
            "out": out.detach(),
            "lse": lse.detach(),
            "lse_teacher": lse_teacher,
            "value": value.detach(),
            "plain": plain_gradient,
            "align": align_gradient,
            "fused": (*both, plain_gradient[2]),
        }

    def teacher(self, answers) -> Layer:
        lse = answers["lse_teacher"].float()
        return Layer(self.q_teacher, self.k_teacher, lse, self.scale_teacher)

    def statistics(self, answers, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        student = Layer(self.q[None], self.k[None], answers["lse"].float()[None], self.scale)
        value, statistic = cuda_impl.statistics(
            student, self.teacher(answers), keep, self.case.divergence, self.case.beta,
            self.geometry(),
        )  # fmt: skip
        return value[0], statistic[0]

    def backward(self, answers, kind: str, statistic: Tensor) -> tuple[Tensor, ...]:
        plain = alignment = None
        if kind != "align":
            out = guarded(answers["out"].to(self.case.dtype))
            plain = Plain(self.v, out, self.d_out, self.d_lse)
        if kind != "plain":
            row_weight = self.weight / self.case.heads[0]
            divergence, beta = self.case.divergence, self.case.beta
            alignment = Alignment(self.teacher(answers), row_weight, statistic, divergence, beta)
        student = Layer(self.q, self.k, answers["lse"].float(), self.scale)
        got = cuda_impl.backward(student, self.geometry(), plain, alignment)
        assert (got[2] is None) == (kind == "align")
        return tuple(x for x in got if x is not None)


def check_close(got: Tensor, wanted: Tensor, bound: float, name: str) -> None:
    assert wanted.norm() > 1e-4, f"{name}: the reference is too small to compare with"
    error = ((got.double() - wanted).norm() / wanted.norm()).item()
    worst = int((got.double() - wanted).abs().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), wanted.shape)]
    assert error <= bound, f"{name}: relative error {error:.2e}, most at {where}"


def check_case(case: Case, machine: str) -> None:
    inputs = Inputs(case, machine)
    answers = inputs.answers()
    keep = inputs.weight != 0
    value, statistic = inputs.statistics(answers, keep)
    assert value.dtype == torch.float32 and (value[~keep] == 0).all()
    check_close(value, answers["value"] * keep, LOSS_BOUND, "value")
    for kind in ("align", "plain", "fused"):
        got = inputs.backward(answers, kind, statistic)
        for name, x, wanted in zip(("dq", "dk", "dv"), got, answers[kind], strict=False):
            assert x.dtype == case.dtype
            check_close(x, wanted, GRADIENT_BOUND, f"{kind} {name}")


def check_dropped_rows(case: Case, kind: str, machine: str) -> None:
    """What rows of weight 0 hold makes no difference."""
    inputs = Inputs(replace(case, lengths=(70, 60)), machine)
    answers = inputs.answers()
    dropped = inputs.weight == 0
    value, statistic = inputs.statistics(answers, ~dropped)
    wanted = inputs.backward(answers, kind, statistic)
    inputs.q_teacher[dropped] = math.nan
    answers["lse_teacher"][:, dropped] = math.nan
    if kind == "align":
        inputs.q[dropped] = math.nan
        answers["lse"][:, dropped] = math.nan
    value_again, statistic_again = inputs.statistics(answers, ~dropped)
    assert torch.equal(value, value_again), "a dropped row changed the value"
    assert torch.equal(statistic, statistic_again), "a dropped row changed the statistic"
    statistic_again[:, dropped] = math.nan
    for x, y in zip(wanted, inputs.backward(answers, kind, statistic_again), strict=True):
        assert torch.equal(x, y), "a dropped row changed a gradient"


def check_nan_stays(case: Case, machine: str) -> None:
    """A sequence of NaN leaves the ones on both sides of it as they were."""
    inputs = Inputs(replace(case, lengths=(40, 20, 50)), machine)
    inputs.weight = torch.full_like(inputs.weight, 1e-2)
    answers = inputs.answers()
    value, statistic = inputs.statistics(answers, None)
    clean = [inputs.backward(answers, kind, statistic) for kind in ("plain", "fused")]
    for x in (inputs.q, inputs.k, inputs.v, inputs.d_out, inputs.q_teacher, inputs.k_teacher):
        x[40:60] = math.nan
    others = torch.ones_like(inputs.weight, dtype=torch.bool)
    others[40:60] = False
    value_again, statistic = inputs.statistics(answers, None)
    assert torch.equal(value[others], value_again[others]), "a NaN left its sequence"
    assert value_again[~others].isnan().all()
    for kind, wanted in zip(("plain", "fused"), clean, strict=True):
        for x, y in zip(wanted, inputs.backward(answers, kind, statistic), strict=True):
            assert torch.equal(x[others], y[others]), "a NaN left its sequence"
            assert y[~others].isnan().any()
