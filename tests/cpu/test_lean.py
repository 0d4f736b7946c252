"""The lean encoder against the same BERT computed in full by transformers 5.23: losses, gradients, dropout, updates.

Reference: transformers.BertForSequenceClassification with equal weights, called the *whole* model here.

    python -m pytest tests/cpu/test_lean.py
"""

import copy
from functools import partial

import pytest
import torch
from conftest import tiny_bert, unseen
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanofinetune.cpu import dropout
from nanofinetune.cpu.dropout import use_exact_dropout, use_fast_dropout
from nanofinetune.cpu.lean import Layout, layout_of, use_lean_encoder
from nanofinetune.step.optim import AdamW

LENGTHS = {
    "much padding": [60, 5, 8, 30],
    "little padding": [60, 60, 58, 59],
    "no padding": [40, 40, 40, 40],
    "short": [3, 2, 1],
    "one row": [33],
}


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    return {
        "input_ids": torch.randint(5, 25, (len(lengths), longest), generator=generator),
        "token_type_ids": torch.randint(0, 2, (len(lengths), longest), generator=generator),
        "attention_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long(),
        "labels": torch.randint(0, 2, (len(lengths),), generator=generator),
    }


def pair(dropout=0.1, **settings):
    """The whole model and the lean one, with equal weights."""
    whole, ours = tiny_bert(dropout=dropout, **settings), tiny_bert(dropout=dropout, **settings)
    use_exact_dropout(ours)
    use_lean_encoder(ours)
    return whole, ours


def backward(model, batch, seed=0, precision=torch.float32):
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    return out


def assert_close_gradients(whole, ours, tolerance):
    """Relative to each gradient's largest number; a key's bias has none but rounding, since softmax ignores it."""
    for (name, p), q in zip(whole.named_parameters(), ours.parameters(), strict=True):
        if name.endswith("self.key.bias"):
            assert q.grad.abs().max() < 1e-4
        else:
            assert (p.grad - q.grad).abs().max() <= tolerance * p.grad.abs().max(), name


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13), (torch.bfloat16, 0.03)], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_lean_model_matches_the_whole_one(lengths, dropout, precision, tolerance):
    """Loss, logits and every gradient, batch after batch; in fp64 to 13 digits, so it is rounding and nothing else."""
    whole, ours = pair(dropout)
    if precision == torch.float64:
        whole, ours = whole.double(), ours.double()
    for step in range(3):
        batch = batch_of(lengths, step)
        theirs, found = (backward(model.train(), batch, step, precision) for model in (whole, ours))
        assert found.loss.item() == pytest.approx(theirs.loss.item(), rel=tolerance)
        assert (found.logits - theirs.logits).abs().max() <= tolerance
        assert_close_gradients(whole, ours, tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_logits_match_the_whole_model_in_evaluation(lengths):
    whole, ours = pair()
    batch = batch_of(lengths)
    with torch.inference_mode():
        theirs, found = (model.eval()(**batch).logits for model in (whole, ours))
    assert (theirs - found).abs().max() < 1e-6


def noted_masks(model, batch):
    """Which numbers each dropout lets pass, in order, and the state of the generator after it."""
    masks: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, args, out: masks.append(out.ne(0) | args[0].eq(0)))
        for module in model.modules()
        if isinstance(module, nn.Dropout)
    ]
    torch.manual_seed(3)
    model.train()(**batch)
    for handle in handles:
        handle.remove()
    return masks, torch.get_rng_state()


@pytest.mark.parametrize("lengths", [LENGTHS["much padding"], LENGTHS["no padding"]], ids=["much", "no"])
def test_dropout_matches_the_whole_one(lengths):
    """What is dropped of a token is what would have been: bit for bit, and the generator ends where it would have."""
    whole, ours = pair(0.5)
    batch = batch_of(lengths)
    with unseen():
        (theirs, their_state), (found, our_state) = (noted_masks(model, batch) for model in (whole, ours))
    assert torch.equal(their_state, our_state)
    layout = Layout(batch["attention_mask"].bool())
    embeddings, *first_layer, attention_output, output, classifier = theirs
    expected = [embeddings, *map(layout.pack, map(torch.Tensor.float, first_layer))]
    expected += [layout.first(layout.pack(mask.float())) for mask in (attention_output, output)] + [classifier]
    assert len(found) == len(expected) == 1 + 2 * 2 + 1
    for mask, other in zip(found, expected, strict=True):
        assert torch.equal(mask, other.bool()) and 0 < mask.float().mean() < 1


def test_attentions_dropout_matches_the_whole_one():
    """Its noise is drawn for all queries; of the last layer's the first one's is used."""
    whole, ours = pair(0.5)
    batch = batch_of(LENGTHS["no padding"])
    seen: dict[str, list[torch.Tensor]] = {"whole": [], "ours": []}
    for name, model in (("whole", whole), ("ours", ours)):
        for layer in model.bert.encoder.layer:  # attention's outcome, before anything else is dropped
            layer.attention.output.dense.register_forward_pre_hook(
                lambda _, args, name=name: seen[name].append(args[0])
            )
        torch.manual_seed(3)
        with unseen():
            model.train()(**batch)
    first, last = seen["whole"]
    assert torch.allclose(seen["ours"][0], first.reshape(1, -1, 32), atol=1e-6)
    assert torch.allclose(seen["ours"][1][0], last[:, 0], atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ten_updates_match_the_whole_model(dropout):
    whole, ours = pair(dropout)
    losses: list[list[float]] = []
    for model in (whole, ours):
        optimizer = AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(10):
            losses[-1].append(backward(model.train(), batch_of(LENGTHS["much padding"], step), step).loss.item())
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][9]


def test_fewer_rows_are_multiplied():
    """What it is for: the products have the tokens' rows, and in the last layer one for each row of the batch."""
    _, ours = pair()
    seen: dict[str, int] = {}
    for name, module in ours.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0].shape[0]}))
    with unseen():
        backward(ours.train(), batch_of([60, 5, 8, 30]))
    assert set(seen.values()) == {128, 4}  # 103 tokens, filled up to 4 x 32; 4 x 60 positions
    assert {name for name, rows in seen.items() if rows == 4} == {
        "layer.1.attention.self.query", "layer.1.attention.output.dense", "layer.1.intermediate.dense",
        "layer.1.output.dense",
    }  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_a_layout_holds_every_token(lengths, multiple):
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    layout = Layout(real, multiple, least=0.0)
    x = torch.randn(*real.shape, 3)
    packed = layout.pack(x)
    assert torch.equal(layout.unpack(packed)[real], x[real])
    assert torch.equal(layout.first(packed)[0], x[:, 0])
    if layout.rows is not None:
        assert packed.shape == (1, -(-sum(lengths) // multiple) * multiple, 3)
        assert (layout.rows.diff() > 0).all()


def test_pack_and_unpack_are_each_others_gradient():
    layout = Layout(torch.arange(6) < torch.tensor([[6], [2], [3]]), multiple=4)
    padded = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    for function, x in ((layout.pack, padded), (layout.unpack, packed), (layout.first, packed)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def whole_or_lean(mask, hidden=None):
    hidden = torch.zeros(mask.shape[0], mask.shape[-1], 2) if hidden is None else hidden
    return layout_of(hidden, mask)


def test_other_batches_are_computed_whole():
    rows = (torch.arange(4) < torch.tensor([[4], [2]]))[:, None, None, :].expand(2, 1, 4, 4)
    assert whole_or_lean(rows) is not None
    empty = rows.clone()
    empty[1] = False
    left = rows.flip(-1)  # padding on the left: the first token is none
    causal = rows & torch.ones(4, 4, dtype=torch.bool).tril()
    for other in (empty, left, causal, rows.float(), rows[:, :, :1]):
        assert whole_or_lean(other) is None
    assert layout_of(torch.zeros(2, 4, 2, device="meta"), None) is None


@pytest.mark.parametrize("kind", ["a row without tokens", "padding on the left"])
def test_a_batch_that_is_computed_whole_matches_exactly(kind):
    whole, ours = pair()
    batch = batch_of([30, 20, 10])
    if kind == "a row without tokens":
        batch["attention_mask"][1] = 0
    else:
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    theirs, found = (backward(model.train(), batch) for model in (whole, ours))
    assert torch.equal(theirs.logits, found.logits)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(whole.parameters(), ours.parameters(), strict=True))


def test_other_models_stay_as_they_are():
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**small)
    plain = tiny_bert()  # without either dropout before
    decoder = BertForSequenceClassification(BertConfig(**small, is_decoder=True))
    eager = BertForSequenceClassification._from_config(copy.deepcopy(config), attn_implementation="eager")
    tokens = BertForTokenClassification(config)  # reads every token
    for model in (plain, decoder, eager, tokens):
        if model is not plain:
            use_exact_dropout(model)
        before = model.config._attn_implementation
        use_lean_encoder(model)
        assert model.config._attn_implementation == before and "forward" not in vars(model.bert.encoder)


def test_with_fast_dropout_only_what_is_computed_is_dropped():
    """Its masks match nobody's, so none are drawn for padding; without dropout it is the same function."""
    whole, ours = tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)
    use_fast_dropout(ours)
    use_lean_encoder(ours)
    batch = batch_of(LENGTHS["much padding"])
    theirs, found = (backward(model.train(), batch) for model in (whole, ours))
    assert found.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert_close_gradients(whole, ours, 1e-5)
    ours = tiny_bert(dropout=0.1)
    use_fast_dropout(ours)
    use_lean_encoder(ours)
    losses = {backward(ours.train(), batch, seed).loss.item() for seed in (1, 1, 2)}
    assert len(losses) == 2


def test_a_copy_computes_as_its_original():
    """deepcopy takes the methods along: the copy's own layers are used."""
    _, ours = pair()
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in other.bert.encoder.layer[-1].parameters():
            parameter.zero_()
    batch = batch_of(LENGTHS["much padding"])
    first, second = (backward(model.eval(), batch).logits for model in (ours, other))
    assert not torch.equal(first, second)
    assert torch.equal(first, backward(ours.eval(), batch).logits)


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    from transformers import BertForSequenceClassification

    whole, ours = pair()
    assert list(whole.state_dict()) == list(ours.state_dict())
    ours.save_pretrained(tmp_path)
    assert "nanofinetune" not in (tmp_path / "config.json").read_text()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    batch = batch_of(LENGTHS["much padding"])
    assert torch.equal(loaded.eval()(**batch).logits, whole.eval()(**batch).logits)


def test_used_twice_is_used_once():
    """A notebook's cell may run again."""
    whole, ours = pair(0.5)
    use_exact_dropout(ours)
    use_lean_encoder(ours)
    batch = batch_of(LENGTHS["much padding"])
    theirs, found = (backward(model.train(), batch).logits for model in (whole, ours))
    assert torch.allclose(theirs, found, atol=1e-6)


@pytest.mark.parametrize("asked", ["output_hidden_states", "gradient checkpointing", "a float mask", "chunks"])
def test_what_needs_the_whole_gets_it(asked):
    """Bit for bit the whole model's logits and gradients."""
    settings = {"chunk_size_feed_forward": 3} if asked == "chunks" else {}
    whole, ours = tiny_bert(dropout=0.1), tiny_bert(dropout=0.1)
    for model in (whole, ours):
        model.config.update(settings)
        for layer in model.bert.encoder.layer:
            layer.chunk_size_feed_forward = settings.get("chunk_size_feed_forward", 0)
    use_exact_dropout(ours)
    use_lean_encoder(ours)
    batch = batch_of(LENGTHS["much padding"])
    if asked == "a float mask":
        allowed = batch["attention_mask"].bool()[:, None, None, :].expand(4, 1, 60, 60)
        batch["attention_mask"] = torch.zeros(4, 1, 60, 60).masked_fill(~allowed, -1e4)
    options = {"output_hidden_states": True} if asked == "output_hidden_states" else {}
    outs = []
    for model in (whole, ours):
        if asked == "gradient checkpointing":
            for layer in model.bert.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        model.train()
        torch.manual_seed(1)
        out = model(**batch, **options)
        torch.manual_seed(2)
        other = model(**batch_of([9, 8], 1))  # a second forward, of another layout, before the first one's backward
        (out.loss + other.loss).backward()
        outs.append(out)
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert_close_gradients(whole, ours, 1e-5)  # the second forward may have been lean
    if options:
        assert [h.shape for h in outs[1].hidden_states] == [(4, 60, 32)] * 3
        assert all(torch.equal(*pair) for pair in zip(*(out.hidden_states for out in outs), strict=True))


def test_two_forwards_before_a_backward_match_the_whole_model():
    whole, ours = pair(0.5)
    for model in (whole, ours):
        model.train()
        torch.manual_seed(1)
        losses = [model(**batch_of(lengths, i)).loss for i, lengths in enumerate(LENGTHS.values())]
        sum(losses).backward()
    assert_close_gradients(whole, ours, 1e-5)


def test_an_exception_leaves_nothing_behind():
    _, ours = pair()
    handle = ours.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with unseen(), pytest.raises(ZeroDivisionError):
        ours(**batch_of(LENGTHS["much padding"]))
    handle.remove()
    assert all(getattr(module, "layout", None) is None for module in ours.modules())


def test_a_pickled_model_computes_as_its_original(tmp_path):
    _, ours = pair()
    torch.save(ours, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    batch = batch_of(LENGTHS["much padding"])
    logits = [model.eval()(**batch).logits for model in (ours, loaded)]
    assert torch.equal(*logits)
    assert loaded.bert.encoder.forward.args[0] is loaded.bert.encoder


# --- a model that is changed afterwards, or recorded: as if it had never been lean ------------------------------------


def cut(model):
    model.bert.encoder.layer = model.bert.encoder.layer[:1]


def one_more(model, copied=0):
    model.bert.encoder.layer.append(copy.deepcopy(model.bert.encoder.layer[copied]))


def turned_around(model):
    model.bert.encoder.layer = nn.ModuleList(reversed(model.bert.encoder.layer))


class Adapter(nn.Module):
    """A linear layer with what LoRA adds to it, its dropout included."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(9)
        self.base, self.dropout = base, nn.Dropout(0.5)
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(self.dropout(x)))


def with_adapters(model):
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = Adapter(layer.attention.self.query)
        layer.output.dense = Adapter(layer.output.dense)


def with_a_forward_of_its_own(model):
    """Somebody's patch, which counts on seeing the batch's shape."""
    inner = model.bert.encoder.layer[0].output
    inner.forward = lambda hidden, residual: type(inner).forward(inner, hidden.cumsum(1), residual)


CHANGES = {
    "fewer layers": cut,
    "one more": one_more,
    "the last one again": partial(one_more, copied=1),
    "turned around": turned_around,
    "sdpa": lambda model: model.set_attn_implementation("sdpa"),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "adapters": with_adapters,
    "a patch": with_a_forward_of_its_own,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_changed_afterwards_matches_the_whole_one(change):
    """Bit for bit, dropout included; without the change it is lean, and equal but for rounding."""
    batch = batch_of(LENGTHS["much padding"])
    whole, ours = pair(0.5)
    theirs, found = (backward(model.train(), batch).logits for model in (whole, ours))
    assert torch.allclose(theirs, found, atol=1e-6)
    for model in (whole, ours):
        change(model)
    theirs, found = (backward(model.train(), batch).logits for model in (whole, ours))
    assert torch.equal(theirs, found)
    for p, q in zip(whole.parameters(), ours.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


class Logits(nn.Module):
    """A model with positional inputs and one tensor as output, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def exported(model, inputs):
    return torch.export.export(Logits(model).train(model.training), inputs).module()


def traced(model, inputs):
    return torch.jit.trace(Logits(model).train(model.training), inputs, check_trace=False)


def compiled(model, inputs):
    torch.compiler.reset()
    return torch.compile(Logits(model), backend="eager")


@pytest.mark.filterwarnings("ignore")  # the recorders' own
@pytest.mark.parametrize("record", [exported, traced, pytest.param(compiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_a_recorded_model_matches_the_recorded_whole_one(record, training):
    """Of other inputs too: what is recorded has no layout in it."""
    batch, other = (batch_of(LENGTHS["much padding"], seed) for seed in (0, 1))
    other["attention_mask"] = other["attention_mask"].flip(0)
    found = []
    for model in pair(0.5):
        model.train(training)
        function = record(model, (batch["input_ids"], batch["attention_mask"]))
        torch.manual_seed(3)
        found.append([function(b["input_ids"], b["attention_mask"]) for b in (batch, other)])
    assert all(torch.equal(*logits) for logits in zip(*found, strict=True))


def test_functional_gradients_match_the_whole_model():
    batch = batch_of(LENGTHS["much padding"])
    found = []
    for model in pair(0.5):
        parameters = dict(model.train().named_parameters())
        torch.manual_seed(3)
        loss = partial(lambda model, parameters: torch.func.functional_call(model, parameters, (), batch).loss, model)
        found.append(torch.func.grad(loss)(parameters))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("use", [use_exact_dropout, use_fast_dropout])
def test_a_model_saved_whole_loads_where_nobody_registered_its_attention(use, tmp_path, monkeypatch):
    """As in another process, which has not made a model lean."""
    from transformers import AttentionInterface, AttentionMaskInterface

    ours = tiny_bert(dropout=0.1)
    use(ours)
    use_lean_encoder(ours)
    batch = batch_of(LENGTHS["much padding"])
    expected = ours.eval()(**batch).logits
    torch.save(ours, tmp_path / "model.pt")
    for table in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        for name in dropout.TABLE:
            monkeypatch.delitem(table, name)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(**batch).logits, expected)
