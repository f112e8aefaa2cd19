"""Each rate that a model ships is found and turned off, or is kept where that is asked for."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oisd.arithmetic import arithmetic_tokenizer
from oisd.config import ModelConfig
from oisd.models.dropout import dropout_rates, set_dropout
from oisd.policy import load_policy

LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
SHIPS = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
    "gpt_bigcode": dict(n_embd=32, n_layer=2, n_head=4),
    "opt": dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32, layerdrop=0.3),
    "biogpt": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4),
    "xglm": dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "seed_oss": LLAMA,
    "llama": dict(LLAMA, attention_dropout=0.2),
    "phimoe": dict(LLAMA, num_local_experts=2, input_jitter_noise=0.1, router_jitter_noise=0.0),
}  # fmt: skip


def make(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=14, eos_token_id=13, pad_token_id=12, bos_token_id=None, **SHIPS[name]
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHIPS)
def test_without_rates_training_computes_what_evaluation_does(name, implementation):
    model = make(name)
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        pytest.skip(f"{name} has no {implementation}")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        assert not torch.equal(model.train()(ids).logits, wanted)
        before = dropout_rates(model)
        assert before and set_dropout(model, 0.0) == before
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert dropout_rates(model) == {} == set_dropout(model, 0.0)


def test_the_setting_and_loras_own_dropout(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    arithmetic_tokenizer().save_pretrained(tmp_path)

    def rates(**options) -> set[float]:
        config = ModelConfig(path=str(tmp_path), **options)
        policy = load_policy(config, seed=0)
        changed.append(set(policy.dropout_replaced))
        modules = policy.model.modules()
        return {module.p for module in modules if isinstance(module, torch.nn.Dropout)}

    changed: list[set[str]] = []
    names = {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
    assert rates() == {0.0}
    assert rates(dropout=None) == {0.1}
    assert rates(dropout=0.25) == {0.25}
    assert rates(lora_rank=2, lora_dropout=0.4, lora_targets=("c_attn",)) == {0.0, 0.4}
    assert changed == [names, set(), names, names]
