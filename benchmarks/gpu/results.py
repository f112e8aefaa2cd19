"""`results.jsonl` of a queue: one object a line, written the moment it is known, read to go on.

Kinds of rows: "queue" (what this was made of, each time the queue starts), "begin" (a check is
begun), "check", "measurement" (of `benchmarks.runner`), "test", "tile", "step" (the end of one).
A step whose end is there with a verdict of DONE is not run again, nor is a check with a result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure.machine import ROOT

Row = dict[str, Any]
NAME = "results.jsonl"
# Verdicts of steps and checks. Only those not in DONE are tried again when the queue goes on.
PASSED, WRONG, FAILED, MEMORY = "passed", "WRONG", "FAILED", "OUT OF MEMORY"
STOPPED, ABSENT, SKIPPED, DEAD = "STOPPED", "absent", "skipped", "DEVICE DEAD"
CUT = "cut short"  # by the end of the queue's minutes, not by its own limit
DONE = (PASSED, WRONG, FAILED, MEMORY, STOPPED, ABSENT)
BAD = (WRONG, FAILED, MEMORY, STOPPED, DEAD)
MOST_BEGINS = 2  # of a check that never ended: it may be what stops the machine


class Results:
    """The rows of a folder. Several processes append to it."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME

    def append(self, row: Mapping[str, Any]) -> None:
        """One write, so that lines of several processes do not mix, nor is one lost later."""
        line = (json.dumps(row) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def rows(self, kind: str | None = None, step: str | None = None) -> list[Row]:
        """Those of a kind and a step. A line that a kill left unfinished is passed over."""
        content = self.path.read_bytes() if self.path.exists() else b""
        found = []
        for line in content.split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and kind in (None, row.get("kind")):
                if step in (None, row.get("step")):
                    found.append(row)
        return found

    def repair(self) -> None:
        """End a line that a kill left unfinished, so that the next one stands alone."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if content and not content.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def done(self) -> dict[str, str]:
        """Verdict of each step that need not be run again."""
        last = {row["step"]: row["verdict"] for row in self.rows("step")}
        return {step: verdict for step, verdict in last.items() if verdict in DONE}

    def known(self, step: str) -> set[str]:
        """Names of a step's checks that have a result, or that never came to one."""
        found = {row["name"] for row in self.rows("check", step) if row["verdict"] in DONE}
        begun = Counter(row["name"] for row in self.rows("begin", step))
        return found | {name for name, times in begun.items() if times >= MOST_BEGINS}

    def begin(self, made_of: Row, asked: str) -> None:
        """Start or go on with a folder.

        Raises ValueError where its rows are of something else.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        if b"\n" in content and not self.rows("queue"):
            raise ValueError(
                f"benchmarks gpu: --out must be a new folder or one of this command, got {asked} "
                f"with a {NAME} of something else; use another --out"
            )
        self.repair()
        for row in self.rows("queue")[:1]:
            for key, what in (("sources", "sources"), ("device", "device"), ("mode", "mode")):
                if row.get(key) != made_of[key]:
                    raise ValueError(
                        f"benchmarks gpu: --out must be a folder of the same {what} "
                        f"({made_of[key]}), got {asked} with {row.get(key)}; use another --out"
                    )
        self.append({"kind": "queue", **made_of})


@functools.cache
def sources() -> str:
    """A digest of what the results are made of: kernels, trainer and benchmarks."""
    digest = hashlib.sha256()
    for folder in ("oisd_kernels", "oisd", "benchmarks", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
