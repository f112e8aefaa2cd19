"""The study's tasks, arms, seeds and settings; a digest of them is in every row of results.

Every setting that the outcome depends on is written here, so that a later change of a recipe or of
a default cannot change the study unnoticed. A change of this file makes another study: the runner
refuses to add its rows to a file that holds those of the old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, NamedTuple

from oisd.config import TrainConfig, from_tables
from oisd.schema import merged

Tables = dict[str, dict[str, Any]]
BASELINE = "grpo"


class Cell(NamedTuple):
    """One run of the study."""

    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.arm}/{self.seed}"


@dataclass(frozen=True)
class Protocol:
    """What is run and measured.

    common: settings of every run. tasks, arms: what each adds to them, the baseline among the arms.
    A task's model and warm-up make the start of each of its seeds, from which all arms set out.
    lens_texts: held-out problems, with their solutions, that the layers are compared on.
    """

    common: Tables
    tasks: dict[str, Tables]
    arms: dict[str, Tables]
    seeds: tuple[int, ...]
    lens_texts: int

    @property
    def digest(self) -> str:
        """Of all settings; the same for equal ones."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cells(self) -> list[Cell]:
        """All runs, in their order: a seed of a task is complete before the next one begins."""
        return [
            Cell(task, arm, seed) for seed in self.seeds for task in self.tasks for arm in self.arms
        ]

    def pairs(self) -> Iterator[tuple[str, int]]:
        """The (task, seed) whose arms share a start."""
        yield from ((task, seed) for seed in self.seeds for task in self.tasks)

    def warm_up(self, task: str, seed: int, folder: str) -> TrainConfig:
        """The run that makes the start of a seed: a warm-up and no step."""
        own: Tables = {"run": {"seed": seed, "output_dir": folder, "steps": 0}, "eval": {}}
        tables = reduce(merged, [self.common, self.tasks[task], own])
        return from_tables(tables | {"eval": {}}, where="study")

    def run(self, cell: Cell, start: str, folder: str) -> TrainConfig:
        """A cell's run from the folder of its start."""
        own: Tables = {
            "model": {"path": start},
            "warmup": {"steps": 0},
            "run": {"seed": cell.seed, "output_dir": folder},
        }
        tables = reduce(merged, [self.common, self.tasks[cell.task], self.arms[cell.arm], own])
        return from_tables(tables, where="study")


def both(share: float, **more: Any) -> Tables:
    """Each term by itself keeps the share; both together make at most twice of it."""
    align = {"think_share": share, "attention_share": share}
    # Until the first measurement, which is the first step's, the paper's weights.
    return {"oisd": {"think_weight": 1.0, "attention_weight": 0.1} | align | more}


STEPS = 40
# What `oisd lens` picks for the pilot of the task "modular": no block raises the entropy of the
# lens there, so that it is the middle layer.
STUDENT = 3

COMMON: Tables = {
    "model": {"dtype": "float32", "attn_implementation": "sdpa"},
    "data": {"split": "train", "max_prompt_tokens": 64},
    "rollout": {
        "prompts_per_step": 16,
        "completions_per_prompt": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "batch_size": 256,
        "engine": "generate",
    },
    "grpo": {
        "advantage": "grpo",
        "aggregation": "token-mean",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "scale_by_std": True,
        "kl_coef": 0.0,
        "minibatches": 2,
    },
    "oisd": {
        "student_layers": [STUDENT],
        "think_weight": 0.0,
        "attention_weight": 0.0,
        "share_every": 5,
        "lens_temperature": 1.0,
        "lens_norm": "final",
        "divergence": "jsd",
        "beta": 0.5,
        "attention_kernel": "separate",
    },
    "optimizer": {
        "learning_rate": 1e-4,
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
    },
    "warmup": {"steps": 1500, "batch_size": 32, "learning_rate": 2e-3},
    "eval": {
        "split": "test",
        "limit": 128,
        "samples": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "every": 10,
    },
    "run": {
        "steps": STEPS,
        "save_every": 20,
        "keep_checkpoints": 1,
        "completions_every": 0,
        "tokens_per_microbatch": 8192,
        "grad_norm_every": 0,
        "threads": 1,
        "device": "cpu",
        "trackers": [],
    },
}


def task(source: str, reward: str, tokens: int, stop_at: float, **settings: Any) -> Tables:
    """A built-in task; stop_at: the probability of a solution at which the warm-up ends."""
    tables: Tables = {
        "model": {"path": "scratch:layers=6,width=168,heads=4"},
        "data": {"source": source},
        "eval": {"source": source},
        "reward": {"function": reward},
        "rollout": {"max_completion_tokens": tokens},
        "warmup": {"stop_at": stop_at},
    }
    return merged(tables, settings)


TASKS: dict[str, Tables] = {
    "sums": task("arithmetic:digits=3", "exact", 8, 0.3, warmup={"steps": 800, "batch_size": 64}),
    "modular": task("modular:terms=12,modulus=7", "final", 32, 0.1),
    "running": task("running_sum:terms=8,digits=1", "final", 32, 0.35),
}

ARMS: dict[str, Tables] = {
    BASELINE: {},
    "both-30": both(0.3),
    "paper": {"oisd": {"think_weight": 1.0, "attention_weight": 0.1}},
    "both-100": both(1.0),
    "both-10": both(0.1),
    "think-30": {"oisd": {"think_weight": 1.0, "think_share": 0.3}},
    "attention-30": {"oisd": {"attention_weight": 0.1, "attention_share": 0.3}},
    "both-30-absolute": both(0.3, advantage="absolute"),
    "both-30-shuffled": both(0.3, advantage="shuffled"),
    "both-30-annealed": both(0.3, think_schedule="linear", attention_schedule="linear"),
    "bupo": {"grpo": {"internal_layer": STUDENT, "internal_steps": STEPS // 3}},
}

STUDY = Protocol(COMMON, TASKS, ARMS, seeds=(11, 12, 13, 14, 15), lens_texts=32)
