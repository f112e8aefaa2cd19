"""OISD inside verl: how it is found, told what to do, and what it refuses; see test_verl.py."""

from __future__ import annotations

from tests.oisd.integrations import verl_environment  # noqa: F401

# isort: split

import warnings
from typing import Any

import pytest
import torch
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.base import EngineRegistry

from oisd.config import AlignmentConfig, ConfigError, load_recipe
from oisd.integrations import verl_data
from oisd.integrations.verl import (
    _PARAMETERS,
    TARGET,
    VERSIONS,
    OISDEngine,
    OISDEngineConfig,
    moved,
    responses_of,
)
from tests import ROOT
from tests.oisd.integrations.verl_runs import (
    batch,
    engine,
    engine_config,
    model_config,
    rollouts,
    save_models,
    start_gloo,
)
from tests.tiny_models import LAYERS, tiny_model

RECIPES = ROOT / "recipes"
RECIPE = RECIPES / "qwen3-4b.toml"


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    start_gloo(str(tmp_path_factory.mktemp("gloo") / "store"))
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_dropout_in_the_update_is_named_with_the_setting(tmp_path):
    tiny_model("qwen3", attention_dropout=0.2).save_pretrained(tmp_path / "noisy")
    setting = r"\(attention_dropout 0.2\).*\+\S*model.override_config.attention_dropout=0.0"
    with pytest.warns(UserWarning, match=setting):
        engine(tmp_path / "noisy")
    tiny_model("qwen3").save_pretrained(tmp_path / "quiet")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="OISDEngine")
        engine(tmp_path / "quiet")


def test_verls_registry_has_the_engine_and_only_for_its_vendor(monkeypatch):
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("VERL_ENGINE_DEVICE", device)
        for backend in ("fsdp", "fsdp2"):
            assert EngineRegistry.get_engine_cls("language_model", backend) is OISDEngine
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is not OISDEngine
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is not OISDEngine


def test_verl_finds_the_plugin_by_itself():
    from importlib.metadata import entry_points

    found = [point.value for point in entry_points(group="verl.plugins")]
    assert "oisd.integrations.verl_plugin" in found


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "FSDP 1": (dict(strategy="fsdp"), {}, "strategy must be 'fsdp2', got 'fsdp'"),
    "fused kernels": ({}, dict(use_fused_kernels=True), "use_fused_kernels=False"),
    "sequence parallel": (dict(ulysses_sequence_parallel_size=2), {}, "must be 1, got 2"),
    "offloading": ({}, dict(enable_activation_offload=True), "enable_activation_offload=False"),
    "value model": ({}, dict(model_type="value_model"), "got 'value_model'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_any_work(checkpoints, case):
    engine_options, model_options, message = REFUSED[case]
    config = engine_config(**engine_options)
    with pytest.raises(ValueError, match=message):
        OISDEngine(model_config(checkpoints / "tied", **model_options), config, None, None)


def test_multimodal_models_are_refused(checkpoints):
    model = model_config(checkpoints / "tied")
    model.hf_config.vision_config = {"depth": 1}
    with pytest.raises(ValueError, match="multimodal models are not supported"):
        OISDEngine(model, engine_config(), None, None)


def test_a_layer_that_the_model_has_not_is_refused(checkpoints):
    with pytest.raises(ValueError, match=f"student_layers must lie in 1..{LAYERS - 1}"):
        engine(checkpoints / "tied", engine_config({"student_layers": [LAYERS]}))


def test_a_training_engine_without_options_is_refused(checkpoints):
    plain = FSDPEngineConfig(strategy="fsdp2")
    with pytest.raises(ValueError, match="_target_=oisd.integrations.verl.OISDEngineConfig"):
        OISDEngine(model_config(checkpoints / "tied"), plain, None, None)


def test_the_reference_models_engine_is_verls_own(checkpoints):
    plain = FSDPEngineConfig(strategy="fsdp2", forward_only=True, ulysses_sequence_parallel_size=1)
    made = OISDEngine(model_config(checkpoints / "tied", use_fused_kernels=True), plain, None, None)
    assert made._taps is None and not made._align.active


def test_the_recipe_is_one_that_verl_accepts():
    """Composed with verl's own configuration, checked by verl, and the same as the TOML recipe."""
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.import_utils import load_extern_object

    with initialize_config_dir(str(RECIPES / "verl"), version_base=None):
        config = compose("qwen3-4b")
    validate_config(config, use_reference_policy=False, use_critic=False)
    policy, data, wanted = config.actor_rollout_ref, config.data, load_recipe(RECIPE)
    actor = omega_conf_to_dataclass(policy.actor)
    assert isinstance(actor.engine, OISDEngineConfig) and actor.engine.strategy == "fsdp2"
    assert actor.engine.alignment() == wanted.oisd
    assert (actor.optim.lr, actor.optim.weight_decay, actor.grad_clip) == (
        wanted.optimizer.learning_rate,
        wanted.optimizer.weight_decay,
        wanted.optimizer.max_grad_norm,
    )
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (
        wanted.grpo.clip_low,
        wanted.grpo.clip_high,
        wanted.grpo.dual_clip,
    )
    assert (actor.loss_agg_mode, actor.use_kl_loss) == (wanted.grpo.aggregation, False)
    assert (policy.model.path, policy.rollout.n) == (wanted.model.path, 8)
    assert (policy.rollout.temperature, policy.rollout.top_p) == (1.0, 1.0)
    assert data.train_batch_size == wanted.rollout.prompts_per_step
    assert actor.ppo_mini_batch_size == 32
    assert data.max_prompt_length == wanted.data.max_prompt_tokens
    assert data.max_response_length == wanted.rollout.max_completion_tokens
    assert config.trainer.total_training_steps == wanted.run.steps
    reward = config.reward.custom_reward_function
    assert load_extern_object(reward.path, reward.name) is verl_data.compute_score


def test_options_from_the_command_line():
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    engine = "actor_rollout_ref.actor.fsdp_config"
    lines = ["actor_rollout_ref.actor.strategy=fsdp2", f"{engine}._target_={TARGET}"]
    lines += ["actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.rollout.name=vllm"]
    lines += [f"+{engine}.oisd.student_layers=[6,9]", f"+{engine}.oisd.key_window=null"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", lines)
        wrong = compose("ppo_trainer", [*lines, f"+{engine}.oisd.layers=[6]"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.engine.alignment() == AlignmentConfig(student_layers=(6, 9))
    with pytest.raises(Exception, match="unknown key oisd.layers; did you mean 'student_layers'"):
        omega_conf_to_dataclass(wrong.actor_rollout_ref.actor)


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match="unknown key oisd.think_wieght; did you mean 'think_we"):
        engine_config({"think_wieght": 1.0})
    with pytest.raises(ConfigError, match="oisd.beta must be in"):
        engine_config({"beta": 1.0})
    with pytest.raises(ConfigError, match="oisd.divergence must be one of"):
        engine_config({"divergence": "kl"})


def test_options_of_the_trainer_alone_are_refused():
    for name, value in {"think_share": 0.1, "advantage": "shuffled", "share_every": 5}.items():
        with pytest.raises(ConfigError, match=f"oisd.{name} must be left out, as `oisd train` al"):
            engine_config({name: value})


def test_defaults_are_those_of_the_library():
    assert engine_config({}).alignment() == AlignmentConfig()
    assert engine_config({"advantage_clip": None}).alignment() == AlignmentConfig()


def test_options_without_the_engine_are_refused(monkeypatch):
    monkeypatch.delenv("VERL_ENGINE_VENDOR")
    with pytest.raises(ValueError, match="VERL_ENGINE_VENDOR must be 'oisd', got None"):
        engine_config()


@pytest.mark.parametrize("key", ["advantages", "response_mask"])
def test_batches_without_what_the_losses_need_are_refused(key):
    data = batch(remove_padding=True).exclude(key)
    with pytest.raises(ValueError, match=f"must have {key}"):
        responses_of(data)


@pytest.mark.parametrize("key", ["use_fused_kernels", "distillation_use_topk"])
def test_batches_that_ask_for_more_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} must be False"):
        responses_of(batch(remove_padding=True, **{key: True}))


def test_weights_are_verls_and_positions_predict():
    data = batch(remove_padding=True, dp_size=2, batch_num_tokens=18, global_batch_size=4)
    found = responses_of(data)
    counts = found.mask.sum(1, keepdim=True)
    torch.testing.assert_close(found.token_weights(found.mask), found.mask * 2 / 4 / counts)
    ids = data["input_ids"].values()
    following = ids[(found.position + 1)[found.mask]]
    assert torch.equal(following, rollouts()["responses"][found.mask])


def test_what_it_relies_on_is_there(monkeypatch):
    assert moved() == []
    for function in [*_PARAMETERS]:
        monkeypatch.setitem(_PARAMETERS, function, ["other"])
        name = function.__qualname__
        assert any(f"{name} must take ['other'], got ['" in line for line in moved())
    for version in (None, "0.9.0", "0.10.0"):
        with pytest.raises(ImportError, match="pip install 'verl>=0.9.1,<0.10'"):
            VERSIONS.check(version)
