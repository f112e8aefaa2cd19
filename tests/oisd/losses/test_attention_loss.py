"""Where to look: the attention loss against loops in float64, and the paper's sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oisd.config import AlignmentConfig
from oisd.losses import (
    attention_loss,
    sampled_keys,
    sampled_steps,
    token_weights,
)
from oisd.models import AttentionPair
from tests.oisd.losses.test_losses import (
    DIVERGENCE_IDS,
    DIVERGENCES,
    close,
    divergence64,
    ragged_mask,
    random,
    softmax64,
)

# ---------------------------------------------------------------- where to look


class Attention:
    """Queries and keys of two layers against a third's, grouped heads, two ragged sequences."""

    batch, length, heads, key_heads, width = 2, 6, 4, 2, 3
    scale, scale_teacher = 0.8, 0.5

    def __init__(self, window=None):
        b, t, h, j, k = self.batch, self.length, self.heads, self.key_heads, self.width
        self.q = [random(b, t, h, k, seed=10 + i) for i in range(2)]
        self.k = [random(b, t, j, k, seed=20 + i) for i in range(2)]
        self.q_teacher, self.k_teacher = random(b, t, h, k, seed=30), random(b, t, j, k, seed=31)
        self.window = window
        self.advantages = torch.tensor([1.4, -2.1])
        self.token_weight = token_weights(ragged_mask([4, 2], t, start=1), "sequence-mean")

    def pairs(self, q=None, k=None):
        return [
            AttentionPair(
                a, b, self.q_teacher, self.k_teacher,
                self.scale, self.scale_teacher, None, self.window,
            )
            for a, b in zip(q or self.q, k or self.k, strict=True)
        ]  # fmt: skip

    def weights(self, q, k, scale, b, t, h, keys):
        group = self.heads // self.key_heads
        scores = [
            scale * sum(x * y for x, y in zip(q[b, t, h].tolist(), k[b, j, h // group].tolist(),
                                              strict=True))
            for j in keys
        ]  # fmt: skip
        return softmax64(scores)

    def keys(self, b, t, key_index):
        window = self.window or self.length
        keys = range(max(0, t - window + 1), t + 1)
        if key_index is None:
            return list(keys)
        return [j for j in keys if j in key_index[b, t].tolist()]

    def by_hand(self, config, key_index=None):
        """Eq. 10, one head of one query after the other."""
        total, signs = 0.0, {"js/attention_pos": [], "js/attention_neg": []}
        for q, k in zip(self.q, self.k, strict=True):
            for b, t in self.token_weight.nonzero().tolist():
                c = config.advantage_clip or math.inf
                advantage = max(-c, min(c, self.advantages[b].item()))
                keys, mean = self.keys(b, t, key_index), 0.0
                for h in range(self.heads):
                    p = self.weights(
                        self.q_teacher, self.k_teacher, self.scale_teacher, b, t, h, keys
                    )
                    a = self.weights(q, k, self.scale, b, t, h, keys)
                    mean += divergence64(p, a, config.divergence, config.beta) / self.heads
                total += advantage * self.token_weight[b, t].item() * mean / len(self.q)
                signs[f"js/attention_{'pos' if advantage > 0 else 'neg'}"].append(mean)
        return total, {name: sum(v) / len(v) for name, v in signs.items()}


@pytest.mark.parametrize("keys", ["all-keys", "window", "sampled-keys"])
@pytest.mark.parametrize("divergence, beta", DIVERGENCES, ids=DIVERGENCE_IDS)
def test_attention_loss(divergence, beta, keys):
    case = Attention(window=3 if keys == "window" else None)
    config = AlignmentConfig(divergence=divergence, beta=beta, advantage_clip=1.5)
    index = sampled_keys(2, case.length, 2, 3) if keys == "sampled-keys" else None
    wanted, wanted_metrics = case.by_hand(config, index)
    loss, metrics = attention_loss(
        case.pairs(), case.advantages, config, token_weight=case.token_weight, key_index=index
    )
    close(loss, wanted)
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in wanted_metrics.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-4), name


def test_attention_gradient_is_that_of_the_loop():
    case, config = Attention(), AlignmentConfig()
    q = [x.clone().requires_grad_() for x in case.q]
    k = [x.clone().requires_grad_() for x in case.k]
    case.q_teacher.requires_grad_()
    case.k_teacher.requires_grad_()
    attention_loss(
        case.pairs(q, k), case.advantages, config, token_weight=case.token_weight
    )[0].backward()  # fmt: skip
    assert case.q_teacher.grad is None and case.k_teacher.grad is None

    for found, name in ((q, "q"), (k, "k")):
        original = getattr(case, name)
        wanted, step = torch.zeros(original[1].shape, dtype=torch.float64), 1e-4
        for index in np.ndindex(*original[1].shape):
            values = []
            for sign in (1, -1):
                moved = original[1].double().clone()
                moved[index] += sign * step
                setattr(case, name, [original[0], moved])
                values.append(case.by_hand(config)[0])
            wanted[index] = (values[0] - values[1]) / (2 * step)
        setattr(case, name, original)
        close(found[1].grad, wanted, rtol=1e-4)


def test_attention_packed_equals_dense():
    case, config = Attention(), AlignmentConfig()
    dense, metrics = attention_loss(
        case.pairs(), case.advantages, config, token_weight=case.token_weight
    )
    lengths = [5, 4]
    keep = ragged_mask(lengths, case.length)
    packed = [
        pair._replace(**{x: getattr(pair, x)[keep] for x in ("q", "k", "q_teacher", "k_teacher")})
        for pair in case.pairs()
    ]
    found, packed_metrics = attention_loss(
        packed,
        case.advantages.repeat_interleave(torch.tensor(lengths)),
        config,
        token_weight=case.token_weight[keep],
        cu_seqlens=torch.tensor([0, 5, 9], dtype=torch.int32),
    )
    close(found, dense, rtol=1e-6)
    for name, mean in metrics.items():
        assert packed_metrics[name].item() == pytest.approx(mean.item(), rel=1e-5)


def test_attention_rows_of_weight_zero_may_hold_nan():
    case, config = Attention(), AlignmentConfig()
    case.advantages = torch.tensor([0.0, -2.1])
    clean = attention_loss(
        case.pairs(), case.advantages, config, token_weight=case.token_weight
    )[0]  # fmt: skip
    assert abs(clean) > 1e-3
    for x in (*case.q, *case.k, case.q_teacher, case.k_teacher):
        x[0] = math.nan  # advantage 0
        x[1, 3:] = math.nan  # padding after the last query
    q = [x.clone().requires_grad_() for x in case.q]
    loss, metrics = attention_loss(
        case.pairs(q), case.advantages, config, token_weight=case.token_weight
    )
    loss.backward()
    assert loss == clean
    for x in q:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.norm() > 1e-3
    assert metrics["js/attention_pos"].count == 0
    assert metrics["js/attention_neg"].item() > 0


# ---------------------------------------------------------------- the paper's sampling


@pytest.mark.parametrize("count", [1, 3, 100])
def test_sampled_steps_keeps_the_largest_noise(count):
    mask = ragged_mask([5, 2, 0, 8], 9, start=1)
    noise = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    found = sampled_steps(mask, noise, count)
    for row in range(4):
        there = mask[row].nonzero().flatten().tolist()
        best = sorted(there, key=lambda t: noise[row, t].item())[-count:]
        assert found[row].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
@pytest.mark.parametrize("window, stride", [(1, 1), (3, 4), (4, 1), (2, 5), (32, 32)])
def test_sampled_keys(length, window, stride):
    found = sampled_keys(3, length, window, stride)
    assert found.shape == (3, length, window + math.ceil(length / stride))
    for t in range(length):
        wanted = {j for j in range(t + 1) if j > t - window or j % stride == 0}
        keys = [j for j in found[1, t].tolist() if j >= 0]
        assert sorted(keys) == sorted(wanted)  # and none of them twice
    assert torch.equal(found[0], found[2])
