"""What a run says at its beginning and its end, on a real terminal, to whoever reads stdout, and in a folder.

python -m pytest tests/run/test_result.py
"""

import ast
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script

train = load_script(ROOT / "train.py")
ROWS = ["the cat sat on the mat", "a small dog ran under the old tree and then it sat", "red", "blue cat"]


def on_terminal(command, columns=80, **environment):
    """Run a command whose stderr is a terminal -> (exit code, stdout, the lines that stay on the terminal)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, stdin=theirs, env=env | environment
    )
    os.close(theirs)
    written, out = b"", b""
    assert process.stdout is not None
    streams = [ours, process.stdout.fileno()]
    while streams:
        for stream in select.select(streams, [], [])[0]:
            try:
                piece = os.read(stream, 2**16)
            except OSError:  # how Linux says that a terminal has no writer left
                piece = b""
            if not piece:
                streams.remove(stream)
            elif stream == ours:
                written += piece
            else:
                out += piece
    os.close(ours)
    process.stdout.close()
    lines = [line.rpartition("\r")[2] for line in written.decode().replace("\r\n", "\n").split("\n")]
    return process.wait(), out.decode(), lines


@pytest.mark.slow
def test_a_terminal_shows_what_people_want_to_know(tiny_model, tmp_path):
    """First that something is going on; in the end the result, five rows, and a command that labels a text.

    What machines read is the last line of stdout.
    """
    for split, count in (("train", 20), ("validation", 9)):
        rows = [{"text": ROWS[i % 4], "label": ("bad", "good")[i % 2]} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "it's here"
    code, out, lines = on_terminal([
        sys.executable, "train.py", "--model", tiny_model, "--data", str(tmp_path), "--output", str(output), "--device",
        "cpu", "--max-steps", "4",
    ])  # fmt: skip
    assert code == 0, lines
    result = json.loads(out.splitlines()[-1])
    assert lines[0] == "loading torch and transformers ..."
    bar = next(line for line in lines if line.startswith("epoch 2/2 |"))
    assert re.fullmatch(r"epoch 2/2 \|#+\| 4/4 [\d.]+ ex/s loss \d\.\d{3} lr \d\.\de-05 0:00 left", bar)
    end = lines[next(i for i, line in enumerate(lines) if line.startswith("result ")) :]
    assert f"accuracy {result['accuracy']:.4f}" in end[0] and end[0].endswith("(9 rows)")
    assert re.fullmatch(r" {11}4 updates in \d:\d\d, [\d.]+ examples a second, [\d,]+ MiB of memory", end[1])
    table = end[3:13]
    assert all(re.match(r"row \d +label (good|bad), said (good|bad) \(\d\.\d\d\)", line) for line in table[::2])
    assert sum("wrong" in line for line in table) == min(2, round(9 * (1 - result["accuracy"])))
    assert all(len(line) <= 80 for line in [*lines[:-3], *table])
    assert end[14].startswith(f"model      {output}/model, ")
    command, env = end[15].replace("python", sys.executable, 1), os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True, env=env)
    assert re.fullmatch(r"(good|bad)\t0\.\d+\tone\n", done.stdout)


def first_words(name, argv, environ, terminal=True):
    """What train.py prints before its imports."""
    statements = ast.parse((ROOT / "train.py").read_text()).body
    node = next(statement for statement in statements if isinstance(statement, ast.If))
    heavy = next(i for i, one in enumerate(statements) if isinstance(one, ast.Import) and one.names[0].name == "torch")
    assert statements.index(node) < heavy
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal  # type: ignore[method-assign]
    names = {"__name__": name, "sys": SimpleNamespace(argv=argv, stderr=stderr), "os": SimpleNamespace(environ=environ)}
    exec(compile(ast.Module([node], []), "train.py", "exec"), names)
    return stderr.getvalue()


def test_the_first_words_are_said_once_and_on_a_terminal():
    words = "loading torch and transformers ...\n"
    assert first_words("__main__", ["train.py", "--lr", "1"], {}) == words
    assert first_words("__main__", ["train.py"], {"RANK": "0", "SLURM_PROCID": "3"}) == words
    assert first_words("train", ["train.py"], {}) == ""
    assert first_words("__main__", ["train.py"], {}, terminal=False) == ""
    for argv in (["train.py", "--help"], ["train.py", "-h"]):
        assert first_words("__main__", argv, {}) == ""
    for environ in ({"RANK": "1"}, {"SLURM_PROCID": "1"}):
        assert first_words("__main__", ["train.py"], environ) == ""


@pytest.mark.parametrize("kind", ["regression", "without --output"])
def test_the_end_for_people(kind, tiny_model, pairs, scored_pairs, tmp_path, call_main, monkeypatch, capsys):
    """In this process: a number has no probability, and where nothing is kept it says so."""
    from nanofinetune.run import result as module

    told, original = list[list[str]](), module.closing

    def listen(*args):
        told.append(original(*args))
        return []

    monkeypatch.setattr(module, "closing", listen)
    stderr = io.StringIO()
    stderr.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", stderr)
    regression = kind == "regression"
    options = ["--output", tmp_path / "out"] if regression else []
    data = scored_pairs if regression else pairs
    code, out, _ = call_main(train, "--model", tiny_model, "--data", data, "--max-steps", 1, *options)
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 1
    (lines,) = told
    assert " 1 update in " in lines[2]
    if regression:
        assert (
            re.match(r"row \d+ +label [\d.]+, said -?[\d.e-]+$", lines[4])
            and "printf 'one\\tanother\\n' |" in lines[-1]
        )
    else:
        assert lines[-1] == "model      not kept: give --output DIR"
        assert "model      not saved: epoch 1, the last" in out


def test_help_begins_with_what_people_use(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    text = capsys.readouterr().out
    first, rest = text.split("\n\nmodel and data:\n")
    assert re.findall(r"^  (--[\w-]+)", first, re.MULTILINE) == ["--data", "--model", "--output", "--epochs", "--lr"]
    flat = " ".join(first.split())
    for example in ("--data reviews.csv", "--model ./my-bert", "--output runs/a", "--epochs 5", "--lr 2e-5"):
        assert f": {example}" in flat
        train.parse_arguments(example.split())
    assert "--warmup-steps" in rest and "torchrun --nproc_per_node=4" in rest


@pytest.mark.parametrize("precision", ["fp16"])
def test_a_mistake_names_the_flag_that_was_typed(precision, call_main):
    code, _, err = call_main(train, "--precision", precision, "--device", "cpu")
    assert code == 2
    assert err == "train.py: --precision is 'fp16', and a CPU has no half-precision training: choose bf16, or a GPU\n"


@pytest.mark.parametrize("there", ["validation.jsonl", "model"])
def test_a_file_of_the_users_is_not_written_over(there, tiny_model, pairs, tmp_path, call_main):
    """A data set's folder has a validation.jsonl too: one that no run made stays what it is."""
    (tmp_path / there).write_text('{"text": "mine", "label": 0}\n')
    arguments = ["--model", tiny_model, "--data", pairs, "--output", tmp_path, "--max-steps", 1]
    for resume in ([], ["--resume", "auto"]):
        code, _, err = call_main(train, *arguments, *resume)
        assert code == 2 and there in err and err.count("\n") == 1, err
    (tmp_path / "checkpoints").mkdir()
    code, _, err = call_main(train, *arguments, "--resume", "auto")
    assert code == 2 and (tmp_path / there).read_text() == '{"text": "mine", "label": 0}\n'
    if there == "validation.jsonl":
        assert "its validation.jsonl is not of a run's making; name another folder" in err


@pytest.mark.slow
def test_the_pace_is_in_the_result(tiny_model, pairs, tmp_path, call_main):
    """One point every 50 updates and at each epoch's end, growing in both numbers."""
    code, _, err = call_main(
        train, "--model", tiny_model, "--data", pairs, "--epochs", 8, "--batch-size", 1, "--output", tmp_path / "out"
    )
    assert code == 0, err
    pace = json.loads((tmp_path / "out" / "result.json").read_text())["speed"]
    updates, seconds = zip(*pace, strict=True)
    assert updates == tuple(sorted({*(61 * k + 50 for k in range(8)), *(61 * (k + 1) for k in range(8))}))
    assert list(seconds) == sorted(seconds) and seconds[0] > 0
