"""Completions sampled from the policy, by transformers' `generate` or its continuous batching.

Both engines draw the same tokens (`oisd.rollout.sampling`), up to the rounding of the model's
arithmetic.

Shape letters: B completions, T completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from oisd.rollout import generate
from oisd.rollout.generate import left_pad as left_pad
from oisd.rollout.sampling import TokenSampler, row_keys

ENGINES = ("generate", "continuous")


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
    engine: str = "generate",
) -> Completions:
    """Sample one completion for each prompt.

    Args:
        model: a transformers causal LM.
        prompts: B lists of token ids, not empty. For several completions of one prompt, repeat it.
        rows: B numbers that tell the completions apart; with `seed` and `step` they fix the noise.
        temperature: at least 0; 0 takes the likeliest token.
        top_p: in (0, 1], nucleus sampling.
        batch_size: completions generated at once.
        engine: "generate" or "continuous". Their log-probs differ in the last digits, and
            occasionally a token.

    Returns the completions in the order of `prompts`. Raises ValueError for an engine that is
    unknown or cannot run this model, RuntimeError if continuous batching failed.
    """
    if engine not in ENGINES:
        raise ValueError(f"sample: engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    device = next(model.parameters()).device
    eos = torch.tensor(list(eos_token_ids), device=device)
    settings = GenerationConfig(
        max_new_tokens=max_completion_tokens,
        do_sample=False,  # a logits processor leaves one token to choose from
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    run = generate.run
    if engine == "continuous" and len(prompts) > 0:
        from oisd.rollout.continuous import run
    keys, sampler = row_keys(rows, seed, step, device), TokenSampler(temperature, top_p)
    with _as_for_inference(model, settings):
        ids, logprobs = run(model, prompts, keys, sampler, settings, batch_size)
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


@contextmanager
def _as_for_inference(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Without dropout and the sampling settings that come with a checkpoint (top_k = 20, say)."""
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
