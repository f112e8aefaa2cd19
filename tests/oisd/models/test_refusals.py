"""A refusal carries its remedies; whoever catches it says them in other words."""

import pickle

import pytest

from oisd.models.refusals import EAGER, WITHOUT_ATTENTION, Remedy, UnsupportedModelError
from oisd.run.model_guards import as_setting

REFUSED = UnsupportedModelError("Taps: SDPA ignores the softcap", EAGER, WITHOUT_ATTENTION)


def test_the_message_names_every_remedy_in_the_words_of_taps():
    assert str(REFUSED) == (
        'Taps: SDPA ignores the softcap; call model.set_attn_implementation("eager"), or use '
        "attention=False"
    )
    assert str(UnsupportedModelError("Taps: no")) == "Taps: no"
    assert str(Remedy("lens_norm", "final")) == 'use lens_norm="final"'


@pytest.mark.parametrize(
    ("remedy", "setting"),
    [
        (EAGER, 'set model.attn_implementation = "eager"'),
        (WITHOUT_ATTENTION, "set oisd.attention_weight = 0"),
        (Remedy("divergence", "jsd"), 'set oisd.divergence = "jsd"'),
        (Remedy("attention_kernel", "auto"), 'set oisd.attention_kernel = "auto"'),
        (Remedy("dropout", 0), "set model.dropout = 0"),
    ],
)
def test_each_remedy_as_a_setting(remedy, setting):
    assert as_setting(remedy) == setting


def test_other_words_leave_out_what_they_do_not_know_and_keep_the_remedies():
    words = {"attn_implementation": "pass --eager"}
    other = REFUSED.reworded(lambda remedy: words.get(remedy.option, ""))
    assert str(other) == "Taps: SDPA ignores the softcap; pass --eager"
    assert other.remedies == REFUSED.remedies and str(REFUSED).endswith("attention=False")
    assert str(REFUSED.reworded(lambda remedy: "")) == REFUSED.reason
    again = pickle.loads(pickle.dumps(other))
    assert str(again) == str(other) and again.remedies == other.remedies
