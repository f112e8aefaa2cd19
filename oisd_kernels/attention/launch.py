"""What the launches of the attention kernels share: operands as the kernels want them, row terms.

Letters: N tokens, H query heads, J key heads, K head dimension.
"""

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from oisd_kernels.attention.spec import Alignment, Geometry
from oisd_kernels.gpu import GFX942, machine

LOG2E = 1.4426950408889634

TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class RowTerms(NamedTuple):
    """What the gradient kernels read of a row: see there."""

    lse: Tensor  # [H, N]
    lse_t: Tensor  # [H, N]
    factor: Tensor  # [N]
    shift: Tensor  # [H, N]

    @classmethod
    def of(cls, lse: Tensor, delta: Tensor | None, alignment: Alignment | None) -> "RowTerms":
        """lse in natural logarithm; delta None: the alignment alone."""

        def base2(x: Tensor) -> Tensor:
            x = rows_of(x, lse.dtype)
            return torch.where(x == -math.inf, 0.0, x) * LOG2E

        if alignment is None:
            assert delta is not None
            return cls(base2(lse), lse, lse, delta)
        factor, beta = -rows_of(alignment.row_weight, lse.dtype), alignment.beta
        if alignment.divergence == "forward_kl":
            shift = factor.expand_as(lse)
        else:
            mean = rows_of(alignment.statistic, lse.dtype)
            if alignment.divergence == "jsd":
                factor = (1 - beta) * factor
            else:
                mean = -mean
            shift = torch.where(factor != 0, factor * mean, 0.0)
        shift = shift.contiguous() if delta is None else delta + shift
        return cls(base2(lse), base2(alignment.teacher.lse), factor, shift)


def ds_scale_of(
    dtype: torch.dtype, d_out: Tensor | None, alignment: Alignment | None, like: Tensor
) -> Tensor | None:
    """float16's range is short: a power of two that brings the largest upstream gradient near 1."""
    if dtype != torch.float16:
        return None
    largest = like.new_zeros((), dtype=torch.float32)
    for x in (d_out, None if alignment is None else alignment.row_weight):
        if x is not None:
            size = x.float().abs()
            largest = largest.maximum(torch.where(size.isfinite(), size, 0).amax())
    exponent = torch.where(largest > 0, largest, 1.0).log2().round().clamp(-100, 100)
    return torch.stack((torch.exp2(-exponent), torch.exp2(exponent)))


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds them all."""
    common = None
    for x in tensors:
        if x is not None:
            common = x.dtype if common is None else torch.promote_types(common, x.dtype)
    assert common is not None
    return common


def compute_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, rows and heads at multiples of 16, K a multiple of 16 (filled up with 0)."""
    x = x.to(dtype)
    if x.shape[-1] % 16:
        x = pad(x, (0, -x.shape[-1] % 16))
    numbers = x.data_ptr(), *strides_of(x)
    if x.stride(-1) != 1 or any(number % 16 for number in numbers):
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).contiguous()


def strides_of(*tensors: Tensor) -> list[int]:
    """Of all dimensions but K, which is dense; what nothing uses must not enter the binary."""
    sizes = [size for x in tensors for size in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return [stride if count > 1 else 0 for count, stride in sizes]


def rounded_up(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def window_of(geometry: Geometry, tokens: int) -> int:
    """At most N, so that nothing overflows."""
    return 0 if geometry.window is None else min(geometry.window, tokens)


def mask_of(geometry: Geometry) -> dict[str, Any]:
    window = geometry.window is not None
    return {"CAUSAL": geometry.causal, "WINDOW": window, "SOFTCAP": geometry.softcap}


def arithmetic(x: Tensor, dtype: torch.dtype, capability: int) -> dict[str, Any]:
    compute = compute_of(dtype)
    # The interpreter's tl.dot takes the bits of bf16 for integers.
    operand = compute if x.device.type == "cpu" else dtype
    exact = "ieee" if capability == GFX942 else "tf32x3"
    precision = exact if operand == torch.float32 else None
    return {"OPERAND": TL[operand], "ACC": TL[compute], "PRECISION": precision}


def capability_of(x: Tensor, capability: int | None) -> int:
    return machine(x.device)[0] if capability is None else capability
