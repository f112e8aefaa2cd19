"""Tiny random causal language models, one per architecture, for tests that need a whole model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2ForCausalLM, PreTrainedModel

VOCAB = 101
LAYERS = 4
WINDOW = 5
SDPA_REFUSES_SOFTCAPS = not Gemma2ForCausalLM._supports_sdpa  # transformers itself, as 5.24 does

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    # Wide enough that attention and logits are far from uniform.
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)

# What each architecture adds to _COMMON; the key is the model_type where "type" is absent.
TINY: dict[str, dict[str, Any]] = {
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(),
    "llama": dict(),
    "mistral": dict(sliding_window=WINDOW),
    # SDPA drops the softcap of the attention scores, so that Gemma 2 needs eager attention.
    "gemma2": dict(
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
        attn_implementation="eager",
    ),
    "gemma3": dict(
        type="gemma3_text",
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        query_pre_attn_scalar=16,
    ),
    "olmo2": dict(),
    "phi3": dict(sliding_window=WINDOW),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=7.0, attention_multiplier=0.5),
    # Learned attention sinks, in both kinds of layers. Other experts take no float64.
    "gpt_oss": dict(
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        num_local_experts=3,
        num_experts_per_tok=2,
        attn_implementation="eager",
        experts_implementation="eager",
    ),
}


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of architecture `name` in float32 and training mode; the global RNG is kept.

    `overrides` go to its configuration, `attn_implementation` and `dtype` included. The norms'
    weights are random too, so that a test sees whether a norm is applied and who trains it.
    """
    options = {**_COMMON, **TINY[name], **overrides}
    model_type = options.pop("type", name)
    names = "attn_implementation", "experts_implementation", "dtype"
    load = {key: options.pop(key) for key in names if key in options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **options)
        model = AutoModelForCausalLM.from_config(config, **load)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()
