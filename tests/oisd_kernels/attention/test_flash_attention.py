"""Attention and its alignment against the reference: values, gradients, what must not leak.

Written for every implementation: `OISD_ATTENTION_IMPL=triton TRITON_INTERPRET=1` runs it on the
Triton kernels.
"""

from __future__ import annotations

import gc
import math
import os

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention
from oisd_kernels.attention import flash
from oisd_kernels.reference import attention as reference_attention
from tests.oisd_kernels.attention.test_attention_reference import make, offsets
from tests.oisd_kernels.test_reference import assert_gradient_close, leaf, normal

IMPL = os.environ.get("OISD_ATTENTION_IMPL", "torch")
INTERPRETED = IMPL == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
LENGTHS = [1, 2, 17, 0, 33]
FORMS = [
    pytest.param({}, id="causal"),
    pytest.param({"causal": False}, id="full"),
    pytest.param({"window": 5}, id="window5"),
    pytest.param({"window": 5, "causal": False}, id="window5-full"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"scale": 0.7}, id="scale"),
]
GROUPS = [(4, 4), (4, 1), (8, 1)]
DIVERGENCES = [("jsd", 0.5), ("jsd", 0.1), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
divergences = pytest.mark.parametrize("divergence, beta", DIVERGENCES)


def packed(lengths=LENGTHS, heads=4, key_heads=2, dim=8) -> list[Tensor]:
    """q, k, v, q_teacher, k_teacher [N, H or J, K] in float64."""
    q, k, q_teacher, k_teacher = make(sum(lengths), heads, key_heads, dim)
    return [q, k, normal(*k.shape, seed=7), q_teacher, k_teacher]


def leaves(inputs, dtype=torch.float64):
    return [x.detach().clone().to(dtype).requires_grad_() for x in inputs]


def upstream(out: Tensor, lse: Tensor) -> list[Tensor]:
    return [normal(*x.shape, seed=i).to(x.dtype) for i, x in enumerate((out, lse), start=11)]


def plain_gradients(inputs, attend, **options):
    q, k, v = leaves(inputs[:3])
    out, lse = attend(q, k, v, **options)
    return (out, lse), torch.autograd.grad((out, lse), (q, k, v), upstream(out, lse))


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads, key_heads", GROUPS)
def test_reference_is_sdpa(heads, key_heads, causal):
    q, k, v = [x.view(2, 7, *x.shape[1:]) for x in packed([7, 7], heads, key_heads)[:3]]
    found, lse = reference_attention(q, k, v, causal=causal)
    wanted = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    assert lse.shape == (2, heads, 7)
    first = (q[0, 0, 0] @ k[0, :, 0].T) * q.shape[-1] ** -0.5
    torch.testing.assert_close(lse[0, 0, 0], (first[:1] if causal else first).logsumexp(0))


@pytest.mark.parametrize("form", FORMS)
def test_reference_gradcheck(form):
    inputs = leaves(packed([1, 3], 2, 1, 3)[:3])
    assert gradcheck(lambda *x: reference_attention(*x, cu_seqlens=offsets([1, 3]), **form), inputs)


# ---------------------------------------------------------------- the op


@pytest.mark.parametrize("form", FORMS)
def test_is_the_reference(form):
    inputs = packed()
    options = {"cu_seqlens": offsets(LENGTHS), **form}
    wanted, wanted_gradients = plain_gradients(inputs, reference_attention, **options)
    found, gradients = plain_gradients(inputs, flash_attention, impl=IMPL, **options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert_gradient_close(a, b, 1e-10)


@pytest.mark.parametrize("heads, key_heads", GROUPS)
def test_dense_is_packed(heads, key_heads):
    inputs = packed([9, 9], heads, key_heads)
    dense = [x.view(2, 9, *x.shape[1:]) for x in inputs]
    (out, lse), gradients = plain_gradients(dense, flash_attention, impl=IMPL)
    options = {"cu_seqlens": offsets([9, 9])}
    (flat, flat_lse), _ = plain_gradients(inputs, reference_attention, **options)
    torch.testing.assert_close(out.flatten(0, 1), flat)
    assert lse.shape == (2, heads, 9)
    torch.testing.assert_close(lse.transpose(0, 1).flatten(1), flat_lse)
    wanted = plain_gradients(dense, reference_attention)[1]
    for a, b in zip(gradients, wanted, strict=True):
        assert_gradient_close(a, b, 1e-10)


@pytest.mark.parametrize("part", ["out", "lse"])
def test_gradient_of_one_output_alone(part):
    inputs, index = packed(), ("out", "lse").index(part)
    options = {"cu_seqlens": offsets(LENGTHS)}

    def gradients(attend, **more):
        x = leaves(inputs[:3])
        attend(*x, **options, **more)[index].sin().sum().backward()
        return [y.grad for y in x]

    wanted, found = gradients(reference_attention), gradients(flash_attention, impl=IMPL)
    for a, b in zip(found[: 3 - index], wanted[: 3 - index], strict=True):
        assert_gradient_close(a, b, 1e-10)
    if part == "lse":
        assert not found[2].any()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("dim", [64, 128], ids=lambda d: f"K{d}")
def test_meets_the_bounds(dim, dtype, bound):
    lengths = [1, 2, 127, 128, 129] if IMPL == "torch" else [1, 2, 17]
    inputs = [x.to(dtype) for x in packed(lengths, 2, 1, dim)]
    options = {"cu_seqlens": offsets(lengths)}
    if INTERPRETED and dtype == torch.bfloat16:
        bound = 8e-3  # the interpreter truncates to bf16 where a GPU rounds

    def run(attend, dtype, **more):
        x = leaves(inputs[:3], dtype)
        out, lse = attend(*x, **options, **more)
        d_out = normal(*out.shape, seed=3).to(inputs[0].dtype).to(dtype)
        return (out, lse, *torch.autograd.grad(out, x, d_out))

    wanted = run(reference_attention, torch.float64)
    found = run(flash_attention, dtype, impl=IMPL)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert b.norm() > 1
        assert (a.double() - b).norm() < bound * b.norm()


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (3, 0), (1, 1)], ids=str)
def test_few_rows(shape):
    q, k = leaf(normal(*shape, 4, 8, seed=0)), leaf(normal(*shape, 2, 8, seed=1))
    v = leaf(normal(*shape, 2, 8, seed=2))
    out, lse = flash_attention(q, k, v, impl=IMPL)
    (out.sum() + lse.sum()).backward()
    assert out.shape == q.shape and lse.shape == (*shape[:-1], 4, shape[-1])
    torch.testing.assert_close(out, v.repeat_interleave(2, -2).detach().view(out.shape))
    assert q.grad.shape == q.shape


def test_nan_stays_in_its_sequence():
    lengths = [20, 18, 19]
    inputs = packed(lengths)
    options = {"cu_seqlens": offsets(lengths)}
    (wanted, _), wanted_gradients = plain_gradients(inputs, flash_attention, impl=IMPL, **options)
    for x in inputs:
        x[20:38] = math.nan
    (found, _), gradients = plain_gradients(inputs, flash_attention, impl=IMPL, **options)
    others = [*range(20), *range(38, 57)]
    assert found[20:38].isnan().all()
    for a, b in zip((found, *gradients), (wanted, *wanted_gradients), strict=True):
        assert torch.equal(a[others], b[others]) and b[others].norm() > 1e-3


def test_strided_inputs_and_autocast():
    inputs = [x.float() for x in packed()[:3]]
    plain = flash_attention(*inputs, impl=IMPL)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        found = flash_attention(*views, impl=IMPL)
    assert all(map(torch.equal, found, plain))


# ---------------------------------------------------------------- alignment


def aligned(inputs, weight, fused, impl, *, ckpt=False, divergence="jsd", beta=0.5, **options):
    """Loss and gradients of attention and its divergence, in a layer that scales q and k."""
    q, k, v = leaves(inputs[:3])
    q_teacher, k_teacher = inputs[3:]
    alignment = AttentionAlignment(divergence, beta) if fused else None

    def layer(q, k, v):
        out, lse = flash_attention(2 * q, 1.5 * k, v, alignment=alignment, impl=impl, **options)
        return out.sin().sum() + lse.cos().sum()

    task = checkpoint(layer, q, k, v, use_reentrant=False) if ckpt else layer(q, k, v)
    if alignment is not None:
        rows = alignment.loss(q_teacher, k_teacher, token_weight=weight)
    else:
        rows = attention_divergence(
            2 * q, 1.5 * k, q_teacher, k_teacher, token_weight=weight, divergence=divergence,
            beta=beta, impl=impl, **options,
        )  # fmt: skip
    total = 3 * task + 50 * (rows * normal(*rows.shape, seed=4)).sum()
    total.backward(retain_graph=True)
    once = [x.grad.clone() for x in (q, k, v)]
    total.backward()
    for a, x in zip(once, (q, k, v), strict=True):
        torch.testing.assert_close(2 * a, x.grad)
    return rows.detach(), once


def signed(*shape) -> Tensor:
    weight = normal(*shape, seed=5)
    weight.view(-1)[::3] = 0
    return weight


@pytest.mark.parametrize("form", FORMS)
@divergences
def test_fused_is_separate(divergence, beta, form):
    inputs, weight = packed(), signed(sum(LENGTHS))
    options = {"cu_seqlens": offsets(LENGTHS), "divergence": divergence, "beta": beta, **form}
    rows, wanted = aligned(inputs, weight, False, "reference", **options)
    found_rows, found = aligned(inputs, weight, True, IMPL, **options)
    torch.testing.assert_close(found_rows, rows)
    for a, b in zip(found, wanted, strict=True):
        assert_gradient_close(a, b, 1e-10)
    _, alone = aligned(inputs, 0 * weight, False, "reference", **options)
    assert (alone[0] - wanted[0]).norm() > 1e-2  # the alignment has a part in it


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@divergences
def test_gradcheck(divergence, beta, fused):
    """Rows that straddle two tiles of the interpreter; signed weights, of which some are 0."""
    lengths = [3, 17]
    inputs, weight = packed(lengths, 2, 1, 4), signed(sum(lengths))
    options = {"cu_seqlens": offsets(lengths), "window": 6, "impl": IMPL}

    def run(q, k, v):
        alignment = AttentionAlignment(divergence, beta) if fused else None
        outputs = flash_attention(q, k, v, alignment=alignment, **options)
        if alignment is not None:
            return *outputs, alignment.loss(*inputs[3:], token_weight=weight)
        return *outputs, attention_divergence(
            q, k, *inputs[3:], token_weight=weight, divergence=divergence, beta=beta, **options
        )  # fmt: skip

    assert run(*inputs[:3])[2].norm() > 1e-2
    assert gradcheck(run, leaves(inputs[:3]), fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", IMPL])
def test_under_checkpointing_and_dense(impl):
    inputs = [x.view(2, 9, *x.shape[1:]) for x in packed([9, 9])]
    rows, wanted = aligned(inputs, signed(2, 9), False, "reference")
    for ckpt in (False, True):
        found_rows, found = aligned(inputs, signed(2, 9), True, impl, ckpt=ckpt)
        torch.testing.assert_close(found_rows, rows)
        for a, b in zip(found, wanted, strict=True):
            assert_gradient_close(a, b, 1e-10)
    assert not flash._LEFT


def test_teacher_of_other_width_with_its_logsumexp():
    inputs = make(20, 4, 2, 8, teacher_key_heads=1, teacher_dim=6)
    v = normal(20, 2, 8, seed=7)
    _, lse_teacher = reference_attention(*inputs[2:], inputs[3], scale=0.3)

    def run(fused):
        q, k = leaves(inputs[:2])
        if not fused:
            return q, k, attention_divergence(
                q, k, *inputs[2:], scale_teacher=0.3, impl="reference"
            )  # fmt: skip
        alignment = AttentionAlignment()
        flash_attention(q, k, v, alignment=alignment, impl=IMPL)
        given = {"lse_teacher": lse_teacher, "scale_teacher": 0.3}
        return q, k, alignment.loss(*inputs[2:], **given)

    (*x, wanted), (*y, found) = run(False), run(True)
    torch.testing.assert_close(found, wanted)
    wanted.sum().backward()
    found.sum().backward()  # the divergence alone: attention itself has no gradient
    for a, b in zip(y, x, strict=True):
        assert_gradient_close(a.grad, b.grad, 1e-10)


def test_a_teacher_of_other_width_has_its_own_default_scale():
    q, k, *teacher = make(9, 4, 2, 8, teacher_dim=3)
    for scale in (None, 0.7):
        alignment = AttentionAlignment()
        flash_attention(q, k, k, scale=scale, alignment=alignment, impl=IMPL)
        wanted = attention_divergence(q, k, *teacher, scale=scale, impl="reference")
        torch.testing.assert_close(alignment.loss(*teacher), wanted)


def test_rows_of_weight_zero_may_hold_nan():
    weight = torch.ones(40).double()
    weight[:20], weight[[25, 33]] = 0, 0  # a whole tile, and rows among others

    def run(poison):
        inputs = packed([40])
        q, k, v = leaves(inputs[:3])
        teacher = inputs[3:]
        if poison:
            teacher[0][weight == 0] = math.nan
        alignment = AttentionAlignment()
        out, _ = flash_attention(q, k, v, alignment=alignment, impl=IMPL)
        loss = alignment.loss(*teacher, token_weight=weight)
        (out.sum() + 50 * loss.sum()).backward()
        return loss, q.grad, k.grad, v.grad

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b) and b.norm() > 1e-3


def test_without_a_loss_it_is_the_plain_attention():
    inputs = packed()

    def gradients(alignment, use=None):
        x = leaves(inputs[:3])
        out, _ = flash_attention(*x, alignment=alignment, impl=IMPL)
        if use:
            use(alignment)
        return torch.autograd.grad(out.sin().sum(), x)

    wanted = gradients(None)
    unused = gradients(AttentionAlignment())
    dropped = gradients(AttentionAlignment(), lambda a: a.loss(*inputs[3:]))
    for a, b, c in zip(wanted, unused, dropped, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.norm() > 1e-2


def test_two_layers_and_two_forwards_keep_apart():
    inputs, weight = packed(), signed(sum(LENGTHS))
    x = leaves(inputs[:3])
    losses = []
    for factor in (1.0, 0.5):
        for shift in (0.0, 0.3):
            alignment = AttentionAlignment()
            flash_attention(x[0] * factor + shift, x[1], x[2], alignment=alignment, impl=IMPL)
            losses.append(alignment.loss(*inputs[3:], token_weight=weight).sum())
    torch.stack(losses).sum().backward()
    y = leaves(inputs[:3])
    wanted = [
        attention_divergence(
            y[0] * factor + shift, y[1], *inputs[3:], token_weight=weight, impl="reference"
        ).sum()
        for factor in (1.0, 0.5)
        for shift in (0.0, 0.3)
    ]
    torch.stack(wanted).sum().backward()
    for a, b in zip(x[:2], y[:2], strict=True):
        assert_gradient_close(a.grad, b.grad, 1e-10)


def test_a_failed_backward_leaves_nothing_behind():
    """It fails between the loss and the student's attention; then the graph goes."""

    def fail(gradient):
        raise RuntimeError("on the way")

    def run():
        inputs = packed()
        x = leaves(inputs[:3])
        alignment = AttentionAlignment()
        out, _ = flash_attention(*x, alignment=alignment, impl=IMPL)
        out.register_hook(fail)
        total = out.sum() + alignment.loss(*inputs[3:]).sum()
        with pytest.raises(RuntimeError, match="on the way"):
            total.backward()
        assert len(flash._LEFT) == 1  # the graph may be used again

    run()
    gc.collect()
    assert not flash._LEFT


def test_the_number_lives_as_long_as_the_graph():
    inputs, wanted = packed(), []
    for drop in (False, True):
        x = leaves(inputs[:3])
        alignment = AttentionAlignment()
        out, _ = flash_attention(*x, alignment=alignment, impl=IMPL)
        total = out.sum() + alignment.loss(*inputs[3:]).sum()
        if drop:
            del alignment
            gc.collect()
        total.backward(retain_graph=True)
        total.backward()
        wanted.append([y.grad for y in x])
    for a, b in zip(*wanted, strict=True):
        assert torch.equal(a, b) and a.norm() > 1e-3
    assert not flash._LEFT


def test_without_gradient():
    inputs = packed()
    alignment = AttentionAlignment()
    with torch.no_grad():
        flash_attention(*inputs[:3], alignment=alignment, impl=IMPL)
        loss = alignment.loss(*inputs[3:])
    torch.testing.assert_close(
        loss, attention_divergence(*inputs[:2], *inputs[3:], impl="reference")
    )
