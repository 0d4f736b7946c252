"""One evaluation of a split: its scores over all ranks, how far it is, and what the model says of the first rows.

>>> found = Evaluation(Metric(["accuracy"]), keeper=SimpleNamespace(shape=(2, 2)))
>>> class Loader(list):  # of one batch, that holds the second row before the first
...     dataset, device, sample_ids = range(2), None, lambda *_: [1, 0]
>>> for batch in found.batches(Loader([torch.eye(2)])):
...     found.add(logits=batch, labels=batch.argmax(-1))
>>> found.scores(SimpleNamespace(device="cpu", reduce=lambda tensor, _: tensor), rows=2), found.keeper.logits.tolist()
({'accuracy': 1.0}, [[0.0, 1.0], [1.0, 0.0]])

Underneath: `transformers.Trainer.evaluation_loop` (transformers 5.23), and the course's `gather_for_metrics`
  - gather every batch's logits on all ranks, and repeat rows where these do not divide.
  - Here ranks add up counts, once, at the end; they may get different numbers of batches, so nobody waits.
  - The logits of the first rows stand in a table with a place for each row. What other ranks saw is zero in it, so a
    sum of the ranks' tables is the whole one, to the bit.

Proof: test_validation_rows_are_those_of_plain_transformers, test_the_scores_are_those_of_a_metric_alone in
tests/run/test_evaluation.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace  # noqa: F401 (the example above)
from typing import Any

import torch
from torch import Tensor

from nanofinetune.ground.progress import Progress
from nanofinetune.ranks.collectives import gather_object
from nanofinetune.step.metrics import Metric, UndefinedMetricWarning  # noqa: F401 (Metric: the example above)


class Evaluation:
    """What `evaluate` of train.py collects.

    Args:
        metric: Scores, MultiLabelMetric or a Metric; it is fed predictions and labels.
        name: of the split, on the screen.
        keeper: has a `shape` (rows, classes), and gets as its `logits` those of the first rows, float32 on the CPU.
    """

    def __init__(self, metric: Any, name: str = "validation", keeper: Any = None) -> None:
        self.metric, self.name, self.keeper = metric, name, keeper
        rows, classes = (0, 1) if keeper is None else keeper.shape
        self.answers = torch.zeros(rows + 1, classes)  # the last one is everyone's who has no place
        self.places, self.done = torch.zeros(0, dtype=torch.int64), 0

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of a prepared loader that adds no rows. Each must be followed by `add`."""
        rows = loader.sample_ids(0, len(loader)) if len(loader) else []
        places = torch.tensor(rows, dtype=torch.int64).clamp(max=len(self.answers) - 1)
        on_host = loader.device is None or loader.device.type == "xla"  # there each slice would be one more program
        self.places, self.done = places if on_host else places.to(loader.device), 0
        whole = len(loader.dataset)
        with Progress(whole, self.name, delay=1.0) as progress:
            for batch in loader:
                yield batch
                if progress.add(whole * self.done // len(rows) - progress.done):  # the other ranks are as far
                    progress.show()

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch's logits, (B, classes), or (B, 1) to regress, and labels: (B,), or (B, classes) of 0.0 and 1.0."""
        predictions = logits if labels.ndim == 2 else logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        self.metric.add_batch(predictions=predictions, references=labels)
        if self.keeper is not None:
            places = self.places[self.done : self.done + len(logits)].to(logits.device)
            self.answers = self.answers.to(logits.device)
            self.answers[places] = logits
        self.done += len(logits)

    def scores(self, accelerator: Any, rows: int) -> dict[str, Any]:
        """The metrics over all ranks, of so many rows; `undefined` names the values that are 0/0. A collective."""
        metric = self.metric
        if metric.reduction == "sum":
            counts = metric.state().to(accelerator.device)
            metric.load_state(accelerator.reduce(counts, "sum"))
        else:  # correlations need the values themselves
            metric.load_state(torch.cat(gather_object([metric.state()], accelerator.world), dim=1))
        if len(metric) != rows:
            raise RuntimeError(f"{len(metric)} rows were scored and the split has {rows}")
        if self.keeper is not None:
            self.keeper.logits = accelerator.reduce(self.answers[:-1].to(accelerator.device), "sum").cpu()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)  # it goes into the result instead
            scores: dict[str, Any] = metric.compute()
        scores = {name: None if math.isnan(value) else value for name, value in scores.items()}  # JSON has no NaN
        return scores | ({"undefined": metric.undefined} if metric.undefined else {}) | getattr(metric, "details", {})
