"""Other people's kernels behind one signature, each with the reason where it cannot run.

Nothing is imported before it is used; a peer that is not installed, or does not run on the device,
is listed as absent. Versions that were read: Liger 0.8.5, TRL 1.16, cut-cross-entropy 25.1,
flash-attn 2.8 and 4, torch 2.13.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.case import PEER, Implementation, Inputs, Result, Run

Make = Callable[[Inputs], Run]


@cache
def missing(module: str, package: str) -> str | None:
    """Why a module cannot be had, or None."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return f"{package} cannot be imported: {error}"
    return None if found else f"not installed: pip install {package}"


def peer(
    name: str,
    make: Make,
    dtype: torch.dtype,
    *,
    module: str | None = None,
    package: str = "",
    needs_cuda: str = "",
    device: str = "cpu",
    **fields: Any,
) -> Implementation:
    """An implementation of others, absent where its package or its device is not there."""
    absent = missing(module, package) if module else None
    if absent is None and needs_cuda and device != "cuda":
        absent = needs_cuda
    return Implementation(name, make, absent=absent, bound=PEER[dtype], **fields)


def grads(loss: Tensor, upstream: Tensor | float, **leaves: Tensor) -> Result:
    """d_<name> of sum(loss * upstream) for each leaf."""
    found = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()))
    return {f"d_{name}": g for name, g in zip(leaves, found, strict=True)}


# Divergence through the unembedding


def lens(device: str, dtype: torch.dtype, tokens: int) -> list[Implementation]:
    """Peers of the lens divergence; all of them do one layer at a time."""
    triton_only = "its kernel is Triton for GPUs"
    return [
        peer(
            "Liger fused_linear_jsd",
            _liger_lens,
            dtype,
            module="liger_kernel",
            package="liger-kernel",
            needs_cuda=triton_only,
            device=device,
            weighted=False,
            note="no weight per token; bf16 logits",
        ),
        peer(
            "Liger chunked JSD",
            partial(_liger_chunked_lens, compiled=device == "cuda"),
            dtype,
            module="liger_kernel",
            package="liger-kernel",
            weighted=False,
            compiles=device == "cuda",
            note="no weight per token; always the unembedding's gradient",
        ),
        peer("TRL chunked divergence", _trl_lens, dtype, module="trl", package="trl"),
    ]


def _liger_lens(inputs: Inputs) -> Run:
    ops = importlib.import_module("liger_kernel.ops")
    hidden, final, weight = inputs["hidden"], inputs["final"], inputs["weight"]

    def run() -> Result:
        losses = [
            # Liger gives the mean over tokens.
            ops.LigerFusedLinearJSDFunction.apply(
                h, weight.detach(), final, weight.detach(), None, 0.5, -100, 1.0, None, None, None
            )
            * len(final)
            for h in hidden.unbind(0)
        ]
        return {"loss": torch.stack(losses).sum().detach()} | grads(
            torch.stack(losses), 1.0, hidden=hidden
        )

    return run


def _liger_chunked_lens(inputs: Inputs, compiled: bool) -> Run:
    loss = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    apply = loss.LigerFusedLinearJSDFunction.apply
    hidden, final, weight = inputs["hidden"], inputs["final"], inputs["weight"]
    labels = torch.zeros(len(final), dtype=torch.int64, device=final.device)

    def run() -> Result:
        losses = []
        for h in hidden.unbind(0):
            mean = apply(
                h, weight, final, weight, labels, None, None, 0.0, 1.0, 0.5, -100, 1.0, compiled
            )
            losses.append(mean * len(final))
        total = torch.stack(losses)
        return {"loss": total.sum().detach()} | grads(total, 1.0, hidden=hidden)

    return run


def _trl_lens(inputs: Inputs) -> Run:
    kernels = importlib.import_module("trl.kernels.chunked_divergence")
    apply = kernels.ChunkedDivergenceFunction.apply
    hidden, final, weight = inputs["hidden"], inputs["final"], inputs["weight"].detach()
    factor = inputs["factor"]

    def run() -> Result:
        rows = [apply(h, weight, None, final, weight, None, 0.5)[0] for h in hidden.unbind(0)]
        loss = torch.stack(rows) * factor
        return {"loss": loss.detach()} | grads(loss, 1.0, hidden=hidden)

    return run


# Log-probability of labels


def logprob(device: str, dtype: torch.dtype) -> list[Implementation]:
    """Peers of `linear_logprob` with gradient to hidden states and unembedding."""
    lce = None if hasattr(F, "linear_cross_entropy") else "needs torch 2.13"
    triton_only = "its kernel is Triton for GPUs"
    return [
        Implementation(
            "torch F.linear_cross_entropy",
            _torch_lce,
            absent=lce,
            bound=PEER[dtype],
            note="chunked where the reduction allows",
        ),
        peer("TRL chunked log-prob", _trl_logprob, dtype, module="trl", package="trl"),
        peer(
            "Liger fused linear CE",
            _liger_ce,
            dtype,
            module="liger_kernel",
            package="liger-kernel",
            needs_cuda=triton_only,
            device=device,
            weighted=False,
            note="no weight per token; bf16 logits",
        ),
        peer(
            "Apple cut-cross-entropy",
            _apple_cce,
            dtype,
            module="cut_cross_entropy",
            package="cut-cross-entropy",
            needs_cuda=triton_only,
            device=device,
            note="skips small gradients",
        ),
    ]


def _torch_lce(inputs: Inputs) -> Run:
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
    options = torch.nn.LinearCrossEntropyOptions()

    def run() -> Result:
        loss = F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)
        loss = -loss * inputs["factor"]
        return {"loss": loss.detach()} | grads(loss, 1.0, hidden=hidden, weight=weight)

    return run


def _trl_logprob(inputs: Inputs) -> Run:
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]

    def run() -> Result:
        rows = kernels.ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("entropy",)
        )[0]
        loss = rows * inputs["factor"]
        return {"loss": loss.detach()} | grads(loss, 1.0, hidden=hidden, weight=weight)

    return run


def _liger_ce(inputs: Inputs) -> Run:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss_of = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]

    def run() -> Result:
        loss = -loss_of(weight, hidden, labels)
        return {"loss": loss.detach()} | grads(loss, 1.0, hidden=hidden, weight=weight)

    return run


def _apple_cce(inputs: Inputs) -> Run:
    cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]

    def run() -> Result:
        loss = -cce(hidden, weight, labels, reduction="none") * inputs["factor"]
        return {"loss": loss.detach()} | grads(loss, 1.0, hidden=hidden, weight=weight)

    return run


# Attention itself


def attention(device: str, dtype: torch.dtype) -> list[Implementation]:
    """Causal attention, forward and backward: torch's backends by name, FlexAttention, FA2, FA4."""
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    no_gpu = "needs a GPU"
    found = [
        peer(f"SDPA {name}", partial(_sdpa, backend=backend), dtype, needs_cuda=no_gpu,
             device=device)
        for name, backend in backends.items()
    ]  # fmt: skip
    return [
        *found,
        peer("FlexAttention", _flex, dtype, needs_cuda=no_gpu, device=device, compiles=True),
        peer("flash-attn 2", _flash2, dtype, module="flash_attn", package="flash-attn",
             needs_cuda=no_gpu, device=device),
        peer("flash-attn 4", _flash4, dtype, module="flash_attn.cute", package="flash-attn-4",
             needs_cuda=no_gpu, device=device),
    ]  # fmt: skip


def _heads_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(inputs[name].transpose(1, 2) for name in "qkv")  # type: ignore[return-value]


def _attention_result(out: Tensor, inputs: Inputs) -> Result:
    found = grads(out, inputs["d_out"], q=inputs["q"], k=inputs["k"], v=inputs["v"])
    return {"loss": out.detach()} | found


def _sdpa(inputs: Inputs, backend: SDPBackend) -> Run:
    def run() -> Result:
        q, k, v = _heads_first(inputs)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return _attention_result(out.transpose(1, 2), inputs)

    return run


def _flex(inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = inputs["q"].shape[1]
    mask = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=inputs["q"].device
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def run() -> Result:
        q, k, v = _heads_first(inputs)
        out = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        return _attention_result(out.transpose(1, 2), inputs)

    return run


def _flash2(inputs: Inputs) -> Run:
    flash = importlib.import_module("flash_attn").flash_attn_func

    def run() -> Result:
        out = flash(inputs["q"], inputs["k"], inputs["v"], causal=True)
        return _attention_result(out, inputs)

    return run


def _flash4(inputs: Inputs) -> Run:
    flash = importlib.import_module("flash_attn.cute.interface").flash_attn_func

    def run() -> Result:
        out = flash(inputs["q"], inputs["k"], inputs["v"], causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return _attention_result(out, inputs)

    return run
