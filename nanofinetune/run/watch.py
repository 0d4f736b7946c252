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
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from nanofinetune.ground.errors import Halt, UsageError
from nanofinetune.ranks.world import World

ANSWER = 3.0  # seconds that ranks get to say where they are


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
