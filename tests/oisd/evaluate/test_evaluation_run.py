"""`oisd eval --benchmark`: shared out, killed, gone on with; the table and the curves.

The model is the built-in one, blank: it answers sums of digits with digits of any number. The
reward is whether their number is the gold answer's, so that some completions earn it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oisd.cli import main
from oisd.config import ConfigError
from oisd.data import PAPER_SYSTEM_PROMPT
from oisd.evaluate import bootstrap_interval, bootstrap_interval_of_mean, table
from oisd.evaluate.run import EvalRun, plan_jobs
from tests import ROOT

SETTINGS = [
    "--reward",
    "tests.oisd.rewards.reward_functions:length",
    "--system-prompt",
    "",
    "--samples",
    "4",
]
SETTINGS += ["--max-completion-tokens", "4", "--batch-size", "4", "--device", "cpu"]
SETTINGS += ["--threads", "1"]
PROBLEMS = 40


@pytest.fixture(autouse=True)
def in_the_folder_of_the_rewards(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    rows = [{"question": f"{i + 10}+{i + 20}", "answer": 1 + i % 3} for i in range(PROBLEMS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(problems: Path, out: Path, name: str = "amc23") -> list[str]:
    return [
        "eval", "arithmetic", "--benchmark", f"{name}:{problems}", *SETTINGS,
        "--output-dir", str(out),
    ]  # fmt: skip


def numbers(out: Path, name: str = "amc23") -> dict:
    summary = json.loads((out / name / "summary.json").read_text())
    del summary["output_dir"]
    return summary


def rows(out: Path, name: str = "amc23") -> list[dict]:
    files = sorted((out / name).glob("problems-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(problems, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        assert main(command(problems, out)) == 0
    finally:
        os.chdir(before)
    means = numbers(out)["problem_means"]
    assert 0.1 < sum(means) / PROBLEMS < 0.9 and len(set(means)) > 2  # or equality says little
    return out


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_two_processes_do_the_same_as_one(problems, whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, "2", "-m", "oisd.cli", *command(problems, tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(tmp_path) == numbers(whole)
    found = {file.name: len(file.read_text().splitlines()) for file in dumps(tmp_path)}
    assert found == {"problems-0-of-2.jsonl": 20, "problems-1-of-2.jsonl": 20}
    by_id = {row["id"]: row for row in rows(tmp_path)}
    assert by_id == {row["id"]: row for row in rows(whole)}

    # One process takes up what two have left, of which each loses the end.
    for file, kept in zip(dumps(tmp_path), (300, 2000), strict=True):
        file.write_bytes(file.read_bytes()[:kept])
    (tmp_path / "amc23" / "summary.json").unlink()
    assert main(command(problems, tmp_path)) == 0
    assert numbers(tmp_path) == numbers(whole)
    assert len(rows(tmp_path)) == PROBLEMS == len({row["id"] for row in rows(tmp_path)})


def dumps(out: Path) -> list[Path]:
    return sorted((out / "amc23").glob("problems-*.jsonl"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_kill_in_the_middle_changes_nothing(problems, whole, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "oisd.cli", *command(problems, tmp_path)],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    dump = tmp_path / "amc23" / "problems-0-of-1.jsonl"
    deadline = time.monotonic() + 120
    while not (dump.exists() and dump.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = dump.read_bytes()
    kept = left[: left.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < PROBLEMS and not (dump.parent / "summary.json").exists()

    assert main(command(problems, tmp_path)) == 0
    assert numbers(tmp_path) == numbers(whole)
    assert dump.read_bytes().startswith(kept)  # what was there was not sampled again
    assert len(rows(tmp_path)) == PROBLEMS


def test_a_finished_evaluation_needs_no_model(problems, whole, monkeypatch, capsys):
    monkeypatch.setattr("oisd.evaluate.run.load_for_command", None)
    before = dumps(whole)[0].read_bytes()
    assert main(command(problems, whole)) == 0
    assert dumps(whole)[0].read_bytes() == before
    printed = capsys.readouterr().out
    assert "AMC23" in printed and "table.md" in printed


def test_other_settings_are_refused_and_another_benchmark_is_not(problems, whole, capsys):
    assert main([*command(problems, whole), "--temperature", "0.5"]) == 2
    assert "temperature: 1.0 != 0.5" in capsys.readouterr().err
    assert main(command(problems, whole, "math500")[:-2] + [
        "--output-dir", str(whole), "--limit", "3", "--prompt-field", "question"
    ]) == 0  # fmt: skip
    assert numbers(whole, "math500")["problems"] == 3
    table = (whole / "table.md").read_text()
    assert "MATH500" in table and "AMC23" not in table  # of what was asked for


def test_both_graders_are_reported(tmp_path):
    """The math grader accepts what the strict one refuses: here, the same completions by both."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1+1", "answer": "2"}\n')
    command = ["eval", "arithmetic", "--benchmark", f"amc23:{file}", "--samples", "2"]
    command += ["--system-prompt", "", "--max-completion-tokens", "2", "--device", "cpu"]
    boxes = iter([[r"\boxed{4/2}", r"\boxed{2}"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oisd.policy.Policy.decode", lambda self, completions: next(boxes))
        assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    (row,) = rows(tmp_path / "out")
    assert row["rewards"] == [1.0, 1.0] and row["second_rewards"] == [0.0, 1.0]
    summary = numbers(tmp_path / "out")
    graders = summary["graders"]
    assert summary["avg_at_k"] == 1.0 and graders["second_avg_at_k"] == 0.5
    assert (graders["agreement"], graders["only_first"], graders["only_second"]) == (0.5, 1, 0)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "by boxed_string | 50.00" in table and "50.0 %" in table
    assert "* arithmetic, AMC23: 1 problems, where the benchmark has 40" in table


# ---- what is evaluated -----------------------------------------------------------------------


def test_the_papers_protocol():
    config = EvalRun(benchmark=("amc23", "math500", "aime24", "aime25", "gsm8k"))
    jobs = plan_jobs("org/model", config)
    assert [job.samples for job in jobs] == [16, 16, 32, 32, 16]
    assert {job.system_prompt for job in jobs} == {PAPER_SYSTEM_PROMPT}
    assert [str(job.folder) for job in jobs][:2] == [
        "runs/eval/org--model/amc23", "runs/eval/org--model/math500"
    ]  # fmt: skip
    assert (config.temperature, config.top_p, config.max_completion_tokens) == (1.0, 1.0, 8192)
    (own,) = plan_jobs("org/model", EvalRun(benchmark=("aime24:here",), samples=300))
    assert own.samples == 300 and own.source.path == Path("here") and own.folder.name == "aime24"


@pytest.mark.parametrize(
    "config, message",
    [
        (EvalRun(benchmark=("aime26",)), "'aime26' is none of amc23, math500"),
        (EvalRun(benchmark=("dapo",)), "'dapo' is none of"),
        (EvalRun(benchmark=("amc23", "amc23:folder")), "names a set twice"),
        (EvalRun(benchmark=("amc23",), data="x.jsonl"), "exclude each other"),
    ],
)
def test_impossible_requests(config, message):
    with pytest.raises(ConfigError, match=message):
        plan_jobs("model", config)


def test_no_network_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert main(["eval", "arithmetic", "--benchmark", "aime24", "--output-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "hf download --repo-type dataset HuggingFaceH4/aime_2024" in error
    assert '"aime24:some/folder"' in error


def test_the_message_can_be_followed_in_the_same_folder(problems, tmp_path, monkeypatch):
    """A benchmark that was not to be had leaves nothing that refuses its copy."""

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", unreachable)
        assert main(["eval", "arithmetic", "--benchmark", "amc23", "--output-dir", str(tmp_path)])
    assert main(command(problems, tmp_path)) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ("--samples 0", "--samples must be at least 1, got 0"),
        ("--max-completion-tokens 0", "--max-completion-tokens must be at least 1, got 0"),
        ("--max-prompt-tokens 0", "--max-prompt-tokens must be at least 1, got 0"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--limit 0", "--limit must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--seed -1", "--seed must be at least 0 and below 2^63, got -1"),
        ("--temperature -1", "--temperature must be at least 0, got -1.0"),
        ("--temperature nan", "--temperature must be at least 0, got nan"),
        ("--top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("--timeout 0", "--timeout must be above 0, got 0.0"),
        ("--device cudda", '--device must be "auto", "cpu", "cuda" or "cuda:N", got \'cudda\''),
        ("--reward nope", "--reward: load_reward: wanted"),
        ("--benchmark", "--benchmark: wanted any of amc23, math500"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message, tmp_path, capsys):
    asked = ["eval", "arithmetic", *options.split(), "--output-dir", str(tmp_path / "out")]
    assert main(asked) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_benchmarks_folder_is_named(problems, tmp_path, capsys):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "test.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (tmp_path / "copy" / "test-2.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    source = f"aime24:{tmp_path / 'copy'}"
    assert main(["eval", "arithmetic", "--benchmark", source]) == 1
    assert "wanted the rows of HuggingFaceH4/aime_2024" in capsys.readouterr().err


# ---- the table -------------------------------------------------------------------------------


def summary(name: str, means: list[float], samples: int = 16, **more) -> dict:
    mean = sum(means) / len(means)
    return {
        "benchmark": name, "samples": samples, "problems": len(means), "problem_means": means,
        "problems_expected": None, "avg_at_k": mean,
        "avg_at_k_interval": bootstrap_interval(means), "frac_finished": 1.0, "graders": {},
        "pass_at_k": {"1": mean, "2": mean, "4": mean},
        "pass_at_k_interval": {k: (mean, mean) for k in ("1", "2", "4")}, **more,
    }  # fmt: skip


FOUR = {"amc23": [0.5, 1.0], "math500": [1.0] * 4, "aime24": [0.0, 0.25], "aime25": [0.5]}


@pytest.fixture
def two_runs(tmp_path) -> list[str]:
    folders = []
    for run, factor in (("grpo", 0.5), ("oisd", 1.0)):
        for name, means in FOUR.items():
            folder = tmp_path / run / name
            folder.mkdir(parents=True)
            found = summary(name, [factor * m for m in means])
            (folder / "summary.json").write_text(json.dumps(found))
        folders.append(str(tmp_path / run))
    return folders


def test_layout_of_table_1(two_runs):
    runs = {Path(f).name: table.read_summaries(f) for f in two_runs}
    header, lines = table.table_cells(runs)
    assert header == [
        "Model", "AMC23 (Avg@16)", "MATH500 (Avg@16)", "AIME24 (Avg@16)", "AIME25 (Avg@16)",
        "Mean of the four",
    ]  # fmt: skip
    assert [line[0] for line in lines] == ["grpo", "oisd"]
    mean = (0.75 + 1.0 + 0.125 + 0.5) / 4
    assert lines[1][-1].startswith(f"{100 * mean:.2f} [")
    assert lines[0][-1].startswith(f"{50 * mean:.2f} [")
    assert lines[1][2] == "100.00 [100.0, 100.0]"


def test_three_benchmarks_have_no_mean():
    runs = {"a": [summary(name, FOUR[name]) for name in ("amc23", "aime24", "aime25")]}
    assert table.table_cells(runs)[1][0][-1] == ""


def test_compare(two_runs, tmp_path, capsys):
    out = tmp_path / "compare"
    assert main(["compare", *two_runs, "--output-dir", str(out)]) == 0
    assert "grpo" in capsys.readouterr().out
    assert (out / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "table.md").read_text().count("\n| ") == 3
    assert main(["compare"]) == 2 and main(["compare", str(tmp_path / "nothing")]) == 2
    assert "holds no finished benchmark" in capsys.readouterr().err


def test_panels_like_figure_3(two_runs, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        table,
        "plot_pass_at_k_panels",
        lambda panels, path, bands: drawn.update(panels) or path,
    )
    runs = {Path(f).name: table.read_summaries(f) for f in two_runs}
    table.write(runs, tmp_path)
    assert list(drawn) == ["AMC23", "MATH500", "AIME24", "AIME25", "Mean of the four"]
    assert all(list(curves) == ["grpo", "oisd"] for curves in drawn.values())
    assert drawn["Mean of the four"]["oisd"][2] == pytest.approx(0.59375)


def test_notes_name_what_a_reader_must_know():
    runs = {"a": [summary("amc23", [1.0], problems_expected=40, frac_finished=0.9)]}
    whole, cut = table.notes(runs)
    assert whole == "* a, AMC23: 1 problems, where the benchmark has 40"
    assert "10.0 % of the completions reached the length limit" in cut
    assert table.table_cells(runs)[1][0][1].endswith("*")


def test_the_interval_of_the_mean_weighs_benchmarks_alike():
    one = bootstrap_interval_of_mean([[0.0, 1.0] * 50], resamples=2000)
    assert one == pytest.approx(bootstrap_interval([0.0, 1.0] * 50), abs=0.02)
    # Of two groups, the large one adds next to nothing to the width.
    both = bootstrap_interval_of_mean([[0.0, 1.0] * 50, [0.5] * 500], resamples=2000)
    assert both[1] - both[0] == pytest.approx((one[1] - one[0]) / 2, rel=0.1)
    with pytest.raises(ValueError, match="groups of values"):
        bootstrap_interval_of_mean([[1.0], []])
