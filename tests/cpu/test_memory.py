"""keep_freed_memory against glibc's own behaviour, by the kernel's count of page faults, in processes of their own.

python -m pytest tests/cpu/test_memory.py
"""

import platform

import pytest
from helpers import run_python

from nanofinetune.cpu.memory import keep_freed_memory

ON_GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="keep_freed_memory is a setting of glibc's malloc: Linux with glibc"
)

# --- the operating system ---------------------------------------------------------------------------------------------

FAULTS = """
    import resource, statistics, sys, torch
    from nanofinetune.cpu.memory import keep_freed_memory
    if sys.argv[1] == "keep":
        assert keep_freed_memory()
    def faults_of_one_step():  # two blocks of 64 MiB, written to and freed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20).add(1)[0].item()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(statistics.median(faults_of_one_step() for _ in range(15)))
    torch.empty(3 * 2**30, dtype=torch.uint8)[-1] = 1  # larger than any of the settings: it still is to be had
"""


@pytest.mark.slow
@ON_GLIBC
def test_keep_freed_memory_stops_page_faults():
    (kept,), (returned,) = run_python(FAULTS, "keep"), run_python(FAULTS, "return")
    # Each step touches 128 MiB: 32,768 pages of 4 KiB, or 64 of 2 MiB where the kernel hands out huge ones. Blocks of
    # more than 32 MiB, since smaller ones glibc may keep by itself: its thresholds rise with what is freed. The median,
    # since the heap takes a few steps to reach its size.
    assert returned >= 64
    assert kept <= 5


def test_keep_freed_memory_says_so_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
