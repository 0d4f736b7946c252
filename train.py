#!/usr/bin/env python3
"""Fine-tune a BERT on a text classification task: the Hugging Face course's loop, top to bottom.

    python train.py                                              bert-base-uncased on GLUE MRPC, one process
    torchrun --nproc_per_node=4 train.py                         the same on four (or: ./launch.sh -n 4)
    python train.py --data glue/cola --lr 2e-5 --output runs/cola
    python train.py --model ./my-bert --data reviews.csv --precision bf16 --group-by-length
    python train.py --dry-run                                    print the plan and stop

The course imports its pieces from the libraries; here each comes from one file of nanofinetune/. The lines that
Accelerate adds to the plain loop are marked `# accelerate`. Differs from the course on purpose: everything is seeded; a
window of accumulated batches is divided by its true number of rows; N processes compute the gradient of one process
with N times the batch; evaluation batches are sorted by length, and its ranks meet once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from nanofinetune.accelerator import Accelerator
from nanofinetune.cli import Parser, number, run, steps_or_ratio
from nanofinetune.collate import DataCollatorWithPadding
from nanofinetune.data import Data, load_data, tokenize
from nanofinetune.device import (
    end_step,
    fixed_lengths,
    keep_freed_memory,
    manual_seed,
    peak_rss_mb,
    seconds_since_start,
    spread_rows,
    state_on_host,
)
from nanofinetune.distributed import gather_object
from nanofinetune.errors import UsageError
from nanofinetune.loader import prepare_data_loader
from nanofinetune.metrics import Metric, UndefinedMetricWarning
from nanofinetune.optim import AdamW, decay_groups
from nanofinetune.pretrained import length_limit, load_model, load_tokenizer, resolve_default
from nanofinetune.sampler import LengthGroupedBatchSampler, SeedableRandomSampler, SortedBatchSampler, mix
from nanofinetune.schedule import get_scheduler, linear_factor

LOG_EVERY = 50  # updates: ranks add up their losses, and metrics.jsonl grows, once in so many


def train(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any] | None:
    """The whole run -> the result, as it is printed; None for a dry run."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    keep_freed_memory()

    # --- data and model: the data first, since the labels decide the model's head ---
    with accelerator.local_main_process_first():  # one rank of a node tokenizes, the others read its cache
        output = claim_output(args.output, accelerator.is_main_process)
        model_name, model_note = (args.model, "") if args.model is not None else resolve_default()
        data = load_data(args.data, args.text_columns, args.label_column, args.seed)
        notes = [note for note in (model_note, data.note) if note]
        for note in notes:
            accelerator.print(f"note: {note}", flush=True)
        tokenizer = load_tokenizer(model_name)
        limit = length_limit(model_name, tokenizer)
        torch.manual_seed(args.seed)  # the classification head is new, and random
        with ThreadPoolExecutor(1) as pool:  # the model loads while the tokenizer works
            loading = pool.submit(load_model, model_name, data.label_names)
            stores = tokenize(data, tokenizer, limit)
            model, made_anew = loading.result()
    model.config.text_columns = list(data.text_columns)  # saved with the model: predict.py asks it for one text or two
    train_store = stores.pop("train")

    # --- batches of all processes together; their order is a function of (seed, epoch) alone ---
    rows_per_step = args.batch_size * world
    batches: BatchSampler | LengthGroupedBatchSampler
    if args.group_by_length:
        batches = LengthGroupedBatchSampler(train_store.lengths, rows_per_step, args.seed)
    else:
        sampler = SeedableRandomSampler(train_store, data_seed=args.seed)
        batches = BatchSampler(sampler, rows_per_step, drop_last=False)
    collator: Callable[[Any], Any] = DataCollatorWithPadding(tokenizer)
    if device.type == "xla":
        collator = partial(collate_to_fixed_length, tokenizer, fixed_lengths(limit))
    train_loader: Any = DataLoader(train_store, batch_sampler=batches, collate_fn=collator)

    # --- optimizer and schedule: the schedule counts updates, neither batches nor processes ---
    updates_per_epoch = math.ceil(len(train_loader) / args.accumulate)
    updates = args.max_steps or args.epochs * updates_per_epoch
    optimizer = AdamW(decay_groups(model, args.weight_decay), lr=args.lr)
    if args.warmup_steps > updates:
        raise UsageError(f"--warmup-steps {args.warmup_steps}: the run has only {updates} updates; choose fewer")
    scheduler = get_scheduler("linear", optimizer, args.warmup_steps, updates)

    padding = padding_fraction(train_store.lengths, batches)
    if accelerator.is_main_process:
        print_plan(
            args, accelerator, model_name, data, model, made_anew, optimizer, scheduler, train_store, limit, padding
        )  # fmt: skip
    if args.dry_run:
        return None
    # accelerate
    model, optimizer, train_loader, scheduler = accelerator.prepare(model, optimizer, train_loader, scheduler)

    # --- the loop ---
    if output and accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    log = Log(output / "metrics.jsonl" if output else None, updates, accelerator)
    evaluations: list[dict[str, Any]] = []
    batch_index, first_step_seconds, training_seconds = 0, 0.0, 0.0
    for epoch in range(math.ceil(updates / updates_per_epoch)):
        model.train()
        began = time.perf_counter()
        for batch in train_loader:  # accelerate: this rank's rows, on the device already
            with accelerator.accumulate(model):  # accelerate: gradients travel, and optimizers step, once a window
                manual_seed(mix(args.seed, batch_index, rank), device)  # dropout: masks of no other rank or batch
                spread_rows(batch, device)  # over the devices of an XLA process; elsewhere nothing
                loss = model(**batch).loss
                accelerator.backward(loss)  # accelerate: in place of loss.backward()
                if args.clip_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip_norm)
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                end_step(device)  # XLA runs what was recorded; elsewhere nothing
            batch_index += 1
            log.add(loss.detach(), train_loader.valid_rows)
            if accelerator.sync_gradients:
                log.end_update(epoch, lr)
                if log.update == 1:
                    first_step_seconds = seconds_since_start()
                if log.update == updates:
                    break
        training_loss = log.end_epoch()
        training_seconds += time.perf_counter() - began
        scores: dict[str, Any] = {}
        for name, store in stores.items():  # MNLI has two validation splits: the first one's scores have plain names
            found = evaluate(accelerator, model, store, collator, args.eval_batch_size, Metric(data.metrics))
            scores |= {f"{name}_{key}": value for key, value in found.items()} if scores else found
        evaluations.append({"epoch": epoch + 1, "loss": training_loss, **scores})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
        log.say(f"epoch {epoch + 1}: loss {training_loss:.4f}, {shown}")
    log.close()

    main_metric = data.metrics[0]
    result = {
        "model": model_name,
        "data": data.name,
        "world": world,
        "steps": log.update,
        "seconds": round(seconds_since_start(), 3),
        "examples_per_second": round(log.examples / training_seconds, 2),
        "first_step_seconds": round(first_step_seconds, 3),
        "peak_rss_mb": round(accelerator.gather(torch.tensor(peak_rss_mb(), device=device)).max().item(), 1),
        "padding": round(padding, 4),
        **{key: value for key, value in evaluations[-1].items() if key != "epoch"},
        "best": max(evaluations, key=lambda found: -2 if found[main_metric] is None else found[main_metric]),
        "device": str(device),
        "precision": accelerator.mixed_precision,
        "notes": notes,
    }
    if output and accelerator.is_main_process:
        save(output, accelerator.unwrap_model(model, keep_fp32_wrapper=False), tokenizer, result, evaluations, args)
    accelerator.wait_for_everyone()
    return result


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, model: Any, store: Any, collator: Callable[[Any], Any], batch_size: int, metric: Metric
) -> dict[str, Any]:
    """The task's metrics over every row of the store, each counted once; `undefined` names the values that are 0/0."""
    loader: Any = DataLoader(store, batch_sampler=SortedBatchSampler(store.lengths, batch_size), collate_fn=collator)
    # Ranks may get different numbers of batches: nothing is reduced before the end, so nobody waits and no row repeats.
    loader = prepare_data_loader(
        loader, accelerator.device, accelerator.num_processes, accelerator.process_index,
        put_on_device=True, even_batches=False,
    )  # fmt: skip
    model = accelerator.unwrap_model(model).eval()
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()  # (B, classes), or (B, 1) to regress
        predictions = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        metric.add_batch(predictions=predictions, references=labels)
    if metric.reduction == "sum":
        counts = metric.state().to(accelerator.device)
        metric.load_state(accelerator.reduce(counts, "sum"))  # the one meeting of the ranks
    else:  # rank correlations need all values
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


class Log:
    """The losses of a run: the progress bar, metrics.jsonl (one line an update) and the mean of an epoch.

    Losses stay on the device until they are shown: reading one waits for all the work before it.
    """

    def __init__(self, path: Path | None, updates: int, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.file = path.open("w") if path and accelerator.is_main_process else None
        hidden = None if accelerator.is_main_process else True  # None: shown on a terminal only
        self.progress = tqdm(total=updates, unit="update", disable=hidden, file=sys.stderr, dynamic_ncols=True)
        self.began = time.perf_counter()
        self.update, self.examples = 0, 0
        self.pending: list[tuple[dict[str, Any], torch.Tensor]] = []  # (line, this rank's sum of losses and rows)
        self.epoch = (0.0, 0.0)  # sum of losses, and rows
        self._new_window()

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """Count one micro-batch: its mean loss over this rank's `rows`, which is NaN where there are none."""
        total = loss * rows if rows else torch.zeros_like(loss)
        self.window += torch.stack([total, total.new_tensor(rows)])

    def end_update(self, epoch: int, lr: float) -> None:
        self.update += 1
        self.pending.append(({"step": self.update, "epoch": epoch + 1, "lr": lr}, self.window))
        if self.progress.update():  # true where the bar was due to be drawn
            loss, speed = self.window[0] / self.window[1], self.examples / (time.perf_counter() - self.began)
            self.progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", examples_per_second=f"{speed:.1f}")
        self._new_window()
        if len(self.pending) == LOG_EVERY:
            self._flush()

    def end_epoch(self) -> float:
        """The mean loss over the epoch's rows, of all ranks."""
        self._flush()
        mean = self.epoch[0] / self.epoch[1]
        self.epoch = (0.0, 0.0)
        return mean

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self.progress.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.progress.close()
        if self.file:
            self.file.close()

    def _flush(self) -> None:
        """Add up what the ranks saw since the last time, and write it."""
        if not self.pending:
            return
        table = self.accelerator.reduce(torch.stack([sums for _, sums in self.pending]), "sum").tolist()  # (n, 2)
        for (line, _), (total, rows) in zip(self.pending, table, strict=True):
            self.examples += int(rows)
            self.epoch = (self.epoch[0] + total, self.epoch[1] + rows)
            if self.file:
                self.file.write(json.dumps(line | {"loss": total / rows, "rows": int(rows)}) + "\n")
        if self.file:
            self.file.flush()
        self.pending = []

    def _new_window(self) -> None:
        self.window = torch.zeros(2, device=self.accelerator.device)


def padding_fraction(lengths: Any, batches: Iterable[list[int]]) -> float:
    """The share of all tokens of the first epoch's batches that is padding."""
    return float(1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches))


def print_plan(
    args: argparse.Namespace, accelerator: Accelerator, model_name: str, data: Data, model: Any, made_anew: list[str],
    optimizer: AdamW, scheduler: Any, train_store: Any, limit: int, padding: float,
) -> None:  # fmt: skip
    """Everything that a setting may have got wrong, before the first step."""
    world, updates = accelerator.num_processes, scheduler.num_training_steps
    batches = math.ceil(len(train_store) / (args.batch_size * world))
    last_lr = args.lr * linear_factor(updates - 1, scheduler.num_warmup_steps, updates)
    splits = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    names = data.label_names
    label = "a number" if names is None else f"{len(names)} classes: {', '.join(names[:6])}"
    decayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    at_limit = int((train_store.lengths == limit).sum())
    grouped = ", grouped by length" if args.group_by_length else ""
    lines = {
        "model": f"{model_name}, {model.num_parameters():,} parameters, new: {', '.join(made_anew) or 'none'}",
        "data": f"{data.name}, {splits} rows; {' + '.join(data.text_columns)} -> {data.label_column} ({label})",
        "device": f"{accelerator.device}, {world} process(es) of {torch.get_num_threads()} thread(s)",
        "batch": f"{args.batch_size} per process x {world} process(es) x {args.accumulate} accumulated = "
        f"{args.batch_size * world * args.accumulate} rows an update",
        "updates": f"{updates:,} ({batches:,} batches an epoch)",
        "lr": f"{scheduler.get_last_lr()[0]:.3g} first, {args.lr:.3g} peak, {last_lr:.3g} last; "
        f"warm-up {scheduler.num_warmup_steps:,} updates",
        "optimizer": f"AdamW ({optimizer.form(optimizer.param_groups[0])}), weight decay {args.weight_decay:g} on "
        f"{decayed:,} parameters, clip norm {'off' if args.clip_norm is None else args.clip_norm}",
        "padding": f"{padding:.1%} of all training tokens{grouped}; {at_limit:,} rows fill the limit of {limit} tokens",
        "precision": "fp32" if accelerator.mixed_precision == "no" else f"{accelerator.mixed_precision} (autocast)",
    }
    print("\n".join(f"{name:<10} {text}" for name, text in lines.items()), flush=True)


# --- the folder that --output names -----------------------------------------------------------------------------------


def claim_output(name: str | None, main_process: bool) -> Path | None:
    """Make sure, before any long work, that the folder can be written and holds nothing that would be written over."""
    if name is None or not main_process:
        return None if name is None else Path(name).expanduser()
    if not name:
        raise UsageError("--output is empty: name a folder")
    output = Path(name).expanduser()
    try:
        held = [
            child for child in ("model", "metrics.jsonl", "result.json", "checkpoints") if (output / child).exists()
        ]
        if held:
            raise UsageError(
                f"--output {name}: it already holds {', '.join(held)} of an earlier run; name another folder"
            )
        there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        tempfile.TemporaryFile(dir=there).close()  # the folder itself is made when there is something to put into it
    except OSError as error:
        raise UsageError(f"--output {name}: it cannot be written ({error.strerror}); name another folder") from error
    return output


def save(
    output: Path, model: Any, tokenizer: Any, result: dict[str, Any], evaluations: list[Any], args: argparse.Namespace
) -> None:
    """model/ (what transformers.pipeline loads) and result.json, the latter last: where it is, the run is complete."""
    model.save_pretrained(output / "model", state_dict=state_on_host(model))
    tokenizer.save_pretrained(output / "model")
    whole = result | {"evaluations": evaluations, "arguments": vars(args)}
    (output / "result.json").write_text(json.dumps(whole, indent=2) + "\n")


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
    add("--eval-batch-size", metavar="ROWS", type=number(int, 1), default=64, help="rows a batch (default 64)")
    add("--accumulate", metavar="N", type=number(int, 1), default=1, help="batches an update (default 1)")
    add("--group-by-length", action="store_true",
        help="batches of rows of similar length: less padding, another order")
    add = parser.add_argument_group("optimizer").add_argument
    add("--lr", metavar="RATE", type=number(float, 0, above=True), default=5e-5, help="at its peak (default 5e-5)")
    add("--weight-decay", metavar="RATE", type=number(float, 0), default=0.0, help="not on biases, LayerNorm (0)")
    add("--warmup-steps", metavar="N", type=steps_or_ratio, default=0, help="updates, or a ratio below 1 (default 0)")
    add("--clip-norm", metavar="NORM", type=number(float, 0, above=True), help="largest gradient norm (default: any)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="KIND", default="auto", help="auto, cpu, cuda, cuda:N, mps, tpu or xla (default auto)")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="autocast; no is fp32 (default no)")
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=42, help="order, head and dropout (default 42)")
    add("--uneven", choices=("mask", "wrap"), default="mask",
        help="the last batch of several processes: masked, or filled with the first rows again (default mask)")
    add = parser.add_argument_group("what is kept").add_argument
    add("--output", metavar="DIR", help="gets model/, metrics.jsonl and result.json")
    add("--save-every", metavar="N", type=number(int, 1), help="updates between two checkpoints (not built yet)")
    add("--keep", metavar="N", type=number(int, 1), default=2, help="checkpoints kept (default 2)")
    add("--resume", metavar="auto|PATH", help="continue from a checkpoint (not built yet)")
    add("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_args(argv)
    for flag, value in (("--save-every", args.save_every), ("--resume", args.resume)):
        if value is not None:  # an option is never ignored
            raise UsageError(f"{flag} {value}: checkpoints are not written yet; leave it out")
    return args
# fmt: on


def main() -> None:
    """Run, and print the result as the last line of stdout."""
    args = parse_arguments()
    accelerator = Accelerator(
        mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate, device=args.device,
        split_batches=True, uneven=args.uneven,
    )  # fmt: skip
    try:
        result = train(args, accelerator)
        if result is not None and accelerator.is_main_process:
            print(json.dumps(result), flush=True)
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run("train.py", main))
