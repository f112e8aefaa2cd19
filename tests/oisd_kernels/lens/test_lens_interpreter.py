"""The Triton row kernels in the interpreter: the kernels themselves, not their torch counterpart.

The interpreter is chosen when triton is imported, so the tests run in a process of their own.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck

from oisd_kernels import PolicyTerms, linear_logprob, logit_lens_divergence, policy_head
from oisd_kernels.lens.chunked.head_pass import row_functions
from oisd_kernels.lens.chunked.rows import RowMath
from tests.interpreter import INTERPRETED, interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.lens import row_forms
from tests.oisd_kernels.test_reference import (
    DIVERGENCES,
    GRADIENT_BOUND,
    LOSS_BOUND,
    assert_gradient_close,
    assert_loss_close,
    leaf,
    lens_case,
    lens_truth,
    normal,
)

CHUNKED = {"impl": "chunked"}
# The interpreter truncates to bf16 where a GPU rounds: twice the error, and all in one direction.
HALF_BOUND = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@outside
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernels", ["whole", pytest.param("split", marks=pytest.mark.slow)])
def test_the_interpreter_passes(kernels):
    """The split form, which nothing takes by default, is in `test_split_rows` every time."""
    passes_in_the_interpreter(__file__, "-k", kernels, timeout=550)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


@pytest.fixture(autouse=True, params=row_forms.FORMS if INTERPRETED else [None])
def form(request, monkeypatch):
    if request.param is not None:
        row_forms.choose(request.param, monkeypatch)
    return request.param


@interpreted
def test_the_kernels_are_what_runs(form, monkeypatch):
    from oisd_kernels.lens.chunked import rows_split, rows_triton

    assert row_functions(torch.device("cpu")) is rows_triton
    ran = []

    def spy(module):
        run = module.student_rows
        monkeypatch.setattr(
            module, "student_rows", lambda *given: (ran.append(module), run(*given))[1]
        )

    spy(rows_triton)
    spy(rows_split.SplitRows)
    logit_lens_divergence(normal(1, 1, 2, seed=0), normal(1, 2, seed=1), normal(3, 2, seed=2))
    assert ran == [rows_triton if form == "whole" else rows_split.SplitRows]


@interpreted
@pytest.mark.parametrize(
    "divergence, beta, softcap",
    [
        pytest.param("jsd", 0.5, None, id="jsd-0.5-uncapped"),
        pytest.param("jsd", 0.1, 3.0, id="jsd-0.1-softcap3"),
        pytest.param("forward_kl", 0.5, 3.0, id="forward_kl-softcap3"),
        pytest.param("reverse_kl", 0.5, 3.0, id="reverse_kl-softcap3"),
        pytest.param("jsd", 0.5, 3.0, id="jsd-0.5-softcap3", marks=pytest.mark.slow),
        pytest.param("jsd", 0.1, None, id="jsd-0.1-uncapped", marks=pytest.mark.slow),
        pytest.param("forward_kl", 0.5, None, id="forward_kl-uncapped", marks=pytest.mark.slow),
        pytest.param("reverse_kl", 0.5, None, id="reverse_kl-uncapped", marks=pytest.mark.slow),
    ],
)
def test_lens_gradcheck(divergence, beta, softcap):
    """Without a softcap, all divergences meet the bounds below too."""
    hidden, teacher, weight = normal(1, 2, 2, seed=0), normal(2, 2, seed=1), normal(5, 2, seed=2)
    options = {"divergence": divergence, "beta": beta, "temperature": 0.7, "logit_softcap": softcap}
    options |= {"bias": normal(5, seed=3), "token_weight": torch.tensor([1.5, -2.0])}
    assert gradcheck(
        lambda h: logit_lens_divergence(h, teacher, weight, **options, **CHUNKED), leaf(hidden)
    )


@interpreted
def test_logprob_gradcheck():
    hidden, weight, bias = leaf(normal(2, 2, seed=0)), leaf(normal(5, 2, seed=1)), normal(5, seed=2)
    labels = torch.tensor([4, 0])
    options = {"bias": bias, "temperature": 0.7, "logit_softcap": 3.0, **CHUNKED}
    assert gradcheck(lambda h, w: linear_logprob(h, w, labels, **options).logprob, (hidden, weight))


@interpreted
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize(
    "case", ["ordinary", "near", "std20", "saturated", "disjoint", "one-hot-teacher", "underflow"]
)
def test_lens_meets_the_bounds(case, divergence, beta):
    hidden, teacher, weight = (x.float() for x in lens_case(case))
    hidden, teacher = leaf(hidden[:, :3]), teacher[:3]
    options = {"divergence": divergence, "beta": beta}
    row_weight, upstream = torch.tensor([1.5, 0.0, -2.0]), normal(2, 3, seed=6).float()
    truth = lens_truth(hidden, teacher, weight, row_weight=row_weight, upstream=upstream, **options)
    loss = logit_lens_divergence(
        hidden, teacher, weight, token_weight=row_weight, **options, **CHUNKED
    )
    assert_loss_close(loss, truth.loss, LOSS_BOUND[torch.float32])
    (loss * upstream).sum().backward()
    assert_gradient_close(hidden.grad, truth.d_hidden, GRADIENT_BOUND[torch.float32])


@interpreted
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[1:4])
def test_many_blocks_and_a_prime_vocabulary(divergence, beta, form, monkeypatch):
    """Sums over 20 blocks, or 5 parts; the loss is below 1e-6 nats in the second row."""
    row_forms.choose(form, monkeypatch, part=4096)
    weight = normal(20_011, 16, seed=0).float()
    teacher = 0.5 * normal(2, 16, seed=1).float()
    hidden = teacher + torch.tensor([[0.3], [1e-4]]) * normal(2, 16, seed=2).float()
    hidden = leaf(hidden)
    options = {"divergence": divergence, "beta": beta}
    truth = lens_truth(hidden, teacher, weight, **options)
    loss, stats = logit_lens_divergence(
        hidden, teacher, weight, return_stats=True, **options, **CHUNKED
    )
    assert ((loss - truth.loss).abs() <= 1e-5 * truth.loss + 1e-7).all()
    loss.sum().backward()
    assert_gradient_close(hidden.grad, truth.d_hidden, 1e-4)
    lp, lq = ((x.double() @ weight.double().T).log_softmax(-1) for x in (teacher, hidden.detach()))
    for got, x in ((stats.teacher_entropy, lp), (stats.student_entropy, lq)):
        torch.testing.assert_close(got.double(), -(x.exp() * x).sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(stats.top1_agreement, (lp.argmax(-1) == lq.argmax(-1)).float())


@interpreted
@pytest.mark.parametrize(
    "dtype, size",
    [
        pytest.param(torch.bfloat16, 1.0, id="bf16-one"),
        pytest.param(torch.bfloat16, 2.0**-30, id="bf16-minute", marks=pytest.mark.slow),
        pytest.param(torch.float16, 1.0, id="fp16-one"),
        pytest.param(torch.float16, 2.0**-30, id="fp16-minute"),
    ],
)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[1:4] + DIVERGENCES[4:])
def test_half_precision_gradient_in_the_logits_memory(
    divergence, beta, dtype, size, form, monkeypatch
):
    """What a GPU does with bf16 and fp16 operands, over several blocks and with padded rows."""
    row_forms.choose(form, monkeypatch, part=1024)
    z, z_final = (3 * normal(2, 3072, seed=i).float() for i in range(2))
    rows = row_forms.functions(form, z_final[:, :3001], 1, dtype)
    z = row_forms.in_room(z[:, :3001], rows, 3072)
    lp, lq = (x[:, :3001].double().log_softmax(-1) for x in (z_final, z))
    settings = RowMath(divergence, beta, 1.0, None)
    factor = size * torch.tensor([1.0, -3.0])
    truth = lens_truth(
        lq, lp, torch.eye(3001), divergence=divergence, beta=beta, upstream=factor.double()
    )
    final = rows.final_rows(z_final[:, :3001], None, None, settings, True, True)
    out = rows.student_rows(
        z, z_final[:, :3001], final, None, torch.arange(2), factor, settings, True, True, dtype,
    )  # fmt: skip
    assert out.d_logits.dtype == dtype
    behind = out.d_logits.data_ptr() - z.data_ptr()
    assert behind == getattr(rows, "spare", 0) * z.stride(0) * z.element_size()
    got = out.d_logits.double() * (out.scale[:, None].double() if out.scale.numel() else 1)
    assert_gradient_close(got, truth.d_hidden, HALF_BOUND[dtype], floor=1e-3 * size)
    assert_loss_close(out.divergence, truth.loss, 1e-5)


@interpreted
def test_half_precision_gradient_of_the_logprob():
    rows = row_functions(torch.device("cpu"))
    settings, labels = RowMath("jsd", 0.5, 0.5, None), torch.tensor([7, 1500])
    for dtype in (torch.bfloat16, torch.float16):
        z = 3 * normal(2, 1536, seed=0).float()
        exact = leaf(z[:, :1501].double())
        logprob = (exact / 0.5).log_softmax(-1)[torch.arange(2), labels]
        factor = torch.tensor([1e-9, -2e-9])
        (logprob * factor).sum().backward()
        final = rows.final_rows(z[:, :1501], None, labels, settings, True, False)
        torch.testing.assert_close(final.logprob.double(), logprob.detach(), rtol=1e-6, atol=1e-6)
        d, scale = rows.final_gradient(z[:, :1501], final, None, labels, factor, settings, dtype)
        got = d.double() * (scale[:, None].double() if scale.numel() else 1)
        assert_gradient_close(got, exact.grad, HALF_BOUND[dtype], floor=1e-12)


@interpreted
def test_policy_head_matches_the_reference():
    hidden, final = leaf(normal(2, 3, 6, seed=0)), leaf(normal(3, 6, seed=1))
    weight, bias = leaf(normal(13, 6, seed=2)), normal(13, seed=3)
    token_weight = torch.tensor([1.0, 0.0, -2.0])
    results = []
    for impl in ("chunked", "reference"):
        out = policy_head(
            final, weight, torch.tensor([0, 12, 5]), hidden, bias=bias, token_weight=token_weight,
            logit_softcap=3.0, grad_weight=True, impl=impl,
        )  # fmt: skip
        loss = (out.logprob * normal(3, seed=5)).sum() + (out.divergence).square().sum()
        results.append([*out[:4], *torch.autograd.grad(loss, (hidden, final, weight))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@interpreted
def test_policy_loss_at_a_temperature_of_its_own():
    hidden, final = leaf(normal(2, 3, 6, seed=0)), leaf(normal(3, 6, seed=1))
    weight, bias = leaf(normal(13, 6, seed=2)), normal(13, seed=3)
    terms = PolicyTerms(
        torch.tensor([1.0, -2.0, 0.5]), torch.ones(3), normal(3, seed=4) - 3, dual_clip=2.0
    )
    results = []
    for impl in ("chunked", "reference"):
        out = policy_head(
            final, weight, torch.tensor([0, 12, 5]), hidden, bias=bias, logit_softcap=3.0,
            temperature=0.7, lens_temperature=1.4, policy=terms, impl=impl,
        )  # fmt: skip
        loss = out.policy_loss + out.divergence.square().sum()
        grads = torch.autograd.grad(loss, (hidden, final, weight))
        assert all(x.norm() > 1e-3 for x in grads)
        results.append([*out[:4], *out.stats, out.policy_loss, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@interpreted
def test_rows_lie_beyond_the_reach_of_int32(form):
    """Two rows 2^31 entries apart; only the pages that are written exist."""
    stride, V = 2**31 + 64, 151
    far = torch.empty(stride + 192).as_strided((2, V), (stride, 1))
    z, z_final = normal(2, V, seed=0).float(), normal(2, V, seed=1).float()
    slot, ones = torch.arange(2), torch.ones(2)
    settings = RowMath("jsd", 0.5, 1.0, None)

    def run(z, z_final):
        rows = row_forms.functions(form, z_final, 1, torch.float32)
        final = rows.final_rows(z_final, None, torch.tensor([1, 0]), settings, True, True)
        got = rows.student_rows(
            z, z_final, final, None, slot, ones, settings, True, True, torch.float32
        )
        return [*final, *got]

    wanted = run(z.clone(), z_final)
    assert wanted[-2].norm() > 1e-3
    far.copy_(z)
    got = run(far, z_final)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    far.copy_(z_final)
    assert torch.equal(far[1], z_final[1])
    got = run(z.clone(), far)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@interpreted
def test_nan_and_infinity_stay_in_their_rows():
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    hidden, teacher = hidden[:, :3], teacher[:3]
    hidden[0, 0, 0], hidden[1, 1, 1] = math.nan, math.inf
    bias = torch.zeros(251)
    bias[200:] = -math.inf  # a masked vocabulary is no fault
    hidden = leaf(hidden)
    loss = logit_lens_divergence(hidden, teacher, weight, bias=bias, **CHUNKED)
    loss.sum().backward()
    bad = torch.tensor([[True, False, False], [False, True, False]])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(hidden.grad.isnan().any(-1), bad)
