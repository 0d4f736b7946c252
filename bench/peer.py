"""The libraries' side of most comparisons: the course's job as the course writes it, with Accelerate.

    python bench/peer.py --model PATH --data PATH_OR_NAME --seed 1

The same job as train.py's: data, loop and evaluation of bench/course.py, which has the course's lines, with
torch.optim.AdamW, `Accelerator.prepare`, `backward` and `gather_for_metrics`. The last line of stdout is one JSON
object.

Whatever the course does not do is an option: `--same-work` takes train.py's batches and dropout seeds instead of a
shuffle of its own, `--fused` AdamW's fastest kernel instead of the default one, and `--trace FILE` gets the losses and
times that bench/throughput.py compares.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from course import evaluate, loaders, train
from peer_options import common_options
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    parser = common_options("peer.py", __doc__)
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW, which is not its default")
    args = parser.parse_args()

    began = time.perf_counter()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train_dataloader, eval_dataloader = loaders(args, tokenizer)

    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.cpu or not torch.cuda.is_available())
    if args.same_work:
        torch.manual_seed(args.seed)  # the head is random: the same one as train.py's
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    optimizer = AdamW(model.parameters(), lr=args.lr, fused=args.fused or None)  # None: its default
    train_dl, eval_dl, model, optimizer = accelerator.prepare(train_dataloader, eval_dataloader, model, optimizer)
    trace = train(args, model, optimizer, train_dl, accelerator.backward, accelerator.process_index)
    scores, seconds = evaluate(model, eval_dl, accelerator.gather_for_metrics)
    if args.trace and accelerator.is_main_process:
        trace.write(args.trace, seconds, scores)
    if accelerator.is_main_process:
        print(json.dumps(trace.result(args, began, len(train_dl), scores)))
    if accelerator.num_processes > 1:
        # With the model: a DDP of torch's that outlives its process group now and then aborts the interpreter.
        model, optimizer = accelerator.free_memory(model, optimizer)
        accelerator.end_training()


if __name__ == "__main__":
    main()
