#!/usr/bin/env bash
# Asking Falcon for its attentions changes what it computes.
#
# `output_attentions=True` should only return more. Under SDPA, the default, Falcon then takes a
# path of its own. With rotary positions it adds the boolean causal mask to the scores, so that a
# forbidden key is at a disadvantage of 1 and no more: tokens see the future. With ALiBi it adds the
# bias twice, once by itself and once as part of the mask. Eager attention does the latter always,
# and has the rotary model right.
#
# Seen with transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11, tiny random models: how much
# twelve more tokens change the logits of the twelve before, and ALiBi's slopes, read from the
# attention of zero queries:
#   rotary, sdpa, without attentions: the future changes logits by 1.5e-07
#   rotary, sdpa, with attentions:    the future changes logits by 1.4e-01
#   rotary, eager, with attentions:   the future changes logits by 2.4e-07
#   ALiBi, sdpa, with attentions:     slopes 1.000, 0.500, 0.250; defined as 0.500, 0.250, 0.125
#   ALiBi, eager, with attentions:    slopes 1.000, 0.500, 0.250; defined as 0.500, 0.250, 0.125
#   ALiBi, sdpa, logits change by 6.8e-02 when attentions are asked for
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, FalconConfig

torch.set_num_threads(1)
torch.set_grad_enabled(False)
HEADS, WIDTH = 8, 8


def falcon(attention, alibi):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=HEADS * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        alibi=alibi, multi_query=False, parallel_attn=False,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def future(attention, attentions):
    """Largest change of the first 12 tokens' logits when 12 more tokens follow them."""
    model = falcon(attention, alibi=False)
    whole = model(input_ids=ids, output_attentions=attentions).logits[:, :12]
    prefix = model(input_ids=ids[:, :12], output_attentions=attentions).logits
    change = (whole - prefix).abs().max().item()
    name = f"rotary, {attention}, {'with' if attentions else 'without'} attentions:"
    print(f"{name:33} the future changes logits by {change:.1e}")
    return change


def slopes(attention):
    """ALiBi's slope of three heads: what attention prefers if all queries are 0."""
    model = falcon(attention, alibi=True)
    weight = model.transformer.h[0].self_attention.query_key_value.weight
    weight.view(HEADS, 3, WIDTH, -1)[:, 0] = 0
    last = model(input_ids=ids, output_attentions=True).attentions[0][0, :3, -1].log()
    found = ((last[:, -1] - last[:, -2]) * math.sqrt(WIDTH)).tolist()
    print(f"{f'ALiBi, {attention}, with attentions:':33} slopes "
          + ", ".join(f"{slope:.3f}" for slope in found) + "; defined as 0.500, 0.250, 0.125")
    return found


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
ids = torch.randint(1, 64, (1, 24), generator=torch.Generator().manual_seed(0))
plain, asked, eager = future("sdpa", False), future("sdpa", True), future("eager", True)
doubled = slopes("sdpa") + slopes("eager")
model = falcon("sdpa", alibi=True)
apart = model(input_ids=ids).logits - model(input_ids=ids, output_attentions=True).logits
apart = apart.abs().max().item()
print(f"ALiBi, sdpa, logits change by {apart:.1e} when attentions are asked for")
same = (
    plain < 1e-6 and eager < 1e-6 and asked > 0.01 and apart > 0.01
    and all(abs(a - b) < 1e-3 for a, b in zip(doubled, [1, 0.5, 0.25] * 2, strict=True))
)
sys.exit(0 if same else 1)
PYTHON
