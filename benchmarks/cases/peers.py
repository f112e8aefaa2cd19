"""Kernels of other projects behind one signature, each with the reason if it cannot run here.

Each is imported when it is used. One that is not installed, or does not run on the device, is
listed as absent. Written against Liger 0.8.5, TRL 1.16, cut-cross-entropy 25.1, flash-attn 2.8 and
4, orda-kernel 0.1, unsloth-zoo 2026.10, torch 2.13.

Left out: Liger's cuTile form, which asks for sm_100; sdpo-rl 0.0.3, whose divergence is over the
top k of logits that are there already.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.case import PEER, Implementation, Inputs, Result, Run, forward_backward

TRITON_ONLY = "its kernel is Triton for GPUs"


@cache
def missing(module: str, package: str) -> str | None:
    """Why a module cannot be imported, or None."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return f"{package} cannot be imported: {error}"
    return None if found else f"not installed: pip install {package}"


def peer(
    name: str,
    make: Callable[[Inputs], Run],
    dtype: torch.dtype,
    package: str = "",
    module: str = "",
    no_gpu: str | None = None,
    **fields: Any,
) -> Implementation:
    """A peer's implementation. `no_gpu`: why it cannot run if the device is not a GPU."""
    absent = missing(module or package.replace("-", "_"), package) if package else None
    return Implementation(name, make, absent=absent or no_gpu, bound=PEER[dtype], **fields)


# Divergence through the unembedding


def lens(device: str, dtype: torch.dtype) -> list[Implementation]:
    """Peers of the lens divergence; all of them compute one layer at a time."""
    on_gpu = device == "cuda"
    no_gpu = None if on_gpu else TRITON_ONLY
    return [
        peer("Liger fused_linear_jsd", partial(_liger_lens, impl="nvidia-triton"), dtype,
             "liger-kernel", no_gpu=no_gpu, weighted=False, note="no weight per token"),
        # Which Liger prefers by itself from sm_90 on, where CUTLASS's package is there.
        peer("Liger fused_linear_jsd, CuTe", partial(_liger_lens, impl="nvidia-cutedsl"), dtype,
             "liger-kernel", no_gpu=no_gpu or missing("cutlass", "nvidia-cutlass-dsl"),
             weighted=False, note="no weight per token"),
        peer("Liger chunked JSD", partial(_liger_chunked_lens, compiled=on_gpu), dtype,
             "liger-kernel", weighted=False, compiles=on_gpu,
             note="no weight per token; always the unembedding's gradient"),
        peer("TRL chunked divergence", _trl_lens, dtype, "trl"),
    ]  # fmt: skip


def lens_by_name(device: str, dtype: torch.dtype) -> list[Implementation]:
    """More peers, for cases that name them: importing unsloth-zoo changes other packages."""
    no_gpu = None if device == "cuda" else TRITON_ONLY
    return [
        peer("ORDA skew_js", _orda_lens, dtype, "orda-kernel", no_gpu=no_gpu, weighted=False,
             note="no weight per token"),
        peer("Unsloth fused_linear_jsd", _unsloth_lens, dtype, "unsloth-zoo",
             no_gpu=no_gpu or missing("unsloth", "unsloth"), weighted=False,
             note="no weight per token"),
    ]  # fmt: skip


def _by_layer(hidden: Tensor, mean: Callable[[Tensor], Tensor]) -> Run:
    """Of a function that gives a layer's mean over tokens."""
    return _summed(hidden, lambda h: mean(h) * h.shape[0])


def _summed(hidden: Tensor, total: Callable[[Tensor], Tensor]) -> Run:
    """Of a function that gives a layer's sum over tokens."""

    def forward() -> Tensor:
        return torch.stack([total(h) for h in hidden.unbind(0)]).sum()

    return forward_backward(forward, hidden=hidden)


def _liger_lens(inputs: Inputs, impl: str) -> Run:
    jsd = importlib.import_module("liger_kernel.functional").fused_linear_jsd
    final, weight = inputs["final"], inputs["weight"].detach()
    return _by_layer(inputs["hidden"], lambda h: jsd(h, weight, final, weight, impl=impl))


def _orda_lens(inputs: Inputs) -> Run:
    orda = importlib.import_module("orda_kernel")
    final, weight = inputs["final"], inputs["weight"].detach()
    labels = torch.zeros(len(final), dtype=torch.int64, device=final.device)
    options = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0,
               "kl_divergence": "skew_js", "kl_beta": 0.5, "reduction": "sum",
               "backend": "triton" if final.is_cuda else "torch"}  # fmt: skip

    def total(h: Tensor) -> Tensor:
        return orda.distillation_loss(
            h, weight, labels, orda.TiedTeacher(hidden=final), **options
        ).loss

    return _summed(inputs["hidden"], total)


def _unsloth_lens(inputs: Inputs) -> Run:
    os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")  # as unsloth sets it before it imports this
    # Else it makes a folder where it is run.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir(), "unsloth")))
    module = importlib.import_module("unsloth_zoo.fused_losses.fused_linear")
    final, weight = inputs["final"], inputs["weight"].detach()
    options = {"beta": 0.5, "num_items_in_batch": 1}  # the sum, divided by 1
    return _summed(
        inputs["hidden"], lambda h: module.fused_linear_jsd(h, weight, final, weight, **options)
    )


def _liger_chunked_lens(inputs: Inputs, compiled: bool) -> Run:
    loss = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    final, weight = inputs["final"], inputs["weight"]
    labels = torch.zeros(len(final), dtype=torch.int64, device=final.device)
    rest = (weight, final, weight, labels, None, None, 0.0, 1.0, 0.5, -100, 1.0, compiled)
    apply = loss.LigerFusedLinearJSDFunction.apply
    return _by_layer(inputs["hidden"], lambda h: apply(h, *rest))


def _trl_lens(inputs: Inputs) -> Run:
    kernels = importlib.import_module("trl.kernels.chunked_divergence")
    apply = kernels.ChunkedDivergenceFunction.apply
    hidden, final, weight = inputs["hidden"], inputs["final"], inputs["weight"].detach()

    def forward() -> Tensor:
        rows = [apply(h, weight, None, final, weight, None, 0.5)[0] for h in hidden.unbind(0)]
        return torch.stack(rows) * inputs["factor"]

    return forward_backward(forward, hidden=hidden)


# Log-probability of labels


def logprob(device: str, dtype: torch.dtype) -> list[Implementation]:
    """Peers of `linear_logprob` with gradient to hidden states and unembedding."""
    needs_torch = None if hasattr(F, "linear_cross_entropy") else "needs torch 2.13"
    no_gpu = None if device == "cuda" else TRITON_ONLY
    return [
        Implementation("torch F.linear_cross_entropy", _torch_lce, absent=needs_torch,
                       bound=PEER[dtype], note="chunked where the reduction allows"),
        peer("TRL chunked log-prob", _trl_logprob, dtype, "trl"),
        peer("Liger fused linear CE", _liger_ce, dtype, "liger-kernel", no_gpu=no_gpu,
             weighted=False, note="no weight per token; bf16 logits"),
        peer("Apple cut-cross-entropy", _apple_cce, dtype, "cut-cross-entropy", no_gpu=no_gpu,
             note="skips small gradients"),
    ]  # fmt: skip


def _logprob_run(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, weighted: bool = True
) -> Run:
    """Of a function of hidden states, unembedding and labels."""
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]

    def forward() -> Tensor:
        rows = loss(hidden, weight, labels)
        return rows * inputs["factor"] if weighted else rows

    return forward_backward(forward, hidden=hidden, weight=weight)


def _torch_lce(inputs: Inputs) -> Run:
    options: Any = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions()}
    return _logprob_run(lambda *given: -F.linear_cross_entropy(*given, **options), inputs)


def _trl_logprob(inputs: Inputs) -> Run:
    apply = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply

    def rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("entropy",))[0]

    return _logprob_run(rows, inputs)


def _liger_ce(inputs: Inputs) -> Run:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return _logprob_run(lambda hidden, weight, y: -loss(weight, hidden, y), inputs, weighted=False)


def _apple_cce(inputs: Inputs) -> Run:
    cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _logprob_run(lambda *given: -cce(*given, reduction="none"), inputs)


# Attention itself

# torch's flash backend is FlashAttention 2.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(device: str, dtype: torch.dtype) -> list[Implementation]:
    """Causal attention, forward and backward: torch's backends by name, FlexAttention, FA2, FA4."""
    no_gpu = None if device == "cuda" else "needs a GPU"
    return [
        *(peer(f"SDPA {name}", partial(_sdpa, backend=backend), dtype, no_gpu=no_gpu)
          for name, backend in BACKENDS.items()),
        peer("FlexAttention", _flex, dtype, no_gpu=no_gpu, compiles=True),
        peer("flash-attn 2", partial(_flash, module="flash_attn"), dtype, "flash-attn",
             no_gpu=no_gpu),
        peer("flash-attn 4", partial(_flash, module="flash_attn.cute.interface"), dtype,
             "flash-attn-4", "flash_attn.cute", no_gpu=no_gpu),
    ]  # fmt: skip


def attention_backward(device: str, dtype: torch.dtype) -> list[Implementation]:
    """The backward of causal attention alone, over a retained graph, as `d_plain_<name>`."""
    no_gpu = None if device == "cuda" else "needs a GPU"
    return [
        peer(f"SDPA {name}", partial(_sdpa_backward, backend=BACKENDS[name]), dtype, no_gpu=no_gpu)
        for name in ("flash", "cuDNN")
    ]


def _sdpa_backward(inputs: Inputs, backend: SDPBackend) -> Run:
    given = [inputs[name] for name in "qkv"]
    q, k, v = (x.transpose(1, 2) for x in given)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    upstream = inputs["d_out"].transpose(1, 2)

    def run() -> Result:
        found = torch.autograd.grad(out, given, upstream, retain_graph=True)
        return {f"d_plain_{name}": g for name, g in zip("qkv", found, strict=True)}

    return run


def attention_run(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Run:
    """Of a function of q, k and v, each [B, T, heads, K]."""
    q, k, v = (inputs[name] for name in "qkv")
    return forward_backward(lambda: attend(q, k, v), inputs["d_out"], q=q, k=k, v=v)


def _heads_first(attend: Callable[..., Tensor], inputs: Inputs) -> Run:
    """Of a function of tensors [B, heads, T, K]."""

    def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        return out.transpose(1, 2)

    return attention_run(heads_last, inputs)


def _sdpa(inputs: Inputs, backend: SDPBackend) -> Run:
    def attend(*given: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*given, is_causal=True, **options)

    return _heads_first(attend, inputs)


def _flex(inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = inputs["q"].shape[1]
    mask = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=inputs["q"].device
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return _heads_first(partial(compiled, block_mask=mask), inputs)


def _flash(inputs: Inputs, module: str) -> Run:
    flash = importlib.import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attention_run(attend, inputs)
