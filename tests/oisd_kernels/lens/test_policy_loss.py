"""The clipped policy loss at its corners: the same slope from autograd and from its formula.

A corner is where a clip begins. torch 2.14 gives a clamp no gradient at its bound, earlier ones the
whole; ours is the whole on every version.
"""

import math

import pytest
import torch

from oisd_kernels.lens.policy_loss import LIMIT, PolicyTerms, policy_loss, policy_slope

UP, DOWN = math.exp(0.25), math.exp(-0.25)


def slopes(log_ratio: float, advantage: float, **options):
    logprob = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    terms = PolicyTerms(advantage * one, one, old_logprob=zero, **options)
    loss = policy_loss(logprob, terms).loss
    (found,) = torch.autograd.grad(loss.sum(), logprob)
    return found.item(), policy_slope(logprob.detach(), terms).item(), loss.item()


@pytest.mark.parametrize(
    "log_ratio, advantage, options, wanted",
    [
        # At the bound the ratio still counts; a step beyond it the loss is flat.
        (0.25, 2.0, {"clip_high": UP - 1}, -2 * UP),
        (math.nextafter(0.25, 1), 2.0, {"clip_high": UP - 1}, 0.0),
        (-0.25, -2.0, {"clip_low": 1 - DOWN}, 2 * DOWN),
        (-0.25 - 1e-9, -2.0, {"clip_low": 1 - DOWN}, 0.0),
        (0.0, 2.0, {"clip_low": 0.0, "clip_high": 0.0}, -2.0),
        (0.0, -2.0, {"clip_low": 0.0, "clip_high": 0.0}, 2.0),
        # The other side's bound does not concern an advantage.
        (-1.0, 2.0, {}, -2 * math.exp(-1)),
        (1.0, -2.0, {}, 2 * math.exp(1)),
        # Where exp would overflow.
        (LIMIT, -2.0, {}, 2 * math.exp(LIMIT)),
        (LIMIT + 1e-9, -2.0, {}, 0.0),
    ],
)
def test_slope_at_a_corner(log_ratio, advantage, options, wanted):
    by_autograd, by_formula, loss = slopes(log_ratio, advantage, **options)
    assert by_formula == pytest.approx(wanted, rel=1e-12, abs=0)
    assert by_autograd == pytest.approx(wanted, rel=1e-12, abs=0)
    assert math.isfinite(loss) and loss != 0


@pytest.mark.parametrize("gap, wanted", [(LIMIT, 1 - math.exp(LIMIT)), (LIMIT + 1e-9, 0.0)])
def test_slope_of_the_kl_term_at_its_limit(gap, wanted):
    reference = torch.tensor([gap], dtype=torch.float64)
    by_autograd, by_formula, _ = slopes(0.0, 0.0, ref_logprob=reference, kl_coef=1.0)
    assert by_formula == pytest.approx(wanted, rel=1e-12, abs=0)
    assert by_autograd == pytest.approx(wanted, rel=1e-12, abs=0)
