"""What OISD adds to a step of TRL: OISDTrainer and GRPOTrainer, step by step in turns.

    python -m benchmarks.trl_overhead [--shape tiny] [--steps 40] [--out benchmarks/results]
    python -m benchmarks.trl_overhead --shape qwen3-0.6b --device cuda

Both update a model of random weights on the same given completions, so only the update is timed:
forward, losses, backward, optimizer step. The first steps are not timed. Before that, the loss of
OISDTrainer must be GRPOTrainer's plus its terms, and its gradient must differ from GRPOTrainer's in
the layers up to the student and nowhere else. If not, the result is wrong and no ratio is printed.

Peak memory is what one trainer alone would hold: parameters, the optimizer's state, and the most
that an untimed step needs beside them.

    tiny         the arithmetic task's model, 16 prompts x 8 completions of 1 to 6 tokens
    qwen3-0.6b   random weights, tied embeddings, 4 prompts x 4 completions of 1 to 1,024 tokens,
                 bf16 autocast and gradient checkpointing as in TRL's defaults
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from trl import GRPOTrainer

from benchmarks.cases.step import Model
from benchmarks.measure.machine import append, describe
from benchmarks.measure.timer import paired
from oisd.arithmetic import arithmetic_examples, arithmetic_model, arithmetic_tokenizer
from oisd.integrations.trl import OISDConfig, OISDTrainer

UNTIMED = 3


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    build: Callable[[], Any]
    student: int
    prompts: int
    completions: int
    tokens: int  # of the longest completion
    half: bool  # bf16 autocast, and checkpointing

    @property
    def rollouts(self) -> int:
        return self.prompts * self.completions


QWEN3 = Model("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, 6)
SHAPES = {
    "tiny": Shape(arithmetic_model, 3, 16, 8, 6, False),
    "qwen3-0.6b": Shape(lambda: QWEN3.build("cpu", False), QWEN3.student, 4, 4, 1024, True),
}


def main() -> None:
    """Check, measure, print one line, append it to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None, help="folder for trl_overhead.jsonl")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape, device = SHAPES[arguments.shape], arguments.device
    batch = rollouts(shape, device)
    with tempfile.TemporaryDirectory() as folder:
        oisd, grpo = (make(one, folder, shape, device) for one in (OISDTrainer, GRPOTrainer))
        check(oisd, grpo, batch, shape)
        step(oisd, batch)
        step(grpo, batch)  # the optimizers have their state now
        peaks = peak(oisd, batch), peak(grpo, batch)
        seconds: list[list[float]] = [[], []]
        for turn in range(arguments.steps + UNTIMED):
            # Each goes first in half of the turns.
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[which].append(step((oisd, grpo)[which], batch))
    result = paired(*(found[UNTIMED:] for found in seconds)) | {
        "oisd_mib": peaks[0] / 2**20,
        "grpo_mib": peaks[1] / 2**20,
        "memory_ratio": peaks[0] / peaks[1],
        "rollouts": shape.rollouts,
        "shape": arguments.shape,
    }
    print("OISDTrainer {oisd_s:.3f} s, GRPOTrainer {grpo_s:.3f} s an update; ratio of pairs: "
          "median {ratio:.3f} (p20 {ratio_p20:.3f}, p80 {ratio_p80:.3f}), {steps} steps; peak "
          "{oisd_mib:,.0f} and {grpo_mib:,.0f} MiB, ratio {memory_ratio:.3f}"
          .format(**result))  # fmt: skip
    if arguments.out:
        append(arguments.out / "trl_overhead.jsonl", [result], describe(device, 1))


def make(trainer: type[GRPOTrainer], folder: str, shape: Shape, device: str) -> Any:
    """A trainer of the shape's model."""
    tokenizer = arithmetic_tokenizer()
    made = trainer(
        model=shape.build(),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
        args=OISDConfig(
            folder,
            student_layers=[shape.student],
            per_device_train_batch_size=shape.rollouts,
            num_generations=shape.completions,
            max_completion_length=shape.tokens,
            bf16=shape.half,
            gradient_checkpointing=shape.half,
            use_cpu=device == "cpu",
            report_to=[],
        ),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    made.create_optimizer()
    return made


def rollouts(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    """A micro-batch as TRL passes it: random digits, a quarter of the advantages 0."""
    tokenizer = arithmetic_tokenizer()
    generator = torch.Generator().manual_seed(0)
    examples = arithmetic_examples(2)[: shape.prompts]
    texts = [str(e.prompt) for e in examples for _ in range(shape.completions)]
    prompt = tokenizer(texts, padding=True)
    size = (shape.rollouts, shape.tokens)
    lengths = torch.randint(1, shape.tokens + 1, size[:1], generator=generator)
    mask = (torch.arange(shape.tokens) < lengths[:, None]).int()
    advantages = torch.randn(size[:1], generator=generator)
    batch = {
        "prompt_ids": torch.tensor(prompt["input_ids"]),
        "prompt_mask": torch.tensor(prompt["attention_mask"]),
        "completion_ids": torch.randint(0, 10, size, generator=generator),
        "completion_mask": mask,
        "advantages": advantages * (torch.arange(size[0]) >= size[0] // 4),
        "num_items_in_batch": mask.sum(),
    }
    return {name: x.to(device) for name, x in batch.items()}


def step(trainer: Any, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one update."""
    wait()
    start = time.perf_counter()
    loss(trainer, batch).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    wait()
    return time.perf_counter() - start


def loss(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As in TRL's own step, whose backward runs outside autocast."""
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, batch)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(trainer: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that one trainer alone holds at the peak of a step."""
    state = [x for one in trainer.optimizer.state.values() for x in one.values()]
    static = sum(x.nbytes for x in (*trainer.model.parameters(), *state))
    if batch["prompt_ids"].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(trainer, batch)
        return static + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(trainer, batch)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    live = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return static + most


def check(oisd: Any, grpo: Any, batch: dict[str, torch.Tensor], shape: Shape) -> None:
    """Exit unless the losses and gradients differ by the terms of OISD."""
    ours, theirs = (loss(t, batch) for t in (oisd, grpo))
    terms = oisd._metrics["train"]
    weighted = terms["loss/think"][0] + 0.1 * terms["loss/attention"][0]
    if abs(ours.item() - theirs.item() - weighted) > 1e-5 or not weighted:
        raise SystemExit(f"WRONG: loss {ours.item()}, GRPO's {theirs.item()}, terms {weighted}")
    ours.backward()
    theirs.backward()
    pairs = zip(oisd.model.named_parameters(), grpo.model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else None
        below = "embed_tokens" in name if layer is None else layer <= shape.student
        if torch.equal(a.grad, b.grad) == below:
            raise SystemExit(f"WRONG: the gradient of {name}")
    oisd.model.zero_grad()
    grpo.model.zero_grad()


if __name__ == "__main__":
    main()
