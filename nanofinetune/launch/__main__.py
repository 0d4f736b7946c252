"""What `launch.sh` runs: `config FILE` asks and writes settings, `run ...` starts the processes of this node.

>>> start(["training"])
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: say config, or run and torchrun's arguments; `launch.sh --help` explains

Underneath: `accelerate.commands.launch.launch_command` (accelerate 1.15).
  - It hands every option on in ACCELERATE_* variables, and starts one process for `--cpu --num_processes 2`.
  - Here launch.sh chooses, in the shell, and this hands on.

Proof: test_launch_sh_table, test_two_processes_on_a_cpu_are_two_ranks_where_accelerate_launch_starts_one in
tests/launch/test_launch.py and tests/launch/test_job.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nanofinetune.ground.cli import run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.launch.config import configure
from nanofinetune.launch.job import launch, work


def start(arguments: list[str]) -> None:
    """`config FILE`, `run TORCHRUN'S ARGUMENTS`, or what the latter starts in each process: `work SCRIPT ARGUMENTS`.

    Raises:
        UsageError: neither of them.
        SystemExit: the job's exit code.
    """
    match arguments:
        case ["config"]:
            configure(Path("launch.env"))
        case ["config", path]:
            configure(Path(path))
        case ["run", *others]:
            sys.exit(launch(others))
        case ["work", script, *others]:
            sys.exit(work(script, others))
        case _:
            raise UsageError("say config, or run and torchrun's arguments; `launch.sh --help` explains")


if __name__ == "__main__":
    sys.exit(run_main("launch.sh", lambda: start(sys.argv[1:])))
