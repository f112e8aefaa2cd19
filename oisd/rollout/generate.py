"""Completions by transformers' `generate`, in batches; completions of one prompt share its prefill.

Rows of a batch that have the same prompt, such as the rollouts of a group or the samples of an
evaluation, run it through the model once. For that `generate` is called twice: on the distinct
prompts for one token, which gives their cache and the scores of the first tokens, and then on all
rows that go on, from the cache with its entries repeated. The cache is repeated a layer at a time,
so that no more than one layer is held twice. Tokens and noise are those of a single call with each
row's own prompt; log-probs differ from its by rounding.

Whether the state of a model can be repeated is found out by trying: once for each model a few
tokens are decoded in both ways. Models whose scores differ, or that keep no cache, run each row's
prompt. Nothing says so during a run, because the samples are the same.

Shape letters: B completions, U distinct prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from oisd.models.guards import arithmetic, default_tolerance, guard_tokens
from oisd.models.loading import quiet

# (scores [B, V], keys [B], positions [B]) -> tokens [B], log-probs [B], as `TokenSampler` has it.
Draw = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_can_share: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
# Tokens of the trial's longer prompt and of its completions, where there are positions for them.
_PROMPT, _COMPLETION = 40, 5


def run(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    sampler: Draw,
    settings: GenerationConfig,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Token ids and log-probs, right-padded to [B, max_new_tokens].

    model: in evaluation mode.
    prompts: B lists of token ids, not empty.
    keys: [B] int64, from `row_keys`.
    batch_size: completions generated at once.
    """
    device = keys.device
    pad: Any = settings.pad_token_id
    ids = torch.full((len(prompts), int(settings.max_new_tokens or 0)), pad, device=device)
    logprobs = torch.zeros(ids.shape, device=device)
    number: dict[tuple[int, ...], int] = {}
    group = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    # Of like length, so that little is padding; and the rows of a prompt together.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), group[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        index = torch.tensor(chosen, device=device)
        distinct = {group[i]: prompts[i] for i in chosen}
        if len(distinct) < len(chosen) and can_share(model):
            place = {own: j for j, own in enumerate(distinct)}
            repeats = torch.tensor([place[group[i]] for i in chosen], device=device)
            inputs = left_pad([*distinct.values()], pad, device)
            found = _decode_shared(model, inputs, repeats, keys[index], sampler, settings)
        else:
            inputs = left_pad([prompts[i] for i in chosen], pad, device)
            found = _decode(model, inputs, keys[index], sampler, settings)
        for whole, part in zip((ids, logprobs), found, strict=True):
            whole[index, : part.shape[1]] = part
    return ids, logprobs


def left_pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], the rows' ends aligned as generation needs them."""
    longest = max(len(row) for row in rows)
    ids = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _decode(
    model: Any,
    inputs: tuple[Tensor, Tensor],
    keys: Tensor,
    sampler: Draw,
    settings: GenerationConfig,
    earlier: int = 0,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Token ids and log-probs [B, at most max_new_tokens] that follow the inputs [B, T].

    earlier: how many of each row's inputs were sampled.
    """
    processor = _Sampling(sampler, keys, earlier)
    ids = model.generate(
        inputs[0],
        attention_mask=inputs[1],
        generation_config=settings,
        logits_processor=LogitsProcessorList([processor]),
        **more,
    )
    return ids[:, inputs[0].shape[1] :], torch.stack(processor.logprobs, dim=1)


def _decode_shared(
    model: Any,
    inputs: tuple[Tensor, Tensor],
    repeats: Tensor,
    keys: Tensor,
    sampler: Draw,
    settings: GenerationConfig,
) -> tuple[Tensor, Tensor]:
    """As `_decode`, where row i has the inputs [U, T] of index repeats[i].

    Raises TypeError where the model returns no cache.
    """
    prefill = _Scores()
    made = model.generate(
        inputs[0],
        attention_mask=inputs[1],
        generation_config=_changed(settings, max_new_tokens=1, return_dict_in_generate=True),
        logits_processor=LogitsProcessorList([prefill]),
    )
    name = "cache" if "cache" in made else "past_key_values"  # its name in older versions
    cache = made.get(name)
    if not isinstance(cache, Cache):
        raise TypeError(f"{type(model).__name__} returned no cache but {type(cache).__name__}")
    tokens, logprobs = sampler(prefill.scores[repeats], keys, torch.zeros_like(keys))
    del prefill
    tokens, logprobs = tokens[:, None], logprobs[:, None]
    limit = int(settings.max_new_tokens or 0)
    ends = torch.tensor(settings.eos_token_id, device=keys.device)
    going = torch.isin(tokens[:, 0], ends, invert=True).nonzero().flatten()
    if limit == 1 or len(going) == 0:
        return tokens, logprobs
    rows: Any = repeats[going]
    cache.reorder_cache(rows)  # whatever a layer keeps; a row may be taken more than once
    ids = torch.cat([inputs[0][rows], tokens[going]], dim=1)
    mask = torch.cat([inputs[1][rows], torch.ones_like(tokens[going])], dim=1)
    settings = _changed(settings, max_new_tokens=limit - 1)
    kept = {name: cache}
    rest = _decode(model, (ids, mask), keys[going], sampler, settings, earlier=1, **kept)
    found = []
    for first, part, fill in zip(
        (tokens, logprobs), rest, (settings.pad_token_id, 0.0), strict=True
    ):
        whole: Any = first.new_full((len(keys), 1 + part.shape[1]), fill)
        whole[:, :1] = first
        whole[going, 1:] = part.to(whole.dtype)
        found.append(whole)
    return found[0], found[1]


def _changed(settings: GenerationConfig, **fields: Any) -> GenerationConfig:
    changed = copy.deepcopy(settings)
    changed.update(**fields)
    return changed


class _Sampling(LogitsProcessor):
    """Samples: returns scores [B, V] that allow the sampled token alone."""

    def __init__(self, sampler: Draw, keys: Tensor, earlier: int) -> None:
        self.sampler, self.keys, self.earlier = sampler, keys, earlier
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        positions = torch.full_like(self.keys, self.earlier + len(self.logprobs))
        token, logprob = self.sampler(scores, self.keys, positions)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class _Scores(LogitsProcessor):
    """Keeps the scores [B, V] of a call for one token."""

    scores: Tensor

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.scores = scores
        return scores


# ---- whether a prefill can be shared ---------------------------------------------------------


def can_share(model: Any) -> bool:
    """Whether rows of one prompt may share its prefill: what a trial found, made once a model.

    model: in evaluation mode.
    """
    if model not in _can_share:
        _can_share[model] = _scores_agree(model)
    return _can_share[model]


@torch.no_grad()
def _scores_agree(model: Any) -> bool:
    """Whether decoding gives the same scores with a prefill that is shared and without.

    Four rows of two prompts of unlike lengths, in an order that shows whose state a row has.
    """
    text = guard_tokens(model, _PROMPT + _COMPLETION)
    count = min(_COMPLETION, len(text) // 4)
    if count < 2:
        return False  # too few positions to tell
    prompts = [text[count:].tolist(), text[: len(text) // 2].tolist()]
    repeats = torch.tensor([1, 0, 0, 1], device=text.device)
    keys = torch.arange(4, device=text.device)
    vocabulary = model.config.get_text_config().vocab_size
    settings = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=[vocabulary],  # no token: completions have one length
        pad_token_id=0,
        use_cache=True,
    )
    dictated = torch.stack([text[i : i + count] for i in range(4)])
    alone, shared = _Dictated(dictated), _Dictated(dictated)
    each = left_pad([prompts[i] for i in repeats.tolist()], 0, text.device)
    distinct = left_pad(prompts, 0, text.device)
    try:
        with quiet():
            _decode(model, each, keys, alone, settings)
            _decode_shared(model, distinct, repeats, keys, shared, settings)
    except Exception:  # whatever a model raises whose state is not a cache of rows
        return False
    one, other = (torch.stack(found.scores) for found in (shared, alone))
    apart = (one - other).abs().amax(-1) / other.abs().amax().clamp_min(1e-30)  # [T, B]
    # The median, because a mixture of experts may choose another expert at one position.
    return bool(apart.median(dim=0).values.max() <= default_tolerance(arithmetic(model)) / 4)


class _Dictated:
    """In place of a sampler: the tokens of a table [B, T]; keeps the scores."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.scores: list[Tensor] = []

    def __call__(self, scores: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.scores.append(scores.float())
        return self.tokens[keys, positions], torch.zeros(len(keys), device=keys.device)
