"""Several labels a row: which classes there are, which of them a row has, and how a model of them is scored.

>>> import pyarrow as pa
>>> names, values = classes_of_lists({"train": pa.chunked_array([[["spam", "rude"], [], ["rude"]]])}, "tags")
>>> names, values["train"].tolist()
(['rude', 'spam'], [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
>>> metric = MultiLabelMetric(2)
>>> metric.add_batch(predictions=torch.tensor([[2.0, -1.0]]), references=torch.tensor([[1.0, 1.0]]))
>>> {name: round(value, 3) for name, value in metric.compute().items()}
{'micro_f1': 0.667, 'macro_f1': 0.5, 'exact_match': 0.0}

Underneath: with the problem_type "multi_label_classification" a head of transformers (5.23) takes
`torch.nn.BCEWithLogitsLoss` of float labels (rows, classes); scores are those of `sklearn.metrics.f1_score` and
`sklearn.metrics.accuracy_score`.
  - There: all rows are kept; a class that is neither true nor predicted warns, and counts as 0.
  - Here: three counts a class, which N ranks add up in one all-reduce; such a class is named in `undefined`.

Proof: test_scores_of_several_labels_equal_sklearn, test_the_loss_is_transformers_own in tests/data/test_multilabel.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanofinetune.ground.errors import UsageError

METRICS = ("micro_f1", "macro_f1", "exact_match")
MOST = 1_000  # classes

# --- what the labels say ----------------------------------------------------------------------------------------------


def classes_of_columns(splits: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Split -> column -> its cells -> (the columns' names, split -> (rows, classes) float32 of 0.0 and 1.0).

    Raises UsageError for a cell that is neither 0 nor 1.
    """
    names, values = list(splits["train"]), {}
    for key, columns in splits.items():
        parts = []
        for name, cells in columns.items():
            column = np.array([_yes_or_no(value) for value in cells.to_pylist()], np.float32)
            if np.isnan(column).any():
                row = int(np.isnan(column).argmax())
                text = f"row {row + 1} of the {key} split is {cells[row].as_py()!r}"
                raise UsageError(f"--label-column {name}: {text}; of several columns each holds 0 and 1")
            parts.append(column)
        values[key] = np.stack(parts, axis=1)
    return names, values


def classes_of_lists(
    splits: Mapping[str, Any], column: str, named: Mapping[str, list[str]] | None = None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Split -> a column of lists -> (names, split -> (rows, classes) float32 of 0.0 and 1.0).

    A list holds the words that a row has, or 0 or 1 for every class in turn. Of a split in `named` it holds numbers of
    these names, which stand for the same class by name, not by number. Raises UsageError for any other list.
    """
    lists = {key: cells.to_pylist() for key, cells in splits.items()}
    where = f"--label-column {column}"
    for key, known in (named or {}).items():
        lists[key] = [
            [_name_of(item, known, f"{where}: row {i} of the {key} split") for item in row]
            for i, row in enumerate(lists[key], 1)
        ]
    items = {item for rows in lists.values() for row in rows for item in row}
    names = list((named or {}).get("train", ()))
    if names or all(isinstance(item, str) for item in items):
        names += sorted({item for item in items if isinstance(item, str)} - set(names))
        places = {name: i for i, name in enumerate(names)}
        for key, rows in lists.items():
            for i, row in enumerate(rows, 1):
                if odd := [item for item in row if item not in places]:
                    raise UsageError(f"{where}: row {i} of the {key} split has {odd[0]}, which is no class")
            lists[key] = [[places[item] for item in row] for row in rows]
    else:
        lengths = {len(row) for rows in lists.values() for row in rows}
        if len(lengths) > 1 or None in items or any(np.isnan(_yes_or_no(item)) for item in items):
            raise UsageError(f"{where}: its lists are neither of words, nor of one 0 or 1 for each class; write such")
        names = [str(i) for i in range(lengths.pop())]
        lists = {key: [[i for i, item in enumerate(row) if item] for row in rows] for key, rows in lists.items()}
    if not 2 <= len(names) <= MOST:
        raise UsageError(f"{where}: its lists hold {len(names):,} classes; between 2 and {MOST:,} can be told apart")
    values = {key: np.zeros((len(rows), len(names)), np.float32) for key, rows in lists.items()}
    for key, rows in lists.items():
        for i, row in enumerate(rows):
            values[key][i, row] = 1
    return names, values


def _name_of(item: Any, names: Sequence[str], where: str) -> str:
    if item is None or not 0 <= item < len(names):
        raise UsageError(f"{where} has {item}, which is no class")
    return names[item]


def _yes_or_no(value: Any) -> float:
    """1.0, 0.0, or NaN for what is neither."""
    return {"0": 0.0, "1": 1.0, 0: 0.0, 1: 1.0}.get(value, np.nan)


# --- what a model of them scores --------------------------------------------------------------------------------------


class MultiLabelMetric:
    """Micro and macro F1 and the share of rows with all classes right, with the methods of run/scores.py's Scores.

    Its state is one table (3, classes + 1): how often each class was true, was predicted, was both. In the last column
    stand the rows, and those of which every class is right.
    """

    names = METRICS
    reduction = "sum"

    def __init__(self, classes: int) -> None:
        self.undefined: dict[str, str] = {}
        self.details: dict[str, Any] = {}  # none, where run/scores.py has those of single classes
        self._table = torch.zeros(3, classes + 1, dtype=torch.int64)

    def add_batch(self, *, predictions: Tensor, references: Tensor) -> None:
        """`predictions`: logits (B, classes), yes where they are above 0. `references`: (B, classes) of 0.0 and 1.0."""
        said, true = predictions > 0, references > 0.5  # as the pipeline: sigmoid above 0.5
        counts = torch.stack([true.sum(0), said.sum(0), (said & true).sum(0)])  # (3, classes)
        right = (said == true).all(dim=1).sum()
        rows = torch.stack([right.new_tensor(len(true)), right, right])
        self._table = self._table.to(counts.device) + torch.cat([counts, rows.unsqueeze(1)], dim=1)

    def __len__(self) -> int:
        return int(self._table[0, -1])

    def state(self) -> Tensor:
        """A copy of the table, which those of other ranks can be added to."""
        return self._table.clone()

    def load_state(self, state: Tensor) -> None:
        """Take the sum of several tables for this one."""
        self._table = state.clone()

    def compute(self) -> dict[str, float]:
        """The scores of all rows; then none is left. `undefined` says which class is neither true nor predicted."""
        true, predicted, both = self._table.tolist()
        rows, exact = true.pop(), predicted.pop()
        both.pop()
        # F1 = 2 tp / (true + predicted), 0 where that is 0/0, as scikit-learn has it
        each = [2 * b / (t + p) if t + p else 0.0 for t, p, b in zip(true, predicted, both, strict=True)]
        unseen = [k for k, (t, p) in enumerate(zip(true, predicted, strict=True)) if t + p == 0]
        self.undefined = {}
        if unseen:
            which = ", ".join(map(str, unseen[:6]))
            self.undefined["macro_f1"] = f"no row has or is given class {which}: its F1 is 0/0 and counts as 0"
        whole = sum(true) + sum(predicted)
        if whole == 0:
            self.undefined["micro_f1"] = "no row has or is given any class: F1 is 0/0"
        self._table = torch.zeros_like(self._table)
        micro = 2 * sum(both) / whole if whole else 0.0
        return {"micro_f1": micro, "macro_f1": sum(each) / len(each), "exact_match": exact / rows}
