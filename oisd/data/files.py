"""Problems from a file on this disk: JSON, JSON Lines or Parquet.

JSON is read here instead of by `datasets`, which guesses types from text: "2023-01-15" would become
a time, and a whole number beyond 2^63 a float. Here text stays as written, and so do the digits of
a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from oisd.data.examples import DataError, SourceError
from oisd.schema import decoded

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

_LFS = b"version https://git-lfs"
_PARQUET = b"PAR1"


class Rows:
    """Rows in memory, with those methods of `datasets.Dataset` that `load_examples` uses."""

    def __init__(self, rows: list[dict[str, Any]]):
        self._rows = rows
        self.column_names = list(dict.fromkeys(name for row in rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """These rows, in this order."""
        return [self._rows[i] for i in indices]

    def select_columns(self, names: list[str]) -> Rows:
        """All rows with these columns alone."""
        return Rows([{name: row[name] for name in names if name in row} for row in self._rows])


def check_file(path: Path) -> None:
    """Raise DataError for a file that holds no data: empty, a Git LFS pointer, a cut Parquet."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path}: expected a {', '.join(FORMATS)} file or a folder")
    try:
        with path.open("rb") as stream:
            first = stream.read(len(_LFS))
            size = stream.seek(0, 2)
            stream.seek(max(size - len(_PARQUET), 0))
            last = stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not first:
        raise DataError(f"{path}: the file is empty")
    if first == _LFS:
        raise DataError(
            f"{path}: is a Git LFS pointer, not the data; run `git lfs pull` in its folder, or "
            f"download the file itself"
        )
    if path.suffix.lower() == ".parquet":
        if first[: len(_PARQUET)] != _PARQUET:
            raise DataError(f"{path}: is not a Parquet file, which would begin with PAR1")
        if last != _PARQUET or size < 12:
            raise DataError(f"{path}: the Parquet file is cut off; copy or download it again")


def read_json(files: Iterable[Path], split: str) -> Rows:
    """The rows of files of one split, whatever it is called, or a slice of them ("train[:100]")."""
    files = list(files)
    rows = [row for path in files for row in _rows_of(path)]
    if split.isidentifier():
        return Rows(rows)
    from datasets import ReadInstruction

    # The instruction names a split; all of them stand for these rows.
    names = re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(names, len(rows)))
    except (ValueError, AssertionError) as error:
        raise SourceError(f"{files[0]}: cannot read split {split!r}: {error}") from error
    return Rows([row for part in parts for row in rows[part.from_ : part.to]])


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    text = _text_of(path)
    start = text.lstrip()[:1]
    whole: Any = None
    if start == "[" or (start == "{" and path.suffix.lower() == ".json"):
        try:
            whole = _parse(text)
        except _TwiceError as error:
            line = _line_of_second(text, error.key)
            raise _twice(path, line, error) from error
        except ValueError as error:
            # Several objects, one a line, in a file called .json, are read below.
            if start == "[" or "Extra data" not in str(error):
                raise _not_json(path, str(error)) from error
    if isinstance(whole, dict):
        whole = _of_object(path, whole)
    if whole is not None:
        for number, row in enumerate(whole):
            yield _checked(path, f"item {number}", row)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = _parse(line)
            except _TwiceError as error:
                raise _twice(path, number, error) from error
            except ValueError as error:
                raise _not_json(path, f"line {number}: {error}") from error
            yield _checked(path, f"line {number}", row)


def _of_object(path: Path, found: dict[str, Any]) -> list[Any]:
    """The rows of a file that is one object: columns of equal length, or one row."""
    if not any(isinstance(value, list) for value in found.values()):
        if any(isinstance(value, dict) for value in found.values()):
            raise _one_object(path, found)
        return [found]
    columns = list(found.values())
    if not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        raise _one_object(path, found)
    if len(found) == 1:
        raise _one_object(path, found)
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def _one_object(path: Path, found: dict[str, Any]) -> DataError:
    keys = ", ".join(list(found)[:5])
    return DataError(
        f"{path}: wanted a list of objects, or one object a line, got one object with the keys "
        f"{keys}; write the list of rows alone into the file"
    )


def _checked(path: Path, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{path}: {where} must be an object with a problem and its answer, got {str(row)[:60]}"
        )
    return row


def _twice(path: Path, line: int, error: _TwiceError) -> DataError:
    return DataError(f"{path}: line {line}: {error}; keep one of them")


def _line_of_second(text: str, key: str) -> int:
    """The line in which a key stands for the second time in the first object with it twice."""
    found: list[int] = []

    def positions(start: tuple[str, int], *rest: Any) -> tuple[Any, int]:
        pairs, end = read_object(start, *rest)
        if not found and [name for name, _ in pairs].count(key) > 1:
            written = "|".join(re.escape(json.dumps(key, ensure_ascii=a)) for a in (True, False))
            places = re.finditer(rf"({written})\s*:", text[start[1] : end])
            found.append(start[1] + max((place.start() for place in places), default=0))
        return pairs, end

    decoder: Any = json.JSONDecoder(object_pairs_hook=lambda pairs: pairs)
    read_object, decoder.parse_object = decoder.parse_object, positions
    # The scanner in C would not call it.
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # pyright: ignore
    decoder.decode(text)
    return text.count("\n", 0, found[0]) + 1


def _not_json(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: is not JSON: {reason}")


class _TwiceError(ValueError):
    """A key stands twice in one object, of which JSON's readers silently take the last."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice in one object")
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for i, key in enumerate(keys) if key in keys[:i]))
    return found


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal, parse_int=_integer, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int | Decimal:
    """Python refuses to convert more than some thousand digits between text and integers."""
    return int(digits) if len(digits) < 4000 else Decimal(digits)


def _text_of(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
