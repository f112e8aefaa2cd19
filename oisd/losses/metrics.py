"""Metrics that add up: a mean is kept as a total and a count until the whole batch is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean over parts of a batch: the total of a quantity and the count of its values."""

    total: Tensor
    count: Tensor

    @classmethod
    def over(cls, values: Tensor, where: Tensor | None = None) -> Mean:
        """The mean of `values`, or of those at which `where` (same shape) is true."""
        values = values.detach().float()
        if where is None:
            where = torch.ones_like(values, dtype=torch.bool)
        return cls(torch.where(where, values, 0.0).sum(), where.sum().float())

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def item(self) -> float:
        """The mean as a number; NaN if there are no values."""
        count = self.count.item()
        return self.total.item() / count if count else math.nan


class Largest(Mean):
    """The largest value instead of the mean; `total` holds it."""

    @classmethod
    def over(cls, values: Tensor, where: Tensor | None = None) -> Largest:
        """The largest of `values`, or of those at which `where` (same shape) is true."""
        values = values.detach().float().flatten()
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where.flatten()
        # Of no values torch has no maximum: one of -inf stands beside them.
        inside = torch.where(where, values, -torch.inf)
        return cls(torch.cat([inside, inside.new_tensor([-torch.inf])]).max(), where.sum().float())

    def __add__(self, other: Mean) -> Largest:
        return Largest(torch.maximum(self.total, other.total), self.count + other.count)

    def item(self) -> float:
        """The largest value; NaN if there are none."""
        return self.total.item() if self.count.item() else math.nan


Metrics = dict[str, Mean]


def add_metrics(a: Mapping[str, Mean], b: Mapping[str, Mean]) -> Metrics:
    """The metrics of two parts of a batch, taken together."""
    merged = dict(a)
    for name, mean in b.items():
        merged[name] = merged[name] + mean if name in merged else mean
    return merged


def means_by_sign(name: str, divergence: Tensor, signed: Tensor) -> Metrics:
    """Mean divergence over the rows of positive weight, and over those of negative weight."""
    signed = signed.expand_as(divergence)
    return {
        f"{name}_pos": Mean.over(divergence, signed > 0),
        f"{name}_neg": Mean.over(divergence, signed < 0),
    }
