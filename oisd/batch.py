"""Rollouts as training batches: right-padded rows, and their split by a token budget.

Position i of a row predicts token i + 1, so a completion of n tokens after a prompt of m is
predicted by the positions m - 1 ... m + n - 2: there `predicts` is true, and whatever belongs to a
completion's token (log-probs, divergences) stands at the position that predicts it.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from oisd.rollout import Completions


@dataclass(frozen=True)
class Batch:
    """Prompts with their completions; all tensors on the same device."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    predicts: Tensor  # [B, T] bool
    rollout_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]
    rows: Tensor  # [B] int64: the number of each completion within its step
    old_logprobs: Tensor | None = None  # [B, T]
    ref_logprobs: Tensor | None = None  # [B, T]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each row, prompt and completion."""
        return self.attention_mask.sum(dim=1)

    @property
    def labels(self) -> Tensor:
        """[B, T] the token that each position predicts; meaningful where `predicts` is true."""
        return self.input_ids.roll(-1, dims=1)

    def predicting_rows(self) -> Tensor:
        """[N] where `predicts` is true, in the flat order of [B * T]; synchronises once."""
        return self.predicts.flatten().nonzero().flatten()

    def select(self, index: Tensor) -> Batch:
        """The rows of `index`, without the padding that they do not need."""
        longest = int(self.lengths[index].max()) if index.numel() else 0
        cut = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                value = value[index]
                cut[f.name] = value[:, :longest] if value.dim() == 2 else value
        return replace(self, **cut)

    def micro_batches(self, tokens: int) -> list[Tensor]:
        """Row indices of parts that hold at most `tokens` padded tokens, or a single row.

        Rows of like length go together, so that little is padding.
        """
        lengths = self.lengths.tolist()
        parts: list[list[int]] = []
        for row in sorted(range(len(self)), key=lambda i: lengths[i]):
            if parts and (len(parts[-1]) + 1) * lengths[row] <= tokens:
                parts[-1].append(row)
            else:
                parts.append([row])
        return [torch.tensor(part, device=self.input_ids.device) for part in parts]


def assemble(
    prompts: Sequence[Sequence[int]],
    completions: Completions,
    advantages: Tensor,
    rows: Sequence[int],
    pad_token_id: int,
) -> Batch:
    """Put each prompt [B lists of token ids] and its completion into one right-padded row."""
    device = completions.ids.device
    ids = [[*p, *c[:n]] for p, c, n in zip(
        prompts, completions.ids.tolist(), completions.lengths.tolist(), strict=True
    )]  # fmt: skip
    longest = max((len(row) for row in ids), default=0)
    padded = [row + [pad_token_id] * (longest - len(row)) for row in ids]
    position = torch.arange(longest, device=device)
    length = torch.tensor([len(row) for row in ids], dtype=torch.int64, device=device)[:, None]
    prompt_length = torch.tensor([len(p) for p in prompts], dtype=torch.int64, device=device)
    prompt_length = prompt_length[:, None]
    predicts = (position >= prompt_length - 1) & (position < length - 1)
    logprobs = completions.logprobs
    return Batch(
        input_ids=torch.tensor(padded, dtype=torch.int64, device=device).view(len(ids), longest),
        attention_mask=(position < length).long(),
        predicts=predicts,
        rollout_logprobs=logprobs.new_zeros(predicts.shape).masked_scatter(
            predicts, logprobs[completions.mask()]
        ),
        advantages=advantages.to(device),
        rows=torch.tensor(list(rows), dtype=torch.int64, device=device),
    )
