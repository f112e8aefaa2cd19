"""A short training run by TRL on a tiny model, for tests; also one process of several.

    python -m tests.oisd.integrations.trl_runs FILE OPTIONS

trains on two processes once for each of OPTIONS, a JSON list of those of `train`, and saves what
each `Run` holds. Under torchrun it is one of the processes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from oisd.arithmetic import arithmetic_tokenizer
from oisd.integrations.alignment import gathered
from oisd.integrations.trl import OISDConfig, OISDTrainer
from oisd.models.layout import is_partitioned
from tests.process_groups import on_ranks
from tests.tiny_models import tiny_model

# Set before TRL warns of it: `rollout_func` is experimental.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

PROMPTS = ["1+2=", "47+85=", "3+4=", "60+9="]
GENERATIONS = 4


@dataclass
class Run:
    """The result: TRL's log, and the weights before and after."""

    log: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    sharded: bool = False

    def moved(self, name: str) -> Tensor:
        """How a parameter changed."""
        return self.after[name] - self.before[name]


def tiny_policy(**overrides: Any) -> Any:
    """A random four-layer Qwen3 over the characters of the arithmetic task."""
    tokenizer = arithmetic_tokenizer()
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tiny_model("qwen3", vocab_size=len(tokenizer), bos_token_id=None, **ids, **overrides)


def scripted_rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The same completions whoever asks: by prompt and place in its group, lengths 1 to 5."""
    eos = trainer.processing_class.eos_token_id
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    completion_ids = []
    for number, prompt in enumerate(prompts):
        place = number % GENERATIONS
        tokens = [(len(prompt) * 3 + place * 5 + j * 7) % 10 for j in range(place + 1)]
        completion_ids.append([*tokens, eos] if place != 2 else tokens * 2)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def digits_reward(
    completions: list[str], prompts: Sequence[str] = (), dull: str | None = None, **_: Any
) -> list[float]:
    """Something that differs within a group and between groups, of unlike size."""
    rewards = [sum(int(c) for c in text if c.isdigit()) / 10 for text in completions]
    if dull is None:
        return rewards
    return [0.0 if p == dull else reward for p, reward in zip(prompts, rewards, strict=True)]


def config(folder: str, **options: Any) -> OISDConfig:
    """Settings for a CPU: plain SGD, so that a step is the gradient, in float32."""
    defaults: dict[str, Any] = dict(
        student_layers=[2],
        per_device_train_batch_size=8,
        num_generations=GENERATIONS,
        max_completion_length=6,
        max_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    return OISDConfig(folder, **(defaults | options))


def make(
    folder: str,
    trainer: Any = OISDTrainer,
    *,
    policy: dict[str, Any] | None = None,
    lora: list[str] | None = None,
    from_files: bool = False,
    scripted: bool = True,
    dull: str | None = None,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of four prompts, by default on scripted completions.

    from_files: let TRL load the model, as from a name.
    dull: a prompt whose completions are all worth the same, so that their advantages are 0.
    policy: overrides of the model's configuration. lora: the target modules of an adapter.
    keywords: other arguments of the trainer; options: of its configuration.
    """
    given: dict[str, Any] = dict(
        model=tiny_policy(**(policy or {})),
        reward_funcs=functools.partial(digits_reward, dull=dull),
        args=config(folder, **options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=arithmetic_tokenizer(),
    )
    if from_files:
        path = f"{folder}-policy-{os.environ.get('RANK', '0')}"
        given["model"].save_pretrained(path)
        given["model"] = path
    if scripted:
        given["rollout_func"] = scripted_rollouts
    if lora:
        given["peft_config"] = LoraConfig(r=4, target_modules=lora, init_lora_weights=False)
    return trainer(**(given | (keywords or {})))


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of a model's parameters, gathered if FSDP2 or ZeRO-3 has sharded them."""
    with gathered(*model.parameters()):
        return {
            name.replace("_checkpoint_wrapped_module.", ""): (
                p.full_tensor() if isinstance(p, DTensor) else p
            )
            .detach()
            .clone()
            for name, p in model.named_parameters()
        }


def train(trainer: Any = OISDTrainer, **options: Any) -> Run:
    """Train for a step, unless `options` say otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(folder, trainer, **options)
        before = weights(made.model)
        made.train()
        sharded = any(isinstance(p, DTensor) or is_partitioned(p) for p in made.model.parameters())
        return Run(made.state.log_history, before, weights(made.model), sharded)


def difference(run: Run, other: Run) -> Tensor:
    """By how much the steps of two runs differ, all parameters in one vector."""
    return torch.cat([(run.moved(n) - other.moved(n)).flatten() for n in sorted(run.before)])


def allow_fsdp_on_cpus() -> None:
    """Let accelerate shard on CPUs too: by itself it has FSDP for accelerators alone.

    torch's `fully_shard` knows gloo, and the rest of accelerate's path asks for nothing else.
    """
    make_state = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def allow_deepspeed_on_cpus() -> None:
    """Let accelerate start DeepSpeed on CPUs too: by itself it takes them for one process."""
    prepare = PartialState._prepare_backend

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return "gloo", DistributedType.MULTI_CPU
        return prepare(self, *args, **kwargs)

    PartialState._prepare_backend = prepared


def main(file: str, cases: str) -> None:
    torch.set_num_threads(1)
    allow_fsdp_on_cpus()
    allow_deepspeed_on_cpus()
    runs = [vars(train(**options)) for options in json.loads(cases)]
    if os.environ.get("RANK", "0") == "0":
        torch.save(runs, file)
    torch.distributed.barrier()
    # Leave without torch's teardown, in which a process aborted once in many runs (torch 2.13,
    # "terminate called without an active exception").
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(*sys.argv[1:])
    sys.exit(any(on_ranks(2, main, *sys.argv[1:])))
