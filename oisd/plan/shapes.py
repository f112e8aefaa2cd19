"""The sizes of a decoder: of the recipes' models, or from a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oisd.config import ConfigError
from oisd.schema import is_scratch, one_line, scratch_sizes


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


def _value(config: Any, name: str) -> Any:
    """None also where each layer has its own, as Gemma 4's: transformers refuses to name one."""
    try:
        return getattr(config, name, None)
    except Exception:  # of a class that only newer versions have
        return None


def _formula(config: Any, source: str) -> Shape:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.path: the plan wants a decoder with gated feed-forward blocks, got a "
            f"{config.model_type}, which has an encoder too"
        )
    for name in _SIZES:
        size = _value(text, name)
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
        key_heads=_value(text, "num_key_value_heads") or heads,
        head_dim=_value(text, "head_dim") or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        qk_norm=text.model_type in ("qwen3", "gemma3_text"),
        qkv_bias=text.model_type == "qwen2" or bool(getattr(text, "attention_bias", False)),
        source=source,
    )
