"""Folders as train.py leaves them, without a training: for the tests of the page about runs."""

import json
import math
import random
from pathlib import Path
from typing import Any

NAMES = ["other", "same"]
PLOTS = ("Loss over updates", "Learning rate over updates", "Rows a second over updates")


def write_log(folder: Path, updates: int, seconds: bool = False, lr: float = 1e-4) -> None:
    """metrics.jsonl: three epochs of falling losses."""
    with (folder / "metrics.jsonl").open("w") as file:
        for k in range(1, updates + 1):
            line: dict[str, Any] = {"step": k, "epoch": 1 + 3 * (k - 1) // updates, "lr": lr * (1 - (k - 1) / updates)}
            line |= {"loss": 0.7 * math.exp(-k / updates) + 0.02 * (k % 3), "rows": 8}
            file.write(json.dumps(line | ({"seconds": round(0.25 * k, 3)} if seconds else {})) + "\n")


def answers(rows: int, kind: str = "single", text: str = "the cat sat") -> list[dict[str, Any]]:
    """The lines of validation.jsonl."""
    dice, found = random.Random(0), []
    for k in range(rows):
        sure = [round(dice.random(), 4)]
        sure += [round(1 - sure[0], 4)]
        line: dict[str, Any] = {"row": k, "text": f"{text} {k}", "text_pair": "on the mat"}
        if kind == "regression":
            line |= {"label": float(k % 5), "prediction": k % 5 + sure[0]}
        elif kind == "multi":
            label = [name for name in NAMES if dice.random() < 0.5]
            said = [name for name, p in zip(NAMES, sure, strict=True) if p > 0.5]
            line |= {"label": label, "prediction": said, "probabilities": sure}
        else:
            line |= {
                "label": NAMES[dice.random() < sure[1]],
                "prediction": NAMES[sure[1] > sure[0]],
                "probabilities": sure,
            }
        found.append(line)
    return found


def write_run(folder: Path, updates: int = 90, rows: int = 40, kind: str = "single", **changes: Any) -> Path:
    """A complete run; `changes` are to result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_log(folder, updates)
    with (folder / "validation.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in answers(rows, kind))
    classes = [
        {"label": name, "precision": 0.75, "recall": 0.6, "f1": 0.65 + k / 10, "rows": 20, "predicted": 18 + 4 * k}
        for k, name in enumerate(NAMES)
    ]
    evaluations = [{"epoch": k, "loss": 0.7 / k, "accuracy": 0.6 + k / 20, "f1": 0.5 + k / 15} for k in (1, 2, 3)]
    result = {
        "model": "a/model", "data": "pairs", "world": 1, "steps": updates, "seconds": 12.5, "loss": 0.23,
        "accuracy": 0.75, "f1": 0.7, "evaluations": evaluations, "notes": ["a note"],
        "arguments": {"lr": 1e-4, "batch_size": 8, "output": str(folder)},
        "plan": {"updates": f"{updates} (30 batches an epoch)"}, "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a processor"}, "speed": [[30, 8.0], [60, 15.0], [90, 23.0]],
        **({"classes": classes, "confusion_matrix": [[12, 8], [6, 14]]} if kind == "single" else {}),
    }  # fmt: skip
    if kind == "multi":
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(NAMES))}))
    (folder / "result.json").write_text(json.dumps(result | changes))
    return folder
