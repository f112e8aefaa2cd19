"""One prefill for the rows of a prompt: the tokens of a prefill for each, and who may share."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oisd.rollout import generate, sample
from tests.oisd.models.test_hybrids import hybrid
from tests.oisd.models.test_vision_wrappers import seeing
from tests.tiny_models import TINY, VOCAB, tiny_model

torch.set_num_threads(1)
EOS = [2, 5, 9, 14, 22]
TOKENS = 9


def texts(*lengths: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(23, 100) for _ in range(length)] for length in lengths]


# Longer and shorter than a window of 5, two of one length, one of a single token.
PROMPTS = texts(11, 7, 30, 1, 11)
# Completions of a prompt are neighbours, as in a rollout, but for the last five.
REPEATED = [prompt for prompt in PROMPTS for _ in range(4)] + PROMPTS


def with_learned_positions():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "gpt2", vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64,
            initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config)


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in TINY},
    "learned positions": with_learned_positions,
    "convolutions": lambda: hybrid("lfm2"),
    "linear attention": lambda: hybrid("qwen3_5_text"),
    "state space": lambda: hybrid("falcon_h1"),
    "vision, windows": lambda: seeing("gemma3"),
}


def both(model, monkeypatch, prompts=REPEATED, **settings):
    """Samples with a shared prefill and without, and the tokens that each read at once."""
    settings = dict(max_completion_tokens=TOKENS, pad_token_id=0, eos_token_ids=EOS) | settings
    read: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, named: read.append(named["input_ids"].numel()), with_kwargs=True
    )
    found, counts = [], []
    sample(model, prompts[:1] * 2, range(2), **settings)  # the trial, and what a first call does
    for shared in (True, False):
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(generate, "can_share", lambda _: False)
            read.clear()
            found.append(sample(model, prompts, range(len(prompts)), **settings))
            counts.append([*read])
    handle.remove()
    return found, counts


def assert_same(ours, theirs):
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.finished, theirs.finished)
    assert (theirs.logprobs < -0.05).float().mean() > 0.2  # far above the tolerance
    assert (ours.logprobs - theirs.logprobs).abs().max() < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokens_are_those_of_a_prefill_for_each_row(kind, monkeypatch):
    model = MODELS[kind]()
    (ours, theirs), (few, many) = both(model, monkeypatch)
    assert_same(ours, theirs)
    assert ours.finished.any() and not ours.finished.all()
    assert generate.can_share(model.eval())
    # Five prompts padded to 30 tokens, in place of 25 rows; then a forward for each token.
    assert few[0] == 5 * 30 and many[0] == 25 * 30
    assert len(few) == len(many) == ours.ids.shape[1]


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_a_batch_may_cut_a_group(batch_size, monkeypatch):
    model = tiny_model("qwen3")
    whole = both(model, monkeypatch)[0][1]
    (ours, theirs), (few, many) = both(model, monkeypatch, batch_size=batch_size)
    assert_same(ours, whole)
    assert_same(theirs, whole)
    assert (few == many) == (batch_size == 1)


def test_rows_of_a_prompt_are_batched_together(monkeypatch):
    model, prompts = tiny_model("qwen3"), texts(6, 6, 6, 6)
    mixed = [prompt for _ in range(4) for prompt in prompts]
    (ours, theirs), (few, _) = both(model, monkeypatch, mixed, batch_size=4, eos_token_ids=[VOCAB])
    assert_same(ours, theirs)
    assert few == 4 * [6, *(TOKENS - 1) * [4]]


@pytest.mark.parametrize("limit", [1, 2])
def test_short_completions(limit, monkeypatch):
    (ours, theirs), (few, _) = both(tiny_model("llama"), monkeypatch, max_completion_tokens=limit)
    assert_same(ours, theirs)
    assert ours.ids.shape[1] == len(few) == limit


def test_completions_that_end_at_once_are_not_continued(monkeypatch):
    model, everything = tiny_model("llama"), list(range(VOCAB))
    (ours, theirs), (few, _) = both(model, monkeypatch, eos_token_ids=everything)
    assert_same(ours, theirs)
    assert ours.lengths.eq(1).all() and few == [5 * 30]
    (ours, theirs), (few, _) = both(model, monkeypatch, eos_token_ids=everything[: VOCAB // 2])
    ended = int(ours.lengths.eq(1).sum())
    assert_same(ours, theirs)
    assert 0 < ended < 25 and few[1] == 25 - ended


def test_prompts_of_their_own_have_no_trial(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(generate, "can_share", None)
    made = sample(model, PROMPTS, range(5), pad_token_id=0, eos_token_ids=EOS,
                  max_completion_tokens=3)  # fmt: skip
    assert made.ids.shape == (5, 3)


# ---- who may not share -----------------------------------------------------------------------


def without_a_cache(model):
    """Keys and values are kept by the model, not returned."""
    whole = model.generate

    def alone(*given, **named):
        made = whole(*given, **named)
        return made if torch.is_tensor(made) else {"sequences": made.sequences}

    model.generate = alone


def with_state_of_its_own(model):
    """Each row's first logits are remembered, and added to its later ones."""
    forward, kept = model.forward, {}

    def remembers(**given):
        output = forward(**given)
        if given["input_ids"].shape[1] > 1 or len(kept["logits"]) != len(output.logits):
            kept["logits"] = output.logits[:, -1:].repeat(len(given["input_ids"]), 1, 1)[
                : len(given["input_ids"])
            ]
        else:
            output.logits = output.logits + kept["logits"]
        return output

    model.forward = remembers


def with_another_position(model):
    """The first token after a cache that was handed in is taken for a later one."""
    forward, seen = model.forward, []

    def counts(**given):
        now = given["input_ids"].shape
        if seen and now[1] == 1 and seen[-1][1] > 1 and seen[-1][0] != now[0]:
            given["position_ids"] = given["position_ids"] + 3
        seen.append(now)
        return forward(**given)

    model.forward = counts


@pytest.mark.parametrize(
    "keep", [without_a_cache, with_state_of_its_own, with_another_position],
    ids=lambda keep: keep.__name__,
)  # fmt: skip
def test_a_model_whose_state_does_not_follow_its_rows(keep, monkeypatch):
    model = tiny_model("llama")
    keep(model)
    assert not generate.can_share(model)
    (ours, theirs), (few, many) = both(model, monkeypatch)
    assert few == many and torch.equal(ours.ids, theirs.ids)


@pytest.mark.parametrize(
    "make", [lambda: hybrid("recurrent_gemma"), lambda: seeing("qwen3_vl")],
    ids=["recurrent_gemma", "qwen3_vl"],
)  # fmt: skip
def test_types_that_remember_outside_of_their_cache(make, monkeypatch):
    model = make()
    (ours, theirs), (few, many) = both(model, monkeypatch)
    assert not generate.can_share(model)
    assert few == many and torch.equal(ours.logprobs, theirs.logprobs)


def test_the_trial_is_made_once_and_leaves_no_trace(monkeypatch):
    model, trials = tiny_model("llama"), []
    agree = generate._scores_agree
    monkeypatch.setattr(generate, "_scores_agree", lambda m: trials.append(m) or agree(m))
    state = torch.random.get_rng_state()
    for seed in range(2):
        both(model, monkeypatch, seed=seed)
    assert trials == [model]
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    other = tiny_model("llama")
    assert generate.can_share(other) and trials == [model, other]


def test_in_half_precision_too():
    model = tiny_model("qwen3", dtype=torch.bfloat16).eval()
    assert generate.can_share(model.eval())
    model = tiny_model("qwen3").eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert generate.can_share(model.eval())
