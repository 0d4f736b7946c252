#!/usr/bin/env python3
"""Fine-tune a BERT on a text classification task: the Hugging Face course's loop, top to bottom.

    python train.py                                              bert-base-uncased on GLUE MRPC, one process
    torchrun --nproc_per_node=4 train.py                         four processes, 32 rows an update (or ./launch.sh)
    python train.py --data glue/cola --lr 2e-5 --output runs/cola
    python train.py --model ./my-bert --data reviews.csv --precision bf16 --group-by-length
    python train.py --output runs/long --save-every 200 --resume auto        stop it, start it again: it goes on
    python train.py --dry-run                                    print the plan and stop

The course imports its pieces from the libraries; here each comes from one file of nanofinetune/. The lines that the
course's Accelerate listing changes in its plain loop are marked `# accelerate`, and so is `accumulate`, which that
listing does not have. Differs from the course on purpose: everything is seeded; no weight decays unless --weight-decay
says so (torch's AdamW: all, by 0.01); a window of accumulated batches is divided by its true number of rows; N
processes compute, but for their dropout masks, the gradient of one process with N times the batch; on a CPU the model
leaves out what its loss does not read; evaluation batches are sorted by length, and the ranks add up their counts
once, at the end of it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

if (
    __name__ == "__main__" and sys.stderr and sys.stderr.isatty() and not {"-h", "--help"} & {*sys.argv}
    and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
):  # fmt: skip
    print("loading torch and transformers ...", file=sys.stderr, flush=True)  # the imports that follow take seconds

import torch
from torch.utils.data import DataLoader

from nanofinetune import Accelerator, AdamW, __version__, get_scheduler
from nanofinetune.cpu.dropout import use_exact_dropout, use_fast_dropout
from nanofinetune.cpu.lean import use_lean_encoder
from nanofinetune.cpu.memory import keep_freed_memory
from nanofinetune.data.job import Job, common_arguments, data_arguments, load, training_loader
from nanofinetune.ground.cli import LONGEST_WAIT, MOST, Parser, number, outliving_readers, run_main, steps_or_ratio
from nanofinetune.ground.errors import UsageError, naming
from nanofinetune.ground.precision import PRECISIONS
from nanofinetune.ground.xla import end_step
from nanofinetune.ranks.loader import prepare_data_loader
from nanofinetune.ranks.world import TIMEOUT
from nanofinetune.run.evaluation import Evaluation
from nanofinetune.run.plan import Plan, padding_fraction, print_plan
from nanofinetune.run.result import conclude
from nanofinetune.run.resume import batch_plan, common_start, run_of
from nanofinetune.run.run import Run
from nanofinetune.run.same import check_same, loaded, told
from nanofinetune.run.trial import trial
from nanofinetune.run.watch import preflight
from nanofinetune.settings import DataLoaderConfiguration
from nanofinetune.step.optim import decay_groups
from nanofinetune.step.order import SortedBatchSampler
from nanofinetune.step.schedule import SCHEDULES


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The whole run."""
    keep_freed_memory()
    preflight(accelerator.world)  # ranks that cannot talk are found before any long work
    check_same(accelerator.world, told(vars(args), __version__))  # all ranks were started alike
    start = common_start(args, accelerator)  # a checkpoint to go on from, or nothing

    # --- data and model ---
    job = load(args, accelerator, start.note)
    compute_faster(job.model, args, accelerator.device)
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

    found = job.found(optimizer)
    check_same(accelerator.world, loaded(accelerator.world, found, model))  # and have found the same
    identity = run_of(vars(args), accelerator.num_processes, found, start)
    plan = Plan(args, rows, rows_per_step, accumulate, updates, start, identity, new_loader, job.answers)
    padding = padding_fraction(job.train.lengths, train_loader.batch_sampler, job.multiple)
    if accelerator.is_main_process:
        print_plan(plan, accelerator, job, scheduler, padding)
    if args.dry_run:
        return
    trial(accelerator, job, rows_per_step)  # what cannot work fails now, in one line
    # accelerate
    model, optimizer, train_loader, scheduler = accelerator.prepare(model, optimizer, train_loader, scheduler)

    # --- the course's loop; `run` adds checkpoints, signals, memory and NaN handling (run/run.py) ---
    with Run(plan, accelerator, model, optimizer, scheduler, train_loader) as run:
        for epoch in run.epochs():
            model.train()
            for batch in run.batches(epoch):  # accelerate: this rank's rows, on the device already
                with accelerator.accumulate(model), run.step():  # accelerate: gradients travel once a window
                    loss = None  # free the last forward's activations, which a failed backward may have left
                    loss = model(**batch).loss
                    accelerator.backward(loss)  # accelerate: in place of loss.backward()
                    if run.agreed(loss):  # end of a window: no rank ran out of memory, and every loss is finite
                        if args.clip_norm is not None:
                            accelerator.clip_grad_norm_(model.parameters(), args.clip_norm)
                        optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            run.end_epoch(evaluate_all(args, accelerator, model, job))

    conclude(accelerator, run, job, padding)  # what --output gets, and the result as the last line of stdout


def compute_faster(model: Any, args: argparse.Namespace, device: torch.device) -> None:
    """On a CPU: the same numbers up to rounding, in less time; --fast-dropout draws other dropout masks."""
    if args.fast_dropout and device.type != "cpu":
        raise UsageError(f"--fast-dropout: only on a CPU, and the device is {device}; leave it out")
    if device.type == "cpu":  # --fast-dropout has masks of its own
        (use_fast_dropout if args.fast_dropout else use_exact_dropout)(model)
        use_lean_encoder(model)


def evaluate_all(args: Any, accelerator: Accelerator, model: Any, job: Job) -> dict[str, Any]:
    """MNLI has two validation splits: the first's scores have plain names."""
    scores: dict[str, Any] = {}
    for name, store in job.validation.items():
        score = evaluate(accelerator, model, store, job.collator, args.eval_batch_size, job.evaluation(name))
        prefix = "" if name == next(iter(job.validation)) else f"{name}_"
        scores |= {prefix + key: value for key, value in score.items()}
    return scores


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, model: Any, store: Any, collator: Callable[[Any], Any], batch_size: int, found: Evaluation
) -> dict[str, Any]:
    """The task's metrics over every row of the store, each counted once; `undefined` names the values that are 0/0."""
    loader: Any = DataLoader(store, batch_sampler=SortedBatchSampler(store.lengths, batch_size), collate_fn=collator)
    # Ranks may get different numbers of batches: nothing is reduced before the end, so nobody waits and no row repeats.
    loader = prepare_data_loader(
        loader, accelerator.device, accelerator.num_processes, accelerator.process_index,
        put_on_device=True, even_batches=False, non_blocking=True,
    )  # fmt: skip
    model = accelerator.unwrap_model(model).eval()
    for batch in found.batches(loader):
        labels = batch.pop("labels")
        found.add(model(**batch).logits.float(), labels)
        end_step(accelerator.device)
    return found.scores(accelerator, len(store))  # the only communication between ranks


# --- the command line -------------------------------------------------------------------------------------------------


# fmt: off
def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError for what cannot be."""
    parser = Parser(prog="train.py", description=__doc__, usage="train.py [options]")
    common_arguments(parser)
    data_arguments(parser)
    add = parser.add_argument_group("how long").add_argument
    count = number(int, 1, MOST)
    add("--max-steps", metavar="N", type=count, help="number of updates; overrides --epochs")
    add("--batch-size", metavar="ROWS", type=count, default=8, help="rows per batch and process (default 8)")
    add("--eval-batch-size", metavar="ROWS", type=count, default=32, help="rows a batch (default 32)")
    add("--accumulate", metavar="N", type=count, default=1, help="batches per update (default 1)")
    add("--group-by-length", action="store_true",
        help="batches of rows of similar length: less padding, another order (bf16, fp16: lengths in steps of 8)")
    add("--fast-dropout", action="store_true", help="cheaper random bits for BERT and its kin on a CPU: other masks")
    add = parser.add_argument_group("optimizer").add_argument
    add("--weight-decay", metavar="RATE", type=number(float, 0), default=0.0, help="not on biases, LayerNorm (0)")
    add("--warmup-steps", metavar="N", type=steps_or_ratio, default=0, help="updates, or a ratio below 1 (default 0)")
    add("--schedule", choices=tuple(SCHEDULES), default="linear",
        help="how the rate goes on after its warm-up (default linear)")
    add("--clip-norm", metavar="NORM", type=number(float, 0, above=True),
        help="clip gradients to this norm (default: no clipping)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="KIND", default="auto", help="auto, cpu, cuda, cuda:N, mps, tpu or xla (default auto)")
    add("--precision", choices=tuple(PRECISIONS), default="no", help="autocast; no is fp32 (default no)")
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=42, help="order, head and dropout (default 42)")
    add("--uneven", choices=("mask", "wrap"), default="mask",
        help="the last batch of several processes: masked, or filled with the first rows again (default mask)")
    add = parser.add_argument_group("what is kept").add_argument
    add("--save-every", metavar="N", type=count, help="updates between two checkpoints (default: at a signal)")
    add("--keep", metavar="N", type=count, default=2, help="checkpoints kept (default 2)")
    add("--resume", metavar="auto|PATH",
        help="resume from the newest complete checkpoint in --output, if any, or from the one named")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add = parser.add_argument_group("when something goes wrong").add_argument
    add("--on-nan", choices=("stop", "skip"), default="stop",
        help="an update whose loss is not finite: end there, or leave it out and say so (default stop)")
    add("--timeout", metavar="SECONDS", type=number(float, 1, LONGEST_WAIT), default=TIMEOUT.total_seconds(),
        help=f"how long processes wait for each other (default {TIMEOUT.total_seconds():g})")
    args = parser.parse_args(argv)
    if args.schedule == "constant" and args.warmup_steps:
        remedy = "constant has none; choose --schedule constant_with_warmup"
        raise UsageError(f"--warmup-steps {args.warmup_steps}: {remedy}")
    if args.schedule == "polynomial" and args.lr <= 1e-7:
        raise UsageError(f"--lr {args.lr:g}: polynomial ends at 1e-07; choose a greater rate, or another --schedule")
    for flag, value in (("--save-every", args.save_every), ("--resume", "auto" if args.resume == "auto" else None)):
        if value is not None and args.output is None:
            raise UsageError(f"{flag} {value} needs --output: name the folder that holds the checkpoints")
    return args
# fmt: on


@outliving_readers()  # `train.py | head -1` trains to the end
def main() -> None:
    """Run, and print the result as the last line of stdout."""
    args = parse_arguments()
    with naming(mixed_precision="--precision"):
        accelerator = Accelerator(  # accelerate
            mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate, device=args.device,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),  # on CUDA a batch ahead
            uneven=args.uneven, timeout=timedelta(seconds=args.timeout),
        )  # fmt: skip
    try:
        train(args, accelerator)
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main("train.py", main))
