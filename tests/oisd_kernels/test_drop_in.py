"""Drop-ins for Liger Kernel: against float64, against Liger itself; signatures of these and TRL's.

The shapes, dtypes, values of beta, temperature and ignore_index are those of the peers' published
suite (Liger 0.8.5, test/transformers/test_fused_linear_jsd.py), which `tests/run_peer_suite.py`
itself runs. Liger has no implementation for a CPU but Triton's interpreter, which needs a process
of its own.
"""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from oisd_kernels import reference
from oisd_kernels.drop_in import (
    ChunkedDivergenceFunction,
    LigerFusedLinearJSD,
    chunked_divergence_loss,
    liger_fused_linear_jsd,
)
from tests import ROOT
from tests.interpreter import interpreted, outside, passes_in_the_interpreter
from tests.oisd_kernels.test_reference import (
    GRADIENT_BOUND,
    LOSS_BOUND,
    assert_gradient_close,
    assert_loss_close,
    leaf,
    relative_error,
)

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("liger_kernel", "trl")}
needs_liger = pytest.mark.skipif(not INSTALLED["liger_kernel"], reason="liger-kernel not installed")
needs_trl = pytest.mark.skipif(not INSTALLED["trl"], reason="trl not installed")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def jsd(beta: float) -> dict:
    if beta in (0.0, 1.0):
        return {"divergence": "forward_kl" if beta == 0.0 else "reverse_kl"}
    return {"divergence": "jsd", "beta": beta}


def truth(student, teacher, *, leaves=2, **options) -> list[Tensor]:
    """Loss, and its gradients to the student's tensors, by the reference in float64."""
    student = [None if x is None else leaf(x.double()) for x in student]
    teacher = [None if x is None else x.detach().double() for x in teacher]
    loss = reference.distillation_divergence(
        *student[:2], *teacher[:2], bias=student[2], teacher_bias=teacher[2], **options
    )
    return [loss.detach(), *torch.autograd.grad(loss, student[:leaves])]


def assert_alike(theirs, ours, bounds, floor=1e-4) -> None:
    """Shapes, dtypes, and the relative error of ours against theirs."""
    for a, b, bound in zip(theirs, ours, bounds, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.double().norm() > floor, "nothing to speak of"
        assert relative_error(b, a.double()) <= bound


# Liger: uniform inputs, a teacher of twice the student's width.

LIGER_LARGE = pytest.param((8, 128, 1024, 4096), id="8x128x1024x4096", marks=pytest.mark.slow)
LIGER_RANDOM = pytest.param((4, 423, 167, 1423), id="4x423x167x1423")
LIGER_SMALL = [(2, 2, 8, 8), (9, 7, 41, 41)]
LIGER_OPTIONS = [
    pytest.param(1.0, 0.5, None, id="jsd"),
    pytest.param(2.0, 0.1, None, id="jsd-0.1"),
    pytest.param(1.0, 0.0, None, id="forward"),
    pytest.param(1.0, 1.0, None, id="reverse"),
    pytest.param(1.0, 0.5, 2, id="jsd-ignore2"),
    pytest.param(2.0, 0.1, 42, id="jsd-0.1-ignore42"),
    pytest.param(1.0, 0.0, 2, id="forward-ignore2"),
    pytest.param(1.0, 1.0, 2, id="reverse-ignore2"),
]


def liger_case(B, T, H, V, dtype, ignore_index=None, scale=1.0, seed=0):
    """(student_input, student_weight, teacher_input, teacher_weight, shift_labels)."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g).to(dtype)

    student = leaf(uniform(B * T, H // 2) * scale), leaf(uniform(V, H // 2))
    teacher = uniform(B * T, H) * scale, uniform(V, H)
    if ignore_index is None:
        return *student, *teacher, None
    labels = torch.randint(0, V, (B * T,), generator=g)
    labels[torch.randperm(B * T, generator=g)[: max(B * T // 3, 1)]] = ignore_index
    return *student, *teacher, labels


def liger_truth(case, temperature, beta, ignore_index):
    student_input, student_weight, *teacher, labels = case
    token_weight = None if labels is None else (labels != ignore_index).double()
    return truth(
        (student_input, student_weight, None),
        (*teacher, None),
        token_weight=token_weight,
        temperature=temperature,
        reduction="mean",
        **jsd(beta),
    )


def assert_meets_the_bounds(loss, leaves, want, dtype, floor):
    assert loss.shape == () and loss.dtype == torch.float32
    assert_loss_close(loss.detach(), want[0], LOSS_BOUND[dtype])
    for x, gradient in zip(leaves, want[1:], strict=True):
        assert x.grad.dtype == x.dtype
        assert_gradient_close(x.grad, gradient, GRADIENT_BOUND[dtype], floor=floor)


@DTYPES
@pytest.mark.parametrize("temperature, beta, ignore_index", LIGER_OPTIONS)
@pytest.mark.parametrize("shape", [LIGER_RANDOM, LIGER_LARGE, *LIGER_SMALL])
def test_liger_module_meets_the_bounds(shape, temperature, beta, ignore_index, dtype):
    ignore_index = ignore_index if ignore_index is None else min(ignore_index, shape[3] - 1)
    case = liger_case(*shape, dtype, ignore_index)
    want = liger_truth(case, temperature, beta, ignore_index)
    options = {} if ignore_index is None else {"ignore_index": ignore_index}
    loss = LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature, **options)(*case)
    loss.backward()
    assert_meets_the_bounds(loss, case[:2], want, dtype, floor=1e-4)


def test_liger_function_is_the_module_whatever_the_accumulation_dtype():
    case = liger_case(9, 7, 41, 41, torch.float32, ignore_index=-100)
    results = []
    for accum_dtype in (None, torch.float32):
        module = LigerFusedLinearJSD(0.1, -100, 2.0, accum_dtype)
        for loss in (
            module(*case),
            liger_fused_linear_jsd(
                *case, jsd_beta=0.1, ignore_index=-100, temperature=2.0, accum_dtype=accum_dtype
            ),
        ):
            results.append([loss, *torch.autograd.grad(loss, case[:2])])
    assert results[0][1].norm() > 1e-3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_liger_all_ignored():
    case = liger_case(2, 2, 8, 8, torch.float32)
    labels = torch.full((4,), 42)
    loss = LigerFusedLinearJSD(ignore_index=42)(*case[:4], labels)
    loss.backward()
    assert torch.equal(loss, torch.zeros(()))
    assert all(torch.count_nonzero(x.grad) == 0 for x in case[:2])


def test_liger_ignored_rows_do_not_count_and_get_nothing():
    student_input, *rest, labels = liger_case(2, 8, 8, 8, torch.float32, ignore_index=2)
    ignored = labels == 2
    assert 0 < ignored.sum() < len(labels)
    with torch.no_grad():
        student_input[ignored] = torch.nan
    loss = liger_fused_linear_jsd(student_input, *rest, labels, ignore_index=2)
    loss.backward()
    kept = [leaf(student_input[~ignored]), rest[0], rest[1][~ignored], rest[2]]
    alone = liger_fused_linear_jsd(*kept)
    (gradient,) = torch.autograd.grad(alone, kept[0])
    torch.testing.assert_close(loss, alone)
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(student_input.grad[~ignored], gradient)
    assert torch.count_nonzero(student_input.grad[ignored]) == 0


def test_liger_block_of_low_probability():
    """A vocabulary of 32,769 of which one token has all the mass: finite, and the reference's."""
    student_weight, teacher_weight = torch.full((32769, 2), -120.0), torch.full((32769, 4), -121.0)
    student_weight[0], teacher_weight[0] = 0, 0
    student_input, teacher_input = leaf(torch.eye(2)[:1]), torch.eye(4)[:1]
    loss = LigerFusedLinearJSD()(student_input, student_weight, teacher_input, teacher_weight)
    loss.backward()
    assert 0 <= loss < 1e-6 and student_input.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("beta, spread", [(0.0, 30.0), (0.5, 10.0), (1.0, 30.0)])
def test_logits_are_not_rounded(beta, spread, dtype):
    """Logits of a wide spread: rounding them to the inputs' dtype costs 1 to 23 % of a gradient."""
    g, N, D, V = torch.Generator().manual_seed(0), 32, 64, 500

    def states_and_head():
        head = torch.randn(V, D, generator=g) * spread / D**0.5
        return torch.randn(N, D, generator=g).to(dtype), head.to(dtype)

    student, teacher = [leaf(x) for x in states_and_head()], states_and_head()
    want = truth((*student, None), (*teacher, None), reduction="mean", **jsd(beta))
    lift = 2.0**8  # float16 could not hold the gradient otherwise
    (LigerFusedLinearJSD(jsd_beta=beta)(*student, *teacher) * lift).backward()
    for x, gradient in zip(student, want[1:], strict=True):
        assert_gradient_close(x.grad, gradient * lift, GRADIENT_BOUND[torch.bfloat16], floor=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_liger_under_autocast(dtype):
    """Half inputs, float32 heads: the head is rounded as autocast's linear rounds it."""
    case = [x.to(dtype) for x in liger_case(2, 4, 256, 400, torch.float32)[:4]]
    student_input, teacher_input = leaf(case[0]), case[2]
    heads = liger_case(2, 4, 256, 400, torch.float32)
    student_weight, teacher_weight = heads[1], heads[3]
    rounded = student_input, student_weight.detach().to(dtype), None
    want = truth(rounded, (teacher_input, teacher_weight.to(dtype), None), reduction="mean")
    lift = 2.0**8
    with torch.autocast("cpu", dtype=dtype):
        loss = LigerFusedLinearJSD()(student_input, student_weight, teacher_input, teacher_weight)
    (loss * lift).backward()
    assert loss.dtype == torch.float32
    assert_loss_close(loss.detach(), want[0], LOSS_BOUND[torch.bfloat16])
    for x, gradient in zip((student_input, student_weight), want[1:], strict=True):
        assert_gradient_close(x.grad, gradient * lift, GRADIENT_BOUND[torch.bfloat16], floor=1e-4)
    assert student_weight.grad.dtype == torch.float32


# Signatures


def parameters(function, drop: int = 0) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[drop:]


@pytest.mark.parametrize(
    "ours, module, path, drop",
    [
        pytest.param(
            LigerFusedLinearJSD.__init__,
            "liger_kernel.transformers.fused_linear_jsd",
            "LigerFusedLinearJSD.__init__",
            0,
            marks=needs_liger,
        ),
        pytest.param(
            LigerFusedLinearJSD.forward,
            "liger_kernel.transformers.fused_linear_jsd",
            "LigerFusedLinearJSD.forward",
            0,
            marks=needs_liger,
        ),
        pytest.param(
            liger_fused_linear_jsd,
            "liger_kernel.transformers.functional",
            "liger_fused_linear_jsd",
            0,
            marks=needs_liger,
        ),
        pytest.param(
            ChunkedDivergenceFunction.apply,
            "trl.kernels.chunked_divergence",
            "ChunkedDivergenceFunction.forward",
            1,  # ctx
            marks=needs_trl,
        ),
        pytest.param(
            chunked_divergence_loss,
            "trl.trainer.distillation_trainer",
            "_chunked_divergence_loss",
            0,
            marks=needs_trl,
        ),
    ],
    ids=["liger-init", "liger-forward", "liger-function", "trl-function", "trl-loss"],
)
def test_signatures_are_the_peers(ours, module, path, drop):
    """Names, kinds and order; their defaults, where they have one."""
    theirs = importlib.import_module(module)
    for name in path.split("."):
        theirs = getattr(theirs, name)
    want, got = parameters(theirs, drop), parameters(ours)
    assert [(p.name, p.kind) for p in got] == [(p.name, p.kind) for p in want]
    for a, b in zip(got, want, strict=True):
        assert b.default is b.empty or a.default == b.default, a.name


# Bad input

X = torch.zeros
JSD = {"student_input": X(4, 8), "student_weight": X(11, 8), "teacher_input": X(4, 6)}
JSD |= {"teacher_weight": X(11, 6), "shift_labels": X(4, dtype=torch.int64)}


def rejects(op, arguments, name, got, op_name=None):
    pattern = rf"^{op_name or op.__name__}: {name} must .*, got .*{re.escape(got)}"
    with pytest.raises(ValueError, match=pattern):
        op(**arguments)


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("student_input", X(2, 4, 8), "[2, 4, 8]"),
        ("student_input", None, "NoneType"),
        ("student_weight", X(8, 11), "[8, 11]"),
        ("teacher_input", X(5, 6), "[5, 6]"),
        ("teacher_weight", X(12, 6), "[12, 6]"),
        ("shift_labels", X(4), "torch.float32"),
        ("shift_labels", X(5, dtype=torch.int64), "[5]"),
        ("jsd_beta", 1.5, "1.5"),
        ("jsd_beta", None, "None"),
        ("temperature", 0, "0"),
        ("accum_dtype", "float32", "float32"),
    ],
)
def test_liger_rejects(name, value, got):
    rejects(liger_fused_linear_jsd, {**JSD, name: value}, name, got)


def test_liger_module_rejects_when_it_is_built():
    rejects(LigerFusedLinearJSD, {"jsd_beta": -0.1}, "jsd_beta", "-0.1")
    rejects(LigerFusedLinearJSD, {"temperature": 0.0}, "temperature", "0.0")


# Liger's kernels and our row kernels, both in the interpreter


@needs_liger
@outside
def test_liger_agrees_in_the_interpreter():
    passes_in_the_interpreter(__file__, "-k", "is_theirs_in_the_interpreter")


@needs_liger
@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [LIGER_SMALL[0], (3, 3, 41, 41)])
@pytest.mark.parametrize(
    "temperature, beta, ignore_index",
    [(1.0, 0.5, -100), (2.0, 0.1, 42), (1.0, 0.0, 2), (1.0, 1.0, 2)],
)
def test_liger_is_theirs_in_the_interpreter(temperature, beta, ignore_index, shape, dtype):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD as Theirs

    case = liger_case(*shape, dtype, ignore_index, scale=0.5)
    results = []
    for module in (Theirs, LigerFusedLinearJSD):
        loss = module(jsd_beta=beta, ignore_index=ignore_index, temperature=temperature)(*case)
        results.append([loss, *torch.autograd.grad(loss, case[:2])])
    # On a CPU theirs rounds the logits to bf16.
    assert_alike(*results, bounds=[{torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]] * 3)


@needs_liger
def test_a_peers_file_meets_our_functions(tmp_path):
    """The runner of docs/drop-in.md, on a file that asks whose functions it is given."""
    file = tmp_path / "test_whose.py"
    file.write_text(
        "from liger_kernel.transformers import LigerFusedLinearJSD\n"
        "from liger_kernel.transformers.functional import liger_fused_linear_jsd\n"
        "def test_whose():\n"
        "    for given in (LigerFusedLinearJSD, liger_fused_linear_jsd):\n"
        "        assert given.__module__ == 'oisd_kernels.drop_in'\n"
    )
    command = [sys.executable, "-m", "tests.run_peer_suite", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
