"""Dropout and other noise that a model's training mode has, found and set.

Rates stand in three places: dropout modules, attributes that a module copied from the config, and
the config itself, which some forwards read. All are set, or one would survive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_RATE = re.compile("drop|jitter_noise")
# Rates of heads that a language model does not have.
_OF_OTHER_HEADS = re.compile("classifier|summary")


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """The rates above 0 by name: those of the config, or of modules where it names none.

    An adapter's own dropout is left out.
    """
    found: dict[str, float] = {}
    for holder, name in _rates(model):
        if not isinstance(holder, nn.Module) and not _OF_OTHER_HEADS.search(name):
            found[name] = getattr(holder, name)
    of_modules = {
        getattr(holder, n) for holder, n in _rates(model) if isinstance(holder, nn.Module)
    }
    for rate in sorted(of_modules - set(found.values())):
        found["dropout of modules"] = rate
    return found


def set_dropout(model: nn.Module, rate: float) -> dict[str, float]:
    """Set each rate above 0 to `rate`, in [0, 1); returns those that it replaced, by name.

    An adapter's own dropout stays.
    """
    before = dropout_rates(model)
    for holder, name in [*_rates(model)]:
        # The width of a router's noise is no probability.
        setattr(holder, name, 0.0 if "jitter" in name else rate)
    return {name: value for name, value in before.items() if value != rate}


def _rates(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Each holder of a rate above 0, and the attribute's name."""
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue
        names = {n for n, value in vars(module).items() if _RATE.search(n) and _is_rate(value)}
        if isinstance(module, nn.modules.dropout._DropoutNd) and _is_rate(module.p):
            names.add("p")
        yield from ((module, name) for name in sorted(names))
    yield from _rates_of_config(getattr(model, "config", None))


def _rates_of_config(config: Any) -> Iterator[tuple[Any, str]]:
    for name, value in vars(config).items() if hasattr(config, "model_type") else ():
        if _RATE.search(name) and _is_rate(value):
            yield config, name
        yield from _rates_of_config(value)


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1
