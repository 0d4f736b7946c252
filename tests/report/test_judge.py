"""Calibration and the tables of classes are scikit-learn's of the same rows.

python -m pytest tests/report/test_judge.py
"""

import numpy as np
import pytest

from nanofinetune.report.judge import BINS, Judged

NAMES = ["no", "maybe", "yes"]


def rows(count=300, seed=0):
    """(row as in validation.jsonl, true class, probabilities (3,)) of each."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        sure = rng.dirichlet([0.7, 0.5, 1.0])
        true = int(rng.choice(3, p=sure)) if rng.random() < 0.7 else int(rng.integers(3))
        line = {"row": k, "text": f"row {k}", "label": NAMES[true], "prediction": NAMES[int(sure.argmax())]}
        yield line | {"probabilities": sure.tolist()}, true, sure


def test_calibration_is_sklearns():
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    judged, right, sure = Judged(NAMES), [], []
    for row, true, found in rows():
        assert judged.add(row)
        right.append(true == found.argmax())
        sure.append(found.max())
    share, mean = calibration_curve(right, sure, n_bins=BINS)
    count, total, correct = judged.bins[judged.bins[:, 0] > 0].T
    np.testing.assert_allclose(correct / count, share, rtol=1e-12)
    np.testing.assert_allclose(total / count, mean, rtol=1e-12)
    assert judged.error() == pytest.approx((count / count.sum() * abs(share - mean)).sum(), rel=1e-12)


def test_tables_of_rows_are_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    judged, labels, found = Judged(NAMES), [], []
    for row, true, sure in rows():
        judged.add(row)
        labels.append(true)
        found.append(int(sure.argmax()))
    assert judged.confusion.tolist() == metrics.confusion_matrix(labels, found).tolist()
    wanted = metrics.precision_recall_fscore_support(labels, found)
    for k, key in enumerate(("precision", "recall", "f1", "rows")):
        np.testing.assert_allclose([row[key] for row in judged.table()], wanted[k], rtol=1e-12)


def test_several_classes_a_row_are_sklearns_class_by_class():
    metrics = pytest.importorskip("sklearn.metrics")
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(0)
    sure, true = rng.random((200, 3)), rng.random((200, 3)) < 0.4
    judged = Judged(NAMES)
    for k in range(200):
        label, said = ([NAMES[j] for j in np.flatnonzero(flags[k])] for flags in (true, sure > 0.5))
        assert judged.add({"text": "", "label": label, "prediction": said, "probabilities": sure[k].tolist()})
    wanted = metrics.precision_recall_fscore_support(true, sure > 0.5, zero_division=0)
    for k, key in enumerate(("precision", "recall", "f1", "rows")):
        np.testing.assert_allclose([row[key] for row in judged.table()], wanted[k], rtol=1e-12)
    share, mean = calibration_curve(true.ravel(), sure.ravel(), n_bins=BINS)
    np.testing.assert_allclose(judged.bins[:, 2] / judged.bins[:, 0], share, rtol=1e-12)
    np.testing.assert_allclose(judged.bins[:, 1] / judged.bins[:, 0], mean, rtol=1e-12)


def test_the_hardest_rows_are_those_of_a_sorted_list():
    judged, all_rows = Judged(NAMES, hardest=7), list(rows(100))
    for row, _, _ in all_rows:
        judged.add(row)
    wanted = sorted(all_rows, key=lambda item: item[2][item[1]])[:7]
    assert [row["row"] for row in judged.hardest()] == [row["row"] for row, _, _ in wanted]


def test_numbers_are_judged_by_their_distance():
    judged = Judged([], hardest=2)
    for label, prediction in ((1.0, 1.5), (2, 5.0), (3.0, 3.0)):
        assert judged.add({"text": "a", "label": label, "prediction": prediction})
    assert judged.kind == "regression" and judged.pairs == [(1.0, 1.5), (2.0, 5.0), (3.0, 3.0)]
    assert [row["hardness"] for row in judged.hardest()] == [3.0, 0.5]
    assert judged.error() != judged.error(), "NaN: numbers have no probabilities"


GOOD = {"text": "a", "label": "no", "prediction": "yes", "probabilities": [0.1, 0.2, 0.7]}


@pytest.mark.parametrize(
    "change",
    [
        {"label": "never"}, {"prediction": "never"}, {"prediction": None}, {"label": 3}, {"label": ["no"]},
        {"probabilities": [0.1, 0.9]}, {"probabilities": None}, {"probabilities": [0.1, 0.2, "0.7"]},
        {"probabilities": [0.1, 0.2, float("nan")]}, {"probabilities": [0.1, 0.2, 1.7]}, {"text": 7}, {"text_pair": []},
        {"probabilities": [True, False, False]},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_cannot_be_is_left_out_and_changes_nothing(change):
    judged = Judged(NAMES)
    judged.add(GOOD)
    before = judged.confusion.tolist(), judged.bins.tolist(), judged.rows
    assert not judged.add(GOOD | change)
    assert (judged.confusion.tolist(), judged.bins.tolist(), judged.rows) == before
