"""The nine GLUE tasks: their text columns, label names, metric and validation splits.

>>> GLUE["mrpc"].text_columns, GLUE["mrpc"].metrics
(('sentence1', 'sentence2'), ('accuracy', 'f1'))

Underneath: the table that `transformers` keeps in examples/pytorch/text-classification/run_glue.py (`task_to_keys`),
the features of the Hub's data set nyu-mll/glue and the branches of `evaluate.load` (evaluate 0.4.6) for "glue", which
are three places there and two here. A task of one's own is one line in GLUE, or none: `data.py` finds the columns of an
ordinary data set by itself. (`metrics.GLUE` is only what `metrics.load("glue", ...)` knows, as the library's does.)

Proof: test_glue_tasks_match_the_metric_of_that_name, test_local_glue_matches_the_task_table and
test_a_hub_name_is_read_as_the_task_that_it_ends_in in tests/test_data.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task: which columns hold text, what the labels mean (None: a float to regress on), how it is scored.

    `validation`: the splits of the Hub's data set to score on; files go by their own names, as `data.py` reads them.
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
    """The metrics of a data set that is not in the table: by the kind of label and the number of classes."""
    if label_names is None:
        return ("pearson", "spearmanr")
    return ("accuracy", "f1") if len(label_names) == 2 else ("accuracy",)
