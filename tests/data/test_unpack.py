"""Packed files, against the same file unpacked, and against pandas, which unpacks whatever comes.

python -m pytest tests/data/test_unpack.py
"""

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tables import rows, write

from nanofinetune.data import unpack
from nanofinetune.data.files import format_of, read
from nanofinetune.data.load import load_data
from nanofinetune.data.unpack import opened
from nanofinetune.ground.errors import UsageError


def zipped(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


PACK: dict[str, Any] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda content: zipped(
        {"folder/": b"", "folder/a.csv": content, "__MACOSX/._a.csv": b"x", ".DS_Store": b"x"}
    ),
}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("ending", PACK)
def test_a_packed_file_is_the_same_table(ending, kind, tmp_path):
    write(tmp_path, kind, "reviews", rows(20))
    plain = tmp_path / f"reviews.{kind}"
    packed = tmp_path / f"PACKED.{kind}.{ending}".upper()
    pack = PACK[ending] if kind == "csv" or ending != "zip" else lambda content: zipped({f"x.{kind}": content})
    packed.write_bytes(pack(plain.read_bytes()))
    assert read([packed])[0].to_pylist() == read([plain])[0].to_pylist()
    assert sum(map(len, load_data(str(packed)).splits.values())) == 20


def test_a_folder_of_packed_splits(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, "csv", split, rows(12))
        plain = tmp_path / f"{split}.csv"
        (tmp_path / f"{split}.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert [len(split) for split in load_data(str(tmp_path)).splits.values()] == [12, 12]


def test_an_archive_says_what_is_in_it(tmp_path):
    """reviews.zip, whose name says nothing."""
    write(tmp_path, "jsonl", "reviews", rows(20))
    packed = tmp_path / "reviews.zip"
    packed.write_bytes(zipped({"data/reviews.jsonl": (tmp_path / "reviews.jsonl").read_bytes()}))
    assert format_of(packed) == "zip" and read([packed])[0].num_rows == 20


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.zip", zipped({"a.csv": b"text\n", "b.csv": b"text\n"}), r"the archive holds 2 files \(a.csv, b.csv\), and"),
        ("a.zip", zipped({}), r"the archive holds 0 files \(none\)"),
        ("a.zip", zipped({"a.doc": b"text"}), r"a.doc in it has no ending that is known: .csv"),
        ("a.csv.zip", b"PK\x03\x04 and no more", r"it could not be read \(File is not a zip file"),
        ("a.csv.gz", b"text,label\n", r"it could not be read \(Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-6], r"it could not be read \(Compressed file ended before"),
        ("a.csv.xz", b"text,label\n", r"it could not be read \(Input format not supported"),
        ("a.csv.bz2", b"text,label\n", r"it could not be read \(Invalid data stream"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as refusal:
        read([tmp_path / name])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ending", PACK)
def test_a_file_that_unpacks_to_too_much_is_refused(ending, tmp_path, monkeypatch):
    """pandas reads it to its end: a terabyte, if need be."""
    import pandas

    monkeypatch.setattr(unpack, "LEAST", 10_000)
    content = b"text,label\n" + b"a,1\n" * 100_000
    bomb = tmp_path / f"a.csv.{ending}"
    bomb.write_bytes(zipped({"a.csv": content}) if ending == "zip" else PACK[ending](content))
    assert len(pandas.read_csv(bomb)) == 100_000
    with pytest.raises(UsageError, match=r"unpacks to more than 200 times its size, the most that is read; unpack it"):
        read([bomb])
    with opened(bomb) as source, pytest.raises(ValueError, match="200 times"):
        while source.read(1000):
            pass


def test_text_is_never_too_much(tmp_path):
    """What is packed well, but not absurdly, is read however long it is."""
    content = b"text,label\n" + b"".join(b"the cat sat on the mat,%d\n" % (i % 2) for i in range(5000))
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(content))
    assert len(content) / file.stat().st_size > 50
    assert read([Path(file)])[0].num_rows == 5000
