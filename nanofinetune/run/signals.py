"""A signal asks the run to stop: it is noted, the update is finished and saved, and all ranks stop together.

>>> with StopSignals() as stop:
...     os.kill(os.getpid(), signal.SIGTERM)  # a scheduler wants this machine back
...     stop.number, stop.exit_code
(15, 143)

Underneath: `torch.distributed.run` (torch 2.13) hands signals on to the ranks. A Python process that does not handle
them ends where it stands, and so does Accelerate's.
  - Here the handler only notes the number. The loop asks at the end of each update, and all ranks agree, so that they
    save the same one.
  - Python runs handlers between two of its own instructions, never while a call waits for another rank. So a thread
    reads the number as it arrives.
  - A second signal ends the process at once.

Proof: test_signals_are_noted_and_the_second_one_ends, test_signal_saves_and_resume_continues in
tests/run/test_signals.py and tests/run/test_resume.py.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

SECOND = 1.0  # seconds in which a signal counts once: torchrun hands Ctrl-C on, which the terminal has sent as well


class StopSignals:
    """A `with` block in which SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1 are noted in `number`; a second one ends it.

    Python allows signal handlers in the main thread only; in any other one this does nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal; 0: none
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that this signal has ended."""
        return 128 + self.number

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
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
            os.close(self._pipe[1])  # the thread reads the end of the pipe, closes its own side, and ends
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
                if os.environ.get("RANK", "0") == "0":  # a launcher sends it to every rank: print once
                    name = signal.Signals(number).name
                    _say(f"\n{name}: stopping after this update; once more to stop now\n")
            elif time.monotonic() - self._when > SECOND:
                _say(f"{signal.Signals(number).name} again: stopped at once\n")
                os._exit(128 + number)
        os.close(pipe)


def _numbers() -> list[int]:
    """The signals that ask for a stop here."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if "SLURM_JOB_ID" in os.environ:
        numbers.append(signal.SIGUSR1)
    # A terminal that closes sends SIGHUP. Under `nohup` it is ignored, and stays so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return [int(number) for number in numbers]


def _say(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # the terminal that sent SIGHUP is gone: the stop still counts
            sys.stderr.write(text)
