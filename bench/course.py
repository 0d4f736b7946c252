"""The course's job, but for its loop: what the peers' scripts have in common, so that only their loops differ.

`map`, `remove_columns`, `set_format("torch")` and DataCollatorWithPadding prepare the data as the course's section on
data does. The metric is what evaluate's GLUE script calls (numpy's mean, scikit-learn's f1_score); the script itself is
on the Hub only. Like `evaluate.load`, `load_metric` imports it after training, before evaluation's clock starts.

    bench/peer.py                Accelerate
    bench/peer_trainer.py        transformers' Trainer
    bench/peer_fabric.py         Lightning Fabric
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import DatasetDict, load_dataset

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


# --- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line and exit code 2, as in nanofinetune.ground.cli. (To import that would count as a peer's time.)"""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.splitlines()[0]}\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def common_options(name: str, doc: str | None) -> Parser:
    """What all peers take."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=name, description=doc, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--max-steps", type=positive)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--eval-batch-size", type=positive, default=8)
    parser.add_argument("--same-work", action="store_true", help="train.py's batches and dropout seeds")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="gets losses and times, as JSON")
    return parser


def need_one_process(parser: Parser) -> None:
    """The scripts of Trainer and Fabric are not written for ranks: they would draw the same rows on each."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        parser.error(f"WORLD_SIZE={world}: it runs in one process; use bench/peer.py for several")
