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

import argparse
import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nanofinetune import cli
from nanofinetune.device import end_with_parent
from nanofinetune.errors import Halt, UsageError

# What a process ends with when torchrun ends it, since another one has failed: at once, or after saving its state.
TERMINATED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
GRACE = 0.5  # seconds that the other ranks of a notebook get to say that they had failed before
CUDA_IN_USE = (
    "this notebook has used CUDA, and forked processes cannot use it again: restart the kernel, and touch the GPU only"
    " in the training function (torch.cuda.is_available() counts, unless PYTORCH_NVML_BASED_CUDA_CHECK=1 was set)"
)


# ---- config: a file of settings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One setting of launch.env: `name`, what to ask, the answer to an empty line, and the check of any other."""

    name: str
    text: str
    default: str
    check: Callable[[str], object]
    several_nodes: bool = False  # asked only then

    def ask(self) -> str:
        """The answer, once it is a good one."""
        while True:
            answer = input(f"{self.text} [{self.default}]: ").strip() or self.default
            try:
                if answer != self.default:
                    self.check(answer)
                elif not answer:
                    raise argparse.ArgumentTypeError("an answer is needed here")
                return answer
            except argparse.ArgumentTypeError as error:
                print(error)


def _one_of(*choices: str) -> Callable[[str], object]:
    def check(answer: str) -> None:
        if answer not in choices:
            raise argparse.ArgumentTypeError(f"{answer} is not one of {', '.join(choices)}")

    return check


def _name(answer: str) -> None:
    if re.search(r"\s", answer):
        raise argparse.ArgumentTypeError(f"{answer!r} is not one name or address")


QUESTIONS = (
    Question("NNODES", "How many nodes (machines)?", "1", cli.number(int, 1)),
    Question("NODE_RANK", "Which of them is this one, counted from 0?", "", cli.number(int, 0), several_nodes=True),
    Question("MASTER_ADDR", "Name or address of node 0?", "", _name, several_nodes=True),
    Question("MASTER_PORT", "A free port on node 0?", "29500", cli.number(int, 1, 65535), several_nodes=True),
    Question("GLOO_SOCKET_IFNAME", "Network interface between nodes (CPU)?", "auto", _name, several_nodes=True),
    Question("NANOFINETUNE_DEVICE", "Device (auto, cpu, cuda, mps)?", "auto", _one_of("auto", "cpu", "cuda", "mps")),
    Question("NPROC_PER_NODE", "Processes on this node (auto: one for each GPU, else 1)?", "auto", cli.number(int, 1)),
    Question("OMP_NUM_THREADS", "Threads a process (auto: cores / processes)?", "auto", cli.number(int, 1)),
    Question("NANOFINETUNE_MIXED_PRECISION", "Precision (no, bf16, fp16)?", "no", _one_of("no", "bf16", "fp16")),
    Question("MAX_RESTARTS", "How often to start again after a failure?", "0", cli.number(int, 0)),
)


def configure(path: Path) -> None:
    """Ask the questions and write the answers that differ from the defaults; a file that exists only after a yes."""
    try:
        if path.exists():
            sure = Question("", f"{path} exists: write over it (yes, no)?", "no", _one_of("yes", "no"))
            if sure.ask() == "no":
                print(f"{path} is as it was")
                return
        answers: dict[str, str] = {}
        for question in QUESTIONS:
            if not question.several_nodes or int(answers["NNODES"]) > 1:
                if question.name == "NODE_RANK":
                    question = replace(question, check=cli.number(int, 0, int(answers["NNODES"]) - 1))
                answers[question.name] = question.ask()
    except EOFError:
        raise UsageError("the answers ended before the questions did; nothing was written") from None
    chosen = [f"{q.name}={answers[q.name]}\n" for q in QUESTIONS if answers.get(q.name, q.default) != q.default]
    try:
        path.write_text("".join(["# Written by `launch.sh config`; the environment goes before it.\n", *chosen]))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from error
    print(f"wrote {path}")


# ---- run: torchrun, with the first failure last ----------------------------------------------------------------------


def launch(argv: list[str]) -> int:
    """`torchrun ARGV` with its script under `work` -> the exit code: 0, the first failing rank's, or 128 + a signal.

    Raises:
        UsageError: the script is not there, or the port of this node is taken.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = torchrun.parse_args(argv)
    if "SLURM_JOB_ID" in os.environ:
        # underneath: torchrun hands on what is in this list; SLURM's warning (--signal=USR1) would end it instead.
        args.signals_to_handle += ",SIGUSR1"
    if not os.path.isfile(args.training_script):
        raise UsageError(f"{args.training_script}: there is no such script")
    itself = ["-u", "-m", "nanofinetune.launch", "work"]
    args.training_script_args = [*itself, args.training_script, *args.training_script_args]
    args.no_python, args.training_script = True, sys.executable
    if "LOGLEVEL" not in os.environ:  # what it logs about a failed process is said below, with the reason
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    folder = tempfile.TemporaryDirectory()
    final = Path(folder.name, "final")  # an end that no restart would mend, as `work` writes it: exit code and text
    os.environ["NANOFINETUNE_FINAL"] = str(final)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, code, text = first_failure(error.failures)
        if code != 2:
            # An agent hears of its own node only; by default --nnodes is "1:1".
            node = "" if args.nnodes.startswith("1:") else f" on node {args.node_rank} of {args.nnodes}"
            text = f"\nlaunch.sh: rank {rank} failed first{node}:\n{text}"
        print(text.rstrip(), end="\n" if text else "", file=sys.stderr)
        return code
    except SignalException as error:
        if not final.exists():
            return 128 + error.sigval
        final_code, _, final_text = final.read_text().partition("\n")
        print(final_text, end="", file=sys.stderr)
        return int(final_code)
    except DistNetworkError as error:
        raise UsageError(f"MASTER_PORT {args.master_port}: {str(error).splitlines()[0]}") from error
    finally:
        folder.cleanup()
    return 0


def first_failure(failures: Mapping[int, Any]) -> tuple[int, int, str]:
    """{rank: torch's ProcessFailure} -> (rank, exit code as a shell has it, text) of the one that failed first.

    The text is a traceback, a UsageError's one line (exit code 2), or "" where the script printed its own line.
    """

    def order(rank: int) -> tuple[bool, float]:
        failure = failures[rank]
        # underneath: torch's own stamps are whole seconds: of two ranks within one, it names the lower as the first.
        # A process without a traceback was killed or left by itself. The agent notes it at its next look, when the
        # others have failed because of it; and it kills those that hang, 30 s later, without a traceback either.
        recorded = _recorded(failure)
        return not recorded and failure.exitcode in TERMINATED, recorded.get("time", failure.timestamp - 10)

    rank = min(failures, key=order)
    failure = failures[rank]
    code = failure.exitcode
    if recorded := _recorded(failure):  # whatever became of the process after that: torch may abort at its end
        return rank, recorded["code"], recorded["text"]
    if code < 0:
        hint = ": on Linux that is mostly the kernel, out of memory" if code == -signal.SIGKILL else ""
        return rank, 128 - code, f"signal {-code} ({failure.signal_name()}) ended it{hint}"
    return rank, code, "" if code == 2 else f"it left with exit code {code}"


def _recorded(failure: Any) -> dict[str, Any]:
    """What `work` wrote about a process, {} if it could not."""
    message = failure.error_file_data["message"]
    return message["extraInfo"] if isinstance(message, dict) else {}


def work(script: str, args: Sequence[str]) -> int:
    """Be `python SCRIPT ARGS...`, and write what it raises into torchrun's error file -> the exit code.

    That is `torch.distributed.elastic.multiprocessing.errors.record` for a script that does not use it.
    """
    end_with_parent()
    faulthandler.enable()  # a segmentation fault prints the Python stacks
    os.environ["NANOFINETUNE_WORKER"] = "1"  # nanofinetune.cli.run leaves a UsageError to us then
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(os.path.abspath(script))
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except UsageError as error:
        final, code, text = True, 2, f"{Path(script).name}: {error}\n"
    except Halt as halt:
        final, code, text = True, halt.code, f"{Path(script).name}: {halt}\n"
    except SystemExit as error:
        if error.code != 2:
            raise
        final, code, text = True, 2, ""  # it has said what the user got wrong, as argparse does
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        final, code, text = False, 1, _traceback(error, script)
    # The launcher prints the text at the very end, but not that of a failure that a restart mended.
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != os.environ["TORCHELASTIC_MAX_RESTARTS"]:
        if final:
            # underneath: torchrun starts again whatever has failed; a signal is the one way to tell it not to.
            with contextlib.suppress(FileExistsError):  # one rank says it
                with open(os.environ["NANOFINETUNE_FINAL"], "x") as file:
                    file.write(f"{code}\n{text}")
                os.kill(os.getppid(), signal.SIGTERM)
            return code
        sys.stderr.write(f"rank {os.environ['RANK']} failed, and all start again:\n{text.rstrip()}\n")
    elif code != 2:
        sys.stderr.write(f"rank {os.environ['RANK']} failed: {text.rstrip().splitlines()[-1]}\n")
    now = time.time()
    record = {"message": text, "extraInfo": {"text": text, "code": code, "time": now, "timestamp": str(int(now))}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": record}))
    return code


# ---- notebook --------------------------------------------------------------------------------------------------------


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
            failure = time.time(), _pickled(error), _traceback(error, code.co_filename if code else "")
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


# ---- both ------------------------------------------------------------------------------------------------------------


def _traceback(error: BaseException, file: str) -> str:
    """The traceback as Python prints it, from the first frame in `file` on: what is above it is this module."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != file:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    """`config FILE`, `run TORCHRUN'S ARGUMENTS`, and what the latter runs in each process: `work SCRIPT ARGUMENTS`."""
    match sys.argv[1:]:
        case ["config"]:
            configure(Path("launch.env"))
        case ["config", path]:
            configure(Path(path))
        case ["run", *arguments]:
            sys.exit(launch(arguments))
        case ["work", script, *arguments]:
            sys.exit(work(script, arguments))
        case _:
            raise UsageError("say config, or run and torchrun's arguments; `launch.sh --help` explains")


if __name__ == "__main__":
    sys.exit(cli.run("launch.sh", main))
