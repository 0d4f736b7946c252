"""The last update as a drawing: what each rank computes, when its gradients are ready, which buckets are on their way.

>>> def update(start):  # forward, backward and the optimizer's step, a second each
...     return [Event(what, start + i, start + i + 1, "", "") for i, what in enumerate(("forward", "backward"))] + [
...         Event("optimizer", start + 2, start + 3, "", ""), Event("zero_grad", start + 3, start + 3, "", "")]
>>> svg = picture([[Event("collate", 0, 0, "", ""), *update(0)]], "One rank")
>>> svg.count("<rect"), "forward: 1000.0 ms" in svg  # the background and three bars
(4, True)

Underneath: `torch.profiler.profile` (torch 2.13) exports a trace for a viewer of a browser; this is one SVG file.
  - Colours are those of buckets: groups of gradients that are averaged in one message.
  - A bar of `backward` ends where it begins to wait for messages.

Proof: test_the_picture_holds_what_was_measured, test_one_process_has_no_buckets in tests/trace/test_trace.py.
"""

from __future__ import annotations

import html

from nanofinetune.trace.observe import Event
from nanofinetune.trace.told import Ranks, overlap, phases

COLOURS = {"forward": "#8ab6d6", "backward": "#3b6fb6", "wait": "#d9d9d9", "optimizer": "#6aa84f"}
BUCKETS = ("#e69138", "#cc4125", "#8e63a9", "#c27ba0", "#b58900", "#2aa198")
WIDTH, LEFT, RIGHT, BAR, LANE = 1200, 90, 30, 26, 20
LEGEND = (
    "A mark: a gradient is ready, in its bucket's colour. A bucket is sent when its last gradient is ready, after the"
    " bucket before it. Green: the optimizer."
)


def picture(ranks: Ranks, title: str) -> str:
    """The last update of every rank as SVG text, all on one time axis. Raises IndexError where there is no update."""
    updates = [[phase for name, phase in phases(events) if name.startswith("update")][-1] for events in ranks]
    shown = [[e for e in events if e.what in COLOURS or e.bucket is not None] for events in updates]
    begin = min(event.begin for events in shown for event in events)
    end = max(event.end for events in shown for event in events)
    scale = (WIDTH - LEFT - RIGHT) / (end - begin)
    parts: list[str] = []

    def x(moment: float) -> float:
        return LEFT + (moment - begin) * scale

    def text(where: float, y: float, words: str, anchor: str = "start", size: int = 13, colour: str = "#222") -> None:
        parts.append(
            f'<text x="{where:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
            f"{html.escape(words)}</text>"
        )

    def bar(event: Event, y: float, height: int, colour: str) -> tuple[float, float, str]:
        left, width = x(event.begin), max(1.0, (event.end - event.begin) * scale)
        took = f"{(event.end - event.begin) * 1e3:.1f} ms"
        parts.append(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}">'
            f"<title>{event.what} {html.escape(event.text)}: {took}</title></rect>"
        )
        return left, width, took

    text(LEFT, 26, title, size=16)
    y = 44.0
    for r, events in enumerate(shown):
        text(14, y + BAR - 8, f"rank {r}", size=14)
        wait = next((event for event in events if event.what == "wait"), None)
        for event in events:
            if event.what in COLOURS:
                if event.what == "backward" and wait is not None:  # it contains the wait
                    event = Event("backward", event.begin, wait.begin, event.text, event.place)
                left, width, took = bar(event, y, BAR, COLOURS[event.what])
                fitting = [words for words in (f"{event.what}: {took}", event.what) if 7.5 * len(words) < width]
                light = "#222" if event.what in ("wait", "forward") else "#fff"
                text(left + width / 2, y + BAR - 8, fitting[0] if fitting else "", "middle", colour=light)
        y += BAR + 4
        for event in events:
            if event.what == "gradient" and event.bucket is not None:
                at, colour = f"{x(event.end):.1f}", BUCKETS[event.bucket % len(BUCKETS)]
                parts.append(
                    f'<line x1="{at}" x2="{at}" y1="{y:.1f}" y2="{y + 14:.1f}" stroke="{colour}" stroke-width="1.5">'
                    f"<title>{html.escape(event.text)}</title></line>"
                )
        text(14, y + 12, "gradients", size=12, colour="#666")
        y += 20
        text(14, y + 12, "all-reduce", size=12, colour="#666")
        lanes = 0
        for event in events:
            if event.what == "all-reduce" and event.bucket is not None:
                lane = event.bucket % len(BUCKETS)
                left, width, took = bar(event, y + lane * LANE, LANE - 4, BUCKETS[lane])
                words = f"bucket {event.bucket + 1}, {event.text.rpartition(', ')[2]}: {took}"
                before = left - 8 * len(words) > LEFT
                edge = left - 5 if before else left + width + 5
                text(edge, y + lane * LANE + 12, words, "end" if before else "start", 12, "#444")
                lanes = max(lanes, lane + 1)
        y += max(1, lanes) * LANE
        text(LEFT, y + 12, overlap(events), size=12, colour="#666")
        y += 38
    step = next(k * 10**e for e in range(9) for k in (1, 2, 5) if (end - begin) * 1e3 / (k * 10**e) <= 12)
    for k in range(int((end - begin) * 1e3 / step) + 1):
        tick = x(begin + k * step / 1e3)
        parts.insert(0, f'<line x1="{tick:.1f}" x2="{tick:.1f}" y1="40" y2="{y - 8:.1f}" stroke="#eee"/>')
        text(tick, y + 6, f"{k * step} ms", "middle", 12, "#666")
    text(LEFT, y + 30, LEGEND, size=12, colour="#666")
    height = y + 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
        f' height="{height:.0f}" font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
