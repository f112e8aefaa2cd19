"""Bytes that the row kernels and their matmuls move through a GPU's memory, for a pair of logits.

    python -m benchmarks.measure.row_bytes

Counted from what the kernels load and store in Triton's interpreter, which takes a process of its
own. A pair is a student's logit and the final layer's; with S student layers a token has V pairs,
and what its S + 1 rows move is divided by V. The gradient is in half precision, as on a GPU.

The matmuls write the logits and read the gradient, whole. A kernel's stores count. So do its loads,
unless the second-level cache still holds what is loaded. It holds what was loaded or stored last,
as much as the share of it that `rows_split` counts on. What comes last follows from the order:

* Programs of `rows_triton` run hundreds at a time, at the same pace.
* Those of `rows_split` run in the order of their numbers, which they keep by waiting.
* A launch finds nothing: the one before has been through a whole chunk, far more than a cache.

Sizes are small, and the cache is as small in proportion: it is what makes the lag LAG tokens. Loads
of single entries are left out, and so are the sums of parts, 2 KB a token beside 1.2 MB.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TOKENS = {1: 16, 4: 10}  # by student layers: more than the cache holds
WIDTH, VOCABULARY, PART, BLOCK, LAG = 8, 1280, 512, 256, 2


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    found = [
        {"form": form, "layers": layers, "bytes": count(form, layers)}
        for form in ("whole", "split")
        for layers in TOKENS
    ]
    json.dump(found, sys.stdout)


def count(form: str, layers: int) -> float:
    """Bytes for each of a token's V pairs."""
    from oisd_kernels import logit_lens_divergence
    from oisd_kernels.lens.chunked import head_pass, rows_split

    tokens, generator = TOKENS[layers], torch.Generator().manual_seed(0)
    hidden, final, weight = (
        torch.randn(*shape, generator=generator)
        for shape in ((layers, tokens, WIDTH), (tokens, WIDTH), (VOCABULARY, WIDTH))
    )
    token, gradient = 4 * (1 + layers) * VOCABULARY, 2 * layers * VOCABULARY
    cache = LAG * (3 * token + gradient)
    traffic = Traffic(cache, in_order=form == "split")
    with ExitStack() as stack:
        for module, name, value in (
            (head_pass, "SPLIT_ROWS", form == "split"),
            (head_pass, "Projection", partial(Narrow, traffic)),
            (rows_split, "PART", PART),
            (rows_split, "BLOCK", BLOCK),
            (rows_split, "LAG", LAG),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        traffic.watch(stack)
        logit_lens_divergence(hidden.requires_grad_(), final, weight, impl="chunked")
    assert traffic.launches == (2 if form == "whole" else 1)
    return traffic.bytes / (tokens * VOCABULARY)


class Narrow:
    """A `Projection` that multiplies bfloat16 operands, as on a GPU, and tells of its traffic."""

    operand = torch.bfloat16

    def __init__(self, traffic: Traffic, weight: Tensor, dtypes: object, compute: torch.dtype):
        del dtypes, compute
        self.traffic, self.weight = traffic, weight

    def logits(self, rows: Tensor, out: Tensor) -> None:
        torch.mm(rows.float(), self.weight.t(), out=out)
        self.traffic.memory = out.untyped_storage().data_ptr(), out.untyped_storage().nbytes()
        self.traffic.bytes += out.numel() * out.element_size()

    def to_hidden(self, d_logits: Tensor) -> Tensor:
        self.traffic.bytes += d_logits.numel() * d_logits.element_size()
        return d_logits.float() @ self.weight


class Traffic:
    """`bytes` of the logits' memory that were moved, with a cache of `cache` bytes."""

    def __init__(self, cache: int, in_order: bool):
        self.cache, self.in_order = cache, in_order
        self.bytes = self.launches = 0
        self.memory: tuple[int, int] = 0, 0  # of the logits: where, and how many bytes
        self.programs: list[
            list[tuple[bool, int, int]]
        ] = []  # load, place and bytes of each access

    def watch(self, stack: ExitStack) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        run = GridExecutor.__call__

        def launch(*given: Any, **named: Any) -> None:
            self.programs, self.launches = [], self.launches + 1
            run(*given, **named)
            self.bytes += moved(self.programs, self.cache, self.in_order)

        def watched(name: str, act: Callable[..., None]) -> None:
            old = getattr(InterpreterBuilder, name)

            def new(*given: Any, **named: Any) -> Any:
                act(*given)
                return old(*given, **named)

            stack.enter_context(mock.patch.object(InterpreterBuilder, name, new))

        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        watched("set_grid_idx", lambda *_: self.programs.append([]))
        watched("create_masked_load", lambda _, at, mask, *__: self.access(True, at, mask))
        watched("create_masked_store", lambda _, at, value, mask, *__: self.access(False, at, mask))

    def access(self, load: bool, pointers: Any, mask: Any) -> None:
        start, size = self.memory
        place = int(pointers.data.flat[0]) - start
        if pointers.data.size > 1 and 0 <= place < size:
            width = pointers.get_element_ty().primitive_bitwidth // 8
            self.programs[-1].append((load, place, int(mask.data.sum()) * width))


def moved(programs: list[list[tuple[bool, int, int]]], cache: int, in_order: bool) -> int:
    """Bytes that a launch moves through a memory whose cache drops what was used longest ago."""
    if in_order:
        order = itertools.chain(*programs)
    else:
        steps = itertools.zip_longest(*programs)
        order = (access for step in steps for access in step if access is not None)
    held: dict[tuple[bool, int], int] = {}  # the last used comes last
    total = 0
    for load, place, size in order:
        found = held.pop((load, place), None)
        if found is None or not load:
            total += size
        held[load, place] = size
        while sum(held.values()) > cache:
            del held[next(iter(held))]
    return total


if __name__ == "__main__":
    main()
