"""Module names of earlier versions that now stand elsewhere: importing one still works, and warns.

The old name is the new module itself, not a copy, so that what a script sets there has its effect.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "oisd.advantages": "oisd.losses.advantages",
    "oisd.answers": "oisd.rewards.answers",
    "oisd.attention_interface": "oisd.models.attention",
    "oisd.attention_loss": "oisd.losses.attention",
    "oisd.attention_maps": "oisd.lens.attention",
    "oisd.attention_samples": "oisd.losses.attention",
    "oisd.benchmark_table": "oisd.evaluate.table",
    "oisd.catalogue": "oisd.data.catalogue",
    "oisd.checkpoint": "oisd.run.folder",
    "oisd.continuous": "oisd.rollout.continuous",
    "oisd.engine_choice": "oisd.run.engine_choice",
    "oisd.evaluation_run": "oisd.evaluate.run",
    "oisd.layout": "oisd.models.layout",
    "oisd.learner": "oisd.optimizer",
    "oisd.lens_page": "oisd.lens.page",
    "oisd.lens_plots": "oisd.lens.plots",
    "oisd.look": "oisd.lens.run",
    "oisd.metrics": "oisd.losses.metrics",
    "oisd.processes": "oisd.run.processes",
    "oisd.progress": "oisd.run.progress",
    "oisd.run.jsonl": "oisd.jsonl",
    "oisd.run_summary": "oisd.run.summary",
    "oisd.sampling": "oisd.rollout.sampling",
    "oisd.stopwatch": "oisd.run.progress",
    "oisd.tables": "oisd.schema",
    "oisd.workers": "oisd.rewards.workers",
}
_SINCE = {"oisd.run.jsonl": "0.3"}  # the others since 0.2


class _Alias(Loader):
    """Gives the module that stands under another name."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(MOVED[spec.name])
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own  # the import system has put the old name's there


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        since = f"{name} is {MOVED[name]} since oisd {_SINCE.get(name, '0.2')}"
        warnings.warn(since, DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, _Alias())


def keep_old_names() -> None:
    """Makes the old names importable; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
