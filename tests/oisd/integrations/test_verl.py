"""OISD inside verl: its own FSDP2 engine on a CPU with gloo, against the losses by themselves."""

from __future__ import annotations

from tests.oisd.integrations import verl_environment  # noqa: F401

# isort: split

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import FSDPOptimizerConfig
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig

from oisd.integrations.verl import OISDEngine
from tests import ROOT
from tests.oisd.integrations.verl_runs import (
    NONE,
    OPTIONS,
    R,
    actor_loss,
    batch,
    distance,
    engine,
    engine_config,
    expected,
    gradients,
    model_config,
    save_models,
    start_gloo,
)

TERMS = ("think", "attention")
SMALLER = dict(micro_batch_size_per_gpu=1, max_token_len_per_gpu=16)
BOUND = 1e-4  # relative, of gradients in float32


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    start_gloo(str(tmp_path_factory.mktemp("gloo") / "store"))
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


CASES = {
    "packed, untied": ("untied", dict(remove_padding=True, micro_batch_size_per_gpu=2)),
    "packed, tied": ("tied", dict(remove_padding=True, micro_batch_size_per_gpu=4)),
    "padded, untied": ("untied", dict(remove_padding=False, micro_batch_size_per_gpu=1)),
    "padded, tied": ("tied", dict(remove_padding=False, micro_batch_size_per_gpu=2)),
    "packed, all nested": (
        "tied",
        dict(remove_padding=True, nested=True, micro_batch_size_per_gpu=2),
    ),
    "by tokens": (
        "untied",
        dict(remove_padding=True, use_dynamic_bsz=True, max_token_len_per_gpu=24),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_metrics_are_those_of_the_losses_alone(checkpoints, case):
    kind, form = CASES[case]
    reference, metrics = expected(checkpoints / kind)
    for term in ("think", "attention"):  # each is far above the tolerance
        without, _ = expected(checkpoints / kind, **{f"{term}_weight": 0.0})
        assert distance(without, reference) > 100 * BOUND, term
    found, output = gradients(engine(checkpoints / kind), batch(**form))
    assert distance(found, reference) < BOUND
    reported = output["metrics"]
    for name, mean in metrics.items():
        if name.startswith(("js/", "entropy/s", "entropy/t", "agreement/")):
            assert reported[name] == [pytest.approx(mean.item(), rel=1e-4)], name
        if name.startswith("loss/"):
            assert reported[name].aggregate() == pytest.approx(mean.item(), rel=1e-4), name
    policy = reported["actor/pg_loss"].aggregate()
    assert policy == pytest.approx(metrics["loss"].item(), rel=1e-4)
    weighted = sum(OPTIONS[f"{t}_weight"] * metrics[f"loss/{t}"].item() for t in TERMS)
    assert sum(output["loss"]) == pytest.approx(policy + weighted, rel=1e-4)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "think alone": (dict(attention_weight=0.0), {}, {}),
    "attention alone": (dict(think_weight=0.0), {}, {}),
    "clipped": (dict(advantage_clip=0.75), {}, {}),
    "reverse KL, temperature": (dict(divergence="reverse_kl", lens_temperature=2.0), {}, {}),
    "no lens norm, beta": (dict(lens_norm="none", beta=0.3), {}, {}),
    "sampled keys": (dict(key_window=2, key_stride=3), {}, {}),
    "more steps than there are": (dict(attention_steps=R), {}, {}),
    "no checkpointing": ({}, {}, dict(enable_gradient_checkpointing=False)),
    "bucketed": ({}, dict(pad_to_length=True, pad_to_length_bucket=32), {}),
    "not resharded": ({}, dict(reshard_after_forward=False), {}),
}


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_reaches_the_losses(checkpoints, variant, form):
    options, engine_options, model_options = VARIANTS[variant]
    reference, _ = expected(checkpoints / "untied", **options)
    config = engine_config(OPTIONS | options, **engine_options)
    made = engine(checkpoints / "untied", config, **model_options)
    data = batch(remove_padding=form == "packed", micro_batch_size_per_gpu=2)
    assert distance(gradients(made, data)[0], reference) < BOUND


def test_options_change_the_gradient(checkpoints):
    """Otherwise the test above could not fail."""
    reference, _ = expected(checkpoints / "untied")
    changing = [options for options, _, _ in VARIANTS.values() if options]
    for options in changing:
        if "attention_steps" not in options:
            other, _ = expected(checkpoints / "untied", **options)
            assert distance(other, reference) > 10 * BOUND, options


def test_sampled_steps_are_a_part_of_the_steps(checkpoints):
    config = engine_config(OPTIONS | dict(think_weight=0.0, attention_steps=1))
    made = engine(checkpoints / "untied", config)
    seen = []

    def terms(taps: Any, found: Any) -> Any:
        computed = OISDEngine._terms(made, taps, found)
        seen.append({name: mean.count.item() for name, mean in made._metrics.items()})
        return computed

    made._terms = terms
    gradients(made, batch(remove_padding=True, micro_batch_size_per_gpu=4))
    # One step of each of the rollouts whose advantage is not 0, for each of two layers.
    assert seen == [{"js/attention_pos": 4.0, "js/attention_neg": 2.0}]


def test_bfloat16_as_verl_trains(checkpoints):
    """In verl's default precision: bfloat16 parameters under autocast, float32 gradients."""
    reference, _ = expected(checkpoints / "untied")
    made = engine(checkpoints / "untied", engine_config(mixed_precision=None))
    found, _ = gradients(made, batch(remove_padding=True))
    plain = engine(checkpoints / "untied", engine_config(NONE, mixed_precision=None))
    without, _ = gradients(plain, batch(remove_padding=True))
    assert distance(found, reference) < 0.05 < 0.3 < distance(without, reference)


def test_lora(checkpoints):
    lora = dict(lora_rank=4, target_modules="all-linear")
    made = engine(checkpoints / "untied", **lora)
    found, output = gradients(made, batch(remove_padding=True))
    assert found and all("lora" in name for name in found)
    plain = engine(checkpoints / "untied", engine_config(NONE), **lora)
    for mine, theirs in zip(plain.module.parameters(), made.module.parameters(), strict=True):
        with torch.no_grad():
            mine.copy_(theirs)
    without, _ = gradients(plain, batch(remove_padding=True))
    assert distance(without, found) > 0.01
    assert output["metrics"]["js/think_pos"][0] > 0


def worker_config(checkpoints: Path, micro_batch_size: int) -> Any:
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=model_config(checkpoints / "untied"),
        engine_config=engine_config(
            use_dynamic_bsz=False, micro_batch_size_per_gpu=micro_batch_size
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )


def test_a_training_step_of_verls_worker(checkpoints, monkeypatch):
    """As its trainer calls it: mini-batches, optimizer, metrics over all of them."""
    alone = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_PORT=0)
    for name, value in (alone | dict(MASTER_ADDR="127.0.0.1")).items():
        monkeypatch.setenv(name, str(value))
    worker = TrainingWorker(worker_config(checkpoints, 2))
    worker.reset()
    worker.set_loss_fn(actor_loss())
    before = [p.full_tensor().clone() for p in worker.engine.module.parameters()]
    data = batch(remove_padding=True, mini_batch_size=2, global_batch_size=2)
    metrics = tu.get(worker.train_mini_batch(data), "metrics")
    after = [p.full_tensor() for p in worker.engine.module.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    names = "js/think_pos js/attention_pos entropy/student entropy/teacher agreement/top1"
    for name in [*names.split(), "loss/think", "loss/attention", "actor/pg_loss", "grad_norm"]:
        assert all(torch.isfinite(torch.tensor(metrics[name]))), name
    assert len(metrics["js/think_pos"]) == 2  # one value per mini-batch
    assert len(metrics["js/think_neg"]) == 1  # the second has no negative advantage
    assert 0 < metrics["js/think_pos"][0] < 0.7


def test_forward_alone_is_verls_own(checkpoints):
    made = engine(checkpoints / "untied")
    with made.eval_mode():
        output = made.infer_batch(batch(remove_padding=True))
    assert "js/think_pos" not in output["metrics"]
    assert output["model_output"]["log_probs"].is_nested
    assert not any(len(m._forward_pre_hooks) > 1 for m in made.module.modules())


def _two_processes(rank: int, root: str, store: str) -> None:
    start_gloo(store, rank, 2)
    found = {}
    rows = slice(2 * rank, 2 * rank + 2)
    for case, (kind, form) in CASES.items():
        made = engine(Path(root) / kind)
        found[case], output = gradients(made, batch(rows, **(form | SMALLER)))
        reported = output["metrics"]
        found[f"{case}: metrics"] = {n: v for n, v in reported.items() if n.startswith("js/")}
        found[f"{case}: losses"] = {t: reported[f"loss/{t}"] for t in TERMS}
    torch.save(found, f"{store}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_are_as_one(checkpoints, tmp_path):
    store = str(tmp_path / "store")
    spawn = torch.multiprocessing.spawn
    spawn(_two_processes, args=(str(checkpoints), store), nprocs=2)
    both = [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(2)]
    for case, (kind, _) in CASES.items():
        reference, metrics = expected(checkpoints / kind)
        for rank, found in enumerate(both):
            assert distance(found[case], reference) < BOUND, (rank, case)
            reported = found[f"{case}: metrics"]
            assert len(reported) == 4
            for name, value in reported.items():
                assert value == [pytest.approx(metrics[name].item(), rel=1e-4)], (rank, name)
        for term in TERMS:
            value = Metric.aggregate_dp([found[f"{case}: losses"][term] for found in both])
            assert value == pytest.approx(metrics[f"loss/{term}"].item(), rel=1e-4), case


@pytest.mark.slow
def test_two_workers_of_ray(checkpoints, monkeypatch):
    """verl's own worker group: what its trainer drives, without the trainer."""
    import ray
    from verl.single_controller.ray import (
        RayClassWithInitArgs,
        RayResourcePool,
        RayWorkerGroup,
    )

    from tests.oisd.integrations.verl_ray import CPUWorker

    folders = [str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]))
    # verl asks for ten CPUs a worker; Ray takes our word.
    ray.init(num_cpus=40, include_dashboard=False, object_store_memory=100_000_000)
    try:
        remote = RayClassWithInitArgs(ray.remote(CPUWorker), config=worker_config(checkpoints, 1))
        pool = RayResourcePool(process_on_nodes=[2], use_gpu=False)
        workers: Any = RayWorkerGroup(pool, remote, device_name="cpu")
        workers.reset()
        workers.set_loss_fn(actor_loss())
        output = workers.train_mini_batch(batch(remove_padding=True, mini_batch_size=4))
        reported = tu.get(output.get(), "metrics")
    finally:
        ray.shutdown()
    reference, metrics = expected(checkpoints / "untied")
    norm = torch.stack([x.norm() for x in reference.values()]).norm().item()
    assert reported["grad_norm"] == [pytest.approx(norm, rel=1e-4)]
    for term in TERMS:
        value = metrics[f"loss/{term}"].item()
        assert reported[f"loss/{term}"] == [pytest.approx(value, rel=1e-4)]
    assert reported["js/think_neg"] == 2 * [pytest.approx(metrics["js/think_neg"].item(), rel=1e-4)]
