"""How far a long work is: a bar on a terminal, a line every half minute in a log file.

>>> log = io.StringIO()
>>> with Progress(3, "reading", "file", stream=log, every=0) as progress:
...     for size in (10, 20, 30):
...         if progress.add():
...             progress.show(f"{size} kB")
>>> print(log.getvalue(), end="")
reading 1/3 10 kB
reading 2/3 20 kB
reading 3/3 30 kB

Underneath: `accelerate.utils.tqdm` (accelerate 1.15) is tqdm on the first process alone.
  - In a file tqdm writes each state of its bar behind a carriage return, as one line of many thousand characters. Here
    a file gets lines.
  - tqdm counts one speed since the beginning; here it is that of the last seconds, and from the first step on.
  - Ranks other than the first show nothing.

Proof: test_a_bar_fits_its_terminal, test_a_log_file_gets_lines_in_time in tests/ground/test_progress.py.
"""

from __future__ import annotations

import io  # noqa: F401 (the example above)
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from typing import Any

from tqdm import tqdm

from nanofinetune.ground.errors import shown

EVERY = 30.0  # seconds, in which a log file gets a line
RECENT = 5.0  # seconds, over which a speed is counted
FORM = "{desc} |{bar}| {n_fmt}/{total_fmt}"
WIDE = 100  # columns: a bar need not be longer than a line of text, on however wide a terminal


def plural(count: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> plural(1, "update"), plural(1377, "update"), plural(2, "batch", "batches")
    ('1 update', '1,377 updates', '2 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def clock(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> clock(7), clock(342), clock(90_061)
    ('0:07', '5:42', '25:01:01')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def wrapped(text: str, width: int, indent: int = 6) -> str:
    """A line in as many as fit a width, cut between words; the later ones are indented.

    >>> print(wrapped("data       a word " + "and another " * 6, 60, indent=11))
    data       a word and another and another and another and
               another and another and another
    >>> print(wrapped("output     a/path/that/is/wider", 20, indent=11))  # it stays beside its name
    output     a/path/that/is/wider
    """
    form: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    name = text[:indent] if text[:indent].endswith(" ") else ""
    form |= {"initial_indent": name, "subsequent_indent": " " * indent}
    return textwrap.fill(text[len(name) :], width, **form)


def for_screen(text: str, stream: Any) -> str:
    """A line as it is; for a terminal `wrapped`."""
    on_terminal = hasattr(stream, "isatty") and stream.isatty()
    return wrapped(text, columns_of(stream)) if on_terminal else text


def is_first() -> bool:
    """Whether this process is the first of its ranks, as their launcher counts them; one alone is."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) in ("", "0")


class Speed:
    """How many things a second there were in the last seconds, with the time between them left out.

    >>> speed = Speed()
    >>> for second, things in enumerate((0, 8, 8)):
    ...     speed.add(things, now=second)
    >>> speed.now
    8.0
    """

    def __init__(self) -> None:
        self.times: deque[tuple[float, float]] = deque()  # (when, how many there were until then)
        self.count = 0.0

    def add(self, things: float, now: float | None = None) -> None:
        """So many more by `now`, in seconds."""
        self.count += things
        self.times.append((time.perf_counter() if now is None else now, self.count))
        while len(self.times) > 2 and self.times[-1][0] - self.times[1][0] >= RECENT:
            self.times.popleft()

    def pause(self) -> None:
        """What comes until the next call of `add(0)` is not counted."""
        self.times.clear()

    @property
    def now(self) -> float:
        """Things a second; 0.0 where nothing is known."""
        if len(self.times) < 2:
            return 0.0
        (begin, before), (end, after) = self.times[0], self.times[-1]
        return (after - before) / max(end - begin, 1e-9)


class Progress:
    """A `with` block that shows how far a work is: `add` counts, and says when it is time to `show`.

    Args:
        total: how much there is to do; initial: how much of it has been done already.
        title: what is done, before the bar.
        unit: what is counted, for a speed in the plural.
        leave: whether the bar stays on the screen when all is done.
        hidden: show nothing; left out, on all ranks but the first.
        delay: seconds before a bar appears: what is over at once needs none.
        every: seconds between two lines of a log file.
        stream: where to; left out, stderr.
    """

    def __init__(
        self, total: int, title: str, unit: str = "row", *, initial: int = 0, leave: bool = False,
        hidden: bool | None = None, delay: float = 0.0, every: float = EVERY, stream: Any = None,
    ) -> None:  # fmt: skip
        self.total, self.done, self.title, self.unit, self.every = total, initial, title, unit, every
        self.stream = sys.stderr if stream is None else stream
        self.hidden = not is_first() if hidden is None else hidden
        terminal = not self.hidden and hasattr(self.stream, "isatty") and self.stream.isatty()
        # underneath: tqdm raises its smallest step while it is fast, and then misses that it has become slow
        self.bar = tqdm(
            total=total, initial=initial, desc=title, disable=not terminal, file=self.stream, leave=leave,
            delay=delay, miniters=1, mininterval=0.25, ascii=" #", bar_format=FORM,
            ncols=columns_of(self.stream) - 1 if terminal else None,
        )  # fmt: skip
        self.speed = Speed()
        self.speed.add(0)
        self.said = self.latest = time.perf_counter()  # of the last line; of the last call of `add`

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def on_terminal(self) -> bool:
        return not self.bar.disable

    def add(self, count: int = 1) -> bool:
        """So much more is done -> whether to `show` it: not more often than a screen or a log file needs."""
        self.done += count
        now = time.perf_counter()
        self.speed.add(count, now)
        took, self.latest = now - self.latest, now
        if self.on_terminal:
            self.bar.ncols = columns_of(self.stream) - 1  # in the last column, some terminals wrap
            return bool(self.bar.update(count))
        return not self.hidden and now + took - self.said >= self.every  # the next one may come too late

    def show(self, text: str = "") -> None:
        """Show the state, with `text` behind it; without, the speed and the time that is left."""
        text = text or self.pace()
        if self.on_terminal:
            self.bar.bar_format = f"{FORM} {text.replace('{', '{{').replace('}', '}}')}"
            self.bar.set_description_str(self.title)
        elif not self.hidden:
            self.said = time.perf_counter()
            print(f"{self.title} {self.done}/{self.total} {text}", file=self.stream, flush=True)

    def pace(self) -> str:
        """How fast it is, and how long the rest takes at this speed."""
        speed = self.speed.now
        left = f" {clock((self.total - self.done) / speed)} left" if speed else ""
        return f"{speed:.1f} {self.unit}s/s{left}"

    def write(self, text: str, stream: Any = None) -> None:
        """Print a line above the bar, safe for a terminal."""
        self.bar.write(shown(text), file=self.stream if stream is None else stream)


def columns_of(stream: Any) -> int:
    """The width of a terminal, at most WIDE; of anything else, the width that its user wants."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return min(columns or shutil.get_terminal_size().columns, WIDE)
