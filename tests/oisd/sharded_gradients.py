"""Gradients of a batch from processes that share one model, beside those of a whole model.

python -m tests.oisd.sharded_gradients PROCESSES OUT.json CASE [CASE ...]
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from oisd import norms
from oisd.adapters import attach, disabled
from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.batch import Batch, assemble
from oisd.config import TrainConfig, from_tables
from oisd.objective import Objective, Totals
from oisd.optimizer import Optimizer
from oisd.policy import Policy
from oisd.rollout import Completions
from oisd.run.processes import Processes
from oisd.sharding import whole
from oisd.trainer import learn
from tests.process_groups import on_ranks
from tests.tiny_models import tiny_model

ROWS, PAD, MOST = 10, 12, 8
BASE: dict[str, dict[str, Any]] = {
    "oisd": {"student_layers": [2], "think_weight": 3.0, "attention_weight": 3.0},
    "rollout": {"max_completion_tokens": MOST},
    "grpo": {"tis_cap": "none"},
    "optimizer": {"max_grad_norm": 1e9},
    "run": {"tokens_per_microbatch": 40, "grad_norm_every": 1},
}
GPT2 = dict(n_embd=32, n_layer=3, n_head=4, vocab_size=101, n_positions=64, initializer_range=0.2)
# What each case changes in BASE; "model" and "rows" (which of them each process has) aside.
CASES: dict[str, dict[str, Any]] = {
    "tied": dict(model=dict(tie_word_embeddings=True)),
    "untied": {},
    "checkpointing": dict(checkpointing=True),
    "fused": {"oisd": {"attention_kernel": "fused"}},
    "sampled keys": {"oisd": {"key_window": 2, "key_stride": 3, "attention_steps": 3}},
    "shares alone": {"run": {"grad_norm_every": 0}, "oisd": {"share_every": 1}},
    "internal policy": {
        "oisd": {"think_weight": 0.0, "attention_weight": 0.0},
        "grpo": {"internal_layer": 2, "internal_steps": 9},
    },
    "long tensors": dict(large=(500, 64)),
    "adapters": dict(lora=["q_proj", "down_proj"]),
    "gpt2": dict(kind="gpt2"),
    "gemma3": dict(kind="gemma3"),
    "a process without rows": dict(rows="first"),
    "in bfloat16": dict(dtype="bfloat16"),
    "in bfloat16, checkpointing": dict(dtype="bfloat16", checkpointing=True),
    "gpt2 in bfloat16": dict(kind="gpt2", dtype="bfloat16"),
    "adapters in bfloat16": dict(lora=["q_proj", "down_proj"], dtype="bfloat16"),
}
_OURS = ("model", "checkpointing", "lora", "kind", "rows", "dtype", "large")


class Recorder(Optimizer):
    """Keeps the gradient instead of taking a step with it."""

    gradient: dict[str, Tensor]

    def step(self, norm: Tensor) -> None:
        grads = [whole(p.grad) for p in self.parameters if p.grad is not None]
        self.gradient = dict(zip(self.names, grads, strict=True))
        self.adamw.zero_grad()


def config_of(case: dict[str, Any]) -> TrainConfig:
    tables = {name: dict(table) for name, table in BASE.items()}
    for name, table in case.items():
        if name not in _OURS:
            tables.setdefault(name, {}).update(table)
    return from_tables(tables)


def policy_of(case: dict[str, Any], dtype: torch.dtype) -> Policy:
    if case.get("kind") == "gpt2":
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(**GPT2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0))
    elif "kind" in case:
        model = tiny_model(case["kind"])
    else:
        model = arithmetic_model(0, initializer_range=0.2, **case.get("model", {}))
    if "lora" in case:
        settings = replace(TrainConfig().model, lora_rank=4, lora_targets=tuple(case["lora"]))
        model = attach(model, settings, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zeros as they are made: A would have no gradient
                    parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model.train(), arithmetic_tokenizer(), dtype)


def batch_of(policy: Policy) -> Batch:
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(1, MOST + 1, (ROWS, 2), generator=generator).tolist()
    prompts = [torch.randint(3, 12, (m,), generator=generator).tolist() for m, _ in sizes]
    lengths = torch.tensor([n for _, n in sizes])
    ids = torch.randint(3, 12, (ROWS, MOST), generator=generator)
    sampled = Completions(ids, torch.zeros(ids.shape), lengths, lengths < MOST)
    advantages = torch.randn(ROWS, generator=generator)
    return assemble(prompts, sampled, advantages, range(ROWS), PAD)


def run(objective: Objective, batch: Batch, processes: Processes, totals: Totals) -> dict:
    optimizer = Recorder(objective.policy.model, objective.config, processes)
    metrics, numbers = learn(objective, optimizer, [(batch, totals)], step=0)
    losses = {n: m for n, m in metrics.items() if n.startswith(("loss/", "js/"))}
    return {"gradient": optimizer.gradient, "norms": numbers, "metrics": losses}


def main(out: str, *names: str) -> None:
    torch.set_num_threads(1)
    processes, alone = Processes("cpu"), Processes("cpu")
    alone.size = 1
    found = {}
    for name in names:
        case = CASES[name]
        dtype = getattr(torch, case.get("dtype", "float32"))
        norms.LARGE, norms._SLICE = case.get("large", (1 << 20, 1 << 16))
        policy, config = policy_of(case, dtype), config_of(case)
        batch = batch_of(policy)
        totals = Totals(ROWS, int(batch.predicts.sum()))
        whole_policy = replace(policy, model=copy.deepcopy(policy.model))
        wanted = run(Objective(whole_policy, config), batch, alone, totals)
        exact = wanted["gradient"]
        if dtype != torch.float32:
            single = replace(whole_policy, dtype=torch.float32)
            exact = run(Objective(single, config), batch, alone, totals)["gradient"]
        objective = Objective(policy, config)
        objective.split()
        if "lora" in case:  # as a KL term does, before anything else
            with disabled(policy.model):
                objective.logprobs(batch)
        first = case.get("rows") == "first"
        mine = range(ROWS)[:: processes.size] if not first else range(ROWS)
        index = [i + (0 if first else processes.rank) for i in mine]
        index = [i for i in index if i < ROWS] if not first or processes.is_first else []
        part = batch.select(torch.tensor(index, dtype=torch.int64))
        ours = run(objective, part, processes, totals)
        logprobs = objective.logprobs(part)
        again = Objective(whole_policy, config).logprobs(batch)[torch.tensor(index).long()]
        gathered = processes.reduce(ours["metrics"])
        found[name] = {
            "error": difference(ours["gradient"], exact),
            "error of the whole": difference(wanted["gradient"], exact),
            "norm": float(torch.nn.utils.get_total_norm(list(exact.values()))),
            "norms": [ours["norms"], wanted["norms"]],
            "metrics": [
                {n: m.item() for n, m in metrics.items()}
                for metrics in (gathered, wanted["metrics"])
            ],
            "logprobs": max(
                processes.gather(
                    float((logprobs - again[:, : logprobs.shape[1]]).abs().max()) if index else 0.0
                )
            ),
            "sharded": sum(p.numel() for p in policy.model.parameters() if hasattr(p, "placements"))
            / sum(p.numel() for p in policy.model.parameters()),
        }
    if processes.is_first:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    processes.close()


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    off = torch.stack([(found[n].float() - w.float()).norm() for n, w in wanted.items()]).norm()
    return float(off / torch.stack([w.float().norm() for w in wanted.values()]).norm())


if __name__ == "__main__":
    processes, *given = sys.argv[1:]
    sys.exit(any(on_ranks(int(processes), main, *given)))
