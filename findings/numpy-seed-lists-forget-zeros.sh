#!/usr/bin/env bash
# `numpy.random.default_rng([seed, 0])` draws the same numbers as `default_rng(seed)`.
#
# A list of numbers is the usual way to seed a stream per run, epoch or worker, and one would expect
# lists that differ to draw differently. numpy joins the numbers, 32 bits each, to one long number
# and pads it with zeros to 128 bits: zeros at the end are lost, and [7, 1] is 7 + 2**32. The first
# epoch of a run repeats what the run itself drew, and [seed, epoch] repeats [seed, epoch, 0].
# Zeros at the front count, and so do those beyond 128 bits. `SeedSequence(seed).spawn` keeps
# streams apart.
#
# Seen with numpy 2.4.6, Python 3.11:
#   7                0.6251 0.8972
#   [7, 0]           0.6251 0.8972
#   [7, 0, 0, 0]     0.6251 0.8972
#   [0, 7]           0.0389 0.7771
#   [7, 1]           0.7701 0.1119
#   [7, 1, 0]        0.7701 0.1119
#   7 + 2**32        0.7701 0.1119
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np

SEEDS = {
    "7": 7, "[7, 0]": [7, 0], "[7, 0, 0, 0]": [7, 0, 0, 0], "[0, 7]": [0, 7],
    "[7, 1]": [7, 1], "[7, 1, 0]": [7, 1, 0], "7 + 2**32": 7 + 2**32,
}
print(f"numpy {np.__version__}")
drawn = {name: tuple(np.random.default_rng(seed).random(2)) for name, seed in SEEDS.items()}
for name, numbers in drawn.items():
    print(f"{name:16}", *(f"{number:.4f}" for number in numbers))
child = tuple(np.random.default_rng(np.random.SeedSequence(7).spawn(1)[0]).random(2))
same = (
    drawn["7"] == drawn["[7, 0]"] == drawn["[7, 0, 0, 0]"]
    and drawn["[7, 1]"] == drawn["[7, 1, 0]"] == drawn["7 + 2**32"]
    and len({drawn["7"], drawn["[0, 7]"], drawn["[7, 1]"], child}) == 4
)
sys.exit(0 if same else 1)
PYTHON
