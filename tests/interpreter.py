"""Triton's interpreter, which is chosen when triton is imported: such tests run in a process of
their own, which the same file's tests run in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")


def passes_in_the_interpreter(
    file: str | Path, *options: str, timeout: float = 280, **environment: str
) -> None:
    """The tests of `file` pass where TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file), *options],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "passed" in done.stdout, done.stdout
