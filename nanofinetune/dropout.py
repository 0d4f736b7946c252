"""Dropout on a CPU from 16 random bits a number, in place of torch's generator: another mask, much faster.

>>> torch.manual_seed(0).initial_seed()
0
>>> kept = fast_dropout(torch.ones(10_000), p=0.1)
>>> [round(value, 3) for value in kept.unique().tolist()], 900 < (kept == 0).sum().item() < 1100
([0.0, 1.111], True)

Underneath: `torch.nn.functional.dropout` (torch 2.13) fills a tensor of floats by `torch.Tensor.bernoulli_`, which on a
CPU asks MKL's generator for 32 bits a number, and divides and multiplies by that tensor. `transformers` passes the
probability of attention's dropout to `torch.nn.functional.scaled_dot_product_attention`, which takes the same way, and
checks each row of the mask for having nothing in it, twice. Here numpy's PCG64DXSM gives 64 bits at a time, enough for
four numbers, and the mask is one byte a number. Its seed is drawn from torch's generator, so that whoever seeds that
decides these masks too, whatever the number of threads. They are others than torch's, and p is rounded to 1/65,536 (0.1
to 0.100006; numbers are scaled by what is really kept): so it is a choice, train.py's --fast-dropout, not a default.

Proof: test_fast_dropout_keeps_as_many_as_torch_dropout, test_gradient_passes_where_the_number_did,
test_masks_follow_from_torch_manual_seed, test_attention_matches_sdpa_without_dropout and
test_a_model_matches_itself_in_evaluation in tests/test_dropout.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanofinetune.errors import UsageError

NAME = "nanofinetune_dropout"  # of our attention function, in transformers' table of them


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """(bool tensor of that shape, the probability of True in it): 1 - p, rounded to 1/65,536."""
    # underneath: torch draws the mask as floats, 32 bits a number, then divides them by 1 - p; here 16 bits are drawn
    dropped = round(p * 2**16)
    seed = int(torch.randint(2**62, ()))
    words = np.random.PCG64DXSM(seed).random_raw(-(-shape.numel() // 4))
    bits = torch.from_numpy(words.view(np.int16)[: shape.numel()]).view(shape)  # -2^15 ... 2^15 - 1, each as likely
    return bits >= dropped - 2**15, 1 - dropped / 2**16


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, probability = keep_mask(x.shape, p)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / probability
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] * kept).mul_(ctx.scale), None


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """x with each number zeroed with probability p, the others divided by the probability of staying. 0 <= p < 1."""
    if not 0 <= p < 1 or round(p * 2**16) == 2**16:
        raise ValueError(f"p is {p}: it must be at least 0 and below 1")
    return _Dropout.apply(x, p) if p > 0 else x


class FastDropout(nn.Module):
    """torch.nn.Dropout's place in a model."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return fast_dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


def attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, queries, width), as key and value are
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # (B, 1, queries, keys) bool, True where there is something to attend to
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(QKᵀ/√width + mask)V with our dropout on the softmax -> (B, queries, heads, width)."""
    if not dropout:  # evaluation: torch's own kernel needs no mask of ours
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)  # (B, heads, queries, keys)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = fast_dropout(scores.softmax(-1), dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def use_fast_dropout(model: Any) -> None:
    """Replace every nn.Dropout of a transformers model, and attention's, in place.

    Raises UsageError for a model that is no BERT, or whose attention is not torch's scaled_dot_product_attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config.model_type != "bert" or model.config._attn_implementation not in ("sdpa", NAME):
        kind = f"{model.config.model_type} model with {model.config._attn_implementation} attention"
        raise UsageError(f"--fast-dropout knows BERT with sdpa attention, and this is a {kind}: leave it out")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, FastDropout(child.p))
