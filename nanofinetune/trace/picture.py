"""The last update as a drawing: what each rank computes, when its gradients are ready, which buckets are on their way.

>>> def update(start):  # forward, backward and the optimizer's step, a second each
...     return [Event(what, start + i, start + i + 1, "", "") for i, what in enumerate(("forward", "backward"))] + [
...         Event("optimizer", start + 2, start + 3, "", ""), Event("zero_grad", start + 3, start + 3, "", "")]
>>> (rank,) = layout([[Event("collate", 0, 0, "", ""), *update(0)]])
>>> [(bar.what, bar.begin, bar.took, bar.row) for bar in rank.bars]
[('forward', 0.0, 1000.0, 0), ('backward', 1000.0, 1000.0, 0), ('optimizer', 2000.0, 1000.0, 0)]

Underneath: `torch.profiler.profile` (torch 2.13) leaves the drawing to a viewer in a browser; this is one SVG file.
  - `layout` says what stands where, in milliseconds. matplotlib (the extra `report`) draws it.
  - Colours are those of buckets: groups of gradients that are averaged in one message.
  - A bar of `backward` ends where it begins to wait for messages; inside a window of batches it waits for none.

Proof: test_the_picture_holds_what_was_measured, test_one_process_has_no_buckets in tests/trace/test_trace.py.
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass, field
from typing import Any

from nanofinetune.ground.errors import UsageError
from nanofinetune.trace.observe import Event
from nanofinetune.trace.told import Ranks, overlap, phases

# Told apart by the colour-blind: Okabe and Ito's colours, and Paul Tol's for more buckets.
COLOURS = {"forward": "#56B4E9", "backward": "#0072B2", "wait": "#DDDDDD", "optimizer": "#009E73"}
BUCKETS = ("#E69F00", "#D55E00", "#CC79A7", "#882255", "#999933", "#332288")
OURS = "<!-- made by python -m nanofinetune.trace -->"  # how a file begins that may be written over
MISSING = "matplotlib draws it, and is not installed: pip install -e '.[report]'"
WIDTH = 11.5  # inches
INK, SOFT = "#222222", "#5F5F5F"


@dataclass
class Bar:
    """Something that took a while, in milliseconds from the first thing that is drawn."""

    what: str
    begin: float
    took: float
    row: int  # 0 what the rank computes, 2 its first bucket
    colour: str
    words: list[str]  # what may be written on it, or beside it; the first that there is room for


@dataclass
class Rank:
    """One rank's part of the drawing."""

    bars: list[Bar] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)  # when a gradient was ready, its bucket's colour
    rows: list[str] = field(default_factory=lambda: ["computes"])
    summary: str = ""


def layout(ranks: Ranks) -> list[Rank]:
    """What is drawn of the last update of every rank, all on one time axis. Raises IndexError where there is none."""
    updates = [[phase for name, phase in phases(events) if name.startswith("update")][-1] for events in ranks]
    shown = [[e for e in events if e.what in COLOURS or e.bucket is not None] for events in updates]
    zero = min(event.begin for events in shown for event in events)
    return [_rank(events, zero) for events in shown]


def picture(ranks: Ranks, title: str) -> str:
    """The drawing as SVG text, the same for the same events. Raises IndexError where there is no update.

    Raises:
        UsageError: matplotlib is not installed.
    """
    check_matplotlib("--picture")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    settings = {
        "font.family": "DejaVu Sans",  # matplotlib brings it
        "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "nanofinetune", "hatch.linewidth": 0.6,
        "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "path.simplify": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        target = io.StringIO()
        FigureCanvasSVG(figure(layout(ranks), title)).print_svg(target, metadata={"Date": None, "Creator": None})
    text = target.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")  # where it is not there
    return f"{OURS}\n" + "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"


def figure(parts: list[Rank], title: str) -> Any:
    """A matplotlib Figure of what `layout` made."""
    from matplotlib.figure import Figure

    end = max(bar.begin + bar.took for part in parts for bar in part.bars)
    heights = [len(part.rows) + (1.1 if part.summary else 0.3) for part in parts]
    height = 0.245 * sum(heights) + 1.25
    drawing = Figure(figsize=(WIDTH, height), facecolor="white")
    panels = drawing.subplots(len(parts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    drawing.subplots_adjust(left=0.085, right=0.985, top=1 - 0.42 / height, bottom=0.66 / height, hspace=0.06)
    drawing.text(0.085, 1 - 0.26 / height, title, fontsize=10.5, fontweight="bold")
    for r, (part, panel) in enumerate(zip(parts, panels, strict=True)):
        _draw(panel, part, end, last=r == len(parts) - 1)
        panel.text(-0.083, 0, f"rank {r}", fontsize=10.5, fontweight="bold", va="center",
                   transform=panel.get_yaxis_transform())  # fmt: skip
    panels[-1].set_xlabel("milliseconds from the update's forward", fontsize=8.5, color=SOFT, labelpad=2)
    legend = (
        "A mark: a gradient is ready, in its bucket's colour. A bucket leaves when its last gradient is ready, after"
        " the bucket before it. Green: the optimizer."
    )
    drawing.text(0.085, 0.07 / height, legend, fontsize=8.5, color=SOFT)
    return drawing


def check_matplotlib(option: str) -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{option}: {MISSING}")


def _rank(events: list[Event], zero: float) -> Rank:
    part = Rank(summary=overlap(events))
    waits = [event.begin for event in events if event.what == "wait"]
    buckets = sorted({event.bucket for event in events if event.what == "all-reduce" and event.bucket is not None})
    if buckets:
        part.rows += ["gradients", *(f"bucket {bucket + 1}" for bucket in buckets)]
    for event in sorted(events, key=lambda event: event.begin):
        end = event.end
        if event.what == "backward":  # it contains the wait, if it is the window's last
            end = next((wait for wait in waits if event.begin <= wait <= event.end), end)
        begin, took = (event.begin - zero) * 1e3, (end - event.begin) * 1e3
        if event.what in COLOURS:
            words = [f"{event.what} {took:.1f} ms", event.what]
            part.bars.append(Bar(event.what, begin, took, 0, COLOURS[event.what], words))
        elif event.what == "all-reduce" and event.bucket is not None:
            words = [f"{event.text.rpartition(', ')[2]}, {took:.1f} ms"]
            row, colour = 2 + buckets.index(event.bucket), BUCKETS[event.bucket % len(BUCKETS)]
            part.bars.append(Bar(event.what, begin, took, row, colour, words))
        elif event.what == "gradient" and event.bucket is not None:
            part.marks.append(((event.end - zero) * 1e3, BUCKETS[event.bucket % len(BUCKETS)]))
    return part


def _draw(panel: Any, part: Rank, end: float, last: bool) -> None:
    panel.set_xlim(-0.004 * end, 1.004 * end)
    panel.set_ylim(len(part.rows) + (0.6 if part.summary else -0.2), -0.62)
    panel.set_yticks(range(1, len(part.rows)), part.rows[1:])
    panel.tick_params(length=0, labelsize=8.5, pad=4)
    panel.tick_params(axis="x", labelbottom=last)
    panel.grid(axis="x", color="#E8E8E8", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in panel.spines.values():
        side.set_visible(False)
    for bar in part.bars:
        thick, hatch = (0.86, None) if bar.row == 0 else (0.62, None)
        if bar.what == "wait":
            hatch = "////"
        panel.barh(bar.row, max(bar.took, 0.001 * end), left=bar.begin, height=thick, color=bar.colour, hatch=hatch,
                   edgecolor="#AAAAAA" if hatch else "none", linewidth=0)  # fmt: skip
        _write(panel, bar, end)
    for moment, colour in part.marks:
        panel.plot([moment, moment], [0.66, 1.34], color=colour, linewidth=1.1, solid_capstyle="butt")
    if part.summary:
        panel.text(0, len(part.rows) + 0.02, part.summary, fontsize=8.5, color=SOFT, va="center")


def _write(panel: Any, bar: Bar, end: float) -> None:
    """A bar's words: inside where they fit; those of a bucket else beside it, on the side that has more room."""
    letter = end / 165  # a letter of this size is about so wide
    fitting = [words for words in bar.words if letter * (len(words) + 1) < bar.took]
    style: dict[str, Any] = {"va": "center_baseline", "fontsize": 8.5}
    if fitting:
        light = bar.colour in ("#0072B2", "#009E73", "#882255", "#332288", "#D55E00")
        box = {"boxstyle": "square,pad=0.15", "facecolor": bar.colour, "edgecolor": "none"}
        panel.text(bar.begin + bar.took / 2, bar.row, fitting[0], ha="center", color="white" if light else INK,
                   bbox=box if bar.what == "wait" else None, **style)  # fmt: skip
    elif bar.row > 0 and bar.begin > end / 2:
        panel.text(bar.begin - letter, bar.row, bar.words[0], ha="right", color=SOFT, **style)
    elif bar.row > 0:
        panel.text(bar.begin + bar.took + letter, bar.row, bar.words[0], ha="left", color=SOFT, **style)
