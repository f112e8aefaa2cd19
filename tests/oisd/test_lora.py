"""LoRA: only adapters are trained, saved and undone; everything else is as without them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oisd import adapters
from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.batch import Batch, assemble
from oisd.cli import main
from oisd.config import (
    AlignmentConfig,
    ConfigError,
    ModelConfig,
    TrainConfig,
    from_tables,
)
from oisd.objective import Objective, Totals
from oisd.optimizer import Optimizer
from oisd.policy import Policy, load_policy
from oisd.rollout import Completions
from oisd.run.processes import Processes
from oisd.trainer import Trainer, learn
from tests import ROOT
from tests.tiny_models import tiny_model

REWARD = """
def low(texts, answers):
    return [float(text[:1] in "01234") for text in texts]
"""
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model with its tokenizer in a folder, random but not flat."""
    folder = tmp_path_factory.mktemp("base")
    arithmetic_model(
        3, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        initializer_range=0.2,
    ).save_pretrained(folder)  # fmt: skip
    arithmetic_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def reward_module(tmp_path, monkeypatch):
    (tmp_path / "lora_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)


def lora(base: Path, **changes) -> ModelConfig:
    return ModelConfig(**{"path": str(base), "lora_rank": 4, **changes})


def adapted(base: Path, **changes) -> Policy:
    """As load_policy makes it, but with adapters that do something."""
    policy = load_policy(lora(base, **changes), seed=0)
    policy.model.train()
    randomise(policy.model)
    return policy


def randomise(model) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layer_of(name: str) -> int:
    """Counted from 1."""
    return int(name.split(".layers.")[1].split(".")[0]) + 1


# ---------------------------------------------------------------- what is trained


def test_without_a_rank_nothing_changes_and_peft_is_not_needed(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load_policy(ModelConfig(path=str(base), dtype="bfloat16"), seed=0).model
    assert not adapters.is_adapted(model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ConfigError, match=r"pip install 'oisd\[lora\]'"):
        load_policy(lora(base), seed=0)


@pytest.mark.parametrize("targets", [("all-linear",), QKV, ("mlp.up_proj",)], ids="-".join)
def test_only_adapters_are_trained_and_the_seed_makes_them(base, targets):
    state = torch.get_rng_state()
    one, again, other = (
        load_policy(lora(base, lora_targets=targets), seed=seed).model for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    names = {"all-linear": {*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"}, QKV: set(QKV)}
    wanted = names.get(targets[0], names.get(targets, {"up_proj"}))
    assert {name.split(".")[-4] for name in trained(one)} == wanted
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(one))
    for name, a in trained(one).items():
        assert torch.equal(a, trained(again)[name]) and a.dtype == torch.float32
        assert ("lora_B" in name) == torch.equal(a, trained(other)[name])


@pytest.mark.parametrize(
    "target, message",
    [
        ("q_prog", r"got 'q_prog'; did you mean 'q_proj'\?"),
        ("self_attn", r"linear layers of Qwen3ForCausalLM \(down_proj, gate_proj, .*'self_attn'"),
        ("embed_tokens", "got 'embed_tokens'"),
        ("proj", "got 'proj'"),
    ],
)
def test_targets_that_are_no_linear_layers_are_named(base, target, message):
    with pytest.raises(ConfigError, match=message):
        load_policy(lora(base, lora_targets=("q_proj", target)), seed=0)


def test_a_head_of_another_name_is_refused_too():
    model = tiny_model("llama")
    model.to_words, model.lm_head = model.lm_head, None
    model.get_output_embeddings = lambda: model.to_words
    config = ModelConfig(lora_rank=2, lora_targets=("q_proj", "to_words"))
    with pytest.raises(ConfigError, match="must leave out the head, got 'to_words'"):
        adapters.attach(model, config, seed=0)


# ---------------------------------------------------------------- losses and gradients


def config_of(model: ModelConfig, **oisd) -> TrainConfig:
    config = TrainConfig(model=model, oisd=AlignmentConfig(**{"student_layers": (2,), **oisd}))
    return replace(
        config,
        rollout=replace(config.rollout, max_completion_tokens=6),
        run=replace(config.run, device="cpu", grad_norm_every=1, tokens_per_microbatch=40),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    rows, lengths = 5, torch.tensor([6, 1, 4, 5, 3])
    prompts = [torch.randint(0, 12, (n,), generator=generator).tolist() for n in (3, 5, 2, 6, 4)]
    ids = torch.randint(0, 12, (rows, 6), generator=generator)
    sampled = Completions(ids, torch.zeros(rows, 6), lengths, lengths < 6)
    advantages = torch.randn(rows, generator=generator)
    return assemble(prompts, sampled, advantages, range(rows), 12)


def totals_of(batch: Batch) -> Totals:
    return Totals(len(batch), int(batch.predicts.sum()))


def losses_of(policy: Policy, config: TrainConfig, batch: Batch) -> dict[str, torch.Tensor]:
    objective = Objective(policy, config)
    with objective.taps:
        return objective(batch, totals_of(batch), 0)[0]


def gradients(losses, model) -> dict[str, dict[str, torch.Tensor]]:
    own = trained(model)
    found = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, own.values(), retain_graph=True, allow_unused=True)
        found[name] = {n: g for n, g in zip(own, grads, strict=True) if g is not None}
    return found


def test_each_loss_reaches_the_adapters_beneath_it_alone(base, batch):
    policy = adapted(base)
    found = gradients(losses_of(policy, config_of(lora(base)), batch), policy.model)
    own = trained(policy.model)
    assert found["grpo"].keys() == own.keys()
    assert found["think"].keys() == {name for name in own if layer_of(name) <= 2}
    # The queries and keys of layer 2, and all of layer 1.
    seen = {n for n in own if layer_of(n) == 1 or "layers.1.self_attn.q_proj" in n}
    assert found["attention"].keys() == seen | {n for n in own if "layers.1.self_attn.k_proj" in n}
    for name, grads in found.items():
        assert all(g.norm() > 1e-6 for g in grads.values()), name
    everything = [p for p in policy.model.parameters() if not p.requires_grad]
    assert everything and all(p.grad is None for p in everything)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_nothing(base, batch, dtype):
    results = []
    for checkpointing in (False, True):
        policy = adapted(base, dtype=dtype, gradient_checkpointing=checkpointing)
        losses = losses_of(policy, config_of(lora(base, dtype=dtype)), batch)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        results.append({name: p.grad for name, p in trained(policy.model).items()})
    for name, gradient in results[0].items():
        assert gradient.norm() > 1e-6
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "cohere", "phi3"])
def test_frozen_layers_in_bf16_give_the_same_numbers(name):
    """To the bit: rounded once is rounded in each forward."""
    found = []
    for rounded in (False, True):
        model = adapters.attach(tiny_model(name), ModelConfig(lora_rank=2), seed=0)
        randomise(model)
        if rounded:
            adapters.round_frozen(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.arange(3, 60).view(3, 19), use_cache=False).logits
        logits.float().square().mean().backward()
        found.append((logits, {n: p.grad for n, p in trained(model).items()}))
    assert torch.equal(found[0][0], found[1][0])
    for parameter, gradient in found[0][1].items():
        assert gradient.norm() > 1e-7 and torch.equal(gradient, found[1][1][parameter])
    halves = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in halves) > sum(p.numel() for p in model.parameters()) / 2
    assert not any(p.requires_grad for p in halves)


def test_a_loss_without_an_adapter_beneath_it(base, batch):
    model = lora(base, lora_targets=("down_proj",))
    config = config_of(model, student_layers=(1,))
    policy = adapted(base, lora_targets=("down_proj",))
    optimizer = Optimizer(policy.model, config, Processes("cpu"))
    given = [(batch, totals_of(batch))]
    metrics, norms = learn(Objective(policy, config), optimizer, given, step=0)
    assert norms["grad_norm/attention"] == 0 < norms["grad_norm/think"] < norms["grad_norm"]
    assert metrics["loss/attention"].item() != 0


# ---------------------------------------------------------------- the reference of the KL term


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_its_adapters_the_policy_is_the_initial_one(base, batch, dtype):
    policy = adapted(base, dtype=dtype)
    copy = load_policy(ModelConfig(path=str(base), dtype=dtype), seed=0)
    objective = Objective(policy, config_of(lora(base, dtype=dtype)))
    frozen = Objective(copy, config_of(ModelConfig()))
    for module in policy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # a frozen copy has none
    modes = [module.training for module in policy.model.modules()]
    names = list(trained(policy.model))
    with adapters.disabled(policy.model):
        reference = objective.logprobs(batch)
    assert torch.equal(reference, frozen.logprobs(batch))
    assert (objective.logprobs(batch) - reference).abs().max() > 1e-2
    assert [module.training for module in policy.model.modules()] == modes
    assert list(trained(policy.model)) == names


def tables(base: Path, output_dir: Path, **changes) -> dict:
    merged = {
        "model": {"path": str(base), "lora_rank": 4},
        "data": {"max_prompt_tokens": 16, "limit": 500},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 6, "max_completion_tokens": 4},
        "reward": {"function": "lora_reward:low"},
        "oisd": {"student_layers": [2]},
        "optimizer": {"learning_rate": 1e-2},
        "run": {
            "steps": 3,
            "save_every": 1,
            "threads": 1,
            "device": "cpu",
            "tokens_per_microbatch": 150,
            "output_dir": str(output_dir),
        },
    }
    for name, table in changes.items():
        merged.setdefault(name, {}).update(table)
    return merged


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("oisd.run.summary.plot_training", lambda *_: [])


def train(base: Path, output_dir: Path, **changes) -> Trainer:
    trainer = Trainer(from_tables(tables(base, output_dir, **changes)))
    trainer.train()
    return trainer


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / "adapter_model.safetensors")


def assert_same_run(ours: Path, theirs: Path, step: int = 3) -> None:
    assert metrics(ours) == metrics(theirs)
    a, b = weights(ours, step), weights(theirs, step)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].norm() > 0, name


def test_the_kl_term_is_that_of_a_frozen_copy(base, tmp_path, monkeypatch, no_plots):
    kl = {"grpo": {"kl_coef": 0.5, "minibatches": 2}}
    train(base, tmp_path / "run", **kl)
    assert not (tmp_path / "run" / "reference").exists()

    def copy(self):
        policy = load_policy(replace(self.config.model, lora_rank=0), seed=0)
        policy.model.requires_grad_(False).eval()
        off = AlignmentConfig(think_weight=0.0, attention_weight=0.0)
        return Objective(policy, replace(self.config, oisd=off))

    monkeypatch.setattr(Trainer, "_load_reference", copy)
    train(base, tmp_path / "copy", **kl)
    assert_same_run(tmp_path / "run", tmp_path / "copy")
    train(base, tmp_path / "without", grpo={"minibatches": 2})
    assert metrics(tmp_path / "run")[2] != metrics(tmp_path / "without")[2]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def whole_run(base, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "lora_reward.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("oisd.run.summary.plot_training", lambda *_: [])
        train(base, folder / "run")
    return folder / "run"


def test_a_checkpoint_is_an_adapter_that_peft_reads(base, whole_run):
    folder = whole_run / "checkpoints" / "step-3"
    assert all(row["grad_norm"] > 0 for row in metrics(whole_run))
    assert not (folder / "model.safetensors").exists()
    assert adapters.base_path(folder) == str(base.resolve())
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    )
    ids = torch.arange(2, 10)[None]
    ours = load_policy(ModelConfig(path=str(folder)), seed=0).model
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (ours(ids).logits - before(ids).logits).abs().max() > 1e-2
    # The base model is as it was.
    saved = load_file(base / "model.safetensors")
    for name, tensor in ours.get_base_model().state_dict().items():
        if "lora_" not in name and (key := name.replace("base_layer.", "")) in saved:
            assert torch.equal(tensor, saved[key]), name


def test_two_processes_make_the_same_adapters_as_one(base, whole_run, tmp_path):
    """As torchrun starts it."""
    run, script = tmp_path / "two", tmp_path / "two.py"
    script.write_text(
        "import oisd.trainer\nfrom oisd.config import from_tables\nif __name__ == '__main__':\n"
        f"    oisd.trainer.Trainer(from_tables({tables(base, run)!r})).train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(metrics(run), metrics(whole_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), ours["step"]
    start, one, two = weights(whole_run, 2), weights(whole_run, 3), weights(run, 3)
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert moved > 1e-3
        # Sums in another order, and AdamW divides by small second moments: a hundredth of the way.
        assert (one[name] - two[name]).norm() < 1e-2 * moved, name


def test_killed_and_started_again_ends_the_same(base, whole_run, tmp_path, no_plots):
    run = tmp_path / "run"
    script = "\n".join(
        [
            "import os, signal, oisd.trainer",
            "from oisd.config import from_tables",
            "learn = oisd.trainer.learn",
            "def cut(*given):",
            "    if given[-1] == 2: os.kill(os.getpid(), signal.SIGKILL)",
            "    return learn(*given)",
            "oisd.trainer.learn = cut",
            f"oisd.trainer.Trainer(from_tables({tables(base, run)!r})).train()",
        ]
    )
    died = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len(metrics(run)) == 2
    train(base, run)
    assert_same_run(run, whole_run)


VARIANTS = {
    "bf16-checkpointing": {"model": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    "kl-minibatches": {"grpo": {"kl_coef": 0.1, "minibatches": 2}},
    "dropout": {"model": {"lora_dropout": 0.2, "lora_targets": ["q_proj", "down_proj"]}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_resume(changes, base, tmp_path, no_plots):
    run = {"run": {"steps": 2}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(base, whole, **changes, **run)
    # As one that was killed in the second step.
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("step-2*"))
    trainer = Trainer(from_tables(tables(base, parts, **changes, **run)))
    assert trainer.step == 1
    trainer.train()
    assert_same_run(parts, whole, step=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_gives_the_policy_that_was_in_memory(base, tmp_path, batch, dtype):
    policy = adapted(base, dtype=dtype)
    adapters.save(policy.model, tmp_path / "adapter")  # PEFT's files alone: the base's tokenizer
    loaded = load_policy(ModelConfig(path=str(tmp_path / "adapter"), dtype=dtype), seed=0)
    config = config_of(lora(base, dtype=dtype))
    found, sampled = [], []
    for one in (policy, loaded):
        sampled.append(one.sample([[1, 10, 2, 11]] * 4, range(4), max_completion_tokens=5))
        found.append(Objective(one, config).logprobs(batch))
    assert torch.equal(*found) and found[0].abs().max() > 0.1
    assert torch.equal(sampled[0].ids, sampled[1].ids)
    assert torch.equal(sampled[0].logprobs, sampled[1].logprobs)
    assert not trained(loaded.model)
    for one in (policy, loaded):
        halves = {n for n, p in one.model.named_parameters() if p.dtype == torch.bfloat16}
        assert bool(halves) == (dtype == "bfloat16")
        assert not halves & trained(one.model).keys()
        assert not any("norm" in name or "embed_tokens" in name for name in halves)


def test_the_commands_take_an_adapter(whole_run, tmp_path, capsys):
    folder = str(whole_run / "checkpoints" / "step-3")
    evaluate = ["eval", folder, "--reward", "lora_reward:low", "--limit", "4", "--samples", "4"]
    evaluate += ["--max-completion-tokens", "4", "--device", "cpu", "--dtype", "bfloat16"]
    assert main([*evaluate, "--output-dir", str(tmp_path / "eval")]) == 0
    look = ["--prompt", "12+34=", "--completion-tokens", "2", "--device", "cpu"]
    look += ["--dtype", "bfloat16", "--output-dir", str(tmp_path / "lens")]
    assert main(["lens", folder, *look]) == 0
    printed = capsys.readouterr().out
    assert "Avg@4" in printed and "boundary layer" in printed


def test_what_cannot_be_adapted_says_what_to_do(base, whole_run, tmp_path):
    folder = whole_run / "checkpoints" / "step-3"
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"is an adapter, which is not trained on: merge it"):
        Trainer(from_tables(tables(folder, out, model={"lora_rank": 0})))
    with pytest.raises(ConfigError, match="is itself an adapter, .* merge it first"):
        Trainer(from_tables(tables(folder, tmp_path / "out2")))
    for changes in ({"model": {"path": "arithmetic"}}, {"warmup": {"steps": 1}}):
        with pytest.raises(ConfigError, match="must be 0 with a blank model or a warm-up, got 4"):
            Trainer(from_tables(tables(base, out, **changes)))


def test_a_base_that_is_gone_or_another_is_named(base, tmp_path):
    adapters.save(adapted(base).model, tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    path = ModelConfig(path=str(tmp_path))
    file.write_text(json.dumps({**written, "base_model_name_or_path": "./nothing"}))
    with pytest.raises(ConfigError, match="'./nothing', the base of the adapter .* cannot be load"):
        load_policy(path, seed=0)
    file.write_text(json.dumps({**written, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base model"):
        load_policy(path, seed=0)
    other = arithmetic_model(0, hidden_size=48, num_hidden_layers=4)
    with pytest.raises(ConfigError, match="does not fit Qwen3ForCausalLM"):
        adapters.load(other, tmp_path, trainable=False)
