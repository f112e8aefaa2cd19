"""Names with settings, `name:key=value,key=value`, and the sizes of a blank model written so.

Standard library only, like `oisd.config`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from oisd.schema import ConfigError, nearest


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


@dataclass(frozen=True)
class ScratchSizes:
    """Sizes of a blank Qwen3; the feed-forward width is 8/3 of the width unless it is given."""

    layers: int = 6
    width: int = 176
    heads: int = 4
    kv_heads: int = 0
    """Heads of keys and values; 0 for as many as `heads`."""
    feed_forward: int = 0
    """Width of the feed-forward blocks; 0 for 8/3 of `width`, rounded to a multiple of 16."""
    positions: int = 1024
    """Written to the model's configuration; rotary positions themselves have no limit."""

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def inner_width(self) -> int:
        return self.feed_forward or max(16, round(self.width * 8 / 3 / 16) * 16)


def is_scratch(path: str) -> bool:
    """Whether a `model.path` asks for a blank model: "scratch", or "scratch:layers=8,..."."""
    return path == "scratch" or path.startswith("scratch:")


def scratch_sizes(path: str) -> ScratchSizes:
    """The sizes that a `model.path` asks for.

    Raises ConfigError for an unknown setting, a value below 1, heads that do not divide the width
    into even parts, and `kv_heads` that does not divide `heads`.
    """
    name = "model.path"
    known = {field.name: field.default for field in dataclasses.fields(ScratchSizes)}
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
