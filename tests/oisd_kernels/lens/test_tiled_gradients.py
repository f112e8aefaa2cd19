"""Gradients of impl="tiled" in the Triton interpreter, against float64.

Without TRITON_INTERPRET=1 the first test runs this file again with it, as in test_tiled.py.
"""

import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.lens.test_tiled import DIVERGENCES
from tests.oisd_kernels.test_reference import (
    assert_gradient_close,
    assert_loss_close,
    leaf,
    lens_case,
    lens_truth,
    normal,
    relative_error,
)

pytest.importorskip("triton")

from oisd_kernels import linear_logprob, logit_lens_divergence
from oisd_kernels.lens.tiled import gradient, op, tiles
from oisd_kernels.lens.tiled.gradient import (
    Backward,
    Product,
)
from oisd_kernels.lens.tiled.tiles import Tile

TILED = {"impl": "tiled"}
BF16_SKIP = gradient.SKIP[torch.bfloat16]


@outside
def test_in_the_interpreter():
    passes_in_the_interpreter(__file__)


@pytest.fixture
def large_tiles(monkeypatch):
    """Fewer steps of the interpreter."""
    monkeypatch.setattr(tiles, "INTERPRETED", Tile(16, 128, 64, 4, 1))
    monkeypatch.setattr(gradient, "INTERPRETED", Product(64, 128, 4, 1))


def compare(ours, theirs, rtol=1e-11):
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 1e-3
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12, check_dtype=False)


def small_case(S=3, N=7, V=37, D=11):
    """V prime, signed weights per layer; rows of weight 0 hold NaN."""
    hidden, teacher = normal(S, N, D, seed=0), normal(N, D, seed=1)
    weight, bias = leaf(normal(V, D, seed=2)), leaf(normal(V, seed=3))
    token_weight = normal(S, N, seed=4)
    token_weight[0, 2] = token_weight[1:, 5 % N] = token_weight[:, 3] = 0
    hidden[token_weight == 0] = math.nan
    return leaf(hidden), teacher, weight, bias, token_weight


# The lens


@interpreted
@pytest.mark.parametrize(
    "reduction, temperature, softcap",
    [("none", 0.5, None), ("mean", 2.0, 3.0)],
    ids=["none-T0.5-uncapped", "mean-T2-softcap3"],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_reference(divergence, reduction, temperature, softcap):
    hidden, teacher, weight, bias, token_weight = small_case()
    results = []
    for impl in ("tiled", "reference"):
        loss = logit_lens_divergence(
            hidden, teacher, weight, bias=bias, token_weight=token_weight, divergence=divergence,
            beta=0.3, temperature=temperature, logit_softcap=softcap, reduction=reduction,
            grad_weight=True, impl=impl,
        )  # fmt: skip
        upstream = normal(3, 7, seed=5) if reduction == "none" else -1.7
        gradients = torch.autograd.grad((loss * upstream).sum(), (hidden, weight, bias))
        results.append([loss.detach(), *gradients])
    compare(*results)
    assert (results[0][1][token_weight == 0] == 0).all()


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_lens_gradcheck(divergence):
    """To hidden alone: a finite difference of the weight would move the teacher as well."""
    hidden, teacher, weight = normal(1, 1, 2, seed=0), normal(1, 2, seed=1), normal(5, 2, seed=2)
    options = {"divergence": divergence, "beta": 0.7, "temperature": 0.7, "logit_softcap": 3.0}
    options |= {"bias": normal(5, seed=3), "token_weight": torch.tensor([-2.0])}
    assert gradcheck(
        lambda h: logit_lens_divergence(h, teacher, weight, **options, **TILED), leaf(hidden)
    )


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "case", ["ordinary", "near", "std20", "saturated", "disjoint", "one-hot-teacher", "underflow"]
)
def test_lens_meets_the_bounds(case, divergence, large_tiles):
    hidden, teacher, weight = (x.float() for x in lens_case(case))
    hidden, teacher, weight = leaf(hidden[:, :3]), teacher[:3], leaf(weight)
    row_weight, upstream = torch.tensor([1.5, 0.0, -2.0]), normal(2, 3, seed=6).float()
    truth = lens_truth(
        hidden, teacher, weight, row_weight=row_weight, upstream=upstream, divergence=divergence
    )
    loss = logit_lens_divergence(
        hidden, teacher, weight, token_weight=row_weight, divergence=divergence, grad_weight=True,
        **TILED,
    )  # fmt: skip
    assert_loss_close(loss, truth.loss, 1e-5)
    (loss * upstream).sum().backward()
    assert_gradient_close(hidden.grad, truth.d_hidden, 1e-4)
    assert_gradient_close(weight.grad, truth.d_weight, 1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["ordinary", "saturated"])
def test_half_precision(case, dtype, large_tiles):
    """Small gradients in half precision, whose accumulators are not the gradients themselves."""
    hidden, teacher, weight = (x.to(dtype) for x in lens_case(case))
    hidden, teacher, weight = leaf(hidden[:, :3]), teacher[:3], leaf(weight)
    truth = lens_truth(hidden, teacher, weight)
    loss = logit_lens_divergence(hidden, teacher, weight, grad_weight=True, **TILED)
    loss.sum().backward()
    assert_loss_close(loss, truth.loss, 1e-4)
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert_gradient_close(hidden.grad, truth.d_hidden, 5e-3)
    assert_gradient_close(weight.grad, truth.d_weight, 5e-3)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_have_no_gradient(divergence, large_tiles):
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    hidden, teacher = hidden[0, :6], teacher[:6]
    hidden[:3] = teacher[:3]
    hidden = leaf(hidden)
    logit_lens_divergence(hidden, teacher, weight, divergence=divergence, **TILED).sum().backward()
    truth = lens_truth(hidden, teacher, weight, divergence=divergence)
    assert_gradient_close(hidden.grad, truth.d_hidden, 1e-4)
    assert hidden.grad[:3].norm() < 1e-5 * hidden.grad[3:].norm()


@interpreted
def test_tied_embedding():
    """The weight's gradient through the states, those of the teacher excepted, and the head."""
    ids, results = torch.tensor([3, 0, 12, 3]), []
    mix = normal(2, 6, 6, seed=1)
    for impl in ("tiled", "reference"):
        weight = leaf(normal(13, 6, seed=0))
        states = torch.tanh(torch.stack([weight[ids] @ m for m in mix]))
        loss = logit_lens_divergence(
            states[0], states[1], weight, reduction="sum", grad_weight=True, impl=impl
        )
        results.append(torch.autograd.grad(loss, weight))
    compare(*results)


@interpreted
@pytest.mark.parametrize("tokens", [1, 33])
def test_odd_numbers_of_tokens(tokens):
    hidden, teacher, weight = (
        normal(tokens, 5, seed=0),
        normal(tokens, 5, seed=1),
        normal(33, 5, seed=2),
    )
    hidden, weight = leaf(hidden), leaf(weight)
    results = []
    for impl in ("tiled", "reference"):
        loss = logit_lens_divergence(hidden, teacher, weight, grad_weight=True, impl=impl)
        results.append(torch.autograd.grad((loss * normal(tokens, seed=3)).sum(), (hidden, weight)))
    compare(*results)


@interpreted
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_to_do(divergence):
    options = {"divergence": divergence, "reduction": "mean", "grad_weight": True, **TILED}
    for tokens in (0, 3):
        hidden, weight = leaf(normal(2, tokens, 4, seed=0)), leaf(normal(7, 4, seed=1))
        loss = logit_lens_divergence(
            hidden, torch.zeros(tokens, 4), weight, token_weight=torch.zeros(tokens), **options
        )
        loss.backward()
        assert hidden.grad.shape == hidden.shape and not hidden.grad.any()
        assert not weight.grad.any()


@interpreted
def test_nan_stays_in_its_row(large_tiles):
    hidden, teacher, weight = lens_case("ordinary")
    hidden, teacher = hidden[:, :4], teacher[:4]
    clean, dirty = leaf(hidden), hidden.clone()
    dirty[0, 1, 0], dirty[1, 2, 5] = math.nan, math.inf
    dirty = leaf(dirty)
    for x in (clean, dirty):
        logit_lens_divergence(x, teacher, weight, **TILED).sum().backward()
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, 2] = True
    assert torch.equal(dirty.grad.isnan().any(-1), bad)
    assert torch.equal(dirty.grad[~bad], clean.grad[~bad]) and clean.grad.norm() > 1e-3


@interpreted
@pytest.mark.parametrize("apart", [False, True], ids=["slabs-outside", "slices-outside"])
def test_slabs_and_slices_change_nothing(apart, monkeypatch):
    """A float32 weight beside float64 states takes the second order of work."""
    monkeypatch.setattr(gradient, "TILES_OF_A_SLICE", 2)
    monkeypatch.setattr(gradient, "ROWS_OF_A_SLAB", 20)
    hidden, teacher, weight, bias, token_weight = small_case(S=2, N=23, V=75, D=6)
    if apart:
        weight = leaf(weight.float())
    plans = []
    whole_plan = Backward.plan
    monkeypatch.setattr(Backward, "plan", lambda *a: plans.append(whole_plan(*a)) or plans[-1])
    results = []
    for impl in ("tiled", "reference"):
        loss = logit_lens_divergence(
            hidden, teacher, weight, bias=bias, token_weight=token_weight, grad_weight=True,
            impl=impl, max_bytes=30_000,
        )  # fmt: skip
        results.append(torch.autograd.grad(loss.sum(), (hidden, weight, bias)))
    assert len(plans) == 1 + apart
    assert all(p.tokens < 23 and p.tiles < 3 and p.bytes <= 30_000 for p in plans)
    compare(*results, rtol=1e-6 if apart else 1e-11)


@interpreted
def test_a_graph_may_be_used_twice_but_not_differentiated_twice():
    hidden, teacher, weight, _, token_weight = small_case()
    loss = logit_lens_divergence(
        hidden, teacher, weight, token_weight=token_weight, reduction="sum", **TILED
    )
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.norm() > 1e-3
    with pytest.raises(RuntimeError, match='cannot itself be differentiated.*impl="reference"'):
        torch.autograd.grad(loss, hidden, create_graph=True)


@interpreted
def test_no_gradient_unless_wanted():
    hidden, teacher, weight, _, _ = small_case()
    loss = logit_lens_divergence(hidden.detach(), teacher, weight, **TILED)
    assert not loss.requires_grad
    with torch.no_grad():
        assert not logit_lens_divergence(hidden, teacher, weight, **TILED).requires_grad


@interpreted
def test_a_budget_below_one_tile_is_refused():
    hidden, teacher, weight, _, _ = small_case()
    loss = logit_lens_divergence(hidden, teacher, weight, max_bytes=1200, **TILED)
    with pytest.raises(
        ValueError, match="logit_lens_divergence: max_bytes must be at least .* for"
    ):
        loss.sum().backward()


# What is left out


class Live:
    """Tiles that went into the product for hidden, and tiles that there were."""

    def __init__(self, monkeypatch):
        self.live = self.all = 0
        run = Backward._to_hidden

        def counted(backward, slab, scratch, first, tiles, sums):
            run(backward, slab, scratch, first, tiles, sums)
            blocks = -(-slab.factor.numel() // backward.tile.n)
            self.live += sum(x.bit_count() for x in scratch.live[:blocks].tolist())
            self.all += blocks * tiles

        monkeypatch.setattr(Backward, "_to_hidden", counted)


@interpreted
@pytest.mark.parametrize("skip", [BF16_SKIP, 2.0**-5], ids=["bf16", "coarse"])
def test_small_tiles_are_left_out_within_the_bound(skip, monkeypatch):
    """A fifth of the tokens has nearly all of the gradient; the rest of them is next to nothing."""
    monkeypatch.setitem(gradient.SKIP, torch.float64, skip)
    live = Live(monkeypatch)
    V, D = 640, 8
    hidden, weight = leaf(normal(5, D, seed=0)), leaf(normal(V, D, seed=1))
    teacher, bias = normal(5, D, seed=2), torch.zeros(V).double()
    bias[128:] = -18 if skip == BF16_SKIP else -8
    loss = logit_lens_divergence(hidden, teacher, weight, bias=bias, grad_weight=True, **TILED)
    got = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert live.live == 4 and live.all == 20
    truth = lens_truth(hidden, teacher, weight, bias=bias)
    logits = [(x.detach() @ weight.detach().T + bias) for x in (hidden, teacher)]
    logits[0].requires_grad_()
    lens = logit_lens_divergence(*logits, torch.eye(V).double(), impl="reference")
    d_logits = torch.autograd.grad(lens.sum(), logits[0])[0]
    bound = skip * d_logits.abs().sum(-1) * weight.detach().norm(dim=-1).max()
    error = (got[0] - truth.d_hidden).norm(dim=-1)
    assert (error > 1e-12).all() and (error <= bound).all()
    assert (bound < 0.1 * truth.d_hidden.norm(dim=-1)).all() or skip != BF16_SKIP
    # The rows of the tokens that were left out are all there in the weight's gradient.
    assert truth.d_weight[128:].norm() > 0
    assert relative_error(got[1][128:], truth.d_weight[128:]) < 1e-9


@interpreted
def test_the_saturated_regime_is_not_left_out(monkeypatch):
    """Half of a row's gradient is spread evenly: each entry is far below any threshold on entries,
    absolute or relative to the row's largest, and together they are as much as all the rest."""
    monkeypatch.setitem(gradient.SKIP, torch.float32, BF16_SKIP)
    monkeypatch.setattr(tiles, "INTERPRETED", Tile(16, 512, 16, 4, 1))
    monkeypatch.setattr(gradient, "INTERPRETED", Product(16, 512, 4, 1))
    live = Live(monkeypatch)
    V, D, N = 8_009, 4, 2
    weight = torch.cat([0.01 * normal(V, D - 1, seed=0), torch.ones(V, 1).double()], 1)
    weight[7, 0] = 30.0
    hidden, teacher = torch.zeros(N, D).double(), torch.zeros(N, D).double()
    hidden[:, 1], teacher[:, 0] = 0.1, 1.0
    hidden, teacher, weight = leaf(hidden.float()), teacher.float(), weight.float()
    truth = lens_truth(hidden, teacher, weight, divergence="jsd")
    p, q = ((x.detach().double() @ weight.double().T).softmax(-1) for x in (teacher, hidden))
    s = (1 + p / q).log()
    d_logits = -q * (s - (q * s).sum(-1, keepdim=True)) / 2
    assert relative_error(d_logits @ weight.double(), truth.d_hidden) < 1e-9
    for threshold in (BF16_SKIP, BF16_SKIP * d_logits.abs().amax(-1, keepdim=True)):
        kept = d_logits.where(d_logits.abs() > threshold, 0)
        # The last feature is the same for all tokens, whose gradients add up to 0.
        lost = (kept @ weight.double() - truth.d_hidden)[:, -1].abs().amin()
        assert lost > 1e-4
    loss = logit_lens_divergence(hidden, teacher, weight, **TILED)
    loss.sum().backward()
    assert live.live == live.all == -(-V // 512)
    assert_gradient_close(hidden.grad, truth.d_hidden, 1e-4)
    assert hidden.grad[:, -1].abs().max() < 1e-7


# The log-probability


@interpreted
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "softcap3"])
@pytest.mark.parametrize("temperature", [0.5, 2.0], ids=lambda t: f"T{t}")
def test_logprob_matches_the_reference(temperature, softcap):
    hidden, weight, bias = (
        leaf(normal(*n, seed=i)) for i, n in enumerate([(19, 6), (37, 6), (37,)])
    )
    labels, results = torch.arange(18, 37), []
    for impl in ("tiled", "reference"):
        out = linear_logprob(
            hidden, weight, labels, bias=bias, temperature=temperature, logit_softcap=softcap,
            impl=impl,
        )  # fmt: skip
        assert not out.entropy.requires_grad and not out.logsumexp.requires_grad
        gradients = torch.autograd.grad(
            (out.logprob * normal(19, seed=4)).sum(), (hidden, weight, bias)
        )
        results.append([*(x.detach() for x in out), *gradients])
    compare(*results)


@interpreted
def test_logprob_gradcheck():
    hidden, weight, bias = (leaf(normal(*n, seed=i)) for i, n in enumerate([(1, 2), (5, 2), (5,)]))
    labels = torch.tensor([4])
    options = {"temperature": 0.7, "logit_softcap": 3.0, **TILED}
    assert gradcheck(
        lambda h, w, b: linear_logprob(h, w, labels, bias=b, **options).logprob,
        (hidden, weight, bias),
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_logprob_in_single_and_half_precision(spread, dtype, large_tiles):
    hidden, weight = (
        normal(5, 16, seed=0).to(dtype),
        (spread / 4 * normal(211, 16, seed=1)).to(dtype),
    )
    hidden, weight, labels = leaf(hidden), leaf(weight), torch.tensor([0, 210, 3, 31, 32])
    out = linear_logprob(hidden, weight, labels, **TILED)
    exact = leaf(hidden.double()), leaf(weight.double())
    truth = linear_logprob(*exact, labels, impl="reference")
    for got, want in zip(out, truth, strict=True):
        assert got.dtype == torch.float32
        assert_loss_close(got, want, 1e-5)
    want = torch.autograd.grad(truth.logprob.sum(), exact)
    for got, exact in zip(
        torch.autograd.grad(out.logprob.sum(), (hidden, weight)), want, strict=True
    ):
        assert got.dtype == dtype
        assert_gradient_close(got, exact, 1e-4 if dtype == torch.float32 else 5e-3)


@interpreted
def test_rows_without_upstream_gradient_are_not_touched():
    hidden, weight = normal(5, 6, seed=0), leaf(normal(13, 6, seed=1))
    upstream, labels = torch.tensor([1.0, 0.0, -2.0, 0.0, 3.0]).double(), torch.arange(5)
    rows, dirty = upstream != 0, hidden.clone()
    dirty[~rows] = math.nan
    dirty = leaf(dirty)
    out = linear_logprob(dirty, weight, labels, **TILED)
    assert torch.equal(out.logprob.isnan(), ~rows)
    out.logprob.backward(upstream)
    assert not dirty.grad[~rows].any()
    few = leaf(hidden[rows])
    logprob = linear_logprob(few, weight, labels[rows], impl="reference").logprob
    want = torch.autograd.grad(logprob, (few, weight), upstream[rows])
    compare((dirty.grad[rows], weight.grad), want)


@interpreted
def test_no_logprob():
    hidden, weight = leaf(normal(0, 6, seed=0)), leaf(normal(13, 6, seed=1))
    out = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), **TILED)
    out.logprob.sum().backward()
    assert out.entropy.shape == (0,) and hidden.grad.shape == (0, 6) and not weight.grad.any()


# torch.library, torch.compile


@interpreted
def test_opcheck_of_the_lens():
    hidden, teacher, weight, bias, token_weight = small_case(S=2, N=4, V=7, D=3)
    call = op.LensCall(
        hidden, teacher, weight, bias, token_weight, "jsd", 0.5, 1.0, None, None, True, True
    )
    torch.library.opcheck(torch.ops.oisd_kernels.tiled_lens.default, tuple(call))


@interpreted
def test_opcheck_of_the_logprob():
    hidden, weight = leaf(normal(3, 6, seed=0)), leaf(normal(13, 6, seed=1))
    labels, bias = torch.arange(3), leaf(normal(13, seed=2))
    call = op.LogprobCall(hidden, weight, bias, labels, 1.0, 2.0, None)
    torch.library.opcheck(torch.ops.oisd_kernels.tiled_logprob.default, tuple(call))


@interpreted
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_in_one_graph(reduction):
    hidden, teacher, weight, bias, token_weight = small_case(S=2, N=4, V=7, D=3)
    labels = torch.arange(4)

    def step(hidden, weight, bias):
        loss, stats = logit_lens_divergence(
            hidden, teacher, weight, bias=bias, token_weight=token_weight, reduction=reduction,
            grad_weight=True, return_stats=True, **TILED,
        )  # fmt: skip
        logprob = linear_logprob(teacher, weight, labels, bias=bias, **TILED).logprob
        return loss.square().sum() + logprob.sum() + stats.divergence.sum()

    inputs = hidden, weight, bias
    eager, compiled = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs)
    compare([loss.detach()], [eager.detach()])
    compare(torch.autograd.grad(loss, inputs), torch.autograd.grad(eager, inputs))
