"""Time and memory of the lens of every layer at GPT-2 small's shape, each in its own process.

    python -m benchmarks.peers.cost NAME FILE

measures one lens and writes what it found to FILE; `measure` runs such processes in turns. Random
weights; 256 tokens. Time is the processor time of one call after one of a few tokens and one whose
memory was taken: the forward pass, and for every layer and token the likeliest token, its
log-probability and the entropy. It leaves out other processes on the core, but not what they do to
caches and memory bandwidth. Memory is the peak of resident memory less what was there before.
"""

from __future__ import annotations

import ctypes
import gc
import statistics as middle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.machine import ROOT
from benchmarks.measure.memory import resident_peak, touch_libraries
from benchmarks.peers import lenses
from benchmarks.peers.lenses import Absent, Row, Statistics
from oisd.lens import LayerLens

TOKENS, FEW = 256, 8
BOUND = 1e-4  # relative, against float64
Measure = Callable[[Tensor], Any]


def model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.05)).eval()


def token_ids() -> Tensor:
    return torch.randint(50257, (TOKENS,), generator=torch.Generator().manual_seed(0))


def ours() -> Measure:
    lens = LayerLens(model(), boundary=False)

    def run(ids: Tensor) -> Statistics:
        look = lens(ids.tolist(), len(ids))
        return Statistics(look.top, look.probability.log(), look.entropy)

    return run


def _transformer_lens(**options: Any) -> tuple[Callable[[Tensor], Any], int]:
    logit_lens = lenses.load("transformer_lens.tools.analysis", "transformer-lens").logit_lens
    base = model()
    made, layers = lenses.bridge(base), base.config.n_layer
    options = dict(positions=None, layers=range(1, layers + 1), return_type="log_probs") | options
    return lambda ids: logit_lens(made, ids[None], **options), layers


def transformer_lens() -> Measure:
    """All log-probabilities, as its `logit_lens` gives them unless asked for less."""
    look, _ = _transformer_lens()

    def run(ids: Tensor) -> Statistics:
        found = look(ids)
        best, top = found.values[:, 0].max(-1)
        return Statistics(top, best, found.readout.entropy[:, 0])

    return run


def transformer_lens_top() -> Measure:
    """The likeliest token and the entropy alone, which is what we compute, less the divergence."""
    look, _ = _transformer_lens(top_k=1)

    def run(ids: Tensor) -> Statistics:
        read = look(ids).readout
        return Statistics(read.top_ids[:, 0, :, 0], read.values[:, 0, :, 0], read.entropy[:, 0])

    return run


def nnsight() -> Measure:
    lenses.load("nnsight", "nnsight")
    base = model()

    def run(ids: Tensor) -> Statistics:
        found = lenses.traced(base, ids, lenses.statistics)
        return Statistics(*map(torch.stack, zip(*found, strict=True)))

    return run


@torch.no_grad()
def projections() -> Measure:
    """The matmuls alone: L times [T, D] x [D, V]."""
    base = model()
    weight, layers = base.lm_head.weight.detach(), base.config.n_layer
    states = torch.randn(layers, TOKENS, base.config.n_embd)

    def run(ids: Tensor) -> None:
        out = torch.empty(len(ids), len(weight))
        for state in states:
            torch.mm(state[: len(ids)], weight.T, out=out)

    return run


@torch.no_grad()
def exact() -> Statistics:
    """In float64."""
    base = model().double()
    out = base.transformer(token_ids()[None], output_hidden_states=True, use_cache=False)
    states = [base.transformer.ln_f(h[0]) for h in out.hidden_states[1:-1]]
    each = [
        lenses.statistics((state @ base.lm_head.weight.T).log_softmax(-1))
        for state in (*states, out.hidden_states[-1][0])
    ]
    return Statistics(*map(torch.stack, zip(*each, strict=True)))


LENSES: dict[str, Callable[[], Measure]] = {
    "ours": ours,
    "TransformerLens": transformer_lens,
    "TransformerLens, top_k=1": transformer_lens_top,
    "nnsight": nnsight,
    "projections alone": projections,
}


def work(name: str) -> dict[str, Any]:
    """In this process: seconds, MiB and statistics of one lens, or why it is absent."""
    torch.set_num_threads(1)
    if name == "exact":
        return {"statistics": tuple(exact())}
    try:
        run = LENSES[name]()
    except Absent as absent:
        return {"absent": str(absent)}
    ids, found = token_ids(), []
    run(ids[:FEW])
    touch_libraries()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed by earlier work hides the peak
    mib = resident_peak(lambda: found.append(run(ids)))
    start = time.process_time()
    run(ids)
    seconds, said = time.process_time() - start, found[0]
    return {"seconds": seconds, "mib": mib, "statistics": said and tuple(said)}


def in_a_process(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.pt"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.cost", name, str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"failed": last[:300]}
        found = torch.load(file)
    if statistics := found.get("statistics"):
        found["statistics"] = Statistics(*statistics)
    return found


def error(found: Statistics, wanted: Statistics) -> float:
    """Relative; infinite if a likeliest token is not within rounding of the likeliest."""
    if found.top.shape != wanted.top.shape:
        return float("inf")
    if (found.top != wanted.top).double().mean() > 1e-3:  # ties within float32's rounding
        return float("inf")
    return max(
        lenses.relative(found.logprob.double(), wanted.logprob),
        lenses.relative(found.entropy.double(), wanted.entropy),
    )


def measure(
    rounds: int,
    names: Sequence[str] = tuple(LENSES),
    run: Callable[[str], dict[str, Any]] = in_a_process,
    say: Callable[[str], None] = print,
) -> Iterator[Row]:
    """A row for each lens: medians over the rounds, and ratios to TransformerLens's default.

    A lens that is wrong has an error and no times.
    """
    wanted = run("exact")["statistics"]
    spent: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, float] = {}
    out: dict[str, Row] = {}
    for turn in range(rounds):
        for name in names:
            if name in out:
                continue
            found = run(name)
            if why := {key: found[key] for key in ("absent", "failed") if key in found}:
                out[name] = why
                continue
            if found["statistics"] is not None:
                errors[name] = max(errors.get(name, 0.0), error(found["statistics"], wanted))
            spent[name].append(found["seconds"])
            peaks[name].append(found["mib"])
            say(f"{turn + 1}/{rounds} {name}: {found['seconds']:.2f} s, {found['mib']:,.0f} MiB")
    for name in names:
        row: Row = {"part": "cost", "lens": name, "tokens": TOKENS, **out.get(name, {})}
        if name not in out and not errors.get(name, 0.0) < BOUND:
            row |= {"wrong": f"{errors[name]:.1e} off"}
        elif name not in out:
            row |= {
                "seconds": middle.median(spent[name]),
                "mib": middle.median(peaks[name]),
                "all_seconds": [round(s, 3) for s in spent[name]],
                "all_mib": [round(m, 1) for m in peaks[name]],
                "error": errors.get(name),
            }
        yield row


if __name__ == "__main__":
    torch.save(work(sys.argv[1]), sys.argv[2])
