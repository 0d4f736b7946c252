"""A data set built from Python's own documentation: does this summary describe this function?

>>> source = '''
... class FTP:
...     def quit(self):
...         "Quit, and close the connection."
...     def delete(self, filename):
...         "Delete a file. Nothing is returned."
... '''
>>> quit, delete = documented("ftplib", ast.parse(source))
>>> for pair in four_pairs(quit, delete): print(*pair, sep=" | ")
ftplib.FTP.quit() | Quit, and close the connection. | 1
ftplib.FTP.quit() | Delete a file. | 0
ftplib.FTP.delete(filename) | Delete a file. | 1
ftplib.FTP.delete(filename) | Quit, and close the connection. | 0

Underneath: `datasets.load_dataset` (datasets 5.2), called with "nyu-mll/glue", "mrpc", needs the Hub
  - this is a task of the same kind, columns and sizes (3,668 training, 408 validation pairs) for a machine without it;
  - nothing is shipped or imported: `ast` reads the standard library's source files;
  - MRPC is two thirds positive; this is half, for each text too, so that only comparing both texts tells the label;
  - another Python version gives other pairs, so compare scores within one.

Proof: test_sizes_and_columns_are_those_of_mrpc, test_one_side_alone_says_nothing_about_the_label in
tests/data/test_stdlib_pairs.py.
"""

import ast
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from nanofinetune.ground.errors import UsageError

LABEL_NAMES = ["other", "same"]  # index = label
SIZES = {"train": 3668, "validation": 408}  # MRPC's

# Folders with programs, tests or bundled files, and site-packages, which is no part of the library.
SKIPPED = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
SKIPPED |= {"dist-packages", "site-packages"}

Documented = tuple[str, str]  # (signature, summary)


class Pair(TypedDict):
    """One row, in the columns of GLUE MRPC."""

    sentence1: str
    sentence2: str
    label: int
    idx: int


def load(seed: int = 0, stdlib: str | os.PathLike[str] | None = None) -> dict[str, list[Pair]]:
    """The rows of both splits, the same for the same `seed` and `stdlib` (a folder; default: this Python's library).

    Two functions of one module, a couple, give four pairs to one split: each signature and each summary appears
    once as "same" and once as "other". So no text hints at a label, and none is in both splits.

    Raises UsageError if the folder documents too few functions, as in a Python installed without its sources.
    """
    folder = Path(stdlib or sysconfig.get_path("stdlib"))
    shuffler = random.Random(seed)
    couples: list[tuple[Documented, Documented]] = []
    for functions in functions_by_module(folder).values():
        shuffler.shuffle(functions)
        two_by_two = zip(functions[::2], functions[1::2], strict=False)  # an odd one is left out
        # Methods of one name often do one thing: the summary of `MH.add_folder` is right for `Maildir.add_folder` too.
        couples += [(one, two) for one, two in two_by_two if method_name(one) != method_name(two)]
    needed = sum(SIZES.values()) // 4
    if len(couples) < needed:
        raise UsageError(
            f"stdlib-pairs: {folder} gives {len(couples)} couples of documented functions and {needed} are needed "
            "(is this Python installed without its library's sources?): name other data with --data"
        )
    shuffler.shuffle(couples)

    splits: dict[str, list[Pair]] = {}
    for split, size in SIZES.items():
        chosen, couples = couples[: size // 4], couples[size // 4 :]
        rows = [row for one, two in chosen for row in four_pairs(one, two)]
        shuffler.shuffle(rows)
        splits[split] = [
            {"sentence1": signature, "sentence2": summary, "label": label, "idx": idx}
            for idx, (signature, summary, label) in enumerate(rows)
        ]
    return splits


def four_pairs(one: Documented, two: Documented) -> list[tuple[str, str, int]]:
    """Each signature with its own summary (label 1) and with the other's (label 0)."""
    return [(one[0], one[1], 1), (one[0], two[1], 0), (two[0], two[1], 1), (two[0], one[1], 0)]


def documented(prefix: str, tree: ast.Module | ast.ClassDef) -> Iterator[Documented]:
    """The public functions of a module, and methods of its public classes, that have a usable summary.

    Left out: private names, which few readers know; dunder methods, whose summaries ("Return self+value.") fit any
    class; and classes, whose summaries say what a thing is rather than what a call does.
    """
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from documented(f"{prefix}.{node.name}", node)
        elif summary := summarise(ast.get_docstring(node) or ""):
            yield f"{prefix}.{node.name}{_parameters(node)}", summary


def summarise(docstring: str) -> str | None:
    """A docstring's first sentence on one line; None where that is no sentence that tells what the function does.

    That is: shorter than 3 words or longer than 40, an example, or the signature again (`D.get(k) -> the value`).
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph, maxsplit=1)[0]
    junk = ">>>" in sentence or not sentence[:1].isalpha() or re.match(r"[\w.]+\(", sentence)
    return sentence if not junk and 3 <= len(sentence.split()) <= 40 else None


def normalised(summary: str) -> str:
    """The words alone, so that "Close the file." is the same summary as "Close the file"."""
    return " ".join(re.findall(r"\w+", summary.lower()))


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`(a, b, *args)`: the names that a caller gives. A property is not called, so it has none and no parentheses."""
    if any(re.search(r"property|\.setter", ast.unparse(decorator)) for decorator in node.decorator_list):
        return ""
    a = node.args
    names = [arg.arg for arg in a.posonlyargs + a.args if arg.arg not in ("self", "cls")]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [arg.arg for arg in a.kwonlyargs]
    names += [f"**{a.kwarg.arg}"] if a.kwarg else []
    return f"({', '.join(names)})"


def method_name(function: Documented) -> str:
    """`quit` of `ftplib.FTP.quit()`."""
    return function[0].split("(")[0].split(".")[-1]


def functions_by_module(folder: Path) -> dict[str, list[Documented]]:
    """Module -> its documented functions, without signatures and summaries that an earlier one had, in any module.

    So a summary that fits several functions stays with the first of them, and the others are in no pair: it can
    neither become a wrong "other" nor be in both splits.
    """
    modules: dict[str, list[Documented]] = {}
    seen: set[str] = set()
    for module, path in _modules(folder):
        for signature, summary in documented(module, ast.parse(path.read_bytes())):
            texts = {signature, normalised(summary)}
            if not texts & seen:
                modules.setdefault(module, []).append((signature, summary))
            seen |= texts
    return modules


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, source file) of each public module of the standard library, always in the same order."""
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)  # os.walk goes where this list says, in its order
        for path in (Path(place, file) for file in sorted(files) if file.endswith(".py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            # The first part shows what belongs to the library: config-3.12 and sitecustomize.py, say, do not.
            if parts and parts[0] in sys.stdlib_module_names and not any(part.startswith("_") for part in parts):
                yield ".".join(parts), path
