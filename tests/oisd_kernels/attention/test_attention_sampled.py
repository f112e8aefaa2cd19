"""The Triton kernels over sampled keys in the interpreter, against float64 autograd.

Their blocks are 16 slots there: 18 slots are two of them.
"""

import math

import pytest
import torch

from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.attention.test_attention_reference import make, offsets, sampled
from tests.oisd_kernels.test_reference import assert_gradient_close, assert_loss_close, leaf, normal

pytest.importorskip("triton")

from oisd_kernels import attention_divergence

LENGTHS = [4, 0, 2]


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


def index_of(lengths, slots=3):
    """Of packed sequences; the third query has none."""
    index = torch.cat([sampled(n, n, slots) for n in lengths if n])
    index[2] = -1
    return index


def run(impl, inputs, weight, upstream, index, lengths=LENGTHS, **options):
    """Loss, dq, dk."""
    q, k, *teacher = inputs
    q, k = leaf(q), leaf(k)
    loss = attention_divergence(
        q, k, *teacher, token_weight=weight, cu_seqlens=offsets(lengths), key_index=index,
        impl=impl, **options,
    )  # fmt: skip
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), q.grad, k.grad


def compare(inputs, weight, index, bound=1e-10, lengths=LENGTHS, **options):
    upstream = normal(len(weight), seed=6)
    found = run("triton", inputs, weight, upstream, index, lengths, **options)
    exact = [x.double() for x in inputs]
    truth = run("reference", exact, weight.double(), upstream, index, lengths, **options)
    assert float(truth[0].abs().max()) > 1e-2
    assert_loss_close(found[0], truth[0], max(bound / 10, 1e-12))
    for got, want in zip(found[1:], truth[1:], strict=True):
        assert_gradient_close(got, want, bound)
    return found


def weights(N, dtype=torch.float64):
    weight = normal(N, seed=5).to(dtype)
    weight[1] = 0
    return weight


@interpreted
@pytest.mark.parametrize(
    "divergence, beta, masks",
    [
        ("jsd", 0.3, {}),
        ("reverse_kl", 0.5, {"window": 3}),
        ("forward_kl", 0.5, {"causal": False, "window": 3, "softcap": 2.0}),
    ],
    ids=["jsd", "reverse_kl-window", "forward_kl-softcap"],
)
def test_value_and_gradients(divergence, beta, masks):
    options = {"divergence": divergence, "beta": beta, **masks}
    inputs, index = make(6, 4, 2, 6, teacher_key_heads=1), index_of(LENGTHS)
    loss, dq, dk = compare(inputs, weights(6), index, **options)
    assert not dq[1:3].any() and not loss[1:3].any()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl", "forward_kl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_combination(dtype, divergence, softcap):
    lengths = [21, 2, 1]
    inputs = [x.to(dtype) for x in make(24, 4, 4, 20, teacher_key_heads=2)]
    index = torch.cat([sampled(21, 21, 18), -torch.ones(3, 18, dtype=torch.int64)])
    index[21:, 0] = 0
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    compare(
        inputs, weights(24, dtype), index, bound, lengths, divergence=divergence, softcap=softcap
    )


@interpreted
def test_slots_in_several_blocks_and_duplicates():
    inputs = make(4, 2, 1, 6, teacher_key_heads=2)
    index = sampled(4, 4, 3).repeat(1, 6)
    many = compare(inputs, weights(4), index, lengths=[4])
    once = compare(inputs, weights(4), index[:, :3], lengths=[4])
    for a, b in zip(many, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@interpreted
def test_head_groups_that_do_not_divide_each_other():
    compare(make(3, 6, 3, 6, teacher_key_heads=2), weights(3), sampled(3, 3, 3), lengths=[3])


@interpreted
def test_float32_of_large_scores():
    q, k, qt, kt = make(9, 1, 1, 16)
    q, qt = (60 * x / (0.25 * (x[:, 0] @ y[:, 0].T).abs().max()) for x, y in ((q, k), (qt, kt)))
    inputs = [x.float() for x in (q, k, qt, kt)]
    _, dq, _ = compare(inputs, torch.ones(9), torch.arange(9).expand(9, 9), 1e-4, [9])
    assert float(dq.norm()) > 1e-3


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    """A weight below float16's range, an upstream gradient that lifts it again."""
    inputs = [x.to(dtype) for x in make(5, 2, 1, 16)]
    weight, upstream = 1e-6 * weights(5, torch.float32), 1e5 * normal(5, seed=6)
    index = sampled(5, 5, 4)
    found = run("triton", inputs, weight, upstream, index, [5])
    truth = run("reference", [x.double() for x in inputs], weight.double(), upstream, index, [5])
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    assert_loss_close(1e6 * found[0], 1e6 * truth[0], 1e-4)
    for got, want in zip(found[1:], truth[1:], strict=True):
        assert_gradient_close(got, want, 1e-2 if dtype == torch.bfloat16 else 2e-3, 1e-4)


@interpreted
def test_what_does_not_count_may_hold_nan():
    """Rows of weight 0, and keys that no other row sampled."""
    inputs = make(6, 2, 1, 6)
    weight = torch.tensor([0, 1.5, 0, 0, -2, 0], dtype=torch.float64)
    index = sampled(6, 6, 3)
    used = torch.zeros(6, dtype=torch.bool)
    for row in (1, 4):
        used[[j for j in index[row].tolist() if 0 <= j <= row]] = True
    assert not used.all()
    upstream = normal(6, seed=6)
    truth = run("reference", inputs, weight, upstream, index, [6])
    q, k, qt, kt = (x.clone() for x in inputs)
    q[weight == 0], qt[weight == 0], k[~used], kt[~used] = (math.nan,) * 4
    found = run("triton", (q, k, qt, kt), weight, upstream, index, [6])
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@interpreted
def test_no_slots_no_tokens_and_several_layers():
    inputs = make(3, 2, 1, 6)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    found = run("triton", inputs, torch.ones(3), torch.ones(3), nothing, [3])
    assert not any(x.any() for x in found)
    empty = [x[:0] for x in inputs]
    index = torch.zeros(0, 4, dtype=torch.int64)
    found = run("triton", empty, torch.ones(0), torch.ones(0), index, [0])
    assert [len(x) for x in found] == [0, 0, 0]
    q, k, *teacher = inputs
    layers = torch.stack((q, 2 * q)), torch.stack((k, k.flip(0)))
    weight = torch.tensor([[1.0, 0, 2], [0.5, 0, -1.0]]).double()
    compare_layers = [
        run(impl, (*layers, *teacher), weight, normal(2, 3, seed=6), sampled(3, 3, 3).abs(), [3])
        for impl in ("triton", "reference")
    ]
    for got, want in zip(*compare_layers, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert float(want[0].abs().max()) > 1e-3 and float(want[1].abs().max()) > 1e-3
