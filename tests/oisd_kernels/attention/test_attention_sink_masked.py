"""Sinks of -inf: a key of probability 0, in every implementation, by hand and in float64.

`OISD_ATTENTION_IMPL=triton TRITON_INTERPRET=1` runs it on the Triton kernels.
"""

import math
import os

import pytest
import torch

from oisd_kernels import attention_divergence
from tests.interpreter import outside, passes_in_the_interpreter
from tests.oisd_kernels.test_reference import leaf, normal

IMPL = os.environ.get("OISD_ATTENTION_IMPL", "torch")
T, H = 6, 2
NONE = -math.inf
STUDENT, TEACHER = [0.4, -0.3], [-0.2, 0.6]  # where they have a sink
INDEX = torch.arange(T).expand(1, T, T)
INDEX = torch.where(INDEX <= torch.arange(T)[:, None], INDEX, -1)  # all keys that a query sees

each_call = pytest.mark.parametrize(
    ("impl", "key_index"),
    [("reference", None), (IMPL, None), (IMPL, INDEX)],
    ids=["reference", "all-keys", "sampled"],
)


@outside
def test_the_interpreter_passes():
    passes_in_the_interpreter(__file__, "-k", "not reference", OISD_ATTENTION_IMPL="triton")


def tensors():
    return [normal(1, T, heads, 8, seed=heads + i) for i, heads in enumerate((H, 1, H, 1))]


def with_sinks(sink, sink_teacher):
    """log P and log T [H, T, T + 1] by hand; -inf for what a query does not see."""
    q, k, qt, kt = tensors()
    hidden = ~torch.ones(T, T, dtype=torch.bool).tril()

    def logs(q, k, sink):
        scores = torch.einsum("thk,jk->htj", q[0], k[0, :, 0]) * 8**-0.5
        own = torch.tensor(sink, dtype=torch.float64)[:, None, None].expand(H, T, 1)
        return torch.cat([scores.masked_fill(hidden, NONE), own], -1).log_softmax(-1)

    return logs(q, k, sink), logs(qt, kt, sink_teacher)


def by_hand(divergence, sink, sink_teacher):
    lq, lp = with_sinks(sink, sink_teacher)
    q, p = lq.exp(), lp.exp()

    def kl(a, la, lb):
        return torch.where(a > 0, a * (la - lb), 0.0)

    mixed = ((p + q) / 2).log()
    terms = {
        "jsd": (kl(p, lp, mixed) + kl(q, lq, mixed)) / 2,
        "forward_kl": kl(p, lp, lq),
        "reverse_kl": kl(q, lq, lp),
    }
    return terms[divergence].sum(-1).mean(0)


def found(divergence, sink, sink_teacher, impl, key_index):
    q, k, *teacher = (x.float() for x in tensors())
    leaves = [leaf(q), leaf(k), leaf(torch.tensor(sink))]
    loss = attention_divergence(
        *leaves[:2], *teacher, sink=leaves[2], sink_teacher=torch.tensor(sink_teacher),
        divergence=divergence, key_index=key_index, impl=impl,
    )  # fmt: skip
    return loss.detach()[0], torch.autograd.grad(loss.sum(), leaves)


@each_call
@pytest.mark.parametrize(
    ("divergence", "sink", "sink_teacher"),
    [
        (divergence, sink, sink_teacher)
        for divergence in ("jsd", "forward_kl", "reverse_kl")
        for sink, sink_teacher in (
            ([NONE, STUDENT[1]], TEACHER),
            (STUDENT, [TEACHER[0], NONE]),
            ([NONE, NONE], [NONE, NONE]),
            ([NONE, STUDENT[1]], [NONE, TEACHER[1]]),
        )
        if not (divergence == "forward_kl" and sink[0] == NONE != sink_teacher[0])
        and not (divergence == "reverse_kl" and sink_teacher[1] == NONE != sink[1])
    ],
)
def test_what_is_finite_is_that_of_a_softmax(divergence, sink, sink_teacher, impl, key_index):
    loss, (dq, dk, dsink) = found(divergence, sink, sink_teacher, impl, key_index)
    wanted = by_hand(divergence, sink, sink_teacher)
    assert wanted.min() >= 0 and wanted.max() > 0.02
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    assert all(x.isfinite().all() for x in (dq, dk, dsink)) and min(dq.norm(), dk.norm()) > 1e-2
    for gradient, score in zip(dsink.tolist(), sink, strict=True):
        assert gradient == 0 if score == NONE else abs(gradient) > 1e-3


@each_call
def test_a_forward_kl_of_a_key_that_the_student_lacks(impl, key_index):
    """Infinite: as large as floats go, with a gradient of q - p."""
    sink = [NONE, STUDENT[1]]
    loss, (dq, dk, dsink) = found("forward_kl", sink, TEACHER, impl, key_index)
    lq, lp = with_sinks(sink, TEACHER)
    q, p = lq.exp(), lp.exp()
    lowest = torch.finfo(torch.float32).min
    torch.testing.assert_close(loss.double(), p[0, :, -1] * -lowest / H, rtol=1e-4, atol=0.0)
    assert loss.min() > 1e36 and dq.isfinite().all() and dk.isfinite().all()
    assert dq.norm() > 0.1 and dk.norm() > 0.1
    wanted = (q - p)[..., -1].sum(1) / H
    assert wanted.abs().min() > 0.1
    torch.testing.assert_close(dsink.double(), wanted, rtol=1e-5, atol=1e-6)


@each_call
def test_a_reverse_kl_of_a_key_that_the_teacher_lacks(impl, key_index):
    loss, (dq, _, dsink) = found("reverse_kl", STUDENT, [NONE, TEACHER[1]], impl, key_index)
    share = with_sinks(STUDENT, [NONE, TEACHER[1]])[0].exp()[0, :, -1]
    lowest = torch.finfo(torch.float32).min
    torch.testing.assert_close(loss.double(), share * -lowest / H, rtol=1e-4, atol=0.0)
    assert loss.min() > 1e36 and dsink[0] > 1e36 and 1e-3 < dsink[1].abs() < 10
    dq = dq.double().abs()
    assert dq[:, :, 0].amax() > 1e36 and 1e-2 < dq[:, :, 1].amax() < 10
