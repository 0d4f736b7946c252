"""Reading local files, against `datasets` 5.2 and pandas on the same files; where they lose or mix rows, it is shown.

python -m pytest tests/data/test_files.py
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tables import rows, write

from nanofinetune.data import files as files_module
from nanofinetune.data.files import read
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
    "text,label\na,0,\nb,1,\n": r"line 2 has 3 fields and the header 2",
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
        assert odd == {"mixed": "mixed types", "odd": "lists", "object": "objects"}


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

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map("w".__add__), min_size=12, max_size=15
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    texts=TEXTS,
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]),
    delimiter=st.sampled_from(",,,;|\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
    ascii_only=st.booleans(),
)
def test_a_random_table_is_read_back_or_refused(texts, kind, quoting, delimiter, end, mark, ascii_only):
    """Written by Python's csv and json and by pyarrow, with any text and in any dialect: the same rows, or one line."""
    content = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"train.{kind}")
        if kind in ("csv", "tsv"):
            with file.open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as target:
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
            file.write_text(body, encoding="utf-8-sig" if mark else "utf-8")
        # a carriage return in a text is quoted only where everything is: then its row is two
        usual = kind not in ("csv", "tsv") or (delimiter == "," and not any("\r" in text for text in texts))
        usual |= quoting == csv.QUOTE_ALL and delimiter == ","
        try:
            found = load_data(str(file))
        except UsageError as refusal:
            assert str(refusal).isprintable() and len(str(refusal)) <= 500
            assert not usual, refusal
        else:
            back = sorted((row for split in found.splits.values() for row in split), key=repr)
            assert back == sorted(content, key=repr)
