"""The same job with Lightning Fabric, where bench/peer.py has Accelerate.

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
from course import evaluate, loaders, train
from lightning_fabric import Fabric, seed_everything
from peer_options import common_options, need_one_process
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PRECISIONS: dict[str, Any] = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def main() -> None:
    parser = common_options("peer_fabric.py", __doc__)
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW, which is not its default")
    args = parser.parse_args()
    need_one_process(parser)

    began = time.perf_counter()
    seed_everything(args.seed, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_dataloader, eval_dataloader = loaders(args, tokenizer)

    kind = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    fabric = Fabric(accelerator=kind, devices=1, precision=PRECISIONS[args.precision])
    fabric.launch()
    if args.same_work:
        torch.manual_seed(args.seed)  # the head is random: the same one as train.py's
    model: Any = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    optimizer: Any = AdamW(model.parameters(), lr=args.lr, fused=args.fused or None)  # None: its default
    model, optimizer = fabric.setup(model, optimizer)
    train_dl, eval_dl = fabric.setup_dataloaders(train_dataloader, eval_dataloader)
    trace = train(args, model, optimizer, train_dl, fabric.backward)
    scores, seconds = evaluate(model, eval_dl)
    if args.trace:
        trace.write(args.trace, seconds, scores)
    print(json.dumps(trace.result(args, began, len(train_dl), scores)))


if __name__ == "__main__":
    main()
