import pytest

from oisd.rewards import countdown_reward, final_reward, load_reward


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("6772+0496=6179", 1.0),
        (" 1=2= 6179 ", 1.0),
        ("6179", 1.0),
        ("6179=", 0.0),
        ("6772+0496=61790", 0.0),
        ("6179=6178", 0.0),
        ("", 0.0),
    ],
)
def test_what_follows_the_last_equals_sign_counts(completion, reward):
    assert final_reward([completion], ["6179"]) == [reward]
    assert load_reward("final")([completion], ["6179"]) == [reward]


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("25*3=75,75+7=82", 1.0),
        ("3*25=75, 7+75=82", 1.0),
        ("25*3=75,75+7=83", 0.0),  # wrong arithmetic
        ("25*3=75", 0.0),  # not the target
        ("75+7=82", 0.0),  # a number that was not given
        ("25*3=75,75+3=78,78+4=82", 0.0),  # used twice
        ("75=75,82=82", 0.0),
        ("25*3=75,,75+7=82", 0.0),
        ("82", 0.0),
        ("", 0.0),
        ("9999999999*1=82", 0.0),
    ],
)
def test_steps_of_a_countdown(completion, reward):
    assert countdown_reward([completion], ["3 7 25:82"]) == [reward]
    assert load_reward("countdown")([completion], ["3 7 25:82"]) == [reward]


def test_not_all_numbers_need_be_used_and_division_is_exact():
    assert countdown_reward(["25-7=18"], ["3 7 25:18"]) == [1.0]
    found = countdown_reward(["21/7=3", "22/7=3", "21/0=0"], ["21 7:3", "22 7:3", "21 0:0"])
    assert found == [1.0, 0.0, 0.0]
