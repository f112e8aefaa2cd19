"""TOML files and tables into dataclasses, and back; errors name the unknown key or wrong type.

Also names with settings of their own, `name:key=value`, such as a blank model's sizes.

Standard library only, like `oisd.config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

# The folders of the recipes that come with oisd: in a checkout, and in a wheel, which goes first.
_RECIPES = Path(__file__).parent.parent / "recipes", Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A configuration that cannot be run: names the key, what was wanted and what was given."""


def require(ok: bool, key: str, wanted: str, got: object) -> None:
    """Raise ConfigError unless `ok`, and for a number that is not finite."""
    if not ok or (isinstance(got, float) and not math.isfinite(got)):
        raise ConfigError(f"{key} must be {wanted}, got {got!r}")


def one_line(error: BaseException, named: bool = False) -> str:
    """What an error says, without line breaks; named: after the name of its type."""
    return " ".join((f"{type(error).__name__}: {error}" if named else str(error)).split())


def at_least(least: int, config: Any, *keys: str) -> None:
    """Raise ConfigError for a field of `config` below `least`; keys: "table.field"; None passes."""
    for key in keys:
        value = getattr(config, key.split(".")[1])
        require(value is None or value >= least, key, f"at least {least}", value)


def above_0(config: Any, *keys: str) -> None:
    """Raise ConfigError for a field of `config` that is 0 or less, as `at_least`."""
    for key in keys:
        value = getattr(config, key.split(".")[1])
        require(value is None or value > 0, key, "above 0", value)


def with_none_spelled(kind: type, arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with "None" for the "none" of each field that may be None.

    kind: the dataclass that they set, whose fields may be dataclasses.
    """
    found, name = [], ""
    may_be_none = set(_optional(kind))
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            if value == "none" and name in may_be_none:
                argument = f"{name}{equals}None"
        elif argument == "none" and name in may_be_none:
            argument = "None"
        found.append(argument)
    return found


def _optional(kind: type, before: str = "") -> Iterator[str]:
    """The options of a dataclass, and of those that its fields are, that may be None."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _optional(hint, f"{name}.")
        elif type(None) in typing.get_args(hint):
            yield option(before + name)


def option(name: str) -> str:
    """The command-line option for a field."""
    return "--" + name.replace("_", "-")


def require_device(key: str, name: str) -> None:
    """Raise ConfigError unless `name` is that of a device supported here."""
    known = bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name))
    require(known, key, '"auto", "cpu", "cuda" or "cuda:N"', name)


def fields(thing: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a dataclass or of an instance of one."""
    return dataclasses.fields(thing)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """How a message about an unknown name ends: with the known name nearest to it, or with all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def recipe_path(name: str) -> Path:
    """A recipe that comes with oisd, by its name, or a file by its path. Raises ConfigError."""
    if Path(name).is_file() or name.endswith(".toml"):
        return Path(name)
    return _own_recipe(name, f"recipe {name!r} is neither a file nor one that comes with oisd")


def _own_recipe(name: str, problem: str) -> Path:
    known = {file.stem: file for folder in _RECIPES for file in folder.glob("*.toml")}
    if name not in known:
        raise ConfigError(problem + nearest(name, known))
    return known[name]


def recipe_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and the ones it is based on, with their own tables; the last base comes first.

    Raises ConfigError for a file that is missing or is not TOML, for an unknown base, and for bases
    in a circle.
    """
    chain: dict[Path, tuple[Path, dict[str, Any]]] = {}
    while path.resolve() not in chain:
        tables = _read_toml(path)
        chain[path.resolve()] = path, tables
        if "base" not in tables:
            return list(chain.values())[::-1]
        path = _base_path(path, tables.pop("base"))
    files = [*(file.name for file, _ in chain.values()), path.name]
    raise ConfigError(f"{files[0]}: base must not lead in a circle, got {' -> '.join(files)}")


def _base_path(path: Path, base: Any) -> Path:
    """The file of the recipe that `base` names in the recipe at `path`."""
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the name of a recipe, got {base!r}")
    if not base.endswith(".toml"):
        return _own_recipe(base, f"{path}: base {base!r} is not a recipe that comes with oisd")
    if not (path.parent / base).is_file():
        beside = [file.name for file in path.parent.glob("*.toml")]
        raise ConfigError(f"{path}: base {base!r} is not a file beside it{nearest(base, beside)}")
    return path.parent / base


def merged(below: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """The tables of a base with those of a recipe over them, key by key."""
    over = {
        name: below[name] | table if name in below and isinstance(table, dict) else table
        for name, table in tables.items()
    }
    return below | over


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decoded(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error


def decoded(content: bytes) -> str:
    """Text in UTF-8, 16 or 32, with or without a byte order mark; ValueError for other bytes."""
    try:
        # JSON's standard tells them apart by where zeros stand, which holds for any ASCII text.
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"wanted UTF-8 or UTF-16, got a byte {content[error.start]:#04x} at {error.start:,} "
            f"that is neither, as in Latin-1 or Windows-1252; convert it, for instance by "
            f"`iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error


def of_table(kind: type, name: str, table: dict[str, Any], where: str) -> Any:
    """A dataclass `kind` from a table's keys and values.

    name, where: of the table and of the file, for messages. Raises ConfigError for a key that the
    class does not have, and for a value of the wrong type or out of its range.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {name}.{key}{nearest(key, hints)}")
        try:
            values[key] = _convert(value, hints[key])
        except TypeError as error:
            raise ConfigError(f"{where}: {name}.{key} must be {error}, got {value!r}") from None
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names; TypeError with what was wanted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise TypeError("one of " + ", ".join(repr(a) for a in arguments))
    if type(None) in arguments:
        if value in ("none", "None"):  # as the command line's own spelling is
            return None
        wanted = []
        for inner in arguments[:-1]:  # None is the last
            try:
                return _convert(value, inner)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(" or ".join(wanted))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(_convert(item, arguments[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError(
            {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint]
        )
    return value


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Turn a plain ValueError into a ConfigError that names the setting it comes from."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # one of ours, which says what it is about
            raise
        raise ConfigError(f"{key}: {error}") from error


def to_tables(config: Any) -> dict[str, dict[str, Any]]:
    """Nested dictionaries ready for TOML, which has no null: a value of None is left out.

    Where None is not the default, it is written as "none", which is read back as None.
    """
    tables: dict[str, dict[str, Any]] = {}
    for section in fields(config):
        table = tables[section.name] = {}
        values = getattr(config, section.name)
        for f in fields(values):
            value = getattr(values, f.name)
            if value is None and f.default is not None:
                value = "none"
            if value is not None:
                table[f.name] = list(value) if isinstance(value, tuple) else value
    return tables


def differences(a: Any, b: Any) -> list[str]:
    """The settings in which two configurations differ, as "table.key: a != b"."""
    found = []
    for section in fields(a):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for f in fields(left):
            x, y = getattr(left, f.name), getattr(right, f.name)
            if x != y:
                found.append(f"{section.name}.{f.name}: {x!r} != {y!r}")
    return found


def whole_numbers(written: str, text: str, known: Mapping[str, int]) -> dict[str, int]:
    """The numbers that `key=value,key=value` sets, over those of `known`.

    written: the whole of what the user wrote, for messages.
    known: each key with its default. Raises ValueError for any other key, a key given twice, and a
    value that is not a whole number.
    """
    found: dict[str, int] = {}
    for part in text.split(",") if text else []:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"{written}: settings are written key=value, got {part!r}")
        if key not in known:
            raise ValueError(f"{written}: unknown setting {key!r}{nearest(key, known)}")
        if key in found:
            raise ValueError(f"{written}: {key} is given twice; leave one out")
        if not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise ValueError(f"{written}: {key} must be a whole number, got {value!r}")
        found[key] = int(value)
    return {**known, **found}


@dataclasses.dataclass(frozen=True)
class ScratchSizes:
    """Sizes of a blank Qwen3; the feed-forward width is 8/3 of the width unless it is given."""

    layers: int = 6
    width: int = 176
    heads: int = 4
    kv_heads: int = 0
    """Heads of keys and values; 0 for as many as `heads`."""
    feed_forward: int = 0
    """Width of the feed-forward blocks; 0 for 8/3 of `width`, rounded to a multiple of 16."""

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def inner_width(self) -> int:
        return self.feed_forward or max(16, round(self.width * 8 / 3 / 16) * 16)


def is_scratch(path: str) -> bool:
    """Whether a `model.path` asks for a blank model: "scratch", or "scratch:layers=8,..."."""
    return path == "scratch" or path.startswith("scratch:")


def require_no_misspelt_blank(path: str) -> None:
    """Raise ConfigError for a `model.path` that is nearly the name of a built-in blank model.

    Hub ids have a slash, and folders are there.
    """
    name, colon, _ = path.partition(":")
    if is_scratch(path) or path == "arithmetic" or os.path.exists(path):
        return
    if meant := difflib.get_close_matches(name, ("arithmetic", "scratch"), n=1, cutoff=0.8):
        written = "scratch:layers=6,width=176,heads=4" if meant[0] == "scratch" else meant[0]
        raise ConfigError(
            f"model.path {path!r}: there is no such folder here, and no blank model of that name; "
            f"did you mean {meant[0] if not colon else written!r}?"
        )


def scratch_sizes(path: str) -> ScratchSizes:
    """The sizes that a `model.path` asks for.

    Raises ConfigError for an unknown setting, a value below 1, heads that do not divide the width
    into even parts, and `kv_heads` that does not divide `heads`.
    """
    name = "model.path"
    known = {field.name: field.default for field in fields(ScratchSizes)}
    try:
        given = whole_numbers(f"{name} {path!r}", path.partition(":")[2], known)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sizes = ScratchSizes(**given)
    for key, value in given.items():
        least = 0 if known[key] == 0 else 1
        if value < least:
            raise ConfigError(f"{name} {path!r}: {key} must be at least {least}, got {value}")
    if sizes.width % (2 * sizes.heads):
        raise ConfigError(
            f"{name} {path!r}: width must be a multiple of 2 x heads = {2 * sizes.heads} (rotary "
            f"positions need an even width of each head), got {sizes.width}"
        )
    if sizes.heads % sizes.key_heads:
        raise ConfigError(
            f"{name} {path!r}: kv_heads must divide heads = {sizes.heads}, got {sizes.kv_heads}"
        )
    return sizes
