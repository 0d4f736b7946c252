"""The collator, the schedules and the metrics on generated inputs, against transformers, scikit-learn and scipy.

hypothesis makes the inputs, always the same ones, and shrinks one that fails to the smallest.

    python -m pytest tests/step/test_step_properties.py

Tokens, learning rates and scores from counts are compared with ==; correlations within 1e-9, since scipy adds up
rounded products in another order.
"""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from nanofinetune.step.collate import DataCollatorWithPadding, FlatRows
from nanofinetune.step.metrics import Metric
from nanofinetune.step.schedule import SCHEDULES, get_scheduler

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes the inputs")
transformers = pytest.importorskip("transformers", reason="the reference of collator and schedules")
given, st = hypothesis.given, hypothesis.strategies
few = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

# ---- the collator

TOKENS = ("input_ids", "token_type_ids", "attention_mask", "special_tokens_mask")
MAKE: dict[str, Any] = {
    "list": list,
    "numpy": np.array,  # float64 where it is empty
    "int32": lambda tokens: np.array(tokens, dtype=np.int32),
    "torch": torch.tensor,  # float32 where it is empty
}
PADDING = st.one_of(
    st.fixed_dictionaries(
        {"padding": st.sampled_from([True, "longest"])}, optional={"pad_to_multiple_of": st.integers(1, 9)}
    ),
    st.fixed_dictionaries(
        {"padding": st.just("max_length"), "max_length": st.integers(7, 20)},
        optional={"pad_to_multiple_of": st.integers(1, 9)},
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return transformers.AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@st.composite
def batches(draw):
    """Rows of 0 to 7 tokens, all with the same columns in the same order, as one of the kinds that a data set gives."""
    kind = draw(st.sampled_from(list(MAKE)))
    columns = draw(st.permutations(["input_ids", *draw(st.lists(st.sampled_from(TOKENS[1:]), unique=True))]))
    label = draw(st.sampled_from(["none", "label", "label_ids", "labels"]))
    number = draw(st.sampled_from([st.integers(0, 5), st.floats(-4, 4, width=32), st.booleans()]))
    rows = []
    for length in draw(st.lists(st.integers(0, 7), min_size=1, max_size=6)):
        tokens = st.lists(st.integers(0, 24), min_size=length, max_size=length)
        row = {name: MAKE[kind](draw(tokens)) for name in columns}
        rows.append(row if label == "none" else row | {label: draw(number)})
    return rows


def assert_same(ours, reference):
    assert list(ours) == list(reference)
    for name, column in reference.items():
        assert (type(ours[name]), ours[name].dtype, ours[name].shape) == (type(column), column.dtype, column.shape), (
            name
        )
        assert np.array_equal(ours[name], column), name


@few
@given(rows=batches(), settings=PADDING, side=st.sampled_from(["left", "right"]), tensors=st.sampled_from(["pt", "np"]))
def test_any_batch_matches_transformers(tokenizer, rows, settings, side, tensors):
    tokenizer.padding_side = side
    settings = settings | {"return_tensors": tensors}
    before = copy.deepcopy(rows)
    ours = DataCollatorWithPadding(tokenizer, **settings)(rows)
    for row, row_before in zip(rows, before, strict=True):  # the input is unchanged
        assert all(np.array_equal(row[name], row_before[name]) for name in row_before) and list(row) == list(row_before)
    assert_same(ours, transformers.DataCollatorWithPadding(tokenizer, **settings)(rows))


@few
@given(rows=batches(), settings=PADDING, data=st.data())
def test_any_flat_store_gives_the_batch_of_its_rows(tokenizer, rows, settings, data):
    names = [name for name in rows[0] if name in TOKENS]
    offsets = np.concatenate([[0], np.cumsum([len(row["input_ids"]) for row in rows])])
    ragged = {
        name: (np.concatenate([np.asarray(row[name]) for row in rows]).astype(np.int32), offsets) for name in names
    }
    dense = {name: np.array([row[name] for row in rows]) for name in rows[0] if name not in TOKENS}
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    flat = FlatRows(ragged, dense, np.array(indices))
    ours = DataCollatorWithPadding(tokenizer, **settings)
    assert_same(ours(flat), ours(list(flat)))


WRONG: dict[str, Any] = {
    "None": lambda row, name: row | {name: None},
    "fractions": lambda row, name: row | {name: [0.5] * max(1, len(row[name]))},
    "nested": lambda row, name: row | {name: [[1, 2]]},
    "text": lambda row, name: row | {name: "the cat"},
    "a number": lambda row, name: row | {name: 3},
    "too long": lambda row, name: row | {name: [1] * (len(row["input_ids"]) + 1)},
    "missing": lambda row, name: {key: value for key, value in row.items() if key != name},
    "extra": lambda row, name: row | {"more": 1},
}


@few
@given(rows=batches(), how=st.sampled_from(sorted(WRONG)), data=st.data())
def test_any_wrong_row_is_the_one_that_is_named(tokenizer, rows, how, data):
    """One row among good ones, in any of its token columns. Never row 0: that one says which columns there are."""
    hypothesis.assume(len(rows) > 1)
    number = data.draw(st.integers(1, len(rows) - 1))
    name = data.draw(st.sampled_from([name for name in rows[0] if name in TOKENS]))
    hypothesis.assume(how != "too long" or name != "input_ids")
    rows[number] = WRONG[how](rows[number], name)
    with pytest.raises(ValueError, match=rf"row {number}\b"):
        DataCollatorWithPadding(tokenizer)(rows)


# ---- the schedules

NUMBER = st.floats(0, 8, allow_subnormal=False)
OPTIONS: dict[str, Any] = {
    "cosine": {"num_cycles": NUMBER},
    "cosine_with_restarts": {"num_cycles": st.integers(0, 8)},
    "polynomial": {"power": NUMBER, "lr_end": st.floats(0, 1e-3)},
    "inverse_sqrt": {"timescale": st.none() | st.integers(1, 99)},
}


@st.composite
def schedules(draw):
    """(name, learning rates of the groups, warm-up, total, options)."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    lrs = draw(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=3))
    total = draw(st.integers(1, 40))
    warmup = 0 if name == "constant" else draw(st.integers(0, 50).filter(lambda n: name != "polynomial" or n != total))
    hypothesis.assume(name != "polynomial" or lrs[0] > 1.1e-3)
    return name, lrs, warmup, total, draw(st.fixed_dictionaries({}, optional=OPTIONS.get(name, {})))


def make(get, name, lrs, warmup, total, options):
    groups = [{"params": [torch.ones(1, requires_grad=True)], "lr": lr} for lr in lrs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a warm-up that is longer than the training
        return get(name, torch.optim.SGD(groups, lr=lrs[0]), warmup, total, options)


def rates(schedule, steps):
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of steps past the end
        for _ in range(steps):
            found.append([group["lr"] for group in schedule.optimizer.param_groups])
            schedule.optimizer.step()
            schedule.step()
    return found


@few
@given(case=schedules(), resume_at=st.integers(0, 45))
def test_any_schedule_matches_transformers_and_resumes(case, resume_at):
    _, lrs, _, total, _ = case
    ours, theirs = (make(get, *case) for get in (get_scheduler, transformers.get_scheduler))
    found = rates(ours, total + 8)
    assert found == rates(theirs, total + 8)
    assert all(0 <= rate <= lr for step in found for lr, rate in zip(lrs, step, strict=True))
    half, rest = make(get_scheduler, *case), make(get_scheduler, *case)
    rates(half, resume_at)
    rest.load_state_dict(half.state_dict())
    assert rates(rest, 5) == rates(half, 5)


# ---- the metrics


@st.composite
def labelled(draw):
    """Predictions and references of 1 to 40 rows over a few classes, and where to cut them into batches."""
    label = st.sampled_from(draw(st.sampled_from([(0, 1), (0, 1, 2), (-1, 1), (1, 2), (0,), (0, 2)])))
    rows = draw(st.lists(st.tuples(label, label), min_size=1, max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    predictions, references = (np.array(column) for column in zip(*rows, strict=True))
    return predictions, references, list(zip([0, *cuts], [*cuts, len(rows)], strict=True))


@few
@given(case=labelled(), ranks=st.integers(1, 4))
def test_any_labels_in_any_batches_on_any_ranks_match_sklearn(case, ranks):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference (extra `test`)")
    predictions, references, batches = case
    names: tuple[str, ...] = ("accuracy", "f1", "matthews_correlation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is undefined; scikit-learn's class for it is one too
        try:
            f1 = sklearn.f1_score(references, predictions)
        except ValueError:  # labels that binary F1 is not defined for
            with pytest.raises(ValueError, match="f1 is for two classes"):
                Metric("f1").compute(predictions=predictions, references=references)
            names = ("accuracy", "matthews_correlation")
        expected = {
            "accuracy": sklearn.accuracy_score(references, predictions),
            "f1": f1 if "f1" in names else None,
            "matthews_correlation": sklearn.matthews_corrcoef(references, predictions),
        }
        shards = [Metric(names) for _ in range(ranks)]
        for number, (begin, end) in enumerate(batches):
            shards[number % ranks].add_batch(predictions=predictions[begin:end], references=references[begin:end])
        whole = Metric(names)
        whole.load_state(sum((shard.state() for shard in shards[1:]), start=shards[0].state()))
        assert len(whole) == len(references)
        assert whole.compute() == {name: expected[name] for name in names}


@few
@given(
    rows=st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2), min_size=2, max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_any_numbers_in_any_order_match_scipy(rows, order):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the reference (extra `test`)")
    x, y = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    metric = Metric(("pearson", "spearmanr"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's for constant and nearly constant input; ours is in `undefined`
        expected = {"pearson": float(stats.pearsonr(x, y)[0]), "spearmanr": float(stats.spearmanr(x, y)[0])}
        found = metric.compute(predictions=x, references=y)
        undefined = metric.undefined
        assert metric.compute(predictions=x[shuffled], references=y[shuffled]) == pytest.approx(
            found, abs=0, nan_ok=True
        )
    constant = bool(np.ptp(x) == 0 or np.ptp(y) == 0)
    assert [math.isnan(value) for value in found.values()] == [constant] * 2
    assert list(undefined) == (["pearson", "spearmanr"] if constant else [])
    if constant:
        return
    assert found["spearmanr"] == pytest.approx(expected["spearmanr"], abs=1e-9)
    if all(np.std(values) > 1e-4 * np.abs(values).max() for values in (x, y)):  # else scipy loses digits, and warns
        assert found["pearson"] == pytest.approx(expected["pearson"], abs=1e-9)
