"""A causal language model from files, refused unless each of its weights was read and is finite.

transformers draws at random whatever a checkpoint lacks, and leaves out whatever a model lacks.
Here both are errors, except for what ties and the model's class make good.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as bars

from oisd.config import ConfigError
from oisd.schema import one_line, require_no_misspelt_blank

_LFS = b"version https://git-lfs"
_FLOATS = {"F64", "F32", "F16", "BF16"}  # as safetensors names them
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors")
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt"}
# Constants that older checkpoints hold as buffers: rotary frequencies and causal masks.
_CONSTANTS = re.compile(r"inv_freq$|\.attn(ention)?(\.attention)?\.(masked_)?bias$")
# How transformers begins to say that a model has no SDPA, FlexAttention or FlashAttention.
_NO_ATTENTION = re.compile(r"(\w+) does not support (an attention implementation|Flash ?Attention)")


def read_model(source: str | Path, named: str, **options: Any) -> Any:
    """The model of a folder or of the Hub in float32, with weights from safetensors alone.

    named: how messages call it. options: of `from_pretrained`.
    Raises ConfigError with the reason if it cannot be read, and for weights that are missing from
    it, that the model does not have, or that have another shape.
    """
    if problem := folder_problem(source):
        raise ConfigError(f"{named} cannot be loaded: {problem}")
    require_no_misspelt_blank(str(source))
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the names
                **options,
            )
    except Exception as error:  # a config of nonsense may raise anything
        if refused := _NO_ATTENTION.match(str(error)):
            raise ConfigError(
                f"{named} cannot be loaded: attn_implementation must be one that {refused[1]} has "
                f"in this version of transformers, got {options.get('attn_implementation')!r}; set "
                f'attn_implementation="eager"'
            ) from error
        here = "" if Path(source).exists() else "there is no such folder here, and from the Hub: "
        raise ConfigError(f"{named} cannot be loaded: {here}{in_short(error)}") from error
    model, found = loaded
    _require_all_weights(model, found, named)
    if method := _claimed_quantisation(Path(source)):
        warnings.warn(
            f"{named}: its config.json says that its weights are quantised ({method}), but they "
            f"are plain floats and were read as such; take quantization_config out of config.json "
            f"if they are meant to be, or else copy the quantised weights again",
            stacklevel=2,
        )
    _make_savable(model)
    return model


def _claimed_quantisation(folder: Path) -> str:
    """The quantisation that a folder's config names and none of its weights has; else ""."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        claimed = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):  # not of a folder, or transformers' own trouble
        return ""
    if not claimed:
        return ""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            if any(weights.get_slice(key).get_dtype() not in _FLOATS for key in weights.keys()):
                return ""
    return str(claimed.get("quant_method", claimed) if isinstance(claimed, dict) else claimed)


def read_tokenizer(source: str | Path, named: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or of the Hub. Raises ConfigError with the reason."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(f"{named} cannot be loaded: its tokenizer: {in_short(error)}") from error


def in_short(error: Exception) -> str:
    """An error of another library on one line."""
    text = one_line(error) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    explained = isinstance(error, (OSError, ValueError, ImportError))
    return text if explained else f"{type(error).__name__}: {text}"


def folder_problem(source: str | Path, config: str = "config.json") -> str | None:
    """Why a local model, or an adapter, cannot be read; None for a Hub id or a sound folder."""
    folder, written = Path(source), str(source)
    if folder.is_file():
        return f"it is a file; give the folder that holds {config} and the weights"
    if not folder.exists():
        is_path = folder.is_absolute() or written.startswith((".", "~")) or written.count("/") > 1
        return "there is no such folder" if is_path else None
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    read = [f for f in files if _WEIGHTS.fullmatch(f.name) or _is_text(f)]
    pointers = [file.name for file in read if _starts_with(file, _LFS)]
    if pointers:
        return (
            f"{pointers[0]} is a Git LFS pointer, not the file itself ({len(pointers)} in all); "
            f"run `git lfs pull` in the folder"
        )
    if not (folder / config).is_file():
        inside = [*folder.glob("*/config.json"), *folder.glob("checkpoints/*/config.json")]
        newest = max(inside, key=lambda file: file.stat().st_mtime, default=None)
        meant = f"; did you mean {str(newest.parent)!r}?" if newest else ""
        return f"the folder has no {config}{meant}"
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        # The trainer's own state is not the model's.
        others = [
            file.name
            for file in files
            if file.suffix in _OTHER_WEIGHTS and file.name != "trainer_state.pt"
        ]
        if not others:
            return "the folder has no .safetensors file, which is where weights are; copy it again"
        return (
            f"weights are read from safetensors alone, and its weights are in {others[0]}, which "
            f"may run code; save it as safetensors"
        )
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:
            return f"{file.name} is cut off or damaged ({in_short(error)}); copy it again"
    return None


def _is_text(file: Path) -> bool:
    return file.suffix in {".json", ".model", ".jinja", ".txt", ".py"}


def _starts_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of keys, which `_require_all_weights` replaces, and its bar."""
    logger, shown = logging.getLogger("transformers.modeling_utils"), bars.is_progress_bar_enabled()
    # Not by its level: at a high one transformers looks for layers that nobody asked to shard.
    logger.addFilter(_is_error)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(_is_error)
        if shown:
            bars.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _require_all_weights(model: nn.Module, found: dict[str, Any], named: str) -> None:
    missing = [key for key in sorted(found["missing_keys"]) if not _CONSTANTS.search(key)]
    unexpected = [key for key in sorted(found["unexpected_keys"]) if not _CONSTANTS.search(key)]
    sizes = sorted(found["mismatched_keys"])
    texts = [f"{key} {[*theirs]}, wanted {[*ours]}" for key, theirs, ours in sizes]
    parts = [
        *_listed("lacks", missing),
        *_listed("has", unexpected, "unknown "),
        *_listed("has other shapes of", texts),
    ]
    if not parts:
        return
    remedy = "give a checkpoint of this very architecture and size, with its head"
    for prefix in ("_orig_mod.", "module."):
        if any(key.startswith(prefix) for key in unexpected):
            remedy = f"take the prefix {prefix!r} off its keys, or save it from the unwrapped model"
    random = " (it would be random there)" if missing or sizes else ""
    raise ConfigError(
        f"{named} does not fit {type(model).__name__}: it {', '.join(parts)}{random}; {remedy}"
    )


def _listed(what: str, keys: Collection[str], kind: str = "") -> Iterator[str]:
    if keys:
        first = ", ".join([*keys][:3])
        weights = f"{kind}weight{'s' * (len(keys) > 1)}"
        yield f"{what} {len(keys)} {weights} ({first}{', ...' if len(keys) > 3 else ''})"


def require_savable(model: Any, tokenizer: Any, named: str) -> None:
    """Raise ConfigError for a config, generation config or tokenizer that a checkpoint cannot have.

    Some are read, but not written; the first checkpoint would be too late.
    """
    with TemporaryDirectory() as folder:
        for part in (model.config, getattr(model, "generation_config", None), tokenizer):
            try:
                if part is not None:
                    part.save_pretrained(folder)
            except Exception as error:
                what = type(part).__name__
                raise ConfigError(f"{named} cannot be saved: {what}: {in_short(error)}") from error


def require_finite(model: Any, named: str) -> None:
    """Raise ConfigError that names the parameters with NaN or infinite entries, and counts them.

    A head's bias may be -inf, which masks a token.
    """
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    weights = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.element_size() > 1 and parameter.numel()
    }
    if not weights:
        return
    # One synchronisation; a sum is NaN or infinite where an entry is.
    sums = torch.stack([weight.sum(dtype=torch.float32) for weight in weights.values()]).tolist()
    wrong = []
    for (name, weight), total in zip(weights.items(), sums, strict=True):
        if abs(total) < float("inf"):
            continue
        bad = ~weight.isfinite()
        if isinstance(bias, Tensor) and weight.data_ptr() == bias.data_ptr():
            bad &= weight != -torch.inf
        if count := int(bad.sum()):
            wrong.append(f"{name}: {count} of {weight.numel()}")
    if wrong:
        more = ", ..." if len(wrong) > 3 else ""
        raise ConfigError(
            f"{named} has NaN or infinite weights in {len(wrong)} of its tensors "
            f"({', '.join(wrong[:3])}{more}): the run that wrote it has diverged, or the file is "
            f"damaged; take an earlier checkpoint"
        )


def _make_savable(model: Any) -> None:
    """Change generation settings that transformers reads but refuses to save.

    The commonest are sampling settings without do_sample. Rollouts and evaluations have settings of
    their own.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or not (wrong := _refused(settings)):
        return
    if settings.temperature != 0:  # which means greedy
        settings.do_sample = True
        wrong = _refused(settings)
    for name in filter(None, wrong):
        setattr(settings, name, None)
    if _refused(settings):
        pad = settings.pad_token_id
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id,
            eos_token_id=settings.eos_token_id,
            pad_token_id=pad if isinstance(pad, int) and pad >= 0 else None,
        )


def _refused(settings: GenerationConfig) -> list[str]:
    """The settings that keep it from being saved, or [""] if the reason names none."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return re.findall(r"^- `(\w+)`", str(error), re.MULTILINE) or [""]
    return []
