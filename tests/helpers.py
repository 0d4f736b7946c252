"""Real ranks for tests: `run_ranks` inside this Python, `run_torchrun` through the launcher.

A rank is a process of its own with torchrun's variables and one thread. What it runs must be a module-level function,
and what that returns must pickle. The ranks are forked from one server process that has imported torch, transformers'
BERT and pytest (the `forkserver` method), so that tests pay for the imports once a session and not once a rank. That
server keeps the environment of its start: what a test sets in `os.environ` does not reach the ranks; pass it as an
argument.
"""

import faulthandler
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from programs import ROOT, fork_context, run_program

GRACE = 2.0  # seconds that the other ranks get, after one has failed, to say what they saw


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `fn(*args)` in `world` processes and return what each returned, in rank order.

    Each process has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as under torchrun, and
    no process group: call `init_world("cpu")` or `torch.distributed.init_process_group("gloo")`, or use `run_world`.
    When a rank raises, dies or still runs after `timeout` seconds, this raises an AssertionError with the traceback of
    the rank that failed *first* (the others mostly fail because it did). Whatever still runs then is killed.
    """
    context = fork_context()
    environment = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    processes, pipes, stacks = [], {}, tempfile.TemporaryDirectory()
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        variables = {name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()}
        process = context.Process(
            target=_rank, args=(sender, variables, stacks.name, fn, args), name=f"rank {rank}", daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes[receiver] = rank
    deadline, results, failures = time.monotonic() + timeout, {}, []  # failures: (when, rank, text)
    try:
        while pipes and (left := deadline - time.monotonic()) > 0:
            for receiver in wait(list(pipes), timeout=left):
                assert isinstance(receiver, Connection)
                rank = pipes.pop(receiver)
                try:
                    succeeded, when, payload = pickle.loads(receiver.recv_bytes())
                except EOFError:  # the process is gone and has sent nothing
                    processes[rank].join(GRACE)
                    died = f"rank {rank} died with exit code {processes[rank].exitcode}"
                    succeeded, when, payload = False, time.monotonic(), died
                if succeeded:
                    results[rank] = payload
                else:
                    failures.append((when, rank, payload))
                    deadline = min(deadline, time.monotonic() + GRACE)
    finally:
        where = {rank: _stack(processes[rank], Path(stacks.name, str(rank))) for rank in pipes.values()}
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join()
        stacks.cleanup()
    if failures:
        _, rank, text = min(failures)
        raise AssertionError(f"rank {rank} of {world} failed first ({len(failures)} failed):\n{text}")
    if pipes:
        text = "\n".join(f"rank {rank}:\n{stack}" for rank, stack in sorted(where.items()))
        raise AssertionError(f"ranks {sorted(where)} of {world} were still running after {timeout} s\n{text}")
    return [results[rank] for rank in range(world)]


def run_world(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """`run_ranks` with the process group set up: call `fn(World, *args)` in each rank."""
    return run_ranks(_in_group, world, fn, *args, timeout=timeout)


def _in_group(fn: Callable[..., Any], *args: Any) -> Any:
    from nanofinetune.ranks.world import init_world, shutdown

    world = init_world("cpu")
    result = fn(world, *args)
    # torch's own DDP may deadlock when it outlives its process group; a rank that raised just ends.
    gc.collect()
    shutdown(world)
    return result


def run_torchrun(
    script_or_args: str | Path | Sequence[str | Path],
    nproc: int,
    timeout: float = 120,
    env: Mapping[str, str | None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python -m torch.distributed.run --nproc_per_node=NPROC ...` on a free port, from the repository root.

    `script_or_args`: a script, or a list of a script (or -m and a module) and its arguments. `env`: changes to this
    process's environment, where None removes a variable; OMP_NUM_THREADS is 1 unless it says otherwise. Returns the
    exit code and the text of both streams; one that runs longer than `timeout` seconds is ended: an AssertionError.
    """
    args = [script_or_args] if isinstance(script_or_args, (str, Path)) else script_or_args
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--master_addr=127.0.0.1"]
    return run_program([*launcher, f"--master_port={free_port()}", *args], timeout=timeout, env=env)


def run_python(code: str, *arguments: str) -> list[float]:
    """Run `code` in a fresh interpreter, without the user's settings of malloc -> the numbers that it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=180,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return [float(word) for word in finished.stdout.split()]


def _stack(process: Any, file: Path) -> str:
    """Where a process that hangs is: its Python stacks."""
    if not hasattr(signal, "SIGUSR1") or not process.is_alive() or not file.exists():
        return ""
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return file.read_text()


def _rank(
    sender: Connection, variables: dict[str, str], stacks: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """One rank: the environment, one thread, the call, and its result or its traceback into the pipe."""
    os.environ.update(variables, OMP_NUM_THREADS="1")
    gc.freeze()  # what the server has imported stays: a collection that went through it would take 0.4 s, and copy it
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, open(Path(stacks, variables["RANK"]), "w"))  # noqa: SIM115
    warnings.simplefilter("error")  # as pytest does in the parent (pyproject.toml)
    try:
        import torch

        torch.set_num_threads(1)
        # plain pickle: multiprocessing's own would send tensors as handles that die with this process
        message = pickle.dumps((True, time.monotonic(), fn(*args)))
    except BaseException:
        message = pickle.dumps((False, time.monotonic(), traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()
