"""The same job with Lightning Fabric: bench/peer.py's loop, with Fabric where that has Accelerate.

    python bench/peer_fabric.py --model PATH --data PATH_OR_NAME --seed 1

Fabric leaves data, optimizer and schedule to its user, so its fastest form has the same options as Accelerate's:
`--fused` takes AdamW's fastest kernel, `--eval-batch-size 64` evaluates in larger batches, `--precision bf16` is its
"bf16-mixed". One process; no logger, no checkpoint, no callback. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from course import (
    Trace,
    common_options,
    for_a_loop,
    load_metric,
    need_one_process,
    prepare_data,
    same_dropout,
    same_order,
)
from lightning_fabric import Fabric, seed_everything
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

PRECISIONS: dict[str, Any] = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def main() -> None:
    parser = common_options("peer_fabric.py", __doc__)
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW, which is not its default")
    args = parser.parse_args()
    need_one_process(parser)

    began = time.perf_counter()
    seed_everything(args.seed, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenized = for_a_loop(prepare_data(args.data, tokenizer))
    collator = DataCollatorWithPadding(tokenizer=tokenizer)
    order: dict[str, Any] = {"shuffle": True}
    if args.same_work:
        order = {"sampler": same_order(len(tokenized["train"]), args.seed)}
    train_dataloader = DataLoader(tokenized["train"], **order, batch_size=args.batch_size, collate_fn=collator)
    eval_dataloader = DataLoader(tokenized["validation"], batch_size=args.eval_batch_size, collate_fn=collator)

    kind = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    fabric = Fabric(accelerator=kind, devices=1, precision=PRECISIONS[args.precision])
    fabric.launch()
    if args.same_work:
        torch.manual_seed(args.seed)  # the head is random: the same one as train.py's
    model: Any = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    optimizer: Any = AdamW(model.parameters(), lr=args.lr, fused=args.fused or None)  # None: its default
    model, optimizer = fabric.setup(model, optimizer)
    train_dl, eval_dl = fabric.setup_dataloaders(train_dataloader, eval_dataloader)
    num_training_steps = args.max_steps or args.epochs * len(train_dl)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=num_training_steps
    )

    step, trace = 0, Trace()
    while step < num_training_steps:
        model.train()
        for batch in train_dl:
            if args.same_work:
                same_dropout(args.seed, step, 0)
            outputs = model(**batch)
            loss = outputs.loss
            fabric.backward(loss)
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
        predictions += outputs.logits.argmax(dim=-1).tolist()
        references += batch["labels"].tolist()
    scores = metric(references, predictions)
    if args.trace:
        trace.write(args.trace, time.time() - evaluation_began, scores)
    print(json.dumps(trace.result(args, began, len(train_dl), scores)))


if __name__ == "__main__":
    main()
