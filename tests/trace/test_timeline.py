"""The timeline keeps to Chrome's trace-event format, and puts the ranks' clocks on one.

The reference is the format's own document ("Trace Event Format", the Chromium project); `faults_of` checks its rules.
Perfetto (version 52) opened what a run of two ranks wrote without one import error; that is not repeated here.

    python -m pytest tests/trace/test_timeline.py
"""

import json
import math
import os
from dataclasses import replace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nanofinetune.ground.errors import UsageError
from nanofinetune.trace.observe import Event
from nanofinetune.trace.timeline import OURS, check, clock_bounds, events_of, save, timeline

WORLD = "rank 0 of 2, gloo, cpu, 1 thread"


def faults_of(trace):
    """What in a parsed trace breaks the format's rules, one line each."""
    found = []
    if not isinstance(trace.get("traceEvents"), list) or trace.get("displayTimeUnit") not in ("ms", "ns"):
        return ["no list of traceEvents, or a unit other than ms and ns"]
    named: dict[str, set[object]] = {}
    stacks: dict[object, list[float]] = {}  # of each row, the ends of the slices that are open
    used, last = set(), -math.inf
    for i, event in enumerate(trace["traceEvents"]):
        kinds = {"ph": str, "name": str, "pid": int, "tid": int, "args": dict}
        found += [
            f"{i}: {key} is no {kind.__name__}" for key, kind in kinds.items() if type(event.get(key)) is not kind
        ]
        row = event["pid"], event["tid"]
        if event["ph"] == "M":
            values = {"process_name": "name", "thread_name": "name", "process_labels": "labels"}
            values |= {"process_sort_index": "sort_index", "thread_sort_index": "sort_index"}
            if list(event["args"]) != [values.get(event["name"])]:
                found.append(f"{i}: {event['name']} with {event['args']}")
            named.setdefault(event["name"], set()).add(row if event["name"].startswith("thread") else event["pid"])
            continue
        if event["ph"] != "X":
            found.append(f"{i}: neither metadata nor a complete event: {event['ph']}")
            continue
        used.add(row)
        times = event.get("ts"), event.get("dur")
        if not all(isinstance(time, (int, float)) and math.isfinite(time) and time >= 0 for time in times):
            found.append(f"{i}: ts and dur are {times}")
            continue
        if not isinstance(event.get("cat"), str):
            found.append(f"{i}: no category")
        if event["ts"] < last:
            found.append(f"{i}: it begins before the one above it")
        last, until = event["ts"], event["ts"] + event["dur"]
        stack = stacks.setdefault(row, [])  # slices of one row lie inside each other, or apart (to a nanosecond)
        while stack and stack[-1] <= event["ts"] + 1e-3:
            stack.pop()
        if stack and until > stack[-1] + 1e-3:
            found.append(f"{i}: {event['name']} ends after the slice around it")
        stack.append(until)
    found += [f"row {row} has no name" for row in used - named.get("thread_name", set())]
    found += [f"process {pid} has no name" for pid in {pid for pid, _ in used} - named.get("process_name", set())]
    return found


def sent(begin, end, bucket=0):
    args = {"shape": [2], "dtype": "float32", "bytes": 8}
    text = f"bucket {bucket + 1} of 2, (2,) float32, 8 bytes"
    return Event("all-reduce", begin, end, text, "nanofinetune/ranks/ddp.py:316", bucket, "send", args)


def test_the_timeline_keeps_to_the_format():
    """That of docs/overlap.json, a run of two ranks: every rule, the rows of each bucket, shapes and bytes."""
    text = (ROOT / "docs" / "overlap.json").read_text()
    trace = json.loads(text)
    assert faults_of(trace) == []
    names = {(e["pid"], e["args"]["name"]): e["tid"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert processes == {1: "rank 0", 2: "rank 1"} and len(set(names.values())) == len(names)
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for pid in processes:
        buckets = [name for of, name in names if of == pid and name.startswith("bucket ")]
        assert len(buckets) >= 2 and {"phases", "calls"} <= {name for of, name in names if of == pid}
        for name in buckets:  # filled from its first gradient on, then sent, in every update
            journey = [e for e in slices if e["tid"] == names[pid, name] and e["cat"] != "gradient"]
            assert [e["cat"] for e in journey] == ["filling", "all-reduce"] * (len(journey) // 2)
            gradients = [e for e in slices if e["tid"] == names[pid, name] and e["cat"] == "gradient"]
            assert sum(e["args"]["gradients"] for e in journey[::2]) == len(gradients)
            for e in journey[1::2]:
                (elements,) = e["args"]["shape"]
                assert e["args"]["dtype"] == "float32" and e["args"]["bytes"] == 4 * elements
                assert sum(g["args"]["bytes"] for g in gradients) == e["args"]["bytes"] * len(journey) // 2
    for event in slices:
        if event["cat"] not in ("phase", "filling"):
            file, _, line = event["args"]["where"].partition(":")
            assert file.endswith(".py") and int(line) > 0 and not os.path.isabs(file) and event["args"]["function"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"ts": -1.0}, "ts and dur are"), ({"dur": -0.5}, "ts and dur are"), ({"dur": math.nan}, "ts and dur are"),
        ({"ts": "0"}, "ts and dur are"), ({"pid": "1"}, "pid is no int"), ({"ph": "B"}, "neither metadata nor"),
        ({"tid": 7}, "row (1, 7) has no name"), ({"dur": 1e9}, "ends after the slice around it"),
        ({"args": None}, "args is no dict"), ({"cat": None}, "no category"),
        ({"ts": 1e12}, "begins before the one above"),
    ],
)  # fmt: skip
def test_the_check_of_the_format_can_fail(change, fault):
    gradient = Event("gradient", 0.5, 0.6, "bias", "x.py:1", 0)
    trace = json.loads(timeline([[gradient, sent(1.0, 2.0)]], ""))
    assert faults_of(trace) == []
    event = next(event for event in trace["traceEvents"] if event.get("cat") == "gradient")
    event.update(change)
    assert any(fault in found for found in faults_of(trace))


TIMES = st.floats(0, 1e6)
CALL = st.builds(
    lambda what, begin, took, text: Event(what, begin, begin + took, text, "x.py:1"),
    st.sampled_from(["collate", "forward", "backward", "wait", "gather"]),
    TIMES, st.floats(0, 100), st.text(max_size=9),
)  # fmt: skip


@given(st.lists(st.lists(CALL, min_size=1, max_size=12), min_size=1, max_size=3))
def test_any_calls_keep_to_the_format_and_come_back(ranks):
    """Also calls of several threads, which overlap in part: each has a row in which it does not."""
    text = timeline(ranks, "title")
    assert faults_of(json.loads(text)) == []
    back, title = events_of(text)
    assert title == "title" and [len(events) for events in back] == [len(events) for events in ranks]
    for events, found in zip(ranks, back, strict=True):
        assert sorted(e.text for e in events) == sorted(e.text for e in found)
        assert sorted(e.end - e.begin for e in events) == pytest.approx(
            sorted(e.end - e.begin for e in found), abs=1e-6
        )


def test_an_event_comes_back_as_it_was():
    event = replace(sent(0.0, 0.25, bucket=1), args={"shape": [2], "dtype": "bfloat16", "bytes": 4})
    forward = Event("forward", 0.5, 0.75, "logits", "nanofinetune/a.py:3", None, "A.forward", {})
    (found,) = events_of(timeline([[event, forward]], ""))[0]
    assert sorted(found, key=lambda e: e.begin) == [event, forward]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(0.001, 5), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9
    ),
    st.floats(-1e6, 1e6),
)
def test_clocks_that_differ_are_put_on_one(steps, skew):
    """Rank 1's clock is off by any amount: on the timeline no all-reduce is back before both ranks have sent."""
    first, other, now = [Event("world", 0, 0, WORLD, "x.py:1")], [Event("world", 0, 0, WORLD, "x.py:1")], 1.0
    for bucket, pause, late, took in steps:
        begin, end = now, now + late + took
        first.append(sent(begin, end, bucket))
        other.append(sent(begin + late, end, bucket))
        now = end + pause
    there = [replace(event, begin=event.begin + skew, end=event.end + skew) for event in other]
    low, high = clock_bounds(first, there)
    assert low <= -skew + 1e-6 and -skew <= high + 1e-6  # the truth is within the bounds
    rows = [e for e in json.loads(timeline([first, there], ""))["traceEvents"] if e.get("cat") == "all-reduce"]
    ours, theirs = ([e for e in rows if e["pid"] == pid] for pid in (1, 2))
    for a, b in zip(ours, theirs, strict=True):
        assert a["ts"] + a["dur"] >= b["ts"] - 1 and b["ts"] + b["dur"] >= a["ts"] - 1  # microseconds


def test_one_clock_is_left_as_it_is_and_a_gpu_tells_nothing():
    first, other = [sent(1.0, 3.0)], [sent(2.0, 3.1)]
    assert clock_bounds(first, other) == pytest.approx((-2.1, 1.0))
    about = json.loads(timeline([first, other], ""))["otherData"]
    assert about["added to each rank's clock, in microseconds"] == [0.0, 0.0]
    gpu = Event("world", 0, 0, "rank 0 of 2, nccl, cuda:0, 1 thread", "x.py:1")
    assert clock_bounds([gpu, *first], [gpu, *other]) == (-math.inf, math.inf)
    about = json.loads(timeline([[gpu, *first], [gpu, *other]], ""))["otherData"]
    assert about["what the all-reduces allow to add to those after the first"] == [None]


def test_only_a_file_of_ours_is_written_over(tmp_path):
    """Whole or not at all; through a link, what it leads to."""
    place = tmp_path / "run.json"
    text = timeline([[sent(0.0, 1.0)]], "one")
    assert text.startswith(OURS)
    save(place, text, OURS, "--timeline")
    link = tmp_path / "link.json"
    link.symlink_to(place)
    save(link, text.replace("one", "two"), OURS, "--timeline")
    assert link.is_symlink() and '"title":"two"' in place.read_text() and len(list(tmp_path.iterdir())) == 2
    place.write_text('{"traceEvents": []}')
    for odd, said in (
        (place, "this file is not from nanofinetune.trace; name another one"),
        (tmp_path, "it is a folder; name a file"),
        (tmp_path / "no" / "x.json", "there is no such folder"),
    ):  # fmt: skip
        for function in (
            lambda odd=odd: check(odd, OURS, "--timeline"),
            lambda odd=odd: save(odd, text, OURS, "--timeline"),
        ):
            with pytest.raises(UsageError, match=said):
                function()
    assert place.read_text() == '{"traceEvents": []}'
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UsageError, match="it is a pipe; name a file"):
            check(tmp_path / "pipe", OURS, "--timeline")


def test_a_file_that_is_not_ours_is_not_read_as_one():
    for text in ("", "{}", '{"traceEvents": []}', "[]"):
        with pytest.raises(ValueError, match="no timeline of python -m nanofinetune"):
            events_of(text)
