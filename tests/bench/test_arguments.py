"""What the scripts in bench/ refuse: an option they do not have, a shortened one, a value that cannot be. One line, 2.

Run: python -m pytest tests/bench/test_arguments.py
"""

import subprocess
import sys
from importlib import import_module, util

import pytest
from conftest import ROOT, load_script
from programs import run_program

from nanofinetune.data.pretrained import packaged_model
from nanofinetune.ground.cli import run_main

sys.path.insert(0, str(ROOT / "bench"))

WRONG = [
    ("captured", "--bogus", "unrecognized arguments: --bogus"),
    ("compare", "--bogus", "unrecognized arguments: --bogus"),
    ("pieces", "--bogus", "unrecognized arguments: --bogus"),
    ("tried", "--bogus", "unrecognized arguments: --bogus"),
    ("tried", "speed", "speed: there is no such idea; choose from draw, words, "),
    ("tried", "--json no/such/file.json", "--json no/such/file.json: there is no such folder"),
    ("throughput", "--bogus", "unrecognized arguments: --bogus"),
    ("throughput", "--step 40", "unrecognized arguments: --step"),
    ("faults", "--bogus", "unrecognized arguments: --bogus"),
    ("faults", "--kill 3", "unrecognized arguments: --kill 3"),
    ("faults", "--kills -3", "--kills: -3 is not a whole number from 0"),
    ("faults", "--only nothing", "--only nothing: choose kills, or of newest"),
    ("faults", "--json no/such/file.json", "--json no/such/file.json: there is no such folder"),
    ("fuzz", "--bogus", "unrecognized arguments: --bogus"),
    ("fuzz", "--caches -1", "--caches: -1 is not a whole number from 0"),
    ("fuzz", "--only caches", "--only caches: name one of commands, checkpoints, caches, files and a number"),
    ("fuzz", "--only tokens:3", "--only tokens:3: name one of commands, checkpoints, caches, files and a number"),
    ("fuzz", "--json no/such/file.json", "--json no/such/file.json: there is no such folder"),
    ("quality", "", "the following arguments are required: --data"),
    ("quality", "--data x --bogus", "unrecognized arguments: --bogus"),
    ("quality", "--data x --seeds one", "--seeds: one is not a whole number from 0"),
    ("quality", "--data x --peer-seeds 9", "--peer-seeds 9: it is none of --seeds"),
    ("quality", "--data x --json no/such/file.json", "--json no/such/file.json: there is no such folder"),
    ("quality", "--data x --timed --peer-seeds 1", "--peer-seeds: with --timed both sides run with each seed"),
    ("quality", "--data x --max-steps 0", "--max-steps: 0 is not a whole number from 1"),
    ("quality", "--data x --max-steps 5 --json x.json", "--json: 5 updates are a trial and no record"),
    ("commands", "--bogus", "unrecognized arguments: --bogus"),
    ("commands", "--only 4", "--only: 4 is not a whole number from 1 to 3"),
    ("commands", "--json no/such/file.json", "--json no/such/file.json: there is no such folder"),
    ("commands", "--clone .", "--clone .: there is no .venv/bin/python in it"),
    ("peer", "--model x --data y --bogus", "unrecognized arguments: --bogus"),
    ("peer", "--model x --data y --batch 4", "unrecognized arguments: --batch 4"),
    ("peer", "--model x --data y --batch-size 0", "argument --batch-size: invalid positive value: '0'"),
    ("peer", "--model x --data y --precision fp8", "argument --precision: invalid choice: 'fp8'"),
    ("peer_trainer", "--model x --data y --fused", "unrecognized arguments: --fused"),
    ("peer_trainer", "--model x --data y --same-work --group-by-length", "--group-by-length: --same-work has an order"),
    ("peer_fabric", "--model x --data y --group-by-length", "unrecognized arguments: --group-by-length"),
    ("peer_fabric", "--model x", "the following arguments are required: --data"),
    ("peer_pipeline", "m x.jsonl y.jsonl --batch-size 0", "argument --batch-size: invalid positive value: '0'"),
    ("readme", "--bogus", "unrecognized arguments: --bogus"),
    ("readme", "x", "unrecognized arguments: x"),
    ("ours", "", "name the file for losses and times first"),
    ("ours", "--help", "name the file for losses and times first"),
    ("ours", "no/such/file.json --lr 1", "no/such/file.json: there is no such folder"),
]


NEEDS = {"peer": "accelerate", "peer_trainer": "accelerate", "peer_fabric": "lightning_fabric"}


@pytest.mark.parametrize(("script", "words", "said"), WRONG)
def test_what_a_script_does_not_know_is_one_line_and_exit_2(script, words, said, monkeypatch, capsys, tmp_path) -> None:
    if script in NEEDS and util.find_spec(NEEDS[script]) is None:
        pytest.skip(f"the libraries' side needs {NEEDS[script]} (extra `bench`)")
    module = import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words.split()])
    if script.startswith(("peer", "ours")):  # these import nothing of ours, and the other is train.py
        try:
            code = module.main()
        except SystemExit as ended:
            code = ended.code
    else:
        code = run_main(f"{script}.py", module.main)
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith(f"{script}.py: {said}") and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


TAKES_DATA = ["compare", "floor", "limit", "pieces", "quality", "throughput"]
FOLDERS = [(name, "--data") for name in TAKES_DATA] + [(name, "--model") for name in [*TAKES_DATA, "scale", "tried"]]


@pytest.mark.parametrize(("script", "option"), FOLDERS)
def test_an_empty_folder_is_refused_before_any_measuring(script, option, monkeypatch, capsys, tmp_path) -> None:
    if option == "--data" and packaged_model() is None:
        pytest.skip("the packaged checkpoint is not installed (extra `offline`)")
    module = import_module(script)
    data = ["--data", "stdlib-pairs"] if (script, option) == ("quality", "--model") else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *data, option, str(tmp_path)])
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started, neither so
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", None)  # nor so
    said = "holds no config.json" if option == "--model" else "needs train.csv, .tsv, .jsonl, .json"
    assert run_main(f"{script}.py", module.main) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{tmp_path}: the folder {said}" in err, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["peer_trainer", "peer_fabric"])
def test_a_peer_that_is_not_written_for_ranks_refuses_them(script, monkeypatch, capsys) -> None:
    if util.find_spec(NEEDS[script]) is None:
        pytest.skip(f"the libraries' side needs {NEEDS[script]} (extra `bench`)")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--model", "x", "--data", "y"])
    with pytest.raises(SystemExit) as ended:
        import_module(script).main()
    why = "WORLD_SIZE=2: it runs in one process; use bench/peer.py for several"
    assert ended.value.code == 2 and capsys.readouterr() == ("", f"{script}.py: {why}\n")


@pytest.mark.slow
def test_readme_py_writes_nothing_where_it_is_told_something() -> None:
    """It rewrote README whatever its arguments were."""
    documents = [ROOT / name for name in import_module("readme").DOCUMENTS]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in documents]
    for words in (["--help"], ["--check"], ["README.md"]):
        done = run_program([ROOT / "bench" / "readme.py", *words])
        assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in documents] == before


def test_render_py_writes_nothing_where_it_is_told_something() -> None:
    """It rewrote every document whatever its arguments were."""
    render = load_script(ROOT / "docs" / "render.py")
    paths = [*render.documents(), ROOT / "docs" / "overlap.svg"]
    before = [path.stat().st_mtime_ns for path in paths]
    for words in (["--help"], ["--check"], ["README.md"]):
        done = run_program([ROOT / "docs" / "render.py", *words])
        assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.parametrize("words", ["--bogus", "--print --bogus", "fp32", "--print --data", "--data x --print"])
def test_gpu_sh_refuses_what_it_does_not_know(words: str) -> None:
    command = ["sh", str(ROOT / "bench" / "gpu.sh"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("gpu.sh: ")
    assert done.stderr.count("\n") == 1


def test_gpu_sh_escapes_what_it_quotes() -> None:
    command = ["sh", str(ROOT / "bench" / "gpu.sh"), "--bo\ngus\x1b[2J"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.sh: --bo?gus?[2J: it takes --print first, then --model and --data\n"
