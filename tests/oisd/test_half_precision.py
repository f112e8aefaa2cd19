"""Runs in bfloat16: rollouts from the copy, their gap, and the optimizer's state on the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from oisd import optimizer as optimizers
from oisd.config import ModelConfig, RolloutConfig, TrainConfig, from_tables
from oisd.evaluate import evaluate
from oisd.optimizer import Optimizer, parts_of
from oisd.policy import Policy, load_policy
from oisd.run.processes import Processes
from oisd.trainer import Trainer
from tests.oisd.test_trainer import (
    assert_same_run,
    metrics,
    reward_module,
    tables,
    weights,
    without_plots,
)

__all__ = ["reward_module", "without_plots"]  # fixtures, for each test here

CHANGES = {
    "model": {"dtype": "bfloat16"},
    "grpo": {"minibatches": 2},
    "eval": {"every": 1, "limit": 2},
    "run": {"steps": 2, "save_every": 1, "grad_norm_every": 0},
}


def train(folder: Path, **rollout) -> None:
    Trainer(from_tables(tables(folder, rollout=rollout, **CHANGES))).train()


def test_a_run_samples_from_the_copy_and_logs_the_gap(tmp_path, monkeypatch):
    seen, sample = [], Policy.sample

    def watched(self, *given, **settings):
        made = sample(self, *given, **settings)
        seen.append((self.is_cast, {p.dtype for p in self.model.parameters()}))
        return made

    monkeypatch.setattr(Policy, "sample", watched)
    train(tmp_path / "run")
    assert len(seen) > 4 and all(cast for cast, _ in seen)
    assert all(dtypes == {torch.bfloat16} for _, dtypes in seen)
    assert {t.dtype for t in weights(tmp_path / "run", 2).values()} == {torch.float32}
    for row in metrics(tmp_path / "run")[1:]:
        assert 1e-7 < row["kl/sampler"] < 0.01  # rounding, and no more
        assert row["kl/sampler"] < row["kl/sampler_max"] < 1
        # Near 1, and seen by the loss although the engine is `generate`.
        assert row["tis/weight"] != 1 and abs(row["tis/weight"] - 1) < 0.02


def test_offload_changes_no_number_and_may_change_in_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "_MOMENTS_AT_ONCE", 10_000)
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(whole)
    train(other, offload=True)
    assert_same_run(other, whole, step=2)
    state = torch.load(other / "checkpoints/step-2/trainer_state.pt", weights_only=True)
    theirs = torch.load(whole / "checkpoints/step-2/trainer_state.pt", weights_only=True)
    for number, one in state["learner"]["optimizer"]["state"].items():
        for name, moment in one.items():
            assert torch.equal(moment, theirs["learner"]["optimizer"]["state"][number][name])
    resumed = tmp_path / "resumed"
    changes = {**CHANGES, "run": {**CHANGES["run"], "steps": 1}}
    Trainer(from_tables(tables(resumed, **changes))).train()
    train(resumed, offload=True)
    assert_same_run(resumed, whole, step=2)


def test_a_part_of_the_moments_is_on_the_card_at_a_time(monkeypatch):
    monkeypatch.setattr(optimizers, "_MOMENTS_AT_ONCE", 400)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(n, 5) for n in (5, 5, 40, 5)))
    learner = Optimizer(model, TrainConfig(rollout=RolloutConfig(offload=True)), Processes("cpu"))
    moves, move = [], Optimizer._move

    def watched(self, parameters, *, to_host):
        moves.append((to_host, [id(p) for p in parameters]))
        move(self, parameters, to_host=to_host)

    monkeypatch.setattr(Optimizer, "_move", watched)
    before = [p.detach().clone() for p in learner.parameters]
    for parameter in learner.parameters:
        parameter.grad = torch.randn_like(parameter)
    learner.step(torch.tensor(1.0))
    assert all((p - b).norm() > 0 for p, b in zip(learner.parameters, before, strict=True))
    assert all(p.grad is None for p in learner.parameters)
    # To the card and back in turns, each parameter once, no part beyond the bound.
    assert [to_host for to_host, _ in moves] == [False, True] * (len(moves) // 2)
    assert [ids for _, ids in moves[::2]] == [ids for _, ids in moves[1::2]]
    assert sum((ids for _, ids in moves[::2]), []) == [id(p) for p in learner.parameters]
    sizes = {id(p): 8 * p.numel() for p in learner.parameters}
    for _, ids in moves:
        assert len(ids) == 1 or sum(sizes[i] for i in ids) <= 400
    assert len(moves) > 4


@pytest.mark.parametrize(
    "sizes, most, wanted",
    [
        ([1, 1, 1], 16, [[0, 1], [2]]),
        ([9, 1, 1], 16, [[0], [1, 2]]),
        ([1, 9], 16, [[0], [1]]),
        ([], 16, []),
    ],
)
def test_parts(sizes, most, wanted):
    assert parts_of([torch.zeros(n) for n in sizes], most) == wanted


def test_the_last_evaluation_is_that_of_the_checkpoint_read_in_bfloat16(tmp_path):
    folder = tmp_path / "run"
    trainer = Trainer(from_tables(tables(folder, **CHANGES)))
    trainer.train()
    config = ModelConfig(path=str(folder / "checkpoints" / "step-2"), dtype="bfloat16")
    policy = load_policy(config, seed=0).cast("cpu")
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    found = evaluate(
        policy, trainer.eval_examples, trainer.eval_prompts,
        lambda texts, answers: [0.0] * len(texts), samples=4, max_completion_tokens=5, seed=2,
    )  # fmt: skip
    file = folder / "evaluations" / "step-2.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [p.completions for p in found] == [row["completions"] for row in rows]
    assert len({text for p in found for text in p.completions}) > 2
