"""The pictures of a run in README and docs are those of the page as it is now.

python -m pytest tests/test_pictures.py
"""

import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT, load_script

matplotlib = pytest.importorskip("matplotlib")
pictures = load_script(ROOT / "docs" / "pictures.py")


def noted():
    """What docs/report.png says it was made from: the hash of a page, and matplotlib's version."""
    from PIL import Image

    with Image.open(pictures.PICTURE) as picture:
        return picture.info["made from"].split(" matplotlib ")


def needs_the_same_matplotlib():
    if matplotlib.__version__ != noted()[1]:
        pytest.skip(f"the pictures were drawn by matplotlib {noted()[1]}, and here is {matplotlib.__version__}")


def test_the_curve_is_drawn_from_its_run():
    needs_the_same_matplotlib()
    assert pictures.curve() == pictures.CURVE.read_text(), "run: python docs/pictures.py"
    ElementTree.fromstring(pictures.curve())


def test_the_picture_is_of_the_page_as_it_is_now():
    needs_the_same_matplotlib()
    assert pictures.made_from().split(" matplotlib ")[0] == noted()[0], "run: python docs/pictures.py"


def test_pictures_are_small_and_shown():
    shown = {"README.md": "docs/report.png", "docs/commands.md": "curve.svg"}
    for document, picture in shown.items():
        assert f"]({picture})" in (ROOT / document).read_text()
    assert pictures.PICTURE.stat().st_size < 150_000 and pictures.CURVE.stat().st_size < 150_000
    assert not re.search(r'"/|\b/(?:home|tmp|usr)\b', "".join(path.read_text() for path in pictures.RUN.iterdir()))
