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
import io
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from nanofinetune.ground.errors import Halt, UsageError, first_line, shown, shown_lines

MOST = 2**31  # of rows, batches, updates or files: no run has more, and a resumed run believes no greater count
LONGEST_WAIT = 10**6  # seconds, 11 days: poll(2) counts milliseconds in 32 bits


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake raises UsageError, and options cannot be abbreviated.

    With a `usage` of its own, instead of a list of all options, only the first paragraph of the description comes first
    in the help, and all else last.
    """

    def __init__(self, prog: str, description: str | None, usage: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter  # the docstring's own lines
        first, _, rest = (description or "").partition("\n\n") if usage else (description, "", None)
        super().__init__(
            prog=prog, usage=usage, description=first, epilog=rest, formatter_class=layout, allow_abbrev=False
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words[: words.index("--")] if "--" in words else words:
            if word.startswith("--") and word.endswith("=--"):  # underneath: argparse makes an empty list of this value
                self.error(f"argument {word.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ") + " (--help lists the options)")


def run_main(name: str, main: Callable[[], None]) -> int:
    """Run a command -> its exit code. A UsageError is one line on stderr and exit code 2; a Halt brings its own."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_traceback
    try:
        main()
        if sys.stdout is not None:  # closed from the beginning: `>&-`
            sys.stdout.flush()
    except UsageError as error:
        if "NANOFINETUNE_WORKER" in os.environ:
            raise  # nanofinetune.launch started this rank, and prints the line of the first rank that fails
        line = f"{name}: {' '.join(str(error).splitlines())}"  # one line, whatever it quotes
        _complain_once(line, "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # all ranks make the same mistake: once a node
        return 2
    except Halt as halt:
        if "NANOFINETUNE_WORKER" in os.environ:
            raise
        _complain_once(f"{name}: {halt}", "RANK", "WORLD_SIZE")
        return halt.code
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted")
        return 130
    except BrokenPipeError:  # whoever read our output has closed it, as `| head` does: no mistake of ours
        _to_devnull(sys.stdout)
        return 141  # 128 + SIGPIPE, what a shell reports
    return 0


def _print_traceback(*error: Any) -> None:
    """A fault of ours, as Python prints it, but that a name in it may hold what a terminal obeys."""
    _complain(shown_lines("".join(traceback.format_exception(*error)).rstrip("\n")))


def _follows(rank: str, size: str) -> bool:
    """Whether these variables say that this is a later rank than 0, which speaks for all; not if they cannot be."""
    value, ranks = os.environ.get(rank, ""), os.environ.get(size, "")
    return value.isdecimal() and ranks.isdecimal() and 0 < int(value[:9]) < int(ranks[:9])


def _complain_once(line: str, rank: str, size: str) -> None:
    """Print it on the first of the ranks that these variables count; the others leave a moment later."""
    if _follows(rank, size):
        time.sleep(1)  # underneath: torchrun ends all ranks as soon as one has ended, also the one that speaks
    else:
        _complain(line)


def _complain(line: str) -> None:
    """Print to stderr, if there is one: without it, the exit code has to do."""
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                _to_devnull(sys.stderr)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """A `with` block in which a stdout or stderr that cannot be written ends nothing.

    Whoever reads them may leave, as `head -1` does, or a terminal closes. Once that is noticed on stdout, stderr gets
    one line. Where there was no stdout from the beginning (`>&-`), nothing is said.
    """
    before = sys.stdout, sys.stderr
    # Where 1 or 2 is closed, the next file that is opened would get its number, and what C prints with it.
    for number_of in (1, 2):
        try:
            os.fstat(number_of)
        except OSError:
            if (nowhere := os.open(os.devnull, os.O_WRONLY)) != number_of:
                os.dup2(nowhere, number_of)
                os.close(nowhere)
    sys.stderr = _Outliving(before[1], lambda why: None)
    sys.stdout = _Outliving(
        before[0],
        lambda why: print(f"note: stdout cannot be written ({why}); the work goes on without", file=sys.stderr),
    )
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


class _Outliving(io.TextIOBase):
    """A stream whose first failed write is reported; from then on what is written is dropped."""

    def __init__(self, stream: Any, report: Callable[[str], None]) -> None:
        self._stream, self._report = stream, report

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:  # encoding, buffer, ...
        return getattr(self._stream, name)

    def _try(self, method: str, *args: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*args)
        except (OSError, ValueError) as error:  # ValueError: it has been closed in Python
            with suppress(
                OSError, ValueError
            ):  # what is still in its buffer goes nowhere, and so ends without an error
                _to_devnull(self._stream)
            self._stream = None
            self._report(getattr(error, "strerror", None) or first_line(error))


def _to_devnull(stream: Any) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or a float from `low` (with `above`: only above it) to `high`; never NaN or infinite."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or value > high or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            limit = f"{'above' if above else 'from'} {low:g}" + ("" if high == math.inf else f" to {high}")
            raise argparse.ArgumentTypeError(f"{shown(text, most=40)} is not {what} {limit}")
        return value

    return parse


def steps_or_ratio(text: str) -> int | float:
    """An argparse type: a whole number of updates, or a ratio of all of them between 0 and 1."""
    value = number(float, 0, MOST)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number of updates nor a ratio below 1")
    return value if 0 < value < 1 else int(value)
