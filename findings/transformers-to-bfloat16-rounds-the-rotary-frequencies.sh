#!/usr/bin/env bash
# `model.to(torch.bfloat16)` is not the model that `from_pretrained(dtype=torch.bfloat16)` returns.
#
# Both have the same bfloat16 weights. But `to` also rounds the buffers, among them the inverse
# frequencies of the rotary embedding, which `from_pretrained` keeps in float32. Rounding moves each
# by up to 0.4 %, and the angle by as much times the position: harmless in a short text, wrong in a
# long one. Going back to float32 does not repair them.
#
# Seen with transformers 5.10.4, torch 2.13.0 (CPU), Python 3.11, on a tiny random Llama (weights of
# standard deviation 0.2) and 4,096 tokens, both models computing in float32:
#   inverse frequencies: loaded torch.float32 cast torch.bfloat16
#   same weights: True; KL of the first 64 tokens 2.1e-05 nats, of the last 256 1.6e-01
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.10.4 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
import tempfile

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
TOKENS = 4096
torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
    max_position_embeddings=TOKENS,
)
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(1, 64, (1, TOKENS))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
cast = model.to(torch.bfloat16)
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("inverse frequencies: loaded", loaded.model.rotary_emb.inv_freq.dtype,
      "cast", cast.model.rotary_emb.inv_freq.dtype)
# Both go on in float32, so that the frequencies are all that differs.
loaded, cast = loaded.float(), cast.float()
pairs = zip(loaded.parameters(), cast.parameters(), strict=True)
weights = all(torch.equal(a, b) for a, b in pairs)
with torch.no_grad():
    logs = [m(input_ids=ids).logits[0].log_softmax(-1) for m in (loaded, cast)]
kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
early, late = kl[:64].mean().item(), kl[-256:].mean().item()
print(f"same weights: {weights}; KL of the first 64 tokens {early:.1e} nats, "
      f"of the last 256 {late:.1e}")
sys.exit(0 if weights and early < 1e-3 and late > 0.03 else 1)
PYTHON
