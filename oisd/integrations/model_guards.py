"""The guards of `oisd train` on a model that TRL trains."""

from __future__ import annotations

import warnings
from typing import Any

from oisd.models.dropout import dropout_rates
from oisd.models.guards import cheap_guards


def guard_model(model: Any) -> None:
    """Run the cheap guards, as TRL passes padding: prompts on the left, without position ids.

    model: whole, on the device where it is trained.
    Raises ValueError for a model that sees later tokens, or that padding of completions changes;
    warns of the rest. Prompts of one length have no padding, so that theirs is no error.
    """
    named = bool(dropout_rates(model))  # of which the trainer has warned already
    for guard in cheap_guards(model, positions=False):
        if guard.corrupts and guard.name in ("finite", "causality", "right padding"):
            raise ValueError(f"OISDTrainer: {guard}")
        if not guard.holds and not (named and guard.name == "dropout"):
            warnings.warn(f"OISDTrainer: {guard}", stacklevel=3)
