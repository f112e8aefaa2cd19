"""`oisd check`: each row against a model or data of which the right answer is known."""

import json
import string

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from oisd.arithmetic import arithmetic_model, arithmetic_tokenizer
from oisd.check.findings import Finding, attempted, of_guard
from oisd.check.settings import options_named
from oisd.cli import main
from oisd.models.guards import Guard
from oisd.objective import Objective
from oisd.rollout.model_copy import ModelCopy

SPECIAL = ["<pad>", "<eos>", "<bos>", "<end>", "<unk>"]
CHARACTERS = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
GOOD = PLAIN + OPEN


def tokenizer(template=None, *, adds_bos=False):
    """One token a character, with a BOS and an end of turn of its own."""
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, *SPECIAL])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", additional_special_tokens=["<end>"],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


def save(folder, template=None, *, adds_bos=False, ends=("<eos>", "<end>"), **generation):
    own = tokenizer(template, adds_bos=adds_bos)
    eos = [own.convert_tokens_to_ids(end) for end in ends]
    model = arithmetic_model(
        1, vocab_size=len(own), hidden_size=32, intermediate_size=32, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=eos, pad_token_id=own.pad_token_id,
    )  # fmt: skip
    model.generation_config.update(eos_token_id=eos, **generation)
    if generation:
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    arithmetic_model(1).save_pretrained(folder / "m")
    arithmetic_tokenizer().save_pretrained(folder / "m")
    return folder / "m"


SHORT = ["--prompts", "2", "--completions", "2", "--completion-tokens", "4", "--layer", "3",
         "--max-completion-tokens", "4"]  # fmt: skip


@pytest.fixture
def check(tmp_path, capsys):
    """Status, rows by name and what was printed."""

    def run(folder, *options):
        out = tmp_path / "out"
        status = main(["check", str(folder), *SHORT, *options, "--output-dir", str(out)])
        printed = capsys.readouterr().out
        report = json.loads((out / "check.json").read_text())
        rows = {row["name"]: row for row in report["findings"]}
        assert len(rows) == len(report["findings"])
        assert (status == 1) == any(row["status"] == "fail" for row in rows.values())
        return status, rows, printed

    return run


def rows_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- the whole table ---------------------------------------------------------------------------


def test_a_sound_model(sums, check):
    status, rows, printed = check(sums, "--data", "arithmetic", "--reward", "exact")
    assert status == 0
    model = ["layout", "kinds of layers", "weights", "finite", "lens", "attention", "causality",
             "right padding", "left padding", "cached decoding", "dropout", "checkpointing",
             "batch dependence"]  # fmt: skip
    assert [*rows][: len(model)] == model
    assert all(rows[name]["status"] == "pass" for name in model)
    assert "Qwen3ForCausalLM, 6 layers" in rows["layout"]["found"]
    assert "612,480 parameters" in rows["weights"]["found"]
    assert 0 < rows["causality"]["value"] < rows["causality"]["bound"] == 2**-10
    assert "4 heads of 24, 2 of keys" in rows["attention"]["found"]
    assert rows["sampler generate"]["status"] == "pass"
    assert rows["sampler generate"]["value"] < 1e-4
    assert rows["memory"]["value"] > 0.1 and rows["memory"]["status"] == "pass"
    assert "7,298 problems" in rows["fields"]["found"]
    assert "pass" in printed and "check.json" in printed and "causality" in printed


def test_without_data(sums, check):
    status, rows, _ = check(sums)
    assert status == 0 and rows["problems"]["status"] == "not checked"
    assert rows["reward"]["status"] == "not checked"
    assert rows["sampler generate"]["status"] == "pass"  # on tokens of our own


def test_a_recipe_gives_the_settings(sums, check):
    status, rows, _ = check(sums, "--recipe", "arithmetic")
    assert status == 0 and "oisd.student_layers = [3]" in rows["layer"]["found"]
    assert rows["overlap"]["status"] == "pass"  # the recipe has an evaluation


def test_adapters_on_frozen_layers_in_bfloat16(sums, check, tmp_path):
    recipe = tmp_path / "lora.toml"
    recipe.write_text(
        'base = "arithmetic"\n[model]\nlora_rank = 2\ndtype = "bfloat16"\n'
        "gradient_checkpointing = true\n"
    )
    status, rows, _ = check(sums, "--recipe", str(recipe))
    assert status == 0
    unchecked = [name for name, row in rows.items() if row["status"] == "not checked"]
    assert unchecked in ([], ["reward"]) and rows["checkpointing"]["status"] == "pass"
    # The bound of bfloat16. What is found depends on the processor: 0 with AVX2, whose matmuls in
    # bfloat16 give a row the same bits whatever stands below it, and above 1e-4 with AVX-512.
    assert rows["causality"]["bound"] == 0.125 and 0 <= rows["causality"]["value"] < 0.125


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--layer", "6"], "set oisd.student_layers within 1..5"),
        (["--dtype", "bfloat16", "--layer", "9"], "within 1..5"),
    ],
)
def test_a_layer_that_the_model_lacks_fails(given, words, sums, check):
    status, rows, printed = check(sums, *given)
    assert status == 1 and rows["layer"]["status"] == "fail"
    assert words in rows["layer"]["remedy"] and words in printed


def test_bad_models_and_options_end_in_one_line(sums, tmp_path, capsys):
    folder = ["--output-dir", str(tmp_path / "o")]
    for given, words in (
        (["nowhere/at/all"], "there is no such folder"),
        ([str(sums), "--prompts", "0"], "--prompts must be at least 1"),
        ([str(sums), "--recipe", "none-such"], "none-such"),
        ([str(sums), "--reward", "none-such"], "--reward"),
        ([str(sums), "--device", "tpu"], "--device"),
        ([], "MODEL is missing"),
    ):
        assert main(["check", *given, *(folder if given else [])]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


# ---- the tokenizer -----------------------------------------------------------------------------


def test_a_template_without_surprises(tmp_path, check):
    _, rows, _ = check(save(tmp_path / "m", GOOD))
    assert rows["chat template"]["status"] == "pass", rows["chat template"]
    assert rows["BOS and EOS"]["status"] == "pass" and rows["ends of sequence"]["status"] == "pass"
    assert rows["shipped sampling"]["status"] == "pass"
    assert rows["vocabulary"]["value"] == rows["vocabulary"]["bound"] == len(tokenizer())


def test_an_end_of_turn_that_ends_nothing(tmp_path, check):
    _, rows, _ = check(save(tmp_path / "m", GOOD, ends=("<eos>",)))
    row = rows["ends of sequence"]
    number = tokenizer().convert_tokens_to_ids("<end>")
    assert row["status"] == "warn" and f"'<end>' ({number})" in row["found"]
    assert f"add {number} to eos_token_id" in row["remedy"]


@pytest.mark.parametrize(
    ("template", "options", "name", "words"),
    [
        ("<bos><bos>" + GOOD, {}, "BOS and EOS", "has 2 BOS tokens"),
        (GOOD + "<eos>", {}, "BOS and EOS", "ends with the EOS"),
        (GOOD, {"adds_bos": True}, "BOS and EOS", "the chat template writes none"),
        (GOOD + "<think>\n", {}, "chat template", "opens a thinking block even with"),
        ("{{ raise_exception('no') if messages[0]['role'] == 'system' else '' }}" + GOOD, {},
         "chat template", "refuses a system prompt"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}" + OPEN, {},
         "chat template", "leaves a system prompt out"),
    ],
    ids=["two-bos", "eos", "no-bos", "thinking", "no-system", "drops-system"],
)  # fmt: skip
def test_surprises_of_a_template(template, options, name, words, tmp_path, check):
    _, rows, _ = check(save(tmp_path / "m", template, **options))
    assert rows[name]["status"] == "warn" and words in rows[name]["found"], rows[name]
    assert rows[name]["remedy"]


def test_sampling_settings_that_are_set_aside(tmp_path, check):
    _, rows, _ = check(save(tmp_path / "m", GOOD, temperature=0.6, top_k=20, top_p=0.95))
    row = rows["shipped sampling"]
    assert row["status"] == "warn"
    assert "temperature = 0.6, top_k = 20, top_p = 0.95" in row["found"]


def test_a_question_that_the_tokenizer_cannot_encode(sums, check):
    _, rows, _ = check(sums)
    assert rows["prompts"]["status"] == "not checked" and "pass --data" in rows["prompts"]["found"]


# ---- data --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return save(tmp_path_factory.mktemp("letters") / "m", GOOD)


def problem(question, answer):
    return {"question": question, "answer": answer}


def test_good_data(letters, tmp_path, check):
    good = [problem(f"what is {i}+1?", str(i + 1)) for i in range(8)]
    other = [problem("what is 9+9?", "18")]
    given = ["--data", rows_of(tmp_path / "a.jsonl", good)]
    _, rows, _ = check(letters, *given, "--eval-data", rows_of(tmp_path / "b.jsonl", other))
    names = ["fields", "duplicates", "overlap", "boxes", "gold answers", "prompt lengths",
             "context"]  # fmt: skip
    assert [rows[name]["status"] for name in names] == ["pass"] * len(names)
    assert rows["prompt lengths"]["value"] == len("user: what is 0+1?assistant: ") + 1


def test_data_with_every_fault(letters, tmp_path, check):
    bad = [
        problem("What  is 1+1?", "2"),
        problem("what is 1+1?", "3"),  # the same question, another answer
        problem("a" * 300, "4"),
        problem("a brace", "\\frac{1"),
        problem("words", "5"),
    ]
    given = ["--data", rows_of(tmp_path / "a.jsonl", bad), "--max-prompt-tokens", "100"]
    status, rows, _ = check(letters, *given, "--eval-data", rows_of(tmp_path / "b.jsonl", bad[4:]))
    assert status == 1
    assert "1 problems occur with different answers" in rows["duplicates"]["found"]
    assert rows["overlap"]["value"] == 1 and "words" in rows["overlap"]["found"]
    assert rows["boxes"]["status"] == "fail" and "frac{1" in rows["boxes"]["found"]
    assert rows["prompt lengths"]["status"] == "fail" and rows["prompt lengths"]["value"] > 300
    assert "raise data.max_prompt_tokens" in rows["prompt lengths"]["remedy"]


def test_duplicates_and_a_long_context(letters, tmp_path, check):
    rows = [problem("what is 1+1?", "2")] * 3
    given = ["--data", rows_of(tmp_path / "a.jsonl", rows), "--max-completion-tokens", "600"]
    _, rows, _ = check(letters, *given)
    assert "2 of 3 problems occur before, one 3 times" in rows["duplicates"]["found"]
    assert rows["context"]["status"] == "warn" and rows["context"]["bound"] == 512


def test_columns_that_are_not_there(letters, tmp_path, check):
    given = ["--data", rows_of(tmp_path / "a.jsonl", [{"q": "x", "answer": "1"}])]
    status, rows, _ = check(letters, *given)
    assert status == 1 and rows["fields"]["status"] == "fail"
    assert "no field 'question'" in rows["fields"]["found"]
    assert rows["reward"]["status"] == "not checked"


# ---- rollouts ----------------------------------------------------------------------------------


def test_a_sampler_that_is_not_the_update(sums, check, monkeypatch):
    own = Objective.logprobs
    monkeypatch.setattr(Objective, "logprobs", lambda self, batch: own(self, batch) - 0.2)
    status, rows, _ = check(sums, "--data", "arithmetic")
    row = rows["sampler generate"]
    assert status == 1 and row["status"] == "fail" and abs(row["value"] - 0.2) < 1e-3
    assert "rollout.engine" in row["remedy"]


def test_both_engines(sums, check):
    _, rows, _ = check(sums, "--engine", "auto")
    for engine in ("generate", "continuous"):
        assert rows[f"sampler {engine}"]["status"] == "pass"


@pytest.mark.parametrize(
    ("rewards", "groups"), [([1.0, 1.0, 1.0, 1.0], "warn"), ([1.0, 0.0, 1.0, 1.0], "pass")]
)
def test_groups_without_variance(rewards, groups, sums, check, monkeypatch):
    def graded(self, completions, answers):
        if len(completions) == 4:  # two prompts, two completions of each
            self.timeouts += 1
            return rewards
        return [1.0] * len(completions)

    monkeypatch.setattr("oisd.rewards.ExactReward.__call__", graded)
    data = ["--data", "arithmetic", "--reward", "exact"]
    _, rows, _ = check(sums, *data, "--completion-tokens", "60", "--max-completion-tokens", "40")
    assert rows["reward"]["value"] == sum(rewards) / 4
    assert rows["groups"]["status"] == groups
    assert rows["groups"]["value"] == (2 if groups == "warn" else 1)
    assert rows["time-outs"]["value"] == 1 and "reward.timeout" in rows["time-outs"]["remedy"]


def test_completions_that_are_cut_off_say_nothing_of_rewards(sums, check):
    data = ["--data", "arithmetic", "--reward", "exact", "--completion-tokens", "1"]
    _, rows, _ = check(sums, *data)
    assert rows["reward"]["status"] == "not checked"
    assert "raise --completion-tokens" in rows["reward"]["found"]


# ---- rows --------------------------------------------------------------------------------------


def test_what_cannot_be_run_is_a_row():
    def look():
        yield Finding("model", "first", "pass", "seen")
        raise KeyError("x")

    first, second = attempted("model", "second", look)
    assert first.status == "pass"
    assert second.status == "not checked" and second.found == "KeyError: 'x'"


def test_rows_of_guards():
    assert of_guard("model", Guard("g", 0.1, 1, "f")).status == "pass"
    assert of_guard("model", Guard("g", 2, 1, "f")).status == "warn"
    assert of_guard("model", Guard("g", 5, 1, "f")).status == "fail"
    assert of_guard("model", Guard("g", 5, 1, "f"), failing="warn").status == "warn"
    assert of_guard("model", Guard("g", float("nan"), 1, "f")).status == "not checked"
    row = of_guard("model", Guard("g", float("inf"), 1, "f")).as_row()
    assert json.loads(json.dumps(row, allow_nan=False))["value"] == "inf"


def test_a_fault_of_the_model_is_a_failing_row(tmp_path, check):
    from tests.oisd.models.test_guards import other_model

    model = other_model("rwkv")  # which padding on the left changes
    model.generation_config.eos_token_id = 13
    model.save_pretrained(tmp_path / "m")
    arithmetic_tokenizer().save_pretrained(tmp_path / "m")
    status, rows, _ = check(tmp_path / "m", "--attn-implementation", "eager")
    assert status == 1 and rows["left padding"]["status"] == "fail"
    assert rows["left padding"]["value"] > 0.1
    assert "rollout.batch_size = 1" in rows["left padding"]["remedy"]
    assert rows["causality"]["status"] == rows["right padding"]["status"] == "pass"
    assert rows["attention"]["status"] == "fail"
    assert rows["attention"]["remedy"] == "set oisd.attention_weight = 0: the think term needs none"
    assert "attention_weight" not in rows["attention"]["found"]


def test_engines_share_one_copy_in_half_precision(sums, check, monkeypatch):
    filled = []
    fill = ModelCopy.filled
    monkeypatch.setattr(ModelCopy, "filled", lambda self: filled.append(1) or fill(self))
    status, rows, _ = check(sums, "--dtype", "bfloat16", "--engine", "auto")
    assert status == 0 and len(filled) == 1
    engines = [rows[f"sampler {engine}"] for engine in ("generate", "continuous")]
    assert all(row["status"] == "pass" and row["value"] > 1e-6 for row in engines)


def test_settings_that_rows_name_are_said_as_options(sums, check, tmp_path):
    path = rows_of(tmp_path / "d.jsonl", [{"problem": "1" * 30, "answer": "3"}] * 2)
    fields = ["--prompt-field", "problem", "--answer-field", "answer"]
    _, rows, printed = check(sums, "--data", path, *fields, "--max-prompt-tokens", "8")
    assert "data.max_prompt_tokens" in rows["prompt lengths"]["remedy"]
    assert "here data.max_prompt_tokens is --max-prompt-tokens" in " ".join(printed.split())
    assert options_named(["set oisd.student_layers within 1..3", "set model.dropout = 0"]) == {
        "oisd.student_layers": "--layer"
    }
