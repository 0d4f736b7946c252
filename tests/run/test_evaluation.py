"""validation.jsonl and the scores beside it, against a whole evaluation by plain transformers, on 1 and 2 ranks.

python -m pytest tests/run/test_evaluation.py
"""

import contextlib
import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, load_script
from helpers import run_ranks
from torch.utils.data import DataLoader

from nanofinetune.data import load
from nanofinetune.ranks.loader import prepare_data_loader
from nanofinetune.run.evaluation import Evaluation
from nanofinetune.run.scores import Scores
from nanofinetune.step.metrics import Metric

train = load_script(ROOT / "train.py")
KINDS = ("single", "pair", "multi", "regression")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Kind -> a folder with 20 rows to train on, and 11 in two validation splits each; texts of very unlike lengths."""
    folders = {}
    for kind in KINDS:
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        rng = np.random.default_rng(len(kind))
        for split, rows in (("train", 20), ("validation_matched", 11), ("validation_mismatched", 11)):
            with (folder / f"{split}.jsonl").open("w") as file:
                for i in range(rows):
                    row: dict[str, Any] = {"text": " ".join(rng.choice(WORDS, rng.integers(1, 30)))}
                    if kind == "pair":
                        row["other"] = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
                    label = {"multi": [["red"], ["blue", "red"], []][i % 3], "regression": float(rng.random())}
                    row["label"] = label.get(kind, ("no", "yes", "perhaps")[i % 3])
                    file.write(json.dumps(row) + "\n")
    return folders


def on_rank(arguments):
    """train.py in one rank -> its exit code."""
    sys.argv = ["train.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        return train.run_main("train.py", train.main)


def trained(kind, world, model, folder, output, call_main, *more):
    columns = ["text", *(["other"] if kind == "pair" else [])]
    arguments = [
        "--model", model, "--data", str(folder), "--output", str(output), "--epochs", "1", "--lr", "1e-2",
        "--eval-batch-size", "4", "--text-columns", *columns, *more,
    ]  # fmt: skip
    if world == 1:
        code, _, err = call_main(train, *arguments)
        assert code == 0, err
    else:
        assert run_ranks(on_rank, world, arguments, timeout=240) == [0] * world
    lines = (output / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((output / "result.json").read_text())


@pytest.mark.parametrize(
    ("kind", "world"),
    [*((kind, 1) for kind in KINDS), ("pair", 2), ("regression", 2)]
    + [pytest.param(kind, 2, marks=pytest.mark.slow) for kind in ("single", "multi")],
)
def test_validation_rows_are_those_of_plain_transformers(kind, world, data, tiny_model, tmp_path, call_main):
    """The saved model, loaded by transformers and run row by row; of two splits the first; rows in their order."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    lines, result = trained(kind, world, tiny_model, data[kind], tmp_path / "out", call_main)
    given = [json.loads(line) for line in (data[kind] / "validation_matched.jsonl").read_text().splitlines()]
    assert result["validation_rows"] == len(lines) == len(given) == 11
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    names = [model.config.id2label[k] for k in range(model.config.num_labels)]
    for number, (line, row) in enumerate(zip(lines, given, strict=True), start=1):
        texts = [row["text"], *([row["other"]] if kind == "pair" else [])]
        with torch.no_grad():
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
        expected = {"row": number, "text": row["text"]} | ({"text_pair": row["other"]} if kind == "pair" else {})
        if kind == "regression":
            assert line.pop("prediction") == pytest.approx(logits[0].item(), abs=1e-5)
            assert line == expected | {"label": pytest.approx(row["label"], abs=1e-5)}
            continue
        chances = logits.sigmoid() if kind == "multi" else logits.softmax(-1)
        assert line.pop("probabilities") == pytest.approx(chances.tolist(), abs=1e-5)
        if kind == "multi":
            said = [name for name, chance in zip(names, chances.tolist(), strict=True) if chance > 0.5]
            assert line == expected | {"label": sorted(row["label"]), "prediction": said}
        else:
            assert line == expected | {"label": row["label"], "prediction": names[int(logits.argmax())]}
    if kind in ("single", "pair"):
        assert [one["label"] for one in result["classes"]] == names
        right = sum(line["label"] == line["prediction"] for line in lines)
        assert result["accuracy"] == right / 11
        matrix = [[sum((a, b) == (x["label"], x["prediction"]) for x in lines) for b in names] for a in names]
        assert result["confusion_matrix"] == matrix


def test_a_resumed_run_writes_the_rows_of_the_best_epoch(data, tiny_model, tmp_path, call_main, monkeypatch):
    """Which came before the checkpoint: its answers are saved with its weights."""
    options = "--epochs", "3", "--keep-best", "--save-every", "2", "--keep", "9"

    def run(output, *more):
        scores = iter([0.9, 0.5, 0.1] if not more else [0.5, 0.1])
        original = Metric.compute
        with monkeypatch.context() as patch:
            patch.setattr(Metric, "compute", lambda self: original(self) | {"accuracy": next(scores)})
            patch.setattr(Metric, "names", ("accuracy",), raising=False)
            return trained("single", 1, tiny_model, data["single"], output, call_main, *options, *more)

    monkeypatch.setattr(train, "evaluate_all", first_split_alone)
    whole, result = run(tmp_path / "whole")
    assert result["saved_epoch"] == 1
    again, result = run(tmp_path / "again", "--resume", str(tmp_path / "whole" / "checkpoints" / "update-00000004"))
    assert result["saved_epoch"] == 1 and again == whole


def first_split_alone(args, accelerator, model, job):
    name, store = next(iter(job.validation.items()))
    return train.evaluate(accelerator, model, store, job.collator, args.eval_batch_size, job.evaluation(name))


def test_of_many_rows_the_first_are_kept_and_of_a_text_its_beginning(
    data, tiny_model, tmp_path, call_main, monkeypatch
):
    """From the cache as well, where the texts are kept beside the tokens."""
    whole, _ = trained("pair", 1, tiny_model, data["pair"], tmp_path / "whole", call_main)
    monkeypatch.setattr(load, "FIRST_ROWS", 5)
    monkeypatch.setattr(load, "FIRST_CHARACTERS", 10)
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        lines, result = trained("pair", 1, tiny_model, data["pair"], tmp_path / name, call_main)
        assert result["validation_rows"] == 5
        cut = [row | {key: row[key][:10] for key in ("text", "text_pair")} for row in whole[:5]]
        assert lines == cut
    assert list((tmp_path / "cache").glob("*.tokens"))


@pytest.mark.parametrize("rows", [0, 3, 7])
def test_the_scores_are_those_of_a_metric_alone(rows):
    """However many answers are kept on the way, in whatever order the rows come."""
    logits, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3
    alone, scores = Scores(("accuracy",), "abc"), Scores(("accuracy",), "abc")
    alone.add_batch(predictions=logits.argmax(-1), references=labels)
    keeper = SimpleNamespace(shape=(rows, 3), logits=None)
    found = Evaluation(scores, keeper=keeper if rows else None)
    order = [6, 0, 3, 5, 1, 2, 4]
    batches = [order[i : i + 2] for i in range(0, 7, 2)]
    rows_of_split: Any = torch.arange(7)
    loader = prepare_data_loader(DataLoader(rows_of_split, batch_sampler=batches), even_batches=False)
    for places in found.batches(loader):
        found.add(logits[places], labels[places])
    accelerator = SimpleNamespace(device="cpu", reduce=lambda tensor, how: tensor)
    assert found.scores(accelerator, 7) == alone.compute() | alone.details
    assert keeper.logits is None if not rows else keeper.logits.equal(logits[:rows])
    with pytest.raises(RuntimeError, match="0 rows were scored and the split has 7"):
        found.scores(accelerator, 7)
