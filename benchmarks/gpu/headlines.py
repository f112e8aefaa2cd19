"""The ratios that decide the bars: each case's implementations checked, then timed in turns.

What is checked is on disk before anything is timed. An implementation that ends its process is
left out of the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

from benchmarks.cases import aligned, attention, head, lens
from benchmarks.cases.case import Bar, Case, Inputs, Result, Run
from benchmarks.cases.shapes import ATTENTIONS, HEADS
from benchmarks.gpu import results
from benchmarks.gpu.place import Place
from benchmarks.gpu.results import Row
from benchmarks.gpu.worker import Work
from benchmarks.runner import Listener, Options, run_case
from oisd_kernels.lens.chunked import head_pass

OURS = ("ours", "OISD", "GRPO")
VERDICTS = {
    "": "checked", "ok": results.PASSED, "wrong": results.WRONG, "failed": results.FAILED,
    "out of memory": results.MEMORY, "absent": results.ABSENT, "skipped": results.SKIPPED,
}  # fmt: skip
RIVALS = ("Liger fused_linear_jsd", "Liger fused_linear_jsd, CuTe", "TRL chunked divergence")
# In a step of their own: what they do when they are imported, and compile, costs no other step.
OTHERS = ("Liger fused_linear_jsd", "ORDA skew_js", "Unsloth fused_linear_jsd")
TOKENS = 8192


class Told(Listener):
    """Puts down at once what a case has come to."""

    def __init__(self, work: Work, case: Case):
        self.work, self.case = work, case
        ended = work.results.rows("check", work.task.step)
        self.ended = {row["name"] for row in ended}

    def name(self, what: str) -> str:
        return f"{self.case.name}: {what}"

    def begins(self, what: str) -> bool:
        return self.work.begin(self.name(what), self.ended)

    def checked(self, row: Row) -> None:
        self.put(row)

    def put(self, row: Row) -> None:
        """Only what is ours can make the step wrong."""
        verdict = VERDICTS[row["status"]]
        if not row["implementation"].startswith(OURS) and verdict in results.BAD:
            verdict = f"rival {row['status']}"
        rest = {key: value for key, value in row.items() if key != "kind"}
        self.work.append("measurement", self.name(row["implementation"]), verdict, **rest)


def timed(case: Case, work: Work) -> None:
    """Run a case and put down its rows."""
    place = work.place
    options = Options(
        out="", device=place.device, quick=True, rounds=place.rounds,
        seconds_per_case=place.seconds, peaks=False,
    )  # fmt: skip
    told = Told(work, case)
    rows = run_case(case, options, told)
    if any("no longer answers" in row["reason"] for row in rows):
        os._exit(1)  # the watching process writes down what this one was at
    for row in rows:
        told.put(row)


def chosen(case: Case, names: Sequence[str]) -> Case:
    """The case with these implementations alone; nothing is compiled by torch."""
    kept = [i for i in case.implementations if i.name in names]
    assert len(kept) == len(names), f"{case.name} has not all of {names}"
    return replace(case, implementations=kept, compiled=False)


def lens_case(place: Place, layers: int) -> Case:
    bars = [Bar("ours: chunked", "median_s", 1 / (0.75 if layers == 1 else 0.8), "roofline")]
    rivals = ["ours: tiled", "eager"] if layers == 1 else ["eager"]
    if layers == 1:
        bars.append(Bar("ours: chunked", "workspace_mib", 1.5e9 / 2**20))
    for rival in RIVALS:
        bars.append(Bar("ours: chunked", "median_s", 0.5, rival))
        bars.append(Bar("ours: chunked", "peak_mib", 1.0, rival))
    if place.rehearsal:
        rivals = ["eager", RIVALS[0]]
        shape = lens.Shape(place.head, "rehearsal", layers, 2 * place.tokens, bars=tuple(bars),
                           rivals=tuple(rivals))  # fmt: skip
    else:
        shape = lens.Shape(HEADS["qwen3-4b"], "qwen3-4b", layers, TOKENS, bars=tuple(bars),
                           rivals=(*rivals, *RIVALS))  # fmt: skip
    return replace(lens.case(shape, place.device, place.dtype), compiled=False)


def others_case(place: Place) -> Case:
    """Further projects at S = 1, one of the headline's among them, so that they can be compared."""
    head, tokens = (place.head, 2 * place.tokens) if place.rehearsal else (place.head, TOKENS)
    model = "rehearsal" if place.rehearsal else "qwen3-4b"
    bars = [Bar("ours: chunked", metric, limit, rival) for rival in OTHERS[1:]
            for metric, limit in (("median_s", 0.5), ("peak_mib", 1.0))]  # fmt: skip
    shape = lens.Shape(head, f"{model}, others", 1, tokens, bars=tuple(bars), rivals=OTHERS)
    return replace(lens.case(shape, place.device, place.dtype), compiled=False)


def rows_case(place: Place, layers: int) -> Case:
    """Both forms of the row kernels, in turns."""
    case = chosen(lens_case(place, layers), ["ours: chunked"])
    (whole,) = case.implementations
    split = replace(whole, name="ours: split rows", make=partial(with_split_rows, whole.make))
    # A gain below 3 % is not worth a second form.
    bars = (Bar(split.name, "median_s", 0.97, whole.name),)
    return replace(case, name=f"{case.name}/rows", implementations=[whole, split], bars=bars)


def with_split_rows(make: Callable[[Inputs], Run], inputs: Inputs) -> Run:
    run = make(inputs)

    def split() -> Result:
        with mock.patch.object(head_pass, "SPLIT_ROWS", True):
            return run()

    return split


def backward_case(place: Place) -> Case:
    """Of a student layer's attention."""
    names = [f"ours: {kind}" for kind in ("plain", "with alignment", "separate")]
    names += ["SDPA flash", "SDPA cuDNN"]
    case = aligned.case(*_attention(place), place.device, frozenset(), place.dtype)
    return chosen(case, names)


def attention_case(place: Place) -> Case:
    case = attention.attention(*_attention(place), place.device, frozenset())
    bars = tuple(
        Bar("ours: flash_attention", "median_s", 1 / 0.8, name)
        for name in ("SDPA flash", "SDPA cuDNN")
    )
    names = ["ours: flash_attention", "SDPA flash", "SDPA cuDNN", "flash-attn 2"]
    return replace(chosen(case, names), bars=bars)


def _attention(place: Place):
    if place.rehearsal:
        return "rehearsal", place.attention, 24
    return "qwen3-4b", ATTENTIONS["qwen3-4b"], TOKENS


def step_case(place: Place) -> Case:
    """A training step of Qwen3-4B's shape, one student layer."""
    from benchmarks.cases import step  # with the trainer, which imports transformers

    names = ["GRPO", "OISD ours, separate", "OISD ours, attention fused", "OISD eager"]
    tiny = step.Model("rehearsal", 3, 32, 48, 4, 2, 16, 211, 1)
    model, length = (tiny, 8) if place.rehearsal else (step.QWEN3_4B, 4096)
    case = step.case(model, 1, length, False, place.device, frozenset())
    # In this order, so that what a limit cuts off is eager.
    ranked = sorted(case.implementations, key=lambda i: i.name == "OISD eager")
    case = chosen(replace(case, implementations=ranked), names)
    return replace(case, check_inputs=None) if place.rehearsal else case


def head_case(place: Place) -> Case:
    if place.rehearsal:
        case = head.policy("rehearsal", place.head, 1, place.tokens, "cpu", frozenset())
    else:
        case = head.policy("qwen3-4b", HEADS["qwen3-4b"], 1, TOKENS, "cuda", frozenset())
    return chosen(case, ["ours: policy_head", "ours: two calls", "eager"])


def logprob_case(place: Place) -> Case:
    if place.rehearsal:
        case = head.logprob("rehearsal", place.head, place.tokens, "cpu", frozenset())
        return chosen(case, ["ours: chunked", "eager"])
    case = head.logprob("qwen3-4b", HEADS["qwen3-4b"], TOKENS, "cuda", frozenset())
    return chosen(case, ["ours: chunked", "ours: tiled", "eager", "Liger fused linear CE",
                         "TRL chunked log-prob"])  # fmt: skip


def divergence_case(place: Place) -> Case:
    case = attention.divergence(*_attention(place), place.device, frozenset())
    names = ["ours: torch"] if place.rehearsal else ["ours: triton"]
    return chosen(case, [*names, "eager"])


def short_lens_case(place: Place) -> Case:
    """What a user with short completions pays."""
    model, shape = ("rehearsal", place.head) if place.rehearsal else ("qwen3-4b", place.head)
    tokens = place.tokens if place.rehearsal else 1024
    found = lens.Shape(shape, model, 1, tokens, rivals=("eager",))
    return replace(lens.case(found, place.device, place.dtype), compiled=False)


def _step(make: Callable[[Place], Case]) -> Callable[[Work], None]:
    return lambda work: timed(make(work.place), work)


lens_one, lens_four = (_step(partial(lens_case, layers=layers)) for layers in (1, 4))
backward, plain = _step(backward_case), _step(attention_case)
step, policy_head = _step(step_case), _step(head_case)
logprob, divergence = _step(logprob_case), _step(divergence_case)
short_lens, others = _step(short_lens_case), _step(others_case)


def split_rows(work: Work) -> None:
    for layers in (1,) if work.place.rehearsal else (1, 4):
        timed(rows_case(work.place, layers), work)
