"""A whole training step of a random model: forward, losses, backward, clipping, AdamW.

GRPO alone; OISD with its losses written eagerly; and OISD as the trainer runs it: with the
attention loss in passes of its own, inside the student layer's attention, and with the lens in a
head pass of its own. All share one model, one optimizer and the GRPO part. The learning rate is so
small that all work on the same weights. Peak memory includes model and optimizer.

Correctness: losses and gradient norms of a short batch against `impl="reference"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.cases import eager
from benchmarks.cases.case import (
    FULL,
    QUICK,
    Bar,
    Bound,
    Case,
    Implementation,
    Inputs,
    Result,
    Yardstick,
)
from benchmarks.cases.shapes import thousands
from oisd import losses
from oisd.batch import Batch
from oisd.config import AlignmentConfig, GRPOConfig, OptimizerConfig, RunConfig, TrainConfig
from oisd.losses import attention
from oisd.objective import Objective, Totals
from oisd.optimizer import Optimizer
from oisd.policy import Policy
from oisd.run.processes import Processes
from oisd.trainer import learn
from oisd_kernels import LensStats, PolicyHead, logit_lens_divergence, policy_head

LEARNING_RATE = 1e-12
VARIANTS = {
    "GRPO": "grpo",
    "OISD eager": "eager",
    "OISD ours, separate": "separate",
    "OISD ours, attention fused": "fused attention",
    "OISD ours, two head passes": "two passes",
}


@dataclass(frozen=True)
class Model:
    """A Qwen3 of random weights."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    dim: int
    vocabulary: int
    student: int

    def matmul_parameters(self) -> float:
        """Parameters that each token is multiplied with, including the head's."""
        attention = 2 * self.width * self.dim * (self.heads + self.key_heads)
        block = attention + 3 * self.width * self.inner
        return float(self.layers * block + self.width * self.vocabulary)

    def build(self, device: str, checkpointing: bool) -> Any:
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.dim,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
        model.set_attn_implementation("sdpa")
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return model.train()


QWEN3_4B = Model("qwen3-4b", 36, 2560, 9728, 32, 8, 128, 151936, 6)
# The head's share of the work is that of Qwen3-4B, 10 %.
CPU_MODEL = Model("cpu", 6, 256, 768, 4, 2, 64, 4096, 2)


def cases(device: str) -> list[Case]:
    """All step cases of a device."""
    if device == "cpu":
        return [
            case(CPU_MODEL, 2, 256, False, device, QUICK),
            *(case(CPU_MODEL, 2, n, False, device, FULL) for n in (512, 1024)),
            case(CPU_MODEL, 2, 1024, True, device, FULL),
        ]
    shapes = [(1, False, QUICK), (2, True, QUICK), (2, False, QUICK), (4, True, FULL)]
    shapes += [(1, True, FULL), (4, False, FULL), (8, True, FULL), (8, False, FULL)]
    return [case(QWEN3_4B, rows, 4096, ckpt, device, suites) for rows, ckpt, suites in shapes]


def case(
    model: Model, rows: int, length: int, checkpointing: bool, device: str, suites: frozenset[str]
) -> Case:
    """The step over `rows` sequences of `length` tokens in one micro-batch."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = rows * length
    scores = 2.0 * model.layers * rows * model.heads * length**2 * model.dim  # two matmuls, causal
    bars: tuple[Bar, ...] = ()
    if device == "cuda":
        bars = tuple(Bar(name, metric, limit, "GRPO") for name in VARIANTS if "ours" in name
                     for metric, limit in (("median_s", 1.06), ("peak_mib", 1.03)))  # fmt: skip
    saved = "checkpointed" if checkpointing else "no-checkpointing"
    return Case(
        name=f"step/{model.name}/{thousands(tokens)}/{saved}",
        family="step",
        device=device,
        dtype=dtype,
        shape={"B": rows, "T": length, "N": tokens, "D": model.width, "V": model.vocabulary,
               "L": model.layers, "S": 1},
        regime="random weights",
        inputs=partial(inputs, model, rows, length, checkpointing, device, dtype),
        truth=truth,
        implementations=[
            Implementation(name, partial(Step, variant=variant))
            for name, variant in VARIANTS.items()
        ],
        yardstick=partial(yardstick, model=model, device=device, dtype=dtype),
        flops=6 * model.matmul_parameters() * tokens + 3 * scores,
        bytes=7 * 4 * model.matmul_parameters(),
        bound=Bound(1e-3, 1e-3) if device == "cpu" else Bound(3e-2, 5e-2),
        suites=suites,
        bars=bars,
        whole=True,
        check_inputs=short,
        checked_at="B = 2, T = 128",
    )  # fmt: skip


def inputs(
    model: Model, rows: int, length: int, checkpointing: bool, device: str, dtype: torch.dtype
) -> Inputs:
    policy = Policy(model.build(device, checkpointing), None, dtype)
    config = settings(model, rows * length, "separate")
    return {
        "model": model,
        "policy": policy,
        "optimizer": Optimizer(policy.model, config, Processes(device)),
        "batch": batch(model, rows, length, device),
    }


def settings(model: Model, tokens: int, variant: str, norms_every: int = 0) -> TrainConfig:
    """The trainer's configuration of the step."""
    kernel = "fused" if variant == "fused attention" else "separate"
    given: dict[str, Any] = {"student_layers": (model.student,), "attention_kernel": kernel}
    if variant == "grpo":
        given |= {"think_weight": 0.0, "attention_weight": 0.0}
    return TrainConfig(
        oisd=AlignmentConfig(**given),
        grpo=GRPOConfig(),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        run=RunConfig(tokens_per_microbatch=tokens, grad_norm_every=norms_every),
    )


def batch(model: Model, rows: int, length: int, device: str) -> Batch:
    """Rows without padding, an eighth of each prompt; advantages of both signs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.vocabulary, (rows, length + 1), generator=generator).to(device)
    position = torch.arange(length, device=device).expand(rows, -1)
    advantages = torch.randn(rows, generator=generator)
    return Batch(
        input_ids=ids[:, :-1],
        labels=ids[:, 1:],
        attention_mask=torch.ones_like(ids[:, 1:]),
        predicts=position >= length // 8,
        rollout_logprobs=torch.zeros(rows, length, device=device),
        advantages=(advantages.sign() * (0.5 + advantages.abs())).to(device),
        rows=torch.arange(rows, device=device),
    )


def short(given: Inputs) -> Inputs:
    """The same model on two rows of 128 tokens. On a CPU with the gradient of each loss alone, for
    which a GPU has no memory beside a large model."""
    device = given["batch"].input_ids.device
    every = int(device.type == "cpu")
    return given | {"batch": batch(given["model"], 2, 128, str(device)), "norms_every": every}


class Step:
    """One variant of the step on given inputs."""

    def __init__(self, given: Inputs, variant: str):
        self.optimizer, self.batch, self.variant = given["optimizer"], given["batch"], variant
        policy, model = given["policy"], given["model"]
        tokens = self.batch.input_ids.numel()
        config = settings(model, tokens, variant, given.get("norms_every", 0))
        self.objective = Objective(policy, config)
        rows = len(self.batch)
        self.totals = Totals(sequences=rows, tokens=int(self.batch.predicts.sum()))

    def __call__(self) -> Result:
        metrics, norms = self._learn()
        names = self.objective.weights.names
        out = {name: metrics[f"loss/{name}"].total for name in names}
        out |= {f"d_{name}": torch.tensor(norms[key]) for name in names
                if (key := f"grad_norm/{name}") in norms}  # fmt: skip
        whole = "d_without" if self.variant == "grpo" else "d_all"
        out[whole] = torch.tensor(norms["grad_norm"])
        return {name: x.double().cpu() for name, x in out.items()}

    def _learn(self) -> tuple[Any, dict[str, float]]:
        self.optimizer.adamw.zero_grad()  # one that ran out of memory left parts of a gradient
        with written(self.variant, self.objective.policy):
            return learn(self.objective, self.optimizer, [(self.batch, self.totals)], step=1)


def truth(given: Inputs) -> Result:
    """Losses and gradient norms with `impl="reference"`, and without alignment."""
    return Step(given, "reference")() | Step(given, "grpo")()


@contextmanager
def written(variant: str, policy: Policy) -> Iterator[None]:
    """Puts eager PyTorch or `impl="reference"` in place of the alignment losses, by variant."""
    head: Any = losses.policy_head
    divergence: Any = attention.attention_divergence
    if variant == "eager":
        head, divergence = partial(two_passes, partial(eager_lens, policy)), eager_attention
    elif variant == "two passes":
        head = partial(two_passes, partial(logit_lens_divergence, return_stats=True))
    elif variant == "reference":
        head, divergence = partial(by_reference, head), partial(by_reference, divergence)
    with (
        mock.patch.object(losses, "policy_head", head),
        mock.patch.object(attention, "attention_divergence", divergence),
    ):
        yield


def two_passes(
    lens: Any, final: Tensor, weight: Tensor, labels: Tensor, students: Tensor, **given: Any
) -> PolicyHead:
    """In place of `policy_head`: GRPO's part by it, the divergence by `lens`."""
    shared = {name: given[name] for name in ("bias", "logit_softcap")}
    own = {name: given[name] for name in ("temperature", "policy")}
    out = policy_head(final, weight, labels, **shared, **own)
    if len(students) == 0:
        return out
    options = {name: given[name] for name in ("token_weight", "divergence", "beta")}
    options["temperature"] = given["lens_temperature"]
    rows, stats = lens(students, final.detach(), weight.detach(), **shared, **options)
    return out._replace(divergence=rows, stats=stats)


def eager_lens(
    policy: Policy, hidden: Tensor, final: Tensor, weight: Tensor, **given: Any
) -> tuple[Tensor, LensStats]:
    """In place of `logit_lens_divergence`; without the statistics that are only logged."""
    with policy.autocast():
        ones = torch.ones_like(hidden[0, :, 0])
        rows = eager.lens_divergence(hidden, final, weight, ones)
    none = torch.zeros_like(rows)
    return rows * given["token_weight"], LensStats(none, none[0], none, rows.detach())


def eager_attention(
    q: Tensor, k: Tensor, q_teacher: Tensor, k_teacher: Tensor, *, token_weight: Tensor, **_: Any
) -> Tensor:
    """In place of `attention_divergence`."""
    return eager.attention_divergence(q, k, q_teacher, k_teacher, token_weight)


def by_reference(function: Any, *arguments: Any, **given: Any) -> Any:
    return function(*arguments, **(given | {"impl": "reference"}))


def yardstick(given: Inputs, model: Model, device: str, dtype: torch.dtype) -> Yardstick:
    """A bare matmul of the batch's hidden states with a feed-forward block's weight."""
    rows = given["batch"].input_ids.numel()
    x = torch.randn(rows, model.width, device=device).to(dtype)
    weight = torch.randn(model.inner, model.width, device=device).to(dtype)
    out = x.new_empty(rows, model.inner)
    flops = 2.0 * x.numel() * model.inner
    return Yardstick(lambda: torch.mm(x, weight.t(), out=out), flops)
