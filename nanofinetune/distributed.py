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
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanofinetune.device import backend_for, choose_device, end_with_parent
from nanofinetune.errors import UsageError

# underneath: gloo's own default is 30 minutes, in which a mistake looks like a slow step.
TIMEOUT = timedelta(minutes=5)
START = "start with `launch.sh` or `torchrun`"


# ---- Which process is this? ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process. `launcher` is torchrun, slurm or none."""

    launcher: str = "none"
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    init_method: str = "env://"


def read_environment(environ: Mapping[str, str]) -> Launch:
    """torchrun's, SLURM's or no launcher's variables -> the place of this process. Pure: `environ` is all it reads.

    In this order: LOCAL_RANK (torchrun's worker), SLURM_PROCID with SLURM_NTASKS > 1 (srun's task), else one process.

    Raises:
        UsageError: the variables are incomplete, or promise several processes without making this one of them.
    """
    if environ.get("LOCAL_RANK", "-1") != "-1":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        rank, local_rank, size, local_size, _ = (_integer(environ, name) for name in names)
        if not (0 <= local_rank <= rank < size and local_rank < local_size <= size and environ.get("MASTER_ADDR")):
            values = " ".join(f"{name}={environ.get(name, '')}" for name in (*names, "MASTER_ADDR"))
            raise UsageError(f"{values} do not fit together: {START}, which set them")
        return Launch("torchrun", rank, local_rank, size, local_size)
    if "SLURM_PROCID" in environ and environ.get("SLURM_NTASKS", "1") != "1":
        return _read_slurm(environ)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if environ.get(name, "1") != "1":
            raise UsageError(f"{name}={environ[name]}: mpirun is not supported; {START}")
    # underneath: Kubeflow's PyTorchJob counts pods in RANK and WORLD_SIZE; Trainer v2 sets torchrun's PET_* options.
    for name in ("WORLD_SIZE", "PET_NNODES", "PET_NPROC_PER_NODE"):
        if environ.get(name, "1") != "1":
            raise UsageError(
                f"{name}={environ[name]} without LOCAL_RANK counts pods or nodes, not processes:"
                " start each of them with `launch.sh` or `torchrun`, which start the processes"
            )
    return Launch()


def first_host(nodelist: str) -> str:
    """The first line of `scontrol show hostnames NODELIST`, without calling it."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodelist)
    if first is None:
        raise UsageError(f"SLURM_JOB_NODELIST={nodelist!r} names no host: set MASTER_ADDR to the first node's name")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def _read_slurm(environ: Mapping[str, str]) -> Launch:
    size = _integer(environ, "SLURM_NTASKS")
    if "SLURM_STEP_ID" not in environ:  # the shell of sbatch has SLURM_PROCID=0 and the job's SLURM_NTASKS too
        raise UsageError(f"SLURM_NTASKS={size}, but srun did not start this process: use `srun python ...`, or {START}")
    rank, local_rank = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_LOCALID")
    tasks: list[int] = []  # of each node: "4(x2),1" is three nodes with 4, 4 and 1
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_TASKS_PER_NODE", "")):
        tasks += [int(count)] * int(repeat or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    local_size = tasks[node] if node < len(tasks) else int(environ.get("SLURM_NTASKS_PER_NODE", "1"))
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_JOB_NODELIST", ""))
    # The same for all tasks, mostly another one for another job, and below the ports that Linux hands out (32768 up).
    port = environ.get("MASTER_PORT") or 15000 + _integer(environ, "SLURM_JOB_ID") % 15000
    return Launch("slurm", rank, local_rank, size, local_size, f"tcp://{host}:{port}")


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        known = "SLURM_PROCID" if name.startswith("SLURM") else "LOCAL_RANK"
        raise UsageError(f"{known} is set but {name} is not: {START}, which set both") from None
    except ValueError:
        raise UsageError(f"{name}={environ[name]!r} is not a whole number") from None


# ---- The world -------------------------------------------------------------------------------------------------------


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


@dataclass
class InitProcessGroupKwargs:
    """For `Accelerator(kwargs_handlers=[...])` (source: accelerate.utils.InitProcessGroupKwargs).

    `backend` must be the device's own, gloo or nccl; the default goes with both. `timeout` None is 10 minutes where
    that is nccl, the default, and else 30. `init_method` is read from the environment, so it stays None.
    """

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.init_method is not None:
            raise NotImplementedError(f"init_method={self.init_method!r} is not supported: {START}")
        if self.timeout is None:
            self.timeout = timedelta(minutes=10 if self.backend == "nccl" else 30)


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


# ---- What the ranks say to each other --------------------------------------------------------------------------------
# `data` is a tensor or a nested list, tuple, named tuple or dict of tensors. At size 1 each call returns at once.
# At other sizes each raises, on all ranks: RuntimeError where the ranks are in different calls or disagree about
# containers, dtypes or shapes; TypeError where a leaf is not a tensor.


def gather(data: Any, world: World) -> Any:
    """Concatenate each leaf over the ranks, in rank order: (n, ...) on each -> (size * n, ...) on all, detached."""
    if world.size == 1:
        return data
    _agree("gather", data, world)

    def gather_one(tensor: torch.Tensor) -> torch.Tensor:
        row = tensor.detach().contiguous()
        row = row[None] if row.ndim == 0 else row  # underneath: so a 0-d tensor comes back as (size,)
        wire = row.reshape(-1).view(torch.uint8)  # bytes, since gloo knows neither int16 nor float8
        result = wire.new_empty(world.size, wire.numel())
        dist.all_gather(list(result.unbind()), wire)
        return result.reshape(-1).view(row.dtype).view(world.size * row.shape[0], *row.shape[1:])

    return recursively_apply(gather_one, data)


def reduce(data: Any, world: World, reduction: str = "mean") -> Any:
    """Reduce each leaf over the ranks, into a new, detached tensor: "mean", "sum", "max" or "none".

    Raises (on all ranks): ValueError for another reduction, for a sum or mean of bools and for a mean of integers.
    """
    if reduction not in ("mean", "sum", "max", "none"):
        raise ValueError(f"reduction={reduction!r}: choose mean, sum, max or none")
    if world.size == 1:
        return recursively_apply(lambda tensor: _tensor(tensor).clone(), data)
    _agree(f"reduce[{reduction}]", data, world)

    def reduce_one(tensor: torch.Tensor) -> torch.Tensor:
        countable = tensor.is_floating_point() or tensor.is_complex() or reduction != "mean"
        if reduction != "max" and (tensor.dtype == torch.bool or not countable):
            raise ValueError(f"reduce: there is no {reduction} of {tensor.dtype}; convert it to float or int64 first")
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        # underneath: Accelerate's "none" sums over the ranks as well; only at size 1 does it do nothing.
        dist.all_reduce(result, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
        return result.div_(world.size) if reduction == "mean" else result

    return recursively_apply(reduce_one, data)


def broadcast(data: Any, world: World, from_process: int = 0) -> Any:
    """Overwrite each leaf, in place, with that of rank `from_process`; return the container with the same tensors."""
    if world.size == 1:
        return data
    _check_rank(from_process, world)
    _agree(f"broadcast[{from_process}]", data, world)

    def broadcast_one(tensor: torch.Tensor) -> torch.Tensor:
        # underneath: gloo sends the memory from the tensor's first element on; of one with gaps, as Accelerate hands it
        # over, that is the wrong elements. So send a dense copy, which for a contiguous tensor is the tensor itself.
        row = tensor.detach().contiguous()
        dist.broadcast(row.reshape(-1).view(torch.uint8), src=from_process)
        if row.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(row)
        return tensor

    return recursively_apply(broadcast_one, data)


def agree(flags: Sequence[int], world: World, name: str = "agree") -> list[int]:
    """The greatest of each flag over all ranks, on all ranks: one short all-reduce, cheap enough for every update."""
    if world.size == 1:
        return list(flags)
    world.calls.begin(name)
    greatest = torch.tensor(flags, dtype=torch.int64, device=world.device)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.tolist()


def pad_across_processes(data: Any, world: World, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Pad each leaf along `dim` to its greatest length on any rank, so that `gather` can take it.

    (..., n, ...) -> (..., max n, ...), same dtype. A leaf without that dimension, or long enough, is returned as it is.
    """
    if world.size == 1:
        return recursively_apply(_tensor, data)
    everyone = _agree("pad_across_processes", data, world, ragged=True)
    shapes = iter(zip(*([shape for _, _, shape in leaves] for leaves in everyone), strict=True))  # a leaf's, by rank

    def pad_one(tensor: torch.Tensor) -> torch.Tensor:
        by_rank = next(shapes)
        if not -tensor.ndim <= dim < tensor.ndim:
            return tensor
        length, longest = tensor.shape[dim], max(shape[dim] for shape in by_rank)
        if length == longest:
            return tensor
        size = list(tensor.shape)
        size[dim] = longest
        # underneath: Accelerate pads with `zeros + pad_index`, which makes bool int64, and only on the ranks that pad.
        padded = tensor.new_full(size, pad_index)
        padded.narrow(dim, longest - length if pad_first else 0, length).copy_(tensor)
        return padded

    return recursively_apply(pad_one, data)


def gather_object(objects: Any, world: World) -> Any:
    """The ranks' lists of picklable objects, joined in rank order, on all ranks."""
    if world.size == 1:
        return objects
    # underneath: one level is flattened, so that a string falls into its letters. Pass a list.
    return [item for part in _meet("gather_object", world, objects)[1] for item in part]


def broadcast_object_list(object_list: list[Any], world: World, from_process: int = 0) -> list[Any]:
    """Overwrite the list's items, in place, with those of rank `from_process`; return the list."""
    if world.size == 1:
        return object_list
    _check_rank(from_process, world)
    label, lengths = _meet(f"broadcast_object_list[{from_process}]", world, len(object_list))
    if len(set(lengths)) > 1:
        raise RuntimeError(f"{label}: the lists are of different lengths, by rank {lengths}")
    dist.broadcast_object_list(object_list, src=from_process)
    return object_list


def wait_for_everyone(world: World) -> None:
    """Return once all ranks are here."""
    if world.size > 1:
        _meet("wait_for_everyone", world, None)


def main_process_first(world: World, timeout: timedelta = timedelta(hours=2)) -> AbstractContextManager[None]:
    """A `with` block that rank 0 runs before the others do. If it fails there, all ranks raise at once.

    `timeout` is this call's own: the first pass over a data set may take longer than ranks otherwise wait.
    """
    return _goes_first(world.rank == 0, "main_process_first", world, timeout)


def local_main_process_first(world: World, timeout: timedelta = timedelta(hours=2)) -> AbstractContextManager[None]:
    """A `with` block that the first rank of each node runs before all others do. If one of them fails, all raise."""
    return _goes_first(world.local_rank == 0, "local_main_process_first", world, timeout)


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


# ---- How they meet ---------------------------------------------------------------------------------------------------


@contextmanager
def _goes_first(first: bool, name: str, world: World, timeout: timedelta) -> Iterator[None]:
    if world.size == 1:
        yield
        return
    _meet(name, world, None)  # all ranks are here: from now on it is the work that takes the time
    patient = dist.new_group(backend="gloo", timeout=timeout)

    def hear_from_the_first(failure: BaseException | None = None) -> None:
        who = f"rank {world.rank} failed with {type(failure).__name__}: {failure}"
        told = None if failure is None else (who, str(failure) if isinstance(failure, UsageError) else "")
        label, heard = _meet(f"end of {name}", world, told, patient)
        failures = [pair for pair in heard if pair]
        if failure is None and failures:
            for _, what_the_user_got_wrong in failures:
                if what_the_user_got_wrong:  # the same on every rank, and no rank's own fault
                    raise UsageError(what_the_user_got_wrong)
            raise RuntimeError(f"{label}: {'; '.join(text for text, _ in failures)}")

    try:
        if not first:
            hear_from_the_first()
            yield
            return
        # underneath: Accelerate has no `try` here: the other ranks wait until rank 0's process ends, or the timeout.
        try:
            yield
        except BaseException as failure:
            hear_from_the_first(failure)
            raise
        hear_from_the_first()
    finally:
        dist.destroy_process_group(patient)


def _meet(name: str, world: World, payload: Any, group: dist.ProcessGroup | None = None) -> tuple[str, list[Any]]:
    """This call's label ("gather#12") and every rank's payload in rank order, once all ranks are in this same call."""
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: {world.size} ranks but no process group; call init_world first and shutdown last")
    label = world.calls.begin(name)
    everyone: list[Any] = [None] * world.size
    try:
        dist.all_gather_object(everyone, (label, payload), group=group)
    except RuntimeError as failure:
        who = f"{label} on rank {world.rank} of {world.size}"
        raise RuntimeError(f"{who}: another rank has ended or did not come in time: {failure}") from failure
    if len({label for label, _ in everyone}) > 1:
        places = ", ".join(f"rank {rank} is at {label}" for rank, (label, _) in enumerate(everyone))
        raise RuntimeError(
            f"the ranks are in different calls: {places}; all must make the same calls in the same order"
        )
    return label, [payload for _, payload in everyone]


def _agree(name: str, data: Any, world: World, ragged: bool = False) -> list[list[tuple[str, str, Any]]]:
    """Every rank's leaves as (path, dtype@device, shape), now known to agree; `ragged`: lengths may differ."""
    label, everyone = _meet(name, world, list(_describe(data)))
    for leaf in zip_longest(*everyone, fillvalue=("", "nothing", ())):
        if len({(path, kind, len(shape) if ragged else shape) for path, kind, shape in leaf}) > 1:
            held = [
                f"rank {rank} has data{path}: {kind} {list(shape)}" for rank, (path, kind, shape) in enumerate(leaf)
            ]
            remedy = "" if ragged else "; where only lengths differ, call pad_across_processes first"
            raise RuntimeError(f"{label}: {', '.join(held)}{remedy}")
    recursively_apply(_tensor, data)  # raises for other leaves, now that all ranks are known to hold them
    return everyone


def _describe(data: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(data, (tuple, list)):
        for index, item in enumerate(data):
            yield from _describe(item, f"{path}[{index}]")
    elif isinstance(data, Mapping):
        for key, item in data.items():
            yield from _describe(item, f"{path}[{key!r}]")
    elif isinstance(data, torch.Tensor):
        yield path, f"{str(data.dtype).removeprefix('torch.')}@{data.device.type}", tuple(data.shape)
    else:
        yield path, type(data).__name__, ()


def recursively_apply(function: Callable[[Any], Any], data: Any) -> Any:
    """`data`'s container with `function` applied to each leaf, in the order of `_describe`."""
    if isinstance(data, (tuple, list, Mapping)):
        return rebuilt(lambda item: recursively_apply(function, item), data)
    return function(data)


def rebuilt(function: Callable[[Any], Any], container: Any) -> Any:
    """A list, tuple or mapping of the same type, with `function` applied to each of its items."""
    kind: Any = type(container)
    if isinstance(container, Mapping):
        return kind({key: function(item) for key, item in container.items()})
    items = [function(item) for item in container]
    return kind(*items) if hasattr(container, "_fields") else kind(items)  # a namedtuple takes its fields


def _tensor(leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"collectives take tensors in nested lists, tuples and dicts, not {type(leaf).__name__}")
    return leaf


def _check_rank(rank: int, world: World) -> None:
    if not 0 <= rank < world.size:
        raise ValueError(f"from_process={rank}: there are {world.size} ranks, numbered from 0")
