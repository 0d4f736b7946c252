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
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np  # noqa: F401 (the example above)
import torch

from nanofinetune.data.job import Job
from nanofinetune.data.pretrained import looks_like_path, packaged_model
from nanofinetune.ground.errors import shown
from nanofinetune.ground.progress import plural, wrapped
from nanofinetune.run.answers import INDENT
from nanofinetune.run.resume import Start
from nanofinetune.step.optim import AdamW

WIDTH = 80  # columns of the plan's lines


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
    answers: Any = None  # run/answers.py's Answers: what the model said in the latest evaluation
    told: dict[str, str] = field(default_factory=dict)  # what `print_plan` has printed, for result.json

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


def print_plan(plan: Plan, accelerator: Any, job: Job, scheduler: Any, padding: float) -> None:
    """Everything that a setting may have got wrong, before the first step, in lines of at most WIDTH columns."""
    args, rows_per_step = plan.args, plan.rows_per_step
    data, model, train_store, limit = job.data, job.model, job.train, job.limit
    optimizer: torch.optim.Optimizer = scheduler.optimizer
    processes, updates = plural(accelerator.num_processes, "process", "processes"), scheduler.num_training_steps
    batches, accumulate = math.ceil(len(train_store) / rows_per_step), accelerator.gradient_accumulation_steps
    last_lr = args.lr * scheduler.factor(updates - 1)
    splits = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    names = data.label_names
    label = "a number" if names is None else f"{plural(len(names), 'class', 'classes')}: {', '.join(names[:6])}"
    label = f"any number of {label}" if data.multi else label
    form = f" ({optimizer.form(optimizer.param_groups[0])})" if isinstance(optimizer, AdamW) else ""
    decayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    at_limit = plural(int((train_store.lengths == limit).sum()), "row")
    grouped = " (grouped by length)" if args.group_by_length else ""
    dropout = ", fast dropout (masks of its own)" if args.fast_dropout else ""
    lines = {
        "model": f"{short_name(job.model_name)}, {millions(model.num_parameters())} parameters, "
        f"new: {', '.join(dict.fromkeys(name.rpartition('.')[0] or name for name in job.made_anew)) or 'none'}",
        "data": f"{short_name(data.name)}: {splits} rows",
        "columns": f"{' + '.join(data.text_columns)} -> {data.label_column}",
        "label": label,
        **job.examples(),
        "device": f"{accelerator.device}, {processes} of {plural(torch.get_num_threads(), 'thread')}",
        "batch": f"{rows_per_step // accelerator.num_processes} per process x {processes} x {accumulate} accumulated = "
        f"{plural(rows_per_step * accumulate, 'row')} an update",
        "updates": f"{updates:,} ({plural(batches, 'batch', 'batches')} an epoch)",
        "lr": f"{scheduler.get_last_lr()[0]:.3g} first, {args.lr:.3g} peak, {last_lr:.3g} last; "
        f"warm-up {plural(scheduler.num_warmup_steps, 'update')}",
        "optimizer": f"{type(optimizer).__name__}{form}, weight decay {args.weight_decay:g} on "
        f"{millions(decayed)} parameters, clip norm {'off' if args.clip_norm is None else args.clip_norm}",
        "padding": f"{padding:.1%} of all tokens{grouped}; "
        f"{at_limit} fill{'' if at_limit != '1 row' else 's'} the limit of {limit} tokens",
        "precision": ("fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} (autocast)")
        + dropout,
        "output": "nothing is kept: give --output DIR" if args.output is None else args.output,
    }
    plan.told.update(lines)
    for name, text in lines.items():
        print(wrapped(f"{name:<10} {shown(text)}", WIDTH, indent=INDENT), flush=True)


def short_name(name: str) -> str:
    """What a person calls a model or a data set: a folder by its last name.

    >>> short_name("runs/a/model/"), short_name("bert-base-uncased"), short_name("glue/mrpc")
    ('model', 'bert-base-uncased', 'glue/mrpc')
    """
    if name == packaged_model():
        return "packaged MiniLM-L6"
    place = Path(name).expanduser()
    return os.path.basename(os.path.abspath(place)) if looks_like_path(name) or os.path.lexists(place) else name


def millions(count: int) -> str:
    """A number of parameters in three digits.

    >>> millions(22_713_986), millions(109_483_778), millions(30_000)
    ('22.7 M', '109 M', '30,000')
    """
    return f"{count:,}" if count < 10**6 else f"{count / 10**6:.3g} M" if count < 10**9 else f"{count / 10**9:.3g} G"
