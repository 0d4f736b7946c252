"""Data of odd sizes: a thousand columns, a text of 30 MB, lists in lists: work in proportion, or one line.

Run: python -m pytest tests/data/test_sizes.py

Work is counted in Python's calls, not in seconds; reading a cell through datasets 5.2 costs calls for every column.
"""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import calls
from pyarrow import parquet

from nanofinetune.data.files import LONGEST
from nanofinetune.data.load import load_data
from nanofinetune.ground.errors import UsageError

BIG = 30_000_000  # characters


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    file = folder / f"{len(rows[0])}.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [rows[0].keys(), *(map(str, row.values()) for row in rows)]
        file.write_text("".join(mark.join(line) + "\n" for line in lines))
    return str(file)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_twice_the_columns_are_twice_the_work(kind, tmp_path):
    def work(columns: int) -> int:
        rows = [{f"c{j}": f"word {i} {j}" for j in range(columns)} | {"label": i % 2} for i in range(20)]
        name = written(tmp_path, kind, rows)
        load_data(name, ["c0"], "label")

        def look() -> None:  # for the texts, in every column
            with pytest.raises(UsageError, match=f"--data has {columns} text columns beside the label"):
                load_data(name)

        return calls(look)

    work(4)  # imports
    assert 1 < work(200) / work(100) < 2.2


def test_a_column_of_a_dataset_costs_what_it_did_in_proportion_to_all():
    """What the search for texts went through, once for every column: the library's own way to one of them."""
    import datasets

    def work(columns: int) -> int:
        rows = datasets.Dataset.from_dict({f"c{j}": ["a"] for j in range(columns)})
        rows.select_columns(["c0"]).with_format("arrow")[:]
        return calls(lambda: rows.select_columns(["c0"]).with_format("arrow")[:])

    assert work(400) > 2.5 * work(100)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_text_of_30_mb_is_one_line_and_little_memory(kind, tmp_path):
    rows = [{"text": f"the cat {i}", "label": i % 2} for i in range(20)]
    rows[3]["text"] = "a" * BIG
    name = written(tmp_path, kind, rows)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=f"more than ({LONGEST:,}|{16 * LONGEST:,})") as failure:
            load_data(name)
        assert tracemalloc.get_traced_memory()[1] < 5 * BIG
    finally:
        tracemalloc.stop()
    assert len(str(failure.value)) < 600


DEEP = 50_000
NESTED = {
    "lists": '{"text": ' + "[" * DEEP + "]" * DEEP + ', "label": 1}\n',
    "objects": '{"a": ' * DEEP + "1" + "}" * DEEP + "\n",
    "no end": "[" * DEEP,
    "in an array": '[{"text": ' + "[" * DEEP + "]" * DEEP + "}]",
    "digits": '{"text": "a", "label": ' + "1" * DEEP + "}\n",
    "a key": '{"' + "k" * BIG + '": 1}\n',
}


@pytest.mark.parametrize("kind", NESTED)
def test_lists_in_lists_are_one_line(kind, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(NESTED[kind])
    with pytest.raises(UsageError, match=r"^--data") as failure:
        load_data(str(file))
    assert len(str(failure.value)) < 600 and str(failure.value).isprintable()


@pytest.mark.skipif(os.name != "posix", reason="a sparse file")
def test_a_file_of_nothing_but_zeros_is_read_no_further_than_its_first_cell(tmp_path):
    (tmp_path / "x.csv").touch()
    os.truncate(tmp_path / "x.csv", 2**30)
    tracemalloc.start()
    try:
        with pytest.raises(
            UsageError, match=r"x.csv: it could not be read .line 1 has more than 16,000,000 characters"
        ):
            load_data(str(tmp_path / "x.csv"))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
