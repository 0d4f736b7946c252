"""Which columns are text and which one is the label, and what the labels mean: the only reading of a file, or none.

The reference is the table itself; there is no library that chooses columns.

    python -m pytest tests/data/test_columns.py
"""

import json
import re
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tables import write

from nanofinetune.data.columns import drop_unlabelled, find_columns, kinds_of, read_labels
from nanofinetune.data.load import load_data
from nanofinetune.data.tasks import GLUE
from nanofinetune.data.tokens import tokenize
from nanofinetune.ground.errors import UsageError


@pytest.mark.parametrize(
    ("row", "asked", "texts", "label"),
    [
        ({"text": "a", "label": 0}, {}, ("text",), "label"),
        ({"review": "a", "stars": 0}, {}, ("review",), "stars"),
        ({"id": 0, "a": "x", "b": "y", "target": 0}, {}, ("a", "b"), "target"),
        ({"a": "x", "b": "y", "c": "z", "label": 0}, {"text_columns": ["c", "a"]}, ("c", "a"), "label"),
        ({"a": "x", "n": 0, "m": 0}, {"label_column": "m"}, ("a",), "m"),
        ({"a": "x", "b": "y", "n": 0, "m": 0}, {"text_columns": ["b"], "label_column": "n"}, ("b",), "n"),
    ],
)
def test_columns_are_found_by_themselves(row, asked, texts, label, tmp_path):
    content = [
        {name: i % 2 if isinstance(value, int) else f"{value} {i}" for name, value in row.items()} for i in range(12)
    ]
    write(tmp_path, "jsonl", "train", content)
    write(tmp_path, "jsonl", "validation", content)
    data = load_data(str(tmp_path), **asked)
    assert (data.text_columns, data.label_column) == (texts, label)
    assert set(data.splits["train"].column_names) == {*texts, label}


# Columns of 20 rows, by the number of the row.
COLUMNS: dict[str, Callable[[int], Any]] = {
    "text": lambda i: f"the cat {i}",
    "text2": lambda i: f"a dog {i}",
    "classes": lambda i: i % 2,
    "words": lambda i: ("bad", "good")[i % 2],
    "others": lambda i: ("new", "old", "red")[i % 3],
    "floats": lambda i: i / 8,
    "counting": lambda i: i,
    "shuffled": lambda i: 7 * i % 20,
    "ids": lambda i: 1000 + 13 * i,
    "gaps": lambda i: None if i == 3 else i % 2,
    "na": lambda i: "NA" if i == 3 else str(i % 2),
    "na floats": lambda i: "N/A" if i == 3 else str(i / 8),
    "ones": lambda i: 1,
    "files": lambda i: f"train/pos/{i}_9.txt",
    "codes": lambda i: f"REV-{i:04}",
    "chinese": lambda i: f"\u4eca\u5929\u5929\u6c14\u5f88\u597d{i}",
    "uuid": lambda i: f"{i:08x}-0000-4000-8000-000000000000",
    "link": lambda i: f"https://example.org/{i}",
    "day": lambda i: f"2020-01-{i + 1:02}",
    "digits": lambda i: str(i * 31),
    "empty": lambda i: "",
    "lists": lambda i: [i],
}


def table(names: dict[str, str]) -> datasets.Dataset:
    """Name of a column -> which of COLUMNS it is."""
    return datasets.Dataset.from_dict({name: [COLUMNS[kind](i) for i in range(20)] for name, kind in names.items()})


def found(names: dict[str, str]) -> tuple[tuple[str, ...], str]:
    rows = table(names)
    texts, (label,) = find_columns(rows, kinds_of(rows), None)
    return texts, label


@pytest.mark.parametrize(
    ("names", "texts", "label"),
    [
        # what pandas adds
        ({"Unnamed: 0": "counting", "review": "text", "sentiment": "words"}, ["review"], "sentiment"),
        ({"review": "text", "sentiment": "words", "__index_level_0__": "shuffled"}, ["review"], "sentiment"),
        ({"a": "text", "n": "shuffled", "b": "words"}, ["a"], "b"),
        # a column that is named like a label is it, whatever its type
        ({"text": "text", "label": "words", "score": "floats"}, ["text"], "label"),
        ({"text": "text", "Label ": "words", "n": "classes"}, ["text"], "Label "),
        ({"text": "text", "sentiment": "words", "confidence": "floats"}, ["text"], "sentiment"),
        ({"text": "text", "label": "floats", "n": "classes"}, ["text"], "label"),
        ({"text": "text", "n": "ids", "target": "classes"}, ["text"], "target"),
        ({"text": "text", "n": "classes", "class": "floats"}, ["text"], "class"),
        ({"text": "text", "stars": "others", "n": "ids", "m": "floats", "v": "ones"}, ["text"], "stars"),
        ({"text": "text", "target": "classes", "topic": "text2"}, ["text", "topic"], "target"),
        ({"text": "text", "target": "classes", "target_text": "words"}, ["text"], "target"),
        # the label in words is no second text
        ({"text": "text", "label": "classes", "label_text": "words"}, ["text"], "label"),
        ({"text": "text", "label": "words", "label_id": "classes"}, ["text"], "label"),
        # names and values that are neither
        ({"text": "text", "n": "classes", "id": "ids", "reviewId": "ids", "#1 ID": "classes"}, ["text"], "n"),
        (
            {"text": "text", "n": "classes", "year": "classes", "price": "floats", "text_length": "classes"},
            ["text"],
            "n",
        ),
        ({"text": "text", "n": "classes", "a": "uuid", "b": "link", "c": "day", "d": "digits"}, ["text"], "n"),
        ({"text": "text", "n": "classes", "e": "empty", "h": "lists", "url": "text2"}, ["text"], "n"),
        ({"text": "text", "label": "classes", "m": "na", "n": "na floats"}, ["text"], "label"),
        ({"text": "text", "n": "classes", "m": "ids"}, ["text"], "n"),
        # two texts
        ({"question": "text", "answer": "text2", "n": "classes"}, ["question", "answer"], "n"),
        ({"text": "text", "answer": "words"}, ["text"], "answer"),
        ({"a": "files", "b": "codes", "n": "classes"}, ["a", "b"], "n"),
        ({"a": "text", "b": "chinese", "n": "classes"}, ["a", "b"], "n"),
        ({"review": "text", "n": "gaps"}, ["review"], "n"),  # and refused when it is read, with the row
        ({"text": "text", "n": "floats"}, ["text"], "n"),
    ],
    ids=str,
)
def test_the_only_reading_is_taken(names, texts, label):
    assert found(names) == (tuple(texts), label)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            {"text": "text", "n": "classes", "m": "words"},
            r"which column is the label, n or m\? .* --label-column; .*text, n",
        ),
        ({"text": "text", "label": "classes", "labels": "classes"}, r"the label, label or labels\? Name it"),
        ({"text": "text", "stars": "classes", "topic": "words"}, r"the label, stars or topic\? Name it"),
        (
            {"review": "text", "__index_level_0__": "shuffled"},
            r"which column is the label\? Name it with --label-column",
        ),
        ({"review": "text", "Unnamed: 0": "counting"}, r"which column is the label\? Name it"),
        ({"review": "text", "n": "shuffled"}, r"which column is the label\? Name it"),
        ({"text": "text", "n": "classes", "g": "gaps"}, r"the label, n or g\? Name it"),
        ({"text": "text", "n": "na floats", "m": "classes"}, r"the label, n or m\? Name it"),
        ({"text": "text", "m": "na", "n": "floats"}, r"the label, m or n\? Name it"),
        # a name that is not certain beats no other column that may be meant
        ({"text": "text", "sentiment": "words", "quality": "others"}, r"the label, sentiment or quality\? Name it"),
        ({"text": "text", "target": "classes", "polarity": "others"}, r"the label, target or polarity\? Name it"),
        ({"comment": "text", "score": "ids", "sarcastic": "classes"}, r"the label, score or sarcastic\? Name it"),
        ({"comment": "text", "score": "ids", "sarcastic": "na"}, r"the label, score or sarcastic\? Name it"),
        # names of things
        ({"a": "files", "text": "text", "n": "classes"}, r"is a, single words without a space, a text, or a name"),
        ({"text": "text", "a": "codes", "n": "classes"}, r"is a, single .* with --text-columns: text a, or one of"),
        ({"review": "text", "price": "floats"}, r"which column is the label\? Name it"),
        ({"a": "text", "b": "text2"}, r"which column is the label\? Name it"),
        (
            {"text": "text", "topic2": "others", "label": "classes"},
            r"is topic2, of a few values many times, a text\? Name",
        ),
        (
            {"a": "text", "b": "text2", "c": "text", "label": "classes"},
            r"3 text columns .*\(a, b, c\): name one or two",
        ),
        ({"label": "classes", "date": "text", "n": "digits"}, r"0 text columns .*\(none\): name one or two"),
        ({"text": "text", "label": "lists"}, r"--label-column label: it holds lists; labels are words, whole"),
    ],
    ids=str,
)
def test_two_readings_are_refused(names, said):
    """One line that names the columns, and the option that chooses."""
    with pytest.raises(UsageError, match=said) as refusal:
        found(names)
    assert "\n" not in str(refusal.value)


def read_rows(folder, columns: dict[str, Callable[[int], Any]], **asked):
    content = [{name: cell(i) for name, cell in columns.items()} for i in range(20)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, content)))
    return load_data(str(folder / "a.jsonl"), **asked)


NAN_BODY = {
    "title": COLUMNS["text"], "body": lambda i: float("nan") if i == 6 else f"a dog {i}", "label": COLUMNS["classes"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (NAN_BODY, r"the column body holds mixed types \(text, and NaN in row 7\); mend that row .* --text-columns"),
        (
            {"title": COLUMNS["text"], "body": lambda i: 3 if i == 6 else f"a dog {i}", "toxic": COLUMNS["classes"]},
            r"the column body holds mixed types \(text, and 3 in row 7\)",
        ),
        (
            {"a": COLUMNS["text"], "toxic": lambda i: str(i % 2) if i == 4 else i % 2, "n": lambda i: i // 2},
            r"which column is the label, toxic or n\?",
        ),
        (
            {"a": COLUMNS["text"], "toxic": lambda i: str(i % 2) if i == 4 else i % 2},
            r'--label-column toxic: it holds mixed types \(numbers, and "0" in row 5\); labels are',
        ),
    ],
    ids=["text", "number", "label", "one label"],
)
def test_a_column_of_several_kinds_does_not_vanish(columns, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        read_rows(tmp_path, columns)


def test_a_column_of_several_kinds_is_left_where_the_texts_are_named(tmp_path):
    assert read_rows(tmp_path, NAN_BODY, text_columns=["title"]).text_columns == ("title",)
    identified = {"title": COLUMNS["text"], "id": NAN_BODY["body"], "label": COLUMNS["classes"]}
    assert read_rows(tmp_path, identified).text_columns == ("title",)


def test_with_the_texts_named_a_column_of_few_words_may_be_the_label(tmp_path):
    columns = {name: COLUMNS[kind] for name, kind in {"text": "text", "target": "classes", "v": "others"}.items()}
    with pytest.raises(UsageError, match=r"which column is the label, target or v\?"):
        read_rows(tmp_path, columns, text_columns=["text"])


def test_a_hub_column_of_objects_in_lists_is_no_label():
    rows = datasets.Dataset.from_dict({"text": ["a b", "c d"], "who": [[{"x": 1}], []], "n": [[[1]], []], "m": [0, 1]})
    assert find_columns(rows, kinds_of(rows), None) == (("text",), ("m",))


def test_the_user_decides_against_every_rule(tmp_path):
    content = [
        {name: COLUMNS[kind](i) for name, kind in {"date": "text", "id": "classes", "e": "empty"}.items()}
        for i in range(20)
    ]
    write(tmp_path, "jsonl", "train", content)
    data = load_data(str(tmp_path / "train.jsonl"), text_columns=["date", "e"], label_column="id")
    assert (data.text_columns, data.label_column, data.label_names) == (("date", "e"), "id", ["0", "1"])


def test_columns_are_looked_at_once_however_many_there_are(monkeypatch):
    """`datasets` copies all features at each look, so that a look for each column is quadratic in their number."""
    looks = []
    for n in (10, 200):
        rows = table({"text": "text", "label": "classes", **{f"c{i}": "ids" for i in range(n)}})
        counted = [0]
        features = datasets.Dataset.features.fget

        def count(self, features=features, counted=counted):
            counted[0] += len(features(self)) > 2
            return features(self)

        monkeypatch.setattr(datasets.Dataset, "features", property(count))
        find_columns(rows, kinds_of(rows), None)
        monkeypatch.undo()
        looks.append(counted[0])
    assert looks[0] == looks[1]


# --- what the labels mean ---------------------------------------------------------------------------------------------


def labels_of(*splits: list, task=None, kind="auto"):
    """What `read_labels` makes of the label columns of train and validation."""
    tables = [datasets.Dataset.from_dict({"label": values}) for values in splits]
    return read_labels(dict(zip(("train", "validation"), tables, strict=False)), ["label"], task, kind)


@pytest.mark.parametrize(
    ("values", "names", "numbers", "note"),
    [
        ([0, 1, 1], ["0", "1"], [0, 1, 1], ""),
        ([1, 5, 3, 1], ["1", "3", "5"], [0, 2, 1, 0], "the labels 1, 3, 5 in label are classes 0 to 2"),
        ([-1, 0, 1], ["-1", "0", "1"], [0, 1, 2], "the labels -1, 0, 1 in label are classes 0 to 2"),
        ([-1, 1, 1], ["-1", "1"], [0, 1, 1], "the labels -1, 1 in label are classes 0 to 1"),
        ([True, False, True], ["False", "True"], [1, 0, 1], ""),
        (["1", "0", "1"], ["0", "1"], [1, 0, 1], ""),
        (["01", "1", "10"], ["01", "1", "10"], [0, 1, 2], ""),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1], "the labels 9, 10 in label are classes 0 to 1"),
        (["pos", "neg", "neutral"], ["neg", "neutral", "pos"], [2, 0, 1], ""),
        ([0.0, 1.0, 1.0], ["0", "1"], [0, 1, 1], "the labels in label are whole floats, and taken as classes"),
        (["0.0", "1.0"], ["0", "1"], [0, 1], "the labels in label are whole floats, and taken as classes"),
        (
            [1.0, 3.0],
            ["1", "3"],
            [0, 1],
            "whole floats, and taken as classes; the labels 1, 3 in label are classes 0 to 1",
        ),
        ([0.5, 1.0, 2.0], None, [0.5, 1, 2], "the labels in label are floats: a number is predicted, not a class"),
        ([float(i) for i in range(40)], None, list(range(40)), "floats: a number is predicted, not a class"),
    ],
    ids=str,
)
def test_labels_of_every_kind(values, names, numbers, note):
    labels = labels_of(values, values)
    assert labels.names == names and (note in labels.note if note else labels.note == "")
    for split in labels.values.values():
        assert split.tolist() == numbers and split.dtype == (np.float32 if names is None else np.int64)


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        ([0, 1], [-1, -1], r"every label of the validation split is -1, the mark of a test set without labels"),
        ([0, 1], ["a", "b"], r"the labels of the validation split are text \('a', 'b'\) and those of the train split"),
        ([0, 1], [0.5, 1.0], r"the validation split holds floats and the training split whole numbers"),
        ([1, 1], [1, 1], r"there is only one class \(1\)"),
        (["a", "a"], ["a"], r"there is only one class \(a\)"),
        ([-1, -1], [-1], r"every label is -1, the mark of a test set"),
        ([f"text {i}" for i in range(20)], ["text 1"], r"20 different labels in 20 rows are no classes"),
        (list(range(20)), [1], r"20 different labels in 20 rows are no classes"),
        ([f"{i},5" for i in range(20)], ["1,5"], r"name another column, or if 0,5 is a number, write it with a point"),
        (["a", "", "b"], ["a"], r"row 2 of the train split has no label \(1 in all\); fill it in"),
        (["a", None, "b"], ["a"], r"row 2 of the train split has no label \(1 in all\); fill it in"),
        ([0, 1], [None, 1], r"row 1 of the validation split has no label"),
        (["a", " ", "b"], ["a"], r"row 2 of the train split has no label \(1 in all\)"),
        (["1", "NA", "0"], ["1"], r"row 2 of the train split has no label \(NA; 1 in all\); .* --drop-unlabelled"),
        ([0.0, float("nan"), 1.0], [0.0], r"row 2 of the train split has no label \(1 in all\); .* --drop-unlabelled"),
        ([0, 1], ["1", "?"], r"row 2 of the validation split has no label \(\?; 1 in all\)"),
        (["NA", "NA"], ["NA"], r"row 1 of the train split has no label \(NA; 2 in all\)"),
        (["spam", "ham"], [["spam"]], r"the train split holds text and the validation split lists; write both alike"),
        ([1, 0], [[1], [0]], r"the train split holds numbers and the validation split lists; write both alike"),
        ([[1, 0], [0, 1]], [1], r"the validation split holds numbers and the train split lists; write both alike"),
        ([[1, 0], [0, 1]], [[[1]]], r"the validation split holds lists, which are no labels"),
        ([0.5, float("inf")], [0.5], r"row 2 of the train split is inf \(1 in all\); write a number"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_are_refused(train, validation, said):
    with pytest.raises(UsageError, match=said):
        labels_of(train, validation)


@pytest.mark.parametrize(
    ("train", "validation", "names", "numbers", "note"),
    [
        (["a", "b"], ["a", "c"], ["a", "b", "c"], [0, 2], "no training row has c, which the validation split has"),
        ([0, 1], [0, 2], ["0", "1", "2"], [0, 2], "no training row has 2, which the validation split has"),
        ([1, 5], [3, 1], ["1", "3", "5"], [1, 0], "no training row has 3, which the validation split has"),
        (["Good", "bad"], ["good "], ["Good", "bad", "good "], [2], "the labels 'Good' and 'good ' are classes of"),
        ([-1, 0, 1], [0], ["-1", "0", "1"], [1], "if -1 means that there is no label, .* --drop-unlabelled"),
        (
            ["a", "NA"],
            ["a"],
            ["NA", "a"],
            [1],
            "the labels hold 'NA': if that means that there is no label, leave such",
        ),
        (["0", "1", "x"], ["x"], ["0", "1", "x"], [2], "beside numbers the labels hold 'x', taken as classes too"),
    ],
    ids=str,
)
def test_what_may_be_a_mistake_is_said(train, validation, names, numbers, note):
    labels = labels_of(train, validation)
    assert labels.names == names and labels.values["validation"].tolist() == numbers
    assert re.search(note, labels.note)


@pytest.mark.parametrize(
    ("values", "kind", "names", "numbers"),
    [
        ([1, 5, 3], "regression", None, [1.0, 5.0, 3.0]),
        ([0.0, 1.0], "regression", None, [0.0, 1.0]),
        (["1", "2"], "regression", None, [1.0, 2.0]),
        (list(range(40)), "regression", None, [float(i) for i in range(40)]),
        ([0.5, 1.0, 0.5], "single", ["0.5", "1.0"], [0, 1, 0]),
        ([0.0, 1.0], "single", ["0", "1"], [0, 1]),
        ([1, 0], "auto", ["0", "1"], [1, 0]),
    ],
    ids=str,
)
def test_the_user_says_what_labels_are(values, kind, names, numbers):
    labels = labels_of(values, values, kind=kind)
    assert labels.names == names and labels.values["train"].tolist() == numbers


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (
            ["a", "b"],
            "regression",
            r"--task regression: the labels in label are text \('a', 'b'\); name a column of num",
        ),
        ([0, 1], "multi", r"--task multi: label is one column of numbers; name several columns of 0 and 1, or one of"),
        ([[0, 1], [1, 0]], "single", r"--task single: the label is in lists, which are several classes; name one"),
        ([[0, 1], [1, 0]], "regression", r"--task regression: the label is in lists"),
    ],
    ids=str,
)
def test_a_task_that_labels_cannot_be_is_refused(values, kind, said):
    with pytest.raises(UsageError, match=said):
        labels_of(values, values, kind=kind)


@pytest.mark.parametrize("word", ["NA", "N/A", "NULL", "null", "NaN", "nan", "None", "none", r"\N", "#N/A", "?", " "])
@pytest.mark.parametrize("others", [["1", "0"], ["0.5", "-1"], ["TRUE", "FALSE"]], ids=str)
def test_among_numbers_a_word_for_nothing_is_no_label(word, others, tmp_path):
    """As R's write.csv and a database's export have it; pandas' reader drops most of these words, and says nothing."""
    rows = datasets.Dataset.from_dict({"label": [*others, f" {word}", *others]})
    kept, note = drop_unlabelled({"train": rows}, ["label"])
    assert kept["train"]["label"][:] == others * 2
    told = f"empty, {word}, or -1" if word.strip() else "empty, or -1"
    assert note == f"left out without a label ({told}): 1 of 5 train rows"


@pytest.mark.parametrize("word", ["NA", "N/A", "NULL", "NaN", r"\N", "#N/A"])
def test_among_words_it_may_be_a_class(word):
    """NA is Namibia, too."""
    values = ["a", "b", word, "b"]
    labels = labels_of(values)
    assert labels.names == sorted({*values})
    assert f"the labels hold {word!r}: if that means that there is no label, " in labels.note
    kept, note = drop_unlabelled({"train": datasets.Dataset.from_dict({"label": values})}, ["label"])
    assert kept["train"]["label"][:] == ["a", "b", "b"] and f"(empty, {word}, or -1)" in note


@pytest.mark.parametrize("word", ["none", "None", "null", "na", "?"])
def test_among_words_a_plain_word_is_a_class(word):
    values = ["joy", word, "fear"]
    assert labels_of(values).names == sorted(values) and labels_of(values).note == ""
    assert drop_unlabelled({"train": datasets.Dataset.from_dict({"label": values})}, ["label"])[1] == ""


def test_truth_values_are_the_same_beside_a_lost_one():
    """R writes TRUE; a file with an NA among them stays text, and its fellow becomes booleans."""
    kept, _ = drop_unlabelled(
        {
            "train": datasets.Dataset.from_dict({"label": [True, False]}),
            "validation": datasets.Dataset.from_dict({"label": ["TRUE", "NA", "FALSE"]}),
        },
        ["label"],
    )
    labels = read_labels(kept, ["label"], None)
    assert labels.names == ["False", "True"] and labels.values["validation"].tolist() == [1, 0]


# --- classes that have names ------------------------------------------------------------------------------------------


def named_table(values: list, names: list[str] | None) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"text": [f"the cat {i}" for i in range(len(values))], "label": values})
    label: Any = names and datasets.ClassLabel(names=names)
    return (
        rows.cast_column("label", datasets.Sequence(label) if isinstance(values[0], list) else label) if names else rows
    )


@pytest.mark.parametrize(
    ("train", "validation", "names", "numbers", "note"),
    [
        (([0, 1, 2], "abc"), ([0, 1], "bc"), "abc", [1, 2], ""),
        (([0, 1, 2], "abc"), ([0, 1], "cb"), "abc", [2, 1], ""),
        (([0, 1], "bc"), ([0, 2], "abc"), "bca", [2, 1], "the training split has no class a, which the validation"),
        (([0, 1], "bc"), ([1, 2], "abc"), "bc", [0, 1], ""),
        (([0, 1], "bc"), (["c", "d"], None), "bcd", [1, 2], "the training split has no class d, which the validation"),
        (([0, 1], "bc"), ([1, 0], None), "bc", [1, 0], "numbers of the validation split are the classes b, c in this"),
        (([0, 1], "01"), ([1, 0], None), "01", [1, 0], ""),
        ((["c", "b"], None), ([0, 1], "bd"), "bcd", [0, 2], "no training row has d, which the validation split has"),
        (([1, 0], None), ([0, 1], "bc"), "01", [0, 1], "the numbers of the train split are the classes b, c in this"),
        (
            ([[0], [1]], "bc"),
            ([[0], [1, 2], []], "abc"),
            "bca",
            [[0, 0, 1], [1, 1, 0], [0, 0, 0]],
            "training row has a",
        ),
        (([[0], [1]], "bc"), ([["c"], ["b"]], None), "bc", [[0, 1], [1, 0]], ""),
        (([["c"], ["b"]], None), ([[0], [1]], "bd"), "bcd", [[1, 0, 0], [0, 0, 1]], "no training row has d"),
    ],
    ids=str,
)
def test_named_classes_are_the_same_by_name_where_their_numbers_differ(train, validation, names, numbers, note):
    splits = {
        key: named_table(values, some and list(some))
        for key, (values, some) in {"train": train, "validation": validation}.items()
    }
    labels = read_labels(splits, ["label"], None)
    assert labels.names == list(names) and labels.values["validation"].tolist() == numbers
    assert note in labels.note and bool(note) == bool(labels.note)


def test_class_encode_column_numbers_each_split_by_itself(tmp_path):
    """What `datasets` writes of a validation split that lacks a class: its 0 is b, and in the training split a."""
    splits = {"train": list("abc") * 5, "validation": list("bc") * 5}
    made = datasets.DatasetDict({key: named_table(labels, None) for key, labels in splits.items()})
    made = made.class_encode_column("label")
    assert made["train"][1]["label"] == 1 and made["validation"][0]["label"] == 0  # both are b
    for key, rows in made.items():
        with (tmp_path / f"{key}.parquet").open("wb") as file:
            rows.to_parquet(file)
    data = load_data(str(tmp_path))
    assert data.label_names == ["a", "b", "c"] and data.splits["validation"]["label"][:] == [1, 2] * 5


@pytest.mark.parametrize("written", [b"{", b"[]", b"5", b'{"info": 5}', b'{"info": {"features": [1]}}', b"[" * 100_000])
def test_what_stands_in_the_place_of_class_names_is_refused(written, tmp_path):
    """`datasets` raises whatever comes of it: JSONDecodeError, TypeError, RecursionError."""
    table = pa.table({"text": ["a b", "c d"] * 10, "label": [0, 1] * 10})
    file = tmp_path / "train.parquet"
    table = table.replace_schema_metadata({b"huggingface": written})
    parquet.write_table(table, file)
    with pytest.raises((TypeError, ValueError, RecursionError)):
        datasets.Dataset(datasets.table.InMemoryTable(table))
    with pytest.raises(UsageError, match=r"train\.parquet: it could not be read \(.*\); correct the file"):
        load_data(str(file))


@pytest.mark.parametrize(("second", "names"), [([0, 1] * 5, ["b", "c"]), ([0, 1] * 5, None)], ids=str)
def test_parts_that_name_other_classes_are_refused(second, names, tmp_path):
    """pyarrow, with which `datasets` reads them, keeps the first part's names for all."""
    parts = {"train-00000-of-00002": ([0, 1, 2] * 5, list("abc")), "train-00001-of-00002": (second, names)}
    for name, (values, some) in {**parts, "validation": ([0, 1] * 5, list("abc"))}.items():
        with (tmp_path / f"{name}.parquet").open("wb") as file:
            named_table(values, some).to_parquet(file)
    with pytest.raises(UsageError, match=r"its classes of label are not those of train-00000-of-00002.parquet"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "validation", "kind", "said"),
    [
        (
            ([0, 1], "15"),
            ([1, 5], None),
            "auto",
            "the train split names its classes 1, 5, and the validation split has n",
        ),
        (
            ([1, 5], None),
            ([0, 1], "15"),
            "auto",
            "the validation split names its classes 1, 5, and the train split has n",
        ),
        (([0, 1], "xy"), ([0, 1], "yx"), "regression", "names its classes x, y, and the validation split y, x; write"),
        (([0, 1], "xy"), ([0, 2], None), "auto", "the validation split has the label 2, which is not one of the 2"),
        (([[0], [1]], "xy"), ([[0], [1]], None), "auto", "row 1 of the validation split has 0, which is no class"),
        (([[0, 1], [1, 0]], None), ([[0], [1]], "xy"), "auto", "its lists are neither of words, nor of one 0 or 1"),
    ],
    ids=str,
)
def test_names_and_numbers_that_may_not_be_the_same_are_refused(train, validation, kind, said):
    splits = {
        key: named_table(values, some and list(some))
        for key, (values, some) in {"train": train, "validation": validation}.items()
    }
    with pytest.raises(UsageError, match=said):
        read_labels(splits, ["label"], None, kind)


def test_named_numbers_are_regressed_on_as_what_they_say():
    splits = {"train": named_table([0, 1, 1], ["1", "5"]), "validation": named_table([0, 1, 1], ["5", "1"])}
    labels = read_labels(splits, ["label"], None, "regression")
    assert {key: values.tolist() for key, values in labels.values.items()} == {
        "train": [1, 5, 5],
        "validation": [5, 1, 1],
    }


@pytest.mark.parametrize(
    ("values", "left"),
    [
        (["a", "", None, "b"], ["a", "b"]),
        (["a", " ", "b"], ["a", "b"]),
        ([1.0, float("nan"), -1.0], [1.0]),
        ([0.5, float("nan"), -1.0], [0.5, -1.0]),
        ([1, -1, None, 2], [1, 2]),
        ([1.0, -1.0, 2.0], [1.0, 2.0]),
        ([0.5, -1.0, None], [0.5, -1.0]),
        (["1", "-1", "2"], ["1", "2"]),
        ([True, None], [True]),
        ([[0, 1], None], [[0, 1]]),
    ],
    ids=str,
)
def test_rows_without_a_label_are_left_out_and_counted(values, left):
    rows = datasets.Dataset.from_dict({"label": values})
    kept, note = drop_unlabelled({"train": rows}, ["label"])
    assert kept["train"]["label"][:] == left
    assert note == f"left out without a label (empty, or -1): {len(values) - len(left)} of {len(values)} train rows"
    assert drop_unlabelled(kept, ["label"])[1] == ""


def test_a_file_with_lost_labels_is_trained_on_without_these_rows(tmp_path):
    content = [{"text": f"the cat {i}", "label": None if i in (3, 5) else i % 2} for i in range(42)]
    write(tmp_path, "csv", "a", content)
    with pytest.raises(UsageError, match=r"row 4 .* no label \(2 in all\); .* with --drop-unlabelled"):
        load_data(str(tmp_path / "a.csv"))
    data = load_data(str(tmp_path / "a.csv"), drop_unlabelled=True)
    assert sum(map(len, data.splits.values())) == 40 and "2 of 42 train rows" in data.note


def test_whole_floats_of_the_validation_split_are_the_whole_numbers_of_the_training_split():
    assert labels_of([0, 1], [1.0, 0.0]).values["validation"].tolist() == [1, 0]
    assert labels_of([0.0, 1.0], [0.5, 0.0]).names is None
    regressed = labels_of([0.5, 1.5], [1, 0])
    assert regressed.values["validation"].dtype == np.float32


def test_words_of_a_task_have_the_order_of_the_task():
    """MNLI's entailment is class 0 in the task table, and in every model that was trained on it."""
    labels = labels_of(["neutral", "contradiction", "entailment"], ["neutral"], task=GLUE["mnli"])
    assert labels.names == ["entailment", "neutral", "contradiction"]
    assert labels.values["train"].tolist() == [1, 2, 0] and labels.values["validation"].tolist() == [1]
    assert labels_of([1, 2, 3], [1]).names == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("labels", [["bad", "good"], [1, 2], [False, True], [0.0, 1.0]], ids=str)
def test_labels_of_a_file_are_numbers_of_classes_when_they_are_tokenized(labels, kind, tmp_path, tiny_tokenizer):
    content = [{"sentence": f"the cat {i}", "label": labels[i % 2]} for i in range(12)]
    write(tmp_path, kind, "train", content)
    write(tmp_path, kind, "validation", content)
    data = load_data(str(tmp_path))
    names = [str(int(name)) if isinstance(name, float) else str(name) for name in labels]
    assert data.label_names == names and data.metrics == ("accuracy", "f1")
    assert tokenize(data, tiny_tokenizer, 16)["validation"].dense["label"].tolist() == [0, 1] * 6


def test_float_labels_are_regression(tmp_path, tiny_tokenizer):
    content = [{"sentence": f"the cat {i}", "score": i / 7} for i in range(12)]
    write(tmp_path, "csv", "train", content)
    write(tmp_path, "csv", "validation", content)
    data = load_data(str(tmp_path))
    assert data.label_names is None and data.metrics == ("pearson", "spearmanr")
    assert "the labels in score are floats: a number is predicted" in data.note
    store = tokenize(data, tiny_tokenizer, 16)["train"]
    assert store.dense["label"].dtype == np.float32
    np.testing.assert_array_equal(store.dense["label"], np.array([row["score"] for row in content], np.float32))


def test_a_text_that_no_model_reads_to_its_end_is_refused(tmp_path):
    """A tokenizer takes 100 bytes for each of its characters: 30 million of them took 3.4 GB and a minute."""
    for kind, said in (
        ("csv", "line 2 holds a cell of more than"),
        ("jsonl", "row 1 of the train split has 1,000,001"),
    ):
        write(tmp_path, kind, "a", [{"text": "a" * (1_000_001 if i == 0 else 9), "label": i % 2} for i in range(12)])
        with pytest.raises(UsageError, match=said):
            load_data(str(tmp_path / f"a.{kind}"))


@pytest.mark.parametrize("kind", ["words", "numbers"])
def test_more_than_a_thousand_classes_are_taken_where_the_user_says_so(kind):
    values = [f"class {i:04}" if kind == "words" else i for i in range(1500)] * 2
    remedy = "name another column, or say that they are with --task single"
    with pytest.raises(UsageError, match=f"1,500 different labels in 3,000 rows are no classes; {remedy}") as failure:
        labels_of(values, values[:3])
    assert ("--task regression" in str(failure.value)) == (kind == "numbers")
    labels = labels_of(values, values[:3], kind="single")
    assert len(labels.names) == 1500 and labels.values["validation"].tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="1,500 different labels in 1,500 rows are no classes; name another column"):
        labels_of(values[:1500], values[:3], kind="single")
