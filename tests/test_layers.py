"""The shape of the code: floors, import isolation, the house form of every module, the size of the package.

python -m pytest tests/test_layers.py
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PACKAGE = ROOT / "nanofinetune"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))

# A file imports only from lower floors. The numbers of the rooms say in which order they build on each other; within
# a room a file may stand higher than its neighbours.
FLOORS = {
    0: "ground/errors data/outline data/head data/balance data/unpack",
    1: "ground/cli ground/xla ground/process ground/precision step/collate step/optim step/schedule step/metrics"
    " step/order ranks/shard ranks/naive_ddp ranks/ddp data/tasks data/files data/padding data/limits cpu/memory"
    " data/multilabel data/leaks launch/rendezvous ground/names cpu/dropout report/thin report/judge report/style"
    " report/svg ground/machine ground/progress run/answers",
    2: "ground/device ground/environment cpu/mpnet data/stdlib_pairs data/pretrained data/columns"
    " data/rows run/schema run/scores report/read report/pieces",
    3: "ranks/world cpu/lean data/load run/folders run/best report/plots report/tables",
    4: "ranks/collectives data/tokens run/checkpoint run/signals run/watch report/page",
    5: "ranks/loader settings run/state run/log run/same run/evaluation data/cache launch/job launch/config"
    " dropin/parallel dropin/processes dropin/logs dropin/local_sgd dropin/tracking dropin/available dropin/absent"
    " report/write",
    6: "wrappers run/resume data/job dropin/saving dropin/profiling dropin/partial_state dropin/uneven launch/notebook"
    " report/__main__",
    7: "accelerator run/plan run/result predict exercise launch/__main__ dropin/attributes dropin/operations",
    8: "run/run trace/observe",
    9: "trace/told dropin/batch_size run/trial",
    10: "trace/picture trace/timeline",
    11: "trace/__main__",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}
ALONE = ("step/", "ranks/shard", "ranks/naive_ddp", "ranks/ddp")  # these import nothing of ours
# Who may import from a room that is not open to all.
# (predict only evaluates, as train.py does between epochs: the same encoder, so the same numbers.)
PRIVATE = {"cpu": ("cpu", "predict"), "dropin": ("accelerator", "dropin")}
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


def own_imports(source: str) -> set[str]:
    """Names of the package's own modules that a source text imports: "ground/errors"."""
    return {name.removeprefix("nanofinetune.").replace(".", "/") for name in imports_of(source)} & set(FLOOR_OF)


def wrong_imports(name: str, source: str) -> list[str]:
    """Which of the package's own modules `name` imports although they are not on a lower floor, or not open to it."""
    allowed = {other for other in FLOOR_OF if FLOOR_OF[other] < FLOOR_OF[name]}
    allowed -= {
        other
        for other in allowed
        for room, importers in PRIVATE.items()
        if other.startswith(room + "/") and not name.startswith(importers)
    }
    if name.startswith(ALONE):
        allowed = set()
    return sorted(own_imports(source) - allowed - {name})


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


EACH_MODULE = pytest.mark.parametrize("path", MODULES, ids=named)


@EACH_MODULE
def test_a_module_imports_only_from_lower_floors(path):
    assert named(path) in FLOOR_OF, "a new module needs a floor"
    assert not wrong_imports(named(path), path.read_text())


@EACH_MODULE
def test_what_needs_no_ranks_does_not_import_torch_distributed(path):
    if not named(path).startswith(("step/", "data/", "cpu/", "ground/", "ranks/shard")):
        pytest.skip("this file is about ranks")
    assert not [name for name in imports_of(path.read_text()) if name.startswith("torch.distributed")]


def test_the_floors_test_can_fail():
    assert wrong_imports("step/collate", "from nanofinetune.data.tokens import TokenStore") == ["data/tokens"]
    assert wrong_imports("ranks/ddp", "from nanofinetune.ground.errors import UsageError") == ["ground/errors"]
    assert wrong_imports("data/load", "import nanofinetune.accelerator") == ["accelerator"]
    assert wrong_imports("accelerator", "from nanofinetune.cpu.lean import use_lean_encoder") == ["cpu/lean"]
    assert wrong_imports("data/load", "from nanofinetune.ground import errors") == []


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_it_is_for_and_in_which_order_to_read_it(room):
    """Folders are one level deep; each opens with a paragraph that names its files."""
    assert not [path for path in room.iterdir() if path.is_dir() and path.name != "__pycache__"]
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    files = {path.stem for path in room.glob("*.py") if path.stem not in ("__init__", "__main__")}
    assert files == set(re.findall(r"`(\w+)`", doc)) & files, "name every file of the room"
    assert len(doc.splitlines()) <= 8 and "ead" in doc


def test_tests_mirror_the_package():
    """A test file of a room bears the name of one of its modules."""
    for path in (ROOT / "tests").glob("*/test_*.py"):
        room, module = path.parent.name, path.stem.removeprefix("test_")
        if (PACKAGE / room).is_dir() and (room, module) not in OTHER_TESTS:
            assert (PACKAGE / room / f"{module}.py").is_file() or module == room, path


# Test files that are about several modules of a room at once.
OTHER_TESTS = {
    ("ranks", "equal_ranks"), ("ranks", "nodes"), ("ranks", "ddp_edges"), ("ground", "xla_calls"),
    ("step", "step_properties"), ("run", "start"), ("run", "damage"), ("data", "architectures"), ("data", "sizes"),
    ("dropin", "public_names"), ("dropin", "scripts"), ("cpu", "other_encoders"),
    ("report", "browser"), ("report", "main"),
}  # fmt: skip


def loaded_by(statement: str) -> list[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return ast.literal_eval(done.stdout)


def test_importing_the_package_loads_neither_transformers_nor_datasets():
    names = ", ".join(f"nanofinetune.{named(path).replace('/', '.')}" for path in MODULES if path.stem != "__main__")
    assert loaded_by(f"import nanofinetune, {names}") == []


def test_the_import_isolation_test_can_fail():
    assert loaded_by("import datasets") == ["datasets"]


def test_notebook_launcher_is_there_when_it_is_asked_for():
    """`launch` is imported late, since it is a program too; the name is the package's own like all others."""
    code = (
        "import sys, nanofinetune\n"
        "assert 'nanofinetune.launch.notebook' not in sys.modules\n"
        "assert set(nanofinetune.__all__) <= set(dir(nanofinetune))\n"
        "from nanofinetune import *\n"
        "assert notebook_launcher is sys.modules['nanofinetune.launch.notebook'].notebook_launcher\n"
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


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=named)
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
            continue  # an optional reference
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # looking a name up imports the library's own modules, with their warnings
            resolve(dotted)


def test_a_missing_symbol_is_noticed():
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve("torch.optim.AdamWWithWings")


def code_lines(path: Path) -> int:
    """Lines that are neither empty, nor a comment, nor a docstring."""
    text = path.read_text()
    said: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for i, line in lines if i not in said and line.strip() and not line.strip().startswith("#"))


CORE_LIMIT = 2800


def core() -> list[Path]:
    """What the mission names: one device, many ranks, the facade over both, the loop."""
    rooms = [path for room in ("step", "ranks") for path in sorted((PACKAGE / room).glob("*.py"))]
    return [*rooms, PACKAGE / "accelerator.py", ROOT / "train.py"]


def test_the_core_stays_short_and_readme_says_how_short():
    lines = sum(map(code_lines, core()))
    assert lines < CORE_LIMIT
    assert f"{lines:,} lines of code" in (ROOT / "README.md").read_text(), f"the core has {lines:,} lines of code"


def test_the_facade_opens_with_what_a_loop_calls():
    text = (PACKAGE / "accelerator.py").read_text()
    assert len(text.splitlines()) <= 450
    facade = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    methods = [node.name for node in facade.body if isinstance(node, ast.FunctionDef)]
    assert methods[:4] == ["prepare", "accumulate", "backward", "gather_for_metrics"]


def test_the_loop_is_short():
    """train() has at most 65 lines and its inner loop at most 15, both as they stand in the file."""
    body: list[Any] = ast.parse((ROOT / "train.py").read_text()).body
    train = next(node for node in body if getattr(node, "name", "") == "train")
    assert train.end_lineno - train.lineno + 1 <= 65
    loops: list[Any] = [node for node in ast.walk(train) if isinstance(node, ast.For)]
    inner = [node for node in loops if "batches" in ast.unparse(node.iter)]
    assert len(inner) == 1 and inner[0].end_lineno - inner[0].lineno + 1 <= 15


def test_accelerates_prepare_is_as_long_as_readme_says():
    """The number that README puts beside ours."""
    accelerate = pytest.importorskip("accelerate.accelerator")
    lines = Path(accelerate.__file__).read_text().splitlines()
    assert (len(inspect.getsource(accelerate.Accelerator.prepare).splitlines()), len(lines)) == (165, 4400)


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
