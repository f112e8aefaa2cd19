"""Accuracy with intervals: Avg@K, unbiased Pass@K, bootstrap over the problems.

Each problem's completions and grades are written to disk as soon as it is done. An evaluation that
was stopped can therefore be resumed, on any number of processes.

A second grader may grade the same completions. Where two graders disagree, one of them is wrong;
the share of completions on which they agree bounds how far a result can be trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from oisd.data import Example
from oisd.jsonl import DamagedFileError, read_rows
from oisd.policy import Policy

Reward = Callable[[list[str], list[str]], list[float]]

_DRAWS_AT_ONCE = 1 << 16  # of a bootstrap: half a megabyte each of numbers and of their places


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k completions is correct, unbiased from c correct ones of n.

    1 - C(n-c, k) / C(n, k), as a product that does not overflow (Chen et al., arXiv 2107.03374).
    Needs 0 <= c <= n and 1 <= k <= n, or raises ValueError.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: wanted 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def avg_at_k(rewards: Sequence[Sequence[float]]) -> float:
    """Mean over the problems of the mean reward of a problem's K completions."""
    if not rewards or not all(len(row) for row in rewards):
        raise ValueError("avg_at_k: wanted at least one problem and one completion of each")
    return float(np.mean([np.mean(row) for row in rewards]))


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, one for each problem, resampling the problems.

    It tells how far the number would move with other problems of the same kind. Raises ValueError
    without values and for a confidence outside (0, 1).
    """
    if len(values) == 0 or not 0 < confidence < 1:
        raise ValueError("bootstrap_interval: wanted values and a confidence in (0, 1)")
    return bootstrap_interval_of_mean(
        [values], confidence=confidence, resamples=resamples, seed=seed
    )


def bootstrap_interval_of_mean(
    groups: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean of the groups' means, resampling within each group.

    For a table's last column: each benchmark has the same weight, whatever its size.
    """
    if not groups or not all(len(values) for values in groups) or not 0 < confidence < 1:
        raise ValueError(
            "bootstrap_interval_of_mean: wanted groups of values and a confidence in (0, 1)"
        )
    generator = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for values in groups:
        data = np.asarray(values, dtype=float)
        at_once = max(1, _DRAWS_AT_ONCE // len(data))
        for start in range(0, resamples, at_once):
            part = total[start : start + at_once]
            part += data[generator.integers(0, len(data), (len(part), len(data)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(total / len(groups), [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Problem:
    """One problem of an evaluation with all its completions."""

    id: str
    prompt: str
    answer: str
    completions: list[str]
    rewards: list[float]
    lengths: list[int]
    """Tokens of each completion."""
    finished: list[bool]
    """False where the limit cut a completion off."""
    second_rewards: list[float] | None = None
    """Of the second grader, if there is one."""

    def without_texts(self) -> Problem:
        """The numbers alone: a benchmark's completions can be gigabytes and are in its dump."""
        return replace(self, completions=[])


@dataclass(frozen=True)
class Evaluation:
    """The problems of an evaluation, all with the same number of completions."""

    problems: list[Problem]

    @property
    def samples(self) -> int:
        """Completions of each problem."""
        return len(self.problems[0].rewards)

    def avg_at_k(self) -> float:
        """Avg@K with K the number of completions."""
        return avg_at_k([p.rewards for p in self.problems])

    def pass_at(self, k: int) -> float:
        """Pass@k; a completion counts as correct from a reward of 1."""
        return float(np.mean(self._pass_at_k(k)))

    def _pass_at_k(self, k: int) -> list[float]:
        return [pass_at_k(self.samples, sum(r >= 1 for r in p.rewards), k) for p in self.problems]

    def pass_curve(self) -> dict[int, float]:
        """Pass@k for k = 1, 2, 4 ... up to the number of completions."""
        return {k: self.pass_at(k) for k in self._ks()}

    def _ks(self) -> list[int]:
        return [2**i for i in range(self.samples.bit_length())]

    def summary(self) -> dict[str, Any]:
        """The numbers, with 95 % intervals over the problems."""
        lengths = [n for p in self.problems for n in p.lengths]
        return {
            "problems": len(self.problems),
            "samples": self.samples,
            "avg_at_k": self.avg_at_k(),
            "avg_at_k_interval": bootstrap_interval(
                [float(np.mean(p.rewards)) for p in self.problems]
            ),
            "pass_at_k": self.pass_curve(),
            "pass_at_k_interval": {k: bootstrap_interval(self._pass_at_k(k)) for k in self._ks()},
            "completion_length": float(np.mean(lengths)),
            "frac_finished": float(np.mean([f for p in self.problems for f in p.finished])),
        }

    def write(self, folder: Path, name: str) -> None:
        """Write the problems to folder/`name`.jsonl and the summary to folder/`name`.json."""
        folder.mkdir(exist_ok=True)
        rows = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.problems)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        summary = json.dumps(self.summary(), indent=1)
        (folder / f"{name}.json").write_text(summary, encoding="utf-8")

    def agreement(self, first: str, second: str) -> dict[str, Any]:
        """How far two graders of these names agree; empty if there was no second one.

        A completion counts as accepted from a reward of 1.
        """
        pairs = [
            (a >= 1, b >= 1)
            for p in self.problems
            for a, b in zip(p.rewards, p.second_rewards or [], strict=p.second_rewards is not None)
        ]
        if not pairs:
            return {}
        means = [float(np.mean(p.second_rewards or [])) for p in self.problems]
        return {
            "first": first,
            "second": second,
            "agreement": float(np.mean([a == b for a, b in pairs])),
            "only_first": sum(a and not b for a, b in pairs),
            "only_second": sum(b and not a for a, b in pairs),
            "second_avg_at_k": float(np.mean(means)),
            "second_avg_at_k_interval": bootstrap_interval(means),
            "second_problem_means": means,
        }


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    *,
    samples: int,
    max_completion_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    step: int = 0,
    batch_size: int = 256,
    engine: str = "generate",
    rank: int = 0,
    world_size: int = 1,
    dump: Path | None = None,
    second: Reward | None = None,
    skip: Collection[str] = (),
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Problem]:
    """Sample and grade `samples` completions of each example.

    Args:
        prompts: token ids of the examples' prompts.
        reward: (completions, answers) -> rewards.
        seed, step: fix the samples, which depend on neither the batches nor the processes.
        batch_size, engine: as `oisd.rollout.sample` has them.
        rank, world_size: this process does every `world_size`-th problem of those left.
        second: another grader for `Problem.second_rewards`.
        skip: ids of problems that any process has done already.
        dump: a JSONL file that finished problems are appended to; a second call reads them from it.
        on_progress: called with the number of problems done.

    Returns this process's problems, in the order of `examples`.
    """
    left = [i for i, example in enumerate(examples) if example.id not in skip]
    mine = left[rank::world_size]
    done = {p.id: p for p in read_problems(dump)} if dump else {}
    todo = [i for i in mine if examples[i].id not in done]
    per_batch = max(1, batch_size // samples)
    for start in range(0, len(todo), per_batch):
        chosen = todo[start : start + per_batch]
        repeated = [i for i in chosen for _ in range(samples)]
        rows = [i * samples + s for i in chosen for s in range(samples)]
        sampled = policy.sample(
            [prompts[i] for i in repeated],
            rows,
            max_completion_tokens=max_completion_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            step=step,
            batch_size=batch_size,
            engine=engine,
        )
        texts = policy.decode(sampled)
        answers = [examples[i].answer for i in repeated]
        rewards = reward(texts, answers)
        seconds = second(texts, answers) if second else None
        lengths, finished = sampled.lengths.tolist(), sampled.finished.tolist()
        for j, i in enumerate(chosen):
            part = slice(j * samples, (j + 1) * samples)
            problem = Problem(
                examples[i].id,
                policy.tokenizer.decode(prompts[i]),
                examples[i].answer,
                texts[part],
                rewards[part],
                lengths[part],
                finished[part],
                seconds[part] if seconds else None,
            )
            done[problem.id] = problem
            if dump:
                with dump.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
        on_progress(sum(examples[i].id in done for i in mine))
    return [done[examples[i].id] for i in mine]


def read_problems(dump: Path) -> list[Problem]:
    """The problems in a dump; an unfinished last line is removed from the file too."""
    rows, size = read_rows(dump)
    if dump.exists() and dump.stat().st_size > size:
        with dump.open("r+b") as file:
            file.truncate(size)
    try:
        return [Problem(**row) for row in rows]
    except TypeError as error:
        raise DamagedFileError(
            f"{dump} is damaged: wanted a problem of an evaluation in each line ({error}); delete "
            "the file to evaluate its problems again"
        ) from error


def read_all(folder: Path) -> dict[str, Problem]:
    """The problems in a folder's dumps, of all processes, without their completions."""
    return {
        problem.id: problem.without_texts()
        for dump in sorted(folder.glob("problems-*.jsonl"))
        for problem in read_problems(dump)
    }


def in_order(parts: Iterable[Iterable[Problem]], examples: Sequence[Example]) -> Evaluation:
    """The evaluation of which several processes did parts, its problems as in `examples`."""
    by_id = {p.id: p for part in parts for p in part}
    return Evaluation([by_id[e.id] for e in examples])
