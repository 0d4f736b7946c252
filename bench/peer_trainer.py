"""The same job with transformers' Trainer, as the course's section "Fine-tuning with the Trainer API" writes it.

    python bench/peer_trainer.py --model PATH --data PATH_OR_NAME --seed 1

What a user who wants speed sets, and why (`settings`): nothing is logged, saved, reported or drawn as a bar, gradients
are not clipped, and a NaN is not looked for in each loss. AdamW is Trainer's default, torch's fused one; the schedule
is its default, linear without warm-up. `--group-by-length` is its own batches of similar length, `--eval-batch-size 64`
evaluates in larger ones. `--same-work` takes train.py's batches and dropout seeds. `--weight-decay` spares biases and
LayerNorm, as in train.py.

One process. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from course import Trace, load_metric, prepare_data, same_dropout, same_order
from peer_options import common_options, need_one_process
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class WatchedTrainer(Trainer):
    """Trainer with a stop-watch; with `same_work` it takes train.py's order of rows and seeds of dropout."""

    def __init__(self, *args: Any, trace: Trace, same_work: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace, self.same_work = trace, same_work

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.same_work:
            return same_order(len(self.train_dataset), self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if self.same_work:
            same_dropout(self.args.seed, self.state.global_step, 0)
        self.taken = super().training_step(model, inputs, num_items_in_batch), inputs
        return self.taken[0]


class Clock(TrainerCallback):
    """Tells the trace when the loop began, and each step after its update."""

    trainer: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.trace.times = [time.time()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.trace.add(*self.trainer.taken)


def settings(args: Any, folder: str) -> dict[str, Any]:
    """TrainingArguments' arguments."""
    strategy = "group_by_length" if args.group_by_length else "random"
    return {
        "output_dir": folder,
        "seed": args.seed,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps or -1,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "learning_rate": args.lr,
        "weight_decay": args.weight_decay,
        "bf16": args.precision == "bf16",
        "fp16": args.precision == "fp16",
        "train_sampling_strategy": strategy,
        "use_cpu": args.cpu or not torch.cuda.is_available(),
        # a pinned batch pays on a GPU alone; on a CPU torch warns of it
        "dataloader_pin_memory": torch.cuda.is_available() and not args.cpu,
        "max_grad_norm": 0.0,  # by default 1.0: the norm of all gradients in each step
        "logging_strategy": "no",  # a logged loss costs a moment; this script reads each loss, as every side does
        "logging_nan_inf_filter": False,  # two more operations on each loss
        "save_strategy": "no",
        "eval_strategy": "no",  # once, after training, as on the other sides
        "report_to": "none",
        "disable_tqdm": True,
    }


def main() -> None:
    parser = common_options("peer_trainer.py", __doc__)
    parser.add_argument("--weight-decay", type=float, default=0.0, help="not on biases and LayerNorm (default 0)")
    parser.add_argument("--group-by-length", action="store_true", help="batches of rows of similar length")
    args = parser.parse_args()
    need_one_process(parser)
    if args.same_work and args.group_by_length:
        parser.error("--group-by-length: --same-work has an order of its own; leave one out")

    began = time.perf_counter()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenized = prepare_data(args.data, tokenizer)
    if args.same_work:
        torch.manual_seed(args.seed)  # the head is random: the same one as train.py's
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    trace, clock = Trace(), Clock()
    with tempfile.TemporaryDirectory(prefix="peer-trainer-") as folder:
        trainer = clock.trainer = WatchedTrainer(
            model,
            TrainingArguments(**settings(args, folder)),
            train_dataset=tokenized["train"],
            eval_dataset=tokenized["validation"],
            data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
            processing_class=tokenizer,
            callbacks=[clock],
            trace=trace,
            same_work=args.same_work,
        )
        trainer.train()

        metric = load_metric()
        trainer.compute_metrics = lambda found: metric(found.label_ids, found.predictions.argmax(-1))
        evaluation_began = time.time()
        found = trainer.evaluate()
    scores = {name: found[f"eval_{name}"] for name in ("accuracy", "f1")}
    if args.trace:
        trace.write(args.trace, time.time() - evaluation_began, scores)
    steps_an_epoch = -(-len(tokenized["train"]) // args.batch_size)
    print(json.dumps(trace.result(args, began, steps_an_epoch, scores)))


if __name__ == "__main__":
    main()
