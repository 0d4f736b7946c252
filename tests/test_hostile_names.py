"""A name that moves the cursor, clears the screen and ends a line, walked through every program.

Run: python -m pytest tests/test_hostile_names.py

There is no reference: torchrun, accelerate and datasets print such names as they are. Tests of single messages are
beside their modules; here each program meets the name wherever a stranger can put one.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from nanofinetune import exercise, predict
from nanofinetune.ground.cli import run_main
from nanofinetune.ground.environment import read_environment
from nanofinetune.ground.errors import UsageError, shown_lines
from nanofinetune.launch.config import configure
from nanofinetune.trace import __main__ as trace
from nanofinetune.trace.observe import Event

EVIL = "e\x1b[2Jv\x9b1mi\rl\x07\u202e"
posix = pytest.mark.skipif(os.name != "posix", reason="such names are not possible elsewhere")


def assert_text(*outputs: str) -> None:
    for output in outputs:
        for line in output.split("\n"):
            assert line.isprintable(), line


@pytest.fixture
def evil(tmp_path, tiny_model) -> Path:
    """A folder of that name, with a model and data of that name in it."""
    folder = tmp_path / EVIL
    shutil.copytree(tiny_model, folder / EVIL)
    config = json.loads((folder / EVIL / "config.json").read_text())
    names = {"id2label": {0: EVIL, 1: "b"}, "label2id": {EVIL: 0, "b": 1}, "text_columns": [EVIL]}
    (folder / EVIL / "config.json").write_text(json.dumps(config | names))
    rows = [{EVIL: f"the cat {i}", "label": (EVIL, "b")[i % 2]} for i in range(20)]
    (folder / f"{EVIL}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@posix
def test_train_py_prints_names_as_text(evil, monkeypatch, capfd):
    """A run, then one that goes on over a damaged checkpoint, a foreign line in its log and a save that is refused."""
    train = load_script(ROOT / "train.py")
    output = evil / "out"

    def run(*options: str) -> int:
        argv = ["--model", evil / EVIL, "--data", evil / f"{EVIL}.jsonl", "--text-columns", EVIL, "--device", "cpu"]
        argv += [
            "--label-column",
            "label",
            "--max-steps",
            3,
            "--save-every",
            1,
            "--keep",
            9,
            "--output",
            output,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        return run_main("train.py", train.main)

    assert run() == 0
    (output / "result.json").unlink()
    for update in (2, 3):
        (output / "checkpoints" / f"update-0000000{update}" / EVIL).touch()
    with (output / "metrics.jsonl").open("a") as log:
        log.write(f"{EVIL}\n")
    out, err = capfd.readouterr()
    assert_text(out, err)
    assert run("--resume", "auto") == 0
    out, err = capfd.readouterr()
    assert_text(out, err)
    escaped = re.escape(r"e\x1b[2Jv\x9b1mi\rl\x07\u202e")
    assert re.search(rf"passed over update-00000003: {escaped} does not belong to it", out)
    assert re.search(rf"{escaped}\S*: 1 line in it not of this run's making", err)
    assert re.search(rf"{escaped}/out/checkpoints/update-00000002 was not saved", err)
    for options in (
        ["--data", EVIL],
        ["--model", EVIL],
        ["--resume", EVIL],
        ["--device", EVIL],
        ["--text-columns", EVIL * 9],
    ):
        assert run(*options) == 2
    out, err = capfd.readouterr()
    assert_text(out, err)
    assert err.count("\n") == 5


@posix
def test_predict_prints_names_as_text_and_what_it_labels_so_on_a_terminal(evil, monkeypatch, capsys):
    (evil / f"{EVIL}.txt").write_text("the cat \x1b[2J\na dog\n")
    (evil / "latin1").write_bytes(b"\xe9\n")
    (evil / "two").write_text("a\tb\n")
    for words, code in (([f"{EVIL}.txt"], 0), ([EVIL], 2), (["latin1"], 2), (["two"], 2)):
        monkeypatch.setattr(sys, "argv", ["predict", str(evil / EVIL), str(evil / words[0])])
        assert run_main("predict", predict.main) == code
        out, err = capsys.readouterr()
        assert_text(err)
        assert [line.split("\t")[2:] for line in out.splitlines()] == (
            [["the cat \x1b[2J"], ["a dog"]] if code == 0 else []
        )

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "argv", ["predict", str(evil / EVIL), str(evil / f"{EVIL}.txt")])
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_main("predict", predict.main) == 0
    assert_text(terminal.getvalue().replace("\t", ""))
    assert terminal.getvalue().splitlines()[0].endswith("the cat \\x1b[2J")


@posix
def test_exercise_prints_names_as_text(tmp_path, monkeypatch, capsys):
    for words, code in (
        (["schedule", "--to", str(tmp_path / EVIL)], 0),
        (["schedule", "--to", str(tmp_path / EVIL)], 2),
        (["schedule", "--check", str(tmp_path / EVIL / EVIL)], 2),
        ([EVIL], 2),
        (["schedule", "--to", ""], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["exercise", *words])
        assert run_main("exercise", exercise.main) == code
        assert_text(*capsys.readouterr())


@posix
def test_trace_prints_names_as_text_and_finds_its_files_folders_first(tmp_path, monkeypatch, capsys):
    world = Event("world", 0, 1, "rank 0 of 1, None, cpu, 2 threads", "")
    rows = Event("collate", 1, 2, f"8 rows of {EVIL}", "")
    update = [Event("forward", 2, 3, EVIL, EVIL), Event("optimizer", 3, 4, f"{EVIL} tensors, 4 numbers, 9 bytes", "")]
    started = []

    def traced(*arguments: object) -> list[list[Event]]:
        started.append(arguments)
        return [[world, rows, *update, Event("zero_grad", 4, 5, "", "")]]

    monkeypatch.setattr(trace, "traced", traced)
    (tmp_path / EVIL).mkdir()
    for picture, code in (
        (tmp_path / EVIL / f"{EVIL}.svg", 0),
        (tmp_path / "no" / EVIL, 2),
        ("", 2),
        (tmp_path / EVIL, 2),
    ):
        monkeypatch.setattr(sys, "argv", ["trace", "--picture", str(picture)])
        assert run_main("trace", trace.main) == code, capsys.readouterr()
        assert_text(*capsys.readouterr())
    assert len(started) == 1, "what cannot be written is found before the training"


@posix
def test_config_prints_names_as_text(tmp_path, monkeypatch, capsys):
    (tmp_path / EVIL).mkdir()
    file = tmp_path / EVIL / f"{EVIL}.env"
    for answers in (f"1\n{EVIL}\ncpu\n\n\n\n\n", "maybe\nno\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
        configure(file)
    with pytest.raises(UsageError) as failure:
        monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" + "\n" * 9))
        configure(tmp_path / EVIL)  # a folder
    assert_text(*capsys.readouterr(), str(failure.value))


LAUNCH = [
    ({}, ["-n", EVIL]), ({}, ["--max-restarts", EVIL]), ({"PYTHON": EVIL}, []), ({"NANOFINETUNE_SCRIPT": EVIL}, []),
    ({"NNODES": "2", "MASTER_ADDR": EVIL, "NODE_RANK": "0"}, []), ({"NNODES": EVIL}, []), ({"LOCAL_RANK": EVIL}, []),
    ({"MASTER_PORT": EVIL}, []), ({"OMP_NUM_THREADS": EVIL, "SLURM_NTASKS": EVIL}, []),
]  # fmt: skip


@posix
@pytest.mark.parametrize(("environment", "words"), LAUNCH, ids=lambda value: ascii(value)[:30])
def test_launch_sh_prints_names_as_text(environment, words):
    variables = {**os.environ, "PYTHON": sys.executable, "LC_ALL": "C.UTF-8", **environment}
    done = subprocess.run(
        [str(ROOT / "launch.sh"), *words, "--print"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert_text(done.stdout, done.stderr)


@posix
def test_launch_sh_prints_its_command_as_text():
    variables = {**os.environ, "PYTHON": sys.executable, "LC_ALL": "C.UTF-8"}
    command = [str(ROOT / "launch.sh"), "--print", "--", "--data", EVIL]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert_text(done.stdout, done.stderr)


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"]
)
def test_variables_are_printed_as_text(name):
    whole = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_PORT": "1",
    }
    if name not in whole:
        whole = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    with pytest.raises(UsageError) as failure:
        read_environment({**whole, "MASTER_ADDR": "a", name: EVIL})
    assert_text(str(failure.value))


@pytest.mark.slow
def test_a_fault_of_ours_is_printed_as_text_where_python_prints_the_name(tmp_path):
    """In one process by its hook for uncaught exceptions, in a rank by what the launcher is told."""
    raising = f"raise RuntimeError({EVIL!r})"
    plain = subprocess.run([sys.executable, "-c", raising], capture_output=True, text=True, timeout=60, check=False)
    assert "\x1b[2J" in plain.stderr
    program = f"from nanofinetune.ground.cli import run_main\ndef main():\n    {raising}\nrun_main('x', main)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "RuntimeError: e\\x1b[2J" in done.stderr
    assert_text(done.stderr)
    assert shown_lines(plain.stderr).replace("\\r", "").replace("\\x07", "").count("\n") == plain.stderr.count("\n")

    script = tmp_path / "script.py"
    script.write_text(raising)
    ranks = {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    environment = os.environ | ranks | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error"), "PYTHONPATH": str(ROOT)}
    rank = subprocess.run(
        [sys.executable, "-m", "nanofinetune.launch", "work", str(script)], env=environment, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    record = json.loads((tmp_path / "error").read_text())["message"]
    assert rank.returncode == 1 and "RuntimeError: e\\x1b[2J" in record["message"]
    assert_text(rank.stderr, record["message"], record["extraInfo"]["text"])


@posix
def test_gpu_sh_prints_names_as_text():
    for words, code in (([EVIL], 2), (["--data", EVIL], 0)):
        command = ["sh", str(ROOT / "bench" / "gpu.sh"), "--print", *words]
        variables = {**os.environ, "PYTHON": "true"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 2) == (code == 2)
        assert_text(done.stdout, done.stderr)
