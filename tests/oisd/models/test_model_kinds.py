"""Which models taps take and which they refuse: attention, layouts, adapters, wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from oisd.models import Taps, UnsupportedModelError
from tests.oisd.models.test_models import (
    STUDENTS,
    gradients,
    logits_of,
    tokens,
)
from tests.tiny_models import LAYERS, VOCAB, tiny_model

# ---------------------------------------------------------------- attention implementations


def test_any_registered_implementation_sees_its_own_name():
    def attend(module, query, key, value, attention_mask, **kwargs):
        assert module.config._attn_implementation == "mine"  # as FlashAttention's does
        names.append(module.layer_idx)
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    names = []
    AttentionInterface.register("mine", attend)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = tiny_model("mistral", attn_implementation="mine").eval()
    expected = model(input_ids=tokens(), use_cache=False).logits
    with Taps(model, STUDENTS) as taps:
        names.clear()
        assert torch.equal(model(input_ids=tokens(), use_cache=False).logits, expected)
        assert names == [*range(LAYERS)] and len(taps.attention()) == len(STUDENTS)


def test_implementation_may_change_inside():
    model, ids = tiny_model("qwen3").eval(), tokens()
    with Taps(model, STUDENTS) as taps:
        sdpa = model(input_ids=ids, use_cache=False)
        model.set_attn_implementation("eager")
        eager = model(input_ids=ids, use_cache=False, output_attentions=True)
        assert sdpa.attentions is None and eager.attentions[0] is not None
        torch.testing.assert_close(eager.logits, sdpa.logits, rtol=1e-4, atol=1e-4)
        assert taps.attention()[0].q.requires_grad


def test_softcap_that_sdpa_would_drop_is_refused():
    try:
        model = tiny_model("gemma2", attn_implementation="sdpa")
    except ValueError as error:  # of transformers itself, in versions that know it
        assert "does not support an attention implementation" in str(error)
        return
    with pytest.raises(UnsupportedModelError, match="SDPA ignores the softcap 2.0"):
        Taps(model, STUDENTS)
    with Taps(model, STUDENTS, attention=False) as taps:
        model(input_ids=tokens(), use_cache=False)
        assert taps.student_hidden().shape[0] == len(STUDENTS)


def test_scores_far_from_zero_are_not_refused_for_rounding():
    # As in trained checkpoints, where eager attention rounds scores of hundreds to bfloat16.
    model = tiny_model("qwen2", dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.mul_(300)
    with Taps(model, STUDENTS) as taps:
        model(input_ids=tokens(), use_cache=False)
        pair = taps.attention()[0]
    assert (pair.q[:, :, 0] @ pair.k[:, :, 0].mT).abs().max() > 200


@pytest.mark.parametrize("change", ["a sink that is ignored", "bidirectional", "other scores"])
def test_attention_that_is_no_causal_softmax_is_refused(change):
    def attend(module, query, key, value, attention_mask, **kwargs):
        if change == "bidirectional":
            kwargs["is_causal"] = False
        if change == "other scores":
            query = 1.1 * query
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("odd", attend)
    model = tiny_model("qwen3", attn_implementation="odd")
    if change == "a sink that is ignored":
        forward = model.model.layers[0].self_attn.forward
        model.model.layers[0].self_attn.forward = lambda *a, **k: forward(
            *a, **k, s_aux=torch.zeros(4)
        )
    with pytest.raises(UnsupportedModelError, match="softmax"):
        Taps(model, STUDENTS)
    Taps(model, STUDENTS, attention=False)


def test_layer_without_attention_interface_is_refused():
    model = tiny_model("qwen3")
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match="layer 1 must attend once by softmax"):
        Taps(model, STUDENTS)


# ---------------------------------------------------------------- arguments and layouts


@pytest.mark.parametrize("layers", [[0], [LAYERS], [-1], [1.5], [True], [2, 2]], ids=str)
def test_layer_bounds(layers):
    with pytest.raises(ValueError, match="student_layers must"):
        Taps(tiny_model("qwen3"), layers)


def test_lens_norm_is_checked():
    with pytest.raises(ValueError, match='lens_norm must be "final" or "none", got'):
        Taps(tiny_model("qwen3"), [1], lens_norm="first")


class ReversedHead(nn.Linear):
    def forward(self, x):
        return super().forward(x.flip(-1))


def shifted_logits(model):
    model.register_forward_hook(lambda m, a, out: setattr(out, "logits", out.logits + 1))


def reversed_head(model):
    model.lm_head.__class__ = ReversedHead


def more_layers(model):
    model.config.num_hidden_layers += 1


def no_head(model):
    model.get_output_embeddings = lambda: None


def mixing_before_norm(model):
    model.model.norm.register_forward_pre_hook(lambda m, a: (a[0].cumsum(1),))


def mixing_norm(model):
    forward = model.model.norm.forward
    model.model.norm.forward = lambda hidden: forward(hidden.cumsum(1))


def needs_an_image(model):
    def refuse(*_):
        raise ValueError("pixel_values must\n be given")

    model.model.register_forward_pre_hook(refuse)


LAYOUTS = {
    shifted_logits: "into the logit 2049, which no scale or softcap",
    reversed_head: "the head's output is not its input",
    mixing_before_norm: "no final norm or other function of the last layer's output",
    mixing_norm: "no final norm or other function of the last layer's output",
    more_layers: "one ModuleList of 5 layers, got 0",
    no_head: "must have a decoder .* and a head",
    needs_an_image: "ends in ValueError: pixel_values must be given",
}


@pytest.mark.parametrize("change", LAYOUTS, ids=lambda f: f.__name__)
def test_unknown_layout_is_refused(change):
    model = tiny_model("qwen3")
    change(model)
    with pytest.raises(UnsupportedModelError, match=LAYOUTS[change]):
        Taps(model, STUDENTS)


def test_not_a_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel or a wrapper of one, got Lin"):
        Taps(nn.Linear(2, 2), [1])


def test_head_with_bias_and_scale():
    model = tiny_model("cohere", tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, VOCAB)
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=tokens(), use_cache=False)
        logits = logits_of(taps.final_hidden(), taps.unembedding)
        torch.testing.assert_close(logits, out.logits, rtol=1e-5, atol=1e-5)
        grads = gradients(model, logits.sin().sum())
    expected = gradients(model, model(input_ids=tokens(), use_cache=False).logits.sin().sum())
    assert expected["lm_head.bias"].norm() > 0.1
    for name in ("lm_head.weight", "lm_head.bias"):
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- adapters and wrappers


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_attention(checkpointing):
    model, ids = lora(tiny_model("qwen3"), target_modules=["q_proj", "k_proj"]), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        student = taps.student_hidden()
        expected = model.base_model.model.model.norm(out.hidden_states[1])
        torch.testing.assert_close(student[0], expected)
        torch.testing.assert_close(logits_of(taps.final_hidden(), taps.unembedding), out.logits)
        pair = taps.attention()[1]
        grads = gradients(model, student.sin().sum() + pair.q.sin().sum() + pair.k.sin().sum())
        with model.disable_adapter(), torch.no_grad():
            model(input_ids=ids, use_cache=False)
            assert (taps.attention()[1].q - pair.q).abs().max() > 1e-3
    assert all("lora_" in name for name in grads)
    # Layer 4's own projections feed only the teacher.
    assert sum("layers.2." in name and g.norm() > 1e-3 for name, g in grads.items()) == 4
    assert not any("layers.3." in name and g.norm() > 0 for name, g in grads.items())


def test_lora_on_head_is_refused_also_when_added_later():
    model = tiny_model("qwen3")
    taps = Taps(model, STUDENTS)
    adapted = lora(model, target_modules=["q_proj", "lm_head"])
    for adapted_model in (adapted, adapted.get_base_model()):
        with pytest.raises(UnsupportedModelError, match="without adapters"):
            Taps(adapted_model, STUDENTS)
    with pytest.raises(UnsupportedModelError, match="without adapters"):
        _ = taps.unembedding


def test_whole_head_in_modules_to_save_is_included():
    model = lora(tiny_model("qwen3"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.mul_(2)
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=tokens(), use_cache=False)
        assert taps.unembedding.weight is head.weight and head.weight.requires_grad
        torch.testing.assert_close(logits_of(taps.final_hidden(), taps.unembedding), out.logits)


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model("qwen3"), config)
    with pytest.raises(UnsupportedModelError, match="prompt learning"):
        Taps(model, STUDENTS)


def test_wrapper_with_module_attribute():
    class Wrapper(nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model = Wrapper(tiny_model("qwen3"))
    with Taps(model, STUDENTS) as taps:
        out = model(input_ids=tokens(), use_cache=False, output_hidden_states=True)
        assert torch.equal(taps.final_hidden(), out.hidden_states[-1])


def test_taps_made_within_autocast_leave_the_gradient_alone():
    """The probe runs without a graph, so autocast must not cache the weights that it casts."""
    gradients = []
    for taps_inside in (False, True):
        model = tiny_model("qwen3")
        with torch.autocast("cpu", torch.bfloat16):
            if taps_inside:
                Taps(model, [1])
            model(torch.tensor([[5, 6, 7]])).logits.float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(x is not None and x.norm() > 0 for x in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
