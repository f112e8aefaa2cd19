"""The tests that need a GPU, run first: a benchmark of something broken is worth nothing.

A pytest plugin keeps the tests that skip without a GPU, or that have "cuda" among their parameters.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.measure.machine import ROOT


def needs_gpu(item: Any) -> bool:
    """Whether a collected test is about a GPU."""
    for mark in item.iter_markers("skipif"):
        reason = str(mark.kwargs.get("reason", "")).lower()
        if "gpu" in reason.split() or "cuda" in reason:
            return True
    callspec = getattr(item, "callspec", None)
    values = [] if callspec is None else callspec.params.values()
    return any(value == "cuda" for value in values if isinstance(value, str))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Pytest's hook: leave out all other tests."""
    kept = [item for item in items if needs_gpu(item)]
    config.hook.pytest_deselected(items=[item for item in items if not needs_gpu(item)])
    items[:] = kept


def run_tests(out: Path, limit: float) -> dict[str, Any]:
    """Run them within `limit` seconds; a row of results. Output goes to tests.log."""
    # A test file that cannot be imported must not keep the others from running.
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "tests", "-vv",
               "--continue-on-collection-errors", "--color=no"]  # fmt: skip
    start = time.monotonic()
    path = out / "tests.log"
    with path.open("wb") as log:
        try:
            subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, timeout=limit, check=False
            )
            finished = True
        except subprocess.TimeoutExpired:
            finished = False
    return summary(path.read_text(errors="replace"), time.monotonic() - start, finished)


def summary(log: str, seconds: float, finished: bool) -> dict[str, Any]:
    """Counts out of pytest's output, which is there even if it was stopped."""
    verdicts = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", log, re.MULTILINE))
    verdicts |= {name: "ERROR" for name in re.findall(r"^ERROR (\S+)", log, re.MULTILINE)}
    count = Counter(verdicts.values())
    failed = [name for name, found in verdicts.items() if found in ("FAILED", "ERROR")]
    text = f"{count['PASSED']} passed, {count['SKIPPED']} skipped, {len(failed)} failed"
    text += f" in {seconds:.0f} s"
    if failed:
        text = f"FAILED: {text}: " + ", ".join(failed[:20])
    elif not finished:
        text = f"NOT FINISHED: {text}"
    elif not count["PASSED"]:
        text = f"NO GPU TEST RAN: {text}; see tests.log"
    row = {"kind": "tests", "seconds": seconds, "failed": failed, "finished": finished}
    return row | {"passed": count["PASSED"], "summary": text}
