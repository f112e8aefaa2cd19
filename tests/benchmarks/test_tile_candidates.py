"""Tile candidates of the GPU queue's sweep: compiled in every launch that would take them."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from benchmarks.gpu import candidates
from benchmarks.gpu.place import GPU
from benchmarks.gpu.sweep import ENTRIES
from benchmarks.measure.machine import ROOT
from oisd_kernels import audit

FORWARD = next(entry for entry in ENTRIES if entry.key[0] == "forward")
(_, TODAY), (LABEL, TILE), *_ = FORWARD.candidates(GPU)


def usage(launch: audit.Launch, arch: str, spills: int = 0) -> audit.Usage:
    return audit.Usage(launch.kernel.__name__, launch.case, arch, 8, 2, 200, spills, 0, 0, False,
                       {}, 1)  # fmt: skip


def test_the_launches_that_take_a_tile():
    usual = audit.launches("sm_90", full=True, families=candidates.FAMILIES["attention"])
    found = candidates.taking(FORWARD, TILE, usual)
    assert {launch.kernel.__name__ for launch in found} == {"attention_forward_kernel"}
    assert len(found) > 1
    for launch in found:
        blocks = {launch.kernel.arg_names[path[0]]: x for path, x in launch.constexprs.items()}
        assert (blocks["BLOCK_M"], blocks["BLOCK_N"]) == (TILE["m"], TILE["n"])
    assert candidates.taking(FORWARD, TODAY, usual) == []


@pytest.mark.parametrize("spills, status", [(0, 0), (1, 1)])
def test_a_candidate_that_spills_is_named(spills, status, monkeypatch, capsys):
    seen = []

    def compiled(launch, arch):
        seen.append(launch)
        last = len(seen) == 3
        return usage(launch, arch, spills if last else 0)

    monkeypatch.setattr(audit, "audit", compiled)
    monkeypatch.setattr(candidates, "ENTRIES", [replace(FORWARD, others=FORWARD.others[:1])])
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    assert candidates.main([]) == status and len(seen) > 3
    failed = f"FAILED: {FORWARD.name}: {LABEL}" in capsys.readouterr().out
    assert failed == bool(status)


def test_an_entry_that_nothing_launches_is_named(monkeypatch, capsys):
    other = replace(FORWARD, key=("forward", "half", 512), others=FORWARD.others[:1])
    monkeypatch.setattr(type(other), "candidates", lambda self, place: iter(
        [("today", TODAY), ("other", TODAY | {"m": 64})]))  # fmt: skip
    monkeypatch.setattr(candidates, "ENTRIES", [other])
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    assert candidates.main([]) == 1
    assert f"FAILED: {other.name}: other" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_candidate_spills():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.candidates"], capture_output=True, text=True,
        cwd=ROOT, timeout=2900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
