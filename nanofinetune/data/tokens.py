"""Token ids kept flat: all tokens of a split in one array, and where each row begins.

>>> flat, offsets = np.array([101, 7, 102, 101, 102], np.int32), np.array([0, 3, 5])
>>> store = TokenStore({"input_ids": (flat, offsets)}, labels=np.array([1, 0]))
>>> len(store), store[1]["input_ids"].tolist(), store.lengths.tolist()
(2, [101, 102], [3, 2])
>>> rows = store.__getitems__([1, 0])  # what torch's DataLoader asks a data set for: a view, no copy
>>> len(rows), rows[0]["label"]
(2, 0)

Underneath: `datasets.Dataset.map` and `datasets.Dataset.set_format` (datasets 5.2)
  - a torch-formatted Dataset makes one small tensor of every cell; the library's collator makes Python lists of them
    again;
  - here each model input is one int32 array of all tokens, plus int64 offsets that all inputs share;
  - `__getitems__` hands the collator a view, from which it copies each column once.

Proof: test_token_store_matches_datasets_rows, test_token_store_holds_int32_and_one_offsets_array in
tests/data/test_tokens.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from nanofinetune.data.columns import labels_of
from nanofinetune.data.load import Data
from nanofinetune.step.collate import FlatRows


class TokenStore(Dataset[dict[str, Any]]):
    """All tokens of a split: for each model input a flat int32 array and int64 offsets; beside them the labels.

    Args:
        ragged: model input name -> (flat (tokens,), offsets (rows + 1,)): row i is flat[offsets[i]:offsets[i + 1]].
        labels: (rows,) int64 class ids or float32 targets; None for text without labels.
    """

    def __init__(self, ragged: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: np.ndarray | None = None) -> None:
        self.ragged = dict(ragged)
        self.dense = {} if labels is None else {"label": labels}
        offsets = next(iter(self.ragged.values()))[1]
        self.lengths = np.diff(offsets)  # (rows,) tokens in each row

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """A hash of all tokens and labels, which differs where the data or the tokenizer has changed."""
        hashed = hashlib.sha256()
        for name, (flat, offsets) in sorted(self.ragged.items()):
            hashed.update(name.encode() + flat.tobytes() + offsets.tobytes())
        for name, column in sorted(self.dense.items()):
            hashed.update(name.encode() + column.tobytes())
        return hashed.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> FlatRows:
        # underneath: torch's DataLoader calls __getitems__, where there is one, with all indices of a batch
        return FlatRows(self.ragged, self.dense, np.asarray(indices, dtype=np.int64))


def tokenize(data: Data, tokenizer: Any, max_length: int) -> dict[str, TokenStore]:
    """Tokenize every split, cut to `max_length` tokens (the longer text of a pair first) -> split name -> TokenStore.

    Where the data are on disk, `datasets` caches the result by a fingerprint of data, tokenizer and arguments.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(*(rows[column] for column in data.text_columns), truncation=True, max_length=max_length))

    stores = {}
    for key, split in data.splits.items():
        drop = [column for column in split.column_names if column != data.label_column]
        stores[key] = _to_store(split.map(encode, batched=True, remove_columns=drop), data)
    return stores


def tokenize_texts(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, max_length: int) -> TokenStore:
    """Tokenize plain strings (and their second sentences) into a TokenStore without labels: what prediction needs."""
    encoded = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=True, max_length=max_length)
    ragged = {}
    for column, rows in encoded.items():
        offsets = np.cumsum([0, *map(len, rows)])
        ragged[column] = (np.concatenate([np.asarray(row, np.int32) for row in rows]), offsets)
    return TokenStore(ragged)


def _to_store(encoded: Any, data: Data) -> TokenStore:
    """A tokenized datasets.Dataset -> TokenStore, straight from its Arrow buffers."""
    table = encoded.with_format("arrow")[:]
    ragged: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for column in encoded.column_names:
        if column != data.label_column:
            lists = table[column].combine_chunks()
            offsets = lists.offsets.to_numpy().astype(np.int64)
            flat = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]].astype(np.int32)
            # all inputs of a model have one value a token, so they share one offsets array
            same = [other for _, other in ragged.values() if np.array_equal(other, offsets - offsets[0])]
            ragged[column] = (flat, same[0] if same else offsets - offsets[0])
    return TokenStore(ragged, labels_of(encoded, data.label_column, "tokenized"))
