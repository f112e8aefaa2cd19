#!/usr/bin/env bash
# The last of `output_hidden_states` is not what every model's unembedding reads.
#
# In most decoders `hidden_states[-1]` is the output of the final norm, and the unembedding turns it
# into the logits. A logit lens or a distillation loss on hidden states relies on that. MiniCPM3
# divides by hidden_size / dim_model_base on the way, ModernBERT's decoder has a dense layer with a
# norm there, and Gemma 3n returns its four streams, a tensor with one dimension more, which it
# merges only afterwards. A pre-hook on `get_output_embeddings()` gets the true input in each.
#
# Seen with transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11, tiny random models:
#   qwen3              hidden_states[-1] [1, 12, 64], relative distance to the head's input 0.00
#   minicpm3           hidden_states[-1] [1, 12, 64], relative distance to the head's input 3.00
#   modernbert-decoder hidden_states[-1] [1, 12, 64], relative distance to the head's input 1.41
#   gemma3n_text       hidden_states[-1] [4, 1, 12, 64], head's input [1, 12, 64]
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, head_dim=16, pad_token_id=0,
)
KINDS = {
    "qwen3": {},
    "minicpm3": dict(
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
        dim_model_base=16,
    ),
    "modernbert-decoder": {},
    "gemma3n_text": dict(
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2, intermediate_size=[96] * 2,
        layer_types=["full_attention"] * 2,
    ),
}


def compare(kind):
    """Relative distance of hidden_states[-1] from the head's input; None if shapes differ."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    given = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: given.append(args[0]))
    with torch.no_grad():
        out = model(input_ids=torch.arange(1, 13)[None], output_hidden_states=True)
    last = out.hidden_states[-1]
    off = None
    if last.shape == given[0].shape:
        off = ((last - given[0]).norm() / given[0].norm()).item()
    print(f"{kind:18} hidden_states[-1] {list(last.shape)}, head's input {list(given[0].shape)}, "
          f"relative distance {'-' if off is None else format(off, '.2f')}")
    return off


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
off = {kind: compare(kind) for kind in KINDS}
same = (
    off["qwen3"] == 0 and abs(off["minicpm3"] - 3) < 1e-3 and off["modernbert-decoder"] > 0.5
    and off["gemma3n_text"] is None
)
sys.exit(0 if same else 1)
PYTHON
