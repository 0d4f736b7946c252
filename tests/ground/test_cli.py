"""The command line: what its types take, how a command ends, and which options train.py has.

    python -m pytest tests/ground/test_cli.py

The last test shows transformers 5.23's own command line taking a learning rate of -1.
"""

import argparse
import math
import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
from conftest import ROOT, load_script

from nanofinetune.ground.cli import Parser, number, run_main, steps_or_ratio
from nanofinetune.ground.errors import UsageError

# Every option of train.py and what it is where nobody gives it. A line here is a promise to everyone's scripts.
COMMAND_LINE = {
    "--model": None,
    "--data": None,
    "--max-length": None,
    "--text-columns": None,
    "--label-column": None,
    "--task": "auto",
    "--drop-unlabelled": False,
    "--separator": None,
    "--encoding": None,
    "--class-weights": None,
    "--keep-best": None,
    "--patience": None,
    "--epochs": 3,
    "--max-steps": None,
    "--batch-size": 8,
    "--eval-batch-size": 32,
    "--accumulate": 1,
    "--group-by-length": False,
    "--lr": 5e-5,
    "--weight-decay": 0.0,
    "--warmup-steps": 0,
    "--schedule": "linear",
    "--clip-norm": None,
    "--device": "auto",
    "--precision": "no",
    "--seed": 42,
    "--fast-dropout": False,
    "--uneven": "mask",
    "--output": None,
    "--save-every": None,
    "--keep": 2,
    "--resume": None,
    "--dry-run": False,
    "--on-nan": "stop",
    "--timeout": 300.0,
}


@pytest.fixture(scope="module")
def train():
    """train.py, which is no part of the package, as a module."""
    return load_script(ROOT / "train.py")


def test_the_command_line_is_frozen(train, monkeypatch, capsys):
    defaults = vars(train.parse_arguments([]))
    assert {f"--{name.replace('_', '-')}": value for name, value in defaults.items()} == COMMAND_LINE
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        train.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert set(re.findall(r"^ +(--[a-z-]+)", shown, re.MULTILINE)) == set(COMMAND_LINE)
    for option, value in COMMAND_LINE.items():  # what --help says of a default is the default
        if value is not None and value is not False:
            said = re.search(rf"^ +{option} .*?default ([^ )]+)", shown, re.MULTILINE | re.DOTALL)
            assert said and type(value)(said[1]) == value, option


def test_the_choices_are_frozen(train):
    schedules = ("linear", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "polynomial")
    several = {
        "--precision": ("no", "bf16", "fp16"), "--uneven": ("mask", "wrap"), "--on-nan": ("stop", "skip"),
        "--task": ("auto", "single", "multi", "regression"),
        "--schedule": (*schedules, "inverse_sqrt"),
    }  # fmt: skip
    for option, choices in several.items():
        for choice in choices:
            assert choice in vars(train.parse_arguments([option, choice])).values()
        with pytest.raises(UsageError, match=f"{option}: invalid choice"):
            train.parse_arguments([option, "another"])


INTEGER = [
    ("1", 1), ("42", 42), ("+7", 7), ("9223372036854775807", 2**63 - 1),
    ("0", None), ("-1", None), ("1.0", None), ("1e3", None), ("nan", None), ("inf", None), ("", None), ("one", None),
]  # fmt: skip
RATE = [
    ("5e-5", 5e-5), ("1", 1.0), ("0.1", 0.1), ("1e-300", 1e-300),
    ("0", None), ("-0.0", None), ("-1", None), ("nan", None), ("inf", None), ("-inf", None), ("1e400", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "above", "text", "value"),
    [(int, False, *case) for case in INTEGER] + [(float, True, *case) for case in RATE],
)
def test_number_takes_what_is_in_range(kind, above, text, value):
    parse = number(kind, 0 if above else 1, above=above)
    if value is not None:
        assert parse(text) == value and type(parse(text)) is kind
        return
    what = "a number above 0" if above else "a whole number from 1"
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"{text} is not {what}") + "$"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "fits"), [("0", True), ("0.5", True), ("1", True), ("1.0001", False), ("-0.1", False)]
)
def test_number_has_an_upper_bound(text, fits):
    parse = number(float, 0, 1)
    if fits:
        assert parse(text) == float(text)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not a number from 0 to 1$"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("0.0", 0), ("0.1", 0.1), ("0.999", 0.999), ("1", 1), ("1.0", 1), ("100", 100), ("1e2", 100)],
)
def test_steps_or_ratio_is_whole_from_one_on(text, value):
    assert steps_or_ratio(text) == value and type(steps_or_ratio(text)) is type(value)


@pytest.mark.parametrize("text", ["1.5", "-1", "-0.1", "nan", "inf", "1e400", "ten", ""])
def test_steps_or_ratio_refuses_the_rest(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{re.escape(text)} is (neither|not)"):
        steps_or_ratio(text)


def test_parser_takes_no_abbreviations_and_raises_usage_errors():
    """argparse takes any beginning of an option that is unique, and ends the process in its own way."""
    plain, ours = argparse.ArgumentParser(), Parser("name", None)
    for parser in (plain, ours):
        parser.add_argument("--batch-size", type=number(int, 1), default=8)
    assert plain.parse_args(["--batch", "4"]).batch_size == 4
    with pytest.raises(UsageError, match=r"unrecognized arguments: --batch 4 \(--help lists the options\)"):
        ours.parse_args(["--batch", "4"])
    with pytest.raises(UsageError, match=r"^--batch-size: 0 is not a whole number from 1 \(--help"):
        ours.parse_args(["--batch-size", "0"])
    assert ours.parse_args(["--batch-size", "4"]).batch_size == 4


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (None, 0, ""),
        (UsageError("--lr is -1: choose more"), 2, "name: --lr is -1: choose more\n"),
        (UsageError("--data a\nb: not there"), 2, "name: --data a b: not there\n"),
        (KeyboardInterrupt(), 130, "name: interrupted\n"),
    ],
)
def test_run_gives_the_exit_code_and_one_line(raised, code, shown, capsys):
    def main() -> None:
        if raised is not None:
            raise raised

    assert run_main("name", main) == code
    assert capsys.readouterr() == ("", shown)


@pytest.mark.parametrize(
    ("variables", "silent"),
    [
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": "1"}, False),  # no launcher says this: it is what the line is about
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": ""}, False),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "9" * 5000}, True),
    ],
)
def test_a_rank_is_silent_only_where_another_one_speaks(variables, silent, monkeypatch, capsys):
    """A wrong LOCAL_RANK alone made every mistake silent: exit code 2, and nothing on the screen."""

    def main() -> None:
        raise UsageError("--lr is -1: choose more")

    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_main("name", main) == 2
    assert capsys.readouterr().err == ("" if silent else "name: --lr is -1: choose more\n")


NINES = "9" * 18


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--timeout 1e300", "--timeout: 1e300 is not a number from 1 to 1000000"),
        ("--timeout inf", "--timeout: inf is not a number from 1 to 1000000"),
        ("--timeout nan", "--timeout: nan is not a number from 1 to 1000000"),
        (
            "--batch-size 100000000000000000000",
            "--batch-size: 1" + "0" * 20 + " is not a whole number from 1 to 2147483648",
        ),
        ("--batch-size " + "9" * 5000, f"--batch-size: {NINES}...{NINES} is not a whole number from 1 to 2147483648"),
        ("--accumulate 2147483649", "--accumulate: 2147483649 is not a whole number from 1 to 2147483648"),
        ("--epochs 1e9", "--epochs: 1e9 is not a whole number from 1 to 2147483648"),
        ("--keep inf", "--keep: inf is not a whole number from 1 to 2147483648"),
        ("--warmup-steps 1e300", "--warmup-steps: 1e300 is not a number from 0 to 2147483648"),
        ("--weight-decay 1e400", "--weight-decay: 1e400 is not a number from 0"),
        ("--clip-norm -inf", "--clip-norm: -inf is not a number above 0"),
        (
            "--seed 9223372036854775808",
            "--seed: 9223372036854775808 is not a whole number from 0 to 9223372036854775807",
        ),
    ],
)
def test_numbers_that_nothing_can_hold_are_one_line(train, arguments, line):
    with pytest.raises(UsageError, match="^" + re.escape(f"{line} (--help lists the options)") + "$"):
        train.parse_arguments([arguments.split(" ")[0] + "=" + arguments.split(" ")[1]])


def test_the_longest_time_out_is_one_that_the_store_waits(train):
    """poll(2), under torch's store, counts milliseconds in 32 bits."""
    args = train.parse_arguments(["--timeout", "1e6"])
    assert timedelta(seconds=args.timeout) // timedelta(milliseconds=1) < 2**31


def test_run_lets_our_own_faults_keep_their_traceback():
    def main() -> None:
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        run_main("name", main)


@pytest.mark.parametrize("rows", [3, pytest.param(100_000, marks=pytest.mark.slow)])
def test_run_ends_with_141_where_head_has_left(rows):
    """A real pipe into `head -1`. The 3 later lines fit into the buffer: it is the last flush that fails."""
    program = f"""
import sys
from nanofinetune.ground.cli import run_main

def main():
    print("first", flush=True)
    sys.stdin.readline()  # head is gone by now
    for row in range({rows}):
        print(row)

sys.exit(run_main("name", main))
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdin and writer.stdout and writer.stderr
    head = subprocess.run(["head", "-1"], stdin=writer.stdout, capture_output=True, timeout=60)
    writer.stdout.close()
    writer.stdin.write(b"\n")
    writer.stdin.close()
    complaint = writer.stderr.read()
    writer.stderr.close()
    assert (head.stdout, complaint, writer.wait(timeout=60)) == (b"first\n", b"", 141)


STREAMS = {  # what a shell can do with a program's streams -> what is left to read on stderr
    "{} | true": "note: stdout cannot be written (Broken pipe); the work goes on without\n",
    "{} >&-": "",
    "{} >/dev/full": "note: stdout cannot be written (No space left on device); the work goes on without\n",
    "{} 2>&1 | true": "",
    "{} >&- 2>&-": "",
    "{} 2>&-": "",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the shell and /dev/full of Linux")
@pytest.mark.parametrize(
    "shell", [s if s in ("{} | true", "{} >&-") else pytest.param(s, marks=pytest.mark.slow) for s in STREAMS]
)
def test_work_outlives_whoever_reads_its_output(shell, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys, time
from pathlib import Path
from nanofinetune.ground.cli import outliving_readers, run_main
from tqdm import tqdm

@outliving_readers()
def main():
    time.sleep(0.3)  # the reader is gone by now
    for _ in range(3):
        print("to stdout", flush=True)
        tqdm.write("through tqdm", file=sys.stdout)
        for _ in tqdm(range(2), file=sys.stderr, disable=None):
            pass
    with open({str(tmp_path / "file")!r}, "w") as file:
        print("x" * 10000)
        file.write("whole")

code = run_main("name", main)
Path({str(tmp_path / "code")!r}).write_text(str(code))
sys.exit(code)
""")
    command = f"{sys.executable} {program}"
    done = subprocess.run(
        ["bash", "-c", f"({shell.format(command)}; exit ${{PIPESTATUS[0]}})"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, STREAMS[shell])
    assert (tmp_path / "code").read_text() == "0"
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # TrainingArguments' own, by version
def test_hf_argument_parser_takes_a_learning_rate_of_minus_one(tmp_path):
    """A hundred options, and the value is not looked at: with it, the loss is driven up."""
    pytest.importorskip("accelerate", reason="transformers.TrainingArguments needs accelerate")
    from transformers import HfArgumentParser, TrainingArguments

    argv = ["--output_dir", str(tmp_path), "--learning_rate", "-1", "--use_cpu", "true"]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv)
    assert arguments.learning_rate == -1
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*argv[:3], "nan", *argv[4:]])
    assert math.isnan(arguments.learning_rate)
    assert len(vars(arguments)) > 100
    with pytest.raises(argparse.ArgumentTypeError, match="-1 is not a number above 0"):
        number(float, 0, above=True)("-1")
