"""Dropout on a CPU: torch's own masks drawn faster, or (by choice) cheaper masks of our own.

>>> torch.manual_seed(0).initial_seed()
0
>>> kept = torch.ones(10_000) * fast_noise(torch.Size([10_000]), torch.float32, p=0.1)
>>> [round(value, 3) for value in kept.unique().tolist()], 900 < (kept == 0).sum().item() < 1100
([0.0, 1.111], True)

Underneath: `torch.nn.functional.dropout` (torch 2.13) multiplies by noise from `torch.Tensor.bernoulli_`
  - outside Intel's MKL that draws one double a number; `torch_noise` draws the same doubles in a tighter loop;
  - with dropout `torch.nn.functional.scaled_dot_product_attention` takes its plain form, and scans all scores for rows
    that are fully masked; `exact_attention` looks at the mask instead;
  - exact: every result is torch's, bit for bit;
  - fast (`--fast-dropout`): 16 random bits a number, so other masks than torch's.

Proof: test_noise_matches_torch_dropout, test_exact_attention_matches_torch_sdpa in tests/cpu/test_dropout.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanofinetune.ground.errors import UsageError

CHUNK = 2**15  # doubles drawn before they are compared: they stay in the core's cache
EXACT, FAST = "nanofinetune_exact_dropout", "nanofinetune_fast_dropout"  # our attentions, in transformers' table

# --- noise: what a tensor is multiplied by ----------------------------------------------------------------------------


def torch_noise(shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
    """The noise of torch's dropout, a tensor of `shape`: 0 with probability p, else 1 / (1 - p). 0 < p < 1."""
    noise = torch.empty(shape, dtype=dtype)
    return (_by_doubles(noise, 1 - p) if draws_doubles() else noise.bernoulli_(1 - p)).div_(1 - p)


def _by_doubles(out: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """`out.bernoulli_(p)`, where torch draws a double for each number."""
    doubles = torch.empty(min(CHUNK, out.numel()), dtype=torch.float64)
    for part in out.view(-1).split(CHUNK):
        # underneath: bernoulli_ does the same a number at a time, from the draw to the comparison
        torch.lt(doubles[: len(part)].uniform_(generator=generator), p, out=part)
    return out


@cache
def draws_doubles() -> bool:
    """Whether torch's `bernoulli_` draws a double a number on this machine, as torch_noise does."""
    theirs, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    same = torch.equal(torch.empty(1000).bernoulli_(0.9, generator=theirs), _by_doubles(torch.empty(1000), 0.9, ours))
    return same and torch.equal(theirs.get_state(), ours.get_state())


def fast_noise(shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
    """Like torch_noise, with other masks and p rounded to 1/65,536. Raises ValueError for a p that rounds to 1."""
    dropped = round(p * 2**16) if 0 <= p < 1 else 2**16
    if dropped == 2**16:
        raise ValueError(f"p is {p}: it must be at least 0 and below 1")
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
    words = generator.integers(2**64 - 1, size=-(-shape.numel() // 4), dtype=np.uint64, endpoint=True)
    bits = torch.from_numpy(words.view(np.int16)[: shape.numel()]).view(shape)  # -2^15 ... 2^15 - 1, equally likely
    noise = torch.ge(bits, dropped - 2**15, out=torch.empty(shape, dtype=dtype))
    return noise.mul_(2**16 / (2**16 - dropped))


# --- modules and attentions that use it -------------------------------------------------------------------------------


def recorded(x: Any) -> bool:
    """Whether torch records what is done to `x`, to do it again later or on other numbers: leave it to torch then.

    So do torch.compile, torch.export, torch.jit.trace, torch.fx and torch.func.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None  # underneath: torch.func has no public question


class ExactDropout(nn.Dropout):
    """torch.nn.Dropout, bit for bit, drawn faster."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training or not 0 < self.p < 1 or recorded(input):
            return super().forward(input)
        if input.device.type != "cpu" or not input.is_contiguous():
            return super().forward(input)
        return input * self.noise(input)

    def noise(self, x: Tensor) -> Tensor:
        return torch_noise(x.shape, x.dtype, self.p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        register_attentions()  # a model that was saved whole may be loaded where nobody has


class FastDropout(nn.Dropout):
    """torch.nn.Dropout with the masks of fast_noise."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training or self.p == 0 or recorded(input):
            return super().forward(input)
        return input * fast_noise(input.shape, input.dtype, self.p)

    __setstate__ = ExactDropout.__setstate__


def torchs_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention that transformers would call."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def wants_more(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether transformers' attention was asked for what ours does not do: a causal one, a bias, a cache, a cap."""
    causal = getattr(module, "is_causal", False) if given.get("is_causal") is None else given["is_causal"]
    return bool(causal) or any(given.get(name) is not None for name in ("position_bias", "cache", "softcap"))


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads x width) -> (B, heads, S, width)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def exact_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, queries, width), as key and value are
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # (B, 1, queries, keys) bool, True where there is something to attend to
    dropout: float = 0.0,
    scaling: float | None = None,
    queries: int | None = None,  # if these are the first of so many queries: noise is drawn for all, and theirs used
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(QKᵀ/√width + mask)V, as torch's scaled_dot_product_attention -> (B, queries, heads, width)."""
    leave_to_torch = not 0 < dropout < 1 or recorded(query) or query.device.type != "cpu" or wants_more(module, kwargs)
    if attention_mask is not None and not leave_to_torch:  # underneath: torch gives zeros for a fully masked row
        leave_to_torch = attention_mask.dtype != torch.bool or not bool(attention_mask.any(-1).all())
    if leave_to_torch:
        return torchs_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # underneath: torch's plain form computes in fp32 under bf16 too, and scales both Q and K by the scale's root
    low = query.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (tensor.float() if low else tensor for tensor in (query, key, value))
        root = (query.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
        scores = (q * root) @ (k.transpose(-1, -2) * root)  # (B, heads, queries, keys)
        if attention_mask is not None:
            scores += torch.zeros(attention_mask.shape, dtype=scores.dtype).masked_fill_(~attention_mask, -torch.inf)
        weights = scores.softmax(-1)
        batch, heads, here, keys = weights.shape
        noise = torch_noise(torch.Size((batch, heads, queries or here, keys)), weights.dtype, dropout)
        out = (weights * noise[:, :, :here]) @ v
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """exact_attention with fast_noise, all of it in the dtype of the query."""
    if not dropout or recorded(query) or wants_more(module, kwargs):
        return torchs_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        return torchs_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    with torch.autocast("cpu", enabled=False):  # autocast would copy the scores to fp32 for the softmax, and back
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = (query * scale) @ key.transpose(-1, -2)
        if attention_mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores += torch.zeros(attention_mask.shape, dtype=scores.dtype).masked_fill_(~attention_mask, lowest)
        weights = scores.softmax(-1)
        out = (weights * fast_noise(weights.shape, weights.dtype, dropout)) @ value
    return out.transpose(1, 2).contiguous(), None


# The kinds of models that attend as these functions do: encoders with a padding mask, and nothing added to the scores.
KINDS = ("albert", "bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
ATTENTIONS = {EXACT: exact_attention, FAST: fast_attention}
TABLE: dict[str, Any] = dict(ATTENTIONS)  # what goes into transformers' table; lean.py adds its own


def use_exact_dropout(model: Any) -> None:
    """Make a transformers model on a CPU draw torch's masks faster, in place."""
    _replace(model, ExactDropout)
    if model.config.model_type in KINDS and not getattr(model.config, "is_decoder", False) and _is_plain(model):
        attend_with(model, EXACT)  # other kinds may need what this attention lacks


def use_fast_dropout(model: Any) -> None:
    """Give a transformers model on a CPU the masks of fast_noise, in place.

    Raises UsageError for a model of no kind in KINDS, or whose attention is not torch's scaled_dot_product_attention.
    """
    if model.config.model_type not in KINDS or not _is_plain(model):
        kind = f"{model.config.model_type} with {model.config._attn_implementation} attention"
        raise UsageError(f"--fast-dropout knows {', '.join(KINDS)} with sdpa attention; {kind}: leave it out")
    _replace(model, FastDropout)
    attend_with(model, FAST)


def attend_with(model: Any, name: str) -> None:
    """Make the model use the attention that TABLE has under this name."""
    register_attentions()
    model.set_attn_implementation(name)


def register_attentions() -> None:
    """Put TABLE into transformers' tables of attentions and of their masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, attention in TABLE.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)


def _is_plain(model: Any) -> bool:
    """Whether a model attends as transformers' sdpa does, which nobody has replaced in transformers' tables."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    theirs = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]
    return model.config._attn_implementation in ("sdpa", *ATTENTIONS) and theirs == (sdpa_attention_forward, sdpa_mask)


def _replace(model: nn.Module, kind: type[nn.Dropout]) -> None:
    for module in model.modules():
        if type(module) in (nn.Dropout, ExactDropout, FastDropout) and not module.inplace:
            module.__class__ = kind  # keeps p, hooks and mode
