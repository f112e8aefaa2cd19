#!/usr/bin/env bash
# On a CPU, `torch.manual_seed` uses the lower 32 bits of its seed only.
#
# It takes 64 bits, and `initial_seed()` gives all of them back. The Mersenne Twister behind it gets
# the lower half, so seeds that differ by a multiple of 2**32 draw the same numbers. A seed made as
# `run << 32 | step` is the same in every run, and of 77,000 seeds made from hashes two are likely
# the same, instead of two of five billion. A `torch.Generator`, and with it the order of a
# DataLoader, does the same. numpy's `default_rng` takes such seeds whole.
#
# Seen with torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11:
#   seed 5                    0.8303 0.1261 0.9075  order [7, 4, 1, 3, 2, 0, 6, 5]
#   seed 5 + 1 * 2**32        0.8303 0.1261 0.9075  order [7, 4, 1, 3, 2, 0, 6, 5]
#   seed 5 + 123456 * 2**32   0.8303 0.1261 0.9075  order [7, 4, 1, 3, 2, 0, 6, 5]
#   seed 6                    0.5722 0.5539 0.9868  order [3, 5, 6, 1, 7, 0, 2, 4]
#   numpy: 5 and 5 + 2**32 draw the same: False
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader


def draw(seed):
    """Three numbers, and the order of eight items in a DataLoader with a generator of its own."""
    torch.manual_seed(seed)
    assert torch.initial_seed() == seed
    numbers = torch.rand(3).tolist()
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(range(8), batch_size=8, shuffle=True, generator=generator)
    return numbers, next(iter(loader)).tolist()


print(f"torch {torch.__version__}, numpy {np.__version__}")
drawn = []
for low, high in ((5, 0), (5, 1), (5, 123456), (6, 0)):
    numbers, order = draw(low + (high << 32))
    drawn.append((numbers, order))
    name = f"{low} + {high} * 2**32" if high else str(low)
    print(f"seed {name:20}", *(f"{number:.4f}" for number in numbers), f" order {order}")
first, second = (np.random.default_rng(5 + (high << 32)).random(3) for high in (0, 1))
numpy_same = bool((first == second).all())
print(f"numpy: 5 and 5 + 2**32 draw the same: {numpy_same}")
same = drawn[0] == drawn[1] == drawn[2] != drawn[3] and not numpy_same
sys.exit(0 if same else 1)
PYTHON
