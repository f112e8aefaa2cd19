"""Runs read from their folders, and grouped: those of a group differ in nothing but the seed.

What decides over a group is every setting but `run.seed` and those that change no result, the
weights that the run began with, and the source of its reward.
"""

from __future__ import annotations

import json
import math
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from oisd.config import ConfigError, TrainConfig, differences, load_recipe, to_tables
from oisd.evaluate import Problem
from oisd.run.folder import RunFolder, may_change
from oisd.run.jsonl import read_rows

_LARGEST_TAIL = 10


@dataclass(frozen=True)
class Run:
    """One run, as far as it has come."""

    folder: RunFolder
    config: TrainConfig
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, one for each step, in their order."""
    is_cut: bool
    """Whether the last line of metrics.jsonl is unfinished."""
    sources: Mapping[str, Any]
    """Of sources.json; {} for a run without it."""

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def steps(self) -> int:
        """The last step that was done."""
        return self.rows[-1]["step"]

    @property
    def is_finished(self) -> bool:
        return self.steps >= self.config.run.steps

    def values(self, metric: str) -> dict[int, float]:
        """A metric by step, where it was measured and is finite."""
        found = {}
        for row in self.rows:
            value = row.get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                found[row["step"]] = float(value)
        return found

    def tail_mean(self, metric: str) -> float | None:
        """Mean over the last steps, at most ten and at most a quarter, as in summary.json."""
        values = [value for step, value in self.values(metric).items() if step > 0]
        tail = max(1, min(_LARGEST_TAIL, len(values) // 4))
        return sum(values[-tail:]) / len(values[-tail:]) if values else None

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order in which they first occur."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in ("step", "alarms")]

    @property
    def alarms(self) -> list[str]:
        return [f"step {row['step']}: {a}" for row in self.rows for a in row.get("alarms", ())]

    @property
    def evaluated_steps(self) -> list[int]:
        """The steps whose evaluation is on disk with its completions."""
        return _numbered(self.folder.evaluations, "jsonl")

    @property
    def completion_steps(self) -> list[int]:
        return _numbered(self.folder.completions, "jsonl")

    def problems(self, step: int) -> list[Problem]:
        """The evaluation after a step. Raises ConfigError for a file that is not one."""
        file = self.folder.evaluations / f"step-{step}.jsonl"
        try:
            return [Problem(**row) for row in read_rows(file)[0]]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{file} is not an evaluation of `oisd train`: {error}") from error

    def summary(self, step: int) -> dict[str, Any]:
        """The numbers of the evaluation after a step; {} where they are missing."""
        return _read_json(self.folder.evaluations / f"step-{step}.json")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in the order of the seeds."""

    letter: str
    name: str
    runs: list[Run]

    @property
    def title(self) -> str:
        return f"{self.letter}: {self.name}"

    @property
    def config(self) -> TrainConfig:
        return self.runs[0].config

    @cached_property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.metrics))

    @property
    def seeds(self) -> list[int]:
        return [run.config.run.seed for run in self.runs]


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs in some folders, and notes on what was left out.

    Raises ConfigError for a folder that is not a run or is named twice, and if no run has a step.
    """
    runs, empty = [], []
    for folder in folders:
        run = _read_run(Path(folder))
        if run is None:
            empty.append(str(folder))
        else:
            runs.append(run)
    paths = [run.folder.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"oisd report: {path} is named twice; wanted each run once")
    if not runs:
        raise ConfigError(
            f"{', '.join(empty)} holds a run without a finished step; wait for its first step"
        )
    return runs, [f"{folder} has no finished step yet and is left out." for folder in empty]


def _read_run(path: Path) -> Run | None:
    if not (path / "config.toml").is_file():
        what = "has no config.toml" if path.is_dir() else "is no folder"
        raise ConfigError(
            f"oisd report: {str(path)!r} is not a run of `oisd train`, because it {what}; wanted "
            f"the run.output_dir of one"
        )
    folder = RunFolder(path)
    try:
        found, size = read_rows(folder.metrics_file)
        rows = {row["step"]: row for row in found}
        in_order = [rows[step] for step in sorted(rows)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder.metrics_file} is damaged: wanted a JSON object with a step in each line, got "
            f"{error}"
        ) from error
    if not in_order:
        return None
    return Run(
        folder,
        load_recipe(path / "config.toml"),
        in_order,
        folder.metrics_file.stat().st_size > size,
        _read_json(folder.sources),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbered(folder: Path, suffix: str) -> list[int]:
    names = (re.fullmatch(rf"step-(\d+)\.{suffix}", f.name) for f in folder.glob("step-*"))
    return sorted(int(match[1]) for match in names if match)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs were given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    parts = [sorted(part, key=lambda run: run.config.run.seed) for part in found.values()]
    names = [_common_name([run.name for run in part]) for part in parts]
    return [
        Group(_letter(place), names[place], part)
        for place, part in enumerate(parts)
    ]  # fmt: skip


def _letter(place: int) -> str:
    letters = string.ascii_uppercase
    return letters[place] if place < len(letters) else f"{letters[place % 26]}{place // 26}"


def _key(run: Run) -> str:
    settings = {
        f"{table}.{key}": value
        for table, values in to_tables(run.config).items()
        for key, value in values.items()
        if _decides(f"{table}.{key}")
    }
    weights = {
        name: record.get("sha256")
        for name, record in run.sources.get("model", {}).get("files", {}).items()
    }
    return json.dumps([settings, weights, run.sources.get("reward")], sort_keys=True)


def _decides(setting: str) -> bool:
    """Whether a setting tells groups apart. A run's length does, since schedules end with it."""
    if setting in ("run.seed", "run.threads", "run.grad_norm_every", "run.trackers"):
        return False
    return setting == "run.steps" or not may_change(setting)


def _common_name(names: Sequence[str]) -> str:
    """What the names of a group's folders begin with, without a seed's remains."""
    if len(names) == 1:
        return names[0]
    common = re.sub(r"([-_. ]*(seed|s))?[-_. ]*$", "", os.path.commonprefix(names))
    return common or names[0]


def setting_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each setting in which groups differ, and its value in each group."""
    names = {
        found.partition(":")[0]: None
        for group in groups[1:]
        for found in differences(groups[0].config, group.config)
    }
    return [
        (name, [_value(group.config, name) for group in groups])
        for name in names
        if _decides(name)
    ]  # fmt: skip


def _value(config: TrainConfig, name: str) -> str:
    table, key = name.split(".")
    value = getattr(getattr(config, table), key)
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# Settings that say what is learned and what is measured.
_OF_TASK = (
    "data.source", "data.split", "data.subset", "reward.function",
    "eval.source", "eval.split", "eval.subset", "eval.limit", "eval.samples",
    "eval.temperature", "eval.top_p", "rollout.max_completion_tokens",
)  # fmt: skip


def task_differences(groups: Sequence[Group]) -> list[str]:
    """Why numbers of these groups do not measure the same; empty if they do."""
    found = [
        f"{name} is {' / '.join(values)}"
        for name, values in setting_rows(groups)
        if name in _OF_TASK
    ]
    if not found and len({_evaluated(group) for group in groups}) > 1:
        found.append("they were evaluated on other problems")
    return found


def _evaluated(group: Group) -> str:
    """The problems of a group's first evaluation, where there is one."""
    run = group.runs[0]
    steps = run.evaluated_steps
    return json.dumps([p.id for p in run.problems(steps[0])]) if steps else ""


def caveats(groups: Sequence[Group]) -> list[str]:
    """What a reader must know before comparing: in words, one sentence or two each."""
    notes = []
    if differing := task_differences(groups):
        notes.append(
            "These runs are not of the same task, so that their rewards and evaluations cannot be "
            f"compared: {'; '.join(differing)}."
        )
    for run in (run for group in groups for run in group.runs):
        if run.is_cut:
            notes.append(
                f"The last line of {run.name}'s metrics.jsonl is unfinished and left out: the run "
                "was killed, or is writing it."
            )
        if not run.is_finished:
            notes.append(
                f"{run.name} has done {run.steps} of its {run.config.run.steps} steps; its last "
                "values are not final ones."
            )
    for group in groups:
        if len(set(group.seeds)) < len(group.seeds):
            notes.append(
                f"Group {group.letter} has several runs of one seed; they count as runs of their "
                "own in means and intervals."
            )
        if len({run.steps for run in group.runs}) > 1:
            notes.append(
                f"The runs of group {group.letter} have come to different steps: after step "
                f"{min(run.steps for run in group.runs)} its curves are of the longer ones alone."
            )
        if len(_distinct(json.dumps(run.sources.get("versions"), sort_keys=True)
                         for run in group.runs)) > 1:  # fmt: skip
            notes.append(f"The runs of group {group.letter} were made with different versions.")
    return notes


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def method_words(config: TrainConfig) -> str:
    """What is trained, in a sentence."""
    policy = {"grpo": "GRPO", "rloo": "RLOO", "reinforce++": "Reinforce++"}[config.grpo.advantage]
    layers = ", ".join(map(str, config.oisd.student_layers))
    layer = f"layer{'s' if len(config.oisd.student_layers) > 1 else ''} {layers}"
    if config.grpo.internal_layer is not None:
        return (
            f"BuPO: for {config.grpo.internal_steps} steps {policy} trains the policy of layer "
            f"{config.grpo.internal_layer}, then that of the final layer."
        )
    if not config.oisd.active:
        return f"{policy} alone, without alignment."
    terms = [
        f"{what} (weight {weight:g})"
        for what, weight in (
            ("next-token distribution", config.oisd.think_weight),
            ("attention", config.oisd.attention_weight),
        )
        if weight
    ]
    return f"OISD: {policy}, and {layer} learns the final layer's {' and '.join(terms)}."


def fact_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """What each group is, row by row, in plain words."""
    rows: dict[str, list[str]] = {}
    for group in groups:
        config, runs = group.config, group.runs
        rollout = config.rollout
        adapters = f", LoRA adapters of rank {config.model.lora_rank}"
        model = "the built-in tiny Qwen3" if config.model.path == "arithmetic" else config.model.path
        evaluation = "none"
        if config.eval.source:
            evaluation = (
                f"{config.eval.source}, {config.eval.samples} completions a problem at temperature "
                f"{config.eval.temperature:g}"
            )
        facts = {
            "method": method_words(config),
            "model": model + (adapters if config.model.lora_rank else ""),
            "problems": f"{config.data.source}, graded by {config.reward.function}",
            "evaluation": evaluation,
            "one step": f"{rollout.prompts_per_step} prompts with {rollout.completions_per_prompt} "
            f"completions each, of at most {rollout.max_completion_tokens} tokens",
            "runs": "; ".join(
                f"{run.name}: seed {run.config.run.seed}, {run.steps} of {run.config.run.steps} "
                "steps"
                for run in runs
            ),
            "versions": " / ".join(_distinct(map(_versions, runs))),
            "machine": " / ".join(
                _distinct(str(run.sources.get("machine", "not recorded")) for run in runs)
            ),
        }
        for name, value in facts.items():
            rows.setdefault(name, []).append(value)
    return list(rows.items())


def _versions(run: Run) -> str:
    found = run.sources.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "not recorded"
