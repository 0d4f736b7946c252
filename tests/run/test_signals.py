"""Signals are noted while a call waits in C, and a second one ends the process; Python's own handlers would wait.

OMP_NUM_THREADS=1 python -m pytest tests/run/test_signals.py
"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from nanofinetune.run.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_noted(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)  # torchrun hands a Ctrl-C on: the same one again, at once
        time.sleep(0.1)
        assert (stop.number, stop.exit_code) == (number, 128 + number)
    assert signal.getsignal(number) is before
    name = signal.Signals(number).name
    assert f"{name}: stopping after this update; once more to stop now" in capfd.readouterr().err


def test_slurm_warns_with_sigusr1(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.exit_code == 128 + signal.SIGUSR1


def test_nohup_stays_in_force():
    """`nohup` starts a process that ignores SIGHUP, so that it outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_counts_where_its_terminal_is_gone(monkeypatch):
    """The thread that reads the signals must survive a write to a terminal that is no more."""
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    for gone in (None, closed):
        with monkeypatch.context() as patch, StopSignals() as stop:
            patch.setattr("sys.stderr", gone)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            reader = [thread for thread in threading.enumerate() if getattr(thread, "_target", None) == stop._read]
            assert stop.exit_code == 129 and len(reader) == 1 and reader[0].is_alive()


def test_another_thread_has_no_handlers():
    found = []

    def enter():
        with StopSignals() as stop:
            found.append(stop.number)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0]


DEAF = """
import time, ctypes
from nanofinetune.run.signals import StopSignals
with StopSignals():
    print("ready", flush=True)
    sleep = ctypes.PyDLL(None).usleep  # keeps the interpreter: no Python signal handler runs
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ctypes.CDLL(None).pause()  # waits in C as a collective does
"""


def test_signals_are_noted_and_the_second_one_ends():
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "SIGTERM again: stopped at once" in err
