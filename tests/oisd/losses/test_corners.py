"""No loss leaves its slope at a corner to torch: between versions the one of `clamp` has changed.

At its bound torch 2.14's clamp passes no gradient and 2.13's all of it; maxima share theirs among
equals. Ours are written as `torch.where`, or as functions with a backward of their own; their
slopes are held to values in `tests/oisd_kernels/lens/test_policy_loss.py`.
"""

import re

import pytest
import torch

from oisd.config import AlignmentConfig, GRPOConfig
from oisd.losses import attention_loss, grpo_and_think_loss, grpo_loss, think_loss
from oisd_kernels import flash_attention, linear_logprob, reference
from tests.oisd.losses.test_attention_loss import Attention
from tests.oisd.losses.test_joint_loss import B, T, V, make
from tests.oisd.losses.test_losses import DIVERGENCE_IDS, DIVERGENCES, VARIANTS

WORDS = "Clamp|Clip|Min|Max|Amin|Amax|Fmin|Fmax|Relu|Hardtanh|Abs|Cummin|Cummax|Topk|Sort|Median"
CORNER = re.compile(rf"(.*::)?({WORDS})[A-Za-z]*Backward\d*")


def nodes(result: torch.Tensor) -> set[str]:
    """Names of all operations between a result and its leaves, such as "ExpBackward0"."""
    assert result.grad_fn is not None
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def corners(result: torch.Tensor) -> set[str]:
    names = nodes(result)
    assert "AccumulateGrad" in {name.rpartition("::")[2] for name in names}  # reached the leaves
    return {name for name in names if CORNER.fullmatch(name)}


def grpo(options):
    x = make()
    logprobs = (x["old"] + x["noise"][0]).requires_grad_()
    return grpo_loss(
        logprobs, x["advantages"], torch.ones(B, T, dtype=torch.bool), GRPOConfig(**options),
        old_logprobs=x["old"], rollout_logprobs=x["old"] + x["noise"][1],
        ref_logprobs=x["old"] - x["noise"][1],
    )[0]  # fmt: skip


def think(impl, kind, beta):
    x = make()
    return think_loss(
        x["students"], x["final"], x["weight"], x["advantages"].repeat_interleave(T),
        AlignmentConfig(divergence=kind, beta=beta), token_weight=x["think_weight"].flatten(),
        bias=x["bias"], impl=impl,
    )[0]  # fmt: skip


def attention(impl, kind, beta):
    case = Attention()
    q, k = ([x.requires_grad_() for x in some] for some in (case.q, case.k))
    config = AlignmentConfig(divergence=kind, beta=beta)
    found = attention_loss(
        case.pairs(q, k), case.advantages, config, token_weight=case.token_weight, impl=impl
    )
    return found[0]


def joint(impl):
    x = make()
    both = grpo_and_think_loss(
        x["final"], x["weight"], torch.arange(B * T) % V, x["students"],
        x["advantages"].repeat_interleave(T), GRPOConfig(**VARIANTS["everything"]),
        grpo_weight=x["grpo_weight"].flatten(), think_weight=x["think_weight"].flatten(),
        old_logprobs=x["old"].flatten(), rollout_logprobs=(x["old"] + x["noise"][0]).flatten(),
        ref_logprobs=x["old"].flatten(), bias=x["bias"], impl=impl,
    )  # fmt: skip
    return both.grpo + both.think


@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo(variant):
    assert not corners(grpo(VARIANTS[variant]))


@pytest.mark.parametrize("kind, beta", DIVERGENCES, ids=DIVERGENCE_IDS)
@pytest.mark.parametrize("loss, ours", [(think, "chunked"), (attention, "torch")])
def test_alignment(loss, ours, kind, beta):
    for impl in ("reference", ours):
        assert not corners(loss(impl, kind, beta))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_joint(impl):
    assert not corners(joint(impl))


def test_logprob_and_attention():
    x = make()
    for impl in ("chunked", "reference"):
        given = x["final"], x["weight"], torch.arange(B * T) % V
        assert not corners(linear_logprob(*given, logit_softcap=3.0, impl=impl).logprob.sum())
    q, k, v = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(3))
    sink = torch.randn(2, requires_grad=True)
    out, lse = reference.attention(q, k, v, softcap=2.0, window=3, sink=sink)
    assert not corners(out.sum() + lse.sum())
    ours = flash_attention(q, k, v, softcap=2.0, window=3, sink=sink)
    assert not corners(ours[0].sum())


@pytest.mark.parametrize(
    "corner",
    [lambda x: x.clamp(-1, 1), lambda x: x.clamp_min(0), lambda x: torch.maximum(x, -x),
     lambda x: x.amax(-1), lambda x: x.max(-1).values, lambda x: x.relu(), lambda x: x.abs(),
     lambda x: torch.minimum(x, -x)],
    ids=["clamp", "clamp-min", "maximum", "amax", "max", "relu", "abs", "minimum"],
)  # fmt: skip
def test_a_corner_is_found(corner):
    assert len(corners(corner(2 * torch.randn(2, 3, requires_grad=True)).exp().sum())) == 1
