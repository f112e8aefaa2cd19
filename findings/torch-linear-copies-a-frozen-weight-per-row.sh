#!/usr/bin/env bash
# In bfloat16 on a CPU, `F.linear` of a slice copies a frozen weight for every row of the batch.
#
# hidden[:, -4:] of a [batch, length, width] tensor is not contiguous. If the weight needs a
# gradient, torch copies the small slice and makes one matrix product. If not, it expands the weight
# over the batch instead, and oneDNN's batched product makes the expanded weight contiguous. An
# unembedding of 125 MiB, frozen as LoRA leaves it, takes 2,000 MiB more at 16 rows.
# `.contiguous()` on the slice avoids it. float32 takes the batched product without the copy.
# Only on a CPU where oneDNN has bfloat16 (AVX-512); elsewhere the script says so and exits with 0.
#
# Seen with torch 2.13.0 (CPU, AVX-512), Python 3.11, 8 rows, a weight of 8,192,000 bytes:
#   a slice, frozen weight     aten::bmm allocates 65,552,384 bytes: 8.00 weights
#   contiguous, frozen weight  aten::mm  allocates 1,024,000 bytes: 0.12 weights
#   a slice, trained weight    aten::mm  allocates 1,040,384 bytes: 0.13 weights
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
from torch.profiler import ProfilerActivity, profile

torch.set_num_threads(1)
ROWS, LENGTH, WIDTH, VOCABULARY = 8, 20, 256, 16_000
weight = torch.randn(VOCABULARY, WIDTH).bfloat16()
hidden = torch.randn(ROWS, LENGTH, WIDTH).bfloat16()


def look(name, hidden, weight):
    """Which product it was, and all bytes that were allocated meanwhile, as weights."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        torch.nn.functional.linear(hidden, weight)
    events = run.key_averages()
    kind = next(event.key for event in events if event.key in ("aten::mm", "aten::bmm"))
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in events)
    print(f"{name:26} {kind:9} allocates {taken:,} bytes: {taken / weight.nbytes:.2f} weights")
    return kind, taken / weight.nbytes


if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    print("this CPU has no bfloat16 in oneDNN: nothing to see")
    sys.exit(0)
print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
last = hidden[:, -4:]
kind, weights = look("a slice, frozen weight", last, weight)
_, contiguous = look("contiguous, frozen weight", last.contiguous(), weight)
_, trained = look("a slice, trained weight", last, weight.clone().requires_grad_())
same = kind == "aten::bmm" and weights >= ROWS and contiguous < 0.2 and trained < 0.2
sys.exit(0 if same else 1)
PYTHON
