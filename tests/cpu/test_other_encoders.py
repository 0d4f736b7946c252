"""The lean encoders of BERT's kin against the same models computed in full by transformers 5.23.

Reference: transformers' ...ForSequenceClassification with equal weights. What is particular to BERT, and what a change
afterwards does, is in test_lean.py.

    python -m pytest tests/cpu/test_other_encoders.py
"""

import copy
import re
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from conftest import unseen
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from nanofinetune.accelerator import Accelerator
from nanofinetune.cpu.dropout import EXACT, KINDS, use_exact_dropout, use_fast_dropout
from nanofinetune.cpu.lean import ENCODERS, layers_of, use_lean_encoder

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 70, "pad_token_id": 1,
}  # fmt: skip
OTHERS = {"distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}, "albert": {"embedding_size": 16}}
VARIANTS = {kind: (kind, OTHERS.get(kind, {})) for kind in KINDS} | {
    "albert, two groups": ("albert", {"embedding_size": 16, "num_hidden_groups": 2}),
    "albert, two layers a group": ("albert", {"embedding_size": 16, "inner_group_num": 2}),
    "electra, narrow embeddings": ("electra", {"embedding_size": 16}),
    "one layer": ("roberta", {"num_hidden_layers": 1}),
    "mpnet": ("mpnet", {}),
    "mpnet, one layer": ("mpnet", {"num_hidden_layers": 1}),
}
LENGTHS = {"much padding": [60, 5, 8, 30], "no padding": [40, 40, 40], "short": [3, 2, 1]}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_sdpa_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if "mpnet" not in name])


def made(variant, dropout=0.1, labels=3):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    kind, sizes = VARIANTS[variant]
    config = AutoConfig.for_model(kind, num_labels=labels, **SIZES | sizes)
    for name in vars(config).copy():  # each kind has its own names for them; ALBERT's are 0 by default
        if re.search("dropout", name) and isinstance(getattr(config, name), float | int):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def pair(variant, dropout=0.1):
    """The whole model and the lean one, with equal weights."""
    whole, ours = made(variant, dropout), made(variant, dropout)
    use_exact_dropout(ours)
    use_lean_encoder(ours)
    return whole, ours


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 32, mask.shape, generator=generator)
    labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long(), "labels": labels}


def run(model, batch, seed=0, **options):
    """Loss and logits, gradients in the model, and where the generator ends."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**batch, **options)
    out.loss.backward()
    return out, torch.get_rng_state()


def assert_same(whole, ours, batch, tolerance, seed=0):
    (theirs, their_state), (found, our_state) = (run(model, batch, seed) for model in (whole, ours))
    assert found.loss.item() == pytest.approx(theirs.loss.item(), rel=tolerance)
    assert (found.logits - theirs.logits).abs().max() <= tolerance
    assert torch.equal(their_state, our_state)
    grads = [(name, p.grad, q.grad) for (name, p), q in zip(whole.named_parameters(), ours.parameters(), strict=True)]
    assert all((a is None) == (b is None) for _, a, b in grads)
    grads = [(name, a, b) for name, a, b in grads if a is not None]  # none: nothing reads it, as a pooler's
    largest = max(a.abs().max() for _, a, _ in grads)
    for name, a, b in grads:
        assert (a - b).abs().max() <= tolerance * largest, name


def is_lean(model, batch):
    """Whether the encoder hands only first tokens to the head."""
    encoder = model.get_submodule(ENCODERS[type(model).__name__])
    seen = []
    handle = encoder.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.shape[1]))
    with unseen():
        run(model, batch)
    handle.remove()
    return seen == [1]


def test_every_kind_whose_attention_is_known_has_a_lean_encoder():
    """MPNet's calls no attention function, and has layers of its own."""
    assert {type(made(variant)).__name__ for variant in (*KINDS, "mpnet")} == set(ENCODERS)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@each_variant
def test_a_lean_model_matches_the_whole_one(variant, lengths, dropout):
    """In fp64 to 12 digits, dropout drawn as it would have been, so it is rounding and nothing else."""
    whole, ours = (model.double().train() for model in pair(variant, dropout))
    for step in range(2):
        assert_same(whole, ours, batch_of(lengths, step), 1e-12, step)
    assert is_lean(ours, batch_of(lengths))


@each_variant
def test_evaluation_matches_the_whole_model(variant):
    whole, ours = (model.eval() for model in pair(variant))
    with torch.inference_mode():
        theirs, found = (model(**batch_of(LENGTHS["much padding"])).logits for model in (whole, ours))
    assert (theirs - found).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@each_variant
def test_fewer_rows_are_multiplied(variant, precision, mode):
    """103 tokens, filled up to 128 of 240 positions; in the last layer's second half the 4 first ones.

    Of a model as `prepare` returns it: autocast gives it a forward of its own, which once made the encoder whole.
    """
    ours = Accelerator(mixed_precision=precision, cpu=True).prepare(pair(variant)[1].train(mode == "train"))
    encoder, rows = ours.get_submodule(ENCODERS[type(ours).__name__]), set()
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: rows.add(args[0].numel() // args[0].shape[-1]))
    with unseen():
        run(ours, batch_of(LENGTHS["much padding"]))
    assert rows == {128, 4}


def test_a_forward_of_ones_own_matches_the_whole_one():
    """It may read all tokens, inside the model's own call, too."""

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.base_model(input_ids, attention_mask).last_hidden_state
        logits = self.classifier(hidden.mean(1))
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits.float(), labels), logits)

    whole, ours = pair("bert")
    for model in (whole, ours):
        model.forward = MethodType(forward, model)
    assert_same(whole, Accelerator(mixed_precision="no", cpu=True).prepare(ours), batch_of([60, 5, 8, 30]), 0.0)
    whole, ours = (Accelerator(mixed_precision="bf16", cpu=True).prepare(model) for model in (whole, ours))
    assert_same(whole, ours, batch_of([60, 5, 8, 30]), 0.0)


@each_variant
def test_an_encoder_called_by_itself_matches_the_whole_one(variant):
    """Somebody takes the tokens' vectors of the trained model, or puts another head on it."""
    whole, ours = (model.eval() for model in pair(variant))
    batch = batch_of(LENGTHS["much padding"])
    batch.pop("labels")
    theirs, found = (model.base_model(**batch).last_hidden_state for model in (whole, ours))
    assert torch.equal(theirs, found) and found.shape[1] == 60


CHANGES = {
    "a head of one's own": lambda model: setattr(model, "classifier", Mean(model.config.num_labels)),
    "sdpa": lambda model: model.set_attn_implementation("sdpa"),
    "eager": lambda model: model.set_attn_implementation("eager"),
}


class Mean(nn.Module):
    """A head that reads all tokens, and takes a pooled vector too."""

    def __init__(self, labels):
        super().__init__()
        torch.manual_seed(5)
        self.out = nn.Linear(32, labels)

    def forward(self, x):
        return self.out(x.mean(1) if x.ndim == 3 else x)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        pytest.param(variant, change, id=f"{variant}, {name}")
        for variant in VARIANTS for name, change in CHANGES.items()
        if "mpnet" not in variant or "head" in name  # it has but one attention
    ],
)  # fmt: skip
def test_a_model_changed_afterwards_matches_the_whole_one(variant, change):
    batch = batch_of(LENGTHS["much padding"])
    whole, ours = (model.train() for model in pair(variant, 0.5))
    for model in (whole, ours):
        change(model)
    (theirs, _), (found, _) = (run(model, batch) for model in (whole, ours))
    assert torch.equal(theirs.logits, found.logits)


@each_variant
def test_a_copy_and_a_saved_model_match_the_original(variant, tmp_path):
    ours = pair(variant)[1].eval()
    batch = batch_of(LENGTHS["much padding"])
    expected = ours(**batch).logits
    torch.save(ours, tmp_path / "model.pt")
    for other in (copy.deepcopy(ours), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(**batch).logits, expected)
        assert is_lean(other, batch)
        with torch.no_grad():
            for parameter in other.get_submodule(ENCODERS[type(ours).__name__]).parameters():
                parameter.zero_()
        assert not torch.equal(other(**batch).logits, expected)
    assert torch.equal(ours(**batch).logits, expected)


@each_sdpa_variant
def test_exact_attention_is_used_and_not_saved(variant, tmp_path):
    model = made(variant)
    use_exact_dropout(model)
    assert model.config._attn_implementation == EXACT
    model.save_pretrained(tmp_path)
    assert "nanofinetune" not in (tmp_path / "config.json").read_text()


@each_sdpa_variant
def test_fast_dropout_draws_masks_of_its_own(variant):
    whole, ours = made(variant, 0.0), made(variant, 0.0)
    use_fast_dropout(ours)
    use_lean_encoder(ours)
    assert_same(whole.train(), ours.train(), batch_of(LENGTHS["much padding"]), 1e-5)
    ours = made(variant, 0.1).train()
    use_fast_dropout(ours)
    use_lean_encoder(ours)
    assert len({run(ours, batch_of([20, 9]), seed)[0].loss.item() for seed in (1, 1, 2)}) == 2


def test_an_exception_in_the_model_leaves_the_encoder_whole_for_others():
    ours = pair("roberta")[1].eval()
    batch = batch_of(LENGTHS["much padding"])
    with pytest.raises(IndexError):
        ours(**batch | {"labels": torch.tensor([0, 1, 2, 9])})
    batch.pop("labels")
    assert ours.base_model(**batch).last_hidden_state.shape[1] == 60


# --- what somebody changes, before or afterwards ----------------------------------------------------------------------

six_kinds = pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "mpnet", "albert"])


def encoder_of(model):
    return model.get_submodule(ENCODERS[type(model).__name__])


def part(model, *names):
    """A module of the last layer: the first one that has one of these names."""
    return next(m for name, m in layers_of(encoder_of(model))[-1].named_modules() if name.rpartition(".")[2] in names)


def key_of(model):
    return part(model, "key", "k", "k_lin")


def attention_of(model):
    """The module that takes its own mode for the scores' dropout."""
    return next(m for name, m in layers_of(encoder_of(model))[-1].named_modules() if hasattr(m, "attention_head_size"))


def replace(model, old, new):
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def mean_of_all_tokens(model):
    def forward(input_ids, attention_mask, labels):
        hidden = model.base_model(input_ids, attention_mask).last_hidden_state
        logits = hidden.mean(1)[:, :3]
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits.float(), labels), logits)

    model.forward = forward


def around(module, method="forward"):
    """Replace a method of one module by one that reads the tokens before it, too."""
    inner = getattr(type(module), method)
    whole = lambda x, *args, **kwargs: inner(module, x.cumsum(1), *args, **kwargs)  # noqa: E731
    alone = lambda x: inner(module, x.cumsum(1))  # noqa: E731 (transformers counts the arguments of what takes chunks)
    setattr(module, method, whole if method == "forward" else alone)


def around_chunks(model):
    modules = list(layers_of(encoder_of(model))[0].modules())
    found = [(m, name) for m in modules for name in ("feed_forward_chunk", "ff_chunk") if hasattr(m, name)]
    around(*(found or [(part(model, "intermediate"), "forward")])[0])


def with_dropout_on_keys(model):
    key = key_of(model)
    replace(model, key, nn.Sequential(key, nn.Dropout(0.5)))


def doubled(module, *seen):
    """A hook of any kind: twice what it may change."""
    return tuple(None if x is None else 2 * x for x in seen[0])


NORMS = ("LayerNorm", "sa_layer_norm", "full_layer_layer_norm")
PATCHES: dict[str, Any] = {
    "a forward of its own": mean_of_all_tokens,
    "the last layer's forward": lambda model: around(layers_of(encoder_of(model))[-1]),
    "a linear layer's forward": lambda model: around(key_of(model)),
    "a layer's second half": around_chunks,
    "dropout on keys": with_dropout_on_keys,
    "identity in place of a norm": lambda model: replace(model, part(model, *NORMS), nn.Identity()),
    "a parametrization": lambda model: parametrize.register_parametrization(key_of(model), "weight", Twice()),
    "shared attention": lambda model: replace(
        model, part(model, "attention"), layers_of(encoder_of(model))[0].attention
    ),
}
HOOKS = {
    "forward": lambda model: attention_of(model).register_forward_hook(lambda m, args, out: doubled(m, out)),
    "forward pre": lambda model: key_of(model).register_forward_pre_hook(doubled),
    "backward": lambda model: key_of(model).register_full_backward_hook(doubled),
    "backward pre": lambda model: key_of(model).register_full_backward_pre_hook(doubled),
    "pruning's": lambda model: prune.l1_unstructured(key_of(model), "weight", 0.5),
    "the encoder's": lambda model: encoder_of(model).register_forward_hook(
        lambda module, args, out: type(out)(last_hidden_state=out.last_hidden_state.flip(1))
    ),
}


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


EVERY = PATCHES | {f"{name} hook": change for name, change in HOOKS.items()}


@pytest.mark.parametrize("change", EVERY.values(), ids=EVERY)
@six_kinds
def test_a_changed_model_matches_the_changed_whole_one(kind, change):
    """To 12 digits. Each of these was once accepted beforehand, or not seen afterwards."""
    whole, before, after = (made(kind, 0.5).double().train() for _ in range(3))
    for model, steps in (
        (whole, [change]),
        (before, [change, use_exact_dropout, use_lean_encoder]),
        (after, [use_exact_dropout, use_lean_encoder, change]),
    ):
        for step in steps:
            step(model)
    for ours in (before, after):
        assert_same(whole, ours, batch_of([12, 3, 7]), 1e-12)


@six_kinds
def test_a_hook_that_is_removed_leaves_the_model_lean(kind):
    ours, batch = pair(kind)[1].train(), batch_of(LENGTHS["much padding"])
    seen: list[torch.Size] = []
    handle = key_of(ours).register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    run(ours, batch)
    assert seen[-1] == (4, 60, 32)
    handle.remove()
    rows: list[torch.Size] = []

    def noted(x, *rest, real=nn.functional.layer_norm):
        rows.append(x.shape[:2])
        return real(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "layer_norm", noted)
        run(ours, batch)
        assert set(rows) == {(4, 60)}  # under a hook on every module in the process
        everywhere.remove()
        run(ours, batch)
        assert set(rows) == {(4, 60), (1, 128), (1, 4)}


@six_kinds
def test_a_class_of_the_same_name_matches_the_whole_one(kind):
    """Somebody's head that reads all tokens."""
    whole, ours = made(kind).double(), made(kind).double()
    base = type(whole)
    own = type(base.__name__, (base,), {"forward": lambda self, **batch: self.mean(**batch)})
    for model in (whole, ours):
        mean_of_all_tokens(model)
        model.mean = vars(model).pop("forward")
        model.__class__ = own
    use_exact_dropout(ours)
    use_lean_encoder(ours)
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 0.0)


@pytest.mark.parametrize("when", ["before", "afterwards"])
@six_kinds
def test_a_class_with_another_method_matches_the_whole_one(kind, when, monkeypatch):
    """As libraries do that make attention or products faster: for all models in the process."""
    whole, ours = made(kind).double().train(), made(kind).double().train()

    def patch(_):
        owner = type(attention_of(whole))
        inner = owner.forward
        monkeypatch.setattr(
            owner, "forward", lambda self, x, *args, **kwargs: inner(self, x.cumsum(1), *args, **kwargs)
        )

    uses = [use_exact_dropout, use_lean_encoder]
    for step in [patch, *uses] if when == "before" else [*uses, patch]:
        step(ours)
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 0.0)


def with_another_p(model):
    for module in attention_of(model).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3


MODES = {
    "attention": lambda model: part(model, "attention").eval(),
    "self-attention": lambda model: attention_of(model).eval(),
    "a dropout": lambda model: next(m for m in attention_of(model).modules() if isinstance(m, nn.Dropout)).eval(),
    "the last layer": lambda model: layers_of(encoder_of(model))[-1].eval(),
    "all but attention": lambda model: attention_of(model.eval()).train(),
    "p of a dropout": with_another_p,
}


@pytest.mark.parametrize("change", MODES.values(), ids=MODES)
@six_kinds
def test_a_mode_of_its_own_matches_the_whole_one(kind, change):
    """Of one module, frozen alone: it stays lean, and drops what the whole one drops."""
    whole, ours = (model.double().train() for model in pair(kind, 0.5))
    for model in (whole, ours):
        change(model)
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 1e-12)
    assert is_lean(ours, batch_of(LENGTHS["much padding"]))


@pytest.mark.parametrize("checkpointed", [(1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_checkpointing_of_some_layers_matches_the_whole_model(kind, checkpointed):
    """A layer that is computed again in backward has no layout then, and drew other masks."""
    whole, ours = (model.double().train() for model in pair(kind, 0.5))
    for model in (whole, ours):
        for i in checkpointed:
            layer = layers_of(encoder_of(model))[i]
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 0.0)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "albert"])
def test_what_only_transformers_attention_does_matches_the_whole_one(kind):
    """A bias for the scores, as an argument of the model: ours took no notice of it."""
    whole, ours = (model.double().train() for model in pair(kind, 0.5))
    bias = torch.randn(1, 2, 60, 60, dtype=torch.float64)
    batch = batch_of(LENGTHS["much padding"])
    found = [run(model, batch, position_bias=bias)[0].logits for model in (whole, ours)]
    assert torch.equal(*found) and not torch.equal(found[0], run(whole, batch)[0].logits)


def test_an_attention_of_ones_own_under_sdpas_name_is_kept(monkeypatch):
    from transformers import AttentionInterface

    model = made("bert")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: 1 / 0)
    use_exact_dropout(model)
    assert model.config._attn_implementation == "sdpa"


@six_kinds
def test_used_again_with_more_layers_matches_the_whole_one(kind):
    """What was once the last layer is none of the last any more."""
    whole, ours = (model.double().train() for model in pair(kind, 0.5))
    for model in (whole, ours):
        layers = (
            model.albert.encoder.albert_layer_groups[0].albert_layers if kind == "albert" else encoder_of(model).layer
        )
        layers.append(copy.deepcopy(layers[0]))
    if kind != "mpnet":
        ours.set_attn_implementation("sdpa")
    use_exact_dropout(ours)
    use_lean_encoder(ours)
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 1e-12)


@each_variant
def test_making_a_model_lean_draws_nothing(variant):
    """Or the losses of a training would not be those of transformers' model."""
    ours = made(variant)
    use_exact_dropout(ours)
    before = torch.get_rng_state()
    use_lean_encoder(ours)
    assert torch.equal(before, torch.get_rng_state()) and is_lean(ours, batch_of(LENGTHS["much padding"]))


# --- MPNet, whose layers are its own ----------------------------------------------------------------------------------


LAYER_LISTS = {
    "fewer layers": lambda layers: layers[:2],
    "one more": lambda layers: [*layers, copy.deepcopy(layers[0])],
    "the last one again": lambda layers: [*layers, layers[-1]],
    "turned around": lambda layers: list(layers)[::-1],
}


@pytest.mark.parametrize("change", LAYER_LISTS.values(), ids=LAYER_LISTS)
def test_an_mpnet_with_other_layers_matches_the_whole_one(change):
    """In fp64 to 12 digits, dropout included: which layer is the last is asked for in each forward."""
    whole, ours = (model.double().train() for model in pair("mpnet", 0.5))
    for model in (whole, ours):
        model.mpnet.encoder.layer = nn.ModuleList(change(model.mpnet.encoder.layer))
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 1e-12)


ASKED = {  # -> how many tensors the output has
    "output_hidden_states": 2 + 4,
    "output_attentions": 2 + 3,
    "a tuple": 2,
    "a mask of one's own": 2,
    "padding on the left": 2,
}


@pytest.mark.parametrize(("asked", "tensors"), ASKED.items(), ids=ASKED)
def test_what_needs_the_whole_mpnet_gets_it(asked, tensors):
    """Bit for bit the whole model's loss and logits, and what else was asked for."""
    batch, options = batch_of(LENGTHS["much padding"]), {}
    if asked == "a tuple":
        options["return_dict"] = False
    elif asked == "padding on the left":
        batch = {name: value.flip(1) if value.ndim > 1 else value for name, value in batch.items()}
    elif asked == "a mask of one's own":  # padding counts a little
        batch["attention_mask"] = (batch["attention_mask"][:, None, None, :].expand(4, 1, 60, 60) - 1.0) * 2
    else:
        options[asked] = True
    found = []
    for model in pair("mpnet", 0.5):
        torch.manual_seed(0)
        out = model.train()(**batch, **options)
        parts = out if isinstance(out, tuple) else out.to_tuple()
        found.append([x for part in parts for x in (part if isinstance(part, tuple) else (part,))])
    assert len(found[0]) == tensors
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_mpnet_with_torchs_dropout_stays_as_it_is():
    """Of packed tokens torch would draw other masks than of the batch."""
    whole, ours = made("mpnet", 0.5).train(), made("mpnet", 0.5).train()
    use_lean_encoder(ours)
    assert "forward" not in vars(ours.mpnet.encoder)
    assert_same(whole, ours, batch_of(LENGTHS["much padding"]), 0.0)


def test_an_exported_mpnet_matches_the_whole_one():
    """Under torch.export every token is computed, so the program fits other batches of that shape."""
    whole, ours = (model.eval() for model in pair("mpnet"))
    first, second = (batch_of(lengths, 3) for lengths in ([30, 20, 9], [30, 4, 25]))
    for batch in (first, second):
        batch.pop("labels")
    with torch.no_grad():
        program = torch.export.export(ours, (), first).module()
        for batch in (first, second):
            assert torch.allclose(program(**batch).logits, whole(**batch).logits, atol=1e-6)
