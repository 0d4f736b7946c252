"""Our dropout against torch 2.13's: how much it keeps, what passes, and a BERT (transformers 5.23) that uses it.

    python -m pytest tests/test_dropout.py

The masks are others than torch's, so what is compared is their distribution, and everything where nothing is dropped.
"""

import pytest
import torch
from conftest import tiny_bert
from torch import nn

from nanofinetune.dropout import FastDropout, attention, fast_dropout, keep_mask, use_fast_dropout
from nanofinetune.errors import UsageError


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_fast_dropout_keeps_as_many_as_torch_dropout(p):
    torch.manual_seed(0)
    n = 1_000_000
    x = torch.ones(n)
    ours, theirs = fast_dropout(x, p), nn.functional.dropout(x, p)
    deviation = (p * (1 - p) / n) ** 0.5
    for found in (ours, theirs):
        assert (found == 0).float().mean().item() == pytest.approx(p, abs=5 * deviation)
    assert ours.mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p))  # what stays makes up for what goes
    assert ours.max().item() == pytest.approx(theirs.max().item(), rel=2**-16 / (1 - p))


def test_neighbours_are_independent():
    """Four numbers share a word of random bits; neither they nor the words may know of each other."""
    torch.manual_seed(0)
    kept = keep_mask(torch.Size([1_000_000]), 0.5)[0].float() - 0.5
    for distance in (1, 2, 3, 4, 8, 64):
        correlation = (kept[:-distance] * kept[distance:]).mean().item() * 4
        assert abs(correlation) < 5e-3, distance


def test_gradient_passes_where_the_number_did():
    torch.manual_seed(0)
    x = torch.rand(50, 3, dtype=torch.float64) + 1
    x.requires_grad_()
    y = fast_dropout(x, 0.3)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert ((x.grad == 0) == (y == 0)).all() and 0 < (y == 0).sum() < 75
    assert torch.allclose(x.grad * x, y, rtol=1e-15)


def test_masks_follow_from_torch_manual_seed():
    x = torch.ones(7, 9)

    def two(seed):
        torch.manual_seed(seed)
        return torch.stack([fast_dropout(x, 0.5), fast_dropout(x, 0.5)])

    first = two(1)
    assert torch.equal(first, two(1)) and not torch.equal(first, two(2))
    assert not torch.equal(first[0], first[1]), "each call has a mask of its own"


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999, float("nan")])
def test_other_probabilities_are_refused(p):
    with pytest.raises(ValueError, match="it must be at least 0 and below 1"):
        fast_dropout(torch.ones(2), p)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_matches_sdpa_without_dropout(masked, monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8)  # (B 2, heads 4, 7, width 8) each
    mask = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None, :].expand(2, 1, 7, 7) if masked else None
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    monkeypatch.setattr("nanofinetune.dropout.fast_dropout", lambda x, p: x)
    found, _ = attention(nn.Module(), query, key, value, mask, dropout=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_matches_itself_in_evaluation():
    batch = {"input_ids": torch.randint(5, 25, (3, 11)), "labels": torch.tensor([0, 1, 0])}
    batch["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [5], [8]])).long()
    plain, fast = tiny_bert(), tiny_bert()
    use_fast_dropout(fast)
    assert not any(type(module) is nn.Dropout for module in fast.modules())
    assert sum(isinstance(module, FastDropout) for module in fast.modules()) == sum(
        type(module) is nn.Dropout for module in plain.modules()
    )
    assert torch.equal(plain.eval()(**batch).logits, fast.eval()(**batch).logits)
    # Trained with p = 0 both compute the same function, by other kernels.
    plain, fast = tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)
    use_fast_dropout(fast)
    losses = [model.train()(**batch).loss for model in (plain, fast)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_dropout_reaches_the_embeddings_the_layers_and_attention(monkeypatch):
    seen = []
    model = tiny_bert()
    use_fast_dropout(model)

    def noted(x, p):
        seen.append(x.dim())
        return fast_dropout(x, p)

    monkeypatch.setattr("nanofinetune.dropout.fast_dropout", noted)
    monkeypatch.setattr(nn.functional, "dropout", lambda *_, **__: pytest.fail("torch's dropout was called"))
    batch = {"input_ids": torch.randint(5, 25, (3, 11)), "labels": torch.tensor([0, 1, 0])}
    model.train()(**batch).loss.backward()
    assert seen.count(4) == 2  # a layer's attention each
    assert seen.count(3) == 1 + 2 * 2 and seen.count(2) == 1
    assert all(p.grad is not None for p in model.parameters())


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    from transformers import BertForSequenceClassification

    model = tiny_bert()
    use_fast_dropout(model)
    model.save_pretrained(tmp_path)
    assert "nanofinetune" not in (tmp_path / "config.json").read_text()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_other_models_are_refused():
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification._from_config(BertConfig(**small), attn_implementation="eager")
    with pytest.raises(UsageError, match="this is a bert model with eager attention: leave it out"):
        use_fast_dropout(model)
