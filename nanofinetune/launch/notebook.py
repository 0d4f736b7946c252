"""Start ranks: the questions of `launch.sh config`, the first failing rank's traceback, training from a notebook.

>>> notebook_launcher(print, args=("one process runs", "right here"), num_processes=1)
one process runs right here

Underneath: `accelerate.notebook_launcher`, `accelerate.commands.launch.launch_command` and
`accelerate.commands.config.cluster.get_cluster_input` (accelerate 1.15), and `torch.distributed.run` (torch 2.13),
which they and `launch.sh` start. `accelerate launch` hands everything on in ACCELERATE_* variables, and starts one
process for `--cpu --num_processes 2`. Its notebook launcher forks; on a CPU it starts N *independent* copies, and its
`mixed_precision` is lost. Kept: names, arguments, fork. Left out: several nodes and restarts from a notebook, TPU,
mpirun. Different on purpose: (1) N processes are N ranks on a CPU as well, also when the notebook has used threads;
(2) a free port on one node, never 29500; (3) the last thing on the screen is the traceback of the rank that failed
*first*, where torchrun has `error_file: <N/A>`; (4) what the user got wrong is one line and exit code 2, not a trace;
(5) no rank outlives its launcher (Linux); (6) what the user got wrong, or a `Halt` (a loss that is no number), is not
started again: torchrun alone repeats it.

Proof: test_launch_sh_table, test_first_failing_rank_is_printed_last_where_torchrun_hides_it,
test_usage_error_is_one_line_and_exit_2, test_usage_error_is_not_started_again_where_torchrun_repeats_it,
test_no_rank_outlives_its_launcher and test_config_asks_and_launch_sh_reads in tests/test_launch.py;
test_two_ranks_after_the_notebook_used_threads, test_mixed_precision_reaches_the_ranks_where_accelerate_loses_it and
test_accelerate_hangs_after_the_notebook_used_threads in tests/test_notebook.py; test_two_nodes_train_together in
tests/test_nodes.py.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from nanofinetune.ground.process import end_with_parent
from nanofinetune.launch.job import free_port, traceback_of

GRACE = 0.5  # seconds that the other ranks of a notebook get to say that they had failed before


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
    """Call `function(*args)` in `num_processes` ranks (None: one for each GPU, else 1); 1 is called right here.

    Each rank is a fork of this process with torchrun's variables, a memory of its own and one thread: on a CPU the
    number of processes is the parallelism. `mixed_precision` ("no", "bf16", "fp16") is what `Accelerator()` uses in
    there. What the function returns is dropped: let rank 0 save what is to be kept. `use_port` None is a free one.

    Raises:
        ValueError: a number of processes or a precision that cannot be.
        NotImplementedError: an argument for several nodes or for restarts, or a system that cannot fork.
        RuntimeError: this process uses CUDA or is in a process group; or a rank died without an exception.
        Exception: what the first failing rank raised, with its traceback in a RuntimeError that is its `__cause__`.
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
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision={mixed_precision!r}: choose no, bf16 or fp16")
    size = (torch.cuda.device_count() or 1) if num_processes is None else num_processes
    if size < 1:
        raise ValueError(f"num_processes={num_processes}: it must be at least 1, or None for one for each GPU")
    # underneath: Accelerate exports MIXED_PRECISION, and its own state reads ACCELERATE_MIXED_PRECISION: it is lost.
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
    # underneath: Accelerate takes 29500, which a second notebook finds taken.
    environment |= {"MASTER_ADDR": master_addr, "MASTER_PORT": str(use_port or free_port()), "OMP_NUM_THREADS": "1"}
    _fork(function, args, size, environment)


def _fork(function: Callable[..., Any], args: Sequence[Any], size: int, environment: dict[str, str]) -> None:
    """The ranks of a notebook, from their start to their end."""
    # underneath: spawn and forkserver import the function by its name, and what a cell defines cannot be imported.
    context = multiprocessing.get_context("fork")
    ranks: list[multiprocessing.process.BaseProcess] = []
    pipes: dict[Connection, int] = {}
    try:
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            place = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
            place |= {name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            ranks.append(context.Process(target=_rank, args=(sender, environment | place, function, args)))
            with warnings.catch_warnings():  # from Python 3.12 on; `_rank` begins with what makes the threads harmless
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                ranks[rank].start()
            sender.close()  # the next rank must not hold it open: a pipe whose rank has died ends
            pipes[receiver] = rank
        failed = _first_to_fail(pipes)
        if failed is None:
            for process in ranks:
                process.join()
    finally:  # also after KeyboardInterrupt: nobody is left behind
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


def _rank(sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: Sequence[Any]) -> None:
    """One rank: in the child, from its first line to its last."""
    import torch

    # underneath: the threads that the notebook has used are not forked, and the first parallel loop waits for them for
    # ever, as it does in accelerate.debug_launcher. With one thread there is no parallel loop.
    torch.set_num_threads(1)
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the kernel's interrupt reaches all; the parent ends the ranks
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
    """An exception's bytes, b"" where it does not survive them: its traceback's text remains."""
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
            except EOFError:  # killed: before anything that the others may say of it
                outcome = (0.0, b"", "")
            if outcome is not None:
                when, raised, text = outcome
                failures.append((when, pipes[receiver], raised, text))
    if not failures:
        return None
    _, rank, raised, text = min(failures)
    return rank, pickle.loads(raised) if raised else None, text
