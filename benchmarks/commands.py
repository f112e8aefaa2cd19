"""The commands of `python -m benchmarks` but `gpu`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmarks.cases.suite import all_cases, select
from benchmarks.report import markdown, read_rows
from benchmarks.report.compare import changes, text
from benchmarks.report.plots import draw
from benchmarks.runner import Options, count_promises, orchestrate


@dataclass(frozen=True)
class ListCases:
    """Which cases to show."""

    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class RunCases:
    """What to run, and for how long."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Parts of names of cases; without any, all cases of the suite."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quick: bool = False
    """A few minutes: the most telling cases, three rounds, no compilation on a CPU."""
    out: Path = Path("runs/benchmarks")
    """Folder of rows.jsonl, report.md and plots; rows are appended."""
    rounds: int = 10
    seconds_per_case: float = 60.0
    """After so many seconds of timing a case gets no further round beyond the third."""
    threads: int = 1
    """CPU threads; more than there are idle cores make everything slow."""
    minutes: float | None = None
    """Begin no case after so many minutes."""


def _parse(kind: type, command: str, arguments: list[str]):
    return tyro.cli(
        kind,
        prog=f"python -m benchmarks {command}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _device(asked: str) -> str:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ValueError(
            "benchmarks: torch sees no GPU; `python -m benchmarks run --device cpu` needs none"
        )
    return ("cuda" if there else "cpu") if asked == "auto" else asked


def _list(arguments: list[str]) -> int:
    given = _parse(ListCases, "list", arguments)
    # A GPU's cases can be listed anywhere.
    device = given.device if given.device != "auto" else _device("auto")
    for case in all_cases(device):
        shape = ", ".join(f"{name} {value:,}" for name, value in case.shape.items())
        print(f"{case.name}  [{', '.join(sorted(case.suites))}]  {shape}")
        for implementation in case.implementations:
            why = f"  absent: {implementation.absent}" if implementation.absent else ""
            print(f"    {implementation.name}{why}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _run(arguments: list[str]) -> int:
    given = _parse(RunCases, "run", arguments)
    device = _device(given.device)
    chosen = select(all_cases(device), given.cases, "quick" if given.quick else "full")
    options = Options(
        out=str(given.out.resolve()),
        device=device,
        quick=given.quick,
        threads=given.threads,
        rounds=min(given.rounds, 3) if given.quick and device == "cpu" else given.rounds,
        seconds_per_case=given.seconds_per_case,
        deadline=time.time() + 60 * given.minutes if given.minutes else float("inf"),
    )
    if not given.cases:
        count_promises(options)
    _say(f"{len(chosen)} cases on {device} -> {given.out}")
    orchestrate(chosen, options, _say)
    return _finish(given.out)


def _finish(out: Path) -> int:
    """Write the report and print it; 1 if something is wrong, failed or broken."""
    rows = read_rows([out])
    try:
        plots = draw(rows, out)
    except Exception as error:  # numbers are worth more than pictures of them
        print(f"no plots: {type(error).__name__}: {error}", file=sys.stderr)
        plots = []
    report = markdown(rows, plots)
    (out / "report.md").write_text(report, encoding="utf-8")
    print(f"\n{report}\n{len(rows)} rows, report and {len(plots)} plots in {out}")
    bad = [row for row in rows if row.get("status") in ("wrong", "failed")
           or row.get("kept") is False or row.get("failed")]  # fmt: skip
    return 1 if bad else 0


def _folders(usage: str, count: int | str, arguments: list[str]) -> list[Path]:
    parser = argparse.ArgumentParser(usage=f"python -m benchmarks {usage}")
    parser.add_argument("folders", nargs=count, type=Path, metavar="DIR")
    return parser.parse_args(arguments).folders


def _report(arguments: list[str]) -> int:
    folders = _folders("report DIR ...   (the report goes to the first)", "+", arguments)
    rows = read_rows(folders)
    report = markdown(rows, draw(rows, folders[0]))
    (folders[0] / "report.md").write_text(report, encoding="utf-8")
    print(report)
    return 0


def _compare(arguments: list[str]) -> int:
    base, new = _folders("compare BASE NEW   (folders of two runs)", 2, arguments)
    found = changes(read_rows([base]), read_rows([new]))
    print(text(found))
    return int(any(change.is_worse for change in found))


COMMANDS = {"list": _list, "run": _run, "report": _report, "compare": _compare}
