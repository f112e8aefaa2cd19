"""docs/peers.md from the rows of `python -m benchmarks peers`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oisd.jsonl import read_rows

TRL = "TRL GRPOTrainer"
PAGE = Path(__file__).parents[2] / "docs" / "peers.md"
Row = dict[str, Any]

_TEXT = """# Beside other projects

`python -m benchmarks peers` compares the lens, the graders and a training step with those of other
projects, on a CPU. A project that is not installed is named as absent. The page is made of the
latest rows of `benchmarks/results/peers.jsonl`.

```bash
pip install transformer-lens nnsight math-verify trl lm-eval
python -m benchmarks peers                                 # or some of: lens cost graders step
pip install --no-deps verl && pip install ray hydra-core codetiming tensordict==0.10.0
python -m benchmarks peers graders                         # in an environment of verl's own
python -m benchmarks peers --write-docs                    # this page
```

"""
_LENS = """## The logit lens of every layer

Ten architectures, tiny and random, in float32. *Error* is the norm of the difference of our
log-probabilities from theirs, over the norm of theirs without their mean over the vocabulary, at
{tokens}. *Numbers* is the largest relative error of what `LayerLens` itself gives: entropy,
log-probability of the likeliest token, divergence from the final layer. Two neighbouring layers
are at least {apart:.2f} apart on this scale, and the bound is 1e-5.

TransformerLens runs transformers' own modules, so most of its logits are ours to the bit. nnsight
has no lens: its user writes norm and unembedding. Here that code also applies Granite's and
Cohere's factors and Gemma's softcap, which norm and unembedding alone leave out.

"""
_COST = """
## What it costs

GPT-2 small's shape (12 layers, width 768, vocabulary 50,257), random weights, {tokens} tokens, one
thread, float32: the forward pass, and for every layer and token the likeliest token, its
log-probability and the entropy. Ours computes the divergence from the final layer besides. Each run
has a process of its own, and the lenses take turns ({rounds} rounds, medians). The numbers of each
are checked against float64 first.

The time is processor time, because the machine is shared: it leaves out other work on the core, but
not what that work does to caches and memory bandwidth, so the spread stays wide. Memory is the peak
of resident memory beyond model and libraries. Without options TransformerLens returns all
log-probabilities, which take 589 MiB here; with `top_k=1` it returns what we return, less the
divergence. Code inside nnsight's trace does so for one layer at a time.

"""
_STEP = """
## A training step

The arithmetic task's model after its warm-up, 16 prompts x 16 completions of at most 6 tokens,
sampling included, one optimizer step a batch, no KL, one thread, float32: TRL's `GRPOTrainer` and
our trainer on the same prompts and rewards. They take turns ({rounds} rounds, {steps} steps each,
medians with the range from p20 to p80). The learning rate is so small that all sample from the same
policy, and each must find that policy's accuracy, {accuracy:.3f}. A step is counted from the end of
the one before it. Processor time is what to compare: much other work ran, and the clock's time is
mostly waiting for a core. `python -m benchmarks.trl_throughput` is the same measurement by itself.

Completions whose advantage is 0 have no gradient, so our trainer leaves them out of the update;
*dropped* is their share. In the rows "all completions" it computes them, as TRL does.

"""
_GRADERS = """
## Graders

{right} right and {wrong} wrong answers with the verdict of a careful human: the short boxes of
`tests/data/grading.jsonl`. Each grader gets an answer *a* and gold *g* in the form that its
documentation asks for. Our rules were written with these answers in view, theirs were not: the
table shows which forms each grader reads, not how often it errs on completions of a model. Many of
the answers are rare forms on purpose.

verl's and lm-eval's scorers, like our `boxed_string`, compare normalised strings, and refuse what
is written differently by design. `math_dapo` was made for golds that are integers, which have
columns of their own. TRL requires well-formed LaTeX, so `\\frac12` earns nothing there; of the
forms that its gold could take, `$g$` does best.

math-verify's verdicts depend on the version of antlr4. With 4.9.3, which verl needs through
omegaconf, it refuses 592 of these answers; with 4.13.2 it refuses 580. What differs is percentages.

"""
_EXAMPLES = """
Some of the answers; "yes" is a reward:

"""


def read(file: Path) -> list[Row]:
    """The latest row of each part, peer and architecture; absence replaces no measured row.

    Raises ValueError if there is no such file.
    """
    if not file.exists():
        raise ValueError(f"peers: {file} does not exist; `python -m benchmarks peers` writes it")
    rows: dict[tuple[str, ...], Row] = {}
    for row in read_rows(file)[0]:
        keys = ("part", "peer", "lens", "grader", "trainer", "architecture")
        named = tuple(row.get(key, "") for key in keys)
        if "absent" not in row or named not in rows:
            rows[named] = row
    return list(rows.values())


def line(row: Row) -> str:
    """What a row says, for a terminal."""
    name = next(row[key] for key in ("peer", "lens", "trainer", "grader") if row.get(key))
    if "architecture" in row:
        name = f"{name}, {row['architecture']}"
    for state in ("absent", "failed", "wrong"):
        if state in row:
            return f"{name}: {state.upper()}: {row[state]}"
    if row["part"] == "lens":
        verdict = "agrees" if row["agrees"] else "DIFFERS"
        return f"{name}: {verdict}, error {row['error']:.1e}, numbers {row['numbers_error']:.1e}"
    if row["part"] == "cost":
        return f"{name}: {row['seconds']:.2f} s, {row['mib']:,.0f} MiB"
    if row["part"] == "step":
        return f"{name}: {row['processor_s']:.3f} s of the processor, {row['median_s']:.3f} s"
    return (
        f"{name}: accepts {row['wrong_accepted']} of {row['wrong_answers']} wrong answers, refuses "
        f"{row['right_refused']} of {row['right_answers']} right ones"
    )


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def lens_table(rows: Sequence[Row]) -> str:
    """Errors by architecture and peer; an absent peer has one cell that says so."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    found = {(row["peer"], row.get("architecture")): row for row in rows}
    body = []
    for architecture in dict.fromkeys(r["architecture"] for r in rows if "architecture" in r):
        cells = [f"`{architecture}`"]
        for peer in peers:
            row = found.get((peer, architecture), {"absent": ""})
            why = next((key for key in ("absent", "failed") if key in row), None)
            cells += [why, ""] if why else [f"{row['error']:.0e}", f"{row['numbers_error']:.0e}"]
        body.append(cells)
    head = ["architecture"]
    for peer in peers:
        head += [f"{peer}: error", "numbers"]
    return table(head, body)


def cost_table(rows: Sequence[Row]) -> str:
    """Medians with their range, and shares of the two ways of asking TransformerLens."""
    full, top = (
        next((r for r in rows if r["lens"] == name and "seconds" in r), None)
        for name in ("TransformerLens", "TransformerLens, top_k=1")
    )
    body = []
    for row in rows:
        if "seconds" not in row:
            state = next(key for key in ("absent", "failed", "wrong") if key in row)
            body.append([row["lens"], state, "", "", ""])
            continue
        spread = f"{min(row['all_seconds']):.2f} - {max(row['all_seconds']):.2f}"
        cells = [row["lens"], f"{row['seconds']:.2f} s ({spread})", f"{row['mib']:,.0f} MiB"]
        for base in (full, top):
            cells.append(
                f"{row['seconds'] / base['seconds']:.2f} / {row['mib'] / base['mib']:.3f}"
                if base
                else ""
            )
        body.append(cells)
    head = ["", "time (range)", "memory", "x TransformerLens: time / memory", "x with `top_k=1`"]
    return table(head, body)


def step_table(rows: Sequence[Row]) -> str:
    """Processor and clock time of a step, and TRL's processor time over it."""
    peer = next((row for row in rows if row["trainer"] == TRL and "median_s" in row), None)
    body = []
    for row in rows:
        if "median_s" not in row:
            state = next(key for key in ("absent", "wrong") if key in row)
            body.append([row["trainer"], state, "", "", "", ""])
            continue
        kinds = (("processor_s", "processor_p20_s", "processor_p80_s"),
                 ("median_s", "p20_s", "p80_s"))  # fmt: skip
        times = ["{:.3f} s ({:.3f} - {:.3f})".format(*(row[key] for key in kind)) for kind in kinds]
        ratio = f"{peer['processor_s'] / row['processor_s']:.2f}" if peer else ""
        body.append(
            [row["trainer"], *times, ratio, f"{row['reward']:.3f}", f"{row['dropped']:.2f}"]
        )
    head = ["trainer", "processor time", "time", "times as fast as TRL", "reward", "dropped"]
    return table(head, body)


def grader_table(rows: Sequence[Row]) -> str:
    keys = ("wrong_accepted", "right_refused", "integer_wrong_accepted", "integer_right_refused")
    body = [
        [row["grader"], row["form"], *(str(row[key]) for key in keys)]
        if "absent" not in row
        else [row["grader"], "absent", "", "", "", ""]
        for row in rows
    ]
    head = ["grader", "form", "wrong accepted", "right refused"]
    return table([*head, "integer golds: wrong accepted", "right refused"], body)


def example_table(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if "absent" not in row]
    said = [{(e[0], e[1]): e[3] for e in row["examples"]} for row in rows]
    body = []
    for right in (False, True):
        for box, gold, truth, _ in rows[0]["examples"]:
            if truth is right:
                cells = [f"`{box}`", f"`{gold}`", "right" if right else "wrong"]
                body.append(cells + ["yes" if each[box, gold] else "no" for each in said])
    return table(["answer", "gold", "human", *(row["grader"] for row in rows)], body)


def made_of(rows: Sequence[Row]) -> str:
    """Machine, dates and versions of the rows, in a sentence or two."""
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    shown = ("torch", "transformers", "transformer-lens", "nnsight", "math-verify", "trl", "verl",
             "lm-eval")  # fmt: skip
    listed = ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
    dates = sorted({row["date"] for row in rows})
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return f"Measured {span} on one core of {devices}, while other work ran: {listed}.\n\n"


def text(rows: Sequence[Row]) -> str:
    """The page; a part without rows is left out."""
    lens, cost, graders, steps = (
        [row for row in rows if row["part"] == part] for part in ("lens", "cost", "grader", "step")
    )
    out = _TEXT + made_of(rows)
    if any("error" in row for row in lens):
        apart = min(row["layers_apart"] for row in lens if "error" in row)
        out += _LENS.format(tokens="24 tokens", apart=apart) + lens_table(lens)
    timed = [row for row in cost if "seconds" in row]
    if timed:
        rounds = len(timed[0]["all_seconds"])
        out += _COST.format(tokens=timed[0]["tokens"], rounds=rounds) + cost_table(cost)
    trained = [row for row in steps if "median_s" in row]
    if trained:
        first = trained[0]
        each = first["steps"] // first["rounds"]
        out += _STEP.format(rounds=first["rounds"], steps=each, accuracy=first["start_accuracy"])
        out += step_table(steps)
    counted = [row for row in graders if "absent" not in row]
    if counted:
        right, wrong = (f"{counted[0][key]:,}" for key in ("right_answers", "wrong_answers"))
        out += _GRADERS.format(right=right, wrong=wrong)
        out += grader_table(graders) + _EXAMPLES + example_table(graders)
    return out


def write(rows: Sequence[Row], to: Path = PAGE) -> None:
    to.write_text(text(rows), encoding="utf-8")
