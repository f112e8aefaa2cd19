"""The folder of a run: metrics, completions, and checkpoints that survive a kill at any moment.

    config.toml  metrics.jsonl  completions/step-N.jsonl  checkpoints/step-N/  tensorboard/  plots/
    sources.json, what the run is of; check.json, what its model was found to do; attention.json,
    the layers (student, teacher) of the attention term, and why; engine.json, where continuous
    batching was tried; trackers.json, the run's ids in experiment trackers

A checkpoint is complete when it has its name (`oisd.run.checkpoints`). If the digests of its files
do not match, the one before is taken, with a warning.

A run's random numbers and its position in the data are functions of (seed, step): of these a
checkpoint holds the step number alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w

from oisd.config import ConfigError, TrainConfig, differences, load_recipe, to_tables
from oisd.data import Example
from oisd.jsonl import DamagedFileError, read_rows
from oisd.run import checkpoints, provenance
from oisd.run.processes import Processes

# Settings that may change between a run and its continuation: they say how long and how often, not
# what is computed.
_MAY_CHANGE = re.compile(
    r"(run\.(steps|save_every|keep_checkpoints|completions_every|restart|output_dir|device|sharding"
    r"|trackers)|rollout\.offload|oisd\.share_every)\b"
)


def may_change(setting: str) -> bool:
    """Whether "table.key" may change between a run and its continuation."""
    return bool(_MAY_CHANGE.match(setting))


class RunFolderError(RuntimeError):
    """The run's folder cannot be used: not writable, full, or of another run."""


class OtherRunError(RunFolderError):
    """The folder holds another run than the one that was asked for: refused before any work."""


def name_of_model(model: str) -> str:
    """What a folder about a model is called: like the model's own, or its Hub id in one word."""
    return Path(model).resolve().name if Path(model).exists() else model.replace("/", "--")


def command_folder(command: str, model: str, output_dir: str | None) -> Path:
    """The folder of a command about one model, made; by default runs/COMMAND/NAME.

    Raises ConfigError where it cannot be written.
    """
    folder = Path(output_dir or f"runs/{command}/{name_of_model(model)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}"
        ) from error
    return folder


class RunFolder:
    """Everything that a run writes. Only the first process of a run writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.completions = self.path / "completions"
        self.evaluations = self.path / "evaluations"
        self.plots = self.path / "plots"
        self.reference = self.path / "reference"
        self.engine = self.path / "engine.json"
        self.sources = self.path / "sources.json"
        self.attention = self.path / "attention.json"

    def prepare(self, config: TrainConfig) -> None:
        """Make the folder, or find that it holds this very run.

        Raises RunFolderError where nothing can be written, and where the folder holds the metrics
        or checkpoints of a run with other settings (names them).
        """
        try:
            if config.run.restart and (self.path / "config.toml").exists():
                shutil.rmtree(self.path)
            for folder in (self.path, self.checkpoints, self.completions, self.plots):
                folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.checkpoints.glob(".writing-*"):
                shutil.rmtree(leftover)
            config_file = self.path / "config.toml"
            # A start that failed before it wrote any result does not fix the settings.
            if config_file.exists() and (self._steps() or self.metrics()):
                self._refuse_other_run(load_recipe(config_file), config)
            _write_atomically(config_file, tomli_w.dumps(to_tables(config)))
        except OSError as error:
            raise RunFolderError(
                f"run.output_dir {str(self.path)!r} cannot be written: {error.strerror or error}"
            ) from error

    def _refuse_other_run(self, theirs: TrainConfig, ours: TrainConfig) -> None:
        found = differences(theirs, ours)
        # A schedule ends with the run: another length changes the learning rate, or the weight of
        # a divergence, at every step.
        scheduled = ours.optimizer.schedule == "cosine" or ours.oisd.anneals
        fixed = ("run.steps",) if scheduled else ()
        if ours.oisd.follows_share:
            fixed += ("oisd.share_every",)
        changed = [d for d in found if d.startswith(fixed) or not _MAY_CHANGE.match(d)]
        if changed:
            raise OtherRunError(
                f"{self.path} holds a run with other settings (there != here):\n  "
                + "\n  ".join(changed)
                + "\nContinue it with its own settings, choose another folder by "
                "--run.output-dir, or delete it and start again with --run.restart True."
            )

    def require_sources(
        self, model: str, problems: Mapping[str, Sequence[Example]], reward: str
    ) -> None:
        """Write down what the run is of, or find that its results are of the same.

        problems: by the setting that names them. A base model that is not here, which a checkpoint
        may not need, is taken to be the same. Raises RunFolderError that names what changed.
        """
        try:
            then = json.loads(self.sources.read_text(encoding="utf-8"))
        except FileNotFoundError:
            then = None
        except ValueError as error:
            raise RunFolderError(
                f"{self.sources} is not JSON ({error}); delete it to resume without this check"
            ) from error
        now = provenance.of_sources(model, problems, reward, then)
        now["machine"] = provenance.machine()
        if self._steps() or self.metrics():
            if then is None:
                warnings.warn(
                    f"{self.path} has no record of its base model, problems and reward, as runs of "
                    "oisd 0.1: they are taken to be those of today",
                    stacklevel=2,
                )
            else:
                if provenance.is_unknown(now["model"]):
                    now["model"] = then["model"]
                if changed := provenance.changes(then, now, model, reward):
                    raise OtherRunError(
                        f"{self.path} holds a run that began with something else under the same "
                        f"names; changed since: {'; '.join(changed)}. Put back what it began with, "
                        "choose another folder by --run.output-dir, or delete the run and start "
                        "again with --run.restart True."
                    )
                provenance.warn_of_versions(str(self.path), then, now)
                now["versions"] = then["versions"]
        if now != then:
            _write_atomically(self.sources, json.dumps(now, indent=1))

    def record_attention(self, layers: Sequence[tuple[int, int]], words: str) -> None:
        """Write down the layers that the attention term compares, or find that they are the same.

        layers: student and teacher, for each student layer; without any, nothing is written.
        words: a sentence about them, or "".
        Raises OtherRunError where the run began with others.
        """
        if not layers:
            return
        now = {"layers": [list(pair) for pair in layers], "words": words}
        try:
            then = json.loads(self.attention.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            then = now
        if then["layers"] != now["layers"] and (self._steps() or self.metrics()):
            raise OtherRunError(
                f"{self.path} holds a run whose attention term compares the layers (student, "
                f"teacher) {then['layers']}, and now it would be {now['layers']}; set "
                f"oisd.attention_student and oisd.attention_teacher, use the versions that it "
                f"began with, or choose another folder by --run.output-dir"
            )
        _write_atomically(self.attention, json.dumps(now, indent=1))

    def require_space(self, num_bytes: int) -> None:
        """Raise RunFolderError when the disk has less than `num_bytes` left."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise RunFolderError(
                f"run.output_dir {str(self.path)!r} has {free / 2**30:.1f} GiB free, but the run's "
                f"checkpoints need {num_bytes / 2**30:.1f} GiB; choose another folder or lower "
                "run.keep_checkpoints"
            )

    def save(
        self,
        step: int,
        model: Any,
        tokenizer: Any,
        optimizer: checkpoints.Resumable,
        processes: Processes,
        more: Mapping[str, Any],
        keep: int,
    ) -> None:
        """Write checkpoints/step-`step` and delete all but the newest `keep`; on all processes.

        more: what else a resumed run needs, see `checkpoints.write`.
        Raises RunFolderError when the disk is full; earlier checkpoints are untouched then.
        """
        final = self.checkpoints / f"step-{step}"
        try:
            state = {**more, "step": step}
            checkpoints.write(final, model, tokenizer, optimizer, processes, state)
        except (OSError, RuntimeError) as error:
            raise RunFolderError(
                f"checkpoint step-{step} could not be written to {self.checkpoints}"
                f"{' (is the disk full?)' if checkpoints.is_full(error) else ''}: {error}; earlier "
                "checkpoints are intact: free some space and run the same command again"
            ) from error
        if processes.is_first:
            for old in self._steps()[:-keep]:
                shutil.rmtree(self.checkpoints / f"step-{old}", ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest intact checkpoint; warns of each damaged one."""
        for step in reversed(self._steps()):
            folder = self.checkpoints / f"step-{step}"
            damage = checkpoints.damage(folder)
            if damage is None:
                return folder
            warnings.warn(f"checkpoint {folder} is damaged ({damage}): passed over", stacklevel=2)
        return None

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", p.name) for p in self.checkpoints.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def rewind(self, step: int) -> None:
        """Delete metrics and completions of later steps than `step`, and unfinished lines."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        _write_atomically(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
        for file in self.completions.glob("step-*.jsonl"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without an unfinished last line."""
        return self.read_metrics()[0]

    def read_metrics(self) -> tuple[list[dict[str, Any]], bool]:
        """The rows of metrics.jsonl, and whether an unfinished line follows them.

        Raises DamagedFileError for a line that is no JSON object with a step.
        """
        rows, size = read_rows(self.metrics_file)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("step"), int):
                raise DamagedFileError(
                    f"{self.metrics_file} is damaged: wanted a step in each row, got none in row "
                    f"{number}; mend or delete that line"
                )
        is_cut = self.metrics_file.exists() and self.metrics_file.stat().st_size > size
        return rows, is_cut

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; what is not finite is written as null."""
        bad = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        finite = row | dict.fromkeys(bad)
        with _writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def write_completions(self, step: int, **columns: Iterable[Any]) -> None:
        """Write completions/step-`step`.jsonl: a table of the first 64 completions."""
        rows = islice(zip(*columns.values(), strict=True), 64)
        table = [dict(zip(columns, row, strict=True)) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        file = self.completions / f"step-{step}.jsonl"
        with _writing(file):
            _write_atomically(file, text)

    def write_nonfinite(self, step: int, rank: int, found: str, rows: dict[int, str]) -> Path:
        """Write down what a process found not to be finite, with the texts that had it."""
        file = self.path / f"nonfinite-step-{step}-rank-{rank}.json"
        report = {"step": step, "found": found, "completions": rows}
        file.write_text(json.dumps(report, indent=1), encoding="utf-8")
        return file


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Names the file that cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{file} could not be written: {error.strerror or error}; checkpoints are intact: mend "
            "that and run the same command again"
        ) from error


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
