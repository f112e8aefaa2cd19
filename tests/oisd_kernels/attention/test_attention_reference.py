"""The attention divergence against a loop over queries, SDPA, gradcheck and the stated bounds."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import pad, scaled_dot_product_attention

import oisd_kernels
from oisd_kernels import reference
from tests.oisd_kernels.test_reference import (
    DIVERGENCES,
    GRADIENT_BOUND,
    LOSS_BOUND,
    SOFTCAPS,
    assert_gradient_close,
    assert_loss_close,
    direct_divergence,
    leaf,
    normal,
)


@pytest.fixture(params=["reference", "torch"], autouse=True)
def impl(request, monkeypatch):
    """What `attention_divergence` below runs."""
    monkeypatch.setitem(RUNNING, "impl", request.param)
    return request.param


RUNNING = {"impl": "reference"}


def attention_divergence(*inputs, **options):
    return oisd_kernels.attention_divergence(*inputs, **options, **RUNNING)


def naive(
    q,
    k,
    q_teacher,
    k_teacher,
    *,
    lengths,
    token_weight=None,
    causal=True,
    window=None,
    softcap=None,
    scale=None,
    scale_teacher=None,
    divergence="jsd",
    beta=0.5,
    key_index=None,
) -> Tensor:
    """Packed form, one query and one head at a time, over an explicit list of keys."""
    q_teacher, k_teacher = q_teacher.detach(), k_teacher.detach()

    def attention(queries, keys, factor, i, h, seen):
        key_head = h // (queries.shape[1] // keys.shape[1])
        factor = queries.shape[2] ** -0.5 if factor is None else factor
        scores = factor * (keys[seen, key_head] @ queries[i, h])
        return (scores if softcap is None else softcap * torch.tanh(scores / softcap)).softmax(0)

    rows, start = [], 0
    for length in lengths:
        for i in range(length):
            seen = [j for j in range(length) if not causal or j <= i]
            seen = [j for j in seen if window is None or abs(i - j) < window]
            if key_index is not None:
                seen = [j for j in seen if j in key_index[start + i].tolist()]
            seen = [start + j for j in seen]
            heads = [
                direct_divergence(
                    attention(q_teacher, k_teacher, scale_teacher or scale, start + i, h, seen),
                    attention(q, k, scale, start + i, h, seen),
                    divergence,
                    beta,
                )
                for h in range(q.shape[1])
            ]
            rows.append(torch.stack(heads).mean() if seen else q.sum() * 0)
        start += length
    loss = torch.stack(rows)
    return loss if token_weight is None else token_weight * loss


def make(
    tokens: int, heads: int, key_heads: int, dim: int, teacher_key_heads=None, teacher_dim=None
) -> list[Tensor]:
    """q, k, q_teacher, k_teacher in float64, packed."""
    teacher_dim = teacher_dim or dim
    shapes = [
        (heads, dim),
        (key_heads, dim),
        (heads, teacher_dim),
        (teacher_key_heads or key_heads, teacher_dim),
    ]
    return [normal(tokens, *shape, seed=seed) * 1.5 for seed, shape in enumerate(shapes)]


def offsets(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def sampled(tokens: int, keys: int, count: int) -> Tensor:
    """Random positions with empty slots, duplicates and keys that causality hides."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(-1, keys, (tokens, count), generator=generator)


LENGTHS = [1, 2, 5, 0, 7]
FORMS = [
    pytest.param({}, id="causal"),
    pytest.param({"causal": False}, id="full"),
    pytest.param({"window": 1}, id="window1"),
    pytest.param({"window": 3}, id="window3"),
    pytest.param({"window": 3, "causal": False}, id="window3-full"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"scale": 0.7}, id="scale"),
    pytest.param({"scale": 0.7, "scale_teacher": 0.2}, id="two-scales"),
]
GROUPS = [
    pytest.param(4, 4, id="heads4-of-4"),
    pytest.param(8, 2, id="heads8-of-2"),
    pytest.param(8, 1, id="heads8-of-1"),
]


# Against the loop


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_packed_is_the_loop(divergence, beta, form):
    inputs = list(map(leaf, make(15, 2, 1, 4)))
    token_weight = normal(15, seed=5)
    token_weight[::4] = 0
    options = {"token_weight": token_weight, "divergence": divergence, "beta": beta, **form}
    upstream = normal(15, seed=6)
    want = naive(*inputs, lengths=LENGTHS, **options)
    want_grads = torch.autograd.grad((want * upstream).sum(), inputs[:2])
    got = attention_divergence(*inputs, cu_seqlens=offsets(LENGTHS), **options)
    assert (got[::4] == 0).all()
    torch.testing.assert_close(got, want.detach())
    if form.get("window") == 1:
        assert want.abs().max() < 1e-12  # one key: both maps are the same
        return
    got_grads = torch.autograd.grad((got * upstream).sum(), inputs[:2])
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_gradient_close(a, b, 1e-10)


@pytest.mark.parametrize("heads, key_heads", GROUPS)
def test_grouped_heads_are_the_loop(heads, key_heads):
    inputs = list(map(leaf, make(8, heads, key_heads, 4)))
    want = naive(*inputs, lengths=[8])
    got = attention_divergence(*inputs)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.sum(), inputs[:2]) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert_gradient_close(a, b, 1e-10)


def test_teacher_may_have_other_key_heads_and_width():
    inputs = make(6, 4, 1, 3, teacher_key_heads=2, teacher_dim=5)
    torch.testing.assert_close(attention_divergence(*inputs), naive(*inputs, lengths=[6]))


@pytest.mark.parametrize("form", [{}, {"causal": False}, {"window": 2}], ids=str)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_sampled_keys_are_the_loop(divergence, beta, form):
    inputs = list(map(leaf, make(12, 2, 2, 4)))
    lengths = [5, 7]
    key_index = torch.cat([sampled(5, 5, 4), sampled(7, 7, 4)])
    key_index[2] = -1  # nothing to see
    options = {"divergence": divergence, "beta": beta, "key_index": key_index, **form}
    want = naive(*inputs, lengths=lengths, **options)
    got = attention_divergence(*inputs, cu_seqlens=offsets(lengths), **options)
    torch.testing.assert_close(got, want)
    assert got[2] == 0
    grads = [torch.autograd.grad(x.sum(), inputs[:2]) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert_gradient_close(a, b, 1e-10)
    assert (grads[0][0][2] == 0).all()


def test_sampling_every_key_changes_nothing():
    inputs = [x.view(2, 5, *x.shape[1:]) for x in make(10, 2, 1, 4)]
    key_index = torch.arange(5).repeat(2, 5, 2)  # each twice, and those ahead of the query
    torch.testing.assert_close(
        attention_divergence(*inputs, key_index=key_index), attention_divergence(*inputs)
    )


def test_no_visible_key_gives_nothing():
    inputs = list(map(leaf, make(6, 2, 1, 4)))
    for key_index in (torch.full((6, 3), -1), torch.zeros(6, 0, dtype=torch.int64)):
        loss = attention_divergence(*inputs, key_index=key_index)
        loss.sum().backward()
        assert (loss == 0).all()
        assert (inputs[0].grad == 0).all() and (inputs[1].grad == 0).all()


# Against torch's own attention


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads, key_heads", GROUPS)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_dense_is_the_divergence_of_sdpa_maps(divergence, beta, heads, key_heads, causal):
    B, T = 3, 6
    inputs = [x.view(B, T, *x.shape[1:]) for x in make(B * T, heads, key_heads, 8)]

    def attention_map(q, k):
        values = torch.eye(T).double().expand(B, k.shape[2], T, T)
        return scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), values, is_causal=causal, enable_gqa=True
        )

    q, p = attention_map(*inputs[:2]), attention_map(*inputs[2:])
    want = direct_divergence(p, q, divergence, beta).mean(1)
    got = attention_divergence(*inputs, divergence=divergence, beta=beta, causal=causal)
    torch.testing.assert_close(got, want)


def test_forward_kl_gradient_is_that_of_a_logsumexp():
    """KL(p||q) = logsumexp of the student's scores - <p, scores> + constant: no map is formed."""
    T, dim = 9, 8
    inputs = [x.view(1, T, *x.shape[1:]) for x in make(T, 4, 4, dim)]
    q, k = leaf(inputs[0]), leaf(inputs[1])
    token_weight = normal(1, T, seed=4)
    attention_divergence(
        q, k, *inputs[2:], token_weight=token_weight, divergence="forward_kl", reduction="sum"
    ).backward()
    q2, k2 = leaf(inputs[0]), leaf(inputs[1])
    heads_first = [x.transpose(1, 2) for x in (q2, k2, *inputs[2:])]
    scores = heads_first[0] @ heads_first[1].mT * dim**-0.5
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    lse = scores.masked_fill(hidden, -math.inf).logsumexp(-1)
    pulled = scaled_dot_product_attention(*heads_first[2:], heads_first[1], is_causal=True)
    kl = lse - dim**-0.5 * (heads_first[0] * pulled).sum(-1)
    (token_weight * kl.mean(1)).sum().backward()
    assert_gradient_close(q.grad, q2.grad, 1e-10)
    assert_gradient_close(k.grad, k2.grad, 1e-10)


# gradcheck


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_gradcheck(divergence, beta, dense, softcap):
    inputs = make(6, 2, 1, 3)
    token_weight = torch.tensor([1.0, -2.0, 0.0, 0.5, -1.0, 3.0]).double()
    options = {"divergence": divergence, "beta": beta, "softcap": softcap, "window": 2}
    if dense:
        inputs = [x.view(2, 3, *x.shape[1:]) for x in inputs]
        options["token_weight"] = token_weight.view(2, 3)
    else:
        options |= {"token_weight": token_weight, "cu_seqlens": offsets([1, 2, 3])}
    q, k = leaf(inputs[0]), leaf(inputs[1])
    assert gradcheck(lambda q, k: attention_divergence(q, k, *inputs[2:], **options), (q, k))


# The stated bounds


def attention_case(name: str, dim: int) -> tuple[list[Tensor], list[int]]:
    lengths = [1, 2, 127, 128, 129]
    q, k, q_teacher, k_teacher = (x / 1.5 for x in make(sum(lengths), 2, 1, dim))
    if name == "near":
        q_teacher, k_teacher = q + 0.03 * q_teacher, k.clone()
    elif name == "std20":
        q, q_teacher = 20 * q, 20 * q_teacher
    elif name == "disjoint":
        # The first feature splits the keys by parity; each side gives the other's half e^-14.
        k[..., 0] = k_teacher[..., 0] = (1 - 2 * (torch.arange(sum(lengths)) % 2))[:, None]
        q[..., 0], q_teacher[..., 0] = 7 * dim**0.5, -7 * dim**0.5
    elif name == "one-hot-teacher":
        q_teacher = 60 * q_teacher
    elif name != "ordinary":
        raise KeyError(name)
    return [q, k, q_teacher, k_teacher], lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [64, 128], ids=lambda d: f"K{d}")
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("case", ["ordinary", "near", "std20", "disjoint", "one-hot-teacher"])
def test_meets_the_bounds(case, divergence, dim, dtype):
    """Against float64 on the same rounded inputs; float64 itself is held to the loop above."""
    inputs, lengths = attention_case(case, dim)
    token_weight = normal(sum(lengths), seed=5).float()
    token_weight[::3] = 0
    options = {"cu_seqlens": offsets(lengths), "token_weight": token_weight}
    options["divergence"] = divergence
    narrow = [leaf(x.to(dtype)) for x in inputs]
    wide = [leaf(x.double()) for x in narrow]
    want = attention_divergence(*wide, **options)
    got = attention_divergence(*narrow, **options)
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    assert_loss_close(got, want.detach(), LOSS_BOUND[dtype])
    want.sum().backward()
    got.sum().backward()
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        assert a.grad.dtype == dtype
        assert_gradient_close(a.grad, b.grad, GRADIENT_BOUND[dtype])


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_equal_layers_give_nothing(divergence, beta):
    q, k = (20 * normal(9, 2, 64, seed=seed).float() for seed in (0, 1))
    q, k = leaf(q), leaf(k)
    loss = attention_divergence(q, k, q, k, divergence=divergence, beta=beta)
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert q.grad.abs().max() < 1e-4 and k.grad.abs().max() < 1e-4


# Weights, padding, what must not leak


@pytest.mark.parametrize("form", [f for f in FORMS if f.values[0].get("causal", True)])
def test_packed_is_dense_with_padding(form):
    """Padding to the right with NaN: causality and a row weight of 0 keep it out."""
    lengths = [3, 6, 1]
    packed = list(map(leaf, make(10, 4, 2, 4)))
    dense = [
        leaf(torch.stack([pad(s, (0, 0, 0, 0, 0, 6 - len(s)), value=math.nan) for s in parts]))
        for parts in (x.detach().split(lengths) for x in packed)
    ]
    token_weight = normal(10, seed=3)
    exists = torch.arange(6) < torch.tensor(lengths)[:, None]
    dense_weight = torch.zeros(3, 6).double().masked_scatter(exists, token_weight)
    a = attention_divergence(
        *packed, cu_seqlens=offsets(lengths), token_weight=token_weight, **form
    )
    b = attention_divergence(*dense, token_weight=dense_weight, **form)
    torch.testing.assert_close(b[exists], a)
    assert (b[~exists] == 0).all()
    a.sum().backward()
    b.sum().backward()
    for x, y in zip(packed[:2], dense[:2], strict=True):
        assert y.grad.isfinite().all()
        torch.testing.assert_close(y.grad[exists], x.grad)
        assert (y.grad[~exists] == 0).all()


def test_dropped_rows_reach_nothing():
    inputs = make(8, 2, 1, 4)
    token_weight = torch.ones(8).double()
    token_weight[[3, 5]] = 0
    clean = [leaf(x) for x in inputs]
    poisoned = [x.clone() for x in inputs]
    poisoned[0][[3, 5]] = math.nan
    poisoned[2][[3, 5]] = math.inf
    poisoned = list(map(leaf, poisoned))
    losses = [attention_divergence(*x, token_weight=token_weight) for x in (clean, poisoned)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    assert clean[0].grad.norm() > 1e-3
    assert torch.equal(clean[0].grad, poisoned[0].grad)
    assert torch.equal(clean[1].grad, poisoned[1].grad)
    assert (poisoned[0].grad[[3, 5]] == 0).all()


def test_gradient_reaches_the_student_alone():
    inputs = list(map(leaf, make(8, 2, 1, 4)))
    token_weight = leaf(torch.ones(8))
    attention_divergence(*inputs, token_weight=token_weight, reduction="sum").backward()
    assert inputs[0].grad.norm() > 1e-3 and inputs[1].grad.norm() > 1e-3
    assert inputs[2].grad is None and inputs[3].grad is None and token_weight.grad is None


def test_reductions():
    inputs = [x.view(2, 4, *x.shape[1:]) for x in make(8, 2, 1, 4)]
    token_weight = normal(2, 4, seed=4)
    token_weight[0, 1] = token_weight[1, 3] = token_weight[1, 0] = 0
    none, total, mean = (
        attention_divergence(*inputs, token_weight=token_weight, reduction=name)
        for name in ("none", "sum", "mean")
    )
    assert none.shape == (2, 4) and none.abs().max() > 1e-3
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.sum() / 5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["packed", "dense"])
def test_all_rows_dropped(shape, reduction):
    q = leaf(normal(*shape, 4, 8, seed=0))
    k = leaf(normal(*shape, 2, 8, seed=1))
    loss = attention_divergence(
        q, k, k.repeat_interleave(2, -2), q, token_weight=torch.zeros(shape), reduction=reduction
    )
    loss.sum().backward()
    assert loss.shape == (shape if reduction == "none" else ()) and (loss == 0).all()
    assert (q.grad == 0).all() and (k.grad == 0).all()


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (3, 0), (1, 1)], ids=str)
def test_few_rows(shape):
    q, k = leaf(normal(*shape, 4, 8, seed=0)), leaf(normal(*shape, 2, 8, seed=1))
    for options in ({}, {"window": 2}, {"causal": False}, {"reduction": "mean"}):
        loss = attention_divergence(q, k, q, k, **options)
        loss.sum().backward()
        assert loss.shape == (() if "reduction" in options else shape)
        assert loss.abs().sum() == 0 and q.grad.isfinite().all()
    if len(shape) == 1:
        lengths = [0, *shape, 0]
        assert attention_divergence(q, k, q, k, cu_seqlens=offsets(lengths)).shape == shape


def test_strided_inputs():
    inputs = make(10, 4, 2, 4)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not any(x.is_contiguous() for x in heads_first)
    assert torch.equal(attention_divergence(*heads_first), attention_divergence(*inputs))
    dense = [x.view(2, 5, *x.shape[1:]) for x in inputs]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]
    assert torch.equal(attention_divergence(*views), attention_divergence(*dense))


def test_under_autocast_is_the_same():
    inputs = [x.float() for x in make(7, 4, 2, 8)]
    plain = attention_divergence(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_divergence(*inputs), plain)


def test_given_logsumexp_changes_nothing():
    inputs = make(7, 4, 2, 8)
    _, lse = reference.attention(*inputs[:2], inputs[1])
    _, lse_teacher = reference.attention(*inputs[2:], inputs[3])
    got = attention_divergence(*inputs, lse=lse, lse_teacher=lse_teacher)
    torch.testing.assert_close(got, attention_divergence(*inputs))
