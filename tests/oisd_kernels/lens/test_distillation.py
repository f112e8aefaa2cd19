"""`distillation_divergence`: a student and a teacher with a head each.

The oracle is that of test_reference.py with two heads: losses from probabilities, gradients from
the closed forms, in float64.
"""

import re

import pytest
import torch
from torch.autograd import gradcheck

from oisd_kernels import distillation_divergence, logit_lens_divergence
from oisd_kernels.lens.chunked.record import HeadCall
from tests.interpreter import outside, passes_in_the_interpreter
from tests.oisd_kernels.lens.test_chunked import budget, compare, matmuls, peak_memory
from tests.oisd_kernels.test_reference import (
    DIVERGENCES,
    GRADIENT_BOUND,
    LOSS_BOUND,
    assert_gradient_close,
    assert_loss_close,
    closed_form_gradient,
    direct_divergence,
    leaf,
    normal,
)

IMPLS = pytest.mark.parametrize("impl", ["reference", "chunked"])
CHUNKED = {"impl": "chunked"}

# N = 9, D = 6, E = 10, V = 13: a width each, a prime vocabulary.
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scales": {"logit_scale": 0.6, "teacher_logit_scale": 1.3},
    "one-softcap": {"logit_softcap": 3.0, "teacher_logit_softcap": 3.0},
    "student-softcap": {"logit_softcap": 3.0},
    "teacher-softcap": {"teacher_logit_softcap": 3.0},
    "student-bias": {"bias": normal(13, seed=4)},
    "all": {
        "bias": normal(13, seed=4),
        "teacher_bias": normal(13, seed=5),
        "temperature": 0.7,
        "logit_scale": 0.6,
        "teacher_logit_scale": 1.3,
        "logit_softcap": 3.0,
        "teacher_logit_softcap": 5.0,
    },
}
SHAPES = [(9, 6), (13, 6), (9, 10), (13, 10)]
SIGNED = normal(9, seed=6)
SIGNED[2] = SIGNED[7] = 0


def small_case(dtype=torch.float64):
    hidden, weight, *teacher = (normal(*n, seed=i).to(dtype) for i, n in enumerate(SHAPES))
    return leaf(hidden), leaf(weight), *teacher


def oracle(hidden, weight, teacher_hidden, teacher_weight, *, upstream, divergence, beta, **heads):
    """(loss [N], d_hidden, d_weight, d_bias) of sum(upstream * loss), in float64."""
    temperature = heads.get("temperature", 1.0)

    def scores(rows, head, prefix):
        head_bias = heads.get(f"{prefix}bias")
        raw = rows.detach().double() @ head.detach().double().T
        raw = raw if head_bias is None else raw + head_bias.double()
        scale, cap = heads.get(f"{prefix}logit_scale", 1.0), heads.get(f"{prefix}logit_softcap")
        if cap is None:
            return scale * raw / temperature, torch.full_like(raw, scale / temperature)
        t = torch.tanh(scale * raw / cap)
        return cap * t / temperature, scale * (1 - t * t) / temperature

    (zq, slope), (zp, _) = (
        scores(hidden, weight, ""),
        scores(teacher_hidden, teacher_weight, "teacher_"),
    )
    loss = direct_divergence(zp.softmax(-1), zq.softmax(-1), divergence, beta)
    d = upstream.double()[:, None] * closed_form_gradient(zp, zq, divergence, beta) * slope
    return loss, d @ weight.detach().double(), d.T @ hidden.detach().double(), d.sum(0)


@IMPLS
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_meets_the_bounds(dtype, divergence, beta, heads, impl):
    inputs = small_case(dtype)
    options = {"divergence": divergence, "beta": beta, **HEADS[heads]}
    upstream = normal(9, seed=7)
    want = oracle(*inputs, upstream=upstream, **options)
    wide = torch.promote_types(dtype, torch.float32)
    biases = {name: leaf(x.to(wide)) for name, x in options.items() if name.endswith("bias")}
    options |= biases
    loss = distillation_divergence(*inputs, impl=impl, **options)
    (loss * upstream).sum().backward()
    assert loss.dtype == wide
    assert_loss_close(loss, want[0], LOSS_BOUND[dtype])
    leaves = [*inputs[:2], *[x for name, x in biases.items() if name == "bias"]]
    for x, gradient in zip(leaves, want[1:], strict=False):
        assert x.grad.dtype == x.dtype
        assert_gradient_close(x.grad, gradient, GRADIENT_BOUND[dtype], floor=1e-2)


@pytest.mark.parametrize("rows", [3, 5, 8, 1000], ids="rows{}".format)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("heads", HEADS)
def test_any_chunk_gives_the_numbers_of_the_reference(heads, reduction, rows):
    inputs, results = small_case(), []
    options = {"token_weight": SIGNED, "reduction": reduction, **HEADS[heads]}
    for impl in ("chunked", "reference"):
        loss, entropy = distillation_divergence(
            *inputs, return_entropy=True, impl=impl, max_bytes=budget(rows, 13, 10), **options
        )
        upstream = normal(9, seed=5) if reduction == "none" else -1.7
        grads = torch.autograd.grad((loss * upstream).sum(), inputs[:2])
        assert all(x.norm() > 1e-2 for x in grads)
        assert not entropy.requires_grad
        results.append([loss, entropy, *grads])
    compare(*results)


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_reference_gradcheck(divergence, beta):
    hidden, weight, *teacher = small_case()
    options = HEADS["all"] | {"token_weight": SIGNED, "divergence": divergence, "beta": beta}
    bias = leaf(options.pop("bias"))

    def loss(hidden, weight, bias):
        return distillation_divergence(
            hidden, weight, *teacher, bias=bias, impl="reference", **options
        )

    assert gradcheck(loss, (hidden, weight, bias))


@IMPLS
def test_dropped_rows_cost_nothing_and_pass_nothing_on(impl):
    hidden, weight, teacher, teacher_weight = small_case()
    with torch.no_grad():
        hidden[2], teacher[7] = torch.nan, torch.inf
    loss, entropy = distillation_divergence(
        hidden, weight, teacher, teacher_weight, token_weight=SIGNED, return_entropy=True,
        reduction="sum", impl=impl,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert hidden.grad.norm() > 0.1 and weight.grad.norm() > 0.1
    for x in (entropy[[2, 7]], hidden.grad[[2, 7]]):
        assert torch.count_nonzero(x) == 0


@IMPLS
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows_at_all(reduction, impl):
    hidden, weight, teacher, teacher_weight = small_case()
    zero = torch.zeros(9)
    for rows, token_weight in ((slice(0), None), (slice(9), zero)):
        loss = distillation_divergence(
            hidden[rows], weight, teacher[rows], teacher_weight, token_weight=token_weight,
            reduction=reduction, impl=impl,
        )  # fmt: skip
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert torch.count_nonzero(loss) == 0
        assert all(torch.count_nonzero(x) == 0 for x in grads)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_minute_gradients_survive_float16(reduction):
    """Gradients near 1e-9, lifted by an upstream gradient as a loss scaler's."""
    inputs, lift = small_case(torch.float16), 2.0**24
    token_weight = torch.full((9,), 2.0**-24)
    want = oracle(*inputs, upstream=torch.ones(9), divergence="jsd", beta=0.5)
    loss = distillation_divergence(
        *inputs, token_weight=token_weight, reduction=reduction, **CHUNKED
    )
    (loss * lift).sum().backward()
    assert_gradient_close(inputs[0].grad, want[1], 1e-3, floor=1e-2)
    assert_gradient_close(inputs[1].grad, want[2], 1e-3, floor=1e-2)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_shared_head_is_the_logit_lens(reduction, monkeypatch):
    hidden, weight, *_ = small_case()
    teacher, bias = normal(9, 6, seed=8), leaf(normal(13, seed=4))
    options = {"token_weight": SIGNED, "bias": bias, "reduction": reduction, "logit_softcap": 3.0}
    lens = logit_lens_divergence(hidden, teacher, weight, grad_weight=True, **options)
    options |= {"teacher_bias": bias, "teacher_logit_softcap": 3.0}
    one = distillation_divergence(hidden, weight, teacher, weight, **options)
    two = distillation_divergence(hidden, weight, teacher, weight.detach().clone(), **options)
    leaves = hidden, weight, bias
    results = [
        [loss, *torch.autograd.grad(loss.sum(), leaves, retain_graph=True)]
        for loss in (lens, one, two)
    ]
    assert all(x.norm() > 1e-3 for x in results[0][1:])
    compare(results[0], results[1], rtol=0)
    compare(results[0], results[2])


def test_a_graph_may_be_used_twice_but_not_differentiated_twice():
    inputs = small_case()
    for reduction in ("none", "mean"):
        loss = distillation_divergence(*inputs, reduction=reduction, **CHUNKED).sum()
        first, second = (torch.autograd.grad(loss, inputs[0], retain_graph=True)[0] for _ in "ab")
        assert first.norm() > 1e-2 and torch.equal(first, second)
        with pytest.raises(RuntimeError, match='cannot itself be differentiated.*impl="reference"'):
            torch.autograd.grad(loss, inputs[0], create_graph=True)


def record(**changes) -> HeadCall:
    hidden, weight, teacher, teacher_weight = small_case()
    call = HeadCall(
        hidden[None], teacher, weight.detach(), teacher_weight=teacher_weight, teacher_softcap=3.0,
        factor=SIGNED[None], capacity=4, drop=True, hidden_grad=True, stats=True,
    )  # fmt: skip
    return call._replace(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="hidden"),
        pytest.param({"factor": None, "drop": False, "softcap": 3.0}, id="all-rows"),
        pytest.param({"weight": leaf(normal(13, 6, seed=1)), "hidden_weight_grad": True,
                      "reduce": True, "bias": leaf(normal(13, seed=4))}, id="weight"),
        pytest.param({"weight": leaf(normal(13, 6, seed=1)), "hidden_grad": False,
                      "hidden_later": True}, id="later"),
    ],
)  # fmt: skip
def test_opcheck(changes):
    torch.library.opcheck(torch.ops.oisd_kernels.head_pass.default, tuple(record(**changes)))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_in_one_graph(reduction):
    inputs = small_case()

    def step(*inputs):
        loss = distillation_divergence(
            *inputs, token_weight=SIGNED, reduction=reduction, **HEADS["all"], **CHUNKED
        )
        return loss.square().sum()

    eager, compiled = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs)
    compare([loss], [eager])
    ours, theirs = (torch.autograd.grad(x, inputs[:2]) for x in (loss, eager))
    assert all(x.norm() > 1e-3 for x in theirs)
    compare(ours, theirs)


def test_matmuls_are_counted():
    N, D, V = 24, 8, 40
    hidden, weight = leaf(normal(N, D, seed=0)), leaf(normal(V, D, seed=1))
    teacher, unit = (normal(N, D, seed=2), normal(V, D, seed=3)), N * D * V
    half = torch.ones(N)
    half[::2] = 0

    def run(weight=weight, **options):
        loss = distillation_divergence(hidden, weight, *teacher, **CHUNKED, **options)
        loss.sum().backward()

    def values():
        with torch.no_grad():
            distillation_divergence(hidden, weight, *teacher, **CHUNKED)

    assert matmuls(values, unit) == 2
    assert matmuls(lambda: run(weight.detach()), unit) == 3
    assert matmuls(lambda: run(reduction="sum"), unit) == 4
    assert matmuls(lambda: run(), unit) == 6
    assert matmuls(lambda: run(reduction="sum", token_weight=half), unit) == 2


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "softcap3"])
def test_workspace_keeps_to_its_budget(softcap):
    N, D, V, max_bytes = 300, 16, 20_011, 4 << 20
    inputs = [normal(*n, seed=i).float() for i, n in enumerate([(N, D), (V, D)] * 2)]
    inputs[0].requires_grad_()
    peak = peak_memory(
        lambda: distillation_divergence(
            *inputs, logit_softcap=softcap, max_bytes=max_bytes, **CHUNKED
        )
    )
    outputs = N * (D + 8) * 4
    index = 6 * N * 8
    assert max_bytes / 2 < peak <= max_bytes + outputs + index


X = torch.zeros
GIVEN = {"hidden": X(4, 8), "weight": X(11, 8), "teacher_hidden": X(4, 6), "bias": X(11)}
GIVEN |= {"teacher_weight": X(11, 6), "teacher_bias": X(11), "token_weight": X(4)}


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("hidden", X(1, 4, 8), "[1, 4, 8]"),
        ("hidden", None, "NoneType"),
        ("weight", X(11, 6), "[11, 6]"),
        ("weight", X(0, 8), "[0, 8]"),
        ("bias", X(8), "[8]"),
        ("teacher_hidden", X(5, 6), "[5, 6]"),
        ("teacher_hidden", X(4, 6, device="meta"), "meta"),
        ("teacher_weight", X(11, 8), "[11, 8]"),
        ("teacher_weight", X(12, 6), "[12, 6]"),
        ("teacher_weight", X(11, 6, dtype=torch.int8), "torch.int8"),
        ("teacher_bias", X(6), "[6]"),
        ("token_weight", X(2, 4), "[2, 4]"),
        ("token_weight", X(4, dtype=torch.bool), "torch.bool"),
        ("divergence", "kl", "'kl'"),
        ("beta", 1.0, "1.0"),
        ("temperature", 0.0, "0.0"),
        ("logit_scale", 0.0, "0.0"),
        ("teacher_logit_scale", -1.0, "-1.0"),
        ("logit_softcap", 0, "0"),
        ("teacher_logit_softcap", "3", "'3'"),
        ("reduction", "batchmean", "'batchmean'"),
        ("return_entropy", 1, "1"),
        ("max_bytes", 100, "100"),
        ("impl", "tiled", "'tiled'"),
    ],
)
def test_rejects(name, value, got):
    pattern = rf"^distillation_divergence: {name} must .*, got .*{re.escape(got)}"
    with pytest.raises(ValueError, match=pattern):
        distillation_divergence(**{**GIVEN, name: value})


# The Triton row kernels, in a process of their own: the interpreter is chosen at triton's import.


CHUNKS = "(any_chunk and rows5 and not mean)"
BOUNDS = "(meets_the_bounds and chunked and float32 and (jsd-0.1 or reverse))"


@outside
def test_the_interpreter_passes():
    """All heads with a divergence and a reduction, and all their options with the others."""
    again = "(sum or reverse) and not all- and not plain-"
    passes_in_the_interpreter(
        __file__, "-k", f"survive_float16 or ({CHUNKS} or {BOUNDS}) and not ({again})"
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_all():
    passes_in_the_interpreter(
        __file__, "-k", f"survive_float16 or {CHUNKS} or {BOUNDS}", timeout=1400
    )
