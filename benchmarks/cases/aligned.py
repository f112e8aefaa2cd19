"""The backward of a student layer's attention: plain, with the alignment term in it, and beside it.

Only one backward over a retained graph is timed, neither the forward nor the divergence's pass over
the scores. The least work is five matmuls of 2*H*T*T*K for the plain backward, halved by the causal
mask; with the alignment, which forms the teacher's scores again, it is six.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import attention as plain
from benchmarks.cases import peers
from benchmarks.cases.case import (
    FULL,
    QUICK,
    Bar,
    Bound,
    Case,
    Implementation,
    Inputs,
    Result,
    Run,
)
from benchmarks.cases.shapes import ATTENTIONS, Attention
from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention


def cases(device: str) -> list[Case]:
    """All of a device: a GPU's."""
    if device == "cpu":
        return []
    found = [case("qwen3-4b", ATTENTIONS["qwen3-4b"], n, device, QUICK if n == 8192 else FULL)
             for n in (8192, 4096, 16384, 32768)]  # fmt: skip
    return [*found, case("64-wide", ATTENTIONS["64-wide"], 8192, device, FULL)]


def case(
    model: str,
    shape: Attention,
    tokens: int,
    device: str,
    suites: frozenset[str],
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """The backward at a shape."""
    H, J, K = shape
    made = {
        "ours: plain": ("plain", "auto"),
        "ours: with alignment": ("fused", "auto"),
        "ours: separate": ("separate", "auto"),
        "ours: cuda plain": ("plain", "cuda"),
        "ours: cuda with alignment": ("fused", "cuda"),
    }
    return Case(
        **plain.fields("attention_backward", model, shape, tokens, device, dtype),
        inputs=partial(inputs, shape, tokens, device, dtype),
        truth=truth,
        implementations=[
            Implementation(name, partial(backward, kind=kind, impl=impl))
            for name, (kind, impl) in made.items()
        ]
        + peers.attention_backward(device, dtype),
        flops=5 * 2.0 * H * tokens**2 / 2 * K,
        bytes=(4.0 * H + 4 * J) * tokens * K * dtype.itemsize,
        bound=Bound(1e-2, 2e-2) if dtype == torch.bfloat16 else Bound(1e-5, 1e-4),
        suites=suites,
        bars=(
            Bar("ours: with alignment", "median_s", 1.5, "ours: plain"),
            Bar("ours: plain", "median_s", 1 / 0.8, "SDPA flash"),
        ),
    )


def inputs(shape: Attention, tokens: int, device: str, dtype: torch.dtype) -> Inputs:
    """Of the attention and of the divergence, with upstream gradients of similar size, so that a
    missing term shows."""
    attention = plain.inputs(shape, tokens, device, dtype, values=True)
    divergence = plain.inputs(shape, tokens, device, dtype)
    both = attention | {name: divergence[name] for name in ("q_teacher", "k_teacher")}
    both["weights"] = attention["weights"] * 30
    return both


def truth(inputs: Inputs) -> Result:
    """Gradients of the attention, and of attention and divergence."""
    attention, divergence = plain.attention_truth(inputs), plain.truth(inputs)
    found = {f"d_plain_{name}": attention[f"d_{name}"] for name in "qkv"}
    found |= {f"d_aligned_{name}": attention[f"d_{name}"] + divergence[f"d_{name}"]
              for name in "qk"}  # fmt: skip
    return found | {"d_aligned_v": attention["d_v"]}


def backward(inputs: Inputs, kind: str, impl: str = "auto") -> Run:
    """Runs the forward; the function that it returns runs the backward."""
    given = q, k, _ = [inputs[name] for name in "qkv"]
    q_teacher, k_teacher, weights = (inputs[name] for name in ("q_teacher", "k_teacher", "weights"))
    rows: Tensor | None = None
    alignment = AttentionAlignment() if kind == "fused" else None
    out, _ = flash_attention(*given, causal=True, alignment=alignment, impl=impl)
    if alignment is not None:
        rows = alignment.loss(q_teacher, k_teacher, token_weight=weights)
    elif kind == "separate":
        rows = attention_divergence(q, k, q_teacher, k_teacher, token_weight=weights)
    ends = [out] if rows is None else [out, rows.sum()]
    upstream = [inputs["d_out"]] if rows is None else [inputs["d_out"], torch.ones_like(ends[1])]
    label = "plain" if kind == "plain" else "aligned"

    def run() -> Result:
        found = torch.autograd.grad(ends, given, upstream, retain_graph=True)
        return {f"d_{label}_{name}": g for name, g in zip("qkv", found, strict=True)}

    return run
