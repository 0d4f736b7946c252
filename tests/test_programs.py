"""`run_program` of tests/programs.py beside `subprocess.run`: a test that uses it sees what a real process shows.

Run: python -m pytest tests/test_programs.py
"""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
from helpers import run_torchrun
from programs import ROOT, run_program

SEEN = """
import json, os, sys
print(json.dumps([sys.argv, sys.path[0], os.getcwd(), __name__, os.environ.get("NAME"), os.environ.get("GONE")]))
print(repr(sys.stdin.read()), file=sys.stderr)
print(os.getsid(0) == os.getpid(), sys.stdout.encoding, sys.stdout.isatty(), [fd for fd in range(3, 20) if is_open(fd)])
"""
OPEN = """
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
import os
"""


def both(words, folder, stdin="", **changes):
    """What a real process and a forked one give."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}
    variables = {name: value for name, value in variables.items() if value is not None}
    real = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=variables, capture_output=True, text=True, input=stdin,
        start_new_session=True, timeout=120,
    )  # fmt: skip
    forked = run_program(words, cwd=folder, env=changes, stdin=stdin)
    return [(done.returncode, done.stdout, done.stderr) for done in (real, forked)]


@pytest.mark.parametrize("kind", ["script", "-m", "-c"])
def test_a_program_sees_what_a_real_process_sees(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("GONE", "it is taken out")
    (tmp_path / "seen.py").write_text(OPEN + SEEN)
    words = {"script": [tmp_path / "seen.py"], "-m": ["-m", "seen"], "-c": ["-c", OPEN + SEEN]}[kind]
    real, forked = both([*words, "--an", "argument"], tmp_path, stdin="one\ntwo", NAME="value", GONE=None)
    assert real[0] == 0 and "--an" in real[1] and "value" in real[1] and real[2] == "'one\\ntwo'\n"
    assert forked == real


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(3)", "raise SystemExit", "raise SystemExit('a line')", "import sys; sys.exit(None)",
     "import os; os.kill(os.getpid(), 9)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
     "import atexit; atexit.register(print, 'at exit'); print('before')",
     "import multiprocessing; [multiprocessing.RLock() for _ in range(3)]; print('locks')",
     "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()"],
)  # fmt: skip
def test_a_program_ends_as_a_real_process_ends(code, tmp_path):
    real, forked = both(["-c", code], tmp_path)
    assert forked == real


def test_a_traceback_and_its_exit_code_are_shown(tmp_path):
    (tmp_path / "fails.py").write_text("def fails():\n    raise KeyError('gone')\n\nfails()\n")
    real, forked = both([tmp_path / "fails.py"], tmp_path)
    assert forked[0] == real[0] == 1
    assert forked[2].splitlines()[-1] == real[2].splitlines()[-1] == "KeyError: 'gone'"


def test_what_is_read_at_import_gets_a_real_process(tmp_path):
    code = "import sys, os; print('torch' in sys.modules, os.environ['HF_HOME'])"
    assert run_program(["-c", code], env={"HF_HOME": "elsewhere"}).stdout == "False elsewhere\n"
    assert run_program(["-c", "import sys; print('torch' in sys.modules)"]).stdout == "True\n"


def test_one_that_hangs_is_ended_and_shown(tmp_path):
    code = "import time; print('before', flush=True); time.sleep(600)"
    with pytest.raises(AssertionError, match=r"ran longer than 1 s\nbefore"):
        run_program(["-c", code], timeout=1)


RANK = """
import os, sys
print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.getsid(0) == os.getpid(), sys.argv[1:], flush=True)
parent = open(f"/proc/{os.getppid()}/comm").read()
sys.exit(2 if os.environ["RANK"] == sys.argv[1] else 0)
"""


@pytest.mark.parametrize("failing", ["1", "none"])
def test_torchruns_ranks_are_forks_that_it_sees_as_its_own(failing, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = run_torchrun([script, failing], 2)
    assert sorted(done.stdout.splitlines()) == [f"{rank} 2 True ['{failing}']" for rank in (0, 1)]
    assert done.returncode == (1 if failing == "1" else 0)
    assert ("exitcode  : 2" in done.stderr and "rank      : 1" in done.stderr) == (failing == "1")


@pytest.mark.parametrize(
    ("asked", "worker", "expected"),
    [({}, None, 3), ({}, "gw0", None), ({"args_source": "named"}, None, None), ({"usepdb": True}, None, None)],
)
def test_only_a_whole_run_has_workers(asked, worker, expected, monkeypatch):
    """Not one in a worker: each would have more, without end."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    option = SimpleNamespace(numprocesses=None, dist="no", usepdb=asked.get("usepdb", False))
    whole = asked.get("args_source", pytest.Config.ArgsSource.TESTPATHS)
    config: Any = SimpleNamespace(option=option, args_source=whole)
    conftest.pytest_cmdline_main(config)
    assert option.numprocesses == expected


@pytest.mark.parametrize(("workers", "longest"), [(1, 2), (3, 3), (3, 2), (2, 3), (4, 0)])
def test_the_longest_tests_begin_the_workers_shares(workers, longest):
    """The shares are cut as pytest-xdist's `worksteal` cuts them, and no test is lost."""
    scheduling = pytest.importorskip("xdist.scheduler.worksteal", reason="pytest-xdist, of the extra `test`")
    marks = {5 * i + 4: "first" for i in range(longest)}
    items: Any = [SimpleNamespace(name=i, get_closest_marker=lambda _, i=i: marks.get(i)) for i in range(31)]
    order = list(items)
    conftest.pytest_collection_modifyitems(SimpleNamespace(workerinput={"workercount": workers}), items)  # type: ignore[arg-type]
    assert sorted(item.name for item in items) == [item.name for item in order]

    shares: dict[Any, list[int]] = {}

    class Worker:
        gateway = SimpleNamespace(id="gw")
        shutting_down = False

        def send_runtest_some(self, indices):
            shares.setdefault(self, []).extend(indices)

        def shutdown(self):
            pass

    config: Any = SimpleNamespace(getvalue=lambda name: ["popen"] * workers, option=SimpleNamespace(maxschedchunk=None))
    schedule = scheduling.WorkStealingScheduling(config)
    nodes: list[Any] = [Worker() for _ in range(workers)]
    for node in nodes:
        schedule.add_node(node)
    for node in nodes:
        schedule.add_node_collection(node, [str(item.name) for item in items])
    schedule.schedule()
    first = [items[shares[node][0]] for node in nodes]
    assert sum(item.get_closest_marker("first") is not None for item in first) == min(longest, workers)
