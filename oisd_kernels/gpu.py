"""What the launches of all Triton kernels share: the machine, table keys, dtypes and strides."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
GFX942 = 942  # stands for AMD's CDNA 3 among the compute capabilities

TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability, and how many programs are wanted at once: two waves of them."""
    if device.type == "cpu":
        return 0, 4
    properties = torch.cuda.get_device_properties(device)
    programs = 2 * properties.multi_processor_count
    if torch.version.hip is not None:
        return GFX942, programs
    return 10 * properties.major + properties.minor, programs


def table_key(capability: int, known: Any) -> int:
    """The entry of a table for a compute capability (90 for sm_90)."""
    if capability == GFX942:
        return GFX942
    if capability >= 120:
        return 86  # consumer cards, with their shared memory
    return max((c for c in known if c <= capability), default=86)


def row_strides(x: Tensor) -> tuple[int, int]:
    """Strides of the layers and of the tokens of [S, T, D]; one layer is every layer's."""
    return (x.stride(0) if len(x) > 1 else 0), x.stride(1)


def is_aligned(x: Tensor) -> bool:
    """Whether Triton sees that rows start at multiples of 16 bytes."""
    sixteen = [x.shape[-1], x.data_ptr(), *(s for s in x.stride()[:-1])]
    return all(number % 16 == 0 for number in sixteen)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
