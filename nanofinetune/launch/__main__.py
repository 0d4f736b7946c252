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

import sys
from pathlib import Path

from nanofinetune.ground.cli import run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.launch.config import configure
from nanofinetune.launch.job import launch, work


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
    sys.exit(run_main("launch.sh", main))
