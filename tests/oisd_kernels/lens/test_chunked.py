"""impl="chunked": what the bounds of test_reference.py do not see.

Chunks of any size give the same numbers, the matmuls and the workspace are what is promised, and
the op behaves under torch.compile, opcheck and a second use of the graph.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from oisd_kernels import PolicyTerms, linear_logprob, logit_lens_divergence, policy_head
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.record import HeadCall
from oisd_kernels.lens.chunked.workspace import release
from oisd_kernels.lens.policy_loss import policy_loss, policy_slope
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

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))


def budget(rows: int, vocabulary: int, width: int, itemsize: int = 8) -> int:
    """Workspace on a CPU that holds so many rows of logits."""
    row = (chunks.padded(vocabulary) + 2 * width) * itemsize
    tile = min(rows, chunks.TILE // vocabulary)
    return rows * row + tile * chunks.SCRATCH_ROWS * vocabulary * itemsize


def small_case():
    """S = 3, N = 11, V = 13 (a prime), with signed weights per layer and dropped rows."""
    hidden, teacher = leaf(normal(3, 11, 6, seed=0)), normal(11, 6, seed=1)
    weight, bias = leaf(normal(13, 6, seed=2)), leaf(normal(13, seed=3))
    token_weight = normal(3, 11, seed=4)
    token_weight[0, 2] = token_weight[1:, 5] = token_weight[:, 7] = 0
    return hidden, teacher, weight, bias, token_weight


def compare(ours, theirs, rtol=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 5, 12, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "softcap2"])
@pytest.mark.parametrize("grad_weight", [False, True], ids=["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("divergence, beta", DIVERGENCES[1:])
def test_lens_of_any_chunk(divergence, beta, reduction, grad_weight, softcap, rows):
    hidden, teacher, weight, bias, token_weight = small_case()
    options = {"divergence": divergence, "beta": beta, "temperature": 0.7, "bias": bias}
    options |= {"reduction": reduction, "grad_weight": grad_weight, "logit_softcap": softcap}
    wanted = (hidden, weight, bias) if grad_weight else (hidden,)
    results = []
    for impl in ("chunked", "reference"):
        loss, stats = logit_lens_divergence(
            hidden, teacher, weight, token_weight=token_weight, return_stats=True, impl=impl,
            max_bytes=budget(rows, 13, 6), **options,
        )  # fmt: skip
        upstream = normal(3, 11, seed=5) if reduction == "none" else -1.7
        grads = torch.autograd.grad((loss * upstream).sum(), wanted)
        assert all(x.norm() > 1e-3 for x in grads)
        results.append([loss, *stats, *grads])
    compare(*results)


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
@pytest.mark.parametrize("frozen", [False, True], ids=["weight", "frozen"])
def test_logprob_of_any_chunk(frozen, rows):
    hidden, weight, bias = (
        leaf(normal(*n, seed=i)) for i, n in enumerate([(9, 6), (13, 6), (13,)])
    )
    wanted = (hidden,) if frozen else (hidden, weight, bias)
    labels, upstream = torch.arange(9), normal(9, seed=4)
    results = []
    for impl in ("chunked", "reference"):
        head = (weight.detach(), bias.detach()) if frozen else (weight, bias)
        out = linear_logprob(
            hidden, head[0], labels, bias=head[1], temperature=0.7, logit_softcap=2.0, impl=impl,
            max_bytes=budget(rows, 13, 6),
        )  # fmt: skip
        grads = torch.autograd.grad((out.logprob * upstream).sum(), wanted)
        results.append([*out, *grads])
    compare(*results)


@pytest.mark.parametrize("rows", [2, 5, 1000])
@pytest.mark.parametrize("layers", [None, 0, 3], ids=lambda s: f"S{s}")
@pytest.mark.parametrize("grad_weight", [False, True], ids=["logprob", "both"])
@pytest.mark.parametrize("frozen", [False, True], ids=["weight", "frozen"])
def test_policy_head(frozen, grad_weight, layers, rows):
    hidden, final, weight, bias, token_weight = small_case()
    final, labels = leaf(final), torch.arange(11)
    student = hidden[0] if layers is None else hidden[:layers]
    token_weight = token_weight[0] if layers is None else token_weight[:layers]
    head = (weight.detach(), bias.detach()) if frozen else (weight, bias)
    results = []
    for impl in ("chunked", "reference"):
        out = policy_head(
            final, head[0], labels, student, bias=head[1], token_weight=token_weight,
            temperature=0.7, grad_weight=grad_weight, impl=impl, max_bytes=budget(rows, 13, 6),
        )  # fmt: skip
        loss = (out.logprob * normal(11, seed=5)).sum()
        loss = loss + (out.divergence * normal(*student.shape[:-1], seed=6)).sum()
        wanted = (hidden, final) if frozen else (hidden, final, weight, bias)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        stats = out.stats._replace(teacher_entropy=out.entropy)
        results.append([*out[:4], *stats, *grads])
    compare(*results)


def policy_terms(n: int, **changes) -> PolicyTerms:
    """Terms whose tokens lie on all sides of the clip ranges."""
    old, advantage = -2.5 + normal(n, seed=21), normal(n, seed=20)
    given = {
        "old_logprob": old, "rollout_logprob": old + normal(n, seed=22) / 2,
        "ref_logprob": -2.5 + normal(n, seed=23), "dual_clip": 2.0, "kl_coef": 0.3,
    }  # fmt: skip
    return PolicyTerms(advantage, normal(n, seed=24), **(given | changes))


@pytest.mark.parametrize("changes", [
    pytest.param({}, id="everything"),
    pytest.param({"old_logprob": None}, id="on-policy"),
    pytest.param({"rollout_logprob": None, "kl_coef": 0.0, "dual_clip": None}, id="plain"),
])  # fmt: skip
def test_policy_slope_is_the_derivative(changes):
    n = 400
    terms = policy_terms(n, **changes)
    logprob = leaf(-2.5 + normal(n, seed=25))
    with torch.no_grad():
        logprob[:4] += torch.tensor([60.0, -60.0, 25.0, -25.0])
    found = policy_loss(logprob, terms)
    (wanted,) = torch.autograd.grad(found.loss.sum(), logprob)
    assert wanted.norm() > 1
    rests = wanted == 0
    assert terms.old_logprob is None or terms.kl_coef or 40 < rests.sum() < 300
    torch.testing.assert_close(policy_slope(logprob.detach(), terms), wanted)


def test_policy_slope_keeps_nan():
    terms = policy_terms(3)._replace(old_logprob=torch.tensor([math.nan, -1.0, -1.0]))
    slope = policy_slope(torch.tensor([-1.0, math.nan, -1.0]), terms)
    assert slope.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("rows", [2, 5, 1000])
@pytest.mark.parametrize("grad_weight", [False, True], ids=["policy", "both"])
@pytest.mark.parametrize("lens_temperature", [None, 1.3], ids=["one-temperature", "two"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "softcap2"])
@pytest.mark.parametrize("layers", [0, 3], ids=lambda s: f"S{s}")
def test_policy_head_with_the_policy_loss(layers, softcap, lens_temperature, grad_weight, rows):
    hidden, final, weight, bias, token_weight = small_case()
    final, labels, student = leaf(final), torch.arange(11), hidden[:layers]
    results = []
    for impl in ("chunked", "reference"):
        out = policy_head(
            final, weight, labels, student, bias=bias, token_weight=token_weight[:layers],
            temperature=0.7, lens_temperature=lens_temperature, logit_softcap=softcap,
            grad_weight=grad_weight, policy=policy_terms(11), impl=impl,
            max_bytes=budget(rows, 13, 6),
        )  # fmt: skip
        assert not out.logprob.requires_grad
        loss = 1.7 * out.policy_loss + (out.divergence * normal(layers, 11, seed=6)).sum()
        wanted = (hidden, final, weight, bias)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        assert all(x.norm() > 1e-3 for x in grads[1 if layers == 0 else 0 :])
        stats = out.stats
        seen = (token_weight[:layers] != 0).any(0)
        entropy = torch.where(seen, stats.teacher_entropy, 0)
        stats = stats._replace(teacher_entropy=entropy)
        results.append([*out[:4], out.policy_loss, *stats, *grads])
    compare(*results)


def test_policy_head_without_students_is_the_logprob():
    _, final, weight, bias, _ = small_case()
    alone = linear_logprob(final, weight, torch.arange(11), bias=bias)
    out = policy_head(final, weight, torch.arange(11), bias=bias)
    compare(out[:3], alone)
    assert out.divergence.shape == (0, 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("grad_weight", [False, True], ids=["hidden", "weight"])
@pytest.mark.parametrize("case", ["ordinary", "near", "saturated", "disjoint"])
def test_lens_in_half_precision(case, grad_weight, device, dtype):
    """A minute gradient does not vanish on its way to an upstream gradient that lifts it."""
    hidden, teacher, weight = (x.to(dtype).to(device) for x in lens_case(case))
    hidden, weight = leaf(hidden), leaf(weight)
    upstream = torch.full((2, 24), 2.0**16, device=device)
    token_weight = torch.full((24,), 2.0**-10, device=device)
    truth = lens_truth(*(x.cpu() for x in (hidden, teacher, weight)))
    loss = logit_lens_divergence(
        hidden, teacher, weight, token_weight=token_weight, grad_weight=grad_weight, impl="chunked"
    )
    (loss * upstream).sum().backward()
    assert_loss_close(loss.cpu() * 2.0**10, truth.loss, LOSS_BOUND[torch.bfloat16])
    assert_gradient_close(hidden.grad.cpu(), 2**6 * truth.d_hidden, GRADIENT_BOUND[torch.bfloat16])
    if grad_weight:
        assert_gradient_close(
            weight.grad.cpu(), 2**6 * truth.d_weight, GRADIENT_BOUND[torch.bfloat16]
        )


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_lens_at_a_large_vocabulary(device):
    """V of Qwen3, in the saturated regime's neighbourhood and far from it."""
    V, D = 151_936, 16
    hidden = normal(1, 5, D, seed=0).float() * torch.tensor([0.01, 0.3, 1.0, 2.0, 5.0])[:, None]
    teacher, weight = 2 * normal(5, D, seed=1).float(), normal(V, D, seed=2).float()
    truth = lens_truth(hidden, teacher, weight)
    hidden = leaf(hidden.to(device))
    loss = logit_lens_divergence(hidden, teacher.to(device), weight.to(device), impl="chunked")
    loss.sum().backward()
    assert_loss_close(loss.cpu(), truth.loss, LOSS_BOUND[torch.float32])
    assert_gradient_close(hidden.grad.cpu(), truth.d_hidden, GRADIENT_BOUND[torch.float32])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")
def test_offsets_beyond_int32():
    """16,384 rows of 151,936 logits in one buffer: 2.5e9 entries."""
    N, D, V = 16_384, 16, 151_936
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    hidden, teacher, weight = (
        normal(*n, seed=i).float().cuda() for i, n in enumerate([(1, N, D), (N, D), (V, D)])
    )
    for x in (hidden, teacher):
        x[..., -3:, :] = x[..., :3, :]
    hidden.requires_grad_()
    loss = logit_lens_divergence(hidden, teacher, weight, impl="chunked", max_bytes=30 << 30)
    loss.sum().backward()
    torch.testing.assert_close(loss[:, -3:], loss[:, :3])
    torch.testing.assert_close(hidden.grad[:, -3:], hidden.grad[:, :3])


def test_nan_stays_in_its_rows():
    hidden, teacher, weight = (x.float() for x in lens_case("ordinary"))
    hidden[0, 3, 0], hidden[1, 5, 1], teacher[9, 2] = math.nan, math.inf, math.nan
    hidden = leaf(hidden)
    loss = logit_lens_divergence(hidden, teacher, weight, impl="chunked")
    loss.sum().backward()
    bad = torch.zeros(2, 24, dtype=torch.bool)
    bad[0, 3] = bad[1, 5] = bad[:, 9] = True
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(hidden.grad.isnan().any(-1), bad)


def test_a_graph_may_be_used_twice_but_not_differentiated_twice():
    hidden, teacher, weight, _, token_weight = small_case()
    loss = logit_lens_divergence(
        hidden, teacher, weight, token_weight=token_weight, reduction="mean", impl="chunked"
    )
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match='cannot itself be differentiated.*impl="reference"'):
        torch.autograd.grad(loss, hidden, create_graph=True)


# torch.library, torch.compile


def record(**changes) -> HeadCall:
    hidden, final, weight, bias, factor = small_case()
    call = HeadCall(
        hidden, final, weight.detach(), bias.detach(), factor=factor, capacity=5, drop=True,
        hidden_grad=True, stats=True,
    )  # fmt: skip
    return call._replace(**changes)


POLICY = {"policy_advantage": normal(11, seed=20), "policy_weight": normal(11, seed=24)}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="hidden"),
        pytest.param({"factor": None, "drop": False, "stats": False}, id="all-rows"),
        pytest.param({"weight": leaf(normal(13, 6, seed=2)), "reduce": True,
                      "hidden_weight_grad": True}, id="weight"),
        pytest.param({"weight": leaf(normal(13, 6, seed=2)), "hidden_grad": False,
                      "hidden_later": True, "final_later": True, "labels": torch.arange(11),
                      "final": leaf(normal(11, 6, seed=1))}, id="later"),
        pytest.param({**POLICY, "weight": leaf(normal(13, 6, seed=2)), "final_grad": True,
                      "final_weight_grad": True, "labels": torch.arange(11),
                      "final": leaf(normal(11, 6, seed=1))}, id="policy-loss"),
    ],
)  # fmt: skip
def test_opcheck(changes):
    torch.library.opcheck(torch.ops.oisd_kernels.head_pass.default, tuple(record(**changes)))


@pytest.mark.parametrize("grad_weight", [False, True], ids=["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_in_one_graph(reduction, grad_weight):
    hidden, final, weight, _, token_weight = small_case()
    final, labels = leaf(final), torch.arange(11)

    def step(hidden, final, weight):
        lens = logit_lens_divergence(
            hidden, final, weight, token_weight=token_weight, reduction=reduction,
            grad_weight=grad_weight, impl="chunked",
        )  # fmt: skip
        head = policy_head(final, weight, labels, hidden, token_weight=token_weight)
        logprob = linear_logprob(final, weight, labels, impl="chunked").logprob
        terms = PolicyTerms(logprob.detach(), logprob.detach())
        loss = policy_head(final, weight, labels, policy=terms).policy_loss
        value = lens.square().sum() + head.divergence.sum() + (head.logprob * logprob).sum()
        return value + loss

    inputs = (hidden, final, weight)
    eager, compiled = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs)
    compare([loss], [eager])
    compare(torch.autograd.grad(loss, inputs), torch.autograd.grad(eager, inputs))


# Cost


def matmuls(run, unit: int) -> float:
    """Multiplications of all matmuls that `run` does, in units of N*D*V."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    total = 0
    for event in recorded.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            shapes = [x for x in event.input_shapes if len(x) == 2]
            left, right = next(p for p in pairwise(shapes[event.name != "aten::mm" :]))
            nested = event.cpu_parent is not None and "mm" in event.cpu_parent.name
            total += 0 if nested else left[0] * left[1] * right[1]
    return total / unit


@pytest.mark.parametrize("layers", [1, 3])
def test_matmuls_are_counted(layers):
    N, D, V = 24, 8, 40
    hidden, final = leaf(normal(layers, N, D, seed=0)), leaf(normal(N, D, seed=1))
    weight, labels = leaf(normal(V, D, seed=2)), torch.arange(N)
    half = torch.ones(N)
    half[::2] = 0

    def lens(**options):
        loss = logit_lens_divergence(hidden, final, weight, impl="chunked", **options)
        return lambda: loss.sum().backward()

    def policy():
        out = policy_head(final, weight.detach(), labels, hidden)
        (out.logprob.sum() + out.divergence.sum()).backward()

    def values():
        with torch.no_grad():
            logit_lens_divergence(hidden, final, weight, impl="chunked")

    S, unit = layers, N * D * V
    assert matmuls(values, unit) == S + 1
    assert matmuls(lambda: lens()(), unit) == 2 * S + 1
    assert matmuls(lambda: lens(max_bytes=budget(S + 1, V, D))(), unit) == 2 * S + 1
    assert matmuls(lambda: lens(token_weight=half)(), unit) == (2 * S + 1) / 2
    assert matmuls(lambda: lens(reduction="sum", grad_weight=True)(), unit) == 3 * S + 1
    assert matmuls(lambda: lens(grad_weight=True)(), unit) == 4 * S + 2
    assert matmuls(policy, unit) == 2 * S + 2

    def with_policy_loss():
        out = policy_head(final, weight, labels, hidden, policy=policy_terms(N))
        (out.policy_loss + out.divergence.sum()).backward()

    assert matmuls(with_policy_loss, unit) == 2 * S + 3
    logprob = linear_logprob(final, weight, labels).logprob
    assert matmuls(lambda: logprob.sum().backward(), unit) == 3


def peak_memory(run) -> int:
    """Bytes that `run` holds at once at most; the workspace of an earlier call is given back."""
    release()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("max_bytes", [2 << 20, 5 << 20], ids=lambda b: f"{b >> 20}MiB")
def test_workspace_keeps_to_its_budget(max_bytes):
    N, D, V = 300, 16, 20_011
    hidden, final = normal(2, N, D, seed=0).float(), normal(N, D, seed=1).float()
    hidden.requires_grad_()
    weight = normal(V, D, seed=2).float()
    peak = peak_memory(
        lambda: logit_lens_divergence(hidden, final, weight, impl="chunked", max_bytes=max_bytes)
    )
    outputs = hidden.numel() * 4 + 8 * 2 * N * 4
    index = 6 * 2 * N * 8
    assert max_bytes / 2 < peak <= max_bytes + outputs + index


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")
def test_no_synchronisation_without_a_token_weight():
    hidden, final, weight = (normal(*n, seed=0).cuda() for n in [(2, 9, 8), (9, 8), (70, 8)])
    hidden.requires_grad_()
    logit_lens_divergence(hidden, final, weight).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        logit_lens_divergence(hidden, final, weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
