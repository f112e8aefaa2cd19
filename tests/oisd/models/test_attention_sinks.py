"""Models with learned attention sinks: what taps capture, and that gradient reaches the sinks.

Beside gpt-oss, which `tests.tiny_models` has, those that the installed transformers knows.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from oisd.config import AlignmentConfig
from oisd.lens.attention import LayerAttention
from oisd.losses import attention_loss
from oisd.models import Taps, UnsupportedModelError, pack_padded
from tests.oisd.models.test_models import distribution, tokens
from tests.tiny_models import LAYERS, TINY, VOCAB, WINDOW, tiny_model

STUDENTS = [1, 2, 3]
_NEWER = {
    # Sinks in the layers with a window alone, which have key heads of their own number.
    "mimo_v2_flash": dict(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, v_head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=8, swa_v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "granite_swa": dict(attention_multiplier=0.5),
    "granitemoe_swa": dict(attention_multiplier=0.5, num_local_experts=3, num_experts_per_tok=2),
    "flint": dict(
        num_experts=4, n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
}  # fmt: skip
NAMES = ["gpt_oss", *(name for name in _NEWER if name in CONFIG_MAPPING_NAMES)]
PACKED_BAD = ("gpt_oss", True)
_LAYER_TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def model_of(name: str, layer_types=_LAYER_TYPES):
    """Random, eager, with sinks far enough from each other to tell heads and layers apart."""
    if name in TINY:
        model = tiny_model(name, layer_types=layer_types)
    else:
        options = dict(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
            max_position_embeddings=128, sliding_window=WINDOW, layer_types=layer_types,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, **_NEWER[name],
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, **options)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter))
    return model.train()


def sinks_of(model) -> dict[int, torch.nn.Parameter]:
    """By layer, from 1."""
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    found = {n: getattr(x, "sinks", None) for n, x in enumerate(attentions, 1)}
    return {n: sink for n, sink in found.items() if sink is not None}


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(batch=3)
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 7:] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", NAMES)
def test_captures_are_the_models_own_maps(name):
    """Right padding; eager's maps leave the sink's column out, or are normalised without it."""
    model, (ids, mask) = model_of(name).eval(), padded()
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
        pairs, calls = taps.attention(), dict(taps._calls)
    own = sinks_of(model)
    real = mask.bool()[:, None, :, None].expand_as(out.attentions[0])
    for layer in (*STUDENTS, LAYERS):
        pair = pairs[min(layer, 3) - 1]
        fields = (
            (pair.q, pair.k, pair.scale, pair.softcap, calls[layer].window, pair.sink)
            if layer < LAYERS
            else (
                pair.q_teacher, pair.k_teacher, pair.scale_teacher, pair.softcap,
                calls[layer].window, pair.sink_teacher,
            )
        )  # fmt: skip
        assert (fields[5] is not None) == (layer in own)
        if layer in own:
            assert torch.equal(fields[5], own[layer])
        found, wanted = distribution(*fields), out.attentions[layer - 1]
        if name.endswith("_swa"):
            found = found / found.sum(-1, keepdim=True)
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-6)
        if layer in own and not name.endswith("_swa"):
            assert wanted[real].view(-1, ids.shape[1]).sum(-1).min() < 0.9


# Eager gpt-oss hands no positions to its mask, so that its packed sequences see each other.
@pytest.mark.parametrize(
    "name, packed",
    [(name, packed) for name in NAMES for packed in (False, True) if (name, packed) != PACKED_BAD],
    ids=lambda x: x if isinstance(x, str) else "packed" if x else "padded",
)
def test_gradient_reaches_the_sinks_separate_and_fused(name, packed):
    """One loss three ways; packed as positions that begin again, padded on the right."""
    model = model_of(name)
    if packed:
        ids = tokens(batch=1, length=12)
        inputs = {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
        keep, lengths = torch.ones_like(ids), [0, 5, 12]
        advantages = torch.tensor([[1.3] * 5 + [-0.8] * 7])
    else:
        ids, keep = padded()
        inputs = {"attention_mask": keep}
        advantages = torch.tensor([[1.3], [-0.8], [0.5]]).expand(ids.shape)
    # The last row of each sequence predicts nothing.
    token_weight = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) * keep
    students = [1, 3]  # windows, so no wider than the last layer's
    own = sinks_of(model)

    def gradients(kernel):
        fused = kernel == "fused"
        taps = Taps(model, students, attention_kernel="fused" if fused else "separate")
        with taps:
            model(input_ids=ids, use_cache=False, **inputs)
            pairs, more = taps.attention(), {}
            signs, weight = advantages, token_weight
            if not fused:
                flat = [pack_padded(keep, *pair[:4])[:4] for pair in pairs]
                fields = pairs[0]._fields[:4]
                pairs = [
                    pair._replace(**dict(zip(fields, x, strict=True)))
                    for pair, x in zip(pairs, flat, strict=True)
                ]
                signs, weight, offsets = pack_padded(keep, advantages, token_weight)
                more["cu_seqlens"] = torch.tensor(lengths).int() if packed else offsets
            impl = "reference" if kernel == "reference" else "auto"
            loss, _ = attention_loss(pairs, signs, token_weight=weight, impl=impl, **more)
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), found

    loss, wanted = gradients("reference")
    reached = [own[n] for n in students if n in own]
    names = {id(p): n for n, p in model.named_parameters()}
    assert reached and all(wanted[names[id(p)]].norm() > 1e-4 for p in reached)
    if LAYERS in own:
        assert names[id(own[LAYERS])] not in wanted, "the teacher's gets none"
    for kernel in ("separate", "fused"):
        again, found = gradients(kernel)
        torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-6)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            error = (found[key] - gradient).norm()
            assert error <= 1e-4 * gradient.norm() + 1e-7, key


@pytest.mark.parametrize("name", [name for name in NAMES if name == "mimo_v2_flash"])
def test_a_sink_of_one_layer_alone(name):
    """jsd is finite; a KL whose first layer alone has one is refused when the taps are made."""
    model = model_of(name)  # the last layer has neither a window nor a sink
    for divergence, refused in (("jsd", False), ("forward_kl", False), ("reverse_kl", True)):
        if refused:
            with pytest.raises(UnsupportedModelError, match="both have an attention sink"):
                Taps(model, [1], divergence=divergence)
            continue
        with Taps(model, [1], divergence=divergence) as taps:
            model(input_ids=tokens(), use_cache=False)
            loss, _ = attention_loss(
                taps.attention(), torch.ones(2), AlignmentConfig(divergence=divergence),
                token_weight=torch.ones(tokens().shape),
            )  # fmt: skip
        loss.backward()
        assert loss > 0.1 and sinks_of(model)[1].grad.norm() > 1e-3
        model.zero_grad()


def test_sdpa_that_ignores_the_sink_is_refused():
    model = model_of("gpt_oss")
    model.config._attn_implementation = "sdpa"  # transformers itself would refuse it
    with pytest.raises(UnsupportedModelError, match="SDPA ignores the learned sink of layer 4"):
        Taps(model, STUDENTS)


def test_the_overlap_counts_the_sink():
    model = model_of("gpt_oss").eval()
    found = LayerAttention(model, STUDENTS)([5, 9, 2, 44, 17, 8, 3])
    with Taps(model, STUDENTS) as taps, torch.no_grad():
        model(input_ids=torch.tensor([[5, 9, 2, 44, 17, 8, 3]]), use_cache=False)
        pair = taps.attention()[2]
    maps = [
        distribution(q, k, scale, None, pair.window, sink)[0]
        for q, k, scale, sink in (
            (pair.q, pair.k, pair.scale, pair.sink),
            (pair.q_teacher, pair.k_teacher, pair.scale_teacher, pair.sink_teacher),
        )
    ]
    torch.testing.assert_close(found.maps[2], maps[0].mean(0))
    torch.testing.assert_close(found.final_map, maps[1].mean(0))
    maps = [torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in maps]
    torch.testing.assert_close(found.overlap[2], torch.minimum(*maps).sum(-1).mean(0))
    assert (maps[0][..., -1] > 0.1).any()
