"""The two exceptions that end a command with one line and no traceback: a mistake of the user's, and an early stop.

>>> raise UsageError("--lr is -1.0: it must be above 0")
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: --lr is -1.0: it must be above 0
>>> Halt(143, "stopped by SIGTERM after update 7").code
143

Underneath: `transformers.HfArgumentParser` (transformers 5.23) lets a wrong value fail wherever it is first used.
  - Here whatever the user can correct is a `UsageError`. Its one line names the thing, its value and the remedy;
    command-line programs print it on stderr and exit with 2.
  - A `Halt` is nobody's mistake, such as a signal or a loss that is not a number. It brings its own exit code.
  - Any other exception is a bug of ours, and keeps its traceback.

Proof: test_every_bad_input_gives_one_line_and_exit_2, test_run_gives_the_exit_code_and_one_line in
tests/test_bad_inputs.py and tests/ground/test_cli.py.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """What the user got wrong, in one line: the thing, the value, the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(shown(" ".join(text.splitlines())))


class Halt(Exception):
    """An early stop that is nobody's programming error: a signal, or a loss that is not a number.

    `code` is the exit code; the text is the one line to print.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(shown(" ".join(text.splitlines())))
        self.code = code


@contextmanager
def naming(**flags: str) -> Iterator[None]:
    """A `with` block in which a mistake in an argument of ours is told by the flag that gave it.

    >>> with naming(mixed_precision="--precision"):
    ...     raise UsageError("mixed_precision is 'fp16': choose bf16")
    Traceback (most recent call last):
    nanofinetune.ground.errors.UsageError: --precision is 'fp16': choose bf16
    """
    try:
        yield
    except UsageError as error:
        name, space, rest = str(error).partition(" ")
        if name in flags:
            raise UsageError(flags[name] + space + rest) from error
        raise


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to its first line and 200 characters, to be quoted in a UsageError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip()


def shown(text: str, most: int = 500) -> str:
    r"""Text that came from a file, a name or a command line, safe to print: at most `most` characters, all printable.

    A terminal obeys what it is sent: a column's name can clear the screen, and a class's name can end a line.

    >>> shown("good\x1b[2J\tbad"), shown("a" * 600, most=9)
    ('good\\x1b[2J\\tbad', 'aaa...aaa')
    """
    if len(text) > 2 * most:  # the middle of it is left out below, at once here: it may be a whole file
        text = text[:most] + text[-most:]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = (most - 3) // 2
    return safe if len(safe) <= most else f"{safe[:half]}...{safe[-half:]}"


def shown_lines(text: str) -> str:
    r"""Text of several lines, such as a traceback, safe to print: each as `shown` makes it, however long.

    >>> shown_lines("line 1\nline\r2\n")
    'line 1\nline\\r2\n'
    """
    return "\n".join(shown(line, most=sys.maxsize) for line in text.split("\n"))
