"""`oisd eval`: a model on benchmarks or a data source, with a folder that it can resume from.

Problems are shared out over the processes, each of which writes a problem to disk once it is done.
A restart reads what all processes wrote, so their number may change. Samples are a function of
(seed, problem, sample) alone: the result is that of an evaluation that was never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress as Bar

from oisd.config import ConfigError, require_grader
from oisd.data import PAPER_SYSTEM_PROMPT, Example, catalogue, encode_prompts
from oisd.data.problems import load_problems
from oisd.evaluate import Evaluation, evaluate, in_order, read_all
from oisd.options import EvalRun
from oisd.plots import plot_pass_at_k
from oisd.policy import Policy, load_for_command
from oisd.rewards import RewardFunction, load_reward
from oisd.run import provenance
from oisd.run.folder import name_of_model
from oisd.run.processes import Processes
from oisd.schema import option, require, require_device

# Each math grader's verdicts are compared with another's, at almost no cost.
SECOND_GRADER = {"math": "boxed_string", "math_verify": "boxed_string", "boxed_string": "math"}

# One process may have all the long completions: the others wait for it instead of giving up.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Job:
    """One set of problems of an evaluation, with what the paper's protocol gives it."""

    source: catalogue.Source
    samples: int
    system_prompt: str | None
    folder: Path


def run(model: str, config: EvalRun) -> list[dict[str, Any]]:
    """Evaluate, write the files, and return a summary for each set of problems.

    The summaries are on the first process; others return []. Raises ConfigError for a setting out
    of its range and where a folder holds an evaluation with other settings, DataError for problems
    that cannot be used, and what loading the model raises.
    """
    check_settings(config)
    for source in config.benchmark or [config.data]:
        require_grader("--reward", config.reward, source)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    jobs = plan_jobs(model, config)
    processes = Processes(config.device, PATIENCE)
    graders: list[RewardFunction] = []
    try:
        # All of the data first: a benchmark that cannot be read fails before any work, and leaves
        # no folder behind that would refuse the copy which the message asks for.
        examples = [load_problems(job.source.written, config, config.seed) for job in jobs]
        graders += _graders(config)
        for job, problems in zip(jobs, examples, strict=True):
            processes.on_first(partial(_prepare, model, config, job, problems))
        policy = None
        summaries = []
        for job, problems in zip(jobs, examples, strict=True):
            done = read_all(job.folder)
            processes.barrier()  # or this could read a dump while another process writes to it
            mine = []
            if any(example.id not in done for example in problems):
                policy = policy or load_for_command(model, config, "cpu").cast(processes.device)
                # The commit of a Hub model may be known, and may have moved on, only now.
                processes.on_first(partial(_require_same, model, config, job, problems, bool(done)))
                mine = _evaluate(policy, problems, config, job, graders, set(done), processes)
            result = in_order([done.values(), *processes.gather(mine)], problems)
            if processes.is_first:
                summaries.append(_write(model, config, job, result))
        return summaries
    finally:
        for grader in graders:
            grader.close()
        processes.close()


def benchmark_names() -> list[str]:
    """What `--benchmark` may name."""
    return [name for name, known in catalogue.DATA_SETS.items() if "test" in known.splits]


def check_settings(config: EvalRun) -> None:
    """Raise ConfigError for a number out of its range."""
    for name in ("samples", "max_completion_tokens", "max_prompt_tokens", "batch_size", "limit",
                 "threads"):  # fmt: skip
        value = getattr(config, name)
        require(value is None or value >= 1, option(name), "at least 1", value)
    require(config.seed >= 0, "--seed", "at least 0", config.seed)
    require(config.temperature >= 0, "--temperature", "at least 0", config.temperature)
    require(0 < config.top_p <= 1, "--top-p", "above 0 and at most 1", config.top_p)
    require(config.timeout > 0, "--timeout", "above 0", config.timeout)
    require_device("--device", config.device)


def _graders(config: EvalRun) -> list[RewardFunction]:
    """The grader, and for mathematics the one that it is compared with."""
    try:
        first = load_reward(config.reward, config.timeout)
    except ValueError as error:
        raise ConfigError(f"--reward: {error}") from error
    if config.reward not in SECOND_GRADER:
        return [first]
    return [first, load_reward(SECOND_GRADER[config.reward], config.timeout)]


def plan_jobs(model: str, config: EvalRun) -> list[Job]:
    """The sets of problems of an evaluation, each with its own folder.

    Raises ConfigError for a name that is no benchmark, or for one given twice.
    """
    name = name_of_model(model)
    if not config.benchmark:
        source = catalogue.resolve(config.data)
        data = Path(config.data).stem if Path(config.data).exists() else config.data
        data = source.name or data.replace("/", "--").replace(":", "-")
        folder = Path(config.output_dir or f"runs/eval/{name}/{data}")
        return [Job(source, config.samples or 16, config.system_prompt, folder)]
    if config.data != EvalRun.data:
        raise ConfigError(f"--benchmark and --data ({config.data!r}) exclude each other")
    jobs = []
    for written in config.benchmark:
        source = catalogue.resolve(written)
        if source.data_set is None or "test" not in source.data_set.splits:
            raise ConfigError(
                f"--benchmark {written!r} is none of {', '.join(benchmark_names())}; for "
                f"problems of your own pass --data"
            )
        system = PAPER_SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt
        folder = Path(config.output_dir or f"runs/eval/{name}") / source.name
        jobs.append(Job(source, config.samples or source.data_set.samples, system, folder))
    if len({job.folder for job in jobs}) < len(jobs):
        raise ConfigError(f"--benchmark names a set twice: {' '.join(config.benchmark)}")
    return jobs


def _evaluate(
    policy: Policy,
    examples: Sequence[Example],
    config: EvalRun,
    job: Job,
    graders: Sequence[RewardFunction],
    done: set[str],
    processes: Processes,
) -> list[Any]:
    """This process's share of the problems not done yet, without their texts."""
    prompts = encode_prompts(
        policy.tokenizer,
        examples,
        system_prompt=job.system_prompt,
        chat_template=config.chat_template,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    policy.require_positions(
        prompts.token_ids, config.max_completion_tokens, "--max-completion-tokens"
    )
    own = job.folder / f"problems-{processes.rank}-of-{processes.size}.jsonl"
    with Bar(disable=not processes.is_first) as bar:
        left = [example for example in examples if example.id not in done]
        task = bar.add_task(job.source.title, total=len(processes.share(left)))
        mine = evaluate(
            policy,
            examples,
            prompts.token_ids,
            graders[0],
            samples=job.samples,
            max_completion_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
            engine=config.engine,
            rank=processes.rank,
            world_size=processes.size,
            dump=own,
            second=graders[1] if len(graders) > 1 else None,
            skip=done,
            on_progress=lambda count: bar.update(task, completed=count),
        )
    return [problem.without_texts() for problem in mine]


def _write(model: str, config: EvalRun, job: Job, result: Evaluation) -> dict[str, Any]:
    """The summary and the plot of one set of problems."""
    summary: dict[str, Any] = {
        "model": model,
        "data": job.source.written,
        "benchmark": job.source.name or None,
        "problems_expected": None if config.limit else job.source.rows_of(config.split),
        "reward": config.reward,
        **result.summary(),
        "problem_means": [sum(p.rewards) / len(p.rewards) for p in result.problems],
        "graders": result.agreement(config.reward, SECOND_GRADER.get(config.reward, "")),
        "output_dir": str(job.folder),
    }
    (job.folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    name = Path(model).name
    curves, bands = {name: result.pass_curve()}, {name: summary["pass_at_k_interval"]}
    plot_pass_at_k(curves, job.folder / "pass_at_k.png", bands)
    return summary


def _prepare(model: str, config: EvalRun, job: Job, examples: Sequence[Example]) -> None:
    """Make the folder, or find that it holds this very evaluation."""
    settings: dict[str, Any] = {"model": model}
    free = config._free
    settings |= {k: v for k, v in asdict(config).items() if k not in free}
    settings |= {"data": job.source.written, "samples": job.samples}
    settings["system_prompt"] = job.system_prompt
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        done = read_all(job.folder)  # which also repairs unfinished lines
        theirs = _read_settings(job) if done else {}
        if done and theirs:
            # A setting that did not exist yet when the folder was written had its default.
            known = {k: getattr(EvalRun, k, None) for k in settings} | theirs
            changed = [f"{k}: {known[k]!r} != {v!r}" for k, v in settings.items() if known[k] != v]
            if changed:
                raise ConfigError(
                    f"{job.folder} holds an evaluation with other settings (there != here): "
                    f"{'; '.join(changed)}; choose another --output-dir"
                )
        if done and "sources" not in theirs:
            raise ConfigError(
                f"{job.folder} holds results without a record of the weights, problems and reward "
                f"that they are of, as oisd 0.1 left them; {_remedies(job)}"
            )
        _write_settings(job, settings | {k: theirs[k] for k in ("sources",) if k in theirs})
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(job.folder)!r} cannot be written: {error.strerror or error}"
        ) from error
    finished = all(example.id in done for example in examples)
    _require_same(model, config, job, examples, bool(done), loaded=finished)


def _require_same(
    model: str,
    config: EvalRun,
    job: Job,
    examples: Sequence[Example],
    has_results: bool,
    loaded: bool = True,
) -> None:
    """Write down what the evaluation is of, or find that its results are of the same.

    loaded: whether a Hub model has its copy here, and with it a commit, if it ever has.
    Raises ConfigError that names what changed.
    """
    settings = _read_settings(job)
    then = settings.get("sources")
    problems = {"--benchmark" if config.benchmark else "--data": examples}
    now = provenance.of_sources(model, problems, config.reward, then)
    if has_results and then is not None:
        if not loaded and provenance.is_unknown(now["model"]):
            now["model"] = then["model"]
        if changed := provenance.changes(then, now, model, config.reward):
            raise ConfigError(
                f"{job.folder} holds results of something else under the same names; changed "
                f"since: {'; '.join(changed)}; {_remedies(job)}"
            )
        provenance.warn_of_versions(str(job.folder), then, now)
        now["versions"] = then["versions"]
    if now != then:
        _write_settings(job, settings | {"sources": now})


def _remedies(job: Job) -> str:
    return f"choose another --output-dir, or delete {job.folder} to evaluate again"


def _read_settings(job: Job) -> dict[str, Any]:
    file = job.folder / "settings.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); {_remedies(job)}") from error


def _write_settings(job: Job, settings: dict[str, Any]) -> None:
    # Never half a file: it tells what the results beside it are of.
    writing = job.folder / ".settings.json.writing"
    writing.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    os.replace(writing, job.folder / "settings.json")
