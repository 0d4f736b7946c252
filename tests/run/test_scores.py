"""What an evaluation finds, against scikit-learn.

python -m pytest tests/run/test_scores.py
"""

import numpy as np
import pytest
import torch

from nanofinetune.run.scores import MOST, Scores

sklearn = pytest.importorskip("sklearn.metrics")


def labels(classes, rows, seed, used=None):
    rng = np.random.default_rng(seed)
    return (torch.from_numpy(rng.integers(0, used or classes, rows)) for _ in range(2))


@pytest.mark.parametrize(
    ("classes", "used", "rows"), [(2, 2, 50), (5, 5, 200), (6, 3, 40), (4, 4, 1), (MOST, MOST, 999)]
)
def test_scores_match_sklearn(classes, used, rows):
    """Also where a class occurs nowhere, or is never predicted: 0/0 is 0, and the mean leaves out what nobody saw."""
    true, found = labels(classes, rows, seed=classes, used=used)
    scores = Scores(("accuracy",), [f"class {k}" for k in range(classes)])
    for begin in range(0, rows, 7):
        scores.add_batch(predictions=found[begin : begin + 7], references=true[begin : begin + 7])
    result = scores.compute()
    assert result["accuracy"] == sklearn.accuracy_score(true, found)
    assert result["macro_f1"] == pytest.approx(sklearn.f1_score(true, found, average="macro"), abs=1e-15)
    each = sklearn.precision_recall_fscore_support(true, found, labels=range(classes), zero_division=0)
    for name, expected in zip(("precision", "recall", "f1", "rows"), each, strict=True):
        assert [one[name] for one in scores.details["classes"]] == pytest.approx(expected.tolist(), abs=1e-15)
    matrix = sklearn.confusion_matrix(true, found, labels=range(classes)).tolist()
    assert scores.details["confusion_matrix"] == matrix
    assert [one["label"] for one in scores.details["classes"]] == [f"class {k}" for k in range(classes)]


def test_ranks_add_up_to_one_process():
    true, found = labels(3, 60, seed=0)
    whole, parts = Scores(("accuracy",), "abc"), [Scores(("accuracy",), "abc") for _ in range(3)]
    whole.add_batch(predictions=found, references=true)
    for part, rows in zip(parts, ([*range(10)], [*range(10, 60)], []), strict=True):
        part.add_batch(predictions=found[rows], references=true[rows])
    parts[0].load_state(sum(part.state() for part in parts))  # type: ignore[arg-type]
    assert len(parts[0]) == len(whole) == 60
    assert parts[0].compute() == whole.compute() and parts[0].details == whole.details


def test_many_classes_have_numbers_and_no_matrix():
    """Labels above Metric's own 128 are counted one by one."""
    true, found = labels(300, 2000, seed=1)
    scores = Scores(("accuracy",), [str(k) for k in range(300)])
    scores.add_batch(predictions=found, references=true)
    assert scores.compute()["macro_f1"] == pytest.approx(sklearn.f1_score(true, found, average="macro"), abs=1e-15)
    assert list(scores.details) == ["classes"] and len(scores.details["classes"]) == 300


def test_numbers_have_their_metrics_alone():
    scores = Scores(("pearson", "spearmanr"), None)
    scores.add_batch(predictions=torch.tensor([1.0, 2.0, 4.0]), references=torch.tensor([1.0, 2.0, 3.0]))
    assert scores.reduction == "cat" and scores.state().shape == (2, 3)
    assert set(scores.compute()) == {"pearson", "spearmanr"} and scores.details == {}
