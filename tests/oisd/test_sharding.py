"""Processes that share one model by FSDP2: their gradients, their runs, their checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oisd.config import from_tables
from oisd.trainer import Trainer
from tests import ROOT
from tests.oisd.launches import launch
from tests.oisd.sharded_gradients import CASES
from tests.oisd.test_trainer import (
    REWARD,
    assert_same_run,
    launched,
    metrics,
    tables,
    weights,
    without_plots,
)

__all__ = ["without_plots"]  # a fixture, for each test here

# Two optimizer steps for each rollout, and a reference model that is split as well.
SHARED = {
    "grpo": {"kl_coef": 0.1, "minibatches": 2},
    "run": {"sharding": "fsdp2"},
    "eval": {"source": "none"},
}
FULL = """
import os
import torch.distributed.checkpoint.filesystem as filesystem
write = filesystem.FileSystemWriter.write_data
def write_or_fail(self, plan, planner):
    if os.environ["RANK"] == "1" and "step-4" in str(self.path):
        raise OSError(28, "No space left on device")
    return write(self, plan, planner)
filesystem.FileSystemWriter.write_data = write_or_fail
"""
LEFT = """
import os, pathlib
if os.environ["RANK"] == "0":
    pathlib.Path("left").write_text(str(sorted(os.listdir("full/checkpoints"))))
"""


@pytest.fixture(autouse=True)
def reward_module(tmp_path, monkeypatch):
    (tmp_path / "tests_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- gradients


def gradients(processes: int, folder: Path) -> dict:
    out = folder / "gradients.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.oisd.sharded_gradients", str(processes), str(out), *CASES],
        capture_output=True, text=True, timeout=280, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return gradients(2, tmp_path_factory.mktemp("two"))


def check(case: dict) -> None:
    """Against the gradient of a whole model in float32, which must be far from 0."""
    assert case["norm"] > 1 and case["sharded"] == 1
    if case["error of the whole"] == 0:  # itself in float32
        assert case["error"] < 1e-5
        assert case["norms"][0]["grad_norm"] == pytest.approx(case["norm"], rel=1e-5)
        assert case["logprobs"] < 2e-5
        bound = 1e-4
    else:
        assert 1e-4 < case["error of the whole"] < 0.2
        assert case["error"] < 1.5 * case["error of the whole"]
        assert case["logprobs"] < 0.2
        bound = 0.1
    for ours, theirs in (case["norms"], case["metrics"]):
        assert ours.keys() == theirs.keys() and ours
        assert ours == pytest.approx(theirs, rel=bound, abs=bound / 100)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_one(found, name):
    check(found[name])


@pytest.mark.slow
def test_four_processes_have_the_gradient_of_one(tmp_path):
    for case in gradients(4, tmp_path).values():
        check(case)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory) -> Path:
    """A folder with runs of two processes.

    `whole` is one that nobody disturbed. The last checkpoint of `full` could not be written; `said`
    and `left` hold its words and its checkpoints, before it was started again with room.
    """
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tests_reward.py").write_text(REWARD)
    whole, full = (launched(folder / name, processes=2, **SHARED) for name in ("whole", "full"))
    launches = [whole, replace(full, before=FULL), replace(full, before=LEFT)]
    done, failed, again = launch(folder, launches)
    assert all(failed.statuses), failed.stderr[-3000:]
    (folder / "said").write_text(failed.stderr)
    for each in (done, again):
        assert each.went_well, each.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def shared_run(shared_runs) -> Path:
    return shared_runs / "whole"


def assert_nearly_the_same(ours: Path, theirs: Path) -> None:
    for a, b in zip(metrics(ours), metrics(theirs), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (a["step"], name)
    start, one, two = weights(theirs, 2), weights(theirs, 4), weights(ours, 4)
    assert one.keys() == two.keys()
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert moved > 1e-3
        # Sums in another order, and AdamW divides by small second moments: a hundredth of the way.
        assert (one[name] - two[name]).norm() < 1e-2 * moved, name


def test_a_shared_model_trains_as_a_whole_one(shared_run, tmp_path):
    whole = SHARED | {"run": {"sharding": "none"}}
    Trainer(from_tables(tables(tmp_path / "whole", **whole))).train()
    assert_nearly_the_same(shared_run, tmp_path / "whole")
    # The folder is one that a user reads: it differs in nothing but the optimizer's state.
    ours, theirs = (f / "checkpoints" / "step-4" for f in (shared_run, tmp_path / "whole"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    assert {p.name for p in ours.iterdir()} - {p.name for p in theirs.iterdir()} == {"optimizer"}
    # One process goes on from what two have written, and needs no other setting.
    (ours / "digests.json").rename(ours / "digests.lost")
    with pytest.warns(UserWarning, match="step-4 is damaged") as warned:
        alone = Trainer(from_tables(tables(shared_run, **SHARED)))
    assert not [w for w in warned if "torch.distributed" in str(w.message)]
    (ours / "digests.lost").rename(ours / "digests.json")
    assert alone.step == 2
    state = alone.optimizer.adamw.state
    assert all(state[p]["step"] == 4 and state[p]["exp_avg"].norm() > 0 for p in state)
    assert len(state) == len(alone.optimizer.parameters)


def test_a_part_that_cannot_be_written_leaves_the_checkpoint_before(shared_runs):
    said = (shared_runs / "said").read_text()
    assert "RunFolderError: checkpoint step-4 could not be written to" in said, said[-3000:]
    assert "(is the disk full?)" in said and "No space left on device" in said
    assert (shared_runs / "left").read_text() == "['step-0', 'step-2']"
    assert_same_run(shared_runs / "full", shared_runs / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        "place = oisd.trainer.Trainer; name = '_roll_out'",
        "import oisd.optimizer; place = oisd.optimizer.Optimizer; name = 'step'",
        "import oisd.run.checkpoints; place = oisd.run.checkpoints; name = '_seal'",
    ],
    ids=["sampling", "update", "checkpoint"],
)
def test_killed_and_started_again_ends_the_same(shared_run, tmp_path, kill):
    run, calls = tmp_path / "run", 8
    # A rollout and two updates a step, a checkpoint after the warm-up, step 2 and step 4.
    calls = {"_roll_out": 4, "step": 6, "_seal": 3}[kill.split("'")[1]]
    before = [
        "import os, oisd.trainer",
        kill,
        "real, calls = getattr(place, name), []",
        "def counted(*args, **kwargs):",
        "    calls.append(1)",
        f"    if len(calls) == {calls} and os.environ['RANK'] == '1': die()",
        "    return real(*args, **kwargs)",
        "setattr(place, name, counted)",
    ]
    one = launched(run, processes=2, **SHARED)
    (died,) = launch(tmp_path, [replace(one, before="\n".join(before))])
    assert died.statuses[1] == -signal.SIGKILL and died.statuses[0] != 0, died.stderr[-3000:]
    assert not (run / "checkpoints" / "step-4").exists()
    (done,) = launch(tmp_path, [one])
    assert done.went_well, done.stderr[-3000:]
    assert_same_run(run, shared_run)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["none", "fsdp2"])
def test_another_number_of_processes_goes_on(shared_run, tmp_path, first):
    """From one process to four, and from two to one."""
    run = tmp_path / "run"
    start = {**SHARED, "run": {"steps": 2, "sharding": first}}
    sizes = (2, 1) if first == "fsdp2" else (1, 4)
    settings = zip(sizes, (start, SHARED), strict=True)
    launches = [launched(run, processes=size, **changes) for size, changes in settings]
    for done in launch(tmp_path, launches):
        assert done.went_well, done.stderr[-3000:]
    assert_nearly_the_same(run, shared_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"offload": True}, "model": {"gradient_checkpointing": True}},
        {"rollout": {"engine": "continuous"}},
        {"rollout": {"prompts_per_step": 1}, "grpo": {"minibatches": 1}},
    ],
    ids=["offload", "continuous", "a process without prompts"],
)
def test_variants(tmp_path, changes):
    runs = {sharding: tmp_path / sharding for sharding in ("none", "fsdp2")}
    launches = [
        launched(folder, processes=1 if sharding == "none" else 2,
                 **{**SHARED, **changes, "run": {"sharding": sharding}})
        for sharding, folder in runs.items()
    ]  # fmt: skip
    for done in launch(tmp_path, launches):
        assert done.went_well, done.stderr[-3000:]
    assert_nearly_the_same(runs["fsdp2"], runs["none"])


def test_one_process_alone_has_nothing_to_split(tmp_path):
    with pytest.warns(UserWarning, match=r'run.sharding = "fsdp2" .* one process, .* torchrun'):
        trainer = Trainer(from_tables(tables(tmp_path / "run", **SHARED)))
    assert not any(hasattr(p, "placements") for p in trainer.policy.model.parameters())
    assert torch.is_tensor(trainer.optimizer.parameters[0])
