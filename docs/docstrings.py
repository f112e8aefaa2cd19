"""Extension of griffe: docstrings hold formulas, of which Markdown would eat `*` and `<`."""

import re
from typing import Any

import griffe


def escaped(text: str) -> str:
    """`text` with both characters escaped outside `code` and but for bullets."""
    parts = re.split(r"(``?[^`]+``?)", text)
    parts[::2] = [re.sub(r"(?<!^)(?<!\n)(\*)(?=\S)|(<)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


class Formulas(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and not obj.is_module:  # a module's formulas stand in blocks of code
            obj.docstring.value = escaped(obj.docstring.value)
