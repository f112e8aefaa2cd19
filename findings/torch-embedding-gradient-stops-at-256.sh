#!/usr/bin/env bash
# On a CPU, the gradient of a bfloat16 embedding is added up in bfloat16, token by token.
#
# A sum or a matrix product of bfloat16 numbers is accumulated in float32 and rounded once. The
# backward pass of `nn.Embedding`, and of indexing a parameter by a tensor, adds one row after the
# other to a bfloat16 total instead, and rounds each time. Ones add up to 256 and no further. In a
# text of 16,384 tokens, the most frequent one (here 2,110 times) gets a gradient that is 5 % off if
# what comes back is noise, and 51 % off if it has a mean. `index_select` accumulates in float32.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   10,000 gradients of 1   nn.Embedding 256           weight[ids] 256       index_select 9984
#   noise of mean 0         nn.Embedding 4.8e-02 off   weight[ids] 4.8e-02   index_select 1.7e-03
#   noise of mean 1         nn.Embedding 5.1e-01 off   weight[ids] 5.1e-01   index_select 2.2e-03
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn.functional import embedding

torch.set_num_threads(1)
torch.manual_seed(0)
WAYS = {
    "nn.Embedding": lambda weight, ids: embedding(ids, weight),  # what the module calls
    "weight[ids]": lambda weight, ids: weight[ids],
    "index_select": lambda weight, ids: weight.index_select(0, ids),
}


def gradient(way, ids, upstream, rows):
    weight = torch.zeros(rows, upstream.shape[1], dtype=torch.bfloat16, requires_grad=True)
    WAYS[way](weight, ids).backward(upstream)
    return weight.grad.double()


print(f"torch {torch.__version__}")
ids, ones = torch.zeros(10_000, dtype=torch.long), torch.ones(10_000, 1, dtype=torch.bfloat16)
sums = {way: gradient(way, ids, ones, 1).item() for way in WAYS}
print("10,000 gradients of 1  ", sums)
rows, tokens, width = 1000, 16_384, 64
frequency = 1 / torch.arange(1, rows + 1.0)  # Zipf's law
ids = torch.multinomial(frequency / frequency.sum(), tokens, replacement=True)
off = {}
for mean in (0, 1):
    upstream = (torch.randn(tokens, width) + mean).bfloat16()
    truth = torch.zeros(rows, width, dtype=torch.double).index_add_(0, ids, upstream.double())[0]
    for way in WAYS:
        found = gradient(way, ids, upstream, rows)[0]
        off[way, mean] = ((found - truth).norm() / truth.norm()).item()
    listed = ", ".join(f"{way} {off[way, mean]:.1e}" for way in WAYS)
    print(f"noise of mean {mean}, token 0 ({int((ids == 0).sum())} times) off by: {listed}")
same = (
    sums == {"nn.Embedding": 256, "weight[ids]": 256, "index_select": 9984}
    and off["nn.Embedding", 0] > 0.02 and off["nn.Embedding", 1] > 0.2
    and max(off["index_select", 0], off["index_select", 1]) < 0.005
)
sys.exit(0 if same else 1)
PYTHON
