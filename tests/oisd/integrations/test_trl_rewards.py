"""The grader as a reward function of TRL, and the alarms in TRL's log."""

from __future__ import annotations

import functools
import json
import multiprocessing
import pickle
import string
import warnings
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.rewards import accuracy_reward

from oisd.integrations.trl import OISDTrainer, math_reward
from tests.oisd.integrations.graded import HALF, in_a_process
from tests.oisd.integrations.trl_runs import PROMPTS, config, make
from tests.tiny_models import tiny_model


def said(text: Any, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    "completion, reward",
    [
        (HALF, 1.0),
        ([said(HALF)], 1.0),
        ([said([{"type": "text", "text": HALF}])], 1.0),
        ([said([HALF])], 1.0),
        ([said(HALF), said(r"\boxed{9}", role="tool")], 1.0),
        ([said(HALF), said(r"\boxed{9}")], 0.0),
        ([said(None)], 0.0),
        ([], 0.0),
        ("1/2", 0.0),  # no box
    ],
    ids=["plain", "message", "parts", "strings", "tool", "last", "empty", "none", "no-box"],
)
def test_the_last_words_of_the_assistant_are_graded(completion, reward):
    assert math_reward(prompts=["?"], completions=[completion], solution=["0.5"]) == [reward]


@pytest.mark.parametrize(
    "gold, reward",
    [
        (r"\frac{1}{2}", 1.0),
        (r"Half of it, $\boxed{\tfrac12}$.", 1.0),
        (0.5, 1.0),
        (2, 0.0),
        (None, None),
        (float("nan"), None),
        ("", None),
    ],
    ids=str,
)
def test_gold_answers(gold, reward):
    assert math_reward([HALF], solution=[gold]) == [reward]


def test_a_gold_that_nobody_can_read_is_left_out_for_all_and_named_once():
    gold = r"\begin{tikzpicture} \draw (0,0); \end{tikzpicture}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = math_reward([HALF, "no box", HALF], solution=[gold, gold, "1/2"])
        math_reward([HALF], solution=[gold])
    assert found == [None, None, 1.0]
    (said,) = (text for each in caught if "math_reward" in (text := str(each.message)))
    assert "tikzpicture" in said and "None" in said


def test_columns():
    other = functools.partial(math_reward, column="final_answer")
    assert math_reward([HALF], answer=["1/2"]) == [1.0]
    assert math_reward([HALF], answer=["1/3"], solution=["1/2"]) == [1.0]
    assert other([HALF], final_answer=["1/2"], solution=["1/3"]) == [1.0]
    with pytest.raises(ValueError, match=r"column 'solution' or 'answer'.*got \['topic'\]"):
        math_reward([HALF], topic=["halves"], completion_ids=[[1]], trainer_state=object())
    with pytest.raises(ValueError, match="column 'final_answer' of gold answers"):
        other([HALF], solution=["1/2"])


@pytest.mark.parametrize(
    "completions, solution, says",
    [
        ([HALF, HALF], ["1/2"], "completions must be .* 1, got 2 of them"),
        (HALF, ["1/2"], "got a string"),
        ([HALF], "1/2", "column 'solution' must be a list of gold answers, got str"),
        ([3], ["1/2"], r"completions\[0\] must be a string or a list of messages .*, got int"),
        ([[{"text": HALF}]], ["1/2"], r"completions\[0\] must be"),
        ([[said([{"text": 3}])]], ["1/2"], r"completions\[0\] must have parts .* text, got int"),
        (iter([HALF]), ["1/2"], "completions must be a list .*, got list_iterator"),
        ([HALF], [["1/2"]], "gold answer 0 must be a string, a number or None, got list"),
    ],
    ids=["lengths", "one-string", "one-gold", "number", "no-content", "parts", "iterator", "list"],
)
def test_errors_name_the_argument(completions, solution, says):
    with pytest.raises(ValueError, match="math_reward: .*" + says):
        math_reward(completions, solution=solution)


def test_pickled_in_several_processes():
    """Each with workers of its own, which sympy's answer needs."""
    pickled = pickle.dumps(functools.partial(math_reward, column="final_answer"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(in_a_process, [pickled] * 2) == [[1.0, 1.0]] * 2


@pytest.mark.skipif(trl.__version__ != "1.16.0", reason="what docs/trl.md says of TRL 1.16.0")
@pytest.mark.parametrize(
    "text, gold, theirs",
    [
        (r"\boxed{\frac12}", r"\frac{1}{2}", 0.0),
        (r"$\boxed{\tfrac12}$", r"$\frac{1}{2}$", 0.0),
        (r"$\boxed{\sqrt3}$", r"$\sqrt{3}$", 0.0),
        (r"Not \boxed{7}, but \boxed{8}", "8", 0.0),
        (r"$\boxed{\frac{1}{2}}$", r"$\frac{1}{2}$", 1.0),
    ],
)
def test_what_the_document_says_of_trls_own_grader(text, gold, theirs):
    assert accuracy_reward([[said(text)]], [gold]) == [theirs]
    assert math_reward([[said(text)]], solution=[gold]) == [1.0]


# ---- in a trainer --------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def letters() -> PreTrainedTokenizerFast:
    """One token a character, so that a completion can hold a box."""
    alphabet = ["[PAD]", "[EOS]", "[UNK]", *string.printable]
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", chat_template=TEMPLATE
    )


BOXES = [r"\boxed{\frac12}", r"\boxed{2}", "half", r"\boxed{0.5}"]


def boxed_rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    tokenizer = trainer.processing_class
    texts = [p if isinstance(p, str) else p[0]["content"] for p in prompts]
    completions = [tokenizer(BOXES[i % 4] + "[EOS]")["input_ids"] for i in range(len(prompts))]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


@pytest.mark.parametrize("conversational", [False, True])
def test_a_step_on_its_rewards(conversational, tmp_path):
    tokenizer = letters()
    prompt: Any = [said("1/2?", role="user")] if conversational else "1/2?"
    rows = [{"prompt": prompt, "final_answer": gold} for gold in ("1/2", "1/2")]
    trainer = OISDTrainer(
        model=tiny_model("qwen3", vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1),
        reward_funcs=functools.partial(math_reward, column="final_answer"),
        args=config(str(tmp_path), max_completion_length=20),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=boxed_rollouts,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["reward"] == 0.5 and row["rewards/math_reward/mean"] == 0.5
    assert row["frac_timeouts"] == 0.0 and row["frac_gold"] == 1.0
    assert row["loss/think"] != 0
    after = trainer.model.parameters()
    moved = [torch.linalg.norm(p - b) for p, b in zip(after, before, strict=True)]
    assert max(moved) > 1e-3


# ---- alarms --------------------------------------------------------------------------------------


def alarms(log: list[dict[str, Any]]) -> dict[str, int]:
    return {n: row["step"] for row in log for n in row if n.startswith("alarm/")}


def nothing(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def nothing_at_all(folder: str, **options: Any) -> Any:
    return make(folder, keywords={"reward_funcs": nothing}, learning_rate=1e-3, **options)


@pytest.mark.parametrize("logging_steps, step", [(1, 10), (4, 12)])
def test_rewards_that_are_all_equal(logging_steps, step, tmp_path, caplog):
    trainer = nothing_at_all(str(tmp_path), max_steps=13, logging_steps=logging_steps)
    trainer.train()
    assert alarms(trainer.state.log_history) == {"alarm/rewards_equal": step}
    (line,) = (r.getMessage() for r in caplog.records if "alarm" in r.getMessage())
    assert f"step {step}: alarm: the rewards" in line and "\n" not in line
    assert f"equal for {step} steps (mean now 0.0000)" in line and "reward_funcs" in line


def test_a_resumed_run_raises_at_the_same_step_and_not_again(tmp_path, caplog):
    options: dict[str, Any] = dict(max_steps=12, save_strategy="steps", save_steps=6)
    nothing_at_all(str(tmp_path), **options).train()
    for step, said_again in ((6, 1), (12, 0)):
        caplog.clear()
        again = nothing_at_all(str(tmp_path), **options | {"max_steps": 14})
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert alarms(again.state.log_history) == {"alarm/rewards_equal": 10}
        assert len([r for r in caplog.records if "alarm" in r.getMessage()]) == said_again


HEALTHY = {"reward": 0.5, "frac_reward_zero_std": 0.3, "completions/clipped_ratio": 0.2,
           "entropy": 0.5, "sampling/sampling_logp_difference/mean": 0.01}  # fmt: skip


@pytest.mark.parametrize(
    "name, changes, step",
    [
        ("all_cut_off", {"completions/clipped_ratio": 1.0}, 3),
        ("sampler_gap", {"sampling/sampling_logp_difference/mean": 0.2}, 1),
        ("entropy_low", {"entropy": 0.002}, 10),
        ("reward_timeouts", {"frac_timeouts": 0.25}, 3),
        ("think_share", {"share/think": 0.004}, 3),
        ("no_gold", {"frac_gold": 0.0}, 5),
    ],
)
def test_each_quantity_of_trls_log(name, changes, step, tmp_path):
    trainer = make(str(tmp_path))
    found = {n: trainer._new_alarms(HEALTHY | changes, n) for n in range(1, 15)}
    assert [(n, list(alarm)) for n, alarm in found.items() if alarm] == [(step, [name])]


def test_a_healthy_run_raises_none(tmp_path, caplog):
    trainer = make(str(tmp_path), max_steps=12, learning_rate=1e-3)
    trainer.train()
    log = trainer.state.log_history
    assert len([row for row in log if "reward" in row]) == 12 and len(PROMPTS) == 4
    assert all(0 < row["entropy"] and row["reward_std"] > 0.1 for row in log if "reward" in row)
    assert alarms(log) == {} and "alarm" not in json.dumps([r.getMessage() for r in caplog.records])
