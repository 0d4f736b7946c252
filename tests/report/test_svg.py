"""matplotlib's drawings, made fit for a page: no id twice, no inline style, the page's colours.

python -m pytest tests/report/test_svg.py
"""

import io
import re
from xml.etree import ElementTree

import pytest

from nanofinetune.report.svg import NAMES, alone, inline, paint

matplotlib = pytest.importorskip("matplotlib")


def drawn():
    """A drawing with marks, a clip and text, as matplotlib writes it."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([1, 2, 3], [1, 3, 2], marker="o", color=paint("c3"))
        axes.set_title("a < b")
        file = io.StringIO()
        figure.savefig(file, format="svg")
    return file.getvalue()


def test_drawings_share_no_id():
    raw = drawn()
    ids = set(re.findall(r'id="([^"]+)"', raw))
    assert ids & set(re.findall(r'id="([^"]+)"', drawn())), "matplotlib's own do"
    one, other = (inline(raw, name, "A drawing") for name in ("one", "other"))
    found = [re.findall(r' id="([^"]+)"', text) for text in (one, other)]
    assert found[0] and not set(found[0]) & set(found[1]) and not ids & set(found[0])
    used = set(re.findall(r'href="#([^"]+)"', one)) | set(re.findall(r"url\(#([^)]+)\)", one))
    assert used == set(found[0])


def test_a_drawing_has_neither_style_nor_link():
    text = inline(drawn(), "one", "A drawing")
    assert "style=" in drawn() and "<metadata" in drawn(), "matplotlib's own has"
    assert not re.search(r"style|metadata|https?:|xmlns|<!--", text)
    assert "var(--c3)" in text and "a &lt; b" in text and 'aria-label="A drawing"' in text
    ElementTree.fromstring(text)


def test_every_colour_of_the_page_can_be_painted():
    for name in NAMES:
        text = f'<svg xmlns="http://www.w3.org/2000/svg"><path style="fill: {paint(name)}"/></svg>'
        assert f'fill="var(--{name})"' in inline(text, "a", "b")


def test_a_drawing_alone_is_a_document():
    text = alone(inline(drawn(), "one", "A drawing"), ":root{--c3:#fff}", 600)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["width"] == "600"
    assert ":root{--c3:#fff}" in text
