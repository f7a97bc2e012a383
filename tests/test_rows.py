"""Rows of CSV and parquet files: what is damaged is counted by its line, and never read as something else."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_gpt.datasets.reading import rows
from mm_gpt.datasets.reading.parquet import read_parquet
from mm_gpt.datasets.reading.rows import plain_values, read_csv, read_rows
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.sources import read_samples
from mm_gpt.document import Document
from mm_gpt.errors import MMGPTError

HEAD = b"image,caption\n"


def read(path: Path, data: bytes) -> tuple[list[tuple[int, Any]], dict[str, list[str]]]:
    """(line, caption) of each row, and the names of what was counted."""
    path.write_bytes(data)
    errors = ErrorCounter()
    found = [(number, row["caption"]) for number, row in read_rows(str(path), errors)]
    assert errors.total == sum(map(len, errors.examples.values()))
    return found, errors.examples


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'1.png,"Hello there', "bad CSV: a stray quote"),  # it seems to end in front of `a cat`
        (b'1.png,"12" screen on a desk', "bad CSV: a stray quote"),
        (b"1.png,a brown dog, running fast, in deep snow", "more cells than columns"),
        (b"1.png", "fewer cells than columns"),
        ("1.png,A dog\u2019s caf\u00e9".encode("cp1252"), "text is not UTF-8"),
        (b"1.png,a \0 dog", "text with zero bytes"),
        (b"1.png," + b"x" * 131_073, "bad CSV: a cell that is too long"),
        (b'1.png,"two\n' + b"x" * 131_073, "bad CSV: a cell that is too long"),
        (b"1.png,a\rdog", "bad CSV: new-line character seen in unquoted field"),
    ],
)
def test_a_damaged_line_of_csv_costs_that_line_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    """Stops: a caption that swallows the rows behind it, or ends at its first comma, or has other letters."""
    found, named = read(tmp_path / "a.csv", HEAD + b"0.png,a dog\n" + line + b'\n2.png,"a cat, wet"\n3.png,a 3" nail\n')
    assert found[0] == (2, "a dog")
    assert [caption for _, caption in found[1:]] == ["a cat, wet", 'a 3" nail']
    (known,) = [key for key in named if key.startswith(reason)]
    assert named[known][0] == "a.csv:3"
    assert sum(map(len, named.values())) == 1 + line.count(b"\n")  # the second line of a broken row is none


def test_cells_of_several_lines(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf image ,caption\r\n1.png,"one\r\n\r\n""two"""\r\n\r\n2.png,\r\n"3.png",last'
    found, named = read(tmp_path / "a.csv", data)
    assert found == [(2, 'one\n\n"two"'), (6, None), (7, "last")]
    assert named == {}


def test_a_quote_that_is_never_closed_does_not_take_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_CELL_LINES", 10)
    found, named = read(tmp_path / "a.csv", HEAD + b'0.png,"open\n' + b"1.png,a dog\n" * 100)
    assert found == [(number, "a dog") for number in range(3, 103)]
    assert named == {"bad CSV: a quote that is not closed": ["a.csv:2"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"file,text\n", "no column caption or image in the first line"),
        (b"", "no column caption or image in the first line"),
        (b'image,"caption\n', r":1: bad CSV"),
        (b"image,caption\xe9\n", r":1: text is not UTF-8"),
        (b"image,caption,caption\n", "two columns 'caption'"),
        ("image,caption\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
    ],
)
def test_a_damaged_first_line_of_csv_is_an_error(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(MMGPTError, match=message) as caught:
        list(read_csv(str(path), ErrorCounter(), columns=("image", "caption")))
    assert str(path) in str(caught.value)


def test_tabs(tmp_path: Path) -> None:
    found, named = read(tmp_path / "a.tsv", b"image\tcaption\n1.png\ta dog, wet\n2.png\ta\tb\n")
    assert found == [(2, "a dog, wet")]
    assert named == {"more cells than columns": ["a.tsv:3"]}


def test_json_lines_in_another_encoding_are_counted(tmp_path: Path) -> None:
    lines = [
        b'{"caption": "a"}',
        '{"caption": "caf\u00e9"}'.encode("cp1252"),
        b'{"caption": "\0"}',
        b'{"caption": "d"}',
    ]
    found, named = read(tmp_path / "a.jsonl", b"\n".join(lines))
    assert found == [(1, "a"), (4, "d")]
    assert named == {"text is not UTF-8": ["a.jsonl:2"], "text with zero bytes": ["a.jsonl:3"]}
    with pytest.raises(MMGPTError, match=r"a\.jsonl: UTF-16"):
        read(tmp_path / "a.jsonl", '{"caption": "a"}'.encode("utf-16"))


def test_numbers_that_no_float_holds_are_metadata(tmp_path: Path) -> None:
    assert plain_values({"a": 10**400, "b": float("inf"), "c": 1.5, "d": [1], "e": "x"}, without="e") == {
        "a": 10**400,
        "c": 1.5,
    }


# ---- Parquet ----


FAR = 253_402_300_800_000_000
"""The year 10000, in microseconds."""


@pytest.mark.parametrize(
    "column",
    [
        pa.array([FAR, 0], type=pa.timestamp("us")),
        pa.array([0, 0], type=pa.timestamp("us", tz="PDT")),
        pa.array([10**7, 0], type=pa.date32()),
        pa.array([2**62, 0], type=pa.duration("s")),
        pa.array([1, 2], type=pa.time64("us")),
        pa.array([1, 2], type=pa.decimal128(5)),
        pa.array([[FAR], []], type=pa.list_(pa.timestamp("us"))),
        pa.array([{"at": FAR}, None], type=pa.struct([("at", pa.timestamp("us"))])),
        pa.array([[("k", FAR)], []], type=pa.map_(pa.string(), pa.timestamp("us"))),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_columns_that_nobody_asked_for_stop_nothing(tmp_path: Path, column: Any) -> None:
    """Stops: a build that ends in an OverflowError for a date that no reader looks at."""
    pq.write_table(pa.table({"text": ["One.", "Two."], "crawled": column}), tmp_path / "a.parquet")
    errors = ErrorCounter()
    assert len(list(read_samples(str(tmp_path / "a.parquet"), errors))) == 2
    assert errors.total == 0


def test_nested_columns_keep_what_is_plain(tmp_path: Path) -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("at", pa.timestamp("us"))])
    turns = [{"role": role, "content": "a", "at": FAR} for role in ("user", "assistant")]
    columns = {
        "messages": pa.array([turns], type=pa.list_(turn)),
        "dots.in.name": pa.array(["x"]).dictionary_encode(),
        "boxes": pa.array([[[1.0, 2.0]]], type=pa.large_list(pa.list_(pa.float32(), 2))),
        "images": pa.array([[{"bytes": b"x", "path": None}]]),
        "none": pa.nulls(1),
        "at": pa.array([FAR], type=pa.timestamp("us")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    errors = ErrorCounter()
    assert list(read_parquet(str(tmp_path / "a.parquet"), errors)) == [
        (
            1,
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
                "dots.in.name": "x",
                "boxes": [[1.0, 2.0]],
                "images": [{"bytes": b"x", "path": None}],
                "none": None,
            },
        )
    ]
    assert errors.total == 0


def test_a_value_that_python_cannot_hold_is_a_counted_row(tmp_path: Path) -> None:
    """Stops: the rest of a file left out for one text that is no UTF-8."""
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    errors = ErrorCounter()
    found = [s.segments[0] for s in read_samples(str(tmp_path / "a.parquet"), errors) if isinstance(s, Document)]
    assert [segment.text for segment in found] == ["a", "c"]  # type: ignore[union-attr]
    assert errors.counts == {"unreadable row": 1}
    assert errors.examples["unreadable row"][0].startswith("a.parquet:2 ")


def test_values_that_arrow_keeps_as_json(tmp_path: Path) -> None:
    """What changes its kind from row to row is JSON inside; read as a string it would lose its images."""
    infos = [json.dumps({"raw_url": "https://e/a.jpg", "matched_text_index": 0, "matched_sim": 0.3})]
    kind = pa.list_(pa.json_())
    storage = pa.array([infos], type=pa.list_(pa.string()))
    table = pa.table({"text_list": [["One."]], "image_info": storage.cast(kind), "url": ["https://e/"]})
    pq.write_table(table, tmp_path / "a.parquet")
    errors = ErrorCounter()
    (document,) = read_samples(str(tmp_path / "a.parquet"), errors)
    assert isinstance(document, Document)
    assert [image.source for image in document.images] == ["https://e/a.jpg"]
    assert errors.total == 0


def test_dates_within_reason_are_left_out_as_well(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["One."], "at": [datetime.date(2020, 1, 1)]}), tmp_path / "a.parquet")
    assert list(read_parquet(str(tmp_path / "a.parquet"), ErrorCounter())) == [(1, {"text": "One."})]
