"""`oisd lens` and `oisd attention`: pictures, numbers and a page about a model's layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from oisd.config import ConfigError
from oisd.data import encode_prompts, render_prompt
from oisd.data.problems import load_problems
from oisd.lens import LayerLens, Lens, LensSummary, summarise
from oisd.lens.attention import AttentionOverlap, LayerAttention
from oisd.lens.page import write_page
from oisd.lens.plots import Picture, plot_attention, plot_compare, plot_layers, plot_lens
from oisd.models import UnsupportedModelError
from oisd.options import LookRun
from oisd.policy import Policy, load_for_command
from oisd.schema import option, require, require_device


def run_lens(model: str, config: LookRun) -> dict[str, Any]:
    """Apply the lens; write pictures, lens.json and index.html; return the report.

    Raises ConfigError for settings that the models do not allow, DataError for unreadable data.
    """
    models = [model] + ([config.compare] if config.compare else [])
    names = _distinct_names(models)
    folder = _folder(model, config, "lens")
    texts: list[list[int]] = []
    tokens: list[str] = []
    summaries: list[tuple[str, LensSummary]] = []
    pictures: list[tuple[str, Picture]] = []
    attention: AttentionOverlap | None = None
    per_token: dict[str, dict[str, list[list[float]]]] = {}
    depth, vocabulary, without_attention = sys.maxsize, {}, ""
    for name, path in zip(names, models, strict=True):
        policy = _load(path, config)
        vocabulary = vocabulary or policy.tokenizer.get_vocab()
        if policy.tokenizer.get_vocab() != vocabulary:
            raise ConfigError(
                f"--compare needs a model of the same vocabulary as {model!r}, got {path!r}"
            )
        lens = LayerLens(policy.model, divergence=config.divergence, lens_norm=config.lens_norm)
        depth = min(depth, lens.num_layers)
        _check_layer(config.layer, depth)
        texts = texts or _texts(policy, config)
        looks = [
            lens(ids, config.picture_tokens if number == 0 else 0)
            for number, ids in enumerate(track(texts, f"{name}: lens", transient=True))
        ]
        summaries.append((name, summarise(looks)))
        per_token[name] = {
            what: [[round(x, 6) for x in row] for row in getattr(looks[0], what).tolist()]
            for what in ("divergence", "entropy", "agreement")
        }
        pictures.append((name, _picture(policy, texts[0], looks[0], config.picture_tokens)))
        if path == model:
            tokens = _decode_each(policy, texts[0])
            try:
                attention = LayerAttention(policy.model, range(1, lens.num_layers))(texts[0])
            except UnsupportedModelError as error:  # no softmax over keys: the lens needs none
                without_attention = _as_options(error)
    layer = config.layer or _default_layer(summaries[0][1], depth)
    title = f"Logit lens of {names[0]}"
    plots = [
        plot_lens(pictures[0][1], folder / "lens.png", title=title, layer=layer),
        plot_layers(summaries, folder / "layers.png"),
    ]
    if config.compare:
        both = "Top token of the final layer and of an intermediate one"
        plots.append(plot_compare(pictures, layer, folder / "compare.png", title=both))
    if attention is not None:
        plots.append(plot_attention(attention, tokens, layer, folder / "attention.png"))
    report = {
        "model": model,
        "layer": layer,
        "boundary_layer": summaries[0][1].boundary_layer,
        "texts": len(texts),
        "tokens": summaries[0][1].tokens,
        "layers": {name: summary._asdict() for name, summary in summaries},
        "first_text": {"tokens": tokens, "layers": per_token},
        "pictures": {name: picture._asdict() for name, picture in pictures},
        "output_dir": str(folder),
        "plots": [str(plot) for plot in plots],
    }
    (folder / "lens.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    page = write_page(folder / "index.html", title, summaries, pictures, attention, tokens, layer)
    return {**report, "page": str(page), "without_attention": without_attention}


def run_attention(model: str, config: LookRun) -> dict[str, Any]:
    """Compare every layer's attention with the final layer's; write attention.png and .json.

    Raises as `run_lens`, and UnsupportedModelError if the attention is not a causal softmax.
    """
    folder = _folder(model, config, "attention")
    policy = _load(model, config)
    lens = LayerLens(policy.model, lens_norm=config.lens_norm)
    depth = lens.num_layers
    _check_layer(config.layer, depth)
    texts = _texts(policy, config)
    layer = config.layer or _default_layer(summarise([lens(ids) for ids in texts]), depth)
    try:
        look = LayerAttention(policy.model, range(1, depth))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(_as_options(error)) from error
    seen = [look(ids) for ids in track(texts, "attention", transient=True)]
    overlap = torch.cat([x.overlap for x in seen], dim=1)
    divergence = torch.cat([x.divergence for x in seen], dim=1)
    first = seen[0]._replace(overlap=overlap, divergence=divergence)
    plot = plot_attention(first, _decode_each(policy, texts[0]), layer, folder / "attention.png")
    report = {
        "model": model,
        "layer": layer,
        "texts": len(texts),
        "tokens": overlap.shape[1],
        "overlap": overlap.mean(1).tolist(),
        "divergence": divergence.mean(1).tolist(),
        "output_dir": str(folder),
        "plots": [str(plot)],
    }
    (folder / "attention.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _folder(model: str, config: LookRun, command: str) -> Path:
    if bool(config.prompt) == bool(config.data):
        raise ConfigError(f"oisd {command}: give either --prompt or --data")
    for name in ("limit", "max_prompt_tokens", "picture_tokens", "threads"):
        value = getattr(config, name)
        require(value is None or value >= 1, option(name), "at least 1", value)
    for name in ("completion_tokens", "seed"):
        value = getattr(config, name)
        require(value >= 0, option(name), "at least 0", value)
    require_device("--device", config.device)
    name = Path(model).resolve().name if Path(model).exists() else model.replace("/", "--")
    folder = Path(config.output_dir or f"runs/{command}/{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}"
        ) from error
    return folder


def _load(path: str, config: LookRun) -> Policy:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The lens runs in float32.
    policy = load_for_command(path, config, device, round_frozen=False)
    policy.model.eval()
    return policy


def _texts(policy: Policy, config: LookRun) -> list[list[int]]:
    """Token ids of the texts, each with its completion."""
    tokenizer = policy.tokenizer
    options: Any = {"system_prompt": config.system_prompt, "chat_template": config.chat_template}
    if config.data:
        examples = load_problems(config.data, config, config.seed)
        most = config.max_prompt_tokens
        prompts = encode_prompts(tokenizer, examples, max_prompt_tokens=most, **options).token_ids
    else:
        rendered = [render_prompt(tokenizer, text, **options) for text in config.prompt]
        prompts = [tokenizer(text)["input_ids"] for text in rendered]
    if not all(prompts):
        raise ConfigError("--prompt holds a text without tokens")
    # The attention's maps grow with the square of the length: 9 GiB for 8,192 tokens, 36 layers.
    longest = max(map(len, prompts))
    if longest > config.max_prompt_tokens:
        raise ConfigError(
            f"--prompt holds a text of {longest} tokens, the limit is {config.max_prompt_tokens}; "
            f"shorten it or raise --max-prompt-tokens"
        )
    policy.require_positions(
        prompts, config.completion_tokens, "--max-prompt-tokens", "--completion-tokens"
    )
    if config.completion_tokens > 0:
        most, rows = config.completion_tokens, range(len(prompts))
        made = policy.sample(prompts, rows, max_completion_tokens=most, seed=config.seed)
        lengths = made.lengths.tolist()
        for prompt, ids, n in zip(prompts, made.ids.tolist(), lengths, strict=True):
            prompt.extend(ids[:n])
    return prompts


def _as_options(error: UnsupportedModelError) -> str:
    """The message with its remedy as a command-line option; that of Taps is a call."""
    call = 'call model.set_attn_implementation("eager"), or use attention=False'
    return str(error).replace(call, "pass --attn-implementation eager")


def _check_layer(layer: int | None, depth: int) -> None:
    if layer is not None and not 1 <= layer < depth:
        raise ConfigError(
            f"--layer must lie in 1..{depth - 1}, below the final layer of every model, got {layer}"
        )


def _default_layer(summary: LensSummary, depth: int) -> int:
    """The boundary layer, or the middle one if there is none; below the last of `depth` layers."""
    return max(1, min(summary.boundary_layer or depth // 2, depth - 1))


def _picture(policy: Policy, ids: Sequence[int], lens: Lens, shown: int) -> Picture:
    return Picture(
        _decode_each(policy, ids[-shown:]),
        [_decode_each(policy, layer) for layer in lens.top.tolist()],
        lens.probability.tolist(),
        (lens.agreement[:, -shown:] == 1).tolist(),
    )


def _decode_each(policy: Policy, ids: Sequence[int]) -> list[str]:
    return policy.tokenizer.batch_decode([[token] for token in ids])


def _distinct_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole paths if those parts are the same."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else list(models)
