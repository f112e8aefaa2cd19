"""What rows, keys and sequences may hold that nothing should read: the Triton attention kernels.

In the interpreter, whose tiles are 16 x 16; see `test_attention_interpreter`.
"""

import math

import pytest
import torch

from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.test_reference import assert_loss_close, normal

pytest.importorskip("triton")

from oisd_kernels.attention import triton_impl
from oisd_kernels.attention.spec import Alignment, Layer, Plain
from tests.oisd_kernels.attention.attention_truth import (
    SCALE,
    SCALE_T,
    Truth,
    aligned,
    check_alignment,
    geometry,
    inputs,
    statistics,
)


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_the_long_cases():
    passes_in_the_interpreter(__file__, "-m", "slow", timeout=1400)


@interpreted
@pytest.mark.parametrize("both", [False, True], ids=["alone", "and-plain"])
def test_rows_of_weight_0_may_hold_nan(depth, both):
    where, N = geometry([18, 16]), 34
    q, k, v, qt, kt = inputs(N)
    weight = torch.zeros(N, dtype=torch.float64)
    weight[3:10], weight[20] = 1.5, -2.0
    weight[5] = 0
    dead = weight == 0
    unseen = torch.zeros(N, dtype=torch.bool)
    unseen[10:18] = unseen[21:] = True  # by causality: no kept row comes later
    truth = Truth(q, k, v, qt, kt, where)
    loss, gradient = truth.alignment(weight, "jsd", 0.5)
    lse = triton_impl.logsumexp(q, k, where, SCALE)
    qt[dead], kt[unseen] = math.nan, math.nan
    d_out, d_lse = normal(*q.shape, seed=7), normal(*lse.shape, seed=8)
    plain = None
    if both:
        out = truth.out.detach()
        plain = Plain(v, out, d_out, d_lse)
        alone = truth.plain(d_out, d_lse)[:2]
        gradient = [a + b for a, b in zip(alone, gradient, strict=True)]
    else:
        q[dead], k[unseen], lse[:, dead] = math.nan, math.nan, math.nan
    lse_t = triton_impl.logsumexp(qt, kt, where, SCALE_T)
    assert lse_t[:, dead].isnan().all() and not lse_t[:, ~dead].isnan().any()
    teacher = Layer(qt, kt, lse_t, SCALE_T)
    student = Layer(q, k, lse, SCALE)
    value, statistic = statistics(student, teacher, ~dead, "jsd", 0.5, where)
    assert_loss_close(weight * value, loss, 1e-12)
    alignment = Alignment(teacher, weight / 2, statistic, "jsd", 0.5)
    got = triton_impl.backward(student, where, plain, alignment)
    check_alignment(got[:2], gradient, 1e-12)


@interpreted
@pytest.mark.parametrize(
    "depth, causal, divergence",
    [
        (None, True, "jsd"),
        (None, False, "forward_kl"),
        (16, True, "forward_kl"),
        (16, False, "jsd"),
        pytest.param(None, True, "forward_kl", marks=pytest.mark.slow),
        pytest.param(None, False, "jsd", marks=pytest.mark.slow),
        pytest.param(16, True, "jsd", marks=pytest.mark.slow),
        pytest.param(16, False, "forward_kl", marks=pytest.mark.slow),
    ],
    indirect=["depth"],
    ids=lambda x: {None: "whole", 16: "in-parts", True: "causal", False: "full"}.get(x, x),
)
def test_keys_between_the_windows_of_kept_rows_may_hold_nan(causal, divergence, depth):
    """Rows 2, 9 and 14 share a tile and leave keys 5 and 6 between their windows unseen."""
    where, N = geometry([20, 18], (causal, 3, None)), 38
    q, k, _, qt, kt = inputs(N)
    weight = torch.zeros(N, dtype=torch.float64)
    weight[[2, 9, 14, 30]] = torch.tensor([1.5, -2.0, 1.0, 0.5], dtype=torch.float64)
    ahead = torch.arange(N) - torch.arange(N)[:, None]
    visible = ((ahead <= 0) | (not causal)) & (ahead.abs() < 3)
    unseen = ~visible[weight != 0].any(0)
    assert unseen[5:7].all()
    _, gradient = Truth(q, k, k, qt, kt, where).alignment(weight, divergence, 0.3)
    for x in (k, kt):
        x[unseen] = math.nan
    for x in (q, qt):
        x[weight == 0] = math.nan
    _, lse, alignment = aligned(q, k, qt, kt, where, divergence, 0.3, weight)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    check_alignment(got[:2], gradient, 1e-12)


@interpreted
def test_nan_and_infinity_stay_in_their_sequence():
    lengths = [18, 5, 17]
    where, N = geometry(lengths), 40
    q, k, v, qt, kt = inputs(N)
    k[17, 0, 0], qt[30, 0, 0] = math.nan, math.inf
    weight = torch.ones(N, dtype=torch.float64)
    value, lse, alignment = aligned(q, k, qt, kt, where, "jsd", 0.5, weight)
    out, _ = triton_impl.forward(q, k, v, where, SCALE)
    d_out = normal(*out.shape, seed=7)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, Plain(v, out, d_out), alignment)
    assert value[17].isnan() and value[30].isnan() and not value[:17].isnan().any()
    clean = slice(18, 23)
    middle = geometry(lengths[1:2])
    alone = [x[clean] for x in (q, k, v, qt, kt)]
    truth = Truth(*alone, middle)
    _, gradient = truth.alignment(weight[clean], "jsd", 0.5)
    plain = truth.plain(d_out[clean], torch.zeros(2, 5))
    check_alignment(
        [x[clean] for x in got],
        [plain[0] + gradient[0], plain[1] + gradient[1], plain[2]],
        1e-12,
    )
    assert got[0][17].isnan().any() and got[0][30].isnan().any()


@interpreted
def test_all_rows_of_weight_0():
    where, N = geometry([17, 2]), 19
    q, k, _, qt, kt = inputs(N)
    weight = torch.zeros(N, dtype=torch.float64)
    value, lse, alignment = aligned(q, k, qt, kt, where, "jsd", 0.5, weight)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, None, alignment)
    for x in (value, alignment.statistic, *got[:2]):
        assert torch.equal(x, torch.zeros_like(x))


@interpreted
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no-sequence", "empty-sequences"])
def test_no_tokens(lengths):
    where = geometry(lengths)
    q, k, v, qt, kt = inputs(0)
    weight = torch.zeros(0, dtype=torch.float64)
    value, lse, alignment = aligned(q, k, qt, kt, where, "jsd", 0.5, weight)
    out, _ = triton_impl.forward(q, k, v, where, SCALE)
    got = triton_impl.backward(Layer(q, k, lse, SCALE), where, Plain(v, out, out), alignment)
    assert value.shape == (0,) and lse.shape == (2, 0) and out.shape == q.shape
    assert [x.shape for x in got] == [q.shape, k.shape, v.shape]
