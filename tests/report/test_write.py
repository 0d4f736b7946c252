"""report.html on the disk: never over what is not ours, never half, and never at a training's cost.

python -m pytest tests/report/test_write.py
"""

import os

import pytest
from conftest import ROOT, load_script
from runs import write_run

from nanofinetune.ground.errors import UsageError
from nanofinetune.report import write
from nanofinetune.report.page import OPENING
from nanofinetune.report.write import put, write_report

OURS = OPENING + "<title>a</title>"


def test_a_page_of_ours_is_replaced(tmp_path):
    put(tmp_path / "report.html", OURS)
    put(tmp_path / "report.html", OURS + "new")
    assert (tmp_path / "report.html").read_text() == OURS + "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o666 & ~umask


def a_link(path, outside):
    outside.write_text(OURS)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    "make",
    [lambda path, _: path.write_text("<p>my own</p>"), lambda path, _: path.write_text(OURS.replace("nano", "micro")),
     lambda path, _: path.write_bytes(b""), lambda path, _: path.mkdir(), lambda path, _: os.mkfifo(path), a_link,
     lambda path, outside: path.symlink_to(outside)],
    ids=["a page", "a page like ours", "empty", "a folder", "a pipe", "a link to ours", "a link to nothing"],
)  # fmt: skip
def test_what_is_not_ours_is_not_written_over(make, tmp_path):
    (tmp_path / "in").mkdir()
    path, outside = tmp_path / "in" / "report.html", tmp_path / "outside"
    make(path, outside)
    before = path.lstat(), outside.exists() and outside.read_text()
    with pytest.raises(UsageError, match="is there and is no page of ours: it stays; name another --output"):
        put(path, OURS)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before[0].st_ino, before[0].st_size)
    assert (outside.exists() and outside.read_text()) == before[1]
    assert len(list((tmp_path / "in").iterdir())) == 1, "and no draft is left"


def test_a_name_that_is_taken_meanwhile_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "refusal", lambda path: "")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UsageError, match="cannot be written"):
        put(tmp_path / "report.html", OURS)
    assert (tmp_path / "report.html").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    put(tmp_path / "report.html", OURS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        put(tmp_path / "report.html", OURS + "new")
    assert (tmp_path / "report.html").read_text() == OURS and len(list(tmp_path.iterdir())) == 1


def test_a_training_writes_its_page(tiny_model, pairs, call_main, tmp_path, monkeypatch):
    train = load_script(ROOT / "train.py")
    options = ("--model", tiny_model, "--data", pairs, "--epochs", "1")
    monkeypatch.delenv("NANOFINETUNE_REPORT")
    code, _, err = call_main(train, *options, "--output", tmp_path / "one")
    text = (tmp_path / "one" / "report.html").read_text()
    assert code == 0 and "no report.html" not in err and text.startswith(OPENING)
    for part in ("Over updates", "Over epochs", "Classes", "Hardest rows", "What the plan said", "Machine", "Versions"):
        assert f"<h2>{part}</h2>" in text
    monkeypatch.setenv("NANOFINETUNE_REPORT", "no")
    assert call_main(train, *options, "--output", tmp_path / "other")[0] == 0
    assert not (tmp_path / "other" / "report.html").exists()


def test_a_training_never_fails_for_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NANOFINETUNE_REPORT")
    write_run(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("mine")
    write_report(tmp_path / "run")
    monkeypatch.setattr(write, "available", lambda: False)
    write_report(tmp_path / "run")
    monkeypatch.setattr(write, "report", lambda *_: 1 / 0)
    write_report(tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("note: no report.html: ") for line in lines)
    assert "no page of ours" in lines[0] and "pip install 'nanofinetune[report]'" in lines[1]
    assert (tmp_path / "run" / "report.html").read_text() == "mine"
