"""Workspace of the backward of impl="tiled", counted on tensors without storage."""

import pytest
import torch

pytest.importorskip("triton")

from oisd_kernels.gpu import GFX942, table_key
from oisd_kernels.lens.tiled import gradient
from oisd_kernels.lens.tiled.gradient import (
    PRODUCTS,
    Backward,
    LensLoss,
    LogprobLoss,
    allocate_gradients,
)
from oisd_kernels.lens.tiled.tiles import TILES, Head, Scores
from tests.oisd_kernels.lens.test_tiled import INTERPRETED, Largest

pytestmark = pytest.mark.skipif(INTERPRETED, reason="is about the launches, not the kernels")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def backward(S, N, V, D, dtype, lens=True, bias=False, budget=None) -> Backward:
    hidden, weight = meta(S, N, D, dtype=dtype), meta(V, D, dtype=dtype)
    rows = meta(S, N, dtype=torch.float32)
    states = [hidden, meta(1, N, D, dtype=dtype)] if lens else [hidden]
    loss = LensLoss("jsd", 0.5, rows[0], rows, rows)
    if not lens:
        loss = LogprobLoss(meta(N, dtype=torch.int64), rows[0], rows[0])
    head = Head(states, weight, meta(V, dtype=dtype) if bias else None, torch.float32, 90)
    out = allocate_gradients(hidden, weight, torch.float32, (True, True, bias))
    return Backward("an_op", head, loss, rows, None, Scores(1.0, None), out, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("S, lens", [(1, False), (1, True), (8, True)], ids=["logprob", "S1", "S8"])
def test_the_plan_stays_below_64_mb(S, lens, dtype):
    run = backward(S, 1_000_000, 262_144, 4_096, dtype, lens)
    for to_hidden, slices_outside in ((True, False), (False, False), (False, True)):
        plan = run.plan(to_hidden, slices_outside)
        assert plan.bytes <= (32 << 20)
        assert plan.tokens * S >= 512 and plan.tiles >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("S, lens", [(1, False), (1, True), (8, True)], ids=["logprob", "S1", "S8"])
def test_workspace_stays_below_64_mb(S, lens, dtype, monkeypatch):
    """Counted with tensors without storage: what is planned is what is allocated."""
    kernels = [x for x in vars(gradient) if x.startswith("tiled_") and x.endswith("_kernel")]
    assert len(kernels) == 5
    for name in kernels:
        monkeypatch.setattr(getattr(gradient, name), "run", lambda *a, **k: None)
    run = backward(S, 6_000, 151_936, 4_096, dtype, lens, bias=True)
    inputs = *run.head.states, run.head.weight, run.head.bias, run.factor, *run.out
    inputs += tuple(x for x in run.loss if isinstance(x, torch.Tensor))
    planned = run.plan(True, False).bytes
    if dtype != torch.float32:  # the weight's gradient in an order of work of its own
        planned = max(planned, run.plan(False, True).bytes)
    with Largest(*inputs) as largest:
        run.run()
    assert planned / 2 < largest.most < planned + (4 << 20) < 64 << 20


def test_every_table_of_products_is_complete():
    kinds = {(of, kind) for of in ("hidden", "weight") for kind in ("half", "fp32", "odd")}
    assert all(set(table) == kinds for table in PRODUCTS.values())
    assert set(PRODUCTS) <= set(TILES)
    # A tile of the gradient is a whole number of steps of the product.
    for capability in (75, 80, 86, 89, 90, 100, 103, 120, GFX942):
        tiles = TILES[table_key(capability, TILES)].values()
        products = PRODUCTS[table_key(capability, PRODUCTS)].values()
        assert all(tile.v % min(x.inner, tile.v) == 0 for tile in tiles for x in products)
