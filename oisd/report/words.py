"""What ran, in words: the method, the settings that differ, and what to know before comparing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from oisd.config import TrainConfig, differences
from oisd.report.runs import Group, Run, decides


def setting_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Each setting in which groups differ, and its value in each group."""
    names = {
        found.partition(":")[0]: None
        for group in groups[1:]
        for found in differences(groups[0].config, group.config)
    }
    return [
        (name, [_value(group.config, name) for group in groups])
        for name in names
        if decides(name)
    ]  # fmt: skip


def _value(config: TrainConfig, name: str) -> str:
    table, key = name.split(".")
    value = getattr(getattr(config, table), key)
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# Settings that say what is learned and what is measured.
_OF_TASK = (
    "data.source", "data.split", "data.subset", "reward.function",
    "eval.source", "eval.split", "eval.subset", "eval.limit", "eval.samples",
    "eval.temperature", "eval.top_p", "rollout.max_completion_tokens",
)  # fmt: skip


def task_differences(groups: Sequence[Group]) -> list[str]:
    """Why numbers of these groups do not measure the same; empty if they do."""
    found = [
        f"{name} is {' / '.join(values)}"
        for name, values in setting_rows(groups)
        if name in _OF_TASK
    ]
    if not found and len({_evaluated(group) for group in groups}) > 1:
        found.append("they were evaluated on other problems")
    return found


def _evaluated(group: Group) -> str:
    """The problems of a group's first evaluation, where there is one."""
    run = group.runs[0]
    steps = run.evaluated_steps
    return json.dumps([p.id for p in run.problems(steps[0])]) if steps else ""


def caveats(groups: Sequence[Group]) -> list[str]:
    """What a reader must know before comparing: in words, one sentence or two each."""
    notes = []
    if differing := task_differences(groups):
        notes.append(
            "These runs differ in their task or evaluation, so that their rewards and evaluations "
            f"cannot be compared: {'; '.join(differing)}."
        )
    for run in (run for group in groups for run in group.runs):
        if run.unfinished:
            notes.append(
                f"The last line of {run.name}'s {' and '.join(run.unfinished)} is unfinished and "
                "left out: the run was killed, or is writing it."
            )
        if not run.is_finished:
            notes.append(
                f"{run.name} has done {run.steps} of its {run.config.run.steps} steps; its last "
                "values are not final ones."
            )
    for group in groups:
        if len(set(group.seeds)) < len(group.seeds):
            notes.append(
                f"Group {group.letter} has several runs of one seed; they count as runs of their "
                "own in means and intervals."
            )
        if len({run.steps for run in group.runs}) > 1:
            notes.append(
                f"The runs of group {group.letter} have come to different steps: after step "
                f"{min(run.steps for run in group.runs)} its curves are of the longer ones alone."
            )
        if len(_distinct(json.dumps(run.sources.get("versions"), sort_keys=True)
                         for run in group.runs)) > 1:  # fmt: skip
            notes.append(f"The runs of group {group.letter} were made with different versions.")
    return notes


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def method_words(config: TrainConfig) -> str:
    """What is trained, in a sentence."""
    policy = {"grpo": "GRPO", "rloo": "RLOO", "reinforce++": "Reinforce++"}[config.grpo.advantage]
    layers = ", ".join(map(str, config.oisd.student_layers))
    layer = f"layer{'s' if len(config.oisd.student_layers) > 1 else ''} {layers}"
    if config.grpo.internal_layer is not None:
        return (
            f"BuPO: for {config.grpo.internal_steps} steps {policy} trains the policy of layer "
            f"{config.grpo.internal_layer}, then that of the final layer."
        )
    if not config.oisd.active:
        return f"{policy} alone, without alignment."
    terms = [
        f"{what} (weight {weight:g})"
        for what, weight in (
            ("next-token distribution", config.oisd.think_weight),
            ("attention", config.oisd.attention_weight),
        )
        if weight
    ]
    return f"OISD: {policy}, and {layer} learns the final layer's {' and '.join(terms)}."


def fact_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """What each group is, row by row, in plain words."""
    rows: dict[str, list[str]] = {}
    for group in groups:
        config, runs = group.config, group.runs
        rollout = config.rollout
        adapters = f", LoRA adapters of rank {config.model.lora_rank}"
        model = (
            "the built-in tiny Qwen3" if config.model.path == "arithmetic" else config.model.path
        )
        evaluation = "none"
        if config.eval.source:
            evaluation = (
                f"{config.eval.source}, {config.eval.samples} completions a problem at temperature "
                f"{config.eval.temperature:g}"
            )
        facts = {
            "method": method_words(config),
            "model": model + (adapters if config.model.lora_rank else ""),
            "problems": f"{config.data.source}, graded by {config.reward.function}",
            "evaluation": evaluation,
            "one step": f"{rollout.prompts_per_step} prompts with {rollout.completions_per_prompt} "
            f"completions each, of at most {rollout.max_completion_tokens} tokens",
            "runs": "\n".join(
                f"{run.name}: seed {run.config.run.seed}, {run.steps} of {run.config.run.steps} "
                "steps"
                for run in runs
            ),
            "versions": " / ".join(_distinct(map(_versions, runs))),
            "machine": " / ".join(
                _distinct(str(run.sources.get("machine", "not recorded")) for run in runs)
            ),
        }
        for name, value in facts.items():
            rows.setdefault(name, []).append(value)
    return list(rows.items())


def _versions(run: Run) -> str:
    found = run.sources.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "not recorded"
