"""When a rank does not answer in time, ask all of them where they are, and say so in place of a bare time-out.

>>> transport_failure(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"))
'late'
>>> transport_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
''

Underneath: `torch.distributed` (torch 2.13) says "Timed out waiting 1800000ms for recv operation to complete", and not
which rank waits, for whom, or where.
  - Here a rank that waited in vain asks all ranks, over the store in which they met, for their collective, update and
    line. A thread answers, even while its rank hangs. A rank that does not answer is stopped, or gone.
  - That is gloo's case. Under NCCL torch's own watchdog names the collective and ends the process.

Proof: test_a_stopped_rank_is_named_where_gloo_names_none, test_preflight_names_the_missing_ranks in
tests/run/test_watch.py.
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

PATIENCE = 20.0  # seconds that rank 0 waits in `all_call` for the others
ANSWER = 3.0  # seconds in which the ranks may say where they are


class Watch:
    """A thread that answers for this rank when another one has waited in vain and asks all ranks where they are.

    In its `with` block, a collective that times out raises RuntimeError that says where each rank is. The loop sets
    `update`. With one rank it does nothing.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.update = 0
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._answer, daemon=True, name="watch")
        if world.size > 1:
            self._store = _store()
            self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._ended.set()
        if self.world.size > 1:
            # underneath: a thread that is inside the store (C++) while the interpreter ends aborts the process
            self._thread.join(ANSWER)  # the store may not answer: then end as it is
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
        if kind == "lost":  # its launcher says how it ended, and will end us too
            return f"another rank has ended:\n{mine}"
        answers: dict[int, str] = {}
        asking = threading.Thread(target=self._ask, args=(place, answers), daemon=True)
        asking.start()
        asking.join(2 * ANSWER)  # the store itself does not answer if the rank that holds it is stopped
        silent = "does not answer: it is stopped, or gone"
        others = [
            f"  rank {rank} {answers.get(rank, silent)}"
            for rank in range(self.world.size) if rank != self.world.rank
        ]  # fmt: skip
        return "\n".join(["a rank is missing:", mine, *others])

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
        except RuntimeError:  # the store is gone, with the rank or the launcher that held it
            return


def all_call(name: str, world: World, patience: float = PATIENCE) -> None:
    """Begin a call that every rank must make, before its first real collective. It costs a message to the store a rank.

    Rank 0 waits for the others' messages, `patience` seconds at most; they go on at once, to the next collective, whose
    own time-out holds. So a rank 0 that is late by minutes, after an evaluation of its own, is no failure.
    Raises RuntimeError on rank 0 that names the ranks that did not call.
    """
    if world.size == 1:
        return
    # Not a connection of its own: to make one to a store that went with its launcher would wait for the time-out.
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"all_call/{world.calls.begin(name)}"
    keys = {rank: f"{key}/{rank}" for rank in range(1, world.size)}
    try:
        if world.rank != 0:
            store.set(keys[world.rank], "here")
            return
        store.wait(list(keys.values()), timedelta(seconds=patience))
    except dist.DistNetworkError:
        return  # the store is gone, so nobody can be asked; the collective that follows has its own time-out
    except dist.DistStoreError as error:
        missing = [rank for rank in keys if not store.check([keys[rank]])]
        world.calls[name] -= 1  # the call has not happened
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        raise RuntimeError(
            f"{name}: {who} did not call it within {patience:g} s; call it on all ranks, not under is_main_process"
        ) from error
    for each in keys.values():  # a second Accelerator in the same group counts from the beginning
        store.delete_key(each)


def _store() -> Any:
    """A connection of its own to the store in which the ranks met."""
    store: Any = dist.distributed_c10d._get_default_store()  # there is no public way to it
    return store.clone()


def transport_failure(error: BaseException) -> str:
    """What an error of torch.distributed's says: "late" (a time-out), "lost" (another rank has ended); else ""."""
    # underneath: gloo raises a plain RuntimeError, so only its text says which
    text = str(error)
    if "Timed out waiting" in text or "collective operation timeout" in text:
        return "late"
    lost = ("Connection closed by peer", "Connection reset", "gloo/transport")
    return "lost" if any(words in text for words in lost) else ""


def preflight(world: World, timeout: timedelta = timedelta(seconds=60)) -> None:
    """Have all ranks add up ones over the network that they will train on, before any long work.

    Raises RuntimeError with the ranks that are missing after `timeout`, or with a sum that is wrong.
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
        who = f"ranks {missing} are missing" if missing else "all ranks have started and cannot reach each other"
        hint = "set GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) to the network interface between the nodes"
        raise RuntimeError(f"preflight: {who} after {timeout}; {hint}") from error
    if not (ones == world.size).all():
        raise RuntimeError(f"preflight: {world.size} ranks added up ones and rank {world.rank} got {ones[0].item()}")
    dist.destroy_process_group(group)


@contextmanager
def noted(describe: Callable[[], str]) -> Iterator[None]:
    """A `with` block whose exceptions get one more line at the end of their traceback."""
    try:
        yield
    except (UsageError, Halt):
        raise  # these are one line, which says it all
    except Exception as error:
        error.add_note(describe())
        raise
