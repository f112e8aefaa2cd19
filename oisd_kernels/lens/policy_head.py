"""Everything that OISD needs of the unembedding, in one pass over it.

    z = cap(hidden_final @ weight.T + bias) / temperature,  p = softmax(z)
    logprob = log p_label, entropy, logsumexp       as `linear_logprob` of hidden_final
    divergence                                      as `logit_lens_divergence` of student_hidden,
                                                    with p, detached, as the teacher

    policy_loss = sum_n of `oisd_kernels.lens.policy_loss`, where its terms are given

The final logits are computed once for all. With G = one 2*N*D*V matmul: 1 + S G for values, 2 + 2S
with gradients to both hidden states, 3 + 2S where `weight` receives the policy loss's gradient,
4 + 2S where it receives a gradient through the log-probability that only the backward knows: then
the final logits are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.checks import compute_dtype
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked import chunks
from oisd_kernels.lens.chunked.head_loop import HeadPass
from oisd_kernels.lens.chunked.head_pass import NO_POLICY, head_pass
from oisd_kernels.lens.policy_loss import PolicyTerms, policy_loss
from oisd_kernels.lens.vocab_parallel import Part
from oisd_kernels.reference import LensStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "policy_head"
NAMES = ("reference", "chunked")


class PolicyHead(NamedTuple):
    """In nats. Gradient passes through `divergence`, and through `policy_loss` where its terms are
    given, else through `logprob`."""

    logprob: Tensor  # [N]
    entropy: Tensor  # [N]
    logsumexp: Tensor  # [N]
    divergence: Tensor  # [S, N], multiplied by the weight
    stats: LensStats
    policy_loss: Tensor  # [], a sum over tokens; 0 without terms


def policy_head(
    hidden_final: Tensor,
    weight: Tensor,
    labels: Tensor,
    student_hidden: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: str = "jsd",
    beta: float = 0.5,
    temperature: float = 1.0,
    lens_temperature: float | None = None,
    logit_softcap: float | None = None,
    grad_weight: bool = False,
    policy: PolicyTerms | None = None,
    impl: str = "auto",
    max_bytes: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> PolicyHead:
    """`linear_logprob` and `logit_lens_divergence` in one, the final layer's logits computed once.

    With `policy` also the loss of GRPO, so that one forward computes the gradients of both losses,
    the unembedding's among them.

    Args:
        hidden_final: [N, D], final hidden state after the final norm. Receives gradient through
            `logprob` or `policy_loss`, none through the divergence, whose teacher it is.
        weight: [V, D], the unembedding. Receives gradient through `logprob` or `policy_loss`;
            through the divergence with `grad_weight`.
        labels: [N] int64 in [0, V), checked for CPU tensors only.
        student_hidden: [S, N, D] or [N, D], after the final norm; None for the log-probability
            alone, with S = 0 in the results.
        bias: [V].
        token_weight: [N] or [S, N], weight of the divergence; its zero rows are dropped before any
            matmul. The log-probability is computed for every token.
        divergence, beta, logit_softcap, grad_weight: of `logit_lens_divergence`.
        temperature: of the log-probability.
        lens_temperature: of the divergence. None: as `temperature`.
        policy: terms of the policy loss, [N] each; they receive no gradient.
        impl: "chunked", which "auto" takes, or "reference" (all logits in memory).
        max_bytes: workspace budget of "chunked" in bytes.
        tp_group: the process group that has the vocabulary in parts, see `logit_lens_divergence`;
            labels count from the first row of the first part.

    Returns:
        `PolicyHead`; float32, or float64 if an input is. In `stats`, `teacher_entropy` is that of
        tokens with a student row, at the divergence's temperature; what it holds for the others
        depends on `impl`.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: arXiv 2605.29089, eq. 6 and 7; arXiv 2402.03300, eq. 3.
    """
    checks.check_dims(OP, "hidden_final", hidden_final, {2: "[N, D]"})
    checks.check_tensor(OP, "hidden_final", hidden_final, "[N, D]", hidden_final.shape)
    tokens, width = hidden_final.shape
    device = hidden_final.device
    integer = checks.INDEX_DTYPES
    checks.check_tensor(OP, "labels", labels, "[N]", (tokens,), dtypes=integer, device=device)
    if student_hidden is None:
        student_hidden = hidden_final.detach().new_zeros(0, tokens, width)
        token_weight = None
    checks.check_dims(OP, "student_hidden", student_hidden, {2: "[N, D]", 3: "[S, N, D]"})
    *layers, _, _ = student_hidden.shape
    layout = "[S, N, D]" if layers else "[N, D]"
    sizes = (*layers, tokens, width)
    checks.check_tensor(OP, "student_hidden", student_hidden, layout, sizes, device=device)
    if token_weight is not None:
        checks.check_dims(OP, "token_weight", token_weight, {1: "[N]", 2: "[S, N]"})
        per_layer = bool(layers) and token_weight.dim() == 2
        layout, sizes = ("[S, N]", (*layers, tokens)) if per_layer else ("[N]", (tokens,))
        checks.check_tensor(OP, "token_weight", token_weight, layout, sizes, device=device)
    checks.check_divergence(OP, divergence, beta)
    checks.check_positive(OP, "temperature", temperature)
    checks.check_positive(OP, "lens_temperature", lens_temperature, optional=True)
    if policy is not None:
        _check_policy(policy, tokens, device)
    checks.check_positive(OP, "logit_softcap", logit_softcap, optional=True)
    checks.check_flag(OP, "grad_weight", grad_weight)
    checks.check_count(OP, "max_bytes", max_bytes)
    run = checks.choose(OP, impl, IMPLEMENTATIONS, NAMES)
    part = vocab_parallel.part(OP, hidden_final, weight, bias, tp_group, True)
    remedy = "leave rows without a label out, or weight them by 0"
    checks.check_values(OP, "labels", labels, 0, part.vocabulary, remedy)
    return vocab_parallel.bind(OP, impl, run, part)(
        hidden_final,
        part.weight,
        labels,
        student_hidden,
        bias=part.bias,
        token_weight=token_weight,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        lens_temperature=temperature if lens_temperature is None else lens_temperature,
        logit_softcap=logit_softcap,
        grad_weight=grad_weight,
        policy=policy,
        max_bytes=max_bytes,
    )


def _check_policy(policy: PolicyTerms, tokens: int, device: torch.device) -> None:
    for name, x in policy._asdict().items():
        if isinstance(x, Tensor):
            checks.check_tensor(OP, f"policy.{name}", x, "[N]", (tokens,), device=device)
    checks.check_positive(OP, "policy.dual_clip", policy.dual_clip, optional=True)


def _chunked(
    hidden_final: Tensor,
    weight: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    *,
    bias: Tensor | None,
    token_weight: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    lens_temperature: float,
    logit_softcap: float | None,
    grad_weight: bool,
    policy: PolicyTerms | None,
    max_bytes: int | None,
    part: Part | None = None,
) -> PolicyHead:
    compute = compute_dtype(hidden_final, student_hidden, weight, bias)
    part = part or vocab_parallel.whole(weight, bias)
    capacity = chunks.row_capacity(
        OP, max_bytes, weight.device, part.largest, weight.shape[1], compute.itemsize, 2,
        bool(part.group),
    )  # fmt: skip
    rows = student_hidden.shape[:-1]
    layers = student_hidden if student_hidden.dim() == 3 else student_hidden[None]
    factor = None
    if token_weight is not None and len(layers) > 0:
        factor = token_weight.detach().to(compute).expand(layers.shape[:-1])
    recording = torch.is_grad_enabled()
    to_weight = recording and (weight.requires_grad or (bias is not None and bias.requires_grad))
    student_later = to_weight and grad_weight
    final_later = to_weight and policy is None
    out = HeadPass(
        *head_pass(
            layers,
            hidden_final,
            weight,
            bias,
            labels=labels,
            factor=factor,
            final_factor=None,
            **_policy_arguments(policy),
            divergence=divergence,
            beta=float(beta),
            temperature=float(lens_temperature),
            final_temperature=float(temperature),
            softcap=None if logit_softcap is None else float(logit_softcap),
            capacity=capacity,
            drop=factor is not None,
            reduce=False,
            hidden_grad=recording and student_hidden.requires_grad and not student_later,
            final_grad=recording and hidden_final.requires_grad and not final_later,
            hidden_weight_grad=False,
            final_weight_grad=to_weight and not final_later,
            hidden_later=student_later,
            final_later=final_later,
            stats=True,
            group=part.group,
            start=part.start,
        )
    )
    stats = LensStats(
        out.student_entropy.view(rows),
        out.teacher_entropy,
        out.agreement.view(rows),
        out.divergence.view(rows),
    )
    return PolicyHead(
        out.logprob,
        out.final_entropy,
        out.logsumexp,
        out.loss.view(rows),
        stats,
        out.policy_loss,
    )


def _policy_arguments(policy: PolicyTerms | None) -> dict[str, Any]:
    if policy is None:
        return NO_POLICY
    dual_clip = math.inf if policy.dual_clip is None else policy.dual_clip
    options = policy.clip_low, policy.clip_high, dual_clip, policy.tis_cap, policy.kl_coef
    return {
        "advantage": policy.advantage,
        "loss_weight": policy.weight,
        "old_logprob": policy.old_logprob,
        "rollout_logprob": policy.rollout_logprob,
        "ref_logprob": policy.ref_logprob,
        "policy_options": [float(x) for x in options],
    }


def _reference(
    hidden_final: Tensor,
    weight: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    lens_temperature: float,
    logit_softcap: float | None,
    policy: PolicyTerms | None,
    max_bytes: int | None,
    **lens: Any,
) -> PolicyHead:
    del max_bytes
    head: dict[str, Any] = {"bias": bias, "logit_softcap": logit_softcap}
    out = reference.linear_logprob(hidden_final, weight, labels, temperature=temperature, **head)
    loss = out.logprob.new_zeros(())
    if policy is not None:
        loss = policy_loss(out.logprob, policy).loss.sum()
        out = out._replace(logprob=out.logprob.detach())
    result = reference.logit_lens_divergence(
        student_hidden,
        hidden_final.detach(),
        weight,
        return_stats=True,
        temperature=lens_temperature,
        **head,
        **lens,
    )
    assert isinstance(result, tuple)
    return PolicyHead(*out, *result, loss)


# In order of preference: "auto" takes the first.
IMPLEMENTATIONS: dict[str, Callable[..., PolicyHead]] = {
    "chunked": _chunked,
    "reference": _reference,
}
