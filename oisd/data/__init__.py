"""Problems with verifiable answers: reading and checking them.

Folders, Parquet files and Hub ids are read through the `datasets` library, JSON by
`oisd.data.files`, so that text stays as written.
Every row is checked before training starts: a missing answer found at step 200 is a lost run.
"""

from __future__ import annotations

import datetime
import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from oisd.data import catalogue, files
from oisd.data.catalogue import BOXED, DataSet, Source
from oisd.data.examples import (
    DataError,
    Example,
    Message,
    SourceError,
    permutation,
    prompt_indices,
)
from oisd.data.prompts import EncodedPrompts, check_vocabulary, encode_prompts, render_prompt
from oisd.data.reasoning import check_reasoning, is_reasoning, reasoning_examples
from oisd.data.sums import arithmetic_examples, check_arithmetic, is_arithmetic
from oisd.data.tasks import TASKS, is_task, task_examples, task_settings
from oisd.rewards.answers import last_boxed

__all__ = [
    "BOXED", "PAPER_SYSTEM_PROMPT", "DataError", "DataSet", "EncodedPrompts", "Example", "Message",
    "Source", "SourceError", "catalogue", "check_source", "check_vocabulary", "encode_prompts",
    "load_examples", "permutation", "prompt_indices", "render_prompt",
]  # fmt: skip

PAPER_SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


def load_examples(
    source: str,
    *,
    split: str = "train",
    prompt_field: str | None = None,
    answer_field: str | None = None,
    answer_pattern: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """Read problems and their answers, checking every row that is taken.

    source: a name of `oisd.data.catalogue`, such as "math500", or "math500:folder" for its rows
        from a file or folder here; a .jsonl, .json or .parquet file; a folder, saved by
        `datasets.save_to_disk` or of data files; "arithmetic" or "arithmetic:digits=2",
        the built-in task; a task of `oisd.data.tasks`, such as "multiplication:digits=3", or
        of `oisd.data.reasoning`, "reasoning-gym:chain_sum?min_terms=3"; otherwise a Hub id.
    split: name of the split. A file is one split, whatever it is called; "train[:100]" works
        wherever `datasets.load_dataset` reads.
    prompt_field, answer_field: columns; dots reach into structs ("extra_info.answer"). A prompt is
        text or a list of {role, content}; an answer is text or a number. None: what the named set
        has, otherwise "question" and "answer".
    answer_pattern: "boxed" for the content of the last box, or a regular expression with one
        group, searched for in the answer field, that is the answer (r"####\\s*(.+)$" for GSM8K).
    subset: configuration name ("main" for GSM8K on the Hub).
    limit: take this many rows, drawn without replacement by `seed`; all rows if there are fewer.
    Raises DataError when there is nothing to read, or a row lacks its prompt or its answer, and
    SourceError, which is one, for what `check_source` refuses and for a file that there is not.
    """
    if limit is not None and limit < 1:
        raise DataError(f"load_examples: limit must be at least 1, got {limit}")
    columns = {
        "prompt_field": prompt_field,
        "answer_field": answer_field,
        "answer_pattern": answer_pattern,
        "subset": subset,
    }
    check_source(source, split=split, **columns)
    draw: Any = {"split": split, "limit": limit, "seed": seed}
    if is_arithmetic(source):
        return arithmetic_examples(check_arithmetic(source, split), **draw)
    if is_task(source):
        return task_examples(source, **draw)
    if is_reasoning(source):
        return reasoning_examples(source, **draw)

    resolved = catalogue.resolve(source)
    known = resolved.data_set
    prompt_field = prompt_field or (known.prompt_field if known else "question")
    answer_field = answer_field or (known.answer_field if known else "answer")
    answer_pattern = answer_pattern or (known.answer_pattern if known else None)
    dataset = _read_source(resolved, split, subset)
    if len(dataset) == 0:
        raise DataError(f"{source}: split {split!r} has no rows")
    rows: Sequence[int] = range(len(dataset))
    if known and known.draw and known.draw < len(rows):
        rows = sorted(permutation(len(rows), catalogue.DRAW_SEED)[: known.draw])
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(permutation(len(rows), seed)[:limit])]

    # Only the columns needed: DeepMath has three long solutions beside each question.
    names = dataset.column_names
    wanted = {_column(names, prompt_field), _column(names, answer_field)} & set(names)
    columns = dataset.select_columns(sorted(wanted)) if wanted else dataset

    examples = []
    for number, row in zip(rows, columns.select(rows), strict=True):
        where = f"{source}, row {number}"
        row = {**dict.fromkeys(names), **cast("dict[str, Any]", row)}
        prompt = _parse_prompt(row, where, prompt_field)
        answer = _parse_answer(row, where, answer_field)
        if answer_pattern is not None:
            answer = _extract(answer_pattern, answer, where, answer_field)
        examples.append(Example(prompt, answer, f"{split}/{number}"))
    return examples


def check_source(source: str, *, split: str = "train", **columns: str | None) -> None:
    """Raise SourceError for what `load_examples` refuses before it reads or makes a problem.

    Names, settings and splits, that is.
    columns: prompt_field, answer_field, answer_pattern and subset, as `load_examples` takes them.
    """
    try:
        _check_source(source, split, columns)
    except DataError as error:
        raise SourceError(str(error)) from error


def _check_source(source: str, split: str, columns: dict[str, str | None]) -> None:
    if is_arithmetic(source):
        check_arithmetic(source, split)
    elif is_task(source):
        task_settings(source, split)
    elif is_reasoning(source):
        check_reasoning(source, split)
    else:
        _check_name(source, split)
        pattern = columns.get("answer_pattern")
        if pattern not in (None, BOXED):
            _check_answer_pattern(pattern)
        return
    what = "a source of reasoning-gym" if is_reasoning(source) else "the built-in task"
    _refuse_unused(source, what, **columns)


def _check_name(source: str, split: str) -> None:
    """Refuse a named set's unknown split, and what looks like a misspelt name of a set or task."""
    if not source:
        raise DataError("load_examples: the source is empty; pass a file, a folder or a Hub id")
    resolved, name = catalogue.resolve(source), source.partition(":")[0]
    if resolved.data_set is not None:
        _hub_split(resolved, split)
    elif not os.path.exists(source):
        # A namesake on the Hub would have a slash in its id.
        names = [*TASKS, "arithmetic", "reasoning-gym", *catalogue.DATA_SETS]
        if meant := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
            what = "data set" if meant[0] in catalogue.DATA_SETS else "task"
            raise DataError(f"{source}: no {what} is called {name!r}; did you mean {meant[0]!r}?")


def _refuse_unused(source: str, what: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise SourceError(f"{source}: {what} has no {name}, got {value!r}; leave it out")


def _check_answer_pattern(answer_pattern: str) -> None:
    try:
        pattern = re.compile(answer_pattern)
    except re.error as error:
        raise DataError(
            f"answer_pattern {answer_pattern!r} is not a regular expression: {error}"
        ) from error
    if pattern.groups != 1:
        raise DataError(
            f"answer_pattern {answer_pattern!r} must have exactly one group, the answer; it has "
            f"{pattern.groups} (write (?:...) for a group that is not the answer)"
        )


def _read_source(source: Source, split: str, subset: str | None) -> Any:
    """The rows of a source, whose name may stand for a Hub id, a subset and a split."""
    known = source.data_set
    if known is None:
        return _read(source.written, split, subset)
    theirs = _hub_split(source, split)
    if source.path is None:
        return _read(known.hub, theirs, subset or known.subset, source.name)
    if not source.path.exists():
        raise SourceError(f"{source.written}: no such file or folder: {source.path}")
    try:
        return _read_local(source.path, known, theirs, subset)
    except DataError as error:
        raise DataError(
            f"{source.written}: wanted the rows of {known.hub}, as a file or in its own layout: "
            f"{error}"
        ) from error


def _hub_split(source: Source, split: str) -> str:
    """The Hub's name of a split of a named set."""
    known = source.data_set
    assert known is not None
    if found := catalogue.hub_split(known, split):
        return found
    raise DataError(
        f"{source.name}: no split {split!r}; it has {', '.join(known.splits)}. To train on a "
        f"benchmark, or the other way round, pass its Hub id {known.hub} as the source"
    )


def _read_local(path: Path, known: DataSet, split: str, subset: str | None) -> Any:
    """A named set's rows from a file, or from a folder as the Hub lays it out, or a plain one."""
    if path.is_file():
        return _read(str(path), split, None)
    subset = subset or known.subset
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if subset and not saved and not _declares_subsets(path):
        # Without the card that declares the subsets, their folders would be read as one set.
        path = path / subset if (path / subset).is_dir() else path
        subset = None
    # A folder whose one file of problems names no split is "train" to `datasets`.
    return _read(str(path), "train" if not saved and _is_unnamed(path) else split, subset)


def _declares_subsets(path: Path) -> bool:
    card = path / "README.md"
    return card.is_file() and "config_name" in card.read_text(encoding="utf-8", errors="replace")


def _is_unnamed(path: Path) -> bool:
    """Whether a folder holds one data file, whose name contains no split's."""
    found = _data_files(path)
    return len(found) == 1 and not re.search(r"train|test|valid|dev", found[0].stem.lower())


def _data_files(folder: Path) -> list[Path]:
    found = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in files.FORMATS]
    return [f for f in found if not any(p[0] == "." for p in f.relative_to(folder).parts)]


def _read(source: str, split: str, subset: str | None, known_as: str = "") -> Any:
    """The rows of `source`, as a `datasets.Dataset`."""
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_file():
            _refuse_unused(source, "a file", subset=subset)
            files.check_file(path)
            if files.FORMATS[path.suffix.lower()] == "json":
                return files.read_json([path], split)
            name = re.split(r"[\[+]", split, maxsplit=1)[0]
            return datasets.load_dataset("parquet", data_files={name: str(path)}, split=split)
        if path.is_dir():
            if (path / "dataset_dict.json").exists():
                return _pick_split(datasets.load_from_disk(str(path)), source, split)
            if (path / "state.json").exists():
                return datasets.load_from_disk(str(path))
            for file in _data_files(path):
                files.check_file(file)
            return _read_folder(path, split, subset)
        if path.suffix.lower() in files.FORMATS or source[:1] in "./~" or source.count("/") > 1:
            raise SourceError(f"{source}: no such file or folder")
        return datasets.load_dataset(source, subset, split=split)
    except DataError:
        raise
    except ConnectionError as error:
        what = f"{known_as} comes from the Hub" if known_as else "no such file or folder here"
        place = f'"{known_as}:some/folder"' if known_as else "its path"
        raise DataError(
            f"{source}: {what}, and the Hugging Face Hub cannot be reached "
            f"({error}). On a machine with network access run\n"
            f"    hf download --repo-type dataset {source} --local-dir some/folder\n"
            f"then copy that folder here and pass {place} as the source"
        ) from error
    except Exception as error:
        # The cause says what is wrong with a file; the error that `datasets` raises does not.
        reason = error.__cause__ or error
        # `datasets` has no error of its own for an empty file, saved set or split.
        if isinstance(reason, (StopIteration, IndexError)) or "to no data" in str(reason):
            raise DataError(f"{source}: split {split!r} has no rows") from error
        raise DataError(
            f"{source}: cannot read split {split!r}: {type(reason).__name__}: {reason}"
        ) from error


def _read_folder(path: Path, split: str, subset: str | None) -> Any:
    """The rows of a folder's data files, split as `datasets` finds them by their names."""
    import datasets

    builder = datasets.load_dataset_builder(str(path), subset)
    found = (builder.config.data_files or {}).get(re.split(r"[\[+]", split, maxsplit=1)[0])
    if builder.dataset_name is None or not found or "+" in split:
        return datasets.load_dataset(str(path), subset, split=split)
    own = [Path(str(file)) for file in found]
    if not all(files.FORMATS.get(f.suffix.lower()) == "json" and f.is_file() for f in own):
        return datasets.load_dataset(str(path), subset, split=split)
    return files.read_json(own, split)


def _pick_split(dataset: Any, source: str, split: str) -> Any:
    if split not in dataset:
        raise DataError(f"{source}: no split {split!r}; it has {', '.join(dataset)}")
    return dataset[split]


def _column(names: Iterable[str], field: str) -> str:
    return field if field in names else field.split(".")[0]


def _lookup(row: dict[str, Any], field: str, where: str, option: str) -> Any:
    """The value of `field`, which may be a column with a dot in its name or a path of names."""
    value: Any = row
    names = [field] if field in row else field.split(".")
    for depth, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            above = ".".join(names[:depth])
            fields = list(value) if isinstance(value, dict) else []
            raise DataError(_missing_field(name, above, fields, where, option))
        value = value[name]
    if value is None or value == "" or (isinstance(value, float | Decimal) and math.isnan(value)):
        raise DataError(
            f"{where}: field {field!r} is empty; remove the row or choose another {option} "
            f"(fields: {', '.join(row)})"
        )
    return value


def _missing_field(name: str, above: str, fields: list[str], where: str, option: str) -> str:
    within = f" in {above!r}" if above else ""
    near = difflib.get_close_matches(name, fields, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    present = ", ".join(fields) or "none"
    return (
        f"{where}: no field {name!r}{within}{suggestion} (fields{within}: {present}). "
        f"Set {option} to the one to use"
    )


def _parse_prompt(row: dict[str, Any], where: str, field: str) -> str | tuple[Message, ...]:
    value = _lookup(row, field, where, "prompt_field")
    if isinstance(value, str) and value.strip():
        return _encodable(value, where, field)
    if isinstance(value, list) and value:
        return tuple(_parse_message(message, where, field) for message in value)
    raise DataError(
        f"{where}: field {field!r} must be text or a list of {{role, content}}, got {value!r}"
    )


def _parse_message(message: Any, where: str, field: str) -> Message:
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role"), given.get("content")
    if not (isinstance(role, str) and isinstance(content, str) and role and content):
        raise DataError(
            f"{where}: each message of {field!r} must have a role and a content, both text, "
            f"got {message!r}"
        )
    return Message(role, _encodable(content, where, field))


def _encodable(text: str, where: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} has half of a surrogate pair, {text[error.start]!r}, which "
            f"is no text; mend or remove the row"
        ) from error
    return text


def _parse_answer(row: dict[str, Any], where: str, field: str) -> str:
    value = _lookup(row, field, where, "answer_field")
    if isinstance(value, str) and value.strip():
        return _encodable(value.strip(), where, field)
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float | Decimal):
        return _number(value)
    if isinstance(value, datetime.date):  # a column of dates, in a Parquet file
        return _date(value)
    raise DataError(f"{where}: field {field!r} must be text or a number, got {value!r}")


def _number(value: float | Decimal) -> str:
    """The digits of a number; without a point where it is whole, as 12.0 for 12.

    Many tools turn a column of integers with a null into floats.
    """
    if not math.isfinite(value):
        return str(value)
    exact = value if isinstance(value, Decimal) else Decimal(repr(value))
    _, digits, exponent = exact.as_tuple()
    if exact == exact.to_integral_value() and len(digits) + int(exponent) <= 400:
        return f"{exact.to_integral_value():f}"
    return str(value)


def _date(value: datetime.date) -> str:
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return value.isoformat()


def _extract(answer_pattern: str, text: str, where: str, field: str) -> str:
    if answer_pattern == BOXED:
        found, failure = last_boxed(text), "there is no box with an answer in"
    else:
        match = re.search(answer_pattern, text)
        found, failure = match and match[1], f"answer_pattern {answer_pattern!r} finds no answer in"
    answer = (found or "").strip()
    if not answer:
        raise DataError(f"{where}: {failure} field {field!r}, which ends in {text[-60:]!r}")
    return answer
