"""Attention that layers compute themselves, ALiBi among it: read as the layer computes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from oisd.models import Taps, UnsupportedModelError, pack_padded
from oisd.models.inline import _Watch, with_bias
from oisd_kernels import attention_divergence, reference
from tests.oisd.models.test_models import distribution, gradients, tokens
from tests.tiny_models import VOCAB

torch.set_num_threads(1)

LAYERS, T = 4, 13
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
_GPT = dict(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, n_inner=48)
_FALCON = dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4)
KINDS: dict[str, dict[str, Any]] = {
    "falcon": _FALCON,
    "falcon in eager": dict(_FALCON, attn_implementation="eager"),
    "falcon with ALiBi": dict(
        _FALCON, alibi=True, multi_query=False, attn_implementation="eager"
    ),
    "falcon with ALiBi and one key head": dict(_FALCON, alibi=True, multi_query=True),
    "bloom": dict(hidden_size=32, n_layer=LAYERS, n_head=4),
    "bloom with 6 heads": dict(hidden_size=48, n_layer=LAYERS, n_head=6),
    "mpt": dict(d_model=32, n_heads=4, n_layers=LAYERS, max_seq_len=64),
    "xglm": dict(d_model=32, attention_heads=4, num_layers=LAYERS, ffn_dim=48,
                 max_position_embeddings=64, dropout=0, attention_dropout=0, layerdrop=0),
    "gpt_neox_japanese": dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
                              intermediate_multiple_size=2, max_position_embeddings=64),
    "gpt_neo": dict(hidden_size=32, num_layers=LAYERS, num_heads=4, window_size=5,
                    attention_types=[[["global", "local"], 2]], max_position_embeddings=64,
                    intermediate_size=48),
    "openai-gpt": _GPT,
}  # fmt: skip
if OLD:  # newer ones use transformers' interface
    KINDS |= {
        "codegen": dict(_GPT, rotary_dim=4),
        "gptj": dict(_GPT, rotary_dim=4),
        "ctrl": dict(_GPT, dff=48),
        "nemotron": dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, intermediate_size=48),
    }  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
alibi = pytest.mark.parametrize("kind", [k for k in KINDS if "ALiBi" in k or k in ("bloom", "mpt")])


def tiny(kind: str, **overrides: Any):
    options = dict(
        vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    options |= KINDS[kind] | overrides
    load = {key: options.pop(key) for key in ("attn_implementation", "dtype") if key in options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind.split(" ")[0], **options)
        model = AutoModelForCausalLM.from_config(config, **load)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif any(part in name for part in ("query_key_value", "q_proj", "c_attn", "Wq")):
                parameter.data.mul_(8 if "c_attn" in name else 3)  # attention far from uniform
    return model.eval()


@pytest.fixture
def seen(monkeypatch):
    """Each softmax [B, H, T, T] of the forwards in the test, from SDPA's arguments too."""
    found: list[torch.Tensor] = []
    softmax, fused = F.softmax, F.scaled_dot_product_attention

    def keep(weights):
        if weights.ndim == 3:
            weights = weights.unflatten(0, (-1, 4))
        found.append(weights.detach())

    def of_eager(scores, *args, **kwargs):
        weights = softmax(scores, *args, **kwargs)
        if weights.shape[-1] == weights.shape[-2]:
            keep(weights)
        return weights

    def of_fused(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        scores = (scale or q.shape[-1] ** -0.5) * q @ k.mT
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf)
        keep(softmax(scores + attn_mask, -1))
        return fused(q, k, v, attn_mask, dropout_p, False, scale=scale, **more)

    def install():
        found.clear()
        monkeypatch.setattr(F, "softmax", of_eager)
        monkeypatch.setattr(torch, "softmax", of_eager)
        monkeypatch.setattr(F, "scaled_dot_product_attention", of_fused)
        return found

    yield install
    monkeypatch.undo()


@kinds
def test_equal_to_the_softmax_inside(kind, seen):
    model, ids = tiny(kind), tokens(length=T)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0  # right padding
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    taps = Taps(model, [2])
    assert taps._attending == {4: True, 2: True} and taps.attention_layers == ((2, 4),)
    with taps:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert torch.equal(out.logits, plain)
        pair = taps.attention()[0]
        windows = [taps._calls[layer].window for layer in (2, 4)]
    weights = seen()
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert len(weights) == LAYERS
    computed = (
        distribution(pair.q, pair.k, pair.scale, None, windows[0]),
        distribution(pair.q_teacher, pair.k_teacher, pair.scale_teacher, None, windows[1]),
    )
    assert windows == ([5, 5] if kind == "gpt_neo" else [None, None])
    for found, wanted in zip(computed, (weights[1], weights[3]), strict=True):
        assert found[0, :, -1].std() > 0.02
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(found[1, :, :8, :8], wanted[1, :, :8, :8], rtol=1e-4, atol=2e-6)


@kinds
def test_gradients_reach_the_student_layers_and_survive_checkpointing(kind):
    model, ids = tiny(kind).train(), tokens(length=T)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    taps = Taps(model, [2])
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                continue
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with taps:
            model(input_ids=ids, use_cache=False)
            pair = taps.attention()[0]
            loss = attention_divergence(
                pair.q, pair.k, pair.q_teacher, pair.k_teacher, window=pair.window,
                scale=pair.scale, scale_teacher=pair.scale_teacher, reduction="sum",
            )  # fmt: skip
        results.append(gradients(model, loss))
    layers = [set(map(id, layer.parameters())) for layer in taps._layout.layers]
    moved = [sum(p.grad.norm() for p in model.parameters() if id(p) in own and p.grad is not None)
             for own in layers]  # fmt: skip
    assert moved[0] > 1e-3 and moved[1] > 1e-3 and moved[2:] == [0, 0]
    for name, gradient in results[0].items():
        assert torch.equal(results[-1][name], gradient), name


@alibi
def test_left_padding_counts_positions_within_the_row(kind):
    model, ids = tiny(kind), tokens(length=T)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad(), Taps(model, [2]) as taps:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        pair = taps.attention()[0]
        q, k, offsets = pack_padded(mask, pair.q, pair.k)
        model(input_ids=ids[:1, 5:], use_cache=False)
        alone = taps.attention()[0]
    wanted = distribution(alone.q, alone.k, alone.scale, None, None)
    found = distribution(q[None, : offsets[1]], k[None, : offsets[1]], pair.scale, None, None)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def test_autocast_and_bfloat16():
    ids = tokens(length=T)
    for model, context in (
        (tiny("bloom"), torch.autocast("cpu", torch.bfloat16)),
        (tiny("bloom", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)),
    ):
        with context, Taps(model, [2]) as taps:
            model(input_ids=ids, use_cache=False)
            pair = taps.attention()[0]
            pair.q.float().sin().sum().backward()
        assert pair.q.isfinite().all() and pair.q.shape == pair.k.shape == (2, T, 4, 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_bias_is_exact_to_float32s_rounding(dtype):
    """Of 8,192 keys, with the steepest slope of ALiBi, against the same sum in float64."""
    torch.manual_seed(0)
    length, heads, scale = 8192, 3, 64**-0.5
    slopes = torch.tensor([2**-0.5, 2**-4.5, 2**-8.0])
    bias = slopes[None, :, None] * torch.arange(length)
    q, k = (
        torch.randn(1, length, 1, 64).to(dtype).repeat(1, 1, heads, 1),
        torch.randn(1, length, 1, 64).to(dtype),
    )
    more_q, more_k = with_bias(q, k, bias, scale)
    assert more_q.shape == more_k.shape == (1, length, heads, 67) and more_q.dtype == dtype
    rows = torch.tensor([1, 100, 4097, 8191])
    for head in range(heads):
        found = scale * more_q[0, rows, head].double() @ more_k[0, :, head].double().T
        wanted = scale * q[0, rows, head].double() @ k[0, :, 0].double().T + bias[0, head].double()
        assert wanted.std() > 1
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error < 2**-22
        naive = (bias[0, head] / scale).to(dtype).double() * scale - bias[0, head].double()
        if dtype == torch.bfloat16:  # one column would be off by whole units
            assert naive.abs().max() > 2**-10 * bias[0, head].max()


def test_the_loss_with_bias_equals_the_maps():
    torch.manual_seed(0)
    q, k, other_q, other_k = (torch.randn(1, 9, 4, 8, dtype=torch.float64) for _ in range(4))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    bias = slopes[None, :, None] * torch.arange(9)
    pair = with_bias(q, k, bias, 0.3), with_bias(other_q, other_k, bias, 0.3)
    found = attention_divergence(*pair[0], *pair[1], scale=0.3)

    def maps(q, k):
        scores = 0.3 * torch.einsum("bihk,bjhk->bhij", q, k) + bias[:, :, None]
        hidden = torch.ones(9, 9).triu(1).bool()
        return scores.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, -1e3)

    own, last = maps(q, k), maps(other_q, other_k)
    mixture = torch.logaddexp(own, last) - math.log(2)
    wanted = 0.5 * (own.exp() * (own - mixture) + last.exp() * (last - mixture)).sum(-1).mean(1)
    assert wanted.norm() > 0.1
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-7)
    assert reference.attention_divergence(*pair[0], *pair[1], scale=0.3).allclose(found.double())


def test_a_layer_that_computes_something_else_is_refused(monkeypatch):
    model = tiny("bloom")
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, *a, **k: softmax(1.5 * x, *a, **k) ** 2)
    with pytest.raises(UnsupportedModelError, match="not the causal softmax|no softmax"):
        Taps(model, [2])
    monkeypatch.undo()
    Taps(model, [2])


def test_generation_and_pause():
    model, ids = tiny("bloom"), tokens(length=5)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **options)
    with Taps(model, [2]) as taps:
        assert torch.equal(model.generate(ids, **options), plain)
        with pytest.raises(RuntimeError, match="as many keys as queries"):
            taps.attention()
        taps.enabled = False
        assert torch.equal(model.generate(ids, **options), plain)


def test_nothing_is_left_behind():
    model = tiny("mpt")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    taps = Taps(model, [2])
    with pytest.raises(IndexError), taps:
        model(input_ids=tokens() + VOCAB, use_cache=False)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_fused_kernel_is_refused():
    with pytest.raises(UnsupportedModelError, match='attention_kernel="fused"'):
        Taps(tiny("bloom"), [2], attention_kernel="fused")
    assert Taps(tiny("bloom"), [2], attention_kernel="auto")._fusable == ()


def test_attention_that_was_not_seen_is_missed_in_words(monkeypatch):
    """As in a compiled model, whose code runs without the function mode."""
    model = tiny("bloom")
    taps = Taps(model, [2])
    monkeypatch.setattr(_Watch, "_see", lambda *_: None)
    with torch.no_grad(), taps:
        model(input_ids=tokens(), use_cache=False)
        for read in (taps.student_hidden, taps.attention):
            with pytest.raises(RuntimeError, match="by torch.compile; do not compile this model"):
                read()
