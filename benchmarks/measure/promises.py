"""Asserted cases: matmuls counted, workspace within its budget. No time, so any machine will do.

G = one matmul of 2*N*D*V. `chunked` is counted on a CPU, where it makes the same matmuls in the
same chunks as on a GPU; `tiled` on tensors without storage, at Qwen3-4B's head, with its kernels
not launched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases.case import size
from benchmarks.measure.counting import Allocations, equivalents
from oisd_kernels import linear_logprob, logit_lens_divergence, policy_head

N, D, V = 48, 16, 640
MIB = 2**20


@dataclass(frozen=True)
class Promise:
    """A number that an operation must keep to."""

    name: str
    unit: str
    wanted: float
    count: Callable[[], float]
    exactly: bool = True

    def row(self) -> dict[str, object]:
        """As a row of results."""
        got = self.count()
        kept = abs(got - self.wanted) < 1e-6 if self.exactly else got <= self.wanted
        row: dict[str, object] = {"kind": "promise", "promise": self.name, "unit": self.unit}
        return row | {"wanted": self.wanted, "exactly": self.exactly, "got": got, "kept": kept}


def promises() -> Iterator[Promise]:
    """All of them."""
    for layers in (1, 4, 8):
        yield Promise(
            f"lens, values, S = {layers}", "G", layers + 1, lambda s=layers: lens(s, False)
        )
        yield Promise(
            f"lens, gradient, S = {layers}", "G", 2 * layers + 1, lambda s=layers: lens(s, True)
        )
        yield Promise(
            f"lens beside GRPO in one head pass, S = {layers}",
            "G",
            2 * layers,
            lambda s=layers: head(s) - head(0),
        )
    yield Promise("lens, half of the tokens weigh 0", "G", 1.5, lambda: lens(1, True, dropped=True))
    yield Promise("linear_logprob, gradient to hidden states", "G", 2, lambda: logprob(False))
    yield Promise("linear_logprob, both gradients", "G", 4, lambda: logprob(True))
    for budget in (4, 16):
        yield Promise(
            f"chunked lens with max_bytes = {budget} MiB: workspace",
            "MiB",
            budget,
            lambda b=budget: chunked_workspace(b * MIB) / MIB,
            exactly=False,
        )
    for layers in (1, 8):
        yield Promise(
            f"tiled lens, 100,000 tokens of Qwen3-4B, S = {layers}: workspace",
            "MiB",
            64,
            lambda s=layers: tiled_workspace(s) / MIB,
            exactly=False,
        )


def tensors(layers: int, width: int = D, vocabulary: int = V) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(layers, N, width, requires_grad=True)
    return hidden, torch.randn(N, width), torch.randn(vocabulary, width)


def lens(layers: int, gradient: bool, dropped: bool = False) -> float:
    hidden, final, weight = tensors(layers)
    factor = (torch.arange(N) % 2).float() if dropped else None

    def run() -> None:
        with torch.set_grad_enabled(gradient):
            loss = logit_lens_divergence(hidden, final, weight, token_weight=factor, impl="chunked")
        if gradient:
            loss.sum().backward()

    return equivalents(run, 2.0 * N * D * V)


def head(layers: int) -> float:
    hidden, final, weight = tensors(layers)
    final.requires_grad_()
    weight.requires_grad_()
    labels = torch.arange(N)

    def run() -> None:
        out = policy_head(final, weight, labels, hidden if layers else None)
        (out.logprob.sum() + out.divergence.sum()).backward()

    return equivalents(run, 2.0 * N * D * V)


def logprob(to_weight: bool) -> float:
    _, hidden, weight = tensors(1)
    hidden.requires_grad_()
    weight.requires_grad_(to_weight)
    labels = torch.arange(N)
    return equivalents(
        lambda: linear_logprob(hidden, weight, labels).logprob.sum().backward(), 2.0 * N * D * V
    )


def chunked_workspace(budget: int) -> float:
    """Bytes beside outputs, gradients and the lists of rows."""
    hidden, final, weight = tensors(2, width=64, vocabulary=20011)
    with Allocations(hidden, final, weight) as counted:
        logit_lens_divergence(hidden, final, weight, max_bytes=budget, impl="chunked")
    rows = 2 * N
    outputs = hidden.numel() * 4 + 8 * rows * 4
    index = 6 * rows * 8
    assert counted.most > budget / 4, "the mode did not see the workspace"
    return counted.most - outputs - index


def tiled_workspace(layers: int) -> float:
    """Bytes beside the outputs, of the public function on an H100 that is not there."""
    import triton

    import oisd_kernels.lens.tiled.op  # noqa: F401  # so that its modules are there to be patched

    tokens, width, vocabulary = 100_000, 2560, 151936
    hidden, final, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((layers, tokens, width), (tokens, width), (vocabulary, width))
    )
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for function in ("machine", "_machine"):
                if name.startswith("oisd_kernels.lens.tiled.") and hasattr(module, function):
                    h100 = mock.patch.object(module, function, lambda device: (90, 264))
                    stack.enter_context(h100)
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", _skip))
        counted = stack.enter_context(Allocations(hidden, final, weight))
        out, stats = logit_lens_divergence(hidden, final, weight, impl="tiled", return_stats=True)
    outputs = size([out, *stats])
    assert counted.most > outputs, "the mode did not see the outputs"
    return counted.most - outputs


def _skip(*_: object, **__: object) -> None:
    return None
