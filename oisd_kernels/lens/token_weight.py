"""The weight of a row in a divergence, and the mean over the rows that have one.

Letters: S student layers, N tokens, D width.
"""

import torch
from torch import Tensor


def row_weight(
    token_weight: Tensor | None,  # [S, N] or [N]
    hidden: Tensor,  # [S, N, D] or [N, D]
    dtype: torch.dtype,
) -> Tensor | None:
    """The weight as a kernel takes it, without gradient: one number for each row of `hidden`."""
    if token_weight is None:
        return None
    return token_weight.detach().to(dtype).expand(hidden.shape[:-1])


def row_count(weight: Tensor | None, hidden: Tensor) -> Tensor | int:
    """Rows of weight other than 0, at least 1: what the reduction "mean" divides by."""
    if weight is None:
        return max(hidden.shape[:-1].numel(), 1)
    return (weight != 0).sum().clamp_min(1)
