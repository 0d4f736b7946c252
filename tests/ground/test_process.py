"""What a process learns from its operating system, in processes of their own, against the system's own counters.

python -m pytest tests/ground/test_process.py
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import run_python

from nanofinetune.ground import process
from nanofinetune.ground.process import peak_rss_mb, seconds_since_start

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's counters are in /proc: Linux")

RSS = """
    import resource, sys, torch
    from nanofinetune.ground.process import peak_rss_mb
    block = torch.ones(300 * 2**18)  # 300 MiB
    del block
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak_rss_mb(), usage / (2**20 if sys.platform == "darwin" else 2**10))
"""
PARENT = """
    import subprocess, sys
    block = b"x" * (int(sys.argv[1]) * 2**20)
    sys.exit(subprocess.run([sys.executable, "-c", sys.argv[2]]).returncode)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource usage")
def test_peak_rss_matches_resource_usage():
    own, by_usage = run_python(PARENT, "1", textwrap.dedent(RSS))
    assert own > 300  # the block is gone, the peak is not
    assert by_usage == pytest.approx(own, rel=0.02)  # the kernel adds up its per-CPU counters at different times
    if sys.platform.startswith(
        "linux"
    ):  # of a small process that a large one started, `resource` tells the large one's
        own, by_usage = run_python(PARENT, "1500", textwrap.dedent(RSS))
        assert own < 1500 <= by_usage
    assert peak_rss_mb() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of another process")
def test_peak_rss_of_another_process_matches_its_own():
    code = (
        "import sys; from nanofinetune.ground.process import peak_rss_mb\n"
        "print(peak_rss_mb(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        own = float(child.stdout.readline())
        assert own <= peak_rss_mb(child.pid) < own + 8  # MiB, for the printing
        child.stdin.close()
        child.wait()
        assert peak_rss_mb(child.pid) == 0.0


START = """
    import sys, time
    time.sleep(0.6)  # what came before our import
    from nanofinetune.ground.process import seconds_since_start
    first = seconds_since_start()
    time.sleep(0.2)
    print(first, seconds_since_start() - first)
"""


@ON_LINUX
def test_seconds_since_start_includes_what_came_before_the_import():
    since_start, slept = run_python(START)
    assert 0.6 <= since_start < 180
    assert 0.19 <= slept < 180  # the kernel counts in hundredths


def test_seconds_since_start_counts_from_the_import_where_the_kernel_does_not_tell(monkeypatch):
    monkeypatch.setattr(process, "_read", lambda path: "")
    monkeypatch.setattr(process, "_IMPORTED", process.time.monotonic() - 5)
    assert 5 <= seconds_since_start() < 65


CHILD = """
    import sys, time
    from pathlib import Path
    {before}
    Path(sys.argv[1], "begun").touch()
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.01)
    from nanofinetune.ground.process import end_with_parent
    end_with_parent()
    Path(sys.argv[1], "outlived").touch()
    time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).pid, flush=True)"
FORKING = """
    import os
    from nanofinetune.ground import process
    if (child := os.fork()) == 0:
        process.end_with_parent()
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@ON_LINUX
def test_a_process_whose_launcher_died_while_it_imported_ends(tmp_path):
    """The kernel alone would send nothing: it speaks of a parent that dies after the call."""
    code = textwrap.dedent(CHILD).format(before="import nanofinetune")
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER + "; input()", code, str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as launcher:  # fmt: skip
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        wait_for(lambda: (tmp_path / "begun").exists())
        launcher.kill()
    (tmp_path / "go").touch()
    try:
        wait_for(lambda: not alive(child) or (tmp_path / "outlived").exists())
        time.sleep(0.2)
        assert not (tmp_path / "outlived").exists() and not alive(child)
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


@ON_LINUX
def test_a_forked_rank_has_its_own_parent():
    assert run_python(FORKING) == [7]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; one that has ended may wait for a parent to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
