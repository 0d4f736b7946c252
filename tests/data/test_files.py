"""Reading local files, against `datasets` 5.2 and pandas on the same files; where they lose or mix rows, it is shown.

python -m pytest tests/data/test_files.py
"""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tables import rows, write

from nanofinetune.data import files as files_module
from nanofinetune.data.files import dialect, read
from nanofinetune.data.load import load_data
from nanofinetune.ground.errors import UsageError

hypothesis = pytest.importorskip("hypothesis", reason="draws the random tables")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def by_datasets(kind: str, file: Path) -> Any:
    """The library's rows of the file."""
    import datasets

    return datasets.load_dataset(kind, data_files={"train": [str(file)]}, split="train").to_list()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows_as_datasets(kind, tmp_path):
    train, validation = rows(20), rows(8, seed=1)
    write(tmp_path, kind, "train", train)
    write(tmp_path, kind, "validation", validation)
    data = load_data(str(tmp_path))
    assert data.text_columns == ("sentence1", "sentence2") and data.label_column == "label"
    assert data.label_names == ["0", "1"] and data.metrics == ("accuracy", "f1")
    for split, content in (("train", train), ("validation", validation)):
        assert data.splits[split].to_list() == [
            {k: row[k] for k in ("sentence1", "sentence2", "label")} for row in content
        ]


def test_glue_tsv_keeps_rows_that_pandas_quoting_loses(tmp_path):
    """GLUE's own TSV layout with lone quotation marks: pandas' default quoting swallows rows, we keep every one."""
    import pandas

    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    lines = [f"{i % 2}\t{i}\t{i}\t{chr(34) * (i in (2, 5))}the cat {i}\tthe dog\n" for i in range(9)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(header + "".join(lines))
    assert len(pandas.read_csv(tmp_path / "dev.tsv", sep="\t")) < len(lines)
    data = load_data(str(tmp_path))
    assert [len(split) for split in data.splits.values()] == [len(lines)] * 2
    assert data.text_columns == ("#1 String", "#2 String") and data.label_column == "Quality"
    assert data.splits["train"][2]["#1 String"] == '"the cat 2'
    assert list(data.splits) == ["train", "validation"]


def test_the_words_none_and_na_stay_text(tmp_path):
    content = [{"sentence": word, "label": i % 2} for i, word in enumerate(["None", "NA", "null", "nan", ""])]
    write(tmp_path, "csv", "train", content)
    write(tmp_path, "csv", "validation", content)
    assert load_data(str(tmp_path)).splits["train"]["sentence"][:] == ["None", "NA", "null", "nan", ""]


# --- a name is a name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "data[1].csv", "star*.csv", "what?.csv", "a::b.csv", "{a,b}.csv", "runs [v2]/data.csv", "%41.csv", "zip:x.csv",
        " .csv", "-n.csv", "~.csv", "hf:/x/y.csv",
    ],
)  # fmt: skip
def test_a_name_is_a_name(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    for decoy in ("data1.csv", "starfish.csv", "whats.csv", "a.csv", "A.csv"):
        write(tmp_path, "csv", decoy.removesuffix(".csv"), rows(5, seed=9, pair=False))
    write(file.parent, "csv", file.stem, rows(20, pair=False))
    table, kinds = read([file])
    assert table.column("sentence1").to_pylist() == [row["sentence1"] for row in rows(20, pair=False)]
    assert kinds == {"sentence1": "text", "label": "numbers", "idx": "numbers"}
    assert sum(len(split) for split in load_data(str(file)).splits.values()) == 20


def test_datasets_takes_a_name_as_a_pattern(tmp_path):
    """Why `datasets` does not read our files: data[1].csv is data1.csv to it."""
    write(tmp_path, "csv", "data[1]", rows(20))
    write(tmp_path, "csv", "data1", rows(5, seed=9))
    assert len(by_datasets("csv", tmp_path / "data[1].csv")) == 5


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_an_ending_in_capitals_is_the_same_ending(kind, tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, kind, split, rows(12))
        (tmp_path / f"{split}.{kind}").rename(tmp_path / f"{split.upper()}.{kind.upper()}")
    assert [len(split) for split in load_data(str(tmp_path)).splits.values()] == [12, 12]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_new_content_under_an_old_time_is_read(kind, tmp_path):
    """cp -p, rsync -t and tar keep times; `datasets` knows a file by its path and time, and gives the old rows."""
    sizes, theirs = [], []
    for n in (12, 30):
        write(tmp_path, kind, "reviews", rows(n))
        file = tmp_path / f"reviews.{kind}"
        os.utime(file, (1e9, 1e9))
        sizes.append(sum(len(split) for split in load_data(str(file)).splits.values()))
        theirs.append(len(by_datasets("csv" if kind == "csv" else "json", file)))
    assert sizes == [12, 30] and theirs == [12, 12]


# --- csv: refused rather than repaired

REVIEWS = [f"the cat {i},{i % 2}" for i in range(12)]
REFUSED = {
    "text,label\na, b,0\nc,1\n": r"line 2 has 3 fields and the header 2\); a text with a comma in it needs quotes",
    "text,label\na,0,\nb,1,\n": r"line 2 has 3 fields and the header 2\); remove the comma at its end, or name",
    'text,label\n"a\nb",0\n\nc,1,2\n': r"line 5 has 3 fields",
    "text,label\na,0\nb\n": r"line 3 has 1 fields and the header 2\); fill it in",
    "text,label\na,0\ntext,label\nb,1\n": r"line 3 is the header again; remove it",
    "text,text\na,b\n": r"two of its columns are named text; rename one",
    "\n\n": r"the file has no header; write a line of column names",
    ",,\na,b,c\n": r"the file has no header; write a line of column names",
    "the cat,0\nthe dog,1\n": r"is the first line a header\? It holds the number 0; write a line of column names",
    "0,the cat\n1,the dog\n": r"is the first line a header\? It holds the number 0",
    "the cat,bad\n" + "a dog,bad\nit,good\n" * 4: r"is the first line a header\? bad is a column's name and a value",
    'text,label\n"a,0\nb,1\n': r"line 3: .*unbalanced quotes\?\); correct",
    'text,label\n"a"b,0\n': r"line 2: .*unbalanced quotes\?\); correct",
    "text,label\n" + "a" * 1_000_001 + ",0\n": r"line 2 holds a cell of more than 1,000,000 characters",
    ",".join(f"c{i}" for i in range(5001)) + "\n": r"it has more than 5,000 columns, the most that is read",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: content[:24])
def test_what_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "reviews.csv").write_text(content)
    with pytest.raises(UsageError, match=REFUSED[content]) as refusal:
        read([tmp_path / "reviews.csv"])
    assert str(refusal.value).startswith(f"--data {tmp_path}")


def test_pandas_makes_an_index_of_the_first_fields(tmp_path):
    """Why a surplus field is refused: with one in every row, pandas shifts all columns, and says nothing."""
    import pandas

    file = tmp_path / "reviews.csv"
    file.write_text("text,label\ngood, really,1\nbad, really,0\n")
    assert pandas.read_csv(file)["text"].tolist() == [" really", " really"]


def test_names_of_columns_as_pandas_writes_them_are_names(tmp_path):
    (tmp_path / "a.csv").write_text("0,1\n" + "\n".join(REVIEWS) + "\n")
    (tmp_path / "b.csv").write_text(",text,label\n" + "\n".join(f"{i},{row}" for i, row in enumerate(REVIEWS)) + "\n")
    assert list(read([tmp_path / "a.csv"])[1]) == ["0", "1"]
    assert list(read([tmp_path / "b.csv"])[1]) == ["Unnamed: 0", "text", "label"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_is_quoted_only_if_it_must_be(quoting, tmp_path):
    """Marks that a program has doubled are undone; those of GLUE's files, alone or around a whole text, stay."""
    texts = ['say "hi"', "a\ttab", '"']
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([["text", "n"], *([text, 1] for text in texts)])
    assert read([tmp_path / "a.tsv"])[0].column("text").to_pylist() == texts
    for texts in (['"the cat', "sat"], ['"the cat"', "sat"], ['"the cat', 'sat"'], ['say "hi"', '"']):
        (tmp_path / "b.tsv").write_text("text\tn\n" + "".join(f"{text}\t1\n" for text in texts))
        assert read([tmp_path / "b.tsv"])[0].column("text").to_pylist() == texts


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", " 2", "+3", "-4"], [1, 2, 3, -4]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "2.5", ".5", "1e3", "nan", "-inf"], [1.0, 2.5, 0.5, 1000.0, "nan", float("-inf")]),
        (["True", "False", ""], [True, False, None]),
        (["nan", "inf"], ["nan", "inf"]),
        (["1", "2", "x"], ["1", "2", "x"]),
        (["99999999999999999999", "1"], [1e20, 1.0]),
        (["", ""], ["", ""]),
        (["0x10", "1"], ["0x10", "1"]),
        (["1_0", "1"], ["1_0", "1"]),
    ],
    ids=str,
)
def test_the_type_of_a_column_is_that_of_all_its_cells(cells, values, tmp_path):
    (tmp_path / "a.csv").write_text("n,text\n" + "".join(f"{cell},a\n" for cell in cells))
    found = read([tmp_path / "a.csv"])[0].column("n").to_pylist()
    assert ["nan" if value != value else value for value in found] == values
    assert list(map(type, found)) == [type(value) if value != "nan" or "inf" in cells else float for value in values]


# --- how a text file is written ---------------------------------------------------------------------------------------


def content_of(file: Path, **how: Any) -> list[dict]:
    return read([file], dialect(**how))[0].to_pylist()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text;stars\ngood, cheap;5\nbad;1\n", [("good, cheap", 5), ("bad", 1)]),
        ("text|stars\ngood; cheap, nice|5\nbad|1\n", [("good; cheap, nice", 5), ("bad", 1)]),
        ("text\tstars\ngood, cheap\t5\nbad\t1\n", [("good, cheap", 5), ("bad", 1)]),
        ('text;"stars, 1 to 5"\n"good; cheap";5\nbad;1\n', [("good; cheap", 5), ("bad", 1)]),
        ("text;stars, 1 to 5\ngood;5\nbad, cold;1\n", [("good", 5), ("bad, cold", 1)]),
        ("sep=;\ntext;stars\ngood, cheap;5\nbad;1\n", [("good, cheap", 5), ("bad", 1)]),
        ("sep=|\r\ntext|stars\r\ngood; cheap|5\r\nbad|1\r\n", [("good; cheap", 5), ("bad", 1)]),
        ("text,stars\ngood; cheap,5\nbad;,1\n", [("good; cheap", 5), ("bad;", 1)]),
    ],
    ids=str,
)
def test_what_separates_the_columns_is_found(content, expected, tmp_path):
    """pandas, and `datasets` with it, takes a comma, whatever the file holds."""
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert [tuple(row.values()) for row in content_of(tmp_path / "a.csv")] == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b;c,d\n1,2;3,4\n", r"are its columns separated by commas or semicolons\? Name one with --separator"),
        ("a,b;c\n1\n", r"are its columns separated by commas or semicolons\?"),
        ("text;stars\ngood;5\nbad; cold;1\n", r"line 3 has 3 fields and the header 2\); a text with a semicolon in"),
        ("sep=;\ntext;stars\ngood;5\n\nbad;1;2\n", r"line 5 has 3 fields"),
        ("text;stars\ngood,5\nbad,1\n", r"line 2 has 1 fields and the header 2\); fill it in"),
    ],
)
def test_a_separator_of_two_readings_is_refused(content, said, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UsageError, match=said):
        read([tmp_path / "a.csv"])


def test_the_user_names_separator_and_encoding(tmp_path):
    (tmp_path / "a.csv").write_text("a,b;c,d\n1,2;3,4\n")
    assert content_of(tmp_path / "a.csv", separator=";") == [{"a,b": "1,2", "c,d": "3,4"}]
    (tmp_path / "b.tsv").write_text("a~b\n1~2\n")
    assert content_of(tmp_path / "b.tsv", separator="~") == [{"a": 1, "b": 2}]
    (tmp_path / "c.csv").write_bytes("a\tb\ncaf\u00e9\t2\n".encode("cp1252"))
    assert content_of(tmp_path / "c.csv", separator="tab", encoding="cp1252") == [{"a": "caf\u00e9", "b": 2}]
    with pytest.raises(UsageError, match=r"byte 0xe9 is not UTF-8\); name its encoding with --encoding"):
        content_of(tmp_path / "c.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_byte_order_mark_says_the_encoding(kind, encoding, tmp_path):
    """Excel's "Unicode text" is UTF-16 with a mark."""
    write(tmp_path, kind, "a", rows(12))
    before = content_of(tmp_path / f"a.{kind}")
    text = (tmp_path / f"a.{kind}").read_text()
    (tmp_path / f"a.{kind}").write_bytes((("\ufeff" if encoding.endswith("le") else "") + text).encode(encoding))
    assert content_of(tmp_path / f"a.{kind}") == before


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"separator": ";;"}, r"--separator ;;: name one character, such as ; or \|, or tab"),
        ({"separator": ""}, r"--separator : name one character"),
        ({"separator": '"'}, r"name one character"),
        ({"encoding": "nosuch"}, r"--encoding nosuch: Python knows no such encoding; utf-8, utf-16, cp1252"),
        ({"encoding": "base64"}, r"--encoding base64: Python knows no such encoding"),
    ],
)
def test_a_dialect_that_is_none_is_refused(how, said):
    with pytest.raises(UsageError, match=said):
        dialect(**how)


def test_what_a_format_has_not_cannot_be_named(tmp_path):
    for kind in ("jsonl", "parquet"):
        write(tmp_path, kind, "a", rows(12))
        with pytest.raises(UsageError, match=r"--separator ;: a.\w+ is a \w+ file, which has none; leave it out"):
            load_data(str(tmp_path / f"a.{kind}"), separator=";")
    with pytest.raises(UsageError, match=r"--encoding cp1252: a.parquet is a parquet file, which has none"):
        load_data(str(tmp_path / "a.parquet"), encoding="cp1252")
    with pytest.raises(UsageError, match=r"--encoding cp1252: only for a csv or tsv file or a folder of them"):
        load_data("stdlib-pairs", encoding="cp1252")


# --- Excel ------------------------------------------------------------------------------------------------------------


def sheet(file: Path, *sheets: list[list]) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="the extra excel")
    book = openpyxl.Workbook()
    for i, content in enumerate(sheets):
        page = book.active if i == 0 else book.create_sheet(f"Sheet{i + 1}")
        for row in content:
            page.append(row)
    book.save(file)


def test_a_sheet_is_read_as_it_is_shown(tmp_path):
    import datetime

    day = datetime.datetime(2020, 1, 1)
    sheet(
        tmp_path / "a.xlsx",
        [["text", "stars", "score", "when", "note"], ["good", 5, 0.5, day, None], [], ["10", 1, 2, day, None]],
        [],
    )
    table, kinds = read([tmp_path / "a.xlsx"])
    assert table.to_pylist() == [
        {"text": "good", "stars": 5, "score": 0.5}, {"text": "10", "stars": 1, "score": 2.0},
    ]  # fmt: skip
    assert kinds == {"text": "text", "stars": "numbers", "score": "numbers", "when": "dates", "note": "nothing"}


@pytest.mark.parametrize(
    ("sheets", "said"),
    [
        (
            [[["text", "n"], ["a", 1]], [["text", "n"], ["b", 2]]],
            r"one sheet with rows is read, and it has 2 \(Sheet, Sh",
        ),
        ([[]], r"one sheet with rows is read, and it has 0 \(none\)"),
        ([[["good", 5], ["bad", 1]]], r"is the first line a header\? It holds the number 5"),
    ],
)
def test_a_workbook_of_several_readings_is_refused(sheets, said, tmp_path):
    sheet(tmp_path / "a.xlsx", *sheets)
    with pytest.raises(UsageError, match=said):
        read([tmp_path / "a.xlsx"])


def test_a_date_among_the_texts_of_a_sheet_is_said(tmp_path):
    """Excel makes a date of a text that looks like one."""
    import datetime

    found = files_module._sheet_cells(tmp_path, "text", ["a", None, datetime.datetime(2020, 1, 2), "b"])
    assert found == 'mixed types (text, and "2020-01-02 00:00:00" in row 3)'


def test_excel_needs_the_extra(tmp_path, monkeypatch):
    """Where openpyxl is not installed, one line says how to get it."""
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    said = r"--data \S+a.xlsx: reading Excel files needs openpyxl; install it \(pip install 'nanofinetune\[excel\]'\)"
    with pytest.raises(UsageError, match=said):
        read([tmp_path / "a.xlsx"])


# --- json and parquet -------------------------------------------------------------------------------------------------


def test_deep_nesting_is_one_line(tmp_path):
    """In pyarrow, which `datasets` reads json with, it ends the process without a word."""
    file = tmp_path / "deep.jsonl"
    file.write_text(('{"text": ' + "[" * 50_000 + "]" * 50_000 + ', "label": 1}\n') * 12)
    with pytest.raises(UsageError, match="line 1 has lists in lists in lists, too deep to read"):
        read([file])
    code = "import sys, pyarrow.json; pyarrow.json.read_json(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, timeout=100)
    assert done.returncode < 0 and not done.stderr


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a"}', '{"text": '], r"line 2, column 1\d: Expecting value"),
        (['{"text": "a"}', "", '["a"]'], r"line 3 is no object with the columns' names\); write"),
        (['{"text": "a"}', '{"text": "\\ud83d"}'], r"row 2 of text holds half of a surrogate pair"),
        (['{"n": ' + "1" * 5000 + "}"], "4300"),
        ([json.dumps({f"k{i}": 1}) for i in range(5001)], r"more than 5,000 columns"),
    ],
)
def test_broken_json_is_one_line(lines, said, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=said):
        read([tmp_path / "a.jsonl"])


CONTENT = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CONTENT),
        json.dumps(CONTENT, indent=2),
        json.dumps({"data": CONTENT}),
        json.dumps({"version": "1", "rows": CONTENT, "tags": ["x"]}, indent=2),
        "\n\n" + json.dumps({"data": CONTENT}) + "\n\n",
        "".join(json.dumps(row) + "\n" for row in CONTENT),
        "\n".join(json.dumps(row) + "\n" for row in CONTENT),
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson"])
def test_rows_of_json_are_found_where_they_are(text, ending, tmp_path):
    (tmp_path / f"a.{ending}").write_text(text)
    assert content_of(tmp_path / f"a.{ending}") == CONTENT


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("orient", ["columns", "index", "records", "list"])
def test_what_pandas_writes_as_json_is_read_as_its_rows(orient, indent, tmp_path):
    frame = pd.DataFrame(CONTENT)
    if orient == "list":
        (tmp_path / "a.json").write_text(json.dumps(frame.to_dict(orient="list"), indent=indent))
    else:
        frame.to_json(tmp_path / "a.json", orient=orient, indent=indent)
    table, _ = read([tmp_path / "a.json"])
    assert table.to_pylist() == frame.to_dict(orient="records")


@pytest.mark.parametrize("codes", [["01", "02", "10"], ["007", "+1", " 08 "], ["00", "1.5"]])
def test_numbers_with_a_zero_in_front_stay_words_as_csv_gives_them(codes, tmp_path):
    """01 and 1 are two names: of a shop, a diagnosis, a postal code. pandas makes 1 of both."""
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t,{code}\n" for code in codes))
    table, kinds = read([tmp_path / "a.csv"])
    assert table["label"].to_pylist() == codes and kinds["label"] == "text"
    assert pd.read_csv(tmp_path / "a.csv")["label"].dtype.kind in "if"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": CONTENT, "b": CONTENT}, r"it holds rows under a and b; write \{\"data\": \["),
        ({"text": {"x": "a"}, "n": {"x": 1}}, r"it holds no list of rows under any key"),
        ({"text": {"0": "a"}, "n": {"1": 1}}, r"it holds no list of rows under any key"),
        ({"text": ["a", "b"], "n": [1]}, r"it holds no list of rows under any key"),
        ({"data": [{"text": "a"}, 1]}, r"it holds no list of rows under any key"),
        ([CONTENT[0], 1], r"row 2 is no object with the columns' names"),
    ],
    ids=str,
)
def test_json_of_other_shapes_is_refused(value, said, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=2))
    with pytest.raises(UsageError, match=said):
        read([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a", "n": 1}\n{"text": "b", "n": 0, "n": 1}\n', "line 2 has n twice"),
        ('{"text": "a", "text": "b", "n": 1}\n', "line 1 has text twice"),
        ('[{"text": "a", "n": 1},\n{"text": "b", "n": 0, "n": 1}]', "row 2 has n twice"),
        ('{"data": [{"text": "a", "n": 1}, {"text": "b", "n": 0, "n": 1}]}', "row 2 has n twice"),
        ('{"text": ["a", "b"], "n": [0, 1],\n"n": [1, 0]}', "it has n twice"),
        ('{"text": {"0": "a", "1": "b"}, "n": {"0": 1,\n"0": 1, "1": 0}}', "its n has 0 twice"),
        ('{"0": {"text": "a", "n": 1},\n"1": {"text": "b", "n": 0, "n": 1}}', "its 1 has n twice"),
    ],
)
def test_a_name_that_json_has_twice_is_refused(text, said, tmp_path):
    """json.loads, pandas and all that are built on them keep the last value, and say nothing."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=rf"it could not be read \({said}\); leave one of them, or rename it"):
        read([tmp_path / "a.json"])
    assert json.loads('{"n": 0, "n": 1}') == {"n": 1}


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "lines"])
@pytest.mark.parametrize("under_a_key", [False, True], ids=["list", "object"])
def test_a_list_that_is_too_long_to_be_held_is_refused(indent, under_a_key, tmp_path, monkeypatch):
    """And no more of it is read; as one row a line it may have any length."""
    value = {"data": CONTENT * 20} if under_a_key else CONTENT * 20
    text = json.dumps(value, indent=indent)
    (tmp_path / "a.json").write_text(text)
    monkeypatch.setattr(files_module, "LONGEST_LIST", len(text))
    assert content_of(tmp_path / "a.json") == CONTENT * 20
    monkeypatch.setattr(files_module, "LONGEST_LIST", len(text) - 1)
    monkeypatch.setattr(files_module, "LONGEST_LINE", 64)
    if under_a_key and indent is None:
        said = "line 1 has more than 64 characters"
    else:
        said = f"one list or object of more than {len(text) - 1:,} characters, .*; write one row a line, as .jsonl"
    with pytest.raises(UsageError, match=said):
        read([tmp_path / "a.json"])
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, CONTENT * 20)))
    assert content_of(tmp_path / "a.jsonl") == CONTENT * 20


def test_a_row_with_rows_in_it_is_a_row(tmp_path):
    """SQuAD's answers, a list of objects in each line, are a column that is not used."""
    lines = [{"text": text, "n": i % 2, "answers": [{"start": 1}]} for i, text in enumerate("abc")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table, kinds = read([tmp_path / "a.jsonl"])
    assert table.column("text").to_pylist() == ["a", "b", "c"] and kinds["answers"] == "lists"


def test_flat_lists_can_be_used_and_others_cannot(tmp_path):
    lines = [{"tags": ["x"], "deep": [["x"]], "mixed": [1, "a"], "some": [1]}, {"tags": [], "some": [0.5]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table, kinds = read([tmp_path / "a.jsonl"])
    assert table.to_pylist() == [{"tags": ["x"], "some": [1.0]}, {"tags": [], "some": [0.5]}]
    assert set(kinds.values()) == {"lists"}


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["a", 1, "b"], "mixed types (text, and 1 in row 2)"),
        ([None, 1, "a", "b"], "mixed types (text, and 1 in row 2)"),
        (["a", None, "b", float("nan")], "mixed types (text, and NaN in row 4)"),
        ([True, 1, 1], "mixed types (numbers, and true in row 1)"),
        ([{"en": "a"}, "a", "b"], 'mixed types (text, and {"en": "a"} in row 1)'),
        (["a", "b", ["c"]], 'mixed types (text, and ["c"] in row 3)'),
        ([1, 2, "x" * 50], 'mixed types (numbers, and "' + "x" * 39 + "... in row 3)"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("block", [1, 2, 1_000_000])
def test_a_column_of_several_kinds_says_which_and_where(cells, kind, block, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CELLS", block)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": cell, "i": 1}) for cell in cells))
    assert read([tmp_path / "a.jsonl"])[1] == {"n": kind, "i": "numbers"}


def test_what_is_shown_of_an_odd_cell_can_be_printed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "i": 1}\n{"n": 2, "i": 1}\n{"n": "\\ud83d\\n", "i": 1}\n')
    assert read([tmp_path / "a.jsonl"])[1]["n"] == r'mixed types (numbers, and "\ud83d\n" in row 3)'


@pytest.mark.parametrize("cells", [[[], None], [None, [], []]], ids=repr)
def test_a_column_of_empty_lists_is_left_out(cells, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": cell, "i": 1}) for cell in cells))
    assert read([tmp_path / "a.jsonl"])[1] == {"n": "lists", "i": "numbers"}


@pytest.mark.parametrize("block", [1, 2, 1_000_000])
def test_values_of_json_decide_the_type_whatever_the_block(block, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CELLS", block)
    content = [
        {"text": "a", "whole": 1, "mixed": 1, "late": None, "odd": [1], "some": "x", "yes": True},
        {"text": None, "whole": 2.5, "mixed": "b", "odd": [[2]]},
        {"text": "c", "whole": None, "mixed": 2, "late": 3, "odd": None, "some": "y", "yes": False, "object": {}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, content)))
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(content, indent=1))
    for name in ("a.jsonl", "b.json"):
        table, kinds = read([tmp_path / name])
        assert table.to_pylist() == [
            {"text": "a", "whole": 1.0, "late": None, "some": "x", "yes": True},
            {"text": None, "whole": 2.5, "late": None, "some": None, "yes": None},
            {"text": "c", "whole": None, "late": 3, "some": "y", "yes": False},
        ]
        odd = {name: kind for name, kind in kinds.items() if kind not in ("text", "numbers")}
        assert odd == {"mixed": 'mixed types (numbers, and "b" in row 2)', "odd": "lists", "object": "objects"}


def test_parquet_of_pandas_is_read_without_its_index(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": [f"the cat {i}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    frame["kind"] = pandas.Categorical(["good", "bad"] * 10)
    frame["when"] = pandas.Timestamp("2020-01-01")
    frame.sample(frac=1, random_state=0).to_parquet(tmp_path / "a.parquet")
    table, kinds = read([tmp_path / "a.parquet"])
    assert kinds == {
        "text": "text", "label": "numbers", "kind": "text", "when": "dates", "__index_level_0__": "an index",
    }  # fmt: skip
    assert set(table.column("kind").to_pylist()) == {"good", "bad"}


def test_a_parquet_file_of_too_many_rows_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "parquet", "a", rows(20))
    monkeypatch.setattr(files_module, "MOST_ROWS", 19)
    with pytest.raises(UsageError, match="it has 20 rows, more than 19, the most that is read"):
        read([tmp_path / "a.parquet"])


# --- any table, any dialect -------------------------------------------------------------------------------------------


def packed_as(file: Path, ending: str) -> Path:
    """The file, in one of the forms that a download has."""
    made = file.with_name(f"{file.name}.{ending}")
    if ending == "zip":
        with zipfile.ZipFile(made, "w") as archive:
            archive.write(file, file.name)
    else:
        pack: Any = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending]
        made.write_bytes(pack(file.read_bytes()))
    return made


TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map("w".__add__), min_size=12, max_size=15
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    texts=TEXTS,
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]),
    delimiter=st.sampled_from(",;|\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    packed=st.sampled_from(["", "", "gz", "bz2", "xz", "zip"]),
    ascii_only=st.booleans(),
)
def test_a_random_table_is_read_back_or_refused(texts, kind, quoting, delimiter, end, encoding, packed, ascii_only):
    """Written by Python's csv and json and by pyarrow, with any text and in any dialect: the same rows, or one line."""
    content = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"train.{kind}")
        if kind in ("csv", "tsv"):
            with file.open("w", encoding=encoding, newline="") as target:
                form = {"delimiter": "\t" if kind == "tsv" else delimiter, "quoting": quoting, "lineterminator": end}
                writer = csv.DictWriter(target, ["text", "label"], **form)
                writer.writeheader()
                try:
                    writer.writerows(content)
                except csv.Error:  # without quotes, not every text can be written
                    hypothesis.reject()
        elif kind == "parquet":
            write(Path(folder), kind, "train", content)
        else:
            lines = [json.dumps(row, ensure_ascii=ascii_only) for row in content]
            body = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
            file.write_text(body, encoding=encoding)
        if packed:
            file = packed_as(file, packed)
        # a carriage return in a text is quoted only where everything is: then its row is two
        usual = kind not in ("csv", "tsv") or not any("\r" in text for text in texts)
        usual |= quoting in (csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)
        try:
            found = load_data(str(file))
        except UsageError as refusal:
            assert str(refusal).isprintable() and len(str(refusal)) <= 500
            assert not usual, refusal
        else:
            back = sorted((row for split in found.splits.values() for row in split), key=repr)
            assert back == sorted(content, key=repr)
