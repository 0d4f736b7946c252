"""Padding that the model does not notice: which token, on which side, and the same one in model and tokenizer.

>>> bare = SimpleNamespace(pad_token_id=None, eos_token="<end>")
>>> give_padding_token(bare)  # GPT-2 and Llama have none
>>> bare.pad_token
'<end>'

Underneath: `transformers.PreTrainedTokenizerBase.pad`, `transformers.GPT2ForSequenceClassification` (transformers 5.23)
  - A tokenizer without a padding token raises at the first batch; a config without one raises inside the head.
  - Some heads look for the last token that is not the config's padding, whatever the tokenizer pads with.
  - XLNet reads the last token: padded on the right, it reads padding. GPT-2 counts positions from the left. Here one
    row is computed alone and padded; the side that changes nothing is taken.

Proof: test_a_padding_token_comes_from_the_tokenizer, test_the_side_is_the_one_that_changes_nothing,
test_a_trained_decoder_answers_in_a_batch_as_the_pipeline_does_alone in tests/data/test_padding.py.
"""

from __future__ import annotations

from types import SimpleNamespace  # noqa: F401 (the example above)
from typing import Any

import torch

from nanofinetune.data.outline import Outline

MORE = 4  # padding tokens of the row that is tried


def give_padding_token(tokenizer: Any) -> None:
    """Where a tokenizer has no padding token, its end-of-text token becomes it. It may have neither."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # attention leaves it out, and heads take the last token before it


def take_padding_token(model: Any, outline: Outline, tokenizer: Any, notes: list[str]) -> None:
    """Give the model's config the tokenizer's padding token. `notes` gets a line where there was another."""
    config, padding = model.config, tokenizer.pad_token_id
    was = getattr(config, "pad_token_id", None)
    if padding == tokenizer.eos_token_id:
        notes.append(f"the tokenizer's end-of-text token {tokenizer.eos_token} is its padding token too")
    if was == padding or (was is not None and outline.first == was + 1):  # RoBERTa's positions begin behind its own
        return
    config.pad_token_id = padding
    if was is not None:
        notes.append(f"pad_token_id is {was} in the model's config and {padding} in its tokenizer: {padding} is taken")


def keep_padding_token(model: Any, tokenizer: Any) -> None:
    """Make a trained model's tokenizer pad with the config's padding token: a row is then answered as it is alone.

    Where the config names none of the tokenizer's tokens, both get one that no row ends with.
    """
    # underneath: a decoder's head takes the last token that is not the config's padding, and a row alone has none
    config, was = model.config.get_text_config(), tokenizer.pad_token
    known = getattr(config, "pad_token_id", None)
    if isinstance(known, int) and 0 <= known < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
        if tokenizer.pad_token_id == known:
            return
        tokenizer.pad_token = was
    last = tokenizer("a")["input_ids"][-1:]
    others = [tokenizer.pad_token_id, *tokenizer.all_special_ids, *reversed(range(len(tokenizer)))]
    tokenizer.pad_token_id = config.pad_token_id = next(number for number in others if number not in last)


def choose_side(model: Any, outline: Outline, tokenizer: Any, notes: list[str]) -> None:
    """Pad on the side on which a row's answer does not depend on its padding. `notes` gets a line for another side."""
    if outline.positions is not None and tokenizer.padding_side == "right":
        return  # positions that count from the left, as BERT's: no need to try
    other = {"left": "right", "right": "left"}[tokenizer.padding_side]
    try:
        alone = _answer(model, tokenizer, tokenizer.padding_side, 0)
        if _alike(alone, _answer(model, tokenizer, tokenizer.padding_side, MORE)):
            return
        if not _alike(alone, _answer(model, tokenizer, other, MORE)):
            return  # a model that pools or convolves over padding: no side is better
    except Exception:  # the trial before the first update says what is wrong with this model
        return
    notes.append(f"rows are padded on the {other}: padded on the {tokenizer.padding_side}, the model reads the padding")
    tokenizer.padding_side = other
    tokenizer.init_kwargs["padding_side"] = other  # what is saved with the tokenizer


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, side: str, more: int) -> torch.Tensor:
    """The logits of a short row with so many padding tokens."""
    ids = tokenizer("a")["input_ids"]
    width = len(ids) + more
    row = tokenizer.pad(
        {"input_ids": [ids]}, padding="max_length", max_length=width, padding_side=side, return_tensors="pt"
    )
    training = model.training
    logits: torch.Tensor = model.eval()(**row).logits
    model.train(training)
    return logits


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding."""
    return bool((one - other).abs().max() <= 1e-6 + 1e-4 * one.abs().max())
