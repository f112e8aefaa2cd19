"""The machinery of the benchmarks: what is wrong is not timed, what is absent is listed."""

from __future__ import annotations

import inspect
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_tests, report, runner
from benchmarks.cases import lens, step
from benchmarks.cases.case import (
    REGIMES,
    Bar,
    Bound,
    Case,
    Implementation,
    Yardstick,
    expected,
    hidden_states,
    verdict,
)
from benchmarks.cases.lens import Shape
from benchmarks.cases.shapes import Head
from benchmarks.cases.suite import all_cases, select
from benchmarks.gpu.results import Results
from benchmarks.measure import promises, timer
from benchmarks.measure.counting import Allocations, equivalents
from benchmarks.measure.machine import append, describe
from benchmarks.report.bars import UNITS
from benchmarks.report.plots import draw
from oisd_kernels import logit_lens_divergence

REQUIRED = {
    "kind", "case", "family", "implementation", "status", "reason", "shape", "dtype", "regime",
    "seed", "checked_at", "bars",
}  # fmt: skip
TIMED = {
    "errors", "bound", "warmup", "rounds", "seconds", "yardstick_seconds", "median_s", "p20_s",
    "p80_s", "floor_flops", "floor_bytes", "tflops", "matmul_tflops", "copy_gbps", "roofline_s",
    "roofline_percent",
}  # fmt: skip
MACHINE = {"date", "commit", "device", "driver", "threads", "python", "versions"}


@pytest.fixture(autouse=True)
def no_memory_process(monkeypatch):
    """A fresh process for each implementation takes seconds; one slow test has it."""
    monkeypatch.setattr(runner.memory, "cpu_peak", lambda *_, **__: 7.0)
    monkeypatch.setattr(runner.roofline, "copy", lambda device: (lambda: sum(range(2000)), 1e3))


class Doubling:
    """Doubles x, plus an error, and counts how often."""

    def __init__(self, error=0.0, raises=None):
        self.calls, self.error, self.raises = 0, error, raises

    def __call__(self, inputs):
        def run():
            self.calls += 1
            if self.raises:
                raise self.raises
            return {"loss": 2 * inputs["x"] + self.error, "d_x": torch.full((3,), 2.0)}

        return run


def doubling_case(*implementations: Implementation, **fields) -> Case:
    case = Case(
        name="double/3",
        family="lens",
        device="cpu",
        dtype=torch.float32,
        shape={"N": 3},
        regime="none",
        inputs=lambda: {"x": torch.tensor([1.0, 2.0, 3.0])},
        truth=lambda given: {"loss": 2 * given["x"].double(), "d_x": torch.full((3,), 2.0)},
        implementations=implementations,
        yardstick=lambda given: Yardstick(lambda: sum(range(2000)), 1e3),
        flops=1e3,
        bytes=1e3,
        bound=Bound(1e-5, 1e-4),
    )
    return replace(case, **fields)


OPTIONS = runner.Options(out="unused", rounds=3, seconds_per_case=1.0)


def test_wrong_is_reported_and_never_timed():
    right, wrong, nan = Doubling(), Doubling(1e-3), Doubling(math.nan)
    case = doubling_case(*(Implementation(n, d) for n, d in
                           (("right", right), ("wrong", wrong), ("nan", nan))))  # fmt: skip
    rows = {row["implementation"]: row for row in runner.run_case(case, OPTIONS)}
    assert rows["right"]["status"] == "ok" and right.calls == 1 + 3
    for name, run in (("wrong", wrong), ("nan", nan)):
        assert rows[name]["status"] == "wrong" and run.calls == 1
        assert "loss is" in rows[name]["reason"] and "median_s" not in rows[name]
    assert rows["nan"]["errors"]["loss"] is None
    assert rows["wrong"]["errors"]["loss"] == pytest.approx(1e-3 * 3**0.5 / 2 / 14**0.5, rel=1e-2)


def test_all_that_are_right_are_timed():
    two = [Implementation(name, Doubling()) for name in ("one", "two")]
    rows = runner.run_case(doubling_case(*two), OPTIONS)
    assert [(row["status"], row["peak_mib"]) for row in rows] == [("ok", 7.0)] * 2


def test_a_wrong_gradient_is_wrong():
    case = doubling_case(
        Implementation("one", Doubling()),
        truth=lambda given: {"loss": 2 * given["x"].double(), "d_x": torch.full((3,), 2.1)},
    )
    (row,) = runner.run_case(case, OPTIONS)
    assert row["status"] == "wrong" and "d_x" in row["reason"]


def test_a_gradient_of_zeros_proves_nothing():
    found, truth = {"d_x": torch.zeros(3)}, {"d_x": torch.zeros(3), "loss": torch.ones(3)}
    assert verdict(found, truth, Bound(1, 1))[1]
    assert verdict({}, truth, Bound(1, 1))[1]


def test_failures_stay_with_their_row():
    absent = Doubling()
    case = doubling_case(
        Implementation("broken", Doubling(raises=RuntimeError("no such kernel\nmore"))),
        Implementation("large", Doubling(raises=torch.OutOfMemoryError("tried 9 GiB"))),
        Implementation("peer", absent, absent="not installed: pip install peer"),
        Implementation("compiled", absent, compiles=True),
        Implementation("huge", absent, needs=1e18),
        Implementation("right", Doubling()),
    )
    rows = runner.run_case(case, replace(OPTIONS, quick=True))
    found = {row["implementation"]: (row["status"], row["reason"]) for row in rows}
    assert found["broken"] == ("failed", "RuntimeError: no such kernel")
    assert found["large"][0] == "out of memory"
    assert found["peer"] == ("absent", "not installed: pip install peer")
    assert found["compiled"][0] == found["huge"][0] == "skipped"
    assert "GiB" in found["huge"][1]
    assert found["right"][0] == "ok" and absent.calls == 0
    table = report.markdown([row | machine() for row in rows])
    for name, (status, _) in found.items():
        assert name in table and (status == "ok" or f"{name}: **{status}**" in table)


def test_inputs_that_do_not_fit_fail_the_case_alone():
    def inputs():
        raise torch.OutOfMemoryError("CUDA out of memory")

    (row,) = runner.run_case(doubling_case(Implementation("a", Doubling()), inputs=inputs), OPTIONS)
    assert row["status"] == "out of memory"


def machine() -> dict:
    return {"device": "d", "driver": None, "threads": 1, "versions": {}, "commit": "c",
            "date": "2026-01-01"}  # fmt: skip


def test_rows_have_their_schema(tmp_path):
    rows = runner.run_case(
        doubling_case(
            Implementation("a", Doubling()), Implementation("b", Doubling(), absent="gone")
        ),
        OPTIONS,
    )
    append(tmp_path / "rows.jsonl", rows, describe("cpu", 1))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    a, b = (json.loads(line) for line in lines)
    assert REQUIRED | TIMED | MACHINE <= set(a)
    assert REQUIRED | MACHINE <= set(b) and "median_s" not in b
    assert len(a["seconds"]) == len(a["yardstick_seconds"]) == a["rounds"] == 3
    assert a["p20_s"] <= a["median_s"] <= a["p80_s"]
    assert a["workspace_mib"] == 7.0 - a["outputs_mib"] == 7.0 - 2 * 12 / 2**20
    append(tmp_path / "rows.jsonl", [a | {"status": "failed"}], {})
    again = report.read_rows([tmp_path])
    assert len(again) == 2 and again[-1]["status"] == "failed"  # the last one counts
    with pytest.raises(ValueError, match="holds no rows.jsonl"):
        report.read_rows([tmp_path / "nowhere"])


def test_every_row_of_a_round_takes_its_turn():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timer.interleaved(functions, timer.Plan(warmup=2, rounds=3), "cpu")
    assert order[:6] == list("aabbcc")
    assert ["".join(order[i : i + 3]) for i in (6, 9, 12)] == ["abc", "bca", "cab"]
    assert {len(found) for found in seconds.values()} == {3}
    assert timer.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_time_limits_the_rounds_but_not_below_the_least():
    plan = timer.Plan(warmup=0, rounds=50, least=2, seconds=0.0)
    assert len(timer.interleaved({"a": int}, plan, "cpu")["a"]) == 2


# The process that watches


@pytest.mark.parametrize(
    "script, wanted",
    [
        ("print('begin a'); raise SystemExit(7)", "ended with 7"),
        ("import os; print('begin a', flush=True); os.kill(os.getpid(), 9)", "killed"),
        ("import time; print('begin a', flush=True); time.sleep(60)", "stopped after"),
        ("pass", "did not start"),
    ],
    ids=["exit", "signal", "hang", "no-start"],
)
def test_a_death_costs_one_case(monkeypatch, tmp_path, script, wanted):
    monkeypatch.setattr(runner, "WORKER", [sys.executable, "-c", script])
    case = doubling_case(Implementation("only", Doubling()), name="a")
    limit = 0.5 if "sleep" in script else 60
    options = replace(OPTIONS, out=str(tmp_path), case_limit=limit)
    runner.orchestrate([case], options, lambda line: None)
    (row,) = report.read_rows([tmp_path])
    assert row["status"] == "failed" and wanted in row["reason"]


def test_the_cases_after_a_death_go_on(monkeypatch, tmp_path):
    script = (
        "import json, sys; names = json.load(sys.stdin)['names']\n"
        "print('begin', names[0]); print('a library talks')\n"
        "if names[0] == 'a': sys.exit(1)\n"
        "for name in names: print('begin', name); print('end', name)\n"
    )
    monkeypatch.setattr(runner, "WORKER", [sys.executable, "-c", script])
    made = [doubling_case(Implementation("only", Doubling()), name=name) for name in "abc"]
    said = []
    runner.orchestrate(made, replace(OPTIONS, out=str(tmp_path)), said.append)
    assert [line.split(":")[0].strip() for line in said] == ["a", "b", "c"]
    assert [row["case"] for row in report.read_rows([tmp_path])] == ["a"]


def test_no_case_begins_after_the_deadline(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "WORKER", [sys.executable, "-c", "pass"])
    options = replace(OPTIONS, out=str(tmp_path), deadline=0.0)
    runner.orchestrate([doubling_case(Implementation("a", Doubling()))], options, print)
    (row,) = report.read_rows([tmp_path])
    assert (row["status"], row["reason"]) == ("skipped", "the time budget was used up")


# The cases themselves


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_cases_can_be_listed_anywhere(device):
    found = all_cases(device)
    families = {case.family for case in found}
    assert families >= {"lens", "linear_logprob", "policy_head", "attention_divergence", "step"}
    assert len({case.name for case in found}) == len(found)
    for case in found:
        names = {i.name for i in case.implementations}
        assert len(names) == len(case.implementations)
        for bar in case.bars:
            assert bar.implementation in names and bar.metric in UNITS
    assert select(found, (), "quick")
    with pytest.raises(ValueError, match="no case has 'nothing'"):
        select(found, ["nothing"], "full")


def test_peers_that_are_not_there_say_so(monkeypatch):
    from benchmarks.cases import peers

    peers.missing.cache_clear()
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    try:
        found = {i.name: i.absent for i in peers.lens("cpu", torch.float32)}
    finally:
        peers.missing.cache_clear()
    assert len(found) == 4 and all("pip install" in (why or "") for why in found.values())


HEAD = Head(24, 211)


@pytest.mark.parametrize("regime", REGIMES)
def test_ours_and_eager_pass_the_check(regime):
    shape = Shape(HEAD, "test", 2, 300, regime)
    case = lens.case(shape, "cpu", torch.float32)
    inputs = case.inputs()
    truth = case.truth(inputs)
    direct = logit_lens_divergence(
        inputs["hidden"].detach().double(), inputs["final"].double(), inputs["weight"].double(),
        impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(truth["loss"], direct)  # 300 rows, of which one period was computed
    for implementation in case.implementations:
        if implementation.name in ("ours: chunked", "ours: reference", "eager"):
            want = expected(truth, implementation.weighted, inputs["factor"])
            found = implementation.make(inputs)()
            assert verdict(found, want, implementation.bound or case.bound)[1] == ""


def test_a_wrong_row_anywhere_is_seen():
    case = lens.case(Shape(HEAD, "test", 1, 300), "cpu", torch.float32)
    inputs = case.inputs()
    want = expected(case.truth(inputs), True, inputs["factor"])
    found = case.implementations[0].make(inputs)()
    found["d_hidden"][0, 299] *= 1.5
    assert "d_hidden" in verdict(found, want, case.bound)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("factor, right", [(1.0, True), (1.01, False), (0.0, False)])
def test_a_planted_error_is_refused(factor, right, dtype):
    """A gradient 1 % off, and one of zeros, beside the right one."""
    case = lens.case(Shape(HEAD, "test", 2, 300), "cpu", dtype)
    chunked = next(i for i in case.implementations if i.name == "ours: chunked")

    def planted(inputs):
        run = chunked.make(inputs)

        def altered():
            found = run()
            return found | {name: factor * x for name, x in found.items() if name[:2] == "d_"}

        return altered

    rows = runner.run_case(replace(case, implementations=[Implementation("x", planted)]), OPTIONS)
    assert rows[0]["status"] == ("ok" if right else "wrong")
    assert right or "d_hidden" in rows[0]["reason"]


def cube() -> Case:
    def run(given):
        return lambda: {"loss": given["x"] ** 3, "d_x": 3 * given["x"] ** 2}

    return Case(
        "cube/3", "lens", "cpu", torch.float32, {"N": 3}, "none",
        inputs=lambda: {"x": torch.tensor([1.0, 2.0, 3.0])},
        truth=lambda given: run({"x": given["x"].double()})(),
        implementations=[Implementation("ours", run)],
        yardstick=lambda given: Yardstick(lambda: sum(range(2000)), 1e3),
        flops=1e3, bytes=1e3, bound=Bound(1e-5, 1e-4),
    )  # fmt: skip


def test_a_case_is_a_few_lines():
    assert len(inspect.getsource(cube).splitlines()) < 15
    (row,) = runner.run_case(cube(), OPTIONS)
    assert row["status"] == "ok"


def test_saturated_is_within_3_percent_of_uniform():
    student, final, weight = hidden_states("saturated", 1, 64, 256, 32000, "cpu", 0)
    lq = (student[0] @ weight.T).log_softmax(-1)
    entropy = -(lq.exp() * lq).sum(-1)
    assert 0.97 * math.log(32000) < entropy.mean() < 0.98 * math.log(32000)
    lp = (final @ weight.T).log_softmax(-1)
    assert -(lp.exp() * lp).sum(-1).mean() < 5


MODEL = step.Model("test", 3, 32, 48, 4, 2, 8, 64, 1)


def test_steps_agree_and_the_losses_matter():
    case = step.case(MODEL, 2, 16, False, "cpu", frozenset())
    assert case.check_inputs
    inputs = case.check_inputs(case.inputs()) | {"batch": step.batch(MODEL, 2, 16, "cpu")}
    truth = case.truth(inputs)
    assert truth["d_think"] > 1e-3 and truth["d_attention"] > 1e-4
    for implementation in case.implementations:
        found = implementation.make(inputs)()
        assert verdict(found, truth, case.bound)[1] == ""
        aligned = implementation.name != "GRPO"
        assert ("think" in found) == ("d_attention" in found) == aligned


# Counting


def test_matmuls_are_counted_inside_custom_ops():
    x, y = torch.randn(3, 5), torch.randn(5, 7)
    assert equivalents(lambda: x @ y, 2.0) == 3 * 5 * 7
    assert equivalents(lambda: torch.addmm(torch.zeros(3, 7), x, y), 2.0) == 3 * 5 * 7
    assert equivalents(lambda: torch.bmm(x[None], y[None]), 2.0) == 3 * 5 * 7


def test_allocations_are_the_most_at_once():
    x = torch.zeros(1000)
    with Allocations(x) as counted:
        for _ in range(3):
            x = x + 1  # two alive at once, of which the input is not counted
    assert counted.most == 8000


def test_promises_are_kept():
    rows = [promise.row() for promise in promises.promises()]
    assert len(rows) > 10 and [row["promise"] for row in rows if not row["kept"]] == []
    broken = promises.Promise("too many", "G", 2, lambda: 3.0).row()
    assert not broken["kept"] and "BROKEN" in report.markdown([broken])


# The GPU's tests


def test_gpu_tests_are_told_apart():
    def item(*reasons, params=None):
        marks = [SimpleNamespace(kwargs={"reason": reason}) for reason in reasons]
        fields = {"callspec": SimpleNamespace(params=params)} if params else {}
        return SimpleNamespace(iter_markers=lambda name: marks, **fields)

    assert gpu_tests.needs_gpu(item("GPU"))
    assert gpu_tests.needs_gpu(item("needs CUDA"))
    assert gpu_tests.needs_gpu(item(params={"device": "cuda"}))
    assert not gpu_tests.needs_gpu(item("runs in the interpreter", params={"device": "cpu"}))


def test_each_gpu_test_is_a_row_at_once(tmp_path, capsys):
    """With the plugin that the queue uses: of a file with tests about a GPU and about none."""
    (tmp_path / "test_made_up.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cpu', 'cuda'])\n"
        "def test_right(device): pass\n"
        "@pytest.mark.parametrize('device', ['cuda'])\n"
        "def test_wrong(device): assert 1 == 2, 'off by one'\n"
        "@pytest.mark.skipif(True, reason='no GPU')\n"
        "def test_skipped(): pass\n"
    )
    # The limit and the workers are those of the test around it.
    command = ["-p", "benchmarks.gpu_tests", "-o", "addopts=", "-p", "no:cacheprovider",
               "-p", "no:timeout", "-p", "no:xdist", "--results", str(tmp_path / "results.jsonl"),
               "--step", "made up", str(tmp_path)]  # fmt: skip
    assert pytest.main(command) == 1
    capsys.readouterr()
    rows = Results(tmp_path).rows("test", "made up")
    found = {row["name"].split("::")[1]: (row["verdict"], row["reason"]) for row in rows}
    assert {name: verdict for name, (verdict, _) in found.items()} == {
        "test_right[cuda]": "passed", "test_wrong[cuda]": "FAILED", "test_skipped": "skipped"
    }  # fmt: skip
    assert "1 == 2" in found["test_wrong[cuda]"][1]
    pytest.main(command)
    assert "3 deselected" in capsys.readouterr().out  # the one on a CPU, and what has a row


# Pictures


def test_plots_of_made_up_rows(tmp_path):
    rows = []
    for tokens in (512, 1024):
        case = doubling_case(
            Implementation("ours: chunked", Doubling()),
            Implementation("eager", Doubling()),
            name=f"lens/test/S1/{tokens}/near",
            shape={"S": 1, "N": tokens},
        )
        rows += [row | machine() for row in runner.run_case(case, OPTIONS)]
    paths = draw(rows, tmp_path)
    assert [path.name for path in paths] == ["lens_test-S1-near_by_tokens.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert draw([], tmp_path) == []
    assert Bar("a", "median_s", 1.0).against is None


@pytest.mark.slow
def test_peak_memory_of_a_fresh_process(monkeypatch):
    monkeypatch.undo()
    from benchmarks.measure.memory import cpu_peak

    chunked = cpu_peak("lens/cpu-small/S1/512/saturated", "ours: chunked", 1, 200)
    eager = cpu_peak("lens/cpu-small/S1/512/saturated", "eager", 1, 200)
    logits = 4 * 512 * 16000 / 2**20
    assert eager > 4 * logits and 10 < chunked < eager
