"""Supervised warm-up: a blank model learns a task until some of its rollouts are right."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from oisd.arithmetic import supervised_batch
from oisd.config import WarmupConfig
from oisd.data import Example, prompt_indices
from oisd.norms import total_norm
from oisd.policy import Policy

# Batches over which the probability of the right answers is averaged.
_RECENT = 8


def warm_up(
    policy: Policy,
    examples: Sequence[Example],
    config: WarmupConfig,
    *,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on prompts and their solutions by cross-entropy, in place; a function of `seed` alone.

    A solution is the problem's worked one, or else its answer. Ends after `config.steps`, or once
    the solutions of recent batches have the mean probability `config.stop_at`. That is how often
    sampling at temperature 1 gives the very same text, and so at most the expected accuracy; the
    two are equal where only one text earns the reward. It costs nothing, since it is computed from
    the batches before the model has learned from them.
    """
    model = policy.model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    steps = config.steps
    schedule = get_scheduler(
        "linear", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps
    )
    recent: deque[float] = deque(maxlen=_RECENT)
    model.train()
    for step in range(steps):
        indices = prompt_indices(step, config.batch_size, len(examples), seed)
        batch = supervised_batch(examples, policy.tokenizer, indices)
        batch = {name: tensor.to(policy.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        with policy.autocast():
            logits = model(**batch).logits
        loss, probability = _loss(logits.float(), labels)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, total_norm(gradients))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
        recent.append(probability.item())
        if config.stop_at and len(recent) == _RECENT and sum(recent) / _RECENT >= config.stop_at:
            break


def _loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the labelled tokens, and mean probability of the whole answers."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    tokens = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return tokens.sum() / (labels != -100).sum(), (-tokens.detach().sum(dim=1)).exp().mean()
