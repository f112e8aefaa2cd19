#!/usr/bin/env bash
# math-verify says that sin 30 degrees is not one half.
#
# It drops `^\circ` as a unit before it evaluates. This does no harm to an angle that is itself the
# answer. Inside a sine or a tangent, the bare number is an angle in radians, and an answer left in
# this form is refused.
#
# Seen with math-verify 0.9.0, latex2sympy2_extended 1.11.0, Python 3.11:
#   \sin\frac{\pi}{6}  read as sin(pi/6)  equals \frac{1}{2}: True
#   \sin 30^\circ      read as sin(30)    equals \frac{1}{2}: False
#   \tan 45^\circ      read as tan(45)    equals 1: False
#   2\cos 30^\circ     read as 2*cos(30)  equals \sqrt{3}: False
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from math_verify import parse, verify

PAIRS = [
    (r"\frac{1}{2}", r"\sin\frac{\pi}{6}"),
    (r"\frac{1}{2}", r"\sin 30^\circ"),
    ("1", r"\tan 45^\circ"),
    (r"\sqrt{3}", r"2\cos 30^\circ"),
]
print(f"math-verify {version('math-verify')}")
equal = []
for gold, answer in PAIRS:
    equal.append(verify(parse(f"${gold}$"), parse(f"${answer}$")))
    print(f"{answer:18} read as {str(parse(f'${answer}$')[0]):10} equals {gold}: {equal[-1]}")
sys.exit(0 if equal == [True] + [False] * 3 else 1)
PYTHON
