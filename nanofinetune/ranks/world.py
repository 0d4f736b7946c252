"""The ranks of one run: this process's place among them, its device, and the process group that connects them.

>>> world = init_world("cpu")  # no launcher has started this process, so it is alone
>>> world.rank, world.size, world.backend
(0, 1, None)
>>> shutdown(world)

Underneath: `accelerate.state.PartialState` (accelerate 1.15).
  - PartialState is one dictionary that all its instances share; a `World` is a value that is passed around.
  - Under torchrun on a machine without a GPU it makes N separate copies; here N ranks train one model over gloo.
  - Ranks wait 5 minutes for each other; gloo's default is 30.
  - After a restart, the new ranks find each other; entries that dead ranks left in torchrun's store are ignored.
  - Left out: several XLA processes (one drives all devices: ground/xla.py), NPU and other backends.

Proof: test_torchrun_on_cpu_is_one_world_where_accelerate_runs_copies, test_an_attempt_never_meets_the_dead in
tests/ranks/test_world.py.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from nanofinetune.ground.device import backend_for, choose_device
from nanofinetune.ground.environment import Launch, read_environment, whole_number
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.process import end_with_parent

# underneath: gloo's own default is 30 minutes, in which a mistake looks like a slow step.
TIMEOUT = timedelta(minutes=5)


class Calls(Counter[str]):
    """How often each collective was called, and which was the latest: what a rank reports when it waits in vain.

    >>> calls = Calls()
    >>> calls.begin("gather"), calls.begin("gather"), calls.latest
    ('gather#1', 'gather#2', 'gather#2')
    """

    latest = "no collective yet"
    inside = ""  # the name of the block, if this rank is in one that lets some rank go first

    def begin(self, name: str) -> str:
        """Count one more call -> its label, which is the same on all ranks that make the same calls."""
        if self.inside:
            raise RuntimeError(
                f"{name} inside {self.inside}, where ranks wait for each other's end: call it after that"
            )
        self[name] += 1
        self.latest = f"{name}#{self[name]}"
        return self.latest


@dataclass(frozen=True)
class World:
    """The ranks of this run, seen from one of them. At size 1 there is no process group, and `backend` is None."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    backend: str | None
    adopted: bool = False  # the caller made the process group, so the caller destroys it
    launched: bool = False  # alone, but by a launcher of ranks
    calls: Calls = field(default_factory=Calls, compare=False, repr=False)


def init_world(device: str = "auto", timeout: timedelta = TIMEOUT) -> World:
    """Set up the process group that the environment asks for (gloo on CPUs, nccl on CUDA), or adopt the caller's.

    This process ends with its torchrun from then on (Linux). Call `shutdown` in a `finally`.
    `timeout` is how long ranks wait for each other, here and in each collective.

    Threads: with several ranks, and neither OMP_NUM_THREADS nor MKL_NUM_THREADS set, a rank takes torch's number
    divided by the ranks on its node. A value that is set is respected.
    Source: accelerate.state.PartialState.

    Raises:
        UsageError: as `read_environment`; or there is no such device, or the ranks cannot share it.
        RuntimeError: the other ranks were not there in time.
    """
    if dist.is_initialized():
        backend: str = dist.get_backend()
        launch = Launch(
            launcher="adopted",
            rank=dist.get_rank(),
            local_rank=whole_number(os.environ, "LOCAL_RANK", dist.get_rank()),  # not said: all are on one node
            size=dist.get_world_size(),
            local_size=whole_number(os.environ, "LOCAL_WORLD_SIZE", dist.get_world_size()),
        )
        place = _device_of(launch, "cpu" if device == "auto" and "nccl" not in backend else device)
        return World(launch.rank, launch.local_rank, launch.size, launch.local_size, place, backend, adopted=True)
    launch = read_environment(os.environ)
    place = _device_of(launch, device)
    if launch.size == 1:
        return World(0, 0, 1, 1, place, None, launched=launch.launcher != "none")
    # underneath: torchrun sets OMP_NUM_THREADS=1, with a warning, where it is not set. We cannot tell that 1 from one
    # that the user chose, so `launch.sh` sets cores / ranks before it calls torchrun.
    if not os.environ.get("OMP_NUM_THREADS") and not os.environ.get("MKL_NUM_THREADS"):
        # srun binds a task to CPUs of its own; where it does, torch's number is that task's share already.
        share = whole_number(os.environ, "SLURM_CPUS_PER_TASK", 0) if launch.launcher == "slurm" else 0
        torch.set_num_threads(share or max(1, torch.get_num_threads() // launch.local_size))
    if launch.launcher == "torchrun":
        end_with_parent()
    cuda = place if place.type == "cuda" else None
    if cuda is not None:
        torch.cuda.set_device(cuda)
    try:
        dist.init_process_group(
            backend_for(place), store=_store(launch, timeout), timeout=timeout,
            rank=launch.rank, world_size=launch.size, device_id=cuda,
        )  # fmt: skip
    except RuntimeError as failure:
        who = f"rank {launch.rank} of {launch.size} ({launch.launcher}, {launch.init_method})"
        raise RuntimeError(f"{who} did not meet the other ranks within {timeout}: {failure}") from failure
    atexit.register(_let_threads_finish)
    return World(launch.rank, launch.local_rank, launch.size, launch.local_size, place, dist.get_backend())


def shutdown(world: World) -> None:
    """Destroy the process group that `init_world` made. Belongs in a `finally`; may be called twice.

    This ends the group's threads, unless something still holds the group itself. torch's DistributedDataParallel does,
    and so does ours where it was given a group: delete such models first.
    """
    if dist.is_initialized() and not world.adopted:
        gc.collect()  # models that only their own hooks hold
        dist.destroy_process_group()
        atexit.unregister(_let_threads_finish)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks: as the process group says, or, before there is one, the environment.

    Raises UsageError, as `read_environment`.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launch = read_environment(os.environ)
    return launch.rank, launch.size


def _let_threads_finish() -> None:
    """At the end of a process that never called `shutdown`."""
    # underneath: gloo's thread drops a call's tensors after it has reported the call's end. Where Python holds them
    # too, the thread needs the interpreter for that. An interpreter that is shutting down ends the thread there, inside
    # a destructor: "terminate called without an active exception". Destroying the group might wait for calls that the
    # other ranks never make, so give the thread a moment instead.
    if dist.is_initialized():
        time.sleep(0.1)


def _store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store in which the ranks of this attempt meet."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            return _store_of_this_attempt(_open_store(launch, timeout), launch, timeout)
        except dist.DistNetworkError:
            # A second Accelerator in the same processes: rank 0 may still be closing the first one's store.
            if launch.rank == 0 or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """torchrun's store, which listens on all interfaces, or one of rank 0's, which on one node is loopback only."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    if launch.launcher == "slurm":
        host, _, port = launch.init_method.removeprefix("tcp://").rpartition(":")
    on_one_node = launch.local_size == launch.size or host in ("localhost", "::1") or host.startswith("127.")
    if on_one_node and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens where the host's name leads
    if not on_one_node or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or os.name != "posix":
        store, _, _ = next(dist.rendezvous(launch.init_method, launch.rank, launch.size, timeout=timeout))
        return store
    listener = None
    # underneath: torch's own TCPStore listens on all interfaces, whatever address it is given
    if launch.rank == 0:
        # OSError: the port is taken by a store that this process still has, which torch then uses; or torch says so.
        with suppress(OSError):
            listener = socket.create_server(("127.0.0.1", int(port))).detach()
    return dist.TCPStore(
        "127.0.0.1", int(port), launch.size, launch.rank == 0, timeout, multi_tenant=True, master_listen_fd=listener
    )


def _store_of_this_attempt(store: dist.Store, launch: Launch, timeout: timedelta) -> dist.Store:
    """The part of the store that only the ranks of this attempt, all of them alive, read and write.

    Rank 0 puts up an invitation under a name that no attempt had before. Every other rank answers each invitation that
    it sees, even a dead rank's, with an id of its own, and joins the one whose list of guests has that id: only a rank
    that waits here now can have answered a new name.
    """
    # underneath: torchrun keeps one store over its restarts. New ranks find the addresses of dead ones there, and are
    # refused or hang (pytorch issue 135712). TORCHELASTIC_RESTART_COUNT cannot tell attempts apart: each node counts
    # for itself, and starts its ranks while the other node's old ones still run.
    if launch.rank == 0:
        attempt = uuid.uuid4().hex
        store.set("nanofinetune/invitation", attempt)
        guests = [store.get(f"{attempt}/{rank}").decode() for rank in range(1, launch.size)]  # waits for each
        store.set(f"{attempt}/guests", " ".join(guests))
        return dist.PrefixStore(attempt, store)
    me, attempt, deadline = uuid.uuid4().hex, "", time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if (latest := store.get("nanofinetune/invitation").decode()) != attempt:
            attempt = latest
            store.set(f"{attempt}/{launch.rank}", me)
        if store.check([f"{attempt}/guests"]) and me in store.get(f"{attempt}/guests").decode().split():
            return dist.PrefixStore(attempt, store)
        time.sleep(0.01)
    raise RuntimeError("rank 0 did not hear from all ranks")


def _device_of(launch: Launch, name: str) -> torch.device:
    """The device of this rank. With several ranks, `cuda` becomes the GPU that has the local rank's number."""
    device = choose_device(name)
    if launch.size == 1:
        return device
    if device.type == "mps" and name == "auto":
        return torch.device("cpu")
    backend_for(device)  # raises where only one process can be
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise UsageError(f"--device {name} is one GPU for {launch.size} processes: choose --device cuda")
    count = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each task its own GPU as number 0.
    index = 0 if launch.launcher == "slurm" and count == 1 else launch.local_rank
    if index >= count:
        raise UsageError(
            f"{launch.local_size} processes on a node with {count} GPUs: start {count}, or choose --device cpu"
        )
    return torch.device("cuda", index)
