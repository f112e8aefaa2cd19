"""Divergence between two layers' attention maps, and the attention kernels themselves.

The least work of the divergence with its gradients is four matmuls of 2*H*T*T*K: student's and
teacher's scores, d_q and d_k. Attention takes two forward and five backward. Causal masks halve
both. A kernel that keeps no scores has to compute them again and cannot reach the first limit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import eager, peers
from benchmarks.cases.case import (
    EXACT,
    FULL,
    QUICK,
    Bar,
    Bound,
    Case,
    Implementation,
    Inputs,
    Result,
    Run,
    Yardstick,
    formula,
    forward_backward,
    own,
    seeded,
    token_weights,
)
from benchmarks.cases.shapes import ATTENTIONS, CPU_ATTENTION, Attention, thousands
from oisd_kernels import attention_divergence as divergence_op
from oisd_kernels import flash_attention, reference

IMPLS = ("torch", "triton", "cuda", "reference")
CHECKED = 8192  # the longest sequence whose float64 maps are formed, a head at a time


def cases(device: str) -> list[Case]:
    """All attention cases of a device."""
    if device == "cpu":
        return [
            divergence("cpu", CPU_ATTENTION, 1024, device, QUICK),
            divergence("cpu", CPU_ATTENTION, 512, device, QUICK),
            divergence("cpu", CPU_ATTENTION, 4096, device, FULL, bars=True),
            divergence("cpu", CPU_ATTENTION, 2048, device, FULL),
            divergence("cpu-grouped", Attention(8, 2, 64), 1024, device, FULL),
        ]
    four = ATTENTIONS["qwen3-4b"]
    found = [divergence("qwen3-4b", four, n, device, QUICK if n in (4096, 8192) else FULL)
             for n in (8192, 4096, 1024, 2048, 16384, 32768)]  # fmt: skip
    found += [attention("qwen3-4b", four, n, device, QUICK if n == 8192 else FULL)
              for n in (8192, 4096, 16384, 32768)]  # fmt: skip
    for model, shape in ATTENTIONS.items():
        if model != "qwen3-4b":
            found += [divergence(model, shape, 8192, device, FULL)]
            found += [attention(model, shape, 8192, device, FULL)]
    return found


def divergence(
    model: str,
    shape: Attention,
    tokens: int,
    device: str,
    suites: frozenset[str],
    bars: bool = False,
) -> Case:
    """JS between student's and teacher's attention, gradients to the student's q and k."""
    H, J, K = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    maps = 4.0 * H * tokens**2
    promises = (
        Bar("ours: torch", "median_s", 1.0, "eager"),
        Bar("ours: torch", "peak_mib", 1 / 20, "eager"),
    )
    return Case(
        **fields("attention_divergence", model, shape, tokens, device, dtype),
        inputs=partial(inputs, shape, tokens, device, dtype),
        truth=truth,
        implementations=formula(ours, IMPLS, naive, dtype, 12 * maps, 6 * maps),
        flops=4 * 2.0 * H * tokens**2 / 2 * K,
        bytes=(2.0 * (H + J) + (H + J)) * tokens * K * dtype.itemsize,
        bound=EXACT[dtype],
        suites=suites,
        bars=promises if bars else (),
    )


def attention(
    model: str, shape: Attention, tokens: int, device: str, suites: frozenset[str]
) -> Case:
    """Attention itself, forward and backward: the kernel that carries the alignment term."""
    H, J, K = shape
    dtype = torch.bfloat16
    mine = [
        Implementation(name, partial(own_flash, impl=impl))
        for name, impl in (("ours: flash_attention", "auto"), ("ours: cuda backward", "cuda"))
    ]
    return Case(
        **fields("attention", model, shape, tokens, device, dtype),
        inputs=partial(inputs, shape, tokens, device, dtype, values=True),
        truth=attention_truth,
        implementations=[*mine, *peers.attention(device, dtype)],
        flops=7 * 2.0 * H * tokens**2 / 2 * K,
        bytes=(4.0 * H + 4 * J) * tokens * K * dtype.itemsize,
        bound=Bound(1e-2, 2e-2),  # the output and its gradients are rounded to bf16
        suites=suites,
        compiled=True,
        bars=(Bar("ours: flash_attention", "median_s", 1 / 0.8, "flash-attn 2"),),
    )


def inputs(
    shape: Attention, tokens: int, device: str, dtype: torch.dtype, values: bool = False
) -> Inputs:
    """Queries and keys whose scores have a standard deviation of 1.5. The teacher's are half the
    student's and half its own."""
    generator = seeded(0, device)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, shape.dim, generator=generator, device=device)

    q, k = normal(shape.heads) * 1.5, normal(shape.key_heads)
    found: Inputs = {
        "q": q.to(dtype).requires_grad_(),
        "k": k.to(dtype).requires_grad_(),
        "weights": token_weights(tokens, device, 0)[None],
    }
    if values:
        found["v"] = normal(shape.key_heads).to(dtype).requires_grad_()
        found["d_out"] = normal(shape.heads).to(dtype)
        return found
    half = 0.5**0.5
    found["q_teacher"] = (half * (q + 1.5 * normal(shape.heads))).to(dtype)
    found["k_teacher"] = (half * (k + normal(shape.key_heads))).to(dtype)
    return found


def prefix(inputs: Inputs) -> Inputs:
    """The first tokens, as leaves of their own."""
    return {
        name: x.detach()[:, :CHECKED].clone().requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }


def fields(
    family: str, model: str, shape: Attention, tokens: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What all cases of attention share. A long one is checked on its first tokens."""
    found: dict[str, Any] = {
        "name": f"{family}/{model}/{thousands(tokens)}",
        "family": family,
        "device": device,
        "dtype": dtype,
        "shape": {"T": tokens, "H": shape.heads, "J": shape.key_heads, "K": shape.dim},
        "regime": "random",
        "yardstick": partial(square_matmul, dtype=dtype, device=device),
    }
    if tokens > CHECKED:
        found |= {"check_inputs": prefix, "checked_at": f"T = {CHECKED}"}
    return found


def truth(inputs: Inputs) -> Result:
    """Float64, a query head at a time, weighted."""
    q, k, q_teacher, k_teacher, weights = (
        inputs[name].detach().double() for name in ("q", "k", "q_teacher", "k_teacher", "weights")
    )
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    found = {"loss": torch.zeros_like(weights), "d_q": torch.zeros_like(q),
             "d_k": torch.zeros_like(k)}  # fmt: skip
    for h in range(heads):
        at, key = slice(h, h + 1), slice(h // group, h // group + 1)
        one = q[:, :, at].clone().requires_grad_(), k[:, :, key].clone().requires_grad_()
        loss = reference.attention_divergence(
            *one, q_teacher[:, :, at], k_teacher[:, :, key], token_weight=weights / heads
        )
        d_q, d_k = torch.autograd.grad(loss.sum(), one)
        found["loss"] += loss.detach()
        found["d_q"][:, :, at] = d_q
        found["d_k"][:, :, key] += d_k
    return found


def attention_truth(inputs: Inputs) -> Result:
    """Float64, a query head at a time, from torch's own formula."""
    q, k, v, d_out = (inputs[name].detach().double() for name in ("q", "k", "v", "d_out"))
    group = q.shape[2] // k.shape[2]
    found = {"loss": torch.zeros_like(q)}
    found |= {f"d_{name}": torch.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    for h in range(q.shape[2]):
        j = h // group
        one = [x[:, :, i].clone().requires_grad_() for x, i in ((q, h), (k, j), (v, j))]
        scores = one[0] @ one[1].mT * q.shape[-1] ** -0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ one[2]
        d_q, d_k, d_v = torch.autograd.grad(out, one, d_out[:, :, h])
        found["loss"][:, :, h] = out.detach()
        found["d_q"][:, :, h] = d_q
        found["d_k"][:, :, j] += d_k
        found["d_v"][:, :, j] += d_v
    return found


def ours(inputs: Inputs, impl: str) -> Run:
    q, k, weights = inputs["q"], inputs["k"], inputs["weights"]
    given = (q, k, inputs["q_teacher"], inputs["k_teacher"])
    return forward_backward(
        lambda: own(divergence_op, *given, token_weight=weights, impl=impl), q=q, k=k
    )


def naive(inputs: Inputs, compiled: bool) -> Run:
    function = eager.attention_divergence
    if compiled:
        function = torch.compile(function, dynamic=False)
    given = [inputs[name] for name in ("q", "k", "q_teacher", "k_teacher", "weights")]
    return forward_backward(lambda: function(*given), q=given[0], k=given[1])


def own_flash(inputs: Inputs, impl: str) -> Run:
    return peers.attention_run(
        lambda *given: flash_attention(*given, causal=True, impl=impl)[0], inputs
    )


def square_matmul(inputs: Inputs, dtype: torch.dtype, device: str) -> Yardstick:
    """A bare square matmul: attention's own matmuls would be bound by memory on their own."""
    n = 8192 if device == "cuda" else 1024
    # Random numbers: matrices of ones draw less power and so run at a higher clock.
    x = torch.randn(n, n, generator=seeded(0, device), device=device).to(dtype)
    out = torch.empty_like(x)
    return Yardstick(lambda: torch.mm(x, x, out=out), 2.0 * n**3)
