"""Metrics that add up: means that stay open until the whole batch has been seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean that is still open: the total of a quantity and how many it was taken over."""

    total: Tensor
    count: Tensor

    @classmethod
    def over(cls, values: Tensor, where: Tensor) -> Mean:
        """The mean of `values` over the entries at which `where` (same shape) is true."""
        values = values.detach().float()
        return cls(torch.where(where, values, 0.0).sum(), where.sum().float())

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def item(self) -> float:
        """The mean as a number; NaN where it was taken over nothing."""
        count = self.count.item()
        return self.total.item() / count if count else math.nan


Metrics = dict[str, Mean]


def add_metrics(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> Metrics:
    """The metrics of two parts of a batch, taken together."""
    merged = dict(a)
    for name, mean in b.items():
        merged[name] = merged[name] + mean if name in merged else mean
    return merged


def means_by_sign(name: str, divergence: Tensor, signed: Tensor) -> Metrics:
    """Mean divergence over the rows that are pulled together, and over those pushed apart."""
    signed = signed.expand_as(divergence)
    return {
        f"{name}_pos": Mean.over(divergence, signed > 0),
        f"{name}_neg": Mean.over(divergence, signed < 0),
    }
