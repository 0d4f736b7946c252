"""Which columns hold the texts and which one the label, and whether every row can be used.

>>> import datasets
>>> rows = datasets.Dataset.from_dict({"id": [7, 8], "review": ["good food", "cold soup"], "stars": [1, 0]})
>>> find_columns(rows, None, None, None)
(('review',), 'stars')
>>> check_labels({"train": rows}, "stars", None)
['0', '1']

Underneath: `datasets.Dataset.remove_columns` and `datasets.Dataset.rename_column` (datasets 5.2), called by hand
  - the course names its columns itself; here they come from the user, the task table, or the only reading there is;
  - labels are checked before any long work: transformers meets a gap, a text or a NaN in them as an index error or a
    NaN loss;
  - every refusal names the column, the row and what to do.

Proof: test_columns_are_found_by_themselves, test_float_labels_are_regression in tests/data/test_columns.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanofinetune.data.tasks import Task
from nanofinetune.ground.errors import UsageError

_LABEL_NAMES = ("label", "labels", "target", "class", "score", "Quality")


def find_columns(
    train: Any, task: Task | None, text_columns: Sequence[str] | None, label_column: str | None
) -> tuple[tuple[str, ...], str]:
    """-> (one or two text columns, label column): the user's, the task table's, or the only reading there is."""
    columns = train.column_names
    for flag, asked in (
        ("--text-columns", text_columns or ()),
        ("--label-column", [label_column] if label_column else ()),
    ):
        for column in asked:
            if column not in columns:
                raise UsageError(f"{flag} {column}: there is no such column; the data have {', '.join(columns)}")
    if text_columns and len(text_columns) > 2:
        raise UsageError(f"--text-columns {' '.join(text_columns)}: name one column or two")
    if text_columns and len(set(text_columns)) < len(text_columns):
        raise UsageError(f"--text-columns {' '.join(text_columns)}: one column twice; name it once, or another one")
    if task is not None:
        return task.text_columns, task.label_column

    text = [column for column in columns if _kind(train, column) == "text"]
    for column in text_columns or ():
        if column not in text:
            raise UsageError(f"--text-columns {column}: the column holds {_kind(train, column)}, not text")
    label = label_column or _only_label(train, [column for column in columns if column not in (text_columns or ())])
    if label in (text_columns or ()):
        raise UsageError(f"--label-column {label}: it is also named as a text column")
    found = tuple(text_columns or (column for column in text if column != label))
    if not 1 <= len(found) <= 2:
        raise UsageError(
            f"--data has {len(found)} text columns beside the label ({', '.join(found) or 'none'}): "
            "name one or two with --text-columns"
        )
    return found, label


def _only_label(train: Any, columns: list[str]) -> str:
    """The label column: one of the usual name, else the only column of numbers that is not an index."""
    named = [column for column in columns if column in _LABEL_NAMES]
    numbers = [
        c for c in columns if _kind(train, c) in ("numbers", "classes") and c.lower() not in ("idx", "id", "index")
    ]
    candidates = named if len(named) == 1 else numbers
    if len(candidates) != 1:
        raise UsageError(
            f"--data: which column is the label? Name it with --label-column; the data have {', '.join(columns)}"
        )
    return candidates[0]


def _kind(train: Any, column: str) -> str:
    """What a column holds, in words: text, classes, numbers, or the library's own name for anything else."""
    import datasets

    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if dtype in ("string", "large_string", "string_view"):
        return "text"
    return "numbers" if dtype.startswith(("int", "uint", "float", "bool")) else str(dtype)


def keep(split: Any, columns: Sequence[str], key: str) -> Any:
    missing = [column for column in columns if column not in split.column_names]
    if missing:
        raise UsageError(f"--data: the {key} split has no column {missing[0]}; it has {', '.join(split.column_names)}")
    return split.select_columns(list(columns))


def check_labels(splits: Mapping[str, Any], column: str, task: Task | None) -> list[str] | None:
    """Check that every label can be trained on -> the class names, or None for regression."""
    import datasets

    for key, split in splits.items():
        kind = _kind(split, column)
        if kind == "text":
            values = split[column][:]
            if "" in values:  # a lost label, which makes a csv file's column one of text
                row = values.index("") + 1
                raise UsageError(f"--label-column {column}: row {row} of the {key} split has no label; fill it in")
            shown = ", ".join(map(repr, sorted(set(map(str, values)))[:4]))
            raise UsageError(
                f"--label-column {column}: the labels of the {key} split are text ({shown} ...); "
                "write them as 0, 1, 2 ... in the file, one number for each class"
            )
        if kind not in ("classes", "numbers"):
            raise UsageError(f"--label-column {column}: it holds {kind}; labels are whole numbers or floats")
    arrays = {key: labels_of(split, column, key) for key, split in splits.items()}
    if arrays["train"].dtype.kind == "f":
        return None
    for key, array in arrays.items():
        if array.dtype.kind == "f":
            raise UsageError(
                f"--label-column {column}: the {key} split holds floats and the training split whole numbers; "
                "write both as classes 0, 1, 2 ... or both as floats"
            )
    classes = np.unique(arrays["train"])
    if classes[0] == -1 and len(classes) == 1:
        raise UsageError(f"--label-column {column}: every label is -1, the mark of a test set without labels")
    if len(classes) == 1:
        raise UsageError(f"--label-column {column}: there is only one class ({classes[0]}) in the training split")
    feature = splits["train"].features[column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if names is None and task is not None and task.label_names is not None:
        names = list(task.label_names)
    if names is None:
        if classes[0] != 0 or classes[-1] != len(classes) - 1:
            shown = ", ".join(map(str, classes[:6]))
            raise UsageError(
                f"--label-column {column}: the classes are {shown}; number them 0 to {len(classes) - 1} without gaps"
            )
        names = [str(value) for value in classes]
    for key, array in arrays.items():
        outside = array[(array < 0) | (array >= len(names))]
        if len(outside):
            raise UsageError(
                f"--label-column {column}: the {key} split has the label {outside[0]}, which is not one of the "
                f"{len(names)} classes of the training split"
            )
    return names


def labels_of(split: Any, column: str, key: str) -> np.ndarray:
    """(rows,) int64 class ids or float32 targets. Raises UsageError naming the first row without a usable label."""
    table = split.with_format("arrow")[:][column]
    if table.null_count:
        row, count = table.to_pylist().index(None) + 1, f"{table.null_count} in all"
        raise UsageError(f"--label-column {column}: row {row} of the {key} split has no label ({count}); fill it in")
    values = table.to_numpy()
    if values.dtype.kind != "f":
        return values.astype(np.int64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        shown = f"row {bad[0] + 1} of the {key} split is {values[bad[0]]} ({len(bad)} in all)"
        raise UsageError(f"--label-column {column}: {shown}; write a number")
    return values.astype(np.float32)


def check_texts(split: Any, columns: Sequence[str], key: str) -> None:
    for column in columns:
        kind = _kind(split, column)
        if kind != "text":
            remedy = "write it as json lines or parquet, which tell them apart"
            raise UsageError(f"--text-columns {column}: the {key} split holds {kind}, not text; {remedy}")
        values = split.with_format("arrow")[:][column]
        if values.null_count:
            row, count = values.to_pylist().index(None) + 1, f"{values.null_count} in all"
            raise UsageError(f"--text-columns {column}: row {row} of the {key} split has no text ({count}); fill it in")
