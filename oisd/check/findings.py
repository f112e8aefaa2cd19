"""One row of the table: what was looked at, whether it holds, and what to do if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from oisd.data import DataError
from oisd.models import UnsupportedModelError
from oisd.models.guards import Guard
from oisd.schema import ConfigError, one_line

Status = Literal["pass", "warn", "fail", "not checked"]


@dataclass(frozen=True)
class Finding:
    """A row of `oisd check`.

    part: "model", "tokenizer", "data", "rollout" or "run".
    value, bound: the number found and the largest that is well; None where there is none.
    remedy: the setting to change; empty where all is well.
    """

    part: str
    name: str
    status: Status
    found: str
    value: float | None = None
    bound: float | None = None
    remedy: str = ""

    def as_row(self) -> dict[str, Any]:
        """The fields, ready for JSON, which has neither NaN nor infinity."""
        row = asdict(self)
        if self.value is not None and not math.isfinite(self.value):
            row["value"] = str(self.value)
        return row


def of_guard(part: str, guard: Guard, failing: Status = "fail") -> Finding:
    """The row of a guard; a value near its bound is a warning.

    failing: the status of a value far above its bound.
    """
    if not guard.is_checked:
        return Finding(part, guard.name, "not checked", guard.found)
    status: Status = "pass" if guard.holds else failing if guard.corrupts else "warn"
    bound = guard.bound or None
    return Finding(part, guard.name, status, guard.found, guard.value, bound, guard.remedy)


def attempted(
    part: str, name: str, look: Callable[[], Iterable[Finding]], refused: Status = "fail"
) -> list[Finding]:
    """The rows that `look` gives, or one row that says why there are none.

    refused: the status where the model, the data or a setting cannot be used. What could not be run
        for another reason is not checked.
    """
    found: list[Finding] = []
    try:
        found.extend(look())  # so that rows before an error stay
    except Exception as error:  # a table with a hole says more than a traceback
        reason = one_line(error) or type(error).__name__
        given = isinstance(error, ConfigError | DataError | UnsupportedModelError)
        if not isinstance(error, ValueError | OSError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        found.append(Finding(part, name, refused if given else "not checked", reason))
    return found
