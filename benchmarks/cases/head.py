"""Log-probability of labels, and the policy head: log-probability and divergence in one pass.

The least work in units of G = 2*N*D*V: 3 for the log-probability with both gradients (logits, and
one matmul each for hidden states and unembedding); 2S more for the divergence of S layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import eager, peers
from benchmarks.cases.case import (
    EXACT,
    FULL,
    PEER,
    QUICK,
    Bar,
    Case,
    Implementation,
    Inputs,
    Result,
    Run,
    formula,
    forward_backward,
    gradients,
    hidden_states,
    own,
    period,
    periodic,
    seeded,
    token_weights,
)
from benchmarks.cases.lens import IMPLS, yardstick
from benchmarks.cases.lens import truth as lens_truth
from benchmarks.cases.shapes import CPU_HEAD, HEADS, SMALL_HEAD, Head, thousands
from oisd_kernels import linear_logprob, logit_lens_divergence, policy_head, reference


def cases(device: str) -> list[Case]:
    """All cases of a device: log-probability, then policy head."""
    if device == "cuda":
        four = HEADS["qwen3-4b"]
        tokens = {8192: QUICK, 1024: FULL, 4096: FULL, 16384: FULL, 32768: FULL, 65536: FULL}
        found = [logprob("qwen3-4b", four, n, device, suites) for n, suites in tokens.items()]
        found += [logprob(m, h, 8192, device, FULL) for m, h in HEADS.items() if m != "qwen3-4b"]
        found += [policy("qwen3-4b", four, s, 8192, device, QUICK if s == 1 else FULL)
                  for s in (1, 4)]  # fmt: skip
        return found
    return [
        logprob("cpu-small", SMALL_HEAD, 256, device, QUICK),
        policy("cpu-small", SMALL_HEAD, 1, 256, device, QUICK),
        logprob("cpu", CPU_HEAD, 2048, device, FULL),
        policy("cpu", CPU_HEAD, 1, 2048, device, FULL),
        policy("cpu-small", SMALL_HEAD, 4, 256, device, FULL),
    ]


def logprob(model: str, head: Head, tokens: int, device: str, suites: frozenset[str]) -> Case:
    """The log-probability case of a shape."""
    N, D, V = tokens, *head
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logits = 4.0 * N * V
    return Case(
        name=f"linear_logprob/{model}/{thousands(N)}/peaked",
        family="linear_logprob",
        device=device,
        dtype=dtype,
        shape={"N": N, "D": D, "V": V},
        regime="peaked",
        inputs=partial(inputs, head, 1, N, device, dtype, "peaked"),
        truth=logprob_truth,
        implementations=[
            *formula(ours_logprob, IMPLS, eager_logprob, dtype, 4 * logits, 3 * logits),
            *peers.logprob(device, dtype),
        ],
        yardstick=yardstick,
        flops=3 * 2.0 * N * D * V,
        bytes=2.0 * (V * D + N * D) * dtype.itemsize,
        bound=EXACT[dtype],
        suites=suites,
        compiled=True,
    )  # fmt: skip


def policy(
    model: str, head: Head, layers: int, tokens: int, device: str, suites: frozenset[str]
) -> Case:
    """The policy-head case of a shape: gradients to both hidden states and to the unembedding."""
    S, N, D, V = layers, tokens, *head
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logits = 4.0 * N * V * (S + 1)
    return Case(
        name=f"policy_head/{model}/S{S}/{thousands(N)}/saturated",
        family="policy_head",
        device=device,
        dtype=dtype,
        shape={"S": S, "N": N, "D": D, "V": V},
        regime="saturated",
        inputs=partial(inputs, head, S, N, device, dtype, "saturated"),
        truth=policy_truth,
        implementations=[
            Implementation("ours: policy_head", partial(one_pass, impl="chunked")),
            Implementation("ours: two calls", two_calls),
            Implementation("ours: policy_head, reference", partial(one_pass, impl="reference"),
                           needs=5 * logits),
            Implementation("eager", eager_policy, bound=PEER[dtype], needs=5 * logits),
        ],
        yardstick=yardstick,
        flops=(3 + 2 * S) * 2.0 * N * D * V,
        bytes=(2.0 * V * D + 2 * (S + 1) * N * D) * dtype.itemsize,
        bound=EXACT[dtype],
        suites=suites,
        bars=(Bar("ours: policy_head", "median_s", 1.0, "ours: two calls"),),
    )  # fmt: skip


def inputs(
    head: Head, layers: int, tokens: int, device: str, dtype: torch.dtype, regime: str
) -> Inputs:
    student, final, weight = hidden_states(regime, layers, tokens, *head, device, 0)
    generator = seeded(2, device)
    labels = torch.randint(head.vocabulary, (period(tokens),), generator=generator, device=device)
    return {
        "student": student.to(dtype).requires_grad_(),
        "final": final.to(dtype),
        "hidden": final.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "labels": periodic(labels[:, None], tokens)[:, 0],
        "factor": token_weights(tokens, device, 0),
    }


def logprob_truth(inputs: Inputs) -> Result:
    """Unweighted rows in float64, computed for one period. `d_weight`, a sum over rows, both with
    the weights and without."""
    tokens = inputs["hidden"].shape[0]
    rows = period(tokens)
    hidden = inputs["hidden"].detach()[:rows].double().requires_grad_()
    weight = inputs["weight"].detach().double().requires_grad_()
    loss = reference.linear_logprob(hidden, weight, inputs["labels"][:rows]).logprob
    d_hidden = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)[0]
    found = {"loss": per_row(loss.detach(), tokens), "d_hidden": periodic(d_hidden, tokens)}
    for name, factor in (("d_weight", torch.ones_like(inputs["factor"])),
                         ("weighted d_weight", inputs["factor"])):  # fmt: skip
        summed = hidden.new_zeros(rows)
        summed.index_add_(0, torch.arange(tokens, device=hidden.device) % rows, factor.double())
        (found[name],) = torch.autograd.grad((loss * summed).sum(), weight, retain_graph=True)
    return found


def policy_truth(inputs: Inputs) -> Result:
    """As `logprob_truth`, and `d_student` of the divergence."""
    given = {
        "hidden": inputs["student"],
        "final": inputs["final"],
        "weight": inputs["weight"].detach(),
    }
    lens = lens_truth(given, gradient=True)
    return logprob_truth(inputs) | {"divergence": lens["loss"], "d_student": lens["d_hidden"]}


def per_row(values: Tensor, tokens: int) -> Tensor:
    return periodic(values[:, None], tokens)[:, 0]


def ours_logprob(inputs: Inputs, impl: str) -> Run:
    return logprob_run(lambda *given: own(linear_logprob, *given, impl=impl).logprob, inputs)


def eager_logprob(inputs: Inputs, compiled: bool) -> Run:
    function = torch.compile(eager.logprob, dynamic=False) if compiled else eager.logprob
    return logprob_run(function, inputs)


def logprob_run(logprob: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Run:
    """Of a function of hidden states, unembedding and labels."""
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
    return forward_backward(
        lambda: logprob(hidden, weight, labels) * inputs["factor"], hidden=hidden, weight=weight
    )


def one_pass(inputs: Inputs, impl: str) -> Run:
    def forward(*given: Tensor) -> tuple[Tensor, Tensor]:
        out = policy_head(*given, inputs["student"], token_weight=inputs["factor"], impl=impl)
        return out.logprob, out.divergence

    return policy_run(forward, inputs)


def two_calls(inputs: Inputs) -> Run:
    student, final, factor = inputs["student"], inputs["final"], inputs["factor"]

    def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = linear_logprob(hidden, weight, labels).logprob
        return rows, logit_lens_divergence(student, final, weight, token_weight=factor)

    return policy_run(forward, inputs)


def eager_policy(inputs: Inputs) -> Run:
    student, final, factor = inputs["student"], inputs["final"], inputs["factor"]

    def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = eager.logprob(hidden, weight, labels)
        return rows, eager.lens_divergence(student, final, weight.detach(), factor)

    return policy_run(forward, inputs)


def policy_run(forward: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Run:
    """Of a function of hidden states, unembedding and labels that gives log-probability and
    divergence."""
    leaves = {name: inputs[name] for name in ("hidden", "student", "weight")}

    def run() -> Result:
        rows, divergence = forward(inputs["hidden"], inputs["weight"], inputs["labels"])
        loss = rows * inputs["factor"]
        found = {"loss": loss.detach(), "divergence": divergence.detach()}
        return found | gradients(torch.cat([loss[None], divergence]), 1.0, **leaves)

    return run
