import pytest
import torch
from transformers import AutoTokenizer

from oisd.arithmetic import (
    arithmetic_examples,
    arithmetic_model,
    arithmetic_tokenizer,
    supervised_batch,
)
from oisd.data import DataError, Example


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic_tokenizer()


def summands(example):
    a, b = example.prompt.removesuffix("=").split("+")
    return int(a), int(b)


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_answers_are_reversed_sums(digits):
    examples = arithmetic_examples(digits, limit=30)
    for example in examples:
        a, b = summands(example)
        assert len(str(a)) == len(str(b)) == digits
        assert int(example.answer[::-1]) == a + b
        assert len(example.answer) in (digits, digits + 1)
    assert len({example.id for example in examples}) == 30


def test_splits_share_no_problem_in_either_order():
    train, test = arithmetic_examples(2), arithmetic_examples(2, split="test")
    assert len(train) + len(test) == 90**2
    assert 0.08 < len(test) / 90**2 < 0.12
    assert not {frozenset(summands(e)) for e in train} & {frozenset(summands(e)) for e in test}


@pytest.mark.parametrize("digits", [2, 4])
def test_draws_are_fixed_by_the_seed(digits):
    draws = [arithmetic_examples(digits, limit=50, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len({example.id for example in draws[0]}) == 50


def test_long_problems_have_a_default_limit():
    assert len(arithmetic_examples(4)) == 10_000


@pytest.mark.parametrize("wrong", [{"digits": 0}, {"digits": 10}, {"split": "validation"}])
def test_bad_requests(wrong):
    with pytest.raises(DataError, match="arithmetic"):
        arithmetic_examples(**wrong)


def test_tokenizer_survives_a_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    batch = ["47+85=231", "5+5="]
    assert loaded(batch, padding=True).data == tokenizer(batch, padding=True).data
    assert loaded.padding_side == "left"
    assert (loaded.pad_token_id, loaded.eos_token_id) == (12, 13)


def test_tokenizer_pads_left_and_decodes_without_spaces(tokenizer):
    ids = tokenizer(["47+85=", "5+5="], padding=True)["input_ids"]
    assert ids == [[4, 7, 10, 8, 5, 11], [12, 12, 5, 10, 5, 11]]
    assert tokenizer.decode([2, 3, 1, 13, 12], skip_special_tokens=True) == "231"
    assert tokenizer.decode(tokenizer("47+85=231<eos>")["input_ids"]) == "47+85=231<eos>"


def test_model_is_a_function_of_the_seed():
    state = torch.random.get_rng_state()
    first, again, other = arithmetic_model(0), arithmetic_model(0), arithmetic_model(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.num_parameters() == 612_480
    assert first.config.num_hidden_layers == 6
    assert first.lm_head.weight is not first.model.embed_tokens.weight


def test_model_takes_other_sizes():
    model = arithmetic_model(0, num_hidden_layers=2, hidden_size=32)
    assert model.config.num_hidden_layers == 2 and model.config.hidden_size == 32


def test_supervised_batch(tokenizer):
    examples = [Example("7+8=", "51", "a"), Example("9+9=", "81", "b"), Example("1+1=", "2", "c")]
    batch = supervised_batch(examples, tokenizer, [2, 0])
    assert batch["input_ids"].tolist() == [[1, 10, 1, 11, 2, 13, 12], [7, 10, 8, 11, 5, 1, 13]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, -100, 2, 13, -100],
        [-100, -100, -100, -100, 5, 1, 13],
    ]


def test_padding_does_not_reach_the_loss(tokenizer):
    examples = [Example("1+1=", "2", "a"), Example("99+99=", "891", "b")]
    model = arithmetic_model(0)
    alone = model(**supervised_batch(examples, tokenizer, [0])).loss * 2
    other = model(**supervised_batch(examples, tokenizer, [1])).loss * 4
    both = model(**supervised_batch(examples, tokenizer, [0, 1])).loss * 6
    torch.testing.assert_close(both, alone + other)


def test_model_learns_one_batch(tokenizer):
    examples = arithmetic_examples(2, limit=8)
    model = arithmetic_model(0, num_hidden_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = supervised_batch(examples, tokenizer, range(8))
    for _ in range(80):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompts = tokenizer([example.prompt for example in examples], return_tensors="pt")
    output = model.generate(**prompts, do_sample=False, max_new_tokens=6)
    texts = tokenizer.batch_decode(output[:, 6:], skip_special_tokens=True)
    assert texts == [example.answer for example in examples]
