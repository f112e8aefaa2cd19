"""The lens of every layer over a text, against the projections that it cannot do without.

    python -m benchmarks.lens_picture [--layers 36] [--tokens 512] [--width 2560] [--boundary]
                                      [--out benchmarks/results]

A random model (Qwen3's layers, small feed-forward blocks, a vocabulary of 32,000). In turns, in the
same process: the model's forward; L bare matmuls of [T, D] x [D, V] from its own hidden states; the
lens as `oisd lens` looks at the text of its picture, without the boundary layer and, if asked for,
with it, which takes L further projections. The forward is taken off the lens's time. Medians of the
rounds, in processor time, which leaves out what other processes take of a busy core. Memory: the
peak of resident memory over T / 4 and over T tokens, less what was there before; logits of all
layers would be 4 L V bytes a token.

The numbers of some layers and tokens are held to float64; no time is printed where they are off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import machine
from benchmarks.measure.memory import MIB, _field, _resident, _touch_libraries
from oisd.lens import LayerLens, Lens

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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=arguments.width, intermediate_size=1024,
            num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=2,
            head_dim=64, initializer_range=0.05,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(VOCABULARY, (arguments.tokens,)).tolist()
    states = hidden_states(model, ids)
    peak = memory(model, ids)
    result = {
        "layers": arguments.layers, "tokens": arguments.tokens, "width": arguments.width,
        "vocabulary": VOCABULARY, "rounds": arguments.rounds,
        **seconds(model, ids, states, arguments.rounds, arguments.boundary), **peak,
        **machine.describe("cpu", arguments.threads),
    }  # fmt: skip
    for name in result:
        if name.endswith("_s"):
            print(f"{name:<16}{result[name]:8.3f}")
    print(f"picture / projections           {result['picture_ratio']:.3f}  (bar {BOUND})")
    if arguments.boundary:
        print(f"with the boundary / twice those {result['whole_ratio']:.3f}")
    print(f"peak MiB over T / 4 and T tokens {result['peak_quarter_mib']:.0f}, "
          f"{result['peak_mib']:.0f}")  # fmt: skip
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "lens_picture.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


@torch.no_grad()
def hidden_states(model: Qwen3ForCausalLM, ids: list[int]) -> list[torch.Tensor]:
    """What the unembedding reads for each layer, [T, D]."""
    out = model.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    states = out.hidden_states or ()
    return [model.model.norm(h[0]) for h in states[1:-1]] + [states[-1][0]]


def check(model: Qwen3ForCausalLM, states: list[torch.Tensor], found: Lens) -> None:
    """Raise SystemExit where the lens is not what float64 says, on some layers and tokens."""
    weight, tokens = model.lm_head.weight.detach().double(), slice(-SHOWN, None)
    final = (states[-1][tokens].double() @ weight.T).log_softmax(-1)
    for layer in (0, len(states) // 2, len(states) - 2, len(states) - 1):
        lq = (states[layer][tokens].double() @ weight.T).log_softmax(-1)
        m = torch.logaddexp(lq, final) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        js = ((final.exp() * (final - m)).sum(-1) + (lq.exp() * (lq - m)).sum(-1)) / 2
        wanted = (lq.exp() * -lq).sum(-1), js, lq.amax(-1).exp()
        ours = found.entropy[layer, tokens], found.divergence[layer, tokens], found.probability
        for name, a, b in zip(
            ("entropy", "divergence", "probability"), (*ours[:2], ours[2][layer]), wanted,
            strict=True,
        ):  # fmt: skip
            error = ((a - b).norm() / b.norm().clamp(min=1e-9)).item()
            if not error < 1e-4 and b.norm() > 1e-6:
                raise SystemExit(f"WRONG: {name} of layer {layer + 1} is {error:.1e} off")
        if not torch.equal(found.top[layer], lq.argmax(-1)):
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
        turns = zip(
            spent["forward_s"], spent["projections_s"], spent.get(f"{name}_s", []), strict=False
        )
        ratios = [(lens - forward) / (share * bare) for forward, bare, lens in turns]
        if ratios:
            found[f"{name}_ratio"] = statistics.median(ratios)
    return found


def memory(model: Qwen3ForCausalLM, ids: list[int]) -> dict[str, float]:
    """Peak resident MiB of the lens over a quarter of the text and all of it.

    The layers' hidden states, 4 L T D bytes in each of a few copies, are in it.
    """
    lens = LayerLens(model, boundary=False)
    _touch_libraries()
    found = []
    for part in (ids[: len(ids) // 4], ids):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or the peak hides in what earlier work has freed
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        lens(part, SHOWN)
        found.append((1024 * _field("/proc/self/status", "VmHWM") - before) / MIB)
    return {"peak_quarter_mib": found[0], "peak_mib": found[1]}


if __name__ == "__main__":
    main()
