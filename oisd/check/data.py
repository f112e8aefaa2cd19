"""Rows about the problems: fields, lengths, duplicates, and whether each answer can be earned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from oisd.check.findings import Finding
from oisd.config import TrainConfig
from oisd.data import Example, encode_prompts, permutation
from oisd.data.problems import load_problems
from oisd.models.layout import unwrap
from oisd.policy import Policy
from oisd.rewards import (
    MAX_BOX_CHARACTERS,
    BoxedStringReward,
    ExactReward,
    MathReward,
    RewardFunction,
    last_boxed,
)

_PART = "data"
# Rendering and grading take time: this many problems, drawn by the run's seed, stand for more.
_RENDERED, _GRADED = 2048, 512


@dataclass
class Problems:
    """What rows about data read, and rows about rollouts go on from."""

    examples: list[Example] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)


def problem_rows(config: TrainConfig, problems: Problems) -> Iterator[Finding]:
    """Read the problems; every row must have its fields."""
    data = config.data
    problems.examples = load_problems(data.source, data, config.run.seed)
    first = problems.examples[0]
    text = first.prompt if isinstance(first.prompt, str) else first.prompt[-1].content
    found = (
        f"{len(problems.examples):,} problems, the first {_short(text)} -> {first.answer[:40]!r}"
    )
    yield Finding(_PART, "fields", "pass", found)
    yield _duplicate_row(problems.examples)


def overlap_rows(config: TrainConfig, problems: Problems) -> Iterator[Finding]:
    """Problems of the evaluation that are trained on."""
    settings = config.eval
    if not settings.source:
        yield Finding(_PART, "overlap", "not checked", "no --eval-data")
        return
    theirs = load_problems(settings.source, settings, config.run.seed)
    own = {_key(example) for example in problems.examples}
    both = [example for example in theirs if _key(example) in own]
    found = f"{len(both)} of {len(theirs)} problems of the evaluation are trained on"
    if not both:
        yield Finding(_PART, "overlap", "pass", found, 0, 0)
        return
    # The built-in task is small, and its evaluation does not claim more.
    remedy = "take them out of the training problems, or the evaluation measures memory"
    named = f"{found}, {_short(_text(both[0]))} first"
    yield Finding(_PART, "overlap", "warn", named, len(both), 0, remedy)


def _duplicate_row(examples: Sequence[Example]) -> Finding:
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(_key(example), set()).add(example.answer.strip())
    count = len(examples) - len(answers)
    differing = [text for text, found in answers.items() if len(found) > 1]
    if differing:
        found = f"{len(differing)} problems occur with different answers: {_short(differing[0])}"
        remedy = "remove them: no completion can be right for both"
        return Finding(_PART, "duplicates", "warn", found, len(differing), 0, remedy)
    share = count / len(examples)
    most = Counter(_key(example) for example in examples).most_common(1)[0]
    found = f"{count} of {len(examples):,} problems occur before"
    if count:
        found += f", one {most[1]} times"
    remedy = "remove them, or they weigh more than others" if share > 0.01 else ""
    return Finding(_PART, "duplicates", "warn" if remedy else "pass", found, share, 0.01, remedy)


def length_rows(policy: Policy, config: TrainConfig, problems: Problems) -> Iterator[Finding]:
    """Prompts against their limit, and with a completion against the model's positions."""
    data = config.data
    looked = _drawn(problems.examples, _RENDERED, config.run.seed)
    encoded = encode_prompts(
        policy.tokenizer,
        looked,
        system_prompt=data.system_prompt,
        chat_template=data.chat_template,
        max_prompt_tokens=1 << 40,
    )
    lengths = [len(ids) for ids in encoded.token_ids]
    kept = [
        (example, ids)
        for example, ids in zip(looked, encoded.token_ids, strict=True)
        if len(ids) <= data.max_prompt_tokens
    ]
    problems.examples = [example for example, _ in kept]
    problems.prompts = [ids for _, ids in kept]
    over, longest = len(looked) - len(kept), max(lengths)
    found = f"{median(lengths):g} tokens at the median, {longest} at most, of {len(looked):,}"
    limit = data.max_prompt_tokens
    if not over:
        yield Finding(_PART, "prompt lengths", "pass", found, longest, limit)
    else:
        drop = data.overlong_prompts == "drop" and bool(kept)
        found += f"; {over} are over the limit and {'dropped' if drop else 'end the run'}"
        remedy = f"raise data.max_prompt_tokens to {longest}"
        remedy += "" if drop else ', or set data.overlong_prompts = "drop"'
        status = "warn" if drop else "fail"
        yield Finding(_PART, "prompt lengths", status, found, longest, limit, remedy)
    yield _context_row(policy, config, max((len(ids) for ids in problems.prompts), default=0))


def _context_row(policy: Policy, config: TrainConfig, longest: int) -> Finding:
    whole = longest + config.rollout.max_completion_tokens
    text: Any = unwrap(policy.model).config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    found = f"the longest prompt and rollout.max_completion_tokens need {whole:,} positions"
    policy.require_positions([[0] * longest], config.rollout.max_completion_tokens,
                             "rollout.max_completion_tokens")  # fmt: skip
    if not isinstance(limit, int) or whole <= limit:
        return Finding(_PART, "context", "pass", found, whole, limit)
    found += f", the model was made for {limit:,}"
    remedy = f"lower rollout.max_completion_tokens to {max(limit - longest, 1)}"
    return Finding(_PART, "context", "warn", found, whole, limit, remedy)


def answer_rows(
    config: TrainConfig, reward: RewardFunction, examples: Sequence[Example]
) -> Iterator[Finding]:
    """Gold answers that the box cannot hold, and that their grader does not take for right."""
    answers = [e.answer for e in _drawn(examples, _GRADED, config.run.seed)]
    boxed = isinstance(reward, MathReward | BoxedStringReward)
    if not (boxed or isinstance(reward, ExactReward)):
        found = f"what {config.reward.function} takes for right is its own affair"
        yield Finding(_PART, "gold answers", "not checked", found)
        return
    if boxed:
        lost = [a for a in answers if not _fits(a)]
        found = f"{len(lost)} of {len(answers)} gold answers do not survive \\boxed{{}}"
        if lost:
            found += f": {_short(lost[0])}"
            remedy = "mend their braces or set data.answer_pattern; nothing can earn their reward"
            yield Finding(_PART, "boxes", _by_share(lost, answers), found, len(lost), 0, remedy)
        else:
            yield Finding(_PART, "boxes", "pass", found, 0, 0)
        answers = [a for a in answers if _fits(a)]
    texts = [f"\\boxed{{{a}}}" if boxed else a for a in answers]
    wrong = [a for a, r in zip(answers, reward(texts, answers), strict=True) if r != 1]
    unread = len(reward.check_answers(answers)) if isinstance(reward, MathReward) else 0
    found = f"{len(wrong)} of {len(answers)} gold answers do not grade as equal to themselves"
    if wrong:
        found += f": {_short(wrong[0])}"
        remedy = "mend or remove them, or choose another reward.function"
        yield Finding(
            _PART, "gold answers", _by_share(wrong, answers), found, len(wrong), 0, remedy
        )
    elif unread:
        found = f"{unread} of {len(answers)} gold answers cannot be parsed: only the same string "
        remedy = "write them as answers that can be read, or remove them"
        yield Finding(_PART, "gold answers", "warn", found + "earns a reward", unread, 0, remedy)
    else:
        yield Finding(_PART, "gold answers", "pass", found, 0, 0)


def _by_share(wrong: Sequence[str], answers: Sequence[str]) -> Any:
    """A few are a waste of rollouts; many are a wrong column."""
    return "fail" if len(wrong) > 0.1 * len(answers) else "warn"


def _fits(answer: str) -> bool:
    box = last_boxed(f"\\boxed{{{answer}}}")
    return box is not None and box.strip() == answer.strip() and len(box) < MAX_BOX_CHARACTERS


def _drawn(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    if len(examples) <= most:
        return [*examples]
    return [examples[i] for i in sorted(permutation(len(examples), seed)[:most])]


def _text(example: Example) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n".join(message.content for message in example.prompt)


def _key(example: Example) -> str:
    return " ".join(_text(example).split()).casefold()


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 48 else f"{flat[:47]}\u2026")
