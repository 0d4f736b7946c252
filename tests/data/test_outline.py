"""What a model looks up before it has weights, against the same model's tables.

python -m pytest tests/data/test_outline.py
"""

from typing import Any

import pytest
import torch
from test_pretrained import tiny_config
from transformers import AutoConfig, AutoModelForSequenceClassification

from nanofinetune.data.outline import outline_of


@pytest.mark.parametrize(
    ("kind", "positions", "first"),
    [("bert", 40, 0), ("roberta", 38, 2), ("mpnet", 38, 2), ("nystromformer", 40, 2), ("opt", 40, 2), ("xmod", 38, 2)],
)
def test_every_position_counts_from_where_the_model_begins(kind, positions, first):
    """`max_position_embeddings` is 40 in all of them; MPNet has a second table, of distances, which is no limit."""
    found = outline_of(tiny_config(kind))
    assert (found.positions, found.first) == (positions, first)


@pytest.mark.parametrize("kind", ["llama", "xlnet", "modernbert", "funnel"])
def test_a_model_without_a_table_has_no_positions(kind):
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    if kind == "xlnet":
        sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    if kind == "funnel":
        sizes = {"d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 16}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    found = outline_of(AutoConfig.for_model(kind, vocab_size=32, **tokens, **sizes))
    assert (found.positions, found.first) == (None, 0)


def test_the_outline_draws_no_random_number_and_names_the_inputs():
    config = tiny_config("distilbert")
    before = torch.get_rng_state()
    found = outline_of(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert "input_ids" in found.inputs and "token_type_ids" not in found.inputs
    assert "token_type_ids" in outline_of(tiny_config("bert")).inputs


def test_a_roberta_without_a_padding_token_needs_one_and_a_gpt2_does_not():
    for kind, needs in (("roberta", True), ("gpt2", False)):
        config = tiny_config(kind)
        config.pad_token_id = None
        assert outline_of(config).needs_padding == needs


def test_a_config_that_differs_has_an_outline_of_its_own():
    """It is kept by the config's content, not by a name."""
    config = tiny_config("bert")
    assert outline_of(config).positions == 40
    config.max_position_embeddings = 24
    assert outline_of(config).positions == 24
    assert (
        AutoModelForSequenceClassification.from_config(config).bert.embeddings.position_embeddings.num_embeddings == 24
    )
