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

from collections.abc import Iterator
from typing import Any

from nanofinetune.trace.observe import Event

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
    """The lines of the report: one for each thing that happened, with begin and duration on every rank, in ms."""
    split = [dict(phases(events)) for events in ranks]
    zero = split[0]["update 1"][0].begin if "update 1" in split[0] else split[0]["set-up"][0].begin
    times = "   ".join(f"{f'rank {r}: at':>12}{'took':>9}" for r in range(len(ranks)))
    for name in split[0]:
        yield ""
        yield f"{name:<{len(times)}}   (milliseconds; 0 is the first batch)" if name == "set-up" else name
        if name in ("set-up", "update 1"):
            yield times
        by_rank = [_grouped(phase.get(name, []), name == "afterwards") for phase in split]
        for i, event in enumerate(by_rank[0]):
            same = [rows[i] if i < len(rows) and rows[i].what == event.what else None for rows in by_rank]
            columns = "   ".join(
                f"{(e.begin - zero) * 1e3:12.1f}{(e.end - e.begin) * 1e3:9.1f}" if e else " " * 21 for e in same
            )
            yield f"{columns}   {event.what:<11} {event.text}"
            for r, other in enumerate(same[1:], start=1):
                if other is not None and other.text != event.text:
                    yield f"{' ' * len(columns)}   {f'  (rank {r})':<11} {other.text}"
        for r, phase in enumerate(split):
            if summary := overlap(phase.get(name, [])):
                yield f"{'':{len(times)}}   rank {r}: {summary}"
    yield ""
    yield "where that is:"
    for what, place in dict.fromkeys((event.what, event.place) for event in sorted(ranks[0], key=lambda e: e.begin)):
        yield f"  {what:<17} {place}"


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
        rows.append(Event(first.what, first.begin, last, text, first.place, first.bucket))
    return sorted(rows, key=lambda event: event.begin)
