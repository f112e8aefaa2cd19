"""`flash_attention` and `AttentionAlignment`: misuse is refused, and torch.library's checks.

`OISD_ATTENTION_IMPL=triton TRITON_INTERPRET=1` runs it on the Triton kernels.
"""

from __future__ import annotations

import re

import pytest
import torch

from oisd_kernels import AttentionAlignment, attention_divergence, flash_attention
from oisd_kernels.attention import flash
from tests.oisd_kernels.attention.test_attention_reference import offsets
from tests.oisd_kernels.attention.test_flash_attention import IMPL, leaves, packed


def test_order_is_checked():
    inputs = packed()
    alignment = AttentionAlignment()
    with pytest.raises(RuntimeError, match="before flash_attention"):
        alignment.loss(*inputs[3:])
    flash_attention(*inputs[:3], alignment=alignment, impl=IMPL)
    alignment.loss(*inputs[3:])
    with pytest.raises(RuntimeError, match="twice"):
        alignment.loss(*inputs[3:])
    with pytest.raises(RuntimeError, match="make a new AttentionAlignment"):
        flash_attention(*inputs[:3], alignment=alignment, impl=IMPL)


def test_second_derivatives_are_refused():
    inputs = packed()
    x = leaves(inputs[:3])
    out, _ = flash_attention(*x, impl=IMPL)
    with pytest.raises(RuntimeError, match="cannot itself be differentiated"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    rows = attention_divergence(*x[:2], *inputs[3:], impl=IMPL)
    with pytest.raises(RuntimeError, match="cannot itself be differentiated"):
        torch.autograd.grad(rows.sum(), x[:2], create_graph=True)


X = torch.zeros
LAYER = {"q": X(5, 4, 8), "k": X(5, 2, 8), "v": X(5, 2, 8)}


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("q", X(5, 8), "[5, 8]"),
        ("k", X(6, 2, 8), "[6, 2, 8]"),
        ("k", X(5, 3, 8), "J = 3"),
        ("k", X(5, 2, 8).bfloat16(), "torch.bfloat16"),
        ("v", X(5, 4, 8), "[5, 4, 8]"),
        ("v", X(5, 2, 8).double(), "torch.float64"),
        ("v", X(5, 2, 8, device="meta"), "meta"),
        ("cu_seqlens", torch.tensor([1, 5]), "[1, 5]"),
        ("cu_seqlens", torch.tensor([0, 3, 2, 5]), "[0, 3, 2, 5]"),
        ("cu_seqlens", torch.tensor([0, 4]), "[0, 4]"),
        ("causal", None, "None"),
        ("window", 0, "0"),
        ("softcap", -1.0, "-1.0"),
        ("scale", 0.0, "0.0"),
        ("impl", "eager", "'eager'"),
        ("impl", "flash", "'flash'"),
    ],
)
def test_rejects(name, value, got):
    pattern = rf"^flash_attention: {name} must .*, got .*{re.escape(got)}"
    with pytest.raises(ValueError, match=pattern):
        flash_attention(**{**LAYER, name: value})


@pytest.mark.parametrize(
    "name, value, got",
    [
        ("q_teacher", X(5, 2, 8), "[5, 2, 8]"),
        ("q_teacher", X(6, 4, 8), "[6, 4, 8]"),
        ("q_teacher", X(1, 5, 4, 8), "[1, 5, 4, 8]"),
        ("k_teacher", X(5, 3, 8), "J = 3"),
        ("token_weight", X(6), "[6]"),
        ("lse_teacher", X(5, 4), "[5, 4]"),
        ("scale_teacher", 0.0, "0.0"),
    ],
)
def test_loss_rejects(name, value, got):
    alignment = AttentionAlignment()
    flash_attention(**LAYER, alignment=alignment)
    arguments = {"q_teacher": LAYER["q"], "k_teacher": LAYER["k"], name: value}
    pattern = rf"^AttentionAlignment.loss: {name} must .*, got .*{re.escape(got)}"
    with pytest.raises(ValueError, match=pattern):
        alignment.loss(**arguments)


def test_triton_rejects_a_wide_head_and_a_cpu():
    wide = {name: X(2, 1, 257) for name in "qkv"}
    with pytest.raises(ValueError, match=r'at most 256 with impl="triton" here, got K = 257'):
        flash_attention(**wide, impl="triton")
    if IMPL != "triton":
        with pytest.raises(ValueError, match='q must be on a GPU with impl="triton"|impl must be'):
            flash_attention(**LAYER, impl="triton")


# ---------------------------------------------------------------- torch.library


def test_opcheck():
    q, k, v, _, _ = leaves(packed([3, 4], 2, 1, 4))
    cu_seqlens = offsets([3, 4])
    options = (None, True, 3, 2.0, 0.5, IMPL)
    torch.library.opcheck(
        torch.ops.oisd_kernels.flash_attention.default, (q, k, v, cu_seqlens, None, *options)
    )
    keyed = (q, k, v, cu_seqlens, AttentionAlignment()._key, *options)
    torch.library.opcheck(
        flash.flash_attention_op, keyed, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "aligned"])
def test_fullgraph_compile(fused):
    inputs = packed([7])

    def run(q, k, v, alignment):
        out, lse = flash_attention(q, k, v, impl=IMPL, window=3, alignment=alignment)
        loss = out.sin().sum() + lse.cos().sum()
        return loss if alignment is None else loss + 50 * alignment.loss(*inputs[3:]).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second time with an alignment of another number
        x, y = leaves(inputs[:3]), leaves(inputs[:3])
        wanted = run(*x, AttentionAlignment() if fused else None)
        found = compiled(*y, AttentionAlignment() if fused else None)
        wanted.backward()
        found.backward()
        torch.testing.assert_close(found, wanted)
        for a, b in zip(y, x, strict=True):
            assert torch.equal(a.grad, b.grad) and b.grad.norm() > 1e-3
