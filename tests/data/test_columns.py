"""Which columns are text and which one is the label, and what the labels mean: the only reading of a file, or none.

The reference is the table itself; there is no library that chooses columns.

    python -m pytest tests/data/test_columns.py
"""

import numpy as np
import pytest
from tables import write

from nanofinetune.data.load import load_data
from nanofinetune.data.tokens import tokenize


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


def test_float_labels_are_regression(tmp_path, tiny_tokenizer):
    content = [{"sentence": f"the cat {i}", "score": i / 7} for i in range(12)]
    write(tmp_path, "csv", "train", content)
    write(tmp_path, "csv", "validation", content)
    data = load_data(str(tmp_path))
    assert data.label_names is None and data.metrics == ("pearson", "spearmanr")
    store = tokenize(data, tiny_tokenizer, 16)["train"]
    assert store.dense["label"].dtype == np.float32
    np.testing.assert_array_equal(store.dense["label"], np.array([row["score"] for row in content], np.float32))
