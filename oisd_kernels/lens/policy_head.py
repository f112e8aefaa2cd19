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
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from oisd_kernels import checks, reference
from oisd_kernels.lens import vocab_parallel
from oisd_kernels.lens.chunked.head_pass import head_pass
from oisd_kernels.lens.chunked.record import HeadCall, HeadResult, policy_fields
from oisd_kernels.lens.logit_lens import lens_stats
from oisd_kernels.lens.policy_loss import PolicyTerms, policy_loss
from oisd_kernels.lens.token_weight import row_weight
from oisd_kernels.op import untransformed
from oisd_kernels.reference import LensStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "policy_head"
IMPLEMENTATIONS = ("auto", "chunked", "reference")


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
            matmul. The log-probability is computed for every token. None without `student_hidden`.
        divergence, beta, logit_softcap, grad_weight: of `logit_lens_divergence`.
        temperature: of the log-probability.
        lens_temperature: of the divergence. None: as `temperature`.
        policy: `PolicyTerms`, [N] each, which are taken in the dtype of the results and receive no
            gradient.
        impl: "chunked", which "auto" takes, or "reference" (all logits in memory).
        max_bytes: workspace budget of "chunked" in bytes.
        tp_group: the process group that has the vocabulary in parts, see `logit_lens_divergence`;
            labels count from the first row of the first part.

    Returns:
        `PolicyHead`; float32, or float64 if hidden states or the unembedding are. In `stats`,
        `teacher_entropy` is that of tokens with a student row, at the divergence's temperature;
        what it holds for the others depends on `impl`. A label that `bias` masks is as in
        `linear_logprob`; with `policy`, its loss is not finite.

    Raises:
        ValueError: a shape, dtype, device or value is not as above.

    Source: arXiv 2605.29089, eq. 6 and 7; arXiv 2402.03300, eq. 3.
    """
    checks.check_rows(OP, "hidden_final", hidden_final)
    checks.check_labels(OP, labels, hidden_final)
    if student_hidden is None:
        if token_weight is not None:
            got = type(token_weight).__name__
            raise checks.argument_error(OP, "token_weight", "be None without student_hidden", got)
        student_hidden = hidden_final.detach()[None][:0]
    checks.check_layers(OP, "student_hidden", student_hidden, hidden_final)
    checks.check_token_weight(OP, token_weight, student_hidden)
    checks.check_divergence(OP, divergence, beta)
    checks.check_positive(OP, "temperature", temperature)
    checks.check_positive(
        OP, "lens_temperature", lens_temperature, optional=True, none="None takes `temperature`"
    )
    if policy is not None:
        _check_policy(policy, hidden_final)
    checks.check_softcap(OP, "logit_softcap", logit_softcap, temperature, lens_temperature)
    checks.check_flag(OP, "grad_weight", grad_weight)
    checks.check_count(OP, "max_bytes", max_bytes)
    checks.check_choice(OP, "impl", impl, IMPLEMENTATIONS)
    part = vocab_parallel.part(OP, hidden_final, weight, bias, tp_group, True)
    checks.check_label_values(OP, labels, part.vocabulary)
    part.check_impl(OP, impl)
    if lens_temperature is None:
        lens_temperature = temperature
    compute = checks.compute_dtype(hidden_final, student_hidden, part.weight, part.bias)
    if impl == "reference":
        final, unembedding = hidden_final.to(compute), part.weight.to(compute)
        head: dict[str, Any] = {"bias": part.bias, "logit_softcap": logit_softcap}
        token = reference.linear_logprob(
            final, unembedding, labels, temperature=temperature, **head
        )
        loss = token.logprob.new_zeros(())
        if policy is not None:
            loss = policy_loss(token.logprob, policy.constants(compute)).loss.sum()
            token = token._replace(logprob=token.logprob.detach())
        lens = reference.logit_lens_divergence(
            student_hidden, final.detach(), unembedding, token_weight=token_weight,
            divergence=divergence, beta=beta, temperature=lens_temperature,
            grad_weight=grad_weight, return_stats=True, **head,
        )  # fmt: skip
        assert isinstance(lens, tuple)
        return PolicyHead(*token, *lens, loss)
    layers = student_hidden if student_hidden.dim() == 3 else student_hidden[None]
    call = HeadCall(
        layers, hidden_final, part.weight, part.bias, labels=labels,
        factor=row_weight(token_weight, layers, compute) if len(layers) > 0 else None,
        divergence=divergence, beta=beta, temperature=lens_temperature,
        final_temperature=temperature, softcap=logit_softcap, stats=True,
        **policy_fields(policy),
    ).complete(OP, part, max_bytes, grad_weight)  # fmt: skip
    out = HeadResult(*head_pass(*untransformed(call)))
    divergences = out.loss.view(student_hidden.shape[:-1])
    stats = lens_stats(out, student_hidden)
    return PolicyHead(
        out.logprob, out.final_entropy, out.logsumexp, divergences, stats, out.policy_loss
    )


def _check_policy(policy: Any, hidden: Tensor) -> None:
    if not isinstance(policy, PolicyTerms):
        raise checks.argument_error(OP, "policy", "be PolicyTerms", type(policy).__name__)
    for name in ("advantage", "weight", "old_logprob", "rollout_logprob", "ref_logprob"):
        x = getattr(policy, name)
        if x is not None or name in ("advantage", "weight"):
            sizes, device = hidden.shape[:1], hidden.device
            checks.check_tensor(OP, f"policy.{name}", x, "[N]", sizes, device=device)
    for name in ("clip_low", "clip_high"):
        checks.check_above(OP, f"policy.{name}", getattr(policy, name), 0, least=True)
    if policy.dual_clip is not None:
        checks.check_above(OP, "policy.dual_clip", policy.dual_clip, 1)
    checks.check_above(OP, "policy.tis_cap", policy.tis_cap, 0)
    checks.check_above(OP, "policy.kl_coef", policy.kl_coef, 0, least=True)
    if policy.kl_coef == math.inf:
        raise checks.argument_error(OP, "policy.kl_coef", "be finite", policy.kl_coef)
