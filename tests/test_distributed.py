"""Environment, process group and collectives beside accelerate 1.15's, on real gloo ranks; all results bit for bit.

OMP_NUM_THREADS=1 python -m pytest tests/test_distributed.py
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, run_ranks, run_torchrun, run_world

from nanofinetune import distributed
from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.collectives import (
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    local_main_process_first,
    main_process_first,
    pad_across_processes,
    reduce,
    wait_for_everyone,
)
from nanofinetune.ranks.environment import Launch, first_host, read_environment
from nanofinetune.ranks.world import World, init_world, set_seed, shutdown

Point = collections.namedtuple("Point", "x y")
ALONE = World(0, 0, 1, 1, torch.device("cpu"), None)
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
]


# ---- which process is this? ------------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_PORT": "1",
    "MASTER_ADDR": "a",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "5", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1",
         "SLURM_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "n[07-08],m1"}  # fmt: skip


def without(environ, name):
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch("torchrun", 5, 1, 8, 4, "env://")),
        ({**SLURM, **TORCHRUN}, Launch("torchrun", 5, 1, 8, 4, "env://")),  # torchrun inside a SLURM job
        ({"LOCAL_RANK": "-1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),  # one pod
        (SLURM, Launch("slurm", 3, 1, 5, 2, "tcp://n07:16234")),
        ({**SLURM, "SLURM_NODEID": "2"}, Launch("slurm", 3, 1, 5, 1, "tcp://n07:16234")),
        ({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "9"}, Launch("slurm", 3, 1, 5, 2, "tcp://h:9")),
        ({**without(SLURM, "SLURM_TASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE": "4"},
         Launch("slurm", 3, 1, 5, 4, "tcp://n07:16234")),
        ({**SLURM, "SLURM_NTASKS": "1"}, Launch()),  # srun with one task, or an interactive shell
        (without(SLURM, "SLURM_PROCID"), Launch()),  # salloc's shell on the login node
    ],
)  # fmt: skip
def test_read_environment_table(environ, expected):
    assert read_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK counts pods or nodes, not processes"),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, "PET_NNODES=2 without LOCAL_RANK counts pods"),
        ({"PET_NPROC_PER_NODE": "auto"}, "PET_NPROC_PER_NODE=auto without LOCAL_RANK counts pods"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: mpirun is not supported; start with `launch.sh`"),
        (without(TORCHRUN, "RANK"), "LOCAL_RANK is set but RANK is not: start with `launch.sh` or `torchrun`"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR= do not fit together"),
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 .* do not fit together"),
        ({**TORCHRUN, "RANK": "two"}, "RANK='two' is not a whole number"),
        (without(SLURM, "SLURM_STEP_ID"), "SLURM_NTASKS=5, but srun did not start this process: use `srun python ...`"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_PROCID is set but SLURM_LOCALID is not"),
        (without(SLURM, "SLURM_JOB_NODELIST"), "SLURM_JOB_NODELIST='' names no host: set MASTER_ADDR"),
    ],
)
def test_read_environment_refuses_what_would_be_silent_copies(environ, text):
    with pytest.raises(UsageError, match=text):
        read_environment(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5,9]", "node3"),
        ("node[007,009-011],other", "node007"),
        ("rack[2-3]n[07-09]-ib,x", "rack2n07-ib"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("launch", "name", "count", "expected"),
    [
        (Launch("torchrun", 5, 1, 8, 4), "auto", 4, torch.device("cuda", 1)),
        (Launch("torchrun", 5, 1, 8, 4), "cuda", 2, torch.device("cuda", 1)),
        (Launch("torchrun", 5, 1, 8, 4), "cpu", 4, torch.device("cpu")),
        (Launch("slurm", 5, 3, 8, 4), "cuda", 1, torch.device("cuda", 0)),
        (Launch(), "cuda", 4, torch.device("cuda")),
        (Launch(), "mps", 4, torch.device("mps")),
        (Launch("torchrun", 5, 1, 8, 4), "mps", 4, "--device mps is one device for one process"),
        (
            Launch("torchrun", 5, 1, 8, 4),
            "cuda",
            1,
            "4 processes on a node with 1 GPUs: start 1, or choose --device cpu",
        ),
        (
            Launch("torchrun", 5, 1, 8, 4),
            "cuda:0",
            4,
            "--device cuda:0 is one GPU for 8 processes: choose --device cuda",
        ),
    ],
)
def test_each_rank_has_its_own_gpu(monkeypatch, launch, name, count, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            distributed._device_of(launch, name)
    else:
        assert distributed._device_of(launch, name) == expected


# ---- collectives -----------------------------------------------------------------------------------------------------


def leaves(rank, dtype):
    """Tensors that differ by rank and share no memory: nested, 0-d, transposed, with gaps, empty."""
    generator = torch.Generator().manual_seed(rank)

    def draw():
        return torch.randint(0, 2 if dtype == torch.bool else 100, (3, 4), generator=generator).to(dtype)

    return {"a": [draw(), (draw().t(), draw()[0, 0])], "b": Point(draw()[:, ::2], draw()[:0]), 3: draw()[None]}


def same(ours, theirs):
    """The same containers and the same bits in them."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    else:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)


def collectives_beside_accelerate(world):
    from accelerate import PartialState
    from accelerate.utils import operations as theirs

    assert PartialState(cpu=True).num_processes == world.size
    for dtype in DTYPES:
        data = leaves(world.rank, dtype)
        same(gather(data, world), theirs.gather(data))
        same(reduce(data, world, "max"), theirs.reduce(data, "max"))
        if dtype != torch.bool:
            same(reduce(data, world, "sum"), theirs.reduce(data, "sum"))
            same(reduce(data, world, "none"), theirs.reduce(data, "none"))
            same(reduce(data, world, "none"), reduce(data, world, "sum"))
        if dtype.is_floating_point:
            same(reduce(data, world), theirs.reduce(data))
        for source in range(world.size):
            copy = leaves(world.rank, dtype)
            result = broadcast(copy, world, source)
            reference = leaves(world.rank, dtype)
            del reference["b"]  # see below
            same({key: result[key] for key in reference}, theirs.broadcast(reference, source))
            same(copy, leaves(source, dtype))  # in place
            assert result["a"][0] is copy["a"][0]
    for dim in (0, 1, -1, 5):
        for first in (False, True):
            ragged = {"x": [torch.full((2 + world.rank, 4 - world.rank), 7)], "y": torch.ones(3)}
            same(pad_across_processes(ragged, world, dim, -100, first),
                 theirs.pad_across_processes(ragged, dim, -100, first))  # fmt: skip
    for objects in ([world.rank, "a"], [], ["only rank 0"] if world.rank == 0 else []):
        same_objects = gather_object(objects, world), theirs.gather_object(objects)
        assert same_objects[0] == same_objects[1]
    ours_list, their_list = [world.rank, {"a": world.rank}], [world.rank, {"a": world.rank}]
    assert broadcast_object_list(ours_list, world, 1) is ours_list
    assert ours_list == theirs.broadcast_object_list(their_list, 1) == [1, {"a": 1}]
    wait_for_everyone(world)

    # What Accelerate cannot do: dtypes that gloo has no name for; padding that keeps the dtype.
    short = torch.full((2,), world.rank, dtype=torch.int16)
    assert gather(short, world).tolist() == [rank for rank in range(world.size) for _ in range(2)]
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        theirs.gather(short)
    ragged_mask = torch.ones(1 + world.rank, dtype=torch.bool)
    padded = theirs.pad_across_processes(ragged_mask)
    assert padded.dtype == (torch.bool if world.rank == world.size - 1 else torch.int64)  # not gatherable
    assert pad_across_processes(ragged_mask, world).dtype == torch.bool
    # A tensor with gaps: gloo sends the first elements of its memory, gaps and all, and Accelerate lets it.
    gaps = [torch.arange(6.0).add(10 * world.rank)[::2] for _ in range(2)]
    assert broadcast(gaps[0], world).tolist() == [0, 2, 4]
    assert (theirs.broadcast(gaps[1]).tolist() == [0, 2, 4]) == (world.rank == 0)
    # ... and gradients do not flow through collectives.
    assert not gather(torch.ones(1, requires_grad=True), world).requires_grad


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_match_accelerate(world):
    pytest.importorskip("accelerate", reason="the oracle is Accelerate itself (extra `test`)")
    run_world(collectives_beside_accelerate, world)


def test_single_process_matches_accelerate():
    theirs = pytest.importorskip("accelerate.utils.operations", reason="the oracle is Accelerate itself (extra `test`)")
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        assert PartialState(cpu=True).num_processes == 1
        data = leaves(0, torch.int64)
        assert gather(data, ALONE) is data is theirs.gather(data)
        assert broadcast(data, ALONE) is data is theirs.broadcast(data)
        assert gather_object(data, ALONE) is data is theirs.gather_object(data)
        items = [1]
        assert broadcast_object_list(items, ALONE) is items is theirs.broadcast_object_list(items)
        for reduction in ("mean", "sum", "max", "none"):  # the mean of integers is refused only where there is one
            same(reduce(data, ALONE, reduction), theirs.reduce(data, reduction))
        assert reduce(data["a"][0], ALONE) is not data["a"][0]
        same(pad_across_processes(data, ALONE, 1), theirs.pad_across_processes(data, 1))
        assert pad_across_processes(data, ALONE)["a"][0] is data["a"][0] is theirs.pad_across_processes(data)["a"][0]
        for function in (reduce, pad_across_processes):
            with pytest.raises(TypeError, match="not str"):
                function(["text"], ALONE)
            with pytest.raises(TypeError):
                getattr(theirs, function.__name__)(["text"])
    finally:
        AcceleratorState._reset_state(True)
    wait_for_everyone(ALONE)
    with main_process_first(ALONE), local_main_process_first(ALONE):
        pass
    assert not ALONE.calls


def disagreements(world):
    r = world.rank

    def text(call, error=RuntimeError):
        with pytest.raises(error) as failure:
            call()
        dist.barrier()  # nobody hangs, and the next collective works
        return str(failure.value)

    texts = [
        text(lambda: gather(torch.zeros(2 + r, 3), world)),
        text(lambda: reduce({"logits": [torch.zeros(2, dtype=torch.int64 if r else torch.float32)]}, world)),
        text(lambda: gather([torch.zeros(2)] * (2 + r), world)),
        text(lambda: gather({"ab"[r]: torch.zeros(2)}, world)),
        text(lambda: pad_across_processes(torch.zeros([2] * (1 + r)), world)),
        text(lambda: broadcast_object_list([0] * (1 + r), world)),
        text(lambda: gather([3], world), TypeError),
        text(lambda: gather([3 if r else torch.zeros(())], world)),
        text(lambda: reduce(torch.zeros(2, dtype=torch.int64), world), ValueError),
        text(lambda: reduce(torch.zeros(2, dtype=torch.bool), world, "sum"), ValueError),
        text(lambda: reduce(torch.zeros(2), world, "min"), ValueError),
        text(lambda: broadcast(torch.zeros(2), world, 2), ValueError),
        text(lambda: broadcast(torch.zeros(2 + r), world)),
    ]
    texts.append(text(lambda: reduce(torch.zeros(2), world, "sum" if r else "mean")))
    texts.append(text(lambda: gather(torch.zeros(2), world) if r else wait_for_everyone(world)))
    texts.append(text(lambda: gather(torch.zeros(2), world)))  # of which rank 1 has now made one more
    return texts


def test_disagreement_raises_on_all_ranks():
    first, second = run_world(disagreements, 2)
    assert first == second
    expected = [
        "gather#1: rank 0 has data: float32@cpu [2, 3], rank 1 has data: float32@cpu [3, 3]; where only "
        "lengths differ, call pad_across_processes first",
        "reduce[mean]#1: rank 0 has data['logits'][0]: float32@cpu [2], rank 1 has data['logits'][0]: int64@cpu [2]",
        "gather#2: rank 0 has data: nothing [], rank 1 has data[2]: float32@cpu [2]",
        "gather#3: rank 0 has data['a']: float32@cpu [2], rank 1 has data['b']: float32@cpu [2]",
        "pad_across_processes#1: rank 0 has data: float32@cpu [2], rank 1 has data: float32@cpu [2, 2]",
        "broadcast_object_list[0]#1: the lists are of different lengths, by rank [1, 2]",
        "collectives take tensors in nested lists, tuples and dicts, not int",
        "rank 0 has data[0]: float32@cpu [], rank 1 has data[0]: int []",
        "reduce: there is no mean of torch.int64; convert it to float or int64 first",
        "reduce: there is no sum of torch.bool; convert it to float or int64 first",
        "reduction='min': choose mean, sum, max or none",
        "from_process=2: there are 2 ranks, numbered from 0",
        "rank 0 has data: float32@cpu [2], rank 1 has data: float32@cpu [3]",
        "the ranks are in different calls: rank 0 is at reduce[mean]#3, rank 1 is at reduce[sum]#2",
        "the ranks are in different calls: rank 0 is at wait_for_everyone#1, rank 1 is at gather#6; all must make",
        "the ranks are in different calls: rank 0 is at gather#6, rank 1 is at gather#7; all must make",
    ]
    for text, part in zip(first, expected, strict=True):
        assert part in text


def one_rank_is_late():
    world = init_world("cpu", timeout=timedelta(seconds=1))
    if world.rank == 1:
        time.sleep(2.5)
        return None
    started = time.monotonic()
    with pytest.raises(RuntimeError) as failure:
        gather(torch.zeros(1), world)
    return str(failure.value), time.monotonic() - started


def test_a_collective_on_some_ranks_only_ends_at_the_timeout_and_says_which():
    (text, seconds), _ = run_ranks(one_rank_is_late, 2)
    assert text.startswith("gather#1 on rank 0 of 2: another rank has ended or did not come in time: ")
    assert seconds < 2.4


def test_torch_and_so_accelerate_would_wait_for_half_an_hour():
    minutes = {
        "ours": distributed.TIMEOUT.total_seconds() / 60,
        "torch's": dist.constants.default_pg_timeout.total_seconds() / 60,
    }
    assert minutes == {"ours": 5, "torch's": 30}
    theirs = pytest.importorskip("accelerate.utils", reason="the oracle is Accelerate itself (extra `test`)")
    assert theirs.InitProcessGroupKwargs(backend="gloo").timeout == timedelta(minutes=30)


def test_several_ranks_without_a_group():
    world = World(1, 1, 2, 2, torch.device("cpu"), "gloo")
    with pytest.raises(
        RuntimeError, match="gather: 2 ranks but no process group; call init_world first and shutdown last"
    ):
        gather(torch.zeros(1), world)


def meet_among_the_dead(rank, store, launch):
    """One rank's part of the meeting -> the value of a key that this attempt alone has."""
    own = distributed._store_of_this_attempt(store, launch, timedelta(seconds=20))
    if rank == 0:
        own.set("attempt", "this one")
    return own.get("attempt")


def test_an_attempt_never_meets_the_dead():
    """Three threads meet in a store with what a dead rank 0 and dead guests of it have left; the last comes late."""
    store = dist.HashStore()
    for key, value in [("nanofinetune/invitation", "old"), ("old/1", "x"), ("old/2", "y"), ("old/guests", "x y")]:
        store.set(key, value)
    dist.PrefixStore("old", store).set("attempt", "the dead one's")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        ranks = []
        for rank in (1, 0, 2):
            ranks.append(pool.submit(meet_among_the_dead, rank, store, Launch("torchrun", rank, rank, 3, 3)))
            time.sleep(0.1)
            assert not any(done.done() for done in ranks if rank != 2)  # nobody goes on before all are there
        assert [done.result(20) for done in ranks] == [b"this one"] * 3
    alone = Launch("torchrun", 1, 1, 2, 2)
    with pytest.raises(RuntimeError, match="rank 0 did not hear from all ranks"):
        distributed._store_of_this_attempt(store, alone, timedelta(seconds=0.1))


# ---- process control -------------------------------------------------------------------------------------------------


def first_and_failing():
    world = init_world("cpu", timeout=timedelta(seconds=2))
    log = []
    for block in (main_process_first, local_main_process_first):
        with block(world):
            if world.rank == 0:
                time.sleep(3)  # longer than ranks otherwise wait
            log.append(time.monotonic())
    texts, waited = [], 0.0
    for block in (main_process_first, local_main_process_first):
        started = time.monotonic()
        with pytest.raises(RuntimeError if world.rank else KeyError) as failure, block(world):
            assert world.rank == 0, "the others must not get here"
            raise KeyError("no such column")
        texts.append(str(failure.value))
        waited = max(waited, time.monotonic() - started)
    wait_for_everyone(world)
    with contextlib.suppress(ValueError), main_process_first(world):
        if world.rank == 1:
            raise ValueError("after rank 0: this one's own affair")
    shutdown(world)
    return log, texts, waited


def test_main_process_first_failure_reaches_all_ranks():
    (log0, own, _), (log1, heard, waited) = run_ranks(first_and_failing, 2)
    for mine, other in zip(log0, log1, strict=True):
        assert mine < other
    assert own == ["'no such column'"] * 2
    assert heard == [
        f"end of {name}#2: rank 0 failed with KeyError: 'no such column'"
        for name in ("main_process_first", "local_main_process_first")
    ]
    assert waited < 1.5


def first_meets_a_usage_error(world):
    with pytest.raises(UsageError) as failure, main_process_first(world):
        if world.rank == 0:
            raise UsageError("--data x.csv: there is no such file")
    return str(failure.value)


def test_main_process_first_tells_all_ranks_what_the_user_got_wrong():
    assert run_world(first_meets_a_usage_error, 2) == ["--data x.csv: there is no such file"] * 2


def accelerate_main_process_first():
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    from accelerate import PartialState

    state = PartialState(cpu=True)
    started = time.monotonic()
    try:
        with state.main_process_first():
            if state.is_main_process:
                raise KeyError("no such column")
    except KeyError:
        time.sleep(5)  # a program that cleans up, or catches what it can
    except RuntimeError as failure:
        return str(failure), time.monotonic() - started
    return "", 0.0


def test_accelerate_main_process_first_waits_for_the_timeout():
    pytest.importorskip("accelerate", reason="shows Accelerate itself (extra `test`)")
    _, (text, waited) = run_ranks(accelerate_main_process_first, 2)
    assert "Timed out waiting" in text and "no such column" not in text
    assert 1.8 < waited < 4.5  # not until rank 0's process has ended, and no word of its failure


def adopt_and_threads():
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.pop("MKL_NUM_THREADS", None)
    torch.set_num_threads(4)
    own = init_world("cpu")
    threads = torch.get_num_threads()
    adopted = init_world()  # a second one takes the group that is there
    shutdown(adopted)
    still = dist.is_initialized()
    set_seed(3, device_specific=True)
    draw = torch.rand(1).item()
    shutdown(own)
    shutdown(own)
    return own == World(own.rank, own.rank, 2, 2, torch.device("cpu"), "gloo"), adopted, threads, still, draw


def started_by_srun():
    """A rank that has srun's variables in place of torchrun's."""
    rank = os.environ.pop("RANK")
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "3",
                   "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "31234",
                   "SLURM_JOB_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "2"}  # fmt: skip
    world = init_world("cpu")
    total = reduce(torch.tensor([world.rank + 1.0]), world, "sum").item()
    shutdown(world)
    return world, total, torch.get_num_threads()


def test_srun_makes_a_world():
    for rank, (world, total, threads) in enumerate(run_ranks(started_by_srun, 3)):
        assert world == World(rank, rank, 3, 3, torch.device("cpu"), "gloo")
        assert (total, threads) == (6.0, 2)


def test_a_group_is_adopted_threads_are_shared_out_and_seeds_differ_by_rank():
    for rank, (right, adopted, threads, still, draw) in enumerate(run_ranks(adopt_and_threads, 2)):
        assert right and still and threads == 2
        assert adopted == World(rank, rank, 2, 2, torch.device("cpu"), "gloo", adopted=True)
        torch.manual_seed(3 + rank)
        assert draw == torch.rand(1).item()


@pytest.mark.parametrize("seed", [0, 42, 2**31])
def test_set_seed_matches_accelerate(seed):
    theirs = pytest.importorskip("accelerate.utils", reason="the oracle is Accelerate itself (extra `test`)")
    draws = []
    for function in (set_seed, theirs.set_seed):
        function(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(2).tolist()))
    assert draws[0] == draws[1]
    try:
        set_seed(seed, device_specific=True, deterministic=True)  # alone, the rank is 0
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.rand(2).tolist() == draws[0][2]
    finally:
        torch.use_deterministic_algorithms(False)


LAST_CALL = """
import atexit, sys, time
import torch
import torch.distributed as dist
from nanofinetune import distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "ours":  # as init_world does
    atexit.register(distributed._let_threads_finish)
class Last:
    def __del__(self, sleep=time.sleep):
        sleep(0.2)  # the interpreter is ending, and lets others have a go
last = Last()
sys.setswitchinterval(1000)  # until then, who has the interpreter keeps it
dist.all_reduce(torch.ones(3), async_op=True)  # whose work and tensor only gloo's thread holds on to
end = time.monotonic() + 0.2  # in which gloo's thread is done, and waits for the interpreter
while time.monotonic() < end:
    pass
"""


def test_a_group_that_is_never_shut_down_does_not_abort_where_torch_does(tmp_path):
    """Whether torch's does is a race: it is given some tries, and ours as many."""
    script = tmp_path / "script.py"
    script.write_text(LAST_CALL)
    codes: dict[str, list[int]] = {"ours": [], "torch": []}
    for _ in range(6):
        for whose, found in codes.items():
            done = subprocess.run([sys.executable, script, whose], cwd=ROOT, capture_output=True, timeout=60)
            found.append(done.returncode)
        if -signal.SIGABRT in codes["torch"]:
            break
    assert set(codes["ours"]) == {0}
    assert -signal.SIGABRT in codes["torch"]


SCRIPT = """
import importlib, json, sys
import torch
accelerator = importlib.import_module(sys.argv[1]).Accelerator()
seen = [accelerator.num_processes, accelerator.process_index, torch.distributed.get_world_size()]
seen.append(accelerator.reduce(torch.tensor([accelerator.process_index + 1.0]), "sum").item())
sys.stdout.write(json.dumps(seen) + "\\n")
accelerator.end_training()
"""


def test_torchrun_on_cpu_is_one_world_where_accelerate_runs_copies(tmp_path):
    """Two processes without a GPU run one script with either Accelerator(): a world of two, or two worlds of one."""
    pytest.importorskip("accelerate", reason="shows Accelerate itself (extra `test`)")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    seen = {}
    for whose in ("nanofinetune", "accelerate"):
        done = run_torchrun([script, whose], 2, env={"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": None})
        assert done.returncode == 0, done.stderr
        seen[whose] = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert seen["nanofinetune"] == [[2, 0, 2, 3.0], [2, 1, 2, 3.0]]
    assert seen["accelerate"] == [[1, 0, 2, 1.0]] * 2  # it makes a group of two, and believes to be alone
