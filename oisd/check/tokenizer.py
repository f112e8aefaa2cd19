"""Rows about the tokenizer, the ends of a sequence, the chat template and shipped settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from oisd.check.findings import Finding
from oisd.config import TrainConfig
from oisd.data import DataError, Message, render_prompt
from oisd.data.prompts import token_ids_of
from oisd.models.layout import unwrap
from oisd.policy import Policy

_PART = "tokenizer"
_QUESTION = "What is 2 + 3?"
# What `generate` would do with each of these, if rollouts did not set them aside.
_NEUTRAL = {
    "temperature": (None, 1.0),
    "top_k": (None, 0, 50),  # 50 is transformers' own default
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "suppress_tokens": (None, []),
    "forced_eos_token_id": (None,),
}


def vocabulary_rows(policy: Policy) -> Iterator[Finding]:
    """Size against the model's, and which tokens end a completion."""
    tokenizer, model = policy.tokenizer, unwrap(policy.model)
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    config: Any = model.config
    has = config.get_text_config().vocab_size
    more = f", {has - needed} rows of the model are padding" if has > needed else ""
    found = f"{needed:,} ids of the tokenizer, {has:,} of the model{more}"
    yield Finding(_PART, "vocabulary", "pass", found, needed, has)
    yield _ends_row(policy)
    settings: Any = model.generation_config
    own = {name: getattr(settings, name, None) for name in _NEUTRAL}
    aside = {name: value for name, value in own.items() if value not in _NEUTRAL[name]}
    words = ", ".join(f"{name} = {value}" for name, value in aside.items())
    yield Finding(
        _PART,
        "shipped sampling",
        "warn" if aside else "pass",
        f"rollouts set aside {words}" if aside else "no settings that rollouts set aside",
        remedy="evaluate with the model's own settings if you compare with its report"
        if aside
        else "",
    )


def _ends_row(policy: Policy) -> Finding:
    """The ends that rollouts heed, and those that the chat template writes."""
    tokenizer = policy.tokenizer
    shipped = unwrap(policy.model).generation_config.eos_token_id  # pyright: ignore
    theirs = {*shipped} if isinstance(shipped, list) else {shipped} - {None}
    ends = policy.eos_token_ids
    named = ", ".join(f"{tokenizer.decode([i])!r} ({i})" for i in ends)
    found = f"completions end at {named}"
    if turn := _end_of_turn(tokenizer):
        text, first = turn
        if first not in ends:
            remedy = f"add {first} to eos_token_id in generation_config.json"
            found += f", but the chat template ends a turn with {text!r} ({first})"
            return Finding(_PART, "ends of sequence", "warn", found, remedy=remedy)
    own = tokenizer.eos_token_id
    if own is not None and theirs and own not in theirs:
        found += f"; generation_config has {sorted(theirs)}, the tokenizer {own}: both are heeded"
    if own is not None and own == tokenizer.pad_token_id and len(ends) == 1:
        found += "; it is the padding too, which masks hide"
    return Finding(_PART, "ends of sequence", "pass", found)


def _end_of_turn(tokenizer: Any) -> tuple[str, int] | None:
    """The first special token that the template writes after an assistant's words."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "zzanswerzz"
    talk = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # a template may refuse this talk; its row says so
        return None
    after = text.rpartition(mark)[2]
    ids = token_ids_of(tokenizer, [after], True)[0] if after.strip() else []
    special = next((i for i in ids if i in tokenizer.all_special_ids), None)
    return None if special is None else (tokenizer.decode([special]), special)


def prompt_rows(
    policy: Policy, config: TrainConfig, problem: str | tuple[Message, ...] | None
) -> Iterator[Finding]:
    """How a prompt is rendered: BOS, EOS, thinking blocks, a talk that ends with the assistant.

    problem: the first of the data; None for a question of our own.
    """
    tokenizer, data = policy.tokenizer, config.data
    options: Any = {"system_prompt": data.system_prompt, "chat_template": data.chat_template}
    asked = problem or _QUESTION
    text = render_prompt(tokenizer, asked, **options)
    try:
        ids = token_ids_of(tokenizer, [text], data.chat_template)[0]
    except DataError as error:
        if problem:
            raise
        yield Finding(_PART, "prompts", "not checked", f"{error}; pass --data")
        return
    yield _special_row(policy, ids)
    templated = getattr(tokenizer, "chat_template", None) and data.chat_template is not False
    if not templated:
        yield Finding(_PART, "chat template", "pass", "none: prompts are plain text")
        return
    tail = text[-60:]
    surprises = []
    if "<think" in tail or "</think" in tail:
        surprises.append("it ends the prompt with a thinking block that is closed already")
        if tail.rstrip().endswith("<think>"):
            surprises[-1] = "it opens a thinking block even with enable_thinking=False"
    elif text != render_prompt(tokenizer, asked, enable_thinking=True, **options):
        surprises.append("thinking is off (enable_thinking=False)")
    system = "Answer briefly."
    try:
        if system not in render_prompt(tokenizer, _QUESTION, system_prompt=system):
            surprises.append("it leaves a system prompt out")
    except DataError:
        surprises.append("it refuses a system prompt")
    try:
        talk = (Message("user", _QUESTION), Message("assistant", "The answer is"))
        if not render_prompt(tokenizer, talk).rstrip().endswith("The answer is"):
            surprises.append("it does not continue a conversation that ends with the assistant")
    except DataError:
        surprises.append("it refuses a conversation that ends with the assistant")
    end = f"prompts end in {tail[-24:]!r}"
    found = "; ".join([end, *surprises])
    bad = [s for s in surprises if "thinking is off" not in s and "closed already" not in s]
    remedy = "read a rendered prompt; put instructions into the problem itself" if bad else ""
    yield Finding(_PART, "chat template", "warn" if bad else "pass", found, remedy=remedy)


def _special_row(policy: Policy, ids: Sequence[int]) -> Finding:
    """BOS once at most and first, no EOS at the end."""
    tokenizer = policy.tokenizer
    bos, count = tokenizer.bos_token_id, 0
    if bos is not None and bos not in policy.eos_token_ids:
        count = sum(token == bos for token in ids)
    if count > 1:
        found = f"a rendered prompt has {count} BOS tokens"
        remedy = "take the BOS out of the chat template or of the system prompt"
        return Finding(_PART, "BOS and EOS", "warn", found, count, 1, remedy)
    if ids and ids[-1] == tokenizer.eos_token_id:
        found = "a rendered prompt ends with the EOS, after which a model begins another text"
        remedy = "mend the chat template: it must end where the assistant begins"
        return Finding(_PART, "BOS and EOS", "warn", found, remedy=remedy)
    begins = "begins with its BOS" if count else "has no BOS"
    if not count and bos is not None and _adds_bos(tokenizer):
        found = "the tokenizer adds a BOS to plain text, the chat template writes none"
        remedy = "add bos_token to the chat template if the model was trained with it"
        return Finding(_PART, "BOS and EOS", "warn", found, 0, 1, remedy)
    return Finding(
        _PART, "BOS and EOS", "pass", f"a rendered prompt {begins} and no EOS at its end"
    )


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
