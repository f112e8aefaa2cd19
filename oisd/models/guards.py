"""What training relies on in a causal language model, held against the model itself.

Each guard runs the model in two ways that must agree, and returns a `Guard`: the difference found,
the bound that rounding stays below, and the remedy. None of them knows an architecture by name.

The difference of two runs is that of their logits. At each position it is the largest over the
vocabulary, divided by the largest logit. The value of a guard is its median over `_RUN`
neighbouring positions, of those where it is largest: a fault shows in most positions that it
reaches, while a mixture of experts may, by rounding alone, choose another expert at a single one.

Models are left as they were: their mode, their generation settings, the random state, and the
weights that autocast has cached. Run a guard in the arithmetic that it is to judge, under autocast
where that is used. Float32 shows a fault most clearly.

Guards that take longer are in `oisd.models.thorough_guards`.

T tokens of a text, B rows, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oisd.models.dropout import dropout_rates
from oisd.models.layout import learned_positions, unwrap
from oisd.models.probe import in_mode
from oisd.schema import one_line

_RUN = 8
# Prefixes of 96 tokens; blocks of 64 are what linear attention and some kernels compute at once.
TOKENS, PREFIXES = 96, (9, 33, 80)
# A value so many times its bound is a fault of the model; below, its rounding may be unusual.
GRAVE = 4
EAGER = 'attn_implementation = "eager"'


@dataclass(frozen=True)
class Guard:
    """What one guard found.

    value: the difference, as a share of the largest logit (of the norm, for gradients); NaN where
        it could not be measured.
    bound: the largest value that rounding explains.
    found: one line that says so in words, or why the guard could not run.
    remedy: what to change; empty if the guard holds.
    """

    name: str
    value: float
    bound: float
    found: str
    remedy: str = ""

    @property
    def is_checked(self) -> bool:
        """Whether there is a value at all."""
        return not math.isnan(self.value)

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound

    @property
    def corrupts(self) -> bool:
        """Whether the value is so far above the bound that no unusual rounding explains it."""
        return self.value > GRAVE * self.bound

    def as_row(self) -> dict[str, Any]:
        """The fields, ready for JSON, which has neither NaN nor infinity."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "holds": self.holds}

    def __str__(self) -> str:
        if not self.is_checked:
            return f"{self.name}: not checked: {self.found}"
        words = f"{self.name}: {self.found}"
        if self.bound:
            words += f"; rounding explains {self.bound:.2g}"
        return f"{words}. {self.remedy[:1].upper()}{self.remedy[1:]}" if self.remedy else words


def default_tolerance(dtype: torch.dtype) -> float:
    """The share of the largest logit that rounding in `dtype` explains, after many layers.

    Sixteen roundings; in float32 sums are rounded more often than results, so that 2^-10 is the
    least. Products in TF32 keep 10 bits, as float16 does.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = torch.finfo(torch.float16).eps
    return max(16 * eps, 2.0**-10) if dtype != torch.float64 else 2.0**-30


def arithmetic(model: nn.Module) -> torch.dtype:
    """The dtype in which a forward here would multiply: autocast's, or that of the layers."""
    kind = next(model.parameters()).device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    if any(not p.is_floating_point() or _is_coded(p) for p in matrices):
        return torch.bfloat16  # codes, which are multiplied in half precision
    dtypes = {p.dtype for p in matrices}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _is_coded(weight: Tensor) -> bool:
    return weight.element_size() == 1 or getattr(weight, "quant_state", None) is not None


def guard_tokens(model: nn.Module, count: int = TOKENS) -> Tensor:
    """[T] ids of a text for the guards: drawn from the vocabulary, the same at each call.

    Fewer than `count` if the model is made for fewer positions. Ids of special tokens are avoided.
    """
    inner: Any = unwrap(model)
    config = inner.config.get_text_config()
    limits = [count, learned_positions(inner) or count]
    # Beyond these, some rotary embeddings change with the length of the text.
    limits.append(getattr(config, "max_position_embeddings", None) or count)
    special: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id"):
        ids = getattr(config, name, None)
        special |= {ids} if isinstance(ids, int) else {*(ids or ())}
    usable = torch.tensor(sorted({*range(config.vocab_size)} - special) or [0])
    drawn = torch.rand(min(limits), generator=torch.Generator().manual_seed(1))
    return usable[(drawn * len(usable)).long()].to(next(model.parameters()).device)


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[None]:
    """A mode for every module, and afterwards all as it was, random and autocast's state too."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_mode(model, training):
        yield


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    """The logits [B, T, V] of rows of ids [B, T], in float32 and without gradient."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **given).logits.float()


def difference(one: Tensor, other: Tensor, run: int = _RUN) -> float:
    """The value of a guard for logits [T, V] of the same tokens; see the module's docstring.

    run: neighbouring positions over which the median is taken; 1 for the largest of all.
    """
    apart = (one - other).abs().amax(dim=-1) / other.abs().max().clamp_min(1e-30)
    # NaN or infinity in one run alone is a difference as large as can be.
    apart = apart.nan_to_num(torch.inf, torch.inf)
    runs = apart.unfold(0, min(run, len(apart)), 1)
    return float(runs.median(dim=-1).values.max())


def _eager_mends(model: Any, measure: Callable[[], float], bound: float) -> bool:
    """Whether the difference is within the bound under eager attention; the model's own returns."""
    inner: Any = unwrap(model)
    own = getattr(inner.config, "_attn_implementation", None)
    if own in (None, "eager"):
        return False
    # Parts of a model may have implementations of their own.
    configs = {id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}
    name = "_attn_implementation_internal"
    before = [(c, getattr(c, name)) for c in configs.values() if hasattr(c, name)]
    try:
        inner.set_attn_implementation("eager")
        return measure() <= bound
    except Exception:  # it has none, or fails with it: then it is no remedy
        return False
    finally:
        inner.set_attn_implementation(own)
        for config, implementation in before:
            setattr(config, name, implementation)


def judged(
    name: str,
    model: Any,
    measure: Callable[[], float],
    bound: float,
    words: str,
    remedy: str,
) -> Guard:
    """The guard whose value `measure` gives; eager attention is its remedy where it mends it.

    words: what is compared, up to "agree" or "differ".
    """
    value = measure()
    if value <= bound:
        return Guard(name, value, bound, f"{words} agree")
    if _eager_mends(model, measure, bound):
        remedy = f"set {EAGER}, under which they agree"
    return Guard(name, value, bound, f"{words} differ by {value:.2g} of the largest logit", remedy)


_OTHER_RELEASE = "try another release of transformers: its attention for this model is at fault"

_BY_LENGTH = "train another model: sampled and updated probabilities of this one would differ"


def causality(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Guard:
    """A prefix's logits are those that the whole text has there: no position sees a later one, nor
    the length of the text.

    ids: [T], of which the prefixes of `PREFIXES` tokens are read.
    dtype: of the arithmetic; `tolerance` replaces the bound that follows from it.
    """
    bound = default_tolerance(dtype) if tolerance is None else tolerance
    lengths = [n for n in PREFIXES if n < len(ids)] or [max(1, len(ids) - 1)]

    def against(other: Callable[[int], Tensor]) -> float:
        with undisturbed(model):
            whole = logits(model, ids[None])[0]
            return max(difference(logits(model, other(n)[None])[0, :n], whole[:n]) for n in lengths)

    words = f"the logits of prefixes of {', '.join(map(str, lengths))} tokens and of the whole text"
    prefixes = partial(against, lambda n: ids[:n])
    guard = judged("causality", model, prefixes, bound, words, _OTHER_RELEASE)
    if guard.remedy != _OTHER_RELEASE:
        return guard
    if against(lambda n: torch.cat([ids[:n], ids[:1].expand(len(ids) - n)])) <= bound:
        found = f"{guard.found}, by the text's length and not by its later tokens"
        return replace(guard, found=found, remedy=_BY_LENGTH)
    return guard


def _padded(model: nn.Module, ids: Tensor, left: bool, positions: bool) -> tuple[float, int, int]:
    """The difference that padding makes to a short row beside a long one; how long they are."""
    short = max(1, len(ids) // 3)
    row, gap = ids[:short], len(ids) - short
    # Ids that mean something: a mask must hide whatever stands there.
    filling = ids[-gap:] if gap else ids[:0]
    rows = torch.stack([torch.cat([filling, row] if left else [row, filling]), ids])
    mask = torch.ones_like(rows)
    own = slice(gap, None) if left else slice(0, short)
    mask[0] = 0
    mask[0, own] = 1
    given: dict[str, Tensor] = {"attention_mask": mask}
    if positions and "position_ids" in inspect.signature(unwrap(model).forward).parameters:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with undisturbed(model):
        bare = logits(model, row[None])[0]
        return difference(logits(model, rows, **given)[0, own], bare), short, gap


def right_padding(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Guard:
    """A row's logits do not change when a longer row beside it makes padding necessary, as in an
    update.

    Arguments as those of `causality`; the row is the first third of `ids`.
    """
    bound = default_tolerance(dtype) if tolerance is None else tolerance
    return judged(
        "right padding",
        model,
        lambda: _padded(model, ids, False, False)[0],
        bound,
        f"a row of {len(ids) // 3} tokens, bare and padded on its right,",
        "update each row alone, without padding (run.tokens_per_microbatch = 1 in oisd train)",
    )


def left_padding(
    model: nn.Module,
    ids: Tensor,
    dtype: torch.dtype,
    tolerance: float | None = None,
    *,
    positions: bool = True,
) -> Guard:
    """A row's logits do not change when it is padded on its left, as prompts are for sampling.

    positions: whether the row's position ids begin at its first real token, as `generate` passes
        them to a model that takes them; TRL's update passes none.
    Other arguments as those of `causality`; the row is the first third of `ids`.
    """
    bound = default_tolerance(dtype) if tolerance is None else tolerance
    without = "" if positions else ", without position ids,"
    remedy = "sample each completion alone, without padding (rollout.batch_size = 1 in oisd train)"
    if not positions:
        remedy = "use prompts of equal length, or one prompt in a batch"
        if left_padding(model, ids, dtype, tolerance).holds:
            remedy = "pass position_ids that begin at the first real token, or " + remedy
    return judged(
        "left padding",
        model,
        lambda: _padded(model, ids, True, positions)[0],
        bound,
        f"a row of {len(ids) // 3} tokens, bare and padded on its left{without}",
        remedy,
    )


def dropout_noise(
    model: nn.Module, ids: Tensor, dtype: torch.dtype, tolerance: float | None = None
) -> Guard:
    """Two forwards in training mode agree: no dropout, no noise of a router.

    Arguments as those of `causality`.
    """
    bound = default_tolerance(dtype) if tolerance is None else tolerance

    def measure() -> float:
        with undisturbed(model, training=True):
            return difference(logits(model, ids[None])[0], logits(model, ids[None])[0])

    value = measure()
    if value <= bound:
        return Guard("dropout", value, bound, "two forwards in training mode agree")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in dropout_rates(unwrap(model)).items())
    return Guard(
        "dropout",
        value,
        bound,
        f"two forwards in training mode differ by {value:.2g} of the largest logit"
        f"{' (' + rates + ')' if rates else ''}",
        "set model.dropout = 0 (and model.lora_dropout = 0): rollouts run without it",
    )


def finite_parameters(model: nn.Module) -> Guard:
    """No parameter is NaN or infinite, but for a head's bias, where -inf masks a token.

    The value counts the tensors that have such entries.
    """
    head = unwrap(model).get_output_embeddings()
    bias = getattr(head, "bias", None)
    names, sums = [], []
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.element_size() > 1 and p.numel() and p is not bias:
            names.append(name)
            sums.append(p.detach().sum(dtype=torch.float32).isfinite())
    # One synchronisation. A sum of finite numbers may overflow, so look again at what is left.
    whole = dict(zip(names, torch.stack(sums).tolist() if sums else [], strict=True))
    parameters = dict(model.named_parameters())
    wrong = [n for n, fine in whole.items() if not (fine or parameters[n].isfinite().all())]
    if not wrong:
        return Guard("finite", 0, 0, f"{len(names)} tensors of parameters are finite")
    more = ", ..." if len(wrong) > 3 else ""
    found = f"{len(wrong)} tensors have NaN or infinite entries ({', '.join(wrong[:3])}{more})"
    return Guard("finite", len(wrong), 0, found, "take an earlier checkpoint, or copy it again")


def cheap_guards(
    model: nn.Module, ids: Tensor | None = None, *, positions: bool = True
) -> list[Guard]:
    """The guards that a run starts with, in the arithmetic that is in force: about ten forwards.

    ids: [T]; by default `guard_tokens`.
    positions: as in `left_padding`.
    """
    ids = guard_tokens(model) if ids is None else ids
    dtype = arithmetic(model)
    guards = [
        attempted(guard, model, ids, dtype)
        for guard in (
            causality,
            right_padding,
            partial(left_padding, positions=positions),
            dropout_noise,
        )
    ]
    return [finite_parameters(model), *guards]


def attempted(
    guard: Callable[[nn.Module, Tensor, torch.dtype], Guard],
    model: nn.Module,
    ids: Tensor,
    dtype: torch.dtype,
) -> Guard:
    """What the guard finds, or that the model cannot be run in this way, with its own reason.

    Running out of memory is the caller's affair.
    """
    try:
        return guard(model, ids, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may raise whatever it stumbles over
        reason = one_line(error, named=True)[:160]
        name = getattr(guard, "func", guard).__name__.replace("_", " ")
        return Guard(name, math.nan, default_tolerance(dtype), reason)
