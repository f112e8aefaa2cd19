"""Learned sinks: the reference against a softmax over keys and sink, the others against it.

`OISD_ATTENTION_IMPL=triton TRITON_INTERPRET=1` runs it on the Triton kernels.
"""

import math
import os
import re

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention, reference
from oisd_kernels.attention import flash, torch_blocks
from oisd_kernels.attention.divergence import divergence_op
from tests.interpreter import INTERPRETED, outside, passes_in_the_interpreter
from tests.oisd_kernels.attention.test_attention_reference import make, offsets, sampled
from tests.oisd_kernels.test_reference import (
    GRADIENT_BOUND,
    LOSS_BOUND,
    assert_gradient_close,
    assert_loss_close,
    direct_divergence,
    leaf,
    normal,
)

IMPL = os.environ.get("OISD_ATTENTION_IMPL", "torch")
LENGTHS = [1, 2, 0, 33, 20] if IMPL == "torch" else [3, 0, 17]
# A kernel over sampled keys takes a query at a time.
SAMPLED_LENGTHS = LENGTHS if IMPL == "torch" else [3, 0, 4]
N, H = sum(LENGTHS), 4
DIVERGENCES = [("jsd", 0.3), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
MASKS = [
    pytest.param({}, id="causal"),
    pytest.param({"window": 3, "softcap": 2.0}, id="window3-softcap"),
    pytest.param({"causal": False, "window": 5}, id="window5-full"),
]
# Student and teacher have a sink, or one of them; with a KL the other one is infinite.
OWNERS = [
    pytest.param(divergence, beta, own, last, id=f"{divergence}-{name}")
    for divergence, beta in DIVERGENCES
    for name, own, last in (("both", 1, 1), ("student", 1, 0), ("teacher", 0, 1))
    if (divergence, own, last) not in (("forward_kl", 0, 1), ("reverse_kl", 1, 0))
]
each_divergence = pytest.mark.parametrize("divergence, beta", DIVERGENCES)
in_torch = pytest.mark.skipif(INTERPRETED, reason="the same in the other process")


@outside
def test_the_interpreter_passes():
    some = "jsd-both or minus_infinity or sampled-jsd or all-keys-jsd or torch.float32"
    # In float32 they are among the others.
    again = "test_divergence[few-blocks-jsd-both-causal] or minus_infinity and torch.float64"
    some = f"({some}) and not ({again})"
    passes_in_the_interpreter(__file__, "-k", some, OISD_ATTENTION_IMPL="triton")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@outside
def test_the_interpreter_passes_all():
    passes_in_the_interpreter(__file__, timeout=1400, OISD_ATTENTION_IMPL="triton")


@pytest.fixture(params=["few-blocks", "many-blocks"] if IMPL == "torch" else ["few-blocks"])
def block_size(request, monkeypatch):
    if request.param == "many-blocks":
        monkeypatch.setattr(torch_blocks, "CPU_BLOCK", 1)


def sinks(seed: int = 7, shift: float = 0.0) -> list[Tensor]:
    return [shift + normal(H, seed=seed + i) for i in range(2)]


def layers(dtype=torch.float64, rows: int = N) -> list[Tensor]:
    """q, k, q_teacher, k_teacher, packed; GQA, the teacher's width and key heads its own."""
    return [x.to(dtype) for x in make(rows, H, 2, 8, teacher_key_heads=1, teacher_dim=6)]


def samples() -> tuple[dict[str, Tensor], int]:
    """Sequences with sampled keys, as options, and their rows."""
    index = torch.cat([sampled(n, n, 6) for n in SAMPLED_LENGTHS if n])
    return {"cu_seqlens": offsets(SAMPLED_LENGTHS), "key_index": index}, len(index)


def weight_of(rows: int = N) -> Tensor:
    weight = normal(rows, seed=5)
    weight[::3] = 0
    return weight


def divergence_and_gradients(impl, tensors, sink, sink_teacher, upstream=None, **options):
    """loss, dq, dk and, with a sink of the student, dsink."""
    q, k, *teacher = tensors
    leaves = [leaf(x) for x in (q, k) if x is not None]
    own = None if sink is None else leaf(sink)
    loss = attention_divergence(
        *leaves, *teacher, sink=own, sink_teacher=sink_teacher, impl=impl, **options
    )
    wanted = leaves if own is None else [*leaves, own]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


def assert_same(found, wanted, bound, loss_bound=None):
    assert_loss_close(found[0], wanted[0], bound / 10 if loss_bound is None else loss_bound)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert_gradient_close(got.double(), want, bound)


# ---------------------------------------------------------------- the reference


@in_torch
@pytest.mark.parametrize("divergence, beta, own, last", OWNERS)
def test_reference_is_a_softmax_over_keys_and_sink(divergence, beta, own, last):
    """Heads of their own keys; maps by hand, a layer without a sink with a column of 0."""
    q, k, qt, kt = make(6, H, H, 5)
    found = reference.attention_divergence(
        q, k, qt, kt, sink=sinks()[0] if own else None, sink_teacher=sinks()[1] if last else None,
        divergence=divergence, beta=beta, scale=0.5, softcap=3.0, window=4,
    )  # fmt: skip

    def attend(q, k, sink):
        scores = 3.0 * torch.tanh(0.5 * torch.einsum("ihk,jhk->hij", q, k) / 3.0)
        ahead = torch.arange(6)[None] - torch.arange(6)[:, None]
        scores = scores.masked_fill((ahead > 0) | (ahead <= -4), -math.inf)
        column = scores.new_full((H, 6, 1), -math.inf) if sink is None else sink[:, None, None]
        return torch.cat([scores, column.expand(H, 6, 1)], -1).softmax(-1)

    p, q = attend(qt, kt, sinks()[1] if last else None), attend(q, k, sinks()[0] if own else None)
    wanted = direct_divergence(p, q, divergence, beta).mean(0)
    assert wanted.min() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@in_torch
def test_reference_attention_drops_the_sinks_column():
    q, k, v, _ = make(6, H, H, 5)
    out, lse = reference.attention(q, k, v, sink=sinks()[0], causal=False)
    scores = 5**-0.5 * torch.einsum("ihk,jhk->hij", q, k)
    scores = torch.cat([scores, sinks()[0][:, None, None].expand(H, 6, 1)], -1)
    wanted = torch.einsum("hij,jhk->ihk", scores.softmax(-1)[..., :-1], v)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@in_torch
@pytest.mark.parametrize("divergence, beta, own, last", OWNERS[::2])
def test_gradcheck_of_the_reference(divergence, beta, own, last):
    q, k, qt, kt = make(5, 2, 1, 3)
    q, k, sink = torch.stack([q, 0.5 * q]), torch.stack([k, k]), normal(2, 2, seed=3)

    def loss(q, k, sink):
        return reference.attention_divergence(
            q, k, qt, kt, sink=sink if own else None, sink_teacher=sinks()[0][:2] if last else None,
            divergence=divergence, beta=beta, softcap=2.0,
        )  # fmt: skip

    assert gradcheck(loss, (leaf(q), leaf(k), leaf(sink)))

    def attend(q, k, sink):
        return reference.attention(q, k, k.sin(), sink=sink, window=3)

    assert gradcheck(attend, (leaf(q[0]), leaf(k[0]), leaf(sink[0])))


# ---------------------------------------------------------------- attention


def attend(impl, tensors, sink, d_out, d_lse, **options):
    """out, lse, dq, dk, dv, dsink."""
    leaves = [leaf(x) for x in (*tensors, sink)]
    out, lse = flash_attention(*leaves[:3], sink=leaves[3], impl=impl, **options)
    upstream = [d_out.to(out), d_lse.to(lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype, masks, block_size):
    q, k, v = (x.to(dtype) for x in (*layers()[:2], normal(N, 2, 8, seed=4)))
    # A sink in the layer's dtype, as gpt-oss has it.
    upstream, sink = (normal(N, H, 8, seed=5), normal(H, N, seed=6)), sinks()[0].to(dtype)
    options = {"cu_seqlens": offsets(LENGTHS), **masks}
    found = attend(IMPL, (q, k, v), sink, upstream[0].to(dtype), upstream[1], **options)
    exact = [x.double() for x in (q, k, v)]
    wanted = attend(
        "reference", exact, sink.double(), upstream[0].to(dtype), upstream[1], **options
    )
    # The interpreter truncates to bf16 where a GPU rounds.
    bound = GRADIENT_BOUND[dtype] * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)
    assert found[0].dtype == dtype and found[5].dtype == sink.dtype
    for got, want in zip(found, wanted, strict=True):
        assert_gradient_close(got.double(), want, bound)
    for x in found[:2]:
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_sink_at_minus_infinity_is_none(dtype):
    q, k, v = (x.to(dtype) for x in (*layers()[:2], normal(N, 2, 8, seed=4)))
    d_out = normal(N, H, 8, seed=5).to(dtype)
    x, y = [leaf(x) for x in (q, k, v)], [leaf(x) for x in (q, k, v)]
    sink = leaf(torch.full((H,), -math.inf))
    plain = flash_attention(*x, cu_seqlens=offsets(LENGTHS), impl=IMPL)
    found = flash_attention(*y, sink=sink, cu_seqlens=offsets(LENGTHS), impl=IMPL)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    plain[0].backward(d_out)
    found[0].backward(d_out)
    assert all(torch.equal(a.grad, b.grad) and b.grad.norm() > 1 for a, b in zip(x, y, strict=True))
    assert torch.equal(sink.grad, torch.zeros(H))


@pytest.mark.parametrize("height", [14.0, 60.0])
def test_attention_where_nearly_all_mass_is_on_the_sink(height):
    q, k, v = (x.float() for x in (*layers()[:2], normal(N, 2, 8, seed=4)))
    upstream, sink = (normal(N, H, 8, seed=5), torch.zeros(H, N)), sinks(shift=height)[0].float()
    options = {"cu_seqlens": offsets(LENGTHS)}
    found = attend(IMPL, (q, k, v), sink, *upstream, **options)
    wanted = attend(
        "reference", [x.double() for x in (q, k, v)], sink.double(), *upstream, **options
    )
    for got, want in zip(found, wanted, strict=True):
        assert want.norm() > 1e-30
        assert (got.double() - want).norm() <= 1e-4 * want.norm()


# ---------------------------------------------------------------- the divergence


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("divergence, beta, own, last", OWNERS)
def test_divergence(divergence, beta, own, last, masks, block_size):
    sink, sink_teacher = (x if has else None for x, has in zip(sinks(), (own, last), strict=True))
    options = {"divergence": divergence, "beta": beta, "token_weight": weight_of(), **masks}
    options |= {"cu_seqlens": offsets(LENGTHS)}
    given = layers(), sink, sink_teacher, normal(N, seed=6)
    wanted = divergence_and_gradients("reference", *given, **options)
    found = divergence_and_gradients(IMPL, *given, **options)
    assert_same(found, wanted, 1e-10)
    without = attention_divergence(*layers(), impl="reference", **options)
    assert (wanted[0] - without).norm() > 1e-2 * wanted[0].norm(), "the sink counts"


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_in(dtype, divergence, beta):
    """Sinks of float32 beside bf16 queries, as where a model keeps them so."""
    tensors, (sink, sink_teacher) = layers(dtype), [x.float() for x in sinks()]
    options = {"divergence": divergence, "beta": beta, "cu_seqlens": offsets(LENGTHS)}
    options |= {"token_weight": weight_of()}
    exact = [x.double() for x in tensors], sink.double(), sink_teacher.double()
    wanted = divergence_and_gradients("reference", *exact, **options)
    found = divergence_and_gradients(IMPL, tensors, sink, sink_teacher, **options)
    bound = GRADIENT_BOUND[dtype] * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)
    assert_same(found, wanted, bound, LOSS_BOUND[dtype])


@each_divergence
@pytest.mark.parametrize("shared", [True, False], ids=["one-sink", "a-sink-a-layer"])
def test_layers(shared, divergence, beta):
    q, k, *teacher = layers()
    q, k = torch.stack([q, -0.5 * q]), torch.stack([k, k.sin()])
    own, last = sinks()
    own = own if shared else torch.stack([own, 1 - own])
    options = {"divergence": divergence, "beta": beta, "cu_seqlens": offsets(LENGTHS)}
    weight = torch.stack([weight_of(), weight_of().roll(1)])
    given = (q, k, *teacher), own, last, normal(2, N, seed=6)
    wanted = divergence_and_gradients("reference", *given, token_weight=weight, **options)
    found = divergence_and_gradients(IMPL, *given, token_weight=weight, **options)
    assert_same(found, wanted, 1e-10)
    assert found[3].shape == own.shape


@pytest.mark.parametrize("masks", MASKS[:2])
@pytest.mark.parametrize("divergence, beta, own, last", OWNERS)
def test_sampled_keys(divergence, beta, own, last, masks):
    """Of which a sink is always one; a row without a sampled key is no row, whoever has a sink."""
    sink, sink_teacher = (x if has else None for x, has in zip(sinks(), (own, last), strict=True))
    where, rows = samples()
    where["key_index"][4:6] = -1
    options = {"divergence": divergence, "beta": beta, **where, **masks}
    options |= {"token_weight": weight_of(rows)}
    given = layers(rows=rows), sink, sink_teacher, normal(rows, seed=6)
    wanted = divergence_and_gradients("reference", *given, **options)
    found = divergence_and_gradients(IMPL, *given, **options)
    assert_same(found, wanted, 1e-10)
    alone = weight_of(rows).zero_()
    alone[4:6] = 1.0
    found = divergence_and_gradients(IMPL, *given, **options | {"token_weight": alone})
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


@pytest.mark.parametrize("sampling", [False, True], ids=["all-keys", "sampled"])
@each_divergence
def test_divergence_where_nearly_all_mass_is_on_the_sink(divergence, beta, sampling):
    """In float32, where 1 - P_sink formed from P_sink would have no digits left."""
    where, rows = samples() if sampling else ({"cu_seqlens": offsets(LENGTHS)}, N)
    tensors, (own, last) = layers(torch.float32, rows), [x.float() for x in sinks(shift=14.0)]
    options = {"divergence": divergence, "beta": beta, **where}
    exact = [x.double() for x in tensors], own.double(), last.double()
    wanted = divergence_and_gradients("reference", *exact, **options)
    found = divergence_and_gradients(IMPL, tensors, own, last, **options)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert_gradient_close(got.double(), want, 1e-4, floor=1e-8)
    assert 1e-9 < wanted[0].abs().max() < 0.1
    assert_loss_close(found[0], wanted[0], 1e-5)


@each_divergence
@pytest.mark.parametrize("sampling", [False, True], ids=["all-keys", "sampled"])
def test_divergence_of_sinks_that_leave_nothing_or_are_nothing(divergence, beta, sampling):
    where, rows = samples() if sampling else ({"cu_seqlens": offsets(LENGTHS)}, N)
    options = {"divergence": divergence, "beta": beta, **where}
    tensors = layers(torch.float32, rows)
    full = torch.full((H,), 60.0)
    for got in divergence_and_gradients(IMPL, tensors, full, full, **options):
        assert got.isfinite().all() and got.abs().max() < 1e-6
    none = torch.full((H,), -math.inf)
    found = divergence_and_gradients(IMPL, tensors, none, none, **options)
    plain = divergence_and_gradients(IMPL, tensors, None, None, **options)
    for got, want in zip(found, plain, strict=False):
        assert want.norm() > 1e-2
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[3], torch.zeros(H))


def test_rows_of_weight_0_may_hold_nan():
    clean, weight = layers(), weight_of()
    weight[-4:] = 0  # keys of rows that are kept must be sound
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[-4:] = math.nan
    options = {"cu_seqlens": offsets(LENGTHS), "token_weight": weight}
    wanted = divergence_and_gradients(IMPL, clean, *sinks(), **options)
    found = divergence_and_gradients(IMPL, poisoned, *sinks(), **options)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@each_divergence
def test_logsumexp_of_the_forward(divergence, beta):
    """What `flash_attention` returns is what `attention_divergence` takes."""
    tensors, (own, last) = layers(), sinks()
    where = {"cu_seqlens": offsets(LENGTHS)}
    options = {"divergence": divergence, "beta": beta, **where}
    _, lse = flash_attention(*tensors[:2], tensors[1], sink=own, impl=IMPL, **where)
    _, lse_t = flash_attention(*tensors[2:], tensors[3], sink=last, impl=IMPL, **where)
    wanted = divergence_and_gradients("reference", tensors, own, last, **options)
    options |= {"lse": lse, "lse_teacher": lse_t}
    assert_same(divergence_and_gradients(IMPL, tensors, own, last, **options), wanted, 1e-10)


# ---------------------------------------------------------------- both at once


@pytest.mark.parametrize("lse", [False, True], ids=["", "teacher's-lse"])
@pytest.mark.parametrize("divergence, beta, own, last", OWNERS)
def test_alignment_in_the_backward_of_attention(divergence, beta, own, last, lse):
    q, k, qt, kt = layers()
    v = normal(N, 2, 8, seed=4)
    sink, sink_t = (x if has else None for x, has in zip(sinks(), (own, last), strict=True))
    where = {"cu_seqlens": offsets(LENGTHS), "window": 9}
    lse_t = flash_attention(qt, kt, kt, sink=sink_t, impl=IMPL, **where)[1] if lse else None

    def gradients(kind):
        impl = "reference" if kind == "reference" else IMPL
        leaves = [leaf(x) for x in (q, k, v, sink) if x is not None]
        alignment = AttentionAlignment(divergence, beta) if kind == "fused" else None
        student = leaves[3] if own else None
        out, _ = flash_attention(*leaves[:3], sink=student, alignment=alignment, impl=impl, **where)
        if alignment is None:
            rows = attention_divergence(
                *leaves[:2], qt, kt, sink=student, sink_teacher=sink_t, impl=impl, beta=beta,
                divergence=divergence, token_weight=weight_of(), **where,
            )  # fmt: skip
        else:
            rows = alignment.loss(
                qt, kt, sink_teacher=sink_t, token_weight=weight_of(), lse_teacher=lse_t
            )
        total = 0.01 * out.sin().sum() + 3 * rows.sum()
        return [rows.detach(), *torch.autograd.grad(total, leaves)]

    wanted = gradients("reference")
    assert_same(gradients("fused"), wanted, 1e-10)
    if not lse:  # which only the fused one takes
        assert_same(gradients("separate"), wanted, 1e-10)


def test_alignment_alone_reaches_the_sink():
    q, k, qt, kt = layers()
    own, last = sinks()
    found = []
    for impl in ("reference", IMPL):
        sink, alignment = leaf(own), AttentionAlignment()
        flash_attention(q.requires_grad_(), k, k, sink=sink, alignment=alignment, impl=impl)
        alignment.loss(qt, kt, sink_teacher=last).sum().backward()
        found.append(sink.grad)
    assert_gradient_close(found[1], found[0], 1e-10)


# ---------------------------------------------------------------- refusals, torch.library


def test_double_backward_is_refused():
    q, k, qt, kt = layers()
    sink = leaf(sinks()[0])
    for loss in (
        attention_divergence(leaf(q), k, qt, kt, sink=sink, sink_teacher=sink, impl=IMPL).sum(),
        flash_attention(leaf(q), k, k, sink=sink, impl=IMPL)[0].sum(),
    ):
        with pytest.raises(RuntimeError, match="cannot itself be differentiated"):
            torch.autograd.grad(loss, sink, create_graph=True)


@in_torch
@pytest.mark.parametrize(
    "change, name, got",
    [
        ({"sink": torch.zeros(3)}, "sink", "[3]"),
        ({"sink": torch.zeros(4, dtype=torch.int64)}, "sink", "int64"),
        ({"sink": 0.0}, "sink", "float"),
        ({"sink_teacher": torch.zeros(1, 4)}, "sink_teacher", "[1, 4]"),
        ({"sink": None, "divergence": "forward_kl"}, "sink", "None"),
        ({"sink_teacher": None, "divergence": "reverse_kl"}, "sink_teacher", "None"),
    ],
    ids=str,
)
def test_bad_arguments(change, name, got):
    q, k, qt, kt = layers()
    given = {"sink": torch.zeros(4), "sink_teacher": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=rf"^attention_divergence: {name} must .*{re.escape(got)}"):
        attention_divergence(q, k, qt, kt, **given)
    divergence = given.pop("divergence", "jsd")
    sink, last = given["sink"], given["sink_teacher"]
    if name == "sink" and divergence == "jsd":
        with pytest.raises(ValueError, match=rf"^flash_attention: sink must .*{re.escape(got)}"):
            flash_attention(q, k, k, sink=sink)
    else:
        alignment = AttentionAlignment(divergence)
        flash_attention(q, k, k, sink=sink, alignment=alignment)
        with pytest.raises(ValueError, match=rf"^AttentionAlignment.loss: {name} must "):
            alignment.loss(qt, kt, sink_teacher=last)


@in_torch
def test_a_stack_of_sinks_needs_a_stack_of_layers():
    q, k, qt, kt = layers()
    with pytest.raises(ValueError, match=r"sink must have shape \[H\] = \[4\], got \[2, 4\]"):
        attention_divergence(q, k, qt, kt, sink=torch.zeros(2, 4), sink_teacher=torch.zeros(4))
    two = torch.stack([q, q]), torch.stack([k, k])
    with pytest.raises(ValueError, match=r"sink must have shape \[S, H\] = \[2, 4\], got \[3, 4\]"):
        attention_divergence(*two, qt, kt, sink=torch.zeros(3, 4), sink_teacher=torch.zeros(4))


@in_torch
@pytest.mark.parametrize("sampling", [False, True], ids=["all-keys", "sampled"])
def test_opcheck(sampling):
    q, k, qt, kt = make(7, 2, 1, 4)
    own, last = normal(2, seed=1), normal(2, seed=2)
    where = offsets([3, 4])
    index = sampled(7, 3, 4) if sampling else None
    options = (7, True, 3, 2.0, 0.5, 0.4, "jsd", 0.3, IMPL)
    arguments = leaf(q[None]), leaf(k[None]), qt, kt, normal(1, 7, seed=4), where, index, None, None
    torch.library.opcheck(divergence_op, (*arguments, *options, leaf(own[None]), last))
    if not sampling:
        masks = (None, None, True, 3, 2.0, 0.5, IMPL)
        call = (leaf(q), leaf(k), leaf(k.sin()), where, *masks, leaf(own))
        torch.library.opcheck(flash.flash_attention_op, call)


@in_torch
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_fullgraph_compile(fused):
    q, k, qt, kt = layers()
    own, last = sinks()

    def run(q, k, sink, alignment):
        out, lse = flash_attention(q, k, k.sin(), sink=sink, impl=IMPL, alignment=alignment)
        loss = out.sin().sum() + lse.cos().sum()
        if alignment is not None:
            return loss + 50 * alignment.loss(qt, kt, sink_teacher=last).sum()
        rows = attention_divergence(q, k, qt, kt, sink=sink, sink_teacher=last, impl=IMPL)
        return loss + 50 * rows.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, y = [leaf(t) for t in (q, k, own)], [leaf(t) for t in (q, k, own)]
    wanted = run(*x, AttentionAlignment() if fused else None)
    found = compiled(*y, AttentionAlignment() if fused else None)
    wanted.backward()
    found.backward()
    torch.testing.assert_close(found, wanted)
    for a, b in zip(y, x, strict=True):
        assert torch.equal(a.grad, b.grad) and b.grad.norm() > 1e-3
