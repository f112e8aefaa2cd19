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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from oisd.config import ConfigError, TrainConfig, load_recipe, to_tables
from oisd.evaluate import Problem
from oisd.jsonl import DamagedFileError, read_rows
from oisd.run.folder import RunFolder, may_change

_LARGEST_TAIL = 10


@dataclass(frozen=True)
class Run:
    """One run, as far as it has come."""

    folder: RunFolder
    config: TrainConfig
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, one for each step, in their order."""
    unfinished: list[str]
    """Files whose last line is cut off, which is left out."""
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
        except DamagedFileError as error:
            raise ConfigError(str(error)) from error
        except TypeError:
            wanted = ", ".join(field.name for field in fields(Problem))
            raise ConfigError(
                f"{file} is not an evaluation of `oisd train`, whose rows have {wanted}"
            ) from None

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
        found, is_cut = folder.read_metrics()
    except DamagedFileError as error:
        raise ConfigError(str(error)) from error
    rows = {row["step"]: row for row in found}
    if not rows:
        return None
    in_order = [rows[step] for step in sorted(rows)]
    if not re.search(r"^\[run\]", (path / "config.toml").read_text("utf-8", "replace"), re.M):
        raise ConfigError(
            f"{path / 'config.toml'} is empty or cut off: wanted all settings of the run, of which "
            f"[run] is the last table"
        )
    config = load_recipe(path / "config.toml")
    unfinished = ["metrics.jsonl"] if is_cut else []
    for rows_folder in (folder.evaluations, folder.completions):
        cut = (file for file in sorted(rows_folder.glob("step-*.jsonl")) if _is_cut(file))
        unfinished += [f"{rows_folder.name}/{file.name}" for file in cut]
    return Run(folder, config, in_order, unfinished, _read_json(folder.sources))


def _is_cut(file: Path) -> bool:
    with file.open("rb") as opened:
        end = opened.seek(0, os.SEEK_END)
        opened.seek(max(end - 1, 0))
        return opened.read(1) not in (b"\n", b"")


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
        if decides(f"{table}.{key}")
    }
    weights = {
        name: record.get("sha256")
        for name, record in run.sources.get("model", {}).get("files", {}).items()
    }
    return json.dumps([settings, weights, run.sources.get("reward")], sort_keys=True)


def decides(setting: str) -> bool:
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
