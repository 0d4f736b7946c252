"""The rebuild-it exercises: an emptied module fails its tests, the real file in its place passes them.

    python -m pytest tests/test_exercise.py            one module; all of them: -m slow (minutes)

Nothing is compared with a library here: the reference is the repository itself.
"""

import ast
import re
import sys
from typing import Any

import pytest
from conftest import ROOT

from nanofinetune import exercise as command
from nanofinetune.exercise import ORDER, emptied, main, modules, proof_of
from nanofinetune.ground.cli import run_main

MODULES = modules()


@pytest.fixture
def exercise(monkeypatch, capfd):
    """Call the command in this process -> (exit code, stdout, stderr); the tests that it starts are a real process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["exercise", *map(str, arguments)])
        code: Any
        try:
            code = run_main("nanofinetune.exercise", main)
        except SystemExit as ended:  # pytest's exit code
            code = ended.code
        return code, *capfd.readouterr()

    return call


def test_every_module_of_the_first_room_can_be_rebuilt(exercise, tmp_path):
    """And sharding and DDP, from the second one. They are listed in the order to do them."""
    assert {path.stem for path in (ROOT / "nanofinetune" / "step").glob("[a-z]*.py")} <= set(modules())
    assert list(modules())[:6] == ["schedule", "metrics", "collate", "shard", "naive_ddp", "ddp"]
    code, listed, _ = exercise()
    lines = listed.splitlines()
    assert code == 0 and max(map(len, lines)) <= 100
    found = [re.match(r" {1,2}(\d\.| {2}) (\w+) +(\d+) lines  \S", line) for line in lines]
    assert [match[2] for match in found if match] == list(modules()), "each module once, with its first sentence"
    assert [match[1].strip() for match in found if match][:7] == ["1.", "2.", "3.", "4.", "5.", "6.", ""]
    assert re.findall(r"^## (\d\. \w+)", (ROOT / "docs" / "exercise.md").read_text(), re.MULTILINE) == [
        f"{match[1]} {match[2]}" for match in found if match and match[1].strip()
    ]
    first = lines[-1].removeprefix("next: ").split()
    assert first[:3] == ["python", "-m", "nanofinetune.exercise"]
    assert exercise(first[3], "--to", tmp_path)[0] == 0 and (tmp_path / f"{first[3]}.py").is_file()


@pytest.mark.parametrize(
    ("imports", "alone"),
    [
        ("import torch\nfrom nanofinetune.ground.errors import UsageError", True),
        ("from nanofinetune.ground import cli, errors", True),
        ("from nanofinetune.ground import cli, device", False),
        ("from nanofinetune.step import collate", False),
        ("def f():\n    from nanofinetune.step.order import mix", False),
        ("import nanofinetune.step.order", False),
        ("from nanofinetune import Accelerator", False),
    ],
)
def test_a_module_that_needs_others_of_ours_is_not_offered(imports, alone):
    assert command._stands_alone(imports) is alone


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in MODULES])
def test_an_emptied_module_fails_its_tests_and_the_real_one_passes(name, tmp_path, exercise):
    """By the very command that is printed.

    The real file's tests pass in the default run too: a module that is no step of the course runs its two proofs here.
    """
    code, written, _ = exercise(name, "--to", tmp_path)
    command = written.strip().splitlines()[-1].split()
    assert code == 0 and command[:3] == ["python", "-m", "nanofinetune.exercise"]
    code, failed, _ = exercise(*command[3:], "-x", "-q")
    assert code in (1, 2) and "NotImplementedError" in failed, failed  # 2: it could not even collect them

    real = MODULES[name].read_text()
    (tmp_path / f"{name}.py").write_text(real)
    proofs = re.findall(r"\btest_\w+\b(?!\.py)", real.partition("\nProof:")[2].partition('"""')[0])
    chosen = [] if name in ORDER else ["-k", " or ".join(proofs)]
    code, passed, _ = exercise(*command[3:], "-x", "-q", *chosen)
    assert code == 0, passed[-3000:]


@pytest.mark.parametrize("name", MODULES)
def test_emptied_keeps_what_others_need(name):
    """Docstrings, constants, classes and public signatures, word for word; and nothing of what the functions do."""
    source = MODULES[name].read_text()
    whole, left = ast.parse(source), ast.parse(emptied(source))
    assert ast.get_docstring(left) == ast.get_docstring(whole)

    def outline(tree, prefix=""):
        found: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = [ast.unparse(part) for part in (*node.bases, *node.decorator_list)]
                found |= outline(node, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                if not node.name.startswith("_") or node.name.endswith("__"):
                    found[prefix + node.name] = [ast.unparse(node.args), ast.get_docstring(node)]
            else:
                found[f"{prefix}{ast.unparse(node)}"] = []
        return found

    assert outline(left) == outline(whole)
    functions = [node for node in ast.walk(left) if isinstance(node, ast.FunctionDef)]
    assert functions
    for node in functions:
        assert ast.unparse(node.body[-1]) == "raise NotImplementedError" and len(node.body) <= 2


def test_the_proof_of_a_module_are_its_own_tests_and_those_elsewhere_that_its_docstring_names(tmp_path, monkeypatch):
    assert proof_of("tasks")[-1] == "nanofinetune/data/tasks.py"

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    proof = "Proof: test_here, test_there in tests/step/test_thing.py and tests/test_other.py."
    write("nanofinetune/step/thing.py", f'"""A thing.\n\n{proof}\n"""\n')
    write("tests/step/test_thing.py", "def test_here(): ...\ndef test_more(): ...\n")
    write("tests/test_other.py", "def test_there(): ...\ndef test_not_named(): ...\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "PACKAGE", tmp_path / "nanofinetune")
    expected = ["tests/step/test_thing.py", "tests/test_other.py::test_there", "nanofinetune/step/thing.py"]
    assert proof_of("thing") == expected


def test_nothing_is_written_over(tmp_path, exercise):
    kept = tmp_path / "collate.py"
    kept.write_text("mine")
    code, _, said = exercise("collate", "--to", tmp_path)
    assert code == 2 and "is there already" in said and len(said.splitlines()) == 1
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "nothing: choose one of schedule, metrics, collate"),
        (["collate", "--check", "no/such.py"], "there is no such file"),
        (["collate", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_one_line(arguments, text, exercise):
    code, _, said = exercise(*arguments)
    assert code == 2 and text in said and len(said.splitlines()) == 1
