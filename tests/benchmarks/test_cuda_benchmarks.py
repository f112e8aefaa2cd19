"""benchmarks/cuda_kernels.py and cuda_times.py, as far as they go without a GPU."""

import re
import subprocess
import sys

import pytest

from benchmarks import cuda_kernels, cuda_times
from benchmarks.cases.shapes import Attention
from benchmarks.cuda_kernels import Step
from oisd_kernels.attention import cuda_impl, torch_impl
from tests.oisd_kernels.cuda.csrc_cases import emulate, needs_emulation


def test_the_steps():
    names = [step.name for step in cuda_kernels.steps(list(cuda_kernels.ENGINES), "a-sanitizer")]
    assert len(names) == len(set(names)) == 2 + 3 * (3 + len(cuda_kernels.SANITIZED))
    assert names[:2] == ["build", "tests WARP_ENGINE"]
    assert len(cuda_kernels.steps(["WARP_ENGINE"], None)) == 5


def test_every_test_on_a_gpu_is_of_one_engine():
    """The words that choose an engine's tests leave none out."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "--collect-only", "-q"]
    command += ["-o", "addopts=", *cuda_kernels.TESTS]
    found = subprocess.run(command, capture_output=True, text=True, cwd=cuda_kernels.ROOT)
    names = [line for line in found.stdout.splitlines() if "::" in line]
    words = [
        re.findall(r"\w+", word.replace(" or ", " ")) for word in cuda_kernels.ENGINES.values()
    ]
    for name in names:
        assert sum(any(word in name for word in of_one) for of_one in words) == 1, name
    for wanted in ("against_float64", "every_unit", cuda_kernels.RERUNS, "captured_graph"):
        for of_one in words:
            assert any(wanted in name and any(w in name for w in of_one) for name in names), wanted


def step(code: str, seconds: float = 60.0, tests: bool = False) -> Step:
    return Step("a step", [sys.executable, "-c", code], seconds, tests)


@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        (step("print(1)"), "ok"),
        (step("print('== 3 passed in 1s')", tests=True), "3 passed"),
        (step("print('== 3 skipped in 1s')", tests=True), "FAILED: no test ran"),
        (step("print('1 passed'); raise SystemExit(9)"), "FAILED: status 9"),
        (
            step("print('x PASSED', flush=True); import time; time.sleep(60)", 3.0),
            "not finished, 1 passed",
        ),
    ],
    ids=["ok", "passed", "skipped", "failed", "hangs"],
)
def test_a_step(what, verdict, tmp_path):
    row = cuda_kernels.run(what, tmp_path, 60.0)
    assert row["verdict"] == verdict and row["seconds"] < 50
    assert (tmp_path / row["log"]).is_file()


def test_no_time_left(tmp_path):
    assert cuda_kernels.run(step("print(1)"), tmp_path, 5.0)["verdict"] == "no time left"


@needs_emulation
def test_the_times_of_a_pass(monkeypatch):
    """By the emulation, against torch's functions in the place of Triton's."""
    emulator = emulate(monkeypatch)
    monkeypatch.setattr(cuda_times, "triton_impl", torch_impl)
    call = cuda_times.Call(Attention(2, 1, 64), 20, "cpu")
    for kind in cuda_times.MATMULS:
        timed = list(cuda_times.lines("tiny", kind, call, seconds=0.0))
        labels = ["cuda WARP_ENGINE", "Triton"]
        for label in labels:
            assert sum(label in line and " ms " in line for line in timed) == 1, timed
    assert emulator.launches
    right = cuda_impl.backward

    def wrong(*arguments, **options):
        return tuple(2 * x for x in right(*arguments, **options) if x is not None)

    monkeypatch.setattr(cuda_impl, "backward", wrong)
    timed = list(cuda_times.lines("tiny", "align", call, seconds=0.0))
    assert sum("wrong: 1.0e+00" in line for line in timed) == 1


def test_the_engine_of_launches():
    before = cuda_impl.WARPGROUPS, cuda_impl.HOPPER_ENGINE
    for name in cuda_kernels.ENGINES:
        with cuda_times.engine(name):
            assert cuda_impl.WARPGROUPS == (name != "WARP_ENGINE")
            if cuda_impl.WARPGROUPS:
                assert cuda_impl.HOPPER_ENGINE == name
    assert (cuda_impl.WARPGROUPS, cuda_impl.HOPPER_ENGINE) == before
    assert cuda_times.engines()[0] == "WARP_ENGINE"
