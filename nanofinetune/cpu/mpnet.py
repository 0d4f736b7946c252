"""MPNet, computing only what the loss reads: what `lean` does, where attention adds a bias for the tokens' distance.

>>> padding_mask(torch.tensor([[[[0.0, 0.0, -3.4028234663852886e38]]]])).tolist()
[[[[True, True, False]]]]

Underneath: MPNetLayer, MPNetEncoder.compute_position_bias (transformers 5.23)
  - MPNet adds a learned number for the distance of query and key, one for each head, to the scores; transformers'
    attention functions have no place for it, so its layers call none;
  - the bias is copied for every row of the batch: here one, (1, heads, S, S), serves all of them;
  - padding is masked by adding the lowest number to its scores: `padding_mask` finds it there;
  - kept, and left to transformers: as in nanofinetune/cpu/lean.py, whose `encode` calls these layers.

Proof: test_a_lean_model_matches_the_whole_one, test_fewer_rows_are_multiplied in tests/cpu/test_other_encoders.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanofinetune.cpu.dropout import by_heads, recorded


def padding_mask(mask: Tensor | None) -> Tensor | None:
    """A mask that adds 0 or its dtype's lowest number, as bool: True where there is a token. Others as they are."""
    if mask is None or not mask.is_floating_point() or recorded(mask):
        return mask
    real = mask == 0
    return real if bool((real | (mask == torch.finfo(mask.dtype).min)).all()) else mask


def position_bias(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The encoder's compute_position_bias: for packed tokens (1, tokens, width) that of the batch, (1, heads, S, S)."""
    layout = self.layout
    # underneath: of `x` only the shape and the device are read
    x = x if layout is None else x.new_empty(1, layout.length, 0)
    return type(self).compute_position_bias(self, x, *args, **kwargs)


def layer(
    self: Any,
    hidden_states: Tensor,  # (1, tokens, width) with a layout
    attention_mask: Tensor | None = None,  # (B, 1, S, S) bool
    position_bias: Any = None,  # (1, heads, S, S)
    *args: Any,
    layout: Any = None,
    **kwargs: Any,
) -> Any:
    """An MPNetLayer's forward for packed tokens; the last one's for the first tokens -> (1, tokens or B, width)."""
    if layout is None:
        return type(self).forward(self, hidden_states, attention_mask, position_bias, *args, **kwargs)
    layout.layers -= self is layout.last
    attention, heads = self.attention.attn, self.attention.attn.num_attention_heads
    key, value = (by_heads(layout.unpack(part(hidden_states)), heads) for part in (attention.k, attention.v))
    if layout.layers:
        x, query = hidden_states, by_heads(layout.unpack(attention.q(hidden_states)), heads)
    else:  # none is left: only the first tokens are read
        x = layout.first(hidden_states)
        query = by_heads(attention.q(x).transpose(0, 1), heads)
    here = query.shape[2]  # queries: S, or 1
    scores = query * attention.attention_head_size**-0.5 @ key.transpose(-1, -2) + position_bias[:, :, :here]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, :, :here], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if layout.layers:
        weights = attention.dropout(weights)
    else:  # noise is drawn for all queries, as the whole layer does
        full = *weights.shape[:2], layout.length, layout.length
        weights = weights * attention.dropout(weights.new_ones(full))[:, :, :here]
    out = (weights @ value).transpose(1, 2).flatten(2)  # (B, S or 1, heads x width)
    out = layout.pack(out) if layout.layers else out.transpose(0, 1)
    x = self.attention.LayerNorm(self.attention.dropout(attention.o(out)) + x)
    return (self.output(self.intermediate(x), x),)
