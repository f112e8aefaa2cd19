#!/usr/bin/env bash
# math-verify reads `1\,234` as 1 + 234.
#
# A space, mostly a thin one, is the usual mark of thousands in texts that avoid the comma. With a
# comma math-verify reads the number. With a space it adds the groups up as if they were a mixed
# number, makes a product of `10\,000`, and refuses the right answer.
#
# Seen with math-verify 0.9.0, latex2sympy2_extended 1.11.0, Python 3.11:
#   1,234 and 1{,}234    read as 1234
#   1\,234 and 1 234     read as 235
#   10\,000 and 10 000   read as 10*0
#   1\,234\,567          read as 802
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

NUMBERS = {
    "1234": ["1,234", r"1{,}234", r"1\,234", "1 234"],
    "10000": ["10,000", r"10{,}000", r"10\,000", "10 000"],
    "1234567": ["1,234,567", r"1{,}234{,}567", r"1\,234\,567", "1 234 567"],
}
print(f"math-verify {version('math-verify')}")
same = True
for gold, forms in NUMBERS.items():
    right = [verify(parse(f"${gold}$"), parse(f"${form}$")) for form in forms]
    read = [str(parse(f"${form}$")[0]) for form in forms]
    print(f"{gold}: {dict(zip(forms, read, strict=True))}, equal: {right}")
    same = same and right == [True, True, False, False]
sys.exit(0 if same else 1)
PYTHON
