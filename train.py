#!/usr/bin/env python3
"""Fine-tune a BERT on a text classification task: the Hugging Face course's loop, top to bottom.

    python train.py                                              bert-base-uncased on GLUE MRPC, one process
    torchrun --nproc_per_node=4 train.py                         the same on four (or: ./launch.sh -n 4)
    python train.py --data glue/cola --lr 2e-5 --output runs/cola
    python train.py --model ./my-bert --data reviews.csv --precision bf16 --group-by-length
    python train.py --output runs/long --save-every 200 --resume auto        stop it, start it again: it goes on
    python train.py --dry-run                                    print the plan and stop

The course imports its pieces from the libraries; here each comes from one file of nanofinetune/. The lines that
the course's Accelerate listing changes in its plain loop are marked `# accelerate`, and so is `accumulate`, which that
listing does not have. Differs from the course on purpose: everything is seeded; no weight decays unless --weight-decay
says so (torch's AdamW: all, by 0.01); a window of accumulated batches is divided by its true number of rows; N
processes compute the gradient of one process with N times the batch; on a CPU the model leaves out what its loss does
not read; evaluation batches are sorted by length, and the ranks add up their counts once, at the end of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch.utils.data import BatchSampler, DataLoader

from nanofinetune import Accelerator, AdamW, DataCollatorWithPadding, get_scheduler
from nanofinetune.cpu.dropout import use_exact_dropout, use_fast_dropout
from nanofinetune.cpu.embedding import use_row_gradients
from nanofinetune.cpu.lean import use_lean_encoder
from nanofinetune.cpu.memory import keep_freed_memory
from nanofinetune.data.cache import load_tokens
from nanofinetune.data.load import Data
from nanofinetune.data.pretrained import import_library, length_limit, load_model, load_tokenizer, resolve_default
from nanofinetune.ground.cli import Parser, number, run_main, steps_or_ratio
from nanofinetune.ground.errors import Halt, UsageError, first_line, shown
from nanofinetune.ground.precision import PRECISIONS
from nanofinetune.ground.process import peak_rss_mb, seconds_since_start
from nanofinetune.ground.xla import end_step, fixed_lengths, state_on_host
from nanofinetune.ranks.collectives import agree, broadcast_object_list, gather_object
from nanofinetune.ranks.loader import prepare_data_loader
from nanofinetune.ranks.world import TIMEOUT
from nanofinetune.run.resume import Start, batch_plan, find_start, run_of
from nanofinetune.run.run import Plan, Run
from nanofinetune.run.watch import preflight
from nanofinetune.settings import DataLoaderConfiguration
from nanofinetune.step.metrics import Metric, UndefinedMetricWarning
from nanofinetune.step.optim import decay_groups
from nanofinetune.step.order import (
    LengthGroupedBatchSampler,
    RebatchedSampler,
    SeedableRandomSampler,
    SortedBatchSampler,
)
from nanofinetune.step.schedule import SCHEDULES


def train(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any] | None:
    """The whole run -> the result, as it is printed; None for a dry run."""
    keep_freed_memory()
    preflight(accelerator.world)  # ranks that cannot talk are found before any long work
    start = common_start(args, accelerator)  # a checkpoint to go on from, or nothing

    # --- data and model ---
    job = load(args, accelerator, start)
    model, rows = job.model, len(job.train)

    # --- batches of all processes together; their order is a function of (seed, epoch) alone ---
    rows_per_step, accumulate = batch_plan(args.batch_size, args.accumulate, accelerator.num_processes, start)
    accelerator.gradient_accumulation_steps = accumulate
    new_loader = partial(training_loader, args, job, start.rows_per_step or rows_per_step)
    train_loader: Any = new_loader(rows_per_step)

    # --- optimizer and schedule: the schedule counts updates, neither batches nor processes ---
    updates = args.max_steps or args.epochs * math.ceil(rows / (rows_per_step * accumulate))
    if args.warmup_steps > updates:
        raise UsageError(f"--warmup-steps {args.warmup_steps}: the run has only {updates} updates; choose fewer")
    optimizer = AdamW(decay_groups(model, args.weight_decay), lr=args.lr)
    scheduler = get_scheduler(args.schedule, optimizer, args.warmup_steps, updates)

    identity = run_of(vars(args), accelerator.num_processes, job.found(optimizer), start)
    plan = Plan(args, rows, rows_per_step, accumulate, updates, start, identity, new_loader)
    padding = padding_fraction(job.train.lengths, train_loader.batch_sampler, job.multiple)
    if accelerator.is_main_process:
        print_plan(args, accelerator, job, scheduler, padding, rows_per_step)
    if args.dry_run:
        return None
    # accelerate
    model, optimizer, train_loader, scheduler = accelerator.prepare(model, optimizer, train_loader, scheduler)

    # --- the loop: the course's. `run` is what the course leaves to luck: nanofinetune/run/run.py ---
    with Run(plan, accelerator, model, optimizer, scheduler, train_loader) as run:
        for epoch in run.epochs():
            model.train()
            for batch in run.batches(epoch):  # accelerate: this rank's rows, on the device already
                with accelerator.accumulate(model), run.step():  # accelerate: gradients travel once a window
                    loss = None  # frees the forward before it, if its backward ran out of memory
                    loss = model(**batch).loss
                    accelerator.backward(loss)  # accelerate: in place of loss.backward()
                    if run.agreed(loss):  # a window's end: on every rank there was memory, and the loss is a number
                        if args.clip_norm is not None:
                            accelerator.clip_grad_norm_(model.parameters(), args.clip_norm)
                        optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            run.end_epoch(evaluate_all(args, accelerator, model, job))

    result = summary(args, accelerator, job, run.log, padding)
    if run.output and accelerator.is_main_process:
        whole = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        save(run.output, whole, job.tokenizer, result, run.log.evaluations, args)
    accelerator.wait_for_everyone()
    return result


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

    def found(self, optimizer: torch.optim.Optimizer) -> dict[str, str]:
        """What the names stand for: a run goes on only with the same."""
        return {
            "the model": self.model_name, "the data set": self.data.name,
            "the hash of the training rows": self.train.digest(), "the optimizer": type(optimizer).__name__,
        }  # fmt: skip


def common_start(args: argparse.Namespace, accelerator: Accelerator) -> Start:
    """What --output and --resume ask for: rank 0 looks what is there, and tells the others."""
    if args.output is None and args.resume is None:
        return Start()
    # A node counts its own restarts: another one's ranks may know of none.
    restarted = bool(agree([os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"], accelerator.world)[0])
    with accelerator.main_process_first():
        found = [find_start(args, restarted) if accelerator.is_main_process else None]
    return broadcast_object_list(found, accelerator.world)[0]


def load(args: argparse.Namespace, accelerator: Accelerator, start: Start) -> Job:
    """Model, tokenizer and tokens; the data first, since the labels decide the model's head."""
    device = accelerator.device
    import_library()
    with accelerator.local_main_process_first():  # one rank of a node tokenizes, the others read its cache
        model_name, model_note = (args.model, "") if args.model is not None else resolve_default()
        tokenizer = load_tokenizer(model_name)
        limit = length_limit(model_name, tokenizer)
        data, stores = load_tokens(args.data, args.text_columns, args.label_column, args.seed, tokenizer, limit)
        notes = [note for note in (model_note, data.note, start.note) if note]
        for note in notes:
            accelerator.print(f"note: {shown(note)}", flush=True)
        torch.manual_seed(args.seed)  # the classification head is new, and random
        model, made_anew = load_model(model_name, data.label_names)
        if args.fast_dropout and device.type != "cpu":
            raise UsageError(f"--fast-dropout: only on a CPU, and the device is {device}; leave it out")
        if device.type == "cpu":  # the same numbers but for rounding, faster; --fast-dropout has masks of its own
            use_row_gradients(model)  # an optimizer that writes into `.grad.data` would need it left out
            (use_fast_dropout if args.fast_dropout else use_exact_dropout)(model)
            use_lean_encoder(model)
    model.config.text_columns = list(data.text_columns)  # saved with the model: predict.py asks it for one text or two
    # A batch of one length is one shape of its products, and low-precision kernels are made anew for every shape.
    multiple = 8 if args.group_by_length and args.precision != "no" and limit % 8 == 0 else 1
    collator: Callable[[Any], Any] = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    if device.type == "xla":
        collator = partial(collate_to_fixed_length, tokenizer, fixed_lengths(limit))
    train_store = stores.pop("train")
    return Job(model, model_name, made_anew, tokenizer, data, train_store, stores, collator, limit, multiple, notes)


def training_loader(args: argparse.Namespace, job: Job, rows_per_group: int, rows_per_step: int) -> DataLoader:
    """All processes' batches: the same rows in the same order, whatever the size of a batch."""
    batches = batches_of(args, job.train, rows_per_step, rows_per_group)
    return DataLoader(job.train, batch_sampler=batches, collate_fn=job.collator)


def summary(args: Any, accelerator: Accelerator, job: Job, log: Any, padding: float) -> dict[str, Any]:
    main_metric = job.data.metrics[0]  # "best" is where it is greatest: an error would have to be negated
    device = accelerator.device
    return {
        "model": job.model_name,
        "data": job.data.name,
        "world": accelerator.num_processes,
        "steps": log.update,
        "seconds": round(seconds_since_start(), 3),
        "examples_per_second": round(log.examples / log.seconds, 2),
        "first_step_seconds": round(log.first_step_seconds, 3),
        "peak_rss_mb": round(accelerator.gather(torch.tensor(peak_rss_mb(), device=device)).max().item(), 1),
        "padding": round(padding, 4),
        **{key: value for key, value in log.evaluations[-1].items() if key != "epoch"},
        "best": max(log.evaluations, key=lambda found: -math.inf if found[main_metric] is None else found[main_metric]),
        "device": str(device),
        "precision": accelerator.mixed_precision,
        "notes": job.notes,
    }


def evaluate_all(args: Any, accelerator: Accelerator, model: Any, job: Job) -> dict[str, Any]:
    """MNLI has two validation splits: the first's scores have plain names."""
    scores: dict[str, Any] = {}
    for name, store in job.validation.items():
        score = evaluate(accelerator, model, store, job.collator, args.eval_batch_size, Metric(job.data.metrics))
        prefix = "" if name == next(iter(job.validation)) else f"{name}_"
        scores |= {prefix + key: value for key, value in score.items()}
    return scores


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, model: Any, store: Any, collator: Callable[[Any], Any], batch_size: int, metric: Metric
) -> dict[str, Any]:
    """The task's metrics over every row of the store, each counted once; `undefined` names the values that are 0/0."""
    loader: Any = DataLoader(store, batch_sampler=SortedBatchSampler(store.lengths, batch_size), collate_fn=collator)
    # Ranks may get different numbers of batches: nothing is reduced before the end, so nobody waits and no row repeats.
    loader = prepare_data_loader(
        loader, accelerator.device, accelerator.num_processes, accelerator.process_index,
        put_on_device=True, even_batches=False, non_blocking=True,
    )  # fmt: skip
    model = accelerator.unwrap_model(model).eval()
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()  # (B, classes), or (B, 1) to regress
        predictions = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        metric.add_batch(predictions=predictions, references=labels)
        end_step(accelerator.device)
    if metric.reduction == "sum":
        counts = metric.state().to(accelerator.device)
        metric.load_state(accelerator.reduce(counts, "sum"))  # the one meeting of the ranks
    else:  # correlations need the values themselves
        metric.load_state(torch.cat(gather_object([metric.state()], accelerator.world), dim=1))
    if len(metric) != len(store):
        raise RuntimeError(f"{len(metric)} rows were scored and the split has {len(store)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # it goes into the result instead
        scores: dict[str, Any] = metric.compute()
    scores = {name: None if math.isnan(value) else value for name, value in scores.items()}  # JSON has no NaN
    return scores | ({"undefined": metric.undefined} if metric.undefined else {})


def collate_to_fixed_length(tokenizer: Any, lengths: tuple[int, ...], rows: Any) -> Any:
    """Pad to the next of a few lengths: XLA compiles a step anew for every shape that it has not met."""
    longest = max(len(row["input_ids"]) for row in rows)
    width = next(length for length in lengths if length >= longest)
    return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=width)(rows)


def batches_of(args: argparse.Namespace, store: Any, rows_per_step: int, rows_per_group: int) -> Any:
    """The batch sampler of all processes together: the same rows in the same order, whatever the size of a batch."""
    if not args.group_by_length:
        return BatchSampler(SeedableRandomSampler(store, data_seed=args.seed), rows_per_step, drop_last=False)
    grouped = LengthGroupedBatchSampler(store.lengths, rows_per_group, args.seed)
    return grouped if rows_per_step == rows_per_group else RebatchedSampler(grouped, rows_per_step)


def padding_fraction(lengths: Any, batches: Iterable[list[int]], multiple: int = 1) -> float:
    """The share of all tokens of the first epoch's batches that is padding, up to a multiple of so many tokens."""
    widths = (len(batch) * multiple * math.ceil(lengths[batch].max() / multiple) for batch in batches)
    return float(1 - lengths.sum() / sum(widths))


def print_plan(
    args: argparse.Namespace, accelerator: Accelerator, job: Job, scheduler: Any, padding: float, rows_per_step: int
) -> None:
    """Everything that a setting may have got wrong, before the first step."""
    data, model, train_store, limit = job.data, job.model, job.train, job.limit
    optimizer: torch.optim.Optimizer = scheduler.optimizer
    processes, updates = accelerator.num_processes, scheduler.num_training_steps
    batches, accumulate = math.ceil(len(train_store) / rows_per_step), accelerator.gradient_accumulation_steps
    last_lr = args.lr * scheduler.factor(updates - 1)
    splits = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    names = data.label_names
    label = "a number" if names is None else f"{len(names)} classes: {', '.join(names[:6])}"
    form = f" ({optimizer.form(optimizer.param_groups[0])})" if isinstance(optimizer, AdamW) else ""
    decayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    at_limit = int((train_store.lengths == limit).sum())
    grouped = ", grouped by length" if args.group_by_length else ""
    dropout = ", fast dropout (masks of its own)" if args.fast_dropout else ""
    lines = {
        "model": f"{job.model_name}, {model.num_parameters():,} parameters, new: {', '.join(job.made_anew) or 'none'}",
        "data": f"{data.name}, {splits} rows; {' + '.join(data.text_columns)} -> {data.label_column} ({label})",
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


# --- the folder that --output names -----------------------------------------------------------------------------------


def save(
    output: Path, model: Any, tokenizer: Any, result: dict[str, Any], evaluations: list[Any], args: argparse.Namespace
) -> None:
    """model/ (what transformers.pipeline loads) and result.json, the latter last: where it is, the run is complete."""
    whole = result | {"evaluations": evaluations, "arguments": vars(args)}
    unfinished = output / ".result.json"
    try:
        model.save_pretrained(output / "model", state_dict=state_on_host(model))
        tokenizer.save_pretrained(output / "model")
        unfinished.write_text(json.dumps(whole, indent=2) + "\n")
        unfinished.replace(output / "result.json")
    except (OSError, SafetensorError) as error:
        why = f"--output {output}: the model cannot be written ({first_line(error)})"
        raise Halt(1, f"{why}; make room, and --resume auto goes on from the newest checkpoint") from error


# --- the command line -------------------------------------------------------------------------------------------------


# fmt: off
def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError for what cannot be."""
    parser = Parser(prog="train.py", description=__doc__)
    add = parser.add_argument_group("what to train on what").add_argument
    add("--model", metavar="NAME", help="a folder or a name on the Hub (default bert-base-uncased)")
    add("--data", metavar="NAME",
        help="glue/TASK, stdlib-pairs, a file, a folder or a name on the Hub (default glue/mrpc)")
    add("--text-columns", metavar="COLUMN", nargs="+", help="one or two columns of text (default: found)")
    add("--label-column", metavar="COLUMN", help="the column of classes or numbers (default: found)")
    add = parser.add_argument_group("how long").add_argument
    add("--epochs", metavar="N", type=number(int, 1), default=3, help="passes over the training rows (default 3)")
    add("--max-steps", metavar="N", type=number(int, 1), help="updates, whatever --epochs says")
    add("--batch-size", metavar="ROWS", type=number(int, 1), default=8, help="rows a batch, per process (default 8)")
    add("--eval-batch-size", metavar="ROWS", type=number(int, 1), default=32, help="rows a batch (default 32)")
    add("--accumulate", metavar="N", type=number(int, 1), default=1, help="batches an update (default 1)")
    add("--group-by-length", action="store_true",
        help="batches of rows of similar length: less padding, another order (bf16, fp16: lengths in steps of 8)")
    add("--fast-dropout", action="store_true", help="cheaper random bits for a BERT on a CPU: other dropout masks")
    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", metavar="RATE", type=number(float, 0, above=True), default=5e-5, help="at its peak (default 5e-5)")
    add("--weight-decay", metavar="RATE", type=number(float, 0), default=0.0, help="not on biases, LayerNorm (0)")
    add("--warmup-steps", metavar="N", type=steps_or_ratio, default=0, help="updates, or a ratio below 1 (default 0)")
    add("--schedule", choices=tuple(SCHEDULES), default="linear",
        help="how the rate goes on after its warm-up (default linear)")
    add("--clip-norm", metavar="NORM", type=number(float, 0, above=True), help="largest gradient norm (default: any)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="KIND", default="auto", help="auto, cpu, cuda, cuda:N, mps, tpu or xla (default auto)")
    add("--precision", choices=tuple(PRECISIONS), default="no", help="autocast; no is fp32 (default no)")
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=42, help="order, head and dropout (default 42)")
    add("--uneven", choices=("mask", "wrap"), default="mask",
        help="the last batch of several processes: masked, or filled with the first rows again (default mask)")
    add = parser.add_argument_group("what is kept").add_argument
    add("--output", metavar="DIR", help="gets model/, metrics.jsonl, result.json and checkpoints/")
    add("--save-every", metavar="N", type=number(int, 1), help="updates between two checkpoints (default: at a signal)")
    add("--keep", metavar="N", type=number(int, 1), default=2, help="checkpoints kept (default 2)")
    add("--resume", metavar="auto|PATH",
        help="go on from the newest whole checkpoint of --output, if any, or from the one named")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add = parser.add_argument_group("when something goes wrong").add_argument
    add("--on-nan", choices=("stop", "skip"), default="stop",
        help="an update whose loss is not finite: end there, or leave it out and say so (default stop)")
    add("--timeout", metavar="SECONDS", type=number(float, 1), default=TIMEOUT.total_seconds(),
        help=f"how long processes wait for each other (default {TIMEOUT.total_seconds():g})")
    args = parser.parse_args(argv)
    if args.schedule == "constant" and args.warmup_steps:
        raise UsageError(f"--warmup-steps {args.warmup_steps}: constant has none; choose --schedule constant_with_warmup")
    for flag, value in (("--save-every", args.save_every), ("--resume", "auto" if args.resume == "auto" else None)):
        if value is not None and args.output is None:
            raise UsageError(f"{flag} {value} needs --output: name the folder that holds the checkpoints")
    return args
# fmt: on


def main() -> None:
    """Run, and print the result as the last line of stdout."""
    args = parse_arguments()
    accelerator = Accelerator(  # accelerate
        mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate, device=args.device,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),  # on CUDA a batch ahead
        uneven=args.uneven, timeout=timedelta(seconds=args.timeout),
    )  # fmt: skip
    try:
        result = train(args, accelerator)
        if result is not None and accelerator.is_main_process:
            print(json.dumps(result), flush=True)
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main("train.py", main))
