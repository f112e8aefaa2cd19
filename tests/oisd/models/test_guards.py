"""Guards: silent on models that compute what training relies on, in words on those that do not."""

import math
from importlib.metadata import version

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oisd.models import guards
from oisd.models import thorough_guards as thorough
from tests.tiny_models import tiny_model

ALL = (
    guards.causality,
    guards.right_padding,
    guards.left_padding,
    guards.dropout_noise,
    thorough.cached_decoding,
    thorough.batch_dependence,
    thorough.checkpointed_gradients,
)
F32, BF16 = torch.float32, torch.bfloat16
TRANSFORMERS = tuple(map(int, version("transformers").split(".")[:2]))

_SIZES = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=48)
OTHERS = {
    "gpt2": dict(
        vocab_size=131, n_embd=64, n_layer=4, n_head=4, n_positions=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "doge": _SIZES | dict(num_experts=4, num_experts_per_tok=2),
    "glm_moe_dsa": _SIZES | _EXPERTS | dict(
        num_key_value_heads=4, n_routed_experts=4, q_lora_rank=24, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1,
        # More keys than the text has: what is left is the attention itself.
        n_shared_experts=1, index_n_heads=2, index_head_dim=16, index_topk=128,
    ),
    "rwkv": dict(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        attention_hidden_size=64, bos_token_id=1, eos_token_id=2,
    ),
    "recurrent_gemma": dict(_SIZES, lru_width=64),
    "gpt_neox_japanese": dict(
        vocab_size=131, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "qwen3_next": _SIZES | _EXPERTS | dict(
        num_hidden_layers=8, head_dim=16, num_experts=4, shared_expert_intermediate_size=48,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}  # fmt: skip


def other_model(name: str) -> nn.Module:
    """A random model of a kind that tests.tiny_models lacks; the global random state is kept."""
    config = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def look(guard, model, dtype=F32):
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        return guard(model, guards.guard_tokens(model), dtype)


# ---- silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_sound_models_pass_every_guard(name, dtype):
    model = other_model(name) if name == "gpt2" else tiny_model(name)
    for guard in ALL:
        found = look(guard, model, dtype)
        assert found.holds and not found.remedy, str(found)
        assert found.value <= found.bound / 2, str(found)  # room for unusual rounding
    assert guards.finite_parameters(model).holds


def test_half_precision_weights_too():
    model = tiny_model("qwen3").to(BF16)
    assert guards.arithmetic(model) == BF16
    assert all(guard.holds for guard in guards.cheap_guards(model))


# ---- faults that we make -----------------------------------------------------------------------


def faulty(name="qwen3", layer=1, change=lambda x: x):
    """A model whose hidden states after a layer are changed."""
    model = tiny_model(name)

    def changed(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = change(hidden)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    model.get_decoder().layers[layer].register_forward_hook(changed)
    return model


def noise(x):
    return x + 0.05 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("guard", "change"),
    [
        (guards.causality, lambda x: x + 0.01 * x.mean(1, keepdim=True)),
        (guards.causality, lambda x: x + 0.01 * (x.shape[1] > 80) * x.flip(1)),
        (guards.right_padding, lambda x: x * (1 + 0.01 * (len(x) > 1))),
        (guards.left_padding, lambda x: x + 0.01 * x.cumsum(1)),
        (guards.dropout_noise, noise),
        (thorough.batch_dependence, lambda x: x + 0.01 * x.mean(0, keepdim=True) * (len(x) > 1)),
        (thorough.cached_decoding, lambda x: x * (1 + 0.01 * (x.shape[1] == 1))),
        (
            thorough.checkpointed_gradients,
            lambda x: x * (1 + 0.01 * torch.is_grad_enabled()) if faults["on"] else x,
        ),
    ],
    ids=["future", "future-beyond-80", "right", "left", "noise", "batch", "cache", "gradients"],
)
def test_each_guard_sees_its_fault(guard, change, monkeypatch):
    faults["on"] = False
    model = faulty(change=change)
    if guard is thorough.checkpointed_gradients:
        enable = model.gradient_checkpointing_enable
        monkeypatch.setattr(
            model, "gradient_checkpointing_enable",
            lambda **k: (faults.update(on=True), enable(**k))[1],
        )  # fmt: skip
    found = look(guard, model)
    assert not found.holds and found.value > 2 * found.bound, str(found)
    assert found.remedy and f"{found.value:.2g}" in found.found


faults = {"on": False}


def test_a_rare_choice_of_another_expert_is_no_fault():
    """One position of a hundred may differ by rounding; half of a stretch may not."""
    one, other = torch.randn(96, 11), torch.zeros(96, 11)
    other.copy_(one)
    other[40] += 5
    assert guards.difference(other, one) == 0
    other[40:48] += 5
    assert guards.difference(other, one) > 0.5
    assert guards.difference(other, one, run=1) >= guards.difference(other, one)
    assert guards.difference(one * math.nan, one) == math.inf


def test_parameters_that_are_not_finite():
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_decoder().layers[2].mlp.up_proj.weight[3, 4] = math.inf
    found = guards.finite_parameters(model)
    assert not found.holds and found.value == 1 and "layers.2.mlp.up_proj.weight" in found.found
    with torch.no_grad():  # finite, though its sum in float32 is not
        model.get_decoder().layers[2].mlp.up_proj.weight.fill_(1e38)
    assert guards.finite_parameters(model).holds


# ---- faults of transformers --------------------------------------------------------------------


def is_mended() -> bool | None:
    """Whether this version has what 5.10 has wrong; None for versions that nobody looked at."""
    if (5, 10) < TRANSFORMERS < (5, 24):
        return None
    return TRANSFORMERS >= (5, 24)


def test_logits_that_depend_on_the_length_alone_are_not_said_to_see_the_future():
    found = look(guards.causality, faulty(change=lambda x: x + x.roll(1, -1) * len(x[0]) / 100))
    assert found.corrupts and "by the text's length and not by its later tokens" in found.found
    assert found.remedy.startswith("train another model")
    seen = look(guards.causality, faulty(change=lambda x: x + 0.01 * x.mean(1, keepdim=True)))
    assert not seen.holds and "length" not in seen.found
    assert "another release of transformers" in seen.remedy


@pytest.mark.parametrize("name", ["glm_moe_dsa", "doge"])
def test_attention_that_sees_the_future_under_sdpa(name):
    model = other_model(name)
    found = look(guards.causality, model)
    assert model.config._attn_implementation == "sdpa"  # though eager attention was tried
    mended = True if name == "glm_moe_dsa" and is_mended() else found.holds
    assert found.holds == mended
    if is_mended() is False:
        assert found.corrupts and found.value > 0.5
    if not found.holds:
        assert 'set attn_implementation = "eager", under which they agree' in found.remedy
        model.set_attn_implementation("eager")
        assert look(guards.causality, model).holds  # the remedy works


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma"])
def test_recurrent_states_read_padding_on_the_left(name):
    model = other_model(name)
    found = look(guards.left_padding, model)
    assert found.corrupts and "rollout.batch_size = 1" in found.remedy
    assert look(guards.right_padding, model).holds and look(guards.causality, model).holds


def test_gpt2_needs_position_ids():
    model = other_model("gpt2")
    ids = guards.guard_tokens(model)
    found = guards.left_padding(model, ids, F32, positions=False)
    assert found.corrupts and found.remedy.startswith("pass position_ids")
    assert guards.left_padding(model, ids, F32).holds


def test_a_model_that_refuses_checkpointing():
    found = look(thorough.checkpointed_gradients, other_model("gpt_neox_japanese"))
    assert not found.holds and found.value == math.inf
    assert "refused" in found.found and "gradient_checkpointing off" in found.remedy
    assert found.as_row()["value"] == "inf"


def test_dropout_that_a_model_ships():
    found = look(guards.dropout_noise, other_model("gpt_neox_japanese"))
    assert found.corrupts and "attention_dropout 0.1" in found.found


def test_rows_that_depend_on_their_neighbours_in_bfloat16():
    found = look(thorough.batch_dependence, other_model("qwen3_next").to(BF16), BF16)
    if is_mended() is not None:
        assert found.holds == is_mended(), str(found)


# ---- what guards leave behind ------------------------------------------------------------------


def test_nothing_is_left_behind():
    model = tiny_model("qwen3")
    model.get_decoder().layers[0].eval()  # a mixed mode, which stays
    modes = [m.training for m in model.modules()]
    shipped = model.generation_config
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.autocast("cpu", BF16):
        ids = guards.guard_tokens(model)
        found = [guard(model, ids, BF16) for guard in ALL]
        assert torch.is_autocast_cache_enabled()
    assert all(found) and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert model.generation_config is shipped and not model.is_gradient_checkpointing
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_cannot_be_run_is_said():
    def breaks(model, ids, dtype):
        raise KeyError("no such cache")

    found = guards.attempted(breaks, tiny_model("qwen3"), torch.arange(9), F32)
    assert not found.is_checked and not found.holds and not found.corrupts
    assert str(found) == "breaks: not checked: KeyError: 'no such cache'"
    assert found.as_row()["value"] == "nan"


def test_tokens_are_ordinary_ones_and_as_many_as_fit():
    model = tiny_model("llama")
    ids = guards.guard_tokens(model)
    assert len(ids) == guards.TOKENS and not {0, 1, 2} & {*ids.tolist()}
    assert torch.equal(ids, guards.guard_tokens(model)) and len(ids.unique()) > 30
    short = other_model("gpt2")
    short.transformer.wpe = nn.Embedding(40, 64)
    assert len(guards.guard_tokens(short)) == 40
    assert look(guards.causality, short).holds
