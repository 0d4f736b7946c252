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
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from nanofinetune.data.load import Data, label_values
from nanofinetune.ground.progress import Progress
from nanofinetune.step.collate import FlatRows

BLOCK = 1000  # rows, and
CHARACTERS = 1_000_000  # characters, that are tokenized at a time: a tokenizer's own record takes 100 bytes for each


class TokenStore(Dataset[dict[str, Any]]):
    """All tokens of a split: for each model input a flat int32 array and int64 offsets; beside them the labels.

    Args:
        ragged: model input name -> (flat (tokens,), offsets (rows + 1,)): row i is flat[offsets[i]:offsets[i + 1]].
        labels: (rows,) int64 class ids or float32 targets, (rows, classes) float32 of 0.0 and 1.0; None for text
            without labels.
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
            hashed.update(name.encode())
            for array_ in (flat, offsets):  # as they lie, without a copy
                hashed.update(np.ascontiguousarray(array_).data)
        for name, column in sorted(self.dense.items()):
            hashed.update(name.encode())
            hashed.update(np.ascontiguousarray(column).data)
        return hashed.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> FlatRows:
        # underneath: torch's DataLoader calls __getitems__, where there is one, with all indices of a batch
        return FlatRows(self.ragged, self.dense, np.asarray(indices, dtype=np.int64))


def tokenize(data: Data, tokenizer: Any, max_length: int) -> dict[str, TokenStore]:
    """Tokenize each split, cut to `max_length` tokens (the longer text of a pair first) -> split name -> TokenStore."""
    stores = {}
    for key, split in data.splits.items():
        blocks = (split[begin : begin + BLOCK] for begin in _shown(range(0, len(split), BLOCK), f"tokenizing {key}"))
        texts = ([block[column] for column in data.text_columns] for block in blocks)
        stores[key] = TokenStore(_ragged(texts, tokenizer, max_length), label_values(split, data.label_column))
    return stores


def _shown(begins: range, title: str) -> Iterator[int]:
    """Where the blocks begin, with a bar."""
    with Progress(begins.stop, title, delay=1.0) as progress:
        for begin in begins:
            yield begin
            if progress.add(min(begins.step, begins.stop - begin)):
                progress.show()


def tokenize_texts(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, max_length: int) -> TokenStore:
    """Tokenize plain strings (and their second sentences) into a TokenStore without labels: what prediction needs."""
    return TokenStore(_ragged([[texts] if pairs is None else [texts, pairs]], tokenizer, max_length))


def _ragged(
    blocks: Iterable[Sequence[Sequence[str]]], tokenizer: Any, max_length: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Blocks of [texts] or [texts, second texts] -> for each of the model's inputs its flat array and its offsets."""
    flat: dict[str, array[int]] = {}  # each grows in place: at no time are there two copies of the tokens
    lengths: dict[str, array[int]] = {}
    for texts in chain.from_iterable(map(_bounded, blocks)):
        for name, lists in tokenizer(*texts, truncation=True, max_length=max_length).items():
            counts = np.fromiter(map(len, lists), np.int64, len(lists))
            tokens = np.fromiter(chain.from_iterable(lists), np.int32, counts.sum())
            lengths.setdefault(name, array("q")).frombytes(counts.tobytes())
            flat.setdefault(name, array("i")).frombytes(tokens.tobytes())
    ragged: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in flat:
        offsets = np.zeros(len(lengths[name]) + 1, np.int64)
        np.cumsum(lengths.pop(name), out=offsets[1:])
        # all inputs of a model have one value a token, so they share one offsets array
        same = [other for _, other in ragged.values() if np.array_equal(other, offsets)]
        ragged[name] = (np.asarray(flat[name]), same[0] if same else offsets)
    return ragged


def _bounded(texts: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """The rows of a block, in as many parts as keep each below CHARACTERS, or at one row."""
    rows, size = [list(column) for column in texts], len(texts[0])
    if size > 1 and sum(len(text) for column in rows for text in column) > CHARACTERS:
        yield from _bounded([column[: size // 2] for column in rows])
        yield from _bounded([column[size // 2 :] for column in rows])
    else:
        yield rows
