"""A drawing of matplotlib's made fit for a page: several in one document, in the page's colours, without inline styles.

>>> drawn = '<svg xmlns="http://www.w3.org/2000/svg"><path id="a" style="fill: none; stroke: #010000"/></svg>'
>>> inline(drawn, "loss", "Loss")
'<svg role="img" aria-label="Loss"><path fill="none" stroke="var(--c0)" /></svg>'

Underneath: `matplotlib.backends.backend_svg.RendererSVG` (matplotlib 3.11)
  - writes a document: with a date, and with ids that repeat in the next one. Here both are gone, and an id that is used
    gets the drawing's name;
  - writes `style="..."`, which a page without inline styles ignores. Here these are attributes;
  - knows colours, and no themes. Here a drawing uses a few marked colours (`paint`), which become the page's variables.

Proof: test_drawings_share_no_id, test_a_drawing_has_neither_style_nor_link in tests/report/test_svg.py.
"""

from __future__ import annotations

import re
from html import escape
from xml.etree import ElementTree

NAMES = ("c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "ink", "line", "paper")
HREF = "{http://www.w3.org/1999/xlink}href"
USED = re.compile(r"url\(#([^)]+)\)")


def paint(name: str) -> str:
    """The marked colour that stands for one of the page's, as matplotlib takes it: c0 to c7, ink, line, paper."""
    return f"#{NAMES.index(name) + 1:02x}0000"


def inline(drawn: str, name: str, label: str) -> str:
    """An svg element for html. `name`: of this drawing on its page; `label`: what a screen reader says."""
    root = ElementTree.fromstring(drawn)
    used = {match for element in root.iter() for value in element.attrib.values() for match in USED.findall(value)}
    used |= set(USED.findall(drawn)) | {e.attrib[HREF][1:] for e in root.iter() if HREF in e.attrib}
    new = {old: f"{name}-{k}" for k, old in enumerate(sorted(used))}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _tidy(element, new)
    view = root.attrib.get("viewBox")
    root.attrib.clear()
    root.attrib.update({"role": "img", "aria-label": label} | ({"viewBox": view} if view else {}))
    return re.sub(r"\s*\n\s*", "", ElementTree.tostring(root, encoding="unicode"))


def alone(element: str, styles: str, width: int) -> str:
    """An svg element as a file of its own, with the page's themes."""
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
    rules = "svg{background:var(--paper);font-family:Helvetica,Arial,sans-serif}text{fill:var(--ink)}"
    head, _, rest = element.removeprefix("<svg ").partition(">")
    return f"{opening}{head}><style>{escape(styles, quote=False)}{rules}</style>{rest}\n"


def _tidy(element: ElementTree.Element, new: dict[str, str]) -> None:
    """Attributes for styles, variables for marked colours, new ids for those that are used and none for the others."""
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        if key == "style":
            attributes |= dict(_declaration(one) for one in value.split(";") if ":" in one)
        elif key == HREF:
            attributes["href"] = f"#{new[value[1:]]}"
        elif key != "id" or value in new:
            attributes[key] = new[value] if key == "id" else value
    for key, value in attributes.items():
        if re.fullmatch(r"#[0-9a-f]{2}0000", value) and 0 < int(value[1:3], 16) <= len(NAMES):
            attributes[key] = f"var(--{NAMES[int(value[1:3], 16) - 1]})"
        elif found := USED.match(value):
            attributes[key] = f"url(#{new[found[1]]})"
    if element.tag == "text":
        attributes.pop("font-family", None)  # the page's
    element.attrib.clear()
    element.attrib.update(attributes)


def _declaration(text: str) -> tuple[str, str]:
    """One declaration of a style as an attribute. `font` is no attribute: of it the size is kept."""
    key, _, value = text.partition(":")
    key, value = key.strip(), value.strip()
    if key == "font":
        size = re.search(r"[\d.]+px", value)
        return "font-size", size[0] if size else "10px"
    return key, value
