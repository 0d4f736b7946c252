"""Step through one run on both sides and show the first step and tensor that differ.

    python bench/compare.py                                    20 steps on the packaged checkpoint and stdlib-pairs
    python bench/compare.py --data ./mrpc --steps 100 --adamw loop
    python bench/compare.py --precision bf16 --tolerance 1e-2

Both sides are the loops that bench/throughput.py times: transformers' collator and schedule, torch's AdamW and
Accelerate on one side, this package on the other, in one process, with the same initial weights, rows and dropout
seeds. After each part of a step its result is compared: batch, loss, gradient, learning rate, weight. The first part
that differs names the piece that is wrong.

With `--adamw loop` or `foreach` everything has to be equal bit for bit. AdamW's fused kernel rounds differently from
torch's default loop; there the tolerance is 1e-6 of the largest number of that part, times the number of steps so far.

The last line of stdout is one JSON object. The exit code is 1 where the sides differ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pieces import BATCH, LR, SEED, Job, model_of, shuffled

from nanofinetune.accelerator import Accelerator
from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.step.collate import DataCollatorWithPadding
from nanofinetune.step.optim import AdamW
from nanofinetune.step.order import mix
from nanofinetune.step.schedule import get_scheduler

# Where to look for the mistake: what makes each part of a step, and its file in nanofinetune/.
MADE_BY = {
    "weight at the start": "load_model (data/pretrained.py)",
    "batch": "TokenStore (data/tokens.py), the collator (step/collate.py) or the loader (ranks/loader.py)",
    "loss": "the forward pass: dropout's seed (run/run.py), autocast (wrappers.py)",
    "gradient": "Accelerator.backward (accelerator.py), or zero_grad before it (wrappers.py)",
    "learning rate": "the schedule (step/schedule.py) or what steps it (AcceleratedScheduler, wrappers.py)",
    "weight": "AdamW (step/optim.py)",
}
Part = tuple[str, Mapping[str, Tensor]]  # a key of MADE_BY, and the tensors by name


@dataclass(frozen=True)
class Difference:
    """The first tensor that is not the same on both sides."""

    step: int  # from 1; 0: before the first one
    part: str
    tensor: str
    how: str

    def __str__(self) -> str:
        where = f"step {self.step}: " if self.step else ""
        return f"{where}{self.part} {self.tensor}: {self.how}; made by {MADE_BY[self.part]}"


def library_parts(job: Job, precision: str, adamw: str) -> Iterator[Part]:
    """The course's loop with the libraries, stopped after each part of a step."""
    import accelerate
    import transformers

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    data = job.course_data()["train"]
    collator = transformers.DataCollatorWithPadding(job.tokenizer())
    batches = BatchSampler(shuffled(len(data)), BATCH, drop_last=False)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collator)
    model = job.classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **FORMS[adamw])  # type: ignore[arg-type]
    schedule = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=WARM_UP, num_training_steps=3 * len(loader)
    )
    yield from parts(accelerator, model, optimizer, loader, schedule)


def our_parts(job: Job, precision: str, adamw: str) -> Iterator[Part]:
    """The same loop with this package."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    data = job.our_data()["train"]
    batches = BatchSampler(shuffled(len(data)), BATCH, drop_last=False)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=DataCollatorWithPadding(job.tokenizer()))
    model = job.classifier()
    optimizer = AdamW(model.parameters(), lr=LR, **OUR_FORMS[adamw])  # type: ignore[arg-type]
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=WARM_UP, num_training_steps=3 * len(loader))
    yield from parts(accelerator, model, optimizer, loader, schedule)


WARM_UP = 3  # updates, so that the rate changes in both directions within a few steps
FORMS: dict[str, dict[str, bool]] = {"default": {}, "loop": {"foreach": False}, "foreach": {"foreach": True}}
OUR_FORMS: dict[str, dict[str, bool]] = {**FORMS, "loop": {"foreach": False, "fused": False}}


def parts(accelerator: Any, model: Any, optimizer: Any, loader: Any, schedule: Any) -> Iterator[Part]:
    """The loop itself, the same code for both sides: they differ only in what is passed in."""
    yield "weight at the start", dict(model.named_parameters())
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for step, batch in enumerate(loader):
        yield "batch", batch
        torch.manual_seed(mix(SEED, step, 0))
        loss = model(**batch).loss
        yield "loss", {"": loss.detach()}
        accelerator.backward(loss)
        yield "gradient", {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        yield "learning rate", {f"of group {i}": rate(group["lr"]) for i, group in enumerate(optimizer.param_groups)}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield "weight", {name: p.detach() for name, p in model.named_parameters()}


def rate(lr: float) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64)


PARTS_A_STEP = len(MADE_BY) - 1


def first_difference(library: Iterator[Part], ours: Iterator[Part], steps: int, tolerance: float) -> Difference | None:
    """Walk both sides part by part -> the first tensor that differs; None after `steps` steps without one."""
    count = 1 + steps * PARTS_A_STEP
    compared = 0
    for i, ((part, theirs), (_, own)) in enumerate(zip(islice(library, count), islice(ours, count), strict=True)):
        step = (i + PARTS_A_STEP - 1) // PARTS_A_STEP
        allowed = 0.0 if part in ("weight at the start", "batch", "learning rate") else tolerance * max(0, step - 1)
        if part == "weight":
            allowed = tolerance * step  # the update itself may round differently, from the first one on
        if list(theirs) != list(own) and set(theirs) != set(own):
            odd = sorted(set(theirs) ^ set(own))
            return Difference(step, part, odd[0], f"only {'the library has' if odd[0] in theirs else 'we have'} it")
        if allowed:  # of the largest number of all: the gradient of a key's bias is nothing but rounding errors
            allowed *= max(float(tensor.abs().max()) for tensor in theirs.values())
        for name in theirs:
            if how := differ(theirs[name], own[name], allowed):
                return Difference(step, part, name, how)
        compared += 1
    if compared < count:
        raise UsageError(f"--steps {steps}: an epoch has only {(compared - 1) // PARTS_A_STEP} steps; choose fewer")
    return None


def differ(theirs: Tensor, own: Tensor, allowed: float) -> str:
    """How two tensors differ, in words; "" where they lie no further apart than `allowed`."""
    if theirs.shape != own.shape or theirs.dtype != own.dtype:
        return f"{tuple(theirs.shape)} {theirs.dtype} with the library and {tuple(own.shape)} {own.dtype} with us"
    if torch.equal(theirs, own):
        return ""
    a, b = theirs.double(), own.double()
    distance = (a - b).abs()
    worst = int(distance.nan_to_num(nan=torch.inf).argmax())
    if distance.flatten()[worst] <= allowed:  # NaN is never allowed
        return ""
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), theirs.shape)]
    values = f"{a.flatten()[worst]:.9g} with the library and {b.flatten()[worst]:.9g} with us"
    return f"{values} at {index}" if index else values


def main() -> None:
    parser = Parser(prog="compare.py", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    add("--data", metavar="DIR", default="stdlib-pairs", help="what train.py takes (default stdlib-pairs)")
    add("--steps", metavar="N", type=number(int, 1), default=20, help="updates (default 20)")
    add("--precision", choices=("no", "bf16"), default="no", help="no is fp32 (default no)")
    add("--adamw", choices=tuple(FORMS), default="default", help="the form on both sides (default: each one's own)")
    add("--tolerance", metavar="PART", type=number(float, 0), help="of the largest number of a part (see above)")
    args = parser.parse_args()
    model = model_of(args.model)
    tolerance = args.tolerance if args.tolerance is not None else 1e-6 if args.adamw == "default" else 0.0
    job = Job(model, args.data)
    job.check()
    library, ours = (side(job, args.precision, args.adamw) for side in (library_parts, our_parts))
    found = first_difference(library, ours, args.steps, tolerance)
    how = "bit for bit" if tolerance == 0 else f"to {tolerance:g} of the largest number of a part, for each step"
    print(str(found) if found else f"{args.steps} steps: batches, losses, gradients, rates and weights agree, {how}")
    print(json.dumps({"steps": args.steps, "tolerance": tolerance, "difference": vars(found) if found else None}))
    sys.stdout.flush()
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_main("compare.py", main))
