"""The lens of every layer over a text, against the projections that it cannot avoid.

    python -m benchmarks.lens_picture [--layers 36] [--tokens 512] [--width 2560] [--boundary]
                                      [--out benchmarks/results]

A random model (Qwen3's layers, small feed-forward blocks, a vocabulary of 32,000). In turns, in the
same process: the model's forward; L bare matmuls of [T, D] x [D, V] from its own hidden states; and
the lens as `oisd lens` computes it for its picture, without the boundary layer and, with
`--boundary`, with it, which takes L more projections. The forward is subtracted from the lens's
time. Times are medians of the rounds, in processor time, which excludes other processes on a busy
core. Memory: the peak of resident memory over T / 4 and over T tokens, less what was there before;
logits of all layers would take 4 L V bytes a token.

The numbers of some layers and tokens are checked in float64; if they are off, no time is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure.machine import append, describe
from benchmarks.measure.memory import resident_peak, touch_libraries
from oisd.lens import LayerLens, Lens
from oisd_kernels import reference

VOCABULARY, SHOWN = 32_000, 24
BOUND = 1.2


def main() -> None:
    """Measure, print a line for each, append them to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--boundary", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for lens_picture.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=given.width, intermediate_size=1024,
            num_hidden_layers=given.layers, num_attention_heads=8, num_key_value_heads=2,
            head_dim=64, initializer_range=0.05,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(VOCABULARY, (given.tokens,)).tolist()
    states = hidden_states(model, ids)
    peaks = memory(model, ids)
    result = {
        "layers": given.layers, "tokens": given.tokens, "width": given.width,
        "vocabulary": VOCABULARY, "rounds": given.rounds,
        **seconds(model, ids, states, given.rounds, given.boundary), **peaks,
    }  # fmt: skip
    for name in result:
        if name.endswith("_s"):
            print(f"{name:<16}{result[name]:8.3f}")
    print(f"picture / projections           {result['picture_ratio']:.3f}  (bar {BOUND})")
    if given.boundary:
        print(f"with the boundary / twice those {result['whole_ratio']:.3f}")
    print("peak MiB over T / 4 and T tokens {peak_quarter_mib:.0f}, {peak_mib:.0f}".format(**peaks))
    if given.out:
        append(given.out / "lens_picture.jsonl", [result], describe("cpu", given.threads))


@torch.no_grad()
def hidden_states(model: Qwen3ForCausalLM, ids: list[int]) -> list[torch.Tensor]:
    """What the unembedding reads for each layer, [T, D]."""
    out = model.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    states = out.hidden_states or ()
    return [model.model.norm(h[0]) for h in states[1:-1]] + [states[-1][0]]


def check(model: Qwen3ForCausalLM, states: list[torch.Tensor], found: Lens) -> None:
    """Raise SystemExit if the lens differs from float64 on some layers and tokens."""
    weight, tokens = model.lm_head.weight.detach().double(), slice(-SHOWN, None)
    layers = [0, len(states) // 2, len(states) - 2, len(states) - 1]
    seen = torch.stack([states[layer][tokens] for layer in layers]).double()
    divergence, stats = reference.logit_lens_divergence(seen, seen[-1], weight, return_stats=True)
    likeliest, top = (seen @ weight.T).softmax(-1).max(-1)
    for name, ours, wanted in (
        ("entropy", found.entropy[layers, tokens], stats.student_entropy),
        ("divergence", found.divergence[layers, tokens], divergence),
        ("probability", found.probability[layers], likeliest),
    ):
        for layer, a, b in zip(layers, ours, wanted, strict=True):
            error = ((a - b).norm() / b.norm().clamp(min=1e-9)).item()
            if not error < 1e-4 and b.norm() > 1e-6:
                raise SystemExit(f"WRONG: {name} of layer {layer + 1} is {error:.1e} off")
    for layer, wanted in zip(layers, top, strict=True):
        if not torch.equal(found.top[layer], wanted):
            raise SystemExit(f"WRONG: top tokens of layer {layer + 1}")


def seconds(
    model: Qwen3ForCausalLM,
    ids: list[int],
    states: list[torch.Tensor],
    rounds: int,
    boundary: bool,
) -> dict[str, float]:
    """Medians over the rounds, and those of the ratios within a round."""
    picture, whole = LayerLens(model, boundary=False), LayerLens(model)
    weight = model.lm_head.weight.detach()
    out = torch.empty(len(ids), VOCABULARY)

    @torch.no_grad()
    def forward() -> object:
        return model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def projections() -> object:
        for state in states:
            torch.mm(state, weight.T, out=out)
        return out

    runs = {
        "forward_s": forward,
        "projections_s": projections,
        "picture_s": lambda: picture(ids, SHOWN),
    }
    if boundary:
        runs["whole_s"] = lambda: whole(ids, SHOWN)
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            seen = run()
            spent[name].append(time.process_time() - start)
            if number == 0 and isinstance(seen, Lens):
                check(model, states, seen)
    found = {name: statistics.median(times) for name, times in spent.items()}
    for share, name in ((1, "picture"), (2, "whole")):
        if f"{name}_s" in spent:
            turns = zip(
                *(spent[k] for k in ("forward_s", "projections_s", f"{name}_s")), strict=True
            )
            ratios = [(lens - forward) / (share * bare) for forward, bare, lens in turns]
            found[f"{name}_ratio"] = statistics.median(ratios)
    return found


def memory(model: Qwen3ForCausalLM, ids: list[int]) -> dict[str, float]:
    """Peak resident MiB of the lens over a quarter of the text and over all of it.

    It includes the layers' hidden states, 4 L T D bytes in each of a few copies.
    """
    lens = LayerLens(model, boundary=False)
    touch_libraries()
    found = []
    for part in (ids[: len(ids) // 4], ids):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed by earlier work hides the peak
        found.append(resident_peak(lambda part=part: lens(part, SHOWN)))
    return {"peak_quarter_mib": found[0], "peak_mib": found[1]}


if __name__ == "__main__":
    main()
