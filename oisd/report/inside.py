"""The layers of a run's model before and after: lens and attention of two of its checkpoints.

Both read the same texts: problems of the run's first evaluation, each with a completion of the last
one, or else completions of training. They are read from the run's folder, not from its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oisd.config import ConfigError
from oisd.lens import LayerLens, LensSummary, summarise
from oisd.lens.attention import LayerAttention
from oisd.lens.page import lens_rows, visible
from oisd.lens.plots import Picture
from oisd.models import UnsupportedModelError
from oisd.policy import Policy, load_policy
from oisd.report.answers import training_samples
from oisd.report.runs import Run
from oisd.schema import one_line

# The attention's maps grow with the square of the length.
_MOST_TOKENS = 512
_SHOWN_TOKENS = 20


@dataclass(frozen=True)
class Look:
    """What one checkpoint's layers do, means over the tokens of all texts."""

    name: str
    summary: LensSummary
    picture: Picture
    attention_layers: list[int]
    overlap: list[float]
    """Of each of `attention_layers` with the final layer's attention."""


@dataclass(frozen=True)
class Inside:
    """A run's model before and after."""

    layer: int
    looks: list[Look]
    texts: int
    tokens: list[str]
    """Of the first text, its last ones."""
    without: str
    """Why something is missing, or ""."""

    def rows(self) -> list[dict[str, Any]]:
        """The final layer and the student layer of each look, for `lens_rows` of layers.html."""
        found = []
        for look in self.looks:
            final = len(look.picture.top)
            found += lens_rows(look.picture, (final, self.layer), 0, f"{look.name}, ")
        return found


def checkpoints(run: Run) -> list[tuple[str, Path | None]]:
    """Names and folders of the model before and after; None stands for the base model.

    Raises ConfigError for a run without a checkpoint after a step.
    """
    last = run.folder.latest()
    steps = sorted(
        int(path.name.removeprefix("step-")) for path in run.folder.checkpoints.glob("step-*")
    )
    if last is None or steps == [0]:
        raise ConfigError(f"{run.name} has no checkpoint after a step yet")
    after = int(last.name.removeprefix("step-"))
    if run.config.warmup.steps == 0 and steps[0] > 0:
        return [("base model", None), (f"step {after}", last)]
    first = run.folder.checkpoints / f"step-{steps[0]}"
    if steps[0] == after:
        return [(f"step {after}", last)]
    return [(f"step {steps[0]}", first), (f"step {after}", last)]


def look_inside(run: Run, texts: int, device: str) -> Inside:
    """Read the models of `checkpoints` and look at `texts` texts of the run, at least one.

    Raises ConfigError where there is nothing to look at, and what reading a model raises.
    """
    samples = _samples(run, texts)
    if not samples:
        raise ConfigError(f"{run.name} has neither evaluations nor completions to look at")
    looks: list[Look] = []
    tokens: list[str] = []
    layer, without = run.config.oisd.student_layers[0], ""
    for name, folder in checkpoints(run):
        config = replace(run.config.model, gradient_checkpointing=False, dropout=None)
        policy = load_policy(config, seed=run.config.run.seed, device=device, checkpoint=folder)
        policy.model.eval()
        ids = [_token_ids(policy, *sample) for sample in samples]
        tokens = tokens or [visible(token) for token in _decoded(policy, ids[0][-_SHOWN_TOKENS:])]
        lens = LayerLens(policy.model, lens_norm=run.config.oisd.lens_norm)
        layer = min(layer, lens.num_layers - 1)
        with policy.autocast():
            seen = [lens(text, _SHOWN_TOKENS if n == 0 else 0) for n, text in enumerate(ids)]
            layers, overlap, without = _overlap(policy, lens.num_layers, ids)
        picture = Picture(
            _decoded(policy, ids[0][-_SHOWN_TOKENS:]),
            [_decoded(policy, row) for row in seen[0].top.tolist()],
            seen[0].probability.tolist(),
            (seen[0].agreement[:, -_SHOWN_TOKENS:] == 1).tolist(),
        )
        looks.append(Look(name, summarise(seen), picture, layers, overlap))
    if len(looks) == 1:
        without = " ".join(["The run kept one checkpoint, so that there is no before.", without])
    elif looks[0].name not in ("base model", "step 0"):
        without = " ".join(
            [f"The first checkpoint that is still there is {looks[0].name}.", without]
        )
    return Inside(layer, looks, len(samples), tokens, without.strip())


def _samples(run: Run, count: int) -> list[tuple[str, str]]:
    """Prompts with completions, as text."""
    steps = run.evaluated_steps
    if steps:
        problems = run.problems(steps[-1])
        return [(p.prompt, p.completions[0]) for p in problems[:count] if p.completions]
    tables = training_samples(run)
    return [(row["prompt"], row["completion"]) for _, rows in tables for row in rows][:count]


def _token_ids(policy: Policy, prompt: str, completion: str) -> list[int]:
    """The text's last tokens; its prompt has the special ones spelled out already."""
    parts = [policy.tokenizer(part, add_special_tokens=False) for part in (prompt, completion)]
    return [token for part in parts for token in part["input_ids"]][-_MOST_TOKENS:]


def _overlap(
    policy: Policy, depth: int, texts: Sequence[Sequence[int]]
) -> tuple[list[int], list[float], str]:
    """Layers, mean overlap of each, and why there is none."""
    try:
        look = LayerAttention(policy.model, range(1, depth))
    except UnsupportedModelError as error:
        return [], [], f"Attention is not compared: {one_line(error)}."
    found = [look(ids) for ids in texts]
    overlap = torch.cat([one.overlap for one in found], dim=1).mean(1)
    return found[0].layers, overlap.tolist(), ""


def _decoded(policy: Policy, ids: Sequence[int]) -> list[str]:
    return policy.tokenizer.batch_decode([[token] for token in ids])
