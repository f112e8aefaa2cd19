"""The memory plan against a hand computation, real parameter counts and what autograd keeps."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from oisd import plan as planning
from oisd.cli import main, recipe_path
from oisd.config import ConfigError, load_recipe
from oisd.plan import (
    CARDS,
    GIB,
    SHAPES,
    USABLE,
    Shape,
    layer_activations,
    memory_plan,
    model_shape,
    shape_of,
    with_sharding,
)
from oisd.rollout.model_copy import ModelCopy
from tests import ROOT
from tests.tiny_models import TINY, tiny_model

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", sorted(TINY.keys() - {"gpt_oss"}))
def test_parameters_of_real_models(name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    assert shape_of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_a_mixture_of_experts_is_refused():
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, moe_intermediate_size=48,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="gated feed-forward blocks, got a qwen3_moe"):
        shape_of(config)
    with pytest.raises(ConfigError, match="gated feed-forward blocks, got a gpt_oss"):
        shape_of(tiny_model("gpt_oss").config)


def test_a_layer_that_the_model_has_not_is_refused(capsys):
    command = ["plan", "qwen3-4b", "--oisd.student-layers"]
    assert main([*command, "36"]) == 2
    assert "must lie in 1..35, below the final layer of Qwen/Qwen3-4B" in capsys.readouterr().err
    assert main([*command, "35"]) == 0


def test_parameters_of_the_built_in_model():
    from oisd.arithmetic import arithmetic_model

    real = sum(p.numel() for p in arithmetic_model().parameters())
    assert model_shape("arithmetic").parameters == real


def test_published_sizes():
    counts = {name.split("/")[1]: shape.parameters for name, shape in SHAPES.items()}
    assert counts == {
        "Qwen3-4B": 4_022_468_096,
        "Qwen3-8B": 8_190_735_360,
        "OctoThinker-3B-Long-Base": 3_212_749_824,
        "OctoThinker-8B-Long-Base": 8_030_261_248,
    }


def test_a_configuration_that_is_here_goes_first(tmp_path):
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)) == shape_of(
        AutoConfig.from_pretrained(tmp_path), "its config.json"
    )


def test_a_size_that_each_layer_has_its_own_of_is_not_asked_for(monkeypatch):
    """transformers 5.24 raises an error of its own for Gemma 4's head_dim."""
    config = AutoConfig.for_model("qwen3", head_dim=8, num_attention_heads=4, hidden_size=64)
    cls = type(config)

    def refuse(own, name):
        if name == "head_dim":
            raise RuntimeError("'head_dim' is a per-layer attribute")
        return object.__getattribute__(own, name)

    monkeypatch.setattr(cls, "__getattribute__", refuse)
    assert planning.shapes._formula(config, "here").head_dim == 16


def test_unknown_models_say_how_to_go_on():
    with pytest.raises(ConfigError, match="hf download nobody/nothing config.json"):
        model_shape("nobody/nothing")


# ---- what autograd keeps ---------------------------------------------------------------------


def kept(run) -> list[torch.Tensor]:
    """The tensors that autograd keeps for the backward of `run()`, each storage once."""
    found: dict[int, torch.Tensor] = {}

    def pack(tensor):
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return list(found.values())


def kept_bytes(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_activations_of_a_layer(name, half):
    tokens = 200

    def run(layers: int) -> tuple[int, Shape]:
        model = tiny_model(
            name, num_hidden_layers=layers, hidden_size=128, intermediate_size=224,
            num_attention_heads=8, num_key_value_heads=4, head_dim=32,
            max_position_embeddings=512,
        )  # fmt: skip
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        # Copies of the weights in bf16 are counted separately.
        copies = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
        ids = torch.randint(3, 100, (1, tokens))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            tensors = kept(lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state)
        mine = [
            t for t in tensors
            if t.untyped_storage().data_ptr() not in own
            and not {tuple(t.shape), tuple(reversed(t.shape))} & copies
        ]  # fmt: skip
        return kept_bytes(mine), shape_of(model.config)

    (few, _), (many, shape) = run(2), run(4)
    assert layer_activations(shape, half) == pytest.approx((many - few) / 2 / tokens, rel=0.05)


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_cache_of_keys_and_values_and_the_copy_that_samples(half, tied):
    model, tokens = tiny_model("qwen3", tie_word_embeddings=tied), 40
    cache = DynamicCache(config=model.config)
    samples = ModelCopy(model, torch.bfloat16).fill() if half else model
    renamed = "cache" in inspect.signature(model.forward).parameters  # since transformers 5.23
    with torch.no_grad():
        samples(
            torch.randint(3, 100, (2, tokens)), **{"cache" if renamed else "past_key_values": cache}
        )
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    copied = sum({p.data_ptr(): p.nbytes for p in samples.parameters()}.values()) * half
    config = load_recipe(recipe_path("arithmetic"))
    dtype = "bfloat16" if half else "float32"
    model_config = type(config.model)(path="arithmetic", dtype=dtype)
    data = type(config.data)(max_prompt_tokens=tokens - 6)
    rollout = type(config.rollout)(batch_size=2, max_completion_tokens=6)
    config = type(config)(model=model_config, data=data, rollout=rollout)
    plan = memory_plan(config, shape_of(model.config))
    assert plan.rollout["key-value cache"] == size
    assert plan.rollout["sampling copy"] == copied and (copied > 0) == half


def eager_jsd(students: list[torch.Tensor], teacher: torch.Tensor) -> torch.Tensor:
    """As anyone would write it; the eager figures are for this."""
    lp = teacher.log_softmax(-1)
    p = lp.exp()
    total = teacher.new_zeros(())
    for logits in students:
        lq = logits.log_softmax(-1)
        q = lq.exp()
        m = ((p + q) / 2).log()
        total = total + ((p * (lp - m)).sum() + (q * (lq - m)).sum()) / 2
    return total


@pytest.mark.parametrize("layers, maps", [(1, 5), (2, 9)])
def test_maps_of_an_eager_divergence(layers, maps):
    n, v = 32, 4096
    students = [torch.randn(n, v, requires_grad=True) for _ in range(layers)]
    own = {s.untyped_storage().data_ptr() for s in students}
    teacher = torch.randn(n, v)
    tensors = kept(lambda: eager_jsd(students, teacher))
    found = kept_bytes(t for t in tensors if t.untyped_storage().data_ptr() not in own)
    assert found / (4 * n * v) == pytest.approx(maps, rel=0.02)


# ---- a plan by hand --------------------------------------------------------------------------


def test_qwen3_4b_by_hand():
    plan = memory_plan(load_recipe(recipe_path("qwen3-4b")), SHAPES["Qwen/Qwen3-4B"])
    p = 4_022_468_096
    assert plan.resident == {"parameters": 4 * p, "AdamW": 8 * p}
    assert plan.tokens == 16384 and plan.longest == 9216 and plan.checkpointing
    layer = 16384 * (26 * 2560 + 8 * 9728 + 10 * 40 * 128 + 4 * 32)
    assert plan.other_checkpointing == 36 * layer
    assert plan.update["activations"] == 36 * 16384 * 2560 * 4 + layer
    assert plan.update["gradients"] == 4 * p and plan.update["bf16 copies"] == 2 * p
    hidden, unembedding = 2 * 4 * 2560 * 16384, 4 * 151936 * 2560
    assert plan.update["head"] == (5 << 28) + hidden + unembedding
    assert plan.update["attention maps"] == 16384 * (4 * 40 * 128 + 16 * 32)
    assert plan.update["shares"] == 2 * 4 * 2**25
    # 9.3 GiB for a map of logits, 10.1 GiB for one of attention: what the kernels avoid.
    assert plan.eager["head"] == 7 * 4 * 16384 * 151936
    assert plan.eager["attention maps"] == 6 * 4 * 32 * 9216**2
    assert plan.rollout["key-value cache"] == 24 * 9216 * 36 * 8 * 128 * 4
    assert plan.rollout["sampling copy"] == 2 * p
    assert plan.peak / GIB == pytest.approx(82.9, abs=0.1)  # the rollout's, by its cache


def test_offload_takes_the_moments_off_the_card():
    config = load_recipe(recipe_path("qwen3-4b"))
    shape = SHAPES["Qwen/Qwen3-4B"]
    plain = memory_plan(config, shape)
    config = replace(config, rollout=replace(config.rollout, offload=True))
    plan = memory_plan(config, shape)
    assert plan.host == {"AdamW": 8 * shape.parameters} and not plain.host
    assert plain.peak - plan.peak == 8 * shape.parameters
    assert plan.peak / GIB == pytest.approx(52.9, abs=0.1)
    # What the sampling copy in bf16 and `offload` are for: before them the recipe took 113.3 GiB.
    assert plain.peak <= 0.75 * 113.3 * GIB and plan.peak <= 0.5 * 113.3 * GIB
    # In a step: parameters, gradients, and 12 bytes for each number of the largest parameter.
    step = plan.held + plan.update["gradients"] + 12 * shape.vocabulary * shape.width
    assert step < plan.peak


QWEN3_8B = 8_190_735_360


def test_qwen3_8b_over_four_cards_by_hand():
    plan = memory_plan(load_recipe(recipe_path("qwen3-8b")), SHAPES["Qwen/Qwen3-8B"])
    p = QWEN3_8B
    assert plan.sharded and plan.processes == 4
    assert plan.resident == {"parameters": p, "AdamW": 2 * p}
    assert plan.update["gradients"] == p and "bf16 copies" not in plan.update
    root = 2 * 151936 * 4096 + 4096
    layer = (p - root) // 36
    assert layer == 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288 + 2) + 2 * 128
    # Two layers in bf16, one's gradient in bf16, and in float32 while it is reduced.
    assert plan.update["layers gathered"] == (2 * 2 + 2 + 4) * layer
    assert plan.update["embedding, head gathered"] == (2 + 2 + 4) * root
    assert plan.rollout["sampling copy"] == 2 * p
    assert plan.rollout["key-value cache"] == 24 * 9216 * 36 * 8 * 128 * 4
    assert plan.peak / GIB == pytest.approx(68.6, abs=0.1)  # the rollout's
    assert (plan.held + sum(plan.update.values())) / GIB == pytest.approx(56.8, abs=0.1)


@pytest.mark.parametrize("model", ["qwen3-8b", "octothinker-8b"])
@pytest.mark.parametrize("arm", ["", "-grpo", "-bupo"])
def test_the_recipes_of_8_billion_fit_four_cards_of_80_gb(model, arm):
    config = load_recipe(recipe_path(model + arm))
    shape = SHAPES[config.model.path]
    plan = memory_plan(config, shape)
    assert config.run.sharding == "fsdp2" and plan.processes == 4
    assert 60 * GIB < plan.peak < 72 * GIB
    assert plan.peak < USABLE * CARDS["80 GB (A100, H100)"] * GIB
    assert memory_plan(with_sharding(config, "none"), shape).peak > 140 * GIB


def test_what_is_split_and_what_each_process_holds():
    config, shape = load_recipe(recipe_path("qwen3-8b")), SHAPES["Qwen/Qwen3-8B"]
    plans = [memory_plan(config, shape, processes) for processes in (1, 2, 3, 8)]
    assert [plan.resident["AdamW"] for plan in plans] == [
        8 * QWEN3_8B, 4 * QWEN3_8B, 8 * QWEN3_8B // 3, QWEN3_8B
    ]  # fmt: skip
    one, *_, eight = plans
    split = {"gradients"}
    assert {k: v for k, v in one.update.items() if k not in split} == {
        k: v for k, v in eight.update.items() if k not in split
    }
    assert one.rollout == eight.rollout
    # Whole models: the processes divide the prompts alone.
    whole = with_sharding(config, "none")
    assert memory_plan(whole, shape, 8) == replace(memory_plan(whole, shape), processes=8)
    many = memory_plan(whole, shape, 128)
    assert many.at_once == 8 and many.rollout["sampling"] == 24 * 8 * 151936


def test_offload_of_a_share():
    config, shape = load_recipe(recipe_path("qwen3-8b")), SHAPES["Qwen/Qwen3-8B"]
    plain = memory_plan(config, shape, 2)
    plan = memory_plan(replace(config, rollout=replace(config.rollout, offload=True)), shape, 2)
    assert plan.host == {"AdamW": 4 * QWEN3_8B} and "AdamW" not in plan.resident
    assert plain.peak - plan.peak == 4 * QWEN3_8B


def test_sharded_float32_gathers_float32_and_samples_from_a_whole_model():
    config = load_recipe(recipe_path("qwen3-8b"))
    config = replace(config, model=replace(config.model, dtype="float32"))
    plan = memory_plan(config, SHAPES["Qwen/Qwen3-8B"])
    root = 2 * 151936 * 4096 + 4096
    assert plan.update["embedding, head gathered"] == (4 + 4 + 4) * root
    assert plan.update["layers gathered"] == (2 * 4 + 4 + 4) * ((QWEN3_8B - root) // 36)
    assert plan.rollout["sampling copy"] == 4 * QWEN3_8B


def test_float32_has_no_copy_and_a_cache_in_float32():
    config = load_recipe(recipe_path("qwen3-4b"))
    config = replace(config, model=replace(config.model, dtype="float32"))
    plan = memory_plan(config, SHAPES["Qwen/Qwen3-4B"])
    assert plan.rollout["sampling copy"] == 0
    assert plan.rollout["key-value cache"] == 24 * 9216 * 36 * 8 * 128 * 8


def test_continuous_batching_fills_whole_blocks():
    config = load_recipe(recipe_path("qwen3-4b"))
    config = replace(config, rollout=replace(config.rollout, engine="continuous"))
    plan = memory_plan(config, SHAPES["Qwen/Qwen3-4B"])
    assert plan.rollout["key-value cache"] == 24 * (9216 + 512) * 36 * 8 * 128 * 4


def test_a_plain_grpo_run_needs_no_alignment():
    oisd, grpo = (
        memory_plan(load_recipe(recipe_path(name)), SHAPES["Qwen/Qwen3-4B"])
        for name in ("qwen3-4b", "qwen3-4b-grpo")
    )
    assert grpo.update["attention maps"] == grpo.eager["attention maps"] == 0
    assert grpo.update["shares"] == 0
    assert oisd.update["head"] - grpo.update["head"] == 4 * 2560 * 16384
    assert grpo.eager["head"] == 2 * 4 * 16384 * 151936
    # The bar for a whole step: at most 1.03 times the memory of GRPO's.
    assert sum(oisd.update.values()) <= 1.03 * sum(grpo.update.values())


def test_without_a_kernel_the_maps_are_counted():
    config = load_recipe(recipe_path("qwen3-4b"))
    config = replace(config, oisd=replace(config.oisd, attention_kernel="reference"))
    plan = memory_plan(config, SHAPES["Qwen/Qwen3-4B"])
    assert plan.update["attention maps"] == plan.eager["attention maps"] > 50 * GIB
    assert any("eager maps" in line for line in planning.assumptions(plan))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(recipe, capsys):
    assert main(["plan", str(recipe)]) == 0
    printed = capsys.readouterr().out
    for words in ("parameters", "AdamW", "activations", "key-value cache", "141 GB", "peak"):
        assert words in printed


def test_the_number_of_processes(capsys):
    def printed(*options: str) -> str:
        assert main(["plan", "qwen3-8b", *options]) == 0
        return capsys.readouterr().out

    four = printed()
    assert printed("--processes", "4") == four
    assert 'Memory of one process of 4, GiB, run.sharding = "fsdp2"' in " ".join(four.split())
    assert "│ AdamW                    │ always  │ 15.26 │" in four
    assert "│ AdamW                    │ always  │  7.63 │" in printed("--processes=8")
    assert "of 2" in printed("--processes", "2", "--run.sharding", "none")
    for wrong in (["--processes"], ["--processes", "0"], ["--processes=two"]):
        assert main(["plan", "qwen3-8b", *wrong]) == 2
        assert "--processes must be a number of processes" in capsys.readouterr().err


def test_overrides_reach_the_plan(capsys):
    main(["plan", "qwen3-4b", "--model.gradient-checkpointing", "False"])
    assert "107.51" in capsys.readouterr().out
    assert main(["plan", "qwen3-4b", "--model.path", "nobody/nothing"]) == 2
    assert "nobody/nothing" in capsys.readouterr().err
