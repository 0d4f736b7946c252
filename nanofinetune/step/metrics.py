"""Accuracy, F1 and Matthews correlation from three rows of counts; Pearson and Spearman from the values themselves.

>>> metric = load("glue", "mrpc")
>>> metric.add_batch(predictions=[1, 1, 0], references=[1, 0, 0])
>>> metric.add_batch(predictions=[1], references=[1])
>>> metric.compute()
{'accuracy': 0.75, 'f1': 0.8}

Underneath: `evaluate.load` (evaluate 0.4.6) runs a script from the Hub, which calls `sklearn.metrics.f1_score`,
`sklearn.metrics.matthews_corrcoef`, `scipy.stats.pearsonr` and `scipy.stats.spearmanr`.
  - There: every row goes into an Arrow file, which `compute` reads back. Here: three counts for each label, on the
    data's device. N ranks add theirs in one all-reduce.
  - Kept: names, keys, values, the reset after `compute`.
  - Different: 0/0 warns; fractions as labels are refused; correlations use float64.
  - Left out: files, `process_id`, all other metrics.

Proof: test_f1_and_accuracy_equal_sklearn, test_shell_behaves_as_evaluate_metric in tests/step/test_metrics.py.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The configurations of evaluate's "glue" script and the keys of what each computes.
GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    **dict.fromkeys(("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans"), ("accuracy",)),
}
CLASSIFICATION = ("accuracy", "f1", "matthews_correlation")
REGRESSION = ("pearson", "spearmanr")

TRUE, PREDICTED, BOTH = 0, 1, 2  # rows of the table of counts: how often each label was true, was predicted, was both
Score = tuple[float, str]  # the value, and why it is undefined ("" where it is defined)


class UndefinedMetricWarning(UserWarning):
    """A metric is undefined on these rows (0/0, mostly); the value reported is the library's convention."""


# ---------------------------------------------------------------------------------------------- the pure core: counting


def count_labels(predictions: Tensor, references: Tensor, num_classes: int) -> Tensor:
    """The table of counts (3, num_classes + 2), int64, of one batch. Reads nothing back to the host.

    Columns: label -1, labels 0 .. num_classes - 1, and a last column for all other labels. The tables of parts of the
    data add up to the table of all the data.

    Args:
        predictions: labels (n,), int64.
        references: labels (n,), int64, on the same device.
    """

    def column(labels: Tensor) -> Tensor:  # (n,) -> (n,)
        return torch.where((labels >= -1) & (labels < num_classes), labels + 1, num_classes + 1)

    ones = torch.ones_like(references)  # (n,)
    table = torch.zeros(3, num_classes + 2, dtype=torch.int64, device=references.device)
    # index_add_, since bincount on CUDA reads the largest label back to the host.
    table[TRUE].index_add_(0, column(references), ones)
    table[PREDICTED].index_add_(0, column(predictions), ones)
    table[BOTH].index_add_(0, column(references), (predictions == references).to(torch.int64))
    return table


def f1_from_counts(tp: int, fp: int, fn: int) -> Score:
    """F1 of the positive class, from true positives, false positives and false negatives.

    precision P = tp / (tp + fp), recall R = tp / (tp + fn), F1 = 2 P R / (P + R) = 2 tp / (2 tp + fp + fn).
    Source: `sklearn.metrics.f1_score`, which computes the last form and gives 0.0 for 0/0.
    """
    if tp + fp + fn == 0:
        return 0.0, "label 1 is neither predicted nor true in any row, so f1 is 0/0"
    return 2 * tp / (2 * tp + fp + fn), ""


def matthews_from_counts(correct: int, true: Sequence[int], predicted: Sequence[int]) -> Score:
    """Matthews correlation for any number of classes (Gorodkin's R_K), from the correct rows and each label's counts.

    With n rows, c of them correct, t_k rows of true label k and p_k rows of predicted label k:
    R_K = (c n - Σ t_k p_k) / sqrt((n² - Σ p_k²) (n² - Σ t_k²)).
    So it needs the diagonal and the margins of the confusion matrix only. Python's integers are exact for any n.
    Source: Gorodkin 2004; `sklearn.metrics.matthews_corrcoef`, which gives 0.0 for 0/0.
    """
    n = sum(true)
    covariance = correct * n - sum(t * p for t, p in zip(true, predicted, strict=True))
    spread_predicted = n * n - sum(p * p for p in predicted)
    spread_true = n * n - sum(t * t for t in true)
    if spread_predicted == 0 or spread_true == 0:
        which = "predictions" if spread_predicted == 0 else "references"
        return 0.0, f"all {which} are one label, so matthews_correlation is 0/0"
    return float(covariance) / math.sqrt(float(spread_predicted) * float(spread_true)), ""


def scores_from_counts(names: Sequence[str], table: Tensor) -> dict[str, Score]:
    """The named metrics of a table of counts (3, num_classes + 2).

    Raises:
        ValueError: no rows, labels that the metric is not defined for, or a name without a branch here.
    """
    true, predicted, both = table.tolist()  # each: labels -1, 0, 1, ..., num_classes - 1, outside
    rows, correct, outside, one = sum(true), sum(both), true[-1] + predicted[-1], 2  # one: the column of label 1
    if rows == 0:
        raise ValueError("no rows: call add_batch before compute")
    scores: dict[str, Score] = {}
    for name in names:
        if name != "accuracy" and outside:
            raise ValueError(f"{name}: {outside} labels are outside -1 .. {len(true) - 3}: drop padding rows (-100) "
                             "first, or make the Metric with a larger num_classes")  # fmt: skip
        if name == "accuracy":
            scores[name] = correct / rows, ""
        elif name == "f1":
            seen = [column - 1 for column in range(len(true)) if true[column] + predicted[column]]
            # underneath: sklearn's pos_label is 1, whatever the labels: {-1, 1} and {1, 2} pass, {0, 2} does not.
            if len(seen) > 2 or (len(seen) == 2 and 1 not in seen):
                raise ValueError(f"f1 is for two classes, the positive one labelled 1, and the labels seen are {seen}")
            tp = both[one]
            scores[name] = f1_from_counts(tp, fp=predicted[one] - tp, fn=true[one] - tp)
        elif name == "matthews_correlation":
            scores[name] = matthews_from_counts(correct, true, predicted)
        else:
            raise ValueError(f"{name}: scores_from_counts has no branch for it")
    return scores


# ------------------------------------------------------------------------------------------ the pure core: correlations


def pearson(x: Tensor, y: Tensor) -> Score:
    """Pearson's r of two float64 vectors (n,), n >= 2; NaN where it is undefined.

    r = Σ dx dy / sqrt(Σ dx² Σ dy²) with dx = x - mean(x), dy = y - mean(y). Two passes, because the one-pass form
    n Σ x² - (Σ x)² loses its digits when the mean is large and the spread small. `math.fsum` rounds each sum once, so
    the order of the rows (batches, ranks) cannot change the result. Source: `scipy.stats.pearsonr`.
    """
    for name, values in (("predictions", x), ("references", y)):
        if bad := int((~values.isfinite()).sum()):
            return math.nan, f"{bad} of {len(values)} {name} are NaN or infinite, so the correlation is undefined"
        if bool((values == values[0]).all()):
            return math.nan, f"all {len(values)} {name} are equal, so the correlation is 0/0"
    dx = x - math.fsum(x.tolist()) / len(x)
    dy = y - math.fsum(y.tolist()) / len(y)
    # r does not depend on the scale. With 1 as the largest entry no square overflows or becomes 0.
    dx, dy = dx / dx.abs().max(), dy / dy.abs().max()
    covariance, spread_x, spread_y = (math.fsum(p.tolist()) for p in (dx * dy, dx * dx, dy * dy))
    r = covariance / math.sqrt(spread_x * spread_y)
    return max(-1.0, min(1.0, r)), ""  # beyond ±1 only by rounding


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1 .. n of a vector (n,); equal values share the mean of their ranks. Source: `scipy.stats.rankdata`.

    >>> average_ranks(torch.tensor([10.0, 30.0, 10.0, 20.0])).tolist()
    [1.5, 4.0, 1.5, 3.0]
    """
    _, group, size = values.unique(return_inverse=True, return_counts=True)  # group (n,), size (number of groups,)
    last = size.cumsum(0)  # a group of equal values has the ranks last - size + 1 .. last
    return (last.double() - (size.double() - 1) / 2)[group]


def spearman(x: Tensor, y: Tensor) -> Score:
    """Spearman's rho of two vectors (n,): Pearson's r of their average ranks. Source: `scipy.stats.spearmanr`."""
    if len(x) < 2:
        return math.nan, "one row has no correlation"
    for name, values in (("predictions", x), ("references", y)):
        if bad := int(values.isnan().sum()):
            return math.nan, f"{bad} of {len(values)} {name} are NaN, so they have no rank"
    return pearson(average_ranks(x), average_ranks(y))


def scores_from_values(names: Sequence[str], values: Tensor) -> dict[str, Score]:
    """The named metrics of predictions and references (2, n), float64.

    Raises:
        ValueError: no rows, one row for `pearson`, or a name without a branch here.
    """
    x, y = values
    if len(x) == 0:
        raise ValueError("no rows: call add_batch before compute")
    if len(x) == 1 and "pearson" in names:  # underneath: scipy raises here, yet gives NaN for spearmanr
        raise ValueError("pearson needs two rows or more, and there is one")
    scores: dict[str, Score] = {}
    for name in names:
        if name == "pearson":
            scores[name] = pearson(x, y)
        elif name == "spearmanr":
            scores[name] = spearman(x, y)
        else:
            raise ValueError(f"{name}: scores_from_values has no branch for it")
    return scores


# ------------------------------------------------------------------------------------------------- the stateful shell


class Metric:
    """Collects predictions and references batch by batch, then computes the named metrics over all of them.

    Classification: `accuracy`, `f1` (two classes, the positive one labelled 1), `matthews_correlation`. Their state is
    one table of counts, (3, num_classes + 2), on the device of the data. Regression: `pearson`, `spearmanr`.
    Correlations need the values themselves, so these are their state, and memory grows with the number of rows.

    On N ranks, where each counts its own rows and no row is counted twice:

        state = metric.state().to(device)    # metric.reduction == "sum"
        torch.distributed.all_reduce(state)
        metric.load_state(state)             # now this is the metric of all ranks' rows

    If `reduction` is "cat", concatenate the ranks' states along dimension 1 instead.

    Attributes:
        undefined: after `compute`, metric -> why its value is undefined on these rows; empty if all are defined.
        reduction: how states combine, "sum" or "cat".

    Raises:
        ValueError: a name is unknown, there is none, or there are names of both kinds.
    """

    def __init__(self, names: Sequence[str], *, num_classes: int = 128) -> None:
        """`num_classes`: labels -1 .. num_classes - 1 are counted one by one; `accuracy` takes any other label too."""
        self.names = (names,) if isinstance(names, str) else tuple(names)
        known = ", ".join(CLASSIFICATION + REGRESSION)
        if unknown := [name for name in self.names if name not in CLASSIFICATION + REGRESSION]:
            raise ValueError(f"unknown metric {unknown[0]!r}: known are {known}")
        if not self.names:
            raise ValueError(f"no metric named: choose from {known}")
        if len({name in REGRESSION for name in self.names}) == 2:
            raise ValueError(f"{', '.join(self.names)} mix classes and real numbers: make one Metric for each kind")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: it must be 2 or more")
        self.num_classes = num_classes
        self.reduction = "cat" if self.names[0] in REGRESSION else "sum"
        self.undefined: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._counts = torch.zeros(3, self.num_classes + 2, dtype=torch.int64)  # for "sum"
        self._values: list[tuple[Tensor, Tensor]] = []  # for "cat": predictions (n,) and references (n,) of each batch

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Add one row: two numbers, or tensors of one number."""
        self.add_batch(predictions=_as_tensor("prediction", prediction).reshape(-1),
                       references=_as_tensor("reference", reference).reshape(-1))  # fmt: skip

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add rows: two vectors (n,) as tensors on any device, numpy arrays or lists.

        Raises:
            ValueError: other shapes (logits need an argmax first), unequal lengths, or fractions as labels.
            TypeError: anything but real numbers.
        """
        predictions, references = _as_tensor("predictions", predictions), _as_tensor("references", references)
        for name, values in (("predictions", predictions), ("references", references)):
            if values.ndim != 1:
                remedy = "logits need .argmax(dim=-1) first" if self.reduction == "sum" else "try .squeeze(-1)"
                raise ValueError(f"{name} have shape {tuple(values.shape)} and must have one dimension: {remedy}")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions and {len(references)} references: the lengths must match")
        if self.reduction == "sum":
            predictions, references = _as_labels("predictions", predictions), _as_labels("references", references)
            table = count_labels(predictions, references.to(predictions.device), self.num_classes)
            # Not in place: if a first batch was counted under torch.inference_mode, later ones may not write to it.
            self._counts = self._counts.to(table.device) + table
        else:
            self._values.append((predictions.detach().clone(), references.detach().clone()))

    def __len__(self) -> int:
        """The number of rows collected."""
        return int(self._counts[TRUE].sum()) if self.reduction == "sum" else sum(len(x) for x, _ in self._values)

    def state(self) -> Tensor:
        """A copy of everything collected: counts (3, num_classes + 2) int64, or values (2, n) float64 on the CPU."""
        if self.reduction == "sum":
            return self._counts.clone()
        batches = [torch.stack([x.cpu().double(), y.cpu().double()]) for x, y in self._values]  # each (2, rows)
        return torch.cat([torch.empty(2, 0, dtype=torch.float64), *batches], dim=1)

    def load_state(self, state: Tensor) -> None:
        """Replace everything collected with a state: this metric's own, or the sum or concatenation of several.

        Raises ValueError for a state of another shape or dtype.
        """
        mine = self.state()
        comparable = 2 if self.reduction == "sum" else 1  # dimensions that must agree; that of the rows need not
        if state.ndim != 2 or state.shape[:comparable] != mine.shape[:comparable] or state.dtype != mine.dtype:
            raise ValueError(f"a state of shape {tuple(state.shape)}, {state.dtype} is not one of this metric: "
                             f"its own has shape {tuple(mine.shape)}, {mine.dtype}")  # fmt: skip
        self.reset()
        if self.reduction == "sum":
            self._counts = state.clone()
        else:
            self._values = [(state[0].clone(), state[1].clone())]

    def merge(self, other: "Metric") -> None:
        """Add all rows that `other` collected; `other` stays as it is. ValueError if its names or classes differ."""
        if (self.names, self.num_classes) != (other.names, other.num_classes):
            raise ValueError(f"cannot merge Metric({other.names}, num_classes={other.num_classes}) "
                             f"into Metric({self.names}, num_classes={self.num_classes})")  # fmt: skip
        self._counts = self._counts + other._counts.to(self._counts.device)
        self._values = self._values + other._values

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float]:
        """The metrics over all rows, including those given here. Then forget the rows.

        Returns:
            metric -> value, in the order of the names. An undefined metric has the library's value (f1 and
            matthews_correlation 0.0, correlations NaN), an `UndefinedMetricWarning` and an entry in `undefined`.

        Raises:
            ValueError: no rows; labels that `f1` or `matthews_correlation` is not defined for; `pearson` of one row.
        """
        if predictions is not None or references is not None:
            if predictions is None or references is None:
                raise ValueError(f"{'predictions' if predictions is None else 'references'} are missing: give both")
            self.add_batch(predictions=predictions, references=references)
        state = self.state()
        self.reset()
        self.undefined = {}
        scores = (scores_from_counts if self.reduction == "sum" else scores_from_values)(self.names, state)
        self.undefined = {name: reason for name, (_, reason) in scores.items() if reason}
        for name, reason in self.undefined.items():
            warnings.warn(f"{reason}; reported as {scores[name][0]}", UndefinedMetricWarning, stacklevel=2)
        # underneath: evaluate returns None on every process but the first; here each rank has the result.
        return {name: value for name, (value, _) in scores.items()}


def load(path: str, config_name: str | None = None) -> Metric:
    """The metric that `evaluate.load(path, config_name)` gives, without the Hub.

    Args:
        path: "glue", with the task as `config_name`; or "accuracy", "f1" or "matthews_correlation", without one.

    Raises:
        ValueError: an unknown metric or task (in evaluate FileNotFoundError and KeyError).
    """
    if path == "glue":
        if config_name not in GLUE:
            raise ValueError(f"unknown GLUE task {config_name!r}: known are {', '.join(GLUE)}")
        return Metric(GLUE[config_name])
    if path not in CLASSIFICATION:
        raise ValueError(f"unknown metric {path!r}: known are glue, {', '.join(CLASSIFICATION)}")
    if config_name is not None:
        raise ValueError(f"{path} has no configuration {config_name!r}: leave it out")
    return Metric((path,))


def _as_tensor(name: str, values: Any) -> Tensor:
    """A tensor as it is; numbers in lists or numpy arrays as a new tensor."""
    try:
        # A copy: torch warns about read-only arrays and refuses negative strides.
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers in a tensor, an array or a flat list ({error})") from None
    if tensor.is_complex():
        raise TypeError(f"{name} are complex and must be real numbers")
    return tensor


def _as_labels(name: str, values: Tensor) -> Tensor:
    """Whole numbers (n,) as int64. Only floating-point values have to be looked at: on a GPU that waits."""
    # underneath: evaluate's int64 column silently truncates 0.9 to 0.
    if values.is_floating_point() and bool((values.frac() != 0).any()):
        value = float(values[values.frac() != 0][0])
        raise ValueError(f"{name} must be whole numbers, and one is {value:g}: logits need .argmax(dim=-1) first")
    return values.to(torch.int64)
