"""What OISD adds to a step of TRL: OISDTrainer and GRPOTrainer, step by step in turns.

    python -m benchmarks.trl_overhead [--steps 40] [--out benchmarks/results]

Both work on one blank model of the arithmetic task, on the same given completions (16 prompts x 8
of 1 to 6 tokens), so only the update is timed: forward, losses, backward, optimizer step. Each has
its first steps untimed. Before that the loss of OISDTrainer must be GRPOTrainer's plus its
terms, and its gradient must differ from GRPOTrainer's in the layers up to the student and nowhere
else; else the result is wrong, and no ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer

from benchmarks.trl_throughput import machine
from oisd.arithmetic import arithmetic_examples, arithmetic_model, arithmetic_tokenizer
from oisd.integrations.trl import OISDConfig, OISDTrainer

UNTIMED = 3
PROMPTS, COMPLETIONS, TOKENS, STUDENT = 16, 8, 6, 3


def main() -> None:
    """Check, measure, print one line, append it to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None, help="folder for trl_overhead.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = rollouts()
    with tempfile.TemporaryDirectory() as folder:
        oisd, grpo = make(OISDTrainer, folder), make(GRPOTrainer, folder)
        check(oisd, grpo, batch)
        seconds: list[list[float]] = [[], []]
        for turn in range(arguments.steps + UNTIMED):
            # Each goes first in half of the turns.
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[which].append(step((oisd, grpo)[which], batch))
    ours, theirs = (found[UNTIMED:] for found in seconds)
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    cuts = statistics.quantiles(ratios, n=5)
    result = {
        "oisd_s": statistics.median(ours),
        "grpo_s": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_p20": cuts[0],
        "ratio_p80": cuts[3],
        "steps": len(ratios),
        "rollouts": PROMPTS * COMPLETIONS,
    }
    print(
        f"OISDTrainer {result['oisd_s']:.3f} s, GRPOTrainer {result['grpo_s']:.3f} s an update; "
        f"ratio of pairs: median {result['ratio']:.3f} (p20 {cuts[0]:.3f}, p80 {cuts[3]:.3f}), "
        f"{len(ratios)} steps"
    )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "trl_overhead.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**result, **machine()}) + "\n")


def make(trainer: type[GRPOTrainer], folder: str) -> Any:
    """A trainer of the blank model."""
    tokenizer = arithmetic_tokenizer()
    made = trainer(
        model=arithmetic_model(),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
        args=OISDConfig(
            folder,
            student_layers=[STUDENT],
            per_device_train_batch_size=PROMPTS * COMPLETIONS,
            num_generations=COMPLETIONS,
            max_completion_length=TOKENS,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
        ),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    made.create_optimizer()
    return made


def rollouts() -> dict[str, torch.Tensor]:
    """A micro-batch as TRL hands it over; random digits, a quarter of advantage 0."""
    tokenizer = arithmetic_tokenizer()
    generator = torch.Generator().manual_seed(0)
    examples = arithmetic_examples(2)[:PROMPTS]
    prompt = tokenizer([str(e.prompt) for e in examples for _ in range(COMPLETIONS)], padding=True)
    shape = (PROMPTS * COMPLETIONS, TOKENS)
    lengths = torch.randint(1, TOKENS + 1, shape[:1], generator=generator)
    mask = (torch.arange(TOKENS) < lengths[:, None]).int()
    advantages = torch.randn(shape[:1], generator=generator)
    return {
        "prompt_ids": torch.tensor(prompt["input_ids"]),
        "prompt_mask": torch.tensor(prompt["attention_mask"]),
        "completion_ids": torch.randint(0, 10, shape, generator=generator),
        "completion_mask": mask,
        "advantages": advantages * (torch.arange(shape[0]) >= shape[0] // 4),
        "num_items_in_batch": mask.sum(),
    }


def step(trainer: Any, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one update."""
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - start


def check(oisd: Any, grpo: Any, batch: dict[str, torch.Tensor]) -> None:
    """Exit unless the losses and gradients differ by the terms of OISD."""
    ours, theirs = (t.compute_loss(t.model, batch) for t in (oisd, grpo))
    terms = oisd._metrics["train"]
    weighted = terms["loss/think"][0] + 0.1 * terms["loss/attention"][0]
    if abs(ours.item() - theirs.item() - weighted) > 1e-5 or not weighted:
        raise SystemExit(f"WRONG: loss {ours.item()}, GRPO's {theirs.item()}, terms {weighted}")
    ours.backward()
    theirs.backward()
    pairs = zip(oisd.model.named_parameters(), grpo.model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else None
        below = "embed_tokens" in name if layer is None else layer <= STUDENT
        if torch.equal(a.grad, b.grad) == below:
            raise SystemExit(f"WRONG: the gradient of {name}")
    oisd.model.zero_grad()
    grpo.model.zero_grad()


if __name__ == "__main__":
    main()
