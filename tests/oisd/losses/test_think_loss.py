"""`think_loss` against a loop over its rows in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oisd.config import AlignmentConfig
from oisd.losses import think_loss
from tests.oisd.losses.test_losses import (
    DIVERGENCE_IDS,
    DIVERGENCES,
    close,
    divergence64,
    random,
    softmax64,
)


class Lens:
    """Hidden states of two layers over seven tokens: two of advantage 0, one of weight 0."""

    layers, rows, width, vocabulary = 2, 7, 5, 11

    def __init__(self, layers=2):
        self.student = random(self.layers, self.rows, self.width, seed=5)[:layers]
        self.teacher = random(self.rows, self.width, seed=6)
        self.weight = random(self.vocabulary, self.width, seed=7)
        self.bias = random(self.vocabulary, seed=8)
        self.advantages = torch.tensor([1.5, -0.7, 0.0, 2.4, -2.0, 0.0, 0.9])
        self.token_weight = torch.tensor([0.2, 0.2, 0.3, 0.1, 0.15, 0.05, 0.0])

    def probabilities(self, hidden, temperature, bias):
        logits = []
        for v in range(self.vocabulary):
            z = sum(
                float(h) * float(w)
                for h, w in zip(hidden.tolist(), self.weight[v].tolist(), strict=True)
            )
            logits.append((z + (float(self.bias[v]) if bias else 0.0)) / temperature)
        return softmax64(logits)

    def by_hand(self, config, bias=False):
        """Eq. 7 with its clip, and the means of the metrics."""
        total, values = 0.0, {"js/think_pos": [], "js/think_neg": [], "agreement/top1": []}
        values |= {"entropy/student": [], "entropy/teacher": []}
        for s in range(len(self.student)):
            for n in range(self.rows):
                c = config.advantage_clip or math.inf
                weight = max(-c, min(c, self.advantages[n].item())) * self.token_weight[n].item()
                if weight == 0:
                    continue
                p = self.probabilities(self.teacher[n], config.lens_temperature, bias)
                q = self.probabilities(self.student[s, n], config.lens_temperature, bias)
                divergence = divergence64(p, q, config.divergence, config.beta)
                total += weight * divergence / len(self.student)
                values[f"js/think_{'pos' if weight > 0 else 'neg'}"].append(divergence)
                values["agreement/top1"].append(float(np.argmax(p) == np.argmax(q)))
                values["entropy/student"].append(-sum(x * math.log(x) for x in q))
                if s == 0:
                    values["entropy/teacher"].append(-sum(x * math.log(x) for x in p))
        return total, {name: sum(v) / len(v) for name, v in values.items()}

    def run(self, config, student, **overrides):
        arguments = dict(advantages=self.advantages, token_weight=self.token_weight) | overrides
        teacher = arguments.pop("teacher", self.teacher)
        advantages = arguments.pop("advantages")
        return think_loss(student, teacher, self.weight, advantages, config, **arguments)


@pytest.mark.parametrize("layers", [1, 2], ids=["one-layer", "two-layers"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip-1"])
@pytest.mark.parametrize("divergence, beta", DIVERGENCES, ids=DIVERGENCE_IDS)
def test_think_loss(divergence, beta, clip, layers):
    lens = Lens(layers)
    config = AlignmentConfig(
        divergence=divergence, beta=beta, advantage_clip=clip, lens_temperature=1.7
    )
    wanted, wanted_metrics = lens.by_hand(config, bias=True)
    loss, metrics = lens.run(config, lens.student, bias=lens.bias)
    close(loss, wanted)
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in wanted_metrics.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("divergence, beta", DIVERGENCES, ids=DIVERGENCE_IDS)
def test_think_gradient_is_that_of_the_loop(divergence, beta):
    lens = Lens()
    config = AlignmentConfig(divergence=divergence, beta=beta)
    student = lens.student.clone().requires_grad_()
    teacher = lens.teacher.clone().requires_grad_()
    lens.weight.requires_grad_()
    lens.run(config, student, teacher=teacher)[0].backward()
    assert teacher.grad is None and lens.weight.grad is None
    lens.weight.requires_grad_(False)

    wanted, step = torch.zeros_like(lens.student, dtype=torch.float64), 1e-4
    original = lens.student.double()
    for index in np.ndindex(*original.shape):
        values = []
        for sign in (1, -1):
            lens.student = original.clone()
            lens.student[index] += sign * step
            values.append(lens.by_hand(config)[0])
        wanted[index] = (values[0] - values[1]) / (2 * step)
    assert wanted[:, [2, 5, 6]].abs().max() == 0
    close(student.grad, wanted, rtol=1e-4)


def test_think_layers_are_averaged():
    lens, config = Lens(), AlignmentConfig()
    one, other = (lens.run(config, lens.student[i : i + 1])[0] for i in (0, 1))
    assert abs(one - other) > 1e-3
    close(lens.run(config, lens.student)[0], (one + other) / 2, rtol=1e-6)


def test_think_clip_bounds_the_advantage():
    lens = Lens()
    found = lens.run(AlignmentConfig(advantage_clip=0.5), lens.student)[0]
    bounded = lens.run(
        AlignmentConfig(), lens.student, advantages=lens.advantages.clamp(-0.5, 0.5)
    )[0]
    unbounded = lens.run(AlignmentConfig(), lens.student)[0]
    assert found == bounded
    assert abs(found - unbounded) > 1e-3


def test_think_rows_of_advantage_zero_may_hold_nan():
    lens, config = Lens(), AlignmentConfig()

    def run(poison):
        student, teacher = lens.student.clone(), lens.teacher.clone()
        student[:, [2, 5, 6]], teacher[[2, 5, 6]] = poison, poison
        student.requires_grad_()
        loss, metrics = lens.run(config, student, teacher=teacher)
        loss.backward()
        return loss.item(), student.grad, {k: m.item() for k, m in metrics.items()}

    loss, gradient, metrics = run(math.nan)
    clean_loss, clean_gradient, clean_metrics = run(0.0)
    assert clean_gradient.norm() > 1e-2
    assert loss == clean_loss
    assert torch.equal(gradient, clean_gradient)
    assert metrics == clean_metrics


def test_think_all_advantages_zero_costs_exactly_nothing():
    lens = Lens()
    student = lens.student.clone().requires_grad_()
    loss, metrics = lens.run(AlignmentConfig(), student, advantages=torch.zeros(lens.rows))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and not student.grad.any()
    assert all(mean.count == 0 for mean in metrics.values())
