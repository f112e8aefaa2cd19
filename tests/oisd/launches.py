"""Training runs in processes of their own, forked from one that has imported the library.

python -m tests.oisd.launches FOLDER

trains as each entry of FOLDER/launches.json says, one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import oisd.run.summary
from oisd.config import from_tables
from oisd.trainer import Trainer
from tests import ROOT
from tests.process_groups import on_ranks

PLOTS = ("plot_training", "plot_pass_at_k")
"""Of `oisd.run.summary`: they take longer than the rest of a tiny run."""


@dataclass(frozen=True)
class Launch:
    """A run without plots."""

    tables: dict[str, Any]
    before: str = ""
    """Statements that each of its processes runs first; `die()` ends it as kill -9 does."""
    processes: int = 1


@dataclass(frozen=True)
class Ended:
    """What became of a run."""

    statuses: list[int]
    """Of its processes; -9 of one that was killed."""
    stderr: str

    @property
    def went_well(self) -> bool:
        return not any(self.statuses)


def launch(folder: Path, launches: list[Launch]) -> list[Ended]:
    """Train in processes whose current folder, and first place to import from, is `folder`."""
    (folder / "launches.json").write_text(json.dumps([asdict(one) for one in launches]))
    path = os.pathsep.join([str(folder), str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "tests.oisd.launches", str(folder)],
        capture_output=True, text=True, timeout=280, cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [Ended(**one) for one in json.loads((folder / "ended.json").read_text())]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train(one: Launch, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    for name in PLOTS:
        setattr(oisd.run.summary, name, lambda *_: [])
    exec(one.before, {"die": die})
    Trainer(from_tables(one.tables)).train()


def main(folder: Path) -> None:
    ended = []
    for number, fields in enumerate(json.loads((folder / "launches.json").read_text())):
        one, said = Launch(**fields), folder / f"stderr-{number}"
        said.write_bytes(b"")
        ended.append(asdict(Ended(on_ranks(one.processes, _train, one, said), said.read_text())))
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
