"""Softmax attention that a layer computes itself, without transformers' AttentionInterface.

While a tapped layer runs, a torch function mode follows its tensors from the product of queries and
keys through scales, masks and biases to the softmax, and on to the product with the values; or it
sees one call of `scaled_dot_product_attention`. It only looks: the layer computes what it always
does, and no operation is added to its graph, so that checkpointing may run it again.

    P = softmax_j(scale * <q_i, k_j> + bias_hj)   over the causal keys;   out = P v

The bias is what was added to the scores and depends on the head and the key alone, as ALiBi does:
its value at j is read on the diagonal, where no mask hides it. Whether this describes the layer is
not decided here: the probe compares P v with the layer's own.

B batch, T positions, H query heads, J key heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oisd.models.attention import AttentionCall

IMPLEMENTATION = "the layer's own"
_PRODUCTS = ("matmul", "bmm", "baddbmm")
_FACTORS = ("mul", "multiply", "imul", "mul_")
_DIVISORS = ("div", "divide", "true_divide", "truediv", "itruediv", "div_")
_SUMS = ("add", "iadd", "add_")


@dataclass
class _Scores:
    """Scores of queries and keys on their way to the product with the values."""

    latest: Tensor  # the scores, and after the softmax the weights
    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, J, T, K]
    scale: float
    added: list[tuple[Tensor, float]] = field(default_factory=list)  # with its factor
    normalised: bool = False

    def multiply(self, factor: float) -> None:
        self.scale *= factor
        self.added = [(term, old * factor) for term, old in self.added]


class _Watch(TorchFunctionMode):
    """Reports the attention among the torch functions called while the mode is active.

    batch, length: of the layer's hidden states.
    with_bias: whether to read what is added to the scores.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        with_bias: bool,
        record: Callable[[AttentionCall], None],
    ):
        super().__init__()
        self.batch, self.length, self.with_bias, self.record = batch, length, with_bias, record
        self.chains: list[_Scores] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            name = getattr(func, "__name__", "")
            name = name.strip("_") if name.startswith("__") else name
            self._see(name, args, kwargs, out)
        return out

    def _see(self, name: str, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        given = [*args, *kwargs.values()]
        if name == "scaled_dot_product_attention":
            self._fused(out, *args, **kwargs)
            return
        for chain in self.chains:
            if any(x is chain.latest for x in given):
                self._follow(chain, name, given, kwargs, out)
                return
        if name in _PRODUCTS and out.ndim > 2 and out.shape[-2] == self.length:
            self._begin(name, given, kwargs, out)

    def _begin(self, name: str, given: list[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        """A product that may be one of queries and keys."""
        scale, added = 1.0, []
        if name == "baddbmm":
            term, *given = given
            scale = float(kwargs.get("alpha", 1))
            added = [(term, float(kwargs.get("beta", 1)))]
        q, k = given[:2]
        if not isinstance(k, Tensor) or q.ndim < 3 or k.ndim < 3:
            return
        q, k = self._heads(q), self._heads(k.mT)
        if len(q) == len(k) == self.batch and q.shape[1] % k.shape[1] == 0:
            chain = _Scores(out, q, k, scale)
            chain.added = [(self._over_heads(t, out), factor) for t, factor in added]
            self.chains.append(chain)

    def _follow(
        self, chain: _Scores, name: str, given: list[Any], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        """What a function makes of the scores or weights; the probe notices what is left out."""
        others = [x for x in given if x is not chain.latest]
        if name in _PRODUCTS:
            self.chains.remove(chain)
            if chain.normalised and given[0] is chain.latest:
                self._report(chain, self._heads(others[0]), self._heads(out))
            return
        if out.numel() != chain.latest.numel():
            self.chains.remove(chain)
            return
        if name == "softmax":
            chain.normalised = True
        elif not chain.normalised and others:
            other = others[0]
            number = isinstance(other, int | float) or (
                isinstance(other, Tensor) and other.ndim == 0
            )
            if name in _FACTORS and number:
                chain.multiply(float(other))
            elif name in _DIVISORS and number:
                chain.multiply(1 / float(other))
            elif name in _SUMS and isinstance(other, Tensor) and not number:
                factor = float(kwargs.get("alpha", 1))
                chain.added.append((self._over_heads(other, chain.latest), factor))
        chain.latest = out

    def _fused(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """The arguments of torch's scaled_dot_product_attention."""
        if query.ndim != 4 or query.shape[0] != self.batch or query.shape[2] != self.length:
            return
        chain = _Scores(out, query, key, scale or query.shape[-1] ** -0.5)
        if attn_mask is not None and attn_mask.is_floating_point():
            mask = attn_mask if attn_mask.ndim == 4 else attn_mask[None, None]
            chain.added.append((mask, 1.0))
        self._report(chain, value, out)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, heads, ...] for [B * heads, ...]."""
        return x if x.ndim == 4 else x.reshape(self.batch, -1, *x.shape[-2:])

    def _over_heads(self, term: Tensor, scores: Tensor) -> Tensor:
        """What is added to the scores as [B or 1, H or 1, T or 1, T]."""
        term = term.detach()
        if scores.ndim == 4:
            return term.reshape((1,) * (4 - term.ndim) + term.shape)
        return (
            self._heads(term)
            if term.ndim == 3 and len(term) > 1
            else term.reshape(1, 1, *term.shape[-2:])
        )

    def _bias(self, chain: _Scores) -> Tensor | None:
        """[B, H, T] what was added to the score of each key; 0 where the key itself is hidden."""
        keys = chain.k.shape[2]
        if not self.with_bias or chain.q.shape[2] != keys:
            return None
        accurate = torch.promote_types(chain.q.dtype, torch.float32)
        bias = chain.q.new_zeros(self.batch, chain.q.shape[1], keys, dtype=accurate)
        for term, factor in chain.added:
            if term.shape[-1] != keys:
                continue
            own = term[:, :, 0] if term.shape[2] == 1 else term.diagonal(dim1=-2, dim2=-1)
            hidden = own <= torch.finfo(own.dtype).min / 2
            bias = bias + torch.where(hidden, 0.0, factor * own.to(accurate))
        return bias.detach()

    def _report(self, chain: _Scores, v: Tensor, out: Tensor) -> None:
        call = AttentionCall(
            IMPLEMENTATION, chain.q, chain.k, v, out.transpose(1, 2), chain.scale, None, None,
            None, False, bias=self._bias(chain),
        )  # fmt: skip
        self.record(call)


@contextmanager
def watched(
    layer: nn.Module,
    record: Callable[[AttentionCall], None],
    active: Callable[[], bool],
    with_bias: bool,
) -> Iterator[None]:
    """Records the attention that `layer` computes itself, in forwards that begin when `active`.

    A compiled layer's is not seen.
    """
    running: list[ExitStack] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        running.append(stack)
        if not active():
            return
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3]
        if tensors:
            batch, length = tensors[0].shape[:2]
            stack.enter_context(_Watch(batch, length, with_bias, record))

    def end(*_: Any) -> None:
        running.pop().close()

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(end, always_call=True).remove)
        yield


def with_bias(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K + c] and k [B, T, H, K + c] whose scaled products have the bias too.

    bias: [B, H, T], added to the score of each key. Its columns are parts of at most 8 binary
        digits, which no matmul rounds: three hold it to float32's precision in any dtype of q, and
        in float64 it has one. They are divided by 64, so that float16 does not overflow.
    """
    share = 64
    heads = q.shape[2] // k.shape[2]
    rest = (bias.transpose(1, 2) / (scale * share))[..., None]
    parts = []
    for _ in range(3 if q.dtype != torch.float64 else 1):
        part = rest if q.dtype == torch.float64 else rest.bfloat16()
        parts.append(part.to(q.dtype))
        rest = rest - part.to(rest.dtype)
    columns = torch.cat(parts, dim=-1)
    q = torch.cat([q, torch.full_like(columns, share)], dim=-1)
    return q, torch.cat([k.repeat_interleave(heads, dim=2), columns], dim=-1)
