"""OISD inside TRL on two processes: data parallel, FSDP2 and ZeRO take the step that one takes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.oisd.integrations.trl_runs import Run, difference, train

HEAVY = dict(think_weight=3.0, attention_weight=3.0)
OFF = dict(think_weight=0.0, attention_weight=0.0)
LORA = dict(lora=["q_proj", "k_proj", "up_proj"])
# One of the two processes has only advantages of 0, but still takes part in the collectives.
EQUAL = dict(dull="47+85=", shuffle_dataset=False)
DULL = HEAVY | EQUAL
DEEPSPEED = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, see docs/development.md"
)
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
    launch = [sys.executable]
    if environment == DEEPSPEED:  # it is not known to work in a forked process
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, "-m", "tests.oisd.integrations.trl_runs", str(file), json.dumps(halves)],
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
    shares = {"share/think", "share/attention"} & found.log[0].keys()
    names = {"loss/think", "loss/attention", "js/think_pos", "js/attention_neg", "loss/grpo"}
    for name in names | shares:
        assert found.log[0][name] == pytest.approx(whole.log[0][name], rel=max(bound, 1e-4)), name


def test_data_parallel(tmp_path):
    cases = [
        HEAVY,
        HEAVY | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        DULL,
    ]
    runs = on_two_processes(cases, tmp_path, {})
    for case, found in zip((HEAVY, HEAVY, DULL), runs, strict=True):
        assert not found.sharded and 0.1 < found.log[0]["share/think"]
        require_same_step(found, case, 1e-4)
    assert runs[2].log[0]["frac_reward_zero_std"] == 0.5


def test_fsdp2(tmp_path):
    """accelerate shards only on accelerators; `allow_fsdp_on_cpus` lifts that."""
    cases = [HEAVY, HEAVY | LORA, DULL]
    for case, found in zip(cases, on_two_processes(cases, tmp_path, FSDP2), strict=True):
        assert found.sharded and "share/think" not in found.log[0]
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


def zero(stage: int, **options: Any) -> dict[str, Any]:
    """Settings of a run; small parameters (norms) are partitioned too unless `options` differ."""
    auto = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    given = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": given | options,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            **dict.fromkeys(auto, "auto"),
        },
    }


def under_zero(case: dict[str, Any], stage: int, folder: Path, **options: Any) -> Run:
    """A run in its own processes: a second engine in one takes a different step, OISD or not."""
    (run,) = on_two_processes([case | zero(stage, **options)], folder, DEEPSPEED)
    assert run.sharded == (stage == 3)
    return run


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(tmp_path, stage):
    require_same_step(under_zero(HEAVY, stage, tmp_path), HEAVY, 1e-4)


FORMS = {
    "accumulated": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "lora": LORA,
    "tied": dict(policy=dict(tie_word_embeddings=True), max_steps=2),
    "checkpointed": dict(gradient_checkpointing=True, max_steps=2),
    "from-files": dict(from_files=True, max_steps=2),
    "no-norm": dict(lens_norm="none"),
    "equal-rewards": EQUAL,
}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_in_all_its_forms(tmp_path, form, stage):
    case = HEAVY | FORMS[form]
    alone = HEAVY if form == "accumulated" else case
    require_same_step(under_zero(case, stage, tmp_path), alone, 1e-4)


@needs_deepspeed
@pytest.mark.slow
def test_zero3_that_keeps_small_parameters_whole(tmp_path):
    kept = under_zero(HEAVY, 3, tmp_path, stage3_param_persistence_threshold=100)
    require_same_step(kept, HEAVY, 1e-4)


@needs_deepspeed
@pytest.mark.slow
def test_zero3_with_reentrant_checkpointing_is_refused(tmp_path):
    """TRL makes it reentrant for adapters."""
    case = HEAVY | LORA | dict(gradient_checkpointing=True)
    with pytest.raises(AssertionError, match="OISDTrainer: TRL makes checkpointing"):
        under_zero(case, 3, tmp_path)
