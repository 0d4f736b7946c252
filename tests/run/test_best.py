"""Which epoch's model is saved, and when a run ends early: in one process, resumed, and on two ranks.

python -m pytest tests/run/test_best.py
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script, tiny_bert
from helpers import run_torchrun
from safetensors.torch import load_file

from nanofinetune.run.best import Best, best, waited

train = load_script(ROOT / "train.py")


@pytest.fixture
def run(monkeypatch, call_main, tiny_model, pairs):
    """Run train.py on the pairs with scripted accuracies, one an epoch -> (code, result, stdout, stderr).

    A score that is an exception is raised. `weights` collects the model of each evaluation.
    """

    def call(scores, *arguments, weights=None):
        left = iter(scores)

        def evaluate_all(args, accelerator, model, job):
            if weights is not None:
                weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            score = next(left)
            if isinstance(score, Exception):
                raise score
            return {"accuracy": score, "f1": 1.0 - (score or 0.0)}

        monkeypatch.setattr(train, "evaluate_all", evaluate_all)
        code, out, err = call_main(train, "--model", tiny_model, "--data", pairs, *arguments)
        return code, json.loads(out.splitlines()[-1]) if code == 0 else None, out, err

    return call


def same(folder, weights):
    saved = load_file(folder / "model" / "model.safetensors")
    return all(torch.equal(saved[name], weights[name]) for name in saved)


@pytest.mark.parametrize(
    ("options", "epoch", "line"),
    [
        ((), 4, "epoch 4, the last; accuracy was best in epoch 2, which --keep-best saves"),
        (("--keep-best",), 2, "epoch 2 of 4, the best by accuracy"),
        (("--keep-best", "f1"), 3, "epoch 3 of 4, the best by f1"),
    ],
)
def test_the_saved_model_is_the_best_epochs(options, epoch, line, run, tmp_path):
    """Its scores are the result's; the first of two equal epochs is kept."""
    weights: list[Any] = []
    code, result, out, _ = run(
        [0.5, 0.9, 0.1, 0.9], "--epochs", 4, "--output", tmp_path / "out", *options, weights=weights
    )
    assert code == 0 and result["saved_epoch"] == epoch and f"saved: {line}" in out
    assert [same(tmp_path / "out", each) for each in weights] == [number == epoch for number in (1, 2, 3, 4)]
    assert result["accuracy"] == [0.5, 0.9, 0.1, 0.9][epoch - 1]


def test_a_resumed_run_keeps_the_best_of_before(run, tmp_path):
    """A fault in the last evaluation; the checkpoint that is resumed was saved after the best epoch."""
    whole: list[Any] = []
    options = "--epochs", 3, "--keep-best", "--save-every", 5, "--output"
    assert run([0.5, 0.9, 0.7], *options, tmp_path / "whole", weights=whole)[0] == 0
    with pytest.raises(RuntimeError, match="a fault"):
        run([0.5, 0.9, RuntimeError("a fault")], *options, tmp_path / "torn")
    code, result, _, _ = run([0.7], *options, tmp_path / "torn", "--resume", "auto")
    assert code == 0 and result["saved_epoch"] == 2 and result["accuracy"] == 0.9
    assert same(tmp_path / "torn", whole[1]) and same(tmp_path / "whole", whole[1])


def test_patience_ends_the_run_and_a_resumed_one_goes_on_counting(run, tmp_path):
    options = "--epochs", 9, "--patience", 2, "--save-every", 5, "--output"
    code, result, _, err = run([0.9, 0.5, 0.8], *options, tmp_path / "whole")
    assert code == 0 and result["steps"] == 3 * 8 and result["saved_epoch"] == 3
    assert "nothing better in 2 epochs: stopped after 3" in err
    with pytest.raises(RuntimeError, match="a fault"):
        run([0.9, 0.5, RuntimeError("a fault")], *options, tmp_path / "torn")
    code, again, _, _ = run([0.8], *options, tmp_path / "torn", "--resume", "auto")
    assert code == 0 and again["steps"] == 3 * 8
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "torn")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_something_better_begins_the_count_anew(run):
    code, result, _, _ = run([0.1, 0.1, 0.2, 0.2, 0.3, None, 0.3], "--epochs", 9, "--patience", 2)
    assert code == 0 and result["steps"] == 7 * 8 and result["best"]["epoch"] == 5


def test_a_metric_that_is_not_computed_is_refused_before_the_training(run):
    code, _, _, err = run([], "--keep-best", "bleu")
    assert code == 2 and "--keep-best bleu: there is no such metric here; choose accuracy or f1 or macro_f1" in err


def test_the_tables_are_in_result_json_alone(tiny_model, pairs, monkeypatch, capsys, tmp_path):
    """Those of the epoch that is saved; the printed line stays one line to read."""
    arguments = ["--model", tiny_model, "--data", pairs, "--epochs", "2", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--class-weights", "balanced"])
    assert train.run_main("train.py", train.main) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not {"classes", "confusion_matrix"} & printed.keys() and 0 <= printed["macro_f1"] <= 1
    assert sum(map(sum, saved["confusion_matrix"])) == sum(one["rows"] for one in saved["classes"]) == 23
    assert saved["evaluations"][-1]["confusion_matrix"] == saved["confusion_matrix"]


def kept(epoch, weights):
    return {"epoch": epoch, "weights": weights}


def test_only_what_it_saved_fits():
    model = tiny_bert()
    keeper = Best(SimpleNamespace(keep_best="", patience=None), model, keeps=True)
    assert keeper.misfit(keeper.state_dict()) == ""
    keeper.end_epoch([{"epoch": 1, "loss": 1.0, "f1": 0.5}])
    state = keeper.state_dict()
    assert keeper.misfit(state) == "" and state["epoch"] == 1
    weights = state["weights"]
    name = "classifier.weight"
    for wrong, why in (
        (kept(1, {}), "its epoch is 1, and it has 0 weights"),
        (kept(-1, weights), "it is not what --keep-best saves"),
        (state | {"more": 1}, "it is not what --keep-best saves"),
        (kept(1, weights | {name: weights[name][:1]}), f"the best epoch's {name} has the shape [1, 32]"),
        (kept(1, {key: value for key, value in weights.items() if key != name}), f"the best epoch's {name} is missing"),
    ):
        assert keeper.misfit(wrong).startswith(why)


def test_the_first_of_equals_is_the_best_and_one_without_a_value_the_least():
    found = [{"epoch": i + 1, "f1": value} for i, value in enumerate([None, 0.2, 0.2, None])]
    assert best(found, "f1")["epoch"] == 2 and [waited(found[:n], "f1") for n in (1, 2, 3, 4)] == [0, 0, 1, 2]


@pytest.mark.slow
def test_two_ranks_stop_together_and_save_the_best_epoch(tiny_model, pairs, tmp_path):
    options = ["--model", tiny_model, "--data", pairs, "--epochs", "6", "--keep-best", "macro_f1", "--patience", "1"]
    done = run_torchrun(["train.py", *options, "--class-weights", "balanced", "--output", tmp_path / "out"], 2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    found = result["evaluations"]
    assert result["saved_epoch"] == best(found, "macro_f1")["epoch"]
    assert len(found) == 6 or waited(found, "macro_f1") == 1
