"""A cell of the study: its start, its run, and the row of what came out."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.protocol import Cell, Protocol
from oisd.config import ModelConfig, TrainConfig
from oisd.data import Example
from oisd.data.problems import load_problems
from oisd.jsonl import read_rows
from oisd.lens import LayerLens
from oisd.lens.attention import LayerAttention
from oisd.objective import NonFiniteError
from oisd.policy import Policy, load_policy
from oisd.trainer import Trainer

# What a repetition of a cell has to give again, to the bit.
REPEATED = ("start", "curve", "pass_at_k", "reward", "entropy", "shares", "layers")


def start_of(protocol: Protocol, task: str, seed: int, out: Path) -> Path:
    """The checkpoint that all arms of a (task, seed) set out from; warms it up if it is missing."""
    folder = out / task / f"seed-{seed}" / "start"
    checkpoint = folder / "checkpoints" / "step-0"
    if not checkpoint.is_dir():
        Trainer(protocol.warm_up(task, seed, str(folder))).train()
    return checkpoint


def digest_of(checkpoint: Path) -> str:
    """Of a checkpoint's weights."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]


def folder_of(cell: Cell, out: Path) -> Path:
    """Where a cell runs."""
    return out / cell.task / f"seed-{cell.seed}" / cell.arm


def run_cell(protocol: Protocol, cell: Cell, out: Path) -> dict[str, Any]:
    """Run a cell, or what is left of it, and return its row.

    A run whose numbers stop being finite is a row too, with `failed` in the place of results.
    """
    start = start_of(protocol, cell.task, cell.seed, out)
    folder = folder_of(cell, out)
    config = protocol.run(cell, str(start), str(folder))
    row: dict[str, Any] = {
        **cell._asdict(),
        "digest": protocol.digest,
        "start": digest_of(start),
    }
    resumed = any((folder / "checkpoints").glob("step-*"))
    began, cpu = time.perf_counter(), time.process_time()
    try:
        Trainer(config).train()
    except NonFiniteError as error:
        return row | {"failed": str(error).splitlines()[0]}
    # Of a run that was stopped and continued, no time of the whole is known.
    wall = None if resumed else round(time.perf_counter() - began, 1)
    used = None if resumed else round(time.process_time() - cpu, 1)
    row |= results(folder) | {"wall_s": wall, "cpu_s": used}
    end = folder / "checkpoints" / f"step-{config.run.steps}"
    row["layers"] = {
        "before": layers_of(start, config, protocol.lens_texts),
        "after": layers_of(end, config, protocol.lens_texts),
    }
    return row


def results(folder: Path) -> dict[str, Any]:
    """What the files of a finished run say of it."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    curve = [[row["step"], row["eval/avg_at_k"]] for row in rows if "eval/avg_at_k" in row]
    steps = [row for row in rows if row["step"] > 0]
    last = json.loads((folder / "evaluations" / f"step-{curve[-1][0]}.json").read_text("utf-8"))
    shares = {
        name: [row[name] for row in steps if name in row]
        for name in ("share/think", "share/attention")
    }
    return {
        "curve": curve,
        "auc": area(curve),
        "final": curve[-1][1],
        "pass_at_k": last["pass_at_k"],
        "reward": [row["reward"] for row in steps],
        "entropy": [row.get("entropy/policy") for row in steps],
        "shares": {name: values for name, values in shares.items() if values},
        "step_s": statistics.median(row["time/step"] for row in steps),
        "alarms": [line for row in rows for line in row.get("alarms", ())],
    }


def area(curve: Sequence[Sequence[float]]) -> float:
    """The mean of a curve of (step, value) over its steps, by the trapezoid rule."""
    parts = [
        (after[0] - before[0]) * (before[1] + after[1]) / 2
        for before, after in zip(curve[:-1], curve[1:], strict=True)
    ]
    return sum(parts) / (curve[-1][0] - curve[0][0])


def layers_of(checkpoint: Path, config: TrainConfig, count: int) -> dict[str, list[float]]:
    """Each layer on held-out problems with their solutions, over the tokens that are predicted.

    js: of the lens's distribution and the final layer's. attention_js: mean over heads, of the
    attention of the layers below the final one and the final one's. entropy: of the lens. In nats.
    """
    source = config.eval.source
    assert source is not None
    policy = load_policy(ModelConfig(path=str(checkpoint)), seed=0, device="cpu")
    policy.model.eval()
    lens = LayerLens(policy.model, boundary=False)
    attention = LayerAttention(policy.model, range(1, lens.num_layers))
    found: dict[str, list[torch.Tensor]] = {"js": [], "entropy": [], "attention_js": []}
    for example in load_problems(source, config.eval, config.run.seed)[:count]:
        ids, written = tokens_of(policy, example)
        look, overlap = lens(ids), attention(ids)
        found["js"].append(look.divergence[:, written])
        found["entropy"].append(look.entropy[:, written])
        found["attention_js"].append(overlap.divergence[:, written])
    return {
        name: torch.cat(parts, dim=1).double().mean(1).tolist() for name, parts in found.items()
    }


def tokens_of(policy: Policy, example: Example) -> tuple[list[int], slice]:
    """Token ids of a problem with its solution and its end, and the positions that predict it."""
    encode: Callable[..., list[int]] = policy.tokenizer.encode
    prompt = encode(str(example.prompt), add_special_tokens=False)
    solution = encode(example.solution or example.answer, add_special_tokens=False)
    ids = [*prompt, *solution]
    return ids, slice(len(prompt) - 1, len(ids))


def differences(recorded: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """Where a repetition is not the recorded run, to the bit; [] if it is."""
    repeated = json.loads(json.dumps(again))
    return [
        f"{name}: recorded {recorded.get(name)}, now {repeated.get(name)}"
        for name in (*REPEATED, "failed")
        if recorded.get(name) != repeated.get(name)
    ]
