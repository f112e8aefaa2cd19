"""The demonstration on runs that are made up: what is skipped, what the table says."""

import json
import math

import pytest
import tomli_w

from benchmarks import demonstration
from oisd.cli import parse_train
from oisd.config import to_tables


def finish(out, arm, seed, accuracy, step_s, overrides=()):
    """What a finished run leaves behind."""
    think, attention = demonstration.ARMS[arm]
    folder = demonstration.run_folder(out, arm, seed)
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval/avg_at_k": 0.5}]
    rows += [{"step": s, "reward": accuracy * s / 20, "time/step": step_s} for s in range(1, 21)]
    rows[-1]["eval/avg_at_k"] = accuracy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text("{}")
    settings = ["--oisd.think-weight", str(think), "--oisd.attention-weight", str(attention)]
    settings += ["--run.seed", str(seed), "--run.output-dir", str(folder)]
    settings += ["--run.grad-norm-every", "0", *overrides]
    tables = to_tables(parse_train(["arithmetic", *settings]))
    (folder / "config.toml").write_text(tomli_w.dumps(tables))


@pytest.fixture
def finished(tmp_path):
    for seed in range(3):
        for number, arm in enumerate(demonstration.ARMS):
            finish(tmp_path, arm, seed, 0.9 + 0.01 * seed + 0.02 * number, 0.5 + 0.05 * number)
    return tmp_path


def test_finished_runs_are_not_run_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(demonstration.subprocess, "run", None)
    monkeypatch.setattr(demonstration, "describe", lambda *_: {"device": "a machine"})
    demonstration.main(["--out", str(finished), "--results", str(finished / "results")])
    printed = capsys.readouterr().out
    assert (
        "| both (OISD) | 0.500 ± 0.000 | 0.970 ± 0.025 | +0.060 ± 0.000 | 0.650 | 1.30 |" in printed
    )
    assert "cannot show that the method helps" in printed
    assert (finished / "demonstration.png").read_bytes()[:4] == b"\x89PNG"
    rows = (finished / "results" / "demonstration.jsonl").read_text().splitlines()
    assert len(rows) == 12 and json.loads(rows[0])["arm"] == "GRPO"


def test_a_run_with_other_settings_is_refused(finished, monkeypatch):
    monkeypatch.setattr(demonstration.subprocess, "run", None)
    with pytest.raises(SystemExit, match="run.steps: 400 != 7"):
        demonstration.main(["--out", str(finished), "--", "--run.steps", "7"])


def test_an_unfinished_run_is_run_with_its_weights_and_seed(finished, monkeypatch):
    (demonstration.run_folder(finished, "think only", 1) / "summary.json").unlink()
    called = []
    monkeypatch.setattr(
        demonstration.subprocess, "run", lambda command, check: called.append(command)
    )
    demonstration.main(["--out", str(finished)])
    ((_, _, module, verb, recipe, *settings),) = called
    assert (module, verb, recipe) == ("oisd.cli", "train", "arithmetic")
    config = parse_train(["arithmetic", *settings])
    assert (config.oisd.think_weight, config.oisd.attention_weight) == (1.0, 0.0)
    assert config.run.seed == 1 and config.run.output_dir.endswith("think-only-seed-1")


def test_intervals_are_students():
    assert demonstration.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(demonstration.interval([1.0]))
