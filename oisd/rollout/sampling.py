"""Which token comes next: a function of the model's logits and of counter-based noise.

Sampling is the Gumbel-max trick: the token is argmax(log p + g), and g is a function of (seed,
step, completion, position, token) alone. A completion therefore does not depend on how completions
are split into batches or over processes, nor on the engine that runs the model. Only the model's
own arithmetic may be rounded differently, which in bfloat16 occasionally changes a token. A resumed
run needs no generator's state. The log-probability of each sampled token, under the distribution
that it was sampled from, is returned at no extra cost.

Shape letters: B completions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

# Numbers of noise drawn at once: enough to fill a GPU; on a CPU, what stays in its cache.
_NOISE_AT_ONCE = {"cpu": 1 << 17}
_NOISE_ELSEWHERE = 1 << 22
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class TokenSampler:
    """Samples a token for each row of scores, by temperature and nucleus.

    temperature: at least 0; 0 takes the likeliest token.
    top_p: in (0, 1], the mass of the nucleus.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0) -> None:
        self.greedy = temperature == 0
        self.warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, scores: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] int64 and their log-probs [B] float32.

        scores: [B, V], the model's logits.
        keys, positions: [B] int64, `row_keys` of the completions and how many tokens they have.
        """
        # In slices: the noise of many rows over a large vocabulary is gigabytes.
        at_once = _NOISE_AT_ONCE.get(scores.device.type, _NOISE_ELSEWHERE)
        rows = max(1, at_once // scores.shape[-1])
        parts = zip(scores.split(rows), keys.split(rows), positions.split(rows), strict=True)
        chosen = [self._choose(*part) for part in parts]
        tokens, logprobs = zip(*chosen, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _choose(self, scores: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        unused: Any = None  # the warpers look at the scores alone
        warped: Any = scores.float()
        logprobs = self.warpers(unused, warped).log_softmax(dim=-1)
        choice = logprobs
        if not self.greedy:
            noise = uniform(keys, positions, scores.shape[-1])
            choice = logprobs.double().sub_(noise.log_().neg_().log_())
        token = choice.argmax(dim=-1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1)


def row_keys(rows: Sequence[int], seed: int, step: int, device: torch.device | str) -> Tensor:
    """[B] int64: a key for each row number, from which `uniform` draws."""
    base = _mix_int(_mix_int(seed) + step)
    keys = [_mix_int(base + row) for row in rows]
    keys = [k - (1 << 64) if k >> 63 else k for k in keys]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def uniform(keys: Tensor, position: int | Tensor, count: int) -> Tensor:
    """[B, count] float64 in (0, 1), a function of (key, position, column) alone (SplitMix64).

    position: one for all rows, or [B] int64.
    """
    golden = _signed(_GOLDEN)
    at_position = _mix_(keys + (torch.as_tensor(position, device=keys.device) + 1) * golden)
    columns = torch.arange(1, count + 1, device=keys.device) * golden
    bits = _mix_(at_position[:, None] + columns)
    # 52 bits and a half: with 53 the largest would round to 1, whose noise is infinite.
    return _shift(bits, 12).double().add_(0.5).mul_(2.0**-52)


def _mix_int(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_(x: Tensor) -> Tensor:
    """The same on int64 tensors, in place, whose products wrap as unsigned ones do."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; that of int64 would copy the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x
