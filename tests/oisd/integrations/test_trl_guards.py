"""The guards inside TRL: a sound model says nothing, a faulty one is refused or warned of."""

import math
import warnings

import pytest

from oisd.arithmetic import arithmetic_tokenizer
from oisd.integrations import model_guards
from oisd.integrations.model_guards import guard_model
from oisd.models.guards import Guard
from tests.oisd.integrations.trl_runs import make
from tests.oisd.models.test_guards import is_mended, other_model
from tests.tiny_models import SDPA_REFUSES_SOFTCAPS, tiny_model


def test_a_sound_model_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard_model(tiny_model("qwen3"))


def test_padding_without_position_ids_is_warned_of():
    """TRL's update passes none."""
    with pytest.warns(UserWarning, match="left padding.*without position ids.*Pass position_ids"):
        guard_model(other_model("gpt2"))


def test_attention_that_cannot_be_compared_is_refused_with_the_option_that_helps(tmp_path):
    tokens = arithmetic_tokenizer()
    ids = dict(eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    model = tiny_model("gemma2", vocab_size=len(tokens), bos_token_id=None, **ids)
    model.config._attn_implementation = "sdpa"
    helps = "eager" if SDPA_REFUSES_SOFTCAPS else "SDPA ignores .*, or set attention_weight=0$"
    with pytest.raises(ValueError, match=helps):
        make(str(tmp_path), keywords={"model": model})
    if not SDPA_REFUSES_SOFTCAPS:
        make(str(tmp_path), keywords={"model": model}, attention_weight=0.0)


@pytest.mark.skipif(is_mended() is not False, reason="known to see the future in 5.10")
def test_a_model_that_sees_the_future_is_refused():
    with pytest.raises(ValueError, match='OISDTrainer: causality.*attn_implementation = "eager"'):
        guard_model(other_model("doge"))


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [("right padding", 0.5, True), ("right padding", 2e-3, False), ("left padding", 0.5, False),
     ("causality", math.nan, False), ("finite", 1.0, True)],
)  # fmt: skip
def test_the_trainer_asks(name, value, refused, tmp_path, monkeypatch):
    found = Guard(name, value, 0 if name == "finite" else 1e-3, "they differ", "change it")
    monkeypatch.setattr(model_guards, "cheap_guards", lambda model, positions: [found])
    if refused:
        with pytest.raises(ValueError, match=f"OISDTrainer: {name}: they differ.*Change it"):
            make(str(tmp_path))
    else:
        with pytest.warns(UserWarning, match=f"OISDTrainer: {name}"):
            make(str(tmp_path))
