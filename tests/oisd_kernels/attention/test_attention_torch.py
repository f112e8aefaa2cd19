"""The divergence in blocks, one op for S layers: what test_attention_reference does not ask of it.

`OISD_ATTENTION_IMPL=triton TRITON_INTERPRET=1` runs it on the Triton kernels.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from oisd_kernels import attention_divergence
from oisd_kernels.attention import torch_blocks
from oisd_kernels.attention.spec import Geometry
from oisd_kernels.reference import attention as reference_attention
from tests.oisd_kernels.attention.test_attention_reference import make, offsets, sampled
from tests.oisd_kernels.test_reference import (
    DIVERGENCES,
    assert_gradient_close,
    assert_loss_close,
    leaf,
    normal,
)

IMPL = os.environ.get("OISD_ATTENTION_IMPL", "torch")
LENGTHS = [1, 2, 127, 0, 128, 129] if IMPL == "torch" else [1, 2, 17, 0, 33]
MASKS = [
    pytest.param({}, id="causal"),
    pytest.param({"causal": False}, id="full"),
    pytest.param({"window": 40}, id="window40"),
    pytest.param({"window": 40, "causal": False}, id="window40-full"),
    pytest.param({"softcap": 2.0}, id="softcap"),
]
torch_only = pytest.mark.skipif(IMPL != "torch", reason="of the torch functions alone")


@pytest.fixture(params=["few-blocks", "many-blocks"])
def block_size(request, monkeypatch):
    """Many: several tiles of queries and blocks of keys in each sequence, as in long ones."""
    if request.param == "many-blocks":
        monkeypatch.setattr(torch_blocks, "CPU_BLOCK", 1)
    return request.param


def weight_of(tokens: int) -> torch.Tensor:
    weight = normal(tokens, seed=5)
    weight[::3] = 0
    weight[20:60] = 0  # whole tiles of nothing
    return weight


def both(inputs, options, upstream=None):
    """(loss, dq, dk) of the reference and of the implementation."""
    found = []
    for impl in ("reference", IMPL):
        q, k = leaf(inputs[0]), leaf(inputs[1])
        loss = attention_divergence(q, k, *inputs[2:], impl=impl, **options)
        loss.backward(torch.ones_like(loss) if upstream is None else upstream)
        found.append((loss.detach(), q.grad, k.grad))
    return found


def assert_both(inputs, options, upstream=None, bound=1e-10):
    wanted, found = both(inputs, options, upstream)
    torch.testing.assert_close(found[0], wanted[0], rtol=bound, atol=bound * 1e-2)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert_gradient_close(a, b, bound)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_is_the_reference(divergence, beta, masks, block_size):
    inputs = make(sum(LENGTHS), 4, 2, 8, teacher_key_heads=1, teacher_dim=6)
    options = {"divergence": divergence, "beta": beta, **masks}
    options |= {"cu_seqlens": offsets(LENGTHS), "token_weight": weight_of(sum(LENGTHS))}
    assert_both(inputs, options, normal(sum(LENGTHS), seed=6))


@pytest.mark.parametrize("heads, key_heads", [(8, 8), (8, 2), (8, 1)])
def test_grouped_heads(heads, key_heads, block_size):
    inputs = [x.view(2, 20, *x.shape[1:]) for x in make(40, heads, key_heads, 8)]
    assert_both(inputs, {"token_weight": weight_of(40).view(2, 20)})


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_sampled_keys(divergence, beta, masks):
    inputs, lengths = make(40, 4, 2, 8, teacher_key_heads=1), [17, 23]
    index = torch.cat([sampled(17, 17, 6), sampled(23, 23, 6)])
    index[2] = -1
    options = {"divergence": divergence, "beta": beta, "key_index": index, **masks}
    options |= {"cu_seqlens": offsets(lengths), "token_weight": weight_of(40) + 0.1}
    assert_both(inputs, options, normal(40, seed=6))


# ---------------------------------------------------------------- several layers


@pytest.mark.parametrize("sampling", [False, True], ids=["all-keys", "sampled"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("impl", ["reference", IMPL])
def test_layers_are_one_after_the_other(impl, dense, sampling):
    q, k, *teacher = [normal(*shape, seed=i) for i, shape in enumerate(
        [(3, 12, 4, 8), (3, 12, 2, 8), (12, 4, 8), (12, 1, 8)]
    )]  # fmt: skip
    weight = normal(3, 12, seed=5)
    weight[0, :7] = weight[1, 3:9] = 0
    options = {"cu_seqlens": offsets([5, 7])}
    if sampling:
        options["key_index"] = sampled(12, 5, 4)
    if dense:
        q, k = q.unflatten(1, (2, 6)), k.unflatten(1, (2, 6))
        teacher = [x.unflatten(0, (2, 6)) for x in teacher]
        weight = weight.view(3, 2, 6)
        options = {name: x.view(2, 6, -1) for name, x in options.items() if name == "key_index"}
    for shared in (False, True):
        w = weight[0] if shared else weight
        x, y = leaf(q), leaf(k)
        found = attention_divergence(x, y, *teacher, token_weight=w, impl=impl, **options)
        found.backward(normal(*found.shape, seed=6))
        assert found.shape == weight.shape
        for layer in range(3):
            own = w if shared else w[layer]
            a, b = leaf(q[layer]), leaf(k[layer])
            one = attention_divergence(
                a, b, *teacher, token_weight=own, impl="reference", **options
            )  # fmt: skip
            one.backward(normal(*found.shape, seed=6)[layer])
            torch.testing.assert_close(found[layer].detach(), one.detach())
            assert_gradient_close(x.grad[layer], a.grad, 1e-10)
            assert_gradient_close(y.grad[layer], b.grad, 1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("impl", ["reference", IMPL])
def test_reductions_over_layers(impl, reduction):
    q, k, teacher = normal(2, 6, 2, 4, seed=0), normal(2, 6, 2, 4, seed=1), normal(6, 2, 4, seed=2)
    weight = normal(2, 6, seed=3)
    weight[0, :4] = 0
    options = {"token_weight": weight, "impl": impl}
    rows = attention_divergence(q, k, teacher, teacher, **options)
    found = attention_divergence(q, k, teacher, teacher, reduction=reduction, **options)
    torch.testing.assert_close(found, rows.sum() / (8 if reduction == "mean" else 1))


def test_given_logsumexp_of_layers_saves_nothing_else():
    q, k = normal(2, 9, 4, 8, seed=0), normal(2, 9, 2, 8, seed=1)
    teacher = [normal(9, 4, 8, seed=2), normal(9, 2, 8, seed=3)]
    lse = torch.stack([reference_attention(*x, x[1])[1] for x in zip(q, k, strict=True)])
    lse_teacher = reference_attention(*teacher, teacher[1])[1]
    found = []
    for given in ({}, {"lse": lse, "lse_teacher": lse_teacher}):
        x = leaf(q)
        loss = attention_divergence(x, k, *teacher, impl=IMPL, **given)
        loss.sum().backward()
        found.append((loss.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        assert_gradient_close(a, b, 1e-10)


# ---------------------------------------------------------------- regimes


def regime(name: str):
    """q, k, q_teacher, k_teacher of 40 tokens, scores of up to 60."""
    q, k, q_teacher, k_teacher = make(40, 2, 1, 16)

    def to_sixty(q, k):
        return q * 60 / (torch.einsum("nhk,mjk->nhm", q, k) * 16**-0.5).abs().amax()

    if name == "one-hot against uniform":
        q, q_teacher = 1e-3 * q, to_sixty(q_teacher, k_teacher)
    elif name == "uniform against one-hot":
        q, q_teacher = to_sixty(q, k), 1e-3 * q_teacher
    elif name == "scores of 60":
        q, q_teacher = to_sixty(q, k), to_sixty(q_teacher, k_teacher)
    return [q, k, q_teacher, k_teacher]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    "name", ["one-hot against uniform", "uniform against one-hot", "scores of 60"]
)
def test_extreme_scores(name, divergence, dtype):
    inputs = [x.to(dtype) for x in regime(name)]
    wide = [leaf(x.double()) for x in inputs]
    narrow = [leaf(x) for x in inputs]
    wanted = attention_divergence(*wide, divergence=divergence, impl="reference")
    found = attention_divergence(*narrow, divergence=divergence, impl=IMPL)
    assert_loss_close(found, wanted.detach(), 1e-5)
    wanted.sum().backward()
    found.sum().backward()
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        assert_gradient_close(a.grad, b.grad, 1e-4)


def test_forward_kl_is_a_logsumexp_gradient():
    """Its gradient is that of lse - <q, attention(teacher; student's keys)>: no map is formed."""
    inputs = [x.float()[None] for x in make(50, 4, 4, 16)]
    q, k = leaf(inputs[0]), leaf(inputs[1])
    attention_divergence(q, k, *inputs[2:], divergence="forward_kl", impl=IMPL).sum().backward()
    x, y = leaf(inputs[0].double()), leaf(inputs[1].double())
    heads_first = [z.double().transpose(1, 2) for z in (*inputs[2:], y)]
    pulled = scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    _, lse = reference_attention(x, y, y)
    (lse.mean(1).sum() - (x * pulled).sum() / 4 / 4).backward()
    assert_gradient_close(q.grad, x.grad, 1e-5)
    assert_gradient_close(k.grad, y.grad, 1e-5)


def test_nan_stays_in_its_sequence():
    lengths, poisoned = [20, 18, 19], slice(20, 38)
    inputs = make(57, 4, 2, 8)
    wanted = both(inputs, {"cu_seqlens": offsets(lengths)})[1]
    for x in inputs:
        x[poisoned] = math.nan
    found = both(inputs, {"cu_seqlens": offsets(lengths)})[1]
    others = [*range(20), *range(38, 57)]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a[others], b[others]) and b[others].norm() > 1e-3


@pytest.mark.parametrize("masks", MASKS[:4])
def test_keys_that_no_kept_row_sees_may_hold_nan(masks, block_size):
    inputs = make(60, 4, 2, 8)
    weight = torch.zeros(60).double()
    weight[[3, 9, 50]] = 1
    place = torch.arange(60)
    ahead = place - place[weight != 0][:, None]  # [3, 60]
    reach = masks.get("window", 60) if "window" in masks else 60
    seen = (ahead.abs() < min(reach, 4)) if "window" in masks else ahead.abs() < 60
    masks = {**masks, "window": 4} if "window" in masks else masks
    seen = (seen & ((ahead <= 0) | (not masks.get("causal", True)))).any(0)
    clean = both(inputs, {"token_weight": weight, **masks})[1]
    for x in (inputs[1], inputs[3]):
        x[~seen] = math.nan
    for x in (inputs[0], inputs[2]):
        x[weight == 0] = math.nan
    found = both(inputs, {"token_weight": weight, **masks})[1]
    for a, b in zip(found, clean, strict=True):
        torch.testing.assert_close(a, b)
        assert b.norm() > 1e-3


def test_runs_twice_the_same():
    inputs = [x.float() for x in make(60, 4, 2, 8)]
    first, second = (both(inputs, {})[1] for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---------------------------------------------------------------- the plan of blocks


@torch_only
@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, 3), (False, None)])
@pytest.mark.parametrize("elements", [1, 1 << 9, 1 << 20])
def test_blocks_hold_every_visible_pair_once(causal, window, elements, monkeypatch):
    monkeypatch.setattr(torch_blocks, "CPU_BLOCK", elements)
    lengths = [40, 0, 33, 3, 3, 1]
    geometry = Geometry(offsets(lengths), len(lengths), None, causal, window, None)
    keep = torch.rand(80, generator=torch.Generator().manual_seed(0)) < 0.5
    visits = torch.zeros(80, 80, dtype=torch.int64)
    for group in torch_blocks.groups(geometry, heads=2):
        for tile in group.rows(keep[group.index] & group.exists).tiles():
            for block in tile.blocks():
                shape = (*tile.index.shape, block.keys.stop - block.keys.start)
                shown = torch.ones(shape, dtype=torch.bool)
                if block.hidden is not None:
                    shown &= ~block.hidden[:, 0]
                for b, r, c in shown.nonzero().tolist():
                    visits[tile.index[b, r], group.index[b, block.keys.start + c]] += 1
    wanted = torch.zeros_like(visits)
    ends = list(itertools.accumulate(lengths, initial=0))
    for start, stop in itertools.pairwise(ends):
        for i, j in itertools.product(range(start, stop), repeat=2):
            near = window is None or abs(i - j) < window
            wanted[i, j] = keep[i] and near and (not causal or j <= i)
    assert torch.equal(visits, wanted) and wanted.sum() > 0


# ---------------------------------------------------------------- torch.library


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl"])
def test_opcheck(divergence):
    q, k = (leaf(x) for x in (normal(2, 7, 2, 4, seed=0), normal(2, 7, 1, 4, seed=1)))
    teacher = normal(7, 2, 4, seed=2), normal(7, 2, 4, seed=3)
    options = (None, True, 3, 2.0, 0.5, 0.4, divergence, 0.5, IMPL)
    weight = normal(2, 7, seed=4)
    for key_index in (None, sampled(7, 3, 2)):
        tensors = (q, k, *teacher, weight, offsets([3, 4]), key_index, None, None)
        torch.library.opcheck(torch.ops.oisd_kernels.attention_pass.default, (*tensors, *options))


def test_fullgraph_compile():
    inputs = make(7, 2, 1, 4)
    weight = normal(7, seed=4)

    def run(q, k):
        return attention_divergence(q, k, *inputs[2:], token_weight=weight, impl=IMPL).sum()

    x, y = [leaf(z) for z in inputs[:2]], [leaf(z) for z in inputs[:2]]
    wanted, found = run(*x), torch.compile(run, fullgraph=True, backend="aot_eager")(*y)
    wanted.backward()
    found.backward()
    torch.testing.assert_close(found, wanted)
    for a, b in zip(y, x, strict=True):
        assert torch.equal(a.grad, b.grad) and b.grad.norm() > 1e-3
