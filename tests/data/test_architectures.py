"""Many architectures, each trained, saved and asked by this package, against transformers' own model in a plain loop.

    python -m pytest tests/data/test_architectures.py             one of each kind of position, padding and head
    python -m pytest tests/data/test_architectures.py -m slow     all of them

The plain loop has transformers' tokenizer, model and schedule, and torch's AdamW; it knows the order of the rows and
the seed of each update's dropout.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import KINDS, save_model
from conftest import ROOT, WORDS, load_script
from torch.utils.data import BatchSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

from nanofinetune import predict
from nanofinetune.data.pretrained import length_limit, load_tokenizer, load_trained
from nanofinetune.step.order import SeedableRandomSampler, mix

ROWS, UPDATES = 30, 4
# What the default run tries: a kind of position, padding or head each, and each shape of the data.
FEW = {
    ("bert", "pair"), ("roberta", "long"), ("gpt2", "one"), ("xlnet", "pair"), ("llama", "long"),
    ("deberta-v2", "regression"), ("modernbert", "classes"), ("mpnet", "pair"),
}  # fmt: skip
SHAPES = ("one", "pair", "long", "classes", "regression")
CASES = [
    pytest.param(kind, shape, marks=() if (kind, shape) in FEW else pytest.mark.slow)
    for kind in KINDS
    for shape in SHAPES
]


def write_table(folder: Path, shape: str) -> list[dict[str, Any]]:
    """Rows of one shape, as a folder with train.jsonl and validation.jsonl -> the training rows."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        count = int(rng.integers(50, 70) if shape == "long" else rng.integers(2, 9))
        row: dict[str, Any] = {"text": " ".join(rng.choice(WORDS, count))}
        if shape == "pair":
            row["other"] = " ".join(rng.choice(WORDS, 5))
        row["label"] = {"classes": "abcde"[i % 5], "regression": float(rng.random())}.get(shape, ("no", "yes")[i % 2])
        rows.append(row)
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def plain_losses(
    model_folder: Path, rows: list[dict[str, Any]], tokenizer_folder: Path, names: list[str]
) -> list[float]:
    """The losses of transformers' own model, with what its documentation says about padding tokens done by hand."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(42)
    head = {"num_labels": len(names)} if names else {"num_labels": 1, "problem_type": "regression"}
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, **head).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    limited = (getattr(model.config, "max_position_embeddings", None) or -1) > 0  # to 40 tokens, wherever they begin
    cut = {"truncation": True, "max_length": 40} if limited else {}
    encoded = [tokenizer(row["text"], *([row["other"]] if "other" in row else []), **cut) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("linear", optimizer, 0, UPDATES)
    losses = []
    for update, chosen in enumerate(BatchSampler(SeedableRandomSampler(rows, data_seed=42), 8, drop_last=False)):
        torch.manual_seed(mix(42, update, 0))
        batch = tokenizer.pad([encoded[i] for i in chosen], return_tensors="pt")
        labels = [names.index(rows[i]["label"]) if names else rows[i]["label"] for i in chosen]
        loss = model(**batch, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_losses_and_answers_are_transformers_own(kind, shape, tmp_path, monkeypatch, capsys):
    """Train, save, predict: four losses, and the answer to each row by itself, from the saved folder."""
    save_model(kind, tmp_path / "model")
    rows = write_table(tmp_path / "data", shape)
    train, output = load_script(ROOT / "train.py"), tmp_path / "out"
    arguments = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--output", output, "--max-steps", UPDATES]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    assert train.run_main("train.py", train.main) == 0, capsys.readouterr().err
    mine = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    names = [] if shape == "regression" else sorted({row["label"] for row in rows})
    theirs = plain_losses(tmp_path / "model", rows, output / "model", names)
    assert len(mine) == UPDATES and mine == pytest.approx(theirs, rel=1e-5)

    folder = str(output / "model")
    tokenizer, library = load_tokenizer(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    limit = length_limit(folder, tokenizer)
    texts = [tuple(row[key] for key in ("text", "other") if key in row) for row in rows[:6]]
    size = 1 if kind in ("funnel", "convbert", "nystromformer") else 6  # these mix padding into a row's answer
    for text, (label, value) in zip(
        texts, predict.predict(texts, load_trained(folder, tokenizer), tokenizer, limit, size), strict=True
    ):
        with torch.inference_mode():
            row = AutoTokenizer.from_pretrained(folder)(*text, truncation=True, max_length=limit, return_tensors="pt")
            logits = library(**row).logits[0]
        if names:
            assert label == names[int(logits.argmax())] and value == pytest.approx(
                float(logits.softmax(-1).max()), rel=1e-4
            )
        else:
            assert label == "score" and value == pytest.approx(float(logits[0]), rel=1e-3, abs=1e-5)
