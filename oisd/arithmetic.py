"""A model for the task of `oisd.data.sums` that a CPU can train.

A six-layer Qwen3 of 612 thousand parameters learns it in a minute: enough to run the whole trainer,
with an intermediate layer to align, without a GPU.

A supervised warm-up comes first: no answer sampled from a blank model is right, so that without it
there would be no advantage and no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from oisd.data.examples import DataError, Example
from oisd.data.sums import arithmetic_examples

__all__ = ["arithmetic_examples", "arithmetic_model", "arithmetic_tokenizer", "supervised_batch"]

_CHARACTERS = "0123456789+="
_PAD, _EOS = "<pad>", "<eos>"


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of the task; pads on the left."""
    vocabulary = {token: i for i, token in enumerate((*_CHARACTERS, _PAD, _EOS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def arithmetic_model(seed: int = 0, **size: Any) -> Qwen3ForCausalLM:
    """A blank Qwen3 for the task, six layers and 612,480 parameters unless `size` says otherwise.

    seed: of the initial weights; the global random state is neither used nor changed.
    size: fields of transformers' `Qwen3Config` to override.
    """
    tokenizer = arithmetic_tokenizer()
    config = Qwen3Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            # Wider than the usual 0.02, for so narrow a model: it learns in half the steps.
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **size,
        }
    )
    # `torch.manual_seed` would reach the generators of the GPUs too, which are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def supervised_batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Problems with their solutions, padded on the right, as the arguments of a model's forward.

    Returns input_ids, attention_mask and labels, each (B, T) int64. Labels are the worked solution,
    or the answer of a problem that has none, and the end-of-sequence token; -100 elsewhere.
    """
    chosen = [examples[i] for i in indices]
    prompts = tokenizer([_text(example) for example in chosen])["input_ids"]
    texts = tokenizer([example.solution or example.answer for example in chosen])["input_ids"]
    end_of_sequence: Any = tokenizer.eos_token_id
    answers = [[*ids, end_of_sequence] for ids in texts]
    shape = len(chosen), max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    pad: Any = tokenizer.pad_token_id
    input_ids = torch.full(shape, end_of_sequence if pad is None else pad)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _text(example: Example) -> str:
    if not isinstance(example.prompt, str):
        raise DataError(f"supervised_batch: the prompt of {example.id} is not plain text")
    return example.prompt
