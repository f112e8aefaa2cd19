"""A blank model of any size with a tokenizer made from its task: `model.path = "scratch:..."`.

The tokenizer has one token for each printable ASCII character, for the line break, and for each
other character that the task's texts use. Words of letters that are in at least a hundredth of the
texts are one token too, so that a question in English is not spelled. A word that has no token is
spelled. Digits are always single.

A checkpoint of such a model is an ordinary Hugging Face folder with its tokenizer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from oisd.data import Example
from oisd.schema import ScratchSizes

_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_BOX = "\\boxed{"  # one token: every graded completion of some tasks has it
_CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
_PIECES = r"\\boxed\{|[A-Za-z]+|[\s\S]"
_SHARE = 100  # a word has a token of its own if at least one text in so many has it


def texts_of(examples: Iterable[Example]) -> list[str]:
    """What a model reads and writes of problems: prompts, and solutions where there are any."""
    found = []
    for example in examples:
        prompt = example.prompt
        found += [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
        found.append(example.solution or example.answer)
    return found


def scratch_tokenizer(texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer made from texts, see the module; pads on the left. Their order does not matter.

    A character that neither ASCII nor the texts have becomes "<unk>".
    """
    characters = sorted({c for text in texts for c in text} - {*_CHARACTERS})
    counts = Counter(word for text in texts for word in {*re.findall(r"[A-Za-z]{2,}", text)})
    words = sorted(word for word, count in counts.items() if count * _SHARE >= len(texts))
    tokens = [_PAD, _EOS, _UNKNOWN, *_CHARACTERS, *characters, _BOX, *words]
    # With an empty prefix WordPiece takes the longest token that fits, and spells what is left.
    model = models.WordPiece(
        {token: i for i, token in enumerate(tokens)},
        unk_token=_UNKNOWN,
        max_input_chars_per_word=10_000,
        continuing_subword_prefix="",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def scratch_model(
    sizes: ScratchSizes, tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> Qwen3ForCausalLM:
    """A blank Qwen3 of these sizes for the tokenizer; the global random state is not used.

    seed: of the initial weights.
    """
    special: dict[str, Any] = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.inner_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.width // sizes.heads,
        # Rotary positions have no limit; other programs take this for the longest text.
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        # Wider than the usual 0.02, as for the arithmetic model: 0.15 at a width of 96.
        initializer_range=0.15 * (96 / sizes.width) ** 0.5,
        bos_token_id=None,
        **special,
    )
    # `torch.manual_seed` would reach the generators of the GPUs too, which are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen3ForCausalLM(config)
