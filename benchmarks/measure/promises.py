"""Asserted cases: matmuls counted, workspace within its budget. No time, so any machine will do.

G = one matmul of 2*N*D*V. `chunked` is counted on a CPU, where it does the same matmuls in the same
chunks as on a GPU. `tiled` is counted on tensors without storage, at the head of Qwen3-4B, with its
kernels not launched. `row_bytes` counts the logits' bytes, for both forms of the row kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases.case import size
from benchmarks.measure.counting import Allocations, equivalents
from oisd_kernels import linear_logprob, logit_lens_divergence, policy_head
from oisd_kernels.lens.chunked.workspace import release

N, D, V = 48, 16, 640
MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Promise:
    """A number that an operation must keep to."""

    name: str
    unit: str
    wanted: float
    count: Callable[[], float]
    exactly: bool = True

    def row(self) -> dict[str, object]:
        """As a row of results; a count that fails is a broken promise with a reason."""
        row: dict[str, object] = {"kind": "promise", "promise": self.name, "unit": self.unit}
        row |= {"wanted": self.wanted, "exactly": self.exactly}
        try:
            got = self.count()
        except Exception as error:
            return row | {"got": None, "kept": False, "reason": str(error)}
        kept = abs(got - self.wanted) < 1e-6 if self.exactly else got <= self.wanted
        return row | {"got": got, "kept": kept}


def promises() -> list[Promise]:
    """All of them."""
    found = []
    for s in (1, 4, 8):
        found += [
            Promise(f"lens, values, S = {s}", "G", s + 1, partial(lens, s, False)),
            Promise(f"lens, gradient, S = {s}", "G", 2 * s + 1, partial(lens, s, True)),
            Promise(f"lens beside GRPO in one head pass, S = {s}", "G", 2 * s,
                    lambda s=s: head(s) - head(0)),
        ]  # fmt: skip
    found += [
        Promise("lens, half of the tokens weigh 0", "G", 1.5, partial(lens, 1, True, dropped=True)),
        Promise("linear_logprob, gradient to hidden states", "G", 2, partial(logprob, False)),
        Promise("linear_logprob, both gradients", "G", 4, partial(logprob, True)),
    ]
    for s, whole, split in ((1, 36, 20), (4, 96, 56)):
        for form, wanted in (("whole", whole), ("split", split)):
            name = f"chunked lens, {form} rows, S = {s}: logits moved"
            found.append(Promise(name, "bytes a pair", wanted, partial(row_bytes, form, s)))
    for mib in (4, 16):
        name = f"chunked lens with max_bytes = {mib} MiB: workspace"
        found.append(Promise(name, "MiB", mib, partial(chunked_workspace, mib), exactly=False))
    for s in (1, 8):
        name = f"tiled lens, 100,000 tokens of Qwen3-4B, S = {s}: workspace"
        found.append(Promise(name, "MiB", 64, partial(tiled_workspace, s), exactly=False))
    return found


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
    """MiB beside outputs, gradients and the lists of rows, with so many MiB allowed."""
    hidden, final, weight = tensors(2, width=64, vocabulary=20011)
    release()  # what an earlier call has left would serve this one
    with Allocations(hidden, final, weight) as counted:
        logit_lens_divergence(hidden, final, weight, max_bytes=budget * MIB, impl="chunked")
    rows = 2 * N
    outputs = hidden.numel() * 4 + 8 * rows * 4
    index = 6 * rows * 8
    assert counted.most > budget * MIB / 4, "the mode did not see the workspace"
    return (counted.most - outputs - index) / MIB


def row_bytes(form: str, layers: int) -> float:
    for row in _row_bytes():
        if (row["form"], row["layers"]) == (form, layers):
            return row["bytes"]
    raise KeyError((form, layers))


@cache
def _row_bytes() -> list[dict[str, Any]]:
    """In a process of its own, where Triton interprets."""
    command = [sys.executable, "-m", "benchmarks.measure.row_bytes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def tiled_workspace(layers: int) -> float:
    """MiB beside the outputs, of the public function as on an H100."""
    import triton  # which may be missing on CPU-only machines

    import oisd_kernels.lens.tiled.op  # noqa: F401  # loads the modules that are patched below

    tokens, width, vocabulary = 100_000, 2560, 151936
    hidden, final, weight = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((layers, tokens, width), (tokens, width), (vocabulary, width))
    )
    ours = [module for name, module in sys.modules.items() if name.startswith("oisd_kernels.")]
    with ExitStack() as stack:
        for module in ours:
            if hasattr(module, "machine"):
                h100 = mock.patch.object(module, "machine", lambda device: (90, 264))
                stack.enter_context(h100)
        no_launch = mock.patch.object(triton.runtime.JITFunction, "run", lambda *_, **__: None)
        stack.enter_context(no_launch)
        counted = stack.enter_context(Allocations(hidden, final, weight))
        out, stats = logit_lens_divergence(hidden, final, weight, impl="tiled", return_stats=True)
    outputs = size([out, *stats])
    assert counted.most > outputs, "the mode did not see the outputs"
    return (counted.most - outputs) / MIB
