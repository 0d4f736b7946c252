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

import pyarrow as pa
import pytest
from pyarrow import parquet
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
    write_rows(target, kind, ([row | extra for row in block] for block in table.blocks), table, extra)
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
    back = parquet.read_table(io.BytesIO(copied(tmp_path / "a.csv", "parquet", label="x")))
    assert (back.num_rows, back.column_names) == (0, ["text", "n", "label"])


@pytest.mark.parametrize("block", [1, 4096])
def test_a_column_that_only_later_rows_have_is_in_every_format(block, tmp_path, monkeypatch):
    """In datasets' own words they are rows of another schema; in pyarrow's `from_pylist` the column is gone."""
    monkeypatch.setattr(rows_module, "BLOCK", block)
    content = '{"text": "a"}\n{"text": "b", "n": 1}\n'
    (tmp_path / "a.jsonl").write_text(content)
    assert pa.Table.from_pylist([json.loads(line) for line in content.splitlines()]).column_names == ["text"]
    assert copied(tmp_path / "a.jsonl", "jsonl").decode() == content
    assert copied(tmp_path / "a.jsonl", "csv", label="x").decode() == "text,n,label\na,,x\nb,1,x\n"
    back = parquet.read_table(io.BytesIO(copied(tmp_path / "a.jsonl", "parquet", label="x")))
    assert back.to_pylist() == [{"text": "a", "n": None, "label": "x"}, {"text": "b", "n": 1, "label": "x"}]


@pytest.mark.parametrize(
    ("first", "later", "type_"),
    [
        (1, 1.5, "double"),
        (None, "x", "string"),
        ([], ["x"], "list<item: string>"),
        ([1], [0.5], "list<item: double>"),
        ({"a": 1}, {"b": "x"}, "struct<a: int64, b: string>"),
        ({"a": None}, {"a": [1]}, "struct<a: list<item: int64>>"),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 2])
def test_a_type_is_that_of_all_rows(first, later, type_, block, tmp_path, monkeypatch):
    """Of later blocks too, where pyarrow drops a struct's new fields without a word."""
    monkeypatch.setattr(rows_module, "BLOCK", block)
    (tmp_path / "a.jsonl").write_text(json.dumps({"n": first}) + "\n" + json.dumps({"n": later}) + "\n")
    back = parquet.read_table(io.BytesIO(copied(tmp_path / "a.jsonl", "parquet")))
    assert str(back.schema.field("n").type).replace("element", "item") == type_
    assert [without_none(row) for row in back.to_pylist()] == [without_none({"n": first}), without_none({"n": later})]


MIXED = [(1, "x"), ("x", 1), (True, 1), (1.5, True), ([1, 2.5], [True]), ([1], ["x"]), ({"a": 1}, {"a": "x"})]
MIXED += [({"a": 1}, [1]), (2**63, 1), (2**53 + 1, 0.5), ({}, {}), ("\ud83d", "x")]


@pytest.mark.parametrize("pair", MIXED, ids=ascii)
@pytest.mark.parametrize("block", [1, 2])
def test_what_parquet_cannot_hold_is_one_line_before_any_answer(pair, block, tmp_path, monkeypatch):
    """pyarrow raises four kinds of errors for these, and makes 1.0 of a true beside a float."""
    monkeypatch.setattr(rows_module, "BLOCK", block)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"n": value}) + "\n" for value in pair))
    table = read_rows(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"^a parquet file cannot hold these rows \(.+\); name an --output of .jsonl"):
        write_rows(io.BytesIO(), "parquet", table.blocks, table)
    if pair != (2**53 + 1, 0.5):
        assert next(table.blocks)  # none of them was asked for
    assert copied(tmp_path / "a.jsonl", "jsonl").count(b"\n") == 2


def test_a_sheet_of_numbers_and_words_is_refused_for_parquet_and_written_as_csv(tmp_path):
    import datetime

    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["text", "n", "when"], ["a", 1, datetime.datetime(2020, 1, 2)], ["b", "x", None]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(UsageError, match=r"hold these rows \(n has values of the types int and str\); name an"):
        copied(tmp_path / "a.xlsx", "parquet")
    assert copied(tmp_path / "a.xlsx", "csv").decode() == "text,n,when\na,1,2020-01-02 00:00:00\nb,x,\n"


def test_half_a_surrogate_pair_is_written_as_it_was_or_refused(tmp_path):
    """Tweets that JavaScript has cut: json can hold them, and no encoding."""
    content = '{"text": "a", "by": "b"}\n{"text": "a", "by": "nice \\ud83d"}\n{"text": "\U0001f600"}\n'
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert copied(tmp_path / "a.jsonl", "jsonl").decode() == content
    for kind in ("csv", "tsv"):
        with pytest.raises(UsageError, match=r"^row 2 holds half of a surrogate pair, which is no character; correct"):
            copied(tmp_path / "a.jsonl", kind)
    with pytest.raises(UsageError, match="a parquet file cannot hold these rows"):
        copied(tmp_path / "a.jsonl", "parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "a", "\\udc00": 1}\n')
    for kind in ("csv", "parquet"):
        with pytest.raises(UsageError, match=r"name an --output of .jsonl"):
            copied(tmp_path / "b.jsonl", kind)


def test_lists_and_objects_are_json_in_a_csv_file_and_classes_are_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["a, b", "c"], "of": {"x": [1, null]}}\n')
    (row,) = csv.DictReader(io.StringIO(copied(tmp_path / "a.jsonl", "csv", label=["good", "new"]).decode()))
    assert {name: json.loads(row[name]) for name in ("tokens", "of")} == {
        "tokens": ["a, b", "c"],
        "of": {"x": [1, None]},
    }
    assert row["label"] == "good, new"


def test_a_class_with_a_line_end_keeps_a_tsv_without_quotes_in_its_rows(tmp_path):
    (tmp_path / "a.tsv").write_text('text\n"the cat\n')
    assert copied(tmp_path / "a.tsv", "tsv", label="a\nb\tc").decode() == 'text\tlabel\n"the cat\ta b c\n'


def test_a_file_that_gets_columns_while_it_is_read_is_refused(tmp_path):
    """The new one may be called as an answer is, which would be written over it."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    table = read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "gold"}\n')
    with pytest.raises(UsageError, match=r"it was changed while it was read: one has the column label; start again"):
        write_rows(io.BytesIO(), "jsonl", table.blocks, table)


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"FILE \S+: two of its columns are named text; rename one"):
        read_rows(tmp_path / "a.parquet")


def test_more_columns_than_a_table_can_have_are_lines_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"c{n}": 1}}\n' for n in range(5_001)))
    for kind in ("csv", "parquet"):
        with pytest.raises(
            UsageError, match=r"the rows have 5,001 columns, more than 5,000; name an --output of .jsonl"
        ):
            copied(tmp_path / "a.jsonl", kind)
    assert copied(tmp_path / "a.jsonl", "jsonl") == (tmp_path / "a.jsonl").read_bytes()


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


def without_none(value: Any) -> Any:
    """A cell without what is missing in it: in a table a key that a row lacks is null."""
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


def exact(value: Any) -> Any:
    """True is not 1, though Python finds them equal; 1 and 1.0 are one number."""
    if isinstance(value, dict):
        return {name: exact(each) for name, each in value.items()}
    return [exact(each) for each in value] if isinstance(value, list) else (isinstance(value, bool), value)


ANY = st.text(st.characters(exclude_categories=[]), max_size=4)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3))
KEYS = st.sampled_from(["text", "label", "n"]) | ANY
ALIKE: list[Any] = [st.integers(-9, 9), st.integers(-9, 9) | st.floats(-9, 9), ANY]
ALIKE += [
    st.lists(st.integers(-9, 9) | st.none()),
    st.dictionaries(st.sampled_from("ab"), st.lists(st.booleans(), max_size=2), min_size=1),
    st.booleans(),
]
ANYHOW = st.lists(st.dictionaries(KEYS, NESTED, max_size=3), min_size=1, max_size=5)
TYPED = st.sampled_from(ALIKE).flatmap(
    lambda cells: st.lists(st.dictionaries(st.sampled_from(["text", "n"]), st.none() | cells), min_size=1, max_size=5)
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(objects=ANYHOW | TYPED, target=st.sampled_from(ENDINGS), block=st.sampled_from([1, 2, 9]))
def test_random_objects_are_written_and_read_back_or_refused(objects, target, block):
    """Any keys, any types, halves of characters: each cell comes back, or one line says why not."""
    objects = json.loads(json.dumps(objects))  # two halves side by side are one character
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "BLOCK", block)
        file = Path(folder, "a.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in [{"first": 1}, *objects]))
        try:
            written = copied(file, target, answer="yes")
        except UsageError as error:
            assert (
                target != "jsonl" and str(error).endswith("name an --output of .jsonl") and str(error).count("\n") == 0
            )
            return
    if target == "jsonl":
        back = [json.loads(line) for line in written.decode().split("\n")[:-1]]
        assert exact(back) == exact([row | {"answer": "yes"} for row in [{"first": 1}, *objects]])
    elif target == "parquet":
        back = parquet.read_table(io.BytesIO(written)).to_pylist()
        wanted = [row | {"answer": "yes"} for row in [{"first": 1}, *objects]]
        assert exact(without_none(back)) == exact(without_none(wanted))
    else:
        lines = csv.DictReader(io.StringIO(written.decode(), newline=""), delimiter="\t" if target == "tsv" else ",")
        for row, wanted in zip(lines, [{"first": 1}, *objects], strict=True):
            for name, cell in row.items():
                value = wanted.get(name, "yes" if name == "answer" else None)
                nested = isinstance(value, (list, dict))
                assert (
                    exact(json.loads(cell)) == exact(value) if nested else cell == ("" if value is None else str(value))
                )
