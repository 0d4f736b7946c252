"""How far a long work is: bars on terminals of several widths, and lines in a log file.

python -m pytest tests/ground/test_progress.py
"""

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios

import pytest

from nanofinetune.ground import progress as module
from nanofinetune.ground.progress import Progress, Speed, for_screen


@pytest.fixture
def terminal():
    """A real terminal of a width -> (a stream that writes to it, a function that reads what was written)."""
    opened = []

    def make(columns):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        stream = open(theirs, "w", newline="")  # noqa: SIM115 (closed below)
        opened.append((ours, stream))

        def written():
            stream.flush()
            text = b""
            while select.select([ours], [], [], 0.1)[0]:
                text += os.read(ours, 2**20)
            return text.decode()

        return stream, written

    yield make
    for ours, stream in opened:
        stream.close()
        os.close(ours)


@pytest.fixture
def seconds(monkeypatch):
    """A clock that only the test moves: seconds[0]."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_bar_fits_its_terminal(columns, terminal):
    """At 80 columns with a bar of ten characters or more; the last column stays empty, where some terminals wrap."""
    stream, written = terminal(columns)
    with Progress(137_700, "epoch 10/10", leave=True, stream=stream) as progress:
        progress.bar.mininterval = 0.0
        for _ in range(3):
            assert progress.add(45_000)
            progress.show("1234.5 ex/s loss 0.690 lr 3.1e-05 12:34:56 left")
    states = [state for state in re.split(r"[\r\n]+", written()) if state.strip()]
    assert len(states) >= 4 and max(map(len, states)) < min(columns, module.WIDE + 1)
    if columns >= 80:
        assert re.search(
            r"epoch 10/10 \|#+ *\| 135000/137700 1234.5 ex/s loss 0.690 lr 3.1e-05 12:34:56 left", states[-1]
        )
    if columns == 120:
        assert len(re.findall(r"\|([# ]+)\|", states[-1])[0]) >= 10


def test_a_terminal_that_becomes_narrow_gets_a_narrow_bar(terminal):
    stream, written = terminal(100)
    with Progress(10, "reading", stream=stream) as progress:
        progress.bar.mininterval = 0.0
        progress.add()
        written()
        fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        progress.add()
        progress.show("at a walk")
        assert max(len(state) for state in written().split("\r")) == 99  # what was there is wiped out once
        progress.add()
        progress.show("at a walk")
        assert max(len(state) for state in written().split("\r")) < 50


def test_a_log_file_gets_lines_in_time(seconds):
    """Every half minute, also where the next step would end after it; no carriage return."""
    log, shown = io.StringIO(), []
    with Progress(1000, "epoch 1/3", stream=log) as progress:
        for _ in range(20):
            seconds[0] += 7.0
            if progress.add():
                progress.show("0.1 ex/s")
                shown.append(seconds[0])
    assert shown == [28.0, 56.0, 84.0, 112.0, 140.0]
    assert log.getvalue().splitlines()[:2] == ["epoch 1/3 4/1000 0.1 ex/s", "epoch 1/3 8/1000 0.1 ex/s"]
    assert "\r" not in log.getvalue()


def test_what_is_over_at_once_leaves_nothing(terminal):
    stream, written = terminal(80)
    with Progress(10, "tokenizing", delay=1.0, stream=stream) as progress:
        for _ in range(10):
            if progress.add():
                progress.show()
    stream.write("next")
    assert written() == "next"
    log = io.StringIO()
    with Progress(1, "tokenizing", stream=log) as progress:
        assert not progress.add()
    assert log.getvalue() == ""


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_other_ranks_show_nothing(variable, terminal, monkeypatch):
    monkeypatch.setenv(variable, "1")
    stream, written = terminal(80)
    for each in (stream, io.StringIO()):
        with Progress(10, "tokenizing", stream=each, every=0) as progress:
            assert not progress.add()
            progress.show()
    stream.write("next")
    assert written() == "next"


def test_speed_is_that_of_the_last_seconds_and_right_from_the_first():
    speed = Speed()
    speed.add(0, now=100.0)
    assert speed.now == 0.0
    speed.add(8, now=100.5)
    assert speed.now == 16.0
    for second in range(101, 131):  # it has become slow
        speed.add(2, now=float(second))
    assert speed.now == 2.0
    speed.pause()
    speed.add(0, now=500.0)  # an evaluation has passed
    speed.add(30, now=501.0)
    assert speed.now == 30.0


def test_a_note_is_wrapped_for_a_terminal_alone(terminal):
    stream, _ = terminal(30)
    note = "note: " + "a few words " * 5
    assert for_screen(note, io.StringIO()) == note
    lines = for_screen(note, stream).splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 30 and all(line.startswith("      ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == note.strip()
