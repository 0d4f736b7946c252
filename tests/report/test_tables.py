"""The tables of classes: result.json's numbers where it has them, else those of the rows.

python -m pytest tests/report/test_tables.py
"""

import json
import re

import pytest
from runs import NAMES, write_run

from nanofinetune.report.read import Record, read_run
from nanofinetune.report.tables import class_rows, confusion, hard, matrix_of


def test_the_tables_are_those_of_result_json(tmp_path):
    run = read_run(write_run(tmp_path))
    names, counts = matrix_of(run) or ([], None)
    assert counts is not None
    assert names == NAMES and counts.tolist() == [[12, 8], [6, 14]] != run.judged.confusion.tolist()
    assert class_rows(run.result["classes"])[1] == ("same", [0.75, 0.6, 0.75, 20, 22])
    assert re.findall(r">(\d+)</td>", confusion(names, counts)) == ["12", "8", "6", "14"]


@pytest.mark.parametrize(
    "changes",
    [{"confusion_matrix": None}, {"confusion_matrix": [[1, 2]]}, {"confusion_matrix": [[1, 2], [3, "x"]]},
     {"confusion_matrix": [[1, -2], [3, 4]]}, {"confusion_matrix": [[1, 2], [3, 1e999]]}, {"confusion_matrix": {}},
     {"classes": [{"label": name} for name in NAMES], "confusion_matrix": 7}],
    ids=str,
)  # fmt: skip
def test_where_there_is_no_table_it_is_that_of_the_rows(changes, tmp_path):
    run = read_run(write_run(tmp_path, **changes))
    names, counts = matrix_of(run) or ([], None)
    assert counts is not None
    assert names == NAMES and counts.tolist() == run.judged.confusion.tolist() and counts.sum() == 40
    assert [name for name, _ in class_rows(run.judged.table())] == NAMES


def test_many_classes_give_a_list_of_mistakes():
    names = [f"class {k}" for k in range(50)]
    counts = [[100 if k == j else 0 for j in range(50)] for k in range(50)]
    counts[3][7], counts[9][1] = 4, 9
    run = Record("a", {"classes": [{"label": name} for name in names], "confusion_matrix": counts})
    found = matrix_of(run)
    assert found is not None
    told = re.sub(r"<[^>]+>", " ", confusion(*found)).split("  ")
    assert [part.strip() for part in told if part.strip()] == [
        "The mistakes that are made most often.", "true", "taken for", "rows",
        "class 9", "class 1", "9", "class 3", "class 7", "4",
    ]  # fmt: skip


def test_a_row_shows_the_likeliest_classes_and_the_true_one():
    names = [f"c{k}" for k in range(9)]
    sure = [0.3, 0.25, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01]
    told = hard({"row": 7, "text": "<i>", "label": "c8", "prediction": "c0", "probabilities": sure}, names)
    assert re.findall(r"<span>(c\d)</span>", told) == ["c0", "c1", "c2", "c8"]
    assert "&lt;i&gt;" in told and "c8, taken for <b>c0</b>" in told and "row 7" in told
    assert json.dumps(sure[8]) in told
