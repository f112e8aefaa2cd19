"""The memory that a run needs, computed from shapes alone: `oisd plan`.

`oisd.plan.shapes` has the sizes of models, `oisd.plan.memory` the formulas, and `oisd.plan.tables`
what is printed.
"""

from oisd.plan.memory import (
    SHARDED_PROCESSES,
    MemoryPlan,
    check_layers,
    layer_activations,
    lora_targets,
    memory_plan,
    rollout_parts,
    with_sharding,
)
from oisd.plan.shapes import SHAPES, Shape, model_shape, shape_of
from oisd.plan.tables import CARDS, GIB, SHARDS, USABLE, assumptions, rich_tables

__all__ = [
    "CARDS",
    "GIB",
    "SHAPES",
    "SHARDED_PROCESSES",
    "SHARDS",
    "USABLE",
    "MemoryPlan",
    "Shape",
    "assumptions",
    "check_layers",
    "layer_activations",
    "lora_targets",
    "memory_plan",
    "model_shape",
    "rich_tables",
    "rollout_parts",
    "shape_of",
    "with_sharding",
]
