"""Tokens kept between runs: the finished arrays of a data set, in one file that numpy alone can read.

>>> data = Data("two rows", {}, ("text",), "label", ["0", "1"], ("accuracy",))
>>> flat, offsets = np.array([101, 7, 102, 101, 102], np.int32), np.array([0, 3, 5])
>>> stores = {"train": TokenStore({"input_ids": (flat, offsets)}, labels=np.array([1, 0]))}
>>> with tempfile.TemporaryDirectory() as folder:
...     write_cache(Path(folder, "1.tokens"), data, stores)
...     found, again = read_cache(Path(folder, "1.tokens"))
>>> found.splits, again["train"][0]["input_ids"].tolist()
({'train': range(0, 2)}, [101, 7, 102])

Underneath: the cache of `datasets.Dataset.map` (datasets 5.2)
  - saves the tokenizing, but not the imports of itself, pandas and pyarrow; ours needs none of them;
  - knows a local file by path and mtime; ours by a hash of its content;
  - believes what it finds; ours has a checksum, of its name too, and must belong to the user;
  - grows for ever; ours keeps the 4 GB that were used last.

A cache that cannot be read or written is left out: it saves time, and nothing depends on it.

Proof: test_cached_tokens_are_the_loaded_ones_without_datasets, test_other_content_of_the_same_size_and_time_is_noticed
in tests/data/test_cache.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nanofinetune.data.files import format_of
from nanofinetune.data.load import Data, load_data
from nanofinetune.data.tokens import TokenStore, tokenize
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.names import place_of

MOST_BYTES = 4 * 2**30  # of our files in the folder; those that were used longest ago go first
LEFT_BEHIND = 3600  # seconds: a file that has been unfinished for longer is a killed process's
OUR_FILES = re.compile(r"[0-9a-f]{32}(\.tokens|\.\w+\.part|\.npz)")  # .npz: an earlier version's


def load_tokens(
    name: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | Sequence[str] | None,
    seed: int,
    tokenizer: Any,
    max_length: int,
    **how: Any,
) -> tuple[Data, dict[str, TokenStore]]:
    """`load_data` and `tokenize`, or what they gave for the same data and tokenizer before; `how` is for `load_data`.

    Results are kept in the folder that NANOFINETUNE_CACHE names (default ~/.cache/nanofinetune; "": nothing is kept). A
    file's name is a hash of all that the result depends on: the data's content, the tokenizer, the arguments, the code
    of this room. From the cache, `Data.splits` are ranges, of which only the length counts.

    Raises what `load_data` raises.
    """
    asked = [name, text_columns and list(text_columns), label_column, how]
    content = _content(name, seed)
    file = _file(asked, content, tokenizer, max_length)
    if file is not None and (found := read_cache(file)) is not None:
        return found
    data = load_data(name, text_columns, label_column, seed, **how)
    if content is None and (content := _fingerprints(data)) is not None:
        file = _file(asked, content, tokenizer, max_length)
        if file is not None and (found := read_cache(file)) is not None:
            return found
    import pyarrow  # not before: tokens from the cache do without

    # underneath: Arrow keeps what it has freed, several times the table's size, for the next one
    pyarrow.default_memory_pool().release_unused()
    stores = tokenize(data, tokenizer, max_length)
    if file is not None and content == (_content(name, seed) or _fingerprints(data)):  # nobody has changed it meanwhile
        write_cache(file, data, stores)
    return data, stores


def read_cache(file: Path) -> tuple[Data, dict[str, TokenStore]] | None:
    """What `write_cache` wrote under this name; None where that is not there, is damaged or belongs to someone else."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(file, flags), "rb") as raw:
            status = os.fstat(raw.fileno())
            if not (_is_ours(status) and _is_ours(file.parent.stat())) or status.st_size > MOST_BYTES:
                return None
            if raw.read(32) != _checksum(file, raw):
                return None
            raw.seek(32)
            kept = json.loads(np.load(raw, allow_pickle=False).tobytes())
            stores = {}
            for split, columns in kept.pop("columns").items():
                labels, offsets = np.load(raw, allow_pickle=False), np.load(raw, allow_pickle=False)
                ragged = {column: (np.load(raw, allow_pickle=False), offsets) for column in columns}
                if not _fits(labels, offsets, *(flat for flat, _ in ragged.values())):
                    return None
                stores[split] = TokenStore(ragged, labels)
            os.utime(file)  # used last
        splits = {split: range(len(store)) for split, store in stores.items()}
        tuples = {name: tuple(kept[name]) for name in ("text_columns", "metrics")}
        return Data(**kept | tuples, splits=splits), stores
    except Exception:  # whatever it is, it is not what was written: JSON that is no object, an array of 2**60 bytes ...
        return None


def write_cache(file: Path, data: Data, stores: Mapping[str, TokenStore]) -> None:
    """Write beside the file and rename, so that no one reads half of it. Where that fails, nothing is left."""
    arrays: list[np.ndarray] = []
    kept = asdict(replace(data, splits={}))
    kept["columns"] = {split: list(store.ragged) for split, store in stores.items()}
    del kept["splits"]
    for store in stores.values():
        offsets = next(iter(store.ragged.values()))[1]
        if any(other is not offsets for _, other in store.ragged.values()):
            return  # columns of different lengths: no model's inputs
        arrays += [store.dense["label"], offsets, *(flat for flat, _ in store.ragged.values())]
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(file.parent.stat()) or not _make_room(file.parent, sum(array.nbytes for array in arrays)):
            return
        number, part = tempfile.mkstemp(prefix=f"{file.stem}.", suffix=".part", dir=file.parent)
        try:
            with open(number, "w+b") as raw:
                raw.write(bytes(32))
                for array in (np.frombuffer(json.dumps(kept).encode(), np.uint8), *arrays):
                    np.save(raw, array, allow_pickle=False)
                raw.seek(32)
                checksum = _checksum(file, raw)
                raw.seek(0)
                raw.write(checksum)
            os.replace(part, file)
        finally:
            with suppress(OSError):
                os.unlink(part)


def _checksum(file: Path, content: Any) -> bytes:
    """Of the rest of an opened file and of its name: the tokens of other data are as sound under a wrong name."""
    return hashlib.file_digest(content, lambda: hashlib.sha256(file.stem.encode())).digest()


def _fits(labels: np.ndarray, offsets: np.ndarray, *flats: np.ndarray) -> bool:
    """Whether these can be a TokenStore's arrays."""
    if any(array.ndim != 1 for array in (labels, offsets, *flats)) or not flats:
        return False
    whole = all(array.dtype.kind == "i" for array in (offsets, *flats)) and labels.dtype.kind in "if"
    return bool(
        whole and len(offsets) == len(labels) + 1 and offsets[0] == 0 and (np.diff(offsets) >= 0).all()
        and all(offsets[-1] == len(flat) for flat in flats)
    )  # fmt: skip


# --- what the result depends on ---------------------------------------------------------------------------------------


def _content(name: str | None, seed: int) -> list[Any] | None:
    """What stands for the content of local data; None where only the library knows it."""
    if name is None:
        return None  # the default and its fallback are different data
    if name == "stdlib-pairs":
        return [_digest(Path(os.__file__)), sys.version]
    path = place_of("--data", name)
    with suppress(OSError):
        if path.is_file():
            return [path.suffix, _digest(path), seed]  # the seed chooses the rows that are held out
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if format_of(file) is not None and file.is_file())
            return [[file.name, _digest(file)] for file in files]
    return None


def _fingerprints(data: Data) -> list[Any] | None:
    """What `datasets` knows data of the Hub by; None for what is not on the disk."""
    if not all(getattr(rows, "cache_files", None) for rows in data.splits.values()):
        return None
    return [[split, rows._fingerprint] for split, rows in data.splits.items()]


def _file(asked: list[Any], content: list[Any] | None, tokenizer: Any, max_length: int) -> Path | None:
    """Where the result is, or will be; None where nothing is kept."""
    setting = os.environ.get("NANOFINETUNE_CACHE")
    if setting == "" or content is None or not hasattr(tokenizer, "backend_tokenizer"):
        return None  # a tokenizer that is written in Python cannot be hashed
    try:
        folder = Path("~/.cache/nanofinetune" if setting is None else setting).expanduser()
    except RuntimeError as error:
        if setting is None:
            return None  # this user has no home
        raise UsageError(f"NANOFINETUNE_CACHE {setting}: there is no such user; name a folder") from error
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}  # as the latest call left them; each call says what it wants
    tokens = [rules, *tokenizer.model_input_names, tokenizer.truncation_side, max_length]
    versions = [version(name) for name in ("datasets", "pyarrow", "tokenizers", "transformers")]
    code = [_digest(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    whole = json.dumps([*asked, content, tokens, versions, code])
    return folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.tokens"


def _digest(file: Path) -> str:
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


# --- the folder -------------------------------------------------------------------------------------------------------


def _is_ours(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user; root, above all, is not to read what others left in its place."""
    is_mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return is_mine and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def _make_room(folder: Path, size: int) -> bool:
    """Remove what was left unfinished, then what was used longest ago -> whether `size` more bytes may be kept."""
    found = []
    for file in folder.iterdir():
        if OUR_FILES.fullmatch(file.name):
            with suppress(OSError):
                found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = size + sum(size for _, size, _ in found)
    for used, bytes_, file in sorted(found):
        left_behind = file.suffix == ".part" and used < time.time() - LEFT_BEHIND
        if left_behind or (total > MOST_BYTES and file.suffix != ".part"):
            with suppress(OSError):
                file.unlink()
                total -= bytes_
    return total <= MOST_BYTES
