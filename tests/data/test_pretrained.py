"""Loading the pretrained model and its tokenizer, against transformers 5.23's own from_pretrained.

python -m pytest tests/data/test_pretrained.py
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import socket
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from helpers import run_python
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from nanofinetune.data import pretrained
from nanofinetune.data.pretrained import (
    DEFAULT_MODEL,
    class_names,
    hub_in_reach,
    length_limit,
    load_model,
    load_tokenizer,
    load_trained,
    looks_like_path,
    resolve_default,
)
from nanofinetune.ground.errors import UsageError


@pytest.fixture
def encoder(tmp_path) -> str:
    """A saved tiny BERT encoder without a head, as a pretrained checkpoint is."""
    tiny_bert().bert.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def classifier(tmp_path) -> str:
    """A saved tiny BERT classifier of two classes."""
    tiny_bert().save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def assert_same_weights(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_load_model_matches_from_pretrained(classes, encoder):
    """Bitwise, the new head included: from the same seed both draw it from torch's generator."""
    torch.manual_seed(7)
    mine, made_anew = load_model(encoder, [f"class {i}" for i in range(classes)])
    torch.manual_seed(7)
    theirs = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=classes)
    assert_same_weights(mine, theirs)
    assert made_anew == ["classifier.bias", "classifier.weight"]
    torch.manual_seed(8)
    assert not torch.equal(load_model(encoder, ["a", "b"])[0].classifier.weight, mine.classifier.weight[:2])


def test_a_trained_head_is_kept_as_from_pretrained_keeps_it(classifier):
    mine, made_anew = load_model(classifier, ["no", "yes"])
    assert made_anew == []
    assert_same_weights(mine, AutoModelForSequenceClassification.from_pretrained(classifier))


def test_a_head_of_another_size_is_made_anew_and_named(classifier):
    """The library refuses it, unless it is told to ignore the sizes of the encoder as well."""
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=3)
    model, made_anew = load_model(classifier, ["a", "b", "c"])
    assert made_anew == ["classifier.bias", "classifier.weight"]
    assert model.classifier.weight.shape == (3, 32) and model.config.num_labels == 3
    assert_same_weights(model.bert, tiny_bert().bert)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_trained_in_fp32(dtype, tmp_path):
    """transformers 5 keeps the checkpoint's dtype: its weights would be updated in half precision."""
    tiny_bert().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in AutoModelForSequenceClassification.from_pretrained(tmp_path).parameters()} == {dtype}
    for model in (load_model(str(tmp_path), ["a", "b"])[0], load_trained(str(tmp_path))):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert_same_weights(model, tiny_bert().to(dtype).float())


@pytest.mark.parametrize("with_head", [False, True], ids=["encoder", "classifier"])
@pytest.mark.parametrize("kept, said", [(3, ""), (2, "encoder.layer 2"), (1, "encoder.layer 1 to 2")])
def test_layers_that_the_config_leaves_out_are_said(kept, said, with_head, tmp_path):
    """transformers loads the shorter model, and reports it as of another task: here a note, and an error to predict."""
    config = tiny_bert().config
    config.num_hidden_layers = 3
    model: Any = AutoModelForSequenceClassification.from_config(config)
    (model if with_head else model.bert).save_pretrained(tmp_path)
    config.num_hidden_layers = kept
    config.save_pretrained(tmp_path)
    assert len(AutoModelForSequenceClassification.from_pretrained(tmp_path).bert.encoder.layer) == kept
    notes: list[str] = []
    shorter, _ = load_model(str(tmp_path), ["a", "b"], notes=notes)
    assert len(shorter.bert.encoder.layer) == kept
    assert notes == ([f"the weights have layers that the config has not ({said}): left out"] if said else [])
    if with_head and said:
        with pytest.raises(UsageError, match=f"layers that its config has not \\({said}\\).*; correct the config"):
            load_trained(str(tmp_path))


def test_missing_encoder_weights_are_refused(tmp_path):
    """The library fills them with random numbers, and says so in a table; the same of a shape that does not fit."""
    one_layer = tiny_bert().config
    one_layer.num_hidden_layers = 1
    BertModel(one_layer).save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not model.bert.encoder.layer[1].output.dense.weight.isnan().any()
    with pytest.raises(UsageError, match=r"16 encoder weights are missing .* first bert\.encoder\.layer\.1\."):
        load_model(str(tmp_path), ["a", "b"])
    config.num_hidden_layers, config.intermediate_size = 1, 48
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"3 encoder weights are missing .* first bert\.encoder\.layer\.0"):
        load_model(str(tmp_path), ["a", "b"])


def test_a_missing_pooler_is_made_anew_as_the_library_makes_it(tmp_path):
    """Checkpoints of masked language models have none. It is a part of BERT's encoder that only the head needs."""
    BertModel(tiny_bert().config, add_pooling_layer=False).save_pretrained(tmp_path)
    _, made_anew = load_model(str(tmp_path), ["a", "b"])
    assert [name for name in made_anew if "pooler" in name] == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]


def test_label_names_are_in_the_config(encoder, tmp_path):
    model, _ = load_model(encoder, ["not_equivalent", "equivalent"])
    model.save_pretrained(tmp_path / "again")
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert config.id2label == {0: "not_equivalent", 1: "equivalent"} and config.label2id["equivalent"] == 1
    assert config.problem_type == "single_label_classification"


def test_classes_that_are_not_numbered_from_0_have_no_names(classifier):
    """In the library's pipeline row 1 of the head gets class 1's name, which its author, it seems, gave to row 0."""
    file = Path(classifier, "config.json")
    for numbers, expected in (("01", ["neg", "pos"]), ("10", ["pos", "neg"]), ("12", ["LABEL_0", "LABEL_1"])):
        names = dict(zip(numbers, ["neg", "pos"], strict=True))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": names}))
        assert class_names(classifier) == expected
    with pytest.raises(UsageError, match=r"its id2label names the classes 1, 2, and its head has those from 0"):
        load_trained(classifier)


def test_the_regression_head_has_one_output_and_a_squared_error(encoder):
    model, _ = load_model(encoder, None)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0.5, 2.0])}
    output = model.eval()(**batch)
    expected = torch.nn.functional.mse_loss(output.logits.squeeze(-1), batch["labels"])
    assert output.logits.shape == (2, 1) and torch.equal(output.loss, expected)


def test_load_trained_wants_a_head(encoder, classifier):
    assert not load_trained(classifier).training
    with pytest.raises(UsageError, match=r"never fine-tuned .*it lacks classifier.bias, .*; fine-tune it"):
        load_trained(encoder)


# --- a stranger's folder ----------------------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
class EvilConfig(BertConfig):
    model_type = "evil"
class EvilModel(BertForSequenceClassification):
    config_class = EvilConfig
class EvilTokenizer(BertTokenizerFast):
    pass
"""
CODE = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForSequenceClassification": "evil.EvilModel",
    "AutoTokenizer": [None, "evil.EvilTokenizer"],
}


@pytest.fixture
def hostile(tmp_path, tiny_tokenizer_dir, monkeypatch):
    """hostile(model_type): a folder whose config, model and tokenizer name code; stdin and every prompt say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))

    def make(model_type: str, **settings: Any) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(tiny_tokenizer_dir, folder)
        tiny_bert().save_pretrained(folder)
        (folder / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
        settings |= {"model_type": model_type, "auto_map": CODE}
        for file, changed in (
            ("config.json", settings),
            ("tokenizer_config.json", {"auto_map": CODE, "tokenizer_class": "EvilTokenizer"}),
        ):
            content = json.loads((folder / file).read_text()) | changed
            (folder / file).write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize(
    ("load", "model_type", "library"),
    [
        (lambda name: length_limit(name, Unlimited()), "evil", AutoConfig),
        (load_tokenizer, "evil", AutoTokenizer),
        (load_tokenizer, "vit", AutoTokenizer),  # a config that transformers knows, and code for all else
        (load_trained, "evil", AutoModelForSequenceClassification),
        (load_trained, "vit", AutoModelForSequenceClassification),
        (lambda name: load_model(name, ["a", "b"]), "vit", AutoModelForSequenceClassification),
    ],
    ids=["config", "tokenizer", "tokenizer alone", "trained", "model alone", "model to train"],
)
def test_the_code_of_a_model_folder_is_never_run(load, model_type, library, hostile, monkeypatch, tmp_path):
    """The library's own call asks on stdin, and a yes there runs it: the file that it then writes shows that it ran."""
    folder = hostile(model_type)
    with pytest.raises(UsageError, match="it comes with code of its own, which is never run here; choose a model"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with contextlib.suppress(Exception):
        library.from_pretrained(folder)
    assert (tmp_path / "ran").exists(), "the library did not run it: this test shows nothing"


def test_a_known_model_type_is_loaded_without_the_code(hostile, tmp_path):
    folder = hostile("bert")
    assert load_model(str(folder), ["a", "b"])[1] == []
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_an_unknown_class_is_refused_where_the_library_takes_another(hostile, tmp_path):
    """The library's makes no token types: both texts of a pair look like one, and nothing says so."""
    folder = hostile("bert")
    with pytest.raises(UsageError, match=r"\(it is a EvilTokenizer, which transformers does not have\)"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("a cat", "a dog")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    assert load_tokenizer(str(folder))("a cat", "a dog")["token_type_ids"][-1] == 1


@pytest.mark.filterwarnings("always")  # torch's would be an error here
@pytest.mark.parametrize("load", [load_trained, lambda name: load_model(name, ["a", "b"])])
def test_a_pickle_in_place_of_the_weights_is_one_line_without_torchs_warning(load, classifier, tmp_path):
    folder = Path(shutil.copytree(classifier, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Path("x")}))
        archive.writestr("archive/version", "3\n")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(UsageError, match="could not be loaded"):
        load(str(folder))
    assert [str(warning.message) for warning in caught] == []
    with warnings.catch_warnings(record=True) as caught, pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert "pickle protocol" in str(caught[0].message)


@pytest.mark.parametrize("attention", ["someone/kernel", "someone/kernel@v1:attend", "paged|someone/kernel"])
def test_an_attention_from_the_hub_is_refused(attention, hostile):
    """With the package `kernels` installed, the library downloads and imports it."""
    folder = hostile("bert", attn_implementation=attention)
    with pytest.raises(UsageError, match=r"its config names code on the Hub .*, which is never run here"):
        load_trained(str(folder))


# --- tokenizer and limit ----------------------------------------------------------------------------------------------


def test_load_tokenizer_matches_from_pretrained(tiny_tokenizer_dir, classifier):
    shutil.copytree(tiny_tokenizer_dir, classifier, dirs_exist_ok=True)
    mine, theirs = load_tokenizer(classifier), AutoTokenizer.from_pretrained(classifier)
    assert mine.get_vocab() == theirs.get_vocab()
    assert mine("the cat sat")["input_ids"] == theirs("the cat sat")["input_ids"]


def test_a_made_up_tokenizer_is_refused(classifier):
    """transformers 5 makes one up for a folder without a vocabulary, and every word is unknown to it."""
    invented = AutoTokenizer.from_pretrained(classifier)
    assert invented("the cat sat")["input_ids"][1:-1] == [invented.unk_token_id] * 3
    with pytest.raises(UsageError, match="it has no tokenizer files; save the tokenizer beside the model"):
        load_tokenizer(classifier)


class Unlimited:
    """A tokenizer that leaves the limit to the model."""

    model_max_length = int(1e30)
    pad_token_id, eos_token_id, padding_side = 1, None, "right"

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 3

    def __len__(self) -> int:
        return 32


def tiny_config(kind: str) -> Any:
    """A config of the kind with 40 rows in its position table."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    if kind in ("electra", "albert"):
        sizes["embedding_size"] = 16
    if kind == "luke":
        sizes |= {"entity_vocab_size": 4, "entity_emb_size": 16}
    if kind == "longformer":
        sizes["attention_window"] = 4
    if kind in ("gpt2", "xlm"):
        names = ("n_embd", "n_layer", "n_head") if kind == "gpt2" else ("emb_dim", "n_layers", "n_heads")
        sizes = dict(zip(names, (16, 1, 2), strict=True))
    if kind == "opt":
        sizes |= {"ffn_dim": 16, "word_embed_proj_dim": 16}
    if kind == "xmod":
        sizes |= {"languages": ["en_XX"], "default_language": "en_XX"}
    if kind == "esm":
        sizes |= {"mask_token_id": 4, "position_embedding_type": "absolute"}
    return AutoConfig.for_model(kind, vocab_size=32, max_position_embeddings=40, pad_token_id=1, **sizes)


@pytest.mark.parametrize(
    "kind",
    [
        "bert", "distilbert", "electra", "albert", "deberta", "deberta-v2", "roformer", "roberta", "xlm-roberta",
        "camembert", "mpnet", "longformer", "data2vec-text", "ibert", "luke", "markuplm", "roberta-prelayernorm",
        "xlm-roberta-xl", "xmod", "esm", "nystromformer", "yoso", "gpt2", "opt", "xlm", "big_bird",
    ],
)  # fmt: skip
def test_length_limit_is_what_the_model_takes(kind, tmp_path):
    """One row of `limit` tokens goes through the model itself, and one of limit + 1 does not."""
    config = tiny_config(kind)
    config.save_pretrained(tmp_path)
    limit = length_limit(str(tmp_path), Unlimited())
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.inference_mode():
        assert model(input_ids=torch.full((1, limit), 5), attention_mask=torch.ones(1, limit)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5), attention_mask=torch.ones(1, limit + 1))


def test_the_smaller_limit_wins_and_room_for_text_is_left(classifier, tiny_tokenizer, monkeypatch):
    assert length_limit(classifier, tiny_tokenizer) == 64
    tiny_tokenizer.model_max_length = 20
    assert length_limit(classifier, tiny_tokenizer) == 20
    tiny_tokenizer.model_max_length = 3
    with pytest.raises(UsageError, match="takes 3 tokens at most, of which 3 are special: no room for text; choose"):
        length_limit(classifier, tiny_tokenizer)


def test_max_length_may_exceed_the_tokenizers_limit_and_not_the_tables(classifier, tiny_tokenizer):
    """The tokenizer's limit is a habit; the table's is the number of its rows: 64."""
    tiny_tokenizer.model_max_length = 20
    assert [length_limit(classifier, tiny_tokenizer, asked) for asked in (4, 20, 64)] == [4, 20, 64]
    for asked, why in (
        (65, "takes 64 tokens at most; choose 4 to 64"),
        (3, "puts 3 special tokens into a pair; choose 4"),
    ):
        with pytest.raises(UsageError, match=f"--max-length {asked}: model .* {why}"):
            length_limit(classifier, tiny_tokenizer, asked)


def test_a_model_without_a_limit_has_none(tmp_path):
    """XLNet's config says -1, which the library's own truncation would take for a length."""
    config = AutoConfig.for_model("xlnet", vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=1)
    assert config.max_position_embeddings == -1
    config.save_pretrained(tmp_path)
    assert length_limit(str(tmp_path), Unlimited()) == pretrained.NO_LIMIT
    assert length_limit(str(tmp_path), Unlimited(), 5000) == 5000


def test_a_config_without_a_padding_token_takes_the_tokenizers(tmp_path):
    """RoBERTa's positions begin behind it: the library's own model raises a TypeError."""
    config = tiny_config("roberta")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    row = {"input_ids": torch.tensor([[5, 6]])}
    with pytest.raises(TypeError):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)(**row)
    tokenizer: Any = Unlimited()
    assert length_limit(str(tmp_path), tokenizer) == 38
    model, _ = load_model(str(tmp_path), ["a", "b"], tokenizer)
    assert model.config.pad_token_id == 1 and model(**row).logits.isfinite().all()


@pytest.mark.parametrize(
    "setting", ["return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"]
)
def test_a_config_that_asks_for_other_outputs_is_trained_and_saved_like_any_other(setting, classifier, tmp_path):
    """transformers' own model returns a tuple, or cannot be saved; of chunks, only some lengths pass."""
    value = {"return_dict": False, "chunk_size_feed_forward": 7}.get(setting, True)
    raw = json.loads(Path(classifier, "config.json").read_text()) | {setting: value}
    Path(classifier, "config.json").write_text(json.dumps(raw))
    notes: list[str] = []
    model, _ = load_model(classifier, ["no", "yes"], notes=notes)
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    output = model.eval()(**batch)
    assert torch.equal(output.loss, tiny_bert().eval()(**batch).loss)
    assert getattr(output, "attentions", None) is None and getattr(output, "hidden_states", None) is None
    assert any(setting in note for note in notes) == (setting != "return_dict")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_trained(classifier)(**batch).loss, output.loss)  # and predict.py's


# --- the forms of weights ---------------------------------------------------------------------------------------------


def weights_as(form: str, folder: Path) -> None:
    """The tiny classifier with its weights in one of the forms that the Hub has."""
    model = tiny_bert()
    if "sharded" in form:
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    else:
        model.save_pretrained(folder)
    if form.endswith("bin"):
        from safetensors.torch import load_file

        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), folder / f"{file.stem.replace('model', 'pytorch_model', 1)}.bin")
            file.unlink()
        for index in folder.glob("*.index.json"):
            text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_every_form_of_weights_in_the_hubs_cache_is_loaded(form, tmp_path, monkeypatch):
    """transformers loads each of them from there without a network; the same model comes from each."""
    number = "0123456789abcdef0123456789abcdef01234567"
    model_folder = tmp_path / "models--someone--tiny"
    (model_folder / "refs").mkdir(parents=True)
    (model_folder / "refs" / "main").write_text(number)
    weights_as(form, model_folder / "snapshots" / number)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert pretrained.is_cached("someone/tiny") and not pretrained.is_cached("someone/other")
    notes: list[str] = []
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    mine, made_anew = load_model(str(model_folder / "snapshots" / number), ["a", "b"], notes=notes)
    assert made_anew == []
    assert_same_weights(mine, tiny_bert())
    assert any("are a pickle" in note for note in notes) == form.endswith("bin")
    with pytest.raises(UsageError, match=f"holds no config.json; name .*snapshots/{number}"):
        load_model(str(model_folder), ["a", "b"])


def test_a_pickle_that_runs_code_is_refused(classifier, tmp_path):
    """torch.load without `weights_only` runs it: the file that it then writes shows that it ran."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    Path(classifier, "model.safetensors").unlink()
    torch.save({"bert": Evil()}, Path(classifier, "pytorch_model.bin"))
    with pytest.raises(UsageError, match="the model could not be loaded"):
        load_model(classifier, ["a", "b"])
    assert not (tmp_path / "ran").exists()
    torch.load(Path(classifier, "pytorch_model.bin"), weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_tokenizer_keeps_to_the_inputs_that_the_model_has(tiny_tokenizer_dir, tmp_path):
    """DistilBERT takes no token types, and one row of RoBERTa's table holds none for a second text."""
    for kind, tables in (("distilbert", {}), ("roberta", {"type_vocab_size": 1})):
        folder = tmp_path / kind
        shutil.copytree(tiny_tokenizer_dir, folder)
        config = tiny_config(kind)
        config.update(tables)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        assert "token_type_ids" in AutoTokenizer.from_pretrained(tiny_tokenizer_dir)("the cat", "the dog")
        tokenizer = load_tokenizer(str(folder))
        row = tokenizer("the cat", "the dog", return_tensors="pt")
        assert set(row) == {"input_ids", "attention_mask"}
        assert load_model(str(folder), ["a", "b"], tokenizer)[0](**row).logits.isfinite().all()
        tokenizer.save_pretrained(tmp_path / f"{kind}-saved")
        assert set(AutoTokenizer.from_pretrained(tmp_path / f"{kind}-saved")("the cat")) == set(row)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(classifier, tiny_tokenizer):
    tiny_tokenizer.add_tokens([f"word{i}" for i in range(32 - len(tiny_tokenizer))])
    assert length_limit(classifier, tiny_tokenizer) == 64
    tiny_tokenizer.add_tokens(["another"])
    with pytest.raises(UsageError, match="has 33 tokens and its embedding table 32 rows; save"):
        length_limit(classifier, tiny_tokenizer)
    with pytest.raises(IndexError):
        tiny_bert()(input_ids=torch.tensor([[tiny_tokenizer.convert_tokens_to_ids("another")]]))


# --- with and without the Hub -----------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch):
    """As if the user had neither asked for offline mode nor had a proxy; what hub_in_reach writes is put back after."""
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


def test_hub_in_reach_asks_the_endpoint(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_in_reach()
        assert os.environ["HF_HUB_OFFLINE"] == "" and not constants.HF_HUB_OFFLINE


def test_hub_out_of_reach_puts_huggingface_hub_offline(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")  # closed again
    assert not hub_in_reach()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE
    online.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("asked twice"))
    assert not hub_in_reach()


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("https://huggingface.co", ("huggingface.co", 443)),
        ("http://mirror.example", ("mirror.example", 80)),
        ("https://mirror.example:8443/hub", ("mirror.example", 8443)),
    ],
)
def test_hub_in_reach_asks_the_port_of_the_scheme(endpoint, address, online):
    asked = []

    def refuse(where: tuple[str, int], timeout: float) -> None:
        asked.append(where)
        raise OSError

    online.setenv("HF_ENDPOINT", endpoint)
    online.setattr(socket, "create_connection", refuse)
    assert not hub_in_reach() and asked == [address]


def test_a_proxy_is_trusted(online):
    online.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    online.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("bypassed the proxy"))
    assert hub_in_reach()


def test_default_model_falls_back_and_says_so(packaged_model, monkeypatch):
    monkeypatch.setattr(pretrained, "is_cached", lambda name: False)
    folder, note = resolve_default()
    assert folder == packaged_model and Path(folder, "config.json").is_file()
    assert note == f"the Hub is out of reach and {DEFAULT_MODEL} is not cached: using the packaged checkpoint instead"
    model, made_anew = load_model(folder, ["a", "b"])
    assert made_anew == ["classifier.bias", "classifier.weight"] and model.num_parameters() > 20e6
    assert length_limit(folder, load_tokenizer(folder)) == 512
    with pytest.raises(UsageError, match=f"model {DEFAULT_MODEL}: the Hub is out of reach"):
        load_tokenizer(DEFAULT_MODEL)  # named by the user, it is never replaced


def test_without_the_packaged_checkpoint_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(pretrained, "is_cached", lambda name: False)
    monkeypatch.setattr(pretrained, "packaged_model", lambda: None)
    with pytest.raises(UsageError, match=r"bert-base-uncased .* out of reach: .*nanofinetune\[offline\].*--model"):
        resolve_default()


@pytest.mark.parametrize(("cached", "reach"), [(True, False), (False, True)])
def test_the_default_is_bert_base_uncased_where_it_can_be_had(cached, reach, monkeypatch):
    monkeypatch.setattr(pretrained, "is_cached", lambda name: cached)
    monkeypatch.setattr(pretrained, "hub_in_reach", lambda: reach)
    assert resolve_default() == (DEFAULT_MODEL, "")


def test_names_on_the_hub_have_one_slash_at_most():
    assert all(looks_like_path(name) for name in ("./x", "~/x", "/x", "a/b/c"))
    assert not any(looks_like_path(name) for name in ("a", "a/b", "a-b.c"))


def test_the_first_import_is_left_out_of_later_collections_and_a_second_one_is_not():
    """What somebody makes before a second call may be garbage one day."""
    code = """
        import gc
        from nanofinetune.data.pretrained import import_library
        print(gc.get_freeze_count())
        import_library()
        first = gc.get_freeze_count()
        print(first)
        made = [[] for _ in range(1000)]
        import_library()
        print(gc.get_freeze_count() - first)
    """
    before, first, more = run_python(code)
    assert before == 0 and first > 100_000 and more == 0


def test_the_import_leaves_the_collector_as_it_was():
    import gc

    before = gc.get_threshold()
    gc.set_threshold(701, 11, 12)
    try:
        pretrained.import_library()
        assert gc.get_threshold() == (701, 11, 12) and gc.isenabled()
    finally:
        gc.set_threshold(*before)
