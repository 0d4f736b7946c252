"""The command: one page, its place, and one line for what the user got wrong.

python -m pytest tests/report/test_main.py
"""

import webbrowser

import pytest
from runs import write_run

from nanofinetune.ground.cli import run_main
from nanofinetune.report import __main__ as command
from nanofinetune.report import write

pytest.importorskip("matplotlib")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call the command in a folder of its own -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
        code = run_main("nanofinetune.report", command.main)
        return code, *capsys.readouterr()

    return called


def test_the_command_writes_one_page(call, tmp_path, monkeypatch):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    before = sorted(path.name for path in one.iterdir())
    assert call("one") == (0, "wrote one/report.html\n", "")
    assert sorted(path.name for path in one.iterdir()) == sorted([*before, "report.html"])
    assert call(one, other) == (0, "wrote report.html\n", "")
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", shown.append)  # None: it has not been opened
    code, _, err = call("one", "--output", "x.html", "--open")
    assert (code, err) == (0, "note: --open: there is no browser here; open the file in one\n")
    assert shown == [(tmp_path / "x.html").as_uri()]
    assert (tmp_path / "x.html").read_bytes() == (one / "report.html").read_bytes()


def test_what_the_user_got_wrong_is_one_line(call, tmp_path, monkeypatch):
    write_run(tmp_path / "one")
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    lines = {
        (): "the following arguments are required: DIR",
        ("nowhere",): "nowhere: there is no such folder; name a folder that",
        ("empty",): "empty: holds no metrics.jsonl, result.json or validation.jsonl; name a folder that",
        ("mine.html",): "mine.html: there is no such folder; name a folder that",
        ("",): "DIR is empty",
        ("one",) * 9: "9 runs: a page shows 8 at most; name fewer",
        ("one", "--output", "mine.html"): "mine.html is there and is no page of ours: it stays; name another --output",
        ("one", "--output", "empty"): "--output empty: this is a folder; name a file in it",
        ("one", "--output", "no/x.html"): "--output no/x.html: there is no such folder",
        ("one", "--never"): "unrecognized arguments: --never",
    }
    for arguments, line in lines.items():
        code, out, err = call(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and line in err, (arguments, err)
    monkeypatch.setattr(write, "available", lambda: False)
    assert call("one")[::2] == (
        2, "nanofinetune.report: matplotlib is not installed: pip install 'nanofinetune[report]'\n"
    )  # fmt: skip
    assert (tmp_path / "mine.html").read_text() == "mine"
