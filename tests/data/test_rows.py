"""What predict reads and writes again, against the file itself, pandas and pyarrow.

python -m pytest tests/data/test_rows.py
"""

import csv
import io
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tables import rows, write

from nanofinetune.data import rows as rows_module
from nanofinetune.data.files import dialect, read
from nanofinetune.data.rows import new_file, read_rows, write_rows
from nanofinetune.ground.errors import UsageError

hypothesis = pytest.importorskip("hypothesis", reason="draws the random tables")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ENDINGS = ["csv", "tsv", "jsonl", "parquet"]


def copied(file: Path, kind: str, **extra: Any) -> bytes:
    """The file's rows with more columns, as they are written."""
    table, target = read_rows(file), io.BytesIO()
    write_rows(target, kind, ([row | extra for row in block] for block in table.blocks), table)
    return target.getvalue()


def test_a_table_is_written_as_it_was_read(tmp_path):
    """05, NA, 1.0, an empty cell and the separator stay; pandas makes 5, an empty cell and 1.0 of them."""
    import pandas

    content = 'id;text;n;stars\n05;"good; cheap";1.0;NA\n06;"say ""hi""";;\n'
    (tmp_path / "a.csv").write_text(content)
    assert copied(tmp_path / "a.csv", "csv").decode() == content
    assert pandas.read_csv(tmp_path / "a.csv", sep=";").to_csv(sep=";", index=False) != content
    assert copied(tmp_path / "a.csv", "csv", label="x").decode().splitlines()[1] == '05;"good; cheap";1.0;NA;x'


def test_a_tsv_with_lone_quotation_marks_is_written_as_it_was_read(tmp_path):
    content = 'text\tn\n"the cat\t1\nsay "hi"\t2\n'
    (tmp_path / "a.tsv").write_text(content)
    assert copied(tmp_path / "a.tsv", "tsv").decode() == content


def test_types_of_parquet_stay(tmp_path):
    import pandas
    from pyarrow import parquet

    frame = pandas.DataFrame(
        {"text": ["a", "b"], "n": [1, 2], "when": pandas.to_datetime(["2020-01-01", "2021-05-06"])}
    )
    frame["kind"] = pandas.Categorical(["x", "y"])
    frame["small"] = frame.n.astype("int8")
    frame.to_parquet(tmp_path / "a.parquet")
    back = parquet.read_table(io.BytesIO(copied(tmp_path / "a.parquet", "parquet", label="x", probability=0.5)))
    before = parquet.read_table(tmp_path / "a.parquet")
    assert back.select(before.column_names).equals(before) and back.column_names[-2:] == ["label", "probability"]


@pytest.mark.parametrize("target", ENDINGS)
@pytest.mark.parametrize("source", [*ENDINGS, "json"])
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_every_format_becomes_every_other(source, target, block, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", block)
    content = rows(15)
    write(tmp_path, "jsonl" if source == "json" else source, "a", content)
    if source == "json":
        (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": content}, indent=2))
    (tmp_path / f"b.{target}").write_bytes(copied(tmp_path / f"a.{source}", target))
    if source in ("csv", "tsv") and target in ("jsonl", "parquet"):  # a cell is text
        content = [{name: str(value) for name, value in row.items()} for row in content]
    assert read([tmp_path / f"b.{target}"])[0].to_pylist() == content


def test_a_table_without_rows_keeps_its_header(tmp_path):
    (tmp_path / "a.csv").write_text("text|n\n")
    assert copied(tmp_path / "a.csv", "csv") == b"text|n\n"
    with pytest.raises(UsageError, match="there are no rows, and so no types for a parquet file"):
        copied(tmp_path / "a.csv", "parquet")


def test_a_column_that_only_later_rows_have_is_refused_or_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": 1}\n')
    assert copied(tmp_path / "a.jsonl", "jsonl").decode() == '{"text": "a"}\n{"text": "b", "n": 1}\n'
    with pytest.raises(
        UsageError, match=r"a row has the column n, which the first has not; name an --output of .jsonl"
    ):
        copied(tmp_path / "a.jsonl", "csv")


def test_nothing_that_exists_is_written_over(tmp_path):
    """Neither a file that is there before, nor one that comes meanwhile; and a failure leaves nothing."""
    kept = tmp_path / "kept.csv"
    kept.write_text("mine")
    refused = pytest.raises(UsageError, match=r"--output \S+kept.csv: it exists already, and is not written over")
    with refused, new_file(kept) as target:
        target.write(b"x")
    with pytest.raises(UsageError, match="it exists already"), new_file(tmp_path / "b.csv") as target:
        target.write(b"x")
        (tmp_path / "b.csv").write_text("theirs")
    with pytest.raises(KeyError), new_file(tmp_path / "c.csv"):
        raise KeyError
    refused = pytest.raises(UsageError, match=r"--output \S+: it cannot be written \(No such file or directory\)")
    with refused, new_file(tmp_path / "nowhere" / "d.csv"):
        pass
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept.csv": "mine", "b.csv": "theirs"}


def test_a_new_file_is_complete_when_it_has_its_name(tmp_path):
    with new_file(tmp_path / "a.csv") as target:
        target.write(b"x")
        assert not (tmp_path / "a.csv").exists()
    assert (tmp_path / "a.csv").read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.csv").stat().st_mode) == 0o666 & ~umask


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=10).map("w".__add__)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
    source=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    target=st.sampled_from(ENDINGS),
    delimiter=st.sampled_from(",;|\t"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_random_table_is_written_and_read_back_the_same(cells, source, target, delimiter, encoding):
    """Whatever the cells hold: marks, line ends, quotation marks, emoji."""
    content = [{"text": one, "other": two} for one, two in cells]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"a.{source}")
        if source in ("csv", "tsv"):
            with file.open("w", encoding=encoding, newline="") as opened:
                mark = "\t" if source == "tsv" else delimiter
                writer = csv.DictWriter(opened, ["text", "other"], delimiter=mark, quoting=csv.QUOTE_ALL)
                writer.writeheader()
                writer.writerows(content)
        else:
            write(Path(folder), source, "a", content)
        table = read_rows(file, dialect(encoding=encoding if source in ("csv", "tsv") else None))
        with new_file(Path(folder, f"b.{target}")) as opened:
            write_rows(opened, target, table.blocks, table)
        back = [row for block in read_rows(Path(folder, f"b.{target}")).blocks for row in block]
        assert back == content
