"""Problems of the package reasoning-gym (Open-Thought, Apache-2.0): a hundred kinds, without end.

    reasoning-gym:chain_sum
    reasoning-gym:chain_sum?min_terms=3&max_terms=5
    reasoning-gym:2*chain_sum?min_terms=3,gcd           two thirds of chain_sum, one third of gcd

Parts are separated by commas; a weight stands before its task with `*`; settings are those of the
task's own configuration, their values written as in JSON (a text needs no quotes).

A problem is a function of its task, its settings and one seed, which is in its id. reasoning-gym
gives problem i of seed s the seed s + i, so that neighbouring seeds share problems. The seeds of a
run's parts are therefore far apart, those of training and test problems lie in two ranges, and a
fixed quarter of all questions is never trained on, whatever the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import re
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from oisd.data.examples import DataError, Example, check_split
from oisd.schema import nearest, one_line

PREFIX = "reasoning-gym:"
INSTALL = "pip install 'oisd[reasoning-gym]'"

# What cannot be trained on, and why; tests/oisd/data/test_reasoning.py looks at all tasks.
_NO_ANSWER = "its problems have no answer of their own that its grader could be checked with"
_UNSTABLE = "the same seed gives other problems in another process"
_TUPLES = "its grader compares tuples, which an answer in JSON does not keep"
REFUSED = {
    "arc_agi": _TUPLES,
    "boxnet": _NO_ANSWER,
    "composite": "it is made of other tasks; name those, with weights",
    "graph_color": _NO_ANSWER,
    "isomorphic_strings": _UNSTABLE,
    "list_functions": _UNSTABLE,
    "polynomial_multiplication": _UNSTABLE,
    "propositional_logic": _NO_ANSWER,
    "ransom_note": _UNSTABLE,
    "rearc": _TUPLES,
    "rubiks_cube": _NO_ANSWER,
    "rush_hour": _NO_ANSWER,
}

_DEFAULT_LIMIT = 2_000
_PATIENCE = 300  # questions in a row that are not new; beyond them a task counts as exhausted
_HALF = 1 << 30  # seeds of training problems lie below, those of test problems above
_HELD_OUT = 4  # one question in so many is a test problem


class Part(NamedTuple):
    """One task of a source: its share of the problems, its name and settings."""

    written: str
    weight: float
    task: str
    settings: dict[str, Any]


def is_reasoning(source: str) -> bool:
    """Whether a data source names tasks of reasoning-gym."""
    return source.startswith(PREFIX) or source == PREFIX.rstrip(":")


def parts_of(source: str) -> list[Part]:
    """The tasks of a source, see the module; neither imports reasoning-gym nor knows its tasks.

    Raises DataError where the source is not written as the module says.
    """
    found = []
    for written in _split(source.removeprefix(PREFIX) if ":" in source else ""):
        match = re.fullmatch(r"(?:([0-9.]+)\*)?(\w+)(?:\?(.*))?", written.strip(), re.DOTALL)
        if match is None:
            raise DataError(
                f"{source}: wanted tasks like chain_sum, chain_sum?min_terms=3&max_terms=5 or "
                f"2*chain_sum,gcd, got {written!r}"
            )
        try:
            weight = float(match[1] or 1)
        except ValueError:
            weight = 0.0
        if weight <= 0:
            raise DataError(f"{source}: a weight must be a number above 0, got {match[1]!r}")
        settings: dict[str, Any] = {}
        for pair in match[3].split("&") if match[3] else []:
            key, equals, value = pair.partition("=")
            if not equals or key in settings:
                problem = "is given twice" if equals else "has no value: write key=value"
                raise DataError(f"{source}: the setting {key!r} of {match[2]} {problem}")
            settings[key] = _value(value)
        found.append(Part(written.strip(), weight, match[2], settings))
    return found


def _split(text: str) -> Iterator[str]:
    """The parts between commas that are not within brackets."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_reasoning(source: str, split: str) -> None:
    """Raise what `reasoning_examples` would before its first problem.

    Without reasoning-gym, whose tasks and settings are then not known, the spelling is checked.
    """
    check_split(source, split)
    for part in parts_of(source):
        if _is_installed():
            _dataset(source, part, _first_seed(part, split, 0), _PATIENCE)


def _is_installed() -> bool:
    return importlib.util.find_spec("reasoning_gym") is not None


def reasoning_examples(
    source: str, *, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Problems of the tasks that `source` names, without repetition; see the module.

    split: "train" or "test".
    limit: number of problems of all tasks together, shared out by weight; None: 2,000. A task with
        fewer different questions gives what it has found, and a warning.
    Answers are JSON: the right answer, the task with its settings, and what its grader needs.
    Raises DataError for an unknown task or setting, a setting of the wrong type or that the task
    refuses, a task that cannot be trained on, and where reasoning-gym is not installed.
    """
    if not _is_installed():
        raise DataError(f"{source}: reasoning-gym is not installed; {INSTALL}")
    check_split(source, split)
    parts = parts_of(source)
    seen: set[str] = set()
    examples: list[Example] = []
    for part, share in zip(parts, _shares(parts, limit or _DEFAULT_LIMIT), strict=True):
        # Some tasks make all of their problems at once, so that we ask for few more than we need.
        size = share * (2 * _HELD_OUT if split == "test" else 2) + _PATIENCE
        dataset = _dataset(source, part, _first_seed(part, split, seed), size)
        taken = list(_problems(source, part, dataset, split, share, seen))
        if len(taken) < share:
            warnings.warn(
                f"{source}: {part.task} gave {len(taken)} different {split} problems, {share} were "
                "asked for; it repeats itself with these settings",
                stacklevel=2,
            )
        examples += taken
    if not examples:
        raise DataError(f"{source}: there is no problem in the split {split!r}")
    return examples


def _shares(parts: list[Part], limit: int) -> list[int]:
    """`limit` problems shared out by weight, at least one for each part."""
    total, left, shares = sum(part.weight for part in parts), limit, []
    for part in parts:
        shares.append(max(1, round(left * part.weight / total)))
        left, total = left - shares[-1], total - part.weight
    return shares


def _first_seed(part: Part, split: str, seed: int) -> int:
    content = f"{seed} {part.task} {json.dumps(part.settings, sort_keys=True)}"
    number = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())
    return number % (_HALF - (1 << 24)) + (_HALF if split == "test" else 0)


def _dataset(source: str, part: Part, seed: int, size: int) -> Any:
    """The generator of a part, its settings checked."""
    from reasoning_gym.factory import DATASETS, create_dataset  # pyright: ignore

    if part.task not in DATASETS:
        raise DataError(f"{source}: unknown task {part.task!r}{nearest(part.task, DATASETS)}")
    if part.task in REFUSED:
        raise DataError(f"{source}: {part.task} cannot be trained on: {REFUSED[part.task]}")
    settings = _checked(source, part, DATASETS[part.task][1])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return create_dataset(part.task, seed=seed, size=size, **settings)
    except Exception as error:
        raise DataError(
            f"{source}: {part.task} refuses its settings: {one_line(error, named=True)}"
        ) from error


def _checked(source: str, part: Part, config: type) -> dict[str, Any]:
    """The part's settings as its configuration takes them."""
    hints = typing.get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    found = {}
    for key, value in part.settings.items():
        if key in ("seed", "size"):
            remedy = {"seed": "run.seed (--seed)", "size": "data.limit (--limit)"}[key]
            raise DataError(f"{source}: {key} is not set here; set {remedy}")
        if key not in known:
            raise DataError(
                f"{source}: {part.task} has no setting {key!r}"
                f"{nearest(key, {*known} - {'seed', 'size'})}"
            )
        try:
            found[key] = _as(value, hints.get(key, Any))
        except TypeError as error:
            raise DataError(
                f"{source}: {part.task}'s {key} must be {error}, got {value!r}"
            ) from None
    return found


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _as(value: Any, hint: Any) -> Any:
    """`value` from JSON as a field's type; TypeError with what was wanted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        wanted = []
        for inner in arguments:
            try:
                return _as(value, inner)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(" or ".join(wanted))
    if hint in (None, type(None)):
        if value is not None:
            raise TypeError("null")
        return None
    kind = origin or hint
    if kind in (list, tuple):
        if not isinstance(value, list):
            raise TypeError("a list, as in [1,2]")
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and not isinstance(value, str | list | dict):
        return json.dumps(value)  # text that reads as a number
    if kind in _WORDS and type(value) is not kind:
        raise TypeError(_WORDS[kind])
    return value


def _problems(
    source: str, part: Part, dataset: Any, split: str, share: int, seen: set[str]
) -> Iterator[Example]:
    """`share` problems of a part whose questions are not in `seen`, which grows."""
    count = misses = 0
    for index in range(len(dataset)):
        if count == share or misses == _PATIENCE:
            return
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                entry = dataset[index]
        except Exception as error:
            raise DataError(
                f"{source}: {part.task} could not make its problem of seed "
                f"{dataset.seed + index}: {one_line(error, named=True)}"
            ) from error
        question = str(entry["question"]).strip()
        misses += 1
        if question not in seen:
            seen.add(question)
            misses = 0
            if is_held_out(question) == (split == "test"):
                count += 1
                yield _example(source, part, entry, dataset.seed + index)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the fixed quarter that is never trained on."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % _HELD_OUT == 0


def _example(source: str, part: Part, entry: dict[str, Any], seed: int) -> Example:
    answer = entry["answer"]
    if not isinstance(answer, str):
        raise DataError(
            f"{source}: {part.task} has no answer to its problem of seed {seed} that can be "
            f"written, got {answer!r}"
        )
    record = {
        "answer": answer,
        "task": part.task,
        "settings": part.settings,
        "question": entry["question"],
        "metadata": entry["metadata"],
    }
    try:
        # As text what JSON lacks, such as fractions: the tests see that graders take it.
        text = json.dumps(record, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{source}: {part.task}'s problem of seed {seed} cannot be written as JSON: {error}"
        ) from error
    boxed = f"\\boxed{{{answer}}}"
    return Example(str(entry["question"]).strip(), text, f"{part.written}/{seed}", boxed)
