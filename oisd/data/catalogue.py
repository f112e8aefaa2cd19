"""Mathematics data sets by name: where the Hub keeps them and which columns hold what.

A source is written `gsm8k`, or `gsm8k:some/folder` for the same rows from a local file or folder,
such as `hf download --repo-type dataset openai/gsm8k --local-dir some/folder` writes. The name sets
columns, split and answer pattern; a caller's own settings have priority.

No rows are shipped: most of these sets have no licence that would allow it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BOXED = "boxed"
"""In place of an answer pattern: the content of the last box."""


@dataclass(frozen=True)
class DataSet:
    """One set of problems with verifiable answers."""

    title: str
    hub: str
    prompt_field: str
    answer_field: str
    splits: dict[str, str]
    """Our split, "train" or "test", to the Hub's."""
    rows: dict[str, int]
    """Problems in each of our splits; an evaluation of fewer says so."""
    subset: str | None = None
    answer_pattern: str | None = None
    draw: int | None = None
    """Take this many rows, drawn by `DRAW_SEED`, whatever the run's seed."""
    samples: int = 16
    """K of Avg@K: the paper's for its four benchmarks, ours for others."""


DRAW_SEED = 2605  # of deepmath-5k: ours, since the paper's list of rows is not published

_TRAIN, _TEST = {"train": "train"}, {"test": "test"}
_DEEPMATH = "zwhe99/DeepMath-103K"

DATA_SETS = {
    # Evaluation. The first four are the paper's, section 4.1.
    "amc23": DataSet("AMC23", "math-ai/amc23", "question", "answer", _TEST, {"test": 40}),
    "math500": DataSet(
        "MATH500", "HuggingFaceH4/MATH-500", "problem", "answer", _TEST, {"test": 500}
    ),
    # The Hub calls the one split of this exam "train".
    "aime24": DataSet(
        "AIME24", "HuggingFaceH4/aime_2024", "problem", "answer", {"test": "train"}, {"test": 30},
        samples=32,
    ),
    "aime25": DataSet(
        "AIME25", "math-ai/aime25", "problem", "answer", _TEST, {"test": 30}, samples=32
    ),
    # Both.
    "gsm8k": DataSet(
        "GSM8K", "openai/gsm8k", "question", "answer", _TRAIN | _TEST,
        {"train": 7473, "test": 1319}, subset="main", answer_pattern=r"####\s*(.+)$",
    ),
    "math": DataSet(
        "MATH", "DigitalLearningGmbH/MATH-lighteval", "problem", "solution", _TRAIN | _TEST,
        {"train": 7500, "test": 5000}, answer_pattern=BOXED,
    ),
    # Training.
    "deepmath": DataSet(
        "DeepMath", _DEEPMATH, "question", "final_answer", _TRAIN, {"train": 103_022}
    ),
    "deepmath-5k": DataSet(
        "DeepMath-5k", _DEEPMATH, "question", "final_answer", _TRAIN, {"train": 5000}, draw=5000
    ),
    "dapo": DataSet(
        "DAPO", "open-r1/DAPO-Math-17k-Processed", "prompt", "solution", _TRAIN,
        {"train": 17_398}, subset="all",
    ),
}  # fmt: skip

PAPER_BENCHMARKS = ("amc23", "math500", "aime24", "aime25")


@dataclass(frozen=True)
class Source:
    """A data source as written, with what its name stands for, if it has one."""

    written: str
    data_set: DataSet | None = None
    name: str = ""
    path: Path | None = None
    """Where rows of the named set are read from instead of the Hub."""

    @property
    def title(self) -> str:
        """For tables and plots."""
        return self.data_set.title if self.data_set else self.written

    def rows_of(self, split: str) -> int | None:
        """How many problems the whole of a split has, where that is known."""
        return self.data_set.rows.get(split) if self.data_set else None


def resolve(source: str) -> Source:
    """Look up the name in `name` or `name:path`; any other source has no data set."""
    name, colon, path = source.partition(":")
    data_set = DATA_SETS.get(name)
    if data_set is None:
        return Source(source)
    return Source(source, data_set, name, Path(path).expanduser() if colon else None)


def hub_split(data_set: DataSet, split: str) -> str | None:
    """The Hub's name of our `split`, slices such as "test[:10]" included; None: there is none."""
    base, rest = re.fullmatch(r"([^\[+]*)(.*)", split, re.DOTALL).groups()  # type: ignore[union-attr]
    return f"{data_set.splits[base]}{rest}" if base in data_set.splits else None
