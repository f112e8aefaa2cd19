"""`python -m benchmarks`: what each kernel costs beside the alternatives and the physical limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

_USAGE = """\
usage: python -m benchmarks list [--device cpu|cuda]
       python -m benchmarks run [CASES ...] [--device cpu|cuda] [--quick] [--out DIR]
       python -m benchmarks report DIR ...
       python -m benchmarks compare BASE NEW
       python -m benchmarks gpu --out DIR [--minutes 8]

list     the cases, their implementations, and what is absent here and why
run      correctness first, then time and memory of what is correct; CASES are parts of names
report   the table again, and plots as PNG files
compare  ratios with intervals; exit status 1 if anything got slower or takes more memory
gpu      everything that one GPU can say in eight minutes: the GPU tests, then all headline numbers

`python -m benchmarks run --help` lists the settings.
"""


@dataclass(frozen=True)
class ListCases:
    """Which cases to show."""

    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class RunCases:
    """What to run, and how long."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Parts of names of cases; all cases of the suite if none is given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quick: bool = False
    """A few minutes: the most telling cases, three rounds, no compilation on a CPU."""
    out: Path = Path("runs/benchmarks")
    """Folder of rows.jsonl, report.md and plots; rows are appended."""
    rounds: int = 10
    seconds_per_case: float = 60.0
    """After so many seconds of timing a case gets no further round, beyond the third."""
    threads: int = 1
    """CPU threads; more than there are idle cores makes everything slow."""
    minutes: float | None = None
    """Begin no case after so many minutes."""


@dataclass(frozen=True)
class Gpu:
    """The quick run on one GPU."""

    out: Path = Path("runs/benchmarks-gpu")
    minutes: float = 8.0
    """For everything; what does not fit is listed as skipped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit status: 0 done, 1 something is worse or wrong, 2 asked wrongly."""
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
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ValueError("benchmarks: --device cuda, but torch sees no GPU; use --device cpu")
    return ("cuda" if there else "cpu") if asked == "auto" else asked


def _list(arguments: list[str]) -> int:
    given = _parse(ListCases, "list", arguments)
    from benchmarks.cases.suite import all_cases

    # The cases of a GPU can be listed anywhere.
    device = given.device if given.device != "auto" else _device("auto")
    for case in all_cases(device):
        shape = ", ".join(f"{name} {value:,}" for name, value in case.shape.items())
        print(f"{case.name}  [{', '.join(sorted(case.suites))}]  {shape}")
        for implementation in case.implementations:
            why = f"  absent: {implementation.absent}" if implementation.absent else ""
            print(f"    {implementation.name}{why}")
    return 0


def _run(arguments: list[str]) -> int:
    given = _parse(RunCases, "run", arguments)
    from benchmarks.cases.suite import all_cases, select
    from benchmarks.runner import Options, orchestrate

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
        _count_promises(options.out, device, given.threads)
    print(f"{len(chosen)} cases on {device} -> {given.out}", flush=True)
    orchestrate(chosen, options, lambda line: print(line, flush=True))
    return _finish(given.out)


def _count_promises(out: str, device: str, threads: int) -> None:
    """Counted on a CPU, whatever the device."""
    from benchmarks.measure.machine import describe
    from benchmarks.measure.promises import promises
    from benchmarks.runner import write

    rows = []
    for promise in promises():
        try:
            rows.append(promise.row())
        except Exception as error:
            blank = {k: v for k, v in asdict(promise).items() if k in ("unit", "wanted", "exactly")}
            rows.append({"kind": "promise", "promise": promise.name, **blank, "got": None,
                         "kept": False, "reason": str(error)})  # fmt: skip
    write(out, rows, describe(device, threads))


def _finish(out: Path) -> int:
    """Write the report, print it; 1 if something is wrong, failed or broken."""
    from benchmarks.report import markdown, read_rows
    from benchmarks.report.plots import draw

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


def _report(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m benchmarks report DIR ...   (the report goes to the first)")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    from benchmarks.report import markdown, read_rows
    from benchmarks.report.plots import draw

    folders = [Path(folder) for folder in arguments]
    rows = read_rows(folders)
    text = markdown(rows, draw(rows, folders[0]))
    (folders[0] / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _compare(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0].startswith("-"):
        print("usage: python -m benchmarks compare BASE NEW   (folders of two runs)")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    from benchmarks.report import read_rows
    from benchmarks.report.compare import changes, text

    found = changes(read_rows(arguments[:1]), read_rows(arguments[1:]))
    print(text(found))
    return int(any(change.is_worse for change in found))


def _gpu(arguments: list[str]) -> int:
    given = _parse(Gpu, "gpu", arguments)
    _device("cuda")
    from benchmarks.cases.suite import all_cases, in_turns, select
    from benchmarks.gpu_tests import run_tests
    from benchmarks.measure.machine import describe
    from benchmarks.runner import Options, orchestrate, write

    end = time.time() + 60 * given.minutes
    out = given.out.resolve()
    write(str(out), [], {})
    say = lambda line: print(line, flush=True)  # noqa: E731
    say("GPU tests")
    tests = run_tests(out, limit=15 * given.minutes)
    write(str(out), [tests], describe("cuda", 1))
    say(f"  {tests['summary']}")
    _count_promises(str(out), "cuda", 1)
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
    chosen = in_turns(select(all_cases("cuda"), (), "gpu"))
    say(f"{len(chosen)} cases")
    orchestrate(chosen, options, say)
    return _finish(out)


if __name__ == "__main__":
    sys.exit(main())
