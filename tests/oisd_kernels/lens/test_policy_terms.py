"""policy_head(policy=): the terms that it refuses, and in which dtype it takes them."""

import math

import pytest
import torch

from oisd_kernels import PolicyTerms, policy_head


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"advantage": torch.ones(2)},
            r"policy.advantage must have shape \[N\] = \[3\], got \[2\]",
        ),
        ({"weight": torch.ones(3, dtype=torch.int64)}, "policy.weight must .*int64"),
        ({"old_logprob": torch.ones(3, 1)}, r"policy.old_logprob must have shape \[N\] = \[3\]"),
        ({"advantage": None}, "policy.advantage must be a torch.Tensor, got NoneType"),
        ({"weight": 1.0}, "policy.weight must be a torch.Tensor, got float"),
        ({"ref_logprob": [0.0] * 3}, "policy.ref_logprob must be a torch.Tensor, got list"),
        ({"clip_low": math.nan}, "policy.clip_low must be a number of at least 0, got nan"),
        ({"clip_low": torch.tensor(0.2)}, "policy.clip_low must be a number of at least 0"),
        ({"clip_high": -0.1}, "policy.clip_high must be a number of at least 0, got -0.1"),
        ({"dual_clip": 0.5}, "policy.dual_clip must be a number above 1, got 0.5"),
        ({"dual_clip": 1.0}, "policy.dual_clip must be a number above 1, got 1.0"),
        ({"tis_cap": 0.0}, "policy.tis_cap must be a number above 0, got 0.0"),
        ({"tis_cap": None}, "policy.tis_cap must be a number above 0, got None"),
        ({"kl_coef": -1.0}, "policy.kl_coef must be a number of at least 0, got -1.0"),
        ({"kl_coef": math.inf}, "policy.kl_coef must be finite, got inf"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_policy_head_refuses_terms(impl, change, message):
    terms = PolicyTerms(torch.ones(3), torch.ones(3), dual_clip=2.0)._replace(**change)
    given = torch.randn(3, 4), torch.randn(7, 4), torch.arange(3)
    with pytest.raises(ValueError, match=message):
        policy_head(*given, policy=terms, impl=impl)


def test_policy_head_refuses_what_are_no_terms_and_a_weight_without_students():
    given = torch.randn(3, 4), torch.randn(7, 4), torch.arange(3)
    with pytest.raises(ValueError, match="policy must be PolicyTerms, got tuple"):
        policy_head(*given, policy=(torch.ones(3), torch.ones(3)))  # pyright: ignore
    with pytest.raises(ValueError, match="token_weight must be None without student_hidden, got T"):
        policy_head(*given, token_weight=torch.ones(3))
    with pytest.raises(ValueError, match="got 0.0; None takes `temperature`"):
        policy_head(*given, lens_temperature=0.0)


@pytest.mark.parametrize("off", [{"clip_high": math.inf}, {"tis_cap": math.inf}])
def test_an_infinite_bound_is_none(off):
    """Against the loss written out, where the ratio and the importance are e^2."""
    final, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.arange(3)
    logprob = policy_head(final, weight, labels).logprob
    one = torch.ones(3)
    terms = PolicyTerms(one, one, logprob - 2, rollout_logprob=logprob - 4, tis_cap=2.0)
    found = policy_head(final, weight, labels, policy=terms._replace(**off)).policy_loss
    wanted = -(math.exp(2) if "clip_high" in off else 1.2)
    wanted *= math.exp(2) if "tis_cap" in off else 2.0
    torch.testing.assert_close(found.item(), 3 * wanted, rtol=1e-5, atol=0)


def test_the_reference_takes_terms_as_the_kernels_do():
    """In the dtype of the results, as constants."""
    torch.manual_seed(0)
    final, weight, labels = torch.randn(9, 4), torch.randn(7, 4), torch.arange(9) % 7
    logprob = policy_head(final, weight, labels).logprob.bfloat16()
    terms = PolicyTerms(
        torch.randn(9).bfloat16().requires_grad_(), torch.ones(9).bfloat16(), logprob - 0.3,
        rollout_logprob=logprob - 0.9, tis_cap=100.0,
    )  # fmt: skip
    exact = terms.constants(torch.float64)
    given = final.clone().requires_grad_(), weight, labels
    found = [policy_head(*given, policy=terms, impl=i).policy_loss for i in ("auto", "reference")]
    truth = policy_head(final.double(), weight.double(), labels, policy=exact).policy_loss
    for loss in found:
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        loss.backward()
    assert terms.advantage.grad is None
    student = torch.randn(2, 9, 4, dtype=torch.float64)
    wide = policy_head(final, weight, labels, student, policy=terms, impl="reference")
    results = [*wide[:4], *wide.stats, wide.policy_loss]
    assert {x.dtype for x in results if x.is_floating_point()} == {torch.float64}
