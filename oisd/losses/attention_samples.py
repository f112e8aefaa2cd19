"""The paper's sampling of the attention loss: some decoding steps, and for each some keys.

B sequences, T positions, M sampled keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_steps(mask: Tensor, noise: Tensor, count: int) -> Tensor:
    """Keep at most `count` true entries of each row of `mask` (the paper's sampled decoding steps).

    Args:
        mask: [B, T] bool.
        noise: [B, T], independent uniform numbers in [0, 1): the largest are kept.
        count: at least 1.
    """
    chosen = noise.masked_fill(~mask, -1.0).topk(min(count, mask.shape[1]), dim=1).indices
    return torch.zeros_like(mask).scatter(1, chosen, True) & mask


def sampled_keys(
    batch: int, length: int, window: int, stride: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The paper's sampled keys: the nearest `window`, the own position among them, and a stride.

    Returns [B, T, M] int64 positions, M = window + ceil(T / stride): for query t the keys
    t - window + 1 ... t, and every stride-th position (0, stride, ...) before those; -1 where there
    is none.
    """
    t = torch.arange(length, device=device)[:, None]
    near = t - torch.arange(window, device=device)
    far = torch.arange(0, length, stride, device=device).expand(length, -1)
    far = torch.where(far <= t - window, far, -1)
    index = torch.cat([near.clamp(min=-1), far], dim=1)
    return index.expand(batch, -1, -1)
