"""The head of a model that was fine-tuned before, against what transformers makes of it under other names.

python -m pytest tests/data/test_head.py
"""

import pytest
import torch
from conftest import tiny_bert

from nanofinetune.data.head import fit_head, order_of
from nanofinetune.data.pretrained import class_names, load_model

OLD = ["contradiction", "entailment", "neutral"]


@pytest.fixture
def trained(tmp_path):
    model = tiny_bert(3)
    model.config.id2label = dict(enumerate(OLD))
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path / "trained")
    return str(tmp_path / "trained")


def fitted(folder, names):
    torch.manual_seed(1)
    model, made_anew = load_model(folder, names)
    return model, *fit_head(model, made_anew, class_names(folder), names)


def logits(model):
    return model.eval()(input_ids=torch.tensor([[2, 7, 8, 3]])).logits[0]


def test_a_head_is_put_in_the_order_of_the_datas_names(trained):
    """The library keeps the head's rows and writes the new names over them: entailment answers for contradiction."""
    from transformers import AutoModelForSequenceClassification

    before = dict(zip(OLD, logits(tiny_of(trained)).tolist(), strict=True))
    new = ["Entailment", "neutral", "contradiction"]
    model, made_anew, note = fitted(trained, new)
    assert made_anew == [] and "are put in the data's order: Entailment, neutral, contradiction" in note
    assert dict(zip(map(str.lower, new), logits(model).tolist(), strict=True)) == pytest.approx(before, abs=1e-6)
    theirs = AutoModelForSequenceClassification.from_pretrained(trained, num_labels=3, id2label=dict(enumerate(new)))
    assert theirs.config.id2label[0] == "Entailment"
    assert logits(theirs)[0].item() == pytest.approx(before["contradiction"], abs=1e-6)


def tiny_of(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_same_names_in_the_same_order_stay(trained):
    model, made_anew, note = fitted(trained, OLD)
    assert (made_anew, note) == ([], "") and torch.equal(model.classifier.weight, tiny_of(trained).classifier.weight)


def test_a_head_of_other_names_is_made_anew(trained):
    model, made_anew, note = fitted(trained, ["bad", "fine", "good"])
    assert made_anew == ["classifier.bias", "classifier.weight"]
    assert note.endswith("its classes were contradiction, entailment, neutral, and the data's are bad, fine, good")
    assert not torch.equal(model.classifier.weight, tiny_of(trained).classifier.weight)
    assert model.classifier.bias.abs().max() == 0  # as transformers makes a new one


def test_a_head_without_names_is_kept_and_that_is_said(tmp_path):
    tiny_bert(2).save_pretrained(tmp_path / "plain")
    model, made_anew, note = fitted(str(tmp_path / "plain"), ["bad", "good"])
    assert made_anew == [] and note == "the model's classes had no names, and are taken for bad, good in this order"
    assert torch.equal(model.classifier.weight, tiny_bert(2).classifier.weight)


@pytest.mark.parametrize("names", [["a", "b"], None])
def test_a_new_head_is_none_of_our_business(names, trained):
    """Another number of classes, or a regression: transformers has made it anew already."""
    _, made_anew, note = fitted(trained, names)
    assert made_anew == ["classifier.bias", "classifier.weight"] and note == ""


def test_an_order_needs_the_same_names_each_once():
    assert order_of(["a", "b"], ["B", "a"]) == [1, 0]
    assert order_of(["a", "b"], ["a", "c"]) is None
    assert order_of(["a", "A"], ["a", "A"]) is None
