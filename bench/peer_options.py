"""The command lines of the peers' scripts: what bench/peer*.py have in common.

Apart from bench/course.py, since it imports argparse alone: what a peer does not need must not count as its time. One
line and exit code 2 for a mistake, as in nanofinetune.ground.cli, which is not imported for the same reason.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """One line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.splitlines()[0]}\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def common_options(name: str, doc: str | None) -> Parser:
    """What all peers take."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=name, description=doc, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--max-steps", type=positive)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--eval-batch-size", type=positive, default=8)
    parser.add_argument("--same-work", action="store_true", help="train.py's batches and dropout seeds")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="gets losses and times, as JSON")
    return parser


def need_one_process(parser: Parser) -> None:
    """The scripts of Trainer and Fabric are not written for ranks: they would draw the same rows on each."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        parser.error(f"WORLD_SIZE={world}: it runs in one process; use bench/peer.py for several")
