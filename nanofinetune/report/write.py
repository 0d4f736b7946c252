"""report.html on the disk: whole or not at all, and over nothing that is not ours.

>>> import tempfile
>>> mine = Path(tempfile.mkdtemp(), "report.html")
>>> _ = mine.write_text("<p>my own</p>")
>>> put(mine, "...")
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: ...report.html is there and is no page of ours: it stays; name another --output

Underneath: `transformers.Trainer.create_model_card` (transformers 5.23) writes README.md over whatever has the name.
  - Here a page begins with a line that says whose it is. Only a plain file that begins so is replaced, in one step.
  - The end of a training calls `write_report`, which fails no training: it says in one line why there is no page.

Proof: test_what_is_not_ours_is_not_written_over, test_a_training_never_fails_for_its_page in
tests/report/test_write.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nanofinetune.ground.errors import UsageError, first_line, shown
from nanofinetune.ground.names import begins, write_whole
from nanofinetune.report.page import OPENING, page
from nanofinetune.report.plots import MISSING, available
from nanofinetune.report.read import names_of, read_run

NAME = "report.html"


def write_report(folder: Path) -> None:
    """Write a run's page into its folder, as train.py does at its end; where that fails, say why on stderr.

    With NANOFINETUNE_REPORT=no in the environment there is none, and nothing is said.
    """
    if os.environ.get("NANOFINETUNE_REPORT") == "no":
        return
    try:
        report([folder], folder / NAME)
    except Exception as error:  # the run is complete and its model saved: nothing here is worth its exit code
        print(f"note: no {NAME}: {shown(first_line(error))}", file=sys.stderr, flush=True)


def report(folders: Sequence[Path], output: Path) -> None:
    """Read the runs in these folders and write their page. Raises UsageError where that cannot be."""
    if not available():
        raise UsageError(MISSING)
    _refuse(output)  # before the work
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    put(output, page(runs))


def refusal(path: Path) -> str:
    """Why a page cannot have this name, "" if it can: there is nothing, or an earlier page of ours."""
    if not os.path.lexists(path):
        return ""
    with suppress(OSError):
        if path.is_file() and not path.is_symlink() and begins(path, OPENING):
            return ""
    return f"{path} is there and is no page of ours: it stays; name another --output"


def put(path: Path, text: str) -> None:
    """Write a page, complete under its name or not there at all. Raises UsageError for a name that it cannot have."""
    try:
        write_whole(path, text, lambda: _refuse(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); name another --output") from error


def _refuse(path: Path) -> None:
    if reason := refusal(path):
        raise UsageError(reason)
