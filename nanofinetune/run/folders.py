"""Folders that appear complete or not at all, are replaced in one step, and are deleted only if we made them.

>>> import tempfile
>>> parent = Path(tempfile.mkdtemp())
>>> with new_folder(parent / "last", ["w.json"]) as draft:
...     _ = (draft / "w.json").write_text("1")
>>> sorted(file.name for file in (parent / "last").iterdir()), check(parent / "last")
(['manifest.json', 'w.json'], '')
>>> _ = (parent / "last" / "notes.txt").write_text("mine")
>>> not_ours(parent / "last")
'notes.txt in it is not ours'

Underneath: `accelerate.checkpointing.save_accelerator_state` (accelerate 1.15) writes into the folder itself, and
`accelerate.Accelerator.save_state` deletes older folders, whatever they hold, before it has written a new one.
  - Here files are written under a hidden name and synced, with a manifest of their sizes and hashes; then one rename
    makes them visible. A kill at any moment leaves the old folder or the new one.
  - What is deleted or replaced has a manifest of ours and holds nothing that is not in it. All else stays, and saving
    over it is refused.

Proof: test_a_kill_at_every_file_operation_loses_nothing, test_what_is_not_ours_is_never_deleted in
tests/run/test_checkpoint.py and tests/run/test_folders.py.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanofinetune.ground.errors import shown

FORMAT = 1  # of the folder; a reader accepts no other
MANIFEST = "manifest.json"
NEW_MANIFEST = MANIFEST + ".new"
LARGEST = 2**20  # bytes of a manifest; ours have about a thousand
HOUR = 3600.0
HIDDEN = re.compile(r"\.(saving|replaced|leaving)-(.+)-[0-9a-f]{8}")  # of folders on their way; see `_hidden`


@contextmanager
def new_folder(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A `with` block that fills a hidden folder with files of these names; at its end it is `folder`, complete.

    An older folder of ours is replaced. Raises FileExistsError if anything else is there, OSError if the disk does not
    take it; then everything is as it was before.
    """
    if reason := refusal(folder):
        raise FileExistsError(reason)
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    draft = _hidden("saving", folder)
    draft.mkdir()  # raises if it exists
    lock = _lock(draft)
    try:
        (draft / MANIFEST).write_text(_manifest({name: {} for name in names}))  # from now on `sweep` knows it as ours
        yield draft
        facts = {}
        for name in names:
            _sync(draft / name)
            facts[name] = {"bytes": (draft / name).stat().st_size, "sha256": sha256(draft / name)}
        (draft / NEW_MANIFEST).write_text(_manifest(facts))  # in the draft, as all files so far
        _sync(draft / NEW_MANIFEST)
        os.replace(draft / NEW_MANIFEST, draft / MANIFEST)  # ours: the draft's first one; there is never half of one
        _sync(draft)
        _publish(draft, folder)
        _sync(folder.parent)
    except BaseException:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)  # ours: made above, under a name of this call's own
        restore(folder)
        raise
    finally:
        if lock is not None and lock >= 0:
            os.close(lock)
    sweep(folder.parent)


def check(folder: Path, *, hashes: bool = True) -> str:
    """What is wrong with a folder, "" if nothing is. Reads every byte of its files, unless `hashes` is False."""
    try:
        expected = read_manifest(folder)
        with os.scandir(folder) as entries:
            present = set()
            for entry in entries:  # stops at the first stranger, however many there are
                if entry.name not in expected and entry.name != MANIFEST:
                    return f"{shown(entry.name, most=80)} does not belong to it"
                present.add(entry.name)
        for name in sorted(set(expected) - present):
            return f"{name} is missing"
        for name, facts in expected.items():
            status = (folder / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a plain file"  # reading a FIFO or a device may never end
            if status.st_size != facts["bytes"]:
                return f"{name} has {status.st_size} bytes, and its manifest says {facts['bytes']}"
        for name, facts in expected.items() if hashes else ():
            if sha256(folder / name) != facts["sha256"]:
                return f"{name} has been changed: its hash is not the manifest's"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except KeyError:  # of a draft
        return f"its {MANIFEST} is damaged"
    except ValueError as error:
        return str(error)
    return ""


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{name of a file: {"bytes": ..., "sha256": ...}}; of a draft {name: {}}. Raises ValueError with what is wrong."""
    try:
        status = (folder / MANIFEST).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise ValueError
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if type(manifest["format"]) is not int:
            raise ValueError
        if manifest["format"] != FORMAT:
            other = manifest["format"]
        elif all(os.path.basename(name) == name and type(facts) is dict for name, facts in manifest["files"].items()):
            return manifest["files"]
        else:
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}: its save was interrupted, or something else made it") from None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # deep brackets are a recursion
        raise ValueError(f"its {MANIFEST} is damaged") from error
    raise ValueError(f"its format is {other}, and this version reads {FORMAT}")


# ---- What is ours ----------------------------------------------------------------------------------------------------


def not_ours(folder: Path) -> str:
    """Why a folder must not be deleted or replaced, "" if it is ours: a manifest, and nothing that is not in it."""
    if folder.is_symlink():
        return "it is a link"
    if not folder.is_dir():
        return "it is not a folder"
    try:
        known = read_manifest(folder) if os.path.lexists(folder / MANIFEST) else {}
        names = {*known, MANIFEST, NEW_MANIFEST}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name not in names:
                    return f"{shown(entry.name, most=80)} in it is not ours"
                if not entry.is_file(follow_symlinks=False):
                    return f"{shown(entry.name, most=80)} in it is not a plain file"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return ""


def refusal(folder: Path) -> str:
    """What to tell the user where nothing can be saved; "" if the name is free, or what has it may be replaced."""
    with suppress(OSError):
        if not os.path.lexists(folder) or (not folder.is_symlink() and not any(folder.iterdir())):
            return ""
    reason = not_ours(folder)
    return f"{folder} exists and is no checkpoint of ours ({reason}): name another folder" if reason else ""


def delete(folder: Path) -> None:
    """Delete a folder of ours: first its name, then its files, the manifest last. Any other folder stays as it is."""
    if not_ours(folder):
        return
    hidden = folder
    if not HIDDEN.fullmatch(folder.name):
        hidden = _hidden("leaving", folder)
        os.rename(folder, hidden)  # ours, by the check above; first, so that a kill leaves no half checkpoint
    with suppress(OSError):  # another process may be sweeping too; or the folder has just got another file, and stays
        known = read_manifest(hidden) if os.path.lexists(hidden / MANIFEST) else {}  # {}: an empty folder
        for name in (*known, NEW_MANIFEST, MANIFEST):
            (hidden / name).unlink(missing_ok=True)  # ours: our manifest names it, and these are names, not paths
        os.rmdir(hidden)  # only if it is empty


def sweep(parent: Path) -> None:
    """Delete what a kill has left half-written or half-deleted, and put back what it has left half-replaced."""
    with os.scandir(parent) as entries:
        hidden = [parent / entry.name for entry in entries if entry.name.startswith(".")]  # few beside all that is kept
    for path in hidden:
        found = HIDDEN.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir() or not _abandoned(path):
            continue
        if found[1] == "replaced" and not os.path.lexists(parent / found[2]):
            restore(parent / found[2])
            continue
        with suppress(OSError):
            manifest = path / MANIFEST
            if os.listdir(path) == [MANIFEST] and manifest.stat().st_size == 0:
                manifest.unlink()  # ours by the folder's name, and empty: the kill came before its first byte
            os.rmdir(path)  # ours by its name, and empty, else this raises
            continue
        delete(path)


def restore(folder: Path) -> None:
    """Where a kill came between the two renames that replace a folder: give the old one its name again."""
    if os.path.lexists(folder) or not folder.parent.is_dir():
        return
    for path in folder.parent.iterdir():
        found = HIDDEN.fullmatch(path.name)
        if found is not None and found[1] == "replaced" and found[2] == folder.name and not not_ours(path):
            with suppress(OSError):  # another rank may have done it
                os.rename(path, folder)  # ours, by the check above; to a name that is free
            return


# ---- Private ---------------------------------------------------------------------------------------------------------


def _hidden(why: str, folder: Path) -> Path:
    """A name beside the folder that nothing has; `why` is saving, replaced or leaving."""
    return folder.parent / f".{why}-{folder.name}-{uuid.uuid4().hex[:8]}"


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"format": FORMAT, "files": files}, indent=1)


def _publish(draft: Path, folder: Path) -> None:
    """Give the draft its name. An older folder of ours gets the draft's, or another hidden one: `sweep` deletes it."""
    try:
        os.rename(draft, folder)  # replaces nothing but an empty folder: the system refuses all else
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if reason := refusal(folder):
        raise FileExistsError(reason)
    if not _exchange(draft, folder):  # ours, by the check above, and the draft
        os.rename(folder, _hidden("replaced", folder))  # ours, by the check above; a kill after this: see `restore`
        os.rename(draft, folder)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step -> whether this system and this file system can."""
    # underneath: POSIX has no such call. Linux has one that Python's `os` lacks, and that NFS refuses.
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD (fcntl.h), RENAME_EXCHANGE (stdio.h)
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _lock(folder: Path) -> int | None:
    """Mark a folder as being written -> a descriptor, which holds it until it is closed, if only by the process's end.

    None: another process holds it. -1: this system, or this file system, has no such locks.
    """
    descriptor = -1
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except (ImportError, OSError) as error:
        if descriptor >= 0:
            os.close(descriptor)
        return None if isinstance(error, BlockingIOError) else -1


def _abandoned(folder: Path) -> bool:
    """Whether no process is writing a folder any more. Where there are no locks, nobody has for an hour."""
    lock = _lock(folder)
    if lock == -1:
        return time.time() - folder.stat().st_mtime > HOUR
    if lock is not None:
        os.close(lock)
    return lock is not None


def _sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk and not only in the kernel's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
