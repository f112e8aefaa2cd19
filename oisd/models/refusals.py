"""Refusals of a model, with what helps as data: whoever catches one may say it in other words."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Remedy(NamedTuple):
    """An option and the value under which the model is taken.

    option: an argument of `Taps`, or "attn_implementation" or "dropout" of the model.
    words: how to set it from Python, where `option=value` is not it.
    """

    option: str
    value: bool | float | str
    words: str = ""

    @property
    def written(self) -> str:
        """The value as Python and TOML write it, but for TOML's lower-case booleans."""
        return f'"{self.value}"' if isinstance(self.value, str) else f"{self.value}"

    def __str__(self) -> str:
        return self.words or f"use {self.option}={self.written}"

    def as_setting(self, name: str) -> str:
        """The remedy as a setting of a recipe that takes the option's values, called `name`."""
        return f"set {name} = {self.written}"


WITHOUT_ATTENTION = Remedy("attention", False)
EAGER = Remedy("attn_implementation", "eager", 'call model.set_attn_implementation("eager")')


class UnsupportedModelError(ValueError):
    """A model that Taps does not understand; the message says what was missing or different.

    reason: what is wrong, without a remedy.
    remedies: any of them helps; the message names all, in the words of `Taps`.
    """

    def __init__(self, reason: str, *remedies: Remedy) -> None:
        self.reason, self.remedies = reason, remedies
        super().__init__(self.worded(str))

    def worded(self, say: Callable[[Remedy], str]) -> str:
        """The message with `say` of each remedy; those of which it says nothing are left out."""
        said = ", or ".join(filter(None, map(say, self.remedies)))
        return f"{self.reason}; {said}" if said else self.reason

    def reworded(self, say: Callable[[Remedy], str]) -> UnsupportedModelError:
        """The same refusal, whose message is `worded(say)`."""
        other = UnsupportedModelError(self.reason, *self.remedies)
        other.args = (self.worded(say),)
        return other
