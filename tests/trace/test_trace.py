"""The trace reports what really happened, in order, and changes nothing.

Real ranks over gloo with a tiny model; the reference is the same train.py without a trace.

    python -m pytest tests/trace/test_trace.py
"""

import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from itertools import pairwise
from threading import Thread
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, tiny_bert
from helpers import run_torchrun
from programs import run_program

from nanofinetune.accelerator import Accelerator
from nanofinetune.ground.cli import run_main
from nanofinetune.trace.__main__ import main, title_of
from nanofinetune.trace.__main__ import traced as run_traced
from nanofinetune.trace.observe import Event, Observer, observe_all
from nanofinetune.trace.picture import BUCKETS, COLOURS, figure, layout, picture
from nanofinetune.trace.timeline import events_of
from nanofinetune.trace.told import WIDTH, phases, told
from nanofinetune.wrappers import AcceleratedOptimizer

UPDATES = 3


@pytest.fixture(scope="module")
def job(tiny_model, pairs):
    """The arguments of a small job."""
    return ["--model", tiny_model, "--data", pairs, "--clip-norm", "1", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def traced(job, tmp_path_factory):
    """A traced run on two ranks -> (its folder, its report, its events)."""
    folder = tmp_path_factory.mktemp("traced")
    options = ["--updates", UPDATES, "--timeline", "trace.json", "--output", "run", "--device", "cpu", *job]
    done = run_program(["-m", "nanofinetune.trace", *map(str, options)], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, events_of((folder / "trace.json").read_text())[0]


def test_losses_are_those_of_an_unwatched_run(job, traced, tmp_path):
    """Bit for bit: the file of losses is the same, and so are the weights."""
    options = ["--max-steps", str(UPDATES), "--output", tmp_path / "run", "--device", "cpu", *job]
    done = run_torchrun([ROOT / "train.py", *options], 2)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (traced[0] / "run" / name).read_bytes()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(set(losses)) == UPDATES


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_tell_what_happens_in_order(traced, rank):
    events = traced[2][rank]
    names = [name for name, _ in phases(events)]
    assert names == ["set-up", *(f"update {k + 1}" for k in range(UPDATES)), "afterwards"]
    by_name = dict(phases(events))
    assert [e.text for e in by_name["set-up"] if e.what == "world"] == [f"rank {rank} of 2, gloo, cpu, 1 thread"]
    for k in range(UPDATES):
        update = by_name[f"update {k + 1}"]
        first = {what: min(e.begin for e in update if e.what == what) for what in {e.what for e in update}}
        order = ["collate", "to device", "forward", "backward", "gradient", "all-reduce", "wait", "clip", "optimizer"]
        order += ["schedule", "zero_grad"]
        assert sorted(order, key=first.__getitem__) == order
        # One batch ahead: the first update fetches two, the others the one after theirs. The trial's is set-up.
        assert sum(e.what == "collate" for e in update) == (2 if k == 0 else 1)
        gradients = [e for e in update if e.what == "gradient"]
        parameters = [name for name, p in tiny_bert().named_parameters() if p.requires_grad]
        assert sorted(e.text for e in gradients) == sorted(parameters), "each parameter, once"
        (sent,) = [e for e in update if e.what == "all-reduce"]  # all of a tiny model is one bucket
        size = sum(p.numel() for p in tiny_bert().parameters())
        assert sent.text == f"bucket 1 of 1, ({size},) float32, {4 * size:,} bytes"
        assert max(e.end for e in gradients) <= sent.end, "a bucket is sent when its last gradient is ready"
        backward = next(e for e in update if e.what == "backward")
        wait = next(e for e in update if e.what == "wait")
        assert backward.begin <= wait.begin and sent.end <= wait.end + 0.05 and wait.end <= backward.end
        rate = next(e for e in update if e.what == "schedule")
        assert rate.text == f"lr is {1e-3 * (UPDATES - k - 1) / UPDATES:.3g} after {k + 1} of {UPDATES} updates"
    rows = [int(e.text.split()[0]) for e in by_name["afterwards"] if e.what == "count"]
    assert sum(rows) in range(24), "this rank's validation rows"
    assert [e.text for e in by_name["afterwards"] if e.what == "reduce"] == [
        f"({UPDATES}, 2) float32, {8 * UPDATES} bytes",  # the losses
        "(394,) int64, 3,152 bytes",  # the counts of evaluation, 3 x 130, and its 2 x 2 table
        "(23, 2) float32, 184 bytes",  # the logits of the validation rows: the last all-reduce
    ]


def test_the_two_ranks_validate_every_row_once(traced):
    counted = [e for events in traced[2] for e in events if e.what == "count"]
    assert sum(int(e.text.split()[0]) for e in counted) == 23


def test_the_report_names_places_that_exist(traced):
    """Each is the line of a `def`: a terminal opens it by a click."""
    report = traced[1]
    places = re.findall(
        r"^  [\w -]{10}  (\S+\.py):(\d+)  ([\w.]+)$", report.partition("where that is:")[2], re.MULTILINE
    )
    assert len(places) > 15
    ours = {(file, line, symbol) for file, line, symbol in places if (ROOT / file).is_file() or file.startswith("/")}
    theirs = {file for file, _, _ in set(places) - ours}
    assert theirs <= {"transformers/models/bert/modeling_bert.py"}, "the model is transformers'; all else is ours"
    for file, line, symbol in ours:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]  # an absolute path stays one
        assert re.search(rf"(def|class) {symbol.rpartition('.')[2]}\b", text), (file, line, symbol)
    for k in range(UPDATES):
        assert f"\nupdate {k + 1}\n" in report
    assert "bucket 1 of 1" in report


def test_the_report_is_at_most_100_columns_wide(traced):
    """For two ranks, one, and five: then it shows rank 0, and the rank on which each thing took longest."""
    for ranks in (traced[2], traced[2][:1], [*traced[2], *traced[2], traced[2][1]]):
        lines = list(told(ranks))
        assert WIDTH == 100 and max(map(len, lines)) <= WIDTH and not any(line.endswith(" ") for line in lines)
        parameters = [name for name, p in tiny_bert().named_parameters() if p.requires_grad]
        words = " ".join(" ".join(lines).split())
        assert f"{len(parameters)} into bucket 1" in words and "while backward still ran" in words
    slow = [[replace(e, end=e.end + r) if e.what == "forward" else e for e in traced[2][0]] for r in range(3)]
    rows = [re.match(r" *([-\d.]+) +([\d.]+) +([-\d.]+) +([\d.]+)  forward ", line) for line in told(slow)]
    times = [[float(number) for number in row.groups()] for row in rows if row]
    assert len(times) == UPDATES + 1 and times[0][3] == pytest.approx(times[0][1] + 2000, abs=0.2), "2 s on rank 2"


def test_the_picture_holds_what_was_measured(traced):
    """`layout` says what stands where; matplotlib draws just that, the same text each time, from the timeline too."""
    folder, _, ranks = traced
    svg = (folder / "trace.svg").read_text()
    assert svg == picture(ranks, title_of(ranks)) == picture(ranks, title_of(ranks))
    words = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert title_of(ranks) in words and {"rank 0", "rank 1", "gradients", "bucket 1"} <= set(words)
    updates = [dict(phases(events))[f"update {UPDATES}"] for events in ranks]
    shown = [[e for e in events if e.what in COLOURS or e.bucket is not None] for events in updates]
    zero = min(e.begin for events in shown for e in events)
    parts = layout(ranks)
    for events, part in zip(shown, parts, strict=True):  # one axis: where a bar stands is when its rank did it
        for what in ("forward", "all-reduce", "wait", "optimizer"):
            (event,), (bar,) = [e for e in events if e.what == what], [bar for bar in part.bars if bar.what == what]
            assert (bar.begin, bar.took) == pytest.approx(((event.begin - zero) * 1e3, (event.end - event.begin) * 1e3))
            assert bar.row == (2 if what == "all-reduce" else 0)
        backward, wait = (next(bar for bar in part.bars if bar.what == what) for what in ("backward", "wait"))
        assert backward.begin + backward.took == pytest.approx(wait.begin)
        ready = sorted((e.end - zero) * 1e3 for e in events if e.what == "gradient")
        assert [moment for moment, _ in sorted(part.marks)] == pytest.approx(ready)
        assert {colour for _, colour in part.marks} == {BUCKETS[0]}
    for part, panel in zip(parts, figure(parts, "").axes, strict=True):
        drawn = sorted((box.get_x(), box.get_width()) for box in panel.patches)
        low, high = panel.get_xlim()
        assert [x for x, _ in drawn] == pytest.approx(sorted(bar.begin for bar in part.bars))
        assert low <= drawn[0][0] and all(x + width <= high for x, width in drawn)


def test_a_picture_needs_matplotlib_and_says_so_before_the_training(run_here, tmp_path, monkeypatch, job):
    """Named, it is a mistake; else the report comes without one."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("nanofinetune.trace.__main__.traced", lambda *_: [UPDATE])
    code, out, err = run_here("--picture", "mine.svg")
    assert (code, out) == (2, "") and err.startswith("nanofinetune.trace: --picture mine.svg: matplotlib draws it, and")
    assert err.endswith(" is not installed: pip install -e '.[report]'\n")
    code, out, err = run_here("--timeline", "all.json")
    assert (code, err) == (0, "") and "no picture: matplotlib draws it" in out
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


UPDATE = [
    Event("world", 0, 0, "rank 0 of 1, None, cpu, 1 thread", ""), Event("collate", 1, 1, "8 rows of 5 tokens", ""),
    Event("forward", 1, 2, "", "", args={"shape": [8, 2]}), Event("backward", 2, 3, "", ""),
    Event("optimizer", 3, 4, "AdamW: 2 tensors, 5 numbers, 20 bytes", ""), Event("zero_grad", 4, 4, "", ""),
]  # fmt: skip


def test_an_update_of_several_batches_is_drawn_and_named_as_it_was():
    """Only the last backward of the window waits; what was fetched ahead, or evaluated before, was not trained."""
    world, *_, optimizer, zero = UPDATE
    evaluated = Event("forward", 0.5, 0.9, "", "", args={"shape": [64, 2]})
    calls = [
        ("forward", 1, 2, 8),
        ("backward", 2, 5, 0),
        ("forward", 5, 6, 3),
        ("backward", 6, 9, 0),
        ("wait", 8, 9, 0),
    ]
    window = [Event(what, begin, end, "", "", args={"shape": [rows, 2]}) for what, begin, end, rows in calls]
    fetched = [Event("collate", at, at, f"{rows} rows of 5 tokens", "") for at, rows in ((0.4, 64), (5.5, 2))]
    late = [replace(event, begin=event.begin + 6, end=event.end + 6) for event in (optimizer, zero)]
    ranks = [[world, evaluated, *window, *fetched, *late]] * 2
    bars = [(bar.begin, bar.took) for bar in layout(ranks)[0].bars if bar.what == "backward"]
    assert bars == [(1500.0, 3000.0), (5500.0, 2000.0)]
    assert ", 11 rows each, " in title_of(ranks)
    window[0].args["shape"] = [6, 2]
    other = [replace(event, args={"shape": [8, 2]}) if event is window[0] else event for event in ranks[0]]
    assert ", 9 to 11 rows each, " in title_of([ranks[0], other])


@pytest.mark.slow
def test_accumulated_batches_are_told_apart(job, run_here, tmp_path):
    """Two ranks, two batches of eight an update: two bars of backward, which do not overlap."""
    options = ("--accumulate", "2", "--timeline", "trace.json", "--updates", "1", "--device", "cpu")
    assert run_here(*options, *job)[0] == 0
    ranks, title = events_of((tmp_path / "trace.json").read_text())
    assert ", 16 rows each, " in title
    for part in layout(ranks):
        bars = sorted((bar.begin, bar.took, bar.what) for bar in part.bars if bar.row == 0)
        assert [what for *_, what in bars].count("backward") == 2
        assert all(begin + took <= then + 1e-6 for (begin, took, _), (then, *_) in pairwise(bars))


def test_a_file_of_somebody_else_is_never_written_over(run_here, tmp_path, monkeypatch):
    """Not by its default name either; said before the training. What the command made before, it may make again."""
    monkeypatch.setattr("nanofinetune.trace.__main__.traced", lambda *_: [UPDATE])
    for _ in range(2):
        assert run_here("--timeline", "all.json")[0] == 0
    made = {name: (tmp_path / name).read_text() for name in ("trace.svg", "all.json")}
    monkeypatch.setattr("nanofinetune.trace.__main__.traced", lambda *_: pytest.fail("it trained"))
    for name, words in (("trace.svg", []), ("all.json", ["--timeline", "all.json"])):
        (tmp_path / name).write_text("mine")
        code, out, err = run_here(*words)
        assert code == 2 and f"{name}: this file is not from nanofinetune.trace; name another one" in err and not out
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).write_text(made[name])
    for words, said in (
        (["--picture", "x", "--timeline", "x"], "--timeline x: this is the file of the picture"),
        (["--timeline", "no/such/x.json"], "--timeline no/such/x.json: there is no such folder"),
        (["--timeline", ""], "--timeline is empty"),
    ):
        code, _, err = run_here(*words)
        assert code == 2 and said in err and len(err.splitlines()) == 1, err
    monkeypatch.setenv("NNODES", "2")
    code, _, err = run_here()
    assert code == 2 and "NNODES is 2: a trace is of the ranks of one machine" in err


@pytest.mark.skipif(os.name != "posix", reason="signals and scripts of a POSIX system")
def test_the_job_does_not_outlive_a_trace_that_is_ended(tmp_path, monkeypatch):
    (tmp_path / "launch.sh").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 100\n")
    (tmp_path / "launch.sh").chmod(0o755)
    monkeypatch.setattr("nanofinetune.trace.__main__.ROOT", tmp_path)

    def end():
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_traced([], 1)
    assert ended.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.fixture
def run_here(tmp_path, monkeypatch, capfd):
    """The command in this process, which has imported all that it needs -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trace", *arguments])
        code: str | int | None
        try:
            code = run_main("nanofinetune.trace", main)
        except SystemExit as ended:  # as train.py did
            code = ended.code
        return code, *capfd.readouterr()

    return call


@pytest.mark.slow
def test_one_process_has_no_buckets(job, run_here, tmp_path):
    code, out, err = run_here("-n", "1", "--updates", "1", "--device", "cpu", *job)
    assert code == 0, err
    assert "optimizer" in out and "all-reduce" not in out
    ElementTree.fromstring((tmp_path / "trace.svg").read_text())


def test_observing_ends():
    before = AcceleratedOptimizer.step
    observer = Observer()
    observe_all(observer)
    assert AcceleratedOptimizer.step is not before
    observer.close()
    assert AcceleratedOptimizer.step is before


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.SGD])
def test_any_optimizer_is_told_at_the_end_of_its_window(kind):
    """By its own name, once for each update, so that updates are told apart."""
    ours = Accelerator(cpu=True, gradient_accumulation_steps=2)
    observer = Observer()
    observe_all(observer)
    try:
        optimizer = ours.prepare(kind([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))], lr=0.5))
        for _ in range(4):
            with ours.accumulate():
                optimizer.step()
                optimizer.zero_grad()
    finally:
        observer.close()
        ours.end_training()
    steps = [event for event in observer.events if event.what == "optimizer"]
    assert [event.text for event in steps] == [f"{kind.__name__}, lr 0.5: 2 tensors, 5 numbers, 20 bytes"] * 2
    assert steps[0].function == f"{kind.__name__}.step"
    assert re.fullmatch(rf"torch/optim/{kind.__name__.lower()}\.py:\d+", steps[0].place.replace("_", ""))
    prepared = max(event.end for event in observer.events if event.what == "prepare")
    observer.note("collate", prepared, prepared, "a batch, before the updates", kind.step)
    assert [name for name, _ in phases(observer.events)] == ["set-up", "update 1", "update 2", "afterwards"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--updates", "0"], "--updates: 0 is not a whole number from 1"),
        (["--dry-run"], "--dry-run: there is nothing to trace"),
        (["--lr", "-1"], "--lr: -1 is not a number above 0"),  # train.py's own
    ],
)
def test_a_mistake_is_one_line(arguments, said, run_here):
    code, _, err = run_here(*arguments)
    assert code == 2 and said in err and len(err.splitlines()) == 1, err
