"""BERT and its kin, computing only what the loss reads: no padding, and one token per row in the last layer.

>>> layout = Layout(torch.tensor([[True, True, True], [True, False, False]]), multiple=1)
>>> layout.rows.tolist()  # of the batch's 2 x 3 positions: the four that hold tokens
[0, 1, 2, 3]
>>> layout.pack(torch.arange(6.0).view(2, 3, 1)).flatten().tolist()
[0.0, 1.0, 2.0, 3.0]
>>> layout.first(torch.tensor([[[5.0], [6.0], [7.0], [8.0]]])).flatten().tolist()
[5.0, 8.0]

Underneath: the encoders of BERT, RoBERTa, ELECTRA, ALBERT, DistilBERT and MPNet (transformers 5.23)
  - compute every position of a padded batch in every layer, though a classifier reads the first token alone;
  - here each layer works on one (1, tokens, width) tensor without padding; only attention sees (B, S) again;
  - in the last layer only keys and values are computed for all tokens;
  - kept: losses and gradients but for rounding, dropout bit for bit;
  - left to transformers: other masks, gradient checkpointing, `output_hidden_states`, a model that somebody changed
    (layers, attention, adapters, head, methods) or hooks, and whatever records operations (compile, export, trace).

Proof: test_a_lean_model_matches_the_whole_one in tests/cpu/test_lean.py,
test_a_changed_model_matches_the_changed_whole_one in tests/cpu/test_other_encoders.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registrations

from nanofinetune.cpu import mpnet
from nanofinetune.cpu.dropout import (
    ATTENTIONS,
    TABLE,
    ExactDropout,
    FastDropout,
    attend_with,
    by_heads,
    recorded,
    torch_noise,
)

MULTIPLE = 32  # packed tokens are filled up to a multiple: oneDNN compiles a bf16 product for each new number of rows
LEAST = 0.1  # the share of positions that must be padding before packing pays

# --- where the tokens are ---------------------------------------------------------------------------------------------


class _Pack(torch.autograd.Function):
    """(positions, width) -> (tokens, width): the rows that hold a token, each once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.positions = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # underneath: index_select's own backward adds, since a row may have been chosen twice
        return _Unpack.apply(gradients[0], ctx.saved_tensors[0], ctx.positions), None


class _Unpack(torch.autograd.Function):
    """(tokens, width) -> (positions, width), zero where there is no token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, positions: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(positions, x.shape[-1]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Pack.apply(gradients[0], ctx.saved_tensors[0]), None, None


class Layout:
    """Which of a batch's B x S positions are computed: all tokens, and as much padding as fills up `multiple`.

    `rows` are these positions, ascending; None where leaving the others out does not pay.
    """

    def __init__(self, real: Tensor, multiple: int = MULTIPLE, least: float = LEAST) -> None:
        """`real` is (B, S) bool, True where there is a token; each row begins with one."""
        self.batch, self.length = real.shape
        tokens = -(-int(real.sum()) // multiple) * multiple
        self.layers = 0  # how many calls of the last layer are still to come (`encode` and the layer count)
        self.last: Any = None  # that layer
        self.rows: Tensor | None = None
        self.firsts = torch.arange(self.batch) * self.length  # (B,) where in the packed tensor each row begins
        if tokens <= (1 - least) * real.numel():
            order = real.flatten().logical_not().to(torch.int8).argsort(stable=True)  # tokens, then the rest
            self.rows = order[:tokens].sort().values
            self.firsts = torch.searchsorted(self.rows, self.firsts)

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, width) -> (1, tokens, width)"""
        x = x.reshape(-1, x.shape[-1])
        return (x if self.rows is None else _Pack.apply(x, self.rows)).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, tokens, width) -> (B, S, width), zero where nothing was computed"""
        x = x.squeeze(0)  # underneath: the backward of x[0] fills a tensor with zeros and copies into it
        x = x if self.rows is None else _Unpack.apply(x, self.rows, self.batch * self.length)
        return x.view(self.batch, self.length, -1)

    def first(self, x: Tensor) -> Tensor:
        """(1, tokens, width) -> (1, B, width): the first token of each row"""
        return _Pack.apply(x.squeeze(0), self.firsts).unsqueeze(0)


def layout_of(hidden: Tensor, attention_mask: Tensor | None) -> Layout | None:
    """How a batch (B, S, width) is packed; None where its mask (B, 1, S, S) is no padding mask: do not pack it."""
    if hidden.device.type != "cpu" or recorded(hidden):
        return None
    if attention_mask is None:
        return Layout(torch.ones(hidden.shape[:2], dtype=torch.bool))
    if attention_mask.dtype != torch.bool or attention_mask.shape != (len(hidden), 1, *[hidden.shape[1]] * 2):
        return None
    real = attention_mask[:, 0, 0]  # (B, S): the keys that the first query sees; all others must see the same
    same = torch.equal(attention_mask[:, 0], real.unsqueeze(1).expand_as(attention_mask[:, 0]))
    return Layout(real) if same and real[:, 0].all() else None


# --- the model's parts, changed to work on packed tokens --------------------------------------------------------------


class PackedDropout(ExactDropout):
    """Dropout of packed tokens that drops what it would have dropped in the full batch."""

    layout: Layout | None = None

    def noise(self, x: Tensor) -> Tensor:
        if self.layout is None:
            return super().noise(x)
        full = torch.Size((self.layout.batch, self.layout.length, x.shape[-1]))
        noise = self.layout.pack(torch_noise(full, x.dtype, self.p))
        return noise if self.layout.layers else self.layout.first(noise)  # none left: the last one's first tokens


def laid_out(attention: Any) -> Any:
    """An attention function for transformers that also takes packed queries, keys and values, with their layout."""

    def attend(
        module: nn.Module,
        query: Tensor,  # (B, heads, S, width), or (1, heads, tokens, width) with a layout; as key and value are
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if layout is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        heads = query.shape[1]
        query, key, value = (by_heads(layout.unpack(x.transpose(1, 2).flatten(2)), heads) for x in (query, key, value))
        out, _ = attention(module, query, key, value, attention_mask, **kwargs)
        return layout.pack(out.flatten(2)).unflatten(-1, (heads, -1)), None

    return attend


TABLE.update({f"{name}_lean": laid_out(attention) for name, attention in ATTENTIONS.items()})


# --- where the models that we know keep what a layer does -------------------------------------------------------------

# The models whose head reads the first token alone, and where their encoder is.
ENCODERS = {
    "AlbertForSequenceClassification": "albert.encoder",
    "BertForSequenceClassification": "bert.encoder",
    "CamembertForSequenceClassification": "roberta.encoder",
    "DistilBertForSequenceClassification": "distilbert.transformer",
    "ElectraForSequenceClassification": "electra.encoder",
    "MPNetForSequenceClassification": "mpnet.encoder",
    "RobertaForSequenceClassification": "roberta.encoder",
    "XLMRobertaForSequenceClassification": "roberta.encoder",
}


class Parts(NamedTuple):
    """A layer, taken apart."""

    attention: Any  # the module that calls the attention function
    query: nn.Module  # (..., width) -> (..., heads x width of a head), as key and value are
    key: nn.Module
    value: nn.Module
    heads: int
    dropout: float  # of the attention's weights
    rest: Callable[[Tensor, Tensor], Tensor]  # the heads' outcome and the layer's input -> the layer's output


def parts_of(layer: Any) -> Parts:
    """The parts of a layer of BERT's, ALBERT's or DistilBERT's build."""
    name, attention = type(layer).__name__, layer.attention
    if name == "TransformerBlock":  # DistilBERT

        def distilbert(out: Tensor, x: Tensor) -> Tensor:
            x = layer.sa_layer_norm(attention.out_lin(out) + x)
            return layer.output_layer_norm(layer.ffn(x) + x)

        linear = attention.q_lin, attention.k_lin, attention.v_lin
        return Parts(attention, *linear, attention.n_heads, attention.dropout.p, distilbert)
    if name == "AlbertLayer":

        def albert(out: Tensor, x: Tensor) -> Tensor:
            x = attention.LayerNorm(x + attention.output_dropout(attention.dense(out)))
            return layer.full_layer_layer_norm(layer.ff_chunk(x) + x)

        linear = attention.query, attention.key, attention.value
        return Parts(attention, *linear, attention.num_attention_heads, attention.attention_dropout.p, albert)

    def bert(out: Tensor, x: Tensor) -> Tensor:
        return layer.feed_forward_chunk(layer.attention.output(out, x))

    attention = attention.self
    linear = attention.query, attention.key, attention.value
    return Parts(attention, *linear, attention.num_attention_heads, attention.dropout.p, bert)


def layers_of(encoder: Any) -> list[Any]:
    """The layers in the order in which they are called; ALBERT calls one many times."""
    if not hasattr(encoder, "albert_layer_groups"):
        return list(encoder.layer)
    groups, config = encoder.albert_layer_groups, encoder.config
    calls = [int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers)]
    return [layer for group in calls for layer in groups[group].albert_layers]


# --- whether the model is as it was built, and nobody looks on --------------------------------------------------------

METHODS = ("forward", "feed_forward_chunk", "ff_chunk", "compute_position_bias")  # what a layer is computed with
LIBRARIES = ("transformers.", "torch.nn.modules.", "nanofinetune.cpu.")  # whose methods these are
LOOKERS = ("transformers.utils.output_capturing", "torch.utils.module_tracker")  # whose hooks change nothing


def modules_of(model: Any) -> list[nn.Module]:
    """The model and all modules in it but embeddings, which are computed as ever."""
    found, seen = [model], {model}
    for module in found:  # underneath: nn.Module.modules() makes every one's name, which takes far longer
        new = [m for m in module._modules.values() if m not in seen and m is not None]
        found += [m for m in new if not isinstance(m, nn.Embedding)]
        seen.update(new)
    return found


def build_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What `encode` counts on: each module's class, what stands in place of its methods, and how it attends."""
    names = {*METHODS, "is_causal"}
    return [(type(m), () if vars(m).keys().isdisjoint(names) else particulars(m)) for m in modules]


def particulars(module: Any) -> tuple[Any, ...]:
    """A module's methods that are not its class's, and how it attends, if it does."""
    own = vars(module)
    found = [getattr(own[name], "func", own[name]) for name in METHODS if name in own]
    if found and getattr(own.get("forward"), "forward", None) == type(module).forward.__get__(module):
        del found[0]  # what only calls the class's, as autocast's wrapper does
    if "is_causal" in own:
        found += [module.config._attn_implementation, own["is_causal"]]
    return tuple(found)


def as_built(model: Any) -> bool:
    """Whether a model is as transformers builds it from its config, but for what dropout.py and this file put in."""
    import transformers

    kind, act = type(model), getattr(model.config, "hidden_act", "")
    if kind is not getattr(transformers, kind.__name__, None) or not isinstance(act, str):
        return False
    with torch.device("meta"):  # takes no memory, and draws nothing
        plain = build_of(modules_of(kind(copy.deepcopy(model.config))))
    dropouts, ours = (ExactDropout, FastDropout, PackedDropout), (encode, last_layer, mpnet.layer, mpnet.position_bias)
    return plain == [
        (nn.Dropout if kind in dropouts else kind, tuple(one for one in own if one not in ours))
        for kind, own in build_of(modules_of(model))
    ]


def left_alone(modules: list[nn.Module]) -> bool:
    """Whether nobody has hooked the modules, or replaced a method of one's class."""
    kinds = {type(module) for module in modules}
    return not hooked(modules) and all(is_librarys(*(getattr(k, name, None) for name in METHODS)) for k in kinds)


def hooked(modules: list[nn.Module]) -> bool:
    """Whether somebody's hook may see what is computed inside the model, the first one, or change it."""
    found = [
        registrations._global_forward_hooks, registrations._global_forward_pre_hooks,
        registrations._global_backward_hooks, registrations._global_backward_pre_hooks,
    ]  # fmt: skip
    for module in modules[1:]:
        found += module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(getattr(hook, "__module__", "") not in LOOKERS for hooks in found if hooks for hook in hooks.values())


@cache
def is_librarys(*found: Any) -> bool:
    """Whether a class's methods are those that its library wrote."""
    return all(method is None or (getattr(method, "__module__", None) or "").startswith(LIBRARIES) for method in found)


# --- the encoder ------------------------------------------------------------------------------------------------------

UNREAD = {"return_dict", "position_ids", "num_items_in_batch"}  # what a layer may be given, and does nothing with


def begin(model: Any, inputs: Any) -> None:
    """Before the model's forward: its head will read the first token alone. Someone else may read them all."""
    model.head_reads = True


def end(model: Any, inputs: Any, outputs: Any) -> None:
    model.head_reads = False


def encode(
    self: Any,
    model: Any,
    build: list[Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The encoder's forward for packed tokens, while its model is as it was built."""
    from transformers.utils.output_capturing import _active_collector

    layers = layers_of(self)
    # underneath: hooks collect what layers return; and checkpointing computes a layer again when its layout is gone
    full = bool(_active_collector.get()) or any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    full = full or not model.head_reads  # the encoder was called by itself, for its tokens
    asked = [value for name, value in kwargs.items() if name not in UNREAD]  # hidden states, a bias for the scores, ...
    full = full or any(value is not None and value is not False for value in asked)
    full = full or bool(args) or not kwargs.get("return_dict", True)
    modules = modules_of(model)
    full = full or build_of(modules) != build or not left_alone(modules)
    mask = mpnet.padding_mask(attention_mask)
    layout = None if full else layout_of(hidden_states, mask)
    if layout is None:
        return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
    layout.last, layout.layers = layers[-1], sum(layer is layers[-1] for layer in layers)
    informed = [self, *(module for module in self.modules() if isinstance(module, PackedDropout))]
    try:
        for module in informed:
            module.layout = layout
        out = type(self).forward(self, layout.pack(hidden_states), mask, *args, layout=layout, **kwargs)
    finally:
        for module in informed:
            module.layout = None
    out.last_hidden_state = out.last_hidden_state.transpose(0, 1)  # (1, B, width) -> (B, 1, width)
    return out


def last_layer(
    self: Any,
    hidden_states: Tensor,  # (1, tokens, width)
    attention_mask: Tensor | None = None,
    *args: Any,
    layout: Layout | None = None,
    **kwargs: Any,
) -> Tensor:
    """The last layer's forward, for the first tokens: (1, tokens, width) -> (1, B, width)."""
    if layout is not None:
        layout.layers -= 1
    if layout is None or layout.layers:  # ALBERT's is called for the other layers too
        kwargs |= {} if layout is None else {"layout": layout}
        return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
    parts, first = parts_of(self), layout.first(hidden_states)
    query = by_heads(parts.query(first).transpose(0, 1), parts.heads)  # (B, heads, 1, width)
    key, value = (by_heads(layout.unpack(part(hidden_states)), parts.heads) for part in (parts.key, parts.value))
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    attend = ATTENTIONS[self.attends_by]
    dropout = parts.dropout if parts.attention.training else 0.0  # its own mode: it may be frozen alone
    out, _ = attend(
        parts.attention, query, key, value, mask, dropout=dropout, scaling=parts.attention.scaling,
        queries=layout.length,
    )  # fmt: skip
    return parts.rest(out.flatten(2).transpose(0, 1), first)  # of (B, 1, heads, width)


def use_lean_encoder(model: Any) -> None:
    """Make a model of ENCODERS on a CPU compute only what its loss reads, in place; other models stay.

    Call it after `use_exact_dropout` or `use_fast_dropout`: it unpacks the tokens for the attention that those chose.
    """
    name, config, kind = model.config._attn_implementation, model.config, type(model).__name__
    apart = kind == "MPNetForSequenceClassification"  # its layers call no attention function: see mpnet.py
    if kind not in ENCODERS or getattr(config, "is_decoder", False) or getattr(config, "chunk_size_feed_forward", 0):
        return
    if not (apart or name in ATTENTIONS) or not as_built(model):
        return
    encoder = model.get_submodule(ENCODERS[kind])
    unpacked = [layer.attention.attn.dropout for layer in encoder.layer] if apart else []  # that drop scores
    if any(type(module) is nn.Dropout for module in encoder.modules()):
        return  # torch's own dropout would draw for the packed tokens alone, and so other masks
    for module in encoder.modules():
        if type(module) is ExactDropout and module not in unpacked:
            module.__class__ = PackedDropout
    if not hasattr(model, "head_reads"):  # a second call registers nothing twice
        model.register_forward_pre_hook(begin)
        model.register_forward_hook(end, always_call=True)
    model.head_reads = False
    encoder.forward, encoder.layout = encode, None  # for build_of, as the partial below
    if apart:
        encoder.compute_position_bias = partial(mpnet.position_bias, encoder)
        for layer in encoder.layer:
            layer.forward = partial(mpnet.layer, layer)
    else:
        last = layers_of(encoder)[-1]
        last.attends_by, last.forward = name, partial(last_layer, last)
        attend_with(model, f"{name}_lean")
    encoder.forward = partial(encode, encoder, model, build_of(modules_of(model)))  # a partial can be pickled
