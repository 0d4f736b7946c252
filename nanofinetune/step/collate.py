"""Pad tokenized rows (a *row* is one example of the data set) into one rectangular batch.

>>> from types import SimpleNamespace
>>> tokenizer = SimpleNamespace(pad_token_id=0, pad_token_type_id=0, padding_side="right", model_max_length=512,
...                             model_input_names=["input_ids", "attention_mask"])
>>> batch = DataCollatorWithPadding(tokenizer)([{"input_ids": [7, 8, 9], "label": 1}, {"input_ids": [5], "label": 0}])
>>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
([[7, 8, 9], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]], [1, 0])

Underneath: `transformers.data.data_collator.DataCollatorWithPadding` (transformers 5.23), which calls
`transformers.tokenization_utils_base.PreTrainedTokenizerBase.pad`.
  - There: every tensor becomes a Python list, is padded row by row, and becomes a tensor again.
  - Kept: arguments, values, order of keys, dtypes. Here each column is one vectorised copy.
  - Different: what the library drops or mangles is an error here; a mask of bools always becomes int64.
  - Left out: masks of two dimensions, token columns that are not whole numbers, single examples, return_tensors=None.

Proof: test_collator_matches_transformers, test_where_transformers_is_silent_we_raise in tests/step/test_collate.py.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

UNLIMITED = 10**20  # a tokenizer without a limit says model_max_length = 1e30
_ALONE = "this is one example, not a batch of them: a single example must come as [example]"
Columns = dict[str, np.ndarray | torch.Tensor]  # a batch before it is a Batch, in the order of its keys


def token_cells(lengths: np.ndarray, width: int, side: str) -> np.ndarray:
    """Which cells of a batch hold a token; the rest is padding, on `side`: (B,) lengths -> (B, width) bool.

    >>> token_cells(np.array([3, 1]), width=3, side="left").astype(int).tolist()
    [[1, 1, 1], [0, 0, 1]]
    """
    cell = np.arange(width)
    return cell >= (width - lengths)[:, None] if side == "left" else cell < lengths[:, None]


def pad_flat(tokens: np.ndarray, inside: np.ndarray, value: int) -> np.ndarray:
    """Rows end to end, (total,) -> one column of a batch, (B, W) int64, with `value` in every cell without a token.

    >>> pad_flat(np.array([7, 8, 9, 5]), token_cells(np.array([3, 1]), 3, "right"), value=0).tolist()
    [[7, 8, 9], [5, 0, 0]]
    """
    column = np.full(inside.shape, value, dtype=np.int64)
    column[inside] = tokens  # a mask walks the cells row by row, left to right: the order of the tokens
    return column


def flat_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices into `flat` of the rows flat[starts[i] : starts[i] + lengths[i]], end to end: (B,), (B,) -> (total,).

    >>> flat_indices(np.array([10, 4]), np.array([3, 2])).tolist()
    [10, 11, 12, 4, 5]
    """
    ends = lengths.cumsum()  # (B,) in the result
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


class Tokenizer(Protocol):
    """The five attributes that padding reads from a tokenizer."""

    pad_token_id: int | None
    pad_token_type_id: int
    padding_side: str
    model_input_names: list[str]  # the first one gives a row its length: input_ids
    model_max_length: int


class Batch(dict[str, Any]):
    """Column name -> tensor, (B, W) for tokens, (B,) for labels. In place of transformers' BatchEncoding.

    A column is an attribute too: `batch.input_ids`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:  # underneath: BatchEncoding's AttributeError does not say which name
            raise AttributeError(f"the batch has no {name}, only {', '.join(self)}") from None

    def to(self, device: str | int | torch.device, non_blocking: bool = False) -> "Batch":
        """Move every tensor, in place as BatchEncoding does, and return self. TypeError for a batch of numpy arrays."""
        device = torch.device(device)  # refuses a dtype: `batch.to(torch.float16)` would round the token ids
        for name, column in self.items():
            if not isinstance(column, torch.Tensor):
                raise TypeError(f'{name} is a numpy array, which lives on no device: collate with return_tensors="pt"')
            self[name] = column.to(device, non_blocking=non_blocking)
        return self


@dataclass(frozen=True, eq=False)
class FlatRows(Sequence[dict[str, Any]]):
    """Some rows of a flat token store, not yet copied out of it: what a data set's `__getitems__(indices)` returns.

    torch's DataLoader passes it to the collator, which copies straight from the store into the batch. As a sequence
    it gives ordinary rows, each a dict.

    ragged: name -> (flat (total,) int32, offsets (rows + 1,) int64). Columns with equal offsets should share one array.
    dense: name -> (rows, ...). indices: (B,). Raises IndexError for an index below 0.
    """

    ragged: Mapping[str, tuple[np.ndarray, np.ndarray]]
    dense: Mapping[str, np.ndarray]
    indices: np.ndarray

    def __post_init__(self) -> None:
        # offsets has one entry more than there are rows, so numpy's -2 would not be the row before -1
        if (self.indices < 0).any():
            raise IndexError(f"row indices count from 0, got {self.indices.min()}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        """Row i as a dict of arrays and Python numbers; for a slice, the FlatRows of those rows."""
        row = self.indices[i]
        if isinstance(i, slice):
            return FlatRows(self.ragged, self.dense, row)
        tokens = {name: flat[offsets[row] : offsets[row + 1]].copy() for name, (flat, offsets) in self.ragged.items()}
        return tokens | {name: column[row].tolist() for name, column in self.dense.items()}


@dataclass(eq=False)
class DataCollatorWithPadding:
    """Rows -> padded `Batch`. The arguments of transformers.DataCollatorWithPadding, which may also be set later.

    padding: True or "longest" (as wide as the batch's longest row), "max_length" (as wide as `max_length`, else as the
    tokenizer's model_max_length), False or "do_not_pad" (rows must be equally long). pad_to_multiple_of: round the
    width up; tensor cores like 8. return_tensors: "pt" or "np".

    It pads the ids (with pad_token_id), attention_mask (0), token_type_ids (pad_token_type_id) and
    special_tokens_mask (1), and stacks all other columns. It makes the attention_mask if the model wants one and the
    rows have none. label and label_ids become labels.
    Raises ValueError, naming the column and the row, where the rows do not make a batch.
    """

    tokenizer: Tokenizer
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        """Raise ValueError for settings that are wrong or contradict each other."""
        strategy = _strategy(self.padding)
        if self.return_tensors not in ("pt", "np"):
            raise ValueError(f'return_tensors is {self.return_tensors!r}: use "pt" or "np"')
        for name, number in (("max_length", self.max_length), ("pad_to_multiple_of", self.pad_to_multiple_of)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}: it must be at least 1")
        # underneath: the library ignores max_length with "longest" and "do_not_pad"; only padding=True warns
        if self.max_length is not None and strategy != "max_length":
            raise ValueError(f'max_length={self.max_length} has no effect unless padding="max_length"')
        if self.pad_to_multiple_of is not None and strategy == "do_not_pad":
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} has no effect without padding")

    def __call__(self, features: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Batch:
        """Collate a list of rows, FlatRows, or a dict of columns (what `dataset[:8]` gives). Changes none of them."""
        self._check()
        if len(features) == 0:
            raise ValueError("the batch has no rows")
        if self.tokenizer.padding_side not in ("left", "right"):
            raise ValueError(f'tokenizer.padding_side is {self.tokenizer.padding_side!r}: use "left" or "right"')
        if isinstance(features, FlatRows):
            columns, inside = self._from_store(features)
        else:
            columns, inside = self._from_rows(_by_column(features))
        if "attention_mask" not in columns and "attention_mask" in self.tokenizer.model_input_names:
            columns["attention_mask"] = inside.astype(np.int64)
        _rename_label(columns)
        if self.return_tensors == "np":
            return Batch({name: np.asarray(column) for name, column in columns.items()})
        return Batch({name: _tensor(column) for name, column in columns.items()})

    def _from_store(self, rows: FlatRows) -> tuple[Columns, np.ndarray]:
        """The columns, copied straight from the flat store, and which cells hold tokens, (B, W) bool."""
        main, pad_value = self.tokenizer.model_input_names[0], self._pad_values()
        _need_ids(main, rows.ragged)
        offsets = rows.ragged[main][1]
        starts, lengths = _spans(offsets, rows.indices)
        inside = token_cells(lengths, self._width(main, lengths.tolist()), self.tokenizer.padding_side)
        where = flat_indices(starts, lengths)  # (total,), the same for all columns
        columns: Columns = {}
        for name, (flat, own_offsets) in rows.ragged.items():
            if name not in pad_value:
                raise ValueError(f"{name} is a ragged column but not one that is padded: leave it out of the store")
            own_where = where
            if own_offsets is not offsets:
                own_starts, own_lengths = _spans(own_offsets, rows.indices)
                _same_lengths(name, own_lengths.tolist(), lengths.tolist())
                own_where = flat_indices(own_starts, own_lengths)
            columns[name] = pad_flat(flat[own_where], inside, pad_value[name])
        for name, values in rows.dense.items():
            columns[name] = self._as_python_numbers(torch.from_numpy(values[rows.indices]))
        return columns, inside

    def _from_rows(self, values_of: dict[str, list[Any]]) -> tuple[Columns, np.ndarray]:
        """The columns, from lists, arrays or tensors, and which cells hold tokens, (B, W) bool."""
        main, pad_value = self.tokenizer.model_input_names[0], self._pad_values()
        _need_ids(main, values_of)
        first = values_of[main][0]
        if isinstance(first, int) or getattr(first, "ndim", 1) == 0:
            raise ValueError(_ALONE)
        names = [main, *(name for name in values_of if name in pad_value and name != main)]
        tokens, lengths_of = _end_to_end({name: values_of[name] for name in names})  # C columns: (C * total,)
        lengths = lengths_of[main]
        for name, own_lengths in lengths_of.items():
            _same_lengths(name, own_lengths, lengths)
        inside = token_cells(np.array(lengths), self._width(main, lengths), self.tokenizer.padding_side)
        tokens_of = dict(zip(names, tokens.reshape(len(names), -1), strict=True))
        columns: Columns = {}
        for name, values in values_of.items():
            if name in tokens_of:
                columns[name] = pad_flat(tokens_of[name], inside, pad_value[name])
            else:
                columns[name] = self._stacked(name, values, keep_dtype=isinstance(first, (list, tuple)))
        return columns, inside

    def _stacked(self, name: str, values: list[Any], keep_dtype: bool) -> torch.Tensor:
        """A column that is not padded, (B,) or (B, ...)."""
        try:
            if isinstance(values[0], torch.Tensor):
                column = torch.stack(values).cpu()
            elif isinstance(values[0], np.ndarray):
                column = torch.from_numpy(np.stack(values))
            else:  # numbers, or lists of them
                column = torch.from_numpy(np.asarray(values)) if self.return_tensors == "np" else torch.tensor(values)
                return column if column.numel() else column.to(torch.int64)  # underneath: what is empty is int64
        except (TypeError, ValueError, RuntimeError) as error:
            raise _why_not(name, values, padded=False) from error
        # underneath: where the ids are lists the library keeps a tensor's dtype, else it turns all into Python numbers
        return column if keep_dtype else self._as_python_numbers(column)

    def _as_python_numbers(self, column: torch.Tensor) -> torch.Tensor:
        """The column in the dtype that Python numbers get: int64 or bool; float32 from torch, float64 from numpy."""
        if column.is_floating_point():
            return column.to(torch.float64 if self.return_tensors == "np" else torch.float32)
        return column if column.dtype == torch.bool else column.to(torch.int64)

    def _pad_values(self) -> dict[str, int]:
        """Name of a padded column -> the value it is padded with."""
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None or pad_id < 0:
            if _strategy(self.padding) != "do_not_pad":
                raise ValueError(
                    "the tokenizer has no pad token: set tokenizer.pad_token, to its eos_token for instance"
                )
            pad_id = 0  # never used: nothing is padded
        return {
            self.tokenizer.model_input_names[0]: pad_id,
            "attention_mask": 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }

    def _width(self, main: str, lengths: list[int]) -> int:
        """W of a batch whose rows have these lengths."""
        strategy, longest = _strategy(self.padding), max(lengths)
        if strategy == "do_not_pad":
            if longest != min(lengths):
                raise ValueError(f"{main} has lengths {_listed(lengths)} and padding is off: use padding=True")
            return longest
        width = longest
        if strategy == "max_length":
            width = self.tokenizer.model_max_length if self.max_length is None else self.max_length
            if width > UNLIMITED:  # underneath: the library then leaves the rows unpadded, silently
                raise ValueError('padding="max_length" needs a max_length: this tokenizer has no model_max_length')
        if self.pad_to_multiple_of is not None:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if longest > width:  # underneath: `pad` never truncates; rows that are all equally too long pass
            raise ValueError(
                f"row {lengths.index(longest)} has {longest} tokens, max_length is {width}: "
                f"truncate when tokenizing (truncation=True, max_length={width})"
            )
        return width


def _strategy(padding: bool | str) -> str:
    """The strategy's name. transformers' PaddingStrategy members are strings and pass too."""
    if isinstance(padding, bool):
        return "longest" if padding else "do_not_pad"
    for strategy in ("longest", "max_length", "do_not_pad"):
        if padding == strategy:
            return strategy
    raise ValueError(f'padding is {padding!r}: use True, "longest", "max_length", False or "do_not_pad"')


def _spans(offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows at `indices` start in the store, and how long they are: (B,) each."""
    starts = offsets[indices]
    return starts, offsets[indices + 1] - starts


def _by_column(features: Any) -> dict[str, list[Any]]:
    """Column name -> its value in every row. ValueError where rows have different columns."""
    if isinstance(features, Mapping):
        if any(isinstance(values, (int, float)) for values in features.values()):
            raise ValueError(_ALONE)
        columns = {name: list(values) for name, values in features.items()}
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(f"columns must have the same number of rows, at least one; theirs are {sizes}")
        return columns
    first = features[0]
    for number, row in enumerate(features):
        if not isinstance(row, (dict, Mapping)):  # dict first: asking an abstract class takes longer
            raise ValueError(f"row {number} is a {type(row).__name__}: a row is a dict of column names and values")
        # underneath: the library takes row 0's names, drops what only later rows have, KeyErrors on what they lack
        if row.keys() != first.keys():
            missing, extra = [name for name in first if name not in row], [name for name in row if name not in first]
            what = f"has no {', '.join(missing)}" if missing else f"has {', '.join(extra)} too"
            raise ValueError(f"row {number} {what}: all rows must have the columns of row 0 ({', '.join(first)})")
    return {name: [row[name] for row in features] for name in first}


def _end_to_end(columns: dict[str, list[Any]]) -> tuple[np.ndarray, dict[str, list[int]]]:
    """All rows of all token columns, one after the other, in one integer array; and each column's row lengths."""
    values = [value for column in columns.values() for value in column]
    try:
        tokens, size = _concatenated(values)
        if tokens.dtype.kind not in "iub" and all(map(_is_whole, values)):
            # np.array([]) and torch.tensor([]) are floats, and make floats of all; so does uint64 beside int64
            tokens = np.concatenate([_array(value).astype(np.int64) for value in values])
        if tokens.ndim == 1 and tokens.dtype.kind in "iub":
            return tokens, {name: list(map(size, column)) for name, column in columns.items()}
        cause = None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        cause = error
    if len(columns) > 1:
        for name, column in columns.items():  # one by one, so that the error names the right column
            _end_to_end({name: column})
    name = next(iter(columns))
    raise _why_not(name, columns[name], padded=True) from cause


def _concatenated(values: list[Any]) -> tuple[np.ndarray, Callable[[Any], int]]:
    """The values of all rows in one array, and the fastest function that tells a row's length."""
    if all(isinstance(value, torch.Tensor) for value in values):
        return torch.cat(values).cpu().numpy(), torch.Tensor.numel
    if isinstance(values[0], (list, tuple)):
        integers = array("q")  # int64: the fast way out of lists, and it takes nothing but integers
        for value in values:
            integers.fromlist(list(value))
        return np.array(integers), len
    return np.concatenate(values), len


def _tensor(column: np.ndarray | torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(column) if isinstance(column, np.ndarray) else column


def _rename_label(columns: Columns) -> None:
    labels = [name for name in ("label", "label_ids", "labels") if name in columns]
    if len(labels) > 1:  # underneath: the library lets label overwrite labels, and label_ids overwrite both
        raise ValueError(f"the rows have {' and '.join(labels)}: keep only the one to train on")
    for name in labels:
        if name != "labels":
            columns["labels"] = columns.pop(name)  # last of the keys, as in the library


# ---- Below: only the checks, and the search for what is wrong with a column that makes no tensor.


def _need_ids(main: str, names: Mapping[str, Any]) -> None:
    if main not in names:
        raise ValueError(f"the rows have no {main}, only {', '.join(names)}: tokenize them first")


def _same_lengths(name: str, lengths: list[int], ids: list[int]) -> None:
    for row in range(len(ids)) if lengths != ids else ():
        if lengths[row] != ids[row]:  # underneath: the library pads every column by as much as the ids lack
            raise ValueError(
                f"row {row} has {ids[row]} tokens but {lengths[row]} values of {name}: it must have one for each token"
            )


def _why_not(name: str, values: list[Any], padded: bool) -> ValueError:
    """What is wrong with a column that makes no tensor, and in which row."""
    if all(isinstance(value, str) or (isinstance(value, (list, tuple)) and _is_text(value)) for value in values):
        return ValueError(f"{name} is text: keep the tokenizer's output only, with dataset.remove_columns({name!r})")
    shapes = [_shape(value) for value in values]
    for row, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if value is None:
            return ValueError(f"{name} is None in row {row}: leave out the rows without a value, or the column")
        if shape is None or (padded and shape and not _is_whole(value)):
            return ValueError(
                f"{name} holds something else than {'whole ' * padded}numbers: row {row} is {value!r:.60}"
            )
        if padded and not shape:
            return ValueError(f"{name} is a single number in row {row}: it must be a list, with one for each token")
        if padded and len(shape) > 1:
            return ValueError(
                f"{name} has {len(shape)} dimensions in row {row}: not supported, only one value for each token"
            )
        if not padded and type(value) is not type(values[0]):
            kinds = sorted({type(value).__name__, type(values[0]).__name__})
            return ValueError(
                f"{name} mixes {' and '.join(kinds)}: all rows must have the same type, and row {row} differs"
            )
    if not padded and len(set(shapes)) > 1:
        return ValueError(_not_padded(name, [shape for shape in shapes if shape is not None]))
    return ValueError(f"{name} makes no tensor, though each of its rows does: row 0 is {values[0]!r:.60}")


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of one row's value; None where that is not made of numbers."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    try:
        numbers = np.asarray(value)
    except ValueError:  # a list whose items have different lengths
        return None
    return numbers.shape if numbers.dtype.kind in "iubf" else None


def _is_whole(value: Any) -> bool:
    """Whether one row's value, a list or the like, holds integers or bools, or nothing."""
    return not len(value) or _array(value).dtype.kind in "iub"


def _array(value: Any) -> np.ndarray:
    """One row's value as a numpy array; a bfloat16 tensor, which numpy does not know, as one of float32."""
    if isinstance(value, torch.Tensor):
        return (value.float() if value.is_floating_point() else value).cpu().numpy()
    return np.asarray(value)


def _is_text(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], str)


def _not_padded(name: str, shapes: list[tuple[int, ...]]) -> str:
    found = _listed([shape[0] for shape in shapes]) if all(len(shape) == 1 for shape in shapes) else ""
    what = f"lengths {found}" if found else f"shapes {', '.join(map(str, sorted(set(shapes))))}"
    return f"{name} has {what} and is not a padded column: pad it beforehand or leave it out"


def _listed(lengths: list[int]) -> str:
    return ", ".join(map(str, sorted(set(lengths))))
