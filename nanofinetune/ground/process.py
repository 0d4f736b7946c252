"""The device seam: which device a run uses, what XLA wants otherwise, and what a process asks of its operating system.

>>> choose_device("cpu")
device(type='cpu')
>>> choose_device("gpu")
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: --device gpu: there is no such device; choose auto, cpu, cuda, cuda:N, mps, tpu or xla
>>> fixed_lengths(200)
(32, 64, 128, 200)

Underneath: `accelerate.state.PartialState` (accelerate 1.15) picks among a dozen backends by the environment and by
what imports; for XLA it wants one process a device, and its optimizer wrapper all-reduces their gradients. Here the
choice is one function, and one process drives all XLA devices. `tpu` is the native device of the package torch_tpu (for
torch 2.11 and up); `xla` is torch_xla (2.9 is the last, for torch 2.9 only), where operations are only recorded until
the step ends. No real TPU was used: `tpu` has never run, `xla` ran as 1, 2 and 4 XLA devices on a CPU.
`keep_freed_memory` has no counterpart there: glibc's malloc returns large blocks to the kernel when they are freed, and
gets them anew, zeroed page by page, a moment later. A training step frees and allocates the same blocks every time.

Proof: test_choose_device_matches_torch, test_auto_matches_accelerate_partial_state, test_no_tpu_here_is_one_line,
test_keep_freed_memory_stops_page_faults, test_peak_rss_matches_resource_usage and
test_seconds_since_start_includes_what_came_before_the_import in tests/test_device.py; in an environment of its own,
which tests/xla/environment.sh makes, test_steps_on_xla_match_the_cpu, test_fixed_lengths_bound_the_compilations and
test_torch_manual_seed_does_not_reach_xla in tests/xla/test_xla.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time

_IMPORTED = time.monotonic()


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the one that started it is gone; Linux only."""
    # underneath: whoever kills torchrun leaves its workers running.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG (prctl.h)


def peak_rss_mb(pid: int | None = None) -> float:
    """The most memory this process, or the one of that number, ever held, in MiB (0.0 where the system does not tell).

    Of another process only Linux tells, and only while it runs.
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
    """Seconds since this process began, the start of the interpreter and all imports included (to 0.01 s).

    Only Linux tells when a process began; elsewhere it is seconds since this module was imported.
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
