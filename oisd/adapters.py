"""LoRA through PEFT: adapters beside a model's frozen linear layers, created, saved and loaded.

    y = W x + lora_alpha / r * B A x        A [r, in] random, B [out, r] zero at first

Only A and B are trained, in float32 (Hu et al. 2021). The default lora_alpha = 32 at every rank and
adapters on all layers follow Schulman et al., "LoRA Without Regret" (2025).

Frozen weights need no float32 master copy. Under bf16 autocast W is kept in bf16, because autocast
caches copies of trained weights only and would round W again in each forward. The numbers are
identical bit for bit, at 2 bytes a parameter instead of 4 and a copy. Embeddings (and a head tied
to them) and norms stay float32, as under autocast.

Adapters are not merged into the trained model: W + B A would be rounded in every step, and a
resumed run would differ from the one that was killed. In bfloat16 rollouts come from a copy
(`oisd.rollout.model_copy`), into which they are merged.

peft is imported only where an adapter is asked for or found.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oisd.config import ConfigError, ModelConfig, TrainConfig
from oisd.sharding import whole

CONFIG = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format, rather than a whole model."""
    return (Path(folder) / CONFIG).is_file()


class Weight(NamedTuple):
    """A weight of a model as a saved one has it: by its plain name, with adapters merged."""

    name: str
    stored: Tensor
    layer: Any = None
    """The adapted layer whose weight it is."""

    def read(self) -> Tensor:
        """The stored tensor, or W + lora_alpha / r * B A in float32; whole, if it is in shards."""
        stored = whole(self.stored)
        if self.layer is None:
            return stored
        deltas = (whole(self.layer.get_delta_weight(name)) for name in self.layer.active_adapters)
        return sum(deltas, stored.float())


def plain_weights(model: nn.Module) -> Iterator[Weight]:
    """Each parameter and saved buffer of a transformers model, as it would be without adapters."""
    modules = dict(model.named_modules())
    adapted = {name for name, m in modules.items() if hasattr(m, "get_delta_weight")}
    for name, stored in model.state_dict(keep_vars=True).items():
        layer, inside, leaf = name.rpartition(".base_layer.")
        if inside:
            yield Weight(f"{layer}.{leaf}", stored, modules[layer] if leaf == "weight" else None)
        elif not any(name.startswith(f"{layer}.") for layer in adapted):
            yield Weight(name, stored)


def is_adapted(model: nn.Module) -> bool:
    """Whether a loaded model has adapters, in PEFT's wrapper or added by transformers."""
    return hasattr(model, "peft_config")


def base_path(folder: Path) -> str:
    """The base model that an adapter's folder names. Raises ConfigError if it names none."""
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{folder / CONFIG} is not PEFT's: {error!r}") from error
    if not base:
        raise ConfigError(f"{folder / CONFIG} names no base model: set base_model_name_or_path")
    return base


def attach(model: Any, config: ModelConfig, *, seed: int) -> Any:
    """`model` in PEFT's wrapper with new adapters; everything else is frozen.

    seed: for A; the global random state is neither used nor changed.
    Raises ConfigError if `config.lora_targets` names the head or anything that is not a linear
    layer of the model, and if peft is not installed.
    """
    peft = _peft()
    every = config.lora_targets == ("all-linear",)
    if not every:
        _require_linear_layers(model, config.lora_targets)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if every else list(config.lora_targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, lora)
    # A folder by its full path: an adapter may be read from another working directory.
    base = Path(config.path)
    lora.base_model_name_or_path = str(base.resolve()) if base.exists() else config.path
    return model


def load(model: Any, folder: Path, *, trainable: bool) -> Any:
    """`model` in PEFT's wrapper with the adapters of a folder, in float32.

    Raises ConfigError if they do not fit the model, and if peft is not installed.
    """
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            loaded = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        given = set(peft.utils.load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # a file of nonsense may raise anything
        raise ConfigError(
            f"the adapter {str(folder)!r} does not fit {type(model).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    wanted = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
    # An adapter's file may also hold layers of the model, such as a longer embedding.
    known = wanted | {name.replace(".base_layer.", ".") for name in loaded.state_dict()}
    missing, unexpected = sorted(wanted - given), sorted(given - known)
    if missing or unexpected or not wanted:
        first = ", ".join((missing or unexpected)[:3])
        raise ConfigError(
            f"the adapter {str(folder)!r} does not fit {type(model).__name__}: it lacks "
            f"{len(missing)} of {len(wanted)} weights and has {len(unexpected)} unknown ones "
            f"({first}, ...); give the base model that it was trained on, and its whole file"
        )
    return loaded


def save(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write only the adapters, as safetensors in PEFT's format.

    weights: the adapters', by the model's names, if they are not the model's own tensors.
    """
    # Otherwise PEFT asks the Hub at each checkpoint for the size of the base model's vocabulary.
    options = {"safe_serialization": True, "save_embedding_layers": False}
    model.save_pretrained(folder, state_dict=weights, **options)


def round_frozen(model: Any, dtype: torch.dtype) -> None:
    """Cast frozen linear layers, untrained adapters included, to the forward's dtype."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(dtype)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Context in which the model is as before its adapters: a KL term's reference without a copy.

    In eval mode, as a frozen copy would be.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True


def refuse_blank(config: TrainConfig) -> None:
    """Raise ConfigError for adapters on a blank model, or together with a warm-up."""
    if config.model.lora_rank and (config.model.is_blank or config.warmup.steps):
        raise ConfigError(
            "model.lora_rank must be 0 with a blank model or a warm-up, got "
            f"{config.model.lora_rank}: train without adapters first, then adapt the checkpoint "
            "(model.path = .../checkpoints/step-N, warmup.steps = 0)"
        )


def refuse_others(model: nn.Module, config: ModelConfig) -> None:
    """Raise ConfigError for a model to be trained that has the adapters of another run."""
    if is_adapted(model) and not config.lora_rank:
        raise ConfigError(
            f"model.path {config.path!r} is an adapter, which is not trained on: merge it into its "
            "base first (docs/lora.md)"
        )


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the trained parameters: what a checkpoint holds, apart from the optimizer."""
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() * p.element_size() for p in trained)


def _require_linear_layers(model: Any, targets: tuple[str, ...]) -> None:
    """Each name must be the end of a module's path, as PEFT looks for it."""
    modules = [(name, module) for name, module in model.named_modules() if name]
    head = model.get_output_embeddings()
    known = sorted({n.rsplit(".", 1)[-1] for n, m in modules if _is_linear(m) and m is not head})
    for target in targets:
        found = [m for name, m in modules if f".{name}".endswith(f".{target}")]
        if any(module is head for module in found):
            raise ConfigError(
                f"model.lora_targets must leave out the head, got {target!r}: the lens reads only "
                "its weight and would miss an adapter"
            )
        if not found or not all(_is_linear(module) for module in found):
            close = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"model.lora_targets must name linear layers of {type(model).__name__} "
                f"({', '.join(known)}), got {target!r}{meant}"
            )


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's linear layers are of another class.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "adapters need peft, which cannot be imported "
            f"({error}): pip install 'oisd[lora]', or set model.lora_rank = 0"
        ) from error
    return peft
