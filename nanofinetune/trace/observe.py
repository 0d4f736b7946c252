"""In each rank: wrap the functions around a training step, so that every call leaves a note of what it did and when.

>>> observer = Observer()
>>> observer.observe(json, "dumps", "write", lambda text, data: f"{len(data)} items, {len(text)} letters")
>>> json.dumps([1, 2, 3])
'[1, 2, 3]'
>>> observer.events[-1].what, observer.events[-1].text, observer.events[-1].function
('write', '3 items, 9 letters', 'dumps')
>>> observer.close()

Underneath: `torch.profiler.profile` (torch 2.13), which `accelerate.Accelerator.profile` (accelerate 1.15) starts.
  - It records every operator of one process, thousands of lines a step; the files of two ranks share no clock.
  - We note a few dozen calls a step, under the names that this repository gives them.
  - The ranks of one machine share its monotonic clock, so one axis holds for all.
  - What is wrapped gets and returns the same objects: the losses do not change.
  - Times are the host's; on a GPU they say when work was handed over.

Proof: test_losses_are_those_of_an_unwatched_run, test_observing_ends in tests/trace/test_trace.py.
"""

from __future__ import annotations

import functools
import inspect
import json
import linecache
import os
import runpy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanofinetune import accelerator, settings, wrappers
from nanofinetune.ground.progress import plural
from nanofinetune.ranks import collectives, ddp, loader
from nanofinetune.step import collate, metrics, optim, schedule

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
MOST_NAMED = 16  # tensors of one call whose shapes are noted one by one
Said = str | tuple[str, dict[str, Any]]  # what a call did, and what `measured` says of its tensors (it keeps none)


@dataclass(frozen=True)
class Event:
    """One call of an observed function, or the time in which one bucket of gradients was averaged over the ranks."""

    what: str
    begin: float  # seconds on the machine's monotonic clock
    end: float
    text: str
    place: str  # of the function, as seen from the folder that holds its package: nanofinetune/ranks/ddp.py:279
    bucket: int | None = None  # its number, from 0
    function: str = ""  # its name: Bucket.open
    args: dict[str, Any] = field(default_factory=dict)  # shapes, dtypes and bytes of what it worked on


class Observer:
    """Wraps functions in place so that each call leaves an Event; `close` puts the originals back."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def observe(self, owner: Any, name: str, what: str, describe: Callable[..., Said]) -> None:
        """Note every call of `owner.name`. `describe` says what it did, from its result and its arguments."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def observed(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            result = inner(*args, **kwargs)
            self.note(what, begin, time.monotonic(), describe(result, *args, **kwargs), inner)
            return result

        self.replace(owner, name, observed)

    def note(self, what: str, begin: float, end: float, said: Said, function: Any, bucket: int | None = None) -> None:
        """Add an event; `begin` and `end` in seconds of time.monotonic()."""
        text, args = (said, {}) if isinstance(said, str) else said
        self.events.append(Event(what, begin, end, text, _place_of(function), bucket, function.__qualname__, args))

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
        (settings, "init_world", "world", _world),
        (ddp, "broadcast_from_rank", "broadcast", _broadcast),
        (facade, "prepare_model", "prepare", _model),
        (facade, "prepare_data_loader", "prepare", _loader),
        (facade, "prepare_optimizer", "prepare", lambda ours, *_: f"{_kind(ours)} around {_kind(ours.optimizer)}"),
        (facade, "prepare_scheduler", "prepare", lambda ours, *_: f"{_kind(ours)} around {_kind(ours.scheduler)}"),
        (collate.DataCollatorWithPadding, "__call__", "collate", _batch),
        (loader, "send_to_device", "to device", _moved),
        (facade, "_weigh", "weigh", _weight),
        (facade, "backward", "backward", lambda *_: "every gradient, from the last layer to the first"),
        (facade, "clip_grad_norm_", "clip", lambda norm, *_, **__: f"the norm was {norm.item():.4g}"),
        (schedule.Schedule, "step", "schedule", _rate),
        (wrappers.AcceleratedOptimizer, "zero_grad", "zero_grad", _reset),
        (metrics.Metric, "add_batch", "count", lambda _, self, **of: plural(len(of["references"]), "row")),
        (collectives, "gather", "gather", _sent),
        (collectives, "reduce", "reduce", _sent),
        (collectives, "gather_object", "gather", lambda _, objects, *__: plural(len(objects), "object")),
        (collectives, "wait_for_everyone", "barrier", lambda *_: "every rank has got here"),
    ):
        observer.observe(owner, name, what, describe)
    _observe_forward(observer)
    _observe_buckets(observer)
    _observe_optimizer(observer)


def described(tensors: Any) -> str:
    """A tensor's shape, dtype and bytes, or how many tensors, numbers and bytes. What is no tensor does not count."""
    found = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    size = in_bytes(sum(tensor.numel() * tensor.element_size() for tensor in found))
    if len(found) == 1:
        return f"{tuple(found[0].shape)} {str(found[0].dtype).removeprefix('torch.')}, {size}"
    return f"{len(found)} tensors, {sum(tensor.numel() for tensor in found):,} numbers, {size}"


def measured(tensors: Any) -> dict[str, Any]:
    """The same for a program: shape, dtype and bytes of one tensor; of several how many, and each one's if few.

    >>> measured([torch.zeros(8, 2)])
    {'shape': [8, 2], 'dtype': 'float32', 'bytes': 64}
    >>> measured({"ids": torch.zeros(8, 69, dtype=torch.int64), "labels": torch.zeros(8, dtype=torch.int64)})["ids"]
    {'shape': [8, 69], 'dtype': 'int64', 'bytes': 4416}
    """
    named = tensors.items() if isinstance(tensors, Mapping) else ((str(i), each) for i, each in enumerate(tensors))
    each: dict[str, dict[str, Any]] = {
        name: {
            "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.numel() * tensor.element_size(),
        }
        for name, tensor in named
        if isinstance(tensor, torch.Tensor)
    }  # fmt: skip
    if len(each) <= 1:
        return next(iter(each.values()), {})
    dtypes = ", ".join(dict.fromkeys(one["dtype"] for one in each.values()))
    total = {"tensors": len(each), "dtype": dtypes, "bytes": sum(one["bytes"] for one in each.values())}
    return total | (each if len(each) <= MOST_NAMED and isinstance(tensors, Mapping) else {})


def in_bytes(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size:,} bytes"


@functools.cache
def _place_of(function: Any) -> str:
    """The line where a function is defined; of one that is not written in Python the module's name."""
    module, code = function.__module__, getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return str(module)
    line = code.co_firstlineno
    while linecache.getline(code.co_filename, line).lstrip().startswith("@"):
        line += 1  # a decorator
    inside = module.replace(".", "/") + ("/__init__" if Path(code.co_filename).stem == "__init__" else "")
    return f"{inside}.py:{line}"


def _kind(thing: Any) -> str:
    return type(thing).__name__


def _world(world: Any, *_: Any) -> str:
    threads = plural(torch.get_num_threads(), "thread")
    return f"rank {world.rank} of {world.size}, {world.backend}, {world.device}, {threads}"


def _model(model: Any, *_: Any) -> str:
    if not isinstance(model, ddp.DistributedDataParallel):
        return f"{_kind(model)}, unwrapped: one process has nobody to average with"
    buckets = [described(bucket.parameters.values()).rpartition(", ")[2] for bucket in model._buckets]
    return f"{_kind(model)} around {_kind(model.module)}, buckets of {', '.join(buckets)}"


def _loader(shard: Any, *_: Any) -> str:
    last = f"{shard.remainder or 'all'} of them real in the last"
    return f"{_kind(shard)}: {len(shard)} batches a rank, {shard.total_batch_size} rows a step, {last}"


def _moved(batch: Any, *_: Any) -> Said:
    named = dict(batch.items()) if hasattr(batch, "items") else {}
    return described(named.values()), measured(named)


def _broadcast(_: Any, tensors: Any, *__: Any) -> Said:
    return f"rank 0's {described(tensors)}", measured(tensors)


def _sent(_: Any, data: Any, *__: Any) -> Said:
    return described([data]), measured([data])


def _batch(batch: Any, _: Any, rows: Any) -> Said:
    lengths = batch["attention_mask"].sum(1).tolist()
    shape = tuple(batch["input_ids"].shape)
    which = f" {', '.join(map(str, rows.indices.tolist()))}" if hasattr(rows, "indices") and len(rows) <= 16 else ""
    padding = 1 - sum(lengths) / (shape[0] * shape[1])
    text = f"{len(lengths)} rows{which} of {min(lengths)} to {max(lengths)} tokens -> {shape}, {padding:.0%} padding"
    return text, measured(dict(batch.items()))


def _weight(_: Any, self: Any, __: Any) -> str:
    position = self.position
    rows = None if position is None else position.loader.rows_of_step(position.index)
    if rows is None:
        return f"loss / {self.gradient_accumulation_steps}"
    return f"the mean over {rows[0]} of the step's {rows[1]} rows; batch {position.index + 1} of {len(position.loader)}"


def _rate(_: Any, self: Any, *__: Any) -> str:
    return f"lr is {self.get_last_lr()[0]:.3g} after {self.last_epoch} of {self.num_training_steps} updates"


def _reset(_: Any, self: Any, *__: Any) -> str:
    return "every .grad is None" if self.gradient_state.sync_gradients else "inside a window: nothing"


def _observe_forward(observer: Observer) -> None:
    """Through hooks on the model itself: evaluation calls it without its wrapper."""
    prepare_model = accelerator.Accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepared(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        began: list[float] = []

        def before(module: Any, inputs: Any) -> None:
            began.append(time.monotonic())

        def after(module: Any, inputs: Any, outputs: Any) -> None:
            text = f"logits {described([outputs.logits])}"
            if outputs.loss is not None and outputs.loss.device.type == "cpu":  # reading it would stall a GPU
                text += f"; loss {outputs.loss.item():.4f}"
            said = text, measured([outputs.logits])
            observer.note("forward", began.pop(), time.monotonic(), said, type(module).forward)

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)
        return prepare_model(self, model, *args, **kwargs)

    observer.replace(accelerator.Accelerator, "prepare_model", prepared)


def _observe_buckets(observer: Observer) -> None:
    """When each gradient is ready, when its bucket is sent and when it is back, how long backward then waits."""
    wrapper = ddp.DistributedDataParallel
    put_into, send, finish = wrapper._put_into, wrapper._send_full_buckets, wrapper._finish

    @functools.wraps(put_into)
    def observed_put(self: Any, bucket: Any, i: int) -> None:
        said, begin = (self._names[i], measured([bucket.parameters[i]])), time.monotonic()
        put_into(self, bucket, i)
        observer.note("gradient", begin, time.monotonic(), said, put_into, self._buckets.index(bucket))

    @functools.wraps(send)
    def observed_send(self: Any) -> None:
        first, begin = self._next, time.monotonic()
        send(self)
        for k in range(first, self._next):
            bucket = self._buckets[k]
            text = f"bucket {k + 1} of {len(self._buckets)}, {described([bucket.flat])}"
            said = text, measured([bucket.flat])
            if bucket.flat.device.type == "cpu":  # note the moment it is back; on a GPU only the stream knows

                def back(_: Any, k: int = k, said: Said = said) -> None:
                    observer.note("all-reduce", begin, time.monotonic(), said, send, k)

                bucket.work.get_future().then(back)
            else:
                observer.note("all-reduce", begin, time.monotonic(), said, send, k)

    @functools.wraps(finish)
    def observed_finish(self: Any) -> None:
        begin = time.monotonic()
        finish(self)
        observer.note("wait", begin, time.monotonic(), "all gradients are ready; wait for the last buckets", finish)

    for name, function in (
        ("_put_into", observed_put), ("_send_full_buckets", observed_send), ("_finish", observed_finish)
    ):  # fmt: skip
        observer.replace(wrapper, name, function)


def _observe_optimizer(observer: Observer) -> None:
    """The steps of whatever optimizer was prepared; those inside a window of accumulated batches do nothing."""
    step = wrappers.AcceleratedOptimizer.step

    @functools.wraps(step)
    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        group, begin = self.param_groups[0], time.monotonic()
        form = f", {self.optimizer.form(group)}" if isinstance(self.optimizer, optim.AdamW) else ""
        result = step(self, *args, **kwargs)
        if self.gradient_state.sync_gradients:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            text = f"{_kind(self.optimizer)}{form}, lr {group['lr']:.3g}: {described(parameters)}"
            observer.note("optimizer", begin, time.monotonic(), (text, measured(parameters)), type(self.optimizer).step)
        return result

    observer.replace(wrappers.AcceleratedOptimizer, "step", observed)


def rank() -> None:
    """What each rank runs: train.py, observed. Its events go into the folder that NANOFINETUNE_TRACE names."""
    observer = Observer()
    observe_all(observer)
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        target = Path(os.environ["NANOFINETUNE_TRACE"], f"{os.environ.get('RANK', '0')}.json")
        target.write_text(json.dumps([asdict(event) for event in observer.events]))
