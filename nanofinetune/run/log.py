"""How far a run is: what it shows, what it writes, where in the data it stands, and from where it may go on.

>>> batch_plan(8, 1, processes=2, start=Start())  # rows of a step of all ranks, and batches accumulated
(16, 1)
>>> start = Start(folder=Path("update-40"), run={"batch_size": 8, "accumulate": 1, "world": 2, "fits": 8})
>>> batch_plan(8, 1, processes=1, start=start)  # one rank goes on for two: as many rows an update as before
(8, 2)

Underneath: in the course's loop this is `tqdm` and a `print`. To go on after an end, Accelerate's users call
`accelerate.Accelerator.load_state` (accelerate 1.15), read the epoch and the batch out of the folder's name, and skip
that many batches with `accelerate.skip_first_batches`. The order may be another one by then, and on another number of
ranks as many batches hold other rows. Here the place is (epoch, rows of it that all ranks together have used), which
means the same for every number of ranks, and is saved with the model.

Proof: test_resume_matches_the_uninterrupted_run, test_ranks_may_change_between_runs,
test_resume_refuses_another_run in tests/test_resume.py; test_accelerate_resumes_in_another_order in
tests/test_checkpoint.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from nanofinetune.ground.errors import Halt, UsageError
from nanofinetune.ranks.collectives import gather_object

LOG_EVERY = 50  # updates: ranks add up their losses, and metrics.jsonl grows, once in so many


class Log:
    """A run's losses and its place in the data; as a `with` block, the progress bar and metrics.jsonl too.

    Losses stay on the device until they are shown: reading one waits for all the work before it.
    """

    def __init__(self, output: Path | None, updates: int, accelerator: Any, run: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        self.run = dict(run)  # what `run_of` says of it
        self.path = output / "metrics.jsonl" if output and accelerator.is_main_process else None
        self.updates = updates
        self.update, self.examples, self.seconds, self.first_step_seconds = 0, 0, 0.0, 0.0
        self.start_clock()
        self.epoch, self.rows = 0, 0  # rows of this epoch that all ranks together have used
        self.losses = (0.0, 0.0)  # of this epoch: their sum, and of how many rows
        self.evaluations: list[dict[str, Any]] = []
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []  # (line, this rank's sum of losses and rows)
        self.window, self.batches = torch.zeros(2, device=accelerator.device), 0
        self.saved = -1  # the update that was saved last
        self.complained = False

    def __enter__(self) -> Log:
        """Begin to show and to write; lines of updates after the one that is resumed go."""
        self.file = None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+")
            if not locked(self.file):
                raise UsageError(occupied(str(self.path.parent)))
            self.file.seek(0)
            lines = self.file.readlines() if self.update else []
            kept = takewhile(lambda line: line.endswith("\n") and json.loads(line)["step"] <= self.update, lines)
            self.file.truncate(sum(len(line.encode()) for line in kept))  # needs no room, on a full disk too
        hidden = None if self.accelerator.is_main_process else True  # None: shown on a terminal only
        self.progress = tqdm(
            total=self.updates, initial=self.update, unit="update", disable=hidden, file=sys.stderr, dynamic_ncols=True
        )
        self.began, self.examples_before = time.perf_counter(), self.examples
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self.file:
            with suppress(OSError):  # said before, by `_write`
                self.file.close()

    # ---- one window of micro-batches: an update ----

    @property
    def window_is_empty(self) -> bool:
        return self.batches == 0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """Count one micro-batch: its mean loss over this rank's `rows`, which is NaN where there are none."""
        total = loss * rows if rows else torch.zeros_like(loss)
        self.window += torch.stack([total, total.new_tensor(rows)])
        self.batches += 1

    def is_finite(self, on_nan: str) -> bool:
        """Whether the window's loss is a number.

        Waits for the device; but XLA would run the step as two programs for it, so there `flush` finds out, too late.
        """
        late = self.window.device.type == "xla" and on_nan == "stop"
        return late or bool(self.window[0].isfinite())

    def nonfinite(self, lr: float, rows: str) -> str:
        """Where the loss is not finite, the same text on all ranks; the window is empty then. A collective."""
        mine = "" if math.isfinite(self.window[0].item()) else f"rank {self.accelerator.process_index}: {rows}"
        where = "; ".join(text for text in gather_object([mine], self.accelerator.world) if text)
        self.window = torch.zeros_like(self.window)  # none of its rows count
        return f"update {self.update + 1}: the loss is not finite ({where}; learning rate {lr:.3g})"

    def say(self, text: str) -> None:
        """A line above the progress bar, once for all ranks."""
        if self.accelerator.is_main_process:
            self.progress.write(text, file=sys.stderr)

    def end_update(self, lr: float, rows: int, rows_of_epoch: int) -> None:
        """`rows`: those of a full update of all ranks."""
        self.update += 1
        self.rows = min(self.rows + rows, rows_of_epoch)
        self.pending.append(({"step": self.update, "epoch": self.epoch + 1, "lr": lr}, self.window))
        if self.progress.update():  # true where the bar was due to be drawn
            loss, seconds = self.window[0] / self.window[1], time.perf_counter() - self.began
            speed = (self.examples - self.examples_before) / seconds
            self.progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", examples_per_second=f"{speed:.1f}")
        self.drop_window()
        if len(self.pending) >= LOG_EVERY:
            self.flush()

    def drop_window(self) -> None:
        self.window, self.batches = torch.zeros(2, device=self.accelerator.device), 0

    # ---- many updates ----

    def start_clock(self) -> None:
        """Count the time from here on to the next `flush` as training's."""
        self.since = time.perf_counter()

    def flush(self) -> None:
        """Add up what the ranks saw since the last time, and write it. A collective."""
        self.seconds += time.perf_counter() - self.since
        self.start_clock()
        if not self.pending:
            return
        table = self.accelerator.reduce(torch.stack([sums for _, sums in self.pending]), "sum").tolist()  # (n, 2)
        lines = ""
        for (line, _), (total, rows) in zip(self.pending, table, strict=True):
            if not math.isfinite(total):
                late = "the loss was not finite, and as this device runs ahead the weights have it: they are not saved"
                raise Halt(1, f"update {line['step']}: {late}. --on-nan skip looks at each update before its step")
            self.examples += int(rows)
            self.losses = (self.losses[0] + total, self.losses[1] + rows)
            loss = total / rows if rows else None  # of an update that was left out
            lines += json.dumps(line | {"loss": loss, "rows": int(rows)}) + "\n"
        self.pending = []
        self._write(lines)

    def _write(self, lines: str) -> None:
        """Append to metrics.jsonl. A full disk ends no run: the file object keeps its lines for the next time."""
        if self.file is None:
            return
        try:
            self.file.write(lines)
            self.file.flush()
        except OSError as error:
            if not self.complained:
                self.say(f"note: {self.path} cannot be written ({error.strerror}); the training goes on without")
            self.complained = True

    def mean_loss(self) -> float | None:
        """The mean loss over the epoch's rows, of all ranks."""
        self.flush()
        return self.losses[0] / self.losses[1] if self.losses[1] else None

    def end_epoch(self, evaluation: dict[str, Any]) -> None:
        self.epoch, self.rows, self.losses = self.epoch + 1, 0, (0.0, 0.0)
        self.evaluations.append(evaluation)
        shown = ", ".join(f"{key} {value:.4f}" for key, value in evaluation.items() if isinstance(value, float))
        if self.accelerator.is_main_process:
            self.progress.write(f"epoch {self.epoch}: {shown}", file=sys.stdout)
            sys.stdout.flush()

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain numbers; call `flush` before."""
        names = ("run", "update", "examples", "seconds", "first_step_seconds", "epoch", "rows", "losses", "evaluations")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def locked(file: IO[str]) -> bool:
    """Keep other runs out while this file is open -> whether no other one does."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        return True
    return True


def occupied(name: str) -> str:
    return f"--output {name}: another run is writing there at this moment; wait for its end, or name another folder"
