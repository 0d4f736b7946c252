"""What a model's embeddings take, learned from what they look up: how many positions, and which inputs.

>>> from transformers import RobertaConfig
>>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
>>> found = outline_of(RobertaConfig(vocab_size=9, max_position_embeddings=40, pad_token_id=1, **sizes))
>>> found.positions, found.first  # of 40 rows: RoBERTa's first two are padding's
(38, 2)

Underneath: `max_position_embeddings` in the config of `transformers.PreTrainedModel` (transformers 5.23)
  - counts the rows of a table, of which some kinds of model leave the first ones unused; others leave out that they add
    two, have no table, or say -1.
  - Here a model without weights looks up a few tokens. An index that grows by one a token is a position; where it
    begins and how many rows the table has is the limit.

Proof: test_length_limit_is_what_the_model_takes, test_every_position_counts_from_where_the_model_begins in
tests/data/test_pretrained.py and tests/data/test_outline.py.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

SHORT, LONGER = 5, 9  # tokens of the two rows that are looked up
MOST = 2**20  # rows of a table whose end is looked at


class Outline(NamedTuple):
    """What is known of a model before it has weights."""

    positions: int | None  # that its table holds, in tokens of a row; None: it has no table
    first: int  # the index of the first token's position; 0 without a table
    inputs: frozenset[str]  # the names that its `forward` takes; none where it does not say
    segments: int | None  # rows of the table of token types, as the config says
    needs_padding: bool  # without `pad_token_id` in the config it cannot look up anything


def outline_of(config: Any) -> Outline:
    """The outline of the classifier that a config describes. It costs no weights: memory is asked for, not written.

    Raises whatever the library raises for a config that it cannot build.
    """
    kind: Any = type(config)
    return _outline(kind, config.to_json_string(use_diff=False), getattr(config, "pad_token_id", None))


@lru_cache(maxsize=4)
def _outline(kind: Any, text: str, padding: int | None) -> Outline:
    from transformers import AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    config = kind.from_dict(json.loads(text))
    config.return_dict, config.pad_token_id = True, padding
    with torch.random.fork_rng(devices=[]), no_init_weights():
        # underneath: without this a config that names code of its own asks on stdin whether to run it
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False).eval()
    few, failure = _lookups(model, config, SHORT)
    more, _ = _lookups(model, config, LONGER)
    found = []  # (positions, first) of each table
    for table, (high, rows) in few.items():
        first = high - (SHORT - 1)
        if more.get(table, (high, rows))[0] - high == LONGER - SHORT and first >= 0 and rows <= MOST:
            beyond, failure_there = _lookups(model, config, rows - first + 1)
            # Where that goes well, it is a table of distances, in which the far ones share rows.
            if beyond.get(table, (0, 0))[0] >= rows or not isinstance(failure_there, _Enough | None):
                found.append((rows - first, first))
    positions, first = min(found, default=(None, 0))
    inputs, segments = frozenset(inspect.signature(model.forward).parameters), getattr(config, "type_vocab_size", None)
    inputs = inputs if "input_ids" in inputs else frozenset()  # a forward that takes whatever it is given
    return Outline(positions, first, inputs, segments, padding is None and isinstance(failure, TypeError))


def _lookups(model: Any, config: Any, tokens: int) -> tuple[dict[int, tuple[int, int]], Exception | None]:
    """A row of so many tokens -> {the table's id: (highest index looked up, rows)}, and what ended the forward."""
    token = next(number for number in (0, 1) if number != config.pad_token_id)
    row = torch.full((1, tokens), token)
    failure: Exception | None = None
    with torch.inference_mode(), _Noted() as noted:
        try:
            model(input_ids=row, attention_mask=torch.ones_like(row))
        except Exception as error:  # whatever comes behind the embeddings does not matter
            failure = error
    return noted.seen, failure


class _Enough(Exception):
    """The embeddings are behind us: attention begins."""


class _Noted(TorchFunctionMode):
    """Notes which rows of which table are looked up, and leaves out all products, so that no weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[int, int]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.embedding, torch.embedding):
            names = ("input", "weight") if function is F.embedding else ("weight", "input")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            indices, weight = given["input"], given["weight"] if "weight" in given else args[0]
            high = max(self.seen.get(id(weight), (0, 0))[0], int(indices.max()))
            self.seen[id(weight)] = high, len(weight)
            return torch.zeros(*indices.shape, weight.shape[1])
        if function is F.linear:
            return torch.zeros(*args[0].shape[:-1], len(args[1]))
        if function in (torch.matmul, torch.bmm, F.scaled_dot_product_attention):
            raise _Enough
        return function(*args, **kwargs)
