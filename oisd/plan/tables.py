"""The tables of `oisd plan`: by part, by card, and what the figures assume."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from oisd.config import TrainConfig
from oisd.plan.memory import MemoryPlan, memory_plan, with_sharding
from oisd.plan.shapes import Shape

GIB = 1 << 30
USABLE = 0.92  # share of a card that a plan may fill
CARDS = {"24 GB": 24, "40 GB (A100)": 40, "48 GB (L40S)": 45, "80 GB (A100, H100)": 80,
         "141 GB (H200)": 140, "180 GB (B200)": 179}  # fmt: skip
SHARDS = (2, 4, 8)


def rich_tables(
    config: TrainConfig, shape: Shape, processes: int | None = None
) -> Iterator[Table | Text]:
    """The plan of a run for a terminal: by part, by card, and its assumptions.

    processes: as `memory_plan` has it.
    """
    plan = memory_plan(config, shape, processes)
    yield _by_part(plan)
    yield _by_card(config, shape, plan)
    yield Text("\n".join(assumptions(plan)))


def _by_part(plan: MemoryPlan) -> Table:
    of = f" of {plan.processes}" if plan.processes > 1 else ""
    how = ', run.sharding = "fsdp2"' if plan.sharded else ""
    table = Table(title=f"Memory of one process{of}, GiB{how}")
    table.add_column("part")
    table.add_column("phase")
    table.add_column("here", justify="right")
    table.add_column("eager PyTorch", justify="right")
    for name, size in plan.resident.items():
        table.add_row(name, "always", _gib(size), _gib(size))
    for name, size in plan.host.items():
        table.add_row(name, "always, on the host", f"({_gib(size)})", f"({_gib(size)})")
    for name, size in plan.update.items():
        table.add_row(name, "update", _gib(size), _gib(plan.eager.get(name, size)))
    for name, size in plan.rollout.items():
        table.add_row(name, "rollout", _gib(size), "")
    table.add_section()
    update, rollout = sum(plan.update.values()), sum(plan.rollout.values())
    table.add_row("peak", "update", _gib(plan.held + update), _gib(plan.peak_eager))
    table.add_row("peak", "rollout", _gib(plan.held + rollout), "")
    return table


def _by_card(config: TrainConfig, shape: Shape, plan: MemoryPlan) -> Table:
    cards = Table(title=f"Does it fit? (in {USABLE:.0%} of a card)")
    cards.add_column("card")
    cards.add_column("whole model\non each", justify="right")
    peaks = [memory_plan(with_sharding(config, "none"), shape, plan.processes).peak]
    for shards in SHARDS:
        cards.add_column(f"fsdp2 over\n{shards} cards", justify="right")
        peaks.append(memory_plan(with_sharding(config, "fsdp2"), shape, shards).peak)
    for card, size in CARDS.items():
        cards.add_row(card, *("yes" if peak <= USABLE * size * GIB else "no" for peak in peaks))
    cards.add_section()
    cards.add_row("GiB", *map(_gib, peaks))
    return cards


def assumptions(plan: MemoryPlan) -> list[str]:
    """What the figures assume, one line each."""
    shape = plan.shape
    other = "without" if plan.checkpointing else "with"
    kept = "float32"
    if plan.trained != shape.parameters:
        kept = f"frozen, linear layers in model.dtype, and {plan.trained:,} of adapters in float32,"
    lines = [
        f"{shape.parameters:,} parameters ({shape.source}), {kept} as in `oisd train`.",
        f"Micro-batches of {plan.tokens:,} padded tokens, rows of {plan.longest:,}; "
        f"{plan.at_once:,} completions sampled at once (rollout.batch_size), all of full length.",
        f"Activations {other} gradient checkpointing: {_gib(plan.other_checkpointing)} GiB.",
        "Fused attention (SDPA) in the layers. Not counted: fragmentation, the CUDA context, "
        "communication buffers beyond those of FSDP2's gradients.",
    ]
    maps = plan.update["attention maps"]
    if maps and maps == plan.eager["attention maps"]:
        lines.append('attention_kernel = "reference": the attention loss needs the eager maps.')
    return lines


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
