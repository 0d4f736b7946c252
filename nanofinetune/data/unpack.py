"""Open a file that may be compressed, without letting it unpack to more than a table of its size can be.

>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "reviews.csv.gz")
...     _ = file.write_bytes(gzip.compress(b"text,stars"))
...     with opened(file) as source:
...         print(bare(file), source.read())
('reviews.csv', '.gz') b'text,stars'

Underneath: the `compression` argument of `pandas.read_csv` and of `datasets.load_dataset` (datasets 5.2)
  - unpack whatever comes: a kilobyte of zip can hold a terabyte; here a limit is set by the file's own size;
  - take the first file of an archive; here an archive must hold one file only, beside what macOS adds.

Proof: test_a_packed_file_is_the_same_table, test_a_file_that_unpacks_to_too_much_is_refused in
tests/data/test_unpack.py.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tempfile  # noqa: F401 (the example above)
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKED = (".gz", ".bz2", ".xz", ".zip")
TIMES = 200  # a file may unpack to so many times its own size: text packs to a tenth, and an endless zero to nothing
LEAST = 64 * 2**20  # bytes that any file may unpack to


def bare(file: Path) -> tuple[str, str]:
    """A file's name without its last ending, and that ending in small letters, if it is one of PACKED; else all, ""."""
    ending = file.suffix.lower()
    return (file.stem, ending) if ending in PACKED else (file.name, "")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The bytes in a file, unpacked: a binary file with `peek`, which a packed one cannot seek in.

    Raises ValueError in the middle of reading where it unpacks to more than TIMES its size and LEAST bytes, and
    whatever gzip, bz2, lzma and zipfile raise for a damaged one.
    """
    with file.open("rb") as raw:
        ending = bare(file)[1]
        size = os.fstat(raw.fileno()).st_size
        if ending == "":
            yield raw
        elif ending == ".zip":
            with zipfile.ZipFile(raw) as archive, archive.open(_only_file(archive)) as inner:
                yield io.BufferedReader(_Bounded(inner, size))
        else:
            unpack: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[ending]
            with unpack(raw) as inner:
                yield io.BufferedReader(_Bounded(inner, size))


def name_inside(file: Path) -> str:
    """The name of the table in a packed file, without folders: an archive says it, else it is the file's without .gz.

    Raises ValueError for an archive of several files.
    """
    name, ending = bare(file)
    if ending != ".zip":
        return name
    with zipfile.ZipFile(file) as archive:
        return _only_file(archive).filename.rpartition("/")[2]


def check_archive(source: Any, size: int) -> None:
    """Raise ValueError for a zip archive of `size` bytes, such as an .xlsx, whose files unpack to too much."""
    with zipfile.ZipFile(source) as archive:
        # underneath: zipfile stops at the size that the archive states, so it cannot state less than it holds
        _check_size(sum(member.file_size for member in archive.infolist()), size)


class _Bounded(io.RawIOBase):
    """A readable stream that raises ValueError at the first byte that is too many."""

    def __init__(self, stream: Any, packed: int) -> None:
        self._stream, self._packed, self._read = stream, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        self._read += len(block)
        _check_size(self._read, self._packed)
        buffer[: len(block)] = block
        return len(block)


def _check_size(size: int, packed: int) -> None:
    if size > max(LEAST, TIMES * packed):
        raise ValueError(f"it unpacks to more than {TIMES} times its size, the most that is read; unpack it yourself")


def _only_file(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The one file in an archive. What macOS adds, and hidden files, do not count."""
    files = [member for member in archive.infolist() if not member.is_dir()]
    files = [m for m in files if not m.filename.startswith("__MACOSX/") and m.filename.rpartition("/")[2][:1] != "."]
    if len(files) != 1:
        names = ", ".join(member.filename for member in files[:4])
        raise ValueError(f"the archive holds {len(files)} files ({names or 'none'}), and must hold one; unpack it")
    return files[0]
