"""`oisd lens` and `oisd attention`: pictures, numbers and a page about a model's layers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from oisd.config import ConfigError
from oisd.data import encode_prompts, render_prompt
from oisd.data.problems import load_problems
from oisd.data.prompts import token_ids_of
from oisd.lens import LayerLens, Lens, LensSummary, summarise, without_boundary
from oisd.lens.attention import AttentionOverlap, LayerAttention
from oisd.lens.page import write_page
from oisd.lens.plots import Picture, plot_attention, plot_compare, plot_layers, plot_lens
from oisd.models import UnsupportedModelError
from oisd.models.refusals import Remedy
from oisd.options import LookRun
from oisd.policy import Policy, load_for_command
from oisd.run import provenance
from oisd.run.folder import command_folder
from oisd.run.processes import device_named
from oisd.schema import option, require, require_device


def run_lens(model: str, config: LookRun) -> dict[str, Any]:
    """Apply the lens; write pictures, lens.json and index.html; return the report.

    Raises ConfigError for settings that the models do not allow or for a folder that holds another
    model's pictures, DataError for unreadable data.
    """
    models = _models(model, config)
    names = _distinct_names(models)
    folder = _folder(model, config, "lens")
    texts: list[list[int]] = []
    tokens: list[str] = []
    summaries: list[tuple[str, LensSummary]] = []
    pictures: list[tuple[str, Picture]] = []
    attention: AttentionOverlap | None = None
    per_token: dict[str, dict[str, list[list[float]]]] = {}
    depth, vocabulary, without_attention = sys.maxsize, {}, ""
    for number, (name, path) in enumerate(zip(names, models, strict=True)):
        policy = _load(path, config)
        vocabulary = _checked_vocabulary(policy, vocabulary, model, path)
        lens = LayerLens(policy.model, divergence=config.divergence, lens_norm=config.lens_norm)
        depth = min(depth, lens.num_layers)
        _check_layer(config.layer, depth)
        texts = texts or _texts(policy, config)
        with policy.autocast():
            looks = [
                lens(ids, config.picture_tokens if place == 0 else 0)
                for place, ids in enumerate(_tracked(texts, f"{name}: lens"))
            ]
        summaries.append((name, summarise(looks)))
        per_token[name] = {
            what: [[round(x, 6) for x in row] for row in getattr(looks[0], what).tolist()]
            for what in ("divergence", "entropy", "agreement")
        }
        pictures.append((name, _picture(policy, texts[0], looks[0], config.picture_tokens)))
        if number == 0:
            tokens = _decode_each(policy, texts[0])
            layers = range(1, lens.num_layers)
            try:
                look = LayerAttention(policy.model, layers, config.divergence, lens.probe)
                with policy.autocast():
                    attention = look(texts[0])
            except UnsupportedModelError as error:  # no softmax over keys: the lens needs none
                without_attention = error.worded(_as_option)
    layer = config.layer or _default_layer(summaries[0][1], depth)
    title = f"Logit lens of {names[0]}"
    made_of = _made_of(models, folder, "lens")
    plots = [
        plot_lens(pictures[0][1], folder / "lens.png", title=title, layer=layer),
        plot_layers(summaries, folder / "layers.png"),
    ]
    if config.compare:
        both = "Top token of the final layer and of an intermediate one"
        plots.append(plot_compare(pictures, layer, folder / "compare.png", title=both))
    if attention is not None:
        file, most = folder / "attention.png", config.picture_tokens
        shown = attention.nearest(layer)
        plots.append(plot_attention(attention, tokens, shown, file, most=most))
    report = {
        "model": model,
        "made_of": made_of,
        "layer": layer,
        "boundary_layer": summaries[0][1].boundary_layer,
        "texts": len(texts),
        "tokens": summaries[0][1].tokens,
        "layers": {name: _without_nan(summary) for name, summary in summaries},
        "first_text": {"tokens": tokens, "layers": per_token},
        "pictures": {name: picture._asdict() for name, picture in pictures},
        "output_dir": str(folder),
        "plots": [str(plot) for plot in plots],
    }
    (folder / "lens.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    page = write_page(folder / "index.html", title, summaries, pictures, attention, tokens, layer)
    without = "" if report["boundary_layer"] else without_boundary(summaries[0][1])
    return {
        **report,
        "page": str(page),
        "without_attention": without_attention,
        "without_boundary": without,
    }


def run_attention(model: str, config: LookRun) -> dict[str, Any]:
    """Compare every layer's attention with the final layer's; write attention.png and .json.

    Raises as `run_lens`, and UnsupportedModelError if the attention is not a causal softmax.
    """
    models = _models(model, config)
    folder = _folder(model, config, "attention")
    seen: dict[str, AttentionOverlap] = {}
    texts: list[list[int]] = []
    tokens: list[str] = []
    depth, vocabulary, boundary = sys.maxsize, {}, 0
    for name, path in zip(_distinct_names(models), models, strict=True):
        policy = _load(path, config)
        vocabulary = _checked_vocabulary(policy, vocabulary, model, path)
        lens = LayerLens(policy.model, lens_norm=config.lens_norm)
        depth = min(depth, lens.num_layers)
        _check_layer(config.layer, depth)
        texts = texts or _texts(policy, config)
        tokens = tokens or _decode_each(policy, texts[0])
        with policy.autocast():
            if not config.layer and not boundary:
                summary = summarise([lens(ids) for ids in texts])
                boundary = _default_layer(summary, lens.num_layers)
            seen[name] = _overlap(lens, texts, config)
    layer = config.layer or min(boundary, depth - 1)
    first, *others = seen
    layer = seen[first].nearest(layer)
    made_of = _made_of(models, folder, "attention")
    means = {
        name: {
            "layers": look.layers,
            "compared_with": look.final,
            "overlap": look.overlap.mean(1).tolist(),
            "divergence": look.divergence.mean(1).tolist(),
        }
        for name, look in seen.items()
    }
    plot = plot_attention(
        seen[first],
        tokens,
        layer,
        folder / "attention.png",
        most=config.picture_tokens,
        others={name: _by_layer(means[name]) for name in others},
    )
    report = {
        "model": model,
        "made_of": made_of,
        "layer": layer,
        "texts": len(texts),
        "tokens": seen[first].overlap.shape[1],
        **means[first],
        "compared": {name: means[name] for name in others},
        "output_dir": str(folder),
        "plots": [str(plot)],
    }
    (folder / "attention.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _by_layer(means: dict[str, Any]) -> list[float]:
    """Mean overlap of layer 1, 2 and so on; NaN where a layer has none."""
    known = dict(zip(means["layers"], means["overlap"], strict=True))
    return [known.get(layer, math.nan) for layer in range(1, max(known) + 1)]


def _tracked(texts: Sequence[Any], name: str) -> Iterable[Any]:
    """The texts, with a bar on a terminal; elsewhere it would leave an empty line."""
    return track(texts, name, transient=True, disable=not sys.stdout.isatty())


def _overlap(lens: LayerLens, texts: Sequence[Sequence[int]], config: LookRun) -> AttentionOverlap:
    """Of all texts; the maps are the first one's."""
    layers = range(1, lens.num_layers)
    try:
        look = LayerAttention(lens.model, layers, config.divergence, lens.probe)
    except UnsupportedModelError as error:
        raise error.reworded(_as_option) from error
    seen = [look(ids) for ids in _tracked(texts, "attention")]
    overlap = torch.cat([x.overlap for x in seen], dim=1)
    divergence = torch.cat([x.divergence for x in seen], dim=1)
    return seen[0]._replace(overlap=overlap, divergence=divergence)


def _models(model: str, config: LookRun) -> list[str]:
    return [model] + ([config.compare] if config.compare else [])


def _checked_vocabulary(
    policy: Policy, vocabulary: dict[str, int], model: str, path: str
) -> dict[str, int]:
    """The first model's vocabulary, which another one has to share."""
    own = policy.tokenizer.get_vocab()
    if vocabulary and own != vocabulary:
        raise ConfigError(
            f"--compare needs a model of the same vocabulary as {model!r}, got {path!r}"
        )
    return own


def _without_nan(summary: LensSummary) -> dict[str, Any]:
    """JSON has no NaN."""
    before = [None if math.isnan(x) else x for x in summary.entropy_before]
    return {**summary._asdict(), "entropy_before": before}


# Options that choose rows of --data.
_OF_DATA = ("split", "subset", "prompt_field", "answer_field", "limit")


def _folder(model: str, config: LookRun, command: str) -> Path:
    if bool(config.prompt) == bool(config.data):
        raise ConfigError(f"oisd {command}: give either --prompt or --data")
    for name in _OF_DATA:
        if config.prompt and getattr(config, name) != getattr(LookRun, name):
            raise ConfigError(f"{option(name)} is for --data, not for --prompt; leave it out")
    for name in ("limit", "max_prompt_tokens", "picture_tokens", "threads"):
        value = getattr(config, name)
        require(value is None or value >= 1, option(name), "at least 1", value)
    for name in ("completion_tokens", "seed"):
        value = getattr(config, name)
        require(value >= 0, option(name), "at least 0", value)
    require_device("--device", config.device)
    folder = command_folder(command, model, config.output_dir)
    drawn = _read_made_of(folder, command)
    if drawn and next(iter(drawn)) != _place(model):
        raise ConfigError(
            f"{folder} holds pictures of {next(iter(drawn))}, not of {_place(model)}; choose "
            f"another --output-dir, or remove the folder"
        )
    return folder


def _place(model: str) -> str:
    """What a model's files stand for: a folder, wherever the command runs, or a name."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _read_made_of(folder: Path, command: str) -> dict[str, Any]:
    """The records of the models that a folder's pictures were made of, the first one's first."""
    try:
        report = json.loads((folder / f"{command}.json").read_text(encoding="utf-8"))
        return dict(report.get("made_of") or {_place(report["model"]): {}})
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}  # no pictures, or none that were finished


def _made_of(models: Sequence[str], folder: Path, command: str) -> dict[str, Any]:
    """Records of the models; says so where one has other weights than the folder's pictures."""
    drawn = _read_made_of(folder, command)
    found = {}
    for model in models:
        place = _place(model)
        found[place] = provenance.refreshed(drawn.get(place, {}), model)
        if drawn.get(place):
            changed = provenance.changed_model(drawn[place], model, found[place])
            if changed:
                print(f"oisd {command}: {model} has changed since ({changed[0]}); drawn again")
    return found


def _load(path: str, config: LookRun) -> Policy:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_named(config.device)
    # Outside autocast, as where it measures, the lens reads float32 parameters.
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
        prompts = token_ids_of(tokenizer, rendered, config.chat_template)
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
        prompts, config.completion_tokens, "--completion-tokens", reads_last=True
    )
    if config.completion_tokens > 0:
        most, rows = config.completion_tokens, range(len(prompts))
        made = policy.sample(prompts, rows, max_completion_tokens=most, seed=config.seed)
        lengths = made.lengths.tolist()
        for prompt, ids, n in zip(prompts, made.ids.tolist(), lengths, strict=True):
            prompt.extend(ids[:n])
    return prompts


def _as_option(remedy: Remedy) -> str:
    """A remedy as a command-line option, or "" where there is none.

    `oisd lens` goes on without attention, and `oisd attention` has nothing else to show.
    """
    has = remedy.option in {field.name for field in fields(LookRun)}
    return f"pass {option(remedy.option)} {remedy.value}" if has else ""


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
