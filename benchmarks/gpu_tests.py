"""The tests that need a GPU: a pytest plugin that leaves out all others.

It keeps those that skip without a GPU, or that have "cuda" among their parameters. With --results
FILE and --step NAME each test's end is a row of a queue's results (`benchmarks.gpu`) at once, and a
test that has one is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.results import DONE, FAILED, PASSED, SKIPPED, Results


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
    path, known = config.getoption("--results"), set()
    if path:
        rows = Results(Path(path).parent).rows("test", config.getoption("--step"))
        known = {row["name"] for row in rows if row["verdict"] in DONE}
    kept = [item for item in items if needs_gpu(item) and item.nodeid not in known]
    chosen = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept


def pytest_addoption(parser: Any) -> None:
    """Pytest's hook."""
    group = parser.getgroup("gpu")
    group.addoption("--results", help="a queue's results.jsonl, to which each test adds a row")
    group.addoption("--step", default="", help="the step of these rows")


def pytest_configure(config: Any) -> None:
    """Pytest's hook: write rows where asked to."""
    path = config.getoption("--results")
    if path:
        config.pluginmanager.register(Writer(Path(path), config.getoption("--step")))


class Writer:
    """A row for each test."""

    def __init__(self, path: Path, step: str):
        self.results, self.step = Results(path.parent), step

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Pytest's hook: a test's set-up, call or end."""
        if report.outcome == "passed" and report.when != "call":
            return
        verdict = {"passed": PASSED, "failed": FAILED, "skipped": SKIPPED}[report.outcome]
        reason = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(getattr(crash, "message", report.longrepr)).strip().splitlines()[-1][:300]
        row = {"kind": "test", "step": self.step, "name": report.nodeid, "verdict": verdict}
        self.results.append(row | {"reason": reason, "seconds": round(report.duration, 2)})
