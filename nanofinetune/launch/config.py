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
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nanofinetune.ground import cli
from nanofinetune.ground.errors import UsageError


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
