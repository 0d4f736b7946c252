"""What is said of texts that give the answer away, and what is not.

The reference is the table itself; no library looks.

    python -m pytest tests/data/test_leaks.py
"""

import datasets
import numpy as np
import pytest
from tables import write

from nanofinetune.data import leaks as leaks_module
from nanofinetune.data.leaks import leaks
from nanofinetune.data.load import load_data


def named(texts, labels, names):
    rows = datasets.Dataset.from_dict({"text": texts})
    return leaks({"train": rows}, ["text"], np.array(labels), names)


@pytest.mark.parametrize(
    ("text", "names", "noted"),
    [
        (lambda label, i: f"rated {label}: nice {i}", ["bad", "good"], True),
        (lambda label, i: f"Rated {label.upper()}! {i}", ["very bad", "very good"], True),
        (lambda label, i: f"{label}/5 and the cat", ["1", "5"], True),
        (lambda label, i: f"rated {label}: nice" if i % 3 == 0 else "nice", ["bad", "good"], True),
        (lambda label, i: f"good or bad {i}", ["bad", "good"], False),
        (lambda label, i: f"the goodness of badges {i}", ["bad", "good"], False),
        (lambda label, i: f"the cat {i}", ["bad", "good"], False),
        (lambda label, i: f"it is {label}" if i == 4 else "a cat", ["bad", "good"], False),
    ],
)
def test_a_text_that_names_its_label_is_noted(text, names, noted):
    labels = [i // 2 % 2 for i in range(40)]
    found = named([text(names[label], i) for i, label in enumerate(labels)], labels, names)
    assert bool(found) == noted
    if noted:
        assert found[0].endswith("of 40 training texts name their own label")


def test_a_validation_text_in_training_is_noted(tmp_path):
    content = [{"a": f"the cat {i}", "b": "it sat", "label": i % 2} for i in range(12)]
    write(tmp_path, "jsonl", "train", content)
    write(tmp_path, "jsonl", "validation", [*content[:2], {"a": "the cat 3", "b": "it ran", "label": 0}])
    note = load_data(str(tmp_path)).note
    assert "2 of 3 validation texts are in the training split too" in note


def test_repeated_rows_of_one_file_are_noted(tmp_path):
    write(tmp_path, "csv", "a", [{"text": "the cat", "label": i % 2} for i in range(40)])
    assert "4 of 4 validation texts are in the training split too" in load_data(str(tmp_path / "a.csv")).note


def test_only_so_many_texts_are_looked_at(monkeypatch):
    """Bounded, whatever the size of the table."""
    monkeypatch.setattr(leaks_module, "MOST_READ", 10)
    names, labels = ["bad", "good"], [i % 2 for i in range(1000)]
    assert named([f"{names[k]} cat" for k in labels], labels, names) == ["10 of 10 training texts name their own label"]
    monkeypatch.setattr(leaks_module, "MOST_COMPARED", 1)
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    found = leaks({"train": rows, "validation": rows}, ["text"], np.array([0.5, 1.5]), None)
    assert found == ["1 of 2 validation texts are in the training split too"]
