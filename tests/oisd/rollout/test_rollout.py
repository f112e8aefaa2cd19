"""Sampling against full forward passes, and the noise that it rests on."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

from oisd.arithmetic import arithmetic_model
from oisd.rollout import Completions, left_pad, sample
from oisd.rollout.sampling import row_keys, uniform

PAD, EOS, VOCABULARY = 12, 13, 14
PROMPTS = [[4, 7, 10, 8, 5, 11], [1, 10, 2, 11], [9, 9, 10, 1, 0, 11], [3], [5, 10, 5, 11]]


@pytest.fixture(scope="module")
def model():
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, initializer_range=0.3)
    return arithmetic_model(0, **size).train()


def run(model, prompts, rows=None, **settings) -> Completions:
    settings = dict(pad_token_id=PAD, eos_token_ids=[EOS], max_completion_tokens=6) | settings
    return sample(model, prompts, range(len(prompts)) if rows is None else rows, **settings)


def same(a: Completions, b: Completions) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.lengths, b.lengths)


@torch.no_grad()
def logprobs_by_forward(model, prompt, completion, temperature=1.0):
    """[T, V] log-probs of the completion's positions in one unpadded pass over the row."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_are_those_of_a_full_forward(model, temperature):
    prompts = PROMPTS * 6
    sampled = run(model, prompts, temperature=temperature)
    assert len({tuple(row) for row in sampled.ids.tolist()}) > 10
    for i, prompt in enumerate(prompts):
        completion = sampled.ids[i, : sampled.lengths[i]]
        wanted = logprobs_by_forward(model, prompt, completion.tolist(), temperature)
        wanted = wanted.gather(1, completion[:, None])[:, 0]
        found = sampled.logprobs[i, : sampled.lengths[i]].double()
        assert (found - wanted).abs().max() < 1e-4


def assert_drawn_from(probabilities, tokens):
    """Pearson's test of tokens against probabilities; the rare ones are counted as one."""
    wanted = probabilities * len(tokens)
    found = torch.bincount(tokens, minlength=VOCABULARY).double()
    common = wanted >= 5
    assert common.sum() >= 5
    found = torch.cat([found[common], found[~common].sum()[None]])
    wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
    chi_square = ((found - wanted) ** 2 / wanted.clamp(min=1)).sum()
    assert chi_square < 40  # 13 degrees of freedom at most: p = 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_softmax(model, temperature):
    """The first ones do, and the second ones whatever the first was: each has its own noise."""
    prompt, count = PROMPTS[0], 6000
    sampled = run(
        model,
        [prompt] * count,
        max_completion_tokens=2,
        temperature=temperature,
        batch_size=count,
        seed=3,
    )
    first = sampled.ids[:, 0]
    assert_drawn_from(logprobs_by_forward(model, prompt, [0], temperature)[0].exp(), first)
    mode = int(first[first != EOS].mode().values)
    second = sampled.ids[first == mode, 1]
    assert len(second) > 500
    wanted = logprobs_by_forward(model, prompt, [mode, 0], temperature)[1].exp()
    assert_drawn_from(wanted, second)


def test_temperature_zero_is_greedy(model):
    sampled = run(model, PROMPTS, temperature=0.0)
    for i, prompt in enumerate(PROMPTS):
        completion = sampled.ids[i, : sampled.lengths[i]].tolist()
        wanted = logprobs_by_forward(model, prompt, completion)
        assert wanted.argmax(-1).tolist() == completion
        found = sampled.logprobs[i, : len(completion)].double()
        assert (found - wanted.amax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_keeps_the_nucleus_alone(model, top_p):
    prompts = [PROMPTS[0]] * 300
    sampled = run(model, prompts, top_p=top_p, max_completion_tokens=2)
    seen, outside = set(), 0
    for i, prompt in enumerate(prompts):
        completion = sampled.ids[i, : sampled.lengths[i]].tolist()
        steps = logprobs_by_forward(model, prompt, completion).exp().tolist()
        for t, (probabilities, token) in enumerate(zip(steps, completion, strict=True)):
            nucleus, mass = [], 0.0
            for v in sorted(range(VOCABULARY), key=lambda v: -probabilities[v]):
                if mass >= top_p:
                    break
                nucleus.append(v)
                mass += probabilities[v]
            assert token in nucleus
            wanted = math.log(probabilities[token] / mass)
            assert sampled.logprobs[i, t].item() == pytest.approx(wanted, abs=1e-4)
            seen |= {token} if t == 0 else set()
            outside += VOCABULARY - len(nucleus)
    assert outside > 0
    assert len(seen) > 1 or top_p < 0.5


# ---------------------------------------------------------------- what fixes a completion


@pytest.mark.parametrize("batch_size", [1, 7, 13])
def test_completions_do_not_depend_on_the_batches(model, batch_size):
    prompts = [PROMPTS[i % 5] for i in range(64)]
    whole = run(model, prompts, batch_size=64)
    parts = run(model, prompts, batch_size=batch_size)
    assert len({tuple(row) for row in whole.ids.tolist()}) > 20
    assert same(whole, parts)
    assert torch.equal(whole.finished, parts.finished)
    assert (whole.logprobs - parts.logprobs).abs().max() < 1e-4


def test_completions_follow_their_row_numbers(model):
    prompts, rows = [PROMPTS[i % 5] for i in range(20)], list(range(100, 120))
    whole = run(model, prompts, rows)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    moved = run(model, [prompts[i] for i in order], [rows[i] for i in order])
    assert torch.equal(moved.ids, whole.ids[order])


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"rows": range(40, 80)}], ids=str)
def test_seed_step_and_row_each_change_the_noise(model, change):
    prompts = [PROMPTS[0]] * 40
    base, again = run(model, prompts), run(model, prompts)
    other = run(model, prompts, **change)
    assert same(base, again)
    first = base.ids[:, 0] == other.ids[:, 0]
    assert first.float().mean() < 0.6


def test_positions_have_noise_of_their_own():
    keys = row_keys(range(50), 0, 0, "cpu")
    a, b = uniform(keys, 0, 100), uniform(keys, 1, 100)
    assert (a != b).all()


def test_sampling_leaves_torch_random_state_alone(model):
    before = torch.random.get_rng_state()
    run(model, PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- the end of a completion


@pytest.mark.parametrize("ends", [[EOS], [EOS, 5], [3, 1, 7]], ids=str)
def test_completions_end_at_the_first_of_the_end_tokens(model, ends):
    prompts, limit = [PROMPTS[i % 5] for i in range(60)], 6
    endless = run(model, prompts, eos_token_ids=[PAD])
    sampled = run(model, prompts, eos_token_ids=ends)
    assert sampled.finished.any() and not sampled.finished.all()
    for i in range(60):
        unbroken = endless.ids[i, : endless.lengths[i]].tolist()
        if not endless.finished[i]:  # no padding token was drawn: the whole stream is known
            stop = next((t + 1 for t, token in enumerate(unbroken) if token in ends), None)
            assert sampled.finished[i].item() == (stop is not None)
            length = stop or limit
            assert sampled.lengths[i] == length
            assert sampled.ids[i, :length].tolist() == unbroken[:length]
        length = int(sampled.lengths[i])
        assert (sampled.ids[i, length:] == PAD).all()
        assert (sampled.logprobs[i, length:] == 0).all()
        assert (sampled.logprobs[i, :length] < 0).all()
        assert sampled.mask()[i].tolist() == [t < length for t in range(sampled.ids.shape[1])]


def test_padding_may_be_the_end_token(model):
    prompts = [PROMPTS[i % 5] for i in range(60)]
    a, b = run(model, prompts), run(model, prompts, pad_token_id=EOS)
    assert a.finished.any()
    assert torch.equal(a.lengths, b.lengths) and torch.equal(a.finished, b.finished)
    assert torch.equal(a.ids[a.mask()], b.ids[b.mask()])


def test_the_width_is_that_of_the_longest(model):
    everything = list(range(VOCABULARY))
    sampled = run(model, PROMPTS, eos_token_ids=everything)
    assert sampled.ids.shape == sampled.logprobs.shape == (5, 1)
    assert sampled.finished.all()


def test_no_prompts_give_no_completions(model):
    sampled = run(model, [])
    assert sampled.ids.shape == (0, 0) and sampled.lengths.shape == (0,)


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], PAD, "cpu")
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---------------------------------------------------------------- the model is left as it was


SHIPPED = GenerationConfig(
    do_sample=True,
    temperature=0.6,
    top_k=1,
    top_p=0.5,
    repetition_penalty=5.0,
    max_new_tokens=2,
    eos_token_id=3,
)


def test_what_a_checkpoint_ships_is_set_aside(model, monkeypatch):
    plain = run(model, PROMPTS * 4)
    monkeypatch.setattr(model, "generation_config", SHIPPED)
    assert same(run(model, PROMPTS * 4), plain)
    assert model.generation_config is SHIPPED and SHIPPED.top_k == 1
    assert model.training


def test_what_was_set_aside_comes_back_after_an_exception(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", SHIPPED)
    with pytest.raises(IndexError):
        run(model, [[VOCABULARY + 7]])
    assert model.generation_config is SHIPPED
    assert model.training


def test_evaluation_mode_stays(model):
    model.eval()
    try:
        run(model, PROMPTS)
        assert not model.training
    finally:
        model.train()


# ---------------------------------------------------------------- the noise


def test_uniform_is_reproducible_to_the_last_bit():
    keys = row_keys([0, 5], seed=1, step=2, device="cpu")
    found = uniform(keys, 3, 4)
    assert found[0, 0].item() == 0.2773814543895389
    assert found[1, 3].item() == 0.7010107943560869


def test_uniform_is_splitmix_written_in_integers():
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def key(row, seed, step):
        base = mix((mix((seed + golden) & mask) + step + golden) & mask)
        return mix((base + row + golden) & mask)

    rows, seed, step, position = [0, 3, 1 << 40], 12345, 7, 11
    found = uniform(row_keys(rows, seed, step, "cpu"), position, 5)
    for i, row in enumerate(rows):
        at = mix((key(row, seed, step) + (position + 1) * golden) & mask)
        for column in range(5):
            bits = mix((at + (column + 1) * golden) & mask) >> 12
            assert found[i, column].item() == (bits + 0.5) / 2**52


def test_uniform_is_uniform():
    draws = uniform(row_keys(range(500), 0, 0, "cpu"), 0, 2000)
    count = draws.numel()
    assert draws.dtype == torch.float64 and draws.min() > 0 and draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 5 / math.sqrt(12 * count)
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / count)
    found = torch.histc(draws, 64, 0, 1)
    chi_square = ((found - count / 64) ** 2 / (count / 64)).sum()
    assert 20 < chi_square < 130  # 63 degrees of freedom: p = 1e-6 on either side


@pytest.mark.parametrize("between", ["columns", "positions", "rows", "steps", "seeds"])
def test_uniform_has_no_serial_correlation(between):
    def draw(position=0, step=0, seed=0, first=0):
        return uniform(row_keys(range(first, first + 300), seed, step, "cpu"), position, 1000)

    base = draw()
    other = {
        "columns": lambda: base.roll(1, dims=1),
        "positions": lambda: draw(position=1),
        "rows": lambda: draw(first=1),
        "steps": lambda: draw(step=1),
        "seeds": lambda: draw(seed=1),
    }[between]()
    correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(base.numel())
    assert not torch.equal(base, other)


def test_row_keys_are_distinct():
    keys = torch.cat(
        [row_keys(range(1000), seed, step, "cpu") for seed in range(3) for step in range(5)]
    )
    assert len(keys.unique()) == 15_000
    assert row_keys([], 0, 0, "cpu").numel() == 0
