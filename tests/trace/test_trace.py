"""The trace reports what really happened, in order, and changes nothing.

Real ranks over gloo with a tiny model; the reference is the same train.py without a trace.

    python -m pytest tests/trace/test_trace.py
"""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, tiny_bert
from helpers import run_torchrun
from programs import run_program

from nanofinetune.accelerator import Accelerator
from nanofinetune.ground.cli import run_main
from nanofinetune.trace.__main__ import main, title_of
from nanofinetune.trace.observe import Event, Observer, observe_all
from nanofinetune.trace.picture import COLOURS, LEFT, RIGHT, WIDTH, picture
from nanofinetune.trace.told import phases
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
    options = ["--updates", UPDATES, "--json", "trace.json", "--output", "run", "--device", "cpu", *job]
    done = run_program(["-m", "nanofinetune.trace", *map(str, options)], cwd=folder)
    assert done.returncode == 0, done.stderr
    saved = json.loads((folder / "trace.json").read_text())
    return folder, done.stdout, [[Event(**event) for event in rank] for rank in saved["ranks"]]


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
    report = traced[1]
    places = re.findall(r"([\w/]+\.py)::([\w.]+)$", report.partition("where that is:")[2], re.MULTILINE)
    assert len(places) > 15
    theirs = {file for file, _ in places if not (ROOT / "nanofinetune" / file).is_file()}
    assert theirs == {"modeling_bert.py"}, "the model is transformers'; all else is ours"
    for file, symbol in places:
        if file not in theirs:
            text = (ROOT / "nanofinetune" / file).read_text()
            assert re.search(rf"(def|class) {symbol.rpartition('.')[2]}\b", text), (file, symbol)
    for k in range(UPDATES):
        assert f"\nupdate {k + 1}\n" in report
    assert "while backward still ran" in report and "bucket 1 of 1" in report


def test_the_picture_holds_what_was_measured(traced):
    folder, _, ranks = traced
    svg = (folder / "trace.svg").read_text()
    root = ElementTree.fromstring(svg)
    assert svg == picture(ranks, title_of(ranks))
    space = {"": "http://www.w3.org/2000/svg"}
    bars = [bar for bar in root.findall("rect", space) if bar.find("title", space) is not None]
    hints = [bar.find("title", space).text or "" for bar in bars]  # type: ignore[union-attr]
    for what in ("forward", "backward", "all-reduce", "wait", "optimizer"):
        assert sum(hint.startswith(f"{what} ") for hint in hints) == 2, what
    # One axis: where a bar stands is when its rank did it.
    begins = [dict(phases(events))[f"update {UPDATES}"] for events in ranks]
    forwards = [next(e.begin for e in events if e.what == "forward") for events in begins]
    lefts = [float(bar.get("x", 0)) for bar, hint in zip(bars, hints, strict=True) if hint.startswith("forward")]
    shown = [e for events in begins for e in events if e.what in COLOURS or e.bucket is not None]
    first, last = min(e.begin for e in shown), max(e.end for e in shown)
    scale = (WIDTH - LEFT - RIGHT) / (last - first)
    assert lefts == [float(f"{LEFT + (begin - first) * scale:.1f}") for begin in forwards]
    assert all(float(bar.get("x", 0)) + float(bar.get("width", 0)) <= WIDTH for bar in bars)


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
    told = [event for event in observer.events if event.what == "optimizer"]
    assert [event.text for event in told] == [f"{kind.__name__}, lr 0.5: 2 tensors, 5 numbers, 20 bytes"] * 2
    assert told[0].place.endswith(f"py::{kind.__name__}.step")
    prepared = max(event.end for event in observer.events if event.what == "prepare")
    observer.note("collate", prepared, prepared, "a batch, before the updates", kind.step)
    assert [name for name, _ in phases(observer.events)] == ["set-up", "update 1", "update 2", "afterwards"]


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
