#!/usr/bin/env bash
# Two causal models of transformers 5.10.4 are not causal unless their attention is eager.
#
# In a causal model, the logits of a prefix do not depend on the tokens after it. GLM-MoE-DSA and
# Doge break this under SDPA, which is the default: twelve tokens more change the logits of the
# twelve before them. Nothing warns. Log-probabilities of a whole text then see the answer, while
# generation, token by token, does not. `attn_implementation="eager"` is right.
#
# Seen with transformers 5.10.4, torch 2.13.0 (CPU), Python 3.11, tiny random models:
#   llama        sdpa   change 8.9e-08, logits up to 0.39
#   glm_moe_dsa  sdpa   change 3.2e-02, logits up to 0.42
#   doge         sdpa   change 7.5e-02, logits up to 0.37
#   all three    eager  change 6.0e-08 or less
# transformers 5.24.0 has it right: every change is 8.9e-08 or less there.
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.10.4 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, pad_token_id=None,
)
KINDS = {
    "llama": dict(num_key_value_heads=2),
    "glm_moe_dsa": dict(
        num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, index_head_dim=16, index_n_heads=2, index_topk=64,
    ),
    "doge": dict(num_key_value_heads=2),
}


def apart(kind, attention):
    """Largest change of the first 12 tokens' logits when 12 more tokens follow them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    ids = torch.randint(1, 64, (1, 24))
    with torch.no_grad():
        whole, prefix = model(input_ids=ids).logits[:, :12], model(input_ids=ids[:, :12]).logits
    change, size = (whole - prefix).abs().max().item(), prefix.abs().max().item()
    used = model.config._attn_implementation
    print(f"{kind:12} {used:6} change {change:.1e}, logits up to {size:.2f}")
    return change


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
by_default = {kind: apart(kind, None) for kind in KINDS}
eager = {kind: apart(kind, "eager") for kind in KINDS}
same = (
    by_default["llama"] < 1e-6 and max(eager.values()) < 1e-6
    and by_default["glm_moe_dsa"] > 0.01 and by_default["doge"] > 0.01
)
sys.exit(0 if same else 1)
PYTHON
