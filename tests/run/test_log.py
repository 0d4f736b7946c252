"""metrics.jsonl when a run is resumed: our lines of later updates go, and all others stay, whatever they are.

    python -m pytest tests/run/test_log.py

The reference is the same rule, written over a list of lines.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager

import pytest
from conftest import ROOT

from nanofinetune.accelerator import Accelerator
from nanofinetune.run.log import LONGEST, Log, cut_back, first_step


def ours(update):
    return json.dumps({"step": update, "epoch": 1, "lr": 0.1, "loss": 0.5, "rows": 8}).encode() + b"\n"


STRANGERS = {
    "blank": b"\n",
    "text": b"a note of mine\n",
    "binary": b"\x00\xff\xfe\x80\n",
    "another JSON": b'{"loss": 1}\n',
    "a list": b"[1, 2]\n",
    "a step that is no number": b'{"step": "3"}\n',
    "a step that is a fraction": b'{"step": 3.5}\n',
    "deep brackets": b'{"step": ' + b"[" * 50_000 + b"\n",
    "a step of many digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "half of one of ours": b'{"step": 3, "epo\n',
    "a long line": b"x" * (3 * LONGEST) + b"\n",
    "a long line that ends like ours": b"x" * LONGEST + ours(9),
    "carriage returns": b"a\r\nb\rc\r\n",
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_lines_of_others_stay_and_our_later_ones_go(kind):
    stranger = STRANGERS[kind]
    file = io.BytesIO(
        stranger + ours(1) + stranger + ours(2) + ours(3) + stranger + ours(4) + ours(2) + stranger + ours(5)
    )
    assert cut_back(file, 2) == 4 * stranger.count(b"\n")
    assert file.getvalue() == stranger + ours(1) + stranger + ours(2) + stranger + ours(2) + stranger


@pytest.mark.parametrize("cut", range(len(ours(3))))
def test_a_line_that_a_kill_has_torn_goes(cut):
    file = io.BytesIO(ours(1) + ours(2) + ours(3)[:cut])
    assert cut_back(file, 9) == 0
    assert file.getvalue() == ours(1) + ours(2)


def test_our_next_line_begins_a_line():
    file = io.BytesIO(ours(1) + b"a note without an end")
    assert cut_back(file, 9) == 1
    assert file.getvalue() == ours(1) + b"a note without an end\n"


def test_a_huge_line_takes_little_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(ours(1))
        file.truncate(2**26)  # zeros without an end
    with path.open("r+b") as file:
        tracemalloc.start()
        assert cut_back(file, 1) == 1
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
    assert path.stat().st_size == 2**26 + 1


def test_a_log_says_what_stays(tmp_path, capsys):
    accelerator = Accelerator(cpu=True)
    log = Log(tmp_path, 4, accelerator, {})
    log.update = 1
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ours(1) + b"\n\xff\n" + ours(2))
    with log:
        log._write(ours(2).decode())
    log.close()
    assert path.read_bytes() == ours(1) + b"\n\xff\n" + ours(2)
    assert capsys.readouterr().err == f"note: {path}: 2 lines in it not of this run's making: kept\n"


# ---- a disk that is full for a while ----


@contextmanager
def full_after(size):
    """A `with` block in which no file of this process grows beyond so many bytes: the kernel takes what fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, capsys):
    """The blocks are larger than any buffer, and the first is written up to the middle of a line."""
    log, path = Log(tmp_path, 999, Accelerator(cpu=True), {}), tmp_path / "metrics.jsonl"
    blocks = [b"".join(map(ours, range(k, k + 300))).decode() for k in range(1, 900, 300)]
    with log:
        with full_after(len(blocks[0]) // 2 + 7):
            log._write(blocks[0])
            log._write(blocks[1])
            assert path.stat().st_size == len(blocks[0]) // 2 + 7
        log._write(blocks[2])
        assert path.read_text() == "".join(blocks)
    log.close()
    assert capsys.readouterr().err.count("cannot be written (File too large); the training goes on without") == 1


def test_lines_that_never_find_room_are_counted(tmp_path, capsys):
    log = Log(tmp_path, 9, Accelerator(cpu=True), {})
    with full_after(7), log:
        log._write((ours(1) + ours(2)).decode())
        log._write(ours(3).decode())
    log.close()
    told = f"note: {tmp_path}/metrics.jsonl lacks its last 3 lines: there was no room for them"
    assert told in capsys.readouterr().err
    with (tmp_path / "metrics.jsonl").open("r+b") as file:  # the torn one goes at the next start
        assert cut_back(file, 9) == 0 and file.seek(0, os.SEEK_END) == 0


def test_the_first_update_of_a_log_is_that_of_our_first_line():
    for stranger in STRANGERS.values():
        assert first_step(io.BytesIO(stranger + ours(7) + ours(8))) == 7
    assert first_step(io.BytesIO(b"text\n")) is None and first_step(io.BytesIO()) is None


# ---- what reads the output may leave ----


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["the reader", pytest.param("stdout itself", marks=pytest.mark.slow)])
def test_a_run_whose_output_nobody_reads_trains_to_its_end(gone, tiny_model, pairs, tmp_path):
    """`train.py | head -1`, `train.py >&-`: in a real process, whose plan, scores and result cannot be printed."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments, "--device", "cpu"], cwd=ROOT, timeout=120, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=writer,
        preexec_fn=(lambda: os.close(1)) if gone == "stdout itself" else None,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 2
    notes = [line for line in done.stderr.splitlines() if "stdout" in line]
    expected = ["note: stdout cannot be written (Broken pipe); the work goes on without"]
    assert notes == (expected if gone == "the reader" else []), done.stderr
    assert "Traceback" not in done.stderr
