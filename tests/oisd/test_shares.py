"""Shares of the update from a model's gradients: by hand, and without a trace in the training."""

import math
from dataclasses import replace

import pytest
import torch

from oisd.losses.advantages import clip_advantages, shuffled_advantages
from oisd.objective import Objective
from oisd.term_gradients import TermGradients
from oisd.trainer import learn
from tests.oisd import test_objective
from tests.oisd.test_objective import (
    Unmoved,
    assert_same,
    by_hand,
    config_of,
    gradient_of,
    totals_of,
    values,
)

policy, batch = test_objective.policy, test_objective.batch


def norms_by_hand(policy, batch, config):
    parameters = list(policy.model.parameters())
    found = {}
    for name, loss in by_hand(policy.model, batch, config).items():
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        found[name] = math.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None))
    return found


@pytest.mark.parametrize("grad_norm_every", [0, 1], ids=["by-difference", "by-itself"])
def test_shares_are_those_computed_by_hand(policy, batch, grad_norm_every):
    run = {"grad_norm_every": grad_norm_every}
    config = config_of(tokens=40, run=run, think_weight=2.0, share_every=3)
    norms = norms_by_hand(policy, batch, config)
    assert min(norms.values()) > 1e-2
    _, _, found = gradient_of(policy, config, [(batch, totals_of(batch))], step=3)
    assert found["share/think"] == pytest.approx(2 * norms["think"] / norms["grpo"], rel=1e-5)
    wanted = 0.7 * norms["attention"] / norms["grpo"]
    assert found["share/attention"] == pytest.approx(wanted, rel=1e-5)
    _, _, found = gradient_of(policy, config, [(batch, totals_of(batch))], step=4)
    assert not any(name.startswith("share/") for name in found)


@pytest.mark.parametrize("kernel", ["separate", "fused"])
def test_measuring_leaves_the_gradient_the_same_to_the_bit(policy, batch, kernel):
    minibatches = [(batch, totals_of(batch))] * 2

    def gradient(every):
        config = config_of(tokens=40, attention_kernel=kernel, share_every=every)
        return gradient_of(policy, config, minibatches)

    (without, metrics, norms), (found, more, shares) = gradient(0), gradient(1)
    assert without.norm() > 1e-2 and torch.equal(found, without)
    assert values(more) == values(metrics)
    assert shares.keys() - norms.keys() == {"share/think", "share/attention"}
    assert min(shares["share/think"], shares["share/attention"]) > 1e-3


def test_no_share_and_no_nan_where_grpo_has_no_gradient(policy, batch):
    """The first minibatch has no advantage, then none has; then the alignment alone has one."""
    nothing = replace(batch, advantages=torch.zeros_like(batch.advantages))
    config, totals = config_of(tokens=40, share_every=1), totals_of(batch)
    _, _, found = gradient_of(policy, config, [(nothing, totals), (batch, totals)])
    _, _, alone = gradient_of(policy, config, [(batch, totals)])
    assert found["share/think"] == pytest.approx(alone["share/think"], rel=1e-9)
    aligned = replace(nothing, shuffled=batch.advantages)
    for without in (nothing, aligned, batch.select(torch.tensor([], dtype=torch.int64))):
        _, _, found = gradient_of(policy, config, [(without, totals)])
        assert found.keys() == {"grad_norm"}, "a difference of roundings is no share"
    assert not math.isnan(found["grad_norm"])


def test_a_share_that_is_set_is_the_share_from_the_next_step_on(policy, batch):
    config = config_of(tokens=40, think_share=0.25, attention_share=2.0, share_every=1)
    objective, optimizer = Objective(policy, config), Unmoved(policy, config)
    first, second = (
        learn(objective, optimizer, [(batch, totals_of(batch))] * 2, step)[1] for step in (0, 1)
    )
    assert (first["weight/think"], first["weight/attention"]) == (1.0, 0.7)
    assert first["share/think"] != pytest.approx(0.25, rel=0.1)
    assert second["share/think"] == pytest.approx(0.25, rel=1e-6)
    assert second["share/attention"] == pytest.approx(2.0, rel=1e-6)
    ratio = second["weight/think"] / first["weight/think"]
    assert ratio == pytest.approx(0.25 / first["share/think"], rel=1e-6)
    # Both minibatches of a step have the same weights.
    a, b, c, d = optimizer.gradients
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


@pytest.mark.parametrize("advantage", ["absolute", "shuffled"])
def test_controls_change_what_weighs_the_alignment_and_nothing_else(policy, batch, advantage):
    """Rows 3 and 6 have advantage 0; shuffled, others have."""
    config = config_of(tokens=40, advantage=advantage)
    given, weighed = batch, batch.advantages.abs()
    if advantage == "shuffled":
        weighed = batch.advantages.roll(1)
        assert weighed[3] != 0 and weighed[6] != 0 and weighed[4] == 0
        given = replace(batch, shuffled=weighed)
    policy.model.zero_grad()
    wanted = by_hand(policy.model, replace(batch, advantages=weighed), config)
    wanted["grpo"] = by_hand(policy.model, batch, config)["grpo"]
    (wanted["grpo"] + wanted["think"] + 0.7 * wanted["attention"]).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    found, metrics, _ = gradient_of(policy, config, [(given, totals_of(batch))])
    for name, loss in wanted.items():
        assert abs(loss.item()) > 1e-3
        assert metrics[f"loss/{name}"].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert_same(found, gradient)
    signed, _, _ = gradient_of(policy, config_of(tokens=40), [(batch, totals_of(batch))])
    assert (found - signed).norm() > 1e-2 * signed.norm()


def test_an_absolute_advantage_is_clipped_too():
    given = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    align = config_of(advantage="absolute").oisd
    assert clip_advantages(given, align).tolist() == [1.5, 0.5, 0.0, 0.5, 1.5]


def test_a_shuffle_is_one_permutation_of_the_step_for_any_split():
    advantages = torch.arange(12.0)
    whole = shuffled_advantages(torch.arange(12), [(torch.arange(12), advantages)], 5, 3)
    assert sorted(whole.tolist()) == advantages.tolist() and whole.tolist() != advantages.tolist()
    parts = [torch.tensor([0, 1, 4, 5, 8, 9]), torch.tensor([2, 3, 6, 7, 10, 11]), torch.arange(0)]
    shares = [(rows, advantages[rows]) for rows in parts]
    for rows in parts:
        assert torch.equal(shuffled_advantages(rows, shares, 5, 3), whole[rows])
    others = [shuffled_advantages(torch.arange(12), shares, *at) for at in ((5, 4), (6, 3))]
    assert not any(torch.equal(whole, other) for other in others)


def test_of_a_large_model_a_part_of_each_gradient_is_kept(policy, batch, monkeypatch):
    config = config_of(tokens=40, share_every=1)
    minibatches = [(batch, totals_of(batch))]
    exact, _, whole = gradient_of(policy, config, minibatches)
    numbers = sum(p.numel() for p in policy.model.parameters())
    monkeypatch.setattr("oisd.term_gradients.MOST_NUMBERS", numbers // 6)
    found, _, part = gradient_of(policy, config, minibatches)
    assert torch.equal(found, exact)
    for name in ("share/think", "share/attention"):
        assert part[name] != whole[name]
        assert part[name] == pytest.approx(whole[name], rel=0.2)
    kept = TermGradients(Unmoved(policy, config), ["think"])
    policy.model.zero_grad()
    total = sum((p.sum() for p in policy.model.parameters()), torch.zeros(()))
    kept.add({"think": total, "grpo": total}, policy.model)
    sizes = [part.numel() for part in kept._kept["think"] if part is not None]
    assert numbers / 7 <= sum(sizes) < numbers / 6
    assert all(p.grad is None for p in policy.model.parameters())
