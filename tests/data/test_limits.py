"""A config.json that asks for more than the weights hold, in a model folder; transformers 5.23 builds it first.

Run: python -m pytest tests/data/test_limits.py
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert

from nanofinetune.data import limits, pretrained
from nanofinetune.data.limits import built_within, check_counts
from nanofinetune.data.pretrained import length_limit, load_model, load_tokenizer, load_trained
from nanofinetune.ground.errors import UsageError

hypothesis = pytest.importorskip("hypothesis", reason="draws the configs")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

TOO_MUCH = {
    "num_hidden_layers": (10**7, "num_hidden_layers 10000000, and the most is 1,000"),
    "num_labels": (10**9, "num_labels 1000000000, and the most is 100,000"),
    "hidden_size": (10**9, "asks for over .* numbers, more than its weights"),
    "vocab_size": (10**12, "asks for over .* numbers, more than its weights"),
    "intermediate_size": (10**10, "asks for over .* numbers, more than its weights"),
    "max_position_embeddings": (10**10, "asks for over .* numbers, more than its weights"),
    "type_vocab_size": (10**15, "asks for over .* numbers, more than its weights"),
}
NO_COUNT = [
    {"num_hidden_layers": -1}, {"num_hidden_layers": 0}, {"num_hidden_layers": "12"}, {"num_labels": -3},
    {"num_labels": 0}, {"num_attention_heads": -2}, {"n_layer": 10**6}, {"encoder_layers": math.inf},
    {"text_config": {"num_hidden_layers": 10**7}},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, tiny_model) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, **values: Any) -> str:
    """Put these values into the folder's config -> its name."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return str(folder)


@pytest.mark.parametrize("key", TOO_MUCH)
@pytest.mark.parametrize("load", [load_trained, lambda name: load_model(name, ["0", "1"])], ids=["predict", "train"])
def test_a_config_that_asks_for_too_much_is_refused(key, load, folder):
    value, said = TOO_MUCH[key]
    if key == "num_labels":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("id2label", "_"))
    with pytest.raises(UsageError, match=f"^model .*: its config .*{said}"):
        load(change(folder, **{key: value}))


@pytest.mark.parametrize("config", NO_COUNT, ids=str)
def test_what_is_no_count_of_layers_is_refused(config, folder):
    with pytest.raises(UsageError, match=r"its config has .*correct its config.json"):
        check_counts("m", config)
    if "text_config" not in config:
        with pytest.raises(UsageError, match=r"^model .*config"):
            load_trained(change(folder, **config))


def test_the_number_of_one_layer_is_no_count():
    """LLaVA's configs count from the end; -2 is the last layer but one."""
    check_counts("m", {"vision_feature_layer": -2, "some_layer": "last", "num_hidden_layers": 12, "add_layer": True})


def test_every_kind_of_model_is_built_within_its_file(tmp_path):
    """Architectures that need no more than a few sizes: saved, then read."""
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 2}
    sizes |= {"intermediate_size": 32, "pad_token_id": 0}
    other = {
        "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    }
    for kind in ("bert", "roberta", "albert", "electra", "distilbert", "gpt2", "mpnet", "deberta-v2", "xlm-roberta"):
        config = transformers.AutoConfig.for_model(kind, **sizes | other.get(kind, {}))
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path / kind)
        again = load_trained(str(tmp_path / kind))
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("room", [0, 1])
def test_a_model_as_large_as_its_file_is_built_and_one_number_more_is_not(room, monkeypatch):
    """Counted over parameters and buffers, those without numbers: what is read into their places does not count."""
    monkeypatch.setattr(limits, "NEW", 0)
    with torch.device("meta"), built_within("m", lambda: 11 + room):  # 2 x 5 weights and 2 biases
        if room:
            made = torch.nn.Linear(5, 2)
            made.weight = torch.nn.Parameter(torch.zeros(2, 5, device="cpu"))
        else:
            with pytest.raises(UsageError, match="asks for over 11 numbers"):
                torch.nn.Linear(5, 2)
    torch.nn.Linear(500, 2, device="meta")  # outside of the block nothing is counted


def test_a_model_of_many_parts_is_not_built(monkeypatch):
    monkeypatch.setattr(limits, "MOST_MODULES", 5)
    with pytest.raises(UsageError, match="asks for over 5 modules"), built_within("m", lambda: 0):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10)))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10)))


SOME: Any = st.one_of(
    st.sampled_from([10**7, 10**10, 10**30, -1, 0, 1, "12", "", 0.5, math.nan, math.inf, None, True, [], {}])
)
KEYS = st.sampled_from(
    [*tiny_bert().config.to_dict(), "chunk_size_feed_forward", "is_decoder", "pruned_heads", "quantization_config"]
)


@given(changes=st.dictionaries(KEYS, SOME, min_size=1, max_size=2))
def test_any_config_is_read_or_refused_in_one_line(changes, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "model"
    shutil.copytree(tiny_model, folder)
    name = change(folder, **changes)
    try:
        length_limit(name, load_tokenizer(name))
        load_trained(name)
    except UsageError as error:
        assert str(error).startswith(f"model {name}: ") and len(str(error)) < 600


TOKENIZER = {
    "model_max_length": ("x", "its model_max_length is no number"),
    "model_input_names": (["nothing"], "it gives no nothing"),
    "unk_token": ("[NOTHING]", "UNK"),
}


@pytest.mark.parametrize("key", TOKENIZER)
def test_a_tokenizer_that_fails_later_is_refused_at_once(key, folder):
    file = folder / "tokenizer_config.json"
    value, said = TOKENIZER[key]
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=f"its tokenizer cannot be used .*{said}"):
        load_tokenizer(str(folder))


def test_weights_that_are_no_numbers_are_named(folder):
    """Not at the first loss, where it looks like a fault of the rows; and an inf is in the sum what a NaN is."""
    for bad in (math.nan, math.inf):
        model = tiny_bert()
        model.bert.encoder.layer[1].output.dense.bias.data[3] = bad
        model.save_pretrained(folder)
        for load in (load_trained, lambda name: load_model(name, ["0", "1"])):
            with pytest.raises(
                UsageError, match=r"weights hold NaN or infinity \(bert.encoder.layer.1.output.dense.bias"
            ):
                load(str(folder))
    model = tiny_bert()
    model.classifier.weight.data.fill_(3e38)  # their sum is infinite, and none of them is
    model.save_pretrained(folder)
    load_trained(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt"])
def test_a_file_that_is_too_long_to_read_is_named(name, folder, monkeypatch):
    """As large as the disk says; a file of a gigabyte may take no room there."""
    with (folder / name).open("ab") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(UsageError, match=f"its {name} has 268,435,457 bytes"):
        load_trained(str(folder))


def test_the_home_in_a_models_name_is_found(folder, monkeypatch):
    """transformers looks for it on the Hub."""
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_trained("~/model").config.num_labels == 2
    assert length_limit("~/model", load_tokenizer("~/model")) == 64
    assert pretrained.weights_size(str(folder)) == (folder / "model.safetensors").stat().st_size
