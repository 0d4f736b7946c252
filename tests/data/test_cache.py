"""The cache of tokens against what was tokenized: the same arrays, and only for the same data, tokenizer and options.

python -m pytest tests/data/test_cache.py
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import ROOT
from tables import rows, write

from nanofinetune.data import cache as cache_module
from nanofinetune.data import load as load_module
from nanofinetune.data.cache import load_tokens
from nanofinetune.ground.errors import UsageError

WITHOUT_DATASETS = """
import sys
from transformers import AutoTokenizer
from nanofinetune.data.cache import load_tokens
folder, saved, library = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(saved)
data, stores = load_tokens(folder, None, None, 42, tokenizer, 16)
assert ("datasets" in sys.modules) == (library == "loads"), "a hit needs no library"
tokens = {key: [row["input_ids"].tolist() for row in store] for key, store in stores.items()}
print([data.name, list(data.splits), data.text_columns, data.label_names, data.metrics, data.note, tokens])
"""


@pytest.mark.slow
def test_cached_tokens_are_the_loaded_ones_without_datasets(tmp_path, tiny_tokenizer_dir, monkeypatch):
    write(tmp_path, "jsonl", "train", rows(20))
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(tmp_path / "cache"))
    printed = []
    for library in ("loads", "does not"):
        words = [sys.executable, "-c", WITHOUT_DATASETS, str(tmp_path / "train.jsonl"), tiny_tokenizer_dir, library]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    assert printed[0] == printed[1] and "held out" in printed[0]


def test_a_cache_is_used_only_for_what_it_was_made_of(tmp_path, tiny_tokenizer, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    write(folder, "jsonl", "train", rows(20))
    write(folder, "jsonl", "validation", rows(8, seed=1))
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(cache))

    def load(max_length=16, seed=42):
        data, stores = load_tokens(str(folder), None, None, seed, tiny_tokenizer, max_length)
        assert [len(split) for split in data.splits.values()] == [len(store) for store in stores.values()]
        return type(next(iter(data.splits.values()))) is range, stores  # ranges: from the cache

    hit, loaded = load()
    assert not hit
    hit, cached = load()
    assert hit and list(cached) == list(loaded)
    for split, store in loaded.items():
        assert store.dense["label"].dtype == cached[split].dense["label"].dtype
        assert np.array_equal(store.dense["label"], cached[split].dense["label"])
        assert list(store.ragged) == list(cached[split].ragged)
        for column, (flat, offsets) in store.ragged.items():
            again, own_offsets = cached[split].ragged[column]
            assert again.dtype == flat.dtype and np.array_equal(again, flat) and np.array_equal(own_offsets, offsets)
        assert len({id(offsets) for _, offsets in cached[split].ragged.values()}) == 1  # the collator's fast way
    assert not load(max_length=8)[0]
    assert load(seed=7)[0], "nothing of a folder is held out by the seed"
    tiny_tokenizer.add_tokens(["zebra"])
    assert not load()[0] and load()[0]
    write(folder, "jsonl", "validation", rows(9, seed=2))
    hit, changed = load()
    assert not hit and len(changed["validation"]) == 9
    for file in cache.glob("*.tokens"):
        file.write_bytes(file.read_bytes()[:700])  # what a full disk leaves
    assert not load()[0] and load()[0]
    assert not list(cache.glob("*.part"))
    monkeypatch.setenv("NANOFINETUNE_CACHE", "")
    assert not load()[0]
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(blocked))
    assert not load()[0], "no cache can be written: it works without"


@pytest.fixture
def kept(tmp_path, tiny_tokenizer, monkeypatch):
    """kept() loads tokens of a file of 20 rows -> whether they came from the cache in tmp_path / "cache", and rows."""
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "csv", "reviews", rows(20))

    def load(name="reviews.csv", seed=42):
        data, stores = load_tokens(str(tmp_path / name), None, None, seed, tiny_tokenizer, 16)
        return isinstance(data.splits["train"], range), sum(map(len, stores.values()))

    return load


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.tokens"))


def test_other_content_of_the_same_size_and_time_is_noticed(kept, tmp_path):
    """`cp -p`, `touch -r`, rsync and tar keep both; `datasets` gives what was there before (see test_files.py)."""
    file = tmp_path / "reviews.csv"
    os.utime(file, (1e9, 1e9))
    assert kept() == (False, 20) and kept() == (True, 20)
    before = file.stat()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *reversed(lines[1:])]))
    os.utime(file, (1e9, 1e9))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert kept() == (False, 20)


def test_the_same_content_at_another_time_is_a_hit(kept, tmp_path):
    kept()
    os.utime(tmp_path / "reviews.csv", (1e9, 1e9))
    assert kept() == (True, 20)


def test_a_flipped_bit_anywhere_is_read_anew(kept, tmp_path):
    kept()
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    for place in range(0, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert kept() == (False, 20), place
        assert file.read_bytes() == whole
    for size in (0, 31, 32, 40, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert kept() == (False, 20), size


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_someone_else_is_not_read(what, kept, tmp_path):
    """Root, whose cache is in a folder that others can write in, must not take its tokens from them."""
    kept()
    os.chown(cached(tmp_path)[0] if what == "file" else tmp_path / "cache", 12345, 12345)
    assert kept()[0] is False
    assert kept()[0] is (what == "file"), "what is someone else's is written over in one's own folder alone"


def test_a_link_is_not_followed(kept, tmp_path):
    kept()
    (file,) = cached(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert kept() == (False, 20)
    assert not file.is_symlink()


def test_a_file_of_other_data_under_this_name_is_read_anew(kept, tmp_path):
    """It is whole and undamaged; it was copied, or renamed. Its checksum is of its name too."""
    write(tmp_path, "csv", "other", rows(30, seed=1))
    kept()
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    assert kept("other.csv") == (False, 30)
    (other,) = (path for path in cached(tmp_path) if path != file)
    file.write_bytes(other.read_bytes())
    assert kept() == (False, 20) and file.read_bytes() == whole
    assert kept() == (True, 20) and kept("other.csv") == (True, 30)


def in_place_of(file, kind):
    file.unlink()
    if kind == "a FIFO":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(file.parent)  # a socket's name may be no longer than about a hundred bytes
            listener.bind(file.name)
    else:
        with file.open("wb") as raw:
            raw.truncate(cache_module.MOST_BYTES + 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a socket", "five gigabytes of nothing"])
def test_what_is_no_cache_file_is_left_out_without_waiting(kind, kept, tmp_path, monkeypatch):
    """Opening a FIFO waits for a writer, which never comes; hashing gigabytes takes long."""
    kept()
    (file,) = cached(tmp_path)
    monkeypatch.chdir(tmp_path)
    in_place_of(file, kind)
    monkeypatch.setattr(cache_module, "_checksum", lambda *_: pytest.fail("it is hashed"))  # no Exception
    assert cache_module.read_cache(file) is None


def sealed(file, *arrays):
    """A file whose checksum fits."""
    with file.open("w+b") as raw:
        raw.write(bytes(32))
        for array in arrays:
            np.save(raw, array)
        raw.seek(32)
        checksum = cache_module._checksum(file, raw)
        raw.seek(0)
        raw.write(checksum)


KEPT = {"name": "x", "text_columns": ["a"], "label_column": "b", "label_names": None, "metrics": [], "note": "",
        "columns": {"train": ["input_ids"]}}  # fmt: skip
LABELS, OFFSETS, FLAT = np.array([0, 1]), np.array([0, 2, 3]), np.array([7, 8, 9], np.int32)


@pytest.mark.parametrize(
    ("words", "arrays"),
    [
        ([], (LABELS, OFFSETS, FLAT)),
        ("x", (LABELS, OFFSETS, FLAT)),
        ({**KEPT, "more": 1}, (LABELS, OFFSETS, FLAT)),
        ({"columns": {}}, ()),
        ({**KEPT, "columns": {"train": []}}, (LABELS, OFFSETS)),
        (KEPT, (LABELS, OFFSETS)),
        (KEPT, (LABELS, OFFSETS[:-1], FLAT)),
        (KEPT, (LABELS, OFFSETS[::-1], FLAT)),
        (KEPT, (LABELS, OFFSETS + 1, FLAT)),
        (KEPT, (LABELS, OFFSETS, FLAT[:-1])),
        (KEPT, (LABELS, OFFSETS, FLAT.astype(float))),
        (KEPT, (LABELS, OFFSETS, FLAT[None])),
        (KEPT, (LABELS.astype(str), OFFSETS, FLAT)),
        (KEPT, (LABELS[:1], OFFSETS, FLAT)),
    ],
)
def test_what_no_cache_file_holds_is_left_out_whatever_its_checksum_says(words, arrays, tmp_path):
    file = tmp_path / ("0" * 32 + ".tokens")
    sealed(file, np.frombuffer(json.dumps(KEPT).encode(), np.uint8), LABELS, OFFSETS, FLAT)
    assert cache_module.read_cache(file) is not None
    sealed(file, np.frombuffer(json.dumps(words).encode(), np.uint8), *arrays)
    assert cache_module.read_cache(file) is None


def test_folder_and_files_are_for_the_user_alone(kept, tmp_path):
    kept()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert cached(tmp_path)[0].stat().st_mode & 0o777 == 0o600


def test_what_was_left_unfinished_goes_and_nothing_else_does(kept, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    ours = [cache / f"{'0' * 32}.abc.part", cache / f"{'1' * 32}.npz"]
    others = [cache / "notes.part", cache / "mine.tokens", cache / f"{'2' * 31}.x.part", cache / f"{'3' * 32}.txt"]
    young = cache / f"{'4' * 32}.abc.part"
    for file in (*ours, *others, young):
        file.write_text("x")
        if file != young:
            os.utime(file, (time.time() - cache_module.LEFT_BEHIND - 9,) * 2)
    kept()
    assert not ours[0].exists() and young.exists() and all(file.exists() for file in others)
    assert ours[1].exists(), "a finished file goes only where there is no room"


def test_the_folder_is_bounded_and_what_was_used_last_stays(kept, tmp_path, monkeypatch):
    """Each seed holds other rows of a single file out: a copy each."""
    for seed in range(3):
        assert kept(seed=seed) == (False, 20)
    files = dict(enumerate(sorted(cached(tmp_path), key=lambda file: file.stat().st_mtime_ns)))
    for seed, file in files.items():
        os.utime(file, (1e9 + seed,) * 2)
    assert kept(seed=0) == (True, 20)  # used, so that seed 1 is now the one that was used longest ago
    size = files[0].stat().st_size
    monkeypatch.setattr(cache_module, "MOST_BYTES", 3 * size + size // 2)
    assert kept(seed=3) == (False, 20)
    assert [file.exists() for file in files.values()] == [True, False, True] and len(cached(tmp_path)) == 3
    monkeypatch.setattr(cache_module, "MOST_BYTES", size // 2)
    assert kept(seed=4) == (False, 20) and kept(seed=4) == (False, 20)
    assert not cached(tmp_path), "what is larger than all room is not kept"


def test_a_full_disk_leaves_nothing(kept, tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        assert kept() == (False, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "cache").iterdir())
    assert kept() == (False, 20) and kept() == (True, 20)


def test_data_that_change_while_they_are_read_are_not_kept(kept, tmp_path, monkeypatch):
    real = cache_module.tokenize

    def slow(*arguments):
        write(tmp_path, "csv", "reviews", rows(30))  # another process's doing
        return real(*arguments)

    monkeypatch.setattr(cache_module, "tokenize", slow)
    assert kept() == (False, 20)
    assert not cached(tmp_path)


@pytest.mark.parametrize("setting", ["~/c", "~"])
def test_a_tilde_is_the_home(setting, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NANOFINETUNE_CACHE", setting)
    monkeypatch.chdir(tmp_path)
    assert kept() == (False, 20) and kept() == (True, 20)
    assert not (tmp_path / "~").exists() and list(Path(setting).expanduser().glob("*.tokens"))
    monkeypatch.setenv("NANOFINETUNE_CACHE", "~nobody-of-this-name/c")
    with pytest.raises(UsageError, match="NANOFINETUNE_CACHE ~nobody-of-this-name/c: there is no such user"):
        kept()


def test_tokenization_is_cached_by_datasets_fingerprint(tmp_path, tiny_tokenizer_dir, monkeypatch):
    """Data of the Hub, whose content only `datasets` knows: with a fresh tokenizer, which is never called."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("NANOFINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load_module, "hub_in_reach", lambda: True)
    for n in (20, 24):
        splits = {"train": datasets.Dataset.from_list(rows(n)), "validation": datasets.Dataset.from_list(rows(5))}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / str(n))
    found: list[Any] = []
    for n in (20, 20, 24):
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, n=n: datasets.load_from_disk(tmp_path / str(n)))
        with monkeypatch.context() as patch:
            if len(found) == 1:
                patch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
            data, stores = load_tokens("someone/reviews", None, None, 42, tokenizer, 16)
        found.append((isinstance(data.splits["train"], range), stores["train"].ragged["input_ids"][0].tolist()))
    assert [hit for hit, _ in found] == [False, True, False]
    assert found[0][1] == found[1][1] != found[2][1]
