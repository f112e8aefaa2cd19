"""`oisd check`: the rows in order, the table, and check.json."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from oisd.check import data, model, rollouts, tokenizer
from oisd.check.findings import Finding, attempted
from oisd.check.settings import has_data, settings_of
from oisd.config import TrainConfig
from oisd.data import Example
from oisd.data.problems import load_problems
from oisd.lens import LayerLens, summarise, without_boundary
from oisd.models.guards import guard_tokens
from oisd.models.layout import find_layout, unwrap
from oisd.options import CheckRun
from oisd.plan import GIB, USABLE, memory_plan, shape_of
from oisd.policy import Policy, load_for_training
from oisd.rewards import RewardFunction, load_reward
from oisd.run.folder import command_folder
from oisd.run.model_guards import clearest
from oisd.run.processes import device_named
from oisd.schema import is_scratch, naming

# What the lens reads: enough for the rule, little enough for a vocabulary of 150,000 on a CPU.
_LENS_TEXTS, _LENS_TOKENS = 2, 32


def run_check(path: str, given: CheckRun) -> dict[str, Any]:
    """Look at a model, and at data if there are any; write check.json; return it with its findings.

    Raises ConfigError for settings that cannot be, and what loading the model raises.
    """
    config = settings_of(path, given)
    folder = command_folder("check", path, given.output_dir)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = device_named(config.run.device)
    with naming("--reward"):
        reward = load_reward(config.reward.function, config.reward.timeout)
    loading = replace(config.model, gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would say has a row of its own
            policy = load_for_training(
                loading, seed=config.run.seed, device=device, examples=_read_by(config, given)
            )
            policy.model.eval()
            findings = [*_all_rows(policy, config, given, reward)]
    finally:
        reward.close()
    report = {
        "model": path,
        "transformers": version("transformers"),
        "torch": torch.__version__,
        "device": str(policy.device),
        "dtype": config.model.dtype,
        "findings": [finding.as_row() for finding in findings],
    }
    file = folder / "check.json"
    file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return {**report, "rows": findings, "file": str(file)}


def _read_by(config: TrainConfig, given: CheckRun) -> list[Example]:
    """The problems that the tokenizer of a model from scratch is made from."""
    if not (is_scratch(config.model.path) and has_data(given)):
        return []
    parts = [config.data, *([config.eval] if config.eval.source else [])]
    return [e for part in parts for e in load_problems(part.source or "", part, config.run.seed)]


def _all_rows(
    policy: Policy, config: TrainConfig, given: CheckRun, reward: RewardFunction
) -> Iterator[Finding]:
    problems = data.Problems()
    layers = _layers_of(policy, config)
    # Read before anything is said of prompts: the problems' own are better examples than ours.
    of_data = [*_data_rows(policy, config, given, reward, problems)]
    question = problems.examples[0].prompt if problems.examples else None
    yield from attempted("model", "layout", partial(model.layout_rows, policy))
    yield from attempted("model", "weights", partial(model.parameter_rows, policy))
    yield from attempted("model", "lens", partial(model.taps_rows, policy, config, layers))
    yield from attempted("model", "guards", partial(model.guard_rows, policy, config))
    yield from attempted("tokenizer", "vocabulary", partial(tokenizer.vocabulary_rows, policy))
    yield from attempted(
        "tokenizer", "prompts", partial(tokenizer.prompt_rows, policy, config, question)
    )
    yield from of_data
    yield from _rollout_rows(policy, config, given, reward, problems)
    named = given.recipe is not None or given.layer is not None
    lens = partial(_layer_rows, policy, config, problems.prompts, named)
    yield from attempted("run", "layer", lens, refused="not checked")
    memory = partial(_memory_rows, policy, config)
    yield from attempted("run", "memory", memory, refused="not checked")


def _data_rows(
    policy: Policy,
    config: TrainConfig,
    given: CheckRun,
    reward: RewardFunction,
    problems: data.Problems,
) -> Iterator[Finding]:
    if not has_data(given):
        yield Finding("data", "problems", "not checked", "no --data or --recipe")
        return
    yield from attempted("data", "fields", partial(data.problem_rows, config, problems))
    if not problems.examples:
        return
    yield from attempted("data", "overlap", partial(data.overlap_rows, config, problems))
    answers = partial(data.answer_rows, config, reward, problems.examples)
    yield from attempted("data", "gold answers", answers)
    lengths = partial(data.length_rows, policy, config, problems)
    yield from attempted("data", "prompt lengths", lengths)


def _rollout_rows(
    policy: Policy,
    config: TrainConfig,
    given: CheckRun,
    reward: RewardFunction,
    problems: data.Problems,
) -> Iterator[Finding]:
    prompts, examples = problems.prompts[: given.prompts], problems.examples[: given.prompts]
    real = bool(prompts)
    if not real:  # the sampler can be compared with the update on any tokens
        ids = guard_tokens(policy.model, 32).tolist()
        prompts = [ids[: max(1, len(ids) * (i + 1) // 4)] for i in range(2)]
    most = min(given.completion_tokens, config.rollout.max_completion_tokens)
    sampled: list[rollouts.Sampled] = []
    look = partial(
        rollouts.sampling_rows, policy, config, prompts, given.completions, most, sampled
    )
    yield from attempted("rollout", "sampler", look, refused="not checked")
    if not sampled or not real:
        reason = "nothing was sampled" if real else "no problems"
        yield Finding("rollout", "reward", "not checked", reason)
        return
    earned = partial(rollouts.reward_rows, policy, config, reward, examples, sampled[0])
    yield from attempted("rollout", "reward", earned)


def _layers_of(policy: Policy, config: TrainConfig) -> list[int]:
    """The student layers that the model has, or the middle one if it has none of them."""
    try:
        with clearest(policy):
            depth = len(find_layout(unwrap(policy.model)).layers)
    except Exception:  # the row of the layout says why
        return [1]
    return [n for n in config.oisd.student_layers if n < depth] or [max(1, depth // 2)]


def _layer_rows(
    policy: Policy, config: TrainConfig, prompts: Sequence[Sequence[int]], named: bool
) -> Iterator[Finding]:
    """The layer that BuPO's rule picks, beside the one that the settings have.

    named: whether the user has chosen that one.
    """
    with clearest(policy):
        lens = LayerLens(policy.model)
    depth, layers = lens.num_layers, [*config.oisd.student_layers]
    texts = [ids[-_LENS_TOKENS:] for ids in prompts[:_LENS_TEXTS]]
    what = f"{len(texts)} prompts"
    if not texts:
        texts, what = [guard_tokens(policy.model, _LENS_TOKENS).tolist()], "random tokens"
    with clearest(policy):
        summary = summarise([lens(ids) for ids in texts])
    boundary = summary.boundary_layer
    picked = f"layer {boundary}" if boundary else f"no layer ({without_boundary(summary)})"
    found = f"the rule picks {picked} of {depth} on {what}; oisd.student_layers = {layers}"
    wrong = [n for n in layers if n >= depth]
    if wrong:
        remedy = f"set oisd.student_layers within 1..{depth - 1}"
        status = "fail" if named else "warn"
        yield Finding("run", "layer", status, found, max(wrong), depth - 1, remedy)
        return
    near = next(iter(layers), 1)
    found += f", where the lens is {summary.divergence[near - 1]:.3f} nats from the final layer"
    differs = bool(boundary) and bool(prompts) and boundary not in layers
    remedy = "see `oisd lens` on more problems before you choose" if differs else ""
    yield Finding("run", "layer", "warn" if differs else "pass", found, remedy=remedy)


def _memory_rows(policy: Policy, config: TrainConfig) -> Iterator[Finding]:
    """The peak that `oisd plan` computes, against this machine."""
    inner: Any = unwrap(policy.model)
    plan = memory_plan(config, shape_of(inner.config))
    device = policy.device
    if device.type == "cuda":
        has, name = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        has, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    peak, limit = plan.peak / GIB, USABLE * has / GIB
    each = f" on each of {plan.processes} processes" if plan.processes > 1 else ""
    found = f"a run needs {peak:.2f} GiB{each} at its peak, {name} has {limit:.1f} to fill"
    if peak <= limit:
        yield Finding("run", "memory", "pass", found, peak, limit)
        return
    remedy = "see `oisd plan`; lower run.tokens_per_microbatch or rollout.batch_size"
    yield Finding("run", "memory", "warn", found, peak, limit, remedy)
