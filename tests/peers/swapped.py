"""Run a peer's own test script with our classes in the places of its library's, case by case.

Its text is read from the installed package and stays as it is, but for the imports from accelerate: each name comes
from nanofinetune. A name that is absent here raises when it is used, so that the cases without it still run.
"""

import ast
import contextlib
import importlib.util
import io
import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import nanofinetune

# A case is a call as text. What became of it is "pass", or the error's type and first line.
Outcomes = dict[str, str]


class Absent:
    """In the place of a name that nanofinetune does not have: any use raises what the import would have."""

    def __init__(self, name: str, why: Exception) -> None:
        self._name, self._why = name, why

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._why

    def __getattr__(self, name: str) -> Any:
        if name == "_reset_state":  # of a global that does not exist here: nothing to forget
            return lambda: None
        raise self._why

    def __instancecheck__(self, instance: Any) -> bool:
        raise self._why


def ours(name: str) -> Any:
    if name == "are_the_same_tensors":  # a helper of the scripts' own, which asks Accelerate's global state
        return _same_on_all_ranks
    try:
        return getattr(nanofinetune, name)
    except (ImportError, AttributeError) as error:
        return Absent(name, ImportError(str(error)))


def _same_on_all_ranks(tensor: torch.Tensor) -> bool:
    everyones = nanofinetune.gather(tensor[None].clone())
    return all(torch.equal(each, everyones[0]) for each in everyones)


class _Swap(ast.NodeTransformer):
    """`from accelerate.x import A` -> `A = ours("A")`; the helpers in accelerate.test_utils stay."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        name = node.module or ""
        if name.split(".")[0] != "accelerate":
            return node
        kept = [alias for alias in node.names if alias.name != "are_the_same_tensors"]
        taken = [alias for alias in node.names if alias not in kept]
        if not name.startswith("accelerate.test_utils"):
            kept, taken = [], node.names
        new: list[Any] = [ast.ImportFrom(name, kept, 0)] if kept else []
        new += [ast.parse(f"{alias.asname or alias.name} = ours({alias.name!r})").body[0] for alias in taken]
        return [ast.copy_location(statement, node) for statement in new]


def text_of(name: str) -> str:
    """The text of an installed module, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return Path(spec.origin).read_text()


def load(name: str) -> ModuleType:
    """An installed script as a module whose names from accelerate are ours."""
    tree = ast.fix_missing_locations(_Swap().visit(ast.parse(text_of(name))))
    module = ModuleType(name.rpartition(".")[2])
    vars(module)["ours"] = ours
    exec(compile(tree, name, "exec"), vars(module))
    return module


def silence(stream: Any = contextlib.redirect_stdout) -> Any:
    return stream(io.StringIO())


def run_cases(name: str, setup: str, cases: list[str]) -> Outcomes:
    """In a rank: make `setup`, then call one case after the other."""
    warnings.simplefilter("always")  # some cases look for one
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # loaders start workers
    multiprocessing.set_start_method("fork", force=True)  # which can have the script's classes
    outcomes: Outcomes = {}
    with tempfile.TemporaryDirectory() as folder, silence(), silence(contextlib.redirect_stderr):
        shared = Path(tempfile.gettempdir(), f"nanofinetune-peers-{os.environ['MASTER_PORT']}")  # some write files
        shared.mkdir(exist_ok=True)
        os.chdir(shared if int(os.environ["WORLD_SIZE"]) > 1 else folder)
        module = load(name)
        exec(setup, vars(module))
        for case in cases:
            try:
                exec(case, vars(module))
                outcomes[case] = "pass"
            except BaseException as error:  # pytest's own failures are no Exceptions
                outcomes[case] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        os.chdir(folder)
    return outcomes
