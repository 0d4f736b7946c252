"""A training run around the course's loop: where it begins, what may go wrong on the way, and where it ends.

    with Run(plan, accelerator, model, optimizer, scheduler, loader) as run:
        for epoch in run.epochs():                  those that are left, if the run is resumed
            for batch in run.batches(epoch):        those that are left of it
                with accelerator.accumulate(model), run.step():
                    ...forward, backward...
                    if run.agreed(loss):            at the end of a window, if all went well on all ranks
                        ...optimizer.step...
            run.end_epoch(scores)

>>> smaller(8, 1), smaller(9, 2)  # (rows, batches of an update) after memory ran out: as many rows an update
((4, 2), (3, 6))

Underneath: `accelerate.utils.find_executable_batch_size` (accelerate 1.15) is all that the libraries have of this.
  - It tries a smaller batch on the rank that ran out of memory, and tells no other rank: their batches no longer match.
    Here all ranks return to the beginning of the update.
  - A rank without memory still takes part in that backward's all-reduces, which the others wait for.
  - A loss that is not a number ends the run, or its update is left out; the libraries train on.

Proof: test_out_of_memory_on_one_rank_shrinks_on_all, test_all_ranks_hear_of_every_fault in tests/run/test_resume.py and
tests/run/test_run.py.
"""

from __future__ import annotations

import math
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanofinetune.ground.errors import Halt, UsageError, shown
from nanofinetune.ground.process import seconds_since_start
from nanofinetune.ground.progress import plural
from nanofinetune.ground.xla import end_step, manual_seed, spread_rows
from nanofinetune.ranks.collectives import agree
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.loader import skip_first_batches
from nanofinetune.run.best import Best
from nanofinetune.run.log import Log
from nanofinetune.run.plan import Plan
from nanofinetune.run.resume import check_place, take
from nanofinetune.run.signals import StopSignals
from nanofinetune.run.watch import Watch, noted
from nanofinetune.step.order import mix


class _OutOfMemory(Exception):
    """Some rank ran out of memory in this window: all leave the `with` block, and `batches` reads its rows again."""


class Run:
    """What surrounds the training loop. In its `with` block, signals are noted and a rank that hangs is named.

    Args:
        plan: what to do.
        accelerator: the Accelerator whose `prepare` returned the other arguments.
        loader: the prepared training loader.
    """

    def __init__(self, plan: Plan, accelerator: Any, model: Any, optimizer: Any, scheduler: Any, loader: Any) -> None:
        self.plan, self.args, self.accelerator = plan, plan.args, accelerator
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.prepared = self.loader = loader  # what `prepare` returned; the part of its epoch that is being read
        self.rows_per_step = plan.rows_per_step
        self.output = None if self.args.output is None else Path(self.args.output).expanduser()
        self.signals, self.watch = StopSignals(), Watch(accelerator.world)
        claim = partial(take, self.output, plan.start)
        self.log = Log(self.output, plan.updates, accelerator, plan.identity, plan.epochs, claim)
        self.mean_loss: float | None = None  # of the epoch that was read last
        self.batches_read = 0  # of `loader`
        # of the window that is being accumulated:
        self.no_memory = False  # this rank has run out of memory in it
        self.settled = False  # the ranks have exchanged what happened in it, and what follows is the same on all
        self.signal = 0  # the number of the signal that some rank has received
        self.again = False  # some rank has run out of memory: its rows are read again
        unwrapped = accelerator.unwrap_model(model)
        self.best = Best(self.args, unwrapped, keeps=accelerator.is_main_process, answers=plan.answers)
        accelerator.register_for_checkpointing(self.log, *([self.best] if self.best.wanted else []))
        folder = plan.start.folder
        if folder is not None:
            check_place(plan.start, plan.rows, plan.rows_per_update, plan.updates)
            try:
                accelerator.load_state(folder)
            except ValueError as error:
                raise UsageError(f"--resume: {error}") from error
            accelerator.step = 0  # saved between two windows, which may hold another number of batches now
            ours = self.output is not None and folder.parent == self.output / "checkpoints"
            self.log.saved = self.log.update if ours else -1

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            for each in (self.signals, self.watch, self.log, noted(self.where)):
                stack.enter_context(each)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: Any) -> bool | None:
        if failure[0] is not None:
            return self._stack.__exit__(*failure)
        with self._stack:
            self.best.take()
            self.accelerator.wait_for_everyone()  # until the last checkpoint is written, signals are still only noted
        return None

    # ---- what the loop calls, from the outside to the inside ---------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, as long as patience lasts. `end_epoch` moves on to the next."""
        while self.log.epoch < self.plan.epochs:
            if self.args.patience and agree([self.best.is_over(self.log.evaluations)], self.accelerator.world)[0]:
                since = plural(self.args.patience, "epoch")
                self.log.say(f"note: nothing better in {since}: stopped after {self.log.epoch}")
                break
            yield self.log.epoch
        self.log.kept, self.log.which = self.best.saved(self.log.evaluations)

    def batches(self, epoch: int) -> Iterator[Any]:
        """The batches that are left of this epoch. Where memory ran out, the rows follow in smaller batches."""
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
                if log.window_is_empty:  # dropout masks are a function of (seed, update, rank)
                    seed = mix(self.args.seed, log.update, self.accelerator.process_index)
                    manual_seed(seed, self.accelerator.device)
                spread_rows(batch, self.accelerator.device)  # on XLA; elsewhere it does nothing
                yield batch
                if self.again or log.update == self.plan.updates:
                    break
            if self.again:
                self._shrink()
        self.mean_loss = log.mean_loss()  # now, since the time of the evaluation is not training's

    @contextmanager
    def step(self) -> Iterator[None]:
        """A `with` block around one micro-batch. It catches out-of-memory errors; a window's last ends the update."""
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
                self._settle()  # the other ranks do this in `agreed`
                self.again = True
            return
        end_step(self.accelerator.device)  # XLA runs what it has recorded; elsewhere it does nothing
        if self.accelerator.sync_gradients:
            self._end_update()

    def agreed(self, loss: torch.Tensor) -> bool:
        """Log the loss -> whether to step: at a window's end, if the loss is finite on all ranks. There, a collective.

        `loss` is the mean over this rank's rows. If some rank ran out of memory, all ranks leave the block of `step`.
        Raises Halt where the loss is not a number, unless --on-nan skip leaves that update out.
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
        """Log the epoch's mean loss with its scores, and count the epoch as done."""
        self.log.end_epoch({"epoch": self.log.epoch + 1, "loss": self.mean_loss, **scores})
        self.best.end_epoch(self.log.evaluations)

    # ---- what happens underneath -------------------------------------------------------------------------------------

    def _settle(self) -> bool:
        """Exchange what happened in this window -> whether its loss is a number everywhere. Sets `signal`, `again`."""
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
        """Free what the failed micro-batch holds, and take part in the all-reduces that the other ranks wait for."""
        self.no_memory = True
        traceback.clear_frames(error.__traceback__)  # whose variables hold the activations
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if isinstance(self.model, DistributedDataParallel) and self.accelerator.sync_gradients:
            self.model.join_after_failure()

    def _shrink(self) -> None:
        """Return to the beginning of the update, with smaller batches and more of them."""
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
            f"note: out of memory: {plural(rows, 'row')} per process x {plural(processes, 'process', 'processes')} x"
            f" {accumulate} accumulated from here on, {plural(self.plan.rows_per_update, 'row')} an update as before",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        self.rows_per_step, log.run["fits"] = rows * processes, rows
        accelerator.forget(self.prepared)
        self.prepared = accelerator.prepare(self.plan.new_loader(self.rows_per_step))

    def save(self, background: bool = False) -> str:
        """Save the state after the latest update -> the folder, "" if nothing was saved. A collective."""
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
            accelerator.print(shown(f"{folder} was not saved: {error}"), file=sys.stderr, flush=True)
            return ""

    def where(self) -> str:
        """This rank's place in the run, as the last line of a traceback."""
        rank = self.accelerator.process_index
        if not self.accelerator.unwrap_model(self.model).training:
            return f"rank {rank}, in the evaluation after update {self.log.update}"
        return f"rank {rank}, update {self.log.update + 1}: {self._rows(self.log.batches + 1)}"

    def _rows(self, batches: int) -> str:
        """Which rows of the training split this rank's latest batches held."""
        ids = self.loader.sample_ids(self.batches_read - batches, self.batches_read)
        return f"rows {', '.join(map(str, ids)) or 'none'} of the training split"


def halted(code: int, why: str, saved: str) -> Halt:
    """An early stop. `saved`: the checkpoint's folder, "" if nothing was saved."""
    how = f"saved {saved}; --resume auto goes on from there" if saved else "nothing was saved"
    return Halt(code, f"{why}; {how}")


def stopped(number: int, update: int, saved: str) -> Halt:
    """The stop that a signal asked for."""
    return halted(128 + number, f"stopped by {signal.Signals(number).name} after update {update}", saved)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any kind of device."""
    # underneath: torch's CPU allocator raises a plain RuntimeError; find_executable_batch_size too reads its text
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def smaller(rows: int, accumulate: int) -> tuple[int, int]:
    """(rows of a batch, batches of an update) that need less memory, with as many rows an update; (1, n) stays."""
    part = next((part for part in range(rows // 2, 0, -1) if rows % part == 0), rows)
    return part, accumulate * (rows // part)
