"""The cache of tokens against what was tokenized: the same arrays, and only for the same data, tokenizer and options.

python -m pytest tests/data/test_cache.py
"""

import subprocess
import sys

import numpy as np
from conftest import ROOT
from tables import rows, write

from nanofinetune.data.cache import load_tokens

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
    assert not load(max_length=8)[0] and not load(seed=7)[0]
    tiny_tokenizer.add_tokens(["zebra"])
    assert not load()[0] and load()[0]
    write(folder, "jsonl", "validation", rows(9, seed=2))
    hit, changed = load()
    assert not hit and len(changed["validation"]) == 9
    for file in cache.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:700])  # what a full disk leaves
    assert not load()[0] and load()[0]
    assert not list(cache.glob("*.part"))
    monkeypatch.setenv("NANOFINETUNE_CACHE", "")
    assert not load()[0]
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(blocked))
    assert not load()[0], "no cache can be written: it works without"
