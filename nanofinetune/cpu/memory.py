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
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next step -> whether that could be told (glibc only).

    Call it once, before the first large allocation. The process keeps its peak memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block gets a mapping of its own (those are unmapped when freed), and the heap's end is never given back.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return [mallopt(option, value) for option, value in settings] == [1, 1, 1]
