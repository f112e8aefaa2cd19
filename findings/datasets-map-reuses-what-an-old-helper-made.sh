#!/usr/bin/env bash
# `Dataset.map` returns rows of before an edit if the edited function is in a module of yours.
#
# datasets names a cache file by the code of the function that it maps, and maps again when the
# function has changed. This covers the function itself and what its own script defines. A function
# of an imported module goes in by its name only: edit it, start a new process, and `map` still
# returns what the old one computed.
#
# Seen with datasets 5.2.0, dill 0.4.1, Python 3.11:
#   helper.double multiplies by 3: 1 becomes 3
#   helper.double multiplies by 2: 1 becomes 3
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 dill==0.4.1 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import os
import subprocess
import sys

import datasets

RUN = """
import datasets
import helper

datasets.disable_progress_bars()
rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
print(rows.map(lambda row: {"y": helper.double(row["x"])})["y"][0])
"""
HELPER = "def double(x):\n    return {factor} * x\n"


def run(factor):
    """What a new process computes, with helper.py as it is now."""
    with open("helper.py", "w") as file:
        file.write(HELPER.format(factor=factor))
    command = [sys.executable, "-B", "run.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    print(f"helper.double multiplies by {factor}: 1 becomes {done.stdout.strip()}")
    return int(done.stdout)


with open("rows.jsonl", "w") as file:
    file.write('{"x": 1}\n')
with open("run.py", "w") as file:
    file.write(RUN)
print(f"datasets {datasets.__version__}")
wrong, mended = run(3), run(2)
sys.exit(0 if (wrong, mended) == (3, 3) else 1)
PYTHON
