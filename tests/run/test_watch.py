"""Ranks that are stopped or busy elsewhere are named; gloo's own error, the cause, names none. On real ranks.

OMP_NUM_THREADS=1 python -m pytest tests/run/test_watch.py
"""

import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks

from nanofinetune.ranks.world import init_world, shutdown
from nanofinetune.run.watch import Watch, noted, preflight, transport_failure


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
        r"^a rank is missing:\n"
        r"  rank 0 waits in all_reduce\[bucket 1 of 3\]#3, update 3, at .*test_watch\.py:\d+ stopped\n"
        r"  rank 1 does not answer: it is stopped, or gone$",
        text,
    ), text
    assert "Timed out waiting 3000ms" in cause and not re.search(r"rank [01]", cause)


def watched_and_left(fails):
    """How many threads of the watch there are in its block, and after it."""
    world = init_world("cpu")
    try:
        with Watch(world):
            if world.size > 1:
                dist.barrier()  # rank 0 holds the store: the other one is still connecting to it
            watching = [thread.name for thread in threading.enumerate()].count("watch")
            if fails:
                raise ValueError
    except ValueError:
        pass
    return watching, [thread.name for thread in threading.enumerate()].count("watch")


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_is_left_behind(fails):
    """Nothing to compare with: one that is inside the store while the interpreter ends aborts the process."""
    assert run_ranks(watched_and_left, 2, fails, timeout=60) == [(1, 0)] * 2
    assert run_ranks(watched_and_left, 1, fails, timeout=60) == [(0, 0)]


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


@pytest.mark.slow
def test_a_rank_elsewhere_says_where():
    text, _ = run_ranks(elsewhere, 2, timeout=60)
    assert re.search(r"rank 0 waits in agree#2, update 2", text), text
    assert re.search(
        r"rank 1 is in agree#1, update 2, at test_watch\.py:\d+ dawdle < test_watch\.py:\d+ elsewhere", text
    )


def absent(seconds):
    """Rank 1 takes no part in the preflight."""
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


def test_preflight_names_the_missing_ranks():
    run_ranks(present, 2, timeout=60)
    text, _ = run_ranks(absent, 2, 2.0, timeout=60)
    assert text == (
        "preflight: ranks [1] are missing after 0:00:02; set GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) to the"
        " network interface between the nodes"
    )


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
