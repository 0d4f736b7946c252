"""The libraries' side of most comparisons: the course's job as the course writes it, with Accelerate.

    python bench/peer.py --model PATH --data PATH_OR_NAME --seed 1

The same job as train.py's, in the course's lines: the data of bench/course.py, torch.optim.AdamW,
get_scheduler("linear"), Accelerator.prepare, a loop, `gather_for_metrics`. The last line of stdout is one JSON object.

Whatever the course does not do is an option: `--same-work` takes train.py's batches and dropout seeds instead of a
shuffle of its own, `--fused` AdamW's fastest kernel instead of the default one, and `--trace FILE` gets the losses and
times that bench/throughput.py compares.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from course import Trace, common_options, for_a_loop, load_metric, prepare_data, same_dropout, same_order
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler


def main() -> None:
    parser = common_options("peer.py", __doc__)
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW, which is not its default")
    args = parser.parse_args()

    began = time.perf_counter()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenized = for_a_loop(prepare_data(args.data, tokenizer))
    collator = DataCollatorWithPadding(tokenizer=tokenizer)
    order: dict[str, Any] = {"shuffle": True}
    if args.same_work:
        order = {"sampler": same_order(len(tokenized["train"]), args.seed)}
    train_dataloader = DataLoader(tokenized["train"], **order, batch_size=args.batch_size, collate_fn=collator)
    eval_dataloader = DataLoader(tokenized["validation"], batch_size=args.eval_batch_size, collate_fn=collator)

    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.cpu or not torch.cuda.is_available())
    if args.same_work:
        torch.manual_seed(args.seed)  # the head is random: the same one as train.py's
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    optimizer = AdamW(model.parameters(), lr=args.lr, fused=args.fused or None)  # None: its default
    train_dl, eval_dl, model, optimizer = accelerator.prepare(train_dataloader, eval_dataloader, model, optimizer)
    num_training_steps = args.max_steps or args.epochs * len(train_dl)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=num_training_steps
    )

    step, trace = 0, Trace()
    while step < num_training_steps:
        model.train()
        for batch in train_dl:
            if args.same_work:
                same_dropout(args.seed, step, accelerator.process_index)
            outputs = model(**batch)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            trace.add(loss, batch)
            step += 1
            if step == num_training_steps:
                break

    metric = load_metric()
    evaluation_began = time.time()
    model.eval()
    predictions, references = [], []
    for batch in eval_dl:
        with torch.no_grad():
            outputs = model(**batch)
        found, labels = accelerator.gather_for_metrics((outputs.logits.argmax(dim=-1), batch["labels"]))
        predictions += found.tolist()
        references += labels.tolist()
    scores = metric(references, predictions)
    if args.trace and accelerator.is_main_process:
        trace.write(args.trace, time.time() - evaluation_began, scores)
    if accelerator.is_main_process:
        print(json.dumps(trace.result(args, began, len(train_dl), scores)))
    if accelerator.num_processes > 1:
        # With the model: a DDP of torch's that outlives its process group now and then aborts the interpreter.
        del outputs, loss
        model, optimizer, lr_scheduler = accelerator.free_memory(model, optimizer, lr_scheduler)
        accelerator.end_training()


if __name__ == "__main__":
    main()
