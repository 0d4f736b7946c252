"""One run: where it begins, what it may meet on its way, where it ends. train.py's loop is the course's; this is the rest.

    with Run(plan, accelerator, model, optimizer, scheduler, loader) as run:
        for epoch in run.epochs():                  those that are left, after a resume
            for batch in run.batches(epoch):        those that are left of it; after a lack of memory, smaller ones
                with accelerator.accumulate(model), run.step():
                    ...forward, backward...
                    if run.agreed(loss):            at a window's end: all ranks had memory, and the loss is a number
                        ...step...
            run.end_epoch(scores)

>>> smaller(8, 1), smaller(9, 2)  # (rows, accumulated batches) after memory ran out: as many rows an update
((4, 2), (3, 6))

Underneath: `accelerate.utils.find_executable_batch_size` (accelerate 1.15) is all that a library has of this.
  - It tries again with nine tenths of the batch, on the rank that ran out of memory alone; the ranks' batches part.
    Here all ranks go back to the update's beginning together.
  - A rank without memory still takes part in that backward's all-reduces.
  - A loss that is no number stops the run, or is left out; nothing there looks at it.

Proof: test_out_of_memory_on_one_rank_shrinks_on_all, test_nonfinite_loss_is_named in tests/run/test_resume.py.
"""

from __future__ import annotations

import math
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanofinetune.ground.errors import Halt
from nanofinetune.ground.process import seconds_since_start
from nanofinetune.ground.xla import end_step, manual_seed, spread_rows
from nanofinetune.ranks.collectives import agree
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.loader import skip_first_batches
from nanofinetune.run.log import Log
from nanofinetune.run.resume import Start
from nanofinetune.run.signals import StopSignals
from nanofinetune.run.watch import Watch, noted
from nanofinetune.step.order import mix


@dataclass(frozen=True)
class Plan:
    """What a run is to do, known before its first step."""

    args: Any  # train.py's command line; here count output, save_every, keep, on_nan and seed
    rows: int  # of the training split
    rows_per_step: int  # of all ranks together
    accumulate: int  # batches of an update
    updates: int
    start: Start  # the checkpoint to go on from, if any
    identity: Mapping[str, Any]  # what makes this run this run: `run_of`
    new_loader: Callable[[int], Any]  # rows of a step -> an unprepared loader of the same rows in the same order

    @property
    def rows_per_update(self) -> int:
        return self.rows_per_step * self.accumulate

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return math.ceil(self.updates / math.ceil(self.rows / self.rows_per_update))


class _OutOfMemory(Exception):
    """Some rank had no memory for this window: all leave the `with` block, and `batches` gives its rows once more."""


class Run:
    """The training loop's surroundings. As a `with` block: signals are noted, and a rank that hangs is found out.

    Args:
        plan: what to do.
        accelerator: which made the rest, by `prepare`.
        loader: the prepared training loader.
    """

    def __init__(self, plan: Plan, accelerator: Any, model: Any, optimizer: Any, scheduler: Any, loader: Any) -> None:
        self.plan, self.args, self.accelerator = plan, plan.args, accelerator
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.prepared = self.loader = loader  # what `prepare` gave; the part of it that is being read
        self.rows_per_step = plan.rows_per_step
        self.output = None if self.args.output is None else Path(self.args.output).expanduser()
        self.signals, self.watch = StopSignals(), Watch(accelerator.world)
        self.log = Log(self.output, plan.updates, accelerator, plan.identity)
        self.signal = 0  # the number of the one that some rank has got
        self.no_memory = False  # on this rank, in the window at hand
        self.settled = False  # whether the ranks have agreed on the window at hand
        self.again = False  # whether its rows are to be read once more
        self.batches_read = 0  # since `loader` began
        accelerator.register_for_checkpointing(self.log)
        folder = plan.start.folder
        if folder is not None:
            accelerator.load_state(folder)
            ours = self.output is not None and folder.parent == self.output / "checkpoints"
            self.log.saved = self.log.update if ours else -1

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            for each in (self.signals, self.watch, self.log, noted(self.where)):
                stack.enter_context(each)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: Any) -> bool | None:
        with self._stack as stack:
            if failure[0] is None:
                self.accelerator.wait_for_everyone()  # the last checkpoint too is written, while signals are only noted
                return None
            return stack.__exit__(*failure)

    # ---- what the loop asks for, from the outside to the inside ------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left. `end_epoch` counts on."""
        while self.log.epoch < self.plan.epochs:
            yield self.log.epoch

    def batches(self, epoch: int) -> Iterator[Any]:
        """The batches that are left of this epoch. A window that lacked memory comes once more, in smaller batches."""
        log = self.log
        self.again = True
        while self.again:
            self.again = False
            self.prepared.set_epoch(epoch)
            self.loader = skip_first_batches(self.prepared, math.ceil(log.rows / self.rows_per_step))
            self.batches_read = 0
            log.start_clock()
            for batch in self.loader if log.update < self.plan.updates else ():
                self.batches_read += 1
                self.watch.update = log.update + 1
                if log.window_is_empty:  # dropout: masks of no other update or rank
                    seed = mix(self.args.seed, log.update, self.accelerator.process_index)
                    manual_seed(seed, self.accelerator.device)
                spread_rows(batch, self.accelerator.device)  # over the devices of an XLA process; elsewhere nothing
                yield batch
                if self.again or log.update == self.plan.updates:
                    break
            if self.again:
                self._shrink()
        self.mean_loss = log.mean_loss()  # before evaluation, whose time is not training's

    @contextmanager
    def step(self) -> Iterator[None]:
        """A `with` block around one micro-batch. It swallows a lack of memory; the last one of a window ends an update."""
        self.settled = False
        try:
            yield
        except _OutOfMemory:
            self.again = True
            return
        except Exception as error:
            if self.settled or not out_of_memory(error):
                raise
            self._give_up_backward(error)
            if self.accelerator.sync_gradients:
                self._settle()  # the other ranks are in `agreed`
                self.again = True
            return
        end_step(self.accelerator.device)  # XLA runs what was recorded; elsewhere nothing
        if self.accelerator.sync_gradients:
            self._end_update()

    def agreed(self, loss: torch.Tensor) -> bool:
        """Whether to step: at a window's end, if the loss is a number on all ranks. A collective there.

        Leaves the `with` block where some rank has no memory; raises Halt where the loss is no number (--on-nan stop).
        """
        self.log.add(loss.detach(), self.loader.valid_rows)
        if not self.accelerator.sync_gradients:
            return False
        self.lr = self.scheduler.get_last_lr()[0]
        finite = self._settle()
        if self.again:
            raise _OutOfMemory
        if not finite:
            place = self.log.nonfinite(self.lr, self._rows(self.log.batches))
            if self.args.on_nan == "stop":
                why = f"{place}; nothing was changed by it, and --on-nan skip leaves such updates out"
                raise halted(1, why, self.save())
            self.log.say(f"{place}: left out")
        return finite

    def end_epoch(self, scores: Mapping[str, Any]) -> None:
        """Note the epoch's mean loss and its scores, and count it as done."""
        self.log.end_epoch({"epoch": self.log.epoch + 1, "loss": self.mean_loss, **scores})

    # ---- what happens underneath -------------------------------------------------------------------------------------

    def _settle(self) -> bool:
        """Let all ranks know what one knows of this window -> whether the loss is a number. Sets `signal`, `again`."""
        batch = self.loader.batch_index
        finite = self.no_memory or self.log.is_finite(self.args.on_nan)
        flags = [self.signals.number, not finite, self.no_memory, batch, -batch]
        self.signal, nonfinite, again, last, first = agree([int(flag) for flag in flags], self.accelerator.world)
        self.again, self.no_memory, self.settled = bool(again), False, True
        if last != -first:
            raise RuntimeError(
                f"the ranks are at different batches of this epoch, from {-first} to {last}, and rank "
                f"{self.accelerator.process_index} is at {batch}: a rank has skipped a batch or read one too many"
            )
        return not nonfinite

    def _end_update(self) -> None:
        log = self.log
        log.end_update(self.lr, self.plan.rows_per_update, self.plan.rows)
        if log.update == 1:
            log.first_step_seconds = seconds_since_start()
        due = self.signal or (self.args.save_every and log.update % self.args.save_every == 0)
        saved = self.save(background=not self.signal) if due else ""
        if self.signal:
            raise stopped(self.signal, log.update, saved)

    def _give_up_backward(self, error: BaseException) -> None:
        """Free what the failed micro-batch holds, and do this rank's part of what the other ranks wait for."""
        self.no_memory = True
        traceback.clear_frames(error.__traceback__)  # these hold the activations
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if isinstance(self.model, DistributedDataParallel) and self.accelerator.sync_gradients:
            self.model.join_after_failure()

    def _shrink(self) -> None:
        """Go back to the update's beginning, with smaller batches and more of them an update."""
        accelerator, log = self.accelerator, self.log
        self.optimizer.zero_grad()
        log.drop_window()
        log.flush()
        processes = accelerator.num_processes
        if self.rows_per_step == processes:
            why = "out of memory with one row a batch: choose a smaller model, or a device with more memory"
            raise halted(1, why, self.save())
        rows, accumulate = smaller(self.rows_per_step // processes, accelerator.gradient_accumulation_steps)
        accelerator.gradient_accumulation_steps, accelerator.step = accumulate, 0
        accelerator.print(
            f"note: out of memory: {rows} row(s) per process x {processes} process(es) x {accumulate}"
            f" accumulated from here on, {self.plan.rows_per_update} rows an update as before",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        self.rows_per_step, log.run["fits"] = rows * processes, rows
        accelerator.forget(self.prepared)
        self.prepared = accelerator.prepare(self.plan.new_loader(self.rows_per_step))

    def save(self, background: bool = False) -> str:
        """Save the state after the latest update -> the folder, "" where there is none. A collective."""
        log, accelerator = self.log, self.accelerator
        if self.output is None or log.update == 0:
            return ""
        folder = self.output / "checkpoints" / f"update-{log.update:08d}"
        if log.saved == log.update:
            accelerator.wait_for_everyone()
            return str(folder) if folder.exists() else ""
        log.flush()
        log.saved = log.update
        try:
            return accelerator.save_state(folder, keep=self.args.keep, background=background)
        except (OSError, RuntimeError, MemoryError) as error:
            accelerator.print(f"{folder} was not saved: {error}", file=sys.stderr, flush=True)
            return ""

    def where(self) -> str:
        """This rank's place in the run, for the end of a traceback."""
        rank = self.accelerator.process_index
        if not self.accelerator.unwrap_model(self.model).training:
            return f"rank {rank}, in the evaluation after update {self.log.update}"
        return f"rank {rank}, update {self.log.update + 1}: {self._rows(self.log.batches + 1)}"

    def _rows(self, batches: int) -> str:
        """Which rows of the training split this rank's latest batches hold."""
        ids = self.loader.sample_ids(self.batches_read - batches, self.batches_read)
        return f"rows {', '.join(map(str, ids)) or 'none'} of the training split"


def halted(code: int, why: str, saved: str) -> Halt:
    """An end before the end. `saved`: the checkpoint's folder, "" if there is none."""
    how = f"saved {saved}; --resume auto goes on from there" if saved else "nothing was saved"
    return Halt(code, f"{why}; {how}")


def stopped(number: int, update: int, saved: str) -> Halt:
    """The end by a signal."""
    return halted(128 + number, f"stopped by {signal.Signals(number).name} after update {update}", saved)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    # underneath: torch's CPU allocator raises a plain RuntimeError; find_executable_batch_size reads its text as well.
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def smaller(rows: int, accumulate: int) -> tuple[int, int]:
    """(rows of a batch, batches of an update) for less memory and as many rows an update; (1, n) stays as it is."""
    part = next((part for part in range(rows // 2, 0, -1) if rows % part == 0), rows)
    return part, accumulate * (rows // part)
