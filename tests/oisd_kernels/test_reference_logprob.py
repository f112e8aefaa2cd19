"""`linear_logprob` of the reference and the chunked implementation, against float64."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

import oisd_kernels
from tests.oisd_kernels.test_reference import (
    GRADIENT_BOUND,
    LOSS_BOUND,
    RUNNING,
    SOFTCAPS,
    assert_gradient_close,
    assert_loss_close,
    leaf,
    normal,
)
from tests.oisd_kernels.test_reference import impl as impl


def linear_logprob(*inputs, **options):
    return oisd_kernels.linear_logprob(*inputs, **options, **RUNNING)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0], ids=lambda t: f"T{t}")
def test_logprob_gradcheck(temperature, softcap):
    inputs = leaf(normal(4, 3, seed=0)), leaf(normal(7, 3, seed=1)), leaf(normal(7, seed=2))
    labels = torch.tensor([0, 6, 3, 3])

    def run(hidden, weight, bias):
        return linear_logprob(
            hidden, weight, labels, bias=bias, temperature=temperature, logit_softcap=softcap
        )

    assert gradcheck(lambda *x: run(*x).logprob, inputs)
    logits = inputs[0] @ inputs[1].T + inputs[2]
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    q = logits.softmax(-1)
    logprob, entropy, logsumexp = run(*inputs)
    torch.testing.assert_close(logprob, -cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(entropy, -(q * q.log()).sum(-1))
    torch.testing.assert_close(logsumexp, logits.exp().sum(-1).log())
    assert logprob.requires_grad and not entropy.requires_grad and not logsumexp.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("std", [0.1, 3, 20], ids=lambda s: f"std{s}")
def test_logprob_meets_the_bounds(std, dtype):
    hidden = leaf((std * normal(24, 32, seed=0) / 32**0.5).to(dtype))
    weight = leaf(normal(251, 32, seed=1).to(dtype))
    labels = torch.arange(24) * 7
    upstream = normal(24, seed=2)
    wide = leaf(hidden.double()), leaf(weight.double())
    lq = (wide[0] @ wide[1].T).log_softmax(-1)
    want = lq[torch.arange(24), labels]
    (want * upstream).sum().backward()
    got = linear_logprob(hidden, weight, labels)
    (got.logprob * upstream.float()).sum().backward()
    assert_loss_close(got.logprob, want, LOSS_BOUND[dtype])
    assert_loss_close(got.entropy, -(lq.exp() * lq).sum(-1), LOSS_BOUND[dtype])
    assert_gradient_close(hidden.grad, wide[0].grad, GRADIENT_BOUND[dtype])
    assert_gradient_close(weight.grad, wide[1].grad, GRADIENT_BOUND[dtype])


def test_logprob_without_rows():
    hidden, weight = leaf(normal(0, 3, seed=0)), leaf(normal(5, 3, seed=1))
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64))
    out.logprob.sum().backward()
    assert [x.shape for x in out] == [(0,)] * 3
    assert hidden.grad.shape == (0, 3) and (weight.grad == 0).all()


def test_logprob_under_autocast_is_the_same():
    hidden, weight, labels = (
        normal(4, 8, seed=0).float(),
        normal(9, 8, seed=1).float(),
        [1, 2, 3, 8],
    )
    plain = linear_logprob(hidden, weight, torch.tensor(labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprob(hidden, weight, torch.tensor(labels))
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
