"""The five validation rows that a terminal shows, and the file that all of them are written to.

python -m pytest tests/run/test_answers.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanofinetune.run.answers import Answers, columns, fitted


def answers(logits, labels, names=("no", "yes"), multi=False, texts=None):
    texts = [[f"text {i}"] for i in range(len(labels))] if texts is None else texts
    made = Answers(SimpleNamespace(texts=texts, label_names=names and list(names), multi=multi), np.array(labels))
    made.logits = torch.tensor(logits)
    return made


def rows(found):
    return [line["row"] - 1 for line in found.five()]


def test_the_five_rows_hold_two_wrong_ones():
    """Those of which the model is surest; in the order of the split."""
    logits = [[0.0, float(k)] for k in (1, 2, 9, 3, 1, 1, 8)]
    assert rows(answers(logits, [1, 0, 1, 0, 1, 1, 0])) == [0, 2, 3, 4, 6]
    assert rows(answers(logits, [1, 1, 1, 1, 1, 1, 1])) == [0, 1, 2, 3, 4]
    assert rows(answers(logits, [0, 0, 0, 0, 0, 0, 0])) == [0, 1, 2, 3, 6]
    assert rows(answers(logits[:2], [0, 1])) == [0, 1]


def test_with_many_classes_fewer_rows_are_kept():
    """A file of 10,000 rows with 10,000 probabilities each would have a gigabyte."""
    names, labels = [f"class {i}" for i in range(10_000)], np.zeros(10_000, np.int64)
    data = SimpleNamespace(texts=[["a text"]] * 10_000, label_names=names, multi=False)
    assert Answers(data, labels).shape == (200, 10_000)
    data.label_names = ["no", "yes"]
    assert Answers(data, labels).shape == (10_000, 2)


def test_numbers_show_the_two_that_are_furthest_off():
    assert rows(answers([[float(k)] for k in (1, 2, 9, 3, -7, 1, 1)], [1.0] * 7, None)) == [0, 1, 2, 3, 4]
    assert rows(answers([[float(k)] for k in (1, 2, 2, 3, 1, 9, 9)], [1.0] * 7, None)) == [0, 1, 2, 5, 6]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_the_table_fits_the_terminal(kind, width):
    """Also with wide characters, long names, and what a terminal would obey."""
    texts = [["\u732b" * 90, "b" * 90], ["a\x1b[2Jb\nc" * 20, "b"], ["short", ""]]
    if kind == "regression":
        made = answers([[1.0], [float("nan")], [3.0]], [1.0, 2.0, 3.0], None, texts=texts)
    elif kind == "multi":
        names = ("\x1b[2J", "a" * 80)
        made = answers([[1.0, -1.0], [2.0, 2.0], [-1.0, -1.0]], [[1.0, 0.0]] * 3, names, multi=True, texts=texts)
    else:
        made = answers([[1.0, -1.0], [2.0, 5.0], [-1.0, -2.0]], [0, 0, 0], ("equivalent", "a" * 80), texts=texts)
    lines = made.table(width)
    assert len(lines) == 6 and all(columns(line) <= width and line.isprintable() for line in lines)
    assert ["..." in line for line in lines[1::2]] == [True, True, False] and lines[5] == " " * 11 + "short |"
    first = {"single": "equivalent, said equivalent (0.88)", "multi": "\\x1b[2J, said \\x1b[2J (0.73)"}
    assert lines[0] == f"row 1      label {first.get(kind, '1, said 1')}"
    assert lines[2].endswith({"regression": "2, said NaN", "multi": ".. (0.88), wrong"}.get(kind, ".. (0.95), wrong"))


def test_the_file_is_json_whatever_the_texts_and_numbers_are(tmp_path):
    made = answers([[float("nan"), 0.0], [1.0, 1.0]], [0, 1], texts=[["\ud83d\n\u2028", "b"], ["c", ""]])
    assert made.write(tmp_path / "validation.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert lines[0]["text"] == "\ud83d\n\u2028" and lines[0]["probabilities"] == [None, None]
    assert lines[1] == {
        "row": 2, "text": "c", "text_pair": "", "label": "yes", "prediction": "no", "probabilities": [0.5, 0.5]
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["validation.jsonl"]


def test_without_an_evaluation_there_is_no_file(tmp_path):
    made = answers([[0.0, 0.0]], [0])
    made.logits = None
    assert made.write(tmp_path / "validation.jsonl") == 0 and made.five() == []
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused():
    made = answers([[0.0, 0.0]], [0])
    assert made.misfit(torch.zeros(1, 2)) == ""
    for wrong in (torch.zeros(2, 2), torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int64), [[0.0, 0.0]], None):
        assert made.misfit(wrong) == "answers are not those of these validation rows"


def test_text_is_cut_by_columns():
    assert fitted("\u732b\u732b\u732b", 5) == "\u732b..." and columns(fitted("\u732b" * 9, 7)) <= 7
    assert fitted("a long text", 2) == ".." and fitted("a long text", -1) == ""
    assert fitted("e\u0301tude", 5) == "e\u0301tude"
