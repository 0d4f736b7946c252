"""The page in a real browser: Debian's Chromium, without a window. Skipped where there is none.

python -m pytest tests/report/test_browser.py
"""

import re
import shutil
import subprocess

import pytest
from runs import NAMES, PLOTS, write_run

from nanofinetune.report.write import report

pytest.importorskip("matplotlib")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def opened(page, folder):
    """(the document as the browser has it, what its console says)."""
    if BROWSER is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_every_plot_and_table_is_there(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "<i>two", arguments={"lr": 5e-5})]
    report(runs, tmp_path / "report.html")
    document, console = opened(tmp_path / "report.html", tmp_path)
    assert console == []
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', document)
    assert labels == [*PLOTS, *["A score over epochs"] * 2, "How often it is right, against how sure it is"]
    assert document.count('stroke="var(--c1)"') >= 5, "the second run's lines"
    headings = re.findall(r"<h2>(.*?)</h2>", document)
    each = ["Classes", "Hardest rows", "What the plan said", "Machine", "Versions", "Notes"]
    wanted = ["Over updates", "Over epochs", "What differs", "Calibration"]
    assert headings == wanted + [f"{name}: {part}" for name in ("one", "&lt;i&gt;two") for part in each]
    assert document.count('<table class="matrix">') == 2 and document.count('<td class="s6">12</td>') == 2
    for name in NAMES:
        assert len(re.findall(rf'<th scope="row">{name}</th>', document)) == 4
    assert document.count("<meter") == 2 * 20 * 2 and "<script" not in document


def test_a_broken_policy_would_be_on_the_console(tmp_path):
    """What the test above relies on."""
    report([write_run(tmp_path / "one")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").write_text(text.replace("<h1>", '<script>1</script><h1 style="color:red">'))
    console = "\n".join(opened(tmp_path / "report.html", tmp_path)[1])
    assert "Content Security Policy" in console and "script" in console and "inline style" in console
