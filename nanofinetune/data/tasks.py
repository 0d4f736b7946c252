"""The nine GLUE tasks: their text columns, label names, metrics and validation splits.

>>> GLUE["mrpc"].text_columns, GLUE["mrpc"].metrics
(('sentence1', 'sentence2'), ('accuracy', 'f1'))

Underneath: `task_to_keys` in transformers' run_glue.py, nyu-mll/glue's features, `evaluate.load` (evaluate 0.4.6)
  - there each knows one part: text columns, label names, metrics;
  - here one table holds them, and `metrics.GLUE` only what `metrics.load("glue", ...)` needs;
  - a task of your own is one more line in GLUE, or none: load.py finds the columns of an ordinary data set.

Proof: test_glue_tasks_match_the_metric_of_that_name, test_local_glue_matches_the_task_table in
tests/data/test_load.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task: its text columns, the names of its labels (None: a float to regress on), how it is scored.

    `validation`: the Hub data set's splits to score on. Local files go by their own names: see load.py.
    """

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    label_column: str = "label"


GLUE = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), None, ("pearson", "spearmanr")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def default_metrics(label_names: list[str] | None) -> tuple[str, ...]:
    """Metrics for data that is not in the table: correlations for numbers, accuracy for classes, with F1 for two."""
    if label_names is None:
        return ("pearson", "spearmanr")
    return ("accuracy", "f1") if len(label_names) == 2 else ("accuracy",)
