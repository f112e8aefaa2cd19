"""`logit_lens_divergence`, reference and chunked: shapes, dtypes, statistics."""

import pytest
import torch

from tests.oisd_kernels.test_reference import (
    assert_gradient_close,
    direct_divergence,
    leaf,
    lens_case,
    lens_truth,
    logit_lens_divergence,
    normal,
)
from tests.oisd_kernels.test_reference import impl as impl


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (1, 5), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_lens_few_rows(shape, reduction):
    hidden, teacher = leaf(normal(*shape, seed=0)), normal(shape[-2], 5, seed=1)
    weight = leaf(normal(13, 5, seed=2))
    loss, stats = logit_lens_divergence(
        hidden, teacher, weight, reduction=reduction, grad_weight=True, return_stats=True
    )
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert stats.student_entropy.shape == stats.divergence.shape == shape[:-1]
    assert stats.teacher_entropy.shape == shape[-2:-1]
    truth = lens_truth(hidden, teacher, weight)
    rows = max(truth.loss.numel(), 1) if reduction == "mean" else 1
    torch.testing.assert_close(loss.sum(), truth.loss.sum() / rows)
    loss.sum().backward()
    assert hidden.grad.shape == shape and hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_lens_one_layer_with_and_without_its_axis():
    hidden, teacher, weight = lens_case("ordinary")
    flat, flat_stats = logit_lens_divergence(hidden[0], teacher, weight, return_stats=True)
    deep, deep_stats = logit_lens_divergence(hidden[:1], teacher, weight, return_stats=True)
    assert torch.equal(flat, deep[0])
    for a, b in zip(flat_stats, deep_stats, strict=True):
        assert torch.equal(a, b.view_as(a))


def test_lens_takes_strided_inputs():
    hidden, teacher, weight = lens_case("ordinary")
    strided = [
        leaf(hidden.transpose(0, 2).contiguous()),
        teacher.T.contiguous().T,
        weight.T.contiguous().T,
    ]
    token_weight = normal(24, 3, seed=1)[:, 1]
    student = strided[0].transpose(0, 2)
    assert not (
        student.is_contiguous() or strided[1].is_contiguous() or token_weight.stride(0) == 1
    )
    loss = logit_lens_divergence(student, *strided[1:], token_weight=token_weight)
    truth = lens_truth(hidden, teacher, weight, row_weight=token_weight)
    torch.testing.assert_close(loss, truth.loss)
    loss.sum().backward()
    assert_gradient_close(strided[0].grad.transpose(0, 2), truth.d_hidden, 1e-11)


def test_lens_under_autocast_is_the_same():
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    plain = logit_lens_divergence(hidden, teacher, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logit_lens_divergence(hidden, teacher, weight), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lens_result_dtype(dtype):
    hidden, teacher, weight = lens_case("ordinary")
    loss, stats = logit_lens_divergence(
        hidden.to(dtype), teacher.float(), weight.float(), return_stats=True
    )
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in (loss, *stats)} == {wanted}


def test_lens_stats():
    hidden, teacher, weight = lens_case("ordinary")
    hidden[1, :12] = 1.1 * teacher[:12]  # the same likeliest token
    token_weight = torch.ones(2, 24)
    token_weight[0, :2] = 0
    token_weight[:, 5] = 0
    _, stats = logit_lens_divergence(
        hidden, teacher, weight, token_weight=-2 * token_weight, temperature=2.0, return_stats=True
    )
    q, p = (hidden @ weight.T / 2).softmax(-1), (teacher @ weight.T / 2).softmax(-1)
    agree = (q.argmax(-1) == p.argmax(-1)).double()
    assert 0.2 < agree.mean() < 0.8
    token_kept = (torch.arange(24) != 5).double()
    want = (
        -(q * q.log()).sum(-1) * token_weight,
        -(p * p.log()).sum(-1) * token_kept,
        agree * token_weight,
        direct_divergence(p, q, "jsd", 0.5) * token_weight,
    )
    for got, wanted in zip(stats, want, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, wanted)
