"""What only a GPU can answer beside values: aliased outputs, rounding in place, waits, repetition.

Letters: S student layers, N tokens, R rows, D width, V vocabulary.
"""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.case import Bound, leaves_of, seeded
from benchmarks.gpu import attention_checks, lens_checks
from benchmarks.gpu.attention_checks import divergence, flash, other_width
from benchmarks.gpu.lens_checks import lens, logprob
from benchmarks.gpu.packages import c_compiler
from benchmarks.gpu.place import Place
from benchmarks.gpu.worker import Check, Outcome, Work, Wrong
from benchmarks.measure.machine import describe
from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention
from oisd_kernels import logit_lens_divergence as lens_op
from oisd_kernels.cuda import build
from oisd_kernels.lens.chunked import head_pass
from oisd_kernels.lens.chunked.head_pass import row_functions
from oisd_kernels.lens.chunked.projection import Projection
from oisd_kernels.lens.chunked.rows import RowMath

F32 = torch.float32


# The machine


def machine(work: Work) -> None:
    """Device, driver, versions, nvcc: a row that the table names."""
    if not work.begin("machine"):
        return
    found = describe(work.place.device, 1)
    nvcc = build.find_nvcc()
    if nvcc is not None:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
        found["nvcc"] = (done.stdout.strip().splitlines() or ["?"])[-1]
    found["sanitizer"] = shutil.which("compute-sanitizer")
    found["c_compiler"] = c_compiler()
    if work.place.device == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability())
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    work.append("check", "machine", "passed", machine=found, reason="")


# Matmuls and rows in place


def aliased_addmm(place: Place) -> Outcome:
    """The head's gradient is added up in float32 from bf16 operands, into the matmul's own input:
    `addmm` with out_dtype whose out is its first argument."""
    generator = seeded(1, place.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=place.device)

    vocabulary, width, rows = place.head.vocabulary, place.head.width, place.tokens
    total = normal(vocabulary, width)
    d_logits = normal(rows, vocabulary).to(place.dtype)
    states = normal(rows, width).to(place.dtype)
    truth = total.double() + 2 * d_logits.double().t() @ states.double()
    project = Projection(d_logits.new_zeros(vocabulary, width), {place.dtype}, F32)
    none = total.new_empty(0)
    for _ in range(2):
        project.add_to_weight(total, d_logits, none, states)
    return Outcome({"d_weight": total}, {"d_weight": truth}, Bound(1e-5, 1e-5))


def logits_in_float32(place: Place) -> Outcome:
    """The matmul writes float32 logits into a wider buffer's rows, from bf16 operands."""
    given = lens_checks.tensors(place, 1, "peaked", place.dtype)
    states, weight = given["final"], given["weight"]
    vocabulary = len(weight)
    buffer = torch.full((len(states), vocabulary + 77), torch.nan, device=place.device)
    out = buffer[:, :vocabulary]
    Projection(weight, {place.dtype}, F32).logits(states, out)
    if not bool(buffer[:, vocabulary:].isnan().all()):
        raise Wrong("the matmul wrote past its rows")
    truth = states.double() @ weight.double().t()
    return Outcome({"logits": out}, {"logits": truth}, Bound(1e-5, 1e-5))


def in_place_gradient(place: Place, fewer: int = 0, split: bool = False) -> Outcome | str:
    """The row kernel's gradient in half precision overwrites the logits it is made of, or with
    `split` those of later rows: the same bits in every run, and those of float32 rounded. V less by
    `fewer` ends in the midst of a block."""
    rows, vocabulary = place.tokens, place.head.vocabulary - fewer
    generator = seeded(4, place.device)
    stride = -(-vocabulary // 64) * 64
    logits = torch.randn(2, rows, stride, generator=generator, device=place.device) * 3
    math = RowMath("jsd", 0.5, 1.0, None)
    slot = torch.arange(rows, device=place.device)
    factor = torch.ones(rows, device=place.device)

    def gradient(operand: torch.dtype) -> Tensor:
        functions, spare = row_functions(logits.device), 0
        if split:
            from oisd_kernels.lens.chunked.rows_split import SplitRows

            functions = SplitRows(1, rows, vocabulary, F32, operand, logits.device)
            spare = functions.spare
        buffer = torch.cat([logits.flatten(0, 1), logits[0, :spare]])
        z_final, z = buffer[:rows, :vocabulary], buffer[rows : 2 * rows, :vocabulary]
        final = functions.final_rows(z_final, None, None, math, False, True)
        got = functions.student_rows(
            z, z_final, final, None, slot, factor, math, True, False, operand
        )
        assert got.d_logits is not None
        return got.d_logits.clone()

    truth = gradient(F32)
    # On a CPU the operands of the matmuls are float32.
    operand = F32 if place.rehearsal else torch.bfloat16
    first = gradient(operand)
    for run in range(place.reruns):
        if not torch.equal(gradient(operand), first):
            raise Wrong(f"run {run + 2} gave other bits than the first")
    # Rounding to bf16 is off by 2^-9 at most, 1.7e-3 on average.
    return Outcome({"d_logits": first}, {"d_logits": truth}, Bound(2.5e-3, 2.5e-3))


# Waiting for the device


def no_wait(place: Place, run: Callable[[], object], allowed: int) -> str:
    """After a first run, another one waits for the device at most `allowed` times."""
    run()
    if place.rehearsal:
        return "runs; a CPU is not waited for"
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message).lower()]
    if len(waits) > allowed:
        raise Wrong(f"waited {len(waits)} times for the device, wanted {allowed}")
    return f"{len(waits)} waits, {allowed} allowed"


def lens_waits(place: Place, impl: str, weighted: bool, allowed: int) -> str:
    given = lens_checks.tensors(place, 2, "near", place.dtype)
    hidden = given["hidden"].requires_grad_()
    factor = given["factor"] if weighted else None

    def run() -> None:
        rows = lens_op(hidden, given["final"], given["weight"], token_weight=factor, impl=impl)
        torch.autograd.grad(rows.sum(), hidden)

    return no_wait(place, run, allowed)


def attention_waits(place: Place, kind: str) -> str:
    layers = 2 if kind == "several" else 1
    dim = place.attention.dim
    given = attention_checks.tensors(place, place.dtype, dim, dim, layers)
    own = leaves_of(given, ("q", "k", "v"), None)
    shared = {"cu_seqlens": own["offsets"]}
    index = attention_checks.sample(place) if kind == "sampled" else None

    def run() -> None:
        if kind == "fused":
            alignment = AttentionAlignment()
            q, k, v = (own[name] for name in "qkv")
            out, _ = flash_attention(q, k, v, alignment=alignment, impl="triton", **shared)
            rows = alignment.loss(own["qt"], own["kt"], token_weight=own["weight"])
            torch.autograd.grad((out * own["d_out"]).sum() + rows.sum(), (q, k, v))
            return
        rows = attention_divergence(
            own["q"], own["k"], own["qt"], own["kt"], token_weight=own["weight"],
            key_index=index, impl="triton", **shared,
        )  # fmt: skip
        torch.autograd.grad(rows.sum(), (own["q"], own["k"]))

    return no_wait(place, run, 0)


# The same bits each time


def repeats(place: Place, impl: str) -> str:
    given = lens_checks.tensors(place, 2, "near", place.dtype)
    hidden = given["hidden"].requires_grad_()

    def run() -> Tensor:
        rows = lens_op(
            hidden, given["final"], given["weight"], token_weight=given["factor"], impl=impl
        )
        return torch.cat([rows.detach().flatten(), torch.autograd.grad(rows.sum(), hidden)[0]
                          .float().flatten()])  # fmt: skip

    return _repeats(place, run)


def attention_repeats(place: Place) -> str:
    dim = place.attention.dim
    given = attention_checks.tensors(place, place.dtype, dim, dim, 1)
    own = leaves_of(given, ("q", "k", "v"), None)

    def run() -> Tensor:
        alignment = AttentionAlignment()
        q, k, v = (own[name] for name in "qkv")
        settings = {"alignment": alignment, "impl": "triton", "cu_seqlens": own["offsets"]}
        out, _ = flash_attention(q, k, v, **settings)
        rows = alignment.loss(own["qt"], own["kt"], token_weight=own["weight"])
        found = torch.autograd.grad((out * own["d_out"]).sum() + rows.sum(), (q, k, v))
        return torch.cat([x.flatten() for x in found])

    return _repeats(place, run)


def _repeats(place: Place, run: Callable[[], Tensor]) -> str:
    first = run()
    if not bool(first.isfinite().all()) or float(first.abs().sum()) == 0:
        raise Wrong("the result is not finite, or 0")
    for again in range(place.reruns):
        other = run()
        if not torch.equal(other, first):
            off = int((other != first).sum())
            raise Wrong(f"run {again + 2} gave other bits than the first in {off} places")
    return f"the same bits in {place.reruns + 1} runs"


# The steps


def facts(work: Work) -> None:
    """Matmuls, in-place gradients, waits, repetition."""
    impls = ("chunked", "tiled")
    waits = [
        Check("waits: lens, chunked", partial(lens_waits, impl="chunked", weighted=False,
                                              allowed=0)),
        # It counts the rows of weight other than 0, once.
        Check("waits: lens with weights, chunked", partial(lens_waits, impl="chunked",
                                                           weighted=True, allowed=1)),
        Check("waits: lens with weights, tiled", partial(lens_waits, impl="tiled", weighted=True,
                                                         allowed=0)),
        *(Check(f"waits: attention, {kind}", partial(attention_waits, kind=kind))
          for kind in ("fused", "several", "sampled")),
    ]  # fmt: skip
    work.checks(
        [
            Check("addmm with out_dtype into its own input", aliased_addmm),
            Check("float32 logits from half precision", logits_in_float32),
            Check("gradient in place", in_place_gradient),
            Check("gradient in place, odd V", partial(in_place_gradient, fewer=7)),
            *waits,
            *(Check(f"repeats: lens, {impl}", partial(repeats, impl=impl)) for impl in impls),
            Check("repeats: attention, fused", attention_repeats),
        ]
    )


def split_rows(work: Work) -> None:
    """The row kernels of three stages, which `SPLIT_ROWS` chooses for this process."""
    head_pass.SPLIT_ROWS = True
    gradient = partial(in_place_gradient, split=True)
    work.checks(
        [
            *(Check(check.name.replace("chunked", "split rows"), check.run)
              for check in lens_checks.checks("chunked") if "log-prob" not in check.name),
            Check("gradient over later rows", gradient),
            Check("gradient over later rows, odd V", partial(gradient, fewer=7)),
            Check("repeats: lens, split rows", partial(repeats, impl="chunked")),
        ]
    )  # fmt: skip


def float32(work: Work) -> None:
    """float32 in three tf32 products, to float32's own bounds."""
    both = F32, F32
    work.checks(
        [
            Check("float32: lens, jsd, tiled", partial(lens, impl="tiled", dtypes=both)),
            Check("float32: lens, jsd, chunked", partial(lens, impl="chunked", dtypes=both)),
            Check("float32: log-probability, tiled", partial(logprob, impl="tiled", dtypes=both)),
            Check("float32: attention", partial(flash, impl="triton", dtype=F32)),
            Check("float32: attention with jsd", partial(flash, impl="triton", dtype=F32,
                                                         divergence="jsd")),
            Check("float32: divergence, S = 2", partial(divergence, impl="triton", dtype=F32,
                                                        layers=2)),
            Check("float32: divergence, sampled keys", partial(divergence, impl="triton",
                                                               dtype=F32, sampled=True)),
        ]
    )  # fmt: skip


def registers(work: Work) -> None:
    """Launches that take 250 registers a thread or more on sm_90 and that no other step has.

    By `python -m oisd_kernels.audit --full`; what it cannot show is that they compute right.
    """
    mixed = (None, F32), (F32, None)
    wide = 2 * work.place.attention.dim
    two = partial(flash, impl="triton", divergence="jsd")
    half = other_width(work.place)
    work.checks(
        [
            Check("registers: attention with jsd, K doubled", partial(two, width=wide)),
            Check("registers: attention with jsd, K doubled, window, softcap",
                  partial(two, width=wide, window=work.place.window, softcap=10.0)),
            Check("registers: attention with jsd, full", partial(two, causal=False)),
            Check("registers: attention with jsd, K at 3/4",
                  partial(two, width=work.place.attention.dim * 3 // 4)),
            Check("registers: attention with jsd, teacher narrower",
                  partial(two, width_teacher=half)),
            *(Check(f"registers: attention with {name}, window", partial(
                flash, impl="triton", divergence=name, window=work.place.window))
              for name in ("forward_kl", "reverse_kl")),
            Check("registers: divergence, K halved, S = 4", partial(
                divergence, impl="triton", width=half, layers=4)),
            Check("registers: attention with jsd, float32, K halved", partial(
                two, width=half, dtype=F32)),
            *(Check(f"registers: log-probability, {what}, tiled", partial(
                logprob, impl="tiled", dtypes=dtypes, scores=scores))
              for dtypes, what in zip(mixed, ("head in float32", "states in float32"), strict=True)
              for scores in (False,)),
            Check("registers: log-probability, float32, bias, softcap, tiled", partial(
                logprob, impl="tiled", dtypes=(F32, F32), scores=True)),
        ]
    )  # fmt: skip
