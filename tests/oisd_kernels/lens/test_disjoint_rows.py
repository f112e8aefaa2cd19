"""Every divergence and implementation where student and teacher are near, middling, disjoint or
one-hot, against the centred form in float64; and rows whose vocabulary is masked by the bias."""

import math

import pytest
import torch

from oisd_kernels import distillation_divergence, linear_logprob, logit_lens_divergence, policy_head
from tests.interpreter import INTERPRETED, outside, passes_in_the_interpreter
from tests.oisd_kernels.test_reference import closed_form_gradient

IMPLEMENTATIONS = ["chunked", "tiled" if INTERPRETED else "reference"]
# Of loss and gradient. The interpreter truncates to bf16 where a GPU rounds.
BOUNDS = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-4, 8e-3 if INTERPRETED else 5e-3),
}
KINDS = ["jsd", "forward_kl", "reverse_kl"]
REGIMES = ["near", "middling", "disjoint", "one_hot"]


# In the interpreter the whole grid takes minutes: float32 at the larger vocabulary in CI.
LONG = [pytest.mark.slow] if INTERPRETED else []
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=LONG)]
LOWEST = [
    -torch.inf,
    pytest.param(torch.finfo(torch.float32).min, marks=LONG),
    pytest.param(-1e9, marks=LONG),
]
SHAPES = [
    (1, 331, None, 1.0),
    pytest.param(3, 5, None, 1.0, marks=LONG),
    pytest.param(3, 67, 30.0, 0.7, marks=LONG),
]


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


def states(regime, layers, seed, dtype, far, rows=5, width=32):
    """Student [S, N, D] and teacher [N, D]."""
    make = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, width, generator=make)
    noise = torch.randn(layers, rows, width, generator=make)
    if regime == "near":
        hidden = teacher + 0.05 * noise
    elif regime == "middling":
        hidden, teacher = 2 * teacher + 2 * noise, 3 * teacher
    elif regime == "disjoint":
        hidden, teacher = -far * teacher + noise, far * teacher
    else:
        hidden, teacher = noise, 18 * teacher
    return hidden.to(dtype).requires_grad_(), teacher.to(dtype)


def centred(hidden, teacher, weight, divergence, beta, cap, temperature):
    """Loss of each row, and the gradient of their sum to the states, in float64."""
    weight = weight.double()

    def scores(x):
        z = x.detach().double() @ weight.T
        t = z if cap is None else cap * torch.tanh(z / cap)
        return t / temperature, (1.0 if cap is None else 1 - (t / cap) ** 2) / temperature

    (zp, _), (zq, slope) = scores(teacher), scores(hidden)
    lp, lq = zp.log_softmax(-1), zq.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    if divergence == "jsd":
        lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
        loss = beta * (p * (lp - lm)).sum(-1) + (1 - beta) * (q * (lq - lm)).sum(-1)
    else:
        loss = (p * (lp - lq) if divergence == "forward_kl" else q * (lq - lp)).sum(-1)
    return loss, closed_form_gradient(zp, zq, divergence, beta) * slope @ weight


@pytest.mark.parametrize("layers, vocabulary, cap, temperature", SHAPES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_regimes(impl, dtype, divergence, regime, cap, temperature, layers, vocabulary):
    weight = torch.randn(vocabulary, 32, generator=torch.Generator().manual_seed(9)) / 32**0.5
    weight = weight.to(dtype)
    # The gradient of a saturated JSD underflows where the KLs' are largest.
    hidden, teacher = states(regime, layers, 5, dtype, 3 if divergence == "jsd" else 18)
    options = {"divergence": divergence, "logit_softcap": cap, "temperature": temperature}
    loss = logit_lens_divergence(hidden, teacher, weight, **options, impl=impl)
    loss.sum().backward()
    want, gradient = centred(hidden, teacher, weight, divergence, 0.5, cap, temperature)
    loss_bound, bound = BOUNDS[dtype]
    error = (loss.detach().double() - want).norm()
    assert error < max(loss_bound * want.norm(), 1e-6 * want.numel() ** 0.5)
    assert gradient.norm() > 1e-6
    assert (hidden.grad.double() - gradient).norm() < bound * gradient.norm()


# Rows whose bias masks vocabulary


# Of V tokens
MASKED = {
    "front": lambda V: slice(0, 11 * V // 20),
    "back": lambda V: slice(12 * V // 25, V),
    "whole blocks": lambda V: slice(V // 2, V),
    "all but one": lambda V: slice(0, V - 1),
}


def masked_head(mask, lowest=-torch.inf, impl="chunked"):
    V = 128 if impl == "tiled" else 2048  # several blocks, which are of 32 and of 1024 tokens
    make = torch.Generator().manual_seed(4)
    hidden, final = (torch.randn(3, 16, generator=make) for _ in range(2))
    weight, bias = torch.randn(V, 16, generator=make), torch.zeros(V)
    bias[MASKED[mask](V)] = lowest
    allowed = (bias == 0).nonzero()[:, 0]
    return hidden, final, weight, bias, allowed[torch.tensor([0, -1, len(allowed) // 2])]


@pytest.mark.parametrize("lowest", LOWEST)
@pytest.mark.parametrize("mask", list(MASKED))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_vocabulary_is_as_if_it_was_absent(impl, mask, lowest):
    hidden, final, weight, bias, labels = masked_head(mask, lowest, impl)
    kept = weight[bias == 0]
    place = (bias == 0).cumsum(0)[labels] - 1
    want = linear_logprob(final.double(), kept.double(), place, impl="reference")
    x = final.clone().requires_grad_()
    got = linear_logprob(x, weight, labels, bias=bias, impl=impl)
    got.logprob.sum().backward()
    y = final.double().requires_grad_()
    linear_logprob(y, kept.double(), place, impl="reference").logprob.sum().backward()
    for a, b in zip((*got, x.grad), (*want, y.grad), strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), atol=1e-5, rtol=1e-5)

    for divergence in KINDS:
        x, y = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        options = {"divergence": divergence, "return_stats": True}
        loss, stats = logit_lens_divergence(x, final, weight, bias=bias, impl=impl, **options)
        loss.sum().backward()
        true, true_stats = logit_lens_divergence(
            y, final.double(), kept.double(), impl="reference", **options
        )
        true.sum().backward()
        for a, b in zip((loss, *stats, x.grad), (true, *true_stats, y.grad), strict=True):
            torch.testing.assert_close(a.detach().double(), b.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", list(MASKED))
def test_masked_vocabulary_in_the_fused_heads(mask):
    hidden, final, weight, bias, labels = masked_head(mask)
    got = policy_head(final, weight, labels, hidden, bias=bias, lens_temperature=0.8)
    want = policy_head(
        final, weight, labels, hidden, bias=bias, lens_temperature=0.8, impl="reference"
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    options = {"bias": bias, "teacher_bias": bias, "logit_softcap": 20.0, "return_entropy": True}
    heads = hidden, weight, final, weight.flip(1)
    got = distillation_divergence(*heads, **options)
    want = distillation_divergence(*heads, **options, impl="reference")
    assert got[1].isfinite().all()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_masked_label_has_no_probability(impl):
    _, final, weight, bias, _ = masked_head("front", impl=impl)
    labels = torch.tensor([0, 5, len(weight) - 1])
    got = linear_logprob(final, weight, labels, bias=bias, impl=impl)
    assert (got.logprob[:2] < -1e29).all() and got.logprob[2].isfinite()
    assert got.entropy.isfinite().all() and got.logsumexp.isfinite().all()
