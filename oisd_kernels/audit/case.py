"""A case of `oisd_kernels.audit`: a call of a launcher with "meta" tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call of a launcher; with `full`, only in the full sweep."""

    name: str
    launch: Callable[[], object]
    full: bool = False


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")
