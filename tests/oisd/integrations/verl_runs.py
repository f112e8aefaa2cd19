"""What the tests of verl's integration share: configurations, a batch, engines, what is expected.

Importing this makes verl run on the CPU: see verl_environment.py.
"""

from __future__ import annotations

from tests.oisd.integrations import verl_environment  # noqa: F401

# isort: split

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine.base import EngineRegistry
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from oisd import losses
from oisd.config import AlignmentConfig, GRPOConfig
from oisd.integrations.verl import OISDEngineConfig
from oisd.models import Taps
from tests.tiny_models import VOCAB, tiny_model

PROMPTS, RESPONSES = [3, 5, 2, 4], [6, 4, 7, 3]
P, R = max(PROMPTS), max(RESPONSES)
ADVANTAGES = torch.tensor([1.0, -1.5, 0.0, 0.5])
OPTIONS: dict[str, Any] = dict(student_layers=[2, 3], think_weight=1.0, attention_weight=2.0)
NONE: dict[str, Any] = dict(think_weight=0.0, attention_weight=0.0)
FP32 = dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32")


def start_gloo(store: str, rank: int = 0, processes: int = 1) -> None:
    torch.set_num_threads(1)
    file = torch.distributed.FileStore(store, processes)
    torch.distributed.init_process_group("gloo", store=file, rank=rank, world_size=processes)


def save_models(root: Path) -> Path:
    """Folders of one tiny Qwen3, with a head of its own ("untied") and with tied embeddings."""
    for name, tied in (("untied", False), ("tied", True)):
        tiny_model("qwen3", tie_word_embeddings=tied).save_pretrained(root / name)
    return root


def rollouts() -> dict[str, Tensor]:
    """Four rollouts as verl's trainer holds them: prompts padded left, responses right."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(3, VOCAB, shape, generator=generator)

    prompts, responses = drawn(4, P), drawn(4, R)
    before = torch.arange(P) >= P - torch.tensor(PROMPTS)[:, None]
    after = torch.arange(R) < torch.tensor(RESPONSES)[:, None]
    mask = torch.cat([before, after], dim=1).long()
    counts = after.clone()
    counts[2, 1:3] = False  # as tokens that a tool wrote
    return dict(
        prompts=prompts * before,
        responses=responses * after,
        input_ids=torch.cat([prompts, responses], dim=1) * mask,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        response_mask=counts.long(),
        old_log_probs=-4 + 0.3 * torch.randn(4, R, generator=generator),
        advantages=ADVANTAGES[:, None] * after,
    )


def batch(
    rows: slice = slice(None), *, remove_padding: bool, nested: bool = False, **more: Any
) -> Any:
    """Some of the rollouts, as verl's trainer sends them to an engine.

    nested: as its newer trainer does, which holds prompts and responses without padding too.
    """
    held = {name: x[rows].clone() for name, x in rollouts().items()}
    data = left_right_2_no_padding(tu.get_tensordict(dict(held)))
    if nested:
        for name in ("prompts", "responses", "response_mask", "old_log_probs", "advantages"):
            keep = held["attention_mask"].bool()
            keep = keep[:, :P] if name == "prompts" else keep[:, P:]
            parts = [x[k] for x, k in zip(held[name], keep, strict=True)]
            data[name] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        data["loss_mask"] = data["response_mask"]
        data = data.exclude("attention_mask", "max_response_len", "max_seq_len")
    settings = dict(
        temperature=1.0,
        use_remove_padding=remove_padding,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=1,
        global_batch_size=4,
        global_token_num=None,
    )
    tu.assign_non_tensor(data, **(settings | more))
    return data


def engine_config(options: dict[str, Any] | None = None, **more: Any) -> OISDEngineConfig:
    options = OPTIONS if options is None else options
    settings = dict(strategy="fsdp2", mixed_precision=FP32, use_torch_compile=False)
    return OISDEngineConfig(oisd=options, **(settings | more))


def model_config(path: Path, **more: Any) -> Any:
    overrides = {"attn_implementation": "sdpa"}
    return HFModelConfig(path=str(path), load_tokenizer=False, override_config=overrides, **more)


def engine(path: Path, config: Any = None, **more: Any) -> Any:
    """verl's engine for this configuration, initialised."""
    made = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model_config(path, **more),
        engine_config=config or engine_config(),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


def actor_loss() -> Any:
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=1, fsdp_config=engine_config()
    )
    return functools.partial(ppo_loss, config=config)


def gradients(made: Any, data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradients of a mini-batch, gathered, and the output of verl's engine."""
    with made.train_mode():
        made.optimizer_zero_grad()
        output = made.forward_backward_batch(data, actor_loss())
        grads = {
            name.removeprefix("base_model.model."): parameter.grad.full_tensor().clone()
            for name, parameter in made.module.named_parameters()
            if parameter.grad is not None
        }
    return grads, output


def expected(path: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same gradients and metrics from one model, one padded batch and the losses alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    align = AlignmentConfig(**(OPTIONS | options))
    rows = rollouts()
    ids, attended = rows["input_ids"], rows["attention_mask"]
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    predicts[:, P - 1 : -1] = rows["response_mask"].bool()
    with Taps(model, align.student_layers, lens_norm=align.lens_norm) as taps:
        logits = model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=rows["position_ids"],
            use_cache=False,
        ).logits
        logprobs = logits.log_softmax(-1)[:, P - 1 : -1].gather(2, rows["responses"][..., None])
        loss, metrics = losses.grpo_loss(
            logprobs.squeeze(2),
            ADVANTAGES,
            rows["response_mask"].bool(),
            GRPOConfig(dual_clip=3.0),
            old_logprobs=rows["old_log_probs"],
        )
        weight = losses.token_weights(predicts, "sequence-mean")
        think, more = losses.think_loss(
            taps.student_hidden()[:, predicts],
            taps.final_hidden()[predicts],
            taps.unembedding.weight,
            ADVANTAGES[:, None].expand_as(weight)[predicts],
            align,
            token_weight=weight[predicts],
        )
        metrics |= more
        # Prompts are padded on the left: a rollout at a time.
        attention = torch.zeros(())
        for row, keep in enumerate(attended.bool()):
            pairs = [type(p)(*(cut(x, row, keep) for x in p)) for p in taps.attention()]
            keys = None
            if align.key_window and align.key_stride:
                keys = losses.sampled_keys(1, int(keep.sum()), align.key_window, align.key_stride)
            term, more = losses.attention_loss(
                pairs,
                ADVANTAGES[row : row + 1],
                align,
                token_weight=weight[row : row + 1, keep],
                key_index=keys,
            )
            attention = attention + term
            metrics = losses.add_metrics(metrics, more)
    metrics |= {"loss/think": think, "loss/attention": attention, "loss": loss}
    (loss + align.think_weight * think + align.attention_weight * attention).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, metrics


def cut(x: Any, row: int, keep: Tensor) -> Any:
    return x[row : row + 1, keep] if isinstance(x, Tensor) else x


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of two sets of gradients, relative to the second."""
    assert set(a) == set(b)
    far = torch.stack([(a[name] - b[name]).norm() for name in b]).norm()
    return float(far / torch.stack([x.norm() for x in b.values()]).norm())
