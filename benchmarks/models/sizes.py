"""A tiny configuration of each model type: small values by the names of fields, and by type.

Each model has 8 layers where its kind allows it, and weights wide enough that attention and logits
are far from uniform.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from oisd.models.dropout import set_dropout

LAYERS = 8

# Of any config that has a field of this name and a number in it.
FIELDS: dict[str, Any] = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    n_embd=64, n_layer=LAYERS, n_head=4, n_positions=128, n_ctx=128, n_inner=96,
    d_model=64, n_heads=4, n_layers=LAYERS, num_layers=LAYERS, num_heads=4, d_ff=96, d_kv=16,
    ffn_dim=96, ffn_hidden_size=96, ffn_size=96, max_seq_len=128, word_embed_proj_dim=64,
    embedding_size=64, decoder_layers=LAYERS, decoder_attention_heads=4, decoder_ffn_dim=96,
    attention_heads=4, attention_head_dim=16, attention_hidden_size=64, rotary_dim=8,
    # Experts.
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, moe_k=2, moe_topk=2,
    num_experts_per_tok=2, num_experts_per_token=2, n_shared_experts=1, num_shared_experts=1,
    moe_intermediate_size=48, num_expert_group=1,
    shared_expert_intermediate_size=48, moe_shared_expert_intermediate_size=48, n_group=1,
    topk_group=1, first_k_dense_replace=1, num_dense_layers=1, expert_ffn_hidden_size=48,
    zero_expert_num=1, moe_layer_start_index=1, moe_layer_end_index=3,
    # Latent attention, and selected keys.
    q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    index_n_heads=2, index_head_dim=16, index_topk=4, o_lora_rank=16,
    # Recurrent layers.
    mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_expand=2, mamba_num_heads=8,
    mamba_head_dim=16, ssm_state_size=8, state_size=8, n_mamba_heads=2, lru_width=64,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16, linear_head_dim=16, linear_num_heads=4,
    full_attention_interval=2, attention_hidden=64, head_size=16, mamba_chunk_size=8, chunk_size=8,
    # Gemma 3n and 4.
    vocab_size_per_layer_input=131, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
    laurel_rank=8, global_head_dim=16,
    # The rest.
    sliding_window=8, num_nextn_predict_layers=0, n_hash_layers=0, num_hash_layers=0,
    swa_num_attention_heads=4, swa_num_key_value_heads=2,
)  # fmt: skip

# Of vision and audio towers, which never run on text.
TOWERS: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, depth=2,
    num_heads=2, embed_dim=32, num_layers=2, encoder_layers=2, encoder_attention_heads=2,
    encoder_ffn_dim=48, d_model=32, num_global_layers=1, head_dim=16, num_key_value_heads=2,
    vocab_size=16, mlp_dim=48, num_blocks=2, attention_dim=32, linear_units=48,
)  # fmt: skip

_TEXT = ("text_config", "decoder", "thinker_config", "llm_config", "decoder_config")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = dict(num_key_value_heads=4)
_ASSISTANT = dict(
    model_type="gemma4_text", vocab_size=131, hidden_size=64, intermediate_size=96,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    global_head_dim=16, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
    num_kv_shared_layers=4, sliding_window=8, max_position_embeddings=128,
)  # fmt: skip

_EVERY_THIRD = ["linear_attention", "linear_attention", "full_attention"] * 2
_EVERY_THIRD += ["linear_attention"] * 2
# What a type needs besides; None leaves a field to the type.
TYPES: dict[str, dict[str, Any]] = {
    "blt": dict(
        patch_in_forward=False, encoder_hash_byte_group_vocab=64, max_position_embeddings=128,
        encoder_config=dict(hidden_size=64, num_attention_heads=4, hidden_size_global=64),
        decoder_config=dict(
            hidden_size=64, num_attention_heads=4, hidden_size_global=64, num_hidden_layers=LAYERS,
            intermediate_size=96,
        ),
        global_config=dict(
            hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=96
        ),
        patcher_config=dict(
            hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=96
        ),
    ),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE}
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=64, moe_top_k=2, hidden_size=64),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2, n_group=1, topk_group=1, head_dim=None),
    "dots3_note_audio_encoder": dict(
        adapter_input_size=32, adapter_out_dim=64, downsample_hidden_size=32
    ),
    "dots3_note_vision_encoder": dict(
        pyramid_num_routed=[0, 0], num_hidden_layers=2, adapter_in_dim=32, adapter_out_dim=64
    ),
    "dots3_note_text": dict(shared_experts_intermediate_size=48, num_hidden_layers=4),
    "dots1": dict(n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2),
    # Of hybrids, a layer that attends in each half.
    "bailing_hybrid": dict(layer_types=_EVERY_THIRD),
    "bamba": dict(attn_layer_indices=[2, 5]),
    "granitemoehybrid": dict(layer_types=_EVERY_THIRD),
    "jamba": dict(attn_layer_period=4, attn_layer_offset=2),
    "kimi_linear": dict(layer_types=_EVERY_THIRD),
    "nemotron_h": dict(
        layers_block_type=["mamba", "mlp", "attention"] * 2 + ["mamba", "mlp"],
        num_hidden_layers=None,
    ),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(intermediate_size=[96] * LAYERS),
    "gemma4_assistant": dict(text_config=_ASSISTANT, backbone_hidden_size=64),
    "gemma4_unified_assistant": dict(
        text_config=_ASSISTANT | {"model_type": "gemma4_unified_text"}, backbone_hidden_size=64
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], LAYERS // 2]], window_size=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * (LAYERS // 2)),
    "longcat_flash": dict(num_layers=LAYERS // 2, head_dim=8, num_key_value_heads=4),
    "mamba2": dict(num_heads=8, n_groups=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
        indexer_compress_ratio=4, hc_lowrank=16, heads_per_ngram=2, ngram_vocab_size_base=64,
        make_ngram_vocab_size_divisible_by=8, split_ngram_parts=2, ple_embed_dim=64,
    ),
    "reformer": dict(
        is_decoder=True, attn_layers=["local", "lsh"] * 2, axial_pos_embds=False, num_buckets=2,
        attention_head_size=16, feed_forward_size=96, local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
    ),
    "zamba": dict(attention_hidden_size=None, attention_head_dim=None, use_mamba_kernels=False),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * (LAYERS // 2)),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


# Types of the same mapping that encode, or need an encoder.
NOT_DECODERS = set(
    """bart beam bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert
    data2vec-text electra ernie git marian mbart megatron-bert musicgen musicgen_melody mvp pegasus
    plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm
    xlm-roberta xlm-roberta-xl xlnet xmod""".split()
)


def _names(config: Any) -> set[str]:
    names = set()
    for each in type(config).__mro__:
        names |= set(getattr(each, "__annotations__", {}))
        if "__init__" in vars(each):
            names |= set(inspect.signature(each.__init__).parameters)
    return names


def small(config: Any, fields: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a config's class: those of `fields` that it has a number for, and `asked`."""
    names, now = _names(config), config.to_dict()
    found = {
        name: value
        for name, value in fields.items()
        if name in names and name not in asked
        if isinstance(now.get(name), (int, float))
        or (now.get(name) is None and name in ("num_key_value_heads", "head_dim"))
    }
    if "kv_lora_rank" in names and "num_key_value_heads" in found:
        found |= {key: value for key, value in _LATENT.items() if key not in asked}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found |= {name: token for name, token in tokens.items() if name in now}
    if "initializer_range" in now:
        found["initializer_range"] = 0.2
    return found | {name: value for name, value in asked.items() if value is not None}


def _to_begin_with(model_type: str) -> dict[str, Any]:
    """What a type's config cannot be made without, whatever its sizes."""
    return TYPES[model_type] if model_type.endswith("assistant") else {}


def tiny_config(model_type: str, **settings: Any) -> Any:
    """The config of a type; raises whatever transformers does if the sizes do not fit."""
    base = AutoConfig.for_model(model_type, **_to_begin_with(model_type))
    asked = {**TYPES.get(model_type, {}), **settings}
    for name in getattr(type(base), "sub_configs", {}) or {}:
        part = getattr(base, name, None)
        if part is None or isinstance(part, dict) or name in asked:
            continue
        own = TYPES.get(part.model_type, {})
        fields = FIELDS if name in _TEXT else TOWERS
        asked[name] = {**small(part, fields, own), "model_type": part.model_type}
    return type(base)(**small(base, FIELDS, asked))


def _or_nothing(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A tower whose library is missing (Gemma 3n's needs timm) does nothing: text needs none."""

    def from_config(*arguments: Any, **options: Any) -> nn.Module:
        try:
            return make(*arguments, **options)
        except ImportError:
            return nn.Identity()

    return from_config


def tiny_model(config: Any, **options: Any) -> Any:
    """A random model in training mode without dropout, norms that are not all one."""
    torch.manual_seed(0)
    with mock.patch.object(AutoModel, "from_config", _or_nothing(AutoModel.from_config)):
        model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    set_dropout(model, 0.0)
    return model
