#!/usr/bin/env bash
# TRL's `disable_dropout` leaves dropout on where a model applies it by a rate of its config.
#
# GRPOConfig has `disable_dropout=True`, which calls `disable_dropout_in_model`: it sets the rate of
# each torch.nn.Dropout to 0. Llama's kind of model has no such module. Its attention takes the rate
# from `config.attention_dropout` at each forward, so log-probabilities of one and the same text
# still differ between two forwards. Seed-OSS has that rate at 0.1 by default.
#
# Seen with trl 1.16.0, transformers 5.10.4, torch 2.13.0 (CPU), Python 3.11:
#   seed_oss, as it comes:      two forwards differ by 0.08 nats; modules of torch.nn.Dropout: 0
#   llama, attention_dropout 0: they are the same
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.10.4 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
import trl
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import disable_dropout_in_model

torch.set_num_threads(1)
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)


def look(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES)
    model = AutoModelForCausalLM.from_config(config).train()
    disable_dropout_in_model(model)
    modules = sum(isinstance(m, torch.nn.Dropout) for m in model.modules())
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        first, second = (model(input_ids=ids).logits.log_softmax(-1) for _ in range(2))
    apart = (first - second).abs().max().item()
    print(f"{kind}: attention_dropout {config.attention_dropout}, {modules} Dropout modules, "
          f"two forwards differ by {apart:.3f} nats")
    return config.attention_dropout, modules, apart


print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
rate, modules, apart = look("seed_oss")
_, _, without = look("llama")
same = rate == 0.1 and modules == 0 and apart > 0.01 and without == 0
sys.exit(0 if same else 1)
PYTHON
