"""Watch a real job from the inside: `python -m nanofinetune.trace` trains two updates on two ranks and says what ran.

>>> observer = Observer()
>>> observer.observe(json, "dumps", "write", lambda text, data: f"{len(data)} items, {len(text)} letters")
>>> json.dumps([1, 2, 3])
'[1, 2, 3]'
>>> observer.events[-1].what, observer.events[-1].text, observer.events[-1].place
('write', '3 items, 9 letters', 'json.py::dumps')
>>> observer.close()
>>> merged([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
[(0.0, 3.0), (5.0, 6.0)]

Underneath: `torch.profiler.profile` (torch 2.13), which `accelerate.Accelerator.profile` (accelerate 1.15) starts,
records every operator of one process: thousands of lines a step, and the ranks' files share no clock. Here the names
that this repository's files give to things are recorded, a few dozen a step: each function of the list in `observe_all`
is wrapped in one that notes when it began and ended, and what shapes and bytes it saw. What runs is train.py and
nothing else, started by launch.sh; the wrapped functions get and return the very same objects, so that the losses are
those of a run that nobody watches. Ranks of one machine share its monotonic clock, so that one axis holds for all.
Times are the host's: on a GPU they say when work was handed over, not when it was done.

Proof: test_losses_are_those_of_an_unwatched_run, test_two_ranks_tell_what_happens_in_order,
test_the_picture_holds_what_was_measured and test_observing_ends in tests/test_trace.py.
"""

from __future__ import annotations

import functools
import html
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanofinetune import accelerator, collate, ddp, distributed, loader, metrics, optim, schedule
from nanofinetune.cli import Parser, number, run
from nanofinetune.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


@dataclass(frozen=True)
class Event:
    """One call of an observed function, or one bucket's journey."""

    what: str
    begin: float  # seconds on the machine's monotonic clock
    end: float
    text: str
    place: str  # file.py::symbol
    bucket: int | None = None


# ---- In each rank: observe -------------------------------------------------------------------------------------------


class Observer:
    """Wraps functions in place so that each call leaves an Event; `close` puts the originals back."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def observe(self, owner: Any, name: str, what: str, describe: Callable[..., str]) -> None:
        """Note every call of `owner.name`; `describe` gets its result and its arguments, and changes neither."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def observed(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            result = inner(*args, **kwargs)
            self.note(what, begin, time.monotonic(), describe(result, *args, **kwargs), inner)
            return result

        self.replace(owner, name, observed)

    def note(self, what: str, begin: float, end: float, text: str, function: Any, bucket: int | None = None) -> None:
        place = f"{function.__module__.rpartition('.')[2]}.py::{function.__qualname__}"
        self.events.append(Event(what, begin, end, text, place, bucket))

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def close(self) -> None:
        while self._originals:
            setattr(*self._originals.pop())


def observe_all(observer: Observer) -> None:
    """Everything that happens around a step, in the order in which it happens."""
    facade = accelerator.Accelerator
    for owner, name, what, describe in (
        (distributed, "init_world", "world", _world),
        (ddp, "broadcast_from_first", "broadcast", lambda _, tensors, *__: f"rank 0's {described(tensors)}"),
        (facade, "prepare_model", "prepare", _model),
        (facade, "prepare_data_loader", "prepare", _loader),
        (facade, "prepare_optimizer", "prepare", lambda ours, *_: f"{_kind(ours)} around {_kind(ours.optimizer)}"),
        (facade, "prepare_scheduler", "prepare", lambda ours, *_: f"{_kind(ours)} around {_kind(ours.scheduler)}"),
        (collate.DataCollatorWithPadding, "__call__", "collate", _batch),
        (loader, "send_to_device", "to device", lambda batch, *_: described(getattr(batch, "values", list)())),
        (facade, "_weigh", "weigh", _weight),
        (facade, "backward", "backward", lambda *_: "in it every gradient, from the last layer to the first"),
        (facade, "clip_grad_norm_", "clip", lambda norm, *_, **__: f"the norm was {norm.item():.4g}"),
        (schedule.LinearSchedule, "step", "schedule", _rate),
        (accelerator.AcceleratedOptimizer, "zero_grad", "zero_grad", _reset),
        (metrics.Metric, "add_batch", "count", lambda _, self, **batch: f"{len(batch['references'])} rows"),
        (distributed, "gather", "gather", lambda _, data, *__: described([data])),
        (distributed, "reduce", "reduce", lambda _, data, *__: described([data])),
        (distributed, "gather_object", "gather", lambda _, objects, *__: f"{len(objects)} objects"),
        (distributed, "wait_for_everyone", "barrier", lambda *_: "all are here"),
    ):
        observer.observe(owner, name, what, describe)
    _observe_forward(observer)
    _observe_buckets(observer)
    _observe_optimizer(observer)


def described(tensors: Any) -> str:
    """How many tensors, their shape or their numbers, and bytes."""
    found = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    size = in_bytes(sum(tensor.numel() * tensor.element_size() for tensor in found))
    if len(found) == 1:
        return f"{tuple(found[0].shape)} {str(found[0].dtype).removeprefix('torch.')}, {size}"
    return f"{len(found)} tensors, {sum(tensor.numel() for tensor in found):,} numbers, {size}"


def in_bytes(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size:,} bytes"


def _kind(thing: Any) -> str:
    return type(thing).__name__


def _world(world: Any, *_: Any) -> str:
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return f"rank {world.rank} of {world.size}, {world.backend}, {world.device}, {threads}"


def _model(model: Any, *_: Any) -> str:
    if not isinstance(model, ddp.DistributedDataParallel):
        return f"{_kind(model)}, as it is: one process averages with nobody"
    buckets = [described(bucket.parameters.values()).rpartition(", ")[2] for bucket in model._buckets]
    return f"{_kind(model)} around {_kind(model.module)}, buckets of {', '.join(buckets)}"


def _loader(shard: Any, *_: Any) -> str:
    last = f"{shard.remainder or 'all'} of them real in the last"
    return f"{_kind(shard)}: {len(shard)} batches a rank, {shard.total_batch_size} rows a step, {last}"


def _batch(batch: Any, _: Any, rows: Any) -> str:
    lengths = batch["attention_mask"].sum(1).tolist()
    shape = tuple(batch["input_ids"].shape)
    which = f" {', '.join(map(str, rows.indices.tolist()))}" if hasattr(rows, "indices") and len(rows) <= 16 else ""
    padding = 1 - sum(lengths) / (shape[0] * shape[1])
    return f"{len(lengths)} rows{which} of {min(lengths)} to {max(lengths)} tokens -> {shape}, {padding:.0%} padding"


def _weight(_: Any, self: Any, __: Any) -> str:
    position, shard = self._current()
    rows = None if shard is None else shard.rows_of_step(position.index)
    if rows is None:
        return f"loss / {self.gradient_accumulation_steps}"
    return f"the mean over {rows[0]} of the step's {rows[1]} rows; batch {position.index + 1} of {len(shard)}"


def _rate(_: Any, self: Any, *__: Any) -> str:
    return f"lr is {self.get_last_lr()[0]:.3g} after {self.last_epoch} of {self.num_training_steps} updates"


def _reset(_: Any, self: Any, *__: Any) -> str:
    return "every .grad is None" if self.accelerator.sync_gradients else "inside a window: nothing"


def _observe_forward(observer: Observer) -> None:
    """Hooks on the model itself, since evaluation calls it without its wrapper."""
    prepare_model = accelerator.Accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepared(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        began: list[float] = []

        def before(module: Any, inputs: Any) -> None:
            began.append(time.monotonic())

        def after(module: Any, inputs: Any, outputs: Any) -> None:
            text = f"logits {described([outputs.logits])}"
            if outputs.loss is not None and outputs.loss.device.type == "cpu":  # elsewhere reading it would wait
                text += f"; loss {outputs.loss.item():.4f}"
            observer.note("forward", began.pop(), time.monotonic(), text, type(module).forward)

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)
        return prepare_model(self, model, *args, **kwargs)

    observer.replace(accelerator.Accelerator, "prepare_model", prepared)


def _observe_buckets(observer: Observer) -> None:
    """When each gradient is there, when its bucket leaves, when it is back, how long backward then waits."""
    wrapper = ddp.DistributedDataParallel
    put_into, send, finish = wrapper._put_into, wrapper._send_full_buckets, wrapper._finish

    @functools.wraps(put_into)
    def observed_put(self: Any, bucket: Any, i: int) -> None:
        begin = time.monotonic()
        put_into(self, bucket, i)
        observer.note("gradient", begin, time.monotonic(), self._names[i], put_into, self._buckets.index(bucket))

    @functools.wraps(send)
    def observed_send(self: Any) -> None:
        first, begin = self._next, time.monotonic()
        send(self)
        for k in range(first, self._next):
            bucket = self._buckets[k]
            text = f"bucket {k + 1} of {len(self._buckets)}, {described([bucket.wire])}"
            if bucket.wire.device.type == "cpu":  # the moment it is back; on a GPU only the stream knows

                def back(_: Any, k: int = k, text: str = text) -> None:
                    observer.note("all-reduce", begin, time.monotonic(), text, send, k)

                bucket.work.get_future().then(back)
            else:
                observer.note("all-reduce", begin, time.monotonic(), text, send, k)

    @functools.wraps(finish)
    def observed_finish(self: Any) -> None:
        begin = time.monotonic()
        finish(self)
        observer.note("wait", begin, time.monotonic(), "backward is done; wait for what is on its way", finish)

    for name, function in (
        ("_put_into", observed_put), ("_send_full_buckets", observed_send), ("_finish", observed_finish)
    ):  # fmt: skip
        observer.replace(wrapper, name, function)


def _observe_optimizer(observer: Observer) -> None:
    """The steps of whatever optimizer was prepared, where they are let through: at the end of a window."""
    step = accelerator.AcceleratedOptimizer.step

    @functools.wraps(step)
    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        group, begin = self.param_groups[0], time.monotonic()
        form = f", {self.optimizer.form(group)}" if isinstance(self.optimizer, optim.AdamW) else ""
        result = step(self, *args, **kwargs)
        if self.accelerator.sync_gradients:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            text = f"{_kind(self.optimizer)}{form}, lr {group['lr']:.3g}: {described(parameters)}"
            observer.note("optimizer", begin, time.monotonic(), text, type(self.optimizer).step)
        return result

    observer.replace(accelerator.AcceleratedOptimizer, "step", observed)


def rank() -> None:
    """What each rank runs: train.py, observed; then its events go into the folder NANOFINETUNE_TRACE."""
    observer = Observer()
    observe_all(observer)
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        target = Path(os.environ["NANOFINETUNE_TRACE"], f"{os.environ.get('RANK', '0')}.json")
        target.write_text(json.dumps([asdict(event) for event in observer.events]))


# ---- In the end: tell ------------------------------------------------------------------------------------------------

Ranks = list[list[Event]]  # the events of each rank


def phases(events: list[Event]) -> list[tuple[str, list[Event]]]:
    """A rank's events -> set-up, update 1, update 2, ..., and what follows the last update."""
    ordered = sorted(events, key=lambda event: event.begin)
    first = next((i for i, event in enumerate(ordered) if event.what == "collate"), len(ordered))
    found, rest = [("set-up", ordered[:first])], ordered[first:]
    steps = [event.end for event in rest if event.what == "optimizer"]
    resets = [event.end for event in rest if event.what == "zero_grad"]
    for count, step in enumerate(steps, start=1):
        end = min(reset for reset in resets if reset >= step)  # an update ends with zero_grad
        found.append((f"update {count}", [event for event in rest if event.begin < end]))
        rest = [event for event in rest if event.begin >= end]
    return [*found, ("afterwards", rest)]


def told(ranks: Ranks) -> Iterator[str]:
    """The lines of the report: one for each thing that happened, with begin and duration on every rank."""
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
    done = waits[-1].begin  # the last gradient was there
    busy = merged([(event.begin, event.end) for event in journeys])
    whole = sum(end - begin for begin, end in busy)
    hidden = sum(max(0.0, min(end, done) - begin) for begin, end in busy)
    waited = sum(event.end - event.begin for event in waits)
    return (
        f"{len(journeys)} buckets were on their way for {whole * 1e3:.1f} ms, {hidden * 1e3:.1f} ms of it while"
        f" backward still ran; it waited {waited * 1e3:.1f} ms"
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


# ---- The picture -----------------------------------------------------------------------------------------------------

COLOURS = {"forward": "#8ab6d6", "backward": "#3b6fb6", "wait": "#d9d9d9", "optimizer": "#6aa84f"}
BUCKETS = ("#e69138", "#cc4125", "#8e63a9", "#c27ba0", "#b58900", "#2aa198")
WIDTH, LEFT, RIGHT, BAR, LANE = 1200, 90, 30, 26, 20
LEGEND = (
    "A mark: a gradient is there, in its bucket's colour. A bucket leaves with its last gradient, and after the bucket"
    " before it. Green: the optimizer."
)


def picture(ranks: Ranks, title: str) -> str:
    """The last update as SVG: for each rank what it computes, when gradients are there, which buckets travel."""
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


# ---- The command -----------------------------------------------------------------------------------------------------


def traced(arguments: Sequence[str], processes: int) -> Ranks:
    """Run launch.sh -n `processes` with train.py's `arguments`, observed -> the events of each rank.

    Raises SystemExit with the job's exit code where it failed; it has said why.
    """
    with tempfile.TemporaryDirectory(prefix="nanofinetune-trace-") as folder:
        script = Path(folder, "train.py")  # (by that name it signs what the user got wrong)
        script.write_text("from nanofinetune.trace import rank\n\nrank()\n")
        environment = os.environ | {
            "PYTHON": sys.executable, "NANOFINETUNE_SCRIPT": str(script), "NANOFINETUNE_TRACE": folder,
            "NANOFINETUNE_LAUNCH_ENV": os.devnull,  # launch.env may speak of several nodes
        }  # fmt: skip
        command = [str(ROOT / "launch.sh"), "-n", str(processes), "--", *arguments]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            sys.exit(code)
        files = [Path(folder, f"{r}.json") for r in range(processes)]
        return [[Event(**event) for event in json.loads(file.read_text())] for file in files]


def main() -> None:
    """Train, then print what happened and draw the last update."""
    parser = Parser(prog="python -m nanofinetune.trace", description=__doc__)
    parser.add_argument("-n", metavar="N", dest="processes", type=number(int, 1), default=2, help="ranks (default 2)")
    parser.add_argument("--updates", metavar="N", type=number(int, 1), default=2, help="how many (default 2)")
    parser.add_argument("--picture", metavar="FILE", default="trace.svg", help="of the last update (default trace.svg)")
    parser.add_argument("--json", metavar="FILE", help="what was measured, to draw it again")
    parser.epilog = "every other argument goes to train.py: --model, --data, --batch-size, --accumulate ..."
    args, others = parser.parse_known_args()
    if not (ROOT / "train.py").is_file():
        raise UsageError("train.py is not beside the package: clone the repository")
    if "--dry-run" in others:
        raise UsageError("--dry-run: there is nothing to trace in a run that stops before its first step")
    ranks = traced([*others, "--max-steps", str(args.updates)], args.processes)
    print("\n".join(told(ranks)))
    title = title_of(ranks)
    try:
        if args.json:
            events = [[asdict(event) for event in rank] for rank in ranks]
            Path(args.json).write_text(json.dumps({"title": title, "ranks": events}) + "\n")
        Path(args.picture).write_text(picture(ranks, title))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written ({error.strerror})") from error
    print(f"\nwrote {args.picture}: the last update, all ranks on one axis")


def title_of(ranks: Ranks) -> str:
    """What the picture shows, from what was measured."""
    last = [phase for name, phase in phases(ranks[0]) if name.startswith("update")][-1]
    of = {event.what: event.text for event in [*ranks[0], *last]}
    _, backend, device, threads = of["world"].split(", ")
    rows, numbers = of["collate"].partition(" rows")[0], of["optimizer"].split("tensors, ")[1]
    who = f"{len(ranks)} ranks of {threads} over {backend}" if len(ranks) > 1 else f"one process of {threads}"
    return (
        f"The last update: {who} on {device}, {rows} rows each,"
        f" {numbers.replace('numbers', 'parameters')}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    sys.exit(run("nanofinetune.trace", main))
