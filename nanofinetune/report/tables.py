"""What a page says of one run's classes and rows: the confusion matrix, precision, recall and F1, the hardest rows.

>>> run = Record("a", {"classes": [{"label": "no"}, {"label": "yes"}], "confusion_matrix": [[3, 1], [0, 4]]})
>>> names, counts = matrix_of(run)
>>> confusion(names, counts).count("<td")
4

Underneath: `sklearn.metrics.ConfusionMatrixDisplay` and `sklearn.metrics.classification_report` (scikit-learn 1.9)
  - show a picture and a text; here both are tables, which a phone and a screen reader can read.
  - result.json's numbers are of all validation rows. Where it has none, they are of the rows in validation.jsonl.
  - Of many classes there is a list of the mistakes that are made most often.

Proof: test_the_tables_are_those_of_result_json, test_many_classes_give_a_list_of_mistakes in
tests/report/test_tables.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanofinetune.report.pieces import number, table, text
from nanofinetune.report.read import Record
from nanofinetune.report.style import SHADES

MOST_CLASSES, MOST_CELLS = 100, 30  # rows of the table of classes, and of the matrix


def class_rows(classes: Any) -> list[tuple[str, list[float]]]:
    """(name, [precision, recall, f1, rows, predicted]) of each class, as result.json has them; [] of anything else."""
    rows = []
    for one in classes[:MOST_CLASSES] if isinstance(classes, list) else []:
        keys = ("precision", "recall", "f1", "rows", "predicted")
        values = [number(one.get(key)) for key in keys] if isinstance(one, dict) else [None]
        if None in values:
            return []
        rows.append((str(one.get("label")), [value for value in values if value is not None]))
    return rows


def classes(rows: Sequence[tuple[str, list[float]]]) -> str:
    cells = [(name, [*(f"{v:.3f}" for v in values[:3]), *(f"{int(v):,}" for v in values[3:])]) for name, values in rows]
    more = f"The first {MOST_CLASSES} classes." if len(rows) == MOST_CLASSES else ""
    return table(["class", "precision", "recall", "F1", "rows", "predicted"], cells, caption=more) if rows else ""


def matrix_of(run: Record) -> tuple[list[str], Any] | None:
    """Names and counts: result.json's, else those of the rows; None where there are none."""
    try:
        counts = np.array(run.result.get("confusion_matrix"), dtype=np.float64)
        names = [str(one["label"]) for one in run.result["classes"]]
        if counts.shape == (len(names),) * 2 and len(names) and (counts >= 0).all() and (counts < 1e15).all():
            return names, counts
    except (TypeError, ValueError, KeyError, OverflowError):
        pass
    if run.judged.kind == "single":
        return run.judged.classes[: len(run.judged.confusion)], run.judged.confusion
    return None


def confusion(names: Sequence[str], counts: Any) -> str:
    """The matrix, darker where a class's rows go; of many classes the pairs that are mistaken most often."""
    if len(names) > MOST_CELLS:
        wrong = np.where(np.eye(len(names)), 0, counts)
        most = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CELLS]
        pairs = [divmod(int(place), len(names)) for place in most]
        rows = [
            (names[true], [text(names[found], 80), f"{int(wrong[true, found]):,}"])
            for true, found in pairs
            if wrong[true, found]
        ]
        return table(["true", "taken for", "rows"], rows, caption="The mistakes that are made most often.")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th class="n" scope="col">{text(name, 40)}</th>' for name in names)
    body = ""
    for k, name in enumerate(names):
        shades = [math.ceil(part * SHADES) for part in share[k]]
        cells = "".join(f'<td class="s{s}">{int(n):,}</td>' for n, s in zip(counts[k], shades, strict=True))
        body += f'<tr><th scope="row">{text(name, 40)}</th>{cells}</tr>'
    above = '<p class="faint">A row for each true class, a column for each predicted one.</p>'
    return f'{above}<div class="wide"><table class="matrix"><tr><th></th>{head}</tr>{body}</table></div>'


def hard(row: Mapping[str, Any], classes: Sequence[str]) -> str:
    """One row: its texts, what it is, what the model says and how sure it is."""
    quotes = "".join(f"<q>{text(row[key], 500)}</q>" for key in ("text", "text_pair") if row.get(key) is not None)
    names = {key: _said(row[key]) for key in ("label", "prediction")}
    said = f"<p>{text(names['label'], 160)}, taken for <b>{text(names['prediction'], 160)}</b></p>"
    if names["label"] == names["prediction"]:
        said = f"<p>{text(names['label'], 160)}, and taken for it</p>"
    bars = ""
    if isinstance(row.get("probabilities"), list):
        ranked = sorted(zip(row["probabilities"], classes, strict=False), key=lambda pair: -pair[0])
        kept = [*ranked[:3], *(pair for pair in ranked[3:] if pair[1] in _names(row["label"]))][:5]
        for value, name in kept:
            meter = f'<meter min="0" max="1" value="{value:.4f}"></meter>'
            bars += f'<div class="bar"><span>{text(name, 60)}</span>{meter}<span>{value:.3f}</span></div>'
    k = row.get("row")
    place = f'<p class="faint">row {k:,}</p>' if type(k) is int and 0 <= k < 10**12 else ""
    return f"<li>{quotes}{said}{bars}{place}</li>"


def _names(label: Any) -> list[str]:
    return label if isinstance(label, list) else [label]


def _said(label: Any) -> str:
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.4g}" if isinstance(label, (int, float)) else str(label)
