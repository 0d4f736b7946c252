"""Tokens kept between runs: the finished arrays of local data, in one file that numpy alone can read.

>>> data = Data("two rows", {}, ("text",), "label", ["0", "1"], ("accuracy",))
>>> flat, offsets = np.array([101, 7, 102, 101, 102], np.int32), np.array([0, 3, 5])
>>> stores = {"train": TokenStore({"input_ids": (flat, offsets)}, labels=np.array([1, 0]))}
>>> with tempfile.TemporaryDirectory() as folder:
...     write_cache(Path(folder, "tokens.npz"), data, stores)
...     found, again = read_cache(Path(folder, "tokens.npz"))
>>> found.splits, again["train"][0]["input_ids"].tolist()
({'train': range(0, 2)}, [101, 7, 102])

Underneath: the fingerprints of `datasets.Dataset.map` (datasets 5.2)
  - its cache saves the tokenizing, but not the imports of itself, pandas and pyarrow;
  - ours needs none of them: a warm start is seconds shorter;
  - the file's name is a hash of all that the result depends on;
  - a damaged file is as good as none, and a cache that cannot be written is left out.

Proof: test_cached_tokens_are_the_loaded_ones_without_datasets, test_a_cache_is_used_only_for_what_it_was_made_of in
tests/data/test_cache.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nanofinetune.data.load import Data, load_data
from nanofinetune.data.tokens import TokenStore, tokenize


def load_tokens(
    name: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    seed: int,
    tokenizer: Any,
    max_length: int,
) -> tuple[Data, dict[str, TokenStore]]:
    """`load_data` and `tokenize`, or what they gave for the same data and tokenizer before.

    Kept are local files and stdlib-pairs, in the folder that NANOFINETUNE_CACHE names (default ~/.cache/nanofinetune;
    empty: nothing is kept). The file's name is a hash of all that the result depends on: sizes and times of the data's
    files, the tokenizer, the arguments, this module. `Data.splits` then hold ranges, of which only the length counts.
    Raises what `load_data` raises.
    """
    key = cache_key(name, text_columns, label_column, seed, tokenizer, max_length)
    if key is not None and (found := read_cache(key)) is not None:
        return found
    data = load_data(name, text_columns, label_column, seed)
    stores = tokenize(data, tokenizer, max_length)
    if key is not None:
        write_cache(key, data, stores)
    return data, stores


def cache_key(name: str | None, *arguments: Any) -> Path | None:
    """The file that holds, or will hold, the result; None where nothing is kept."""
    *_, tokenizer, max_length = arguments
    folder = os.environ.get("NANOFINETUNE_CACHE", str(Path("~/.cache/nanofinetune").expanduser()))
    if not folder or name is None or not hasattr(tokenizer, "backend_tokenizer"):
        return None  # a default's fallback may differ next time; a tokenizer in Python cannot be hashed
    path = Path(name).expanduser()
    here = Path(__file__).parent
    sources = [here / f"{module}.py" for module in ("load", "columns", "tokens", "cache", "tasks")]
    if name == "stdlib-pairs":
        sources += [here / "stdlib_pairs.py", Path(os.__file__)]  # the library's own documentation, of this Python
    elif path.is_file():
        sources.append(path)
    elif path.is_dir():
        sources += sorted(file for file in path.iterdir() if file.is_file())
    else:
        return None  # the Hub's: only the library knows whether it has changed
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    texts, label, seed = arguments[:3]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}  # as the latest call left them; each call says what it wants
    tokens = [rules, *tokenizer.model_input_names, tokenizer.truncation_side, max_length]
    whole = [name, texts and list(texts), label, seed, tokens, stamps, version("datasets"), version("transformers")]
    return Path(folder, hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32] + ".npz")


def read_cache(file: Path) -> tuple[Data, dict[str, TokenStore]] | None:
    """What `write_cache` wrote; None where there is nothing, or nothing whole."""
    try:
        with (
            open(file, "rb") as raw,
            np.load(raw, allow_pickle=False) as held,
        ):  # given a name, it leaves a bad file open
            kept = json.loads(str(held["data"]))
            stores = {}
            for split, columns in kept.pop("columns").items():
                offsets = held[f"{split}/offsets"]
                ragged = {column: (held[f"{split}/{column}"], offsets) for column in columns}
                stores[split] = TokenStore(ragged, held[f"{split}/label"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    splits = {split: range(len(store)) for split, store in stores.items()}
    lists = {name: tuple(kept[name]) for name in ("text_columns", "metrics")}
    return Data(**kept | lists, splits=splits), stores


def write_cache(file: Path, data: Data, stores: Mapping[str, TokenStore]) -> None:
    """Write beside the file and rename, so that no one reads half of it. Where that fails there is no cache."""
    arrays: dict[str, Any] = {}
    columns = {}
    for split, store in stores.items():
        offsets = next(iter(store.ragged.values()))[1]
        if any(other is not offsets for _, other in store.ragged.values()):
            return  # columns of different lengths: no model's inputs
        columns[split] = list(store.ragged)
        arrays |= {f"{split}/{name}": flat for name, (flat, _) in store.ragged.items()}
        arrays |= {f"{split}/offsets": offsets, f"{split}/label": store.dense["label"]}
    kept = asdict(replace(data, splits={})) | {"columns": columns}
    del kept["splits"]
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.savez(part, data=np.array(json.dumps(kept)), **arrays)
        os.replace(part.name, file)
