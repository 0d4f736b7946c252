"""The libraries' side of every comparison: the course's job as the course writes it, with Accelerate.

    python bench/peer.py --model PATH --data PATH_OR_NAME --seed 1

The same job as train.py's, in the course's lines: `map`, `remove_columns`, `set_format("torch")`,
DataCollatorWithPadding, torch.optim.AdamW, get_scheduler("linear"), Accelerator.prepare, a loop, `gather_for_metrics`.
The metric is what evaluate's GLUE script calls (numpy's mean, scikit-learn's f1_score); the script itself is on the
Hub only. The last line of stdout is one JSON object.

Whatever the course does not do is an option: `--same-work` takes train.py's batches and dropout seeds instead of a
shuffle of its own, `--fused` AdamW's fastest kernel instead of the default one, and `--trace FILE` gets the losses and
times that bench/throughput.py compares.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict, load_dataset
from sklearn.metrics import accuracy_score, f1_score
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def prepare_data(data: str, tokenizer: Any) -> DatasetDict:
    """The course's section "Prepare for training", for columns like MRPC's (sentence1, sentence2) or SST-2's."""
    if data == "stdlib-pairs":
        from datasets import Dataset

        from nanofinetune.data import stdlib_pairs

        raw = DatasetDict({key: Dataset.from_list(rows) for key, rows in stdlib_pairs.load().items()})
    else:
        raw = load_dataset(data)
    raw = DatasetDict({key: raw[key] for key in ("train", "validation")})
    texts = [name for name in ("sentence1", "sentence2", "sentence") if name in raw["train"].column_names]

    def tokenize_function(example: dict[str, Any]) -> Any:
        return tokenizer(*(example[name] for name in texts), truncation=True)

    tokenized = raw.map(tokenize_function, batched=True)
    tokenized = tokenized.remove_columns([name for name in (*texts, "idx") if name in raw["train"].column_names])
    tokenized = tokenized.rename_column("label", "labels")
    tokenized.set_format("torch")
    return tokenized


def same_order(rows: int, seed: int) -> list[int]:
    """The order in which train.py draws the rows of its first epoch."""
    from nanofinetune.step.order import SeedableRandomSampler

    return list(SeedableRandomSampler(range(rows), data_seed=seed))


def same_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout as train.py does before a step."""
    from nanofinetune.step.order import mix

    torch.manual_seed(mix(seed, step, rank))


class Parser(argparse.ArgumentParser):
    """One line and exit code 2, as in nanofinetune.ground.cli. (To import that would count as this side's time.)"""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"peer.py: {message.splitlines()[0]}\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--max-steps", type=positive)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--eval-batch-size", type=positive, default=8)
    parser.add_argument("--same-work", action="store_true", help="train.py's batches and dropout seeds")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW, which is not its default")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="gets losses and times, as JSON")
    args = parser.parse_args()

    began = time.perf_counter()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenized = prepare_data(args.data, tokenizer)
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

    step, losses, tokens, times = 0, [], [], [time.time()]
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
            losses.append(loss.item())
            times.append(time.time())
            tokens.append(int(batch["attention_mask"].sum()))
            step += 1
            if step == num_training_steps:
                break

    evaluation_began = time.time()
    model.eval()
    predictions, references = [], []
    for batch in eval_dl:
        with torch.no_grad():
            outputs = model(**batch)
        found, labels = accelerator.gather_for_metrics((outputs.logits.argmax(dim=-1), batch["labels"]))
        predictions += found.tolist()
        references += labels.tolist()
    scores = {"accuracy": accuracy_score(references, predictions), "f1": f1_score(references, predictions)}
    if args.trace and accelerator.is_main_process:
        trace = {"losses": losses, "tokens": tokens, "times": times, "evaluation": time.time() - evaluation_began}
        args.trace.write_text(json.dumps(trace | scores))
    result = {
        "model": args.model, "data": args.data, "steps": step, "seconds": time.perf_counter() - began,
        "loss": sum(losses[-len(train_dl):]) / len(losses[-len(train_dl):]),
        **scores,
    }  # fmt: skip
    if accelerator.is_main_process:
        print(json.dumps(result))
    if accelerator.num_processes > 1:
        # With the model: a DDP of torch's that outlives its process group now and then aborts the interpreter.
        del outputs, loss
        model, optimizer, lr_scheduler = accelerator.free_memory(model, optimizer, lr_scheduler)
        accelerator.end_training()


if __name__ == "__main__":
    main()
