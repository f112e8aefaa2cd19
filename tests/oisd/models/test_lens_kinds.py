"""The lens on models whose head does not simply read a final norm of the last layer's output.

The right value of a layer's lens is what the model itself says where its last layer returns that
layer's hidden states: `benchmarks.models.examine` runs it so.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models.examine import LENGTH, error, examine_lens, logits_of, texts
from benchmarks.models.sizes import tiny_config
from benchmarks.models.sizes import tiny_model as swept_model
from oisd.models import Taps, UnsupportedModelError, last_logits_only
from oisd.models.head import ramp, scale_and_softcap, softcapped
from tests.tiny_models import LAYERS, VOCAB, tiny_model

torch.set_num_threads(1)


def registered(*types: str) -> list[str]:
    return [name for name in types if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


# No final norm; a dense layer before the head; a decoder that is not named; layers that do not run
# on text; a factor before the head, and a cut vocabulary; a gain of each token, and loops; softcap
# under a name of its own; streams, merged by a module, or in the decoder's forward; shared blocks.
RISKY = registered(
    "openai-gpt", "modernbert-decoder", "llama4_text", "mllama", "minicpm3", "inkling_text", "dory",
    "xlstm", "deepseek_v4", "hy_v4", "gemma3n_text", "rwkv", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("model_type", RISKY)
def test_lens_is_what_the_model_would_say(model_type):
    model = swept_model(tiny_config(model_type))
    layers = Taps(model, [], attention=False).num_layers
    taps, errors = Taps(model, [layers // 2], attention=False), {}
    examine_lens(model, taps, layers // 2, errors)
    assert errors["far"] > 0.05 and errors["reaches"] and errors["leaks"] == []
    for name in ("logits", "lens", "changed", "last_logits_only", "logits_to_keep"):
        assert errors[name] < 1e-4, (name, errors)
    assert errors["hidden_states"] is None or errors["hidden_states"] < 1e-6


REFUSED = {
    "cpmant": "its layers see 36 positions in a text of 4 tokens",
    "hrm_text": "the number of a layer would mean one of 64 passes",
    "reformer": "its head reads 128 values a token, and its layers return 64",
    "inkling2_text": "no final norm or other function of the last layer's output",
    "gemma4_assistant": "ends in ValueError: inputs_embeds and shared_kv_states cannot be None",
}


@pytest.mark.parametrize("model_type", registered(*REFUSED))
def test_what_has_no_lens_is_refused_with_what_it_does(model_type):
    model = swept_model(tiny_config(model_type))
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]) as refusal:
        Taps(model, [1], attention=False)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- streams, loops, skipped layers


@pytest.mark.parametrize("model_type", registered("gemma3n_text", "deepseek_v4"))
def test_streams_have_no_lens_without_the_tail_that_merges_them(model_type):
    model = swept_model(tiny_config(model_type))
    with pytest.raises(UnsupportedModelError, match='return several streams.*lens_norm="final"'):
        Taps(model, [2], attention=False, lens_norm="none")


@pytest.mark.parametrize("freeze", [True, False])
def test_parameters_of_a_tail_in_the_decoders_own_forward(freeze):
    model = swept_model(tiny_config("gemma3n_text"))
    merging = model.model.altup_unembed_projections
    with Taps(model, [3], attention=False, freeze_norm=freeze) as taps:
        model(input_ids=texts(model), use_cache=False)
        taps.student_hidden().square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.norm() > 1e-6
    trained = [p.grad is not None and bool(p.grad.any()) for p in merging.parameters()]
    assert trained and all(trained) is not freeze and any(trained) is not freeze
    assert model.model.layers[3].mlp.up_proj.weight.grad is None


def test_padding_that_is_zero_in_a_stream_makes_no_gradient_nan():
    """As that of a token whose embedding is 0: Gemma 3n has no slope of its norm there."""
    model = swept_model(tiny_config("gemma3n_text"))
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    ids = torch.randint(3, 131, (3, 21), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(21) < torch.tensor([[21], [15], [9]])
    with Taps(model, [3], attention=False) as taps:
        model(input_ids=ids * mask, attention_mask=mask.long(), use_cache=False)
        taps.student_hidden()[:, mask].square().mean().backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert norms.isfinite().all() and (norms > 1e-6).sum() > 20


def test_a_layer_that_does_not_run_on_text_has_the_lens_of_the_one_before():
    model = swept_model(tiny_config("mllama"))
    skipped = model.config.get_text_config().cross_attention_layers[0] + 1
    with Taps(model, [skipped - 1, skipped], attention=False) as taps:
        model(input_ids=texts(model), use_cache=False)
        before, same = taps.student_hidden()
    assert torch.equal(before, same) and before.std() > 0.1


def test_a_layer_that_runs_several_times_has_the_lens_of_its_last_run():
    model = tiny_model("qwen3")
    layers, ids = model.model.layers, torch.randint(3, VOCAB, (2, 9))

    def again(layer, args, kwargs, out):
        return layer.forward(out, **kwargs)

    looped = layers[1].register_forward_hook(again, with_kwargs=True)
    with Taps(model, [2], attention=False) as taps:
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        wanted = model.model.norm(out.hidden_states[2])
        torch.testing.assert_close(taps.student_hidden()[0], wanted)
    looped.remove()


# ---------------------------------------------------------------- factors and the head


@pytest.mark.parametrize("where", ["before the head", "before the norm"])
def test_factors_around_the_norm(where):
    model, ids = tiny_model("qwen3"), torch.randint(3, VOCAB, (2, 9))

    def scaled(module, args, out):
        out.last_hidden_state = 0.3 * out.last_hidden_state
        return out

    if where == "before the head":
        model.model.register_forward_hook(scaled)
    else:
        model.model.norm.register_forward_pre_hook(lambda _, args: (0.3 * args[0],))
        model.model.norm.variance_epsilon = 0.5  # or the norm would take the factor out
    with Taps(model, [2], attention=False) as taps, torch.no_grad():
        out = model(input_ids=ids, use_cache=False)
        mine = logits_of(taps.student_hidden()[0], taps)
        assert error(logits_of(taps.final_hidden(), taps), out.logits) < 1e-5
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[2]
        handle = model.model.layers[-1].register_forward_hook(lambda *_: hidden)
        wanted = model(input_ids=ids, use_cache=False).logits
        handle.remove()
    assert error(mine, wanted) < 1e-5 and error(out.logits, wanted) > 0.1


class Wrapped(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.inner = linear

    def forward(self, x):
        return self.inner(x)


def test_a_head_that_is_wrapped():
    model, ids = tiny_model("qwen3"), torch.randint(3, VOCAB, (2, 9))
    model.lm_head = Wrapped(model.lm_head)
    with Taps(model, [2], attention=False) as taps:
        out = model(input_ids=ids, use_cache=False)
        assert taps.unembedding.weight is model.lm_head.inner.weight
        assert error(logits_of(taps.final_hidden(), taps), out.logits) < 1e-6


def test_a_vocabulary_that_is_cut_after_the_head():
    model, ids = tiny_model("cohere", tie_word_embeddings=False), torch.randint(3, 90, (2, 9))
    model.lm_head = nn.Linear(32, VOCAB)
    model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits[..., :90]))
    with Taps(model, [2], attention=False) as taps:
        out = model(input_ids=ids, use_cache=False)
        logits = logits_of(taps.final_hidden(), taps)
        assert logits.shape[-1] == 90 and error(logits, out.logits) < 1e-5
        logits.sin().sum().backward()
    assert model.lm_head.weight.grad[:90].norm() > 0.1
    assert not model.lm_head.weight.grad[90:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [101, 128256])
@pytest.mark.parametrize("cap", [None, 3.0, 15.0, 30.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 0.3, 13.0])
def test_scale_and_softcap_are_read_from_a_ramp(scale, cap, size, dtype):
    given = ramp(torch.empty(1, size, dtype=dtype))
    logits = softcapped(scale * given.float(), cap).to(dtype)
    for numbers in ([], [float(size), 0.02, 1 / scale, scale, cap or 7.0, 1e-6]):
        found = scale_and_softcap(given, logits, numbers)
        assert found is not None and (found[1] is None) == (cap is None)
        if numbers:
            assert found == (scale, cap)
        assert error(softcapped(found[0] * given.float(), found[1]), logits) < 1e-2


@pytest.mark.parametrize("change", ["shifted", "one token", "clipped", "infinite"])
def test_what_is_no_scale_or_softcap(change):
    given = ramp(torch.empty(1, 101))
    logits = given.clone()
    if change == "shifted":
        logits += 1
    elif change == "one token":
        logits[0, 7] = -1e4
    elif change == "clipped":
        logits = logits.clamp(-20, 20)
    else:
        logits[0, 3] = -torch.inf
    assert scale_and_softcap(given, logits, [20.0, 1.0]) is None


# ---------------------------------------------------------------- logits of the last position alone


def gemma4_that_shares_keys(**options):
    config = tiny_config(
        "gemma4_text",
        layer_types=["sliding_attention", "full_attention"] * 4,
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=131,
    )
    return swept_model(config, **options)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_gemma4_with_shared_keys_keeps_all_hidden_states(implementation, padded):
    model = gemma4_that_shares_keys(attn_implementation=implementation)
    assert model.config.num_kv_shared_layers == 4
    ids = texts(model)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -3:] = 0
    student = model.config.num_hidden_layers - 2  # among the layers that share
    with Taps(model, [1, student], attention=False) as taps, torch.no_grad():

        def read(**kept):
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept)
            return out.logits, taps.student_hidden(), taps.final_hidden()

        logits, students, final = read()
        assert students.shape[:3] == (2, 2, LENGTH) and students.std() > 0.1
        for kept in (last_logits_only(model, ids), {"logits_to_keep": 1}):
            last, *states = read(**kept)
            assert last.shape[1] == 1 and error(last, logits[:, -1:]) < 1e-4
            for found, wanted in zip(states, (students, final), strict=True):
                assert error(found[..., mask.bool(), :], wanted[..., mask.bool(), :]) < 1e-4


def test_gemma4_with_shared_keys_has_as_many_queries_as_keys():
    model = gemma4_that_shares_keys()
    layers = model.config.num_hidden_layers
    ids = texts(model)
    with Taps(model, [layers - 2]) as taps:
        model(input_ids=ids, use_cache=False, **last_logits_only(model, ids))
        pair = taps.attention()[0]
        assert pair.q.shape[1] == pair.k.shape[1] == LENGTH
        model(input_ids=ids, use_cache=False)
        assert error(pair.q, taps.attention()[0].q) < 1e-5


def test_last_logits_only_is_empty_for_a_model_that_makes_all():
    model = swept_model(tiny_config("xlstm"))
    assert last_logits_only(model, texts(model)) == {}
    kept = last_logits_only(tiny_model("qwen3"), torch.ones(2, 5, dtype=torch.long))
    assert kept["logits_to_keep"].tolist() == [4]


def test_every_layer_is_read():
    """All lenses of a stream model at once, as `oisd lens` reads them."""
    model = swept_model(tiny_config("gemma3n_text"))
    layers = Taps(model, [], attention=False).num_layers
    with Taps(model, range(1, layers), attention=False) as taps, torch.no_grad():
        model(input_ids=texts(model), use_cache=False)
        states = taps.student_hidden()
    assert states.shape[0] == layers - 1 and LAYERS < layers
    assert all(error(a, b) > 0.01 for a, b in zip(states, states[1:], strict=False))
