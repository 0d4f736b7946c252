"""step/metrics.py against scikit-learn 1.9 and scipy 1.17, called as evaluate 0.4.6's glue script calls them.

The class (add, add_batch, compute, reset) is compared with a real evaluate.Metric; the script itself is on the Hub.

    python -m pytest tests/step/test_metrics.py

Accuracy, F1 and Matthews are compared with ==, since both sides divide the same integers. The correlations sum rounded
products in another order than scipy: within 1e-12, unless stated otherwise.
"""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch

from nanofinetune.step.metrics import (
    GLUE,
    Metric,
    UndefinedMetricWarning,
    average_ranks,
    count_labels,
    f1_from_counts,
    load,
    matthews_from_counts,
    pearson,
    scores_from_counts,
    scores_from_values,
)

ALL_CLASSIFICATION = ("accuracy", "f1", "matthews_correlation")
UNDEFINED = pytest.mark.filterwarnings("ignore::nanofinetune.step.metrics.UndefinedMetricWarning")


def sklearn_metrics():
    return pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference (extra `test`)")


def scipy_stats():
    return pytest.importorskip("scipy.stats", reason="scipy is the reference (extra `test`)")


def labels(rows: int, positives: float, agreement: float, seed: int, classes: int = 2):
    """(predictions, references) int64 (rows,): class 0 with probability 1 - positives, the rest evenly."""
    rng = np.random.default_rng(seed)
    share = [1 - positives] + [positives / (classes - 1)] * (classes - 1)
    references = rng.choice(classes, size=rows, p=share)
    predictions = np.where(rng.random(rows) < agreement, references, rng.choice(classes, size=rows, p=share))
    return predictions, references


def split(rows: int, seed: int) -> list[slice]:
    """Random consecutive batches of 0 to 9 rows that cover 0 .. rows - 1."""
    rng, start, batches = np.random.default_rng(seed), 0, []
    while start < rows:
        size = int(rng.integers(0, 10))
        batches.append(slice(start, start + size))
        start += size
    return batches


def real_numbers(rows: int, seed: int, offset: float = 0.0, ties: bool = False):
    rng = np.random.default_rng(seed)
    references = rng.normal(size=rows)
    predictions = references + rng.normal(size=rows)
    if ties:
        references, predictions = references.round(), predictions.round()
    return predictions + offset, references + offset


# ------------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 408, 3668])
@pytest.mark.parametrize("positives", [0.0, 0.1, 0.5, 0.67, 1.0])
@pytest.mark.parametrize("agreement", [0.0, 0.8, 1.0])
# scikit-learn warns of one single label (its confusion matrix) and of undefined F1; so do we, see below.
@pytest.mark.filterwarnings("ignore:.* ill-defined")
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@UNDEFINED
def test_f1_and_accuracy_equal_sklearn(rows, positives, agreement):
    sklearn = sklearn_metrics()
    predictions, references = labels(rows, positives, agreement, seed=rows)
    result = Metric(ALL_CLASSIFICATION).compute(predictions=predictions, references=references)
    assert result == {
        "accuracy": float((predictions == references).mean()),  # the script's own line
        "f1": float(sklearn.f1_score(y_true=references, y_pred=predictions)),
        "matthews_correlation": float(sklearn.matthews_corrcoef(references, predictions)),
    }
    assert result["accuracy"] == sklearn.accuracy_score(references, predictions)
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
@pytest.mark.parametrize("seed", range(4))
def test_matthews_equals_sklearn(classes, seed):
    sklearn = sklearn_metrics()
    predictions, references = labels(500, 0.7, 0.5, seed, classes)
    expected = sklearn.matthews_corrcoef(references, predictions)
    for num_classes in (classes, 128):
        metric = Metric(("matthews_correlation",), num_classes=num_classes)
        assert metric.compute(predictions=predictions, references=references) == {"matthews_correlation": expected}


def test_matthews_stays_exact_where_float64_does_not():
    # 3e9 rows: n² is beyond 2**53. The four cells of a 2 x 2 table give the textbook form, here in exact integers.
    tp, fp, fn, tn = 1_500_000_001, 7, 11, 1_500_000_003
    value, reason = matthews_from_counts(tp + tn, true=[tn + fp, tp + fn], predicted=[tn + fn, tp + fp])
    squared = (tp * tn - fp * fn) ** 2
    denominator = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert reason == "" and value == pytest.approx(math.sqrt(squared / denominator), abs=2**-52)


@pytest.mark.parametrize(
    "seen",
    [(0,), (1,), (7,), (-1,), (0, 1), (-1, 1), (1, 2), (1, 100),
     (0, 2), (-1, 0), (2, 3), (0, 1, 2), (-1, 0, 1), (0, 2, 3)],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.* ill-defined")
@UNDEFINED
def test_labels_f1_accepts_are_those_sklearn_accepts(seen):
    sklearn = sklearn_metrics()
    rng = np.random.default_rng(len(seen))
    references = np.concatenate([seen, rng.choice(seen, 20)])
    predictions = np.concatenate([seen, rng.choice(seen, 20)])
    try:
        expected = sklearn.f1_score(references, predictions)
    except ValueError:
        with pytest.raises(
            ValueError, match=r"f1 is for two classes, the positive one labelled 1, and the labels seen"
        ):
            load("f1").compute(predictions=predictions, references=references)
    else:
        assert load("f1").compute(predictions=predictions, references=references) == {"f1": expected}


def test_labels_outside_the_table():
    predictions, references = [1, 200, -100], [1, 200, 5]
    assert load("accuracy").compute(predictions=predictions, references=references) == {"accuracy": 2 / 3}
    for name in ("f1", "matthews_correlation"):
        with pytest.raises(ValueError, match=rf"{name}: 3 labels are outside -1 \.\. 127: drop padding rows \(-100\)"):
            load(name).compute(predictions=predictions, references=references)
    sklearn = sklearn_metrics()
    metric = Metric(("matthews_correlation",), num_classes=201)
    result = metric.compute(predictions=[1, 200, 200], references=[1, 200, 5])
    assert result["matthews_correlation"] == sklearn.matthews_corrcoef([1, 200, 5], [1, 200, 200])


@UNDEFINED
@pytest.mark.parametrize("rows", [1, 9, 300])
@pytest.mark.parametrize("positives", [0.0, 0.5, 1.0])
def test_any_batching_gives_the_identical_result(rows, positives):
    predictions, references = labels(rows, positives, 0.7, seed=rows)
    x, y = real_numbers(rows + 1, seed=rows)  # + 1: Pearson needs two rows
    whole = Metric(ALL_CLASSIFICATION).compute(predictions=predictions, references=references)
    whole_r = load("glue", "stsb").compute(predictions=x, references=y)
    for seed in range(5):
        metric, correlation = Metric(ALL_CLASSIFICATION), load("glue", "stsb")
        for batch in split(rows, seed):
            metric.add_batch(predictions=predictions[batch], references=references[batch])
        for batch in split(rows + 1, seed):
            correlation.add_batch(predictions=x[batch], references=y[batch])
        assert len(metric) == rows and len(correlation) == rows + 1
        assert metric.compute() == whole
        assert correlation.compute() == whole_r
    order = np.random.default_rng(1).permutation(rows + 1)  # the order of the rows does not matter either, to the bit
    assert load("glue", "stsb").compute(predictions=x[order], references=y[order]) == whole_r
    for p, r in zip(predictions, references, strict=True):
        metric.add(prediction=p, reference=r)
    assert metric.compute() == whole


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sum_of_states_is_the_state_of_the_whole(ranks):
    predictions, references = labels(101, 0.6, 0.8, seed=ranks, classes=3)
    whole = Metric(("accuracy", "matthews_correlation"))
    whole.add_batch(predictions=predictions, references=references)
    shards = [Metric(("accuracy", "matthews_correlation")) for _ in range(ranks)]
    for rank, shard in enumerate(shards):
        shard.add_batch(predictions=predictions[rank::ranks], references=references[rank::ranks])
    assert shards[0].reduction == "sum"
    total = torch.stack([shard.state() for shard in shards]).sum(0)  # what one all-reduce gives to every rank
    assert torch.equal(total, whole.state())

    reduced, merged = Metric(("accuracy", "matthews_correlation")), Metric(("accuracy", "matthews_correlation"))
    reduced.load_state(total)
    for shard in shards:
        before = shard.state()
        merged.merge(shard)
        assert torch.equal(shard.state(), before)
    assert len(reduced) == len(merged) == len(whole) == 101
    assert reduced.compute() == merged.compute() == whole.compute()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_concatenated_states_of_correlations_give_the_whole(ranks):
    x, y = real_numbers(50, seed=ranks)
    whole = load("glue", "stsb").compute(predictions=x, references=y)
    shards = [load("glue", "stsb") for _ in range(ranks)]
    for rank, shard in enumerate(shards):
        shard.add_batch(predictions=x[rank::ranks], references=y[rank::ranks])
    gathered, merged = load("glue", "stsb"), load("glue", "stsb")
    assert gathered.reduction == "cat"
    gathered.load_state(torch.cat([shard.state() for shard in shards], dim=1))
    for shard in shards:
        merged.merge(shard)
    assert len(gathered) == len(merged) == 50
    assert gathered.compute() == merged.compute() == whole


def test_state_is_a_copy():
    metric = load("accuracy")
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    state = metric.state()
    metric.load_state(state)
    state.zero_()  # as an in-place all-reduce would
    metric.state().zero_()
    assert metric.compute() == {"accuracy": 0.5}
    values, correlation = torch.tensor([1.0, 2.0, 4.0]), Metric(("pearson",))
    correlation.add_batch(predictions=values, references=values)
    values.zero_()  # a loop that reuses its buffer
    assert correlation.compute()["pearson"] == pytest.approx(1.0)


def test_state_does_not_grow_with_the_rows():
    sizes = set()
    metric = Metric(ALL_CLASSIFICATION)
    for rows in (1, 1000, 100_000):
        metric.add_batch(
            predictions=torch.ones(rows, dtype=torch.int64), references=torch.ones(rows, dtype=torch.int64)
        )
        tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert not metric._values
    assert sizes == {3 * 130 * 8}
    assert len(metric) == 101_001


def test_integer_batches_are_never_read_back():
    # A meta tensor has a shape and no values: whatever reads one (item, nonzero, bincount, bool) raises.
    batch = torch.zeros(8, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):
        batch.sum().item()
    with pytest.raises(RuntimeError):
        batch.bincount()
    metric, correlation = Metric(ALL_CLASSIFICATION), load("glue", "stsb")
    for _ in range(2):
        metric.add_batch(predictions=batch, references=batch)
        correlation.add_batch(predictions=batch.float(), references=batch.float())
    assert metric.state().device.type == "meta" and len(correlation) == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_batches_count_without_a_sync():
    predictions, references = (torch.from_numpy(x).cuda() for x in labels(300, 0.6, 0.8, seed=0))
    metric = load("glue", "mrpc")
    metric.add_batch(predictions=predictions[:100], references=references[:100])
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.add_batch(predictions=predictions[100:], references=references[100:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = load("glue", "mrpc").compute(predictions=predictions.cpu(), references=references.cpu())
    assert metric.compute() == expected


# --------------------------------------------------------------------------------------------------------- correlations


@pytest.mark.parametrize("rows", [2, 3, 10, 1500])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
@UNDEFINED
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_correlations_match_scipy(rows, ties, seed):
    stats = scipy_stats()
    x, y = real_numbers(rows, seed, ties=ties)
    result = Metric(("pearson", "spearmanr")).compute(predictions=x, references=y)
    assert list(result) == ["pearson", "spearmanr"]
    assert result["pearson"] == pytest.approx(float(stats.pearsonr(x, y)[0]), abs=1e-12, nan_ok=True)
    assert result["spearmanr"] == pytest.approx(float(stats.spearmanr(x, y)[0]), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("ties", [False, True])
def test_average_ranks_equal_scipy_rankdata(ties):
    stats = scipy_stats()
    x, _ = real_numbers(200, 0, ties=ties)
    x[:4] = [-0.0, 0.0, np.inf, -np.inf]
    assert average_ranks(torch.from_numpy(x)).tolist() == stats.rankdata(x).tolist()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e9, -1e12])
def test_pearson_with_a_large_offset_matches_exact_rational_arithmetic(offset):
    # The reference is exact: fractions of the very float64 values given. One-pass sums lose all digits from 1e9 on.
    from fractions import Fraction

    x, y = real_numbers(64, 3, offset)
    fx, fy = [Fraction(v) for v in x.tolist()], [Fraction(v) for v in y.tolist()]
    mx, my = sum(fx) / 64, sum(fy) / 64
    cov = sum((a - mx) * (b - my) for a, b in zip(fx, fy, strict=True))
    sxx, syy = sum((a - mx) ** 2 for a in fx), sum((b - my) ** 2 for b in fy)
    expected = math.copysign(math.sqrt(cov * cov / (sxx * syy)), cov)
    # The mean is rounded to ulp(offset) / 2 once, which enters r squared: (1e12 * 2**-53)² = 1e-8, over the variance 1.
    tolerance = 1e-14 + (abs(offset) * 2**-53) ** 2
    value, reason = pearson(torch.from_numpy(x), torch.from_numpy(y))
    assert reason == "" and value == pytest.approx(expected, abs=tolerance)
    stats = scipy_stats()
    assert value == pytest.approx(float(stats.pearsonr(x, y)[0]), abs=1e-12 + 2 * tolerance)
    if offset == 1e9:
        n, one_pass = 64, float(64 * np.sum(x * x) - np.sum(x) ** 2)
        assert abs(one_pass / n**2 - np.var(x)) > 0.01 * np.var(x), "one-pass sums would do after all"


def test_pearson_neither_overflows_nor_vanishes():
    stats = scipy_stats()
    for scale in (1e-200, 1e200):
        x, y = (v * scale for v in real_numbers(20, 0))
        assert pearson(torch.from_numpy(x), torch.from_numpy(y))[0] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)


def test_pearson_stays_within_one():
    beyond = 0
    for seed in range(200):
        x = torch.from_numpy(real_numbers(10, seed)[0])
        y = 3 * x + 1
        assert abs(pearson(x, y)[0]) <= 1.0 and pearson(x, -y)[0] >= -1.0
        unit = [v / v.norm() for v in (x - x.mean(), y - y.mean())]
        beyond += float(unit[0] @ unit[1]) > 1.0
    assert beyond, "rounding never goes beyond 1: no need to clip"


def test_stsb_is_within_float32_of_the_script():
    # The script's columns are float32, and scipy's pearsonr then works in float32: 1e-6 is its rounding, not ours.
    stats = scipy_stats()
    x, y = real_numbers(1500, 5)
    result = load("glue", "stsb").compute(predictions=torch.from_numpy(x).float(), references=y)
    in32, in64 = (float(stats.pearsonr(x.astype(t), y.astype(t))[0]) for t in (np.float32, np.float64))
    assert result["pearson"] == pytest.approx(in32, abs=1e-6)
    assert result["pearson"] == pytest.approx(in64, abs=1e-7)  # our predictions were float32 here
    assert in32 != in64, "scipy computes float32 input in float64 after all"
    ranks = float(stats.spearmanr(x.astype(np.float32), y.astype(np.float32))[0])
    assert result["spearmanr"] == pytest.approx(ranks, abs=1e-12)


# ----------------------------------------------------------------------------------------------- undefined


@pytest.mark.parametrize("label", [0, 7, -1])
def test_undefined_f1_and_matthews_are_sklearns_and_say_so(label):
    sklearn = sklearn_metrics()
    from sklearn.exceptions import UndefinedMetricWarning as SklearnWarning

    rows = [label] * 8
    with pytest.warns(SklearnWarning, match="no true nor predicted samples"):
        expected = sklearn.f1_score(rows, rows)
    metric = load("glue", "mrpc")
    with pytest.warns(
        UndefinedMetricWarning, match=r"label 1 is neither predicted nor true.*reported as 0\.0"
    ) as caught:
        assert metric.compute(predictions=rows, references=rows) == {"accuracy": 1.0, "f1": expected}
    assert caught[0].filename == __file__  # the warning points at the caller
    assert list(metric.undefined) == ["f1"] and "0/0" in metric.undefined["f1"]

    # With two labels, scikit-learn silently gives 0.0 for a Matthews of 0/0; we say which side is constant.
    cola = load("glue", "cola")
    with pytest.warns(UndefinedMetricWarning, match="all predictions are one label"):
        result = cola.compute(predictions=[label] * 3, references=[label, label, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert result == {"matthews_correlation": sklearn.matthews_corrcoef([label, label, 1], [label] * 3)}
    with pytest.warns(UndefinedMetricWarning, match="all references are one label"):
        cola.compute(predictions=[0, 1], references=[1, 1])

    # Nothing is left from one compute to the next.
    assert metric.compute(predictions=[1, 0], references=[1, 0]) == {"accuracy": 1.0, "f1": 1.0}
    assert metric.undefined == {}
    with pytest.raises(ValueError, match="no rows"):
        cola.compute()
    assert cola.undefined == {}


def test_f1_with_no_true_positive_is_defined():
    sklearn = sklearn_metrics()
    metric = load("f1")
    assert (
        metric.compute(predictions=[0, 0], references=[1, 0]) == {"f1": sklearn.f1_score([1, 0], [0, 0])} == {"f1": 0.0}
    )
    assert metric.undefined == {} and f1_from_counts(0, 0, 1) == (0.0, "")


def test_undefined_correlations_are_scipys_and_say_so():
    stats = scipy_stats()
    metric = load("glue", "stsb")
    with pytest.warns(stats.ConstantInputWarning):
        assert math.isnan(stats.pearsonr([2.5] * 3, [1.0, 2.0, 3.0])[0])
    with pytest.warns(UndefinedMetricWarning) as caught:
        result = metric.compute(predictions=[2.5] * 3, references=[1.0, 2.0, 3.0])
    assert all(math.isnan(value) for value in result.values()) and len(caught) == 2
    assert metric.undefined["pearson"] == "all 3 predictions are equal, so the correlation is 0/0"
    assert set(metric.undefined) == {"pearson", "spearmanr"}

    # NaN: scipy passes it on silently.
    x, y = [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(stats.pearsonr(x, y)[0]) and math.isnan(stats.spearmanr(x, y)[0])
    with pytest.warns(UndefinedMetricWarning, match="1 of 3 predictions are NaN"):
        result = metric.compute(predictions=x, references=y)
    assert all(math.isnan(value) for value in result.values()) and set(metric.undefined) == {"pearson", "spearmanr"}

    # Infinity has a rank and no mean.
    x = [1.0, math.inf, 2.0]
    with pytest.warns(UndefinedMetricWarning, match="1 of 3 references are NaN or infinite"):
        result = metric.compute(predictions=y, references=x)
    assert math.isnan(result["pearson"]) and result["spearmanr"] == pytest.approx(stats.spearmanr(y, x)[0])
    assert set(metric.undefined) == {"pearson"}

    # One row: scipy raises for one and gives NaN for the other.
    with pytest.raises(ValueError, match="at least 2"):
        stats.pearsonr([1.0], [1.0])
    with pytest.raises(ValueError, match="pearson needs two rows or more"):
        metric.compute(predictions=[1.0], references=[1.0])
    assert math.isnan(stats.spearmanr([1.0], [1.0])[0])
    with pytest.warns(UndefinedMetricWarning, match="one row has no correlation"):
        assert math.isnan(Metric(("spearmanr",)).compute(predictions=[1.0], references=[1.0])["spearmanr"])


# ----------------------------------------------------------------------------------------------------------- the shell


def evaluate_metric(tmp_path):
    """A real evaluate.Metric with the glue script's columns and its simple_accuracy."""
    pytest.importorskip("evaluate", reason="evaluate 0.4.6 is the reference for the class Metric")
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        def _info(self):
            columns = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            return evaluate.MetricInfo(
                description="", citation="", inputs_description="", features=datasets.Features(columns), format="numpy"
            )

        def _compute(self, predictions, references):
            return {"accuracy": float((predictions == references).mean())}

    return Accuracy(cache_dir=str(tmp_path), keep_in_memory=True)


def test_shell_behaves_as_evaluate_metric(tmp_path):
    theirs, ours = evaluate_metric(tmp_path), load("accuracy")
    for _ in range(2):  # twice: compute resets
        for metric in (theirs, ours):
            metric.add_batch(predictions=np.array([1, 0, 1]), references=[1, 1, 1])
            metric.add_batch(predictions=torch.tensor([0]), references=torch.tensor([0]))
            metric.add(prediction=1, reference=0)
        assert ours.compute() == theirs.compute() == {"accuracy": 3 / 5}
        assert len(ours) == 0
    given = {"predictions": [1, 0], "references": [1, 1]}
    for metric in (theirs, ours):  # arguments of compute join what was added
        metric.add(prediction=1, reference=1)
    assert ours.compute(**given) == theirs.compute(**given)
    # Every parameter of ours is keyword-only under evaluate's name.
    for method in ("add", "add_batch", "compute"):
        mine = inspect.signature(getattr(ours, method)).parameters
        base = inspect.signature(getattr(theirs, method)).parameters
        assert set(mine) == {name for name in base if base[name].kind is inspect.Parameter.KEYWORD_ONLY}
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in mine.values())
    for metric in (theirs, ours):
        with pytest.raises(ValueError, match=r"2.*1"):
            metric.add_batch(predictions=[1, 0], references=[1])


def test_evaluate_truncates_what_we_refuse(tmp_path):
    theirs = evaluate_metric(tmp_path)
    assert theirs.compute(predictions=np.array([0.9, 1.0]), references=[0, 1]) == {"accuracy": 1.0}  # 0.9 became 0
    for fraction in (np.array([0.9, 1.0]), torch.tensor([1.0, math.nan]), [math.inf, 1.0]):
        with pytest.raises(ValueError, match=r"predictions must be whole numbers, and one is .*argmax\(dim=-1\)"):
            load("accuracy").add_batch(predictions=fraction, references=[0, 1])
    with pytest.raises(ValueError, match=r"references must be whole numbers, and one is 0\.5"):
        load("accuracy").add_batch(predictions=[0, 1], references=[0.5, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float64])
def test_whole_numbers_of_any_type_count(dtype):
    predictions, references = labels(50, 0.6, 0.8, seed=1)
    expected = load("glue", "mrpc").compute(predictions=predictions, references=references)
    as_dtype = torch.from_numpy(predictions).to(dtype)
    assert load("glue", "mrpc").compute(predictions=as_dtype, references=references.tolist()) == expected


def test_arrays_that_torch_does_not_take_as_they_are():
    predictions, references = labels(50, 0.6, 0.8, seed=1)
    expected = load("glue", "mrpc").compute(predictions=predictions, references=references)
    predictions.setflags(write=False)
    assert load("glue", "mrpc").compute(predictions=predictions[::-1], references=references[::-1]) == expected


def test_a_metric_filled_under_inference_mode_works_outside():
    predictions, references = (torch.from_numpy(x) for x in labels(20, 0.6, 0.8, seed=1))
    expected = load("glue", "mrpc").compute(predictions=predictions, references=references)
    metric, correlation = load("glue", "mrpc"), Metric(("pearson",))
    with torch.inference_mode():
        metric.add_batch(predictions=predictions[:10].clone(), references=references[:10].clone())
        correlation.add_batch(predictions=predictions[:10].double(), references=references[:10].double())
    metric.add_batch(predictions=predictions[10:], references=references[10:])
    state = metric.state()
    state += 0  # an in-place all-reduce outside inference mode
    metric.load_state(state)
    assert metric.compute() == expected
    logits = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    correlation.add_batch(predictions=logits, references=[1, 2, 3])
    assert not correlation.state().requires_grad and correlation.compute()["pearson"] > 0


def test_drop_in_names():
    # The configurations and keys of evaluate's glue script (metrics/glue/glue.py).
    keys = {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"],
            "stsb": ["pearson", "spearmanr"]}  # fmt: skip
    only_accuracy = {"sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans"}
    assert set(GLUE) >= set(keys) | only_accuracy  # a task of one's own may be added
    for task in [*keys, *only_accuracy]:
        result = load("glue", task).compute(predictions=[0, 1, 1], references=[0, 1, 0])
        assert list(result) == keys.get(task, ["accuracy"])
    for name in ALL_CLASSIFICATION:
        assert list(load(name).compute(predictions=[0, 1, 1], references=[0, 1, 0])) == [name]
    assert Metric("accuracy").names == ("accuracy",)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: load("glue", "none"), ValueError, "unknown GLUE task 'none': known are cola, mrpc, qqp, stsb, sst2"),
        (lambda: load("glue"), ValueError, "unknown GLUE task None: known are cola"),
        (lambda: load("bleu"), ValueError, "unknown metric 'bleu': known are glue, accuracy, f1, matthews_correlation"),
        (lambda: load("f1", "multilabel"), ValueError, "f1 has no configuration 'multilabel': leave it out"),
        (lambda: Metric(("none",)), ValueError, "unknown metric 'none': known are accuracy, f1, matthews"),
        (lambda: scores_from_counts(("none",), torch.tensor([[0, 1, 1, 0]] * 3)), ValueError,
         "none: scores_from_counts has no branch for it"),
        (lambda: scores_from_values(("none",), torch.ones(2, 3)), ValueError,
         "none: scores_from_values has no branch for it"),
        (lambda: Metric(()), ValueError, "no metric named: choose from accuracy"),
        (lambda: Metric(("f1", "pearson")), ValueError, "f1, pearson mix classes and real numbers"),
        (lambda: Metric(("f1",), num_classes=1), ValueError, "num_classes is 1: it must be 2 or more"),
        (lambda: load("f1").compute(), ValueError, "no rows: call add_batch before compute"),
        (lambda: load("f1").compute(predictions=[], references=[]), ValueError, "no rows"),
        (lambda: load("glue", "stsb").compute(), ValueError, "no rows"),
        (lambda: load("f1").compute(predictions=[1]), ValueError, "references are missing: give both"),
        (lambda: load("f1").compute(references=[1]), ValueError, "predictions are missing: give both"),
        (lambda: load("f1").add_batch(predictions=[1, 0, 1], references=[1, 0]), ValueError,
         "3 predictions and 2 references: the lengths must match"),
        (lambda: load("f1").add_batch(predictions=torch.zeros(4, 2), references=[1, 0, 1, 0]), ValueError,
         r"predictions have shape \(4, 2\) and must have one dimension: logits need .argmax\(dim=-1\) first"),
        (lambda: Metric("pearson").add_batch(predictions=torch.zeros(2, 1), references=[1, 0]), ValueError,
         r"predictions have shape \(2, 1\) and must have one dimension: try .squeeze\(-1\)"),
        (lambda: load("f1").add_batch(predictions=["1"], references=[1]), TypeError, "predictions must be numbers"),
        (lambda: load("f1").add_batch(predictions=[[1], [1, 2]], references=[1]), TypeError, "predictions must be num"),
        (lambda: load("f1").add_batch(predictions=[1j], references=[1]), TypeError, "predictions are complex"),
        (lambda: load("f1").add(prediction=[1, 0], reference=1), ValueError, "2 predictions and 1 references"),
        (lambda: load("f1").merge(load("accuracy")), ValueError, r"cannot merge Metric\(\('accuracy',\), num_cl"),
        (lambda: load("f1").load_state(torch.zeros(3, 4, dtype=torch.int64)), ValueError,
         r"a state of shape \(3, 4\), torch.int64 is not one of this metric: its own has shape \(3, 130\)"),
        (lambda: load("f1").load_state(torch.zeros(3, 130)), ValueError, "torch.float32 is not one of this metric"),
        (lambda: Metric("pearson").load_state(torch.zeros(3, 4).double()), ValueError, r"shape \(3, 4\)"),
    ],
)  # fmt: skip
def test_errors_name_the_thing_and_the_remedy(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value).split("(setting an array")[0]


def test_count_labels_counts_what_a_confusion_matrix_counts():
    sklearn = sklearn_metrics()
    predictions, references = labels(300, 0.7, 0.6, seed=0, classes=4)
    matrix = sklearn.confusion_matrix(references, predictions)  # rows true, columns predicted
    table = count_labels(torch.from_numpy(predictions), torch.from_numpy(references), num_classes=4)
    expected = np.stack([matrix.sum(1), matrix.sum(0), matrix.diagonal()])
    assert torch.equal(table[:, 1:-1], torch.from_numpy(expected))
    assert table[:, 0].tolist() == table[:, -1].tolist() == [0, 0, 0]
