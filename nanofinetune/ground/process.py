"""What a process asks of its operating system: its peak memory, its age, and to end when its launcher is gone.

>>> peak_rss_mb() >= 0, seconds_since_start() > 0
(True, True)

Underneath: `torch.distributed.run` (torch 2.13), which starts the ranks, and `resource.getrusage`, which measures them.
  - A launcher that is killed leaves its ranks running. `end_with_parent` asks Linux to send them SIGTERM.
  - `ru_maxrss` survives exec: a small process that a large one started reports the large one's peak. The kernel's VmHWM
    is the process's own.
  - A clock of Python's begins at the first import; the kernel knows when the process began.

Proof: test_peak_rss_matches_resource_usage, test_seconds_since_start_includes_what_came_before_the_import in
tests/ground/test_process.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time

_IMPORTED = time.monotonic()
_parent = os.getppid()  # who started this process; see `end_with_parent`


def _note_parent() -> None:
    global _parent
    _parent = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_parent)


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the one that started it is gone; Linux only.

    If that one has gone since this module was imported, the signal comes now.
    """
    # underneath: torchrun leaves its workers running when it is killed
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG (prctl.h)
        if os.getppid() != _parent:  # the kernel sends nothing for a parent that was gone before the call
            os.kill(os.getpid(), signal.SIGTERM)


def peak_rss_mb(pid: int | None = None) -> float:
    """The most memory that this process, or process `pid`, ever held, in MiB; 0.0 where the system does not say.

    Only Linux says it of another process, and only while that runs.
    """
    # underneath: on Linux ru_maxrss outlives exec, so a small process that a large one started (torchrun, a benchmark)
    # reports its parent's peak; VmHWM is its own.
    if found := re.search(r"VmHWM:\s*(\d+) kB", _read(f"/proc/{'self' if pid is None else pid}/status")):
        return int(found[1]) / 2**10
    if pid is not None:
        return 0.0
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def seconds_since_start() -> float:
    """Seconds since this process began, the interpreter's own start and all imports included (to 0.01 s).

    Only Linux says when a process began; elsewhere it is seconds since this module was imported.
    """
    stat = _read("/proc/self/stat").rpartition(")")[2].split()  # what follows the name, which may hold anything
    if not stat or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.monotonic() - _IMPORTED
    began = int(stat[19]) / os.sysconf("SC_CLK_TCK")  # proc(5), field 22: starttime, in ticks since the machine booted
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def _read(path: str) -> str:
    """The text of one of the kernel's files, "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
