"""Rebuild a module: `python -m nanofinetune.exercise collate --to DIR` gives it emptied, and how to test your version.

>>> print(emptied('''
... def double(x: int) -> int:
...     "Twice x."
...     return _sum(x, x)
...
...
... def _sum(a, b):
...     return a + b
... ''').strip())
def double(x: int) -> int:
    "Twice x."
    raise NotImplementedError

Underneath: no library; `ast.parse` (Python's own) finds where each body begins and ends.
  - The text around the bodies stays as it is. `ast.unparse` would lose its comments.
  - Private functions go: they are one way to do it.
  - Your file is tested in a copy of the project, so that every process a test starts imports it too.
  - Only modules that need nothing else of this package are offered.

Proof: test_an_emptied_module_fails_its_tests_and_the_real_one_passes, test_emptied_keeps_what_others_need in
tests/test_exercise.py.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from nanofinetune.ground.cli import Parser, run_main
from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.ground.names import place_of

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
NEEDED = ("pyproject.toml", "README.md", "train.py", "launch.sh", "nanofinetune", "tests", "bench")  # by the tests
ORDER = ("schedule", "metrics", "collate", "shard", "naive_ddp", "ddp")  # to do them in; then the rest
ROOMS = ("step", "ranks", "cpu", "data")  # whose files are worth rebuilding
GROUND = {"nanofinetune.ground.errors", "nanofinetune.ground.cli"}  # what a rebuilt module may still import


def modules() -> dict[str, Path]:
    """The modules that can be rebuilt alone, by name, in the order to do them: they import of ours `GROUND` only."""
    files = (path for path in sorted(PACKAGE.glob("*/[a-z]*.py")) if path.parent.name in ROOMS)
    alone = {path.stem: path for path in files if _stands_alone(path.read_text())}
    rooms = {name: ROOMS.index(path.parent.name) for name, path in alone.items()}
    steps = {name: ORDER.index(name) if name in ORDER else len(ORDER) for name in alone}
    return {name: alone[name] for name in sorted(alone, key=lambda name: (steps[name], rooms[name], name))}


def listed(known: dict[str, Path]) -> Iterator[str]:
    """The list of modules, in the order to do them: the steps of the course with their numbers, then the others."""
    for i, (name, path) in enumerate(known.items()):
        if i in (0, len(ORDER)):
            yield "The course, in this order:" if i == 0 else "\nWhat else stands alone, in any order:"
        text = path.read_text()
        step = f"{i + 1}." if name in ORDER else ""
        first, *rest = textwrap.wrap((ast.get_docstring(ast.parse(text)) or "").splitlines()[0], 70)
        yield f"{step:>4} {name:<12} {len(text.splitlines()):>3} lines  {first}"
        yield from (f"{'':28}{line}" for line in rest)
    yield "\nnext: python -m nanofinetune.exercise schedule --to mine"


def emptied(source: str) -> str:
    """A module's text without what its functions do: docstrings, imports, constants, classes and signatures remain.

    A body becomes `raise NotImplementedError`; private functions and methods are left out.
    """
    lines = source.splitlines(keepends=True)
    for node in sorted(_functions(ast.parse(source)), key=lambda node: -node.lineno):  # from the end: numbers hold
        begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        if node.name.startswith("_") and not node.name.endswith("__"):
            # A comment above it goes with it, whether a blank line is between them or not.
            above = begin - 1 if begin and lines[begin - 1].strip() else begin - 2
            while above > 0 and lines[above].strip().startswith("# ") and "---" not in lines[above]:
                begin, above = above, above - 1
            lines[begin : node.end_lineno] = []
            continue
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        kept = (first.end_lineno or first.lineno) if documented else first.lineno - 1
        while lines[kept - 1].strip().startswith("#"):
            kept -= 1  # a comment of the body
        lines[kept : node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError\n"]
    return re.sub(r"\n{4,}", "\n\n\n", "".join(lines)).rstrip() + "\n"


def proof_of(module: str) -> list[str]:
    """What pytest is to run for a module: its own test file, the tests elsewhere that its docstring names, doctests."""
    path = modules()[module]
    room = path.parent.name
    proof = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\nProof:")[2]
    named = re.findall(r"\btest_\w+\b(?!\.py)", proof)
    own = ROOT / "tests" / room / f"test_{module}.py"
    found = [own.relative_to(ROOT).as_posix()] if own.is_file() else []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if file != own:
            text, name = file.read_text(), file.relative_to(ROOT).as_posix()
            found += [f"{name}::{test}" for test in named if f"def {test}(" in text]
    return [*found, f"nanofinetune/{room}/{module}.py"]


def check(module: str, file: Path, arguments: list[str]) -> int:
    """Run the module's tests, with `file` in its place -> pytest's exit code."""
    place = modules()[module].relative_to(ROOT)
    with tempfile.TemporaryDirectory(prefix="nanofinetune-exercise-") as folder:
        for name in NEEDED:
            source, target = ROOT / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        shutil.copy(file, Path(folder, place))
        glue = os.environ.get("NANOFINETUNE_GLUE", str(ROOT.parent / "shared" / "data" / "glue"))
        environment = os.environ | {"PYTHONPATH": folder, "NANOFINETUNE_GLUE": glue, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *proof_of(module), *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main() -> None:
    """List the modules, write one emptied, or test a rebuilt one."""
    parser = Parser(prog="python -m nanofinetune.exercise", description=__doc__)
    parser.add_argument("module", metavar="MODULE", nargs="?", help="which one; without it, all are listed")
    parser.add_argument("--to", metavar="DIR", help="write it there, emptied; never over a file (default: here)")
    parser.add_argument("--check", metavar="FILE", help="run the module's tests with FILE in its place")
    args, others = parser.parse_known_args()
    if others and args.check is None:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    known = modules()
    if args.module is None:
        print("\n".join(listed(known)))
        return
    if args.module not in known:
        raise UsageError(f"{args.module}: choose one of {', '.join(known)}")
    if args.check is not None:
        file = place_of("--check", args.check)
        if not file.is_file():
            raise UsageError(f"--check {args.check}: there is no such file")
        if not (ROOT / "tests").is_dir():
            raise UsageError(f"--check {args.check}: the tests are not beside the package; clone the repository")
        sys.exit(check(args.module, file, others))
    target = place_of("--to", "." if args.to is None else args.to) / f"{args.module}.py"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x") as file_made:
            file_made.write(emptied(known[args.module].read_text()))
    except FileExistsError:
        raise UsageError(f"--to {args.to or '.'}: {target} is there already, and is not written over") from None
    except OSError as error:
        raise UsageError(f"--to {args.to}: {target} cannot be written ({error.strerror})") from error
    print(f"wrote {shown(str(target))}; fill it in until this passes:\n")
    print(f"python -m nanofinetune.exercise {args.module} --check {shown(str(target))}")


def _functions(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, without those inside other functions."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(child)
        elif isinstance(child, ast.ClassDef):
            found += _functions(child)
    return found


def _stands_alone(source: str) -> bool:
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            room = node.module.count(".") < 2  # what is imported from a room, or from the package, is a module
            imported |= {f"{node.module}.{alias.name}" if room else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return {name for name in imported if name.partition(".")[0] == "nanofinetune"} <= GROUND


if __name__ == "__main__":
    sys.exit(run_main("nanofinetune.exercise", main))
