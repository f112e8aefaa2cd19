"""The command: `python -m benchmarks gpu`. It needs nothing that a GPU machine may lack."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from benchmarks.gpu import packages, results
from benchmarks.gpu.results import Results, sources
from benchmarks.gpu.schedule import Schedule
from benchmarks.gpu.steps import STEPS
from benchmarks.gpu.table import NAME, table
from benchmarks.gpu.watch import Step, Watch

LEAST_MINUTES = 0.2


def main(argv: Sequence[str], begun: float) -> int:
    """Exit status: 0 all is right, 1 something is not or is missing, 3 the device is dead.

    begun: of `time.monotonic`, from which the minutes count.
    """
    options = parser().parse_args(argv)
    if options.packages:
        return tell_packages(options)
    if not options.minutes >= LEAST_MINUTES:
        raise ValueError(
            f"benchmarks gpu: --minutes must be at least {LEAST_MINUTES}, got {options.minutes}"
        )
    steps = select(STEPS, options.only)
    if options.rehearse:
        # Read when Triton is imported, which this process has not done; a CPU alone is rehearsed.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.environ |= {"OMP_NUM_THREADS": "1"}
    prepare(os.environ)
    end = begun + 60 * options.minutes
    return run(steps, options.out.resolve(), end, options.rehearse)


def prepare(environment: MutableMapping[str, str]) -> None:
    """What all processes of the queue share; what is set already stands."""
    # Else torch would ask the driver in the process that is forked, and break it for the others.
    environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Nothing here is fetched, and a machine without a network may wait long for an answer.
    environment.setdefault("HF_HUB_OFFLINE", "1")
    # The steps share what Triton has compiled, for which its default folder must be writable.
    home = environment.get("TRITON_HOME") or environment.get("HOME") or ""
    if "TRITON_CACHE_DIR" not in environment and not os.access(home, os.W_OK):
        environment["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")


def run(
    steps: Sequence[Step],
    out: Path,
    end: float,
    rehearse: bool,
    probe: str = Watch.probe,
    at_once: int | None = None,
) -> int:
    """Run the queue in a folder until `end` of `time.monotonic`, and print its table."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"benchmarks gpu: --out must be a folder that can be made, got {out}: {error.strerror}"
        ) from None
    Results(out).begin(made_of(rehearse), str(out))
    watch = Watch(str(out), rehearse, probe, end=end)
    cores = os.cpu_count() or 2
    schedule = Schedule(watch, end, at_once or (2 if rehearse else min(8, max(cores - 2, 2))), say)
    alive = schedule.run(steps)
    if not alive:
        say("The device is dead: the queue ends here.")
    text = table(out, steps, rehearse)
    (out / NAME).write_text(text, encoding="utf-8")
    print(f"\n{text}", end="", flush=True)
    ends = {schedule.verdicts.get(step.name) for step in steps}
    status = 3 if not alive else int(not ends <= {results.PASSED, results.ABSENT})
    if watch.stuck:  # Python would wait for it at its end
        os._exit(status)
    return status


def made_of(rehearse: bool) -> results.Row:
    """What the results of a folder must share."""
    device = "CPU" if rehearse else gpu()
    mode = "rehearsal" if rehearse else "GPU"
    return {"sources": sources(), "device": device, "mode": mode, "date": time.strftime("%F %T")}


def gpu() -> str:
    """The GPU's name, from a process that can be stopped: a broken device may not answer.

    Raises ValueError where there is none.
    """
    ask = "import torch; print(torch.cuda.get_device_name())"
    smi = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    for command in (smi, [sys.executable, "-c", ask]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    raise ValueError(
        "benchmarks gpu: a GPU must answer, got none; `python -m benchmarks gpu --rehearse` needs "
        "none"
    )


def select(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """Those with one of these words in their names.

    Raises ValueError for a word that no name has.
    """
    for word in only:
        if not any(word in step.name for step in steps):
            names = "; ".join(step.name for step in steps)
            raise ValueError(
                f"benchmarks gpu: --only must be parts of steps' names, got {word!r}; there are "
                f"{names}"
            )
    return [step for step in steps if not only or any(word in step.name for word in only)]


def tell_packages(options: argparse.Namespace) -> int:
    """Print what is there and what is absent; 1 where something needed is."""
    have = None
    if options.have is not None:
        if not options.have.is_file():
            raise ValueError(f"benchmarks gpu: --have must be a file, got {options.have}")
        have = packages.listed(options.have.read_text(encoding="utf-8").splitlines())
    carried = set() if options.wheels is None else packages.wheels(options.wheels)
    text, absent = packages.report(have, carried)
    print(text)
    if absent:
        print(f"absent, and needed: {', '.join(absent)}")
    return int(bool(absent))


def say(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m benchmarks gpu",
        description="A queue of checks and measurements for a few minutes on one GPU, best first.",
        epilog="docs/gpu.md says how to read what it prints, and what each outcome decides.",
    )
    add = found.add_argument
    add("--minutes", type=float, default=9.0, help="for everything")
    add(
        "--out",
        type=Path,
        default=Path("runs/benchmarks-gpu"),
        metavar="DIR",
        help="results.jsonl, log.txt, table.txt, tiles.json; what is there is not run again",
    )
    add("--only", nargs="+", default=[], metavar="WORD", help="steps with a word in their names")
    add("--rehearse", action="store_true", help="the whole queue on a CPU, with small shapes")
    add("--packages", action="store_true", help="say which packages are there, and run nothing")
    add("--have", type=Path, metavar="FILE", help="with --packages: a list of what is there")
    add("--wheels", type=Path, metavar="DIR", help="with --packages: a folder of wheels")
    return found  # fmt: skip
