"""A BERT encoder that computes only what the loss reads: no padding, and one token per row in the last layer.

>>> layout = Layout(torch.tensor([[True, True, True], [True, False, False]]), multiple=1)
>>> layout.rows.tolist()  # of the batch's 2 x 3 positions: the four that hold tokens
[0, 1, 2, 3]
>>> layout.pack(torch.arange(6.0).view(2, 3, 1)).flatten().tolist()
[0.0, 1.0, 2.0, 3.0]
>>> layout.first(torch.tensor([[[5.0], [6.0], [7.0], [8.0]]])).flatten().tolist()
[5.0, 8.0]

Underneath: transformers.models.bert.modeling_bert.BertEncoder (transformers 5.23)
  - computes every position of a padded batch in every layer, though `BertPooler` reads the first token alone;
  - here each layer works on one (1, tokens, width) tensor without padding; only attention sees (B, S) again;
  - in the last layer only keys and values are computed for all tokens;
  - kept: losses and gradients but for rounding, dropout bit for bit;
  - left to transformers: other masks, gradient checkpointing, `output_hidden_states`, a model changed afterwards
    (layers, attention, adapters), and whatever records operations (compile, export, trace).

Proof: test_a_lean_model_matches_the_whole_one, test_dropout_matches_the_whole_one in tests/cpu/test_lean.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanofinetune.cpu.dropout import ATTENTIONS, TABLE, ExactDropout, attend_with, recorded, torch_noise

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
        x = x[0] if self.rows is None else _Unpack.apply(x[0], self.rows, self.batch * self.length)
        return x.view(self.batch, self.length, -1)

    def first(self, x: Tensor) -> Tensor:
        """(1, tokens, width) -> (1, B, width): the first token of each row"""
        return _Pack.apply(x[0], self.firsts).unsqueeze(0)


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
    only_first = False  # True in the last layer, which computes first tokens only

    def noise(self, x: Tensor) -> Tensor:
        if self.layout is None:
            return super().noise(x)
        full = torch.Size((self.layout.batch, self.layout.length, x.shape[-1]))
        noise = self.layout.pack(torch_noise(full, x.dtype, self.p))
        return self.layout.first(noise) if self.only_first else noise


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


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads x width) -> (B, heads, S, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def build_of(encoder: Any) -> list[Any]:
    """What `encode` counts on: each layer's attention, each module's class, and which have a forward of their own."""
    attentions = [layer.attention.self.config._attn_implementation for layer in encoder.layer]
    return attentions + [(type(module), "forward" in vars(module)) for module in encoder.modules()]


def encode(
    self: Any, build: list[Any], hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """BertEncoder.forward for packed tokens, while the encoder is as it was built."""
    from transformers.utils.output_capturing import _active_collector

    # underneath: hooks collect what layers return; and checkpointing computes a layer again when its layout is gone
    full = bool(_active_collector.get()) or self.layer[0].gradient_checkpointing or build_of(self) != build
    layout = None if full else layout_of(hidden_states, attention_mask)
    if layout is None:
        return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
    dropouts = [module for module in self.modules() if isinstance(module, PackedDropout)]
    try:
        for dropout in dropouts:
            dropout.layout = layout
        out = type(self).forward(self, layout.pack(hidden_states), attention_mask, *args, layout=layout, **kwargs)
    finally:
        for dropout in dropouts:
            dropout.layout = None
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
    """BertLayer.forward for the first tokens: (1, tokens, width) -> (1, B, width)."""
    if layout is None:
        return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
    attention = self.attention.self
    heads, first = attention.num_attention_heads, layout.first(hidden_states)
    query = by_heads(attention.query(first).transpose(0, 1), heads)  # (B, heads, 1, width)
    key, value = (by_heads(layout.unpack(part(hidden_states)), heads) for part in (attention.key, attention.value))
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    attend = ATTENTIONS[self.attends_by]
    dropout = attention.dropout.p if self.training else 0.0
    out, _ = attend(
        attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, queries=layout.length
    )  # (B, 1, heads, width)
    return self.feed_forward_chunk(self.attention.output(out.flatten(2).transpose(0, 1), first))


def use_lean_encoder(model: Any) -> None:
    """Make a BertForSequenceClassification on a CPU compute only what its loss reads, in place; other models stay.

    Call it after `use_exact_dropout` or `use_fast_dropout`: it unpacks the tokens for the attention that those chose.
    """
    name, config = model.config._attn_implementation, model.config
    known = type(model).__name__ == "BertForSequenceClassification" and name in ATTENTIONS
    if not known or config.is_decoder or config.chunk_size_feed_forward:
        return
    encoder, last = model.bert.encoder, model.bert.encoder.layer[-1]
    for module in encoder.modules():
        if type(module) is ExactDropout:
            module.__class__ = PackedDropout
    for module in last.modules():
        if isinstance(module, PackedDropout):
            module.only_first = True
    last.attends_by = name
    attend_with(model, f"{name}_lean")
    encoder.forward, last.forward = encode, partial(last_layer, last)  # a partial can be pickled
    encoder.forward = partial(encode, encoder, build_of(encoder))
