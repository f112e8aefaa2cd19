#!/usr/bin/env bash
# In reasoning-gym, data sets of seeds 0 and 1 have all but one problem in common.
#
# One would train on one seed and test on the next. But problem i of seed s is made with the seed
# s + i: the second data set is the first one, shifted by a problem. A test set of 100 problems and
# seed 1 lies wholly in a training set of 1,000 problems and seed 0. Runs with seeds 0, 1 and 2 are
# no repetitions either: they see the same problems. Seeds further apart than the sets are long
# share none, except by chance.
#
# Seen with reasoning-gym 0.1.25, Python 3.11: problems of a test set (100, seed s) that are in the
# training set (1,000, seed 0)
#   base_conversion    seed 1: 100   seed 950:  50   seed 1000000:   1
#   countdown          seed 1: 100   seed 950:  50   seed 1000000:   0
#   mini_sudoku        seed 1: 100   seed 950:  50   seed 1000000:   0
#   knights_knaves     seed 1: 100   seed 950:  50   seed 1000000:   0
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import reasoning_gym

TASKS = ["base_conversion", "countdown", "mini_sudoku", "knights_knaves"]
SEEDS = [1, 950, 1_000_000]


def problems(task, size, seed):
    return [item["question"] for item in reasoning_gym.create_dataset(task, size=size, seed=seed)]


print(f"reasoning-gym {version('reasoning-gym')}")
shared = {}
for task in TASKS:
    train = set(problems(task, 1000, 0))
    shared[task] = [sum(q in train for q in problems(task, 100, seed)) for seed in SEEDS]
    listed = zip(SEEDS, shared[task], strict=True)
    print(f"{task:18}", "   ".join(f"seed {seed}: {count:3}" for seed, count in listed))
same = all(a == 100 and b >= 50 and c < 10 for a, b, c in shared.values())
sys.exit(0 if same else 1)
PYTHON
