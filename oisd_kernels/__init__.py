"""Fused losses for self-distillation inside a language model; depends on torch and triton alone.

Each op has a readable twin in `oisd_kernels.reference`, reached with `impl="reference"`. The losses
of Liger Kernel and TRL, under their names, are in `oisd_kernels.drop_in`.
"""

from oisd_kernels.attention.divergence import attention_divergence
from oisd_kernels.attention.flash import AttentionAlignment, flash_attention
from oisd_kernels.lens.distillation import distillation_divergence
from oisd_kernels.lens.linear_logprob import linear_logprob
from oisd_kernels.lens.logit_lens import logit_lens_divergence
from oisd_kernels.lens.policy_head import PolicyHead, policy_head
from oisd_kernels.lens.policy_loss import PolicyTerms
from oisd_kernels.reference import LensStats, LinearLogprob

__all__ = [
    "AttentionAlignment",
    "LensStats",
    "LinearLogprob",
    "PolicyHead",
    "PolicyTerms",
    "attention_divergence",
    "distillation_divergence",
    "flash_attention",
    "linear_logprob",
    "logit_lens_divergence",
    "policy_head",
]
