"""Triton's interpreter, which is chosen when triton is imported: such tests run in a process of
their own, which the same file's tests run in."""

import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")

# Plugins that are found but not needed, hypothesis above all, take longer to import than torch.
SETTINGS = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PLUGINS = "-p", "pytest_timeout", "-p", "no:cacheprovider"


def passes_in_the_interpreter(
    file: str | Path, *options: str, timeout: float = 280, **environment: str
) -> None:
    """The tests of `file` pass where TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *PLUGINS, str(file), *options],
        cwd=ROOT,
        env=os.environ | SETTINGS | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "passed" in done.stdout, done.stdout


@cache
def _callables(owner: ModuleType | type) -> list[str]:
    return [name for name, value in inspect.getmembers(owner) if callable(value)]


def _members(owner: ModuleType | type) -> list[tuple[str, Any]]:
    return [(name, getattr(owner, name, None)) for name in _callables(owner)]


if INTERPRETED:
    # The interpreter looks through triton.language for operations to replace at each call of a
    # function in a kernel: a quarter of its time, where their names need be found only once.
    from triton.runtime import interpreter

    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _members})
