"""`oisd plan` with LoRA, and the recipe: against the models themselves."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from oisd import adapters
from oisd.config import ConfigError, ModelConfig, TrainConfig, differences, load_recipe
from oisd.plan import (
    CARDS,
    GIB,
    SHAPES,
    USABLE,
    layer_activations,
    lora_targets,
    memory_plan,
    shape_of,
    with_sharding,
)
from tests import ROOT
from tests.tiny_models import tiny_model

RECIPES = ROOT / "recipes"


def plan_config(**model) -> TrainConfig:
    return TrainConfig(model=ModelConfig(path="x", lora_rank=3, **model))


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "mlp.down_proj")], ids="-".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, tied", [("qwen2", True), ("qwen3", False), ("llama", True)])
def test_the_plan_counts_what_is_there(name, tied, dtype, targets):
    model = tiny_model(name, tie_word_embeddings=tied)
    shape = shape_of(model.config)
    config = plan_config(dtype=dtype, lora_targets=targets)
    model = adapters.attach(model, config.model, seed=0)
    adapters.round_frozen(model, getattr(torch, dtype))
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = memory_plan(config, shape)
    assert plan.trained == own > 0
    assert plan.resident["parameters"] == sum(p.nbytes for p in model.parameters())
    assert plan.resident["AdamW"] == 2 * plan.update["gradients"] == 8 * own
    whole = memory_plan(replace(config, model=replace(config.model, lora_rank=0)), shape)
    assert whole.trained == shape.parameters
    assert whole.update["head"] - plan.update["head"] == 4 * shape.vocabulary * shape.width
    if dtype == "bfloat16":
        head = 2 * shape.vocabulary * shape.width if tied else 0
        assert plan.update["bf16 copies"] == 2 * own + head


def test_adapters_over_processes():
    """The frozen weights are split too; only adapters have gradients to be reduced."""
    config, shape = load_recipe(RECIPES / "qwen3-8b-lora.toml"), SHAPES["Qwen/Qwen3-8B"]
    whole = memory_plan(config, shape)
    plan = memory_plan(with_sharding(config, "fsdp2"), shape, 2)
    for name in ("parameters", "AdamW"):
        assert plan.resident[name] == whole.resident[name] / 2 > 0
    assert plan.update["gradients"] == 2 * plan.trained
    root, own = 2 * 151936 * 4096 + 4096, plan.trained // 36
    layer = (8_190_735_360 - root) // 36
    assert plan.update["embedding, head gathered"] == 2 * root
    assert plan.update["layers gathered"] == 2 * 2 * (layer + own) + (2 + 4) * own


def test_the_plan_names_targets_that_it_does_not_know():
    with pytest.raises(ConfigError, match="the plan knows q_proj, .*, got 'qkv_proj'"):
        lora_targets(plan_config(lora_targets=("qkv_proj",)), shape_of(tiny_model("phi3").config))


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_the_plans_activations_are_a_bound(name, half):
    """Frozen norms keep less than trained ones; nothing keeps more than is planned."""
    tokens, rank = 100, 8

    def kept(layers: int) -> int:
        model = tiny_model(
            name, num_hidden_layers=layers, hidden_size=128, intermediate_size=224,
            num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        )  # fmt: skip
        model = adapters.attach(model, ModelConfig(lora_rank=rank), seed=0)
        adapters.round_frozen(model, torch.bfloat16 if half else torch.float32)
        # The plan counts autocast's copies of the adapters separately.
        matrices = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            weight = {tuple(tensor.shape), tuple(reversed(tensor.shape))} & matrices
            if not weight and storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(3, 100, (1, tokens))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model.get_base_model().model(input_ids=ids, use_cache=False)
        kept.shape = shape_of(model.config)
        return sum(found.values())

    few, many = kept(2), kept(4)
    planned = layer_activations(kept.shape, half) + (2 if half else 4) * rank * 7
    assert 0.75 * planned < (many - few) / 2 / tokens <= planned


def test_the_recipe_fits_the_card_that_it_names():
    config = load_recipe(RECIPES / "qwen3-8b-lora.toml")
    plan = memory_plan(config, SHAPES["Qwen/Qwen3-8B"])
    assert plan.peak <= USABLE * CARDS["80 GB (A100, H100)"] * GIB
    assert plan.trained == 36 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3)


def test_the_recipe_is_the_whole_models_but_for_lora():
    file = RECIPES / "qwen3-8b-lora.toml"
    found = differences(load_recipe(RECIPES / "qwen3-8b.toml"), load_recipe(file))
    changed = {line.split(":")[0] for line in found}
    assert changed == {
        "model.lora_rank", "optimizer.learning_rate", "run.output_dir", "run.sharding"
    }  # fmt: skip
    settings = [x for x in file.read_text().splitlines() if " = " in x and not x.startswith("#")]
    for line in settings:
        stated = re.search(r"#.*(paper|BuPO|LoRA|ours|not stated)", line)
        assert stated or line.startswith(("base", "path", "output_dir")), line
