#!/usr/bin/env bash
# TRL's `accuracy_reward` gives 0 to a right answer that LaTeX sets without braces.
#
# `\frac12` and `\sqrt2` are ordinary LaTeX, and models write them. math-verify reads them by
# default. TRL passes settings of its own for the completion, though not for the solution, and the
# same string in both then counts as different.
#
# Seen with trl 1.16.0, math-verify 0.9.0, Python 3.11: answer in a box, gold, reward
#   \frac{1}{2}        for $\frac{1}{2}$            1.0
#   \dfrac{1}{2}       for $\frac{1}{2}$            1.0
#   \sqrt{3}           for $\sqrt{3}$               1.0
#   \frac12            for $\frac{1}{2}$            0.0
#   \frac12            for $\frac12$                0.0
#   \frac{1}2          for $\frac{1}{2}$            0.0
#   \frac{\sqrt3}{2}   for $\frac{\sqrt{3}}{2}$     0.0
#   2\sqrt2            for $2\sqrt{2}$              0.0
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.10.4 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6 \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import trl
from trl.rewards import accuracy_reward

PAIRS = [
    (r"\frac{1}{2}", r"$\frac{1}{2}$"),
    (r"\dfrac{1}{2}", r"$\frac{1}{2}$"),
    (r"\sqrt{3}", r"$\sqrt{3}$"),
    (r"\frac12", r"$\frac{1}{2}$"),
    (r"\frac12", r"$\frac12$"),
    (r"\frac{1}2", r"$\frac{1}{2}$"),
    (r"\frac{\sqrt3}{2}", r"$\frac{\sqrt{3}}{2}$"),
    (r"2\sqrt2", r"$2\sqrt{2}$"),
]
print(f"trl {trl.__version__}")
rewards = []
for answer, gold in PAIRS:
    completion = [{"role": "assistant", "content": rf"The answer is $\boxed{{{answer}}}$."}]
    rewards += accuracy_reward([completion], [gold])
    print(f"{answer:18} for {gold:24} {rewards[-1]}")
sys.exit(0 if rewards == [1.0] * 3 + [0.0] * 5 else 1)
PYTHON
