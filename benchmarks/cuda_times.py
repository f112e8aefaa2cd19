"""Times of csrc/'s kernels by each engine, beside Triton's and torch's attention: launches alone.

Without autograd or a forward: the passes over the scores that csrc/ has, on the same tensors, in
turns. Torch's is the backward of a retained graph. A result that differs from Triton's is not
timed. Rates count the matmuls that a pass cannot avoid, 2*H*T*T*K each, halved by the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.attention import inputs
from benchmarks.cases.shapes import ATTENTIONS, Attention
from benchmarks.measure import timer
from oisd_kernels.attention import cuda_impl, triton_impl
from oisd_kernels.attention.spec import Alignment, Layer, Plain, dense_geometry

CASES = [("qwen3-4b", 4096), ("qwen3-4b", 8192), ("64-wide", 8192)]
MATMULS = {"statistics": 2, "plain": 5, "fused": 6, "align": 4}
TOLERANCE = 1e-2  # both have errors of 3e-3


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Launches of csrc/ go to this engine."""
    before = cuda_impl.WARPGROUPS, cuda_impl.HOPPER_ENGINE
    cuda_impl.WARPGROUPS = name != "WARP_ENGINE"
    cuda_impl.HOPPER_ENGINE = name
    try:
        yield
    finally:
        cuda_impl.WARPGROUPS, cuda_impl.HOPPER_ENGINE = before


class Call:
    """The inputs of all passes of a case."""

    def __init__(self, shape: Attention, tokens: int, device: str = "cuda") -> None:
        dtype = torch.bfloat16
        found = inputs(shape, tokens, device, dtype, values=True)
        teacher = inputs(shape, tokens, device, dtype)
        self.leaves = [found[name] for name in "qkv"]
        self.q, self.k, self.v = (x.detach()[0] for x in self.leaves)
        self.d_out, self.weight = found["d_out"][0], found["weights"][0] / shape.heads
        q_teacher, k_teacher = teacher["q_teacher"][0], teacher["k_teacher"][0]
        self.geometry = dense_geometry(self.q, 1, tokens, True, None, None)
        self.scale = shape.dim**-0.5
        settings = self.geometry, self.scale
        self.out, self.lse = triton_impl.forward(self.q, self.k, self.v, *settings)
        lse_teacher = triton_impl.logsumexp(q_teacher, k_teacher, *settings)
        self.teacher = Layer(q_teacher, k_teacher, lse_teacher, self.scale)
        self.student = Layer(self.q, self.k, self.lse, self.scale)
        self.statistic = self.statistics(triton_impl)[1]

    def statistics(self, impl: ModuleType) -> tuple[Tensor, ...]:
        layers = Layer(*(x[None] for x in self.student[:3]), self.scale)
        settings = self.teacher, self.weight != 0, "jsd", 0.5, self.geometry
        return tuple(x[0] for x in impl.statistics(layers, *settings))

    def backward(self, impl: ModuleType, kind: str) -> tuple[Tensor, ...]:
        plain = None if kind == "align" else Plain(self.v, self.out, self.d_out)
        alignment = Alignment(self.teacher, self.weight, self.statistic, "jsd", 0.5)
        alignment = None if kind == "plain" else alignment
        found = impl.backward(self.student, self.geometry, plain, alignment)
        return tuple(x for x in found if x is not None)

    def run(self, impl: ModuleType, kind: str, by: str | None = None) -> tuple[Tensor, ...]:
        pass_of = self.statistics if kind == "statistics" else partial(self.backward, kind=kind)
        if by is None:
            return pass_of(impl)
        with engine(by):
            return pass_of(impl)

    def defined(self, found: tuple[Tensor, ...], kind: str) -> tuple[Tensor, ...]:
        """Without the statistics of rows of weight 0, which nothing reads."""
        return (found[0], found[1][:, self.weight != 0]) if kind == "statistics" else found

    def torch_backward(self, backend: SDPBackend) -> Callable[[], tuple[Tensor, ...]]:
        q, k, v = (x.transpose(1, 2) for x in self.leaves)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        upstream = self.d_out[None].transpose(1, 2)
        run = partial(torch.autograd.grad, out, self.leaves, upstream, retain_graph=True)
        return lambda: tuple(x[0] for x in run())


def error(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest relative difference of the tensors."""
    pairs = zip(got, wanted, strict=True)
    return max(((x - y).float().norm() / y.float().norm()).item() for x, y in pairs)


def engines() -> list[str]:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["WARP_ENGINE", *(["WARPGROUP_ENGINE", "SPECIALIZED_ENGINE"] if hopper else [])]


class Timed(NamedTuple):
    """What came of one implementation of a pass."""

    label: str
    line: str
    median: float | None = None  # seconds
    failure: str = ""


def timed(
    name: str, kind: str, call: Call, by: Sequence[str], seconds: float = 3.0
) -> Iterator[Timed]:
    """Each implementation of a pass, csrc's by these engines; `seconds` for all their rounds."""
    wanted = call.run(triton_impl, kind)
    start = f"{name:<14} {kind:<10} "
    functions: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    candidates = {f"cuda {one}": partial(call.run, cuda_impl, kind, one) for one in by}
    if kind == "plain":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            candidates[f"SDPA {backend.name}"] = partial(call.torch_backward, backend)
    for label, candidate in candidates.items():
        try:
            function = candidate() if label.startswith("SDPA") else candidate
            off = error(*(call.defined(found, kind) for found in (function(), wanted)))
        except Exception as failure:
            first = (str(failure).splitlines() or [""])[0]
            why = f"failed: {type(failure).__name__}: {first}"
            yield Timed(label, f"{start}{label:<24} {why}", failure=why)
            continue
        if off <= TOLERANCE:
            functions[label] = function
        else:
            why = f"wrong: {off:.1e} from Triton's"
            yield Timed(label, f"{start}{label:<24} {why}", failure=why)
    functions["Triton"] = partial(call.run, triton_impl, kind)
    tokens, heads, width = call.q.shape
    work = MATMULS[kind] * 2.0 * heads * tokens**2 / 2 * width
    plan = timer.Plan(warmup=3, seconds=seconds)
    for label, found in timer.interleaved(functions, plan, call.q.device.type).items():
        median, p20, p80 = timer.spread(found)
        line = (
            f"{start}{label:<24} {1e3 * median:8.3f} ms ({1e3 * p20:.3f} to {1e3 * p80:.3f})  "
            f"{work / median / 1e12:6.1f} TFLOP/s"
        )
        yield Timed(label, line, median)


def lines(name: str, kind: str, call: Call, seconds: float = 3.0) -> Iterator[str]:
    """A line for each implementation of a pass."""
    for found in timed(name, kind, call, engines(), seconds):
        yield found.line


def report() -> int:
    for name, tokens in CASES:
        call = Call(ATTENTIONS[name], tokens)
        for kind in MATMULS:
            for line in lines(f"{name} {tokens}", kind, call):
                print(line, flush=True)
        del call
        torch.cuda.empty_cache()
    return 0
