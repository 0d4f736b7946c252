"""What the rows that a model was asked about say of it: what it takes for what, how sure it is, where it is most wrong.

>>> judged = Judged(["no", "yes"], hardest=1)
>>> judged.add({"row": 0, "text": "fine", "label": "yes", "prediction": "yes", "probabilities": [0.1, 0.9]})
True
>>> judged.add({"row": 1, "text": "fine?", "label": "no", "prediction": "yes", "probabilities": [0.2, 0.8]})
True
>>> judged.confusion.tolist(), [row["text"] for row in judged.hardest()], round(judged.error(), 2)
([[0, 1], [0, 1]], ['fine?'], 0.45)

Underneath: `sklearn.metrics.confusion_matrix`, `sklearn.metrics.precision_recall_fscore_support` and
`sklearn.calibration.calibration_curve` (scikit-learn 1.9) need all predictions in memory.
  - Here rows come one at a time from a file; counts and the few hardest rows stay.
  - Of several classes, sure is how sure the model is of its answer; of classes that go together, of each class's yes.
  - The expected calibration error is Guo et al. 2017's, with ten bins of one width.

Proof: test_calibration_is_sklearns, test_tables_of_rows_are_sklearns in tests/report/test_judge.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 10
MOST = 1000  # classes whose confusions are counted
Row = Mapping[str, Any]


class Judged:
    """Rows of validation.jsonl, each looked at once.

    Args:
        classes: names, in the order of the probabilities; none: labels are numbers.
        hardest: how many rows are kept.

    Attributes:
        kind: "single", "multi" or "regression", as the first row says; "" before.
        rows: how many were added.
        confusion: (classes, classes), a row for each true class; of "multi" (classes, 3): true, predicted, both.
        bins: (BINS, 3): rows, the sum of how sure the model was, and how many of them were right.
        pairs: (label, prediction) of the first rows of a regression.
    """

    def __init__(self, classes: Sequence[str], hardest: int = 20, pairs: int = 1000) -> None:
        self.classes = list(classes)
        self.index = {name: k for k, name in enumerate(self.classes)}
        self.kind, self.rows, self.most, self.most_pairs = "", 0, hardest, pairs
        self.confusion = np.zeros((0, 0), dtype=np.int64)
        self.bins = np.zeros((BINS, 3))
        self.pairs: list[tuple[float, float]] = []
        self._heap: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, row: Row) -> bool:
        """Add one row -> whether it is one: of the first row's kind, with known names and probabilities that can be."""
        label, prediction = row.get("label"), row.get("prediction")
        kind = "multi" if type(label) is list else "single" if type(label) is str else "regression"
        if kind != (self.kind or kind) or not all(type(row.get(name, "")) is str for name in ("text", "text_pair")):
            return False
        try:
            hardness = getattr(self, f"_{kind}")(label, prediction, row.get("probabilities"))
        except (KeyError, TypeError, ValueError):  # an unknown name, no list, no number
            return False
        self.kind = kind
        item = (hardness, -self.rows, {**row, "hardness": hardness})
        (heapq.heappush if len(self._heap) < self.most else heapq.heappushpop)(self._heap, item)
        self.rows += 1
        return True

    def hardest(self) -> list[dict[str, Any]]:
        """The rows that the model was most wrong about, the worst first."""
        return [row for _, _, row in sorted(self._heap, reverse=True)]

    def error(self) -> float:
        """The expected calibration error: how far "how sure" is from "how often right", a mean over the rows.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks". NaN where there are no probabilities.
        """
        _, sure, right = self.bins.T
        return float(abs(sure - right).sum() / self.bins[:, 0].sum()) if self.bins[:, 0].any() else math.nan

    def table(self) -> list[dict[str, Any]]:
        """Each class's precision, recall and F1 as result.json has them; 0/0 is 0."""
        if self.kind == "multi":
            true, found, both = self.confusion.T
        else:
            true, found, both = self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()
        return [
            {"label": name, "precision": _share(b, f), "recall": _share(b, t), "f1": _share(2 * b, t + f),
             "rows": int(t), "predicted": int(f)}
            for name, t, f, b in zip(self.classes, true, found, both, strict=False)
        ]  # fmt: skip

    # ---- one row of each kind -> how wrong the model was ----

    def _single(self, label: Any, prediction: Any, probabilities: Any) -> float:
        true, found = self.index[label], self.index[prediction]
        sure = self._probabilities(probabilities)
        size = min(len(self.classes), MOST)
        if not len(self.confusion):
            self.confusion = np.zeros((size, size), dtype=np.int64)
        if true < size and found < size:
            self.confusion[true, found] += 1
        self._count(sure[found], true == found)
        return 1.0 - sure[true]

    def _multi(self, label: Any, prediction: Any, probabilities: Any) -> float:
        true, found = {self.index[name] for name in label}, {self.index[name] for name in prediction}
        sure = self._probabilities(probabilities)
        if not len(self.confusion):
            self.confusion = np.zeros((len(self.classes), 3), dtype=np.int64)
        for column, chosen in enumerate((true, found, true & found)):
            self.confusion[sorted(chosen), column] += 1
        for k, probability in enumerate(sure):
            self._count(probability, k in true)
        return max(abs((k in true) - probability) for k, probability in enumerate(sure))

    def _regression(self, label: Any, prediction: Any, _: Any) -> float:
        pair = _number(label), _number(prediction)
        if len(self.pairs) < self.most_pairs:
            self.pairs.append(pair)
        return abs(pair[0] - pair[1])

    def _probabilities(self, values: Any) -> list[float]:
        if type(values) is not list or len(values) != len(self.classes) or not values:
            raise ValueError
        found = [_number(value) for value in values]
        if not all(0 <= value <= 1 for value in found):
            raise ValueError
        return found

    def _count(self, sure: float, right: bool) -> None:
        self.bins[min(int(sure * BINS), BINS - 1)] += (1, sure, right)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # NaN is not either
        raise ValueError
    return float(value)


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0
