"""Module names of earlier versions still import, as the module that has taken their place."""

import importlib
import subprocess
import sys

import pytest

from oisd.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} since"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == module.__spec__.name == MOVED[old]


def test_a_module_that_moved_back_is_no_old_name(recwarn):
    module = importlib.import_module("oisd.jsonl")
    assert module.__name__ == "oisd.jsonl" and not recwarn
    with pytest.warns(DeprecationWarning, match="oisd.run.jsonl is oisd.jsonl since oisd 0.3"):
        sys.modules.pop("oisd.run.jsonl", None)
        assert importlib.import_module("oisd.run.jsonl") is module


def test_what_is_set_there_has_its_effect(monkeypatch):
    from oisd.run import summary

    monkeypatch.setattr("oisd.run_summary.plot_training", "set")
    assert summary.plot_training == "set"


def test_the_builder_of_csrc_keeps_its_command():
    command = [sys.executable, "-m", "oisd_kernels.cuda_build", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--check" in done.stdout
