"""Experiment trackers: fake packages stand for W&B and Trackio, TensorBoard is the real one."""

import json
import sys
import types

import pytest

from oisd.cli import main
from oisd.config import ConfigError, from_tables
from oisd.run.folder import may_change
from oisd.run.trackers import Trackers
from oisd.trainer import Trainer

FAKE = """
calls = []
failing = set()


class Settings:
    def __init__(self, **options):
        self.options = options


class Run:
    starting_step = 0

    def log(self, values, step):
        if step in failing:
            raise ConnectionError("no route <to> host")
        calls.append(("log", step, values))

    def finish(self, exit_code=0):
        calls.append(("finish", exit_code))


def init(**options):
    if "init" in failing:
        raise RuntimeError("api_key not configured")
    calls.append(("init", options))
    print("greetings")
    return Run()
"""


@pytest.fixture
def packages(tmp_path, monkeypatch) -> dict[str, types.ModuleType]:
    """Fake wandb and trackio, imported as the real ones would be."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    found = {name: __import__(name) for name in ("wandb", "trackio")}
    yield found
    for name in found:
        sys.modules.pop(name, None)


def tables(folder, *trackers, steps=2):
    return {
        "data": {"max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 2, "completions_per_prompt": 2, "max_completion_tokens": 3},
        "reward": {"function": "exact"},
        "oisd": {"student_layers": [2], "attention_weight": 0.0},
        "run": {
            "output_dir": str(folder),
            "steps": steps,
            "save_every": 2,
            "device": "cpu",
            "trackers": list(trackers),
        },
    }


def trackers(folder, *names):
    folder.mkdir(exist_ok=True)
    return Trackers(from_tables(tables(folder, *names)), folder)


def logged(package):
    return [(call[1], call[2]["reward"]) for call in package.calls if call[0] == "log"]


def test_a_run_logs_and_a_resumed_one_goes_on_in_the_same_place(tmp_path, packages, capsys):
    folder = tmp_path / "run"
    first = trackers(folder, "wandb", "trackio")
    first.start(0)
    first.log({"step": 1, "reward": 0.5, "alarms": ["text is no number"], "kl": None})
    first.close()
    second = trackers(folder, "trackio", "wandb")
    second.start(4)
    second.log({"step": 5, "reward": 0.25})
    second.close(failed=True)
    ids = json.loads((folder / "trackers.json").read_text())
    for name, package in packages.items():
        inits = [call[1] for call in package.calls if call[0] == "init"]
        assert [options["resume"] for options in inits] == ["allow", "allow"]
        assert inits[0]["config"]["run"]["steps"] == 2
        assert package.calls[1] == ("log", 1, {"reward": 0.5})
        assert logged(package) == [(1, 0.5), (5, 0.25)], name
    starts = [call[1] for call in packages["wandb"].calls if call[0] == "init"]
    assert [options["id"] for options in starts] == [ids["wandb"]] * 2
    starts = [call[1] for call in packages["trackio"].calls if call[0] == "init"]
    assert [options["name"] for options in starts] == [f"run-{ids['trackio']}"] * 2
    assert ids["wandb"] != ids["trackio"]
    assert packages["wandb"].calls[-1] == ("finish", 1)
    told = capsys.readouterr()
    assert told.out.count("greetings") == 2  # W&B's alone: Trackio greets on standard error
    assert (
        f"wandb goes on with run {ids['wandb']}; steps after 4 that it has already keep" in told.err
    )
    assert "are in it twice" in told.err


def test_wandb_is_not_given_steps_that_it_has(tmp_path, packages, monkeypatch):
    monkeypatch.setattr(packages["wandb"].Run, "starting_step", 6)
    found = trackers(tmp_path / "run", "wandb")
    found.start(4)
    for step in (5, 6, 7):
        found.log({"step": step, "reward": step / 10})
    assert logged(packages["wandb"]) == [(6, 0.6), (7, 0.7)]


def test_one_that_fails_is_said_once_and_left_after_three_times(tmp_path, packages):
    found = trackers(tmp_path / "run", "wandb", "trackio")
    found.start(0)
    packages["wandb"].failing |= {2, 4, 5, 6}
    with pytest.warns(UserWarning, match="wandb did not take the metrics of step 2 .*no route"):
        found.log({"step": 2, "reward": 0.0})
    found.log({"step": 3, "reward": 0.0})
    found.log({"step": 4, "reward": 0.0})  # said before: pytest would show a warning as an error
    found.log({"step": 5, "reward": 0.0})
    with pytest.warns(UserWarning, match="failed 3 times in a row and gets no more"):
        found.log({"step": 6, "reward": 0.0})
    found.log({"step": 7, "reward": 0.0})
    assert [step for step, _ in logged(packages["wandb"])] == [3]
    assert [step for step, _ in logged(packages["trackio"])] == [2, 3, 4, 5, 6, 7]


def test_one_that_does_not_start_is_refused(tmp_path, packages):
    packages["wandb"].failing.add("init")
    found = trackers(tmp_path / "run", "trackio", "wandb")
    with pytest.raises(ConfigError, match="wandb does not start: RuntimeError: api_key.*login"):
        found.start(0)
    assert packages["trackio"].calls[-1][0] == "finish"


def test_unknown_and_missing_ones_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="got 'wanbd'; did you mean 'wandb'"):
        from_tables({"run": {"trackers": ["wanbd"]}})
    with pytest.raises(ConfigError, match="run.trackers must be names, each once"):
        from_tables({"run": {"trackers": ["wandb", "wandb"]}})
    # W&B leaves a folder of this name where it ran, which Python would import.
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="'wandb', which is not installed; `pip install wandb`"):
        Trackers(from_tables({"run": {"trackers": ["wandb"]}}), tmp_path)


def test_a_training_run_survives_its_tracker(tmp_path, packages, monkeypatch):
    """And may have others when it goes on; without any, nothing is imported."""
    folder = tmp_path / "run"
    packages["wandb"].failing.add(1)
    with pytest.warns(UserWarning, match="wandb did not take the metrics of step 1"):
        Trainer(from_tables(tables(folder, "tensorboard", "wandb"))).train()
    assert [step for step, _ in logged(packages["wandb"])] == [2]
    assert packages["wandb"].calls[-1] == ("finish", 0)
    assert len(list((folder / "tensorboard").iterdir())) == 1
    Trainer(from_tables(tables(folder, "trackio", steps=3))).train()
    assert [step for step, _ in logged(packages["trackio"])] == [3]
    assert len(list((folder / "tensorboard").iterdir())) == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert logged(packages["trackio"])[0][1] == rows[2]["reward"]
    assert may_change("run.trackers: ('wandb',) != ()") and not may_change("run.seed: 0 != 1")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_ones_offline(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for step in (0, 1):
        found = trackers(tmp_path / "run", name)
        found.start(step)
        found.log({"step": step + 1, "reward": 0.5})
        found.close()
    assert main(["report", str(tmp_path / "run")]) == 2  # a folder of trackers is not a run
