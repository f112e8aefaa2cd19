"""Does OISD help? Runs the cells of docs/study.md, one after another, and reports on them.

    python -m benchmarks.study [--minutes 120]     run what is missing; again, to go on
    python -m benchmarks.study --list              which cells are done, and which are missing
    python -m benchmarks.study --cell modular/both-30/11      repeat a cell, compare to the bit
    python -m benchmarks.study --report            write the results into docs/study.md

Each row goes to benchmarks/results/study_TASK.jsonl when its cell is done. A cell that was stopped
continues from its checkpoint. Rows of another protocol than this one are refused. Processes of
their own may run different tasks at a time: `--tasks sums running` and `--tasks modular`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.machine import ROOT, append, describe
from benchmarks.study.cells import differences, digest_of, folder_of, run_cell, start_of
from benchmarks.study.protocol import STUDY, Cell, Protocol
from benchmarks.study.report import write_results
from oisd.jsonl import read_rows

PAGE = ROOT / "docs" / "study.md"


def main(argv: Sequence[str] | None = None, protocol: Protocol = STUDY) -> None:
    """Run, list, repeat or report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description="Does OISD help?"
    )
    parser.add_argument("--list", action="store_true", help="what is done and what is missing")
    parser.add_argument("--cell", metavar="TASK/ARM/SEED", help="repeat one recorded cell")
    parser.add_argument("--report", action="store_true", help="write the results into the page")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", choices=list(protocol.tasks), default=[],
        help="run the cells of these tasks alone",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="start no cell after so many minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page that --report writes to")
    options = parser.parse_args(argv)
    done = read_results(protocol, options.results)
    if options.list:
        print(listing(protocol, done))
    elif options.report:
        write_results(protocol, done, options.page)
    elif options.cell:
        repeat(protocol, done, cell_named(protocol, options.cell), options.out)
    else:
        run_missing(protocol, done, options)


def results_file(folder: Path, task: str) -> Path:
    """Where the rows of a task are."""
    return folder / f"study_{task}.jsonl"


def read_results(protocol: Protocol, folder: Path) -> dict[Cell, dict[str, Any]]:
    """The rows that are there, by cell. Exits for rows of another protocol, or twice the same."""
    done: dict[Cell, dict[str, Any]] = {}
    planned = set(protocol.cells())
    for task in protocol.tasks:
        file = results_file(folder, task)
        for row in read_rows(file)[0]:
            cell = Cell(row["task"], row["arm"], row["seed"])
            if row["digest"] != protocol.digest:
                raise SystemExit(
                    f"{file} holds rows of another protocol ({row['digest']}, this one is "
                    f"{protocol.digest}), which are not mixed: put benchmarks/study/protocol.py "
                    f"back, or keep this study's rows in another folder by --results"
                )
            if cell in done or cell not in planned:
                raise SystemExit(f"{file} holds {cell} twice, or though it is not planned")
            done[cell] = row
    return done


def cell_named(protocol: Protocol, name: str) -> Cell:
    """The cell "task/arm/seed". Exits for one that is not planned."""
    for cell in protocol.cells():
        if str(cell) == name:
            return cell
    raise SystemExit(
        f"--cell must be TASK/ARM/SEED with a task of {', '.join(protocol.tasks)}, an arm of "
        f"{', '.join(protocol.arms)} and a seed of {', '.join(map(str, protocol.seeds))}, "
        f"got {name!r}"
    )


def listing(protocol: Protocol, done: dict[Cell, dict[str, Any]]) -> str:
    """How much is done, and the missing cells in the order in which they will be run."""
    cells = protocol.cells()
    lines = [f"protocol {protocol.digest}: {len(done)} of {len(cells)} cells are done"]
    lines += [f"missing  {cell}" for cell in cells if cell not in done]
    return "\n".join(lines)


def run_missing(
    protocol: Protocol, done: dict[Cell, dict[str, Any]], options: argparse.Namespace
) -> None:
    """Run the missing cells in their order; each row is written when its cell is done."""
    began = time.monotonic()
    tasks = options.tasks or list(protocol.tasks)
    for task in tasks:
        _drop_half_row(results_file(options.results, task))
    for cell in protocol.cells():
        if cell in done or cell.task not in tasks:
            continue
        if options.minutes is not None and time.monotonic() - began >= 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; {cell} is next")
            return
        print(f"{cell}", flush=True)
        _require_start(protocol, done, cell, options)
        machine = describe("cpu", 1)  # before the run: the commit that it began with
        row = run_cell(protocol, cell, options.out)
        done[cell] = row
        append(results_file(options.results, cell.task), [row], machine)
        # Only now: what is stopped before this line continues from the last checkpoint.
        shutil.rmtree(folder_of(cell, options.out) / "checkpoints")
        print(f"{cell}: {row.get('failed') or row['final']}", flush=True)


def _drop_half_row(file: Path) -> None:
    """Cut off a last line without its end, whose writer was killed; its cell is run again."""
    whole = read_rows(file)[1]
    if file.exists() and file.stat().st_size > whole:
        os.truncate(file, whole)


def _require_start(
    protocol: Protocol, done: dict[Cell, dict[str, Any]], cell: Cell, options: argparse.Namespace
) -> None:
    """Exit where a cell would not set out from the model of the cells that it is paired with."""
    pair = [row for other, row in done.items() if other[::2] == cell[::2]]
    start = digest_of(start_of(protocol, cell.task, cell.seed, options.out))
    if any(row["start"] != start for row in pair):
        commit = pair[-1]["commit"][:12] or "that is in their rows"
        raise SystemExit(
            f"the start of {cell.task}, seed {cell.seed}, is not that of its {len(pair)} recorded "
            f"cells (another machine, or other versions): go on where they were run, in a working "
            f"tree of commit {commit}, or delete their rows from "
            f"{results_file(options.results, cell.task)} to run the seed here"
        )


def repeat(protocol: Protocol, done: dict[Cell, dict[str, Any]], cell: Cell, out: Path) -> None:
    """Run a recorded cell again, its start included, and compare. Exits with 1 where it differs."""
    if cell not in done:
        raise SystemExit(f"--cell {cell} is not recorded yet; without --cell it will be run")
    again = out / "again"
    shutil.rmtree(again, ignore_errors=True)
    found = differences(done[cell], run_cell(protocol, cell, again))
    if found:
        print(f"{cell} differs from the recorded run:", *found, sep="\n  ")
        recorded = {name: done[cell].get(name) for name in ("device", "versions", "commit")}
        print(f"  which was made by {recorded}")
        sys.exit(1)
    print(f"{cell}: the same as recorded, to the bit")


if __name__ == "__main__":
    main()
