"""Guards that take many forwards, or a backward: see `oisd.models.guards`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from oisd.models.guards import Guard, default_tolerance, difference, judged, logits, undisturbed
from oisd.models.layout import unwrap
from oisd.norms import total_norm
from oisd.schema import one_line

_NO_CKPT = "leave model.gradient_checkpointing off, and lower run.tokens_per_microbatch instead"


def batch_dependence(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Guard:
    """A row's logits are the same alone and beside other rows of its length.

    Arguments as those of `causality`. The value is the largest of all positions, and the bound a
    fourth of the other guards': rows of one length need no padding, so that few sums are rounded
    differently. Texts of 30 tokens are read too, which fill no block.
    """
    bound = default_tolerance(dtype) / 4 if tolerance is None else tolerance

    def beside(row: Tensor, *others: Tensor) -> float:
        rows = torch.stack([row, *others])
        mask = torch.ones_like(rows)
        alone = logits(model, rows[:1], attention_mask=mask[:1])[0]
        return difference(logits(model, rows, attention_mask=mask)[0], alone, run=1)

    def measure() -> float:
        short = ids[:30]
        with undisturbed(model):
            return max(beside(short, short.flip(0)), beside(ids, ids.flip(0), ids.roll(9)))

    return judged(
        "batch dependence",
        model,
        measure,
        bound,
        "a row alone and the same row beside others",
        "run it in float32, or with another release of transformers",
    )


class _Forced(LogitsProcessor):
    """Keeps the scores [V] of each step and allows the text's own next token alone."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.scores = ids, [torch.empty(0)] * 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.scores.append(scores[0].float())
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.ids[input_ids.shape[1]]] = 0
        return allowed


def cached_decoding(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Guard:
    """Decoding token by token over a cache gives the logits of one forward over the whole text.

    Arguments as those of `causality`. The first 8 tokens are a prompt, up to 24 more are decoded by
    the model's own `generate`.
    """
    bound = default_tolerance(dtype) if tolerance is None else tolerance
    inner: Any = unwrap(model)
    prompt = min(8, len(ids) - 1)
    steps = min(24, len(ids) - prompt)

    def measure() -> float:
        forced = _Forced(ids)
        settings = GenerationConfig(
            max_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0
        )
        shipped = inner.generation_config
        inner.generation_config = settings
        try:
            with undisturbed(model):
                whole = logits(model, ids[None])[0, prompt - 1 : prompt - 1 + steps]
                inner.generate(
                    ids[None, :prompt],
                    attention_mask=torch.ones_like(ids[None, :prompt]),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([forced]),
                )
        finally:
            inner.generation_config = shipped
        return difference(torch.stack(forced.scores), whole)

    return judged(
        "cached decoding",
        model,
        measure,
        bound,
        f"{steps} tokens decoded over a cache and one forward",
        "rollouts come from another model than the one that is updated; try another release of "
        "transformers",
    )


def checkpointed_gradients(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Guard:
    """Gradients under non-reentrant gradient checkpointing equal those without.

    Arguments as those of `causality`; up to 32 tokens are read. Looked at are the gradients of the
    vectors (norms, biases) and of the first layer's matrices, through which all layers pass theirs.
    A model that refuses checkpointing has an infinite value and its own reason.
    """
    bound = default_tolerance(dtype) if tolerance is None else tolerance
    inner: Any = unwrap(model)
    # Of a frozen model too, or of one with adapters: what is looked at needs a gradient here.
    looked = _looked_at(inner)
    frozen = [p for p in looked if not p.requires_grad]
    was = bool(getattr(inner, "is_gradient_checkpointing", False))
    ids = ids[None, :32]

    def gradients() -> list[Tensor]:
        with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            torch.manual_seed(0)
            out = model(input_ids=ids, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:])
            found = torch.autograd.grad(loss, looked, allow_unused=True)
        return [g.float() for g in found if g is not None]

    with undisturbed(model, training=True):
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            if was:
                inner.gradient_checkpointing_disable()
            plain = gradients()
            try:
                inner.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
                checkpointed = gradients()
            except Exception as error:
                reason = f"refused: {one_line(error)[:120]}"
                return Guard("checkpointing", math.inf, bound, reason, _NO_CKPT)
        finally:
            if was:
                inner.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
            elif getattr(inner, "is_gradient_checkpointing", False):
                inner.gradient_checkpointing_disable()
            for parameter in frozen:
                parameter.requires_grad_(False)
    norm = float(total_norm(plain))
    apart = (float(total_norm([a - b])) for a, b in zip(plain, checkpointed, strict=True))
    value = math.hypot(*apart) / max(norm, 1e-30)
    words = f"gradients (norm {norm:.2g}) with and without checkpointing"
    if value <= bound:
        return Guard("checkpointing", value, bound, f"{words} agree")
    return Guard("checkpointing", value, bound, f"{words} differ by {value:.2g} of it", _NO_CKPT)


def _looked_at(model: Any) -> list[nn.Parameter]:
    decoder = model.get_decoder()
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m)]
    first = {id(p) for p in lists[0][0].parameters()} if lists else set()
    seen = [p for p in model.parameters() if p.is_floating_point() and p.element_size() > 1]
    return [p for p in seen if p.dim() == 1 or id(p) in first]
