"""Which packages the queue needs on a machine that can fetch nothing, and which are not there.

A package is there if it is installed, or named in a list (one name a line, with or without
==version), or if a folder holds its wheel. The rivals are left out where they are absent.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What each is for. transformers and torch bring what they need themselves.
KERNELS = "all steps"
STEP = "time: step"
TESTS = "tests, and those of csrc"
REQUIRED = {
    "torch": KERNELS, "triton": KERNELS, "numpy": KERNELS,
    "transformers": STEP, "accelerate": STEP, "einops": STEP, "matplotlib": STEP, "mpmath": STEP,
    "pebble": STEP, "rich": STEP, "tomli-w": STEP,
    "pytest": TESTS, "pytest-timeout": TESTS, "hypothesis": TESTS,
}  # fmt: skip
OPTIONAL = {
    "liger-kernel": "rival of the lens: Liger fused_linear_jsd",
    "nvidia-cutlass-dsl": "rival of the lens: Liger fused_linear_jsd, CuTe",
    "orda-kernel": "rival of the lens: ORDA skew_js",
    "unsloth-zoo": "rival of the lens: Unsloth fused_linear_jsd",
    "unsloth": "needed by unsloth-zoo",
    "trl": "rival of the lens: TRL chunked divergence",
    "datasets": "needed by trl",
    "flash-attn": "rival of attention; torch has its kernels as SDPA flash",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(lines: Iterable[str]) -> set[str]:
    """Names of a list like that of `pip freeze`, or separated by commas."""
    names = re.split(r"[,\n]", "\n".join(line.split("#")[0] for line in lines))
    return {normal(re.split(r"[=<>~! \[]", name.strip())[0]) for name in names if name.strip()}


def wheels(folder: Path) -> set[str]:
    """Names of the wheels of a folder.

    Raises ValueError for one that is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"benchmarks gpu: --wheels must be a folder, got {folder}")
    return {normal(path.name.split("-")[0]) for path in folder.glob("*.whl")}


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def c_compiler() -> str | None:
    """Triton's own choice of a compiler, which builds what it launches kernels with; None where it
    or Python's headers are absent."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return found if headers.is_file() else None


def report(have: set[str] | None, carried: set[str]) -> tuple[str, list[str]]:
    """A line for each package, and the required ones that are absent.

    have: what the other machine has; None: what this one has.
    """
    lines, absent = [], []
    for needed, what in ((REQUIRED, "needed by"), (OPTIONAL, "optional,")):
        for name, purpose in needed.items():
            there = installed(name) if have is None else name in have
            where = "there" if there else "in the wheel folder" if name in carried else "ABSENT"
            if where == "ABSENT" and needed is REQUIRED:
                absent.append(name)
            elif where == "ABSENT":
                where = "absent"
            lines.append(f"{name:<18} {where:<20} {what} {purpose}")
    if have is None:
        there = c_compiler()
        absent += [] if there else ["a C compiler"]
        where = "there" if there else "ABSENT"
        lines.append(f"{'C compiler':<18} {where:<20} needed by Triton, with Python.h")
    return "\n".join(lines), absent
