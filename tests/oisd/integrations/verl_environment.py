"""Imported before verl: makes it run on the CPU with our engine, or skips the tests without it.

verl cannot share an environment with TRL, so that its tests are skipped in the usual one;
docs/development.md has the command that makes another and runs them.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    reason = "verl is not installed (it cannot be beside TRL; see docs/development.md)"
    pytest.skip(reason, allow_module_level=True)

HERE = str(Path(__file__).parents[3])
if HERE not in sys.path:  # in the processes that the tests start
    sys.path.insert(0, HERE)
os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_ENGINE_VENDOR"] = "oisd"
os.environ["VERL_USE_EXTERNAL_MODULES"] = "tests.oisd.integrations.verl_cpu"
warnings.filterwarnings("ignore", message=".*engine is not available")
