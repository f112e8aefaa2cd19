"""Completions sampled from the policy by transformers' `generate`.

Sampling is the Gumbel-max trick with counter-based noise: the token is argmax(log p + g), and g is
a function of (seed, step, completion, position, token) alone. A completion so does not depend on
how completions are split into batches or over processes (but for the rounding of the model's own
arithmetic, which in bfloat16 does turn a token now and then), and a resumed run needs no
generator's state. The log-probability of each sampled token, under the distribution that it was
sampled from, comes along for free.

Shape letters: B completions, T completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

_NOISE_AT_ONCE = 1 << 22
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Completions:
    """What was sampled: token ids and log-probs, right-padded to [B, T], and lengths [B].

    The end-of-sequence token, where one was sampled, is the last token of its completion.
    `finished` [B] is false where the limit cut a completion off.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor

    def mask(self) -> Tensor:
        """[B, T] bool, true at the completion's tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    max_completion_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    step: int = 0,
    batch_size: int = 256,
) -> Completions:
    """Sample one completion for each prompt.

    Args:
        model: a transformers causal LM.
        prompts: B lists of token ids, not empty. For several completions of one prompt, repeat it.
        rows: B numbers that tell the completions apart; with `seed` and `step` they fix the noise.
        temperature: at least 0; 0 takes the likeliest token.
        top_p: in (0, 1], nucleus sampling.
        batch_size: completions generated at once; sorted by length so that little is padding.

    Returns the completions in the order of `prompts`.
    """
    device = next(model.parameters()).device
    eos = torch.tensor(list(eos_token_ids), device=device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ids = torch.full((len(prompts), max_completion_tokens), pad_token_id, device=device)
    logprobs = torch.zeros(ids.shape, device=device)
    settings = GenerationConfig(
        max_new_tokens=max_completion_tokens,
        do_sample=False,  # the processor below leaves one token to choose from
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    with _as_for_inference(model, settings):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, attention_mask = left_pad([prompts[i] for i in chosen], pad_token_id, device)
            sampler = GumbelSampler(
                [rows[i] for i in chosen], seed, step, temperature, top_p, device
            )
            output = model.generate(
                input_ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler]),
            )[:, input_ids.shape[1] :]
            index = torch.tensor(chosen, device=device)
            ids[index, : output.shape[1]] = output
            logprobs[index, : output.shape[1]] = torch.stack(sampler.logprobs, dim=1)
    ended = torch.isin(ids, eos)
    finished = ended.any(dim=1)
    lengths = torch.where(finished, ended.int().argmax(dim=1) + 1, max_completion_tokens)
    longest = int(lengths.max()) if len(prompts) else 0
    inside = torch.arange(longest, device=device) < lengths[:, None]
    return Completions(
        ids[:, :longest].masked_fill(~inside, pad_token_id),
        logprobs[:, :longest].masked_fill(~inside, 0.0),
        lengths,
        finished,
    )


class GumbelSampler(LogitsProcessor):
    """Samples by itself: returns scores [B, V] that leave the sampled token alone possible."""

    def __init__(
        self,
        rows: Sequence[int],
        seed: int,
        step: int,
        temperature: float,
        top_p: float,
        device: torch.device,
    ) -> None:
        self.key = row_keys(rows, seed, step, device)
        self.greedy = temperature == 0
        self.warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(top_p)))
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logprobs = self.warpers(input_ids, scores.float()).log_softmax(dim=-1)
        choice = logprobs
        if not self.greedy:
            choice = logprobs.double()
            # In slices, since noise of many rows over a large vocabulary is gigabytes.
            rows = max(1, _NOISE_AT_ONCE // scores.shape[-1])
            for part, key in zip(choice.split(rows), self.key.split(rows), strict=True):
                noise = uniform(key, len(self.logprobs), scores.shape[-1])
                part -= (-noise.log()).log()
        token = choice.argmax(dim=-1, keepdim=True)
        self.logprobs.append(logprobs.gather(1, token).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def row_keys(rows: Sequence[int], seed: int, step: int, device: torch.device | str) -> Tensor:
    """[B] int64: a key for each row number, from which `uniform` draws."""
    base = _mix_int(_mix_int(seed) + step)
    keys = [_mix_int(base + row) for row in rows]
    return torch.tensor([k - (1 << 64) if k >> 63 else k for k in keys], device=device)


def uniform(keys: Tensor, position: int, count: int) -> Tensor:
    """[B, count] float64 in (0, 1), a function of (key, position, column) alone (SplitMix64)."""
    at_position = _mix(keys + _signed((position + 1) * _GOLDEN))
    columns = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _mix(at_position[:, None] + columns)
    # 52 bits and a half: with 53 the largest would round to 1, whose noise is infinite.
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def left_pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], the rows' ends aligned as generation needs them."""
    longest = max(len(row) for row in rows)
    ids = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def _as_for_inference(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Dropout off; the sampling settings that a checkpoint ships (top_k = 20, say) set aside."""
    training = [module for module in model.modules() if module.training]
    shipped = model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = shipped
        for module in training:
            module.training = True


def _mix_int(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """The same on int64 tensors, whose products wrap as unsigned ones do."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; that of int64 would drag the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x
