"""Named data sets: their real schemas, Hub ids, splits, local copies as the Hub lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from oisd.data import DataError, load_examples, permutation
from oisd.data.catalogue import DATA_SETS, PAPER_BENCHMARKS, resolve
from tests import DATA

SAMPLES = DATA
ANSWERS = {
    ("amc23", "test"): ["160", "9", "3", "10"],
    ("math500", "test"): [
        r"\left( 5, \frac{\pi}{2} \right)", r"\frac{14}{3}", r"\text{Ulrike}", "(-3,3)"
    ],
    ("aime24", "test"): ["204", "049"],
    ("aime25", "test"): ["70", "49"],
    ("dapo", "train"): ["80", "153", "1000", "-7"],
    ("math", "train"): [
        r"4\sqrt{3}",
        r"\begin{pmatrix} \frac{1}{2} & 0 \\ 0 & \frac{1}{4} \end{pmatrix}",
        "6",
        "5",
    ],
}  # fmt: skip
HUB = {
    "amc23": (("math-ai/amc23", None), "test"),
    "math500": (("HuggingFaceH4/MATH-500", None), "test"),
    "aime24": (("HuggingFaceH4/aime_2024", None), "train"),
    "aime25": (("math-ai/aime25", None), "test"),
    "gsm8k": (("openai/gsm8k", "main"), "test"),
    "dapo": (("open-r1/DAPO-Math-17k-Processed", "all"), "train"),
    "deepmath": (("zwhe99/DeepMath-103K", None), "train"),
    "deepmath-5k": (("zwhe99/DeepMath-103K", None), "train"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
    )


def sample(name: str) -> Path:
    return SAMPLES / f"{name}_sample.jsonl"


@pytest.mark.parametrize("name, split", ANSWERS)
def test_real_schemas(name, split):
    examples = load_examples(f"{name}:{sample(name)}", split=split)
    assert [e.answer for e in examples] == ANSWERS[name, split]
    field = DATA_SETS[name].prompt_field
    rows = [json.loads(line) for line in sample(name).read_text(encoding="utf-8").splitlines()]
    assert [e.prompt for e in examples] == [row[field] for row in rows]


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_has_both_splits_and_its_answers_follow_the_marker(split):
    examples = load_examples(f"gsm8k:{sample('gsm8k')}", split=split)
    assert examples[0].answer == "25" and examples[2].answer == "1,500"


@pytest.mark.parametrize("name", HUB)
def test_hub_ids_subsets_and_splits(name, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["split"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ours = "test" if "test" in DATA_SETS[name].splits else "train"
    remedy = rf'(?s)comes from the Hub.*hf download .*{HUB[name][0][0]} .*"{name}:some/folder"'
    with pytest.raises(DataError, match=remedy):
        load_examples(name, split=ours)
    assert asked == [HUB[name]]


def test_sizes_and_samples_of_the_papers_protocol():
    sizes = {name: DATA_SETS[name].rows["test"] for name in PAPER_BENCHMARKS}
    assert sizes == {"amc23": 40, "math500": 500, "aime24": 30, "aime25": 30}
    assert [DATA_SETS[name].samples for name in PAPER_BENCHMARKS] == [16, 16, 32, 32]


def test_a_slice_of_a_split_goes_to_the_hubs_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, split: asked.append(split) or datasets.Dataset.from_list([]),
    )
    with pytest.raises(DataError, match="no rows"):
        load_examples("aime24", split="test[:10]")
    assert asked == ["train[:10]"]


@pytest.mark.parametrize("name, split", [("amc23", "train"), ("dapo", "test"), ("gsm8k", "dev")])
def test_a_split_that_a_set_has_not(name, split):
    with pytest.raises(DataError, match=f"{name}: no split '{split}'; it has .*Hub id"):
        load_examples(name, split=split)


def test_a_copy_that_is_not_there():
    with pytest.raises(DataError, match="amc23:/nowhere/amc: no such file or folder"):
        load_examples("amc23:/nowhere/amc", split="test")


def test_what_the_caller_sets_goes_before_the_name(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"problem": "1+1?", "gold": "so 2!"}\n')
    (example,) = load_examples(
        f"amc23:{file}", split="test", prompt_field="problem", answer_field="gold",
        answer_pattern=r"so (\d)",
    )  # fmt: skip
    assert (example.prompt, example.answer) == ("1+1?", "2")


def test_a_file_of_that_name_does_not_hide_the_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").mkdir()
    assert resolve("gsm8k").data_set is DATA_SETS["gsm8k"]
    assert resolve("./gsm8k").data_set is None
    assert resolve("arithmetic:digits=2").data_set is None


# ---- folders as `hf download` leaves them ----------------------------------------------------

GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
  - split: test
    path: socratic/test-*
---
# A card
"""


def gsm8k_folder(folder: Path, card: bool) -> Path:
    rows = datasets.load_dataset("json", data_files=str(sample("gsm8k")), split="train")
    for subset in ("main", "socratic"):
        (folder / subset).mkdir(parents=True)
        taken = rows.select(range(3) if subset == "main" else range(3, 5))
        for split in ("train", "test"):
            part = taken if split == "test" else taken.select([0])
            part.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
    if card:
        (folder / "README.md").write_text(GSM8K_CARD)
    return folder


@pytest.mark.parametrize("card", [True, False], ids=["card", "no-card"])
def test_a_folder_with_subsets(card, tmp_path):
    folder = gsm8k_folder(tmp_path / "gsm8k", card)
    assert [e.answer for e in load_examples(f"gsm8k:{folder}", split="test")] == [
        "25", "202", "1,500"
    ]  # fmt: skip
    assert len(load_examples(f"gsm8k:{folder}", split="train")) == 1


@pytest.mark.parametrize("name", ["math500", "aime25", "amc23"])
@pytest.mark.parametrize("file", ["test.jsonl", "problems.jsonl"])
def test_a_folder_with_one_file(name, file, tmp_path):
    (tmp_path / file).write_bytes(sample(name).read_bytes())
    found = load_examples(f"{name}:{tmp_path}", split="test")
    assert [e.answer for e in found] == ANSWERS[name, "test"]


def test_the_one_split_of_aime_24(tmp_path):
    rows = datasets.load_dataset("json", data_files=str(sample("aime24")), split="train")
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert len(load_examples(f"aime24:{tmp_path}", split="test")) == 2


def test_a_saved_set(tmp_path):
    rows = datasets.load_dataset("json", data_files=str(sample("math500")), split="train")
    rows.save_to_disk(tmp_path / "rows")
    assert len(load_examples(f"math500:{tmp_path / 'rows'}", split="test")) == 4


# ---- deepmath-5k -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    file = tmp_path_factory.mktemp("deepmath") / "rows.jsonl"
    lines = (json.dumps({"question": f"What is {i}?", "final_answer": str(i)}) for i in range(6000))
    file.write_text("\n".join(lines))
    return file


def test_deepmath_5k_is_one_subset_whatever_the_seed(many):
    first, other = (load_examples(f"deepmath-5k:{many}", seed=seed) for seed in (0, 1))
    assert first == other and len(first) == 5000 == len({e.id for e in first})
    drawn = sorted(permutation(6000, 2605)[:5000])
    assert [int(e.answer) for e in first] == drawn != list(range(5000))
    assert len(load_examples(f"deepmath:{many}")) == 6000


def test_a_limit_draws_from_the_subset(many):
    whole = {e.id for e in load_examples(f"deepmath-5k:{many}")}
    some, others = (load_examples(f"deepmath-5k:{many}", limit=50, seed=s) for s in (0, 1))
    assert {e.id for e in some} <= whole and {e.id for e in others} <= whole
    assert len(some) == 50 and some != others


def test_a_published_list_of_rows_is_taken_whole():
    rows = load_examples(f"deepmath-5k:{sample('deepmath')}")
    assert [e.answer for e in rows][:3] == [r"-\frac{125}{6}", "Yes", "6"]


def test_a_solution_without_a_box_is_named(tmp_path):
    file = tmp_path / "math.jsonl"
    file.write_text('{"problem": "1+1?", "solution": "It is 2."}\n')
    with pytest.raises(DataError, match="no box with an answer in field 'solution'.*It is 2"):
        load_examples(f"math:{file}")
