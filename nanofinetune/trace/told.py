"""The report of a trace: its phases, what happened in each on every rank, and how much of the communication was hidden.

>>> merged([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
[(0.0, 3.0), (5.0, 6.0)]
>>> sent = [Event("all-reduce", 1.0, 2.0, "bucket 1 of 2", ""), Event("all-reduce", 1.5, 4.0, "bucket 2 of 2", "")]
>>> overlap([*sent, Event("wait", 3.0, 4.5, "", "")])  # backward computed until 3.0
'2 buckets spent 3000.0 ms on the way, 2000.0 ms of it while backward still ran; it waited 1500.0 ms'

Underneath: `torch.profiler.profile` (torch 2.13) leaves the reading to you: a file for a viewer.
  - Here a line for each thing that happened, in order, with its begin and its duration on every rank.
  - An *update* of the weights ends with `zero_grad`. Several batches may be accumulated into one.

Proof: test_two_ranks_tell_what_happens_in_order, test_any_optimizer_is_told_at_the_end_of_its_window in
tests/trace/test_trace.py.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanofinetune.trace.observe import ROOT, Event

WIDTH = 100  # columns of the report
MOST_SHOWN = 2  # ranks beside each other
Ranks = list[list[Event]]  # the events of each rank


def phases(events: list[Event]) -> list[tuple[str, list[Event]]]:
    """A rank's events, in any order -> (name, events) of set-up, update 1, update 2, ..., and what comes afterwards."""
    ordered = sorted(events, key=lambda event: event.begin)
    prepared = max((i for i, event in enumerate(ordered) if event.what == "prepare"), default=-1)  # the trial is before
    collated = (i for i, event in enumerate(ordered) if event.what == "collate" and i > prepared)
    first = next(collated, len(ordered))
    found, rest = [("set-up", ordered[:first])], ordered[first:]
    steps = [event.end for event in rest if event.what == "optimizer"]
    resets = [event.end for event in rest if event.what == "zero_grad"]
    for count, step in enumerate(steps, start=1):
        end = min(reset for reset in resets if reset >= step)  # an update ends with zero_grad
        found.append((f"update {count}", [event for event in rest if event.begin < end]))
        rest = [event for event in rest if event.begin >= end]
    return [*found, ("afterwards", rest)]


def told(ranks: Ranks) -> Iterator[str]:
    """The lines of the report: one for each thing that happened, with begin and duration on every rank, in ms.

    They are at most WIDTH wide. Of more than two ranks, there is rank 0, and the one on which it took longest.
    """
    split = [dict(phases(events)) for events in ranks]
    zero = split[0]["update 1"][0].begin if "update 1" in split[0] else split[0]["set-up"][0].begin
    columns = [f"rank {r}: at" for r in range(len(ranks))] if len(ranks) <= MOST_SHOWN else ["rank 0: at", "longest"]
    heads = "  ".join(f"{head:>10}{'took':>8}" for head in columns)
    empty, blank = " " * len(heads), " " * 18

    def line(events: Sequence[Event | None], what: str, text: str) -> Iterator[str]:
        times = "  ".join(
            f"{(e.begin - zero) * 1e3:10.1f}{(e.end - e.begin) * 1e3:8.1f}" if e else blank for e in events
        )
        lead = f"{times or empty}  {what:<10} "
        words = textwrap.wrap(text, WIDTH - len(lead), break_on_hyphens=False) or [""]
        yield f"{lead}{words[0]}".rstrip()
        yield from (f"{' ' * len(lead)}{rest}" for rest in words[1:])

    for name in split[0]:
        yield ""
        yield name
        if name in ("set-up", "update 1"):
            yield f"{heads}  (milliseconds; 0 is the first batch)"
        by_rank = [_grouped(phase.get(name, []), name == "afterwards") for phase in split]
        for i, event in enumerate(by_rank[0]):
            same = [rows[i] if i < len(rows) and rows[i].what == event.what else None for rows in by_rank]
            if len(ranks) <= MOST_SHOWN:
                yield from line(same, event.what, event.text)
                for r, other in enumerate(same[1:], start=1):
                    if other is not None and other.text != event.text:
                        yield from line([], f"  (rank {r})", other.text)
            else:
                slowest, r = max(((e, r) for r, e in enumerate(same) if e), key=lambda one: one[0].end - one[0].begin)
                yield from line([event, slowest], event.what, event.text)
                if slowest.text != event.text:
                    yield from line([], f" (rank {r})", slowest.text)
        for r, phase in enumerate(split):
            if summary := overlap(phase.get(name, [])):
                yield from line([], f"  (rank {r})", summary)
    yield ""
    yield "where that is:"
    first: dict[tuple[str, str], Event] = {}
    for event in sorted(ranks[0], key=lambda event: event.begin):
        first.setdefault((event.what, event.place), event)
    for event in first.values():
        lead, tail = f"  {event.what:<10}  ", f"  {event.function}"
        yield f"{lead}{clickable(event.place, WIDTH - len(lead) - len(tail))}{tail}"


def clickable(place: str, most: int) -> str:
    """A function's file and line as a terminal or an editor opens them from here, if that takes `most` letters at most.

    >>> clickable("no/such/file.py:3", 40)
    'no/such/file.py:3'
    """
    file, _, line = place.partition(":")
    for folder in map(Path, (str(ROOT), *sys.path)):
        if (folder / file).is_file():
            here, found = Path.cwd(), (folder / file).absolute()
            shown = f"{found.relative_to(here) if found.is_relative_to(here) else found}:{line}"
            return shown if len(shown) <= most else place
    return place


def overlap(events: list[Event]) -> str:
    """How much of the all-reduces ran beside backward, in words; "" where there were none."""
    journeys = [event for event in events if event.what == "all-reduce"]
    waits = [event for event in events if event.what == "wait"]
    if not journeys or not waits:
        return ""
    done = waits[-1].begin  # the last gradient was ready
    busy = merged([(event.begin, event.end) for event in journeys])
    whole = sum(end - begin for begin, end in busy)
    hidden = sum(max(0.0, min(end, done) - begin) for begin, end in busy)
    waited = sum(event.end - event.begin for event in waits)
    return (
        f"{len(journeys)} bucket{'s' * (len(journeys) > 1)} spent {whole * 1e3:.1f} ms on the way,"
        f" {hidden * 1e3:.1f} ms of it while backward still ran; it waited {waited * 1e3:.1f} ms"
    )


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as intervals that do not touch."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


def _grouped(events: list[Event], evaluation: bool) -> list[Event]:
    """The gradients of a bucket as one event; after training, all calls of one kind as one."""
    groups: dict[Any, list[Event]] = {}
    for i, event in enumerate(events):
        key: Any = (event.what, event.bucket) if event.what == "gradient" else i
        groups.setdefault((event.what, event.place) if evaluation and event.text else key, []).append(event)
    rows = []
    for group in groups.values():
        first, last = group[0], max(event.end for event in group)
        text = first.text
        if len(group) > 1 and first.what == "gradient":
            assert first.bucket is not None
            text = f"{len(group)} into bucket {first.bucket + 1}: {first.text} to {group[-1].text}"
        elif len(group) > 1:
            text = f"{len(group)} times, the first: {text}"
            last = first.begin + sum(event.end - event.begin for event in group)
        rows.append(replace(first, end=last, text=text))
    return sorted(rows, key=lambda event: event.begin)
