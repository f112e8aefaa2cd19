"""Models in which not every layer attends by softmax: which layers the attention term compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from oisd.lens.attention import LayerAttention
from oisd.models import Taps, UnsupportedModelError
from tests.oisd.models.test_models import distribution, tokens
from tests.tiny_models import VOCAB

torch.set_num_threads(1)

COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
             mamba_chunk_size=8)  # fmt: skip
EVERY_THIRD = ["mamba", "mamba", "attention"] * 2
LINEAR = dict(
    layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# The settings of a type, then the student layer with the layers compared for it.
HYBRIDS: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "qwen3_5_text": (LINEAR, 4, (3, 6)),
    "qwen3_next": (
        {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24}, 5, (3, 6)
    ),
    "granitemoehybrid": (
        {**MAMBA, "layer_types": EVERY_THIRD, "num_local_experts": 4, "num_experts_per_tok": 2,
         "shared_intermediate_size": 24}, 4, (3, 6)
    ),
    "nemotron_h": (
        dict(layers_block_type=["mamba", "attention", "mlp"] * 2, mamba_num_heads=8,
             mamba_head_dim=8, ssm_state_size=8, n_groups=1, num_hidden_layers=None), 3, (2, 5)
    ),
    "jamba": (
        dict(attn_layer_period=3, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1,
             mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False), 4, (2, 5)
    ),
    "lfm2": (dict(layer_types=["conv", "full_attention"] * 3), 3, (2, 6)),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 64}, 4, (4, 6)),
    "recurrent_gemma": (
        dict(block_types=["recurrent", "attention"] * 3, lru_width=32, attention_window_size=5),
        3, (2, 6),
    ),
    "kimi_linear": ({}, 4, (3, 6)),
    "lfm3": ({}, 4, (3, 6)),
    "bailing_hybrid": ({}, 4, (3, 6)),
}  # fmt: skip
KNOWN = [name for name in HYBRIDS if name in CONFIG_MAPPING and HYBRIDS[name][0]]


def hybrid(name: str, **overrides: Any):
    options = {**COMMON, **HYBRIDS[name][0], **overrides}
    options = {key: value for key, value in options.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    return model.train()


def seen_attention(model, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """[B, H, T, T] the softmax that the layer computes in eager attention."""
    model.set_attn_implementation("eager")
    found = []
    softmax = torch.nn.functional.softmax

    def watch(scores, *args, **kwargs):
        weights = softmax(scores, *args, **kwargs)
        if weights.ndim == 4 and weights.shape[-2:] == (ids.shape[1],) * 2:
            found.append(weights)
        return weights

    def start(*_):
        torch.nn.functional.softmax = watch

    def stop(*_):
        torch.nn.functional.softmax = softmax

    module = model.get_decoder().layers[layer - 1]
    hooks = module.register_forward_pre_hook(start), module.register_forward_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        stop()
        for hook in hooks:
            hook.remove()
    (weights,) = found
    return weights


@pytest.mark.parametrize("name", KNOWN)
def test_layers_compared(name):
    model, ids = hybrid(name), tokens(length=11)
    _, student, pair = HYBRIDS[name]
    taps = Taps(model, [student])
    assert taps.attention_layers == (pair,)
    usual = pair == (student, 6)
    assert (taps.attention_words == "") is usual
    if not usual:
        assert f"layer {pair[0]} for student layer {student}" in taps.attention_words
        assert f"with layer {pair[1]}, of 6 layers" in taps.attention_words
    plain = model(input_ids=ids, use_cache=False).logits
    with taps:
        out = model(input_ids=ids, use_cache=False)
        torch.testing.assert_close(out.logits, plain, rtol=0, atol=0)
        assert len(taps.student_hidden()) == 1
        found = taps.attention()[0]
        windows = [taps._calls[layer].window for layer in pair]
    own = distribution(found.q, found.k, found.scale, found.softcap, windows[0])
    last = distribution(
        found.q_teacher, found.k_teacher, found.scale_teacher, found.softcap, windows[1]
    )
    (found.q.sin().sum() + found.k.cos().sum()).backward()
    reached = [
        any(p.grad is not None and p.grad.norm() > 0 for p in layer.parameters())
        for layer in taps._layout.layers
    ]
    assert reached == [layer <= pair[0] for layer in range(1, 7)]
    if name == "recurrent_gemma" and taps._attending[pair[0]]:
        return  # it knows SDPA alone, which the probe has compared
    for layer, computed in zip(pair, (own, last), strict=True):
        wanted = seen_attention(model, layer, ids)
        assert wanted.std() > 1e-2
        torch.testing.assert_close(computed, wanted, rtol=1e-4, atol=1e-6)


def test_two_student_layers_may_share_a_pair():
    model = hybrid("qwen3_5_text")
    with Taps(model, [3, 4, 5]) as taps:
        model(input_ids=tokens(), use_cache=False)
        assert taps.attention_layers == ((3, 6),) * 3
        assert len(taps.attention()) == 1 and len(taps.student_hidden()) == 3


def test_layers_can_be_chosen():
    model = hybrid("lfm2")
    with Taps(model, [3, 5], attention_student=[2, 2], attention_teacher=4) as taps:
        model(input_ids=tokens(), use_cache=False)
        assert taps.attention_layers == ((2, 4), (2, 4))
        assert "extends the paper" in taps.attention_words
        chosen = taps.attention()[0]
    with Taps(model, [2]) as taps:
        model(input_ids=tokens(), use_cache=False)
        assert torch.equal(taps.attention()[0].q, chosen.q)
        assert not torch.equal(taps.attention()[0].q_teacher, chosen.q_teacher)


@pytest.mark.parametrize(
    ("students", "options", "error", "message"),
    [
        ([1], {}, UnsupportedModelError, "layer 1 has no softmax .*nearest possible is layer 2"),
        ([5], dict(attention_teacher=2), UnsupportedModelError, "is not below the teacher's"),
        ([3], dict(attention_student=[3]), UnsupportedModelError, "layer 3 has no softmax"),
        ([3], dict(attention_teacher=5), UnsupportedModelError, "layer 5 has no softmax"),
        ([3], dict(attention_student=[1, 2]), ValueError, "one layer for each"),
        ([3], dict(attention_student=[4], attention_teacher=4), ValueError, r"lie in 1\.\.3"),
        ([3], dict(attention_student=[0]), ValueError, r"attention_student must lie in 1\.\.5"),
        ([3], dict(attention_teacher=7), ValueError, r"attention_teacher must lie in 2\.\.6"),
        ([3], dict(attention_teacher=4, attention=False), ValueError, "attention must be True"),
    ],
    ids=str,
)
def test_refused_with_the_nearest_possible(students, options, error, message):
    with pytest.raises(error, match=message):
        Taps(hybrid("lfm2"), students, **options)


def test_a_student_above_the_last_layer_that_attends():
    model = hybrid("lfm2", layer_types=["conv", "full_attention"] * 2 + ["conv"] * 2)
    with pytest.raises(UnsupportedModelError, match="layer 4, is not below .* layer 2, by"):
        Taps(model, [5])
    assert Taps(model, [5], attention=False).attention_layers == ()
    assert Taps(model, [3]).attention_layers == ((2, 4),)


def test_no_layer_attends():
    model = hybrid("lfm2", layer_types=["conv"] * 6)
    with pytest.raises(UnsupportedModelError, match="no layer attends .*attention=False"):
        Taps(model, [3])


def test_heads_of_unequal_number_are_refused():
    model = hybrid("lfm2", layer_types=["full_attention"] * 6)
    attention = model.model.layers[2].self_attn
    other = hybrid("lfm2", layer_types=["full_attention"] * 6, num_attention_heads=8)
    other = other.model.layers[2].self_attn
    attention.__dict__.update({"num_key_value_groups": 4})
    for name in ("q_proj", "out_proj"):
        setattr(attention, name, getattr(other, name))
    with pytest.raises(UnsupportedModelError, match="8 query heads .* 4: heads are compared one"):
        Taps(model, [3])
    assert Taps(model, [3], attention_student=[2]).attention_layers == ((2, 6),)


def test_pictures_leave_out_the_layers_that_cannot_be_compared():
    model = hybrid("granitemoehybrid", layer_types=["attention", "mamba"] * 3)
    look = LayerAttention(model, range(1, 6))([5, 6, 7, 8])
    assert look.layers == [1, 3] and look.final == "layer 5"
    assert look.overlap.shape == (2, 4) and look.maps.shape == (2, 4, 4)
    assert [look.nearest(layer) for layer in range(1, 6)] == [1, 1, 3, 3, 3]


def test_the_fused_kernel_follows_the_layers_chosen(monkeypatch):
    model, ids = hybrid("qwen3_5_text"), tokens()
    with Taps(model, [4], attention_kernel="fused") as taps:
        model(input_ids=ids, use_cache=False)
        pair = taps.attention()[0]
        assert taps._current_plan.fused == {3, 6} and pair.alignment is not None
        assert pair.lse_teacher is not None
