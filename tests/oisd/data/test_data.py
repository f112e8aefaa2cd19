import json
import subprocess
import sys

import datasets
import pytest
from transformers import Qwen3Config

from oisd.arithmetic import arithmetic_tokenizer
from oisd.data import (
    PAPER_SYSTEM_PROMPT,
    DataError,
    Example,
    Message,
    SourceError,
    check_vocabulary,
    encode_prompts,
    load_examples,
    permutation,
    prompt_indices,
    render_prompt,
)
from tests import DATA

GSM8K = str(DATA / "gsm8k_sample.jsonl")
DEEPMATH = str(DATA / "deepmath_sample.jsonl")
GSM8K_PATTERN = r"####\s*(.+)$"

# Qwen's layout, cut down to characters that the built-in tokenizer knows.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '0', 'user': '1', 'assistant': '2'}[m.role] }}="
    "{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}2={% if not enable_thinking %}99{% endif %}{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


ROWS = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]


def test_gsm8k_answers_follow_the_marker():
    examples = load_examples(GSM8K, answer_pattern=GSM8K_PATTERN)
    answers = [example.answer for example in examples]
    assert answers == ["25", "202", "1,500", "20", "80", "-52", "18.5", "120", "168"]
    assert examples[0].id == "train/0"
    assert isinstance(examples[0].prompt, str) and examples[0].prompt.startswith("A baker")


def test_deepmath_answers_are_taken_as_they_are():
    examples = load_examples(DEEPMATH, answer_field="final_answer")
    assert len(examples) == 9
    assert examples[0].answer == "-\\frac{125}{6}"
    assert {"Yes", "True", "\\infty"} <= {example.answer for example in examples}


def as_jsonl(folder):
    return str(folder / "rows.jsonl"), "train"


def as_json(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return str(folder / "rows.json"), "train"


def as_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet"), "train"


def as_saved_dataset(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved"), "train"


def as_saved_dataset_dict(folder):
    rows = {"train": ROWS[:1], "test": ROWS}
    tables = {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
    datasets.DatasetDict(tables).save_to_disk(folder / "saved")
    return str(folder / "saved"), "test"


def as_folder_of_files(folder):
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text((folder / "rows.jsonl").read_text())
    return str(folder / "set"), "train"


@pytest.mark.parametrize(
    "make",
    [as_jsonl, as_json, as_parquet, as_saved_dataset, as_saved_dataset_dict, as_folder_of_files],
    ids=lambda make: make.__name__[3:],
)
def test_every_kind_of_source_gives_the_same_rows(make, tmp_path, write):
    write(*ROWS)
    source, split = make(tmp_path)
    examples = load_examples(source, split=split)
    expected = [Example(r["question"], r["answer"], f"{split}/{i}") for i, r in enumerate(ROWS)]
    assert examples == expected


def test_arithmetic_source():
    examples = load_examples("arithmetic:digits=3", split="test", limit=7)
    assert len(examples) == 7 and all(len(e.prompt) == 8 for e in examples)
    assert len(load_examples("arithmetic", limit=3)) == 3
    with pytest.raises(DataError, match="digits=2"):
        load_examples("arithmetic:digit=3")


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (12.0, "12"), (2.5, "2.5"), (-3, "-3"), (" 7 ", "7")]
)
def test_numbers_become_text(value, text, write):
    assert load_examples(write({"question": "q", "answer": value}))[0].answer == text


def test_dotted_fields_reach_into_structs(write):
    source = write({"extra_info": {"q": "1+1=", "deep": {"answer": 2}}, "a.b": "x"})
    example = load_examples(
        source, prompt_field="extra_info.q", answer_field="extra_info.deep.answer"
    )[0]
    assert (example.prompt, example.answer) == ("1+1=", "2")
    assert load_examples(source, prompt_field="a.b", answer_field="extra_info.q")[0].prompt == "x"


def test_chat_prompts(write):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    example = load_examples(write({"prompt": chat, "answer": "1"}), prompt_field="prompt")[0]
    assert example.prompt == (Message("system", "s"), Message("user", "u"))


def test_limit_draws_a_fixed_subset(write):
    source = write(*({"question": f"q{i}", "answer": i} for i in range(50)))
    drawn = [load_examples(source, limit=10, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({example.id for example in drawn[0]}) == 10
    assert all(example.id == f"train/{example.answer}" for example in drawn[0])
    assert len(load_examples(source, limit=99)) == 50


def test_splits_of_a_file_may_be_sliced(write):
    examples = load_examples(write(*ROWS), split="test[1:3]")
    assert [example.answer for example in examples] == ["2", "4"]
    with pytest.raises(SourceError, match=r"cannot read split 'test\[1': "):
        load_examples(write(*ROWS), split="test[1")


GOOD = {"question": "q", "answer": "1"}

BAD_ROWS = {
    "no such column": (
        [{"question": "q", "final_answer": "1"}],
        {},
        r"row 0: no field 'answer'; did you mean 'final_answer'\? \(fields: question, "
        r"final_answer\). Set answer_field",
    ),
    "no such column in a struct": (
        [{"question": "q", "answer": {"valu": "1"}}],
        {"answer_field": "answer.value"},
        r"row 0: no field 'value' in 'answer'; did you mean 'valu'",
    ),
    "field missing from one row": (
        [GOOD, {"question": "q"}],
        {},
        r"row 1: field 'answer' is empty.*answer_field \(fields: question, answer\)",
    ),
    "null": ([GOOD, {"question": None, "answer": "1"}], {}, r"row 1: field 'question' is empty"),
    "empty": ([GOOD, {"question": "", "answer": "1"}], {}, r"row 1: field 'question' is empty"),
    "blank": ([GOOD, {"question": " ", "answer": "1"}], {}, r"row 1: field 'question' must be"),
    "list for an answer": ([{"question": "q", "answer": ["1"]}], {}, r"text or a number, got \['1"),
    "list of texts": (
        [{"question": ["q"], "answer": "1"}],
        {},
        r"row 0: each message",
    ),
    "no answer in the field": (
        [{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": "so it is 4"}],
        {"answer_pattern": GSM8K_PATTERN},
        r"row 1: answer_pattern .* finds no answer in field 'answer'.*so it is 4",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case, write):
    rows, options, message = BAD_ROWS[case]
    with pytest.raises(DataError, match=f"(?s){message}"):
        load_examples(write(*rows), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"source": "/no/such/folder"}, "no such file or folder"),
        ({"source": ""}, "source is empty"),
        ({"source": __file__}, "expected a .json, .jsonl, .parquet file"),
        ({"source": GSM8K, "limit": 0}, "limit must be at least 1"),
        ({"source": GSM8K, "answer_pattern": "("}, "not a regular expression"),
        ({"source": GSM8K, "answer_pattern": "(a)(b)"}, "exactly one group.*has 2"),
        ({"source": GSM8K, "answer_pattern": "a"}, "exactly one group.*has 0"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(DataError, match=message):
        load_examples(**options)


def test_data_sets_without_rows(tmp_path, write):
    with pytest.raises(DataError, match="empty"):
        load_examples(write())
    none = datasets.Dataset.from_list(ROWS).select([])
    none.to_parquet(tmp_path / "rows.parquet")
    none.save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        with pytest.raises(DataError, match=f"{name}: split 'train' has no rows"):
            load_examples(str(tmp_path / name))
    with pytest.raises(DataError, match="has no rows"):
        load_examples(write(*ROWS), split="train[:0]")


def test_broken_file_and_unknown_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "ans\n{"\n')
    with pytest.raises(DataError, match="rows.jsonl: is not JSON: line 1: Unterminated"):
        load_examples(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        load_examples(as_saved_dataset_dict(tmp_path)[0], split="validation")


def test_unreachable_hub_says_how_to_go_on(monkeypatch):
    def load_dataset(*args, **kwargs):
        assert args == ("openai/gsm8k", "main") and kwargs == {"split": "train"}
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="(?s)cannot be reached.*hf download --repo-type dataset"):
        load_examples("openai/gsm8k", subset="main")


def test_plain_prompts(tokenizer):
    assert render_prompt(tokenizer, "1+1=") == "1+1="
    assert render_prompt(tokenizer, "1+1=", system_prompt="9") == "9\n\n1+1="
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(tokenizer, "1+1=", chat_template=True)


def test_chat_template_is_used_when_there_is_one(chat_tokenizer):
    assert render_prompt(chat_tokenizer, "1+1=") == "1=1+1=2=99"
    assert render_prompt(chat_tokenizer, "1+1=", enable_thinking=True) == "1=1+1=2="
    assert render_prompt(chat_tokenizer, "1+1=", chat_template=False) == "1+1="


def test_system_prompt_yields_to_the_conversations_own(chat_tokenizer):
    rendered = render_prompt(chat_tokenizer, "7", system_prompt=PAPER_SYSTEM_PROMPT)
    assert rendered == f"0={PAPER_SYSTEM_PROMPT}1=72=99"
    chat = (Message("system", "5"), Message("user", "7"))
    assert render_prompt(chat_tokenizer, chat, system_prompt="8") == "0=51=72=99"


def test_template_that_refuses_a_role(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="refuses a conversation of roles system, user: System"):
        render_prompt(chat_tokenizer, "7", system_prompt="8")


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% for m in messages %}", "broken: TemplateSyntaxError: "),
        ("{{ messages[0].content.nothing() }}", "broken: UndefinedError: "),
        ("{{ messages[0]['content'] + 1 }}", "broken: TypeError: "),
    ],
)
def test_a_broken_template_is_not_taken_for_one_that_refuses(chat_tokenizer, template, says):
    chat_tokenizer.chat_template = template
    with pytest.raises(DataError, match=says) as caught:
        render_prompt(chat_tokenizer, "7", system_prompt="8")
    assert "system role" not in str(caught.value) and "chat_template to false" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_that_a_template_does_not_continue(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    chat = (Message("user", "5"), Message("assistant", "7"))
    with pytest.raises(DataError, match="refuses .* end the conversation with the user's"):
        render_prompt(chat_tokenizer, chat)


def examples_of(*prompts):
    return [Example(prompt, "0", f"train/{i}") for i, prompt in enumerate(prompts)]


def test_encode_prompts(tokenizer):
    encoded = encode_prompts(tokenizer, examples_of("47+85=", "1+1="))
    assert encoded.token_ids == [[4, 7, 10, 8, 5, 11], [1, 10, 1, 11]]
    assert encoded.dropped == []


class BosTokenizer:
    """Adds a BOS (7) where asked to, and has a template that already writes it."""

    name_or_path = "bos"

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, **_):
        return "7" + messages[-1]["content"]

    def __call__(self, texts, add_special_tokens, **_):
        return {"input_ids": [[7] * add_special_tokens + [int(c) for c in t] for t in texts]}


@pytest.mark.parametrize("chat_template", [None, "x"], ids=["plain", "chat"])
def test_there_is_one_bos(chat_template):
    encoded = encode_prompts(BosTokenizer(chat_template), examples_of("12"))
    assert encoded.token_ids == [[7, 1, 2]]


def test_overlong_prompts(tokenizer):
    examples = examples_of("1+1=", "1111+1111=", "2+2=")
    with pytest.raises(DataError, match=r"prompt train/1 has 10 tokens, the limit is 4.*drop"):
        encode_prompts(tokenizer, examples, max_prompt_tokens=4)
    encoded = encode_prompts(tokenizer, examples, max_prompt_tokens=4, overlong="drop")
    assert encoded.examples == [examples[0], examples[2]]
    assert encoded.dropped == [examples[1]]
    assert len(encoded.token_ids) == 2
    with pytest.raises(DataError, match="all 3 prompts"):
        encode_prompts(tokenizer, examples, max_prompt_tokens=3, overlong="drop")
    with pytest.raises(DataError, match="overlong must be"):
        encode_prompts(tokenizer, examples, overlong="truncate")  # pyright: ignore


def test_vocabulary(tokenizer):
    check_vocabulary(tokenizer, Qwen3Config(vocab_size=14))
    check_vocabulary(tokenizer, Qwen3Config(vocab_size=64))
    with pytest.raises(DataError, match="vocabulary mismatch.*up to 13.* 13 embeddings"):
        check_vocabulary(tokenizer, Qwen3Config(vocab_size=13))


def test_prompt_indices_visit_every_example_once_an_epoch():
    steps = [prompt_indices(step, 4, 10, seed=5) for step in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert prompt_indices(3, 4, 10, seed=5) == steps[3]
    assert [prompt_indices(step, 4, 10, seed=6) for step in range(5)] != steps


def test_prompt_indices_may_take_several_epochs_at_once():
    taken = prompt_indices(1, 25, 10, seed=0)
    small_steps = [i for step in range(5, 10) for i in prompt_indices(step, 5, 10, seed=0)]
    assert taken == small_steps
    assert prompt_indices(0, 3, 1, seed=0) == [0, 0, 0]


@pytest.mark.parametrize("wrong", [(-1, 4, 10), (0, 0, 10), (0, 4, 0)])
def test_prompt_indices_refuse_nonsense(wrong):
    with pytest.raises(DataError, match="prompt_indices"):
        prompt_indices(*wrong, seed=0)


def test_permutation_never_changes():
    # A resumed run relies on these numbers across machines and versions.
    assert permutation(8, 0) == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(8, 1, 2) == [7, 1, 3, 0, 4, 2, 6, 5]


def test_reading_data_needs_no_torch():
    code = "import sys, oisd.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
