"""Train on several processes from a notebook: fork the notebook's own process, once for each rank.

>>> notebook_launcher(print, args=("one process runs", "right here"), num_processes=1)
one process runs right here

Underneath: `accelerate.notebook_launcher` (accelerate 1.15).
  - On a CPU it starts N *independent* copies; here N processes are N ranks of one job.
  - Where the notebook has used threads, its forks hang; ours do not.
  - Its `mixed_precision` never reaches the ranks. It takes port 29500, which a second notebook finds taken.
  - We keep its name, arguments and fork, and raise what the first failing rank raised.
  - Left out: several nodes, restarts, TPUs.

Proof: test_two_ranks_after_the_notebook_used_threads,
test_mixed_precision_reaches_the_ranks_where_accelerate_loses_it in tests/launch/test_notebook.py.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from nanofinetune.ground.precision import PRECISIONS
from nanofinetune.ground.process import end_with_parent
from nanofinetune.launch import rendezvous
from nanofinetune.launch.job import traceback_of

GRACE = 0.5  # seconds after the first failure in which other ranks may still report an earlier one
CUDA_IN_USE = (
    "this notebook has used CUDA, and forked processes cannot use it again: restart the kernel, and touch the GPU only"
    " in the training function (torch.cuda.is_available() counts, unless PYTORCH_NVML_BASED_CUDA_CHECK=1 was set)"
)


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int | None = None,
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: dict[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Call `function(*args)` in `num_processes` ranks (None: one for each GPU, else 1). One is called right here.

    Each rank is a fork of this process with torchrun's variables, its own memory and one thread: on a CPU, use as many
    ranks as you have cores. `mixed_precision` ("no", "bf16", "fp16") is what `Accelerator()` uses in them.
    What the function returns is dropped; let rank 0 save what you want to keep. `use_port` None takes a free port.

    Raises:
        ValueError: an impossible number of processes, or an unknown precision.
        NotImplementedError: an argument for several nodes or for restarts, or a system that cannot fork.
        RuntimeError: this process has used CUDA, or is in a process group; or a rank died without an exception.
        Exception: what the first failing rank raised. Its `__cause__` is a RuntimeError with that rank's traceback.
    """
    import torch

    unsupported = {
        "master_addr": (master_addr, "127.0.0.1"), "node_rank": (node_rank, 0), "num_nodes": (num_nodes, 1),
        "rdzv_backend": (rdzv_backend, "static"), "rdzv_endpoint": (rdzv_endpoint, ""), "rdzv_conf": (rdzv_conf, None),
        "rdzv_id": (rdzv_id, "none"), "max_restarts": (max_restarts, 0), "monitor_interval": (monitor_interval, 0.1),
        "log_line_prefix_template": (log_line_prefix_template, None),
    }  # fmt: skip
    for name, (value, default) in unsupported.items():
        if value != default:
            raise NotImplementedError(f"{name}={value!r}: a notebook starts one node, once; launch.sh does more")
    precision = mixed_precision.lower()
    if precision not in PRECISIONS:
        raise ValueError(f"mixed_precision={mixed_precision!r}: choose {', '.join(PRECISIONS)}")
    size = (torch.cuda.device_count() or 1) if num_processes is None else num_processes
    if size < 1:
        raise ValueError(f"num_processes={num_processes}: it must be at least 1, or None for one for each GPU")
    # underneath: Accelerate exports MIXED_PRECISION, but its own state reads ACCELERATE_MIXED_PRECISION.
    environment = {"NANOFINETUNE_MIXED_PRECISION": precision}
    if size == 1:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            function(*args)
        finally:
            os.environ.pop("NANOFINETUNE_MIXED_PRECISION")
            os.environ.update({name: before[name] for name in environment if name in before})
        return
    if "fork" not in multiprocessing.get_all_start_methods():
        raise NotImplementedError(f"num_processes={size}: {sys.platform} cannot fork; use launch.sh, or 1 process")
    if torch.cuda.is_initialized():
        raise RuntimeError(CUDA_IN_USE)
    if torch.distributed.is_initialized():
        raise RuntimeError("this process is in a process group: call torch.distributed.destroy_process_group() first")
    # underneath: Accelerate takes port 29500; a second notebook finds it taken.
    with rendezvous.listener(master_addr, int(use_port or 0)) as server:
        environment |= rendezvous.variables(server.getsockname()[1]) | {"OMP_NUM_THREADS": "1"}
        _fork(function, args, size, environment, server)


def _fork(
    function: Callable[..., Any], args: Sequence[Any], size: int, environment: dict[str, str], server: socket.socket
) -> None:
    """Start the ranks, wait for all of them or for the first failure, and leave none behind."""
    # underneath: spawn and forkserver import the function by its name, and what a cell defines cannot be imported.
    context = multiprocessing.get_context("fork")
    ranks: list[multiprocessing.process.BaseProcess] = []
    pipes: dict[Connection, int] = {}
    try:
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            place = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
            place |= {name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            ranks.append(context.Process(target=_rank, args=(sender, server, environment | place, function, args)))
            with warnings.catch_warnings():  # from Python 3.12 on; why the threads do no harm is said in `_rank`
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                ranks[rank].start()
            sender.close()  # or the next rank would inherit it, and the pipe of a dead rank would not end
            pipes[receiver] = rank
        store = rendezvous.store_at(server)  # only now: it has a thread; until then ranks wait at the open port
        failed = _first_to_fail(pipes)
        del store
        if failed is None:
            for process in ranks:
                process.join()
    finally:  # after a KeyboardInterrupt too
        for process in ranks:
            process.terminate()
        for process in ranks:
            process.join(5)
            process.kill()
            process.join()
    if failed is not None:
        rank, error, text = failed
        text = text or f"it ended with exit code {ranks[rank].exitcode} and no exception"
        cause = RuntimeError(f"rank {rank} of {size} failed first:\n\n{text}")
        if "Cannot re-initialize CUDA in forked subprocess" in text:
            raise RuntimeError(CUDA_IN_USE) from cause
        if error is None:
            raise cause
        raise error from cause


def _rank(
    sender: Connection,
    server: socket.socket,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    """One rank, in the forked process."""
    import torch

    server.close()  # the parent's
    # underneath: a fork does not have the threads that the notebook has used, and its first parallel loop waits for
    # them for ever, as in accelerate.debug_launcher. With one thread there is no parallel loop.
    torch.set_num_threads(1)
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # "interrupt" reaches this process too; the parent ends the ranks
    os.environ.update(environment)
    failure: tuple[float, bytes, str] | None = None
    try:
        function(*args)
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:  # sys.exit() is no failure
            code = getattr(function, "__code__", None)
            failure = time.time(), _pickled(error), traceback_of(error, code.co_filename if code else "")
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(failure)


def _pickled(error: BaseException) -> bytes:
    """The exception pickled, b"" where it cannot be: then only the text of its traceback reaches the notebook."""
    try:
        raised = pickle.dumps(error)
        pickle.loads(raised)
        return raised
    except Exception:
        return b""


def _first_to_fail(pipes: dict[Connection, int]) -> tuple[int, Exception | None, str] | None:
    """(rank, what it raised, its traceback) of the first rank to fail, None when all have succeeded."""
    failures: list[tuple[float, int, bytes, str]] = []
    waiting = list(pipes)
    while waiting and (ready := wait(waiting, timeout=GRACE if failures else None)):
        for receiver in ready:
            assert isinstance(receiver, Connection)
            waiting.remove(receiver)
            try:
                outcome = receiver.recv()
            except EOFError:  # it was killed: that came before whatever the others report
                outcome = (0.0, b"", "")
            if outcome is not None:
                when, raised, text = outcome
                failures.append((when, pipes[receiver], raised, text))
    if not failures:
        return None
    _, rank, raised, text = min(failures)
    return rank, pickle.loads(raised) if raised else None, text
