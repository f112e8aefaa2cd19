"""Argument checks and the choice of implementation that the attention ops share."""

from collections.abc import Sequence
from functools import reduce
from types import ModuleType

import torch
from torch import Tensor

from oisd_kernels import checks

IMPLEMENTATIONS = ("torch", "triton", "cuda", "reference")


def check_layer(
    op: str, q: Tensor, k: Tensor, suffix: str, letters: str, rows: Sequence[int], heads: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Queries and keys of one layer, "" or "_teacher", against the student's rows and heads."""
    dim = q.shape[-1]
    q_layout, k_layout = f"[{letters}, H, K]", f"[{letters}, J, K]"
    checks.check_tensor(op, f"q{suffix}", q, q_layout, (*rows, heads, dim), device=device)
    checks.check_tensor(op, f"k{suffix}", k, k_layout, (*rows, None, dim), device=device)
    if heads == 0 or dim == 0:
        raise checks.argument_error(op, f"q{suffix}", "have H and K of at least 1", list(q.shape))
    key_heads = k.shape[-2]
    if key_heads == 0 or heads % key_heads:
        wanted = f"have a number of heads J that divides H = {heads}"
        raise checks.argument_error(op, f"k{suffix}", wanted, f"J = {key_heads}")


def check_masks(op: str, causal: object, window: object, softcap: object) -> None:
    checks.check_flag(op, "causal", causal)
    checks.check_count(op, "window", window)
    checks.check_positive(op, "softcap", softcap, optional=True)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, rows: Sequence[int], q: Tensor) -> None:
    """Offsets of packed sequences; `rows` are q's leading sizes, (N,) or (B, T)."""
    if len(rows) != 1:
        remedy = "pack q and k to [N, H, K], or leave cu_seqlens out"
        raise checks.argument_error(
            op, "cu_seqlens", "be None in the dense form [B, T, H, K]", "a tensor", remedy
        )
    layout = "[number of sequences + 1]"
    checks.check_tensor(
        op, "cu_seqlens", cu_seqlens, layout, (None,), dtypes=checks.OFFSET_DTYPES, device=q.device
    )
    if cu_seqlens.numel() == 0:
        raise checks.argument_error(op, "cu_seqlens", "have at least one entry", "none", "pass [0]")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # a value cannot decide what a compiled graph looks like
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != rows[0] or bool((cu_seqlens.diff() < 0).any()):
        wanted = f"rise from 0 to N = {rows[0]}"
        remedy = "build it as cumsum of the lengths with a 0 in front"
        raise checks.argument_error(op, "cu_seqlens", wanted, offsets, remedy)


def choose(
    op: str, impl: object, layers: Sequence[Tensor], softcap: float | None, sampled: bool = False
) -> str:
    """ "reference", "torch", "triton" or "cuda", for the queries of one layer or of two.

    "auto" is "triton" on a GPU where there is a tile for the head dimension and the dtype, and
    "torch" elsewhere. Raises ValueError where the choice cannot run; what
    "cuda" cannot do beyond that, `cuda_impl.check_supported` says when it is launched.
    """
    q = layers[0]
    if impl == "auto":
        impl = "torch"
        if q.is_cuda and _width(layers) <= _widest(layers, softcap):
            impl = "triton"
    if impl not in IMPLEMENTATIONS:
        here = ", ".join(f'"{name}"' for name in ("auto", *IMPLEMENTATIONS))
        raise checks.argument_error(op, "impl", f"be one of {here}", repr(impl))
    if sampled and impl == "cuda":
        remedy = 'use impl="auto", "triton" or "torch"'
        raise checks.argument_error(op, "impl", "be another beside key_index", repr(impl), remedy)
    if impl == "cuda" and not q.is_cuda:
        remedy = 'use impl="auto" or "torch"'
        raise checks.argument_error(
            op, "q", 'be on a CUDA device with impl="cuda"', q.device, remedy
        )
    if impl in ("triton", "cuda"):
        _check_triton(op, layers, softcap)
    return str(impl)


def _width(layers: Sequence[Tensor]) -> int:
    return max(q.shape[-1] for q in layers)


def _widest(layers: Sequence[Tensor], softcap: float | None) -> int:
    """The largest head dimension that Triton's kernels have a tile for; 0 without Triton."""
    try:
        from oisd_kernels.attention import triton_impl
    except ImportError:
        return 0
    dtype = reduce(torch.promote_types, (q.dtype for q in layers))
    return triton_impl.widest(layers[0], dtype, softcap)


def _check_triton(op: str, layers: Sequence[Tensor], softcap: float | None) -> None:
    q = layers[0]
    try:
        from oisd_kernels.attention import triton_impl
    except ImportError as error:
        wanted = "be one of those that can run here"
        remedy = f'{error}; install triton, or use impl="torch"'
        raise checks.argument_error(op, "impl", wanted, "'triton'", remedy) from error
    width, widest = _width(layers), _widest(layers, softcap)
    if width > widest:
        wanted = f'have a head dimension K of at most {widest} with impl="triton" here'
        got = f"K = {width} of {q.dtype}"
        raise checks.argument_error(op, "q", wanted, got, 'use impl="torch"')
    if not q.is_cuda and not torch.compiler.is_compiling():
        kernel = triton_impl.attention_forward_kernel
        if type(kernel).__name__ != "InterpretedFunction":
            remedy = "set TRITON_INTERPRET=1 before Triton is imported to try it on a CPU"
            raise checks.argument_error(op, "q", 'be on a GPU with impl="triton"', q.device, remedy)


def functions(impl: str) -> ModuleType:
    """The module of "torch", "triton" or "cuda", which have the same functions."""
    if impl == "torch":
        from oisd_kernels.attention import torch_impl

        return torch_impl
    if impl == "cuda":
        from oisd_kernels.attention import cuda_impl

        return cuda_impl

    from oisd_kernels.attention import triton_impl  # triton may be missing on CPU-only machines

    return triton_impl
