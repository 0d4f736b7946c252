"""The trace as a file that Perfetto and chrome://tracing open: a process for each rank, a row for each bucket.

>>> sent = Event("all-reduce", 1.0, 1.5, "bucket 1 of 1, (2,) float32, 8 bytes", "ranks/ddp.py:9", 0, "send")
>>> text = timeline([[sent], [replace(sent, begin=1.2)]], "Two ranks")
>>> [(row["pid"], row["ts"], row["dur"]) for row in json.loads(text)["traceEvents"] if row.get("cat") == sent.what]
[(1, 0.0, 500000.0), (2, 200000.0, 300000.0)]
>>> events_of(text)[0][0][0].text
'bucket 1 of 1, (2,) float32, 8 bytes'

Underneath: `torch.profiler.profile` (torch 2.13) exports the same format, a file for each process.
  - Ranks of one machine read one monotonic clock.
  - Whether that holds is measured: no all-reduce is back before every rank has sent its part. This bounds the
    difference from rank 0's clock. If 0 is out of bounds, their middle is added.
  - On a GPU there are no bounds.

Proof: test_the_timeline_keeps_to_the_format, test_clocks_that_differ_are_put_on_one in tests/trace/test_timeline.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.names import begins, oddity, write_whole
from nanofinetune.trace.observe import Event
from nanofinetune.trace.told import Ranks, phases

OURS = '{"otherData":{"made by":"python -m nanofinetune.trace"'  # how a file begins that may be written over
PHASES, CALLS, BUCKETS = 1, 2, 100  # rows of a process; those of calls may be several, and each bucket has one
ROWS = 10_000  # of a process: no two rows of a file have one number, and none has its process's (the "main thread")
KEPT = ("text", "where", "function", "bucket")  # arguments of a row that are no measurements


def timeline(ranks: Ranks, title: str) -> str:
    """The events of all ranks in Chrome's trace-event format: JSON, one row of it a line, ordered by time.

    Times are microseconds from the first event. A rank is the process with its number + 1 (0 would be the system's).
    """
    bounds = [(0.0, 0.0), *(clock_bounds(ranks[0], events) for events in ranks[1:])]
    shifts = [0.0 if low <= 0 <= high else (low + high) / 2 for low, high in bounds]
    zero = min(event.begin + shift for events, shift in zip(ranks, shifts, strict=True) for event in events)
    names: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for rank, (events, shift) in enumerate(zip(ranks, shifts, strict=True)):
        moved = [replace(event, begin=event.begin + shift - zero, end=event.end + shift - zero) for event in events]
        names += _names(rank, moved)
        rows += _rows(rank + 1, moved)
    rows.sort(key=lambda row: (row["ts"], -row["dur"]))  # the outer one first
    allowed = [[round(bound * 1e6, 3) for bound in pair] if pair[1] < float("inf") else None for pair in bounds[1:]]
    about = {
        "made by": "python -m nanofinetune.trace", "title": title, "torch": torch.__version__,
        "clock": "time.monotonic of rank 0, from its first event on; on a GPU the time when work was handed over",
        "added to each rank's clock, in microseconds": [round(shift * 1e6, 3) for shift in shifts],
        "what the all-reduces allow to add to those after the first": allowed,
    }  # fmt: skip
    head = f'{{"otherData":{_json(about)},\n"displayTimeUnit":"ms",\n"traceEvents":[\n'
    return head + ",\n".join(map(_json, names + rows)) + "\n]}\n"


def events_of(text: str) -> tuple[Ranks, str]:
    """What `timeline` wrote -> the events of each rank, in seconds, and the title. Raises ValueError for other text."""
    if not text.startswith(OURS):
        raise ValueError("this is no timeline of python -m nanofinetune.trace")
    saved = json.loads(text)
    found: dict[int, list[Event]] = {}
    for row in saved["traceEvents"]:
        if row["ph"] == "X" and "text" in row["args"]:
            args = dict(row["args"])
            said, place, function, bucket = (args.pop(name, None) for name in KEPT)
            begin, end = row["ts"] / 1e6, (row["ts"] + row["dur"]) / 1e6
            event = Event(row["cat"], begin, end, said, place, bucket and bucket - 1, function, args)
            found.setdefault(row["pid"] - 1, []).append(event)
    return [found[rank] for rank in sorted(found)], saved["otherData"]["title"]


def clock_bounds(first: list[Event], other: list[Event]) -> tuple[float, float]:
    """The least and the most seconds that may be added to `other`'s clock, so that it is that of `first`.

    An all-reduce is back on no rank before all ranks have sent their part. Infinite where none tells.
    """
    low, high = float("-inf"), float("inf")
    if any(event.what == "world" and ", cpu," not in event.text for event in first):
        return low, high  # the moment at which an all-reduce is back is not known
    ours = dict(_journeys(first))
    for which, theirs in _journeys(other):
        if which in ours:
            low, high = max(low, ours[which].begin - theirs.end), min(high, ours[which].end - theirs.begin)
    return low, high


def save(place: Path, text: str, ours: str, option: str) -> None:
    """Write a file whole or not at all; over another one only if that begins with `ours`.

    Raises:
        UsageError: it is somebody else's, or cannot be written.
    """
    check(place, ours, option)
    try:
        write_whole(place.resolve(), text, lambda: check(place, ours, option))  # of a link what it leads to
    except OSError as error:
        raise UsageError(f"{option} {place}: it cannot be written ({error.strerror})") from error


def check(place: Path, ours: str, option: str) -> None:
    """Raises UsageError where `save` would: before the work that makes the text."""
    if not place.absolute().parent.is_dir():
        raise UsageError(f"{option} {place}: there is no such folder")
    if place.is_dir() or oddity(place):
        raise UsageError(f"{option} {place}: it is {oddity(place) or 'a folder'}; name a file")
    if place.is_file():
        try:
            known = begins(place, ours)
        except OSError as error:
            raise UsageError(f"{option} {place}: it cannot be read ({error.strerror}); name another file") from error
        if not known:
            raise UsageError(f"{option} {place}: this file is not from nanofinetune.trace; name another one")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _journeys(events: Iterable[Event]) -> Iterator[tuple[tuple[int | None, int], Event]]:
    """((bucket, how many of it came before), its all-reduce), in order of time."""
    count: dict[int | None, int] = {}
    for event in sorted(events, key=lambda event: event.begin):
        if event.what == "all-reduce":
            count[event.bucket] = count.get(event.bucket, -1) + 1
            yield (event.bucket, count[event.bucket]), event


def _names(rank: int, events: list[Event]) -> Iterator[dict[str, Any]]:
    """Metadata: what the process and its rows are called, and in which order they stand."""
    pid = rank + 1
    world = next((event.text.split(", ") for event in events if event.what == "world"), [])
    yield _metadata(pid, "process_name", PHASES, name=f"rank {rank}")
    yield _metadata(pid, "process_labels", PHASES, labels=", ".join(world[2:]))
    yield _metadata(pid, "process_sort_index", PHASES, sort_index=rank)
    rows = {PHASES: "phases"}
    rows |= {CALLS + level: "calls" if level == 0 else f"calls beside them, {level}" for level, _ in _levels(events)}
    for event in events:
        if event.what == "all-reduce" and event.bucket is not None:
            rows[BUCKETS + event.bucket] = f"bucket {event.bucket + 1}, {event.text.rpartition(', ')[2]}"
    for row, name in sorted(rows.items()):
        yield _metadata(pid, "thread_name", row, name=name)
        yield _metadata(pid, "thread_sort_index", row, sort_index=row)


def _metadata(pid: int, what: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": pid * ROWS + tid, "args": args}


def _rows(pid: int, events: list[Event]) -> Iterator[dict[str, Any]]:
    """Complete events ("X"): the phases, every call, each bucket's journey, and in the bucket's row its gradients."""
    found = [(name, phase) for name, phase in phases(events) if phase]
    begins = [min(event.begin for event in phase) for _, phase in found]
    for (name, phase), begin, then in zip(found, begins, [*begins[1:], float("inf")], strict=True):
        calls = [event for event in phase if event.bucket is None] or phase
        yield _complete(pid, PHASES, "phase", name, begin, min(max(event.end for event in calls), then), {})
    for level, event in _levels(events):
        yield _complete(pid, CALLS + level, event.what, event.what, event.begin, event.end, _arguments(event))
    for bucket in sorted({event.bucket for event in events if event.bucket is not None}):
        gradients = sorted(
            (event for event in events if event.what == "gradient" and event.bucket == bucket),
            key=lambda event: event.begin,
        )
        for _, sent in _journeys(event for event in events if event.bucket == bucket):
            inside = [event for event in gradients if event.begin < sent.begin]
            gradients = [event for event in gradients if event.begin >= sent.begin]
            if inside:
                text = {"gradients": len(inside), "waits for": "its last gradient, and the buckets before it"}
                yield _complete(pid, BUCKETS + bucket, "filling", "filling", inside[0].begin, sent.begin, text)
            # Another thread notes when it is back, and may do so late; the next backward begins after that.
            end = min([sent.end, *(event.begin for event in gradients[:1])])
            yield _complete(pid, BUCKETS + bucket, sent.what, "on the way", sent.begin, end, _arguments(sent))
    for event in events:
        if event.what == "gradient" and event.bucket is not None:
            row = BUCKETS + event.bucket
            yield _complete(pid, row, event.what, event.text, event.begin, event.end, _arguments(event))


def _complete(
    pid: int, tid: int, kind: str, name: str, begin: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    """One event. Begin and end are rounded, not the duration: what lies inside another one stays inside."""
    ts, until = round(begin * 1e6, 3), round(end * 1e6, 3)
    return {
        "ph": "X", "name": name, "cat": kind, "pid": pid, "tid": pid * ROWS + tid, "ts": ts,
        "dur": round(until - ts, 3), "args": args,
    }  # fmt: skip


def _arguments(event: Event) -> dict[str, Any]:
    said = {"text": event.text, "where": event.place, "function": event.function}
    return said | ({} if event.bucket is None else {"bucket": event.bucket + 1}) | event.args


def _levels(events: list[Event]) -> Iterator[tuple[int, Event]]:
    """Calls without a bucket, each with the first row in which it is inside of, or apart from, every other call."""
    open_calls: list[list[float]] = []  # of each row, the ends of the calls that have begun
    for event in sorted(events, key=lambda event: (event.begin, -event.end)):
        if event.bucket is not None:
            continue
        for level in range(len(open_calls) + 1):
            if level == len(open_calls):
                open_calls.append([])
            ends = open_calls[level]
            while ends and ends[-1] <= event.begin:
                ends.pop()
            if not ends or event.end <= ends[-1]:
                ends.append(event.end)
                yield level, event
                break
