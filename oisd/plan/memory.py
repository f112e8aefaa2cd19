"""The memory of one process of `oisd train`, part by part.

Letters: P parameters, L layers, D width, F feed-forward width, H query and J key heads of K
dimensions, V vocabulary, S student layers; N padded tokens of a micro-batch, T the longest row, C
completions sampled at once; n processes. All bytes are for one process. With run.sharding = "none"
it holds the whole model:

    parameters 4 P   gradients 4 P   AdamW 8 P   bf16 copies 2 P (kept by autocast)
    activations   [26 D + 8 F + 4 (H+J) K + 4 H (+ 6 (H+J) K with norms of q and k)] N a layer
                  under bf16 autocast, [24 D + 16 F + 8 (H+J) K + 4 H (+ 8 (H+J) K)] N in float32;
                  with checkpointing 4 D N a layer and one layer in full
    head, eager   [N, V] float32 maps: 1 for log-probs, 5 more for the first student layer's JSD, 4
                  for each further one, 1 for a gradient
    head, ours    a workspace, hidden states' gradients 4 (S+1) D N, the unembedding's 4 V D
    maps, eager   [H, T, T] float32 maps of N / T rows: 5, 4 for each further student layer, and 1
    maps, kernels gradients 4 (H+J) K S N and four statistics a row, 16 H S N; S here and above
                  counts the layers whose attention learns
    shares        4 min(P, 2^25) a term of the alignment, where they are measured
    sampling copy 2 P in bf16, adapters merged, while completions are sampled; none in float32
    cache         4 J K a layer and token in bf16, 8 J K in float32, C rows of the longest length;
                  continuous batching fills whole blocks (up to 512 tokens more a row)
    sampling      24 C V: an upper bound for scores, their copies in `generate`, and log-probs

With run.sharding = "fsdp2" each process holds 1/n of the parameters, of their gradients and of
AdamW's state. The weights that compute are gathered in the compute dtype, of c bytes (2 in
bfloat16, 4 in float32), and autocast has no copies to keep. E are the parameters of a layer, R
those of the root: embedding, last norm and head.

    parameters 4 P / n   gradients 4 P / n   AdamW 8 P / n
    layers        2 c E: one that computes and the next one, which is being gathered; of the trained
                  parameters among them a layer's gradient c E before it is reduced, and 4 E of it
                  in float32 on its way into the reduction
    root          c R from the beginning of the forward to the end of the backward; where it is
                  trained its gradient c R, and 4 R in float32 on its way into the reduction, when
                  the unembedding's 4 V D are gone
    sampling copy 2 P in bf16 and 4 P in float32: the sampler of each process is a whole model

Activations, head, maps, cache and sampling are as above; each process has its own rows. The parts
of the update are added up, although the root is reduced after the activations are gone: an upper
bound. The copy is filled before the cache exists, a gathered layer or matrix at a time in float32;
that is less than the cache takes in every recipe, and is not counted.

With `rollout.offload` AdamW's 8 P, or 8 P / n, are in the host's memory. A step has a part of them
on the card, when the activations are gone, which take more: at most 12 bytes for each number of the
largest parameter, AdamW's own intermediate results included.

With LoRA, A parameters in adapters: gradients 4 A, AdamW 8 A, copies 2 A (and 2 V D for a head tied
to the embedding); parameters 4 (P + A), or, in bf16, 2 for each parameter of the frozen linear
layers and 4 for the others. The unembedding has no gradient. Each adapter keeps its r numbers a
token. Frozen norms keep up to a quarter of a layer's activations less than counted here.

Tests measure the coefficients of the activations, the eager maps and the cache: they are what
autograd keeps for tiny models and for plain PyTorch losses. Fragmentation, the CUDA context and
further communication buffers are not counted; `USABLE` leaves room for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from oisd.config import ConfigError, TrainConfig
from oisd.plan.shapes import Shape
from oisd.term_gradients import MOST_NUMBERS
from oisd_kernels.lens.chunked.chunks import DEFAULT_BYTES

SHARDED_PROCESSES = 4  # of a plan that shards, where their number is not given


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, for one process. The parts of a phase add up; the phases do not."""

    shape: Shape
    processes: int
    sharded: bool
    """Whether the processes split the model."""
    tokens: int
    longest: int
    at_once: int
    checkpointing: bool
    trained: int
    """Number of trained parameters: all, or only the adapters'."""
    resident: dict[str, int]
    """Held from the beginning of the run to its end."""
    update: dict[str, int]
    """In addition, at the peak of a micro-batch, with this library's operations."""
    eager: dict[str, int]
    """What eager PyTorch needs in place of the parts of `update` with the same names."""
    rollout: dict[str, int]
    """In addition, while completions are sampled."""
    other_checkpointing: int
    """Activations with gradient checkpointing turned the other way."""
    host: dict[str, int]
    """In the host's memory instead."""

    @property
    def held(self) -> int:
        """Bytes of the resident parts."""
        return sum(self.resident.values())

    @property
    def peak(self) -> int:
        """Peak of `oisd train`, in the larger of its two phases."""
        return self.held + max(sum(self.update.values()), sum(self.rollout.values()))

    @property
    def peak_eager(self) -> int:
        """Peak of the update if the losses were written in eager PyTorch."""
        return self.held + sum((self.update | self.eager).values())


def with_sharding(config: TrainConfig, sharding: Literal["none", "fsdp2"]) -> TrainConfig:
    """The same run with another `run.sharding`."""
    return replace(config, run=replace(config.run, sharding=sharding))


def check_layers(config: TrainConfig, shape: Shape) -> None:
    """Raise ConfigError for a layer that is not one of the model's, below its final one."""
    teacher = config.oisd.attention_teacher or 0
    if teacher > shape.layers:
        raise ConfigError(
            f"oisd.attention_teacher must lie in 2..{shape.layers}, the layers of "
            f"{config.model.path}, got {teacher}"
        )
    for name, last in (
        ("oisd.student_layers", max(config.oisd.student_layers, default=0)),
        ("oisd.attention_student", max(config.oisd.attention_student or (), default=0)),
        ("grpo.internal_layer", config.grpo.internal_layer or 0),
    ):
        if last >= shape.layers:
            raise ConfigError(
                f"{name} must lie in 1..{shape.layers - 1}, below the final layer of "
                f"{config.model.path}, got {last}"
            )


def memory_plan(config: TrainConfig, shape: Shape, processes: int | None = None) -> MemoryPlan:
    """The memory of a run; see the module's docstring for each formula.

    processes: of the run; by default one, or `SHARDED_PROCESSES` with run.sharding = "fsdp2".
    """
    sharded = config.run.sharding == "fsdp2"
    processes = processes or (SHARDED_PROCESSES if sharded else 1)
    shards = processes if sharded else 1
    p, s = shape.parameters, len(config.oisd.student_layers)
    compared = len(set(config.oisd.attention_student or config.oisd.student_layers))
    targets = lora_targets(config, shape)
    adapters = shape.layers * config.model.lora_rank * sum(sum(size) for size in targets.values())
    trained = adapters or p
    half = config.model.dtype == "bfloat16"
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    # A row that is longer than the budget is a micro-batch of its own.
    tokens = max(config.run.tokens_per_microbatch, longest)
    layer = layer_activations(shape, half) * tokens
    layer += (2 if half else 4) * config.model.lora_rank * len(targets) * tokens
    boundary = 4 * shape.width * tokens
    full, checkpointed = shape.layers * layer, shape.layers * boundary + layer
    on = config.model.gradient_checkpointing
    head_map = 4 * tokens * shape.vocabulary
    think, attention = config.oisd.think_weight > 0, config.oisd.attention_weight > 0
    measured = config.oisd.share_every > 0
    weights = _gathered(shape, half, adapters) if sharded else _copies(shape, half, adapters)
    rounded = shape.linear_parameters if adapters and half else 0
    rows_bytes = 4 * shape.projections + 16 * shape.heads
    update = {
        "gradients": _share(4 * trained, shards),
        **weights,
        "activations": checkpointed if on else full,
        "head": DEFAULT_BYTES["cuda"]
        + 4 * ((s if think else 0) + 1) * shape.width * tokens
        # In shards it is gone when the root's gradient is reduced, which takes as much or more.
        + (0 if adapters or sharded else 4 * shape.vocabulary * shape.width),
        "attention maps": compared * tokens * rows_bytes * attention,
        "shares": 4 * min(_share(trained, shards), MOST_NUMBERS) * (think + attention) * measured,
    }
    rows = max(1, tokens // longest)
    maps = 4 * rows * shape.heads * longest**2
    eager = {
        "head": head_map * (2 + (5 + 4 * (s - 1) if think else 0)),
        "attention maps": maps * (6 + 4 * (compared - 1)) * attention,
    }
    if config.oisd.attention_kernel == "reference":
        update["attention maps"] = eager["attention maps"]
    own_prompts = _share(config.rollout.prompts_per_step, processes)
    at_once = min(config.rollout.batch_size, own_prompts * config.rollout.completions_per_prompt)
    paged = config.rollout.engine == "continuous"
    adamw = {"AdamW": _share(8 * trained, shards)}
    rollout = rollout_parts(shape, half, at_once, at_once * (longest + 512 * paged))
    if sharded and not half:
        rollout["sampling copy"] = 4 * p
    offload = config.rollout.offload
    return MemoryPlan(
        shape=shape,
        processes=processes,
        sharded=sharded,
        tokens=tokens,
        longest=longest,
        at_once=at_once,
        checkpointing=on,
        trained=trained,
        resident={
            "parameters": _share(4 * p - 2 * rounded + 4 * adapters, shards),
            **({} if offload else adamw),
        },
        update=update,
        eager=eager,
        rollout=rollout,
        other_checkpointing=full if on else checkpointed,
        host=adamw if offload else {},
    )


def _share(whole: int, parts: int) -> int:
    return -(-whole // parts)


def _copies(shape: Shape, half: bool, adapters: int) -> dict[str, int]:
    """Bytes of the weights that autocast rounds and keeps."""
    copies = 2 * (adapters or shape.parameters)
    if adapters and shape.tied:
        copies += 2 * shape.vocabulary * shape.width
    return {"bf16 copies": copies if half else 0}


def _gathered(shape: Shape, half: bool, adapters: int) -> dict[str, int]:
    """Bytes of the weights that FSDP2 gathers, and of gradients before they are reduced."""
    layers, own = shape.layers * shape.layer_parameters, adapters // shape.layers
    layer, root = shape.layer_parameters + own, shape.parameters - layers
    trained_layer, trained_root = (own, 0) if adapters else (layer, root)
    size = 2 if half else 4
    return {
        "layers gathered": 2 * size * layer + (size + 4) * trained_layer,
        "embedding, head gathered": size * root + (size + 4) * trained_root,
    }


def rollout_parts(shape: Shape, half: bool, at_once: int, tokens: int) -> dict[str, int]:
    """Bytes that sampling takes: of so many completions, with so many tokens in the cache."""
    cache = (4 if half else 8) * shape.layers * shape.key_heads * shape.head_dim
    return {
        "sampling copy": 2 * shape.parameters if half else 0,
        "key-value cache": tokens * cache,
        "sampling": 24 * at_once * shape.vocabulary,
    }


def lora_targets(config: TrainConfig, shape: Shape) -> dict[str, tuple[int, int]]:
    """The linear layers of each block that get adapters; none without LoRA. Raises ConfigError."""
    if not config.model.lora_rank:
        return {}
    known = shape.linear_layers
    if config.model.lora_targets == ("all-linear",):
        return known
    names = [target.split(".")[-1] for target in config.model.lora_targets]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"model.lora_targets: the plan knows {', '.join(known)}, got {name!r}; "
                '"all-linear" is an upper bound'
            )
    return {name: known[name] for name in names}


def layer_activations(shape: Shape, half: bool) -> int:
    """Bytes per token that autograd keeps of one layer; half: bf16 autocast, else float32."""
    wide = (26 if half else 24) * shape.width + (8 if half else 16) * shape.feed_forward
    heads = (4 if half else 8) * shape.projections + 4 * shape.heads
    norms = (6 if half else 8) * shape.projections if shape.qk_norm else 0
    return wide + heads + norms
