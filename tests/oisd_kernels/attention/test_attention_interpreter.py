"""The Triton attention kernels in the interpreter, against float64 autograd through the reference.

The interpreter is chosen when triton is imported, so the tests run in a process of their own. Its
tiles are 16 x 16: 17 tokens are two of them.
"""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.test_reference import (
    DIVERGENCES,
    GRADIENT_BOUND,
    assert_loss_close,
    normal,
    relative_error,
)

pytest.importorskip("triton")

from oisd_kernels.attention import triton_impl
from oisd_kernels.attention.spec import Alignment, Layer, Plain
from tests.oisd_kernels.attention.attention_truth import (
    SCALE,
    SCALE_T,
    Truth,
    aligned,
    check_alignment,
    eager,
    geometry,
    inputs,
    row_loss,
    signed_weights,
    statistics,
)

BOUND = GRADIENT_BOUND | {torch.float64: 1e-10}
# The interpreter truncates to bf16 where a GPU rounds: twice the error, and all in one direction.
HALF_BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
FORMS = [
    pytest.param((True, None, None), id="causal"),
    pytest.param((False, None, None), id="full"),
    pytest.param((True, 3, None), id="window3"),
    pytest.param((False, 5, 2.0), id="window5-full-softcap"),
    pytest.param((True, None, 2.0), id="softcap"),
]


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
@pytest.mark.parametrize(
    "name", ["test_attention_torch", "test_flash_attention", "test_flash_attention_arguments"]
)
def test_the_public_functions_pass_on_triton(name):
    """The tests that are written for every implementation."""
    file = Path(__file__).with_name(f"{name}.py")
    passes_in_the_interpreter(file, timeout=1400, OISD_ATTENTION_IMPL="triton")


# The functions


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_attention(form):
    lengths = [17, 0, 1, 2]
    where = geometry(lengths, form)
    q, k, v, qt, kt = inputs(20)
    truth = Truth(q, k, v, qt, kt, where)
    out, lse = triton_impl.forward(q, k, v, where, SCALE)
    torch.testing.assert_close(out, truth.out.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth.lse.detach(), rtol=0, atol=1e-12)
    assert out.is_contiguous() and torch.equal(triton_impl.logsumexp(q, k, where, SCALE), lse)
    d_out, d_lse = normal(*out.shape, seed=7), normal(*lse.shape, seed=8)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, Plain(v, out, d_out, d_lse), None)
    assert all(x.is_contiguous() for x in got)
    check_alignment(got, truth.plain(d_out, d_lse), 1e-12)


@interpreted
@pytest.mark.parametrize("form", FORMS[:4])
def test_alignment(form):
    compare(form, "jsd", 0.3, torch.float64)


@interpreted
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[3:4])
def test_alignment_without_a_statistic(form, divergence, beta):
    compare(form, divergence, beta, torch.float64)


@interpreted
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[4:])
def test_alignment_of_other_divergences(divergence, beta):
    compare((True, None, None), divergence, beta, torch.float64)


@interpreted
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[1:2])
def test_float32(divergence, beta):
    """Those of the KLs are in `test_extreme_scores`, and nightly in `test_every_combination`."""
    compare((True, None, None), divergence, beta, torch.float32)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("heads", [(4, 1, 4), (4, 4, 1)], ids=["heads4-of-1", "heads4-of-4"])
def test_every_combination(form, divergence, beta, dtype, heads):
    compare(form, divergence, beta, dtype, [33, 0, 1, 2, 20], heads=heads, widths=(64, 16))


@interpreted
@pytest.mark.parametrize(
    "depth, divergence, beta",
    [
        pytest.param(None, "jsd", 0.3, id="whole-jsd-0.3"),
        pytest.param(16, "jsd", 0.3, id="in-parts-jsd-0.3"),
        pytest.param(16, "forward_kl", 0.5, id="in-parts-forward_kl"),
        pytest.param(None, "forward_kl", 0.5, id="whole-forward_kl", marks=pytest.mark.slow),
    ],
    indirect=["depth"],
)
def test_wide_heads(depth, divergence, beta):
    """K of 40 is filled up to 48, in blocks of 64; the teacher's 20 to 32."""
    compare((True, 3, 2.0), divergence, beta, torch.float64, [9, 3], widths=(40, 20))


def compare(form, divergence, beta, dtype, lengths=(17, 0, 2), heads=(2, 1, 2), widths=(6, 20)):
    """Value, statistic, the alignment's gradient, and that both at once are the sum of the two."""
    where, N = geometry(lengths, form), sum(lengths)
    q, k, v, qt, kt = inputs(N, *heads, *widths, dtype=dtype)
    weight = signed_weights(N, dtype)
    truth = Truth(q, k, v, qt, kt, where)
    loss, gradient = truth.alignment(weight, divergence, beta)
    value, lse, alignment = aligned(q, k, qt, kt, where, divergence, beta, weight)
    assert value.dtype == lse.dtype == dtype
    assert not value[weight == 0].any()
    assert_loss_close(weight * value, loss, 1e-12 if dtype == torch.float64 else 1e-5)
    if divergence == "forward_kl":
        assert alignment.statistic.shape == (0, 0)
    else:
        check_statistic(truth, alignment, weight)
    alone = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    assert alone[2] is None
    check_alignment(alone[:2], gradient, BOUND[dtype])
    assert not alone[0][weight == 0].any()
    out, _ = triton_impl.forward(q, k, v, where, SCALE)
    d_out, d_lse = normal(*out.shape, seed=7).to(dtype), normal(*lse.shape, seed=8).to(dtype)
    both = triton_impl.backward(
        Layer(q, k, lse, SCALE), where, Plain(v, out, d_out, d_lse), alignment
    )
    plain = truth.plain(d_out, d_lse)
    check_alignment(
        both[:2], [a + b for a, b in zip(plain[:2], gradient, strict=True)], BOUND[dtype]
    )
    check_alignment(both[2:], plain[2:], BOUND[dtype])


def check_statistic(truth, alignment, weight):
    """Of `Alignment`, from the maps themselves."""
    identity = torch.eye(len(weight)).double()[:, None]  # values that make `out` the map
    H = truth.q.shape[1]
    maps = []
    for x, y, factor in ((truth.q, truth.k, SCALE), (truth.qt, truth.kt, SCALE_T)):
        values = identity.expand(-1, y.shape[1], -1)
        maps.append(eager(x, y, values, truth.geometry, factor)[0].detach())
    student, teacher = maps  # [N, H, N]
    seen = student > 0
    ratio = torch.where(seen, teacher, 1).log() - torch.where(seen, student, 1).log()
    if alignment.divergence == "jsd":
        ratio = softplus(ratio + math.log(alignment.beta / (1 - alignment.beta)))
    else:
        ratio = -ratio
    want = torch.where(weight[:, None] != 0, (student * ratio).sum(-1), 0).T
    assert alignment.statistic.shape == (H, len(weight)) and want.norm() > 1e-2
    bound = 1e-10 if alignment.statistic.dtype == torch.float64 else 2e-6
    assert relative_error(alignment.statistic, want) < bound


@interpreted
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[1:2] + DIVERGENCES[3:])
def test_a_teacher_equal_to_the_student(divergence, beta):
    where, weight = geometry([17]), torch.ones(17, dtype=torch.float64)
    q, k, _, _, _ = inputs(17)
    lse = triton_impl.logsumexp(q, k, where, SCALE)
    teacher = Layer(q, k, lse, SCALE)
    value, statistic = statistics(Layer(q, k, lse, SCALE), teacher, None, divergence, beta, where)
    alignment = Alignment(teacher, weight, statistic, divergence, beta)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    if divergence == "jsd":
        statistic = statistic + math.log1p(-beta)
    for x in (value, statistic, *got[:2]):
        assert x.numel() == 0 or float(x.abs().max()) < 1e-13


@interpreted
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[1:2] + DIVERGENCES[3:])
@pytest.mark.parametrize("case", ["large", "near", "one-hot-teacher", "one-hot-student"])
def test_extreme_scores(case, divergence, beta):
    """In float32: scores of +-60, maps 1e-3 apart, one-hot against uniform."""
    where, N = geometry([17]), 17
    q, k, v, qt, kt = inputs(N, 1, 1, 1, 16, 16)
    q, qt = (
        60 * x / (f * (x[:, 0] @ y[:, 0].T).abs().max())
        for x, y, f in ((q, k, SCALE), (qt, kt, SCALE_T))
    )
    if case == "near":
        q = q / 10
        qt, kt = q * (SCALE / SCALE_T) + 1e-4 * qt, k
    elif case == "one-hot-teacher":
        q = 1e-3 * q
    elif case == "one-hot-student":
        qt = 1e-3 * qt
    q, k, v, qt, kt = (x.float() for x in (q, k, v, qt, kt))
    weight = torch.ones(N)
    truth = Truth(q, k, v, qt, kt, where)
    loss, gradient = truth.alignment(weight, divergence, beta)
    value, lse, alignment = aligned(q, k, qt, kt, where, divergence, beta, weight)
    assert_loss_close(value, loss, 1e-5)
    if case == "near":
        assert (value - loss).abs().max() < 2e-7
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    # Of maps 1e-3 apart scores of size 6, rounded at 1e-7, leave 1e-4.
    bound = 1e-3 if case == "near" else 1e-4
    check_alignment(got[:2], gradient, bound, floor=1e-4 if case == "near" else 1e-3)


@interpreted
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_disjoint_maps(beta):
    """In float32: the KL from the mixture is a constant but for e^-28 of it, the gradient's size.

    The truth is the centred form in float64: autograd would lose the same digits.
    """
    where, N = geometry([17]), 17
    q, k, _, qt, kt = inputs(N, 1, 1, 1, 16, 16, spread=0.3)
    # The first feature splits the keys by parity.
    k[..., 0] = kt[..., 0] = (1 - 2 * (torch.arange(N) % 2))[:, None]
    q[..., 0], qt[..., 0] = 14 / SCALE, -14 / SCALE_T
    q, k, qt, kt = (x.float() for x in (q, k, qt, kt))
    weight = signed_weights(N, torch.float32)
    _, lse, alignment = aligned(q, k, qt, kt, where, "jsd", beta, weight)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    lq, lp = (
        (scale * x[:, 0].double() @ y[:, 0].double().T).masked_fill(hidden, -1e9).log_softmax(-1)
        for x, y, scale in ((q, k, SCALE), (qt, kt, SCALE_T))
    )
    s = softplus(lp - lq + math.log(beta / (1 - beta)), threshold=1e9)
    mean = (lq.exp() * s).sum(-1, keepdim=True)
    kept = weight != 0
    assert float(mean[1:].log().max()) < -20
    error = relative_error(alignment.statistic[0][kept], mean[kept, 0])
    assert error < 1e-4, error
    d_scores = SCALE * (beta - 1) * weight.double()[:, None] * lq.exp() * (s - mean)
    truth = (d_scores @ k[:, 0].double())[:, None], (d_scores.T @ q[:, 0].double())[:, None]
    check_alignment(got[:2], truth, 1e-4, floor=1e-12)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs(dtype):
    where, N = geometry([17, 3]), 20
    tensors = inputs(N, dtype=dtype)
    q, k, v, qt, kt = tensors
    weight = 1e-9 * signed_weights(N, torch.float32)  # below float16's range
    truth = Truth(*tensors, where)
    loss, gradient = truth.alignment(weight, "jsd", 0.5)
    value, lse, alignment = aligned(q, k, qt, kt, where, "jsd", 0.5, weight)
    assert value.dtype == lse.dtype == torch.float32
    assert_loss_close(1e9 * weight * value, 1e9 * loss, 1e-4)
    # Outputs of the student's dtype would underflow in float16; a float32 student keeps them.
    got = triton_impl.backward(Layer(q.float(), k.float(), lse, SCALE), where, None, alignment)
    check_alignment(got[:2], gradient, 1e-4, floor=1e-11)
    out, _ = triton_impl.forward(q, k, v, where, SCALE)
    torch.testing.assert_close(out.double(), truth.out.detach(), rtol=1e-2, atol=1e-3)
    out = truth.out.detach().to(dtype)  # rounded as on a GPU: delta would double the truncation
    d_out, d_lse = normal(*out.shape, seed=7).to(dtype), torch.zeros_like(lse)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, Plain(v, out, d_out), None)
    assert [x.dtype for x in (out, *got)] == [dtype] * 4
    check_alignment(got, truth.plain(d_out, d_lse), HALF_BOUND[dtype])


@interpreted
def test_strides_and_mixed_dtypes():
    where, N = geometry([17]), 17
    q, k, v, qt, kt = inputs(N)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k = torch.cat((k, k), -1)[..., :6]
    qt, kt = qt.float(), torch.stack((kt, kt), -1)[..., 0].float()
    weight = signed_weights(N)
    truth = Truth(q, k, v, qt, kt, where)
    loss, gradient = truth.alignment(weight, "jsd", 0.5)
    value, lse, alignment = aligned(q, k, qt, kt, where, "jsd", 0.5, weight)
    assert_loss_close(weight * value, loss, 1e-6)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    check_alignment(got[:2], gradient, 1e-6)


@interpreted
@pytest.mark.parametrize(
    "students, divergence",
    [
        (3, "jsd"),
        (3, "reverse_kl"),
        (3, "forward_kl"),
        (2, "jsd"),
        pytest.param(2, "reverse_kl", marks=pytest.mark.slow),
        pytest.param(2, "forward_kl", marks=pytest.mark.slow),
    ],
)
def test_several_students(students, divergence):
    """Each as if it were alone; rows of weight 0 may hold NaN."""
    where, N = geometry([18, 3]), 21
    q, k, _, qt, kt = inputs(N)
    q, k = (torch.stack([(1 + n / 4) * x.roll(n, 0) for n in range(students)]) for x in (q, k))
    keep = signed_weights(N) != 0
    lse = torch.stack([triton_impl.logsumexp(*x, where, SCALE) for x in zip(q, k, strict=True)])
    teacher = Layer(qt, kt, triton_impl.logsumexp(qt, kt, where, SCALE_T), SCALE_T)
    settings = teacher, keep, divergence, 0.3, where
    want = [row_loss(*x, qt, kt, where, divergence, 0.3) for x in zip(q, k, strict=True)]
    q[:, ~keep], qt[~keep] = math.nan, math.nan
    value, statistic = triton_impl.statistics(Layer(q, k, lse, SCALE), *settings)
    assert value.shape == (students, N)
    torch.testing.assert_close(value, torch.stack(want) * keep, rtol=1e-10, atol=1e-12)
    assert float((value[0] - value[-1]).abs().max()) > 1e-2
    for n in range(students):
        alone = statistics(Layer(q[n], k[n], lse[n], SCALE), *settings)
        assert torch.equal(value[n], alone[0]) and torch.equal(statistic[n], alone[1])


@interpreted
def test_two_runs_are_equal():
    where, N = geometry([17, 3]), 20
    q, k, v, qt, kt = inputs(N, dtype=torch.float32)
    weight, d_out = signed_weights(N, torch.float32), normal(*q.shape, seed=7).float()
    runs = []
    for _ in range(2):
        value, lse, alignment = aligned(q, k, qt, kt, where, "jsd", 0.5, weight)
        out, _ = triton_impl.forward(q, k, v, where, SCALE)
        got = triton_impl.backward(Layer(q, k, lse, SCALE), where, Plain(v, out, d_out), alignment)
        runs.append((value, lse, alignment.statistic, out, *got))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
