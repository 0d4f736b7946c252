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

import contextlib
import faulthandler
import json
import logging
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanofinetune.ground.errors import Halt, UsageError
from nanofinetune.ground.process import end_with_parent

# What a process ends with when torchrun ends it, since another one has failed: at once, or after saving its state.
TERMINATED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)


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
    os.environ["NANOFINETUNE_WORKER"] = "1"  # nanofinetune.ground.cli.run leaves a UsageError to us then
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
        final, code, text = False, 1, traceback_of(error, script)
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


def traceback_of(error: BaseException, file: str) -> str:
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
