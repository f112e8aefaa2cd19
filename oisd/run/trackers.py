"""Experiment trackers: TensorBoard, Weights & Biases, Trackio, each imported only when asked for.

trackers.json in the run's folder has the id of the run in each tracker, under which a resumed run
continues there. A resumed run repeats the steps after its checkpoint. TensorBoard drops what it had
of them, W&B keeps its first values, and Trackio has both.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from oisd.config import ConfigError, TrainConfig, to_tables
from oisd.schema import one_line

# After so many failures in a row a tracker is left alone: each may have waited for a network.
_MOST_FAILURES = 3
# What becomes of the steps that a resumed run repeats, if a tracker has them.
_REPEATED = {"wandb": "keep their first values there", "trackio": "are in it twice"}


class Tracker(Protocol):
    """Where the metrics of a run go."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """The trackers of `run.trackers`, of which none may stop a run once it has begun.

    folder: the run's. Raises ConfigError if a tracker's package is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        for name in config.run.trackers:
            spec = importlib.util.find_spec(name)
            # A folder of that name, such as wandb leaves behind, can be imported as well.
            if spec is None or spec.origin is None:
                raise ConfigError(
                    f"run.trackers names {name!r}, which is not installed; `pip install {name}`, "
                    f"or leave it out"
                )
        self.config, self.folder = config, folder
        self._file = folder / "trackers.json"
        self._open: dict[str, Tracker] = {}
        self._failures: dict[str, int] = {}
        self._failed_once: set[str] = set()

    def start(self, step: int) -> None:
        """Open the trackers of a run that has done `step` steps.

        Raises ConfigError for one that does not start, before any work.
        """
        ids = self._read()
        for name in self.config.run.trackers:
            goes_on = name in ids
            run_id = ids.setdefault(name, secrets.token_hex(4))
            try:
                self._open[name] = _OPEN[name](self.config, self.folder, run_id, step)
            except Exception as error:  # a tracker's own errors are of any type
                self.close(failed=True)
                login = " (`wandb login`, or WANDB_MODE=offline)" if name == "wandb" else ""
                raise ConfigError(
                    f"run.trackers: {name} does not start: {one_line(error, named=True)}; mend "
                    f"that{login}, or leave {name!r} out of run.trackers"
                ) from error
            if goes_on and name in _REPEATED:
                print(
                    f"{name} goes on with run {run_id}; steps after {step} that it has already "
                    f"{_REPEATED[name]}",
                    file=sys.stderr,
                )
        try:
            self._file.write_text(json.dumps(ids, indent=1), encoding="utf-8")
        except OSError as error:
            self.close(failed=True)
            raise ConfigError(f"{self._file} cannot be written: {error.strerror}") from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row of metrics to each tracker; warns of one that fails, once."""
        step = row["step"]
        values = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, step)
            except Exception as error:
                self._failed(name, step, error)
            else:
                self._failures[name] = 0

    def _failed(self, name: str, step: int, error: Exception) -> None:
        if name not in self._failed_once:
            self._failed_once.add(name)
            _warn(
                f"{name} did not take the metrics of step {step} ({one_line(error, named=True)}); "
                f"the run goes on, and metrics.jsonl has them"
            )
        self._failures[name] = self._failures.get(name, 0) + 1
        if self._failures[name] == _MOST_FAILURES:
            _warn(f"{name} failed {_MOST_FAILURES} times in a row and gets no more metrics")
            del self._open[name]

    def close(self, failed: bool = False) -> None:
        """Let each tracker finish; failed: whether the run did."""
        for name, tracker in self._open.items():
            try:
                tracker.close(failed)
            except Exception as error:
                _warn(f"{name} did not finish: {one_line(error, named=True)}")
        self._open = {}

    def _read(self) -> dict[str, str]:
        try:
            return json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # of an older run, or cut off
            return {}


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


class _TensorBoard:
    def __init__(self, config: TrainConfig, folder: Path, run_id: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports slowly

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, folder: Path, run_id: str, step: int) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "oisd"),
            id=run_id,
            name=folder.resolve().name,
            resume="allow",
            dir=str(folder),
            config=to_tables(config),
            settings=wandb.Settings(console="off"),  # our progress bar stays ours
        )

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self._run.starting_step:  # it warns at each row that comes too late
            self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, config: TrainConfig, folder: Path, run_id: str, step: int) -> None:
        trackio = importlib.import_module("trackio")
        with redirect_stdout(sys.stderr):  # it greets
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "oisd"),
                name=f"{folder.resolve().name}-{run_id}",  # runs are told apart by name
                resume="allow",
                config=to_tables(config),
                embed=False,
            )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


_OPEN: dict[str, Callable[[TrainConfig, Path, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
