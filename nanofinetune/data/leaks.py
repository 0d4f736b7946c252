"""Say where the answer can be read off: a text that names its own label, a validation text that is trained on too.

>>> import datasets
>>> rows = {"text": ["rated good: nice", "rated bad: cold", "rated good: ok"], "label": ["good", "bad", "good"]}
>>> train = datasets.Dataset.from_dict(rows)
>>> leaks({"train": train, "validation": train.select([1])}, ["text"], np.array([1, 0, 1]), ["bad", "good"])
['3 of 3 training texts name their own label', '1 of 1 validation texts are in the training split too']

Underneath: `datasets.load_dataset` (datasets 5.2) and `transformers.Trainer` (transformers 5.23) do not look at texts.
  - Both are notes, no errors: a text may name its label by chance, and data sets repeat rows.
  - The cost is bounded: MOST_READ texts are searched, and MOST_COMPARED compared.

Proof: test_a_text_that_names_its_label_is_noted, test_a_validation_text_in_training_is_noted in
tests/data/test_leaks.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_READ = 2_000  # training texts in which labels are looked for
MOST_COMPARED = 1_000_000  # training texts that a validation text is looked for in
MOST_CLASSES = 200
SHARE = 0.2  # of texts that name their own label, and not others as often, is no chance any more


def leaks(splits: Mapping[str, Any], columns: Sequence[str], labels: np.ndarray, names: list[str] | None) -> list[str]:
    """What a person should know before training, a line each.

    Args:
        splits: with "train".
        columns: of the texts.
        labels: (rows,) numbers of the training rows' classes.
        names: of the classes; None for a regression, whose numbers are not looked for.
    """
    found = []
    if names is not None and labels.ndim == 1 and 2 <= len(names) <= MOST_CLASSES:
        found.append(_named(splits["train"].select(range(min(MOST_READ, len(labels)))), columns, labels, names))
    known = _texts(splits["train"].select(range(min(MOST_COMPARED, len(splits["train"])))), columns)
    found += [_seen(_texts(rows, columns), known, key) for key, rows in splits.items() if key != "train"]
    return [line for line in found if line]


def _named(rows: Any, columns: Sequence[str], labels: np.ndarray, names: list[str]) -> str:
    """How many texts name their own label, if they name others much less."""
    wanted = [" ".join(_words(name)) for name in names]
    if not all(wanted):
        return ""
    own = others = 0
    for i, row in enumerate(rows.select_columns(list(columns))):
        text = f" {' '.join(word for column in columns for word in _words(row[column]))} "
        named = [f" {name} " in text for name in wanted]
        own += named[labels[i]]
        others += sum(named) - named[labels[i]]
    if own < SHARE * len(rows) or own < 2 * others / (len(names) - 1):
        return ""
    return f"{own:,} of {len(rows):,} training texts name their own label"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("_", " "))


def _texts(rows: Any, columns: Sequence[str]) -> Any:
    """The texts of each row as one: a pyarrow.ChunkedArray."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = rows.select_columns(list(columns)).with_format("arrow")[:]
    parts = [table[column].cast(pa.large_string()) for column in columns]
    return pc.binary_join_element_wise(*parts, pa.scalar("\t", pa.large_string())) if parts[1:] else parts[0]


def _seen(texts: Any, known: Any, key: str) -> str:
    import pyarrow.compute as pc

    count = pc.sum(pc.is_in(texts, value_set=known)).as_py() or 0
    return f"{count:,} of {len(texts):,} {key} texts are in the training split too" if count else ""
