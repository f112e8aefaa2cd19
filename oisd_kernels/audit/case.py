"""What `oisd_kernels.audit` is told to compile: the call of a launcher with "meta" tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call of a launcher; `full` leaves it out of the sweep unless that was asked for."""

    name: str
    launch: Callable[[], object]
    full: bool = False


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
