"""Names of files and of models, as a command line may be given them: taken, or refused in one line.

Run: python -m pytest tests/ground/test_names.py

The Hub's own rule is asked for the same names; what Path and argparse do with some of them is shown.
"""

import os
import socket
import sys
from pathlib import Path

import pytest

from nanofinetune.ground.cli import Parser
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.names import begins, check_hub_name, give_name, oddity, place_of, write_whole

hypothesis = pytest.importorskip("hypothesis", reason="draws the names")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PIECES = st.sampled_from(
    ["a", "~", "/", ".", "..", "\0", "\n", "\x1b[2J", "@", "$(id)", "\ud800", "\udcff", "é", "x" * 300]
)
ODD = {
    "": "is empty: name a file or folder",
    "a\0b": "no file can have this name",
    "/tmp/a\0b": "no file can have this name",
    "~nobody-has-this-name/x": "this user has no home folder here",
    "x" * 5000: r"it cannot be read \(File name too long\)",
    "/" + "y" * 300: r"it cannot be read \(File name too long\)",
}
NO_HUB_NAMES = [
    "a@main",
    "$(id)",
    "a b",
    " ",
    "a/b/c",
    "-a",
    "a--b",
    "a..b",
    "a\nb",
    "*",
    "é",
    "x" * 97,
    "a.git",
    "user/..",
]


@given(st.lists(PIECES, max_size=6).map("".join))
def test_any_name_is_taken_or_refused_in_one_line(name):
    for ask in (place_of, check_hub_name):
        try:
            ask("--data", name)
        except UsageError as error:
            assert str(error).isprintable() and "\n" not in str(error) and str(error).startswith("--data")
    try:
        place = place_of("--data", name)
    except UsageError:
        return
    assert place.exists() in (True, False)  # whoever gets it may ask


@pytest.mark.parametrize("name", ODD, ids=lambda name: ascii(name[:20]))
def test_a_name_that_no_file_can_have_is_refused_where_path_takes_it(name):
    Path(name)
    with pytest.raises(UsageError, match=f"^--output .*{ODD[name]}"):
        place_of("--output", name)


@pytest.mark.parametrize("name", NO_HUB_NAMES)
def test_what_is_no_name_on_the_hub_is_what_its_own_library_refuses(name):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    with pytest.raises(UsageError, match="there is no such file or folder, and no name on the Hub is like this"):
        check_hub_name("model", name)
    check_hub_name("model", "google-bert/bert-base_uncased.v1")


def test_a_home_is_put_in_place_of_the_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_of("--data", "~/x.csv") == tmp_path / "x.csv"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX has users")
def test_a_folder_that_cannot_be_looked_at_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    me = os.geteuid()
    os.seteuid(me or 65534)  # root may look everywhere
    try:
        with pytest.raises(UsageError, match=r"it cannot be read \(Permission denied\)"):
            place_of("model", str(tmp_path / "closed" / "x"))
    finally:
        os.seteuid(me)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has these")
def test_what_is_neither_file_nor_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(tmp_path)  # its address has room for 100 characters
        try:
            made.bind("socket")
        finally:
            os.chdir(before)
    found = {name: oddity(tmp_path / name) for name in ("pipe", "link", "socket", "file", "loop", "nothing", ".")}
    assert found == {"pipe": "a pipe", "link": "a pipe", "socket": "a socket"} | dict.fromkeys(
        ("file", "loop", "nothing", "."), ""
    )
    assert oddity(Path("/dev/null")) == "a device"


def test_an_option_with_two_dashes_for_a_value_is_refused():
    """Python 3.11's argparse makes an empty list of it, which no option's code expects."""
    for words in (["--model=--"], ["--batch-size=--"]):
        parser = Parser("name", None)
        parser.add_argument("--model")
        parser.add_argument("--batch-size", type=int)
        parser.add_argument("file", nargs="?")
        with pytest.raises(UsageError, match=f"^{words[0][:-3]}: expected one argument"):
            parser.parse_args(words)
        assert parser.parse_args(["--", *words]).file == words[0]


# ---- files that get a name ----


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_given_to_nothing_that_is_taken_where_a_rename_takes_it(links, tmp_path, monkeypatch):
    """On a file system without second names the name is looked at before."""
    draft, place = tmp_path / "draft", tmp_path / "place"
    draft.write_text("new")
    place.write_text("mine")
    with pytest.raises(FileExistsError):
        give_name(draft, place)
    assert place.read_text() == "mine"
    draft.rename(place)  # Python's own
    assert place.read_text() == "new"
    place.rename(draft)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.listdir(tmp_path / "no"))  # an OSError
    give_name(draft, place)
    assert place.read_text() == "new"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    place = tmp_path / "place"

    def refuse():
        assert [path.read_text() for path in tmp_path.iterdir() if path != place] == ["text"], "it is complete by now"
        raise UsageError("it stays")

    for before in (None, "mine"):
        if before is not None:
            place.write_text(before)
        with pytest.raises(UsageError, match="it stays"):
            write_whole(place, "text", refuse)
        assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["place"])
    write_whole(place, "text", lambda: None)
    assert place.read_text() == "text" and begins(place, "te") and not begins(place, "xt")
    place.unlink()
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(FileExistsError):  # somebody was faster
        write_whole(place, "text", lambda: place.write_text("mine"))
    assert place.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
