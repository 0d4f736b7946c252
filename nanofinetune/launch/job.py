"""The processes of one node, through torchrun; when one fails, what it raised is the last thing on the screen.

>>> from types import SimpleNamespace
>>> def failure(time, text):  # a process that failed, as torchrun describes it
...     record = {"time": time, "code": 1, "text": text}
...     return SimpleNamespace(exitcode=1, timestamp=int(time), error_file_data={"message": {"extraInfo": record}})
>>> first_failure({0: failure(7.9, "connection closed by peer"), 1: failure(7.2, "ValueError: the cause")})
(1, 1, 'ValueError: the cause')

Underneath: `torch.distributed.run` (torch 2.13), torchrun. It starts N processes (*ranks*), watches them, and starts
all of them again after a failure, `--max-restarts` times.
  - torchrun ends with a table that says `error_file: <N/A>`. We end with the traceback of the rank that failed first.
  - What the user got wrong is one line and exit code 2. It is not tried again, nor is a `Halt`; torchrun repeats both.
  - Ranks end with their launcher (on Linux), even if that is killed.

Proof: test_first_failing_rank_is_printed_last_where_torchrun_hides_it,
test_usage_error_is_not_started_again_where_torchrun_repeats_it in tests/launch/test_job.py.
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

from nanofinetune.ground.errors import Halt, UsageError, first_line, shown, shown_lines
from nanofinetune.ground.process import end_with_parent

# The exit codes of a process that torchrun has ended because another one failed: at once, or after saving its state.
TERMINATED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)


def launch(argv: list[str]) -> int:
    """Run `torchrun ARGV`, its script inside `work` -> the exit code: 0, the first failing rank's, or 128 + a signal.

    Raises:
        UsageError: the script is not there, or the port of this node is taken.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from nanofinetune.launch.rendezvous import BACKEND, check_interfaces, interfaces

    args = torchrun.parse_args(argv)
    one_node, node = args.nnodes in ("1", "1:1"), args.node_rank
    if one_node or args.rdzv_backend == "static":
        address, port = ("127.0.0.1", 0) if one_node else (args.master_addr, args.master_port or 29500)
        args.standalone, args.rdzv_backend, args.rdzv_endpoint = False, BACKEND, f"{address}:{port}"
        args.rdzv_conf = f"rank={0 if one_node else node}"
        args.node_rank = 0  # torchrun warns of any other one, with a backend that it does not know
    check_interfaces(os.environ)
    if one_node:
        os.environ.update(interfaces(os.environ))
    if "SLURM_JOB_ID" in os.environ:
        # underneath: torchrun passes the signals of this list on to its ranks. Any other one ends it, SLURM's warning
        # before the time limit (--signal=USR1) among them.
        args.signals_to_handle += ",SIGUSR1"
    if not os.path.isfile(args.training_script):
        raise UsageError(f"{args.training_script}: there is no such script")
    itself = ["-u", "-P", "-m", "nanofinetune.launch", "work"]  # -P: modules do not come from the working folder
    args.training_script_args = [*itself, args.training_script, *args.training_script_args]
    args.no_python, args.training_script = True, sys.executable
    if "LOGLEVEL" not in os.environ:  # we say below, with the reason, what torch logs about a failed process
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    folder = tempfile.TemporaryDirectory()
    final = Path(folder.name, "final")  # written by `work`, for a failure that would only repeat: exit code and text
    os.environ["NANOFINETUNE_FINAL"] = str(final)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, code, text = first_failure(error.failures)
        if code != 2:
            # torchrun knows the failures of its own node only.
            where = "" if one_node else f" on node {node} of {args.nnodes}"
            text = f"\nlaunch.sh: rank {rank} failed first{where}:\n{text}"
        print(text.rstrip(), end="\n" if text else "", file=sys.stderr)
        return code
    except SignalException as error:
        if not final.exists():
            return 128 + error.sigval
        final_code, _, final_text = final.read_text().partition("\n")
        print(final_text, end="", file=sys.stderr)
        return int(final_code)
    except DistNetworkError as error:
        raise UsageError(f"MASTER_ADDR {args.rdzv_endpoint}: {first_line(error)}") from error
    finally:
        folder.cleanup()
    return 0


def first_failure(failures: Mapping[int, Any]) -> tuple[int, int, str]:
    """{rank: torch's ProcessFailure} -> (rank, exit code as a shell has it, text) of the one that failed first.

    `failures` must not be empty. The text is a traceback, a UsageError's one line (exit code 2), or "" where the script
    has printed its own line.
    """

    def order(rank: int) -> tuple[bool, float]:
        failure = failures[rank]
        # underneath: torch stamps a failure in whole seconds, and of two ranks within one second it names the lower.
        # A process without a traceback was killed, or left by itself. torchrun sees that at its next look, when others
        # have failed because of it; hence the 10 s. Those that hang it kills 30 s later, without a traceback too.
        recorded = _recorded(failure)
        return not recorded and failure.exitcode in TERMINATED, recorded.get("time", failure.timestamp - 10)

    rank = min(failures, key=order)
    failure = failures[rank]
    code = failure.exitcode
    if recorded := _recorded(failure):  # it counts whatever ended the process after that: torch may abort at exit
        return rank, recorded["code"], recorded["text"]
    if code < 0:
        hint = ": on Linux mostly the kernel, because memory ran out" if code == -signal.SIGKILL else ""
        return rank, 128 - code, f"signal {-code} ({failure.signal_name()}) ended it{hint}"
    return rank, code, "" if code == 2 else f"it left with exit code {code}"


def _recorded(failure: Any) -> dict[str, Any]:
    """What `work` wrote about a process, {} if it could not."""
    message = failure.error_file_data["message"]
    return message["extraInfo"] if isinstance(message, dict) else {}


def work(script: str, args: Sequence[str]) -> int:
    """One rank: run `python SCRIPT ARGS...` in this process, and write down what it raises -> the exit code.

    As `torch.distributed.elastic.multiprocessing.errors.record` does for a script that uses it: into torchrun's file.
    """
    end_with_parent()
    faulthandler.enable()  # a segmentation fault prints the Python stacks
    os.environ["NANOFINETUNE_WORKER"] = "1"  # so that ground.cli.run_main leaves a UsageError to us
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # where Python looks first for a script's modules
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except UsageError as error:
        final, code, text = True, 2, f"{shown(Path(script).name)}: {error}\n"
    except Halt as halt:
        final, code, text = True, halt.code, f"{shown(Path(script).name)}: {halt}\n"
    except SystemExit as error:
        if error.code != 2:
            raise
        final, code, text = True, 2, ""  # the script has said what the user got wrong, as argparse does
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        final, code, text = False, 1, shown_lines(traceback_of(error, script))
    # The launcher prints the text at the very end; but before a restart it is printed here, or nobody would see it.
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != os.environ["TORCHELASTIC_MAX_RESTARTS"]:
        if final:
            # underneath: torchrun restarts after any failure; only a signal keeps it from that.
            with contextlib.suppress(FileExistsError):  # one rank writes it
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
    """The traceback as Python prints it, from the first frame in `file` on: the frames above are this module's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != file:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
