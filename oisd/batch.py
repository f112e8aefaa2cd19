"""Rollouts as training batches: right-padded rows, and their split by a token budget.

Position i of a row holds token i and predicts token i + 1, its label. A completion of n tokens
after a prompt of m is predicted by the positions m - 1 ... m + n - 2. There `predicts` is true, and
there the values of the completion's tokens (log-probs, divergences) are kept. The last token
predicts nothing and is only a label.

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
    labels: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    predicts: Tensor  # [B, T] bool
    rollout_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]
    rows: Tensor  # [B] int64: the number of each completion within its step
    old_logprobs: Tensor | None = None  # [B, T]
    ref_logprobs: Tensor | None = None  # [B, T]
    shuffled: Tensor | None = None  # [B], for the alignment in place of `advantages`

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B] positions of each row that are not padding."""
        return self.attention_mask.sum(dim=1)

    @property
    def aligned(self) -> Tensor:
        """[B] the advantages that weigh the alignment."""
        return self.advantages if self.shuffled is None else self.shuffled

    def token_ids(self) -> list[list[int]]:
        """Each row's prompt and completion."""
        rows = zip(
            self.input_ids.tolist(), self.labels.tolist(), self.lengths.tolist(), strict=True
        )
        return [[ids[0], *labels[:n]] for ids, labels, n in rows]

    def predicting_rows(self) -> Tensor:
        """[N] where `predicts` is true, in the flat order of [B * T]; synchronises once."""
        return self.predicts.flatten().nonzero().flatten()

    def select(self, index: Tensor) -> Batch:
        """The rows of `index`, without padding that none of them needs."""
        longest = int(self.lengths[index].max()) if index.numel() else 0
        cut = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                value = value[index]
                cut[f.name] = value[:, :longest] if value.dim() == 2 else value
        return replace(self, **cut)

    def idle(self) -> Batch:
        """A row that predicts nothing: a model runs on it as on others, and its losses are 0."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        blank = {
            name: value.new_zeros((1, 2)[: value.dim()])
            for name, value in given.items()
            if value is not None
        }
        return replace(self, **blank | {"attention_mask": self.attention_mask.new_ones(1, 2)})

    def micro_batches(self, tokens: int) -> list[Tensor]:
        """Row indices of parts that hold at most `tokens` padded tokens, or a single row.

        Rows of similar length go together, so that there is little padding.
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
    chosen = zip(prompts, completions.ids.tolist(), completions.lengths.tolist(), strict=True)
    tokens = [[*prompt, *ids[:n]] for prompt, ids, n in chosen]
    longest = max((len(row) - 1 for row in tokens), default=0)
    padded = torch.tensor(
        [row + [pad_token_id] * (longest + 1 - len(row)) for row in tokens],
        dtype=torch.int64,
        device=device,
    ).view(len(tokens), longest + 1)
    position = torch.arange(longest, device=device)
    sizes = [[len(prompt) - 1, len(row) - 1] for prompt, row in zip(prompts, tokens, strict=True)]
    bounds = torch.tensor(sizes, dtype=torch.int64, device=device).view(-1, 2)
    inside = position < bounds[:, 1:]
    predicts = inside & (position >= bounds[:, :1])
    logprobs = completions.logprobs
    return Batch(
        input_ids=padded[:, :-1],
        labels=padded[:, 1:],
        attention_mask=inside.long(),
        predicts=predicts,
        rollout_logprobs=logprobs.new_zeros(predicts.shape).masked_scatter(
            predicts, logprobs[completions.mask()]
        ),
        advantages=advantages.to(device),
        rows=torch.tensor(list(rows), dtype=torch.int64, device=device),
    )
