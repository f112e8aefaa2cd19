"""Rollouts as right-padded rows, and their split into parts."""

from __future__ import annotations

import pytest
import torch

from oisd.batch import assemble
from oisd.rollout import Completions

PAD = 99
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
COMPLETIONS = [[11, 12], [13, 14, 15], [16], []]


def batch_of(prompts=PROMPTS, completions=COMPLETIONS):
    longest = max(len(c) for c in completions)
    ids = torch.tensor([c + [PAD] * (longest - len(c)) for c in completions])
    logprobs = -ids.float()
    lengths = torch.tensor([len(c) for c in completions])
    sampled = Completions(ids, logprobs, lengths, torch.ones(len(lengths), dtype=torch.bool))
    advantages = torch.arange(len(lengths)).float()
    return assemble(prompts, sampled, advantages, [7 + i for i in range(len(lengths))], PAD)


def test_assemble_puts_each_token_where_it_is_predicted():
    batch = batch_of()
    width = max(len(p) + len(c) - 1 for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    assert batch.input_ids.shape == (4, width)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        whole = prompt + completion
        size = len(whole) - 1  # the last token is a label alone
        padding = [PAD] * (width - size)
        # The pad that stands in for the last token of a shorter row may differ from it: masked.
        assert batch.input_ids[row, :size].tolist() == whole[:-1]
        assert batch.labels[row].tolist() == whole[1:] + padding
        assert batch.attention_mask[row].tolist() == [1] * size + [0] * (width - size)
        predicted, logprobs = [], []
        for t in range(width):
            if batch.predicts[row, t]:
                predicted.append((t, int(batch.labels[row, t])))
                logprobs.append(batch.rollout_logprobs[row, t].item())
            else:
                assert batch.rollout_logprobs[row, t] == 0
        assert predicted == [(len(prompt) - 1 + i, token) for i, token in enumerate(completion)]
        assert logprobs == [-float(token) for token in completion]
    assert batch.lengths.tolist() == [4, 3, 2, 3]
    assert batch.token_ids() == [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert batch.rows.tolist() == [7, 8, 9, 10]
    assert batch.advantages.tolist() == [0, 1, 2, 3]


def test_select_cuts_the_padding_off():
    batch = batch_of().select(torch.tensor([2, 1]))
    assert len(batch) == 2
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[6, 16, PAD], [13, 14, 15]]
    assert batch.predicts.tolist() == [[False, True, False], [True, True, True]]
    assert batch.rollout_logprobs.tolist() == [[0, -16, 0], [-13, -14, -15]]
    assert batch.rows.tolist() == [9, 8] and batch.advantages.tolist() == [2, 1]
    assert batch.old_logprobs is None


def test_select_nothing():
    batch = batch_of().select(torch.tensor([], dtype=torch.int64))
    assert len(batch) == 0 and batch.input_ids.shape == (0, 0)
    assert batch.micro_batches(10) == []


def random_batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (rows, 2), generator=generator).tolist()
    return batch_of([[1] * m for m, _ in sizes], [[2] * n for _, n in sizes])


@pytest.mark.parametrize("tokens", [1, 40, 100, 10**6])
def test_micro_batches_hold_each_row_once_within_the_budget(tokens):
    batch = random_batch(57)
    parts = [part.tolist() for part in batch.micro_batches(tokens)]
    assert sorted(row for part in parts for row in part) == list(range(57))
    lengths = batch.lengths.tolist()
    for part in parts:
        padded = len(part) * max(lengths[row] for row in part)
        assert padded <= tokens or len(part) == 1
        assert batch.select(torch.tensor(part)).input_ids.numel() == padded
    if tokens == 10**6:
        assert len(parts) == 1
    if tokens == 1:
        assert len(parts) == 57


def test_micro_batches_waste_little_on_padding():
    batch = random_batch(200)
    padded = sum(batch.select(part).input_ids.numel() for part in batch.micro_batches(256))
    assert padded < 1.1 * int(batch.lengths.sum())
    shuffled = int(batch.lengths.max()) * len(batch)
    assert shuffled > 1.5 * int(batch.lengths.sum())  # which sorting has to beat


def test_assemble_nothing_keeps_the_dtypes():
    empty = torch.zeros((0, 0))
    lengths = torch.zeros(0, dtype=torch.int64)
    batch = assemble([], Completions(empty.long(), empty, lengths, lengths.bool()), empty, [], PAD)
    full = batch_of()
    assert len(batch) == 0
    for name in ("input_ids", "labels", "attention_mask", "predicts", "rollout_logprobs", "rows"):
        assert getattr(batch, name).dtype == getattr(full, name).dtype, name
