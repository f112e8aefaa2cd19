"""Log-probability of each row's label under the unembedding, with entropy and logsumexp beside it.

    z = cap(hidden @ weight.T + bias) / temperature
    logsumexp = log sum_v exp(z_v),  logprob = z_label - logsumexp,  entropy = -<q, log q>,
    q = softmax(z)

cap(z) = c * tanh(z / c) where logit_softcap = c is given, else z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.head_loop import HeadPass
from oisd_kernels.lens.chunked.head_pass import NO_POLICY, head_pass
from oisd_kernels.lens.vocab_parallel import Part
from oisd_kernels.reference import LinearLogprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_logprob"
NAMES = ("reference", "chunked", "tiled")


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    max_bytes: int | None,
    part: Part | None = None,
) -> LinearLogprob:
    compute = compute_dtype(hidden, weight, bias)
    part = part or vocab_parallel.whole(weight, bias)
    capacity = chunks.row_capacity(
        OP, max_bytes, hidden.device, part.largest, weight.shape[1], compute.itemsize, 1,
        bool(part.group),
    )  # fmt: skip
    recording = torch.is_grad_enabled()
    to_weight = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    out = HeadPass(
        *head_pass(
            hidden.detach()[None, :][:0],  # no student layers
            hidden,
            weight,
            bias,
            labels=labels,
            factor=None,
            final_factor=None,
            **NO_POLICY,
            divergence="jsd",
            beta=0.5,
            temperature=float(temperature),
            final_temperature=float(temperature),
            softcap=None if logit_softcap is None else float(logit_softcap),
            capacity=capacity,
            drop=False,
            reduce=False,
            hidden_grad=False,
            final_grad=recording and hidden.requires_grad and not to_weight,
            hidden_weight_grad=False,
            final_weight_grad=False,
            hidden_later=False,
            final_later=to_weight,
            stats=True,
            group=part.group,
            start=part.start,
        )
    )
    return LinearLogprob(out.logprob, out.final_entropy, out.logsumexp)


def _tiled(*inputs: Tensor, **options: Any) -> LinearLogprob:
    from oisd_kernels.lens.tiled.op import (
        linear_logprob_tiled,  # triton is not to be had on every CPU
    )

    return linear_logprob_tiled(*inputs, **options)


# In order of preference: "auto" takes the first. Each takes every argument but `impl`.
IMPLEMENTATIONS: dict[str, Callable[..., LinearLogprob]] = {
    "chunked": _chunked,
    "reference": reference.linear_logprob,
    "tiled": _tiled,
}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    impl: str = "auto",
    max_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> LinearLogprob:
    """Log-probability, entropy and logsumexp of `hidden @ weight.T`, per row.

    Args:
        hidden: [N, D]. Receives gradient through `logprob`, as `weight` and `bias` do.
        weight: [V, D], the unembedding.
        labels: [N] int64 in [0, V). Checked for CPU tensors only, since it would stall an
            accelerator. There is no ignored label: leave such rows out, or weight them by 0.
        bias: [V].
        temperature: divides the logits, above 0.
        logit_softcap: c of c * tanh(logits / c), above 0, applied before the temperature.
        impl: "chunked", which "auto" takes: a chunk of tokens at a time, 2 matmuls of 2*N*D*V with
            gradient to `hidden`, 4 with gradient to `weight` or `bias`, whose backward computes the
            logits again. Its gradient cannot be differentiated. "reference": all logits in memory,
            plain autograd. "tiled": projection and log-prob in one Triton kernel, no logits in
            memory whatever N and V, 3 matmuls with gradient to `hidden`, 4 with a float32 `weight`
            besides, 5 with one in half precision; an error on a CPU.
        max_bytes: workspace budget of "chunked" and "tiled" in bytes, beside inputs, outputs and
            their gradients. Default for "chunked" 1.25 GiB on CUDA, 96 MiB on a CPU, or one token
            where that is more; for "tiled" 32 MiB.
        tp_group: the process group that has the vocabulary in parts, see `logit_lens_divergence`;
            labels count from the first row of the first part.

    Returns:
        (logprob, entropy, logsumexp), each [N] in nats; float32, or float64 if hidden, weight or
        bias is. `entropy` and `logsumexp` are detached: no gradient passes through them.

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: the log-probability in the policy ratio of GRPO (Shao et al., arXiv 2402.03300, eq. 3).
    """
    checks.check_dims(OP, "hidden", hidden, {2: "[N, D]"})
    checks.check_tensor(OP, "hidden", hidden, "[N, D]", hidden.shape)
    checks.check_tensor(
        OP,
        "labels",
        labels,
        "[N]",
        hidden.shape[:1],
        dtypes=checks.INDEX_DTYPES,
        device=hidden.device,
    )
    checks.check_positive(OP, "temperature", temperature)
    checks.check_positive(OP, "logit_softcap", logit_softcap, optional=True)
    checks.check_count(OP, "max_bytes", max_bytes)
    run = checks.choose(OP, impl, IMPLEMENTATIONS, NAMES)
    part = vocab_parallel.part(OP, hidden, weight, bias, tp_group, True)
    remedy = "leave rows without a label out, or weight them by 0"
    checks.check_values(OP, "labels", labels, 0, part.vocabulary, remedy)
    return vocab_parallel.bind(OP, impl, run, part)(
        hidden,
        part.weight,
        labels,
        bias=part.bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        max_bytes=max_bytes,
    )
