"""The logit lens of every layer, ours and other projects', on the same random models.

A lens is a function of a model and its tokens [T] that gives the log-probabilities of each layer,
[L, T, V], layers from the first to the last. Written against TransformerLens 4.3 and nnsight 0.8.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases.peers import missing
from benchmarks.models.sizes import tiny_config, tiny_model
from oisd.lens import LayerLens
from oisd_kernels import reference

BOUND = 1e-5
TOKENS = 24
# By name in the table: the type that transformers knows, and settings that make factors and
# softcaps matter.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 5.0}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "phi3": ("phi3", {}),
    "gemma3": ("gemma3_text", {}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere2": ("cohere2", {"logit_scale": 0.5}),
    "qwen3_moe": ("qwen3_moe", {}),
}
Lens = Callable[[nn.Module, Tensor], Tensor]
Row = dict[str, Any]


class Statistics(NamedTuple):
    """What a lens says of each layer and token, [L, T] each; entropy and log-probability in
    nats."""

    top: Tensor
    logprob: Tensor
    entropy: Tensor


def statistics(logprob: Tensor) -> Statistics:
    """Of log-probabilities [..., V]."""
    best, top = logprob.max(-1)
    return Statistics(top, best, -(logprob.exp() * logprob).sum(-1))


class Absent(Exception):
    """A peer that is not installed or cannot be imported; says why."""


def load(module: str, package: str) -> Any:
    """A peer's module; raises Absent."""
    try:
        why = missing(module, package)  # this imports the package of a submodule
        if why is None:
            return importlib.import_module(module)
    except Exception as error:  # whatever a peer's own imports raise
        first = (str(error).splitlines() or [""])[0]
        raise Absent(f"{package} cannot be imported: {type(error).__name__}: {first}") from error
    raise Absent(why)


def model_of(architecture: str) -> nn.Module:
    """A random model, the same each time; eager attention, since SDPA ignores Gemma 2's softcap."""
    kind, settings = ARCHITECTURES[architecture]
    config = tiny_config(kind, **settings)
    return tiny_model(config, attn_implementation="eager").eval()


@torch.no_grad()
def ours(model: nn.Module, ids: Tensor) -> Tensor:
    """From the states that LayerLens reads."""
    taps = LayerLens(model, boundary=False).taps
    with taps:
        model(input_ids=ids[None], use_cache=False)
        states = torch.cat([taps.student_hidden()[:, 0], taps.final_hidden()])
        head = taps.unembedding
    logits = nn.functional.linear(states, head.weight, head.bias)
    if head.logit_softcap is not None:
        logits = head.logit_softcap * (logits / head.logit_softcap).tanh()
    return logits.log_softmax(-1)


def bridge(model: Any) -> Any:
    """A TransformerLens model around a transformers model, which it changes; raises Absent."""
    lens = load("transformer_lens.model_bridge", "transformer-lens")
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # It reads the config from a folder or hub, and wants a tokenizer, which the lens of token
    # numbers does not use.
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    vocabulary = {token: number for number, token in enumerate(special.values())}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        made = lens.TransformerBridge.boot_transformers(
            folder, device="cpu", hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder)
        )
    return made.eval()


def transformer_lens(model: nn.Module, ids: Tensor) -> Tensor:
    """Its `logit_lens` at all positions, without the entry of the embedding."""
    analysis = load("transformer_lens.tools.analysis", "transformer-lens")
    return analysis.logit_lens(
        bridge(model), ids[None], positions=None, return_type="log_probs"
    ).values[1:, 0]


def traced(model: Any, ids: Tensor, keep: Callable[[Tensor], Any]) -> list[Any]:
    """What `keep` makes of each layer's log-probabilities [T, V] inside nnsight's trace.

    nnsight has no lens: its user writes norm and unembedding, and what the model does to the
    logits after them.
    """
    nnsight = load("nnsight", "nnsight")
    seen, config = nnsight.NNsight(model), model.config
    is_gpt2 = config.model_type == "gpt2"
    found: list[Any] = []
    with torch.no_grad(), seen.trace(input_ids=ids[None], use_cache=False):
        layers = seen.transformer.h if is_gpt2 else seen.model.layers
        norm = seen.transformer.ln_f if is_gpt2 else seen.model.norm
        for layer in layers:
            out = layer.output
            hidden = out[0] if isinstance(out, tuple) else out
            logits = as_the_model_says(config, seen.lm_head(norm(hidden))[0])
            found.append(keep(logits.log_softmax(-1)))
    return found


def as_the_model_says(config: Any, logits: Tensor) -> Tensor:
    """The factor and softcap that follow the unembedding."""
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * (logits / cap).tanh()
    return logits


def nnsight(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.stack(traced(model, ids, lambda logprob: logprob))


PEERS: dict[str, Lens] = {"TransformerLens": transformer_lens, "nnsight": nnsight}


def apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference of log-probabilities over that of their spread over the
    vocabulary."""
    spread = wanted - wanted.mean(-1, keepdim=True)
    return ((found - wanted).norm() / spread.norm()).item()


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def compare(architecture: str, lens: Lens, own: Lens = ours) -> Row:
    """Errors of our lens against another on one architecture; raises Absent.

    `error` is of the log-probabilities, `numbers_error` the largest relative error of entropy,
    likeliest token's log-probability and divergence as `LayerLens` gives them. `layers_apart` is
    the smallest distance of two neighbouring layers, which a lens of the wrong layer would show.
    """
    model = model_of(architecture)
    ids = torch.randint(3, 131, (TOKENS,), generator=torch.Generator().manual_seed(0))
    found, look = own(model, ids), LayerLens(model, boundary=False)(ids.tolist(), TOKENS)
    wanted = lens(model_of(architecture), ids).float()
    numbers = statistics(wanted)
    # Log-probabilities as hidden states: under the identity as unembedding they are logits.
    divergence = reference.logit_lens_divergence(
        wanted[:-1].double(), wanted[-1].double(), torch.eye(wanted.shape[-1]).double()
    )
    row = {
        "architecture": architecture,
        "layers": len(wanted),
        "error": apart(found, wanted),
        "numbers_error": max(
            relative(look.entropy, numbers.entropy),
            relative(look.probability.log(), numbers.logprob),
            relative(look.divergence[:-1], divergence.float()),
        ),
        "same_top": (look.top == numbers.top).double().mean().item(),
        "layers_apart": min(apart(a, b) for a, b in zip(wanted[:-1], wanted[1:], strict=True)),
    }
    row["agrees"] = row["error"] < BOUND and row["numbers_error"] < BOUND
    return row


def agreement(peers: dict[str, Lens] = PEERS, own: Lens = ours) -> Iterator[Row]:
    """A row for each peer and architecture, or one that says why the peer is absent."""
    for name, lens in peers.items():
        for architecture in ARCHITECTURES:
            row: Row = {"part": "lens", "peer": name}
            try:
                yield row | compare(architecture, lens, own)
            except Absent as absent:
                yield row | {"absent": str(absent)}
                break
            except Exception as error:  # a peer that cannot read this model says so
                first = (str(error).splitlines() or [""])[0][:200]
                yield row | {
                    "architecture": architecture,
                    "failed": f"{type(error).__name__}: {first}",
                    "agrees": False,
                }
