"""The world of one run: which rank this process is, the process group, and what the ranks say to each other.

>>> read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
...                   "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
Launch(launcher='torchrun', rank=3, local_rank=1, size=4, local_size=2, init_method='env://')
>>> first_host("rack[2-3]n[07-09,11],login1")
'rack2n07'

Underneath: `accelerate.state.PartialState`, `accelerate.utils.operations.gather`, `accelerate.utils.operations.reduce`,
`accelerate.utils.operations.broadcast`, `accelerate.utils.operations.pad_across_processes`,
`accelerate.utils.operations.gather_object`, `accelerate.utils.operations.broadcast_object_list` and
`accelerate.utils.set_seed` (accelerate 1.15). `PartialState` is one dictionary shared by all its instances and picks
among a dozen backends. Its collectives walk a nested container and call `torch.distributed` leaf by leaf; where the
ranks disagree about a shape they hang or return garbage. Kept: names, arguments, results, the early return at one
process. Left out: XLA, NPU and the rest. Different on purpose: (1) torchrun on a machine without a GPU is real training
over gloo, where Accelerate runs N silent copies; (2) before each collective the ranks exchange one small header (which
call, shapes, dtypes; it costs two short all-gathers), so that a disagreement raises on all ranks and says who holds
what; (3) ranks wait 5 minutes for each other, not gloo's 30; (4) a failure inside `main_process_first` reaches all
ranks at once; (5) the state is a `World` that is passed around, not a global; (6) the ranks of a restart meet each
other, and not what torchrun's store still knows of the dead ones.

Proof: test_read_environment_table, test_collectives_match_accelerate, test_single_process_matches_accelerate,
test_disagreement_raises_on_all_ranks, test_main_process_first_failure_reaches_all_ranks,
test_set_seed_matches_accelerate, test_torchrun_on_cpu_is_one_world_where_accelerate_runs_copies and
test_an_attempt_never_meets_the_dead in tests/test_distributed.py; test_restarted_ranks_meet_each_other in
tests/test_launch.py; test_two_nodes_restart_together in tests/test_nodes.py.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from nanofinetune.ground.device import backend_for, choose_device
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.process import end_with_parent
from nanofinetune.ranks.environment import Launch, read_environment

# underneath: gloo's own default is 30 minutes, in which a mistake looks like a slow step.
TIMEOUT = timedelta(minutes=5)


class Calls(Counter[str]):
    """How often each collective was called, and the latest: what a rank says when it waits in vain.

    >>> calls = Calls()
    >>> calls.begin("gather"), calls.begin("gather"), calls.latest
    ('gather#1', 'gather#2', 'gather#2')
    """

    latest = "no collective yet"

    def begin(self, name: str) -> str:
        """Count one more call -> its label, which is the same on all ranks that make the same calls."""
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
    calls: Calls = field(default_factory=Calls, compare=False, repr=False)


def init_world(device: str = "auto", timeout: timedelta = TIMEOUT) -> World:
    """Set up the process group that the environment asks for (gloo on CPUs, nccl on CUDA), or adopt the caller's.

    This process ends with its torchrun from then on (Linux). Call `shutdown` in a `finally`.
    `timeout` is how long ranks wait for each other, here and in each collective.

    Threads: with several ranks and neither OMP_NUM_THREADS nor MKL_NUM_THREADS set, a rank takes torch's number divided
    by the ranks of its node. A value that is set is respected. underneath: torchrun sets OMP_NUM_THREADS=1, with a
    warning, where it is not set; we cannot tell that 1 from the user's, so `launch.sh` sets cores / ranks before.

    Raises:
        UsageError: as `read_environment`; or the device is not there, or the ranks cannot share it.
        RuntimeError: the other ranks did not come in time.
    """
    if dist.is_initialized():
        backend: str = dist.get_backend()
        launch = Launch(
            launcher="adopted",
            rank=dist.get_rank(),
            local_rank=int(os.environ.get("LOCAL_RANK", dist.get_rank())),  # no launcher's word: all on one node
            size=dist.get_world_size(),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
        )
        place = _device_of(launch, "cpu" if device == "auto" and "nccl" not in backend else device)
        return World(launch.rank, launch.local_rank, launch.size, launch.local_size, place, backend, adopted=True)
    launch = read_environment(os.environ)
    place = _device_of(launch, device)
    if launch.size == 1:
        return World(0, 0, 1, 1, place, None)
    if not os.environ.get("OMP_NUM_THREADS") and not os.environ.get("MKL_NUM_THREADS"):
        # srun binds a task to its own CPUs: where it does, torch's number is that task's share already.
        share = int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) if launch.launcher == "slurm" else 0
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

    It ends the group's threads, unless something holds the group itself, as torch's DistributedDataParallel does, and
    ours where it was given one: let go of such models before.
    """
    if dist.is_initialized() and not world.adopted:
        gc.collect()  # models that nothing but their own hooks hold
        dist.destroy_process_group()
        atexit.unregister(_let_threads_finish)


def _let_threads_finish() -> None:
    """At the end of a process that never called `shutdown`."""
    # underneath: gloo's thread gives up a call's tensors after it has told of the call's end. Where Python holds them
    # too it needs the interpreter for that, and one that is ending ends the thread, in a destructor: "terminate called
    # without an active exception". Destroying the group might wait for calls that the others never make; so give time.
    if dist.is_initialized():
        time.sleep(0.1)


def _store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store in which the ranks of this attempt meet."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store, _, _ = next(dist.rendezvous(launch.init_method, launch.rank, launch.size, timeout=timeout))
            return _store_of_this_attempt(store, launch, timeout)
        except dist.DistNetworkError:
            # A second Accelerator in the same processes: rank 0 was still closing the first one's store.
            if launch.rank == 0 or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _store_of_this_attempt(store: dist.Store, launch: Launch, timeout: timedelta) -> dist.Store:
    """The part of the store that the ranks which are alive now have to themselves.

    underneath: torchrun keeps one store over its restarts, in which new ranks find the addresses of dead ones: they
    are refused, or they hang (pytorch issue 135712). TORCHELASTIC_RESTART_COUNT cannot tell the attempts apart: each
    node counts for itself, and starts its ranks while the other's still run. So rank 0 invites under a name that no
    attempt had before. Every other rank accepts, as itself, each invitation that it sees, those of dead ranks too, and
    joins the one whose list of guests has it: only ranks that wait here can have accepted a new name.
    """
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
    """The device of this rank: of several, `cuda` becomes the GPU that has the local rank's number."""
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


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python's `random`, numpy and torch on all devices; `device_specific` adds the rank to `seed`."""
    # underneath: without device_specific all ranks draw the same dropout masks.
    if device_specific:
        seed += dist.get_rank() if dist.is_initialized() else read_environment(os.environ).rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
