"""Models and data that a benchmark makes for itself, in a folder of its own: each function returns the path it made.

Asked again, each returns what is there. Weights are random from a fixed seed: how long a step takes does not depend on
them, and both sides of a comparison load the same ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanofinetune.ground.errors import UsageError

SEED = 42
SIZES = {"2 x 128": (2, 128), "6 x 384": (6, 384), "12 x 768": (12, 768)}  # layers x width
LAYERS, WIDTH, HEADS = 6, 384, 12  # of the other encoders: those of the packaged BERT
NO_SEGMENTS = ["input_ids", "attention_mask"]  # what the tokenizers of models without segments give

# The encoders beside BERT: model type -> what its config calls the sizes, and what else it needs.
USUAL = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH,
}  # fmt: skip
SHIFTED = {"max_position_embeddings": 512 + 2, "type_vocab_size": 1}  # its positions begin behind the padding's
ENCODERS: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 4 * WIDTH},
    "roberta": USUAL | SHIFTED,
    "electra": USUAL | {"embedding_size": WIDTH},
    "albert": USUAL,
    "xlm-roberta": USUAL | SHIFTED,
    "mpnet": USUAL | SHIFTED,
}
WITHOUT_SEGMENTS = ("distilbert", "roberta", "xlm-roberta", "mpnet")


def rows_of(length: int, folder: Path) -> str:
    """A folder of rows that all have `length` tokens: as many words as fit beside the two special tokens."""
    folder = folder / f"rows-{length}"
    if not folder.exists():
        folder.mkdir()
        for split, rows in (("train", 64 * 32), ("validation", 16)):
            words = ["the", "of", "and", "in", "to"]  # each one a token
            with open(folder / f"{split}.jsonl", "w") as file:
                for i in range(rows):
                    text = " ".join(words[(i + k) % len(words)] for k in range(length - 2))
                    file.write(json.dumps({"sentence": text, "label": i % 2}) + "\n")
    return str(folder)


def bert_of(size: str, model: str, folder: Path) -> str:
    """A BERT of that size, beside the tokenizer of `model`."""
    layers, width = SIZES[size]
    sizes = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(2, width // 64),
        "intermediate_size": 4 * width,
    }  # fmt: skip
    return _random("bert", sizes, model, folder / f"model-{size.replace(' ', '')}")


def encoder_of(kind: str, model: str, folder: Path) -> str:
    """Another encoder of the packaged BERT's size, beside the tokenizer of `model`."""
    return _random(kind, ENCODERS[kind], model, folder / f"model-{kind}")


def _random(kind: str, sizes: dict[str, Any], model: str, folder: Path) -> str:
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        inputs = {"model_input_names": NO_SEGMENTS} if kind in WITHOUT_SEGMENTS else {}
        tokenizer = AutoTokenizer.from_pretrained(model, **inputs)
        special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(kind, **sizes, **special)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def with_head(model: str, folder: Path) -> str:
    """The model with a random head for two classes, saved as a trained one is."""
    folder = folder / "model-with-head"
    if not folder.exists():
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(SEED)
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def pairs_of(data: str, folder: Path) -> str:
    """A file of the pairs of a data set's test split, or of its validation split where there is none.

    Raises UsageError where its rows are no pairs in MRPC's columns.
    """
    file = folder / "pairs.jsonl"
    if not file.exists():
        if data == "stdlib-pairs":
            from nanofinetune.data import stdlib_pairs

            rows: Any = stdlib_pairs.load()["validation"]
        else:
            from datasets import load_dataset

            found = load_dataset(data)
            rows = found["test" if "test" in found else "validation"]
            if not {"sentence1", "sentence2"} <= set(rows.column_names):
                raise UsageError(f"--data {data}: predict needs the columns sentence1 and sentence2; name other data")
        with file.open("w") as target:
            for row in rows:
                target.write(json.dumps({name: row[name] for name in ("sentence1", "sentence2")}) + "\n")
    return str(file)
