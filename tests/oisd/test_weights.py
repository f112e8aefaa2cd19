"""Weights of the losses: schedules, and shares of GRPO's gradient that they keep."""

import math

import pytest

from oisd.config import AlignmentConfig, RunConfig, TrainConfig
from oisd.weights import Weights, schedule_factor


def weights(steps: int = 100, **oisd) -> Weights:
    return Weights(TrainConfig(oisd=AlignmentConfig(**oisd), run=RunConfig(steps=steps)))


def test_values_of_the_schedules():
    for schedule, wanted in (
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0.05]),
        ("cosine", [1, 0.8535533906, 0.5, 0.1464466094, 0.0061558297]),
    ):
        found = [schedule_factor(schedule, step, 20) for step in (0, 5, 10, 15, 19)]
        assert found == pytest.approx(wanted, abs=1e-9)


def test_constant_weights_are_the_settings():
    found = weights(think_weight=0.5, attention_weight=0.2)
    assert found.names == ["grpo", "think", "attention"]
    assert found.at(0) == found.at(99) == {"grpo": 1.0, "think": 0.5, "attention": 0.2}
    assert found.metrics(3) == {}
    off = weights(think_weight=0.0, attention_weight=0.2)
    assert off.at(7) == {"grpo": 1.0, "attention": 0.2}


def test_a_weight_is_annealed_with_its_own_schedule():
    found = weights(think_weight=2.0, think_schedule="cosine", attention_schedule="linear")
    assert found.at(25) == pytest.approx(
        {"grpo": 1.0, "think": 1 + math.sqrt(0.5), "attention": 0.075}
    )
    assert found.metrics(25) == {
        "weight/think": found.at(25)["think"], "weight/attention": found.at(25)["attention"]
    }  # fmt: skip


def test_when_shares_are_measured():
    def measured(**oisd):
        return [step for step in range(10) if weights(**oisd).are_measured(step)]

    assert measured(share_every=4) == [0, 4, 8]
    assert measured(share_every=0) == []
    assert measured(share_every=4, think_weight=0.0, attention_weight=0.0) == []
    following = weights(share_every=4, think_share=0.1)
    assert following.are_measured(1)  # as long as there is nothing to follow
    following.observe({"grpo": 1.0, "think": 0.1, "attention": 0.1}, 1)
    assert not following.are_measured(2) and following.are_measured(4)


def test_a_share_is_that_of_the_weighted_gradient():
    found = weights(think_weight=0.5, attention_weight=0.2, attention_schedule="linear")
    norms = {"grpo": 4.0, "think": 0.8, "attention": 6.0}
    assert found.observe(norms, 50) == pytest.approx({"share/think": 0.1, "share/attention": 0.15})


def test_no_share_without_a_gradient_of_grpo():
    found = weights(think_share=0.1)
    assert found.observe({"grpo": 0.0, "think": 0.8, "attention": 0.0}, 0) == {}
    assert found.at(1)["think"] == 1.0 and found.are_measured(1)
    assert found.observe({"grpo": 1.0, "think": 0.0, "attention": 0.0}, 1)["share/think"] == 0.0
    assert found.at(2)["think"] == 1.0  # no weight makes a share of nothing


def test_a_weight_follows_its_share_as_documented():
    """The mean log ratio of five measurements, then a moving average at the rate 1/5."""
    found = weights(think_weight=3.0, think_share=0.5, think_schedule="linear")
    ratios = [0.02, 0.04, 0.01, 0.08, 0.02, 0.3, 0.1]
    assert found.at(0)["think"] == 3.0
    mean = 0.0
    for step, ratio in enumerate(ratios):
        shares = found.observe({"grpo": 2.0, "think": 2.0 * ratio, "attention": 1.0}, step)
        before = 3.0 if step == 0 else 0.5 * (1 - step / 100) / math.exp(mean)
        assert shares["share/think"] == pytest.approx(before * ratio)
        if step < 5:
            mean = sum(map(math.log, ratios[: step + 1])) / (step + 1)
        else:
            mean += 0.2 * (math.log(ratio) - mean)
        wanted = 0.5 * (1 - (step + 1) / 100) / math.exp(mean)
        assert found.at(step + 1)["think"] == pytest.approx(wanted, rel=1e-12)
        assert found.at(step + 1)["attention"] == 0.1
    assert found.metrics(9) == {"weight/think": found.at(9)["think"]}


def test_a_checkpoint_holds_what_was_measured():
    found, again = weights(think_share=0.1), weights(think_share=0.1)
    for ratio in (0.02, 0.03, 0.07):
        found.observe({"grpo": 1.0, "think": ratio, "attention": 0.1}, 0)
    again.load_state_dict(found.state_dict())
    for each in (found, again):
        each.observe({"grpo": 1.0, "think": 0.011, "attention": 0.1}, 0)
    assert found.at(5) == again.at(5) and found.at(5)["think"] != 1.0
