"""`python -m benchmarks`: what each kernel costs beside its alternatives and the physical limit."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmarks.cases.suite import all_cases, in_turns, select
from benchmarks.gpu_tests import run_tests
from benchmarks.measure.machine import append, describe
from benchmarks.report import markdown, read_rows
from benchmarks.report.compare import changes, text
from benchmarks.report.plots import draw
from benchmarks.runner import Options, count_promises, orchestrate

_USAGE = """\
usage: python -m benchmarks list [--device cpu|cuda]
       python -m benchmarks run [CASES ...] [--device cpu|cuda] [--quick] [--out DIR]
       python -m benchmarks report DIR ...
       python -m benchmarks compare BASE NEW
       python -m benchmarks gpu --out DIR [--minutes 8]

list     the cases, their implementations, and which of these cannot run here and why
run      correctness first, then time and memory of what is correct; CASES are parts of names
report   the table again, and plots as PNG files
compare  ratios with intervals; exit status 1 if anything got slower or takes more memory
gpu      eight minutes on one GPU: the GPU tests, then all headline numbers

`python -m benchmarks run --help` lists the settings.
"""


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


@dataclass(frozen=True)
class Gpu:
    """The quick run on one GPU."""

    out: Path = Path("runs/benchmarks-gpu")
    minutes: float = 8.0
    """For everything; cases that do not fit are listed as skipped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit status: 0 done, 1 something is worse or wrong, 2 a wrong command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"list": _list, "run": _run, "report": _report, "compare": _compare, "gpu": _gpu}
    if not arguments or arguments[0] not in commands:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return commands[arguments[0]](arguments[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


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


def _gpu(arguments: list[str]) -> int:
    given = _parse(Gpu, "gpu", arguments)
    _device("cuda")
    end = time.time() + 60 * given.minutes
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    options = Options(
        out=str(out),
        device="cuda",
        quick=True,
        rounds=10,
        seconds_per_case=8.0,
        case_limit=15 * given.minutes,
        deadline=end - 60,
        stop=end - 15,  # the report takes a few seconds
    )
    _say("GPU tests")
    tests = run_tests(out, limit=15 * given.minutes)
    append(options.rows, [tests], describe("cuda", 1))
    _say(f"  {tests['summary']}")
    count_promises(options)
    chosen = in_turns(select(all_cases("cuda"), (), "gpu"))
    _say(f"{len(chosen)} cases")
    orchestrate(chosen, options, _say)
    return _finish(out)


if __name__ == "__main__":
    sys.exit(main())
