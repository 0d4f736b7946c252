"""Command lines that answer a mistake with one line: a parser, types for its arguments, and a program's exit code.

>>> number(int, 1)("0")
Traceback (most recent call last):
argparse.ArgumentTypeError: 0 is not a whole number from 1
>>> steps_or_ratio("0.1"), steps_or_ratio("100")
(0.1, 100)

Underneath: `transformers.HfArgumentParser` (transformers 5.23) makes an option of every field of
`transformers.TrainingArguments`, more than a hundred of them.
  - There most values are checked where they are used, if at all: a learning rate of -1 trains.
  - Here each option is written out where it is read, and checked while it is parsed.
  - argparse also accepts abbreviations, and prints its whole usage above an error. Here there are no abbreviations, and
    an error is one line.

Proof: test_every_bad_input_gives_one_line_and_exit_2, test_hf_argument_parser_takes_a_learning_rate_of_minus_one in
tests/test_bad_inputs.py and tests/ground/test_cli.py.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from nanofinetune.ground.errors import Halt, UsageError


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake raises UsageError, and options cannot be abbreviated."""

    def __init__(self, prog: str, description: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter  # the docstring's own lines
        super().__init__(prog=prog, description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ") + " (--help lists the options)")


def run_main(name: str, main: Callable[[], None]) -> int:
    """Run a command -> its exit code. A UsageError is one line on stderr and exit code 2; a Halt brings its own."""
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        if "NANOFINETUNE_WORKER" in os.environ:
            raise  # nanofinetune.launch started this rank, and prints the line of the first rank that fails
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every rank makes the same mistake: print it once
            print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)  # one line, whatever it quotes
        return 2
    except Halt as halt:
        if "NANOFINETUNE_WORKER" in os.environ:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {halt}", file=sys.stderr)
        return halt.code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has closed it, as `| head` does: no mistake of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, what a shell reports
    return 0


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or a float from `low` (with `above`: only above it) to `high`; never NaN or infinite."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or value > high or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            limit = f"{'above' if above else 'from'} {low:g}" + ("" if high == math.inf else f" to {high:g}")
            raise argparse.ArgumentTypeError(f"{text} is not {what} {limit}")
        return value

    return parse


def steps_or_ratio(text: str) -> int | float:
    """An argparse type: a whole number of updates, or a ratio of all of them between 0 and 1."""
    value = number(float, 0)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number of updates nor a ratio below 1")
    return value if 0 < value < 1 else int(value)
