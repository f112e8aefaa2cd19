"""Labels whose probability is nearly 1, as most tokens of a trained policy are.

1 - p is then the whole of the gradient, and a difference of two numbers near 1 has none of its
digits. Truths are in float64, of the label against the other tokens.
"""

import pytest
import torch

from oisd_kernels import PolicyTerms, linear_logprob, policy_head
from tests.interpreter import INTERPRETED, interpreted, outside, passes_in_the_interpreter

IMPLEMENTATIONS = ["chunked", "tiled" if INTERPRETED else "reference"]
# The interpreter's tiles are of 16 tokens and 32 columns: two tiles, and four.
N, D, V = (17, 20, 101) if INTERPRETED else (24, 48, 509)
RESTS = [0.3, 1e-2, 1e-4, 1e-6]


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__, timeout=580)


def confident(rest, seed=0, bias=None, temperature=1.0):
    """States, unembedding and labels where 1 - p of each label is `rest`."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=make) / 6
    labels = torch.randint(V, (N,), generator=make)
    hidden = torch.randn(N, D, generator=make)
    own = weight[labels]
    for _ in range(60):
        odds = truth(hidden, weight, labels, bias, temperature)[1]
        step = (odds - torch.tensor(rest / (1 - rest)).double().log()) * temperature
        hidden = hidden + (step / own.double().square().sum(1))[:, None].float() * own
    return hidden, weight, labels


def truth(hidden, weight, labels, bias=None, temperature=1.0):
    """Log-probability, log((1 - p) / p) and the log-probability's gradient to the states."""
    weight = weight.double()
    z = hidden.double() @ weight.T
    z = (z if bias is None else z + bias.double()) / temperature
    own = z.gather(1, labels[:, None])
    odds = z.scatter(1, labels[:, None], -torch.inf).logsumexp(1, True) - own
    d = (-z.softmax(-1)).scatter(1, labels[:, None], odds.sigmoid()) / temperature
    return torch.nn.functional.logsigmoid(-odds)[:, 0], odds[:, 0], d @ weight


def relative(got, want):
    """The largest relative error of a row."""
    got, want = got.double().view(len(want), -1), want.view(len(want), -1)
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


@pytest.mark.parametrize("temperature, biased", [(1.0, False), (0.7, True)])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logprob_and_gradient_keep_their_digits(impl, rest, temperature, biased):
    bias = torch.linspace(-1, 1, V) if biased else None
    hidden, weight, labels = confident(rest, 1, bias, temperature)
    logprob, odds, gradient = truth(hidden, weight, labels, bias, temperature)
    assert odds.exp().median() == pytest.approx(rest / (1 - rest), rel=0.1)
    hidden.requires_grad_()
    options = {"bias": bias, "temperature": temperature}
    got = linear_logprob(hidden, weight, labels, **options, impl=impl)
    got.logprob.sum().backward()
    assert relative(got.logprob.detach(), logprob) < 1e-4
    assert relative(hidden.grad, gradient) < 1e-4


@pytest.mark.parametrize("rest", RESTS[1:])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS[:1] if INTERPRETED else IMPLEMENTATIONS)
def test_policy_head_keeps_them_beside_student_rows(impl, rest):
    hidden, weight, labels = confident(rest, 2)
    ones = torch.ones(N)
    hidden.requires_grad_()
    student = torch.randn(2, N, D)
    options = {"policy": PolicyTerms(ones, ones), "lens_temperature": 1.7, "impl": impl}
    policy_head(hidden, weight, labels, student, **options).policy_loss.backward()
    assert relative(hidden.grad, -truth(hidden.detach(), weight, labels)[2]) < 1e-4


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck_of_a_confident_token(impl):
    # Of its own column alone, whose logit is far above the others.
    make = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 3, generator=make).double()
    hidden, labels = 4 * weight[:2] / weight[:2].square().sum(1, True), torch.tensor([0, 1])
    hidden = (2 * hidden).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, labels, impl=impl).logprob,
        (hidden, weight.requires_grad_()),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_token_alone_has_probability_1(impl):
    hidden = torch.randn(3, 5).requires_grad_()
    labels = torch.zeros(3, dtype=torch.int64)
    got = linear_logprob(hidden, torch.randn(1, 5), labels, impl=impl)
    got.logprob.sum().backward()
    assert got.logprob.abs().max() == 0 and hidden.grad.abs().max() == 0


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@outside
def test_a_peaked_policy_keeps_to_the_trajectory_of_float64(impl):
    """200 steps up and down in the log-probability of tokens that are almost sure."""
    ends = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, labels = confident(1e-5, 4)
        hidden = hidden.to(dtype).requires_grad_()
        weight = weight.to(dtype)
        for step in range(200):
            logprob = linear_logprob(hidden, weight, labels, impl=impl).logprob
            sign = 1.0 if step % 3 else -1.0
            (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
            with torch.no_grad():
                # Of a size that the curvature does not undo.
                hidden += sign * 20 * gradient
        z = hidden.detach().double() @ weight.double().T
        lq = z.log_softmax(-1)
        ends.append(-(lq.exp() * lq).sum(-1))
    assert ends[1].max() > 1e-6
    assert ((ends[0] - ends[1]).abs() / ends[1]).max() < 1e-2


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rest_of_nothing_gives_a_gradient_of_nothing(dtype):
    weight = torch.eye(8, dtype=dtype)
    hidden = (300 * weight[:3]).clone().requires_grad_()
    got = linear_logprob(hidden, weight, torch.arange(3))
    got.logprob.sum().backward()
    assert got.logprob.abs().max() == 0 and hidden.grad.abs().max() == 0
