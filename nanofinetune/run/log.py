"""The log of a run: its losses, its place in the data, the progress bar and metrics.jsonl.

>>> from nanofinetune import Accelerator
>>> log = Log(None, updates=2, accelerator=Accelerator(cpu=True), run={})
>>> with log:
...     for window in ([1.0, 3.0], [2.0]):  # the losses of the micro-batches of one update
...         for loss in window:
...             log.add(torch.tensor(loss), rows=4)
...         log.end_update(lr=0.1, rows=8, rows_of_epoch=12)
...     log.mean_loss(), log.update, log.rows  # rows: how many of this epoch have been used
(2.0, 2, 12)

Underneath: the course's loop has `tqdm` and a `print`. `accelerate.Accelerator.save_state` (accelerate 1.15) saves no
place in the data; scripts write it into the folder's name, in batches.
  - Here the place is (epoch, rows of it that all ranks together have used). It means the same on any number of ranks,
    and is saved with the model.
  - Losses stay on the device: reading one waits for all work before it. Ranks add them up once in 50 updates.
  - A full disk does not end the training, and costs no line if there is room again before its end.

Proof: test_ranks_may_change_between_runs, test_full_disk_ends_no_training_and_loses_nothing in
tests/run/test_resume.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from nanofinetune.ground.errors import Halt, UsageError, shown
from nanofinetune.ground.progress import Progress, Speed, clock, plural
from nanofinetune.ranks.collectives import gather_object
from nanofinetune.run.schema import finite, whole

LOG_EVERY = 50  # updates, after which the ranks add up their losses and metrics.jsonl grows
MOST_PACES = 2000  # points of a curve: more than a picture shows
LONGEST = 2**16  # bytes that a line of somebody else's is read by; ours have about a hundred
BEGINNING = b'{"step": '  # of each of our lines
# What a resumed run needs of a log, and what each of it can be.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "run": lambda value: isinstance(value, dict),
    "update": whole,
    "examples": whole,  # rows that have been trained on, in all epochs
    "seconds": partial(finite, low=0),
    "first_step_seconds": partial(finite, low=0),
    "epoch": whole,
    "rows": whole,
    "losses": lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(finite, value)),
    "evaluations": lambda value: isinstance(value, list) and all(isinstance(scores, dict) for scores in value),
}


class Log:
    """A run's losses and its place in the data. In its `with` block it shows the progress bar and writes metrics.jsonl.

    Args:
        output: the folder that gets metrics.jsonl; None: none is written.
        updates: of the whole run, for the progress bar; epochs: begun by it.
        accelerator: it adds up over the ranks; its rank 0 writes.
        run: what a run must have in common with the one that it resumes (`run_of`), saved with the rest.
        take: called once metrics.jsonl is locked, before a line of it is deleted; it may raise UsageError.
    """

    def __init__(
        self, output: Path | None, updates: int, accelerator: Any, run: Mapping[str, Any], epochs: int = 1,
        take: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.accelerator = accelerator
        self.run, self.take = dict(run), take
        self.path = output / "metrics.jsonl" if output and accelerator.is_main_process else None
        self.updates, self.epochs = updates, epochs
        self.update, self.examples, self.seconds, self.first_step_seconds = 0, 0, 0.0, 0.0
        self.speed, self.steps, self.evaluating = Speed(), 0, 0.0  # updates of this process; seconds of an evaluation
        self.start_clock()
        self.epoch, self.rows = 0, 0  # rows of this epoch that all ranks together have used
        self.losses = (0.0, 0.0)  # of this epoch: the sum over its rows, and how many rows that are
        self.evaluations: list[dict[str, Any]] = []
        self.kept: Mapping[str, Any] = {}  # at the end of the run: the evaluation of the model that is saved
        self.which = ""  # and a line that says which one that is
        self.pace: list[tuple[int, float]] = []  # (update, seconds of training until it), of this process; thinned out
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []  # (line, this rank's sum of losses and rows)
        self.window, self.batches = torch.zeros(2, device=accelerator.device), 0
        self.saved = -1  # the update that was saved last; -1: none
        self.unwritten: deque[bytes] = deque()  # what the disk has not taken yet of metrics.jsonl
        self.complained = False

    def __enter__(self) -> Log:
        """Begin to show and to write. Lines of updates after the one that is resumed are deleted: they follow again."""
        self.file = None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer's owner does not know which half of it a full disk has taken, and drops the rest.
            self.file = self.path.open("ab", buffering=0)
            try:
                if not locked(self.file):
                    raise UsageError(occupied(str(self.path.parent)))
                self.take()
            except UsageError:
                self.close()
                raise
            with self.path.open("r+b") as content:
                if strangers := cut_back(content, self.update):
                    why = f"{plural(strangers, 'line')} in it not of this run's making: kept"
                    self.accelerator.print(f"note: {shown(str(self.path))}: {why}", file=sys.stderr, flush=True)
        hidden = not self.accelerator.is_main_process
        self.progress = Progress(self.updates, self._title(), initial=self.update, leave=True, hidden=hidden)
        self.trained_before = self.seconds
        if self.update:
            self.pace.append((self.update, round(self.seconds, 3)))
        return self

    def __exit__(self, *failure: object) -> None:
        """The training ends. Other runs stay locked out: `result.conclude` writes there, and calls `close`."""
        self._write("")
        if self.unwritten:
            lines = plural(sum(piece.count(b"\n") for piece in self.unwritten), "line")
            self.say(f"note: {self.path} lacks its last {lines}: there was no room for them")
        self.progress.__exit__(*failure)
        if failure[0] is not None:
            self.close()

    def close(self) -> None:
        """Let other runs write there."""
        if self.file:
            self.file.close()

    # ---- one window of micro-batches: an update ----

    @property
    def window_is_empty(self) -> bool:
        return self.batches == 0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """Add one micro-batch: its mean loss over this rank's `rows`. Of no rows it is NaN, and counts as nothing."""
        total = loss * rows if rows else torch.zeros_like(loss)
        self.window += torch.stack([total, total.new_tensor(rows)])
        self.batches += 1

    def is_finite(self, on_nan: str) -> bool:
        """Whether this rank's loss of the window is a number. It waits for the device.

        On XLA that would cut the step into two programs; with --on-nan stop, `flush` finds out there, after the update.
        """
        late = self.window.device.type == "xla" and on_nan == "stop"
        return late or bool(self.window[0].isfinite())

    def nonfinite(self, lr: float, rows: str) -> str:
        """Where the loss is not finite, as the same text on all ranks. Empties the window. A collective."""
        mine = "" if math.isfinite(self.window[0].item()) else f"rank {self.accelerator.process_index}: {rows}"
        where = "; ".join(text for text in gather_object([mine], self.accelerator.world) if text)
        self.window = torch.zeros_like(self.window)  # of an update that is left out no row counts
        return f"update {self.update + 1}: the loss is not finite ({where}; learning rate {lr:.3g})"

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0 alone."""
        if self.accelerator.is_main_process:
            self.progress.write(text)

    def end_update(self, lr: float, rows: int, rows_of_epoch: int) -> None:
        """Close the window. `rows`: of a full update of all ranks; `rows_of_epoch`: of the training split."""
        self.update += 1
        before, self.rows = self.rows, min(self.rows + rows, rows_of_epoch)
        self.steps += 1
        self.speed.add(self.rows - before)  # of all ranks
        self.pending.append(({"step": self.update, "epoch": self.epoch + 1, "lr": lr}, self.window))
        ends = self.update == self.updates and self.progress.on_terminal
        if self.progress.add() or ends:  # only then is a loss read from the device
            self._show(lr)
        self.drop_window()
        if len(self.pending) >= LOG_EVERY:
            self.flush()

    def _title(self) -> str:
        return f"epoch {min(self.epoch + 1, self.epochs)}/{self.epochs}"

    def _show(self, lr: float) -> None:
        """Draw the bar, or write a line of a log file."""
        loss = (self.window[0] / self.window[1]).item()
        took = (self.seconds + time.perf_counter() - self.since - self.trained_before) / self.steps
        evaluations = self.epochs - self.epoch if self.evaluating else 0
        left = clock((self.updates - self.update) * took + evaluations * self.evaluating)
        self.progress.title = self._title()
        self.progress.show(f"{self.speed.now:.1f} ex/s loss {loss:.3f} lr {lr:.1e} {left} left")

    def drop_window(self) -> None:
        """Begin a new window."""
        self.window, self.batches = torch.zeros(2, device=self.accelerator.device), 0

    # ---- many updates ----

    def start_clock(self) -> None:
        """Count the time from now until the next `flush` as training time."""
        self.since = time.perf_counter()
        self.speed.pause()
        self.speed.add(0)

    def flush(self) -> None:
        """Add up the ranks' losses since the last call, and write them. A collective. Raises Halt for a NaN (XLA)."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        if not self.pending:
            return
        self.pace.append((self.update, round(self.seconds, 3)))
        if len(self.pace) > MOST_PACES:
            self.pace = self.pace[1::2]
        table = self.accelerator.reduce(torch.stack([sums for _, sums in self.pending]), "sum").tolist()  # (n, 2)
        lines = ""
        for (line, _), (total, rows) in zip(self.pending, table, strict=True):
            if not math.isfinite(total):
                late = "the loss was not finite, and as this device runs ahead the weights have it: they are not saved"
                raise Halt(1, f"update {line['step']}: {late}. --on-nan skip looks at each update before its step")
            self.examples += int(rows)
            self.losses = (self.losses[0] + total, self.losses[1] + rows)
            loss = total / rows if rows else None  # None: the update was left out
            lines += json.dumps(line | {"loss": loss, "rows": int(rows)}) + "\n"
        self.pending = []
        self._write(lines)

    def _write(self, lines: str) -> None:
        """Append to metrics.jsonl. On a full disk the run goes on, and what is not written is tried again next time."""
        if self.file is None:
            return
        if lines:
            self.unwritten.append(lines.encode())
        try:
            while self.unwritten:
                written = self.file.write(self.unwritten[0])  # fewer bytes than asked for, where the disk gets full
                self.unwritten[0] = self.unwritten[0][written:]
                if not self.unwritten[0]:
                    self.unwritten.popleft()
        except OSError as error:
            if not self.complained:
                self.say(f"note: {self.path} cannot be written ({error.strerror}); the training goes on without")
            self.complained = True

    def mean_loss(self) -> float | None:
        """The mean loss over the epoch's rows, of all ranks; None if all were left out. A collective."""
        self.flush()
        return self.losses[0] / self.losses[1] if self.losses[1] else None

    def end_epoch(self, evaluation: dict[str, Any]) -> None:
        """Move on to the next epoch; keep and print this one's scores."""
        self.evaluating = time.perf_counter() - self.since  # `mean_loss` was called before it
        self.epoch, self.rows, self.losses = self.epoch + 1, 0, (0.0, 0.0)
        self.evaluations.append(evaluation)
        scores = ", ".join(f"{key} {value:.4f}" for key, value in evaluation.items() if isinstance(value, float))
        if self.accelerator.is_main_process:
            self.progress.write(f"epoch {self.epoch}: {scores}", sys.stdout)
            sys.stdout.flush()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, in plain numbers. Call `flush` before."""
        return {name: getattr(self, name) for name in FIELDS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises ValueError for what cannot be a log's state."""
        if reason := misfit(state):
            raise ValueError(f"the saved log cannot be one: {reason}")
        for name in FIELDS:
            setattr(self, name, state[name])

    def misfit(self, state: Mapping[str, Any]) -> str:
        """Why a state cannot be one of this run's log, "" if it can."""
        if not (reason := misfit(state)) and state["update"] > self.updates:
            reason = f"update is {state['update']}, and this run has {self.updates}"
        return reason


def misfit(state: Any) -> str:
    """Why a state cannot be a log's, "" if it can."""
    if not isinstance(state, dict) or set(state) != set(FIELDS):
        return "it has other fields"
    for name, fits in FIELDS.items():
        if not fits(state[name]):
            return f"{name} is {str(state[name])[:40]}"
    if len(state["evaluations"]) != state["epoch"]:
        return f"it has {len(state['evaluations'])} evaluations of {state['epoch']} epochs"
    return ""


def cut_back(file: BinaryIO, update: int) -> int:
    """Delete our lines of updates after `update`, in place -> how many lines are not ours: these stay.

    It needs no room on the disk, and little memory, however long a line is.
    """
    strangers = written = 0
    begins = True  # whether the next piece is the beginning of a line
    last = b"\n"
    while piece := file.readline(LONGEST):
        step = _step_of(piece) if begins else None
        strangers += begins and step is None
        begins = piece.endswith(b"\n")
        if step is None or step <= update:
            here, last = file.tell(), piece
            if written + len(piece) < here:  # something before it is gone
                file.seek(written)
                file.write(piece)  # over lines of ours, or over itself
                file.seek(here)
            written += len(piece)
    file.truncate(written)  # ours: what is cut off has been moved forward, or was one of our lines
    if not last.endswith(b"\n"):
        file.seek(written)
        file.write(b"\n")  # our next line begins a line
    return strangers


def _step_of(line: bytes) -> float | None:
    """The update that a line of ours is about; infinity for one that a kill has torn; None if it is not ours."""
    if not line.endswith(b"\n") and len(line) < LONGEST and (BEGINNING.startswith(line) or line.startswith(BEGINNING)):
        return math.inf
    try:
        step = json.loads(line)["step"] if line.startswith(BEGINNING) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None


def first_step(file: BinaryIO) -> float | None:
    """The update of the first line that is ours (see `_step_of`), None if none is."""
    begins = True
    while piece := file.readline(LONGEST):
        if begins and (step := _step_of(piece)) is not None:
            return step
        begins = piece.endswith(b"\n")
    return None


def locked(file: IO[Any]) -> bool:
    """Lock an open file against other runs, until it is closed -> False if another run holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        return True
    return True


def occupied(name: str) -> str:
    """What to tell the user where `locked` is False."""
    return f"--output {name}: another run is writing there at this moment; wait for its end, or name another folder"
