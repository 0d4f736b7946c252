"""The shape of the code: floors, import isolation, the house form of every module, the size of the package.

python -m pytest tests/test_layers.py
"""

import ast
import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "nanofinetune"
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")

# A file imports only from lower floors.
FLOORS = {
    0: {
        "errors",
        "cli",
        "device",
        "collate",
        "optim",
        "schedule",
        "metrics",
        "sampler",
        "tasks",
        "stdlib_pairs",
        "dropout",
        "embedding",
    },
    1: {"distributed", "lean", "pretrained"},
    2: {"data", "ddp", "loader", "checkpoint"},
    3: {"accelerator", "faults", "progress"},
    4: {"launch", "predict", "trace", "exercise"},
}
# errors.py and cli.py are the ground that the ground floor stands on: who raises for people may import them.
GROUND = {"errors": {"cli", "device", "dropout", "metrics", "stdlib_pairs"}, "cli": set()}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
HEAVY = ("transformers", "datasets", "accelerate")


def imports_of(source: str) -> set[str]:
    """Names of all modules that a source text imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(name: str, source: str) -> list[str]:
    """Which of the package's own modules `name` imports although they are not on a lower floor."""
    inner = {module.split(".")[1] for module in imports_of(source) if module.startswith("nanofinetune.")} & set(
        FLOOR_OF
    )
    allowed = {other for other in FLOOR_OF if FLOOR_OF[other] < FLOOR_OF[name]}
    allowed |= {other for other, importers in GROUND.items() if name in importers}
    return sorted(inner - allowed - {name})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_lower_floors(path):
    assert path.stem in FLOOR_OF, "a new module needs a floor"
    assert not wrong_imports(path.stem, path.read_text())


@pytest.mark.parametrize("path", [path for path in MODULES if FLOOR_OF[path.stem] == 0], ids=lambda path: path.stem)
def test_the_ground_floor_does_not_import_torch_distributed(path):
    assert not [name for name in imports_of(path.read_text()) if name.startswith("torch.distributed")]


def test_the_floors_test_can_fail():
    assert wrong_imports("collate", "from nanofinetune.data import TokenStore") == ["data"]
    assert wrong_imports("data", "import nanofinetune.accelerator") == ["accelerator"]
    assert not wrong_imports("data", "from nanofinetune.collate import FlatRows")


def loaded_by(statement: str) -> list[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return ast.literal_eval(done.stdout)


def test_importing_the_package_loads_neither_transformers_nor_datasets():
    names = ", ".join(f"nanofinetune.{path.stem}" for path in MODULES)
    assert loaded_by(f"import nanofinetune, {names}") == []


def test_the_import_isolation_test_can_fail():
    assert loaded_by("import datasets") == ["datasets"]


def test_notebook_launcher_is_there_when_it_is_asked_for():
    """`launch` is imported late, since it is a program too; the name is the package's own like all others."""
    code = (
        "import sys, nanofinetune\n"
        "assert 'nanofinetune.launch' not in sys.modules\n"
        "assert set(nanofinetune.__all__) <= set(dir(nanofinetune))\n"
        "from nanofinetune import *\n"
        "assert notebook_launcher is sys.modules['nanofinetune.launch'].notebook_launcher\n"
        "assert not hasattr(nanofinetune, 'notebook_launchers')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=120)


def symbols(text: str) -> list[str]:
    """Dotted names of library symbols in an Underneath block: with or without backticks."""
    libraries = "accelerate|transformers|torch|datasets|evaluate|sklearn|scipy"
    return re.findall(rf"(?<![\w./])(?:{libraries})(?:\.\w+)+", text)


def resolve(dotted: str) -> object:
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not dotted.startswith(error.name):
                raise  # an extra that the module itself needs
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=lambda path: path.stem)
def test_a_module_has_the_house_form(path):
    """An example, an Underneath block whose library symbols exist, a Proof block whose tests exist."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(doc.splitlines()[0]) <= 120 and ">>> " in doc
    underneath, _, proof = doc.partition("\nProof:")
    assert "\nUnderneath:" in underneath, "no Underneath: block"
    underneath = underneath.partition("\nUnderneath:")[2]
    named = re.findall(r"\btest_\w+\b(?!\.py)(?!/)", proof)
    assert named, "the Proof: block names no test"
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in named if f"def {name}(" not in tests]
    assert not missing, f"tests that do not exist: {missing}"
    for file in re.findall(r"tests/[\w/]+\.py", proof):
        assert (ROOT / file).is_file(), file
    for dotted in dict.fromkeys(symbols(underneath)):
        library = dotted.split(".")[0]
        if library != "torch" and importlib.util.find_spec(library) is None:
            continue  # an optional oracle
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # looking a name up imports the library's own modules, with their warnings
            resolve(dotted)


def test_a_missing_symbol_is_noticed():
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve("torch.optim.AdamWWithWings")


def test_size_of_the_package_is_reported(record_property):
    """Reported, not capped: run with -rA or --junit-xml to see it."""
    sizes = {path.name: len(path.read_text().splitlines()) for path in sorted(PACKAGE.glob("*.py"))}
    record_property("lines", sizes)
    print("\n".join(f"{lines:5} {name}" for name, lines in sizes.items()), f"\n{sum(sizes.values()):5} in all")
    assert sum(sizes.values()) > 0


def test_no_file_names_a_place_on_a_developers_machine():
    """No absolute home, temporary or checkout path in anything that is committed."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    tops = "|".join(("home", "root", "Users", "work"))  # (put together here, so that this file holds no such path)
    pattern = re.compile(rf"/(?:{tops})/\w+|site-packages/gt_")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", ".json") and path != Path(__file__):
            assert not pattern.search(path.read_text()), name
