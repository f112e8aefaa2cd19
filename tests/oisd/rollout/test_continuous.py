"""Continuous batching: the same sampling as `generate`'s, by another engine."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import GenerationConfig

from oisd.arithmetic import arithmetic_model
from oisd.models import Taps
from oisd.rollout import continuous, sample
from tests.oisd.rollout.test_rollout import (
    EOS,
    PAD,
    PROMPTS,
    assert_drawn_from,
    logprobs_by_forward,
    run,
    same,
)
from tests.tiny_models import TINY, WINDOW, tiny_model

# What other versions get is in tests/test_engine_choice.py.
pytestmark = pytest.mark.skipif(
    continuous.untested() is not None, reason=str(continuous.untested())
)

# Windows shorter than the texts are refused where transformers fills them wrongly.
WINDOWED = ["mistral", "gemma3", "phi3", "gpt_oss"]
full_windows = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            continuous.version() < continuous.FULL_WINDOWS, reason="refused with this transformers"
        ),
    )
    for name in WINDOWED
]
# The softcap of Gemma 2 is always refused.
PLAIN = [name for name in TINY if name not in ("gemma2", *WINDOWED)]


@pytest.fixture(scope="module")
def model():
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, initializer_range=0.3)
    return arithmetic_model(0, **size).train()


def texts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(3, 101) for _ in range(draw.randrange(1, longest))] for _ in range(count)
    ]


def both(model, prompts, **settings):
    settings = dict(pad_token_id=0, eos_token_ids=[2, 3, 4, 5], max_completion_tokens=16) | settings
    return (
        sample(model, prompts, range(len(prompts)), engine=engine, **settings)
        for engine in ("generate", "continuous")
    )


def assert_alike(ours, theirs, rounding=1e-4):
    assert same(ours, theirs) and torch.equal(ours.finished, theirs.finished)
    assert len({tuple(row) for row in ours.ids.tolist()}) >= min(5, len(ours.ids))
    assert (ours.logprobs - theirs.logprobs).abs().max() < rounding


# ---------------------------------------------------------------- the tokens of `generate`


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 1.6, "seed": 3, "step": 2}, {"top_p": 0.7}],
    ids=str,
)
def test_the_same_noise_gives_the_same_completions(model, settings):
    prompts = [PROMPTS[i % 5] for i in range(60)]
    theirs = run(model, prompts, **settings)
    assert_alike(run(model, prompts, engine="continuous", **settings), theirs)
    assert theirs.finished.any() and not theirs.finished.all()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "oisd"])
@pytest.mark.parametrize("name", [*PLAIN, *full_windows])
def test_architectures(name, attention):
    # The prompts are read in parts, more than fit wait, and prompts share blocks of 32.
    prompts = texts(4, 30) + [text for text in texts(2, 90, seed=1) for _ in range(3)]
    if name == "gpt_oss" and attention != "eager":  # SDPA, which "oisd" pages by, has no sinks
        with pytest.raises(ValueError, match="does not support"):
            list(both(tiny_model(name, attn_implementation=attention), prompts, batch_size=4))
        return
    model = tiny_model(name, attn_implementation=attention)
    theirs, ours = both(model, prompts, batch_size=4)
    assert_alike(ours, theirs)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["qwen3", full_windows[1]])
def test_a_full_cache_sets_completions_back_without_a_trace(name, monkeypatch):
    """Evicted requests begin anew with what they generated in their prompt."""
    model = tiny_model(name)
    monkeypatch.setattr(continuous, "_BLOCK", 4)
    monkeypatch.setattr(continuous, "_that_fit", lambda served, blocks, block: 20)
    evicted = []
    note = continuous._Due.prepare_tensor_args

    def watched(self, requests_in_batch, arg_storage):
        states = [request.state for request in requests_in_batch]
        given = [state.logit_processor_kwargs["prompt_length"] for state in states]
        evicted.extend(len(s.initial_tokens) - n for s, n in zip(states, given, strict=True))
        return note(self, requests_in_batch, arg_storage)

    monkeypatch.setattr(continuous._Due, "prepare_tensor_args", watched)
    theirs, ours = both(model, texts(12, 20), eos_token_ids=[2])
    assert max(evicted) > 0
    assert_alike(ours, theirs)


@pytest.mark.parametrize("name", ["qwen3", *full_windows])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_prompt_longer_than_a_forward_is_read_in_parts(name, tokens, monkeypatch):
    """Down to parts of one token, which looks like the one that a completion goes on with."""
    monkeypatch.setattr(continuous, "_PREFILL", tokens)
    model = tiny_model(name)
    theirs, ours = both(model, texts(12, 20), batch_size=2)
    assert_alike(ours, theirs)


def test_a_window_that_is_never_full_is_none():
    model = tiny_model("mistral")
    prompts = texts(20, 3)
    theirs, ours = both(model, prompts, max_completion_tokens=WINDOW - 2)
    assert max(map(len, prompts)) == 2
    assert_alike(ours, theirs)


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize(
    "name, dtype, mean, most",
    [
        ("qwen3", "float32", 1e-5, 1e-4),
        ("llama", "bfloat16", 5e-3, 0.1),
        pytest.param("gemma3", "bfloat16", 5e-3, 0.1, marks=full_windows[0].marks),
    ],
)
def test_logprobs_are_those_of_a_full_forward(name, dtype, mean, most):
    model, prompts = tiny_model(name).eval(), texts(20, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), torch.no_grad():
        sampled = sample(
            model, prompts, range(20), engine="continuous", batch_size=7, temperature=0.8,
            pad_token_id=0, eos_token_ids=[2, 3, 4, 5], max_completion_tokens=24,
        )  # fmt: skip
        off = []
        for i, prompt in enumerate(prompts):
            completion = sampled.ids[i, : sampled.lengths[i]]
            ids = torch.tensor([[*prompt, *completion.tolist()]])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / 0.8
            wanted = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
            off.append((sampled.logprobs[i, : sampled.lengths[i]] - wanted).abs())
    off = torch.cat(off)
    assert len(off) > 200 and sampled.logprobs.min() < -3
    assert off.mean() < mean and off.max() < most


def test_tokens_follow_the_softmax(model):
    """The first ones do, and the second ones whatever the first was."""
    prompt, count = PROMPTS[0], 3000
    settings = dict(max_completion_tokens=2, batch_size=250, seed=3, engine="continuous")
    sampled = run(model, [prompt] * count, **settings)
    first = sampled.ids[:, 0]
    assert_drawn_from(logprobs_by_forward(model, prompt, [0])[0].exp(), first)
    mode = int(first[first != EOS].mode().values)
    second = sampled.ids[first == mode, 1]
    assert len(second) > 300
    assert_drawn_from(logprobs_by_forward(model, prompt, [mode, 0])[1].exp(), second)


# ---------------------------------------------------------------- what fixes a completion


@pytest.mark.parametrize("batch_size", [1])
def test_completions_do_not_depend_on_the_batches(model, batch_size):
    prompts = [PROMPTS[i % 5] for i in range(32)]
    whole = run(model, prompts, engine="continuous")
    parts = run(model, prompts, engine="continuous", batch_size=batch_size)
    assert_alike(parts, whole)


def test_a_run_repeats_to_the_bit():
    model, prompts = tiny_model("qwen3"), texts(12, 40)
    options = dict(pad_token_id=0, eos_token_ids=[2, 3, 4], max_completion_tokens=12, batch_size=4)
    first, again = (sample(model, prompts, range(12), engine="continuous", **options) for _ in "ab")
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logprobs, again.logprobs)


def test_sampling_leaves_torch_random_state_alone(model):
    before = torch.random.get_rng_state()
    run(model, PROMPTS, engine="continuous")
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- the model is left as it was


def test_what_a_checkpoint_ships_is_set_aside(model, monkeypatch):
    plain = run(model, PROMPTS * 4, engine="continuous")
    shipped = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=1, top_p=0.5, repetition_penalty=5.0,
        max_new_tokens=2, eos_token_id=3,
    )  # fmt: skip
    monkeypatch.setattr(model, "generation_config", shipped)
    assert same(run(model, PROMPTS * 4, engine="continuous"), plain)
    assert model.generation_config is shipped and model.training


def test_a_tapped_model_samples_the_same(model):
    wanted = run(model, PROMPTS * 4, engine="continuous")
    with Taps(model, student_layers=[1], attention=True, attention_kernel="fused") as taps:
        taps.enabled = False
        assert same(run(model, PROMPTS * 4, engine="continuous"), wanted)
        taps.enabled = True
        model(torch.tensor([PROMPTS[0]]), use_cache=False)
        assert taps.attention()[0].alignment is not None


def test_a_failure_in_the_loop_is_raised_and_leaves_no_trace(model):
    with pytest.raises(RuntimeError, match="continuous batching failed.* out of range"):
        run(model, [[PAD + 9]], engine="continuous")
    assert model.training and model.config._attn_implementation == "sdpa"


REFUSED = {
    "gemma2": r"leaves out the softcap",
    "mistral": r"window of 5 tokens is shorter than 9, prompt and completion, .* before 5\.16",
    "gemma3": r"window of 5 tokens",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_would_sample_wrongly_is_refused(name, monkeypatch):
    monkeypatch.setattr(continuous, "version", lambda: (5, 10))
    with pytest.raises(ValueError, match=f'engine must be "generate" for .*{REFUSED[name]}'):
        run(tiny_model(name), [PROMPTS[3]], engine="continuous", max_completion_tokens=8)


def test_unknown_engines_are_refused(model):
    with pytest.raises(ValueError, match="one of generate, continuous, got 'vllm'"):
        run(model, PROMPTS, engine="vllm")


def test_no_prompts_give_no_completions(model):
    assert run(model, [], engine="continuous").ids.shape == (0, 0)
