"""The losses against loops over tokens in float64, written from the papers' equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oisd.config import GRPOConfig
from oisd.losses import (
    Mean,
    add_metrics,
    frac_zero_std,
    group_advantages,
    grpo_loss,
    token_weights,
)
from oisd.losses.advantages import batch_advantages, rloo_advantages

AGGREGATIONS = ["token-mean", "sequence-mean", "dr-grpo"]
DIVERGENCES = [("jsd", 0.5), ("jsd", 0.3), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
DIVERGENCE_IDS = ["jsd", "jsd-beta-0.3", "forward-kl", "reverse-kl"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ragged_mask(lengths, width, start=0):
    position = torch.arange(width)
    return (position >= start) & (position < start + torch.tensor(lengths)[:, None])


def softmax64(scores):
    """Probabilities of a list of scores, in float64."""
    exponentials = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(exponentials) for e in exponentials]


def divergence64(teacher, student, kind, beta=0.5):
    """Divergence of two lists of probabilities; those that underflowed add nothing."""
    total = 0.0
    for p, q in zip(teacher, student, strict=True):
        m = beta * p + (1 - beta) * q
        if kind == "jsd":
            total += beta * p * math.log(p / m) if p else 0.0
            total += (1 - beta) * q * math.log(q / m) if q else 0.0
        elif kind == "forward_kl":
            total += p * math.log(p / q) if p else 0.0
        else:
            total += q * math.log(q / p) if q else 0.0
    return total


def close(found, wanted, rtol=1e-5):
    """Relative error of the whole; the truth must be far from nothing."""
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    assert wanted.norm() > 1e-3, "the truth is too small to test against"
    assert (found - wanted).norm() / wanted.norm() < rtol


# ---------------------------------------------------------------- means and metrics


def test_mean_leaves_out_what_is_not_asked_for():
    mean = Mean.over(torch.tensor([1.0, math.nan, 4.0]), torch.tensor([True, False, True]))
    assert mean.item() == 2.5
    assert math.isnan(Mean.over(torch.ones(2), torch.zeros(2, dtype=torch.bool)).item())


def test_means_add_up_by_count_and_not_by_average():
    everywhere = torch.ones(3, dtype=torch.bool)
    a = {"x": Mean.over(torch.tensor([1.0, 2.0, 3.0]), everywhere)}
    b = {"x": Mean.over(torch.tensor([10.0]), everywhere[:1]), "y": Mean.over(*[everywhere] * 2)}
    merged = add_metrics(a, b)
    assert merged["x"].item() == 4.0
    assert merged["y"].item() == 1.0
    assert a["x"].item() == 2.0  # the parts are left as they were


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize("scale", [True, False], ids=["std", "dr-grpo"])
def test_advantages_of_mixed_groups(scale):
    groups = [[1.0, 0.0, 0.0, 1.0], [0.25, 0.5, -1.0, 3.0], [0.0, 0.0, 0.0, 1.0]]
    wanted = []
    for group in groups:
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        wanted += [(r - mean) / (std + 1e-6 if scale else 1.0) for r in group]
    found = group_advantages(torch.tensor(groups).flatten(), 4, scale_by_std=scale)
    assert found.dtype == torch.float32
    close(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False], ids=["std", "dr-grpo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.7, 1e-30, 3e30])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 16])
def test_equal_rewards_have_advantage_exactly_zero(reward, size, scale):
    rewards = torch.full((2 * size,), reward)
    rewards[-1] = reward + 1.0  # of the second group, which must not care
    found = group_advantages(rewards, size, scale_by_std=scale)
    assert (found[:size] == 0).all()
    if abs(reward) < 1e30:
        assert (found[size:] != 0).all()


def test_the_largest_advantage_of_eight_binary_rewards():
    found = group_advantages(torch.tensor([1.0] + [0.0] * 7), 8)
    assert found[0].item() == pytest.approx(7 / 8 / math.sqrt(1 / 8), rel=1e-5)
    assert found.sum().abs() < 1e-6


@pytest.mark.parametrize("shape, size", [((7,), 2), ((8,), 1), ((8,), 0), ((2, 4), 4)])
def test_advantages_refuse_what_is_no_group(shape, size):
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        group_advantages(torch.zeros(shape), size)


def test_rloo_is_the_reward_less_the_others_mean():
    groups = [[1.0, 0.0, 0.0, 1.0], [0.25, 0.5, -1.0, 3.0], [0.3, 0.3, 0.3, 0.3]]
    wanted = [r - (sum(group) - r) / 3 for group in groups[:2] for r in group] + [0.0] * 4
    found = rloo_advantages(torch.tensor(groups).flatten(), 4)
    close(found, wanted, rtol=1e-6)
    assert (found[8:] == 0).all() and found.dtype == torch.float32


def test_batch_advantages_are_whitened_over_the_tokens_of_all():
    rewards, lengths = [1.0, 0.0, 0.25, 1.0, -1.0], [3, 1, 7, 2, 5]
    tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
    wanted = [(r - np.mean(tokens)) / math.sqrt(np.var(tokens, ddof=1) + 1e-8) for r in rewards]
    whole = torch.tensor(rewards), torch.tensor(lengths)
    close(batch_advantages(*whole), wanted, rtol=1e-6)
    parts = [batch_advantages(*(x[part] for x in whole), whole) for part in (slice(2), slice(2, 5))]
    assert torch.equal(torch.cat(parts), batch_advantages(*whole))


@pytest.mark.parametrize("reward, length", [(0.0, 3), (0.1, 7), (1.0, 0)])
def test_batch_advantages_of_equal_rewards_or_no_tokens_are_zero(reward, length):
    rewards, lengths = torch.full((6,), reward), torch.full((6,), length)
    assert (batch_advantages(rewards, lengths) == 0).all()


def test_frac_zero_std():
    rewards = torch.tensor([0.1] * 3 + [0.0, 0.0, 1.0] + [1.0] * 3 + [0.0] * 3)
    assert frac_zero_std(rewards, 3).item() == 0.75


# ---------------------------------------------------------------- token weights


@pytest.mark.parametrize("whole", [False, True], ids=["of-itself", "of-a-larger-batch"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_weights(aggregation, whole):
    lengths, width = [3, 1, 0, 5], 6
    mask = ragged_mask(lengths, width, start=1)
    totals = {"num_sequences": 10, "num_tokens": 77} if whole else {}
    sequences, tokens = (10, 77) if whole else (4, sum(lengths))
    found = token_weights(mask, aggregation, max_tokens=32, **totals)
    for row, length in enumerate(lengths):
        weight = {
            "token-mean": 1 / tokens,
            "sequence-mean": 1 / (sequences * max(length, 1)),
            "dr-grpo": 1 / (sequences * 32),
        }[aggregation]
        for t in range(width):
            wanted = weight if 1 <= t < 1 + length else 0.0
            assert found[row, t].item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_weights_of_nothing_are_finite(aggregation):
    found = token_weights(torch.zeros(2, 3, dtype=torch.bool), aggregation, max_tokens=4)
    assert (found == 0).all()


def test_token_weights_refuse():
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="max_tokens is required"):
        token_weights(mask, "dr-grpo")
    with pytest.raises(ValueError, match="got 'mean'"):
        token_weights(mask, "mean")


# ---------------------------------------------------------------- GRPO


class Tokens:
    """Log-probs of a ragged batch whose ratios reach every branch of the clipping."""

    def __init__(self):
        self.mask = ragged_mask([9, 4, 7, 1, 8, 6], 12, start=2)
        shape = self.mask.shape
        self.logprobs = -1.0 - random(*shape, seed=1).abs()
        self.old = self.logprobs + 0.7 * random(*shape, seed=2)
        self.rollout = self.old + 0.5 * random(*shape, seed=3)
        self.ref = self.logprobs + 0.5 * random(*shape, seed=4)
        self.advantages = torch.tensor([1.3, -0.8, -1.9, 0.4, 0.9, -0.3])


VARIANTS = {
    "plain": dict(tis_cap=None, dual_clip=None),
    "clip-higher": dict(tis_cap=None, dual_clip=None, clip_low=0.1, clip_high=0.4),
    "dual-clip": dict(tis_cap=None, dual_clip=1.5),
    "dual-clip-below-clip-high": dict(tis_cap=None, dual_clip=1.1),
    "kl": dict(tis_cap=None, kl_coef=0.3, dual_clip=None),
    "tis-auto": dict(dual_clip=1.5),
    "tis": dict(tis_cap=1.2, dual_clip=1.5),
    "everything": dict(tis_cap=1.2, dual_clip=1.5, kl_coef=0.3, clip_high=0.28),
}


def grpo_by_hand(tokens, weights, config, on_policy=False):
    """Loss, its gradient to each log-prob, and the metrics, one token after the other."""
    total = 0.0
    gradient = np.zeros(tuple(tokens.mask.shape))
    low = high = dual = kl_old = kl_ref = tis = truncated = 0.0
    sampler, apart = [], 0.0
    cap = 2.0 if config.tis_cap == "auto" and not on_policy else config.tis_cap
    for b, t in tokens.mask.nonzero().tolist():
        a = tokens.advantages[b].item()
        new = tokens.logprobs[b, t].item()
        old = new if on_policy else tokens.old[b, t].item()
        ratio = math.exp(new - old)
        if a >= 0:
            bounded = ratio > 1 + config.clip_high
            value = -a * min(ratio, 1 + config.clip_high)
            high += bounded
        else:
            bounded = ratio < 1 - config.clip_low
            value = -a * max(ratio, 1 - config.clip_low)
            low += bounded
            if config.dual_clip is not None and ratio > config.dual_clip:
                value, bounded = -a * config.dual_clip, True
                dual += 1
        slope = 0.0 if bounded else -a * ratio
        if cap is not None and cap != "auto":
            whole = math.exp(old - tokens.rollout[b, t].item())
            importance = min(whole, cap)
            value, slope, tis = value * importance, slope * importance, tis + importance
            truncated += whole > cap
        if config.kl_coef:
            gap = tokens.ref[b, t].item() - new
            value += config.kl_coef * (math.exp(gap) - 1 - gap)
            slope += config.kl_coef * (1 - math.exp(gap))
            kl_ref += math.exp(gap) - 1 - gap
        kl_old += ratio - 1 - (new - old)
        gap = old - tokens.rollout[b, t].item()
        sampler.append(math.exp(gap) - 1 - gap)
        apart += abs(gap)
        total += weights[b, t].item() * value
        gradient[b, t] = weights[b, t].item() * slope
    count = int(tokens.mask.sum())
    metrics = {"clip_frac/low": low, "clip_frac/high": high, "kl/old": kl_old}
    if config.dual_clip is not None:
        metrics["clip_frac/dual"] = dual
    if cap is not None and cap != "auto":
        metrics |= {"tis/weight": tis, "tis/truncated": truncated}
    if config.kl_coef:
        metrics["kl/ref"] = kl_ref
    means = {k: v / count for k, v in metrics.items()}
    means |= {"kl/sampler": sum(sampler) / count, "kl/sampler_max": max(sampler)}
    means["sampler_gap"] = apart / count
    return total, torch.from_numpy(gradient), means


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo_loss(variant, aggregation):
    tokens, config = Tokens(), GRPOConfig(aggregation=aggregation, **VARIANTS[variant])
    weights = token_weights(tokens.mask, aggregation, max_tokens=16)
    wanted, gradient, wanted_metrics = grpo_by_hand(tokens, weights, config)
    for name, share in wanted_metrics.items():
        assert share > 0, f"no token reaches {name}"
    logprobs = tokens.logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(
        logprobs,
        tokens.advantages,
        tokens.mask,
        config,
        old_logprobs=tokens.old,
        rollout_logprobs=tokens.rollout,
        ref_logprobs=tokens.ref,
        max_tokens=16,
    )
    loss.backward()
    close(loss.detach(), wanted)
    close(logprobs.grad, gradient)
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in wanted_metrics.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5), name


def test_grpo_on_policy_is_the_policy_gradient():
    tokens, config = Tokens(), GRPOConfig()
    logprobs = tokens.logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(logprobs, tokens.advantages, tokens.mask, config)
    loss.backward()
    wanted = torch.where(tokens.mask, -tokens.advantages[:, None] / tokens.mask.sum(), 0.0)
    close(logprobs.grad, wanted, rtol=1e-6)
    weights = token_weights(tokens.mask)
    close(loss.detach(), grpo_by_hand(tokens, weights, config, on_policy=True)[0])
    assert metrics["clip_frac/low"].item() == metrics["clip_frac/high"].item() == 0
    assert metrics["kl/old"].item() == 0


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_grpo_at_ratio_one_has_the_whole_gradient(clip):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    config = GRPOConfig(clip_low=clip, clip_high=clip)
    grpo_loss(
        logprobs, torch.tensor([-2.0]), mask, config, old_logprobs=logprobs.detach()
    )[0].backward()  # fmt: skip
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_grpo_does_not_see_what_padding_holds(poison):
    def run(fill):
        tokens, config = Tokens(), GRPOConfig(**VARIANTS["everything"])
        hidden = {}
        for name in ("logprobs", "old", "rollout", "ref"):
            hidden[name] = getattr(tokens, name).masked_fill(~tokens.mask, fill)
        logprobs = hidden["logprobs"].requires_grad_()
        loss, metrics = grpo_loss(
            logprobs,
            tokens.advantages,
            tokens.mask,
            config,
            old_logprobs=hidden["old"],
            rollout_logprobs=hidden["rollout"],
            ref_logprobs=hidden["ref"],
        )
        loss.backward()
        return loss.item(), logprobs.grad, {k: m.item() for k, m in metrics.items()}

    loss, gradient, metrics = run(poison)
    clean_loss, clean_gradient, clean_metrics = run(0.0)
    assert clean_gradient.norm() > 1e-2
    assert loss == clean_loss
    assert torch.equal(gradient, clean_gradient)
    assert metrics == clean_metrics


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0], ids=["pull", "push", "zero"])
def test_grpo_bounds_a_ratio_that_overflows(advantage):
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    mask, old = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-95.0, -1.0]])
    loss, metrics = grpo_loss(
        logprobs, torch.tensor([advantage]), mask, GRPOConfig(), old_logprobs=old
    )
    loss.backward()
    bounded = {1.0: -1.2, -1.0: 10.0, 0.0: 0.0}[advantage]
    assert loss.item() == pytest.approx((bounded - advantage) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, -advantage / 2]]
    assert math.isfinite(metrics["kl/old"].item())


def test_grpo_micro_batches_add_up():
    tokens, config = Tokens(), GRPOConfig(aggregation="sequence-mean")
    total = int(tokens.mask.sum())

    def part(rows):
        weights = token_weights(
            tokens.mask[rows], config.aggregation, num_sequences=6, num_tokens=total
        )
        return grpo_loss(
            tokens.logprobs[rows],
            tokens.advantages[rows],
            tokens.mask[rows],
            config,
            old_logprobs=tokens.old[rows],
            token_weight=weights,
        )

    whole, metrics = part(slice(0, 6))
    (a, more), (b, most) = part(slice(0, 1)), part(slice(1, 6))
    close(a + b, whole, rtol=1e-6)
    for name, mean in add_metrics(more, most).items():
        assert mean.item() == pytest.approx(metrics[name].item(), rel=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(old_logprobs=torch.zeros(2, 4)), "old_logprobs must have the shape"),
        (dict(rollout_logprobs=torch.zeros(3)), "rollout_logprobs must have the shape"),
        (dict(ref_logprobs=torch.zeros(3, 2)), "ref_logprobs must have the shape"),
        (dict(token_weight=torch.zeros(2, 1)), "token_weight must have the shape"),
        (dict(mask=torch.ones(2, 2, dtype=torch.bool)), "mask must have the shape"),
        (dict(advantages=torch.zeros(3)), r"advantages must be \[B\] = \[2\]"),
        (dict(advantages=torch.zeros(2, 3)), r"advantages must be \[B\] = \[2\]"),
        (dict(config=GRPOConfig(kl_coef=0.1)), "ref_logprobs is required"),
        (dict(config=GRPOConfig(tis_cap=2.0)), "rollout_logprobs is required"),
        (dict(config=GRPOConfig(aggregation="dr-grpo")), "max_tokens is required"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "-")[:30],
)
def test_grpo_refuses(change, message):
    arguments = {
        "logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**arguments, **change})


def test_grpo_loss_takes_no_exponential_in_half_precision():
    logprobs = torch.tensor([[-1.0, -2.5]])
    old, rollout = torch.tensor([[-1.0, -2.5]]).bfloat16(), torch.tensor([[-1.75, -2.0]]).bfloat16()
    loss, _ = grpo_loss(
        logprobs, torch.ones(1), torch.ones(1, 2, dtype=torch.bool), GRPOConfig(tis_cap=9.0),
        old_logprobs=old, rollout_logprobs=rollout,
    )  # fmt: skip
    wanted = -(math.exp(0.75) + math.exp(-0.5)) / 2
    torch.testing.assert_close(loss.item(), wanted, rtol=1e-6, atol=0)
