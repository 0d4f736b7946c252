"""`launch.sh config`: ask up to ten questions, and write the answers to launch.env, which later starts read.

>>> precision = next(question for question in QUESTIONS if question.name == "NANOFINETUNE_MIXED_PRECISION")
>>> precision.check("fp8")
Traceback (most recent call last):
argparse.ArgumentTypeError: fp8 is not one of no, bf16, fp16

Underneath: `accelerate.commands.config.cluster.get_cluster_input` (accelerate 1.15).
  - It asks for everything that any backend may need, and writes YAML into the user's cache folder.
  - We ask for nodes, device, processes, threads, precision and restarts, and check each answer at once.
  - The file holds NAME=VALUE lines. launch.sh reads them and never executes them.
  - Left out: DeepSpeed, FSDP, Megatron, TPU pods, mpirun, torch.compile, fp8.

Proof: test_config_asks_and_launch_sh_reads, test_accelerate_config_fields_are_asked_or_left_out in
tests/launch/test_config.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nanofinetune.ground import cli
from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.ground.precision import PRECISIONS


@dataclass(frozen=True)
class Question:
    """One setting of launch.env.

    `default` is what an empty line means, "" where there must be an answer. `check` raises ArgumentTypeError.
    """

    name: str
    text: str
    default: str
    check: Callable[[str], object]
    several_nodes: bool = False  # asked only then

    def ask(self) -> str:
        """Ask until the answer is a valid one -> the answer. Raises EOFError at the end of the input."""
        while True:
            answer = input(f"{self.text} [{self.default}]: ").strip() or self.default
            try:
                if answer != self.default:
                    self.check(answer)
                elif not answer:
                    raise argparse.ArgumentTypeError("an answer is needed here")
                return answer
            except argparse.ArgumentTypeError as error:
                print(shown(str(error)))


def one_of(*choices: str) -> Callable[[str], object]:
    """A check: one of these words."""

    def check(answer: str) -> None:
        if answer not in choices:
            raise argparse.ArgumentTypeError(f"{answer} is not one of {', '.join(choices)}")

    return check


def one_name(answer: str) -> None:
    """A check: no spaces."""
    if re.search(r"\s", answer):
        raise argparse.ArgumentTypeError(f"{answer!r} is not one name or address")


QUESTIONS = (
    Question("NNODES", "How many nodes (machines)?", "1", cli.number(int, 1)),
    Question("NODE_RANK", "Which of them is this one, counted from 0?", "", cli.number(int, 0), several_nodes=True),
    Question("MASTER_ADDR", "Name or address of node 0?", "", one_name, several_nodes=True),
    Question("MASTER_PORT", "A free port on node 0?", "29500", cli.number(int, 1, 65535), several_nodes=True),
    Question("GLOO_SOCKET_IFNAME", "Network interface between nodes (CPU)?", "auto", one_name, several_nodes=True),
    Question("NANOFINETUNE_DEVICE", "Device (auto, cpu, cuda, mps)?", "auto", one_of("auto", "cpu", "cuda", "mps")),
    Question("NPROC_PER_NODE", "Processes on this node (auto: one for each GPU, else 1)?", "auto", cli.number(int, 1)),
    Question("OMP_NUM_THREADS", "Threads a process (auto: cores / processes)?", "auto", cli.number(int, 1)),
    Question("NANOFINETUNE_MIXED_PRECISION", f"Precision ({', '.join(PRECISIONS)})?", "no", one_of(*PRECISIONS)),
    Question("MAX_RESTARTS", "How often to start again after a failure?", "0", cli.number(int, 0)),
)


def configure(path: Path) -> None:
    """Ask, and write the answers that differ from the defaults. A file that exists is written over only after a yes.

    Raises:
        UsageError: the input ended too early, or the file cannot be written.
    """
    try:
        if path.exists():
            sure = Question("", f"{shown(str(path))} exists: write over it (yes, no)?", "no", one_of("yes", "no"))
            if sure.ask() == "no":
                print(f"{shown(str(path))} is as it was")
                print(f"next: {shown(command_after(path))}")
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
    print(f"wrote {shown(str(path))}")
    if answers["NNODES"] != "1":
        print(f"on each of the {answers['NNODES']} nodes, which have a launch.env of their own:")
    print(f"next: {shown(command_after(path))}")


def command_after(path: Path) -> str:
    """What to type to train with these settings, as the shell of the working folder takes it."""
    here, root = Path.cwd(), Path(__file__).resolve().parents[2]
    script = os.path.relpath(root / "launch.sh", here) if root.is_relative_to(here) else str(root / "launch.sh")
    script = script if "/" in script else f"./{script}"
    words = [script, "--output", "runs/first"]
    own = path.absolute() == root / "launch.env"  # which launch.sh reads by itself
    return ("" if own else f"NANOFINETUNE_LAUNCH_ENV={shlex.quote(str(path.absolute()))} ") + shlex.join(words)
