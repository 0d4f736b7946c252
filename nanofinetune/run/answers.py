"""What the model says of the validation rows: validation.jsonl, and the five of them that a terminal shows.

>>> data = SimpleNamespace(texts=[["fine"], ["bad"]], label_names=["no", "yes"], multi=False)
>>> answers = Answers(data, labels=np.array([1, 0]))
>>> answers.logits = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
>>> for line in answers.lines():
...     print(line)
{'row': 1, 'text': 'fine', 'label': 'yes', 'prediction': 'yes', 'probabilities': [0.119203, 0.880797]}
{'row': 2, 'text': 'bad', 'label': 'no', 'prediction': 'yes', 'probabilities': [0.268941, 0.731059]}

Underneath: `transformers.Trainer.predict` (transformers 5.23)
  - returns logits, which a script must bring together with texts and names by itself.
  - Here they are those of the evaluation that was made anyway, of the model that is saved.
  - `row` counts from 1, as messages about data do. The first 10,000 are kept (200 with 10,000 classes), of a text 2,000
    characters.

Proof: test_validation_rows_are_those_of_plain_transformers, test_the_five_rows_hold_two_wrong_ones in
tests/run/test_evaluation.py and tests/run/test_answers.py.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace  # noqa: F401 (the example above)
from typing import Any

import numpy as np
import torch

from nanofinetune.ground.errors import shown

MOST = 2_000_000  # probabilities: with many classes fewer rows are kept
INDENT = 11  # columns, as in the plan
FILE = "validation.jsonl"
BEGINNING = b'{"row": '  # of each of its lines


class Answers:
    """The logits of the model that a run saves, on the first rows of the first validation split, and what they mean.

    Args:
        data: what load_data returns.
        labels: of the split, (rows,) class ids or numbers, or (rows, classes) of 0.0 and 1.0.

    Attributes:
        logits: (rows, classes) float32, or (rows, 1) to regress; None before an evaluation.
    """

    def __init__(self, data: Any, labels: np.ndarray) -> None:
        self.names, self.multi = data.label_names, data.multi
        self.texts = data.texts[: MOST // len(self.names or (1,))]
        self.labels = labels[: len(self.texts)]
        self.logits: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, classes) of the logits."""
        return len(self.texts), len(self.names) if self.names else 1

    def misfit(self, logits: Any) -> str:
        """Why these cannot be such logits, "" if they can."""
        fits = isinstance(logits, torch.Tensor) and tuple(logits.shape) == self.shape and logits.is_floating_point()
        return "" if fits else "answers are not those of these validation rows"

    def lines(self) -> Iterator[dict[str, Any]]:
        """The rows of validation.jsonl, in order; none where there has been no evaluation."""
        if self.logits is None:
            return
        logits = self.logits.float()
        values = logits if not self.names else logits.sigmoid() if self.multi else logits.softmax(-1)
        # what the scores were counted from: run/evaluation.py, data/multilabel.py
        chosen = (logits > 0 if self.multi else logits.argmax(-1)).tolist()
        each = zip(self.texts, self.labels.tolist(), values.tolist(), strict=True)
        for row, (texts, label, found) in enumerate(each, start=1):
            line = {"row": row} | dict(zip(("text", "text_pair"), texts, strict=False))
            if not self.names:
                yield line | {"label": _digits(label), "prediction": _digits(found[0])}
            else:
                named = self._named(label), self._named(chosen[row - 1])
                line |= dict(zip(("label", "prediction"), named, strict=True))
                yield line | {"probabilities": [_digits(value) for value in found]}

    def _named(self, label: Any) -> Any:
        """The name of a class; of flags for all classes a list of names."""
        if isinstance(label, list):
            return [name for name, flag in zip(self.names, label, strict=True) if flag]
        return self.names[label]

    def write(self, file: Path) -> int:
        """Write validation.jsonl; beside it first, so that it is whole where it is -> how many rows it has."""
        count, unfinished = 0, file.with_name(f".{file.name}")
        with unfinished.open("w") as out:
            for line in self.lines():
                out.write(json.dumps(line) + "\n")
                count += 1
        if count:
            unfinished.replace(file)
        else:
            unfinished.unlink()
        return count

    # ---- for people ----

    def five(self) -> list[dict[str, Any]]:
        """Five rows, in order: the two wrong ones that the model is surest of, if there are, and the first others.

        To regress, the two that are furthest off.
        """
        lines = list(self.lines())
        off = [self._off(line) for line in lines]
        worst = [row for row in sorted(range(len(lines)), key=lambda row: -off[row])[:2] if off[row] > 0]
        others = [row for row in range(len(lines)) if row not in worst and (off[row] == 0 or not self.names)]
        more = [row for row in range(len(lines)) if row not in worst and row not in others]  # all wrong, or nearly so
        return [lines[row] for row in sorted([*worst, *others, *more][:5])]

    def _off(self, line: dict[str, Any]) -> float:
        """How far a prediction is off: 0 where it is right, and how sure the model was where it is wrong."""
        if not self.names:
            return abs((line["label"] or 0.0) - (line["prediction"] or 0.0))
        return 0.0 if line["label"] == line["prediction"] else max(sure(line), 1e-9)

    def table(self, width: int) -> list[str]:
        """The five rows, two lines each of at most `width` columns (50 or more), safe for a terminal."""
        lines, room = list[str](), width - INDENT
        for line in self.five():
            label, said = _listed(line["label"]), _listed(line["prediction"])
            chance = f" ({sure(line):.2f})" if self.names else ""
            wrong = ", wrong" if self.names and line["label"] != line["prediction"] else ""
            names = [fitted(name, min(columns(name), (room - 27) // 2)) for name in map(shown, (label, said))]
            text = line["text"]
            if "text_pair" in line:  # each gets half, or what the other leaves
                left = min(room // 2 - 2, columns(shown(line["text_pair"])))
                text = f"{fitted(text, room - 3 - left).rstrip()} | {line['text_pair']}"
            lines.append(f"{fitted('row ' + str(line['row']), INDENT)}label {names[0]}, said {names[1]}{chance}{wrong}")
            lines.append(" " * INDENT + fitted(text, room).rstrip())
        return lines


def sure(line: dict[str, Any]) -> float:
    """How sure the model is of its prediction: that class's probability; of several, that of the least sure answer."""
    values = [value or 0.0 for value in line["probabilities"]]
    return min(max(p, 1 - p) for p in values) if isinstance(line["prediction"], list) else max(values)


def columns(text: str) -> int:
    """How many columns a text takes on a terminal.

    >>> columns("cat"), columns("\\u732b")
    (3, 2)
    """
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitted(text: str, width: int) -> str:
    """Text made safe, and cut or filled up to so many columns.

    >>> fitted("a cat", 4), fitted("cat", 4)
    ('a...', 'cat ')
    """
    text = shown(text, most=2 * width + 20)
    if columns(text) > width:
        while text and columns(text) > width - 3:
            text = text[:-1]
        text = (text + "...")[: max(0, width)] if width < 3 else text + "..."
    return text + " " * (width - columns(text))


def _listed(label: Any) -> str:
    if isinstance(label, list):
        return ", ".join(label) or "none"
    return label if isinstance(label, str) else "NaN" if label is None else f"{label:.4g}"


def _digits(value: float) -> float | None:
    """Six digits of it, as predict.py writes them; None for NaN, which JSON does not have."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
