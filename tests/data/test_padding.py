"""The padding token and its side, against the answer of the same row without padding.

python -m pytest tests/data/test_padding.py
"""

import numpy as np
import pytest
import torch
from architectures import save_model, save_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from nanofinetune import predict
from nanofinetune.data.pretrained import load_model, load_tokenizer, load_trained


def padded(tokenizer, text, more, side=None):
    row = tokenizer([text])
    width = len(row["input_ids"][0]) + more
    return tokenizer.pad(row, padding="max_length", max_length=width, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_padding_token_comes_from_the_tokenizer(kind, tmp_path):
    """Neither has one: the library's tokenizer refuses to pad, and its model to take a batch of two."""
    save_model(kind, tmp_path, padding=None)
    tokenizer, notes = load_tokenizer(str(tmp_path)), list[str]()
    model, _ = load_model(str(tmp_path), ["a", "b"], tokenizer, notes)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert any("end-of-text token </s> is its padding token too" in note for note in notes)
    model.eval()
    with torch.inference_mode():
        logits = model(**padded(tokenizer, "the cat", 3)).logits
        torch.testing.assert_close(logits, model(**padded(tokenizer, "the cat", 0)).logits)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="padding token"):
        theirs(["the cat", "the"], padding=True)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)(input_ids=torch.tensor([[5, 6], [5, 7]]))


def test_a_trained_model_without_a_padding_token_takes_the_tokenizers(tmp_path):
    """Somebody else's GPT-2, which answers one row at a time in the library."""
    save_model("gpt2", tmp_path, padding=None)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).save_pretrained(tmp_path)
    rows = torch.tensor([[5, 6], [5, 2]])
    with pytest.raises(ValueError, match="batch sizes > 1"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)(input_ids=rows)
    model = load_trained(str(tmp_path))
    with torch.inference_mode():
        alone = model(input_ids=rows[1:, :1]).logits
        torch.testing.assert_close(model(input_ids=rows, attention_mask=(rows != 2).long()).logits[1:], alone)


@pytest.mark.parametrize(("kind", "wrong", "right"), [("xlnet", "right", "left"), ("gpt2", "left", "right")])
def test_the_side_is_the_one_that_changes_nothing(kind, wrong, right, tmp_path):
    """XLNet's head reads the last token, GPT-2 counts positions from the left: on the other side answers change."""
    save_model(kind, tmp_path)
    save_tokenizer(kind, tmp_path, padding_side=wrong)
    tokenizer, notes = load_tokenizer(str(tmp_path)), list[str]()
    assert tokenizer.padding_side == wrong
    model, _ = load_model(str(tmp_path), ["a", "b"], tokenizer, notes)
    assert tokenizer.padding_side == right and any(f"rows are padded on the {right}" in note for note in notes)
    model.eval()
    with torch.inference_mode():
        alone = model(**padded(tokenizer, "the cat", 0)).logits
        torch.testing.assert_close(model(**padded(tokenizer, "the cat", 3)).logits, alone)
        assert (model(**padded(tokenizer, "the cat", 3, wrong)).logits - alone).abs().max() > 1e-3
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == right


def test_a_padding_token_that_the_config_knows_by_another_number_is_taken_over(tmp_path):
    """GPT-2's head takes the last token that is not the config's padding: with another one it reads padding."""
    save_model("gpt2", tmp_path, padding=4)
    save_tokenizer("gpt2", tmp_path, pad_token="<pad>")
    tokenizer, notes = load_tokenizer(str(tmp_path)), list[str]()
    model, _ = load_model(str(tmp_path), ["a", "b"], tokenizer, notes)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1
    assert "pad_token_id is 4 in the model's config and 1 in its tokenizer: 1 is taken" in notes


def save_trained(kind, folder, padding, **settings):
    """Somebody else's decoder with a head, large enough weights to decide, and that padding token in its config."""
    save_model(kind, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.config.pad_token_id = padding
    model.save_pretrained(folder)
    save_tokenizer(kind, folder, **settings)


def assert_alone_as_in_a_batch(folder):
    """In batches of 1 and of 8 the pipeline's answers to one row at a time."""
    texts = ["the cat", "the", "the cat sat on the mat the dog", "cat sat", "the dog sat the", "on", "mat the", "sat"]
    reference = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    alone = [{found["label"]: found["score"] for found in reference([text])[0]} for text in texts]
    expected = [[row[f"LABEL_{k}"] for k in range(3)] for row in alone]
    tokenizer = load_tokenizer(str(folder))
    model = load_trained(str(folder), tokenizer)
    for size in (1, 8):
        found = predict.probabilities([(text,) for text in texts], model, tokenizer, 40, size)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("padding", [None, -1, 1, 7, 31], ids=lambda padding: f"padding {padding}")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_trained_decoder_answers_in_a_batch_as_the_pipeline_does_alone(kind, padding, tmp_path):
    """Whatever the config calls padding: nothing, no token, the tokenizer's own, a word, or a row beyond its last."""
    save_trained(kind, tmp_path, padding, pad_token="<pad>")
    assert_alone_as_in_a_batch(tmp_path)


@pytest.mark.parametrize("padding", [None, -1, 2, 4])
def test_a_token_that_ends_every_row_is_not_its_padding_unless_the_config_says_so(padding, tmp_path):
    """A Llama whose tokenizer has no padding token and adds the end-of-text token, which the head reads."""
    save_trained("llama", tmp_path, padding)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    theirs.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>" and theirs("the")["input_ids"][-1] == 2
    assert_alone_as_in_a_batch(tmp_path)


@pytest.mark.parametrize(("kind", "wrong"), [("xlnet", "right"), ("gpt2", "left")])
def test_a_trained_model_is_padded_on_the_side_that_changes_nothing(kind, wrong, tmp_path):
    save_trained(kind, tmp_path, 1, padding_side=wrong, pad_token="<pad>")
    assert_alone_as_in_a_batch(tmp_path)
