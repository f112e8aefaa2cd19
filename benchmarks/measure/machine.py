"""The machine and the versions, which every row of results names."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "nvidia-cutlass-dsl", "orda-kernel",
    "unsloth-zoo", "cut-cross-entropy", "flash-attn", "numpy",
)  # fmt: skip


def append(path: Path, rows: Iterable[Mapping[str, Any]], machine: Mapping[str, Any]) -> None:
    """Append rows to a JSONL file, each with the description of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **machine}) + "\n")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Commit, device, driver, versions, date."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device_name(device),
        "driver": driver() if device == "cuda" else None,
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package(name))},
    }


def commit() -> str:
    """The commit, with "+changes" where the working tree differs from it; "" outside git."""
    found = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "oisd", "oisd_kernels", "benchmarks/*.py")
    return found + ("+changes" if found and changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def device_name(device: str) -> str:
    """A GPU's name, or a processor's with the instructions that torch takes: they decide bits."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
