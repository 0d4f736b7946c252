"""Class weights: each class counts as much as any other, however many rows it has.

>>> balanced(np.array([0, 0, 0, 1]), classes=2).tolist()
[0.6666666865348816, 2.0]
>>> labels, logits = torch.tensor([0, 1, -100]), torch.zeros(3, 2)  # -100: a row of padding
>>> round(weighted_loss(logits, labels, torch.tensor([0.5, 1.5])).item(), 4)  # ln 2 x (0.5 + 1.5) / 2 rows
0.6931

Underneath: `sklearn.utils.class_weight.compute_class_weight` (scikit-learn 1.9) for the weights,
`torch.nn.CrossEntropyLoss` (torch 2.13) for the loss.
  - There the mean is divided by the sum of the batch's weights: what a row counts depends on the others of its batch,
    and ranks no longer add up to one process.
  - Here it is divided by the number of rows. Over all rows the weights' mean is 1.

Proof: test_balanced_weights_match_sklearn, test_weighted_ranks_equal_one_process in tests/data/test_balance.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def balanced(labels: np.ndarray, classes: int) -> Tensor:
    """Weights (classes,) of labels (rows,): rows / (classes that occur x rows of the class). 1 for one without rows."""
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(np.where(counts > 0, weights, 1.0), dtype=torch.float32)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over the rows (B,) with a label of weight x cross-entropy; NaN where no row has one, as torch's."""
    total = cross_entropy(logits, labels, weights.to(logits.device, logits.dtype), reduction="sum")
    return total / (labels != -100).sum()


class WeighedLoss:
    """A hook for a classifier: the loss that its forward returns becomes the weighted one. Nothing of it is saved."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("labels") is not None:
            output.loss = weighted_loss(output.logits, kwargs["labels"], self.weights)
        return output
