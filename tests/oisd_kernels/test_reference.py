"""Ops, reference and chunked, against direct definitions in float64, gradcheck, stated bounds.

The oracle shares no formula with either: losses come from probabilities with the 0*log(0)
terms left out, gradients from the closed forms of the row gradients, chained by hand.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import softplus

import oisd_kernels

DIVERGENCES = [
    pytest.param("jsd", 0.1, id="jsd-0.1"),
    pytest.param("jsd", 0.5, id="jsd-0.5"),
    pytest.param("jsd", 0.9, id="jsd-0.9"),
    pytest.param("forward_kl", 0.5, id="forward_kl"),
    pytest.param("reverse_kl", 0.5, id="reverse_kl"),
]
SOFTCAPS = [pytest.param(None, id="uncapped"), pytest.param(3.0, id="softcap3")]
LOSS_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float64: 1e-11}
GRADIENT_BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float64: 1e-11}


@pytest.fixture(params=["reference", "chunked"], autouse=True)
def impl(request, monkeypatch):
    """What the two ops below run."""
    monkeypatch.setitem(RUNNING, "impl", request.param)
    return request.param


RUNNING = {"impl": "reference"}


def logit_lens_divergence(*inputs, **options):
    return oisd_kernels.logit_lens_divergence(*inputs, **options, **RUNNING)


# The oracle


def direct_divergence(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    """From probabilities, [..., V] -> [...]; a term of probability 0 is 0."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        used = a > 0
        safe_a, safe_b = torch.where(used, a, 1.0), torch.where(used, b, 1.0)
        return torch.where(used, a * (safe_a / safe_b).log(), 0.0).sum(-1)

    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def closed_form_gradient(zp: Tensor, zq: Tensor, divergence: str, beta: float) -> Tensor:
    """Gradient of each row's divergence to the student's scores `zq`, [..., V]."""
    lp, lq = zp.log_softmax(-1), zq.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    if divergence == "forward_kl":
        return q - p
    if divergence == "reverse_kl":
        return q * ((lq - lp) - (q * (lq - lp)).sum(-1, keepdim=True))
    s = softplus(lp - lq + math.log(beta / (1 - beta)), threshold=700)
    return -(1 - beta) * q * (s - (q * s).sum(-1, keepdim=True))


class Truth(NamedTuple):
    loss: Tensor  # [S, N]
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def lens_truth(
    hidden,
    teacher,
    weight,
    *,
    bias=None,
    row_weight=None,
    divergence="jsd",
    beta=0.5,
    temperature=1.0,
    softcap=None,
    upstream=None,
) -> Truth:
    """Loss of every row and gradients of sum(upstream * loss), in float64."""
    hidden, teacher, weight = (x.detach().double() for x in (hidden, teacher, weight))
    bias = torch.zeros(len(weight)).double() if bias is None else bias.detach().double()
    ones = torch.ones(hidden.shape[:-1]).double()
    row_weight = ones if row_weight is None else row_weight.double().expand(ones.shape)

    def scores(x):
        raw = x @ weight.T + bias
        capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        slope = torch.ones_like(raw) if softcap is None else 1 - torch.tanh(raw / softcap) ** 2
        return capped / temperature, slope / temperature

    (zq, slope), (zp, _) = scores(hidden), scores(teacher)
    loss = row_weight * direct_divergence(zp.softmax(-1), zq.softmax(-1), divergence, beta)
    g = row_weight if upstream is None else row_weight * upstream.double()
    d_logits = g[..., None] * closed_form_gradient(zp, zq, divergence, beta) * slope
    rows = d_logits.flatten(0, -2)
    return Truth(loss, d_logits @ weight, rows.T @ hidden.flatten(0, -2), rows.sum(0))


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def assert_loss_close(got: Tensor, want: Tensor, bound: float) -> None:
    """Relative to the norm, or 1e-6 nats a row where the loss itself is that small."""
    worst = (got.double() - want).abs().max()
    assert worst <= 1e-6 or relative_error(got, want) <= bound, (worst, got, want)


def assert_gradient_close(got: Tensor, want: Tensor, bound: float, floor: float = 1e-6) -> None:
    assert want.norm() > floor, "the case has no gradient to speak of"
    assert got.isfinite().all()
    error = relative_error(got, want)
    assert error <= bound, f"relative error {error:.2e} of a gradient of norm {want.norm():.2e}"


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def normal(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# logit_lens_divergence: gradients


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_lens_gradcheck(divergence, beta, temperature, softcap):
    hidden, weight, bias = (
        leaf(normal(*shape, seed=seed)) for seed, shape in enumerate([(2, 4, 3), (5, 3), (5,)])
    )
    teacher = normal(4, 3, seed=3)
    token_weight = torch.tensor([[1.5, 0.0, -2.0, 1.0], [-0.5, 0.0, 0.0, 3.0]]).double()

    def loss(hidden, weight, bias):
        return logit_lens_divergence(
            hidden,
            teacher,
            weight,
            bias=bias,
            token_weight=token_weight,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            logit_softcap=softcap,
            grad_weight=True,
        )

    # Moving `weight` would move the detached teacher too, so finite differences take `hidden` only;
    # `weight` and `bias` meet the closed form below.
    assert gradcheck(lambda h: loss(h, weight.detach(), bias.detach()), hidden)
    truth = lens_truth(
        hidden,
        teacher,
        weight,
        bias=bias,
        row_weight=token_weight,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        softcap=softcap,
        upstream=(upstream := normal(2, 4, seed=4)),
    )
    got = loss(hidden, weight, bias)
    torch.testing.assert_close(got, truth.loss)
    grads = torch.autograd.grad((got * upstream).sum(), (hidden, weight, bias))
    for got_grad, want in zip(grads, truth[1:], strict=True):
        assert_gradient_close(got_grad, want, 1e-11)


def test_lens_weight_gradient_is_the_student_branch_alone():
    """Autograd of the direct definition, with the teacher's probabilities held fixed."""
    hidden, teacher = normal(3, 4, seed=0), normal(3, 4, seed=1)
    weight, bias = leaf(normal(7, 4, seed=2)), leaf(normal(7, seed=3))
    p = (teacher @ weight.T + bias).softmax(-1).detach()
    q = (hidden @ weight.T + bias).softmax(-1)
    want = torch.autograd.grad(direct_divergence(p, q, "jsd", 0.5).sum(), (weight, bias))
    loss = logit_lens_divergence(
        hidden, teacher, weight, bias=bias, grad_weight=True, reduction="sum"
    )
    got = torch.autograd.grad(loss, (weight, bias))
    for a, b in zip(got, want, strict=True):
        assert_gradient_close(a, b, 1e-11)


# logit_lens_divergence: the stated bounds


def lens_case(name: str, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [2, 24, 33], teacher [24, 33], weight [251, 33]; the last feature splits the tokens.

    With weights of standard deviation 1, a hidden state of norm r gives logits of deviation r.
    """
    V, N, D = 251, 24, 32
    weight = torch.cat([normal(V, D, seed=0), torch.zeros(V, 1).double()], 1)
    hidden = torch.cat([normal(2, N, D, seed=1) / D**0.5, torch.ones(2, N, 1).double()], 2)
    teacher = torch.cat([normal(N, D, seed=2) / D**0.5, torch.ones(N, 1).double()], 1)
    half = torch.arange(V) % 2
    if name == "ordinary":
        scale_student, scale_teacher = 3, 3
    elif name == "near":
        teacher = hidden[0] + 0.05 * (teacher - hidden[0])
        hidden[1] = hidden[0] - 0.03 * normal(N, D + 1, seed=3) / D**0.5
        hidden[..., -1] = teacher[:, -1] = 1
        scale_student, scale_teacher = 3, 3
    elif name == "std20":
        scale_student, scale_teacher = 20, 20
    elif name == "saturated":  # a student next to uniform under a peaked teacher
        scale_student, scale_teacher = 0.1, 12
    elif name == "disjoint":  # each gives the other's half of the tokens e^-12
        weight[:, -1] = 6.0 * temperature * (1 - 2 * half)
        teacher[:, -1] = -1
        scale_student, scale_teacher = 1, 1
    elif name == "one-hot-teacher":
        scale_student, scale_teacher = 2, 50
    elif name == "underflow":  # a third of the tokens has probability 0 in both
        weight[:, -1] = -500.0 * (torch.arange(V) % 3 == 0)
        scale_student, scale_teacher = 3, 3
    else:
        raise KeyError(name)
    hidden[..., :-1] *= scale_student
    teacher[:, :-1] *= scale_teacher
    return hidden, teacher, weight


CASES = ["ordinary", "near", "std20", "saturated", "disjoint", "one-hot-teacher", "underflow"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize("case", CASES)
def test_lens_meets_the_bounds(case, divergence, beta, dtype, temperature):
    hidden, teacher, weight = (x.to(dtype) for x in lens_case(case, temperature))
    hidden, weight = leaf(hidden), leaf(weight)
    options = {"divergence": divergence, "beta": beta, "temperature": temperature}
    row_weight, upstream = normal(2, 24, seed=5).float(), normal(2, 24, seed=6).float()
    row_weight[:, 3] = 0
    truth = lens_truth(hidden, teacher, weight, row_weight=row_weight, upstream=upstream, **options)
    loss = logit_lens_divergence(
        hidden, teacher, weight, token_weight=row_weight, grad_weight=True, **options
    )
    assert loss.dtype == torch.float32
    assert_loss_close(loss, truth.loss, LOSS_BOUND[dtype])
    (loss * upstream).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert_gradient_close(hidden.grad, truth.d_hidden, GRADIENT_BOUND[dtype])
    assert_gradient_close(weight.grad, truth.d_weight, GRADIENT_BOUND[dtype])


def test_lens_disjoint_is_log_two():
    hidden, teacher, weight = (x.float() for x in lens_case("disjoint"))
    weight[:, -1] *= 5
    hidden = leaf(hidden)
    loss = logit_lens_divergence(hidden, teacher, weight)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=1e-6, atol=0)
    loss.sum().backward()
    truth = lens_truth(hidden, teacher, weight)
    # e^-70 of the mass overlaps: the gradient is minute, and still right in every digit.
    assert_gradient_close(hidden.grad, truth.d_hidden, 1e-4, floor=1e-30)


@pytest.mark.parametrize("std", [0.1, 3, 20], ids=lambda s: f"std{s}")
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_lens_of_equal_states_is_zero(divergence, beta, std):
    teacher, weight = std * normal(24, 32, seed=0) / 32**0.5, normal(251, 32, seed=1)
    hidden = leaf(teacher.float())
    loss = logit_lens_divergence(
        hidden, teacher.float(), weight.float(), divergence=divergence, beta=beta
    )
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_lens_small_losses_are_good_to_a_micronat(divergence, beta):
    """A large vocabulary next to uniform, where log-softmax has the fewest digits to spare."""
    weight = normal(20011, 16, seed=0).float()
    teacher = 0.05 * normal(8, 16, seed=1).float()
    hidden = teacher + 1e-4 * normal(8, 16, seed=2).float()
    truth = lens_truth(hidden, teacher, weight, divergence=divergence, beta=beta)
    loss = logit_lens_divergence(hidden, teacher, weight, divergence=divergence, beta=beta)
    assert 1e-9 < truth.loss.max() < 1e-6
    assert (loss.double() - truth.loss).abs().max() < 1e-7


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_lens_large_vocabulary(divergence, beta):
    """The error of a sum must not grow with the number of its terms.

    The last product is torch's: over 100,003 terms it is 1.2e-5 off on some CPUs, from the exact
    gradient to the logits too, and nothing but that may be added to ours.
    """
    weight = normal(100_003, 16, seed=0).float()
    hidden = leaf(2 * normal(2, 16, seed=1).float() / 4)
    teacher = 4 * normal(2, 16, seed=2).float() / 4
    truth = lens_truth(hidden, teacher, weight, divergence=divergence, beta=beta)
    loss = logit_lens_divergence(hidden, teacher, weight, divergence=divergence, beta=beta)
    assert relative_error(loss, truth.loss) < 2e-6
    loss.sum().backward()
    student, other = (x.detach().double() @ weight.double().T for x in (hidden, teacher))
    exact = closed_form_gradient(other, student, divergence, beta)
    product = relative_error(exact.float() @ weight, truth.d_hidden)
    assert_gradient_close(hidden.grad, truth.d_hidden, max(1e-5, 1.1 * product))


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_lens_masked_vocabulary_counts_as_absent(divergence, beta):
    """A bias of -inf, as some models give their padded tokens."""
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    bias = torch.zeros(251)
    bias[200:] = -math.inf
    options = {"divergence": divergence, "beta": beta, "grad_weight": True, "reduction": "sum"}
    whole = [leaf(hidden), leaf(weight)]
    part = [leaf(hidden), leaf(weight[:200])]
    losses = [
        logit_lens_divergence(whole[0], teacher, whole[1], bias=bias, **options),
        logit_lens_divergence(part[0], teacher, part[1], **options),
    ]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_gradient_close(whole[0].grad, part[0].grad, 1e-5)
    assert_gradient_close(whole[1].grad[:200], part[1].grad, 1e-5)
    assert (whole[1].grad[200:] == 0).all()


# logit_lens_divergence: weights, reductions, gradients that must not be


@pytest.mark.parametrize("per_layer", [False, True], ids=["weight-N", "weight-SN"])
def test_lens_weights_and_reductions(per_layer):
    hidden, teacher, weight = lens_case("ordinary")
    token_weight = normal(*((2, 24) if per_layer else (24,)), seed=7)
    token_weight[..., ::3] = 0
    assert (token_weight < 0).any()
    want = lens_truth(hidden, teacher, weight, row_weight=token_weight).loss
    loss = {
        name: logit_lens_divergence(
            hidden, teacher, weight, token_weight=token_weight, reduction=name
        )
        for name in ("none", "sum", "mean")
    }
    torch.testing.assert_close(loss["none"], want)
    assert (loss["none"][:, ::3] == 0).all()
    torch.testing.assert_close(loss["sum"], want.sum())
    torch.testing.assert_close(loss["mean"], want.sum() / 32)  # 2 layers, 16 of 24 tokens


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_lens_all_rows_dropped(reduction):
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    hidden, weight = leaf(hidden), leaf(weight)
    loss = logit_lens_divergence(
        hidden,
        teacher,
        weight,
        token_weight=torch.zeros(24),
        reduction=reduction,
        grad_weight=True,
    )
    loss.sum().backward()
    assert (loss == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
def test_lens_dropped_rows_reach_nothing(poison):
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    token_weight = torch.ones(2, 24)
    token_weight[0, 4] = token_weight[1, 9] = 0  # dropped in one layer
    token_weight[:, 17] = 0  # dropped in both: the teacher's row is dropped as well
    hidden[0, 4] = hidden[1, 9] = hidden[:, 17] = teacher[17] = poison
    hidden, weight = leaf(hidden), leaf(weight)
    loss, stats = logit_lens_divergence(
        hidden, teacher, weight, token_weight=token_weight, grad_weight=True, return_stats=True
    )
    loss.sum().backward()
    dropped = token_weight == 0
    assert (loss[dropped] == 0).all() and (hidden.grad[dropped] == 0).all()
    for x in (loss, hidden.grad, weight.grad, *stats):
        assert x.isfinite().all()
    clean = [x.nan_to_num(0, 0, 0) for x in (hidden.detach(), teacher)]
    truth = lens_truth(*clean, weight, row_weight=token_weight)
    assert_loss_close(loss, truth.loss, 1e-5)
    assert_gradient_close(hidden.grad, truth.d_hidden, 1e-4)
    assert_gradient_close(weight.grad, truth.d_weight, 1e-4)


def test_lens_gradient_reaches_the_student_alone():
    hidden, teacher, weight, bias = map(leaf, (*lens_case("ordinary"), normal(251, seed=8)))
    token_weight = leaf(normal(24, seed=9))
    loss = logit_lens_divergence(
        hidden, teacher, weight, bias=bias, token_weight=token_weight, reduction="sum"
    )
    loss.backward()
    assert hidden.grad.norm() > 1e-3
    assert all(x.grad is None for x in (teacher, weight, bias, token_weight))


def test_lens_negative_weight_reverses_the_gradient():
    hidden, teacher, weight = lens_case("ordinary")
    grads = []
    for sign in (1.0, -1.0):
        x = leaf(hidden)
        token_weight = torch.full((24,), sign)
        logit_lens_divergence(
            x, teacher, weight, token_weight=token_weight, reduction="sum"
        ).backward()
        grads.append(x.grad)
    assert grads[0].norm() > 1e-3
    assert torch.equal(grads[0], -grads[1])
