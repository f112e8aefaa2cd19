#!/usr/bin/env bash
# In GGUF's Q4_0, a block from -1 to 1 comes back as -1 to 0.875.
#
# Four bits give the codes -8 to 7. The scale is chosen so that the entry of largest magnitude gets
# -8 and is exact; its sign decides which way the block faces. An entry as large of the other sign
# would need 8 and gets 7: it loses an eighth, twice the rounding error of any other entry. Negating
# a block moves the loss to the other end. Q5_0 loses a sixteenth. Q4_1, with an offset, and Q8_0
# keep both ends.
#
# Seen with gguf 0.19.0, Python 3.11, 32 values from -1 to 1:
#   Q4_0: ends -1.0000 +0.8750; of the negated block +1.0000 -0.8750; largest error 0.1250
#   Q4_1: ends -1.0000 +0.9995; of the negated block +0.9995 -1.0000; largest error 0.0645
#   Q5_0: ends -1.0000 +0.9375; of the negated block +1.0000 -0.9375; largest error 0.0625
#   Q8_0: ends -0.9999 +0.9999; of the negated block +0.9999 -0.9999; largest error 0.0038
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants

block = np.linspace(-1, 1, 32, dtype=np.float32)
back = {}
for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0):
    codes = quants.quantize(np.stack([block, -block]), kind)
    back[kind] = quants.dequantize(codes, kind)
    there, negated = back[kind]
    print(f"{kind.name}: ends {there[0]:+.4f} {there[-1]:+.4f}; of the negated block "
          f"{negated[0]:+.4f} {negated[-1]:+.4f}; largest error {abs(there - block).max():.4f}")
there, negated = back[Kind.Q4_0]
same = (
    there[0] == -1 and there[-1] == 0.875 and negated[0] == 1 and negated[-1] == -0.875
    and back[Kind.Q5_0][0][-1] == 0.9375 and back[Kind.Q4_1][0][-1] > 0.999
)
sys.exit(0 if same else 1)
PYTHON
