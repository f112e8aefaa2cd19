"""The memory that a run needs, computed from shapes alone: `oisd plan`.

Letters: P parameters, L layers, D width, F feed-forward width, H query and J key heads of K
dimensions, V vocabulary, S student layers; N padded tokens of a micro-batch, T the longest row, C
completions sampled at once. All bytes are for one process of `oisd train`, which holds the whole
model. The sharded figures are for a trainer that splits parameters, gradients and optimizer state
(FSDP2, through an adapter) and samples elsewhere.

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
    sampling copy 2 P in bf16, adapters merged, while completions are sampled; none in float32
    cache         4 J K a layer and token in bf16, 8 J K in float32, C rows of the longest length;
                  continuous batching fills whole blocks (up to 512 tokens more a row)
    sampling      24 C V: an upper bound for scores, their copies in `generate`, and log-probs

With `rollout.offload` AdamW's 8 P are in the host's memory. A step has a part of them on the card,
when the activations are gone, which take more: at most 12 bytes for each number of the largest
parameter, AdamW's own intermediate results included.

With LoRA, A parameters in adapters: gradients 4 A, AdamW 8 A, copies 2 A (and 2 V D for a head tied
to the embedding); parameters 4 (P + A), or, under bf16 autocast, 2 for each parameter of the frozen
linear layers and 4 for the others. The unembedding has no gradient. Each adapter keeps its r
numbers a token. Frozen norms keep up to a quarter of a layer's activations less than counted here.

Tests measure the coefficients of the activations, the eager maps and the cache: they are what
autograd keeps for tiny models and for plain PyTorch losses. Fragmentation, the CUDA context and
communication buffers are not counted; `USABLE` leaves room for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from oisd.config import ConfigError, TrainConfig
from oisd.schema import is_scratch, one_line, scratch_sizes
from oisd_kernels.lens.chunked.chunks import DEFAULT_BYTES

GIB = 1 << 30
USABLE = 0.92  # share of a card that a plan may fill
CARDS = {"24 GB": 24, "40 GB (A100)": 40, "48 GB (L40S)": 45, "80 GB (A100, H100)": 80,
         "141 GB (H200)": 140, "180 GB (B200)": 179}  # fmt: skip
SHARDS = (2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated feed-forward blocks."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether embedding and unembedding are one matrix."""
    qk_norm: bool = False
    qkv_bias: bool = False
    further: int = 0
    """Parameters that these formulas leave out: norms of other kinds, a bias."""
    source: str = "its configuration"

    @property
    def projections(self) -> int:
        """(H + J) K: width of a layer's queries and keys together."""
        return (self.heads + self.key_heads) * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's projections, under their usual names."""
        d, f = self.width, self.feed_forward
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "q_proj": (d, queries), "k_proj": (d, keys), "v_proj": (d, keys),
            "o_proj": (queries, d), "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d),
        }  # fmt: skip

    @property
    def projection_parameters(self) -> int:
        """Parameters of one layer's projections."""
        weights = sum(rows * columns for rows, columns in self.linear_layers.values())
        bias = (self.heads + 2 * self.key_heads) * self.head_dim if self.qkv_bias else 0
        return weights + bias

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        norms = 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)
        return self.projection_parameters + norms

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear layers, without a head that is tied to the embedding."""
        head = 0 if self.tied else self.vocabulary * self.width
        return self.layers * self.projection_parameters + head

    @property
    def parameters(self) -> int:
        """P, all parameters."""
        matrices = 1 if self.tied else 2
        embeddings = matrices * self.vocabulary * self.width
        return embeddings + self.layers * self.layer_parameters + self.width + self.further


# The models of the recipes, from the config.json of each repository on the Hub. OctoThinker's sizes
# are those of Llama 3.2 3B and Llama 3.1 8B, from which it was trained.
_QWEN, _LLAMA = "sizes that oisd has of it", "sizes that oisd has of its Llama base"
SHAPES = {
    "Qwen/Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 128, 151936, True, True, source=_QWEN),
    "Qwen/Qwen3-8B": Shape(36, 4096, 12288, 32, 8, 128, 151936, False, True, source=_QWEN),
    "OctoThinker/OctoThinker-3B-Long-Base": Shape(
        28, 3072, 8192, 24, 8, 128, 128256, True, source=_LLAMA
    ),
    "OctoThinker/OctoThinker-8B-Long-Base": Shape(
        32, 4096, 14336, 32, 8, 128, 128256, False, source=_LLAMA
    ),
}


def model_shape(path: str) -> Shape:
    """The shape of a model, from its configuration if that is on this machine, or from `SHAPES`.

    path: folder, Hub id, "arithmetic", or "scratch:...", counted without the words of its data.
        Downloads nothing. Raises ConfigError.
    """
    if path == "arithmetic":
        from oisd.arithmetic import arithmetic_model

        return shape_of(arithmetic_model().config, "the built-in model")
    if is_scratch(path):
        from oisd.scratch import scratch_model, scratch_tokenizer

        blank = scratch_model(scratch_sizes(path), scratch_tokenizer())
        return shape_of(blank.config, "model.path")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a broken configuration raises whatever its class stumbles over
        if path in SHAPES:
            return SHAPES[path]
        if (Path(path) / "config.json").exists():
            raise ConfigError(
                f"model.path {path!r}: its config.json cannot be read: "
                f"{one_line(error, named=True)}"
            ) from error
        raise ConfigError(
            f"model.path {path!r} is neither a folder with a config.json, nor in the Hub's cache "
            f"here, nor one of {', '.join(SHAPES)}; `hf download {path} config.json` gets it"
        ) from error
    where = "its config.json" if Path(path).exists() else "config.json in the Hub's cache"
    return shape_of(config, where)


def shape_of(config: Any, source: str = "its configuration") -> Shape:
    """The shape that a transformers configuration describes.

    Counts the parameters of the model, built without memory. Raises ConfigError if the count is not
    within 1 % of a decoder with gated feed-forward blocks, for a mixture of experts, say.
    """
    shape = _formula(config, source)
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.get_text_config())
    except Exception as error:  # as above
        raise ConfigError(
            f"model.path: wanted a causal language model, got a {config.model_type}: "
            f"{one_line(error, named=True)}"
        ) from error
    further = sum(p.numel() for p in model.parameters()) - shape.parameters
    if abs(further) > 0.01 * shape.parameters:
        raise ConfigError(
            f"model.path: the plan wants a decoder with gated feed-forward blocks, got a "
            f"{config.model_type} of {shape.parameters + further:,} parameters, where such a "
            f"decoder of its sizes has {shape.parameters:,}"
        )
    return replace(shape, further=further)


_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
          "vocab_size")  # fmt: skip


def _formula(config: Any, source: str) -> Shape:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.path: the plan wants a decoder with gated feed-forward blocks, got a "
            f"{config.model_type}, which has an encoder too"
        )
    for name in _SIZES:
        size = getattr(text, name, None)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(
                f"model.path: the plan wants a decoder with gated feed-forward blocks, got a "
                f"{config.model_type} whose configuration has "
                f"{'no ' + name if size is None else f'{name} = {size!r}'}"
            )
    heads = text.num_attention_heads
    return Shape(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        feed_forward=text.intermediate_size,
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        qk_norm=text.model_type in ("qwen3", "gemma3_text"),
        qkv_bias=text.model_type == "qwen2" or bool(getattr(text, "attention_bias", False)),
        source=source,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, for one process. The parts of a phase add up; the phases do not."""

    shape: Shape
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

    def sharded(self, shards: int) -> int:
        """Peak of the update: parameters, gradients, optimizer split, and two layers gathered."""
        split = self.held + self.update["gradients"] + sum(self.host.values())
        gathered = (
            2 * 2 * self.shape.layer_parameters + 2 * self.shape.vocabulary * self.shape.width
        )
        rest = {k: v for k, v in self.update.items() if k not in ("gradients", "bf16 copies")}
        return split // shards + gathered + sum(rest.values())


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


def memory_plan(config: TrainConfig, shape: Shape) -> MemoryPlan:
    """The memory of a run; see the module's docstring for each formula."""
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
    copies = 2 * trained
    if adapters and shape.tied:
        copies += 2 * shape.vocabulary * shape.width
    rounded = shape.linear_parameters if adapters and half else 0
    rows_bytes = 4 * shape.projections + 16 * shape.heads
    update = {
        "gradients": 4 * trained,
        "bf16 copies": copies if half else 0,
        "activations": checkpointed if on else full,
        "head": DEFAULT_BYTES["cuda"]
        + 4 * ((s if think else 0) + 1) * shape.width * tokens
        + (0 if adapters else 4 * shape.vocabulary * shape.width),
        "attention maps": compared * tokens * rows_bytes * attention,
    }
    rows = max(1, tokens // longest)
    maps = 4 * rows * shape.heads * longest**2
    eager = {
        "head": head_map * (2 + (5 + 4 * (s - 1) if think else 0)),
        "attention maps": maps * (6 + 4 * (compared - 1)) * attention,
    }
    if config.oisd.attention_kernel == "reference":
        update["attention maps"] = eager["attention maps"]
    at_once = min(
        config.rollout.batch_size,
        config.rollout.prompts_per_step * config.rollout.completions_per_prompt,
    )
    paged = config.rollout.engine == "continuous"
    adamw = {"AdamW": 8 * trained}
    offload = config.rollout.offload
    return MemoryPlan(
        shape=shape,
        tokens=tokens,
        longest=longest,
        at_once=at_once,
        checkpointing=on,
        trained=trained,
        resident={
            "parameters": 4 * p - 2 * rounded + 4 * adapters,
            **({} if offload else adamw),
        },
        update=update,
        eager=eager,
        rollout=rollout_parts(shape, half, at_once, at_once * (longest + 512 * paged)),
        other_checkpointing=full if on else checkpointed,
        host=adamw if offload else {},
    )


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


# ---- the printed tables ----------------------------------------------------------------------


def rich_tables(plan: MemoryPlan) -> Iterator[Table | Text]:
    """The plan for a terminal: by part, by card, and its assumptions."""
    table = Table(title="Memory of one process, GiB")
    table.add_column("part")
    table.add_column("phase")
    table.add_column("here", justify="right")
    table.add_column("eager PyTorch", justify="right")
    for name, size in plan.resident.items():
        table.add_row(name, "always", _gib(size), _gib(size))
    for name, size in plan.host.items():
        table.add_row(name, "always, on the host", f"({_gib(size)})", f"({_gib(size)})")
    for name, size in plan.update.items():
        table.add_row(name, "update", _gib(size), _gib(plan.eager.get(name, size)))
    for name, size in plan.rollout.items():
        table.add_row(name, "rollout", _gib(size), "")
    table.add_section()
    update, rollout = sum(plan.update.values()), sum(plan.rollout.values())
    table.add_row("peak", "update", _gib(plan.held + update), _gib(plan.peak_eager))
    table.add_row("peak", "rollout", _gib(plan.held + rollout), "")
    yield table

    cards = Table(title=f"Does it fit? (in {USABLE:.0%} of a card)")
    cards.add_column("card")
    cards.add_column("oisd train\n(whole model each)", justify="right")
    for shards in SHARDS:
        cards.add_column(f"sharded over {shards}\n(adapter, update)", justify="right")
    for card, size in CARDS.items():
        needs = [plan.peak, *(plan.sharded(shards) for shards in SHARDS)]
        cards.add_row(card, *("yes" if need <= USABLE * size * GIB else "no" for need in needs))
    cards.add_section()
    cards.add_row("GiB", _gib(plan.peak), *(_gib(plan.sharded(shards)) for shards in SHARDS))
    yield cards
    yield Text("\n".join(assumptions(plan)))


def assumptions(plan: MemoryPlan) -> list[str]:
    """What the figures assume, one line each."""
    shape = plan.shape
    other = "without" if plan.checkpointing else "with"
    kept = "float32"
    if plan.trained != shape.parameters:
        kept = f"frozen, linear layers in model.dtype, and {plan.trained:,} of adapters in float32,"
    lines = [
        f"{shape.parameters:,} parameters ({shape.source}), {kept} as in `oisd train`.",
        f"Micro-batches of {plan.tokens:,} padded tokens, rows of {plan.longest:,}; "
        f"{plan.at_once:,} completions sampled at once (rollout.batch_size), all of full length.",
        f"Activations {other} gradient checkpointing: {_gib(plan.other_checkpointing)} GiB.",
        "Fused attention (SDPA) in the layers. Not counted: fragmentation, the CUDA context, "
        "communication buffers.",
    ]
    maps = plan.update["attention maps"]
    if maps and maps == plan.eager["attention maps"]:
        lines.append('attention_kernel = "reference": the attention loss needs the eager maps.')
    return lines


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
