"""bench/fuzz.py: its cases come again from their numbers, and each of its checks can fail. Never a time.

    python -m pytest tests/bench/test_fuzz.py            what needs no case to be run
    python -m pytest tests/bench/test_fuzz.py -m slow    a handful of each kind, and broken programs

What each check is compared with: programs that are broken on purpose, one for each way to be wrong.
"""

import ctypes
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "bench"))

import fuzz
import fuzzed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is a forked process")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What undamaged runs leave, made once."""
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.import_all()
    fuzz.prepare(folder)
    return folder


def test_every_option_of_train_py_is_fuzzed(capsys):
    with pytest.raises(SystemExit):
        load_script(ROOT / "train.py").parse_arguments(["--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert options == set(fuzzed.OPTIONS)


def contents(place: Path) -> dict[str, str]:
    files = (path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size < 2**24)
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow  # `work` trains a few runs
@pytest.mark.parametrize("kind", fuzzed.KINDS)
def test_a_case_follows_from_the_seed_and_its_number(kind, work, tmp_path):
    made = []
    for seed in (0, 0, 1):
        stage = fuzz.Stage(tmp_path / "case-x")
        stage.build()
        case = fuzzed.KINDS[kind](random.Random(f"{seed} {kind} 3"), stage.place, work / "base", 3)
        made.append((case, contents(stage.place)))
        shutil.rmtree(stage.place)
    assert made[0] == made[1] != made[2]


@pytest.mark.slow
def test_a_handful_of_each_kind_ends_as_it_should(work):
    cases = [("commands", 1), ("commands", 2), ("commands", 3), ("commands", 5), ("checkpoints", 1), ("checkpoints", 4)]
    cases += [("caches", 2), ("caches", 3), ("files", 0), ("files", 1)]
    found = [(kind, nth, *fuzz.judge(end)) for kind, nth, end in fuzz.run_cases(cases, 0, work, jobs=2, limit=100)]
    assert sorted(case[:2] for case in found) == sorted(cases)
    assert not [case for case in found if case[2] not in ("right", "one line")]
    assert {verdict for _, _, verdict, _ in found} == {"right", "one line"}


# ---- each check can fail ---------------------------------------------------------------------------------------------


def fails(words):
    raise KeyError("nothing")


def hangs(words):
    time.sleep(600)


def crashes(words):
    os.kill(os.getpid(), signal.SIGSEGV)


def writes(words):
    Path("../../outside/thesis.txt").write_text("mine too")
    return 0


def removes(words):
    """Not through Python: only the state of the files shows it."""
    ctypes.CDLL(None).unlink(b"../../outside/thesis.txt")
    return 0


def adds(words):
    ctypes.CDLL(None).creat(b"../../home/.profile", 0o600)
    return 0


def touches(words):
    ctypes.CDLL(None).creat(b"../../ran", 0o600)
    return 0


def starts(words):
    subprocess.run(["true"], check=True)
    return 0


class Harmless:
    def __reduce__(self):
        return (dict, ())


def unpickles(words):
    pickle.loads(pickle.dumps(Harmless()))
    return 0


def says(text, code, stream=None):
    def program(words):
        print(text, file=stream or sys.stderr)
        return code

    return program


def gives_other_tokens(words):
    facts = json.loads((Path.cwd().parents[2] / "base" / "facts.json").read_text())["tokens"]
    facts["tokens"]["train"] = facts["tokens"]["train"][::-1]
    print(json.dumps(facts))
    return 0


def gives_tokens(words):
    print(json.dumps(json.loads((Path.cwd().parents[2] / "base" / "facts.json").read_text())["tokens"]))
    return 0


def trains_anew(words):
    Path("out/model").mkdir(parents=True)
    Path("out/model/model.safetensors").write_bytes(b"other weights")
    print("note: resumed after update 9")
    return 0


BROKEN = {
    "a traceback": (fails, "tokens", "traceback: KeyError: 'nothing'"),
    "a hang": (hangs, "tokens", "hang: still running"),
    "a crash": (crashes, "tokens", "crash: SIGSEGV"),
    "a write": (writes, "tokens", "write outside: opens "),
    "a file lost": (removes, "tokens", "write outside: outside/thesis.txt is gone"),
    "a new file": (adds, "tokens", "write outside: home/.profile is new"),
    "what hostile code does": (touches, "tokens", "code run: the file that it makes is there"),
    "a program started": (starts, "tokens", "code run: subprocess.Popen"),
    "a pickle read": (unpickles, "tokens", "code run: pickle.find_class"),
    "other tokens": (gives_other_tokens, "tokens", "wrong result: other tokens"),
    "other weights": (trains_anew, "weights", "wrong result: other weights than the uninterrupted run's"),
    "no result": (says("all well", 0), "tokens", "wrong result: its output is no result"),
    "no refusal": (gives_tokens, "refused", "wrong result: it was not refused"),
    "two lines": (says("load_tokens: word: no\nand more", 2), "tokens", "not one line: exit 2, 2 lines"),
    "silence": (says("", 2), "tokens", "not one line: exit 2, 0 lines"),
    "another exit code": (says("load_tokens: word: no", 3), "tokens", "not one line: exit 3"),
    "a terminal escape": (says("load_tokens: word: \x1b[2J", 2), "tokens", "not one line: control characters"),
    "nothing named": (says("load_tokens: no", 2), "tokens", "not one line: it names nothing that was given"),
    "another program": (says("word: no", 2), "tokens", "not one line: it does not begin with load_tokens"),
    "nothing": (gives_tokens, "tokens", "right: "),
    "a refusal": (says("load_tokens: word: no", 2), "tokens", "one line: load_tokens: word: no"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_program_is_noticed(kind, work, monkeypatch):
    program, right, said = BROKEN[kind]
    monkeypatch.setitem(fuzz.PROGRAMS, "load_tokens", program)
    monkeypatch.setitem(fuzz.KINDS, "caches", lambda *_: fuzz.Case("load_tokens", ["word"], right=right))
    limit = 2 if program is hangs else 100
    found = [fuzz.judge(end) for _, _, end in fuzz.run_cases([("caches", 0)], 0, work, jobs=1, limit=limit)]
    assert ": ".join(*found).startswith(said)
    assert not (work / "case-caches-0").exists()


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_counts_every_case(tmp_path):
    record = tmp_path / "fuzz.json"
    counts = {"commands": 40, "checkpoints": 45, "caches": 60, "files": 20}
    words = [word for kind, count in counts.items() for word in (f"--{kind}", str(count))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "fuzz.py"), "--json", str(record), *words],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(record.read_text())
    assert found == json.loads(done.stdout.splitlines()[-1])
    assert {kind: sum(row.values()) for kind, row in found["rows"].items()} == counts and found["faults"] == []
    assert (tmp_path / "fuzz.md").read_text().count("\n") == 8


@pytest.mark.slow
def test_one_case_can_be_run_alone():
    words = [sys.executable, str(ROOT / "bench" / "fuzz.py"), "--only", "caches:3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.startswith("caches:3: right: "), done.stderr[-3000:]
