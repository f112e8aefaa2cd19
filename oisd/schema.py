"""TOML tables into dataclasses: what is unknown or of another type is refused by name.

Standard library only, as `oisd.config` is.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run: names the key, what was wanted and what came."""


def require(ok: bool, key: str, wanted: str, got: object) -> None:
    """Raise ConfigError unless `ok`, and for a number that is not finite."""
    if not ok or (isinstance(got, float) and not math.isfinite(got)):
        raise ConfigError(f"{key} must be {wanted}, got {got!r}")


def option(name: str) -> str:
    """The command line's option for a field."""
    return "--" + name.replace("_", "-")


def require_device(key: str, name: str) -> None:
    """Raise ConfigError for the name of a device that nothing here runs on."""
    known = bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name))
    require(known, key, '"auto", "cpu", "cuda" or "cuda:N"', name)


def fields(thing: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Those of a dataclass or of one of its objects."""
    return dataclasses.fields(thing)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one it resembles, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def of_table(kind: type, name: str, table: dict[str, Any], where: str) -> Any:
    """A dataclass `kind` of a table's keys and values.

    name, where: of the table and of the file, for messages. Raises ConfigError for a key that the
    class has not, and for a value of the wrong type or out of its range.
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
        if value == "none":
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
