"""Several labels a row, against scikit-learn's scores and transformers' own loss.

python -m pytest tests/data/test_multilabel.py
"""

import json
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, save_tiny_model, tiny_bert
from helpers import run_ranks
from safetensors.torch import load_file
from tables import write

from nanofinetune.data.columns import drop_unlabelled, read_labels
from nanofinetune.data.load import label_values, load_data
from nanofinetune.data.multilabel import METRICS, MultiLabelMetric
from nanofinetune.data.tokens import tokenize
from nanofinetune.ground.cli import run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.step.collate import DataCollatorWithPadding


@pytest.mark.parametrize(("rows", "classes", "rate"), [(1, 2, 0.5), (40, 5, 0.3), (60, 3, 0.02), (30, 4, 0.0)])
def test_scores_of_several_labels_equal_sklearn(rows, classes, rate):
    """Micro and macro F1 and exact match, whatever the batches; a class that nobody has or is given counts as 0."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(rows)
    true = (rng.random((rows, classes)) < rate).astype(np.float32)
    logits = rng.normal(size=(rows, classes)).astype(np.float32) - 2 * (rate < 0.1)
    said = (torch.from_numpy(logits).sigmoid() > 0.5).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "micro_f1": metrics.f1_score(true, said, average="micro"),
            "macro_f1": metrics.f1_score(true, said, average="macro"),
            "exact_match": metrics.accuracy_score(true, said),
        }
    whole, parts = MultiLabelMetric(classes), [MultiLabelMetric(classes), MultiLabelMetric(classes)]
    for i in range(0, rows, 7):
        batch = {"predictions": torch.from_numpy(logits[i : i + 7]), "references": torch.from_numpy(true[i : i + 7])}
        whole.add_batch(**batch)
        parts[i % 2].add_batch(**batch)
    assert len(whole) == rows
    parts[0].load_state(parts[0].state() + parts[1].state())  # as ranks add up theirs
    for metric in (whole, parts[0]):
        scores = metric.compute()
        assert tuple(scores) == METRICS and scores == pytest.approx(expected, abs=1e-12)
        assert ("macro_f1" in metric.undefined) == bool((true.sum(0) + said.sum(0) == 0).any())
        assert len(metric) == 0


def test_the_loss_is_transformers_own(tmp_path, tiny_tokenizer):
    """A batch of our store through transformers' model is BCE of the same texts and labels, as torch computes it."""
    content = [{"text": f"the cat {'sat ' * (i % 5)}", "tags": [i % 2, int(i % 3 == 0), 1]} for i in range(12)]
    write(tmp_path, "jsonl", "train", content)
    write(tmp_path, "jsonl", "validation", content)
    data = load_data(str(tmp_path), label_column="tags")
    assert data.multi and data.metrics == METRICS and data.label_names == ["0", "1", "2"]
    store = tokenize(data, tiny_tokenizer, 64)["train"]
    batch = DataCollatorWithPadding(tiny_tokenizer)(store.__getitems__([3, 0, 7]))
    assert (
        batch["labels"].tolist() == [content[i]["tags"] for i in (3, 0, 7)] and batch["labels"].dtype == torch.float32
    )
    model = tiny_bert(3).eval()
    model.config.problem_type = "multi_label_classification"
    out = model(**batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, batch["labels"])
    assert torch.equal(out.loss, expected)


LABELS = [[1, 0], [0, 0], [1, 1], [0, 1]] * 5


def of_columns(folder, kind):
    content = [{"text": f"the cat {i}", "toxic": a, "rude": b, "n": i} for i, (a, b) in enumerate(LABELS)]
    write(folder, kind, "a", content)
    return load_data(str(folder / f"a.{kind}"), label_column=["toxic", "rude"])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_several_columns_are_a_class_each(kind, tmp_path):
    data = of_columns(tmp_path, kind)
    assert data.label_names == ["toxic", "rude"] and data.text_columns == ("text",) and data.multi
    by_text = {
        text: labels.tolist()
        for split in data.splits.values()
        for text, labels in zip(split["text"][:], label_values(split, data.label_column), strict=True)
    }
    assert by_text == {f"the cat {i}": labels for i, labels in enumerate(LABELS)}


def test_lists_of_words_are_the_classes_of_a_row(tmp_path):
    words = [["toxic"] * a + ["rude"] * b for a, b in LABELS]
    write(tmp_path, "jsonl", "a", [{"text": f"the cat {i}", "labels": some} for i, some in enumerate(words)])
    data = load_data(str(tmp_path / "a.jsonl"))
    assert data.label_names == ["rude", "toxic"] and data.multi
    assert sum(label_values(split, "labels").sum() for split in data.splits.values()) == sum(map(sum, LABELS))


def test_lists_of_numbers_of_named_classes():
    """As the Hub's go_emotions has them."""
    features = datasets.Features({"labels": datasets.Sequence(datasets.ClassLabel(names=["joy", "anger", "fear"]))})
    rows = datasets.Dataset.from_dict({"labels": [[2], [0, 1], []]}, features=features)
    labels = read_labels({"train": rows}, ["labels"], None)
    assert labels.names == ["joy", "anger", "fear"]
    assert labels.values["train"].tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ([[0, 1], [1]], "its lists are neither of words, nor of one 0 or 1 for each class"),
        ([[0, 2], [1, 1]], "its lists are neither of words"),
        ([[1], [0]], "its lists hold 1 classes; between 2 and 1,000"),
        ([["a"], ["a"]], "its lists hold 1 classes"),
        ([["a", "b"], None], r"row 2 of the train split has no label \(1 in all\); .* --drop-unlabelled"),
    ],
    ids=str,
)
def test_lists_that_are_no_classes_are_refused(lists, said):
    rows = datasets.Dataset.from_dict({"tags": lists})
    with pytest.raises(UsageError, match=f"--label-column tags: {said}"):
        read_labels({"train": rows}, ["tags"], None)


def test_a_column_of_more_than_yes_and_no_is_refused():
    rows = datasets.Dataset.from_dict({"a": [0, 1, 1], "b": [0, 1, 2]})
    with pytest.raises(UsageError, match=r"--label-column b: row 3 of the train split is 2; of several columns each"):
        read_labels({"train": rows}, ["a", "b"], None)


def test_lists_beside_other_columns_are_refused():
    rows = datasets.Dataset.from_dict({"a": [0, 1, 1], "b": [[0], [1], []]})
    with pytest.raises(UsageError, match=r"--label-column b: it holds lists; of several columns each holds 0 and 1"):
        read_labels({"train": rows}, ["a", "b"], None)


def test_a_word_for_nothing_in_one_of_several_columns_is_no_label():
    rows = datasets.Dataset.from_dict({"a": [0, 1, 1], "b": ["0", "NA", "1"]})
    with pytest.raises(UsageError, match=r"b: row 2 of the train split has no label \(NA; 1 in all\)"):
        read_labels({"train": rows}, ["a", "b"], None)
    kept, _ = drop_unlabelled({"train": rows}, ["a", "b"])
    assert read_labels(kept, ["a", "b"], None).values["train"].tolist() == [[0, 0], [1, 1]]


def test_a_class_that_no_training_row_has_is_said():
    rows = datasets.Dataset.from_dict({"a": [0, 1, 1], "b": [0, 0, 0]})
    assert read_labels({"train": rows}, ["a", "b"], None).note == "no training row has b"


def train_here(arguments):
    """train.py's main in this rank -> its exit code."""
    sys.argv = ["train.py", *map(str, arguments)]
    return run_main("train.py", load_script(ROOT / "train.py").main)


@pytest.mark.parametrize("task", ["multi", pytest.param("regression", marks=pytest.mark.slow)])
def test_two_ranks_train_and_score_as_one_process(task, tmp_path, tiny_tokenizer_dir):
    """Of 17 rows in steps of 8, the last step has one: a rank has none, and its stand-in must weigh nothing."""
    model = save_tiny_model(tmp_path / "model", tiny_tokenizer_dir, dropout=0.0)
    labels = {"multi": ["toxic", "rude"], "regression": ["score"]}[task]
    for split, count in (("train", 17), ("validation", 11)):
        values = [(i % 2, int(i % 3 == 0)) if task == "multi" else (i / 7,) for i in range(count)]
        rows = ["the cat " + "sat " * (i % 7) + str(i) for i in range(count)]
        cells = [["text", *labels], *([row, *map(str, each)] for row, each in zip(rows, values, strict=True))]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(map(",".join, cells)) + "\n")
    found = []
    for world in (1, 2):
        output = tmp_path / f"out{world}"
        arguments = ["--model", model, "--data", tmp_path / "data", "--label-column", *labels, "--task", task]
        arguments += ["--lr", "1e-3", "--epochs", 2, "--batch-size", 8 // world, "--output", output]
        assert run_ranks(train_here, world, arguments, timeout=120) == [0] * world
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((output / "result.json").read_text())
        scores = {name: result[name] for name in METRICS} if task == "multi" else {"pearson": result["pearson"]}
        found.append((steps, scores, load_file(output / "model" / "model.safetensors")))
    (steps, scores, weights), (others, other_scores, other_weights) = found
    assert [step["rows"] for step in steps] == [step["rows"] for step in others] == [8, 8, 1] * 2
    assert [step["loss"] for step in others] == pytest.approx([step["loss"] for step in steps], abs=1e-5)
    assert other_scores == pytest.approx(scores, abs=1e-3)  # the predictions are nearly all one number
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-4)
