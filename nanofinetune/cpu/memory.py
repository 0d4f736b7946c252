"""Keep freed memory in the process: a training step frees and allocates the same large blocks every time.

>>> keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
True

Underneath: glibc's malloc, which torch's CPU allocator calls; torch 2.13 has no setting for it
  - malloc returns a large block to the kernel when it is freed;
  - the next allocation gets it again, zeroed page by page: a page fault for every 4 KiB;
  - here glibc is told once to keep such blocks; the process stays at its peak size;
  - other C libraries are left alone.

Proof: test_keep_freed_memory_stops_page_faults, test_keep_freed_memory_says_so_where_there_is_no_glibc in
tests/cpu/test_memory.py.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next step -> whether it was told (glibc only).

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
