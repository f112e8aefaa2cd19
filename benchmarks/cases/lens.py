"""Divergence between layers through the unembedding: one student layer, several, all of them.

The least work in units of G = 2*N*D*V: S + 1 for values, 2S + 1 with the gradient to the hidden
states. All implementations get the same inputs; those that take no weight per token ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import eager, peers
from benchmarks.cases.case import (
    EXACT,
    FULL,
    QUICK,
    Bar,
    Case,
    Implementation,
    Inputs,
    Result,
    Run,
    Yardstick,
    formula,
    forward_backward,
    hidden_states,
    own,
    period,
    periodic,
    token_weights,
)
from benchmarks.cases.shapes import CPU_HEAD, HEADS, SMALL_HEAD, Head, thousands
from oisd_kernels import logit_lens_divergence, reference

IMPLS = ("chunked", "tiled", "reference")
GEMM_BYTES = 2 << 30  # of the yardstick's output


@dataclass(frozen=True)
class Shape:
    """What distinguishes one lens case from another."""

    head: Head
    model: str
    layers: int
    tokens: int
    regime: str = "saturated"
    gradient: bool = True
    dropped: float = 0.0
    suites: frozenset[str] = FULL
    bars: tuple[Bar, ...] = ()
    rivals: tuple[str, ...] | None = None
    """The implementations beside "ours: chunked"; None: all of them."""

    @property
    def name(self) -> str:
        parts = ["lens" if self.gradient else "lens-values", self.model, f"S{self.layers}"]
        parts += [thousands(self.tokens), self.regime]
        return "/".join(parts + ([f"{self.dropped:.0%}-dropped"] if self.dropped else []))


def cases(device: str) -> list[Case]:
    """All lens cases of a device."""
    found = gpu_shapes() if device == "cuda" else cpu_shapes()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [case(shape, device, dtype) for shape in found]


def cpu_shapes() -> list[Shape]:
    large, small = partial(Shape, CPU_HEAD, "cpu"), partial(Shape, SMALL_HEAD, "cpu-small")
    barred = "lens/cpu/S1/2k/near"
    bars = (
        Bar("ours: chunked", "median_s", 1.0, "eager"),
        Bar("ours: chunked", "peak_mib", 1 / 8, "eager"),
    )
    # Resident memory is not counted to the byte: 5 % for the allocator's own pages.
    unchanged = (Bar("ours: chunked", "workspace_mib", 1.05, "ours: chunked", case=barred),)
    return [
        large(1, 2048, "near", suites=QUICK, bars=bars, rivals=("eager",)),
        small(1, 512, suites=QUICK),
        small(1, 256, suites=QUICK),
        small(4, 128, suites=QUICK),
        small(1, 128, suites=QUICK),
        large(1, 16384, "near", bars=unchanged, rivals=()),
        *(small(1, n) for n in (1024, 2048, 4096)),
        *(small(s, 128) for s in (8, 12)),
        *(small(1, 512, regime) for regime in ("random", "near", "peaked")),
        small(1, 512, "near", dropped=0.5),
    ]


def gpu_shapes() -> list[Shape]:
    four = partial(Shape, HEADS["qwen3-4b"], "qwen3-4b")
    best = [
        Bar("ours: chunked", "median_s", 0.5, peer)
        for peer in (
            "Liger fused_linear_jsd",
            "Liger fused_linear_jsd, CuTe",
            "Liger chunked JSD",
            "TRL chunked divergence",
        )
    ]
    best += [Bar("ours: chunked", "peak_mib", 1.0, bar.against) for bar in best]
    headline = (
        Bar("ours: chunked", "median_s", 1 / 0.75, "roofline"),
        Bar("ours: chunked", "workspace_mib", 1.5e9 / 2**20),
        *best,
    )
    values = (Bar("ours: tiled", "workspace_mib", 64.0),)
    return [
        four(1, 8192, suites=QUICK, bars=headline),
        four(4, 8192, suites=QUICK, bars=(Bar("ours: chunked", "median_s", 1 / 0.8, "roofline"),)),
        four(1, 8192, gradient=False, suites=QUICK, bars=values),
        four(1, 1024, suites=QUICK),
        four(1, 32768, suites=QUICK),
        four(8, 8192, suites=QUICK),
        four(35, 8192),
        four(1, 8192, dropped=0.5),
        *(four(1, 8192, regime) for regime in ("random", "near", "peaked")),
        *(four(1, n) for n in (2048, 4096, 16384, 65536)),
        *(Shape(head, model, 1, 8192) for model, head in HEADS.items() if model != "qwen3-4b"),
    ]


def case(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """The case of a shape."""
    S, N, D, V = shape.layers, shape.tokens, shape.head.width, shape.head.vocabulary
    matmuls = 2 * S + 1 if shape.gradient else S + 1
    item = dtype.itemsize
    reads = (V * D + (S + 1) * N * D) * item
    return Case(
        name=shape.name,
        family="lens" if shape.gradient else "lens-values",
        device=device,
        dtype=dtype,
        shape={"S": S, "N": N, "D": D, "V": V},
        regime=shape.regime,
        inputs=partial(inputs, shape, device, dtype),
        truth=partial(truth, gradient=shape.gradient),
        implementations=implementations(shape, device, dtype),
        yardstick=yardstick,
        flops=2.0 * N * D * V * matmuls * (1 - shape.dropped),
        bytes=reads + (S * N * D * item if shape.gradient else 0) + 4.0 * S * N,
        bound=EXACT[dtype],
        suites=shape.suites,
        bars=shape.bars,
        compiled=bool(shape.bars),
    )


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    head = shape.head
    student, final, weight = hidden_states(
        shape.regime, shape.layers, shape.tokens, head.width, head.vocabulary, device, 0
    )
    return {
        "hidden": student.to(dtype).requires_grad_(shape.gradient),
        "final": final.to(dtype),
        "weight": weight.to(dtype),
        "factor": token_weights(shape.tokens, device, 0, shape.dropped),
    }


def truth(inputs: Inputs, gradient: bool) -> Result:
    """Unweighted loss [S, N] and its rows' gradient in float64, computed for one period, a layer at
    a time."""
    tokens = inputs["final"].shape[0]
    rows = period(tokens)
    weight, final = inputs["weight"].double(), inputs["final"][:rows].double()
    losses, gradients = [], []
    for layer in inputs["hidden"].detach()[:, :rows].unbind(0):
        layer = layer.double().requires_grad_(gradient)
        loss = reference.logit_lens_divergence(layer, final, weight)
        assert isinstance(loss, Tensor)
        losses.append(loss.detach())
        if gradient:
            gradients.append(torch.autograd.grad(loss.sum(), layer)[0])
    out = {"loss": periodic(torch.stack(losses)[..., None], tokens)[..., 0]}
    if gradient:
        out["d_hidden"] = periodic(torch.stack(gradients), tokens)
    return out


def implementations(shape: Shape, device: str, dtype: torch.dtype) -> list[Implementation]:
    logits = 4.0 * shape.tokens * shape.head.vocabulary * (shape.layers + 1)
    mine, theirs = (partial(make, gradient=shape.gradient) for make in (ours, naive))
    found = formula(mine, IMPLS, theirs, dtype, 5 * logits, 3 * logits)
    if shape.gradient:
        found += peers.lens(device, dtype)
    if shape.rivals is None:
        return found
    found += peers.lens_by_name(device, dtype)
    chosen = ("ours: chunked", *shape.rivals)
    return [i for i in found if i.name in chosen]


def ours(inputs: Inputs, impl: str, gradient: bool) -> Run:
    given = [inputs[name] for name in ("hidden", "final", "weight")]
    weight = inputs["factor"]
    return run_of(
        lambda: own(logit_lens_divergence, *given, token_weight=weight, impl=impl), inputs, gradient
    )


def naive(inputs: Inputs, gradient: bool, compiled: bool) -> Run:
    function = eager.lens_divergence
    if compiled:
        function = torch.compile(function, dynamic=False)
    given = [inputs[name] for name in ("hidden", "final", "weight", "factor")]
    return run_of(lambda: function(*given), inputs, gradient)


def run_of(forward: Callable[[], Tensor], inputs: Inputs, gradient: bool) -> Run:
    leaves = {"hidden": inputs["hidden"]} if gradient else {}
    return forward_backward(forward, **leaves)


def yardstick(inputs: Inputs) -> Yardstick:
    """A bare matmul of final hidden states with the unembedding, at most 2 GiB of logits."""
    weight = inputs["weight"].detach()
    rows = max(min(GEMM_BYTES // (weight.shape[0] * weight.element_size()), 8192), 1)
    final = inputs["final"].detach()[:rows]
    if final.device.type == "cpu":
        final = final[:256]
    out = final.new_empty(len(final), weight.shape[0])
    flops = 2.0 * final.numel() * weight.shape[0]
    return Yardstick(lambda: torch.mm(final, weight.t(), out=out), flops)
