"""OISD: on-policy internal self-distillation of language models (arXiv 2605.29089).

The names below are imported when first used, so that `import oisd` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oisd.moved import keep_old_names

if TYPE_CHECKING:
    from oisd.config import TrainConfig, load_recipe
    from oisd.models import Taps
    from oisd.trainer import Trainer

_HOMES = {
    "Taps": "oisd.models",
    "TrainConfig": "oisd.config",
    "Trainer": "oisd.trainer",
    "load_recipe": "oisd.config",
}
_MODULES = ("config", "data", "evaluate", "losses", "models", "plots", "rewards", "trainer")

__all__ = ["Taps", "TrainConfig", "Trainer", "load_recipe"]


keep_old_names()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"oisd.{name}")
    raise AttributeError(f"module 'oisd' has no attribute {name!r}")
