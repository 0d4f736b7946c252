"""The page as text: it loads and runs nothing, whatever is in it is escaped, and the same files give the same page.

python -m pytest tests/report/test_page.py
"""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from runs import PLOTS, write_log, write_run

from nanofinetune.report.page import differences, page
from nanofinetune.report.read import read_run
from nanofinetune.report.style import SHEET, policy

pytest.importorskip("matplotlib")


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def test_a_page_loads_nothing_and_runs_nothing(tmp_path):
    text = page([read_run(write_run(tmp_path))])
    found = Elements(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base", "image"} & set(found.tags)
    names = {name for _, name, _ in found.attributes}
    assert "style" not in names and not [name for name in names if name.startswith("on")]
    links = [value for _, name, value in found.attributes if name in ("href", "xlink:href", "src", "action")]
    assert links and all(value.startswith("#") for value in links), "uses of the drawings' own marks"
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text) and "@import" not in text
    assert f'content="{policy(SHEET)}"' in text and f"<style>{SHEET}</style>" in text
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_ids_are_there_once(tmp_path):
    found = Elements(page([read_run(write_run(tmp_path))]))
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in found.attributes if name == "href"}
    used |= {match for _, _, value in found.attributes for match in re.findall(r"^url\(#(.+)\)$", value)}
    assert used == set(ids)


HOSTILE = "</title><script>alert(1)</script>\x1b[2J\u202e$\\frac{$&\ud800\x00\"'"


def test_hostile_names_are_text_everywhere(tmp_path):
    classes = [dict.fromkeys(("precision", "recall", "f1"), 0.5) | {"rows": 1, "predicted": 1, "label": HOSTILE}] * 2
    evaluations = [{HOSTILE: 0.5, "loss": 1.0}, {HOSTILE: 0.6}]
    names = ("arguments", "plan", "versions", "machine")
    result: dict[str, Any] = {name: {HOSTILE: HOSTILE} for name in names} | {
        HOSTILE: 0.6,
        "classes": classes,
        "evaluations": evaluations,
    }
    folder = write_run(tmp_path / "<b>&$x$", model=HOSTILE, data=HOSTILE, notes=[HOSTILE], **result)
    other = write_run(tmp_path / "_hidden", **result)
    for runs in ([read_run(folder)], [read_run(folder), read_run(other)]):
        text = page(runs)
        assert "<script" not in text and "<b>&$" not in text
        assert not set("\x1b\u202e\ud800\x00") & set(text)
        assert "&lt;/title&gt;&lt;script&gt;alert(1)" in text and "&lt;b&gt;&amp;$x$" in text
        text.encode()


def test_the_same_files_give_the_same_page(tmp_path):
    write_run(tmp_path)
    assert page([read_run(tmp_path)]) == page([read_run(tmp_path)])


def test_a_running_run_has_a_page_too(tmp_path):
    write_log(tmp_path, 20)
    text = page([read_run(tmp_path)])
    assert "result.json is not there: the run has not ended" in text
    assert PLOTS[0] in text and "Calibration" not in text


def test_several_runs_say_what_differs(tmp_path):
    one = read_run(write_run(tmp_path / "one"), "one")
    other = read_run(
        write_run(tmp_path / "other", arguments={"lr": 5e-5, "batch_size": 8, "seed": None, "output": "x"})
    )
    assert differences([one, other]) == [("--lr", ["0.0001", "5e-05"]), ("--seed", ["not recorded", "not given"])]
    text = page([one, other])
    assert "What differs" in text and text.count('<ul class="legend">') == 4
    same = page([one, one])
    assert "Arguments, versions and machines are the same." in same


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_each_kind_of_label_has_its_parts(kind, tmp_path):
    text = page([read_run(write_run(tmp_path, kind=kind))])
    parts = {name: f"<h2>{name}</h2>" in text for name in ("Calibration", "Predictions", "Classes", "Hardest rows")}
    numbers = kind == "regression"
    assert parts == {"Calibration": not numbers, "Predictions": numbers, "Classes": not numbers, "Hardest rows": True}
    assert text.count('<ul class="hard"><li>') == 1 and text.count("<li><q>") == 20
    assert ("no argument is missing" not in text) and ("left out" not in text)


@pytest.mark.slow
def test_a_million_updates_and_ten_thousand_rows_give_five_megabytes_at_most(tmp_path):
    write_run(tmp_path, rows=12_000)
    write_log(tmp_path, 1_000_000, seconds=True)
    run = read_run(tmp_path)
    assert (run.updates, run.judged.rows) == (1_000_000, 10_000)
    assert len(page([run]).encode()) < 5 * 10**6
