"""What a name on the command line can mean: a place on this disk, or a name on the Hub. All else is refused at once.

>>> place_of("--data", "reviews.csv")
PosixPath('reviews.csv')
>>> check_hub_name("--data", "my reviews")
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: --data my reviews: there is no such file or folder, and no name on the Hub ...

Underneath: `huggingface_hub.utils.validate_repo_id` (huggingface_hub 2.4), and `pathlib.Path` (Python's own)
  - The library looks at a name when it is about to ask for it, and raises an error of its own. Here it is asked before
    anything is looked up.
  - A Path takes any text. An empty one is the working folder; a name too long, or with a NUL in it, fails wherever it
    is first used.
  - Opening a pipe waits for a writer, and reading a device may never end: `oddity` says so first.
  - `Path.rename` replaces whatever has the name; `give_name` does not.

Proof: test_any_name_is_taken_or_refused_in_one_line, test_what_is_neither_file_nor_folder_is_named in
tests/ground/test_names.py.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanofinetune.ground.errors import UsageError

NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF)  # of a place; whoever asks says it in his words


def place_of(what: str, name: str) -> Path:
    """A name -> the place that it means, with `~` replaced. There may be nothing there.

    Args:
        what: what the name is of, as the message begins: "--data", "model".

    Raises:
        UsageError: an empty name, one that no file can have, a user without a home, a folder that cannot be looked at.
    """
    if not name:
        raise UsageError(f"{what} is empty: name a file or folder")
    try:
        place = Path(name).expanduser()
        os.stat(place)
    except RuntimeError as error:  # ~somebody
        raise UsageError(f"{what} {name}: this user has no home folder here; write the path in full") from error
    except ValueError as error:  # a NUL; half a surrogate pair
        raise UsageError(f"{what} {name}: no file can have this name; name another one") from error
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise UsageError(f"{what} {name}: it cannot be read ({error.strerror}); name another one") from error
    return place


def oddity(place: Path) -> str:
    """What is at a place, in words, if it is neither a plain file nor a folder: "a pipe"; "" for all else."""
    try:
        mode = os.stat(place).st_mode
    except OSError:
        return ""
    for words, check in (
        ("a pipe", stat.S_ISFIFO), ("a socket", stat.S_ISSOCK), ("a device", stat.S_ISCHR), ("a disk", stat.S_ISBLK)
    ):  # fmt: skip
        if check(mode):
            return words
    return ""


def begins(place: Path, mark: str) -> bool:
    """Whether a file begins with a mark that its maker leaves in it. Raises OSError."""
    with place.open("rb") as file:
        return file.read(len(mark.encode())) == mark.encode()


def write_whole(place: Path, text: str, check: Callable[[], object]) -> None:
    """Write a file, complete under its name or not there at all.

    Args:
        place: not a link, which would be replaced by the file.
        check: raises where the file that is there must stay. It is asked when the text is on the disk.

    Raises:
        OSError: it cannot be written, or something has taken the name meanwhile.
    """
    draft = place.parent / f".{uuid.uuid4().hex[:12]}.part"
    try:
        with draft.open("xb") as file:
            file.write(text.encode())
        check()
        (os.replace if os.path.lexists(place) else give_name)(draft, place)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)  # ours: made above, under a name of this call's own


def give_name(draft: Path, place: Path) -> None:
    """Give a file a name that nothing has: a second one, which the system refuses where there is a file by now.

    The draft may keep its own, to be removed. Raises FileExistsError.
    """
    try:
        os.link(draft, place)  # unlike a rename
    except FileExistsError:
        raise
    except OSError:  # a file system without second names
        os.replace(draft, place)  # nothing was there a moment ago


def check_hub_name(what: str, name: str) -> None:
    """Raises UsageError for what is no name on the Hub: letters, digits and `-_.`, with at most one slash between."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"{what} {name}: there is no such file or folder, and no name on the Hub is like this; name a local one"
        ) from error
