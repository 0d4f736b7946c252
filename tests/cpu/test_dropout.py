"""Our dropout against torch 2.13's: the exact one bit for bit, the fast one by how much it keeps; and a BERT with each.

Fast masks differ from torch's, so the tests compare their distribution, and all results where nothing is dropped.

    python -m pytest tests/cpu/test_dropout.py
"""

import pytest
import torch
from conftest import tiny_bert
from torch import nn

from nanofinetune.cpu import dropout
from nanofinetune.cpu.dropout import (
    ExactDropout,
    FastDropout,
    draws_doubles,
    exact_attention,
    fast_attention,
    fast_noise,
    torch_noise,
    use_exact_dropout,
    use_fast_dropout,
)
from nanofinetune.ground.errors import UsageError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def torch_attention(query, key, value, mask, p):
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, p).transpose(1, 2)


def our_attention(query, key, value, mask, p):
    return exact_attention(nn.Module(), query, key, value, mask, dropout=p, is_causal=False)[0]


def some_mask(kind, rows=2, length=7):
    """(rows, 1, length, length) bool, as transformers makes one; None for "none"."""
    lengths = {"padding": [7, 4], "a row without tokens": [7, 0]}.get(kind)
    if lengths is None:
        return None
    return (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None, None, :].expand(rows, 1, length, length)


# --- exact: torch's own masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", ["as found", "as on Intel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7, 7), (2**15 - 1,), (2**15 + 1,), (100_003,), (0, 4)], ids=str)
def test_noise_matches_torch_dropout(shape, p, dtype, draws, monkeypatch):
    """Bit for bit, on any number of threads; and what is drawn next is the same too."""
    if draws == "as on Intel":
        monkeypatch.setattr(dropout, "draws_doubles", lambda: False)
    found = []
    for noise in (
        lambda: nn.functional.dropout(torch.ones(shape, dtype=dtype), p),
        lambda: torch_noise(torch.Size(shape), dtype, p),
    ):
        torch.manual_seed(5)
        found.append((noise(), torch.rand(3)))
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*found, strict=True))


def test_draws_doubles_asks_torch():
    """It says yes exactly where bernoulli_ takes two numbers of 32 bits from the generator for each of its own."""
    torch.manual_seed(1)
    torch.empty(100).bernoulli_(0.9)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.empty(100, dtype=torch.float64).uniform_()
    assert draws_doubles() == torch.equal(after, torch.get_rng_state())


def test_draws_doubles_leaves_the_generator_as_it_was():
    draws_doubles.cache_clear()
    before = torch.get_rng_state()
    draws_doubles()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_exact_dropout_matches_torch_dropout(layout, p, dtype):
    """The module: output and gradient, in training and in evaluation, and for tensors that lie otherwise in memory."""
    x = torch.randn(6, 5).to(dtype)
    x = x.t() if layout == "transposed" else x
    results = []
    for module in (nn.Dropout(p), ExactDropout(p)):
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(torch.arange(1, 31).view(x.shape).to(dtype))
        results.append((y, leaf.grad, module.eval()(x)))
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("mask", ["none", "padding", "a row without tokens"])
def test_exact_attention_matches_torch_sdpa(mask, p, dtype):
    """Bit for bit, output and all three gradients."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 4, 7, 8).to(dtype)  # (B 2, heads 4, 7, width 8) each
    results = []
    for attend in (torch_attention, our_attention):
        torch.manual_seed(1)
        leaves = [x.clone().requires_grad_() for x in inputs]
        query, key, value = leaves
        out = attend(query, key, value, some_mask(mask), p)
        out.sin().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*results, strict=True))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_model_in_training_matches_itself_with_torch_dropout(p, precision):
    """A whole BERT: losses and gradients bit for bit, batch after batch, under autocast too."""
    plain, exact = tiny_bert(dropout=p), tiny_bert(dropout=p)
    use_exact_dropout(exact)
    assert sum(isinstance(module, ExactDropout) for module in exact.modules()) == 2 + 3 * 2
    for step in range(3):
        batch = {"input_ids": torch.randint(5, 25, (3, 11)), "labels": torch.tensor([0, 1, 0])}
        batch["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [5 + step], [0 if step == 2 else 8]])).long()
        for model in (plain, exact):
            model.zero_grad()
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                model.loss = model.train()(**batch).loss
            model.loss.backward()
        assert torch.equal(plain.loss, exact.loss)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), exact.parameters(), strict=True))


RECORDERS = {
    "export": lambda module: torch.export.export(module, (torch.ones(4, 9),)).module(),
    "trace": lambda module: torch.jit.trace(module, torch.ones(4, 9), check_trace=False),
    "fx": lambda module: torch.fx.symbolic_trace(nn.Sequential(module)),
    "func": lambda module: torch.func.grad(lambda x: module(x).sum()),
    "vmap": lambda module: torch.vmap(module, randomness="different"),
}


@pytest.mark.filterwarnings("ignore")  # the recorders' own
@pytest.mark.parametrize("kind", [ExactDropout, FastDropout])
@pytest.mark.parametrize("record", RECORDERS)
def test_a_recorded_dropout_matches_torch_dropout(record, kind):
    """Both leave it to torch then: a recorded mask would drop the same for ever."""
    found = []
    for module in (nn.Dropout(0.5), kind(0.5)):
        run = RECORDERS[record](module)
        torch.manual_seed(0)
        found.append((run(torch.ones(4, 9)), run(torch.ones(4, 9))))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not torch.equal(*found[1])


def test_other_attentions_keep_theirs():
    """A decoder's, or one that somebody chose, may do more; their nn.Dropout is exact all the same."""
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = BertForSequenceClassification(BertConfig(**small, is_decoder=True))
    eager = BertForSequenceClassification._from_config(BertConfig(**small), attn_implementation="eager")
    for model, implementation in ((decoder, "sdpa"), (eager, "eager")):
        use_exact_dropout(model)
        assert model.config._attn_implementation == implementation
        assert not any(type(module) is nn.Dropout for module in model.modules())


# --- fast: masks of its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_fast_dropout_keeps_as_many_as_torch_dropout(p):
    torch.manual_seed(0)
    n = 1_000_000
    ours, theirs = FastDropout(p)(torch.ones(n)), nn.functional.dropout(torch.ones(n), p)
    deviation = (p * (1 - p) / n) ** 0.5
    for found in (ours, theirs):
        assert (found == 0).float().mean().item() == pytest.approx(p, abs=5 * deviation)
    assert ours.mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p))  # what stays makes up for what goes
    assert ours.max().item() == pytest.approx(theirs.max().item(), rel=2**-16 / (1 - p))


def test_neighbours_are_independent():
    """Four numbers share a word of random bits; neither they nor the words may know of each other."""
    torch.manual_seed(0)
    kept = (fast_noise(torch.Size([1_000_000]), torch.float32, 0.5) > 0).float() - 0.5
    for distance in (1, 2, 3, 4, 8, 64):
        correlation = (kept[:-distance] * kept[distance:]).mean().item() * 4
        assert abs(correlation) < 5e-3, distance


def test_gradient_passes_where_the_number_did():
    torch.manual_seed(0)
    x = torch.rand(50, 3, dtype=torch.float64) + 1
    x.requires_grad_()
    y = FastDropout(0.3)(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert ((x.grad == 0) == (y == 0)).all() and 0 < (y == 0).sum() < 75
    assert torch.allclose(x.grad * x, y, rtol=1e-15)


def test_masks_follow_from_torch_manual_seed():
    x = torch.ones(7, 9)
    module = FastDropout(0.5)

    def two(seed):
        torch.manual_seed(seed)
        return torch.stack([module(x), module(x)])

    first = two(1)
    assert torch.equal(first, two(1)) and not torch.equal(first, two(2))
    assert not torch.equal(first[0], first[1]), "each call has a mask of its own"


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999, float("nan")])
def test_other_probabilities_are_refused(p):
    with pytest.raises(ValueError, match="it must be at least 0 and below 1"):
        fast_noise(torch.Size([2]), torch.float32, p)


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_fast_attention_matches_sdpa_without_dropout(mask, monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8)
    expected = torch_attention(query, key, value, some_mask(mask), 0.0)
    monkeypatch.setattr(dropout, "fast_noise", lambda shape, dtype, p: torch.ones(shape, dtype=dtype))
    found, _ = fast_attention(nn.Module(), query, key, value, some_mask(mask), dropout=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use", [use_exact_dropout, use_fast_dropout])
def test_a_model_matches_itself_in_evaluation(use):
    batch = {"input_ids": torch.randint(5, 25, (3, 11)), "labels": torch.tensor([0, 1, 0])}
    batch["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [5], [8]])).long()
    plain, other = tiny_bert(), tiny_bert()
    use(other)
    assert not any(type(module) is nn.Dropout for module in other.modules())
    assert torch.equal(plain.eval()(**batch).logits, other.eval()(**batch).logits)
    # Trained with p = 0 both compute the same function, by other kernels.
    plain, other = tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)
    use(other)
    losses = [model.train()(**batch).loss for model in (plain, other)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert list(other.state_dict()) == list(plain.state_dict())


def test_fast_dropout_reaches_the_embeddings_the_layers_and_attention(monkeypatch):
    seen = []
    model = tiny_bert()
    use_fast_dropout(model)

    def noted(shape, dtype, p):
        seen.append(len(shape))
        return fast_noise(shape, dtype, p)

    monkeypatch.setattr(dropout, "fast_noise", noted)
    monkeypatch.setattr(nn.functional, "dropout", lambda *_, **__: pytest.fail("torch's dropout was called"))
    batch = {"input_ids": torch.randint(5, 25, (3, 11)), "labels": torch.tensor([0, 1, 0])}
    model.train()(**batch).loss.backward()
    assert seen.count(4) == 2  # a layer's attention each
    assert seen.count(3) == 1 + 2 * 2 and seen.count(2) == 1
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("use", [use_exact_dropout, use_fast_dropout])
def test_a_saved_model_knows_nothing_of_it(use, tmp_path):
    from transformers import BertForSequenceClassification

    model = tiny_bert()
    use(model)
    model.save_pretrained(tmp_path)
    assert "nanofinetune" not in (tmp_path / "config.json").read_text()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_other_models_are_refused():
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification._from_config(BertConfig(**small), attn_implementation="eager")
    with pytest.raises(UsageError, match=r"knows albert, bert, .*; bert with eager attention: leave it out"):
        use_fast_dropout(model)
