"""What is trained on what: model, tokenizer, tokens and batches, from train.py's arguments.

>>> batches_of(SimpleNamespace(group_by_length=False, seed=0), range(5), 2, 2).batch_size
2

Underneath: the course builds these by hand, one line each, with `transformers.AutoTokenizer`, `datasets.load_dataset`
and `torch.utils.data.DataLoader`.
  - The data come first: their labels decide the model's head.
  - One rank of a node tokenizes, the others read its cache.
  - Batches are those of all ranks together; their order follows from (seed, epoch), whatever the size of a batch.

Proof: test_the_plan_says_what_will_happen, test_grouping_by_length_pads_less in tests/test_train.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from types import SimpleNamespace  # noqa: F401 (the example above)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from nanofinetune.data.balance import WeighedLoss, balanced
from nanofinetune.data.cache import load_tokens
from nanofinetune.data.head import fit_head
from nanofinetune.data.load import Data
from nanofinetune.data.multilabel import MultiLabelMetric
from nanofinetune.data.pretrained import (
    class_names,
    import_library,
    length_limit,
    load_model,
    load_tokenizer,
    resolve_default,
)
from nanofinetune.ground.cli import MOST, number
from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.ground.progress import for_screen
from nanofinetune.ground.xla import fixed_lengths
from nanofinetune.ranks.shard import steps
from nanofinetune.run.answers import Answers
from nanofinetune.run.best import best_arguments, check_metric
from nanofinetune.run.evaluation import Evaluation
from nanofinetune.run.scores import Scores
from nanofinetune.step.collate import DataCollatorWithPadding
from nanofinetune.step.order import LengthGroupedBatchSampler, SeedableRandomSampler

# Of a model's config: names, places and versions, the head's names, and what is asked of a forward beside its logits.
NOT_COMPUTED_WITH = {
    "_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "id2label",
    "label2id", "problem_type", "text_columns", "finetuning_task", "return_dict", "use_cache", "output_hidden_states",
    "output_attentions", "gradient_checkpointing",
}  # fmt: skip


class Job(NamedTuple):
    """What is trained on what."""

    model: Any
    model_name: str
    made_anew: list[str]
    tokenizer: Any
    data: Data
    train: Any  # a TokenStore
    validation: dict[str, Any]
    collator: Callable[[Any], Any]
    limit: int  # tokens of a row
    multiple: int
    notes: list[str]
    answers: Answers  # what the model said of the first validation split

    def evaluation(self, split: str) -> Evaluation:
        """What collects a validation split's scores, and of the first one what the model says."""
        names = self.data.label_names
        metric = MultiLabelMetric(len(names or ())) if self.data.multi else Scores(self.data.metrics, names)
        return Evaluation(metric, split, self.answers if split == next(iter(self.validation)) else None)

    def examples(self) -> dict[str, str]:
        """Two training rows as the model gets them, with other labels: {"row 1": "[CLS] fine [SEP] -> good", ...}."""
        labels = self.train.dense["label"]
        other = np.flatnonzero((labels != labels[0]).reshape(len(labels), -1).any(axis=1))[:1].tolist()
        found = {}
        separator = self.tokenizer.sep_token or self.tokenizer.eos_token or "\n"
        for row in [0, *other]:
            texts = self.tokenizer.decode(self.train[row]["input_ids"]).split(separator)
            most = 96 // max(1, len(texts) - 1)  # of each text, so that one sees the beginnings of both
            cut = [text if len(text) <= most else f"{text[: most - 4]}... " for text in map(shown, texts)]
            found[f"row {row + 1}"] = f"{separator.join(cut)} -> {self._said(labels[row])}"
        return found

    def _said(self, label: Any) -> str:
        names = self.data.label_names
        if names is None:
            return f"{label:g}"
        has = np.flatnonzero(label).tolist() if self.data.multi else [label]
        return ", ".join(names[k] for k in has) or "none"

    def found(self, optimizer: torch.optim.Optimizer) -> dict[str, str]:
        """What the names stand for: a run goes on only with the same."""
        return {
            "the model": self.model_name, "the data set": self.data.name,
            "the hash of the training rows": self.train.digest(), "the optimizer": type(optimizer).__name__,
            "the hash of the validation rows": " ".join(store.digest() for store in self.validation.values()),
            **{f"{name} of the model's config": value for name, value in settings_of(self.model.config).items()},
        }  # fmt: skip


def settings_of(config: Any) -> dict[str, str]:
    """What a model computes with beside its weights, by the names of its config: two runs with others are not the same.

    >>> settings_of(SimpleNamespace(to_dict=lambda: {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "dtype": None}))
    {'hidden_act': 'gelu', 'layer_norm_eps': '1e-12'}
    """
    known = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPUTED_WITH}
    return {name: v if isinstance(v, str) else json.dumps(v, sort_keys=True, default=str) for name, v in known.items()}


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """The five options of train.py that most people use, with an example each; --help begins with them."""
    add = parser.add_argument_group("what most people use, with an example").add_argument
    add(
        "--data", metavar="NAME",
        help="glue/TASK, stdlib-pairs, a file, a folder or a name on the Hub (default glue/mrpc): --data reviews.csv",
    )  # fmt: skip
    add("--model", metavar="NAME", help="a folder or a name on the Hub (default bert-base-uncased): --model ./my-bert")
    add(
        "--output", metavar="DIR",
        help="gets model/, metrics.jsonl, validation.jsonl, result.json and checkpoints/: --output runs/a",
    )  # fmt: skip
    count = number(int, 1, MOST)
    add("--epochs", metavar="N", type=count, default=3, help="passes over the training rows (default 3): --epochs 5")
    rate = number(float, 0, above=True)
    add("--lr", metavar="RATE", type=rate, default=5e-5, help="learning rate at its peak (default 5e-5): --lr 2e-5")


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of train.py that say how data are read, and which epoch's model is kept."""
    add = parser.add_argument_group("model and data").add_argument
    add(
        "--max-length", metavar="TOKENS", type=number(int, 1, MOST),
        help="longer rows are cut, a pair's longer text first (default: what model and tokenizer take)",
    )  # fmt: skip
    add("--text-columns", metavar="COLUMN", nargs="+", help="one or two columns of text (default: found)")
    add(
        "--label-column", metavar="COLUMN", nargs="+", action=_OneOrMore,
        help="the column of classes or numbers; several: a class each, of 0 and 1 (default: found)",
    )  # fmt: skip
    add(
        "--task", choices=("auto", "single", "multi", "regression"), default="auto",
        help="one class a text, any number of them, or a number; auto goes by the labels (default auto)",
    )  # fmt: skip
    add("--drop-unlabelled", action="store_true", help="leave out rows whose label is empty, NA or -1")
    add("--separator", metavar="MARK", help="of a csv or tsv file: one character, or tab (default: found)")
    add("--encoding", metavar="NAME", help="of a text file, such as cp1252 (default: utf-8, or by its first bytes)")
    add(
        "--class-weights", choices=("balanced",),
        help="balanced: each class counts as much in the loss as any other, however rare (default: each row does)",
    )  # fmt: skip
    best_arguments(parser)


class _OneOrMore(argparse.Action):
    """One value as it is, several as a list: what one was called before there could be several stays so."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def load(args: Any, accelerator: Any, note: str = "") -> Job:
    """Model, tokenizer and tokens; the data first, since the labels decide the model's head."""
    device = accelerator.device
    import_library()
    with accelerator.local_main_process_first():  # one rank of a node tokenizes, the others read its cache
        model_name, model_note = (args.model, "") if args.model is not None else resolve_default()
        tokenizer = load_tokenizer(model_name)
        limit = length_limit(model_name, tokenizer, args.max_length)
        if args.max_length is not None:
            tokenizer.model_max_length = limit  # saved with the model: predict.py cuts where the training did
        data, stores = load_tokens(
            args.data, args.text_columns, args.label_column, args.seed, tokenizer, limit, task=args.task,
            drop_unlabelled=args.drop_unlabelled, separator=args.separator, encoding=args.encoding,
        )  # fmt: skip
        # All that is still asked of the rows is how many there are: their texts would stay in memory to the end.
        data = replace(data, splits={split: range(len(store)) for split, store in stores.items()})
        check_metric(args, data.metrics, None if data.multi else data.label_names)
        changes: list[str] = []
        torch.manual_seed(args.seed)  # the classification head is new, and random
        model, made_anew = load_model(model_name, data.label_names, tokenizer, changes)
        made_anew, head_note = fit_head(model, made_anew, class_names(model_name), data.label_names)
    if data.multi:
        model.config.problem_type = "multi_label_classification"
    notes = [text for text in (model_note, data.note, *changes, head_note, note) if text]
    for line in notes:
        accelerator.print(for_screen(f"note: {shown(line)}", sys.stdout), flush=True)
    model.config.text_columns = list(data.text_columns)  # saved with the model: predict.py asks it for one text or two
    # A batch of one length is one shape of its products, and low-precision kernels are made anew for every shape.
    multiple = 8 if args.group_by_length and args.precision != "no" and limit % 8 == 0 else 1
    collator: Callable[[Any], Any] = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    if device.type == "xla":
        collator = partial(collate_to_fixed_length, tokenizer, fixed_lengths(limit))
    train_store = stores.pop("train")
    if args.class_weights is not None:
        if data.label_names is None or data.multi:
            what = "a row may have several classes" if data.multi else "the label is a number, not a class"
            raise UsageError(f"--class-weights {args.class_weights}: {what}; leave it out")
        weights = balanced(train_store.dense["label"], len(data.label_names))
        model.register_forward_hook(WeighedLoss(weights), with_kwargs=True)
    answers = Answers(data, next(iter(stores.values())).dense["label"])
    return Job(
        model, model_name, made_anew, tokenizer, data, train_store, stores, collator, limit, multiple, notes, answers
    )


def training_loader(args: Any, job: Job, rows_per_group: int, rows_per_step: int) -> DataLoader:
    """All processes' batches: the same rows in the same order, whatever the size of a batch."""
    batches = batches_of(args, job.train, rows_per_step, rows_per_group)
    return DataLoader(job.train, batch_sampler=batches, collate_fn=job.collator)


def batches_of(args: Any, store: Any, rows_per_step: int, rows_per_group: int) -> Any:
    """The batch sampler of all processes together: the same rows in the same order, whatever the size of a batch."""
    if not args.group_by_length:
        return BatchSampler(SeedableRandomSampler(store, data_seed=args.seed), rows_per_step, drop_last=False)
    grouped = LengthGroupedBatchSampler(store.lengths, rows_per_group, args.seed)
    return grouped if rows_per_step == rows_per_group else RebatchedSampler(grouped, rows_per_step)


class RebatchedSampler(Sampler[list[int]]):
    """The rows of another batch sampler, in the same order, in batches of another size.

    >>> list(RebatchedSampler([[5, 1], [0, 4], [2]], batch_size=3))
    [[5, 1, 0], [4, 2]]
    """

    drop_last = False

    def __init__(self, batch_sampler: Iterable[list[int]], batch_size: int) -> None:
        self.batch_sampler = batch_sampler
        self.batch_size = batch_size

    @cached_property
    def _count(self) -> int:
        """Rows of an epoch. Counted once, since they do not change and a loader asks for its length at every batch."""
        return sum(map(len, self.batch_sampler))

    def __iter__(self) -> Iterator[list[int]]:
        return steps(chain.from_iterable(self.batch_sampler), self.batch_size)

    def __len__(self) -> int:
        return -(-self._count // self.batch_size)


def collate_to_fixed_length(tokenizer: Any, lengths: tuple[int, ...], rows: Any) -> Any:
    """Pad to the next of a few lengths: XLA compiles a step anew for every shape that it has not met."""
    longest = max(len(row["input_ids"]) for row in rows)
    width = next(length for length in lengths if length >= longest)
    return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=width)(rows)
