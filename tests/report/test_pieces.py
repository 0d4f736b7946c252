"""Pieces of html: whatever is said is escaped.

python -m pytest tests/report/test_pieces.py
"""

import html

import pytest

from nanofinetune.report.pieces import figure, number, swatches, table, text

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@given(st.text())
def test_whatever_is_said_is_escaped(value):
    for said in (text(value), swatches([value]), table(["", value], [(value, ["1"])]), figure("", value, value)):
        said.encode()
        assert all(c.isprintable() for c in said)
    assert not set("<>\"'") & set(text(value))
    if value.isprintable() and len(value) <= 300:
        assert html.unescape(text(value)) == value


@given(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()))
def test_a_number_can_be_drawn(value):
    found = number(value)
    assert found is None or (type(value) in (int, float) and found == value and abs(found) <= 1e30)
