"""A trained head on data whose classes have another order or other names, against transformers' from_pretrained.

python -m pytest tests/data/test_head.py
"""

import itertools

import pytest
import torch
from conftest import tiny_bert
from transformers import AutoModelForSequenceClassification

from nanofinetune.data.head import rows_of
from nanofinetune.data.pretrained import load_model

ROW = {"input_ids": torch.tensor([[2, 5, 6, 3]])}


def save_named(folder, names):
    model = tiny_bert(num_labels=len(names)).eval()
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    return model


def by_name(model):
    return {model.config.id2label[i].lower(): value for i, value in enumerate(model.eval()(**ROW).logits[0].tolist())}


@pytest.mark.parametrize("wanted", [*itertools.permutations(["Entailment", "neutral", "contradiction"])], ids="-".join)
def test_a_head_for_the_same_names_is_put_into_their_order(wanted, tmp_path):
    """Each class keeps its logit. The library writes the new names over the old rows."""
    trained = save_named(tmp_path, ["contradiction", "neutral", "entailment"])
    notes: list[str] = []
    model, made_anew = load_model(str(tmp_path), list(wanted), notes=notes)
    assert made_anew == [] and list(model.config.id2label.values()) == list(wanted)
    assert by_name(model) == pytest.approx(by_name(trained), rel=1e-4)
    other = [name.lower() for name in wanted] != ["contradiction", "neutral", "entailment"]
    assert any("in another order" in note for note in notes) == other
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, id2label=dict(enumerate(wanted)))
    assert (by_name(theirs) == pytest.approx(by_name(trained), rel=1e-4)) != other


@pytest.mark.parametrize("wanted", [["cold", "hot"], ["0", "1"]], ids="-".join)
def test_a_head_for_other_names_is_made_anew(wanted, tmp_path):
    trained = save_named(tmp_path, ["negative", "positive"])
    notes: list[str] = []
    model, made_anew = load_model(str(tmp_path), wanted, notes=notes)
    assert made_anew == ["classifier.bias", "classifier.weight"]
    assert any("for other classes (negative, positive)" in note for note in notes)
    assert not torch.equal(model.classifier.weight, trained.classifier.weight) and not model.classifier.bias.any()
    assert torch.equal(model.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, id2label=dict(enumerate(wanted)))
    assert torch.equal(theirs.classifier.weight, trained.classifier.weight)


def test_a_head_without_names_is_kept_by_number_and_said(tmp_path):
    trained = tiny_bert()
    trained.save_pretrained(tmp_path)
    notes: list[str] = []
    model, made_anew = load_model(str(tmp_path), ["no", "yes"], notes=notes)
    assert made_anew == [] and torch.equal(model.classifier.weight, trained.classifier.weight)
    assert any("its classes have no names: they are taken for no, yes, by number" in note for note in notes)
    notes.clear()
    load_model(str(tmp_path), ["0", "1"], notes=notes)  # numbers are all that they have, and all that the data have
    assert notes == []


def test_names_that_differ_only_in_capitals_are_no_names_to_go_by():
    assert rows_of(["a", "A"], ["A", "a"]) is None and rows_of(["b", "a"], ["A", "B"]) == [1, 0]
