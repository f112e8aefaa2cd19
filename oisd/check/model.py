"""Rows about the model: its layout, its taps, and whether it computes what training relies on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from oisd.check.findings import Finding, Status, of_guard
from oisd.config import TrainConfig
from oisd.models import Taps, UnsupportedModelError
from oisd.models import guards as cheap
from oisd.models import thorough_guards as thorough
from oisd.models.attending import Probe
from oisd.models.head import softcapped
from oisd.models.layout import find_layout, unwrap
from oisd.models.refusals import WITHOUT_ATTENTION
from oisd.policy import Policy
from oisd.run.model_guards import as_setting, clearest

_PART = "model"


def layout_rows(policy: Policy) -> Iterator[Finding]:
    """What the model is made of, as the taps find it."""
    model: Any = unwrap(policy.model)
    with clearest(policy):
        layout = find_layout(model)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    between = ", ".join(type(module).__name__ for module in layout.tail.modules) or "nothing"
    parts = [
        f"{type(model).__name__}, {len(layout.layers)} layers",
        f"{between} before the head",
        f"head {' x '.join(map(str, head.weight.shape))}, {'tied' if tied else 'untied'}",
        f"softcap {layout.softcap:g}" if layout.softcap else "",
        f"logit scale {layout.scale:g}" if layout.scale != 1 else "",
    ]
    yield Finding(_PART, "layout", "pass", "; ".join(filter(None, parts)))
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if kinds:
        count = Counter(kinds)
        found = ", ".join(f"{number} of {kind}" for kind, number in count.items())
        yield Finding(_PART, "kinds of layers", "pass", found)


def taps_rows(policy: Policy, config: TrainConfig, layers: Sequence[int]) -> Iterator[Finding]:
    """Lens and attention of the student layers against what the model itself gives."""
    with clearest(policy):
        taps, refused = _taps(policy.model, config, layers)
        yield _lens_row(policy, taps)
    if refused:
        reason = refused.reason if isinstance(refused, UnsupportedModelError) else str(refused)
        if config.oisd.attention_weight:
            remedy = _remedy(refused)
            yield Finding(_PART, "attention", "fail", reason, remedy=remedy)
        else:
            yield Finding(_PART, "attention", "warn", reason)
        return
    ids = cheap.guard_tokens(policy.model, 16)[None]
    with clearest(policy), torch.no_grad(), taps:
        policy.model(input_ids=ids, use_cache=False)
        pairs = taps.attention()
    windows = {pair.window for pair in pairs if pair.window}
    heads, width = pairs[0].q.shape[2:]
    words = [
        f"{_named(layers)} and the teacher verified: {heads} heads of {width}, "
        f"{pairs[0].k.shape[2]} of keys",
        f"windows {sorted(windows)}" if windows else "",
        f"softcap {pairs[0].softcap:g}" if pairs[0].softcap else "",
        taps.attention_words,
    ]
    yield Finding(_PART, "attention", "pass", "; ".join(filter(None, words)))


def _taps(model: Any, config: TrainConfig, layers: Sequence[int]) -> tuple[Taps, ValueError | None]:
    """Taps with attention, or without it and the reason."""
    own, teacher = config.oisd.attention_student, config.oisd.attention_teacher
    probe = Probe(model)
    try:
        chosen = {"attention_student": own, "attention_teacher": teacher}
        return Taps(probe, layers, **chosen), None
    except ValueError as error:
        return Taps(probe, layers, attention=False), error


def _remedy(refused: ValueError) -> str:
    others = refused.remedies if isinstance(refused, UnsupportedModelError) else ()
    said = [as_setting(remedy) for remedy in others if remedy != WITHOUT_ATTENTION]
    said.append(f"{as_setting(WITHOUT_ATTENTION)}: the think term needs none")
    return ", or ".join(said)


def _named(layers: Sequence[int]) -> str:
    numbers = ", ".join(map(str, layers))
    return f"layer {numbers}" if len(layers) == 1 else f"layers {numbers}"


def _lens_row(policy: Policy, taps: Taps) -> Finding:
    """The final hidden state through the unembedding, against the model's logits."""
    ids = cheap.guard_tokens(policy.model, 16)[None]
    with torch.no_grad(), taps:
        logits = policy.model(input_ids=ids, use_cache=False).logits[0].float()
        head = taps.unembedding
        final, students = taps.final_hidden()[0], taps.student_hidden()[:, 0]
        own = torch.nn.functional.linear(final.to(head.weight.dtype), head.weight, head.bias)
    value = cheap.difference(softcapped(own.float(), head.logit_softcap), logits, run=1)
    bound = cheap.default_tolerance(cheap.arithmetic(policy.model))
    finite = bool(students.isfinite().all())
    names = _named(taps.student_layers)
    words = f"final layer through the unembedding against the logits; {names} read"
    found = words if finite else f"the hidden states of {names} are not finite"
    status: Status = "pass" if value <= bound and finite else "fail"
    return Finding(_PART, "lens", status, found, value, bound)


def parameter_rows(policy: Policy) -> Iterator[Finding]:
    """Read and finite: a model that lacks weights has been refused before there is a table."""
    parameters = [*policy.model.parameters()]
    count = sum(p.numel() for p in parameters)
    yield Finding(_PART, "weights", "pass", f"{count:,} parameters, all keys read")
    yield of_guard(_PART, cheap.finite_parameters(policy.model))


def guard_rows(policy: Policy, config: TrainConfig) -> Iterator[Finding]:
    """The guards where they see most, and those about arithmetic in the run's own."""
    model = policy.model
    ids = cheap.guard_tokens(model)
    with clearest(policy):
        dtype = cheap.arithmetic(model)
        for guard in (cheap.causality, cheap.right_padding, cheap.left_padding):
            yield of_guard(_PART, cheap.attempted(guard, model, ids, dtype))
        yield of_guard(_PART, cheap.attempted(thorough.cached_decoding, model, ids, dtype))
        yield _dropout_row(policy, config, cheap.attempted(cheap.dropout_noise, model, ids, dtype))
        gradients = cheap.attempted(thorough.checkpointed_gradients, model, ids, dtype)
        asked = config.model.gradient_checkpointing
        yield of_guard(_PART, gradients, failing="fail" if asked else "warn")
    with policy.autocast():
        dtype = cheap.arithmetic(model)
        beside = cheap.attempted(thorough.batch_dependence, model, ids, dtype)
        yield of_guard(_PART, beside, failing="warn")


def _dropout_row(policy: Policy, config: TrainConfig, guard: cheap.Guard) -> Finding:
    row = of_guard(_PART, guard, failing="warn")
    if row.status == "pass" and policy.dropout_replaced:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in policy.dropout_replaced.items())
        found = f"model.dropout = {config.model.dropout:g} replaces what the model ships: {rates}"
        return Finding(_PART, row.name, "pass", found, row.value, row.bound)
    return row
