"""bench/scale.py: both sides of a case do the same work, its arithmetic, its turns and its table. Never a time.

    python -m pytest tests/bench/test_scale.py            hundreds of rows, in this process
    python -m pytest tests/bench/test_scale.py -m slow    the real command, beside another checkout

References: datasets 5.2, accelerate 1.15 and scikit-learn 1.9, which are the other side of each case.
"""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import readme
import scale


@pytest.fixture
def case(tmp_path, tiny_model, monkeypatch):
    """A function that measures a case in this process: name, size -> its figures."""
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(tmp_path / "tokens"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    def measure(name, size, **more):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        asked = {"size": size, "model": tiny_model, "folder": str(folder), "cached": False}
        return scale.CASES[name](SimpleNamespace(**asked | more))

    return measure


def both(case, piece, size, **more):
    """Our figures, after both sides have been found to have done the same."""
    sides = {side: case(f"{piece} {side}", size, **more) for side in ("library", "ours")}
    scale.check_same(piece, {"": sides})
    assert set(scale.SAME[piece]) <= set(sides["library"]) & set(sides["ours"])
    return sides["ours"]


def test_a_table_has_the_rows_and_tokens_of_datasets(case, tmp_path):
    pytest.importorskip("accelerate")
    scale.write_table(tmp_path / "table.csv", 300)
    sides = {side: case(f"table {side}", 300, file=str(tmp_path / "table.csv")) for side in ("library", "ours")}
    assert sides["ours"]["rows"] == sides["library"]["rows"] == 300
    assert sides["ours"]["tokens"] == sides["library"]["tokens"] > 300 * 16
    again = case("table ours", 300, file=str(tmp_path / "table.csv"), cached=True)
    assert again["tokens"] == sides["ours"]["tokens"]


def test_rows_have_the_tokens_of_datasets_map(case):
    assert both(case, "rows", 300)["tokens"] > 300 * 16


def test_an_evaluation_has_the_scores_of_gather_for_metrics_and_sklearn(case):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(True)
    assert 0.3 < both(case, "evaluate", 333)["accuracy"] < 0.7


@pytest.mark.parametrize("classes", [2, 150, 3000])
def test_scores_of_many_classes_are_those_of_sklearn(case, classes):
    pytest.importorskip("sklearn")
    assert 0.4 < both(case, "classes", classes)["accuracy"] < 0.8


@pytest.mark.parametrize("kept", [0, 3])
def test_saves_keep_as_many_as_they_say(case, tmp_path, kept):
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(True)
    for side in ("library", "ours"):
        case(f"saves {side}", kept)
        folders = {path.name for path in (tmp_path / f"saves-{side}" / "checkpoints").iterdir()}
        assert len(folders) == kept + 1 and f"{kept + scale.SAVES}" in "".join(folders)


def test_a_slope_is_that_of_numpy_without_the_smallest_size():
    sizes, costs = [10, 1000, 50_000, 900_000], [70.0, 3.0, 200.0, 9000.0]
    reference = np.polyfit(np.log(sizes[1:]), np.log(costs[1:]), 1)[0]
    assert scale.slope(sizes, costs) == pytest.approx(reference, abs=1e-6)
    assert scale.slope([0, 100, 1000], [3.0, 5.0, 50.0]) == pytest.approx(1.0)  # 0 has no logarithm
    assert scale.slope([100], [1.0]) is None


def test_sides_take_strict_turns_and_a_figure_is_the_median():
    order, seconds = [], iter([1.0, 2.0, 9.0, 4.0, 5.0, 3.0] * 2)

    def measure(name, size, **_):
        order.append((name, size))
        return {"seconds": next(seconds), "tokens": size}

    rows = scale.compare("rows", [100, 200], "model", None, 3, measure)
    turn = [("rows library", 100), ("rows ours", 100)]
    assert order[:6] == turn * 3 and order[6:] == [(name, 200) for name, _ in turn * 3]
    (row,) = rows
    assert (row["library"], row["ours"]) == ([5.0, 5.0], [3.0, 3.0]) and row["sizes"] == [100, 200]
    assert row["figure"] == "seconds" and row["ours slope"] == 0.0
    assert "rows: seconds, at 100, 200 rows" in scale.line(row)


def test_a_side_that_does_something_else_is_refused():
    def measure(name, size, **_):
        return {"seconds": 1.0, "tokens": size - ("ours" in name)}

    with pytest.raises(SystemExit, match=r"rows .*tokens differs: {'library': 100, 'ours': 99}"):
        scale.compare("rows", [100], "model", None, 1, measure)


def test_a_tree_is_measured_in_turns_with_this_one():
    asked = []

    def measure(name, tree=None, **_):
        asked.append((name, tree))
        return {"seconds": 1.0, "rows": 20, "tokens": 1}

    rows = scale.compare("table", [20], "model", "/old", 1, measure)
    assert asked[4:] == [("command", "/old")] * 2 + [("command", str(ROOT))] * 2
    assert [(row["what"], "before" in row) for row in rows] == [
        ("cold", False), ("cached", False), ("command, cold", True), ("command, cached", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--bogus", "unrecognized arguments: --bogus"),
        ("nothing", "nothing: there is no such piece; choose from table, rows, evaluate, classes, saves"),
        ("--sizes 100 50", "--sizes 100 50: table takes numbers from 20 on, each greater than the one before"),
        ("rows --sizes 3", "--sizes 3: rows takes numbers from 20 on"),
        ("--sizes many", "--sizes: many is not a whole number from 0"),
        ("--tree .", "--tree .: there is no train.py in it; name a checkout of the project"),
        ("--repeats 0", "--repeats: 0 is not a whole number from 1"),
        ("--record a/b", "--record a/b: a name of letters, digits and underscores"),
    ],
)
def test_what_it_does_not_know_is_one_line_and_exit_2(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scale.py", *words.split()])
    assert scale.run_main("scale.py", scale.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"scale.py: {said}") and err.count("\n") == 1


def test_the_table_of_a_record_and_of_none(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RECORDS", tmp_path)
    assert readme.scale(ROOT) == ""
    row: dict[str, Any] = {"piece": "rows", "what": "", "figure": "seconds", "of": "rows", "sizes": [1000, 20_000]}
    row |= {"library": [2.5, 51.23], "library slope": 1.01, "ours": [1.5, 30.0], "ours slope": None}
    names = ("python", "torch", "transformers", "accelerate", "datasets")
    machine = {"cpu": "a CPU", "cores": 2} | dict.fromkeys(names, "1.0")
    record = {"what": "scale", "machine": machine, "repeats": 3, "rows": [row]}
    (tmp_path / "2026-01-02_cpu_scale.json").write_text(json.dumps(record))
    last = readme.scale(ROOT).splitlines()[-1]
    assert last == "| rows: seconds | 1,000, 20,000 rows | 2.5, 51.23 | 1.5, 30 | 1.01 |  |"


def test_a_record_keeps_the_pieces_that_are_not_measured_again(monkeypatch, capsys, tmp_path, tiny_model):
    base, turns = tmp_path / "2026-01-02_cpu_scale", iter(range(1, 9))
    monkeypatch.setattr(scale, "record_base", lambda *_: base)
    monkeypatch.setattr(scale, "compare", lambda piece, *_: [made(piece, next(turns))])

    def made(piece, seconds):
        row = {"piece": piece, "what": "", "figure": "seconds", "of": "rows", "sizes": [20]}
        return row | {"ours": [seconds], "ours slope": None}

    for words in ("saves rows", "table saves"):
        monkeypatch.setattr(sys, "argv", ["scale.py", "--model", tiny_model, "--record", "scale", *words.split()])
        assert scale.run_main("scale.py", scale.main) == 0
    kept = base.with_suffix(".json").read_text()
    found = {row["piece"]: row["ours"] for row in json.loads(kept)["rows"]}
    assert found == {"table": [3], "rows": [2], "saves": [4]} and list(found) == ["table", "rows", "saves"]
    command, other_model = list(sys.argv), shutil.copytree(tiny_model, tmp_path / "other")
    for more, name in ((["--repeats", "2"], "repeats"), (["--model", str(other_model)], "model")):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert scale.run_main("scale.py", scale.main) == 2
        assert f"2026-01-02_cpu_scale.json has another {name}" in capsys.readouterr().err
    assert next(turns) == 5  # nothing was measured
    assert base.with_suffix(".json").read_text() == kept


@pytest.mark.slow  # a dozen processes
def test_the_command_measures_two_checkouts(tmp_path, tiny_model):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "nanofinetune", tree / "nanofinetune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tree)
    command = [sys.executable, str(ROOT / "bench" / "scale.py"), "table", "classes", "--sizes", "40"]
    command += ["--model", tiny_model, "--tree", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {(row["what"], row["figure"]): row for row in rows}
    assert all(found["command, cold", "seconds"][side][0] > 0 for side in ("before", "ours"))
    assert found["run", "result.json, KiB"]["ours"][0] > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]
