"""The small pieces of html that a page is made of: text, a table, a drawing with its caption, a legend.

>>> text("<b>"), text(0.123456)
('&lt;b&gt;', '0.1235')
>>> table(["", "rows"], [("yes", ["3"])]).count("<td")
1

Underneath: nothing of a library's.
  - Names, texts and paths are a stranger's: whatever is not written in these files goes through `text`.
  - A table is wrapped, so that a wide one scrolls by itself and not the page.

Proof: test_whatever_is_said_is_escaped, test_a_page_loads_nothing_and_runs_nothing in tests/report/test_pieces.py and
tests/report/test_page.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from nanofinetune.ground.errors import shown
from nanofinetune.report.style import DASHES, LIGHT


def text(value: Any, most: int = 300) -> str:
    """Anything as text of html: escaped, of one line, printable, not too long."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    return escape(shown(str(value), most=most))


def number(value: Any) -> float | None:
    """A number that can be drawn, None of anything else."""
    return float(value) if type(value) in (int, float) and abs(value) <= 1e30 else None


def figure(drawing: str, title: str, caption: str = "") -> str:
    """A drawing under its title, and over what it means."""
    said = f"<figcaption>{text(caption, 600)}</figcaption>" if caption else ""
    return f"<figure><h3>{text(title, 80)}</h3>{drawing}{said}</figure>"


def swatches(names: Iterable[str]) -> str:
    """Which colour and dashes are whose."""
    items = []
    for k, name in enumerate(names):
        dashes = f' stroke-dasharray="{DASHES[k % len(DASHES)]}"' if DASHES[k % len(DASHES)] else ""
        line = f'<line x1="1" y1="6" x2="33" y2="6" stroke="var(--c{k % len(LIGHT)})" stroke-width="3"{dashes}/>'
        items.append(
            f'<li><svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">{line}</svg>{text(name, 80)}</li>'
        )
    legend = "".join(items)
    return f'<ul class="legend">{legend}</ul>'


def table(
    head: Sequence[str], rows: Sequence[tuple[str, list[str]]], *, numbers: bool = True, caption: str = ""
) -> str:
    """A table; the cells of `rows` are html, names and `head` are not yet."""
    kind = ' class="n"' if numbers else ""
    top = "".join(f'<th scope="col"{kind if k else ""}>{text(name, 60)}</th>' for k, name in enumerate(head))
    body = ""
    for name, cells in rows:
        told = "".join(f"<td{kind}>{cell}</td>" for cell in cells)
        body += f'<tr><th scope="row">{text(name, 80)}</th>{told}</tr>'
    above = f'<p class="faint">{text(caption)}</p>' if caption else ""
    first = f"<tr>{top}</tr>" if head else ""
    words = "" if numbers or len(head) > 2 else ' class="words"'
    return f'{above}<div class="wide"><table{words}>{first}{body}</table></div>'
