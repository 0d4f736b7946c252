"""The files that stand alone: each one, copied by itself into an empty folder, imports and passes its own examples.

The reference is a fresh, isolated interpreter (`python -I`) in which none of the project and of the libraries that it
replaces can be imported.

    python -m pytest tests/test_standalone.py
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ALONE = (
    "step/collate.py",
    "step/optim.py",
    "step/schedule.py",
    "step/metrics.py",
    "step/order.py",
    "ranks/shard.py",
    "ranks/naive_ddp.py",
    "ranks/ddp.py",
)
BLOCKED = ("nanofinetune", "transformers", "datasets", "accelerate", "evaluate", "sklearn", "scipy", "tqdm")

# What the fresh interpreter runs, with a file's path as its argument: it prints the numbers of examples and failures.
EXAMPLES = f"""
import doctest, importlib.util, sys

sys.modules.update(dict.fromkeys({BLOCKED!r}))  # None in sys.modules: importing that name, or a part of it, fails
spec = importlib.util.spec_from_file_location("alone", sys.argv[1])
sys.modules["alone"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
result = doctest.testmod(module)
print("examples:", result.attempted, "failed:", result.failed)
"""


def run_examples(file: Path) -> tuple[int, int, str]:
    """Import `file` in a fresh interpreter and run its examples -> examples, failures (-1, -1: no import), output."""
    command = [sys.executable, "-I", "-W", "error", "-c", EXAMPLES, str(file)]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=300)
    found = re.search(r"^examples: (\d+) failed: (\d+)$", done.stdout, re.MULTILINE)
    attempted, failed = (int(found[1]), int(found[2])) if found and done.returncode == 0 else (-1, -1)
    return attempted, failed, done.stdout + done.stderr


QUICK = ("step/collate.py", "ranks/ddp.py")  # by default, the smallest and the one with most in it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALONE]
)
def test_a_file_by_itself_passes_its_own_examples(name, tmp_path):
    file = Path(shutil.copy(ROOT / "nanofinetune" / name, tmp_path))
    attempted, failed, output = run_examples(file)
    assert attempted > 0 and failed == 0, output


@pytest.mark.parametrize("name", ALONE)
def test_a_file_by_itself_imports_torch_and_numpy_only(name):
    imported: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "nanofinetune" / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            imported.add(node.module or "")
    assert {name.partition(".")[0] for name in imported} <= {"torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("source", "attempted", "failed", "said"),
    [
        ('">>> 1 + 1\\n2"', 1, 0, "examples: 1 failed: 0"),
        ('">>> 1 + 1\\n3"', 1, 1, "Expected:"),
        ('"No examples."', 0, 0, "examples: 0 failed: 0"),
        *((f"import {name}", -1, -1, f"import of {name} halted") for name in BLOCKED),
        ("from nanofinetune.step import order", -1, -1, "'nanofinetune' is not a package"),
        ('">>> import datasets"', 1, 1, "import of datasets halted"),
        ("import warnings; warnings.warn('old')", -1, -1, "UserWarning: old"),
        ("import beside", -1, -1, "No module named 'beside'"),
    ],
)
def test_the_standalone_test_can_fail(source, attempted, failed, said, tmp_path):
    (tmp_path / "beside.py").write_text("")  # not even what lies in the same folder
    (tmp_path / "module.py").write_text(source + "\n")
    found = run_examples(tmp_path / "module.py")
    assert found[:2] == (attempted, failed) and said in found[2], found[2]
