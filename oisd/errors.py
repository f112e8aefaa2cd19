"""What a command says of an error: in one line if it is explained, else where its traceback is."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from oisd.schema import ConfigError, one_line


def report(error: Exception) -> int:
    """Print one line about an error, on one process of those that share a run.

    Returns the exit status: 2 for an impossible request, else 1.
    """
    explained, outside = is_explained(error), from_outside(error)
    if speaks_for_all(may_follow=not (explained or outside)):
        said = one_line(error) if isinstance(error, ConfigError) else str(error)
        print(f"oisd: {said if explained else outside or of_defect(error)}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) or is_refusal(error) else 1


def speaks_for_all(may_follow: bool = False) -> bool:
    """Whether this process says what is wrong, as one of those that torchrun has started does.

    may_follow: as `oisd.run.processes.is_first_to_fail` takes it.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from oisd.run.processes import is_first_to_fail  # with torch

    return is_first_to_fail(may_follow)


def is_explained(error: Exception) -> bool:
    """Whether the message tells the user enough, so that a traceback would be noise."""
    if isinstance(error, ConfigError):
        return True
    from oisd.data import DataError
    from oisd.jsonl import DamagedFileError
    from oisd.models import UnsupportedModelError
    from oisd.objective import NonFiniteError
    from oisd.rewards import RewardError
    from oisd.run.folder import RunFolderError

    return isinstance(
        error,
        RunFolderError
        | DamagedFileError
        | DataError
        | UnsupportedModelError
        | RewardError
        | NonFiniteError,
    )


def is_refusal(error: Exception) -> bool:
    """Whether nothing was done, because there is no such source, or another run in the folder."""
    from oisd.data import SourceError
    from oisd.run.folder import OtherRunError

    return isinstance(error, SourceError | OtherRunError)


def from_outside(error: Exception) -> str:
    """What a machine or an installation lacks, in one line; "" for another error."""
    reason = shortened(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of memory: {reason}; take a smaller batch size or number of tokens, or see "
            f"`oisd plan`"
        )
    if isinstance(error, ImportError):
        return f"a package is missing or broken: {reason}"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {reason}"
    return ""


def of_defect(error: Exception) -> str:
    """One line about an error that nobody foresaw; its traceback goes into a file."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="oisd-traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return (
        f"unexpected {type(error).__name__}: {shortened(error)}; its traceback is in {file.name} "
        f"(--debug shows it at once)"
    )


def shortened(error: Exception) -> str:
    """The message in one line of at most 300 characters."""
    text = one_line(error)
    return text if len(text) <= 300 else text[:299] + "\u2026"
