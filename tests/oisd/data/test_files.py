"""Files as people have them: encodings, digits, dates, pointers, halves of files."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oisd.data import DataError, load_examples

ANSWERS = ["1999-12-31", "042", "2e7", "3_500", "12:30", "2024-02-29T10:00:00", "true", "null"]
NUMBERS = [
    ("9007199254740993", "9007199254740993"),
    ("-36893488147419103233", "-36893488147419103233"),
    ("6.50", "6.50"),
    ("14.0", "14"),
    ("3e4", "30000"),
    ("12345678901234567890.5", "12345678901234567890.5"),
]


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.json", "set/train.jsonl"])
def test_text_stays_as_written(place, tmp_path):
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(ANSWERS)]
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(json.dumps(rows) if place == "rows.json" else lines)
    source = file if file.parent == tmp_path else file.parent
    assert [example.answer for example in load_examples(str(source))] == ANSWERS


@pytest.mark.parametrize(("written", "read"), NUMBERS)
def test_numbers_keep_their_digits(written, read, tmp_path):
    row = f'{{"question": "q", "answer": {written}}}'
    for name, text in (("rows.jsonl", row), ("rows.json", f"[{row}]")):
        (tmp_path / name).write_text(text)
        assert load_examples(str(tmp_path / name))[0].answer == read


def test_decimals_and_dates_of_parquet(tmp_path):
    import datetime

    file = tmp_path / "rows.parquet"
    numbers = pa.array([Decimal("98765432109876543210987"), Decimal(2)], pa.decimal128(38, 0))
    pq.write_table(pa.table({"question": ["a", "b"], "answer": numbers}), file)
    answers = [example.answer for example in load_examples(str(file))]
    assert answers == ["98765432109876543210987", "2"]
    days = pa.array([datetime.date(2001, 2, 3)], pa.date32())
    pq.write_table(pa.table({"question": ["a"], "answer": days}), tmp_path / "days.parquet")
    assert load_examples(str(tmp_path / "days.parquet"))[0].answer == "2001-02-03"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_that_are_read(encoding, tmp_path):
    file = tmp_path / "rows.jsonl"
    line = json.dumps({"question": "Wie groß?", "answer": "π"}, ensure_ascii=False)
    file.write_bytes(f"{line}\r\n{line}\r\n".encode(encoding))
    assert [e.prompt for e in load_examples(str(file))] == ["Wie groß?"] * 2


def parquet(rows=1):
    sink = pa.BufferOutputStream()
    table = pa.table({"question": ["q"] * rows, "answer": ["1"] * rows})
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"question":"Größe","answer":"1"}'.encode("latin-1"), "Latin-1.*iconv"),
        ("r.jsonl", POINTER, "Git LFS pointer.*git lfs pull"),
        ("r.parquet", POINTER, "Git LFS pointer"),
        ("set/train.json", POINTER, "Git LFS pointer"),
        ("r.parquet", parquet()[:-30], "cut off"),
        ("r.parquet", b"question,answer\n", "not a Parquet file"),
        ("r.json", b"", "the file is empty"),
        ("r.jsonl", b" \n\n", "has no rows"),
        ("r.json", b"[]", "has no rows"),
        ("r.json", b'{"version": 2, "data": [{"question": "q", "answer": "1"}]}', "one object"),
        ("r.json", b'{"data": {"question": "q"}}', "one object with the keys data"),
        ("r.json", b'[{"question": "q", "answer": "1"}', "is not JSON"),
        ("r.jsonl", b'["q", "1"]\n', "item 0 must be an object"),
        ("r.jsonl", b'{"question": "q", "answer": "1"}\n3\n', "line 2 must be an object"),
        ("r.jsonl", b'{"question": "q", "answer": "1"}\n{"quest', "line 2"),
        ("r.jsonl", rb'{"question": "\ud83d", "answer": "1"}', "half of a surrogate pair"),
        ("r.jsonl", b'{"question": "q", "answer": NaN}', "is empty"),
        (
            "r.jsonl",
            b'{"question": "q", "answer": "1"}\n\n{"question": "q", "answer": "1", "answer": "2"}',
            "line 3: the key 'answer' stands twice in one object; keep one",
        ),
        (
            "r.json",
            b'[{"question": "q", "answer": "1"},\n {"question": "q",\n  "answer": "1",\n'
            b'  "of": {"answer": 7},\n  "answer":\n"2"}]',
            "line 5: the key 'answer' stands twice",
        ),
        (
            "r.json",
            '{"question": ["q"],\n "más": [1],\n "answer": ["1"], "más": [2]}'.encode(),
            "line 3: the key 'más' stands twice",
        ),
    ],
)
def test_files_that_are_refused_in_one_line(name, content, message, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = file if file.parent == tmp_path else file.parent
    with pytest.raises(DataError, match=message) as caught:
        load_examples(str(source))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_columns_as_one_object_and_objects_one_a_line(tmp_path):
    (tmp_path / "c.json").write_text('{"question": ["a", "b"], "answer": [1, 2]}')
    (tmp_path / "l.json").write_text(
        '{"question": "a", "answer": 1}\n{"question": "b", "answer": 2}'
    )
    for name in ("c.json", "l.json"):
        assert [e.answer for e in load_examples(str(tmp_path / name))] == ["1", "2"]
    assert len(load_examples(str(tmp_path / "l.json"), split="x[:1]+y[1:]")) == 2


@pytest.mark.parametrize("option", ["subset", "prompt_field", "answer_field", "answer_pattern"])
def test_options_that_the_built_in_task_cannot_heed(option):
    with pytest.raises(DataError, match=f"arithmetic: .* has no {option}, got '.x.'"):
        load_examples("arithmetic", **{option: "(x)"})
