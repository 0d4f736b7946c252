"""ranks/world.py beside accelerate 1.15's PartialState and set_seed, and beside torch, on real gloo ranks.

Run: OMP_NUM_THREADS=1 python -m pytest tests/ranks/test_world.py
"""

import concurrent.futures
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, run_ranks, run_torchrun

from nanofinetune.dropin.operations import set_seed
from nanofinetune.ground.environment import Launch
from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks import world as ranks_world
from nanofinetune.ranks.collectives import reduce, wait_for_everyone
from nanofinetune.ranks.world import World, init_world, shutdown


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
            ranks_world._device_of(launch, name)
    else:
        assert ranks_world._device_of(launch, name) == expected


def test_torch_and_so_accelerate_would_wait_for_half_an_hour():
    minutes = {
        "ours": ranks_world.TIMEOUT.total_seconds() / 60,
        "torch's": dist.constants.default_pg_timeout.total_seconds() / 60,
    }
    assert minutes == {"ours": 5, "torch's": 30}
    theirs = pytest.importorskip("accelerate.utils", reason="what this test compares with (extra `test`)")
    assert theirs.InitProcessGroupKwargs(backend="gloo").timeout == timedelta(minutes=30)


def meet_among_the_dead(rank, store, launch):
    """One rank's part of the meeting -> the value of a key that this attempt alone has."""
    own = ranks_world._store_of_this_attempt(store, launch, timedelta(seconds=20))
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
        ranks_world._store_of_this_attempt(store, alone, timedelta(seconds=0.1))


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
    theirs = pytest.importorskip("accelerate.utils", reason="what this test compares with (extra `test`)")
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


def listening():
    """Addresses at which this process listens for TCP."""
    sockets = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in sockets:
                words = re.findall("[0-9A-F]{8}", parts[1].partition(":")[0])
                found.add(socket.inet_ntop(family, b"".join(bytes.fromhex(word)[::-1] for word in words)))
    return found


def _is_link(fd):
    return os.path.islink(f"/proc/self/fd/{fd}")


def listen_as_one_node(launcher):
    if launcher == "slurm":
        rank = os.environ.pop("RANK")
        for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name)
        os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2",
                       "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1",
                       "MASTER_ADDR": "this-node.invalid"}  # fmt: skip
    if launcher == "torch":
        dist.init_process_group("gloo")
        found = listening()
        dist.barrier()
        dist.destroy_process_group()
        return found
    found = set()
    for _ in range(2):  # a second world in the same processes
        world = init_world("cpu")
        assert reduce(torch.ones(1), world, "sum").item() == 2
        found |= listening()
        wait_for_everyone(world)
        shutdown(world)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_ranks_of_one_node_listen_on_the_loopback_only(launcher):
    assert run_ranks(listen_as_one_node, 2, launcher) == [{"127.0.0.1"}] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchs_store_listens_on_all_interfaces():
    first, _ = run_ranks(listen_as_one_node, 2, "torch")
    assert first & {"::", "0.0.0.0"}


@pytest.mark.parametrize(
    ("name", "value"), [("LOCAL_RANK", "first"), ("LOCAL_WORLD_SIZE", "")], ids=["LOCAL_RANK", "LOCAL_WORLD_SIZE"]
)
def test_an_odd_variable_beside_an_adopted_group_is_one_line(monkeypatch, name, value):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=f"^{name}='{value}' is not a whole number$"):
            init_world("cpu")
    finally:
        dist.destroy_process_group()


LAST_CALL = """
import atexit, sys, time
import torch
import torch.distributed as dist
from nanofinetune.ranks import world
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "ours":  # as init_world does
    atexit.register(world._let_threads_finish)
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


@pytest.mark.slow
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


@pytest.mark.slow
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
