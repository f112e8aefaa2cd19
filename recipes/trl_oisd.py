"""OISD with TRL, on problems with verifiable answers.

    accelerate launch --config_file fsdp2.yaml recipes/trl_oisd.py \\
        --model_name_or_path Qwen/Qwen3-4B --dataset_name zwhe99/DeepMath-103K \\
        --prompt_field question --answer_field final_answer --limit 5000 --use_vllm \\
        --chat_template_kwargs '{"enable_thinking": false}' --output_dir runs/trl-qwen3-4b

The options are those of TRL's own scripts (`--config FILE.yaml` too), of OISDConfig, and the ones
below. Defaults follow the paper where it states a value: learning rate, advantages, temperature
and loss are as in recipes/qwen3-4b.toml; batch sizes are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from oisd.data import Example, load_examples
from oisd.integrations.trl import OISDConfig, OISDTrainer
from oisd.rewards import load_reward

SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass
class Arguments(ScriptArguments):
    """Where the problems come from and how completions are graded."""

    prompt_field: str | None = field(
        default=None,
        metadata={"help": 'Column of the problem; "question" unless the source knows.'},
    )
    answer_field: str | None = field(
        default=None, metadata={"help": 'Column of its answer; "answer" unless the source knows.'}
    )
    answer_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression; its one group is the answer."}
    )
    limit: int | None = field(default=None, metadata={"help": "Take this many rows, at random."})
    system_prompt: str = field(
        default=SYSTEM, metadata={"help": "Empty for none. Used in conversations only."}
    )
    conversation: bool = field(
        default=True, metadata={"help": "Use the chat template instead of the bare problem."}
    )
    reward: str = field(
        default="math", metadata={"help": '"math", "exact", or "module:function" of your own.'}
    )


def problems(arguments: Arguments, seed: int) -> Dataset:
    """The training set in TRL's form: prompt, answer."""
    examples = load_examples(
        arguments.dataset_name or "",
        split=arguments.dataset_train_split,
        prompt_field=arguments.prompt_field,
        answer_field=arguments.answer_field,
        answer_pattern=arguments.answer_pattern,
        subset=arguments.dataset_config,
        limit=arguments.limit,
        seed=seed,
    )
    return Dataset.from_list(
        [{"prompt": _prompt(one, arguments), "answer": one.answer} for one in examples]
    )


def _prompt(example: Example, arguments: Arguments) -> Any:
    if not isinstance(example.prompt, str):
        return [message._asdict() for message in example.prompt]
    if not arguments.conversation:
        return example.prompt
    system = [{"role": "system", "content": arguments.system_prompt}]
    user = [{"role": "user", "content": example.prompt}]
    return (system if arguments.system_prompt else []) + user


def graded(name: str) -> Callable[..., list[float]]:
    """One of our rewards in TRL's form."""
    grade = load_reward(name)

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] or "" for c in completions]
        return grade(texts, answer)

    return reward


def main() -> None:
    """Train with the settings of the command line, and save the model."""
    parser = TrlParser((Arguments, OISDConfig, ModelConfig))  # pyright: ignore
    arguments, config, model = parser.parse_args_and_config(fail_with_unknown_args=True)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    trainer = OISDTrainer(
        model=model.model_name_or_path,
        reward_funcs=graded(arguments.reward),
        args=config,
        train_dataset=problems(arguments, config.seed),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
