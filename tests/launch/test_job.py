"""launch.sh and its job, compared with torchrun (torch 2.13) and accelerate's launcher (accelerate 1.15).

What launch.sh would run is read with torchrun's own parser; the rest are real runs of small scripts over gloo.

    python -m pytest tests/launch/test_job.py
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, run_torchrun
from launching import LAUNCH, launch_sh

from nanofinetune.launch.config import QUESTIONS
from nanofinetune.launch.job import first_failure

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="launch.sh needs bash")
REAL_GLOO = "from nanofinetune.ranks.world import init_world, shutdown\nworld = init_world('cpu')\n"


# ---- what failed first -----------------------------------------------------------------------------------------------


def _failure(tmp_path: Path, rank: int, exitcode: int, when: float | None = None, text: str = ""):
    """torch's own record of a process that failed; with `when`, it left a traceback at that time."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / f"{rank}.json"
    if when is not None:
        extra = {"text": text, "code": 1, "time": when, "timestamp": str(int(when))}
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))


def test_first_failure_orders_within_a_second_where_torch_does_not(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    failures = {
        0: _failure(tmp_path, 0, 1, 1000.9, "connection closed by peer"),
        1: _failure(tmp_path, 1, 1, 1000.2, "the cause"),
        2: _failure(tmp_path, 2, -signal.SIGTERM),
    }
    assert first_failure(failures) == (1, 1, "the cause")
    assert ChildFailedError("train.py", failures).get_first_failure()[0] == 0  # torch: the lowest of that second


def test_first_failure_knows_a_process_without_a_traceback(tmp_path: Path) -> None:
    now = time.time() - 2  # the agent looks later than the others fail
    lost = _failure(tmp_path, 0, 1, now, "connection closed by peer")
    rank, code, text = first_failure({0: lost, 1: _failure(tmp_path, 1, -signal.SIGKILL)})
    assert (rank, code) == (1, 137) and text.startswith("signal 9 (SIGKILL) ended it: ")
    assert first_failure({0: lost, 1: _failure(tmp_path, 1, 3)}) == (1, 3, "it left with exit code 3")
    assert first_failure({0: lost, 1: _failure(tmp_path, 1, 2)}) == (1, 2, "")  # it has said what the user got wrong
    # What the agent ended because of another one: at once, after saving its state, or by force 30 seconds later.
    for code in (-signal.SIGTERM, 143):
        assert first_failure({0: lost, 1: _failure(tmp_path, 1, code)})[0] == 0
    # A traceback counts, whatever ended the process while it was on its way out.
    for code in (-signal.SIGTERM, -signal.SIGABRT):
        left = _failure(tmp_path, 1, code, now - 1, "the cause")
        assert first_failure({0: lost, 1: left}) == (1, 1, "the cause")
    (tmp_path / "1.json").unlink()
    earlier = _failure(tmp_path, 0, 1, now - 30, "the cause")
    assert first_failure({0: earlier, 1: _failure(tmp_path, 1, -signal.SIGKILL)})[0] == 0


def _script(tmp_path: Path, text: str) -> dict[str, str]:
    """The environment in which launch.sh runs this script."""
    (tmp_path / "script.py").write_text(text)
    return {"NANOFINETUNE_SCRIPT": str(tmp_path / "script.py")}


FIRST = """import sys, time
def deep():
    raise ValueError("the cause")
if world.rank == 1:
    deep()
import torch
torch.distributed.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
def test_first_failing_rank_is_printed_last_where_torchrun_hides_it(tmp_path: Path) -> None:
    env = _script(tmp_path, REAL_GLOO + FIRST)
    result = launch_sh("-n", "2", env=env)
    assert result.returncode == 1
    last = result.stderr[result.stderr.index("\nlaunch.sh: rank 1 failed first:\n") :].strip().splitlines()
    assert last[1] == "Traceback (most recent call last):"
    assert last[2] == f'  File "{tmp_path}/script.py", line 7, in <module>'  # nothing of ours above it
    assert last[-1] == "ValueError: the cause"
    assert "rank 1 failed: ValueError: the cause\n" in result.stderr  # said at once, too
    assert "torch/distributed/elastic" not in result.stderr

    # accelerate launch and plain torchrun end in this instead
    theirs = run_torchrun(tmp_path / "script.py", 2)
    assert theirs.returncode == 1
    end = "\n".join(theirs.stderr.splitlines()[-8:])
    assert "error_file: <N/A>" in end and "ValueError" not in end


def test_the_module_itself_starts_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "nanofinetune.launch", "config", str(tmp_path / "launch.env")]
    result = subprocess.run(command, input="\n" * len(QUESTIONS), text=True, capture_output=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "launch.env").exists()


def test_usage_error_is_one_line_and_exit_2(tmp_path: Path) -> None:
    text = "from nanofinetune.ground.errors import UsageError\nraise UsageError('--lr is -1: it must be above 0')\n"
    result = launch_sh("-n", "2", env=_script(tmp_path, text))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "script.py: --lr is -1: it must be above 0\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("UsageError('--lr is -1: it must be above 0')", 2, "script.py: --lr is -1: it must be above 0\n"),
        pytest.param("SystemExit(2)", 2, "", marks=pytest.mark.slow),
        pytest.param(
            "Halt(3, 'update 7: the loss is not finite')",
            3,
            "script.py: update 7: the loss is not finite\n",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["UsageError", "argparse", "Halt"],
)
def test_usage_error_is_not_started_again_where_torchrun_repeats_it(raised, code, said, tmp_path: Path) -> None:
    """Nor is another end that would only come again."""
    starts = tmp_path / "starts"
    text = (
        "import os, time\nfrom nanofinetune.ground.errors import Halt, UsageError\n"
        f"with open({str(starts)!r}, 'a') as file: file.write(os.environ['RANK'])\n"
        "if os.environ['RANK'] == '0': time.sleep(60)\n"  # it is ended, and does not meet the mistake itself
        f"raise {raised}\n"
    )
    result = launch_sh("-n", "2", "--max-restarts", "2", env=_script(tmp_path, text))
    assert (result.returncode, result.stdout, result.stderr) == (code, "", said)
    assert starts.read_text().count("1") == 1
    if "Usage" in raised:
        run_torchrun(["--max-restarts=1", tmp_path / "script.py"], 2)
        assert starts.read_text().count("1") == 3


WARNED = """
import os, signal, time
from nanofinetune.ground.errors import Halt
from nanofinetune.run.signals import StopSignals
with StopSignals() as stop:
    if os.environ["RANK"] == "0":
        time.sleep(0.5)  # the other rank has its handler by then
        os.kill(os.getppid(), signal.SIGUSR1)  # as SLURM does to what `srun` has started, which is torchrun
    until = time.monotonic() + 20
    while not stop.number and time.monotonic() < until:
        time.sleep(0.05)
with open(f"{__file__}.{os.environ['RANK']}", "w") as file:
    file.write(str(stop.number))
raise Halt(stop.exit_code, "saved")
"""


@pytest.mark.slow
def test_slurms_warning_reaches_every_rank(tmp_path: Path) -> None:
    """--signal=USR1@90: torchrun alone would be ended by it."""
    result = launch_sh("-n", "2", env=_script(tmp_path, WARNED) | {"SLURM_JOB_ID": "7"})
    assert result.returncode == 128 + signal.SIGUSR1, result.stderr
    assert [(tmp_path / f"script.py.{rank}").read_text() for rank in range(2)] == [str(int(signal.SIGUSR1))] * 2


def test_missing_script_is_one_line_and_exit_2() -> None:
    result = launch_sh("-n", "2", env={"NANOFINETUNE_SCRIPT": "/nonexistent/train.py"})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "launch.sh: /nonexistent/train.py: there is no such script\n"


def test_killed_rank_is_named(tmp_path: Path) -> None:
    text = REAL_GLOO + "import os, torch\nif world.rank == 0: os.kill(os.getpid(), 9)\n"
    result = launch_sh("-n", "2", env=_script(tmp_path, text + "torch.distributed.all_reduce(torch.ones(1))\n"))
    assert result.returncode == 137
    last = result.stderr.splitlines()[-2:]
    assert last[0] == "launch.sh: rank 0 failed first:" and last[1].startswith("signal 9 (SIGKILL) ended it")


# ---- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_on_a_cpu_with_port_29500_taken(tmp_path: Path) -> None:
    """Two real gloo ranks, as if `python script.py args` had run in each, while 29500 is somebody else's."""
    text = REAL_GLOO + (
        "import os, sys, torch\n"
        "total = torch.tensor([world.rank + 1.0])\n"
        "torch.distributed.all_reduce(total)\n"
        "threads = torch.get_num_threads()\n"
        "print(f'{total.item()} {threads} {__name__} {sys.argv} {sys.path[0]}\\n', end='')\n"
        "shutdown(world)\n"
    )
    env = _script(tmp_path, text) | {"OMP_NUM_THREADS": "1"}
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", 29500))
            taken.listen()
        except OSError:
            pass  # taken already: as good
        result = launch_sh("-n", "2", "--lr", "1 2", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    script = str(tmp_path / "script.py")
    assert result.stdout.splitlines() == [f"3.0 1 __main__ {[script, '--lr', '1 2']} {tmp_path}"] * 2


@pytest.mark.slow
def test_two_processes_on_a_cpu_are_two_ranks_where_accelerate_launch_starts_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="shows Accelerate's own launcher (extra `test`)")
    text = (
        "import importlib, sys, torch\n"
        "accelerator = importlib.import_module(sys.argv[1]).Accelerator(cpu=True)\n"
        "rank = accelerator.process_index\n"
        "total = accelerator.reduce(torch.tensor(rank + 1.0), 'sum').item()\n"
        "print(f'{rank} of {accelerator.num_processes}: {total}\\n', end='')\n"
        "accelerator.end_training()\n"
    )
    env = _script(tmp_path, text)
    ours = launch_sh("-n", "2", "nanofinetune", env=env)
    assert sorted(ours.stdout.splitlines()) == ["0 of 2: 3.0", "1 of 2: 3.0"], ours.stderr
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    variables |= {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}  # no settings of this machine's user
    theirs = subprocess.run(
        [*command, str(tmp_path / "script.py"), "accelerate"], env=variables, text=True, capture_output=True, timeout=90
    )
    assert (theirs.returncode, theirs.stdout) == (0, "0 of 1: 1.0\n"), theirs.stderr


def test_one_process_is_started_without_a_launcher(tmp_path: Path) -> None:
    text = "import os, sys\nprint(sys.argv[1:], 'LOCAL_RANK' in os.environ, 'torch' in sys.modules)\nsys.exit(3)\n"
    result = launch_sh("-n", "1", "--lr", "1 2", env=_script(tmp_path, text))
    assert (result.returncode, result.stdout, result.stderr) == (3, "['--lr', '1 2'] False False\n", "")


RESTARTS = (
    REAL_GLOO
    + """import os, signal, torch
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
total = torch.tensor([world.rank + 1.0])
torch.distributed.all_reduce(total)
print(f"attempt {attempt} {total.item()}\\n", end="")
if attempt == "0" and world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)  # it cannot say goodbye: its address stays in the store
torch.distributed.all_reduce(total)
shutdown(world)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch.sh", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_restarted_ranks_meet_each_other(launcher: str, tmp_path: Path) -> None:
    """The second attempt meets in the store in which the first one's addresses still are."""
    env = _script(tmp_path, RESTARTS)
    if launcher == "launch.sh":
        result = launch_sh("-n", "2", "--max-restarts", "1", env=env)
    else:
        result = run_torchrun(["--standalone", "--max-restarts=1", tmp_path / "script.py"], 2)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["attempt 0 3.0"] * 2 + ["attempt 1 3.0"] * 2


@pytest.mark.slow
def test_a_failure_that_a_restart_mended_is_told_when_it_happens(tmp_path: Path) -> None:
    text = "import os\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': raise ValueError('the cause')\n"
    result = launch_sh("-n", "1", "--max-restarts", "1", env=_script(tmp_path, text))
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.startswith("rank 0 failed, and all start again:\nTraceback (most recent call last):\n")
    assert result.stderr.endswith("ValueError: the cause\n")


def _start(tmp_path: Path, text: str) -> tuple[subprocess.Popen[str], list[int]]:
    """launch.sh with two ranks -> it, and their process ids once both have said them."""
    variables = {**os.environ, "PYTHON": sys.executable, "NANOFINETUNE_LAUNCH_ENV": "/nonexistent"}
    process = subprocess.Popen(
        ["bash", str(LAUNCH), "-n", "2"], env={**variables, **_script(tmp_path, text)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in range(2)]


def _gone(pid: int, seconds: float) -> bool:
    """Has this process ended within so many seconds (a zombie has)?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if re.search(r"State:\s+Z", Path(f"/proc/{pid}/status").read_text()):
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_rank_outlives_its_launcher(tmp_path: Path) -> None:
    process, ranks = _start(tmp_path, "import os, time\nprint(f'{os.getpid()}\\n', end='')\ntime.sleep(100)\n")
    try:
        process.kill()  # not even torchrun can tell its workers then
        process.wait(10)
        assert all(_gone(rank, 10) for rank in ranks)
    finally:
        for rank in ranks:
            if not _gone(rank, 0.1):
                os.kill(rank, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_sigterm_reaches_the_ranks_and_is_the_exit_code(tmp_path: Path) -> None:
    text = (
        "import os, signal, sys, time\n"
        "def save(*_):\n    print('saved\\n', end='')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print(f'{os.getpid()}\\n', end='')\ntime.sleep(100)\n"
    )
    process, _ = _start(tmp_path, text)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "saved\nsaved\n")
    assert "Traceback" not in err
