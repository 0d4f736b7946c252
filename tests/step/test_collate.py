"""step/collate.py against transformers.DataCollatorWithPadding (transformers 5.23).

The same keys in the same order, the same dtypes, the same values, bit for bit. Where the library is silent or gives no
reason, an error that says what to do.

    python -m pytest tests/step/test_collate.py
"""

import copy
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanofinetune.step.collate import Batch, DataCollatorWithPadding, FlatRows

transformers = pytest.importorskip("transformers", reason="the reference is transformers' own collator")

# The types in which tokens and labels reach a collator: Python's own, set_format("numpy") and set_format("torch").
KINDS: dict[str, Any] = {
    "list": (lambda tokens: tokens, lambda label: label),
    "numpy": (lambda tokens: np.array(tokens, dtype=np.int64), lambda label: np.array(label)[()]),
    "numpy32": (lambda tokens: np.array(tokens, dtype=np.int32), lambda label: np.array(label)[()]),
    "torch": (lambda tokens: torch.tensor(tokens, dtype=torch.int64), lambda label: torch.tensor(label)),
}
PADDINGS: dict[str, dict[str, Any]] = {
    "true": {"padding": True},
    "longest": {"padding": "longest"},
    "enum": {"padding": transformers.utils.PaddingStrategy.LONGEST},
    "max": {"padding": "max_length", "max_length": 21},
    "model_max": {"padding": transformers.utils.PaddingStrategy.MAX_LENGTH},
    "to_8": {"pad_to_multiple_of": 8},
    "max_to_16": {"padding": "max_length", "max_length": 21, "pad_to_multiple_of": 16},
    "numpy": {"return_tensors": "np"},
}
COLUMNS = {
    "bert": ["input_ids", "token_type_ids", "attention_mask", "label"],
    "ids_only": ["input_ids"],
    "no_mask": ["label", "input_ids", "token_type_ids"],  # the mask is made, and comes after the row's own columns
    "all": ["special_tokens_mask", "label_ids", "attention_mask", "input_ids", "token_type_ids"],
}


def make_rows(kind="list", columns=COLUMNS["bert"], lengths=(5, 9, 2), float_label=False, seed=0):
    rng = np.random.default_rng(seed)
    tokens, number = KINDS[kind]
    rows = []
    for length in lengths:
        label = float(rng.normal()) if float_label else int(rng.integers(0, 3))
        row = {name: tokens(rng.integers(0, 25 if name == "input_ids" else 2, length).tolist()) for name in columns}
        rows.append({name: number(label) if name.startswith("label") else value for name, value in row.items()})
    return rows


def theirs(tokenizer, features, **settings):
    return transformers.DataCollatorWithPadding(tokenizer, **settings)(features)


def assert_same(ours, reference):
    assert type(ours) is Batch
    assert list(ours) == list(reference)
    for name, column in reference.items():
        assert type(ours[name]) is type(column)
        assert ours[name].dtype == column.dtype, name
        assert ours[name].shape == column.shape, name
        assert np.array_equal(ours[name], column) if isinstance(column, np.ndarray) else torch.equal(ours[name], column)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_collator_matches_transformers(tiny_tokenizer, kind, padding, side, columns):
    tiny_tokenizer.padding_side = side
    settings = PADDINGS[padding]
    for seed, lengths in enumerate([(5, 9, 2), (1,), (16, 16), (0, 3), (8, 1, 13, 20, 4, 4, 7, 2)]):
        for float_label in (False, True):
            rows = make_rows(kind, COLUMNS[columns], lengths, float_label, seed)
            before = copy.deepcopy(rows)
            batch = DataCollatorWithPadding(tiny_tokenizer, **settings)(rows)
            assert_same(batch, theirs(tiny_tokenizer, rows, **settings))
            for row, row_before in zip(rows, before, strict=True):  # the input is unchanged
                assert list(row) == list(row_before)
                assert all(np.array_equal(row[name], row_before[name]) for name in row)


@pytest.mark.parametrize("kind", KINDS)
def test_pad_values_come_from_the_tokenizer(tiny_tokenizer, kind):
    tiny_tokenizer.pad_token, tiny_tokenizer._pad_token_type_id = "[MASK]", 3
    rows = make_rows(kind, COLUMNS["all"])
    batch = DataCollatorWithPadding(tiny_tokenizer)(rows)
    assert_same(batch, theirs(tiny_tokenizer, rows))
    assert batch["input_ids"][2, -1] == tiny_tokenizer.mask_token_id and batch["token_type_ids"][2, -1] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_made_for_a_model_without_one_as_in_transformers(tiny_tokenizer, kind):
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    rows = make_rows(kind, ["input_ids"])
    assert_same(DataCollatorWithPadding(tiny_tokenizer)(rows), theirs(tiny_tokenizer, rows))


@pytest.mark.parametrize(
    "settings", [{"padding": False}, {"padding": "do_not_pad"}, {"padding": False, "return_tensors": "np"}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_without_padding_match_transformers(tiny_tokenizer, kind, settings):
    tiny_tokenizer.pad_token = None  # none is needed
    rows = make_rows(kind, COLUMNS["no_mask"], (6, 6, 6))
    assert_same(DataCollatorWithPadding(tiny_tokenizer, **settings)(rows), theirs(tiny_tokenizer, rows, **settings))


OTHER_VALUES: dict[str, Any] = {
    "bool": lambda i: i == 1,
    "int": lambda i: i,
    "int_or_float": lambda i: i if i else 0.5,
    "float_list": lambda i: [0.25, float(i)],
    "int_matrix": lambda i: [[i, 1], [2, 3]],
    "numpy_bool": lambda i: np.bool_(i == 1),
    "numpy_int32": lambda i: np.int32(i),
    "numpy_float32": lambda i: np.float32(i),
    "numpy_float64": lambda i: np.float64(i),
    "array_0d": lambda i: np.array(i, dtype=np.int32),
    "array_float64": lambda i: np.array([i, 0.1]),
    "tensor_bool": lambda i: torch.tensor(i == 1),
    "tensor_int32": lambda i: torch.tensor(i, dtype=torch.int32),
    "tensor_float16": lambda i: torch.tensor(i, dtype=torch.float16),
    "tensor_float64": lambda i: torch.tensor([i, 0.1], dtype=torch.float64),
}


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize("other", OTHER_VALUES)
@pytest.mark.parametrize("kind", ["list", "numpy", "torch"])
def test_other_columns_match_transformers(tiny_tokenizer, kind, other, return_tensors):
    rows = [row | {"other": OTHER_VALUES[other](i)} for i, row in enumerate(make_rows(kind))]
    batch = DataCollatorWithPadding(tiny_tokenizer, return_tensors=return_tensors)(rows)
    if (kind, other, return_tensors) in {("list", "array_0d", "np"), ("list", "tensor_float64", "pt")}:
        with pytest.raises(ValueError, match="Unable to create tensor"):  # the library cannot; we keep the dtype
            theirs(tiny_tokenizer, rows, return_tensors=return_tensors)
        assert torch.as_tensor(batch["other"]).dtype == torch.as_tensor(rows[0]["other"]).dtype
        assert all(np.array_equal(value, row["other"]) for value, row in zip(batch["other"], rows, strict=True))
    else:
        assert_same(batch, theirs(tiny_tokenizer, rows, return_tensors=return_tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_dict_of_columns_matches_transformers_and_stays_as_it_was(tiny_tokenizer, kind):
    rows = make_rows(kind)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    before = dict(columns)
    batch = DataCollatorWithPadding(tiny_tokenizer)(columns)
    assert all(columns[name] is before[name] for name in columns)
    assert_same(batch, theirs(tiny_tokenizer, columns))
    if kind == "torch":  # the library replaced the caller's tensors
        assert type(columns["input_ids"][0]) is list


def test_batch_encodings_match_transformers(tiny_tokenizer):
    rows = [tiny_tokenizer("the cat sat"), tiny_tokenizer("a dog", "it ran under the tree")]
    assert_same(DataCollatorWithPadding(tiny_tokenizer)(rows), theirs(tiny_tokenizer, rows))


def test_mask_of_bools_is_int64_in_every_batch(tiny_tokenizer):
    even = [{"input_ids": [1, 2], "attention_mask": [True, True]}]
    uneven = [*even, {"input_ids": [1], "attention_mask": [True]}]
    ours = DataCollatorWithPadding(tiny_tokenizer)
    assert ours(even)["attention_mask"].dtype == ours(uneven)["attention_mask"].dtype == torch.int64
    dtypes = [theirs(tiny_tokenizer, rows)["attention_mask"].dtype for rows in (even, uneven)]
    assert dtypes == [torch.bool, torch.int64]  # in the library it depends on the lengths


EMPTY: dict[str, Any] = {
    "list": list,
    "numpy": lambda: np.array([]),  # float64, which is numpy's default
    "numpy32": lambda: np.array([], dtype=np.int32),
    "torch": lambda: torch.tensor([]),  # float32, which is torch's default
}


@pytest.mark.parametrize("padding", ["true", "max", "to_8", "numpy"])
@pytest.mark.parametrize("lengths", [(0,), (0, 0), (0, 3), (3, 0), (4, 0, 1, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_of_any_dtype_match_transformers(tiny_tokenizer, kind, lengths, padding):
    """The dtype of an empty row says nothing: np.array([]) must not make floats of the others."""
    rows = make_rows(kind, COLUMNS["all"], lengths)
    for row in rows:
        row |= {name: EMPTY[kind]() for name, value in row.items() if name != "label_ids" and not len(value)}
    settings = PADDINGS[padding]
    batch = DataCollatorWithPadding(tiny_tokenizer, **settings)(rows)
    assert_same(batch, theirs(tiny_tokenizer, copy.deepcopy(rows), **settings))
    assert torch.as_tensor(batch["input_ids"]).dtype == torch.int64


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_an_empty_other_column_is_int64_as_in_transformers(tiny_tokenizer, return_tensors):
    rows = [{"input_ids": [1, 2], "spans": []}, {"input_ids": [3], "spans": []}]
    settings = {"return_tensors": return_tensors}
    assert_same(DataCollatorWithPadding(tiny_tokenizer, **settings)(rows), theirs(tiny_tokenizer, rows, **settings))


def test_unsigned_ids_beside_signed_ones_match_transformers(tiny_tokenizer):
    rows = [
        {"input_ids": np.array([1, 2], dtype=np.uint64)},
        {"input_ids": np.array([3])},
    ]  # together float64, to numpy
    assert_same(DataCollatorWithPadding(tiny_tokenizer)(rows), theirs(tiny_tokenizer, rows))


def test_fields_set_later_match_transformers(tiny_tokenizer):
    """As on any dataclass; what would be wrong at construction is wrong at the next call."""
    ours, library = DataCollatorWithPadding(tiny_tokenizer), transformers.DataCollatorWithPadding(tiny_tokenizer)
    for settings in (*PADDINGS.values(), {"padding": True, "max_length": None, "return_tensors": "pt"}):
        for collator in (ours, library):
            for name, value in ({"max_length": None, "pad_to_multiple_of": None} | settings).items():
                setattr(collator, name, value)
        assert_same(ours(make_rows()), library(make_rows()))
    left = copy.deepcopy(tiny_tokenizer)
    left.padding_side = "left"
    ours.tokenizer = library.tokenizer = left
    assert_same(ours(make_rows()), library(make_rows()))
    for name, value, message in (
        ("padding", "long", "padding is 'long'"),
        ("return_tensors", "tf", "return_tensors is 'tf'"),
        ("max_length", 7, "max_length=7 has no effect"),
        ("pad_to_multiple_of", 0, "pad_to_multiple_of is 0"),
    ):
        wrong = DataCollatorWithPadding(tiny_tokenizer)
        setattr(wrong, name, value)
        with pytest.raises(ValueError, match=message):
            wrong(make_rows())


def test_rows_of_mixed_kinds_give_the_batch_of_lists(tiny_tokenizer):
    rows = make_rows("list", COLUMNS["all"])
    arrays, tensors = make_rows("numpy", COLUMNS["all"]), make_rows("torch", COLUMNS["all"])
    expected = theirs(tiny_tokenizer, rows)
    ours = DataCollatorWithPadding(tiny_tokenizer)
    for mixed in ([rows[0], arrays[1], tensors[2]], [tensors[0], rows[1], arrays[2]], [arrays[0], tensors[1], rows[2]]):
        plain = [row | {"label_ids": int(row["label_ids"])} for row in mixed]
        assert_same(ours(plain), expected)
    masks = [row | {"attention_mask": array["attention_mask"]} for row, array in zip(tensors, arrays, strict=True)]
    assert_same(ours(masks), expected)


# --- the flat store -------------------------------------------------------------------------------------------------


class FlatStore:
    """The smallest data set that hands FlatRows to a DataLoader."""

    def __init__(self, columns=("input_ids", "token_type_ids", "attention_mask"), rows=20, own_offsets=False, seed=0):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 12, rows)
        offsets = np.concatenate([[0], lengths.cumsum()])
        self.ragged = {
            name: (rng.integers(0, 20, offsets[-1], dtype=np.int32), offsets.copy() if own_offsets else offsets)
            for name in columns
        }
        self.dense = {"label": rng.integers(0, 2, rows, dtype=np.int32)}

    def __len__(self):
        return len(self.dense["label"])

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        return FlatRows(self.ragged, self.dense, np.asarray(indices))


@pytest.mark.parametrize("own_offsets", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "columns", [["input_ids", "token_type_ids", "attention_mask"], ["special_tokens_mask", "input_ids"]]
)
def test_flat_rows_match_transformers(tiny_tokenizer, columns, padding, side, own_offsets):
    tiny_tokenizer.padding_side = side
    ours = DataCollatorWithPadding(tiny_tokenizer, **PADDINGS[padding])
    store = FlatStore(columns, own_offsets=own_offsets)
    rng = np.random.default_rng(1)
    for size in (1, 3, 8, 20):
        rows = store.__getitems__(rng.permutation(len(store))[:size].tolist())
        batch = ours(rows)
        assert_same(batch, ours(list(rows)))
        assert_same(batch, theirs(tiny_tokenizer, list(rows), **PADDINGS[padding]))


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_dense_columns_of_flat_rows_match_transformers(tiny_tokenizer, return_tensors, dtype):
    store = FlatStore()
    rng = np.random.default_rng(2)
    store.dense = {"label": rng.normal(size=20).astype(dtype), "other": rng.normal(size=(20, 3)).astype(dtype)}
    rows = store.__getitems__([4, 0, 4])
    batch = DataCollatorWithPadding(tiny_tokenizer, return_tensors=return_tensors)(rows)
    assert_same(batch, theirs(tiny_tokenizer, list(rows), return_tensors=return_tensors))


def test_flat_rows_are_a_sequence_of_rows_of_their_own():
    store = FlatStore()
    rows = store.__getitems__([7, 2, 5])
    assert len(rows) == len(list(rows)) == 3
    assert list(rows[0]) == ["input_ids", "token_type_ids", "attention_mask", "label"]
    assert type(rows[0]["label"]) is int and rows[-1]["label"] == store[5]["label"]
    assert [row["label"] for row in rows[1:]] == [store[2]["label"], store[5]["label"]]
    longest = max(store.__getitems__(range(20)), key=lambda row: len(row["input_ids"]))
    longest["input_ids"][:] = -1  # a row is a copy: the store does not change
    assert (store.ragged["input_ids"][0] >= 0).all()
    with pytest.raises(IndexError, match="row indices count from 0, got -2"):
        store.__getitems__([3, -2])
    with pytest.raises(IndexError):
        DataCollatorWithPadding(tokenizer())(store.__getitems__([20]))


@pytest.mark.parametrize("workers", [0, 1])
def test_dataloader_over_flat_rows_matches_transformers(tiny_tokenizer, workers):
    store = FlatStore()
    rows: Any = list(store.__getitems__(range(20)))
    flat: Any = store
    settings: dict[str, Any] = {"batch_size": 8, "num_workers": workers}
    ours: Any = torch.utils.data.DataLoader(flat, collate_fn=DataCollatorWithPadding(tiny_tokenizer), **settings)
    library: Any = torch.utils.data.DataLoader(
        rows, collate_fn=transformers.DataCollatorWithPadding(tiny_tokenizer), **settings
    )
    for batch, expected in zip(ours, library, strict=True):
        assert_same(batch, expected)


@pytest.mark.parametrize("row_format", ["torch", "numpy", None])
def test_dataloader_over_torch_format_matches_transformers(tiny_tokenizer, row_format):
    datasets = pytest.importorskip("datasets", reason="the course's rows come from datasets")
    texts = ["the cat sat", "a dog ran on the mat", "it was small", "then", "the big old tree and the new red cat"] * 2
    data = datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 1, 0, 1] * 2})
    data = data.map(lambda rows: tiny_tokenizer(rows["text"], truncation=True), batched=True).remove_columns("text")
    data.set_format(row_format)
    ours = DataCollatorWithPadding(tokenizer=tiny_tokenizer)
    library = transformers.DataCollatorWithPadding(tokenizer=tiny_tokenizer)
    loaders = [torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate) for collate in (ours, library)]
    for batch, expected in zip(*loaders, strict=True):
        assert_same(batch, expected)
    if row_format != "numpy":  # the library cannot take an array of arrays
        assert_same(ours(data[:8]), library(data[:8]))
    assert_same(ours(data[:8]), library([data[i] for i in range(8)]))


# --- Batch.to -------------------------------------------------------------------------------------------------------


def test_to_moves_in_place_like_batch_encoding(tiny_tokenizer):
    for collator in (DataCollatorWithPadding, transformers.DataCollatorWithPadding):
        batch = collator(tiny_tokenizer)(make_rows())
        assert batch.to("meta", non_blocking=True) is batch
        assert {column.device.type for column in batch.values()} == {"meta"}
    batch = DataCollatorWithPadding(tiny_tokenizer)(make_rows())
    assert batch.to(torch.device("cpu"))["input_ids"].dtype == torch.int64
    half: Any = torch.float16
    with pytest.raises(TypeError):
        batch.to(half)
    with pytest.raises(TypeError, match=r'input_ids is a numpy array, .* return_tensors="pt"'):
        DataCollatorWithPadding(tiny_tokenizer, return_tensors="np")(make_rows()).to("cpu")


def test_columns_are_attributes_as_in_batch_encoding(tiny_tokenizer):
    ours, library = (
        cls(tiny_tokenizer)(make_rows()) for cls in (DataCollatorWithPadding, transformers.DataCollatorWithPadding)
    )
    for batch in (ours, library):
        assert batch.input_ids is batch["input_ids"] and batch.labels is batch["labels"]
        assert not hasattr(batch, "label") and not hasattr(batch, "pixel_values")
        assert callable(batch.to) and callable(batch.items)
        for twin in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
            assert type(twin) is type(batch) and torch.equal(twin.input_ids, batch.input_ids)
    with pytest.raises(
        AttributeError, match="the batch has no label, only input_ids, token_type_ids, attention_mask, labels"
    ):
        ours.label  # noqa: B018
    del ours["labels"]
    assert not hasattr(ours, "labels")


# --- errors ---------------------------------------------------------------------------------------------------------


def tokenizer(**changes):
    """Any object with these five attributes will do."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return SimpleNamespace(
        **{
            "pad_token_id": 0,
            "pad_token_type_id": 0,
            "padding_side": "right",
            "model_input_names": names,
            "model_max_length": 64,
        }
        | changes
    )


A, B = {"input_ids": [1, 2, 3], "label": 1}, {"input_ids": [4, 5], "label": 0}
EVEN = {"input_ids": [6, 7, 8], "label": 1}  # as long as A
SQUARE = torch.ones(3, 3, dtype=torch.int64)

# What the library accepts silently: rows, settings, a check that its batch is wrong, our error.
SILENT: dict[str, Any] = {
    "extra column": ([A, B | {"weight": 2}], {}, lambda batch: "weight" not in batch, "row 1 has weight too: all rows"),
    "short masks": (
        [A | {"attention_mask": [1, 1]}, EVEN | {"attention_mask": [1, 1]}],
        {},
        lambda batch: batch["attention_mask"].shape != batch["input_ids"].shape,
        "row 0 has 3 tokens but 2 values of attention_mask",
    ),
    "short token types": (
        [A | {"token_type_ids": [0]}, EVEN | {"token_type_ids": [0]}],
        {},
        lambda batch: batch["token_type_ids"].shape != batch["input_ids"].shape,
        "row 0 has 3 tokens but 1 values of token_type_ids",
    ),
    "all too long": (
        [A, EVEN],
        {"padding": "max_length", "max_length": 2},
        lambda batch: batch["input_ids"].shape[1] == 3,
        r"row 0 has 3 tokens, max_length is 2: truncate when tokenizing \(truncation=True, max_length=2\)",
    ),
    "two labels": (
        [A | {"label_ids": 7}],
        {},
        lambda batch: batch["labels"].tolist() == [7],
        "the rows have label and label_ids: keep only",
    ),
    "label and labels": (
        [{"labels": 7} | A],
        {},
        lambda batch: batch["labels"].tolist() == [1],
        "the rows have label and labels: keep only",
    ),
    "text as numpy": (
        [A | {"sentence1": "the cat"}],
        {"return_tensors": "np"},
        lambda batch: batch["sentence1"].dtype.kind == "U",
        "sentence1 is text: keep the tokenizer's output only",
    ),
    "None as numpy": (
        [A, B | {"label": None}],
        {"return_tensors": "np"},
        lambda batch: batch["labels"].dtype == object,
        "label is None in row 1: leave out",
    ),
    "ragged as numpy": (
        [A | {"spans": [1, 2]}, B | {"spans": [1]}],
        {"return_tensors": "np"},
        lambda batch: batch["spans"].dtype == object,
        "spans has lengths 1, 2 and is not a padded column",
    ),
    "unpadded as numpy": (
        [A, B],
        {"padding": False, "return_tensors": "np"},
        lambda batch: batch["input_ids"].dtype == object,
        "input_ids has lengths 2, 3 and padding is off: use padding=True",
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_where_transformers_is_silent_we_raise(tiny_tokenizer, case):
    rows, settings, wrong, message = SILENT[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrong(theirs(tiny_tokenizer, rows, **settings))
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPadding(tiny_tokenizer, **settings)(rows)


def test_where_transformers_ignores_an_argument_we_raise(tiny_tokenizer):
    assert theirs(tiny_tokenizer, [A, B], padding="longest", max_length=2)["input_ids"].shape == (2, 3)
    with pytest.warns(UserWarning, match="is ignored"):
        theirs(tiny_tokenizer, [A, B], max_length=2)
    with pytest.raises(ValueError, match='max_length=2 has no effect unless padding="max_length"'):
        DataCollatorWithPadding(tiny_tokenizer, max_length=2)
    assert theirs(tiny_tokenizer, [A], padding=False, pad_to_multiple_of=8)["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="pad_to_multiple_of=8 has no effect without padding"):
        DataCollatorWithPadding(tiny_tokenizer, padding=False, pad_to_multiple_of=8)
    tiny_tokenizer.model_max_length = int(1e30)
    assert theirs(tiny_tokenizer, [A], padding="max_length")["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match='padding="max_length" needs a max_length'):
        DataCollatorWithPadding(tiny_tokenizer, padding="max_length")([A])


# What the library fails on too, mostly without saying where: rows, settings, its error, ours.
FAILS: dict[str, Any] = {
    "missing column": (
        [A | {"weight": 2}, B],
        {},
        KeyError,
        "row 1 has no weight: all rows must have .*input_ids, label, weight",
    ),
    "ragged": (
        [A | {"spans": [1, 2]}, B | {"spans": [1]}],
        {},
        ValueError,
        "spans has lengths 1, 2 and is not a padded column",
    ),
    "ragged labels": (
        [
            {"input_ids": torch.tensor([1]), "labels": torch.tensor([1])},
            {"input_ids": torch.tensor([1]), "labels": torch.tensor([1, 2])},
        ],
        {},
        ValueError,
        "labels has lengths 1, 2 and is not a padded column",
    ),
    "not padded": ([A, B], {"padding": False}, ValueError, "input_ids has lengths 2, 3 and padding is off"),
    "mask of one row": (
        [A | {"attention_mask": [1, 1, 1]}, B | {"attention_mask": [1, 1, 1]}],
        {},
        ValueError,
        "row 1 has 2 tokens but 3 values of attention_mask",
    ),
    "text": (
        [A | {"sentence1": "the cat"}],
        {},
        ValueError,
        r"sentence1 is text: .* dataset.remove_columns\('sentence1'\)",
    ),
    "words": ([A | {"tokens": ["the", "cat"]}], {}, ValueError, "tokens is text"),
    "None": ([A | {"label": None}], {}, ValueError, "label is None in row 0"),
    "None as ids": ([A, B | {"input_ids": None}], {}, TypeError, "input_ids is None in row 1"),
    "too long": ([A, B], {"padding": "max_length", "max_length": 2}, ValueError, "row 0 has 3 tokens, max_length is 2"),
    "no rows": ([], {}, AttributeError, "the batch has no rows"),
    "not tokenized": ([{"label": 1}], {}, ValueError, "the rows have no input_ids, only label: tokenize them first"),
    "floats as ids": (
        [A | {"input_ids": [1.0, 2.0]}],
        {},
        ValueError,
        r"input_ids holds .* whole numbers: row 0 is \[1.0, 2.0\]",
    ),
    "not a dict": ([(1, 2)], {}, AttributeError, "row 0 is a tuple: a row is a dict"),
}


@pytest.mark.parametrize("case", FAILS)
def test_errors_beside_those_of_transformers(tiny_tokenizer, case):
    rows, settings, their_error, message = FAILS[case]
    with pytest.raises(their_error):
        theirs(tiny_tokenizer, rows, **settings)
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPadding(tiny_tokenizer, **settings)(rows)


# Rows with one that is at fault, and what the message says about that one.
BLAME: dict[str, Any] = {
    "fractions": ([A, B | {"input_ids": [1.5, 2]}], r"input_ids holds .* whole numbers: row 1 is \[1.5, 2\]"),
    "fraction array": (
        [{"input_ids": np.array([1])}, {"input_ids": np.array([])}, {"input_ids": np.array([0.5])}],
        r"input_ids holds .* whole numbers: row 2 is array\(\[0.5\]\)",
    ),
    "fraction tensor": (
        [{"input_ids": torch.tensor([1])}, {"input_ids": torch.tensor([0.5], dtype=torch.bfloat16)}],
        r"input_ids holds .* whole numbers: row 1 is tensor\(\[0.5",
    ),
    "fraction in a mask": (
        [A | {"attention_mask": [1, 1, 1]}, B | {"attention_mask": [1, 0.5]}],
        r"attention_mask holds .* whole numbers: row 1 is \[1, 0.5\]",
    ),
    "fraction array among lists": (
        [A, B | {"input_ids": np.array([0.5])}],
        "input_ids holds .* whole numbers: row 1 is array",
    ),
    "too large": ([A, B | {"input_ids": [2**70]}], "input_ids holds .* whole numbers: row 1 is "),
    "text": ([A, B | {"input_ids": "ab"}], "input_ids holds .* whole numbers: row 1 is 'ab'"),
    "None": ([A, EVEN, B | {"input_ids": None}], "input_ids is None in row 2"),
    "number": ([A, B | {"input_ids": 7}], "input_ids is a single number in row 1: it must be a list"),
    "nested": ([A, B | {"input_ids": [[7]]}], "input_ids has 2 dimensions in row 1: not supported"),
    "square": (
        [{"input_ids": torch.arange(3)}, {"input_ids": SQUARE}],
        "input_ids has 2 dimensions in row 1: not supported",
    ),
    "label text": ([A, B | {"label": "1"}], "label holds something else than numbers: row 1 is '1'"),
    "label dict": ([A, B | {"label": {"a": 1}}], "label holds something else than numbers: row 1 is {'a': 1}"),
    "label list": ([A, EVEN, B | {"label": [1]}], "label mixes int and list: all rows must .*, and row 2 differs"),
    "label None": ([A, EVEN, B | {"label": None}], "label is None in row 2"),
    "shapes": (
        [A | {"spans": np.ones((1, 2))}, B | {"spans": np.ones((1, 3))}],
        r"spans has shapes \(1, 2\), \(1, 3\) and is not a padded column",
    ),
    "no dict": ([A, EVEN, 5], "row 2 is a int: a row is a dict"),
    "missing": ([A, EVEN, {"input_ids": [1]}], "row 2 has no label"),
    "mask": (
        [A | {"attention_mask": [1, 1, 1]}, B | {"attention_mask": [1]}],
        "row 1 has 2 tokens but 1 values of att",
    ),
}


@pytest.mark.parametrize("case", BLAME)
def test_an_error_names_the_row_at_fault(case):
    rows, message = BLAME[case]
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPadding(tokenizer())(rows)


def test_what_is_not_supported_says_so():
    ours = DataCollatorWithPadding(tokenizer())
    rows: Any
    example: Any
    square = {"input_ids": torch.arange(3), "attention_mask": SQUARE}
    for rows in (
        [square],
        [A | {"attention_mask": SQUARE.tolist()}],
        [square, {"input_ids": torch.arange(2), "attention_mask": SQUARE[:2, :2]}],
    ):
        with pytest.raises(ValueError, match="attention_mask has 2 dimensions in row 0: not supported"):
            ours(rows)
    for example in (A, {"input_ids": torch.arange(3)}):
        with pytest.raises(ValueError, match=r"a single example must come as \[example\]"):
            ours(example)
    for rows in (
        [A | {"attention_mask": [0.5, 1, 1]}],
        [{"input_ids": torch.ones(3)}],
        [{"input_ids": np.array(["a", "b"])}],
    ):
        with pytest.raises(ValueError, match="holds something else than whole numbers"):
            ours(rows)
    with pytest.raises(
        ValueError, match="label mixes Tensor and int: all rows must have the same type, and row 1 differs"
    ):
        ours([A | {"label": torch.tensor(1)}, B])
    with pytest.raises(
        ValueError, match=r"columns must have the same number of rows, .* \{'input_ids': 2, 'label': 1\}"
    ):
        ours({"input_ids": [[1], [2]], "label": [0]})
    with pytest.raises(ValueError, match="at least one"):
        ours({"input_ids": [], "label": []})


def test_wrong_settings_are_refused_beside_transformers(tiny_tokenizer):
    for settings, message in (
        ({"padding": "long"}, 'padding is \'long\': use True, "longest", "max_length", False or "do_not_pad"'),
        ({"padding": None}, "padding is None"),
        ({"return_tensors": "tf"}, 'return_tensors is \'tf\': use "pt" or "np"'),
    ):
        with pytest.raises(ValueError):
            theirs(tiny_tokenizer, [A, B], **settings)
        with pytest.raises(ValueError, match=message):
            DataCollatorWithPadding(tiny_tokenizer, **settings)
    with pytest.raises(ValueError, match='return_tensors is None: use "pt" or "np"'):
        DataCollatorWithPadding(tiny_tokenizer, return_tensors=None)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        theirs(tiny_tokenizer, [A, B], pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0: it must be at least 1"):
        DataCollatorWithPadding(tiny_tokenizer, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="max_length is 0: it must be at least 1"):
        DataCollatorWithPadding(tiny_tokenizer, padding="max_length", max_length=0)
    tiny_tokenizer.padding_side = "up"
    assert theirs(tiny_tokenizer, [A])["input_ids"].shape == (1, 3)  # the library notices only where it has to pad
    with pytest.raises(ValueError, match=r'tokenizer.padding_side is .up.: use "left" or "right"'):
        DataCollatorWithPadding(tiny_tokenizer)([A])
    tiny_tokenizer.padding_side, tiny_tokenizer.pad_token = "right", None
    with pytest.raises(ValueError, match="does not have a padding token"):
        theirs(tiny_tokenizer, [A, B])
    with pytest.raises(ValueError, match=r"the tokenizer has no pad token: set tokenizer.pad_token"):
        DataCollatorWithPadding(tiny_tokenizer)([A, B])


def test_flat_rows_that_do_not_fit_are_refused():
    ours = DataCollatorWithPadding(tokenizer())
    ids, offsets = np.arange(5, dtype=np.int32), np.array([0, 3, 5])
    both = np.array([0, 1])
    with pytest.raises(ValueError, match="row 1 has 2 tokens but 1 values of attention_mask"):
        ours(FlatRows({"input_ids": (ids, offsets), "attention_mask": (ids, np.array([0, 3, 4]))}, {}, both))
    with pytest.raises(ValueError, match="position_ids is a ragged column but not one that is padded"):
        ours(FlatRows({"input_ids": (ids, offsets), "position_ids": (ids, offsets)}, {}, both))
    with pytest.raises(ValueError, match="the rows have no input_ids, only ids"):
        ours(FlatRows({"ids": (ids, offsets)}, {}, both))
    with pytest.raises(ValueError, match="the batch has no rows"):
        ours(FlatRows({"input_ids": (ids, offsets)}, {}, both[:0]))
    with pytest.raises(ValueError, match="row 0 has 3 tokens, max_length is 2"):
        DataCollatorWithPadding(tokenizer(), padding="max_length", max_length=2)(
            FlatRows({"input_ids": (ids, offsets)}, {}, both)
        )


def test_importing_the_collator_imports_no_transformers():
    import subprocess
    import sys

    code = (
        "import sys, nanofinetune.step.collate\n"
        "assert not {'transformers', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
