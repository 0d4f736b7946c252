"""What a training does when something goes wrong: a signal, a rank that hangs, no memory, a loss that is no number.

>>> with StopSignals() as stop:
...     os.kill(os.getpid(), signal.SIGTERM)  # a scheduler wants this machine: finish the update, save, leave
...     stop.number, stop.exit_code
(15, 143)
>>> smaller(8, 1), smaller(9, 2)  # (rows, accumulated batches) after memory ran out: as many rows an update
((4, 2), (3, 6))

Underneath: nothing of this is in `accelerate` 1.15 but `accelerate.utils.find_executable_batch_size`, which tries again
with nine tenths of the batch on the rank that ran out of memory, and tells no other: the ranks' batches part. A signal
ends the process where it stands. `torch.distributed` (torch 2.13) says of a rank that does not come "Timed out waiting
1800000ms for recv operation to complete", without a word on who waits where. Here:
  - Signals are only noted; the loop asks at each update's end, and all ranks agree, so that they save the same update.
  - On a time-out each rank is asked, over the store that made the process group, which collective it is in, in which
    update, at which line: a thread answers for it even while it hangs. Who does not answer is stopped or gone.
    That is gloo's way. Under NCCL a collective that is late raises nothing here: torch's own watchdog prints which one
    it was and ends the process; nobody is asked (and no GPU has run this yet).
  - A rank without memory still takes part in the all-reduces of that backward (`join_after_failure`), then all agree.

Proof: test_signals_are_noted_and_the_second_one_ends, test_a_stopped_rank_is_named_where_gloo_names_none,
test_a_rank_elsewhere_says_where, test_a_rank_that_skips_a_batch_is_found, test_preflight_names_who_did_not_come,
test_accelerate_shrinks_one_rank_alone in tests/test_faults.py; test_signal_saves_and_resume_continues,
test_nonfinite_loss_is_named, test_out_of_memory_on_one_rank_shrinks_on_all in tests/test_resume.py.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SECOND = 1.0  # seconds: torchrun hands the terminal's Ctrl-C on, so that one arrives twice at once


class StopSignals:
    """A `with` block in which SIGTERM, SIGINT and SLURM's SIGUSR1 are noted in `number`; a second one ends at once.

    In a thread other than the main one, which cannot have signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal that came; 0: none
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return 128 + self.number

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
            for number in (signal.SIGTERM, signal.SIGINT, *slurm):
                self._before[number] = signal.signal(number, self._note)
            # Python runs `_note` between two of its own instructions: never, while one call waits for another rank.
            # The interpreter writes the number into this pipe at once, and a thread reads it.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1])
            threading.Thread(target=self._read, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])  # the thread reads the end, closes its own side, and ends
            self._pipe = None

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number

    def _read(self, pipe: int) -> None:
        while arrived := os.read(pipe, 1):
            number = arrived[0]
            if number not in self._before:
                continue
            if not self._when:
                self.number, self._when = self.number or number, time.monotonic()
                if os.environ.get("RANK", "0") == "0":  # a launcher hands it to every rank
                    name = signal.Signals(number).name
                    sys.stderr.write(f"\n{name}: stopping after this update; once more to stop now\n")
            elif time.monotonic() - self._when > SECOND:
                sys.stderr.write(f"{signal.Signals(number).name} again: stopped at once\n")
                os._exit(128 + number)
        os.close(pipe)
