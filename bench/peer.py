"""The peer: the course's training job as the course writes it, with Accelerate, torch, transformers and datasets.

    python bench/peer.py --model PATH --data PATH_OR_NAME --seed 1

The same job as train.py's, in the course's lines: `map`, `remove_columns`, `set_format("torch")`,
DataCollatorWithPadding, torch.optim.AdamW, get_scheduler("linear"), Accelerator.prepare, a loop, `gather_for_metrics`.
What is measured against nanofinetune is measured against this file. The metric is what evaluate's GLUE script calls
(numpy's mean, scikit-learn's f1_score), since the script itself can only be had from the Hub. The last line of stdout
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict, load_dataset
from sklearn.metrics import accuracy_score, f1_score
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler


def prepare_data(data: str, tokenizer: Any) -> DatasetDict:
    """The course's section "Prepare for training", for columns like MRPC's (sentence1, sentence2) or SST-2's."""
    if data == "stdlib-pairs":
        from datasets import Dataset

        from nanofinetune import stdlib_pairs

        raw = DatasetDict({key: Dataset.from_list(rows) for key, rows in stdlib_pairs.load().items()})
    else:
        raw = load_dataset(data)
    raw = DatasetDict({key: raw[key] for key in ("train", "validation")})
    texts = [name for name in ("sentence1", "sentence2", "sentence") if name in raw["train"].column_names]

    def tokenize_function(example: dict[str, Any]) -> Any:
        return tokenizer(*(example[name] for name in texts), truncation=True)

    tokenized = raw.map(tokenize_function, batched=True)
    tokenized = tokenized.remove_columns([*texts, "idx"])
    tokenized = tokenized.rename_column("label", "labels")
    tokenized.set_format("torch")
    return tokenized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--precision", default="no")
    args = parser.parse_args()

    began = time.perf_counter()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenized = prepare_data(args.data, tokenizer)
    collator = DataCollatorWithPadding(tokenizer=tokenizer)
    train_dataloader = DataLoader(tokenized["train"], shuffle=True, batch_size=8, collate_fn=collator)
    eval_dataloader = DataLoader(tokenized["validation"], batch_size=8, collate_fn=collator)

    accelerator = Accelerator(mixed_precision=args.precision, cpu=not torch.cuda.is_available())
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    optimizer = AdamW(model.parameters(), lr=args.lr)
    train_dl, eval_dl, model, optimizer = accelerator.prepare(train_dataloader, eval_dataloader, model, optimizer)
    num_training_steps = args.max_steps or args.epochs * len(train_dl)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=num_training_steps
    )

    step, losses = 0, []
    while step < num_training_steps:
        model.train()
        for batch in train_dl:
            outputs = model(**batch)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step == num_training_steps:
                break

    model.eval()
    predictions, references = [], []
    for batch in eval_dl:
        with torch.no_grad():
            outputs = model(**batch)
        found, labels = accelerator.gather_for_metrics((outputs.logits.argmax(dim=-1), batch["labels"]))
        predictions += found.tolist()
        references += labels.tolist()
    result = {
        "model": args.model, "data": args.data, "steps": step, "seconds": time.perf_counter() - began,
        "loss": sum(losses[-len(train_dl):]) / len(losses[-len(train_dl):]),
        "accuracy": accuracy_score(references, predictions), "f1": f1_score(references, predictions),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
