"""Colours that can be told apart, by people who see fewer of them too, and texts that can be read.

python -m pytest tests/report/test_style.py
"""

import base64
import hashlib
import re
from itertools import combinations

import numpy as np
import pytest

from nanofinetune.report.style import DARK, DASHES, DAY, LIGHT, NIGHT, SHEET, policy

# Viénot, Brettel & Mollon 1999: what is left of linear RGB without red-, or without green-sensitive cones.
MISSING = {
    "none": np.eye(3),
    "red": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "green": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}


def linear(colour):
    """ "#rrggbb" -> linear RGB (3,)."""
    values = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Linear RGB -> CIELAB, in which distances are about what one sees."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """WCAG 2's ratio of luminances."""
    light, dark = sorted((np.dot([0.2126, 0.7152, 0.0722], linear(c)) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("cones", MISSING)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart(palette, cones):
    """The first four, which are what most pages have; further runs have dashes of their own besides."""
    seen = [lab(MISSING[cones] @ linear(colour)) for colour in palette[:4]]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 12
    assert len(set(DASHES)) == len(DASHES) == len(LIGHT) == len(DARK)


@pytest.mark.parametrize(("theme", "palette"), [(DAY, LIGHT), (NIGHT, DARK)], ids=["light", "dark"])
def test_texts_and_lines_stand_out_from_the_paper(theme, palette):
    named = dict(re.findall(r"--(\w+):(#\w+);", theme))
    for paper in (named["paper"], named["card"]):
        assert contrast(named["ink"], paper) > 7 and contrast(named["faint"], paper) > 4.5
        assert min(contrast(colour, paper) for colour in palette) > 2.8


def test_the_policy_names_the_sheets_own_hash():
    digest = base64.b64encode(hashlib.sha256(SHEET.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy(SHEET) and "unsafe" not in policy(SHEET)
    assert policy(SHEET) != policy(SHEET + " ")
