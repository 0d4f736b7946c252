"""What a run is going to do, known and shown before its first step.

>>> round(padding_fraction(np.array([3, 1, 2, 2]), [[0, 1], [2, 3]]), 6)  # 8 of 10 positions hold tokens
0.2

Underneath: `transformers.Trainer` (transformers 5.23) logs a few of these lines at level INFO when training begins.
  - Here each number that a setting may have got wrong is on the screen first: rows an update, updates, learning rates,
    padding, the precision in force.

Proof: test_the_plan_says_what_will_happen, test_every_option_runs in tests/test_train.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np  # noqa: F401 (the example above)
import torch

from nanofinetune.data.job import Job
from nanofinetune.ground.errors import shown
from nanofinetune.run.resume import Start
from nanofinetune.step.optim import AdamW


@dataclass(frozen=True)
class Plan:
    """What a run is to do, known before its first step.

    A *step* is the batches, one a rank, that all ranks work on at the same time. A *window* is the batches that a rank
    accumulates into one *update* of the weights. A *row* is one training example.
    """

    args: Any  # train.py's command line, of which a run reads output, save_every, keep, on_nan and seed
    rows: int  # of the training split
    rows_per_step: int  # of all ranks together
    accumulate: int  # batches of a window
    updates: int  # of the whole run
    start: Start  # the checkpoint to resume from, if any
    identity: Mapping[str, Any]  # what a run must have in common with the one that it resumes: `run_of`
    new_loader: Callable[[int], Any]  # rows of a step -> an unprepared loader of the same rows in the same order

    @property
    def rows_per_update(self) -> int:
        return self.rows_per_step * self.accumulate

    @property
    def epochs(self) -> int:
        """How many epochs are begun; --max-steps may leave the last one early."""
        return math.ceil(self.updates / math.ceil(self.rows / self.rows_per_update))


def padding_fraction(lengths: Any, batches: Iterable[list[int]], multiple: int = 1) -> float:
    """The share of all tokens of the first epoch's batches that is padding, up to a multiple of so many tokens."""
    widths = (len(batch) * multiple * math.ceil(lengths[batch].max() / multiple) for batch in batches)
    return float(1 - lengths.sum() / sum(widths))


def print_plan(args: Any, accelerator: Any, job: Job, scheduler: Any, padding: float, rows_per_step: int) -> None:
    """Everything that a setting may have got wrong, before the first step."""
    data, model, train_store, limit = job.data, job.model, job.train, job.limit
    optimizer: torch.optim.Optimizer = scheduler.optimizer
    processes, updates = accelerator.num_processes, scheduler.num_training_steps
    batches, accumulate = math.ceil(len(train_store) / rows_per_step), accelerator.gradient_accumulation_steps
    last_lr = args.lr * scheduler.factor(updates - 1)
    splits = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    names = data.label_names
    label = "a number" if names is None else f"{len(names)} classes: {', '.join(names[:6])}"
    label = f"any number of {label}" if data.multi else label
    form = f" ({optimizer.form(optimizer.param_groups[0])})" if isinstance(optimizer, AdamW) else ""
    decayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    at_limit = int((train_store.lengths == limit).sum())
    grouped = ", grouped by length" if args.group_by_length else ""
    dropout = ", fast dropout (masks of its own)" if args.fast_dropout else ""
    lines = {
        "model": f"{job.model_name}, {model.num_parameters():,} parameters, new: {', '.join(job.made_anew) or 'none'}",
        "data": f"{data.name}, {splits} rows; {' + '.join(data.text_columns)} -> {data.label_column} ({label})",
        **job.examples(),
        "device": f"{accelerator.device}, {processes} process(es) of {torch.get_num_threads()} thread(s)",
        "batch": f"{rows_per_step // processes} per process x {processes} process(es) x {accumulate} accumulated = "
        f"{rows_per_step * accumulate} rows an update",
        "updates": f"{updates:,} ({batches:,} batches an epoch)",
        "lr": f"{scheduler.get_last_lr()[0]:.3g} first, {args.lr:.3g} peak, {last_lr:.3g} last; "
        f"warm-up {scheduler.num_warmup_steps:,} updates",
        "optimizer": f"{type(optimizer).__name__}{form}, weight decay {args.weight_decay:g} on "
        f"{decayed:,} parameters, clip norm {'off' if args.clip_norm is None else args.clip_norm}",
        "padding": f"{padding:.1%} of all training tokens{grouped}; {at_limit:,} rows fill the limit of {limit} tokens",
        "precision": ("fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} (autocast)")
        + dropout,
    }
    print("\n".join(f"{name:<10} {shown(text)}" for name, text in lines.items()), flush=True)
