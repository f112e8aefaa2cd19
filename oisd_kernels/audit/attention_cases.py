"""The launches of the attention kernels, for `oisd_kernels.audit.lens_cases`.

32 query heads on 8 key heads. By default bf16 at K = 128 with jsd: forward, statistics, the
backward of both at once, and over sampled keys, which makes every kernel; with a sink those two
that read one. `full` adds the rest: every tile of the launcher's table, and at K = 128 every
option.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from oisd_kernels.attention import sampled_triton, triton_impl
from oisd_kernels.attention.spec import Alignment, Geometry, Layer, Plain
from oisd_kernels.attention.tiles import widest
from oisd_kernels.audit.case import DTYPES, Case, empty

TOKENS, SEQUENCES, HEADS, KEY_HEADS, SLOTS = 8192, 8, 32, 8, 320
FORMS = {
    "causal": (True, None, None),
    "causal, window": (True, 1024, None),
    "causal, window, softcap": (True, 1024, 30.0),
    "full": (False, None, None),
    "full, window": (False, 1024, None),
}
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
# dtype, K, the teacher's K, mask, divergences
CONFIGURATIONS = [
    ("bf16", 128, 128, "causal", DIVERGENCES),
    ("bf16", 64, 64, "causal", DIVERGENCES),
    ("bf16", 256, 256, "causal", ("jsd",)),
    *(("fp32", size, size, "causal", ("jsd",)) for size in (64, 128)),
    ("fp16", 128, 128, "causal", ("jsd",)),
    ("bf16", 96, 96, "causal", ("jsd",)),
    ("bf16", 64, 128, "causal", ("jsd",)),
    ("bf16", 128, 64, "causal", ("jsd",)),
    *(("bf16", size, size, "causal, window, softcap", ("jsd",)) for size in (64, 128, 256)),
    ("fp32", 64, 64, "causal, window, softcap", ("jsd",)),
    ("bf16", 128, 128, "causal, window", DIVERGENCES),
    *(("bf16", 128, 128, form, ("jsd",)) for form in ("full", "full, window")),
]


def attention_cases(capability: int) -> Iterator[Case]:
    for name, width, width_t, form, divergences in CONFIGURATIONS:
        if max(width, width_t) <= widest(capability, DTYPES[name], FORMS[form][2]):
            yield from _cases(capability, name, width, width_t, form, divergences)


def _cases(
    capability: int,
    name: str,
    width: int,
    width_t: int,
    form: str,
    divergences: tuple[str, ...],
) -> Iterator[Case]:
    dtype, target = DTYPES[name], {"capability": capability}
    label = f"{name}, K={width}" + (f"/{width_t}" if width_t != width else "") + f", {form}"
    q, qt = (empty(TOKENS, HEADS, size, dtype=dtype) for size in (width, width_t))
    k, kt = (empty(TOKENS, KEY_HEADS, size, dtype=dtype) for size in (width, width_t))
    lse, row = empty(HEADS, TOKENS), empty(TOKENS)
    causal, window, softcap = FORMS[form]
    offsets = empty(SEQUENCES + 1, dtype=torch.int32)
    geometry = Geometry(offsets, SEQUENCES, None, causal, window, softcap)
    teacher = Layer(qt, kt, lse, width_t**-0.5)
    scale = width**-0.5
    student = Layer(q, k, lse, scale)
    plain = Plain(k, q, q, lse)
    usual = (name, width, width_t, form) == CONFIGURATIONS[0][:4]
    if width == width_t:
        forward = partial(triton_impl.forward, q, k, k, geometry, scale, **target)
        yield Case(f"forward, {label}", forward, not usual)
        with_sink = partial(forward, empty(HEADS))
        yield Case(f"forward with a sink, {label}", with_sink, not usual)
        alone = partial(triton_impl.logsumexp, q, k, geometry, scale, **target)
        yield Case(f"logsumexp, {label}", alone, True)
        backward = partial(triton_impl.backward, student, geometry, plain, None, **target)
        yield Case(f"plain, {label}", backward, True)
    for divergence in divergences:
        full = not usual or divergence != "jsd"
        statistics = partial(
            triton_impl.statistics,
            _stacked(student), teacher, row != 0, divergence, 0.5, geometry, **target,
        )  # fmt: skip
        yield Case(f"{divergence}, {label}", statistics, full)
        if form == "causal" and width == width_t:
            settings = teacher, row != 0, divergence, 0.5, geometry
            yield from _several(scale, settings, label, capability, name)
            yield from _sampled(student, settings, label, capability, full)
        alignment = Alignment(teacher, row, lse, divergence, 0.5)
        for extra, what in ((plain, "and plain"), (None, "alone")):
            backward = partial(triton_impl.backward, student, geometry, extra, alignment, **target)
            yield Case(f"{divergence} {what}, {label}", backward, full or extra is None)


def _stacked(student: Layer) -> Layer:
    return Layer(student.q[None], student.k[None], student.lse[None], student.scale)


def _several(
    scale: float, settings: tuple[Any, ...], label: str, capability: int, name: str
) -> Iterator[Case]:
    """The statistics of several students in one launch."""
    width = settings[0].q.shape[-1]
    for students in (2, 4):
        q, k = (
            empty(students, TOKENS, heads, width, dtype=DTYPES[name])
            for heads in (HEADS, KEY_HEADS)
        )
        layers = Layer(q, k, empty(students, HEADS, TOKENS), scale)
        launch = partial(triton_impl.statistics, layers, *settings, capability=capability)
        yield Case(f"{settings[2]} of {students}, {label}", launch, True)


def _sampled(
    student: Layer, settings: tuple[Any, ...], label: str, capability: int, full: bool
) -> Iterator[Case]:
    """Over sampled keys: statistics, with sinks too, and both gradients."""
    teacher, keep, divergence, beta, geometry = settings
    index, layers = empty(TOKENS, SLOTS, dtype=torch.int64), _stacked(student)
    sampled = index, keep, divergence, beta, geometry, capability
    statistics = partial(sampled_triton.statistics, layers, teacher, *sampled)
    yield Case(f"{divergence} sampled, {label}", statistics, full)
    sinks = layers._replace(sink=empty(1, HEADS)), teacher._replace(sink=empty(HEADS))
    statistics = partial(sampled_triton.statistics, *sinks, *sampled)
    yield Case(f"{divergence} sampled with sinks, {label}", statistics, full)
    alignment = Alignment(teacher, empty(TOKENS), teacher.lse, divergence, beta)
    backward = partial(sampled_triton.backward, student, alignment, index, geometry, capability)
    yield Case(f"{divergence} sampled gradient, {label}", backward, full)
