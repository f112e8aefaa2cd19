"""OISD inside TRL on two processes: data parallel and FSDP2 take the step that one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trl_runs import Run, difference, train

ROOT = Path(__file__).parents[1]
HEAVY = dict(think_weight=3.0, attention_weight=3.0)
OFF = dict(think_weight=0.0, attention_weight=0.0)
LORA = dict(lora=["q_proj", "k_proj", "up_proj"])
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def on_two_processes(
    cases: list[dict[str, Any]], folder: Path, environment: dict[str, str]
) -> list[Run]:
    """Runs of each case with half the batch on each of two processes."""
    halves = [{"per_device_train_batch_size": 4, "ddp_backend": "gloo"} | case for case in cases]
    file = folder / "runs.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, "tests/trl_runs.py", str(file), json.dumps(halves)],
        cwd=ROOT,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Run(**run) for run in torch.load(file)]


def require_same_step(found: Run, case: dict[str, Any], bound: float) -> None:
    """Relative to what the terms of OISD add to the step."""
    whole, grpo = train(**case), train(**(case | OFF))
    terms = difference(whole, grpo).norm()
    assert terms > 0.01
    assert difference(found, whole).norm() < bound * terms
    for name in ("loss/think", "loss/attention", "js/think_pos", "js/attention_neg", "loss/grpo"):
        assert found.log[0][name] == pytest.approx(whole.log[0][name], rel=max(bound, 1e-4)), name


def test_data_parallel(tmp_path):
    cases = [HEAVY, HEAVY | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)]
    for found in on_two_processes(cases, tmp_path, {}):
        assert not found.sharded
        require_same_step(found, HEAVY, 1e-4)


def test_fsdp2(tmp_path):
    """accelerate shards on accelerators alone; `allow_fsdp_on_cpus` lifts that."""
    cases = [HEAVY, HEAVY | LORA]
    for case, found in zip(cases, on_two_processes(cases, tmp_path, FSDP2), strict=True):
        assert found.sharded
        require_same_step(found, case, 1e-4)


@pytest.mark.slow
def test_fsdp2_in_all_its_forms(tmp_path):
    """bf16: the halves of a batch round differently, so the comparison is with data parallel."""
    tied = HEAVY | dict(policy=dict(tie_word_embeddings=True), max_steps=2)
    checkpointed = HEAVY | LORA | dict(gradient_checkpointing=True, max_steps=2)
    half = checkpointed | dict(bf16=True)
    runs = on_two_processes([tied, checkpointed, half], tmp_path, FSDP2)
    assert all(run.sharded for run in runs)
    require_same_step(runs[0], tied, 1e-4)
    require_same_step(runs[1], checkpointed, 1e-4)
    accelerates = FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    (wrapped,) = on_two_processes([HEAVY], tmp_path, accelerates)
    assert wrapped.sharded
    require_same_step(wrapped, HEAVY, 1e-4)
    (parallel,) = on_two_processes([half], tmp_path, {})
    terms = difference(parallel, train(**(half | OFF))).norm()
    assert terms > 0.01
    assert difference(runs[2], parallel).norm() < 1e-3 * terms
