"""The course's job: data, loop and evaluation, for the peers' scripts, which differ in who prepares the objects.

`map`, `remove_columns`, `set_format("torch")` and DataCollatorWithPadding prepare the data as the course's section on
data does. The metric is what evaluate's GLUE script calls (numpy's mean, scikit-learn's f1_score); the script itself is
on the Hub only. Like `evaluate.load`, `load_metric` imports it after training, before evaluation's clock starts.

    bench/peer.py                Accelerate
    bench/peer_trainer.py        transformers' Trainer, which has a loop of its own
    bench/peer_fabric.py         Lightning Fabric
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def prepare_data(data: str, tokenizer: Any) -> DatasetDict:
    """The tokenized splits of a data set with columns like MRPC's (sentence1, sentence2) or SST-2's."""
    if data == "stdlib-pairs":
        from datasets import Dataset

        from nanofinetune.data import stdlib_pairs

        raw = DatasetDict({key: Dataset.from_list(rows) for key, rows in stdlib_pairs.load().items()})
    else:
        raw = load_dataset(data)
    raw = DatasetDict({key: raw[key] for key in ("train", "validation")})
    texts = [name for name in ("sentence1", "sentence2", "sentence") if name in raw["train"].column_names]

    def tokenize_function(example: dict[str, Any]) -> Any:
        return tokenizer(*(example[name] for name in texts), truncation=True)

    return raw.map(tokenize_function, batched=True)


def for_a_loop(tokenized: DatasetDict) -> DatasetDict:
    """The course's section "Prepare for training": what Trainer does by itself."""
    names = tokenized["train"].column_names
    tokenized = tokenized.remove_columns([n for n in ("sentence1", "sentence2", "sentence", "idx") if n in names])
    tokenized = tokenized.rename_column("label", "labels")
    tokenized.set_format("torch")
    return tokenized


def same_order(rows: int, seed: int) -> list[int]:
    """The order in which train.py draws the rows of its first epoch."""
    from nanofinetune.step.order import SeedableRandomSampler

    return list(SeedableRandomSampler(range(rows), data_seed=seed))


def same_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout as train.py does before a step."""
    from nanofinetune.step.order import mix

    torch.manual_seed(mix(seed, step, rank))


def loaders(args: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The course's two loaders, training's and validation's, before anybody prepares them."""
    tokenized = for_a_loop(prepare_data(args.data, tokenizer))
    collator = DataCollatorWithPadding(tokenizer=tokenizer)
    order: dict[str, Any] = {"shuffle": True}
    if args.same_work:
        order = {"sampler": same_order(len(tokenized["train"]), args.seed)}
    return (
        DataLoader(tokenized["train"], **order, batch_size=args.batch_size, collate_fn=collator),
        DataLoader(tokenized["validation"], batch_size=args.eval_batch_size, collate_fn=collator),
    )


Metric = Callable[[Sequence[int], Sequence[int]], dict[str, float]]


def load_metric() -> Metric:
    """(references, predictions) -> accuracy and F1."""
    from sklearn.metrics import accuracy_score, f1_score

    return lambda references, predictions: {
        "accuracy": float(accuracy_score(references, predictions)),
        "f1": float(f1_score(references, predictions)),
    }


# --- what a run writes down -------------------------------------------------------------------------------------------


class Trace:
    """The losses, token counts and times of a run: times[0] is when the loop began."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.times: list[float] = [time.time()]

    def add(self, loss: Any, batch: Any) -> None:
        """After a step: each loss is read, as the course's loop does for its progress bar."""
        self.losses.append(loss.item())
        self.times.append(time.time())
        self.tokens.append(int(batch["attention_mask"].sum()))

    def write(self, path: Path, evaluation: float, scores: dict[str, float]) -> None:
        """What bench/throughput.py compares; `evaluation` in seconds."""
        trace = {"losses": self.losses, "tokens": self.tokens, "times": self.times, "evaluation": evaluation}
        path.write_text(json.dumps(trace | scores))

    def result(self, args: Any, began: float, steps_an_epoch: int, scores: dict[str, float]) -> dict[str, Any]:
        """The last line of stdout; the loss is the last epoch's mean."""
        last = self.losses[-steps_an_epoch:]
        return {
            "model": args.model, "data": args.data, "steps": len(self.losses),
            "seconds": time.perf_counter() - began, "loss": sum(last) / len(last), **scores,
        }  # fmt: skip


# --- the course's loop, for whatever has prepared its objects ---------------------------------------------------------


def train(args: Any, model: Any, optimizer: Any, batches: Any, backward: Callable[[Any], None], rank: int = 0) -> Trace:
    """The loop; `backward` is the peer's, in place of `loss.backward()`."""
    num_training_steps = args.max_steps or args.epochs * len(batches)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=num_training_steps
    )
    step, trace = 0, Trace()
    while step < num_training_steps:
        model.train()
        for batch in batches:
            if args.same_work:
                same_dropout(args.seed, step, rank)
            outputs = model(**batch)
            loss = outputs.loss
            backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            trace.add(loss, batch)
            step += 1
            if step == num_training_steps:
                break
    return trace


def evaluate(
    model: Any, batches: Any, gather: Callable[[tuple[Any, Any]], tuple[Any, Any]] = lambda both: both
) -> tuple[dict[str, float], float]:
    """-> (scores, seconds); `gather` is the peer's, of all ranks' predictions and labels."""
    metric = load_metric()
    began = time.time()
    model.eval()
    predictions, references = [], []
    for batch in batches:
        with torch.no_grad():
            outputs = model(**batch)
        found, labels = gather((outputs.logits.argmax(dim=-1), batch["labels"]))
        predictions += found.tolist()
        references += labels.tolist()
    scores = metric(references, predictions)
    return scores, time.time() - began
