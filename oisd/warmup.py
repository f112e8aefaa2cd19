"""Supervised warm-up: a blank model learns a task well enough that rollouts are sometimes right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import get_scheduler

from oisd.arithmetic import supervised_batch
from oisd.config import WarmupConfig
from oisd.data import Example, prompt_indices
from oisd.policy import Policy


def warm_up(
    policy: Policy,
    examples: Sequence[Example],
    config: WarmupConfig,
    *,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on (prompt, answer) pairs by cross-entropy, in place; a function of `seed` alone."""
    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=config.steps // 20,
        num_training_steps=config.steps,
    )
    model.train()
    for step in range(config.steps):
        indices = prompt_indices(step, config.batch_size, len(examples), seed)
        batch = supervised_batch(examples, policy.tokenizer, indices)
        with policy.autocast():
            loss = model(**{name: tensor.to(policy.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, loss.item())
