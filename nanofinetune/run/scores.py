"""What an evaluation finds beyond the task's metrics: macro F1, each class's numbers, the confusion matrix.

>>> scores = Scores(("accuracy",), ["no", "yes"])
>>> scores.add_batch(predictions=torch.tensor([0, 1, 1]), references=torch.tensor([0, 1, 0]))
>>> scores.compute()
{'accuracy': 0.6666666666666666, 'macro_f1': 0.6666666666666666}
>>> scores.details["confusion_matrix"]  # a row for each true class, a column for each predicted one
[[1, 1], [0, 1]]

Underneath: `sklearn.metrics.f1_score`, `sklearn.metrics.precision_recall_fscore_support`,
`sklearn.metrics.confusion_matrix` (scikit-learn 1.9)
  - need all predictions in one place; here ranks add up counts, in the all-reduce that the metrics need anyway;
  - kept: 0/0 is 0, and the macro mean is over the classes that are true or predicted somewhere;
  - above 100 classes there is no matrix.

Proof: test_scores_match_sklearn, test_ranks_add_up_to_one_process in tests/run/test_scores.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanofinetune.step.metrics import BOTH, PREDICTED, TRUE, Metric

MOST = 100  # classes of a confusion matrix


class Scores:
    """A Metric, and beside it which class is taken for which. With numbers to regress on it is the Metric alone.

    Args:
        names: of metrics.
        classes: the names of the classes; None for numbers.

    Attributes:
        reduction, undefined: the Metric's.
        details: after `compute`, what is no single number: "classes", "confusion_matrix"; empty for numbers.
    """

    def __init__(self, names: Sequence[str], classes: Sequence[str] | None) -> None:
        self.classes = list(classes or ())
        self.metric = Metric(names, num_classes=max(128, len(self.classes)))
        self.reduction, self.undefined = self.metric.reduction, dict[str, str]()
        self.details: dict[str, Any] = {}
        size = len(self.classes) if len(self.classes) <= MOST else 0
        self.confusion = torch.zeros(size, size, dtype=torch.int64)

    def __len__(self) -> int:
        """The number of rows collected."""
        return len(self.metric)

    def add_batch(self, *, predictions: Tensor, references: Tensor) -> None:
        """Add rows: two vectors (n,) on one device."""
        self.metric.add_batch(predictions=predictions, references=references)
        if size := len(self.confusion):
            true, found = references.long(), predictions.long()
            known = (true >= 0) & (true < size) & (found >= 0) & (found < size)
            # Rows of other labels go into one more cell. No look at the values: on a GPU that would wait.
            cells = torch.where(known, true * size + found, size * size)
            counts = torch.zeros(size * size + 1, dtype=torch.int64, device=cells.device)
            counts.index_add_(0, cells, torch.ones_like(cells))
            self.confusion = self.confusion.to(cells.device) + counts[:-1].view(size, size)

    def state(self) -> Tensor:
        """The Metric's state; with a confusion matrix one vector that holds both."""
        state = self.metric.state()
        return torch.cat([state.flatten(), self.confusion.flatten().to(state.device)]) if len(self.confusion) else state

    def load_state(self, state: Tensor) -> None:
        """Replace everything collected with a state: the sum or concatenation of several ranks'."""
        if size := len(self.confusion):
            self.confusion = state[-size * size :].view(size, size).clone()
            state = state[: -size * size].view(3, -1)
        self.metric.load_state(state)

    def compute(self) -> dict[str, float]:
        """The Metric's scores, and macro F1 where there are classes. Sets `details`; forgets the rows."""
        table, confusion = self.metric.state().tolist(), self.confusion.tolist()
        scores = self.metric.compute()
        self.confusion, self.undefined, self.details = self.confusion * 0, self.metric.undefined, {}
        if not self.classes:
            return scores
        each = []
        for k, name in enumerate(self.classes):
            true, found, both = table[TRUE][k + 1], table[PREDICTED][k + 1], table[BOTH][k + 1]
            each.append({
                "label": name, "precision": _share(both, found), "recall": _share(both, true),
                "f1": _share(2 * both, true + found), "rows": true, "predicted": found,
            })  # fmt: skip
        seen = [one["f1"] for one in each if one["rows"] or one["predicted"]]
        self.details = {"classes": each} | ({"confusion_matrix": confusion} if confusion else {})
        return scores | {"macro_f1": sum(seen) / len(seen)}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
