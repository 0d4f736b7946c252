"""The drawings of a page: what was logged, update by update, and how sure the model is against how often it is right.

>>> from nanofinetune.report.thin import Thinned
>>> log = Thinned(6)
>>> log.add(np.array([[1, 0.1, 0.7, 8, 0.5, 16], [2, 0.1, 0.6, 8, 0.5, 16.0]]))
>>> "var(--c0)" in loss([Record("a", log=log.buckets())]) if available() else True
True

Underneath: matplotlib draws; the library that is fine-tuned with has `transformers.integrations.TensorBoardCallback`
(transformers 5.23), whose curves need a server.
  - A line is the mean of a bucket of updates, the band behind it goes from the lowest to the highest of them.
  - No text of a run's is in a drawing: matplotlib would read mathematics into it. Names are in the page's legend.

Proof: test_a_spike_in_a_million_updates_is_drawn, test_every_plot_and_table_is_there in tests/report/test_plots.py and
tests/report/test_browser.py.
"""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nanofinetune.report.read import LOSS, LR, ROWS, SPEED, STEP, TOOK, Record
from nanofinetune.report.style import DASHES, LIGHT
from nanofinetune.report.svg import inline, paint
from nanofinetune.report.thin import Table

SIZE = (5.4, 3.0)  # inches of 72 pixels: at this size a line of text is as large as the page's, on a phone two thirds
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
POINTS = 60  # of a curve of speed
MISSING = "matplotlib is not installed: pip install 'nanofinetune[report]'"


def available() -> bool:
    """Whether there is matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def loss(runs: Sequence[Record]) -> str:
    """Loss over updates: a smooth line, and the lowest and the highest loss of each bucket behind it."""
    with _Drawing("loss", "Loss over updates") as drawing:
        for k, run in enumerate(runs):
            step, mean = run.log.mean[:, STEP], run.log.mean[:, LOSS]
            drawing.band(step, run.log.low[:, LOSS], run.log.high[:, LOSS], k)
            drawing.line(step, smooth(mean, run.log.known[:, LOSS]), k)
            drawing.rug(step[run.log.known[:, LOSS] < run.log.known[:, STEP]])
        if len(runs) == 1:
            drawing.marks(runs[0].epochs[1:21])
    return drawing.text


def learning_rate(runs: Sequence[Record]) -> str:
    """Learning rate over updates."""
    with _Drawing("lr", "Learning rate over updates") as drawing:
        for k, run in enumerate(runs):
            drawing.line(run.log.mean[:, STEP], run.log.mean[:, LR], k)
    return drawing.text


def speed(runs: Sequence[Record]) -> str:
    """Rows a second over updates: of each stretch its rows over its time, and the slowest and fastest update in it."""
    with _Drawing("speed", "Rows a second over updates") as drawing:
        for k, run in enumerate(runs):
            step, rate, low, high = rates(run)
            drawing.band(step, low, high, k)
            drawing.line(step, rate, k)
        drawing.axes.set_ylim(bottom=0)
    return drawing.text


def scores(columns: Sequence[tuple[Table, Table]], name: str, label: str) -> str:
    """Scores over epochs: (epochs, values) of each line."""
    with _Drawing(name, label, "epoch") as drawing:
        for k, (epochs, values) in enumerate(columns):
            drawing.line(epochs, values, k, marker=MARKERS[k % len(MARKERS)])
        drawing.axes.xaxis.get_major_locator().set_params(integer=True)
    return drawing.text


def calibration(runs: Sequence[Record]) -> str:
    """How often the model is right where it is so sure. A larger mark is more rows."""
    with _Drawing("calibration", "How often it is right, against how sure it is", "how sure the model is") as drawing:
        drawing.axes.plot([0, 1], [0, 1], color=paint("ink"), linewidth=0.8, dashes=(2, 2))
        for k, run in enumerate(runs):
            rows, sure, right = run.judged.bins[run.judged.bins[:, 0] > 0].T
            drawing.line(sure / rows, right / rows, k)
            drawing.axes.scatter(
                sure / rows, right / rows, s=12 + 120 * rows / rows.sum(), color=paint(f"c{k % len(LIGHT)}"),
                marker=MARKERS[k % len(MARKERS)],
            )  # fmt: skip
        drawing.axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return drawing.text


def regression(runs: Sequence[Record]) -> str:
    """Predicted numbers over true ones."""
    with _Drawing("regression", "Predicted number over true number", "true number") as drawing:
        pairs = [np.array(run.judged.pairs).reshape(-1, 2) for run in runs]
        ends = [float(end(pair[:, 0])) for pair in pairs if len(pair) for end in (np.min, np.max)]
        drawing.axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=paint("ink"), lw=0.8, dashes=(2, 2))
        for k, pair in enumerate(pairs):
            style: dict[str, Any] = {"color": paint(f"c{k % len(LIGHT)}"), "marker": MARKERS[k % len(MARKERS)]}
            drawing.axes.scatter(pair[:, 0], pair[:, 1], s=9, alpha=0.6, linewidths=0, **style)
    return drawing.text


# ---- what is drawn, in numbers ---------------------------------------------------------------------------------------


def smooth(values: Table, weights: Table, share: float = 0.04) -> Table:
    """The mean of each value and its neighbours, which are `share` of all; weighed, and NaN counts as nothing.

    >>> smooth(np.array([1.0, 2.0, 3.0]), np.ones(3), share=1.0).tolist()
    [1.5, 2.0, 2.5]
    """
    reach = int(len(values) * share / 2)
    known = np.where(np.isnan(values), 0.0, weights)
    sums = [np.concatenate([[0.0], np.cumsum(each)]) for each in (np.nan_to_num(values) * known, known)]
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    total, weight = (each[high] - each[low] for each in sums)
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def rates(run: Record) -> tuple[Table, Table, Table, Table]:
    """(steps, rows a second, the slowest update, the fastest) of stretches of the run; none where it has no times."""
    log = run.log
    if not log.known[:, TOOK].any():
        return _paces(run)
    edges = np.unique(np.linspace(0, len(log.low), min(POINTS, len(log.low)) + 1).astype(int))
    found = []
    for begin, end in pairwise(edges.tolist()):
        took, low, high = log.total[begin:end, TOOK].sum(), log.low[begin:end, SPEED], log.high[begin:end, SPEED]
        if took > 0 and not np.isnan(low).all():
            rate = log.total[begin:end, ROWS].sum() / took
            slowest, fastest = np.nanmin(low), np.nanmax(high)
            found.append((log.high[end - 1, STEP], min(max(rate, slowest), fastest), slowest, fastest))
    table = np.array(found).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def _paces(run: Record) -> tuple[Table, Table, Table, Table]:
    """The same of a log without times, from those that result.json has: its "speed", pairs of (update, seconds)."""
    times = run.times
    times = times[np.unique(np.linspace(0, max(0, len(times) - 1), min(len(times), 4 * POINTS)).astype(int))]
    # (of each bucket, its last update and how many rows there were until then)
    first = run.log.low[0, STEP] - 1 if len(run.log.low) else 0.0
    until, rows = np.append(first, run.log.high[:, STEP]), np.append(0, run.log.total[:, ROWS].cumsum())
    done = np.interp(times[:, 0], until, rows)
    moved = np.diff(times[:, 1], prepend=0.0)
    if first:  # the log begins where the run was resumed, and the first time is that of all updates before too
        moved[:1] = 0.0
    rate = np.divide(np.diff(done, prepend=0.0), moved, out=np.full(len(times), np.nan), where=moved > 0)
    return times[:, 0], rate, rate, rate


# ---- matplotlib ------------------------------------------------------------------------------------------------------


class _Drawing:
    """A `with` block with axes; at its end `text` is the drawing, as an svg element."""

    def __init__(self, name: str, label: str, over: str = "update") -> None:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.name, self.label, self.text, self.canvas = name, label, "", FigureCanvasSVG
        self.settings = rc_context({
            "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 11,
            "font.family": "DejaVu Sans", "axes.edgecolor": paint("line"), "axes.linewidth": 0.8,
            "xtick.color": paint("line"), "ytick.color": paint("line"), "xtick.labelcolor": paint("ink"),
            "ytick.labelcolor": paint("ink"), "axes.labelcolor": paint("ink"), "text.color": paint("ink"),
            "axes.spines.top": False, "axes.spines.right": False, "path.simplify": True,
        })  # fmt: skip
        self.settings.__enter__()
        self.figure = Figure(figsize=SIZE, dpi=72)  # margins by hand: finding them takes as long as drawing
        self.figure.subplots_adjust(left=0.12, right=0.96, top=0.92, bottom=0.16)
        self.axes: Any = self.figure.add_subplot()
        self.axes.set_xlabel(over)
        self.axes.locator_params(nbins=6)
        self.axes.ticklabel_format(scilimits=(-3, 5))
        self.axes.grid(color=paint("line"), linewidth=0.6)
        self.axes.set_axisbelow(True)
        self.axes.patch.set_visible(False)
        self.figure.patch.set_visible(False)

    def __enter__(self) -> _Drawing:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                file = io.StringIO()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a hostile log: an axis that begins where it ends
                    self.canvas(self.figure).print_svg(file, metadata={"Date": None})
                self.text = inline(file.getvalue(), self.name, self.label)
        finally:
            self.settings.__exit__(None, None, None)

    def line(self, x: Table, y: Table, k: int, marker: str = "") -> None:
        """A line in the k-th colour and dashes; one point alone is a mark."""
        dashes = [float(number) / 1.6 for number in DASHES[k % len(DASHES)].split()]
        style: dict[str, Any] = {"dashes": dashes} if dashes else {}
        mark = marker or ("o" if len(x) == 1 else "")
        self.axes.plot(x, y, color=paint(f"c{k % len(LIGHT)}"), linewidth=1.6, marker=mark, markersize=5, **style)

    def band(self, x: Table, low: Table, high: Table, k: int) -> None:
        self.axes.fill_between(x, low, high, color=paint(f"c{k % len(LIGHT)}"), alpha=0.22, linewidth=0.5)

    def rug(self, x: Table) -> None:
        """Crosses along the lower edge: updates that were left out."""
        if len(x):
            place = self.axes.get_xaxis_transform()
            self.axes.plot(x, np.full(len(x), 0.015), "x", color=paint("c1"), markersize=5, transform=place)

    def marks(self, steps: Sequence[int]) -> None:
        """Upright lines: where an epoch begins."""
        for step in steps:
            if math.isfinite(step):
                self.axes.axvline(step, color=paint("ink"), linewidth=0.7, dashes=(1, 3))
