"""grpo_and_think_loss: one pass over the head gives what the two losses give apart."""

import pytest
import torch

from oisd.config import AlignmentConfig, GRPOConfig
from oisd.losses import grpo_and_think_loss, grpo_loss, think_loss
from oisd_kernels import linear_logprob

S, B, T, D, V = 2, 3, 5, 6, 17


def make(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    x = {
        "final": torch.randn(B * T, D, dtype=torch.float64),
        "students": torch.randn(S, B * T, D, dtype=torch.float64),
        "weight": torch.randn(V, D, dtype=torch.float64) / 2,
        "bias": torch.randn(V, dtype=torch.float64) / 4,
        "old": -3 + torch.randn(B, T, dtype=torch.float64) / 2,
        "noise": torch.randn(2, B, T, dtype=torch.float64) / 2,
        "advantages": torch.tensor([1.3, -0.7, 0.0], dtype=torch.float64),
        "grpo_weight": torch.rand(B, T, dtype=torch.float64),
        "think_weight": torch.rand(B, T, dtype=torch.float64),
    }
    for name in ("final", "students", "weight", "bias"):
        x[name].requires_grad_()
    return x


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("on_policy", [True, False])
def test_both_losses_at_once(on_policy, layers, impl):
    x, labels = make(), torch.arange(B * T) % V
    students = x["students"][:layers]
    grpo = GRPOConfig(dual_clip=2.0, kl_coef=0.1, tis_cap=1.5)
    config = AlignmentConfig(advantage_clip=1.0, lens_temperature=0.8)
    old = None if on_policy else x["old"]
    rollout, ref = x["old"] + x["noise"][0], x["old"] + x["noise"][1]
    logprob = linear_logprob(
        x["final"], x["weight"], labels, bias=x["bias"], temperature=0.9, impl="reference"
    )
    apart, metrics = grpo_loss(
        logprob.logprob.view(B, T), x["advantages"], torch.ones(B, T, dtype=torch.bool), grpo,
        old_logprobs=old, rollout_logprobs=rollout, ref_logprobs=ref,
        token_weight=x["grpo_weight"],
    )  # fmt: skip
    think = torch.zeros(())
    advantages = x["advantages"].repeat_interleave(T)
    importance = torch.exp((logprob.logprob.view(B, T) if old is None else old) - rollout)
    importance = importance.clamp(max=1.5).detach()
    assert 0.1 < (importance == 1.5).float().mean() < 0.9
    assert metrics["tis/truncated"].item() == pytest.approx((importance == 1.5).double().mean())
    if layers:
        think, more = think_loss(
            students, x["final"], x["weight"], advantages, config,
            token_weight=(x["think_weight"] * importance).flatten(), bias=x["bias"],
            impl="reference",
        )  # fmt: skip
        metrics |= more
    both = grpo_and_think_loss(
        x["final"], x["weight"], labels, students, advantages, grpo, config,
        grpo_weight=x["grpo_weight"].flatten(), think_weight=x["think_weight"].flatten(),
        old_logprobs=None if old is None else old.flatten(), rollout_logprobs=rollout.flatten(),
        ref_logprobs=ref.flatten(), temperature=0.9, bias=x["bias"], impl=impl,
    )  # fmt: skip
    assert both.importance is not None
    torch.testing.assert_close(both.importance, importance.flatten())
    torch.testing.assert_close(both[0], apart)
    torch.testing.assert_close(both[1].double(), think.double())
    entropy = both[2].pop("entropy/policy")
    assert entropy.item() == pytest.approx(logprob.entropy.mean().item())
    assert both[2].keys() == metrics.keys()
    for name, mean in metrics.items():
        assert both[2][name].item() == pytest.approx(mean.item(), rel=1e-6), name

    wanted = [x["final"], x["weight"], x["bias"], *([x["students"]] if layers else [])]
    ours = torch.autograd.grad(both[0] + 0.3 * both[1], wanted)
    theirs = torch.autograd.grad(apart + 0.3 * think, wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 1e-3
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["advantages", "grpo_weight", "think_weight"])
def test_refuses_what_is_not_one_a_row(name):
    x, labels = make(), torch.arange(B * T) % V
    given = dict.fromkeys(("advantages", "grpo_weight", "think_weight"), torch.ones(B * T))
    given[name] = torch.ones(B)
    with pytest.raises(
        ValueError, match=rf"{name} must have the shape of labels \[15\], got \[3\]"
    ):
        grpo_and_think_loss(
            x["final"], x["weight"], labels, x["students"], given.pop("advantages"), **given
        )
