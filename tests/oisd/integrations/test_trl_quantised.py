"""QLoRA inside TRL, on bitsandbytes' CPU backend: the step of the numbers behind the codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oisd import Taps
from oisd.models import UnsupportedModelError
from tests.oisd.integrations.trl_runs import Run, difference, make, tiny_policy

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="needs bitsandbytes, see docs/development.md"
)

# Rows of a multiple of the 64 entries that share a scale.
WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=16)
HEAVY = dict(think_weight=3.0, attention_weight=3.0)
OFF = dict(think_weight=0.0, attention_weight=0.0)
HEAD_TOO = dict(llm_int8_skip_modules=["none"])


def quantised(folder: str, **options: Any) -> Any:
    tiny_policy(**WIDE).save_pretrained(folder)
    codes = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=codes, dtype=torch.float32
    )


def in_numbers(model: Any) -> Any:
    """A model of floats that holds what the codes of `model` stand for."""
    plain = tiny_policy(**WIDE)
    replaced = 0
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            numbers = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            linear = plain.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            assert not torch.equal(linear.weight, numbers)
            linear.weight.data.copy_(numbers)
            replaced += 1
    assert replaced == 28  # seven in each of four layers, not the unembedding
    return plain


@pytest.mark.parametrize("more", [{}, dict(gradient_checkpointing=True)], ids=["", "checkpointed"])
def test_the_step_is_that_of_the_numbers(tmp_path, more):
    folder = str(tmp_path / "policy")

    def step(model: Any, terms: dict[str, float]) -> Run:
        torch.manual_seed(0)  # of the adapters
        lora = dict(lora=["q_proj", "k_proj", "up_proj"])
        made = make(str(tmp_path / "run"), keywords=dict(model=model), **lora, **terms, **more)
        adapters = {n: p for n, p in made.model.named_parameters() if p.requires_grad}
        assert adapters and all("lora_" in name for name in adapters)
        for (
            p
        ) in adapters.values():  # TRL rounds those of a quantised model, and their step would be
            p.data = p.data.bfloat16().float()
        before = {name: p.detach().clone() for name, p in adapters.items()}
        made.train()
        return Run(made.state.log_history, before, {n: p.detach() for n, p in adapters.items()})

    model = quantised(folder)
    plain = in_numbers(model)
    found, grpo = step(model, HEAVY), step(quantised(folder), OFF)
    whole = step(plain, HEAVY)
    terms = difference(found, grpo).norm()
    assert terms > 0.01
    assert difference(found, whole).norm() < 1e-4 * terms
    for name in ("loss/think", "loss/attention", "loss/grpo"):
        assert found.log[0][name] == pytest.approx(whole.log[0][name], rel=1e-4), name


def test_taps_leave_the_codes_as_they_are(tmp_path, monkeypatch):
    """Laid out anew, as by bitsandbytes on CPUs with AVX512-BF16, they pass no gradient on."""
    model = quantised(str(tmp_path / "policy"))
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 28 and not any(layer.training for layer in layers)
    codes = [layer.weight.data.clone() for layer in layers]
    for layer in layers:
        monkeypatch.setattr(layer, "support_avx512bf16_for_cpu", True)
    Taps(model, student_layers=[2])
    assert not any(layer.training for layer in layers)
    for layer, before in zip(layers, codes, strict=True):
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=["bytes", "floats"])
def test_a_quantised_unembedding_is_refused(tmp_path, storage):
    """Codes may be stored in a float tensor, whose dtype does not show it."""
    model = quantised(str(tmp_path / "policy"), bnb_4bit_quant_storage=storage, **HEAD_TOO)
    assert isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    with pytest.raises(UnsupportedModelError, match="must not be quantised, got Linear4bit"):
        Taps(model, student_layers=[2])
    with pytest.raises(ValueError, match="quantised.*llm_int8_skip_modules"):
        make(str(tmp_path), keywords=dict(model=model), lora=["q_proj"], **HEAVY)


def test_an_adapter_on_the_unembedding_is_refused(tmp_path):
    model = quantised(str(tmp_path / "policy"))
    with pytest.raises(ValueError, match="lm_head|output embeddings|unembedding"):
        make(str(tmp_path), keywords=dict(model=model), lora=["q_proj", "lm_head"], **HEAVY)
