"""The flat token store against the torch-formatted `datasets.Dataset` (datasets 5.2) of the course, bit for bit.

python -m pytest tests/data/test_tokens.py
"""

import tracemalloc

import datasets
import numpy as np
import pytest
from tables import rows, write

from nanofinetune.data.load import Data, load_data
from nanofinetune.data.tokens import TokenStore, tokenize, tokenize_texts
from nanofinetune.step.collate import DataCollatorWithPadding


def test_token_store_matches_datasets_rows(tmp_path, tiny_tokenizer):
    """Row by row and batch by batch, bitwise: the store against the torch-formatted data set of the course."""
    from transformers import DataCollatorWithPadding as TransformersCollator

    write(tmp_path, "parquet", "train", rows(50))
    write(tmp_path, "parquet", "validation", rows(11, seed=1))
    data = load_data(str(tmp_path))
    stores = tokenize(data, tiny_tokenizer, max_length=10)

    def encode(example):
        return tiny_tokenizer(example["sentence1"], example["sentence2"], truncation=True, max_length=10)

    for split, store in stores.items():
        reference = data.splits[split].map(encode, batched=True).remove_columns(["sentence1", "sentence2"])
        assert len(store) == len(reference)
        assert store.lengths.tolist() == [len(ids) for ids in reference["input_ids"]]
        for i, row in enumerate(reference):
            mine = store[i]
            assert {name: np.asarray(value).tolist() for name, value in mine.items()} == row
        batch = DataCollatorWithPadding(tiny_tokenizer)(store.__getitems__([3, 0, 7]))
        theirs = TransformersCollator(tiny_tokenizer)([reference[i] for i in (3, 0, 7)])
        assert list(batch) == list(theirs)
        for name, column in theirs.items():
            assert batch[name].equal(column), name


def test_token_store_holds_int32_and_one_offsets_array(tmp_path, tiny_tokenizer):
    write(tmp_path, "parquet", "train", rows(20))
    write(tmp_path, "parquet", "validation", rows(5))
    store = tokenize(load_data(str(tmp_path)), tiny_tokenizer, max_length=64)["train"]
    offsets = [column_offsets for _, column_offsets in store.ragged.values()]
    assert {flat.dtype for flat, _ in store.ragged.values()} == {np.dtype(np.int32)}
    assert all(other is offsets[0] for other in offsets)
    assert store.dense["label"].dtype == np.int64


def test_tokenize_texts_matches_the_tokenizer(tiny_tokenizer):
    texts, pairs = ["the cat", "a big red dog", "it"], ["sat", "ran under the tree", "was small and old"]
    for second in (None, pairs):
        store = tokenize_texts(texts, second, tiny_tokenizer, max_length=9)
        reference = tiny_tokenizer(texts, second, truncation=True, max_length=9)
        for name, column in reference.items():
            assert [np.asarray(store[i][name]).tolist() for i in range(3)] == column


def test_a_row_index_below_zero_is_refused():
    store = TokenStore({"input_ids": (np.array([1, 2, 3], np.int32), np.array([0, 1, 3]))})
    with pytest.raises(IndexError, match="count from 0"):
        store.__getitems__([-1])


def test_tokens_are_in_memory_once_while_they_are_made():
    """They were there twice: as one array a block, and as all of these joined."""
    row = list(range(100))

    def tokenizer(texts, **_):
        return {name: [row] * len(texts) for name in ("input_ids", "attention_mask")}

    split = datasets.Dataset.from_dict({"text": ["a"] * 30_000, "label": [0] * 30_000})
    data = Data("rows", {"train": split}, ("text",), "label", ["0", "1"], ("accuracy",))
    tracemalloc.start()
    try:
        store = tokenize(data, tokenizer, 100)["train"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store[29_999]["input_ids"].tolist() == row
    assert peak < 1.3 * sum(flat.nbytes for flat, _ in store.ragged.values())


def test_a_digest_is_one_of_the_arrays_one_after_the_other():
    """Training rows are told from others by it, in checkpoints that are years old."""
    import hashlib

    flat, offsets, labels = np.array([1, 2, 3], np.int32), np.array([0, 3, 3]), np.array([1, 0])
    store = TokenStore({"input_ids": (flat, offsets)}, labels)
    whole = b"input_ids" + flat.tobytes() + offsets.tobytes() + b"label" + labels.tobytes()
    assert store.digest() == hashlib.sha256(whole).hexdigest()[:16]
