"""Problems and rewards in verl's format; does not need verl."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from datasets import Dataset

from oisd.config import from_tables
from oisd.integrations.verl_data import compute_score, write_data


def test_rows_are_those_that_the_trainer_takes(tmp_path):
    lines = [{"question": f"{n}+1?", "answer": n + 1} for n in range(20)]
    source = tmp_path / "problems.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables = {
        "data": {"source": str(source), "limit": 5, "system_prompt": "Add."},
        "eval": {"source": str(source), "limit": 3},
    }
    paths = write_data(from_tables(tables), tmp_path / "out")
    assert [path.name for path in paths] == ["train.parquet", "test.parquet"]
    rows = [Dataset.from_parquet(str(path)).to_list() for path in paths]
    assert [len(part) for part in rows] == [5, 3]
    for row in rows[0]:
        number = int(row["reward_model"]["ground_truth"])
        assert row["prompt"] == [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"{number - 1}+1?"},
        ]
        assert row["reward_model"]["style"] == "rule" and row["data_source"] == str(source)
    assert len({row["extra_info"]["id"] for row in rows[0]}) == 5


def test_no_evaluation_no_file(tmp_path):
    tables = {"data": {"source": "arithmetic", "limit": 4}}
    assert [p.name for p in write_data(from_tables(tables), tmp_path)] == ["train.parquet"]


def test_scores_from_several_threads():
    answers = [r"\boxed{1/2}", r"so \boxed{0.5}", r"\boxed{2}", "0.5"]
    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda text: compute_score("any", text, "\\frac{1}{2}", None), answers)
        )
    assert found == [1.0, 1.0, 0.0, 0.0]


def test_scores_are_those_of_the_recipes_reward(tmp_path):
    tables = {
        "data": {"source": "running_sum:terms=3", "limit": 2},
        "reward": {"function": "final"},
    }
    (path,) = write_data(from_tables(tables), tmp_path)
    row = Dataset.from_parquet(str(path)).to_list()[0]
    gold = row["reward_model"]["ground_truth"]
    texts = [f"1={gold}", gold[:-1], f"\\boxed{{{gold}}}"]
    found = [compute_score("any", text, gold, row["extra_info"]) for text in texts]
    assert found == [1.0, 0.0, 0.0]
