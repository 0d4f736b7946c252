"""Signals, ranks that do not come, memory that runs out: on real ranks, and what the libraries say in the same places.

OMP_NUM_THREADS=1 python -m pytest tests/test_faults.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from helpers import run_ranks

from nanofinetune.ranks.world import init_world, shutdown
from nanofinetune.run.run import Mishap, out_of_memory, smaller
from nanofinetune.run.signals import StopSignals
from nanofinetune.run.watch import Watch, noted, preflight, transport_failure


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_noted(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)  # torchrun hands a Ctrl-C on: the same one again, at once
        time.sleep(0.1)
        assert (stop.number, stop.exit_code) == (number, 128 + number)
    assert signal.getsignal(number) is before
    name = signal.Signals(number).name
    assert f"{name}: stopping after this update; once more to stop now" in capfd.readouterr().err


def test_slurm_warns_with_sigusr1(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.exit_code == 128 + signal.SIGUSR1


def test_another_thread_has_no_handlers():
    found = []

    def enter():
        with StopSignals() as stop:
            found.append(stop.number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0]


DEAF = """
import time, ctypes
from nanofinetune.run.signals import StopSignals
with StopSignals():
    print("ready", flush=True)
    sleep = ctypes.PyDLL(None).usleep  # keeps the interpreter: no Python signal handler runs
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ctypes.CDLL(None).pause()  # waits in C as a collective does
"""


def test_signals_are_noted_and_the_second_one_ends():
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "SIGTERM again: stopped at once" in err


def group(seconds):
    world = init_world("cpu", timedelta(seconds=seconds))
    pids: list[int] = [0] * world.size
    dist.all_gather_object(pids, os.getpid())
    return world, pids


def stopped():
    """Rank 1 is stopped in its third update; rank 0 waits, explains, and wakes it."""
    world, pids = group(3)
    text = cause = ""
    try:
        with Watch(world) as watch:
            for update in range(1, 5):
                watch.update = update
                if world.rank == 1 and update == 3:
                    os.kill(os.getpid(), signal.SIGSTOP)
                world.calls.begin("all_reduce[bucket 1 of 3]")
                dist.all_reduce(torch.ones(10))
    except RuntimeError as error:
        text, cause = str(error), str(error.__cause__)
    if world.rank == 0:
        os.kill(pids[1], signal.SIGCONT)
    return text, cause


def test_a_stopped_rank_is_named_where_gloo_names_none():
    (text, cause), _ = run_ranks(stopped, 2, timeout=60)
    assert re.search(
        r"^a rank did not come in time:\n"
        r"  rank 0 waits in all_reduce\[bucket 1 of 3\]#3, update 3, at .*test_faults\.py:\d+ stopped\n"
        r"  rank 1 does not answer: it is stopped, or gone$",
        text,
    ), text
    assert "Timed out waiting 3000ms" in cause and not re.search(r"rank [01]", cause)


def dawdle():
    time.sleep(9)


def elsewhere():
    """Rank 1 is busy with something else in its second update."""
    world, _ = group(3)
    text = ""
    try:
        with Watch(world) as watch:
            for update in (1, 2):
                watch.update = update
                if world.rank == 1 and update == 2:
                    dawdle()
                world.calls.begin("agree")
                dist.all_reduce(torch.ones(10))
    except RuntimeError as error:
        text = str(error)
    return text


def test_a_rank_elsewhere_says_where():
    text, _ = run_ranks(elsewhere, 2, timeout=60)
    assert re.search(r"rank 0 waits in agree#2, update 2", text), text
    assert re.search(
        r"rank 1 is in agree#1, update 2, at test_faults\.py:\d+ dawdle < test_faults\.py:\d+ elsewhere", text
    )


class Facade:
    """The parts of an Accelerator that a Mishap asks for."""

    sync_gradients = True

    def __init__(self, world):
        self.world = world


def skipping():
    world, _ = group(20)
    mishap = Mishap(Facade(world), torch.nn.Linear(1, 1), StopSignals())
    said: list[object] = []
    for batch in (0, 1, 2):
        try:
            said.append(mishap.verdict(True, batch + (world.rank == 1 and batch == 2)))
        except RuntimeError as error:
            said.append(str(error))
    shutdown(world)
    return said


def test_a_rank_that_skips_a_batch_is_found():
    """At that very update, on all ranks; without the check they would add up different batches' gradients."""
    for rank, said in enumerate(run_ranks(skipping, 2, timeout=60)):
        assert said[:2] == [(0, False, False)] * 2
        assert said[2] == (
            f"the ranks are at different batches of this epoch, from 2 to 3, and rank {rank} is at {2 + rank}: a rank"
            " has skipped a batch or read one too many"
        )


def verdicts():
    """Each rank has another mishap: all hear of all."""
    world, _ = group(20)
    stop = StopSignals()
    mishap = Mishap(Facade(world), torch.nn.Linear(1, 1), stop)
    stop.number = 15 if world.rank == 0 else 0
    with mishap:
        if world.rank == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
    first = mishap.verdict(world.rank != 1, 0)
    stop.number = 0
    second = mishap.verdict(True, 1)
    shutdown(world)
    return tuple(first), tuple(second)


def test_all_ranks_hear_of_every_mishap():
    assert run_ranks(verdicts, 3, timeout=60) == [((15, True, True), (0, False, False))] * 3


def absent(seconds):
    """Rank 1 never comes to the preflight."""
    world, _ = group(20)
    if world.rank == 1:
        time.sleep(seconds + 2)
        return ""
    try:
        preflight(world, timedelta(seconds=seconds))
    except RuntimeError as error:
        return str(error)
    return "passed"


def present():
    world, _ = group(20)
    preflight(world)
    shutdown(world)


def test_preflight_names_who_did_not_come():
    run_ranks(present, 2, timeout=60)
    text, _ = run_ranks(absent, 2, 2.0, timeout=60)
    assert text == (
        "preflight: ranks [1] did not come within 0:00:02; set GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) to the"
        " network interface between the nodes"
    )


# ---- memory ----


def test_out_of_memory_is_told_from_other_errors():
    """torch's own errors, raised for real on the CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(raised.value)
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    assert out_of_memory(MemoryError())


@pytest.mark.parametrize("rows", range(1, 40))
def test_smaller_keeps_rows_an_update(rows):
    part, accumulate = smaller(rows, 3)
    assert part * accumulate == rows * 3
    assert part < rows or rows == 1


def find_size():
    from accelerate.utils import find_executable_batch_size

    world, _ = group(20)
    tried = []

    @find_executable_batch_size(starting_batch_size=16)
    def train(batch_size):
        tried.append(batch_size)
        if world.rank == 1 and batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch_size

    found = train()
    shutdown(world)
    return found


def test_accelerate_shrinks_one_rank_alone():
    """The trap: rank 0 goes on with 16 rows and rank 1 with fewer; their batches are no longer of one step."""
    pytest.importorskip("accelerate", reason="the oracle of this test, extra `test`")
    assert run_ranks(find_size, 2, timeout=60)[0] == 16 != run_ranks(find_size, 2, timeout=60)[1]


# ---- texts ----


@pytest.mark.parametrize(
    "text, kind",
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", "late"),
        ("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13212: Connection reset by peer", "lost"),
        ("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1", "lost"),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
)
def test_transport_failures_are_told_by_their_text(text, kind):
    assert transport_failure(RuntimeError(text)) == kind


def test_noted_adds_the_rows_to_a_traceback():
    with pytest.raises(ZeroDivisionError) as raised, noted(lambda: "rank 0, update 3: rows 5, 7"):
        print(1 / 0)
    assert raised.value.__notes__ == ["rank 0, update 3: rows 5, 7"]


# ---- bench/faults.py ----


@pytest.mark.slow
def test_every_killed_run_resumes_with_the_same_weights(tmp_path):
    """The table, with fewer kills: ours survives each fault; accelerate does not, as the table says."""
    pytest.importorskip("accelerate", reason="the other side of the table, extra `bench`")
    done = subprocess.run(
        [sys.executable, "bench/faults.py", "--kills", "10", "--json", str(tmp_path / "faults.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "faults.json").read_text())
    kills = record["kills"]["nanofinetune"]
    assert (kills["resumed"], kills["same weights"], kills["lost a checkpoint"]) == (10, 10, 0)
    ours = {name: found["nanofinetune"] for name, found in record["rows"].items()}
    theirs = {name: found["accelerate"] for name, found in record["rows"].items()}
    for kind in ("truncated", "has a flipped bit", "holds a malicious pickle"):
        assert ours[f"newest checkpoint {kind}"] == "passes over it, same weights"
        assert theirs[f"newest checkpoint {kind}"] != "passes over it, same weights"
    assert ours["disk full from the first save on"].startswith("training goes on to its end; said why")
    assert theirs["disk full from the first save on"].startswith("training ends")
    assert ours["SIGTERM on both ranks"] == "exit 143, saved at the update"
    assert theirs["SIGTERM on both ranks"] == "exit -15, nothing saved"
    for name in ("a rank is stopped (SIGSTOP)", "a rank skips a batch", "rank 0 fails in main_process_first"):
        assert ours[name].endswith("names the rank and the place")
        assert not theirs[name].endswith("names the rank and the place")
    assert (tmp_path / "faults.md").read_text().startswith("| fault | nanofinetune | accelerate |")
