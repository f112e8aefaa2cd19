"""The policy: a causal language model with its tokenizer, loaded or made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from oisd import adapters
from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.config import ConfigError, ModelConfig, RolloutConfig
from oisd.data import Example, check_vocabulary
from oisd.models.dropout import set_dropout
from oisd.models.layout import learned_positions, unwrap
from oisd.models.loading import (
    folder_problem,
    read_model,
    read_tokenizer,
    require_finite,
    require_savable,
)
from oisd.rollout import Completions, sample
from oisd.rollout.model_copy import ModelCopy
from oisd.schema import is_scratch, scratch_sizes
from oisd.scratch import scratch_model, scratch_tokenizer, texts_of


@dataclass(frozen=True)
class Policy:
    """A model, its tokenizer, and the arithmetic that it runs in."""

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    """float32, or bfloat16 for mixed precision over float32 parameters (or frozen ones in bf16)."""
    dropout_replaced: dict[str, float] = field(default_factory=dict)
    """The rates that the model came with, by name, where `model.dropout` replaced them."""
    is_cast: bool = False
    """Whether the parameters themselves are in `dtype`, so that a forward needs no autocast."""

    def warn_of_dropout(self, config: ModelConfig) -> None:
        """Say which rates of the model `config.dropout` has replaced, if any."""
        if self.dropout_replaced:
            rates = ", ".join(f"{name} {rate:g}" for name, rate in self.dropout_replaced.items())
            warnings.warn(
                f"model.dropout = {config.dropout:g} replaces what the model ships: {rates}; "
                f'"none" (None on the command line) keeps it',
                stacklevel=3,
            )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """The padding token, or the end of sequence if there is none: masks hide both."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a completion: a chat model may have several."""
        shipped = self.model.generation_config.eos_token_id
        found = shipped if isinstance(shipped, list) else [shipped]
        found = [*found, self.tokenizer.eos_token_id]
        return sorted({token for token in found if token is not None})

    def autocast(self) -> torch.autocast:
        """The context of each forward pass."""
        mixed = self.dtype == torch.bfloat16 and not self.is_cast
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def cast(self, device: torch.device | str) -> Policy:
        """A policy whose parameters are in `dtype`, adapters merged: this one for float32.

        It is on `device`, and computes what rollouts in a run with this `model.dtype` do.
        """
        if not self.is_copied:
            self.model.to(device)
            return self
        copied = ModelCopy(unwrap(self.model), self.dtype, device)
        return replace(self, model=copied.fill(), is_cast=True)

    @property
    def is_copied(self) -> bool:
        """Whether rollouts come from a copy of the model in `dtype`.

        Not in float32, nor from weights that are quantised, which are small already.
        """
        quantised = getattr(unwrap(self.model).config, "quantization_config", None) is not None
        return self.dtype != torch.float32 and not quantised

    def sample(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], **settings: Any
    ) -> Completions:
        """`oisd.rollout.sample` with this policy's model and special tokens."""
        with self.autocast():
            return sample(
                # PEFT's own `generate` would leave its settings in the model.
                unwrap(self.model),
                prompts,
                rows,
                pad_token_id=self.pad_token_id,
                eos_token_ids=self.eos_token_ids,
                **settings,
            )

    def roll_out(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        config: RolloutConfig,
        **settings: Any,
    ) -> Completions:
        """`sample` as a recipe says."""
        return self.sample(
            prompts,
            rows,
            max_completion_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            batch_size=config.batch_size,
            **settings,
        )

    def require_positions(
        self,
        prompts: Sequence[Sequence[int]],
        completion_tokens: int,
        key: str,
        reads_last: bool = False,
    ) -> None:
        """Raise ConfigError where a prompt with its completion has more tokens than positions.

        key: the setting that limits completions.
        reads_last: the model reads a completion's last token too, as sampling does not.
        """
        limit = learned_positions(unwrap(self.model))
        longest = max(map(len, prompts), default=0)
        unread = 0 if reads_last else min(completion_tokens, 1)
        if limit is None or longest + completion_tokens - unread <= limit:
            return
        room = limit - longest + unread
        lower = f"lower {key} to at most {room}, or shorten" if room > 0 else "shorten"
        raise ConfigError(
            f"a prompt of {longest} tokens with {key} = {completion_tokens} needs more positions "
            f"than {type(unwrap(self.model)).__name__} has learned, which are {limit}; {lower} "
            "the prompt"
        )

    def decode(self, completions: Completions) -> list[str]:
        """The completions' texts, without special tokens."""
        lengths = completions.lengths.tolist()
        ids = [row[:n] for row, n in zip(completions.ids.tolist(), lengths, strict=True)]
        # Without rows the tokenizer would return one empty text.
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []


class Sampler:
    """What a run samples from: its policy, or in half precision a copy, filled for each use.

    All processes use it at the same time. Make it before the processes share one model.

    copied: sample from a copy in any case, since the policy's own parameters will be in shards.
    """

    def __init__(self, policy: Policy, *, copied: bool = False) -> None:
        self._policy = policy
        copied = copied or policy.is_copied
        self._copy = ModelCopy(unwrap(policy.model), policy.dtype) if copied else None

    @contextmanager
    def ready(self) -> Iterator[Policy]:
        """Context with a policy of today's weights, which must not change within it."""
        if self._copy is None:
            yield self._policy
            return
        with self._copy.filled() as model:
            yield replace(self._policy, model=model, is_cast=True)


def load_policy(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    round_frozen: bool = True,
    examples: Sequence[Example] = (),
) -> Policy:
    """Load `config.path`, or the weights of a checkpoint of it, with float32 parameters.

    Either may be the folder of an adapter; its base model is then loaded too: the one that the
    folder names, or `config.path` for a checkpoint of a run with `lora_rank`. Without a checkpoint
    such a run gets new adapters.

    round_frozen: keep the layers that adapters freeze in `config.dtype`; False to run the model
        outside `Policy.autocast`.
    examples: what the tokenizer of a model from scratch is made from.

    Weights are read from safetensors alone. Raises ConfigError if the model cannot be loaded, has
    no end-of-sequence token, or lacks weights; if adapters do not fit it; and if weights are not
    finite. Raises DataError if the tokenizer has tokens that the model lacks.
    """
    adapter = _adapter_folder(config, checkpoint)
    named = f"model.path {config.path!r}"
    if config.path == "arithmetic" and checkpoint is None:
        model: Any = arithmetic_model(seed)
        model.set_attn_implementation(config.attn_implementation)
        tokenizer: Any = arithmetic_tokenizer()
    elif is_scratch(config.path) and checkpoint is None:
        tokenizer = scratch_tokenizer(texts_of(examples))
        model = scratch_model(scratch_sizes(config.path), tokenizer, seed)
        model.set_attn_implementation(config.attn_implementation)
    else:
        source, named = _source(config, checkpoint, adapter)
        trust = config.trust_remote_code
        attention = config.attn_implementation
        model = read_model(source, named, attn_implementation=attention, trust_remote_code=trust)
        shipped = adapter is not None and (adapter / "tokenizer_config.json").is_file()
        where = adapter if adapter is not None and shipped else source
        tokenizer = read_tokenizer(where, named, trust_remote_code=trust)
    check_vocabulary(tokenizer, model.config)
    # Before the adapters, whose own dropout stays.
    replaced = {} if config.dropout is None else set_dropout(model, config.dropout)
    if adapter is not None:
        model = adapters.load(model, adapter, trainable=config.lora_rank > 0)
        named = f"the adapter {str(adapter)!r} or {named}"
    elif config.lora_rank:
        model = adapters.attach(model, config, seed=seed)
    # After the adapters, which would take up their layer's dtype.
    if round_frozen and (adapter is not None or config.lora_rank):
        adapters.round_frozen(model, getattr(torch, config.dtype))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = model.to(device)
    require_finite(model, named)
    policy = Policy(model, tokenizer, getattr(torch, config.dtype), replaced)
    if not policy.eos_token_ids:
        raise ConfigError(
            f"model.path {config.path!r} has no end-of-sequence token, in its generation config or "
            "its tokenizer; completions would never end"
        )
    return policy


def load_for_training(config: ModelConfig, **options: Any) -> Policy:
    """`load_policy` with what an update needs: a model in training mode that can be saved."""
    policy = load_policy(config, **options)
    adapters.refuse_others(policy.model, config)
    require_savable(unwrap(policy.model), policy.tokenizer, f"model.path {config.path!r}")
    policy.model.train()
    return policy


def load_for_command(
    path: str, options: Any, device: torch.device | str, *, round_frozen: bool = True
) -> Policy:
    """The model that `oisd eval` and `oisd lens` look at, as their options say."""
    config = ModelConfig(
        path=path,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        dropout=None,  # nothing is trained
    )
    return load_policy(config, seed=options.seed, device=device, round_frozen=round_frozen)


def _source(
    config: ModelConfig, checkpoint: Path | None, adapter: Path | None
) -> tuple[str | Path, str]:
    """Where the model is read from, and how messages call it: an adapter is read onto its base."""
    source = checkpoint or config.path
    if adapter is None:
        return source, f"model.path {str(source)!r}"
    if problem := folder_problem(adapter, adapters.CONFIG):
        raise ConfigError(f"the adapter {str(adapter)!r} cannot be loaded: {problem}")
    source = config.path if config.lora_rank else adapters.base_path(adapter)
    return source, f"model.path {str(source)!r}, the base of the adapter {str(adapter)!r},"


def _adapter_folder(config: ModelConfig, checkpoint: Path | None) -> Path | None:
    if config.lora_rank and adapters.is_adapter(config.path):
        raise ConfigError(
            f"model.path {config.path!r} is itself an adapter, which model.lora_rank = "
            f"{config.lora_rank} would put another one on; merge it first (docs/lora.md)"
        )
    folder = Path(checkpoint or config.path)
    return folder if adapters.is_adapter(folder) else None
