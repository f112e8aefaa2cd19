"""Log-probability of each row's label under the unembedding, with entropy and logsumexp beside it.

    z = cap(hidden @ weight.T + bias) / temperature
    logsumexp = log sum_v exp(z_v),  logprob = z_label - logsumexp,  entropy = -<q, log q>,
    q = softmax(z)

cap(z) = c * tanh(z / c) where logit_softcap = c is given, else z.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked.head_pass import head_pass
from oisd_kernels.lens.chunked.record import HeadCall, HeadResult
from oisd_kernels.op import untransformed
from oisd_kernels.reference import LinearLogprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_logprob"
IMPLEMENTATIONS = ("auto", "chunked", "reference", "tiled")


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
            accelerator. There is no ignored label: leave such rows out, or label them 0
            and weight them by 0 in the loss.
        bias: [V].
        temperature: divides the logits, above 0.
        logit_softcap: c of c * tanh(logits / c), applied before the temperature; at least 0.01, and
            0.01 of the temperature. In float32 "chunked" knows its slope to about 1e-6 of
            temperature / c, which counts where most logits are far beyond c.
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

    A label that `bias` masks by -inf has the log-probability -inf, and its gradient is that of
    torch's log_softmax: W_label - E_q[W] to `hidden`. So it is for a bias below -1e29.

    All float dtypes may be mixed; the computation is in the dtype of the result, autocast or not.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: the log-probability in the policy ratio of GRPO (Shao et al., arXiv 2402.03300, eq. 3).
    """
    checks.check_rows(OP, "hidden", hidden)
    checks.check_labels(OP, labels, hidden)
    checks.check_positive(OP, "temperature", temperature)
    checks.check_softcap(OP, "logit_softcap", logit_softcap, temperature)
    checks.check_count(OP, "max_bytes", max_bytes)
    checks.check_choice(OP, "impl", impl, IMPLEMENTATIONS)
    part = vocab_parallel.part(OP, hidden, weight, bias, tp_group, True)
    checks.check_label_values(OP, labels, part.vocabulary)
    part.check_impl(OP, impl)
    if impl == "reference":
        return reference.linear_logprob(
            hidden, part.weight, labels, bias=part.bias, temperature=temperature,
            logit_softcap=logit_softcap,
        )  # fmt: skip
    if impl == "tiled":
        # Triton may be missing on CPU-only machines.
        from oisd_kernels.lens.tiled import op as tiled

        tiled.check(OP, hidden, checks.compute_dtype(hidden, part.weight, part.bias))
        call = tiled.LogprobCall(
            hidden, part.weight, part.bias, labels, temperature, logit_softcap, max_bytes
        )
        return LinearLogprob(*tiled.tiled_logprob(*untransformed(call)))
    call = HeadCall(
        hidden.detach()[None, :][:0],  # no student layers
        hidden, part.weight, part.bias, labels=labels, temperature=temperature,
        final_temperature=temperature, softcap=logit_softcap, stats=True,
    ).complete(OP, part, max_bytes, False)  # fmt: skip
    out = HeadResult(*head_pass(*untransformed(call)))
    return LinearLogprob(out.logprob, out.final_entropy, out.logsumexp)
