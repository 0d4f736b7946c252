"""One page of html for one run or several: curves, scores, tables, the hardest rows, and what the runs differ in.

>>> differences([Record("a", {"arguments": {"lr": 1, "seed": 2}}), Record("b", {"arguments": {"lr": 3, "seed": 2}})])
[('--lr', ['1', '3'])]

Underneath: `transformers.modelcard.TrainingSummary` (transformers 5.23) writes a README with a table of losses.
  - Names, texts and paths are a stranger's: all of them go through `text`, and the page can run nothing.
  - A part that a run has nothing for is left out; what could not be read is said above.
  - The same files give the same page, to the byte.

Proof: test_any_files_give_a_page_or_one_line, test_every_plot_and_table_is_there in tests/report/test_read.py and
tests/report/test_browser.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanofinetune.report import plots
from nanofinetune.report.judge import BINS
from nanofinetune.report.pieces import figure, number, swatches, table, text
from nanofinetune.report.read import TOOK, Record
from nanofinetune.report.style import SHEET, policy
from nanofinetune.report.tables import class_rows, classes, confusion, hard, matrix_of

OPENING = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="generator" content="nanofinetune.report">\n'
)
MOST_EPOCHS, MOST_SCORES = 1000, 8
MEASURED = {
    "model": "model", "data": "data", "world": "ranks", "device": "device", "precision": "precision",
    "steps": "updates", "resumed_after": "resumed after update", "seconds": "seconds",
    "examples_per_second": "rows a second", "padding": "padding", "peak_rss_mb": "peak memory, MiB",
    "saved_epoch": "epoch whose model is saved", "loss": "training loss",
}  # fmt: skip


def page(runs: Sequence[Record]) -> str:
    """The whole document."""
    title = ", ".join(run.name for run in runs)
    parts = [_head(runs), _curves(runs), _scores(runs), *(_differ(runs) if len(runs) > 1 else [])]
    parts += [_rows(runs), *(part for run in runs for part in _details(run, runs))]
    return (
        f'{OPENING}<meta http-equiv="Content-Security-Policy" content="{policy(SHEET)}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{text(title, 200)}</title>\n<style>{SHEET}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


# ---- what is at the top ----------------------------------------------------------------------------------------------


def _head(runs: Sequence[Record]) -> str:
    """Name, scores in large figures, remarks, and the table of what was measured."""
    lines = [f"<h1>{text(', '.join(run.name for run in runs), 200)}</h1>"]
    if len(runs) == 1:
        lines.append(f'<p class="faint">{_subtitle(runs[0])}</p>')
        tiles = [(name, f"{value:.4f}") for name, value in list(_metrics(runs[0]).items())[:4]]
        since = f" since update {runs[0].result['resumed_after']}" if _plain(runs[0], "resumed_after") else ""
        named = {"loss": MEASURED["loss"], "seconds": MEASURED["seconds"] + since}
        tiles += [(name, text(runs[0].result[key])) for key, name in named.items() if _plain(runs[0], key)]
        boxes = "".join(f'<div class="tile"><b>{value}</b>{text(name, 40)}</div>' for name, value in tiles)
        lines.append(f'<div class="tiles">{boxes}</div>' if tiles else "")
    for run in runs:
        who = f"{text(run.name)}: " if len(runs) > 1 else ""
        lines += [f'<p class="remark">{who}{text(remark)}</p>' for remark in run.remarks]
    names = [name for run in runs for name in _metrics(run)]
    keys = {**{key: name for key, name in MEASURED.items() if any(_plain(run, key) for run in runs)},
            **{name: name for name in names[:40]}}  # fmt: skip
    rows = [(name, [_cell_of(run, key) for run in runs]) for key, name in keys.items()]
    wide = table(["", *(run.name for run in runs)] if len(runs) > 1 else [], rows, numbers=False)
    if len(runs) > 1:
        return "\n".join([*lines, _legend(runs), wide])
    return "\n".join([*lines, f"<details><summary>All that was measured</summary>{wide}</details>" if rows else ""])


def _subtitle(run: Record) -> str:
    said = [_cell_of(run, key) for key in ("model", "data") if _plain(run, key)]
    said += [f"{run.updates:,} updates"] if run.updates else []
    return " · ".join(said)


def _cell_of(run: Record, key: str) -> str:
    """What result.json says of this, as html; of a path its end."""
    value = run.result.get(key)
    if isinstance(value, str) and key in ("model", "data") and value.count("/") > 1:
        value = "/".join(value.rstrip("/").split("/")[-2:])
    return text(value) if isinstance(value, (str, int, float)) else ""


def _plain(run: Record, key: str) -> bool:
    """Whether result.json says this in one number or text."""
    return isinstance(run.result.get(key), (str, int, float))


def _metrics(run: Record) -> dict[str, float]:
    """The scores of the model that is saved: those that an evaluation has, and result.json says once more."""
    last = run.evaluations[-1] if run.evaluations else {}
    names = [name for name in last if name not in ("epoch", "loss")][:40]
    return {name: value for name in names if (value := number(run.result.get(name))) is not None}


def _legend(runs: Sequence[Record]) -> str:
    return swatches([run.name for run in runs]) if len(runs) > 1 else ""


# ---- curves ----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Record]) -> str:
    """Loss, learning rate and speed."""
    logged = [run for run in runs if run.updates]
    if not logged:
        return ""
    runs = [run if run.updates else Record(run.name) for run in runs]  # a run keeps its colour
    width = max(1, *(int(run.log.known[:, 0].max(initial=1)) for run in logged))
    bucket = f"The line is smoothed; the band is from the lowest to the highest loss of {width:,} updates."
    bucket = bucket if width > 1 else "The line is smoothed; the band is what each update had."
    if len(logged) == 1 and len(logged[0].epochs) > 1:
        bucket += " An upright line is the beginning of an epoch."
    if left := sum(run.left_out for run in logged):
        bucket += f" A cross below: {left:,} update(s) without a finite loss, left out."
    figures = [figure(plots.loss(runs), "Loss", bucket)]
    figures.append(figure(plots.learning_rate(runs), "Learning rate"))
    if any(len(plots.rates(run)[0]) for run in logged):
        timed = any(run.log.known[:, TOOK].any() for run in logged)
        note = "The band is from the slowest to the fastest update of a stretch." if timed else ""
        figures.append(figure(plots.speed(runs), "Rows a second", note))
    return f'<h2>Over updates</h2>\n{_legend(runs)}<div class="grid three">{"".join(figures)}</div>'


def _scores(runs: Sequence[Record]) -> str:
    """Scores over epochs: of one run all in one drawing, of several a drawing for each score."""
    epochs = [scores for run in runs for scores in run.evaluations[:MOST_EPOCHS]]
    names = list(dict.fromkeys(name for scores in epochs for name in scores if number(scores[name]) is not None))
    names = [name for name in names if name not in ("epoch", "loss")][:MOST_SCORES]
    if not names:
        return ""
    if len(runs) == 1:
        lines = [_over_epochs(runs[0], name) for name in names]
        rows = [(f"epoch {k}", [_cell(scores, name) for name in ["loss", *names]])
                 for k, scores in enumerate(runs[0].evaluations[:MOST_EPOCHS], start=1)]  # fmt: skip
        drawn = figure(plots.scores(lines, "scores", "Scores over epochs"), "Scores of the validation rows")
        told = table(["", "loss", *names], rows)
        return f'<h2>Over epochs</h2>\n{swatches(names)}<div class="grid">{drawn}{told}</div>'
    figures = [
        figure(plots.scores([_over_epochs(run, name) for run in runs], f"score{k}", "A score over epochs"), name)
        for k, name in enumerate(names)
    ]
    return f'<h2>Over epochs</h2>\n{_legend(runs)}<div class="grid three">{"".join(figures)}</div>'


def _over_epochs(run: Record, name: str) -> tuple[Any, Any]:
    found = [(k, number(e.get(name))) for k, e in enumerate(run.evaluations[:MOST_EPOCHS], start=1)]
    return np.array([k for k, _ in found], dtype=float), np.array([math.nan if v is None else v for _, v in found])


def _cell(scores: Mapping[str, Any], name: str) -> str:
    value = number(scores.get(name))
    return "" if value is None else f"{value:.4f}"


# ---- several runs ----------------------------------------------------------------------------------------------------


def differences(runs: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """(what, its value in each run) of every argument, version and part of the machine in which runs differ."""
    found = []
    parts: list[tuple[str, Callable[[str], str]]] = [
        ("arguments", lambda name: "--" + name.replace("_", "-")), ("versions", str), ("machine", str)
    ]  # fmt: skip
    for part, said in parts:
        maps = [_mapping(run, part) for run in runs]
        for name in dict.fromkeys(name for each in maps for name in each):
            values = [_argument(each[name]) if name in each else "not recorded" for each in maps]
            if len(set(values)) > 1 and name != "output":
                found.append((said(str(name)), values))
    return found


def _argument(value: Any) -> str:
    return "not given" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _mapping(run: Record, part: str) -> Mapping[str, Any]:
    value = run.result.get(part)
    return dict(list(value.items())[:200]) if isinstance(value, dict) else {}


def _differ(runs: Sequence[Record]) -> list[str]:
    found = [(name, [text(value) for value in values]) for name, values in differences(runs)]
    told = table(["", *(run.name for run in runs)], found, numbers=False)
    return ["<h2>What differs</h2>", told if found else "<p>Arguments, versions and machines are the same.</p>"]


# ---- of the rows -----------------------------------------------------------------------------------------------------


def _rows(runs: Sequence[Record]) -> str:
    """Calibration, or predicted over true numbers, of all runs in one drawing."""
    figures, tables = [], []
    sure = [run if run.judged.bins.any() else Record(run.name) for run in runs]
    if any(run.judged.bins.any() for run in sure):
        said = "; ".join(f"{run.name}: {run.judged.error():.3f}" for run in sure if run.judged.bins.any())
        said = said if len(runs) > 1 else said.rpartition(": ")[2]
        caption = (
            f"Expected calibration error {said}. On the dotted line, 80 % sure is right 8 times in 10;"
            " below it the model is too sure. A larger mark is more rows."
        )
        figures.append(figure(plots.calibration(sure), "How often it is right, where it is so sure", caption))
        tables = [_bins(run, len(runs) > 1) for run in sure if run.judged.bins.any()]
    numbers = [run if run.judged.pairs else Record(run.name) for run in runs]
    if any(run.judged.pairs for run in numbers):
        figures.append(
            figure(plots.regression(numbers), "Predicted over true numbers", "On the dotted line they are the same.")
        )
    if not figures:
        return ""
    title, legend = "Calibration" if tables else "Predictions", _legend(runs)
    return f'<h2>{title}</h2>\n{legend}<div class="grid">{"".join(figures)}<div>{"".join(tables)}</div></div>'


def _bins(run: Record, several: bool) -> str:
    rows = []
    for k, (count, sure, right) in enumerate(run.judged.bins):
        if count:
            low, high = 100 * k // BINS, 100 * (k + 1) // BINS
            rows.append((f"{low} to {high} %", [f"{int(count):,}", f"{sure / count:.3f}", f"{right / count:.3f}"]))
    return table([f"{run.name}: how sure" if several else "how sure", "rows", "sure, mean", "right, share"], rows)


def _details(run: Record, runs: Sequence[Record]) -> list[str]:
    """What is of one run: its classes, its hardest rows, its plan, its versions and arguments."""
    whose = f"{text(run.name)}: " if len(runs) > 1 else ""
    parts = []
    computed = run.judged.kind in ("single", "multi")
    each = class_rows(run.result.get("classes")) or (class_rows(run.judged.table()) if computed else [])
    matrix = matrix_of(run)
    if each or matrix is not None:
        told = [confusion(*matrix) if matrix is not None else "", classes(each)]
        boxes = "".join(f"<div>{piece}</div>" for piece in told if piece)
        parts.append(f'<h2>{whose}Classes</h2>\n<div class="grid">{boxes}</div>')
    if hardest := run.judged.hardest():
        what = "farthest from the label" if run.judged.kind == "regression" else "least sure of the label"
        intro = f"Of {run.judged.rows:,} validation rows those where the model is {what}, the worst first."
        items = "".join(hard(row, run.judged.classes) for row in hardest)
        parts.append(f'<h2>{whose}Hardest rows</h2>\n<p class="faint">{intro}</p>\n<ul class="hard">{items}</ul>')
    for key, title in (("plan", "What the plan said"), ("machine", "Machine"), ("versions", "Versions")):
        if found := _mapping(run, key):
            lines = [(str(name), [text(value, 600)]) for name, value in found.items()]
            parts.append(f"<h2>{whose}{title}</h2>\n{table([], lines, numbers=False)}")
    notes = run.result.get("notes")
    if isinstance(notes, list) and notes:
        said = "".join(f"<p>{text(note, 600)}</p>" for note in notes[:50])
        parts.append(f"<h2>{whose}Notes</h2>\n{said}")
    if found := _mapping(run, "arguments"):
        lines = [("--" + str(n).replace("_", "-"), [text(_argument(v))]) for n, v in found.items()]
        inside = table([], lines, numbers=False)
        parts.append(f"<details><summary>{whose}All arguments</summary>{inside}</details>")
    return parts
