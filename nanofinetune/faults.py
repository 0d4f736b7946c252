"""What a training does when something goes wrong: a signal, a rank that hangs, no memory, a loss that is no number.

>>> with StopSignals() as stop:
...     os.kill(os.getpid(), signal.SIGTERM)  # a scheduler wants this machine: finish the update, save, leave
...     stop.number, stop.exit_code
(15, 143)
>>> smaller(8, 1), smaller(9, 2)  # (rows, accumulated batches) after memory ran out: as many rows an update
((4, 2), (3, 6))

Underneath: nothing of this is in `accelerate` 1.15 but `accelerate.utils.find_executable_batch_size`, which tries again
with nine tenths of the batch on the rank that ran out of memory, and tells no other: the ranks' batches part. A signal
ends the process where it stands. `torch.distributed` (torch 2.13) says of a rank that does not come "Timed out waiting
1800000ms for recv operation to complete", without a word on who waits where. Here:
  - Signals are only noted; the loop asks at each update's end, and all ranks agree, so that they save the same update.
  - On a time-out each rank is asked, over the store that made the process group, which collective it is in, in which
    update, at which line: a thread answers for it even while it hangs. Who does not answer is stopped or gone.
    That is gloo's way. Under NCCL a collective that is late raises nothing here: torch's own watchdog prints which one
    it was and ends the process; nobody is asked (and no GPU has run this yet).
  - A rank without memory still takes part in the all-reduces of that backward (`join_after_failure`), then all agree.

Proof: test_signals_are_noted_and_the_second_one_ends, test_a_stopped_rank_is_named_where_gloo_names_none,
test_a_rank_elsewhere_says_where, test_a_rank_that_skips_a_batch_is_found, test_preflight_names_who_did_not_come,
test_accelerate_shrinks_one_rank_alone in tests/test_faults.py; test_signal_saves_and_resume_continues,
test_nonfinite_loss_is_named, test_out_of_memory_on_one_rank_shrinks_on_all in tests/test_resume.py.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from nanofinetune.ddp import DistributedDataParallel
from nanofinetune.distributed import World, agree
from nanofinetune.errors import Halt, UsageError

SECOND = 1.0  # seconds: torchrun hands the terminal's Ctrl-C on, so that one arrives twice at once
ANSWER = 3.0  # seconds that ranks get to say where they are


# ---- Signals ---------------------------------------------------------------------------------------------------------


class StopSignals:
    """A `with` block in which SIGTERM, SIGINT and SLURM's SIGUSR1 are noted in `number`; a second one ends at once.

    In a thread other than the main one, which cannot have signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal that came; 0: none
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return 128 + self.number

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
            for number in (signal.SIGTERM, signal.SIGINT, *slurm):
                self._before[number] = signal.signal(number, self._note)
            # Python runs `_note` between two of its own instructions: never, while one call waits for another rank.
            # The interpreter writes the number into this pipe at once, and a thread reads it.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1])
            threading.Thread(target=self._read, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # the thread reads the end, closes its own side, and ends
            self._pipe = None

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number

    def _read(self, pipe: int) -> None:
        while arrived := os.read(pipe, 1):
            number = arrived[0]
            if number not in self._before:
                continue
            if not self._when:
                self.number, self._when = self.number or number, time.monotonic()
                if os.environ.get("RANK", "0") == "0":  # a launcher hands it to every rank
                    name = signal.Signals(number).name
                    sys.stderr.write(f"\n{name}: stopping after this update; once more to stop now\n")
            elif time.monotonic() - self._when > SECOND:
                sys.stderr.write(f"{signal.Signals(number).name} again: stopped at once\n")
                os._exit(128 + number)
        os.close(pipe)


# ---- Ranks that do not come ------------------------------------------------------------------------------------------


class Watch:
    """Answers for this rank, from a thread, when another one waits in vain and asks where everybody is.

    As a `with` block: a failure to meet the other ranks in it says where each rank is. `update` is for the loop to set.
    A rank alone needs no watch, and has none.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.update = 0
        self._ended = threading.Event()
        self._main = threading.get_ident()
        if world.size > 1:
            self._store = _store()
            threading.Thread(target=self._answer, daemon=True, name="watch").start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._ended.set()
        kind = transport_failure(error) if isinstance(error, RuntimeError) and self.world.size > 1 else ""
        if kind:
            raise RuntimeError(self._explain(kind, self.where(error.__traceback__ if error else None))) from error

    def where(self, failed_at: TracebackType | None = None) -> str:
        """This rank's place: the latest collective, the update, the innermost lines of the main thread."""
        frame = sys._current_frames().get(self._main)
        lines = traceback.extract_tb(failed_at) if failed_at else traceback.extract_stack(frame) if frame else []
        shown = [f"{os.path.basename(line.filename)}:{line.lineno} {line.name}" for line in lines]
        own = [text for text, line in zip(shown, lines, strict=True) if "site-packages" not in line.filename]
        return f"{self.world.calls.latest}, update {self.update}, at {' < '.join(own[-1:-4:-1])}"

    def _explain(self, kind: str, place: str) -> str:
        mine = f"  rank {self.world.rank} waits in {place}"
        if kind == "lost":  # its own launcher says how it ended, and ends us in a moment
            return f"another rank has ended:\n{mine}"
        answers: dict[int, str] = {}
        asking = threading.Thread(target=self._ask, args=(place, answers), daemon=True)
        asking.start()
        asking.join(2 * ANSWER)  # the store does not answer where the rank that keeps it is stopped
        silent = "does not answer: it is stopped, or gone"
        others = [
            f"  rank {rank} {answers.get(rank, silent)}"
            for rank in range(self.world.size) if rank != self.world.rank
        ]  # fmt: skip
        return "\n".join(["a rank did not come in time:", mine, *others])

    def _ask(self, place: str, answers: dict[int, str]) -> None:
        store = self._store.clone()
        store.set(f"watch/{self.world.rank}", f"waits in {place}")
        store.set("watch/where", "?")
        until = time.monotonic() + ANSWER
        while time.monotonic() < until and len(answers) < self.world.size:
            for rank in set(range(self.world.size)) - set(answers):
                if store.check([f"watch/{rank}"]):
                    answers[rank] = store.get(f"watch/{rank}").decode()
            time.sleep(0.1)

    def _answer(self) -> None:
        try:
            while not self._ended.wait(1.0):
                if self._store.check(["watch/where"]) and not self._store.check([f"watch/{self.world.rank}"]):
                    self._store.set(f"watch/{self.world.rank}", f"is in {self.where()}")
        except RuntimeError:  # the store is gone, with the rank or the launcher that kept it
            return


def _store() -> Any:
    """A connection of one's own to the store in which the ranks met."""
    store: Any = dist.distributed_c10d._get_default_store()  # there is no public way to it
    return store.clone()


def transport_failure(error: BaseException) -> str:
    """Whether an error is torch.distributed's: "late" (a time-out), "lost" (a peer has ended) or ""."""
    # underneath: gloo raises a plain RuntimeError, so only its text tells.
    text = str(error)
    if "Timed out waiting" in text or "collective operation timeout" in text:
        return "late"
    return (
        "lost"
        if any(words in text for words in ("Connection closed by peer", "Connection reset", "gloo/transport"))
        else ""
    )


def preflight(world: World, timeout: timedelta = timedelta(seconds=60)) -> None:
    """Let all ranks add up ones over the network they will train on, before any long work, and say who cannot.

    Raises RuntimeError naming the ranks that did not take part, or the sum that came out wrong.
    """
    if world.size == 1:
        return
    store = _store()
    store.set(f"preflight/{world.rank}", "here")
    world.calls.begin("preflight")
    ones = torch.ones(1024, device=world.device)
    try:
        group = dist.new_group(backend=world.backend, timeout=timeout)
        dist.all_reduce(ones, group=group)
    except RuntimeError as error:
        missing = [rank for rank in range(world.size) if not store.check([f"preflight/{rank}"])]
        who = f"ranks {missing} did not come" if missing else "all ranks are there and cannot reach each other"
        hint = "set GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) to the network interface between the nodes"
        raise RuntimeError(f"preflight: {who} within {timeout}; {hint}") from error
    if not (ones == world.size).all():
        raise RuntimeError(f"preflight: {world.size} ranks added up ones and rank {world.rank} got {ones[0].item()}")
    dist.destroy_process_group(group)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    # underneath: torch's CPU allocator raises a plain RuntimeError; find_executable_batch_size reads its text as well.
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def smaller(rows: int, accumulate: int) -> tuple[int, int]:
    """(rows of a batch, batches of an update) for less memory and as many rows an update; (1, n) stays as it is."""
    part = next((part for part in range(rows // 2, 0, -1) if rows % part == 0), rows)
    return part, accumulate * (rows // part)


class Verdict(NamedTuple):
    """What all ranks know at the end of an update, before its step."""

    signal: int  # 0: none
    nonfinite: bool
    no_memory: bool


ALL_WELL = Verdict(0, False, False)


class Mishap:
    """What went wrong on this rank in the update at hand, and at its end the ranks' common verdict.

    As a `with` block around forward and backward it swallows a lack of memory, notes it, and takes part in
    the all-reduces of that backward: the others wait in them, and no rank may leave alone.
    """

    def __init__(self, accelerator: Any, model: nn.Module, stop: StopSignals) -> None:
        self.accelerator = accelerator
        self.world: World = accelerator.world
        self.model = model
        self.stop = stop
        self.no_memory = False

    def __enter__(self) -> Mishap:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None or not out_of_memory(error):
            return False
        self.no_memory = True
        traceback.clear_frames(error.__traceback__)  # these hold the activations
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if isinstance(self.model, DistributedDataParallel) and self.accelerator.sync_gradients:
            self.model.join_after_failure()
        return True

    def verdict(self, finite: bool, batch: int) -> Verdict:
        """Agree with the other ranks. Raises RuntimeError on all where `batch`, its number, is not the same on all."""
        flags = [self.stop.number, not finite, self.no_memory, batch, -batch]
        number, nonfinite, no_memory, last, first = agree([int(flag) for flag in flags], self.world)
        self.no_memory = False
        if last != -first:
            raise RuntimeError(
                f"the ranks are at different batches of this epoch, from {-first} to {last}, and rank {self.world.rank}"
                f" is at {batch}: a rank has skipped a batch or read one too many"
            )
        return Verdict(number, bool(nonfinite), bool(no_memory))


@contextmanager
def noted(describe: Callable[[], str]) -> Iterator[None]:
    """A `with` block whose exceptions carry one more line, at the end of their traceback."""
    try:
        yield
    except (UsageError, Halt):
        raise  # these are one line, and say all
    except Exception as error:
        error.add_note(describe())
        raise
