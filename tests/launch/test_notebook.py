"""notebook_launcher in a real notebook kernel, compared with accelerate.notebook_launcher (accelerate 1.15).

The ranks are real gloo ranks that a fork of the kernel starts; each run has a time limit: what may go wrong here hangs.

    python -m pytest tests/launch/test_notebook.py            (-m slow for the hang of accelerate's own launcher)
"""

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

from nanofinetune.launch.job import free_port
from nanofinetune.launch.notebook import CUDA_IN_USE, notebook_launcher

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a notebook's ranks are forks of its kernel"
)


# ---- in a kernel -----------------------------------------------------------------------------------------------------

THREADS = """
import torch
torch.set_num_threads(2)
x = torch.randn(512, 512, requires_grad=True)
(x @ x).sum().backward()   # both threads have worked now: a fork has only one of them
"""
DEFINE = """
def training_function(greeting):
    from nanofinetune import Accelerator
    accelerator = Accelerator()
    x = torch.randn(512, 512, requires_grad=True)
    (x @ x).sum().backward()
    total = accelerator.reduce(torch.tensor([accelerator.process_index + 1.0]), "sum").item()
    place = f"rank {accelerator.process_index}/{accelerator.num_processes}"
    print(f"{greeting} {place} sum {total} {accelerator.mixed_precision} {torch.get_num_threads()} threads\\n", end="")
    accelerator.end_training()
"""
LAUNCH = """
from nanofinetune import notebook_launcher
print(notebook_launcher(training_function, args=("hello",), num_processes=2, mixed_precision="bf16"))
"""
FAIL = """
def failing():
    from nanofinetune.ranks.world import init_world
    world = init_world("cpu")
    if world.rank == 1:
        raise LookupError("the cause")
    torch.distributed.all_reduce(torch.ones(1))

notebook_launcher(failing, num_processes=2)
"""
INTERRUPT = """
import multiprocessing, os, signal, threading, time
threading.Timer(1, os.killpg, (os.getpgrp(), signal.SIGINT)).start()   # what the stop button does
try:
    notebook_launcher(time.sleep, args=(100,), num_processes=2)
except KeyboardInterrupt:
    print("interrupted,", len(multiprocessing.active_children()), "left")
"""


@pytest.mark.slow
def test_two_ranks_after_the_notebook_used_threads() -> None:
    reason = "nbclient and ipykernel are optional extras: they run the notebook"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    cells = [nbformat.v4.new_code_cell(text) for text in (THREADS, DEFINE, LAUNCH, FAIL, INTERRUPT)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=90, allow_errors=True)
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    client.execute(env={**variables, "PYTHONPATH": str(ROOT)})

    *quiet, launched, failed, interrupted = notebook.cells
    assert [cell.outputs for cell in quiet] == [[], []]
    assert sorted(_text(launched).splitlines()) == [
        "None", *(f"hello rank {rank}/2 sum 3.0 bf16 1 threads" for rank in (0, 1)),
    ]  # fmt: skip
    error = failed.outputs[-1]
    assert (error.output_type, error.ename, error.evalue) == ("error", "LookupError", "the cause")
    shown = "\n".join(error.traceback)
    assert "rank 1 of 2 failed first:" in shown and 'raise LookupError("the cause")' in shown
    assert _text(interrupted) == "interrupted, 0 left\n"


def _text(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


# ---- in this process -------------------------------------------------------------------------------------------------


def _say_environment(folder: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "NANOFINETUNE_MIXED_PRECISION")
    text = " ".join(os.environ.get(name, "-") for name in names)
    (folder / os.environ.get("RANK", "alone")).write_text(f"{text} {torch.get_num_threads()}")


def test_ranks_have_torchruns_variables_and_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFINETUNE_MIXED_PRECISION", "fp16")  # the argument decides, and this one is as it was after
    assert notebook_launcher(_say_environment, (tmp_path,), num_processes=3, mixed_precision="BF16") is None  # type: ignore[func-returns-value]
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"{rank} {rank} 3 3 127.0.0.1 bf16 1"
    for precision in ("no", "bf16"):
        notebook_launcher(_say_environment, (tmp_path,), num_processes=1, mixed_precision=precision)
        assert (tmp_path / "alone").read_text() == f"- - - - - {precision} {torch.get_num_threads()}"
    assert os.environ["NANOFINETUNE_MIXED_PRECISION"] == "fp16"
    assert "RANK" not in os.environ


def test_one_process_is_the_default_without_gpus_and_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("NANOFINETUNE_MIXED_PRECISION", raising=False)
    where: list[int] = []
    notebook_launcher(lambda: where.append(os.getpid()))
    assert where == [os.getpid()] and "NANOFINETUNE_MIXED_PRECISION" not in os.environ


class _Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def _misbehave(how: str) -> None:
    if os.environ["RANK"] == "0" and how != "leave":
        time.sleep(0.2 if how == "late" else 100)
        raise RuntimeError("connection closed by peer")
    if how == "late":
        raise KeyError("the cause")
    if how == "unpicklable":
        raise _Unpicklable(1, 2)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("exit", "leave"):
        sys.exit(3 if how == "exit" else None)
    if how == "cuda":
        raise RuntimeError(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must ..."
        )


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("late", KeyError, "'the cause'"),
        ("unpicklable", RuntimeError, "1 and 2"),
        ("killed", RuntimeError, "rank 1 of 2 failed first:\n\nit ended with exit code -9 and no exception"),
        ("exit", SystemExit, "3"),
        ("cuda", RuntimeError, CUDA_IN_USE),
    ],
)
def test_first_failure_is_raised_and_the_others_end(how: str, kind: type[BaseException], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        notebook_launcher(_misbehave, args=(how,), num_processes=2)
    assert message in str(caught.value)
    assert time.monotonic() - began < 50  # the other rank sleeps for 100
    assert multiprocessing.active_children() == []
    if how in ("late", "cuda"):
        trace = str(caught.value.__cause__)
        assert trace.startswith("rank 1 of 2 failed first:\n\nTraceback (most recent call last):\n")
        assert 'test_notebook.py", line' in trace.splitlines()[3]  # nothing of ours above it


def test_leaving_early_is_no_failure() -> None:
    notebook_launcher(_misbehave, args=("leave",), num_processes=2)


def test_ranks_may_have_children_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    """A DataLoader with workers, which a daemon process may not start."""
    notebook_launcher(_load, num_processes=2)
    assert sorted(capfd.readouterr().out.split()) == ["6", "6"]


def _load() -> None:
    from torch.utils.data import DataLoader

    loader: DataLoader[int] = DataLoader([1, 2, 3], num_workers=1)  # type: ignore[arg-type]
    print(f"{sum(batch.item() for batch in loader)}\n", end="")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_nodes": 2}, NotImplementedError, "num_nodes=2: a notebook starts one node, once; launch.sh does more"),
        ({"max_restarts": 1}, NotImplementedError, "max_restarts=1: "),
        ({"rdzv_conf": {"rank": 0}}, NotImplementedError, "rdzv_conf={'rank': 0}: "),
        ({"log_line_prefix_template": "x"}, NotImplementedError, "log_line_prefix_template='x': "),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision='fp8': choose no, bf16, fp16"),
        ({"num_processes": 0}, ValueError, "num_processes=0: it must be at least 1, or None for one for each GPU"),
    ],
)
def test_what_is_not_supported_is_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        notebook_launcher(print, **{"num_processes": 2, **arguments})
    assert str(caught.value).startswith(message)


def test_a_notebook_that_has_used_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="restart the kernel"):
        notebook_launcher(print, num_processes=2)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def test_signature_matches_accelerate() -> None:
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is an optional extra: its signature is the reference"
    )
    theirs = inspect.signature(accelerate.notebook_launcher).parameters
    ours = inspect.signature(notebook_launcher).parameters
    assert list(ours) == list(theirs)
    differ = {name for name in ours if ours[name].default != theirs[name].default}
    assert differ == {"use_port"}  # a free one instead of 29500


def _python(text: str, tmp_path: Path, timeout: float) -> str:
    """stdout of a script of this text, in a session of its own, of which nothing is left after the time limit."""
    (tmp_path / "script.py").write_text(text)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], env=variables, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, err
    return out


PRECISION = """
import os
from {library} import Accelerator, notebook_launcher

def function():
    accelerator = Accelerator()
    place = f"{{os.environ.get('RANK', 0)}} of {{os.environ.get('WORLD_SIZE', 1)}}"
    print(f"{{place}}: {{accelerator.num_processes}} {{accelerator.mixed_precision}}\\n", end="")

notebook_launcher(function, num_processes={world}, mixed_precision="bf16", use_port="{port}")
"""


@pytest.mark.slow
def test_mixed_precision_reaches_the_ranks_where_accelerate_loses_it(tmp_path: Path) -> None:
    """Accelerate drops the bf16 that was asked for, and each of two ranks believes to be alone (1 process)."""
    pytest.importorskip("accelerate", reason="accelerate is an optional extra: it is what this shows")
    for world, said in ((2, "Launching training on 2 CUDAs."), (1, "Launching training on CPU.")):  # on a CPU, both
        port = free_port()
        ours = _python(PRECISION.format(library="nanofinetune", world=world, port=port), tmp_path, 90)
        assert sorted(ours.splitlines()) == [f"{rank} of {world}: {world} bf16" for rank in range(world)]
        theirs = _python(PRECISION.format(library="accelerate", world=world, port=port), tmp_path, 90)
        assert sorted(theirs.splitlines()[1:]) == [f"{rank} of {world}: 1 no" for rank in range(world)]
        assert theirs.splitlines()[0] == said


HANG = """
import torch
from {launcher}

def function():
    x = torch.randn(512, 512, requires_grad=True)
    (x @ x).sum().backward()

torch.set_num_threads(2)
function()
launcher(function, num_processes=2)
print("done")
"""


@pytest.mark.slow  # a hang takes as long as one waits
def test_accelerate_hangs_after_the_notebook_used_threads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is an optional extra: it is what this shows")
    ours = HANG.format(launcher="nanofinetune import notebook_launcher as launcher")
    began = time.monotonic()
    assert _python(ours, tmp_path, 120) == "done\n"
    patience = 20 + 3 * (time.monotonic() - began)
    for theirs in ("debug_launcher", "notebook_launcher"):
        with pytest.raises(subprocess.TimeoutExpired):
            _python(HANG.format(launcher=f"accelerate import {theirs} as launcher"), tmp_path, patience)
