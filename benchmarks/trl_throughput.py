"""Training throughput on the arithmetic task beside TRL's GRPOTrainer, in one run.

    python -m benchmarks.trl_throughput [--steps 20] [--rounds 3] [--out benchmarks/results]

Same machine, same warmed-up model, same batch (16 prompts x 16 completions of at most 6 tokens,
T = 1), same reward, no KL, one optimizer step a batch, one thread, float32. The trainers take turns
in rounds; a round's first steps are not timed. The learning rate is so small that all trainers keep
the same policy, so each must find that policy's accuracy. One that does not is reported as wrong,
without a time.

Our trainer leaves completions of advantage 0 out of the update (their gradient is 0); `dropped` is
their share. TRL computes them, and so does our trainer in the rows "all completions".

Beside the time of the clock stands the processor time, which leaves out other work on the core.
`python -m benchmarks peers step` is the same for the page of other projects.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure.machine import ROOT, append, describe
from benchmarks.measure.timer import spread
from benchmarks.report import table
from oisd.arithmetic import arithmetic_examples, arithmetic_tokenizer
from oisd.config import from_tables, load_recipe, to_tables
from oisd.policy import load_policy
from oisd.trainer import Trainer
from oisd.warmup import warm_up

UNTIMED = 3
PROMPTS, COMPLETIONS, TOKENS = 16, 16, 6
LEARNING_RATE = 1e-9


@dataclass
class Round:
    """What one trainer did in one round."""

    seconds: list[float]
    processor: list[float]
    reward: float
    dropped: float = 0.0


class Clock:
    """Times from the end of one step to the end of the next, so that all between them counts."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def timed(self) -> tuple[list[float], list[float]]:
        """(seconds, seconds of the processor) of the steps that count."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[UNTIMED - 1 :]
        return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


def main() -> None:
    """Measure, print a table, append rows to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="timed steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for throughput.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.steps, arguments.rounds)
    report(rows)
    if arguments.out:
        append(arguments.out / "throughput.jsonl", rows, describe("cpu", 1))


def measure(steps: int, count: int) -> list[dict[str, Any]]:
    """A row for each trainer: `steps` timed steps in each of `count` rounds."""
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        accuracy = make_start(start)
        trainers = {
            "TRL GRPOTrainer": partial(trl, start, steps),
            "GRPO": partial(ours, start, steps, align=False),
            "OISD": partial(ours, start, steps, align=True),
            "GRPO, all completions": partial(ours, start, steps, align=False, skip=False),
            "OISD, all completions": partial(ours, start, steps, align=True, skip=False),
        }
        rounds: dict[str, list[Round]] = {name: [] for name in trainers}
        for _ in range(count):
            for name, run in trainers.items():
                rounds[name].append(run())
    return [summarize(name, found, accuracy) for name, found in rounds.items()]


def make_start(folder: Path) -> float:
    """Saves the model that all trainers start from; its accuracy on its training problems."""
    recipe = load_recipe(ROOT / "recipes" / "arithmetic.toml")
    policy = load_policy(recipe.model, seed=0)
    examples = arithmetic_examples(2)
    warm_up(policy, examples, recipe.warmup, seed=0)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    chosen = examples[:512]
    prompts = policy.tokenizer([str(e.prompt) for e in chosen])["input_ids"]
    sampled = policy.sample(prompts, range(len(chosen)), max_completion_tokens=TOKENS, seed=9)
    texts = policy.decode(sampled)
    return statistics.mean(t == e.answer for t, e in zip(texts, chosen, strict=True))


def ours(start: Path, steps: int, *, align: bool, skip: bool = True) -> Round:
    """A round of this library's trainer."""
    tables = to_tables(load_recipe(ROOT / "recipes" / "arithmetic.toml"))
    tables["model"]["path"] = str(start)
    tables["warmup"] = {"steps": 0}
    tables["eval"] = {}
    tables["grpo"] |= {"skip_zero_advantage": skip, "minibatches": 1}
    tables["rollout"] |= {"prompts_per_step": PROMPTS, "completions_per_prompt": COMPLETIONS}
    if not align:
        tables["oisd"] |= {"think_weight": 0.0, "attention_weight": 0.0}
    tables["optimizer"]["learning_rate"] = LEARNING_RATE
    with tempfile.TemporaryDirectory() as folder:
        tables["run"] |= {
            "output_dir": folder,
            "steps": steps + UNTIMED,
            "save_every": 0,
            "completions_every": 0,
            "grad_norm_every": 0,
        }
        trainer = Trainer(from_tables(tables))
        trainer._finish = dict  # type: ignore[method-assign]  # no plots
        trainer._save = lambda: None  # type: ignore[method-assign]
        step, clock = trainer._train_step, Clock()

        def timed(progress: Any) -> dict[str, Any]:
            row = step(progress)
            clock.mark()
            return row

        trainer._train_step = timed  # type: ignore[method-assign]
        trainer.train()
        rows = trainer.folder.metrics()[UNTIMED:]
    return Round(
        *clock.timed(),
        statistics.mean(row["reward"] for row in rows),
        statistics.mean(row["frac_zero_std"] for row in rows) if skip else 0.0,
    )


def trl(start: Path, steps: int) -> Round:
    """A round of TRL's trainer, as its users would set it up for this task."""
    tokenizer = arithmetic_tokenizer()
    answers = {e.prompt: e.answer for e in arithmetic_examples(2)}
    rewards: list[float] = []

    def exact(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        graded = [float(c.strip() == answers[p]) for p, c in zip(prompts, completions, strict=True)]
        rewards.append(statistics.mean(graded))
        return graded

    clock = Clock()

    class Marking(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=exact,
            train_dataset=Dataset.from_list([{"prompt": p} for p in answers]),
            callbacks=[Marking()],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=PROMPTS * COMPLETIONS,
                num_generations=COMPLETIONS,
                max_completion_length=TOKENS,
                max_steps=steps + UNTIMED,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=0.0,
                temperature=1.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1000,
            ),
        )
        trainer.train()
    return Round(*clock.timed(), statistics.mean(rewards[UNTIMED:]))


def summarize(name: str, rounds: list[Round], accuracy: float) -> dict[str, Any]:
    """One row of the table; without a time if the trainer sampled from another policy."""
    seconds = [s for r in rounds for s in r.seconds]
    reward = statistics.mean(r.reward for r in rounds)
    # The noise over completions and over a round's problems is far below 5 points.
    right = abs(reward - accuracy) < 0.05
    row: dict[str, Any] = {"trainer": name, "correct": right, "reward": reward}
    row |= {"start_accuracy": accuracy, "steps": len(seconds)}
    row["dropped"] = statistics.mean(r.dropped for r in rounds)
    if right:
        row |= dict(zip(("median_s", "p20_s", "p80_s"), spread(seconds), strict=True))
        row["completions_per_s"] = PROMPTS * COMPLETIONS / row["median_s"]
        processor = spread([s for r in rounds for s in r.processor])
        row |= dict(zip(("processor_s", "processor_p20_s", "processor_p80_s"), processor,
                        strict=True))  # fmt: skip
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, with the ratio of each to TRL."""
    peer = next((r for r in rows if r["trainer"].startswith("TRL")), {})
    lines = []
    for row in rows:
        if not row["correct"]:
            wrong = f"WRONG: reward {row['reward']:.3f}, wanted {row['start_accuracy']:.3f}"
            lines.append([row["trainer"], wrong, "", "", "", ""])
            continue
        ratio = peer["median_s"] / row["median_s"] if peer.get("correct") else float("nan")
        cells = "{median_s:.3f} ({p20_s:.3f} - {p80_s:.3f})", "{completions_per_s:.0f}"
        lines.append([row["trainer"], *(cell.format(**row) for cell in cells), f"{ratio:.2f}",
                      f"{row['reward']:.3f}", f"{row['dropped']:.2f}"])  # fmt: skip
    titles = ["trainer", "s/step (p20 - p80)", "completions/s", "x TRL", "reward", "dropped"]
    print(table(titles, lines))


if __name__ == "__main__":
    main()
