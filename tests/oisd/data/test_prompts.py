"""Prompts begin as the model's own do, and end where it goes on."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from oisd.data import DataError, Example, Message, encode_prompts, render_prompt
from oisd.data.prompts import token_ids_of

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BOS, EOS = 0, 1


def tokenizer(shape: str = "<bos> $A", chat: str | None = None):
    """One token a byte; `shape` is what it adds to a text."""
    special = ["<bos>", "<end>", "<sep>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(special)
    made.post_processor = processors.TemplateProcessing(
        single=shape, special_tokens=[(name, i) for i, name in enumerate(special)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<end>", chat_template=chat
    )


def bare(text):
    return tokenizer("$A")(text)["input_ids"]


@pytest.mark.parametrize(
    "shape", ["$A <end>", "<bos> $A <end>", "<bos> $A <sep>", "$A <sep> <end>"]
)
@pytest.mark.parametrize("text", ["7 - 3 =", "7<end>", "<end>"])
def test_what_a_tokenizer_appends_is_left_out_and_the_text_stays(shape, text):
    (ids,) = token_ids_of(tokenizer(shape), [text])
    assert ids == [BOS] * shape.startswith("<bos>") + bare(text)


def test_one_bos():
    assert token_ids_of(tokenizer(), ["<bos>x", "x"]) == [[BOS, *bare("x")]] * 2
    with_chat = tokenizer("<bos> $A <end>", CHAT)
    (ids,) = encode_prompts(with_chat, [Example("x", "1", "0")]).token_ids
    assert ids == [BOS, *bare("[user]x<end>[assistant]")]


TURNS = (Message("user", "Name one."), Message("assistant", "The answer "))


@pytest.mark.parametrize("words", ["Well, it is", "e", "end", "Name"])
def test_the_assistants_last_words_are_continued(words):
    chat = (TURNS[0], Message("assistant", words))
    rendered = render_prompt(tokenizer(chat=CHAT), chat)
    assert rendered == f"<bos>[user]Name one.<end>[assistant]{words}"
    assert render_prompt(tokenizer(), chat) == f"Name one.\n\n{words}"


def test_a_template_that_drops_the_assistants_words_refuses_to_continue_them():
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="of roles user, assistant.*end the conversation with"):
        render_prompt(tokenizer(chat=drops), TURNS)
