"""Each operation over the unembedding, values and gradients, against float64 at a true head.

Letters: S student layers, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import (
    EXACT,
    Bound,
    Result,
    hidden_states,
    leaves_of,
    seeded,
    token_weights,
)
from benchmarks.gpu.place import Place
from benchmarks.gpu.worker import Check, Outcome, Work
from oisd_kernels import (
    PolicyTerms,
    distillation_divergence,
    linear_logprob,
    logit_lens_divergence,
    policy_head,
)
from oisd_kernels.checks import DIVERGENCES

# float16's own rounding is finer than bfloat16's, and its gradients are scaled.
BOUNDS = EXACT | {torch.float16: EXACT[torch.bfloat16]}
SCORES = {"temperature": 0.7, "logit_softcap": 20.0}


def tensors(place: Place, layers: int, regime: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states [S, N, D], final ones [N, D], head [V, D], bias [V], labels [N], and signed
    weights [N], a quarter of them 0."""
    student, final, weight = hidden_states(
        regime, layers, place.tokens, *place.head, place.device, 0
    )
    generator = seeded(3, place.device)
    vocabulary = place.head.vocabulary
    return {
        "hidden": student.to(dtype),
        "final": final.to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(vocabulary, generator=generator, device=place.device).to(dtype),
        "labels": torch.randint(
            vocabulary, (place.tokens,), generator=generator, device=place.device
        ),
        "factor": token_weights(place.tokens, place.device, 0, dropped=0.25),
    }


Forward = Callable[..., Mapping[str, Tensor]]


def compared(
    forward: Forward, given: Mapping[str, Tensor], leaves: tuple[str, ...], bound: Bound, impl: str
) -> Outcome:
    """`forward` with `impl` against "reference" on float64 copies.

    Its first result is the one that gradients are taken of, summed; integers stay as they are.
    """

    def run(impl: str, dtype: torch.dtype | None) -> Result:
        own = leaves_of(given, leaves, dtype)
        found = dict(forward(**own, impl=impl))
        total = sum((x.sum() for x in found.values() if x.requires_grad), torch.zeros(()))
        gradients = torch.autograd.grad(total, [own[name] for name in leaves])
        found |= {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {name: x.detach() for name, x in found.items()}

    return Outcome(run(impl, None), run("reference", torch.float64), bound)


def reduction(impl: str) -> str:
    """Ours forms the head's gradient in the forward where there is one upstream number. Truth gives
    the rows, whose absolute sum is what a signed sum's error is held against."""
    return "none" if impl == "reference" else "sum"


def lens(
    place: Place,
    impl: str,
    divergence: str = "jsd",
    layers: int = 1,
    regime: str = "saturated",
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    scores: bool = False,
    grad_weight: bool = False,
) -> Outcome:
    """`logit_lens_divergence`; dtypes of states and head, None: the place's."""
    states, head = (dtype or place.dtype for dtype in dtypes)
    given = tensors(place, layers, regime, states)
    given["weight"] = given["weight"].to(head)
    del given["labels"]
    if not scores:
        del given["bias"]

    def forward(hidden: Tensor, final: Tensor, weight: Tensor, factor: Tensor, **rest: Any):
        options = {"reduction": reduction(rest["impl"]), "grad_weight": True} if grad_weight else {}
        rows = logit_lens_divergence(
            hidden, final, weight, token_weight=factor, divergence=divergence,
            **(SCORES if scores else {}), **options, **rest,
        )  # fmt: skip
        return {"loss": rows}

    leaves = ("hidden", "weight") if grad_weight else ("hidden",)
    return compared(forward, given, leaves, BOUNDS[_coarser(states, head)], impl)


def logprob(
    place: Place,
    impl: str,
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    scores: bool = False,
) -> Outcome:
    """`linear_logprob` with its three results and both gradients."""
    states, head = (dtype or place.dtype for dtype in dtypes)
    given = tensors(place, 1, "peaked", states)
    given["weight"] = given["weight"].to(head)
    kept = ("final", "weight", "labels", "factor", *(("bias",) if scores else ()))

    def forward(final: Tensor, weight: Tensor, labels: Tensor, factor: Tensor, **rest: Any):
        out = linear_logprob(final, weight, labels, **(SCORES if scores else {}), **rest)
        return {"loss": out.logprob * factor, "entropy": out.entropy, "lse": out.logsumexp}

    chosen = {name: given[name] for name in kept}
    return compared(forward, chosen, ("final", "weight"), BOUNDS[_coarser(states, head)], impl)


def head(place: Place, impl: str, layers: int) -> Outcome:
    """`policy_head` with the policy loss, at two temperatures: what a training step calls."""
    given = tensors(place, layers, "saturated", place.dtype)
    del given["bias"]
    given["advantage"] = token_weights(place.tokens, place.device, 5)

    def forward(advantage: Tensor, **own: Any):
        labels, factor = own["labels"], own["factor"]
        terms = PolicyTerms(advantage, torch.full_like(advantage, 1 / len(advantage)))
        out = policy_head(
            own["final"], own["weight"], labels, own["hidden"], token_weight=factor,
            lens_temperature=0.7, policy=terms, impl=own["impl"],
        )  # fmt: skip
        return {"loss": out.policy_loss, "divergence": out.divergence, "logprob": out.logprob}

    # The policy loss at ratio 1 sums to the advantages alone: judged by its gradient.
    bound = BOUNDS[place.dtype]
    return compared(forward, given, ("hidden", "final", "weight"), bound, impl)


def distillation(place: Place, impl: str) -> Outcome:
    """`distillation_divergence` from a teacher of half the width, with the head's gradient."""
    given = tensors(place, 1, "peaked", place.dtype)
    width = place.head.width // 2
    given = {
        "hidden": given["hidden"][0],
        "weight": given["weight"],
        "teacher": given["final"][:, :width].contiguous(),
        "teacher_weight": given["weight"][:, width:].contiguous(),
        "factor": given["factor"],
    }

    def forward(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
                factor: Tensor, impl: str):  # fmt: skip
        loss = distillation_divergence(
            hidden, weight, teacher, teacher_weight, token_weight=factor,
            reduction=reduction(impl), impl=impl,
        )  # fmt: skip
        return {"loss": loss}

    return compared(forward, given, ("hidden", "weight"), BOUNDS[place.dtype], impl)


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype whose rounding the bound follows."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def checks(impl: str) -> list[Check]:
    """All of one `impl`, the choice of "auto" first."""
    found = [
        Check(f"lens, jsd, S = {s}, {impl}", partial(lens, impl=impl, layers=s)) for s in (1, 4)
    ]
    found += [
        Check(f"lens, {name}, S = 2, {impl}",
              partial(lens, impl=impl, divergence=name, layers=2, regime="peaked"))
        for name in DIVERGENCES[1:]
    ]  # fmt: skip
    found += [
        Check(f"lens, jsd, gradient to the head, {impl}",
              partial(lens, impl=impl, regime="peaked", grad_weight=True)),
        Check(f"lens, jsd near its teacher, {impl}", partial(lens, impl=impl, regime="near")),
        Check(f"lens, jsd, bias, softcap, temperature, {impl}",
              partial(lens, impl=impl, regime="peaked", scores=True)),
        Check(f"log-probability, {impl}", partial(logprob, impl=impl)),
        Check(f"log-probability, bias, softcap, temperature, {impl}",
              partial(logprob, impl=impl, scores=True)),
        Check(f"lens, jsd, float16, {impl}",
              partial(lens, impl=impl, dtypes=(torch.float16, torch.float16))),
    ]  # fmt: skip
    if impl == "chunked":
        found[2:2] = [
            Check("policy head, S = 1, chunked", partial(head, impl=impl, layers=1)),
            Check("policy head, S = 4, chunked", partial(head, impl=impl, layers=4)),
        ]
        found.append(Check("distillation, chunked", partial(distillation, impl=impl)))
    return found


def chunked(work: Work) -> None:
    work.checks(checks("chunked"))


def tiled(work: Work) -> None:
    work.checks(checks("tiled"))
