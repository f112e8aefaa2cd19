"""Sources of reasoning-gym, and the reward by its graders; needs the extra, but for the syntax."""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from oisd.config import ConfigError, from_tables
from oisd.data import DataError, check_source, load_examples
from oisd.data.reasoning import REFUSED, is_held_out, parts_of
from oisd.rewards import RewardError, check_reward, load_reward
from oisd.rewards.reasoning import ReasoningGymReward

try:
    import reasoning_gym
except ImportError:
    reasoning_gym = None

needs_gym = pytest.mark.skipif(reasoning_gym is None, reason="needs the extra reasoning-gym")
CHAIN = "reasoning-gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=2"


# ---- the syntax, which needs no package ------------------------------------------------------


def test_parts_have_weights_and_settings():
    parts = parts_of("reasoning-gym:2.5*chain_sum?min_terms=3&allow_negation=true,gcd?x=[1,2]&y=a")
    assert [(p.weight, p.task, p.settings) for p in parts] == [
        (2.5, "chain_sum", {"min_terms": 3, "allow_negation": True}),
        (1.0, "gcd", {"x": [1, 2], "y": "a"}),
    ]


@pytest.mark.parametrize(
    "source, message",
    [
        ("reasoning-gym", "wanted tasks like chain_sum"),
        ("reasoning-gym:gcd,", "got ''"),
        ("reasoning-gym:gcd*2", "got 'gcd*2'"),
        ("reasoning-gym:0*gcd", "a weight must be a number above 0, got '0'"),
        ("reasoning-gym:1.2.3*gcd", "a weight must be a number above 0, got '1.2.3'"),
        ("reasoning-gym:gcd?numbers", "the setting 'numbers' of gcd has no value"),
        ("reasoning-gym:gcd?a=1&a=2", "the setting 'a' of gcd is given twice"),
    ],
)
def test_sources_that_are_not_written_so(source, message):
    with pytest.raises(DataError, match=re.escape(message)):
        parts_of(source)


@pytest.mark.parametrize(
    "reward, source",
    [
        ("math", "reasoning-gym:gcd"),
        ("reasoning-gym", "arithmetic"),
        ("exact", "reasoning-gym:gcd"),
    ],
)
def test_a_recipe_needs_the_grader_of_its_problems(reward, source):
    tables = {"reward": {"function": reward}, "data": {"source": source}}
    with pytest.raises(ConfigError, match="reward.function must be"):
        from_tables(tables)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'oisd\[reasoning-gym\]'"):
        load_examples("reasoning-gym:gcd")
    with pytest.raises(ValueError, match=r"pip install 'oisd\[reasoning-gym\]'"):
        load_reward("reasoning-gym")
    # What is written can be checked, but for names that only the package knows.
    check_source("reasoning-gym:gcb?x=1")
    check_reward("reasoning-gym:shaped")
    with pytest.raises(DataError, match="the setting 'x' of gcd has no value"):
        check_source("reasoning-gym:gcd?x")


# ---- problems --------------------------------------------------------------------------------


@needs_gym
def test_problems_are_shared_out_by_weight_and_fixed_by_the_seed():
    source = f"{CHAIN.replace(':', ':2*')},gcd"
    draws = [load_examples(source, limit=30, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    tasks = [json.loads(e.answer)["task"] for e in draws[0]]
    assert (tasks.count("chain_sum"), tasks.count("gcd")) == (20, 10)
    assert len({e.id for e in draws[0]}) == len({e.prompt for e in draws[0]}) == 30
    for example in draws[0][:20]:
        record = json.loads(example.answer)
        expression = record["metadata"]["expression"]
        assert expression in example.prompt and len(re.findall(r"\d+", expression)) in (2, 3)
        assert str(eval(expression)) == record["answer"]
        assert example.solution == f"\\boxed{{{record['answer']}}}"


@needs_gym
def test_training_and_test_problems_never_overlap_whatever_their_seeds():
    # Small enough that a thousand draws would repeat most of it.
    source = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    with pytest.warns(UserWarning, match="it repeats itself"):
        train = {e.prompt for seed in (0, 1) for e in load_examples(source, seed=seed)}
        test = {e.prompt for e in load_examples(source, split="test", limit=1000, seed=0)}
    assert len(train) > 80 and len(test) > 20 and not train & test
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


@needs_gym
@pytest.mark.parametrize(
    "source, message",
    [
        ("chain_sun", "unknown task 'chain_sun'; did you mean 'chain_sum'"),
        ("chain_sum?min_term=3", "has no setting 'min_term'; did you mean 'min_terms'"),
        ("chain_sum?min_terms=x", "chain_sum's min_terms must be an integer, got 'x'"),
        ("chain_sum?min_terms=5&max_terms=3", "max_terms must be >= min_terms"),
        ("chain_sum?size=3", "size is not set here; set data.limit"),
        ("chain_sum?seed=3", "seed is not set here; set run.seed"),
        ("composite", "composite cannot be trained on"),
    ],
)
def test_unknown_tasks_and_settings_are_named(source, message):
    for read in (check_source, partial(load_examples, limit=2)):
        with pytest.raises(DataError, match=re.escape(message)):
            read(f"reasoning-gym:{source}")


# ---- the reward ------------------------------------------------------------------------------


@pytest.fixture
def reward(request):
    found = ReasoningGymReward(request.param, timeout_s=60.0, workers=1)
    yield found
    found.close()


def answer_of(example):
    return json.loads(example.answer)["answer"]


@needs_gym
@pytest.mark.parametrize(
    "reward, wanted",
    [
        ("reasoning-gym", [1.0, 0.0, 0.0, 1.0, 0.0]),
        ("reasoning-gym:shaped", [1.0, 0.0, 0.0, 1.0, 0.25]),
        ("reasoning-gym:whole", [0.0, 1.0, 0.0, 0.0, 0.0]),
        ("reasoning-gym:whole+shaped", [None, 1.0, 0.25, None, None]),
    ],
    indirect=["reward"],
)
def test_exact_and_shaped_scores_of_the_box_and_of_the_whole(reward, wanted):
    # The base grader of reasoning-gym gives a right answer in a sentence its share of the length.
    example = next(e for e in load_examples("reasoning-gym:gcd", limit=50) if answer_of(e) == "3")
    texts = [r"It is \boxed{3}", "3", "x: 3", r"\boxed{4} no, \boxed{ 3 }", r"\boxed{x: 3}"]
    found = reward(texts, [example.answer] * 5)
    assert found == [f if w is None else w for f, w in zip(found, wanted, strict=True)]


@needs_gym
@pytest.mark.parametrize("reward", ["reasoning-gym"], indirect=True)
def test_answers_of_other_problems_are_refused(reward):
    with pytest.raises(RewardError, match=re.escape("answers[1] is '42'")):
        reward([r"\boxed{1}"] * 2, [load_examples("reasoning-gym:gcd", limit=1)[0].answer, "42"])


@needs_gym
def test_a_grader_that_hangs_is_timed_out(tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text(
        "import time\n"
        "from oisd.rewards.reasoning import _start_worker\n"
        "def score(self, text, entry):\n"
        "    time.sleep(600 if text == 'slow' else 0)\n"
        "    return float(text == entry['answer'])\n"
        "def start():\n"
        "    _start_worker()\n"
        "    from reasoning_gym.arithmetic.gcd import GCDDataset\n"
        "    GCDDataset.score_answer = score\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import hanging

    monkeypatch.setattr("oisd.rewards.reasoning._start_worker", hanging.start)
    reward = ReasoningGymReward("reasoning-gym", timeout_s=3.0, workers=1)
    example = load_examples("reasoning-gym:gcd", limit=1)[0]
    try:
        texts = [r"\boxed{slow}", example.solution, r"\boxed{slow}"]
        assert reward(texts, [example.answer] * 3) == [0.0, 1.0, 0.0]
        assert reward.timeouts == 2
        assert reward([example.solution], [example.answer]) == [1.0]
    finally:
        reward.close()


@needs_gym
def test_the_adapters_of_trl_and_verl_grade_the_same(tmp_path):
    from datasets import Dataset

    from oisd.integrations.trl_rewards import reasoning_gym_reward
    from oisd.integrations.verl_data import compute_score, write_data

    tables = {"data": {"source": CHAIN, "limit": 3}, "reward": {"function": "reasoning-gym"}}
    (path,) = write_data(from_tables(tables), tmp_path)
    rows = Dataset.from_parquet(str(path)).to_list()
    golds = [row["reward_model"]["ground_truth"] for row in rows]
    assert golds == [e.answer for e in load_examples(CHAIN, limit=3)]
    right = f"\\boxed{{{json.loads(golds[0])['answer']}}}"
    texts = [right, right + " or \\boxed{x}", "no box"]
    found = [compute_score(CHAIN, text, golds[0], rows[0]["extra_info"]) for text in texts]
    assert found == [1.0, 0.0, 0.0]
    logged = {}
    said = [[{"role": "assistant", "content": text}] for text in texts]
    kwargs = {"prompts": texts, "log_metric": logged.__setitem__}
    assert reasoning_gym_reward(said, answer=[golds[0]] * 3, **kwargs) == found
    assert logged == {"frac_timeouts": 0.0}


# ---- all tasks, nightly ----------------------------------------------------------------------


@needs_gym
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_task_grades_its_own_answers():
    """With default settings: problems can be made, are fixed by the seed, and survive JSON."""
    from reasoning_gym.factory import DATASETS

    reward = ReasoningGymReward("reasoning-gym:whole", timeout_s=120.0)
    failures = {}
    try:
        for task in sorted({*DATASETS} - {*REFUSED}):
            try:
                first, again = (load_examples(f"reasoning-gym:{task}", limit=4) for _ in range(2))
                assert first == again, "other problems the second time"
                scores = reward([answer_of(e) for e in first], [e.answer for e in first])
                assert scores == [1.0] * len(first), scores
            except Exception as error:
                failures[task] = f"{type(error).__name__}: {error}"
    finally:
        reward.close()
    assert not failures, failures
    assert {*REFUSED} <= {*DATASETS}, "a task that is refused is gone"
    pinned = (Path(__file__).parents[3] / "constraints.txt").read_text()
    assert f"reasoning-gym=={version('reasoning-gym')}" in pinned
