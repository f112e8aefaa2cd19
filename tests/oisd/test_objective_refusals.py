"""What a run's model cannot do is refused when the objective is made, by the names of settings."""

from __future__ import annotations

import pytest
import torch

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.config import ConfigError
from oisd.models import UnsupportedModelError
from oisd.models.dropout import set_dropout
from oisd.objective import Objective
from oisd.policy import Policy
from tests.oisd.test_objective import config_of
from tests.tiny_models import SDPA_REFUSES_SOFTCAPS, tiny_model


def test_attention_that_cannot_be_compared_is_refused_with_the_settings_of_a_run():
    """`Taps` speaks of its own arguments, which a recipe does not have."""
    model = tiny_model("gemma2")
    model.config._attn_implementation = "sdpa"
    policy = Policy(model, arithmetic_tokenizer(), torch.float32)
    with pytest.raises(UnsupportedModelError) as refused:
        Objective(policy, config_of(student_layers=(2,)))
    text = str(refused.value)
    assert 'set model.attn_implementation = "eager"' in text
    assert "attention=False" not in text and "call " not in text
    if not SDPA_REFUSES_SOFTCAPS:
        assert text.endswith(", or set oisd.attention_weight = 0")
        Objective(policy, config_of(student_layers=(2,), attention_weight=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(student_layers=(4,)), r"^oisd\.student_layers must lie in 1\.\.3 .*, got 4$"),
        (
            dict(student_layers=(2,), attention_student=(4,)),
            r"^oisd\.attention_student must lie in 1\.\.3, below the teacher's layer 4, got 4$",
        ),
        (
            dict(student_layers=(2,), attention_teacher=9),
            r"^oisd\.attention_teacher must lie in 2\.\.4, got 9$",
        ),
    ],
    ids=["student", "attention student", "attention teacher"],
)
def test_a_layer_that_the_model_lacks_is_named_as_its_setting(options, message):
    policy = Policy(tiny_model("qwen3"), arithmetic_tokenizer(), torch.float32)
    with pytest.raises(ConfigError, match=message):
        Objective(policy, config_of(**options))


def test_fused_attention_that_the_update_cannot_run_is_refused_when_the_run_is_made():
    """Dropout is on in training mode alone, where the taps have not looked."""
    model = arithmetic_model(0, num_hidden_layers=3, attention_dropout=0.2).train()
    policy = Policy(model, arithmetic_tokenizer(), torch.float32)
    fused = config_of(attention_kernel="fused", student_layers=(2,))
    before = torch.get_rng_state()
    remedies = 'set oisd.attention_kernel = "separate", or set model.dropout = 0$'
    with pytest.raises(UnsupportedModelError, match=f"attention dropout is on; {remedies}"):
        Objective(policy, fused)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    Objective(policy, config_of(attention_kernel="separate", student_layers=(2,)))
    set_dropout(model, 0.0)
    Objective(policy, fused)
