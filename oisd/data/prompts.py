"""Prompts as a model reads them: rendered with its chat template, tokenized, of limited length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from oisd.data.examples import DataError, Example, Message
from oisd.schema import one_line


class EncodedPrompts(NamedTuple):
    """Prompts as token ids, row by row with the examples they came from."""

    token_ids: list[list[int]]
    examples: list[Example]
    dropped: list[Example]
    """Examples left out because their prompts are too long."""


def render_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    enable_thinking: bool = False,
) -> str:
    """The text that the model continues.

    tokenizer: a Hugging Face tokenizer.
    system_prompt: put first, unless the prompt is a conversation with a system message of its own.
    chat_template: apply the tokenizer's chat template; None: when it has one. Without it, the parts
        are joined by blank lines.
    enable_thinking: handed to the chat template; Qwen3's opens a thinking block with it.
    A conversation that ends with the assistant's words is continued there.
    Raises DataError when a chat template is asked for and absent, or refuses the conversation.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if system_prompt and all(message.role != "system" for message in messages):
        messages = (Message("system", system_prompt), *messages)
    if not _uses_chat_template(tokenizer, chat_template):
        return "\n\n".join(message.content for message in messages)
    continued = messages[-1].role == "assistant"
    try:
        return tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            enable_thinking=enable_thinking,
        )
    except Exception as error:
        roles = ", ".join(message.role for message in messages)
        reason = one_line(error)
        if not (continued and isinstance(error, ValueError) or _is_refusal(error)):
            raise DataError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} is broken: "
                f"{type(error).__name__}: {reason}. Take the model's own, or set chat_template to "
                f"false for plain text"
            ) from error
        remedy = (
            "If it cannot continue the assistant's words, end the conversation with the user's"
            if continued
            else "If it knows no system role, leave system_prompt empty and put the instruction "
            "into the problem"
        )
        raise DataError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses a "
            f"conversation of roles {roles}: {reason}. {remedy}"
        ) from error


def _is_refusal(error: Exception) -> bool:
    """Whether a template said so itself, by `raise_exception`."""
    from jinja2 import TemplateError  # comes with what renders templates

    return type(error) is TemplateError


def _uses_chat_template(tokenizer: Any, chat_template: bool | None) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template and not has_template:
        raise DataError(
            f"chat_template=True, but {tokenizer.name_or_path or 'the tokenizer'} has no chat "
            f"template; leave chat_template out for plain text, or take an instruct model's "
            f"tokenizer"
        )
    return has_template if chat_template is None else chat_template


def token_ids_of(
    tokenizer: Any, texts: Sequence[str], chat_template: bool | None = None
) -> list[list[int]]:
    """Token ids of rendered prompts, ready to be continued; see `render_prompt`.

    A chat template has written the special tokens itself. To a plain text the tokenizer adds those
    that begin one, except a BOS that the text begins with already, and none that end it.
    """

    def tokenize(texts: Sequence[str], special: bool) -> list[list[int]]:
        try:
            found = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)
        except Exception as error:  # tokenizers raises no class of its own
            raise DataError(
                f"the tokenizer cannot encode a prompt or the system prompt, such as {texts[0]!r}: "
                f"{' '.join(str(error).split())}; take a model whose tokenizer has its characters; "
                'model.path = "scratch" makes one from the data'
            ) from error
        return [list(ids) for ids in found["input_ids"]]

    bare = tokenize(texts, False)
    if _uses_chat_template(tokenizer, chat_template):
        return bare
    bos = getattr(tokenizer, "bos_token_id", None)
    found = []
    for ids, own in zip(tokenize(texts, True), bare, strict=True):
        # What stands before and after the text's own tokens; a tokenizer may add either.
        before = next((n for n in range(len(ids) + 1) if ids[n : n + len(own)] == own), None)
        if before is None:  # its tokens depend on what stands beside them
            found.append(ids)
            continue
        if bos is not None and own[:1] == [bos] and bos in ids[:before]:
            before = 0
            ids = own
        found.append(ids[: before + len(own)])
    return found


def encode_prompts(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    system_prompt: str | None = None,
    chat_template: bool | None = None,
    enable_thinking: bool = False,
    max_prompt_tokens: int = 1024,
    overlong: Literal["error", "drop"] = "error",
) -> EncodedPrompts:
    """Render and tokenize the prompts; see `render_prompt` for the other options.

    max_prompt_tokens: the longest prompt that is taken.
    overlong: what to do with a longer one: "error", or "drop" to leave it out and list it.
    Raises DataError for an overlong or an empty prompt, or if none is left.
    """
    if overlong not in ("error", "drop"):
        raise DataError(f'encode_prompts: overlong must be "error" or "drop", got {overlong!r}')
    if not examples:
        return EncodedPrompts([], [], [])
    texts = [
        render_prompt(
            tokenizer,
            example.prompt,
            system_prompt=system_prompt,
            chat_template=chat_template,
            enable_thinking=enable_thinking,
        )
        for example in examples
    ]
    encoded = token_ids_of(tokenizer, texts, chat_template)

    token_ids, kept, dropped = [], [], []
    for ids, example in zip(encoded, examples, strict=True):
        if not ids:
            raise DataError(f"prompt {example.id} has no tokens")
        if len(ids) <= max_prompt_tokens:
            token_ids.append(list(ids))
            kept.append(example)
        elif overlong == "drop":
            dropped.append(example)
        else:
            raise DataError(
                f"prompt {example.id} has {len(ids)} tokens, the limit is {max_prompt_tokens}; "
                f'raise max_prompt_tokens or, in training, set overlong_prompts="drop"'
            )
    if not kept:
        raise DataError(
            f"all {len(dropped)} prompts are longer than {max_prompt_tokens} tokens; "
            f"raise max_prompt_tokens"
        )
    return EncodedPrompts(token_ids, kept, dropped)


def check_vocabulary(tokenizer: Any, model_config: Any) -> None:
    """Raise DataError if a tokenizer can produce ids for which the model has no embedding.

    model_config: a transformers configuration. A vocabulary larger than the tokenizer's is fine:
        models pad theirs.
    """
    # Added tokens may leave gaps, so that the largest id is not the number of tokens less one.
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    has = model_config.get_text_config().vocab_size
    if needed > has:
        raise DataError(
            f"vocabulary mismatch: the tokenizer {tokenizer.name_or_path} has token ids up to "
            f"{needed - 1}, the model {model_config.name_or_path} has {has} embeddings; take the "
            f"tokenizer that came with the model"
        )
