"""BuPO's first phase: GRPO on the policy of an inner layer, by hand from the model's outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from oisd.arithmetic import arithmetic_model
from oisd.config import AlignmentConfig, ConfigError, GRPOConfig, TrainConfig, from_tables
from oisd.objective import Objective
from oisd.plan import check_layers, shape_of
from tests.oisd.test_objective import TOLERANCE, batch, gradient_of, policy, totals_of, values  # noqa: F401
from tests.oisd.test_trainer import reward_module, train, without_plots  # noqa: F401

LAYER, TEMPERATURE = 2, 1.3
OFF = AlignmentConfig(think_weight=0.0, attention_weight=0.0)
OFF_TABLE = {"think_weight": 0.0, "attention_weight": 0.0, "attention_share": "none"}


def config_of(layer=LAYER, steps=3, **grpo):
    base = TrainConfig()
    return replace(
        base,
        oisd=OFF,
        grpo=GRPOConfig(internal_layer=layer, internal_steps=steps, dual_clip=None, **grpo),
        rollout=replace(base.rollout, temperature=TEMPERATURE),
        optimizer=replace(base.optimizer, learning_rate=1e-2, max_grad_norm=1e9),
    )


def logprobs_by_hand(policy, batch):  # noqa: F811
    """[B, T] of the next tokens under softmax(W h_l / temperature)."""
    out = policy.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    )
    logits = out.hidden_states[LAYER] @ policy.model.lm_head.weight.T / TEMPERATURE
    labels = batch.labels.clamp(min=0)
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def test_gradient_is_that_of_grpo_on_the_layers_own_policy(policy, batch):  # noqa: F811
    now = logprobs_by_hand(policy, batch)
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(3), dtype=now.dtype)
    old = (now + 0.4 * noise).detach()
    ratio, advantage = (now - old).exp(), batch.advantages[:, None].to(now.dtype)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    total = loss[batch.predicts].sum() / batch.predicts.sum()
    parameters = dict(policy.model.named_parameters())
    wanted = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    reached = [n for n, g in zip(parameters, wanted, strict=True) if g is not None]
    assert any("layers.1" in n for n in reached) and "model.norm.weight" not in reached
    assert not any("layers.2" in n or "layers.3" in n for n in reached)

    moved = replace(batch, old_logprobs=old)
    found, metrics, _ = gradient_of(policy, config_of(), [(moved, totals_of(batch))], step=2)
    flat = torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(parameters.values(), wanted, strict=True)
        ]
    )
    assert flat.norm() > 1e-2
    torch.testing.assert_close(found, flat, rtol=TOLERANCE, atol=TOLERANCE * float(flat.norm()))
    assert values(metrics)["loss/grpo"] == pytest.approx(float(total), rel=1e-6)


def test_after_its_steps_it_is_plain_grpo(policy, batch):  # noqa: F811
    minibatches = [(batch, totals_of(batch))]
    plain = replace(config_of(), grpo=GRPOConfig(dual_clip=None))
    wanted, _, _ = gradient_of(policy, plain, minibatches, step=3)
    found, _, _ = gradient_of(policy, config_of(), minibatches, step=3)
    inside, _, _ = gradient_of(policy, config_of(), minibatches, step=2)
    assert torch.equal(found, wanted)
    assert (inside - wanted).norm() > 0.1 * wanted.norm()


def test_logprobs_of_either_policy(policy, batch):  # noqa: F811
    inner, plain = Objective(policy, config_of()), Objective(policy, TrainConfig(oisd=OFF))
    plain.config = replace(plain.config, rollout=inner.config.rollout)
    own = plain.logprobs(batch)
    assert torch.equal(inner.logprobs(batch), own)
    assert torch.equal(inner.logprobs(batch, step=3), own)
    found = inner.logprobs(batch, step=2)
    wanted = logprobs_by_hand(policy, batch).detach()
    torch.testing.assert_close(found[batch.predicts], wanted[batch.predicts], rtol=1e-6, atol=1e-6)


def test_the_sampler_is_not_the_policy_and_weighs_nothing(policy, batch):  # noqa: F811
    """Under an importance weight min(layer / sampler, cap) a near-uniform layer learns nothing."""
    given = [(batch, totals_of(batch))]
    capped, metrics, _ = gradient_of(policy, config_of(tis_cap=1.1), given, step=0)
    without, _, _ = gradient_of(policy, config_of(tis_cap=None), given, step=0)
    assert torch.equal(capped, without) and "tis/weight" not in metrics
    _, metrics, _ = gradient_of(policy, config_of(tis_cap=1.1), given, step=3)
    assert "tis/weight" in metrics


def test_a_run_trains_the_lower_layers_first(tmp_path, reward_module):  # noqa: F811
    train(
        tmp_path / "run",
        grpo={"internal_layer": 1, "internal_steps": 2, "minibatches": 2},
        oisd=OFF_TABLE | {"student_layers": ()},
        optimizer={"weight_decay": 0.0, "learning_rate": 1e-3},
        run={"steps": 3, "save_every": 1, "keep_checkpoints": 3},
    )
    folders = [tmp_path / f"run/checkpoints/step-{step}" for step in (1, 2, 3)]
    states = [load_file(folder / "model.safetensors") for folder in folders]
    moved = [
        {name for name in a if not torch.equal(a[name], b[name])}
        for a, b in zip(states[:-1], states[1:], strict=True)
    ]
    lower, upper = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    assert lower in moved[0] and upper not in moved[0]  # the second step is the layer's
    assert lower in moved[1] and upper in moved[1]


def test_a_layer_that_is_not_there_is_named_by_its_setting(tmp_path):
    off = OFF_TABLE
    internal = {"internal_layer": 6, "internal_steps": 1}
    with pytest.raises(ConfigError, match="^grpo.internal_layer: .* must lie in 1..5"):
        train(tmp_path / "run", grpo=internal, oisd=off, reward={"function": "exact"})
    config = from_tables({"grpo": internal, "oisd": off | {"student_layers": [2]}})
    shape = shape_of(arithmetic_model().config)
    with pytest.raises(ConfigError, match="^grpo.internal_layer must lie in 1..5"):
        check_layers(config, shape)


@pytest.mark.parametrize(
    "grpo, oisd, message",
    [
        ({"internal_layer": 2}, {}, "grpo.internal_steps must be given together"),
        ({"internal_steps": 2}, {}, "grpo.internal_steps must be given together"),
        ({"internal_layer": 0, "internal_steps": 2}, {}, "grpo.internal_layer must be at least 1"),
        ({"internal_layer": 2, "internal_steps": -1}, {}, "grpo.internal_steps must be at least 0"),
        ({"internal_layer": 2, "internal_steps": 1, "kl_coef": 0.1}, {}, "grpo.kl_coef must be 0"),
        ({"internal_layer": 2, "internal_steps": 1}, {"think_weight": 1.0}, "beside an alignment"),
    ],
)
def test_refused(grpo, oisd, message):
    off = {"think_weight": 0.0, "attention_weight": 0.0}
    with pytest.raises(ConfigError, match=message):
        from_tables({"grpo": grpo, "oisd": off | oisd})
