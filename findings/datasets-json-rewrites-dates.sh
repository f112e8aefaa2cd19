#!/usr/bin/env bash
# `load_dataset("json")` turns strings that look like dates into other text.
#
# JSON has no dates, so one would expect a string to come back as it was. The reader infers
# timestamps. If all answers of a file look like dates, they become datetimes, in UTC and without
# their offset (below, 10:00+02:00). If another file of the data has a plain answer, the column is
# of strings, and the dates come back as "2024-02-29 00:00:00": the type is right and the answer is
# not. Asking for strings with `features=` comes too late. A row that is no date keeps the others of
# its own file as they are. `Dataset.from_list` of rows read with the json module keeps all.
#
# Seen with datasets 5.2.0, pyarrow 26.0.1, Python 3.11:
#   one file, dates             timestamp[s]  [datetime.datetime(2024, 2, 29, 0, 0)]
#   one file, with an offset    timestamp[s]  [datetime.datetime(2024, 2, 29, 8, 0)]
#   two files, one with a word  string        ['unknown', '2024-02-29 00:00:00']
#   the same rows in one file   string        ['unknown', '2024-02-29']
#   two files, features given   string        ['unknown', '2024-02-29 00:00:00']
#   from_list                   string        ['unknown', '2024-02-29']
# Exits 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 dill==0.4.1 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import datetime
import json
import sys

import datasets

datasets.disable_progress_bars()


def load(name, *files, **options):
    """Writes one JSONL file per list of answers; returns the column that datasets makes of them."""
    paths = []
    for number, answers in enumerate(files):
        paths.append(f"{name.replace(' ', '-')}-{number}.jsonl")
        with open(paths[-1], "w") as file:
            file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    rows = datasets.load_dataset(
        "json", data_files=paths, split="train", cache_dir="cache", **options
    )
    print(f"{name:26}  {rows.features['answer'].dtype:12}  {rows['answer'][:]}")
    return rows["answer"][:]


print(f"datasets {datasets.__version__}")
text = datasets.Features({"answer": datasets.Value("string")})
day, word = "2024-02-29", "unknown"
dates = load("one file, dates", [day])
offset = load("one file, with an offset", ["2024-02-29T10:00:00+02:00"])
two = load("two files, one with a word", [word], [day])
one = load("the same rows in one file", [word, day])
given = load("two files, features given", [word], [day], features=text)
kept = datasets.Dataset.from_list([{"answer": word}, {"answer": day}])["answer"][:]
print(f"{'from_list':26}  string        {kept}")
same = (
    dates == [datetime.datetime(2024, 2, 29)] and offset == [datetime.datetime(2024, 2, 29, 8)]
    and two == given == [word, "2024-02-29 00:00:00"] and one == kept == [word, day]
)
sys.exit(0 if same else 1)
PYTHON
