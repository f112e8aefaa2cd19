"""Log-probability of labels, and the policy head: log-probability and divergence in one pass.

Floor in units of G = 2*N*D*V: 3 for the log-probability with both gradients (logits, and one matmul
each for hidden states and unembedding); 2S more for the divergence of S layers beside it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import eager, peers
from benchmarks.cases.case import (
    EXACT,
    PEER,
    Bar,
    Case,
    Implementation,
    Inputs,
    Result,
    Run,
    hidden_states,
    own,
    period,
    periodic,
    seeded,
    token_weights,
)
from benchmarks.cases.lens import yardstick
from benchmarks.cases.shapes import CPU_HEAD, HEADS, SMALL_HEAD, Head, thousands
from oisd_kernels import (
    linear_logprob,
    logit_lens_divergence,
    policy_head,
    reference,
)

LOGPROB_IMPLS = ("chunked", "tiled", "reference")
QUICK, FULL = frozenset({"quick", "full"}), frozenset({"full"})
GPU = QUICK | {"gpu"}


def cases(device: str) -> list[Case]:
    """All cases of a device: log-probability, then policy head."""
    if device == "cuda":
        four = HEADS["qwen3-4b"]
        tokens = {8192: GPU, 1024: FULL, 4096: FULL, 16384: FULL, 32768: FULL, 65536: FULL}
        found = [logprob("qwen3-4b", four, n, device, suites) for n, suites in tokens.items()]
        found += [logprob(m, h, 8192, device, FULL) for m, h in HEADS.items() if m != "qwen3-4b"]
        found += [policy("qwen3-4b", four, s, 8192, device, GPU if s == 1 else FULL)
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
            *(Implementation(f"ours: {impl}", partial(ours_logprob, impl=impl),
                             needs=4 * logits if impl == "reference" else 0.0)
              for impl in LOGPROB_IMPLS),
            Implementation("eager", partial(eager_logprob, compiled=False), bound=PEER[dtype],
                           needs=4 * logits),
            Implementation("torch.compile(eager)", partial(eager_logprob, compiled=True),
                           bound=PEER[dtype], needs=3 * logits, compiles=True),
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
    name = f"policy_head/{model}/S{S}/{thousands(N)}/saturated"
    logits = 4.0 * N * V * (S + 1)
    return Case(
        name=name,
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
    """Unweighted rows in float64, one period computed; `d_weight` weighted and not, since it is a
    sum over rows."""
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
    from benchmarks.cases.lens import truth

    lens = truth(
        {
            "hidden": inputs["student"],
            "final": inputs["final"],
            "weight": inputs["weight"].detach(),
        },
        gradient=True,
    )
    return logprob_truth(inputs) | {"divergence": lens["loss"], "d_student": lens["d_hidden"]}


def per_row(values: Tensor, tokens: int) -> Tensor:
    return periodic(values[:, None], tokens)[:, 0]


def ours_logprob(inputs: Inputs, impl: str) -> Run:
    def run() -> Result:
        given = [inputs[name] for name in ("hidden", "weight", "labels")]
        rows = own(linear_logprob, *given, impl=impl)
        return logprob_result(rows.logprob, inputs)

    return run


def eager_logprob(inputs: Inputs, compiled: bool) -> Run:
    function = torch.compile(eager.logprob, dynamic=False) if compiled else eager.logprob

    def run() -> Result:
        rows = function(inputs["hidden"], inputs["weight"], inputs["labels"])
        return logprob_result(rows, inputs)

    return run


def logprob_result(rows: Tensor, inputs: Inputs) -> Result:
    loss = rows * inputs["factor"]
    found = peers.grads(loss, 1.0, hidden=inputs["hidden"], weight=inputs["weight"])
    return {"loss": loss.detach()} | found


def one_pass(inputs: Inputs, impl: str) -> Run:
    def run() -> Result:
        out = policy_head(
            inputs["hidden"],
            inputs["weight"],
            inputs["labels"],
            inputs["student"],
            token_weight=inputs["factor"],
            impl=impl,
        )
        return policy_result(out.logprob, out.divergence, inputs)

    return run


def two_calls(inputs: Inputs) -> Run:
    def run() -> Result:
        rows = linear_logprob(inputs["hidden"], inputs["weight"], inputs["labels"])
        divergence = logit_lens_divergence(
            inputs["student"],
            inputs["final"],
            inputs["weight"],
            token_weight=inputs["factor"],
        )
        return policy_result(rows.logprob, divergence, inputs)

    return run


def eager_policy(inputs: Inputs) -> Run:
    def run() -> Result:
        weight = inputs["weight"]
        rows = eager.logprob(inputs["hidden"], weight, inputs["labels"])
        divergence = eager.lens_divergence(
            inputs["student"], inputs["final"], weight.detach(), inputs["factor"]
        )
        return policy_result(rows, divergence, inputs)

    return run


def policy_result(rows: Tensor, divergence: Tensor, inputs: Inputs) -> Result:
    loss = rows * inputs["factor"]
    leaves = {name: inputs[name] for name in ("hidden", "student", "weight")}
    gradients = peers.grads(torch.cat([loss[None], divergence]), 1.0, **leaves)
    return {"loss": loss.detach(), "divergence": divergence.detach()} | gradients
