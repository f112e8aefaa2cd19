#!/usr/bin/env bash
# Texts packed with `position_ids` see each other, unless there is neither a cache nor a mask.
#
# Positions that start again at 0 tell transformers where a text begins, and the second of two
# packed texts should get the logits that it has alone. They are looked at only if no attention mask
# is given, even one of ones, and no cache is made. Making one is the default, in training mode
# too; the Trainer turns it off. So the same batch is separated in one place and joined in another,
# without a warning. Eager gpt-oss joins texts always, and Bamba's state-space layers do.
#
# Seen with transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11, tiny random models; change of the
# second text's logits:
#   qwen3, use_cache=False                change 6.0e-08, logits up to 0.34
#   qwen3, use_cache=False, mask of ones  change 1.8e-01, logits up to 0.34
#   qwen3, as it comes                    change 1.8e-01, logits up to 0.34
#   gpt_oss, eager, use_cache=False       change 1.1e-01, logits up to 0.31
#   bamba, use_cache=False                change 7.0e-02, logits up to 0.38
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

transformers.logging.set_verbosity_error()  # fast kernels that are not installed
torch.set_num_threads(1)
torch.set_grad_enabled(False)
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
)
KINDS = {
    "qwen3": {},
    "gpt_oss": dict(
        num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "bamba": dict(
        attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=1,
    ),
}


def change(name, kind, **options):
    """Largest change of the second text's logits when it is packed behind the first."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    first, second = torch.randint(1, 64, (2, 1, 6))
    packed, positions = torch.cat([first, second], 1), torch.arange(6).repeat(2)[None]
    alone = model(input_ids=second, use_cache=False).logits
    behind = model(input_ids=packed, position_ids=positions, **options).logits[:, 6:]
    apart = (behind - alone).abs().max().item()
    print(f"{name:37} change {apart:.1e}, logits up to {alone.abs().max():.2f}")
    return apart


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
ones = torch.ones(1, 12, dtype=torch.long)
bare = change("qwen3, use_cache=False", "qwen3", use_cache=False)
masked = change(
    "qwen3, use_cache=False, mask of ones", "qwen3", use_cache=False, attention_mask=ones
)
cached = change("qwen3, as it comes", "qwen3")
sinks = change("gpt_oss, eager, use_cache=False", "gpt_oss", use_cache=False)
state = change("bamba, use_cache=False", "bamba", use_cache=False)
same = bare < 1e-6 and min(masked, cached, sinks, state) > 0.01
sys.exit(0 if same else 1)
PYTHON
