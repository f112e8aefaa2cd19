"""Other projects beside ours: who is absent, what a wrong lens shows, how verdicts are counted."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.grading import table
from benchmarks.peers import command, cost, graders, lenses, page, step
from benchmarks.peers.graders import EXAMPLES, Grader
from benchmarks.peers.lenses import Absent, Statistics

torch.set_num_threads(1)


def not_there(*_):
    raise Absent("not installed: pip install it")


def one_layer_early(model, ids):
    logprob = lenses.ours(model, ids)
    return torch.cat([logprob[:1], logprob[:-1]])


def raises(model, ids):
    raise KeyError("layers.3")


# ---------------------------------------------------------------- absent


def test_a_module_that_is_not_installed_is_absent_with_the_remedy():
    with pytest.raises(Absent, match="^not installed: pip install a-lens$"):
        lenses.load("a_lens_of_nobody", "a-lens")


def test_a_module_whose_own_imports_fail_is_absent_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import ray_of_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match="half cannot be imported: ModuleNotFoundError.*ray_of_nobody"):
        lenses.load("half_installed", "half")


def test_a_package_that_raises_anything_is_absent(tmp_path, monkeypatch):
    (tmp_path / "other_antlr").mkdir()
    (tmp_path / "other_antlr" / "__init__.py").write_text("raise Exception('version 3')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match="^other cannot be imported: Exception: version 3$"):
        lenses.load("other_antlr.scores", "other")


def test_absent_peers_are_rows_and_no_errors(tmp_path, monkeypatch, capsys):
    peers = {"a lens": not_there}
    monkeypatch.setattr(command.lenses, "agreement", lambda own=lenses.agreement: own(peers))
    grader = {"a grader": Grader(not_there, "a box")}
    monkeypatch.setattr(command.graders, "verdicts", lambda own=graders.verdicts: own(grader))
    monkeypatch.setattr(command, "describe", lambda *_: {"versions": {}})
    out = tmp_path / "rows.jsonl"
    assert main(["peers", "lens", "graders", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a lens: ABSENT: not installed: pip install it",
        "a grader: ABSENT: not installed: pip install it",
    ]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["lens", "grader"]


def test_a_measured_row_outlives_a_later_absence(tmp_path):
    rows = [{"part": "grader", "grader": "a", "wrong": 3}, {"part": "grader", "grader": "a"}]
    rows[1]["absent"] = "not installed"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page.read(file) == rows[:1]


# ---------------------------------------------------------------- lenses


def test_our_lens_agrees_with_itself_and_layers_differ():
    row = lenses.compare("gemma2", lenses.ours)
    assert row["agrees"] and row["error"] == 0 and row["numbers_error"] < 1e-6
    assert row["layers_apart"] > 0.1 and row["same_top"] == 1 and row["layers"] == 8


@pytest.mark.parametrize("planted", [one_layer_early, raises], ids=["layer", "raises"])
def test_a_wrong_lens_does_not_agree(planted, monkeypatch):
    monkeypatch.setattr(lenses, "ARCHITECTURES", {"qwen3": ("qwen3", {})})
    (row,) = lenses.agreement({"planted": planted})
    assert row["agrees"] is False
    if planted is raises:
        assert row["failed"] == "KeyError: 'layers.3'"
    else:
        assert row["error"] > 0.1 and row["numbers_error"] > 0.1


def test_a_lens_without_the_factor_of_the_logits_does_not_agree():
    def without(model, ids):
        return (lenses.ours(model, ids) / 0.5).log_softmax(-1)

    assert lenses.compare("cohere2", without)["error"] > 0.1


def test_as_the_model_says_has_factors_and_softcap():
    logits, config = torch.tensor([-3.0, 0.5, 8.0]), lenses.model_of("gemma2").config
    wanted = 5 * torch.tanh(logits / 5)
    torch.testing.assert_close(lenses.as_the_model_says(config, logits), wanted)


def planted_cost(seconds, mib, off=0.0):
    said = Statistics(*torch.rand(3, 2, 5).double().add(1).unbind(0))
    exact = Statistics(*(x.clone() for x in said))
    turns = {name: iter(times) for name, times in seconds.items()}

    def run(name):
        if name == "exact":
            return {"statistics": exact}
        if name not in turns:
            return {"absent": "not installed"}
        found = said._replace(entropy=said.entropy * (1 + (off if name == "wrong" else 0)))
        return {"seconds": next(turns[name]), "mib": mib, "statistics": found}

    return run


def test_the_cost_is_the_median_of_the_rounds_and_a_wrong_lens_has_none():
    seconds = {"ours": [1.0, 5.0, 2.0], "wrong": [1.0, 1.0, 1.0]}
    run, said = planted_cost(seconds, 7.0, off=1e-3), []
    rows = list(cost.measure(3, ["ours", "wrong", "gone"], run, said.append))
    assert rows[0]["seconds"] == 2.0 and rows[0]["all_seconds"] == [1.0, 5.0, 2.0]
    assert rows[0]["mib"] == 7.0 and rows[0]["error"] == 0
    assert rows[1]["wrong"] == "1.0e-03 off" and "seconds" not in rows[1]
    assert rows[2]["absent"] == "not installed" and len(said) == 6
    found = page.cost_table([rows[0] | {"lens": "TransformerLens"}, *rows])
    assert "| ours | 2.00 s (1.00 - 5.00) | 7 MiB | 1.00 / 1.000 |  |" in found
    assert "| wrong | wrong |" in found and "| gone | absent |" in found


def test_other_likeliest_tokens_are_an_infinite_error():
    said = Statistics(*torch.rand(3, 2, 5).add(1).unbind(0))
    assert cost.error(said, said) == 0
    assert cost.error(said._replace(top=said.top + 1), said) == float("inf")
    assert cost.error(said._replace(top=said.top[:1]), said) == float("inf")


# ---------------------------------------------------------------- graders

ANSWERS = [("5", "5", True), ("5.0", "5", True), ("6", "5", False), ("a", "b", False),
           ("skip", "5", True), ("raise", "b", True), ("c", "c", True)]  # fmt: skip


def planted_grader(box, gold):
    if box == "raise":
        raise ValueError(box)
    return None if box == "skip" else box in ("5", "a", "c")


def test_verdicts_are_counted():
    found = graders.count(planted_grader, ANSWERS)
    assert found == {
        "right_answers": 5, "wrong_answers": 2, "right_refused": 3, "wrong_accepted": 1,
        "skipped": 1, "raised": 1, "integer_right_answers": 3, "integer_wrong_answers": 1,
        "integer_right_refused": 2, "integer_wrong_accepted": 0,
        "mistakes": [ANSWERS[1], ANSWERS[3], ANSWERS[4], ANSWERS[5]],
    }  # fmt: skip


def test_rows_and_tables_of_graders():
    example = (r"5 km", "5 m", False)
    ours = {"kind": Grader(lambda: lambda box, gold: True, "`a`")}
    (row,) = graders.verdicts(ours, [*ANSWERS, example])
    assert row["wrong_accepted"] == 3 and row["right_refused"] == 0
    assert row["examples"] == [["5 km", "5 m", False, True]] and "mistakes" not in row
    assert page.line(row) == "kind: accepts 3 of 3 wrong answers, refuses 0 of 5 right ones"
    assert "| kind | `a` | 3 | 0 | 1 | 0 |" in page.grader_table([row])
    assert "| `5 km` | `5 m` | wrong | yes |" in page.example_table([row])
    absent = {"grader": "gone", "absent": "not installed"}
    assert "| gone | absent |" in page.grader_table([row, absent])


def test_the_examples_are_in_the_table():
    assert set(EXAMPLES) <= {(box, gold) for box, gold, _ in table()}


def test_ours_and_math_verify_get_their_own_forms():
    math, plain = (graders.GRADERS[name].make() for name in ("oisd `math`", "math-verify"))
    for box, gold, verdicts in (
        (r"\frac12", "0.5", (True, True)),
        (r"3.14159265", r"\pi", (False, True)),
        ("6", "5", (False, False)),
    ):
        assert (math(box, gold), plain(box, gold)) == verdicts


# ---------------------------------------------------------------- a step


def trainer(name, processor, reward=0.8):
    row = {"trainer": name, "correct": abs(reward - 0.8) < 0.05, "reward": reward}
    row |= {"start_accuracy": 0.8, "steps": 40, "dropped": 0.25}
    if row["correct"]:
        row |= {"processor_s": processor, "processor_p20_s": 0.1, "processor_p80_s": 0.9}
        row |= {"median_s": 2 * processor, "p20_s": 0.2, "p80_s": 1.8}
    return row


def test_a_step_beside_trls():
    asked = []

    def planted(steps, rounds):
        asked.append((steps, rounds))
        return [trainer(page.TRL, 0.6), trainer("OISD", 0.4), trainer("off", 0.1, reward=0.7)]

    rows = list(step.measure(2, planted))
    assert asked == [(step.STEPS, 2)]
    assert page.line(rows[1]) == "OISD: 0.400 s of the processor, 0.800 s"
    assert page.line(rows[2]) == "off: WRONG: reward 0.700, wanted 0.800"
    found = page.step_table(rows)
    wanted = "| OISD | 0.400 s (0.100 - 0.900) | 0.800 s (0.200 - 1.800) | 1.50 | 0.800 | 0.25 |"
    assert wanted in found and "| off | wrong |" in found
    machine = {"date": "2026-01-01", "device": "d", "versions": {}}
    text = page.text([row | machine for row in rows])
    assert "## A training step" in text and "2 rounds, 20 steps each" in text


def test_a_trl_that_is_not_there_is_a_row(monkeypatch):
    monkeypatch.setattr(step, "load", not_there)
    (row,) = step.measure(1)
    assert row == {"part": "step", "trainer": page.TRL, "absent": "not installed: pip install it"}
    assert page.line(row) == "TRL GRPOTrainer: ABSENT: not installed: pip install it"


# ---------------------------------------------------------------- the command


def test_wrong_settings_are_refused_in_a_line(tmp_path, capsys):
    assert main(["peers", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "peers: --rounds must be at least 1, got 0\n"
    assert main(["peers", "--write-docs", "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err
