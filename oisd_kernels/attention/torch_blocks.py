"""Which blocks of scores the torch attention computes, and how their rows get in and out.

Sequences of like length are taken together, as [B, T]; long ones alone. Of each, the rows that are
wanted are moved up, R of them, and cut into tiles; each tile meets the keys that one of its rows
sees, in blocks. Blocks that are masked entirely are never made, and a block has a mask only where
it needs one.

Letters: B sequences of a group, T positions of the longest, R rows, H query heads, J key heads,
K head dimension, r rows and c keys of a block.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oisd_kernels.attention.spec import Geometry

# Elements of a block of scores, all heads together. On a CPU it has to stay in the cache; on
# anything else it has to be worth a launch.
CPU_BLOCK, OTHER_BLOCK = 1 << 17, 1 << 24
# How much of a group may be padding: its shortest sequence against its longest.
LIKE_LENGTH = 0.75


class Scratch:
    """Tensors by name, made once each and used again."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        x = self.tensors.get(name)
        if x is None or x.numel() < count:
            x = self.tensors[name] = torch.empty(count, dtype=self.dtype, device=self.device)
        return x[:count].view(*shape)


class Block(NamedTuple):
    """A block of scores [B, H, r, c]."""

    keys: slice
    hidden: Tensor | None  # [B, 1, r, c]: True where a row does not see a key; None: nowhere


class Group:
    """Sequences that are computed together."""

    def __init__(self, starts: list[int], lengths: list[int], geometry: Geometry, heads: int):
        device = geometry.cu_seqlens.device
        self.geometry, self.heads, self.device = geometry, heads, device
        self.size, self.length = len(starts), lengths[0]
        self.ragged = lengths[-1] < self.length
        self.start = starts[0]  # of the only sequence, where there is one
        places = torch.arange(self.length, device=device)
        self.lengths = torch.tensor(lengths, device=device)[:, None]  # [B, 1]
        self.exists = places < self.lengths  # [B, T]
        index = torch.tensor(starts, device=device)[:, None] + places
        self.index = torch.where(self.exists, index, starts[0])  # [B, T]

    def gather(self, x: Tensor, wanted: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [N, J, K] -> [B, J, T, K]; 0 past a sequence's end and where `wanted` [B, T] is not."""
        if self.size == 1:
            taken = x[self.start : self.start + self.length][None]
        else:
            taken = x.index_select(0, self.index.flatten()).view(*self.index.shape, *x.shape[1:])
        if self.ragged or wanted is not None:
            wanted = self.exists if wanted is None else wanted
            taken = taken.masked_fill(~wanted[:, :, None, None], 0)
        return taken.transpose(1, 2).to(dtype).contiguous()

    def seen(self, keep: Tensor) -> Tensor:
        """[B, T]: the keys that a row of `keep` [B, T] sees."""
        geometry = self.geometry
        count = torch.nn.functional.pad(keep.cumsum(1), (1, 0))  # kept rows before each position
        place = torch.arange(self.length, device=self.device)
        reach = self.length if geometry.window is None else geometry.window
        first = place if geometry.causal else (place - reach + 1).clamp(min=0)
        end = (place + reach).clamp(max=self.length)
        return (count[:, end] > count[:, first]) & self.exists

    def rows(self, keep: Tensor | None) -> "Rows":
        """The rows of `keep` [B, T], or all that exist."""
        if keep is None or bool(keep.all()):
            place = torch.arange(self.length, device=self.device).expand(self.size, -1)
            return Rows(self, place, self.exists if self.ragged else None)
        count = keep.sum(1, keepdim=True)
        most = int(count.max())
        place = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        live = torch.arange(most, device=self.device) < count
        return Rows(self, place, None if bool(live.all()) else live)


class Rows:
    """Rows [B, R] of a group's sequences, by their positions."""

    def __init__(self, group: Group, place: Tensor, live: Tensor | None):
        self.group, self.place, self.live = group, place, live
        self.index = group.index.gather(1, place)  # [B, R], into N
        elements = CPU_BLOCK if group.device.type == "cpu" else OTHER_BLOCK
        per_sequence = max(elements // (group.size * group.heads), 1)
        side = max(math.isqrt(per_sequence), 16)
        self.tile = max(min(place.shape[1], side), 1)
        self.block = max(min(group.length, per_sequence // self.tile), 16)

    def tiles(self) -> Iterator["Tile"]:
        for first in range(0, self.place.shape[1], self.tile):
            yield Tile(self, slice(first, min(first + self.tile, self.place.shape[1])))


class Tile:
    """Some of the rows."""

    def __init__(self, rows: Rows, part: slice):
        self.group, self.block, self.part = rows.group, rows.block, part
        self.place, self.index = rows.place[:, part], rows.index[:, part]
        live = None if rows.live is None else rows.live[:, part]
        self.live = None if live is None or bool(live.all()) else live

    def blocks(self) -> Iterator[Block]:
        group, geometry = self.group, self.group.geometry
        place = self.place if self.live is None else self.place[self.live]
        if place.numel() == 0:
            return
        lowest, highest = int(place.min()), int(place.max())
        reach = group.length if geometry.window is None else geometry.window
        first = max(lowest - reach + 1, 0)
        last = min(highest + 1 if geometry.causal else highest + reach, group.length)
        for start in range(first, last, self.block):
            stop = min(start + self.block, last)
            ahead = 0 if geometry.causal else reach - 1
            whole = stop - 1 <= lowest + ahead and start > highest - reach
            if whole and self.live is None and not group.ragged:
                yield Block(slice(start, stop), None)
            else:
                yield Block(slice(start, stop), self._hidden(start, stop))

    def _hidden(self, start: int, stop: int) -> Tensor:
        geometry = self.group.geometry
        key = torch.arange(start, stop, device=self.group.device)
        ahead = key - self.place[:, :, None]  # [B, r, c]
        hidden = key >= self.group.lengths[:, :, None]
        if geometry.causal:
            hidden = hidden | (ahead > 0)
        if geometry.window is not None:
            hidden = hidden | (ahead.abs() >= geometry.window)
        if self.live is not None:
            hidden = hidden | ~self.live[:, :, None]
        return hidden[:, None]

    def take(self, x: Tensor, dtype: torch.dtype, keep: Tensor | None = None) -> Tensor:
        """Rows of x [N, H, K] -> [B, H, r, K], 0 where they do not live or are not kept."""
        taken = x.index_select(0, self.index.flatten()).view(*self.index.shape, *x.shape[1:])
        taken = taken.to(dtype).transpose(1, 2)
        return self._clear(taken, keep).contiguous()

    def take_statistic(self, x: Tensor, dtype: torch.dtype, keep: Tensor | None = None) -> Tensor:
        """Rows of x [H, N] -> [B, H, r, 1]."""
        taken = x.index_select(1, self.index.flatten()).view(len(x), *self.index.shape)
        return self._clear(taken.to(dtype).transpose(0, 1)[..., None], keep)

    def take_row(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Rows of x [N] -> [B, 1, r, 1]."""
        return self._clear(x[self.index][:, None, :, None], keep)

    def _clear(self, taken: Tensor, keep: Tensor | None) -> Tensor:
        if self.live is not None:
            keep = self.live if keep is None else keep & self.live
        return taken if keep is None else taken.masked_fill(~keep[:, None, :, None], 0)

    def put(self, x: Tensor, values: Tensor) -> None:
        """values [B, H, r, K] to their rows of x [N, H, K]."""
        values = values.transpose(1, 2)
        if self.live is None:
            x[self.index.flatten()] = values.flatten(0, 1).to(x.dtype)
        else:
            x[self.index[self.live]] = values[self.live].to(x.dtype)

    def put_statistic(self, x: Tensor, values: Tensor) -> None:
        """values [B, H, r, 1] to their columns of x [H, N]."""
        self.put(x.T[..., None], values)

    def put_row(self, x: Tensor, values: Tensor) -> None:
        """values [B, 1, r, 1] to their places of x [N]."""
        self.put(x[:, None, None], values)


def groups(geometry: Geometry, heads: int) -> Iterator[Group]:
    """All sequences that are not empty; asks the device for their lengths."""
    offsets = geometry.cu_seqlens.tolist()
    sequences = [(b - a, a) for a, b in zip(offsets, offsets[1:], strict=False) if b > a]
    sequences.sort(key=lambda sequence: -sequence[0])
    elements = CPU_BLOCK if geometry.cu_seqlens.device.type == "cpu" else OTHER_BLOCK
    while sequences:
        longest = sequences[0][0]
        room = max(elements // (heads * longest * longest), 1)
        count = 1
        while count < min(room, len(sequences)) and sequences[count][0] >= LIKE_LENGTH * longest:
            count += 1
        part, sequences = sequences[:count], sequences[count:]
        yield Group([start for _, start in part], [length for length, _ in part], geometry, heads)
