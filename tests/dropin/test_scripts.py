"""Scripts for Accelerate, run as written and again with only their import lines changed: the same losses.

Each script is text. It makes its own rows and its own model, and prints one line, from the main process, that the two
sides are compared by. Every rank is a fork, and each side runs in ranks of its own (accelerate 1.15, torch 2.13,
transformers 5.23).

What all scripts have in common, since the sides differ there on purpose:
  - `cpu=True`: without it, Accelerate on a machine without a GPU starts copies that know nothing of each other.
  - No `shuffle=True`: the order of a shuffling loader is ours. A sampler of the script's own is kept by both.
  - Windows are full: Accelerate divides a short one by the length of a full one.

    python -m pytest tests/dropin/test_scripts.py
"""

import contextlib
import gc
import io
import json
import os
import re
import sys
import warnings
from typing import Any

import pytest
import torch.distributed as dist
from helpers import run_ranks

from nanofinetune.step.schedule import SCHEDULES

# AdamW's default here is the fused kernel, torch's is the loop: the same formula, other rounding. Each update moves a
# weight by at most about lr, so what two roundings of an update differ by stays far below this after a few dozen.
TOLERANCE = 1e-5

SWAPPED = re.compile(r"^from (accelerate|accelerate\.\w+|torch\.optim|transformers) import ", re.MULTILINE)

COMMON = """
import json
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

set_seed(7)


class Rows(Dataset):
    def __init__(self, count, seed=0):
        self.inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        self.labels = (self.inputs[:, 0] > 0).long() + (self.inputs[:, 1] > 0).long()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return {"inputs": self.inputs[i], "labels": self.labels[i]}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, inputs, labels):
        logits = self.layers(inputs)
        return nn.functional.cross_entropy(logits, labels), logits


def loss_of_all(accelerator, loss):
    return accelerator.gather(loss.detach()).tolist()
"""

ACCUMULATION = """
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW
from transformers import get_scheduler
# common
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = Classifier()
optimizer = AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(Rows(64), batch_size=4)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=2 * len(loader) // 2)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
losses, rates, synced = [], [], []
for epoch in range(2):
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss, _ = model(**batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        synced.append(accelerator.sync_gradients)
        losses.append(loss_of_all(accelerator, loss))
        rates.append(scheduler.get_last_lr())
accelerator.print(json.dumps({"losses": losses, "rates": rates, "synced": synced}))
accelerator.end_training()
"""

# A machine that holds 8 rows: the error is raised while a batch is in the model, on all ranks (where the ranks differ,
# Accelerate shrinks the batches of one: tests/dropin/test_batch_size.py).
BATCH_SIZE = """
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, set_seed
from torch.optim import AdamW
# common
accelerator = Accelerator(cpu=True)
sizes, losses = [], []


@find_executable_batch_size(starting_batch_size=12)
def train(batch_size):
    accelerator.free_memory()
    sizes.append(batch_size)
    losses.clear()
    set_seed(1)
    model = Classifier()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(64), batch_size=batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        if len(batch["labels"]) > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_all(accelerator, loss))


train()
assert sizes[0] == 12 and sizes[-1] == 8
accelerator.print(json.dumps({"losses": losses, "sizes": sizes}))
accelerator.end_training()
"""

# The loader has a generator of its own: a loop that begins draws a number, and from torch's generator that would change
# the dropout after a resume within an epoch, in both libraries. So the resumed losses are the uninterrupted run's.
RESUME = """
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch.optim import AdamW
from transformers import get_scheduler
# common
accelerator = Accelerator(cpu=True)


def train(save_every=None, resume_from=None):
    set_seed(3)
    accelerator.free_memory()
    model = Classifier()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(48), batch_size=4, generator=torch.Generator())
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=3 * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    first_epoch, first_step, done, losses = 0, 0, 0, []
    if resume_from is not None:
        accelerator.load_state(resume_from)
        kind, number = os.path.basename(resume_from).split("_")
        if kind == "epoch":
            first_epoch = int(number) + 1
        else:
            first_epoch, first_step = divmod(int(number), len(loader))
        done = first_epoch * len(loader) + first_step
    for epoch in range(first_epoch, 3):
        model.train()
        skipped = epoch == first_epoch and first_step
        for batch in skip_first_batches(loader, first_step) if skipped else loader:
            loss, _ = model(**batch)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            losses.append(loss_of_all(accelerator, loss))
            if save_every == "step" and done % 4 == 0:
                accelerator.save_state(f"step_{done}")
        if save_every == "epoch":
            accelerator.save_state(f"epoch_{epoch}")
    return losses


result = {
    "by step": train("step"),
    "by epoch": train("epoch"),
    "from step 8": train(resume_from="step_8"),
    "from epoch 0": train(resume_from="epoch_0"),
}
whole = result["by step"]
assert result["by epoch"] == whole
assert result["from step 8"] == whole[8:]
assert result["from epoch 0"] == whole[len(whole) // 3 :]
accelerator.print(json.dumps(result))
accelerator.end_training()
"""

CROSS_VALIDATION = """
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW
# common
from torch.utils.data import Sampler, Subset


class Order(Sampler):
    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed)).tolist())


accelerator = Accelerator(cpu=True)
rows, test_rows = Rows(51), Rows(11, seed=1)
order = torch.randperm(51, generator=torch.Generator().manual_seed(2)).tolist()
losses, accuracies, test_logits = [], [], []
for fold in range(3):
    train_rows = Subset(rows, [i for place, i in enumerate(order) if place % 3 != fold])
    held_out = Subset(rows, order[fold::3])
    model = Classifier()
    optimizer = AdamW(model.parameters(), lr=2e-2)
    loaders = [
        DataLoader(train_rows, batch_size=4, sampler=Order(len(train_rows), fold)),
        DataLoader(held_out, batch_size=4),
        DataLoader(test_rows, batch_size=4),
    ]
    model, optimizer, train_loader, eval_loader, test_loader = accelerator.prepare(model, optimizer, *loaders)
    model.train()
    for batch in train_loader:
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_all(accelerator, loss))
    model.eval()
    right = []
    for batch in eval_loader:
        with torch.no_grad():
            _, logits = model(**batch)
        answers, labels = accelerator.gather_for_metrics((logits.argmax(-1), batch["labels"]))
        right += (answers == labels).tolist()
    assert len(right) == len(held_out)
    accuracies.append([sum(right), len(right)])
    of_this_fold = []
    for batch in test_loader:
        with torch.no_grad():
            of_this_fold.append(accelerator.gather_for_metrics(model(**batch)[1]).cpu())
    test_logits.append(torch.cat(of_this_fold))
    accelerator.free_memory()
mean = torch.stack(test_logits).mean(0)
right = (mean.argmax(-1) == test_rows.labels).sum().item()
accelerator.print(json.dumps({"losses": losses, "accuracies": accuracies, "mean": mean.tolist(), "right": right}))
accelerator.end_training()
"""

# Each rank looks at the loss of its own rows: whichever falls first ends the training of all.
EARLY_STOPPING = """
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW
# common
accelerator = Accelerator(cpu=True)
model = Classifier()
optimizer = AdamW(model.parameters(), lr=5e-2)
loader = DataLoader(Rows(64), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses, stopped = [], False
for epoch in range(20):
    for batch in loader:
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_all(accelerator, loss))
        if loss.item() < 0.35:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            stopped = True
            break
    if stopped:
        break
assert stopped
accelerator.print(json.dumps({"losses": losses, "epoch": epoch}))
accelerator.end_training()
"""

# 21 rows in batches of 4: the last step is not full, on one rank and on two.
METRICS = """
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.optim import AdamW
# common
accelerator = Accelerator(cpu=True)
model = Classifier()
optimizer = AdamW(model.parameters(), lr=2e-2)
loader, eval_loader = DataLoader(Rows(32), batch_size=4), DataLoader(Rows(21, seed=1), batch_size=4)
model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
losses, counts, logits_seen, names_seen = [], [], [], []
for epoch in range(2):
    model.train()
    for batch in loader:
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_all(accelerator, loss))
    model.eval()
    right = seen = 0
    for batch in eval_loader:
        with torch.no_grad():
            _, logits = model(**batch)
        logits, labels = accelerator.gather_for_metrics((logits, batch["labels"]))
        right += (logits.argmax(-1) == labels).sum().item()
        seen += len(labels)
        logits_seen += logits.tolist()
        names = [f"class {label}" for label in batch["labels"].tolist()]
        names_seen += accelerator.gather_for_metrics(names, use_gather_object=True)
    assert seen == 21
    counts.append([right, seen])
ranks = gather_object([accelerator.process_index])
result = {"losses": losses, "counts": counts, "logits": logits_seen, "names": names_seen, "ranks": ranks}
accelerator.print(json.dumps(result))
accelerator.end_training()
"""

LOCAL_SGD = """
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import set_seed
from torch.optim import AdamW
# common
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = Classifier()
optimizer = AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(Rows(64), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=4, enabled=True) as local_sgd:
    for epoch in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss, _ = model(**batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
            losses.append(loss_of_all(accelerator, loss))
weights = [weight.tolist() for weight in accelerator.unwrap_model(model).parameters()]
accelerator.print(json.dumps({"losses": losses, "weights": weights}))
accelerator.end_training()
"""

# torch's DDP refuses "bf16" on a CPU.
COMM_HOOK = """
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, set_seed
from torch.optim import AdamW
# common
losses = {}
for hook, wrapper, options in (
    (DDPCommunicationHookType.FP16, DDPCommunicationHookType.NO, {}),
    (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.FP16, {"start_powerSGD_iter": 2}),
):
    set_seed(5)
    settings = DistributedDataParallelKwargs(comm_hook=hook, comm_wrapper=wrapper, comm_state_option=options)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[settings])
    model = Classifier()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(48), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses[str(hook)] = []
    for batch in loader:
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses[str(hook)].append(loss_of_all(accelerator, loss))
accelerator.print(json.dumps({"losses": list(losses.values())}))
accelerator.end_training()
"""

PROFILER = """
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs, set_seed
from torch.optim import AdamW
# common
averages = []
plan = {"wait": 1, "warmup": 1, "active": 2, "repeat": 2}
settings = ProfileKwargs(
    activities=["cpu"],
    schedule_option=plan,
    record_shapes=True,
    on_trace_ready=lambda profiler: averages.append(profiler.key_averages()),
)
accelerator = Accelerator(cpu=True, kwargs_handlers=[settings])
model = Classifier()
optimizer = AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(Rows(64), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
with accelerator.profile() as profiler:
    for batch in loader:
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_all(accelerator, loss))
        profiler.step()
with accelerator.profile(ProfileKwargs(activities=["cpu"], output_trace_dir="traces")):
    model(**batch)
accelerator.wait_for_everyone()
calls = [{event.key: event.count for event in found}["aten::addmm"] for found in averages]
accelerator.print(json.dumps({"losses": losses, "calls": calls, "traces": sorted(os.listdir("traces"))}))
accelerator.end_training()
"""

TRACKING = """
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import set_seed
from torch.optim import AdamW
# common


class Notebook(GeneralTracker):
    name = "notebook"
    requires_logging_directory = False

    def __init__(self, title):
        super().__init__()
        self.title, self.lines = title, []

    @property
    def tracker(self):
        return self.lines

    @on_main_process
    def store_init_configuration(self, values):
        self.lines.append({"title": self.title, **values})

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.lines.append({"step": step, **values, **kwargs})

    @on_main_process
    def finish(self):
        self.lines.append("finished")


accelerator = Accelerator(cpu=True, log_with=Notebook("a run"))
accelerator.init_trackers("project", config={"lr": 1e-2, "batch size": 4})
notebook = accelerator.get_tracker("notebook", unwrap=True) if accelerator.is_main_process else []
model = Classifier()
optimizer = AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(Rows(32), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
done = 0
for epoch in range(2):
    total = 0.0
    for batch in loader:
        loss, _ = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        mean = accelerator.reduce(loss.detach(), reduction="mean").item()
        total += mean
        accelerator.log({"loss": mean}, step=done)
    accelerator.log({"epoch's loss": total / len(loader)}, step=done, log_kwargs={"notebook": {"epoch": epoch}})
accelerator.end_training()
accelerator.print(json.dumps({"lines": notebook}))
"""

# All that are here: the library's other five are refused by name, and so is a warm-up of "constant", which the library
# ignores. Prepared schedules tick once for each rank, so the total is counted with the loader before `prepare`.
CLASSIFICATION = """
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW
from transformers import get_scheduler
# common
accelerator = Accelerator(cpu=True)
result = {}
for name, warmup, options in (
    ("linear", 4, None),
    ("constant", 0, None),
    ("constant_with_warmup", 4, None),
    ("cosine", 4, {"num_cycles": 0.75}),
    ("cosine_with_restarts", 4, {"num_cycles": 2}),
    ("polynomial", 4, {"power": 2.0, "lr_end": 1e-4}),
    ("inverse_sqrt", 4, {"timescale": 5}),
):
    set_seed(11)
    accelerator.free_memory()
    model = Classifier()
    biases = [weight for weight in model.parameters() if weight.ndim == 1]
    others = [weight for weight in model.parameters() if weight.ndim > 1]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=2e-2)
    loader, eval_loader = DataLoader(Rows(48), batch_size=4), DataLoader(Rows(18, seed=1), batch_size=4)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=2 * len(loader), scheduler_specific_kwargs=options
    )
    model, optimizer, loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, loader, eval_loader, scheduler
    )
    losses, rates, right = [], [], []
    for epoch in range(2):
        model.train()
        for batch in loader:
            loss, _ = model(**batch)
            accelerator.backward(loss)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss_of_all(accelerator, loss))
        model.eval()
        for batch in eval_loader:
            with torch.no_grad():
                _, logits = model(**batch)
            answers, labels = accelerator.gather_for_metrics((logits.argmax(-1), batch["labels"]))
            right += (answers == labels).tolist()
    assert len(right) == 2 * 18
    result[name] = {"losses": losses, "rates": rates, "right": right}
accelerator.print(json.dumps(result))
accelerator.end_training()
"""

SCRIPTS = {
    "gradient accumulation": ACCUMULATION,
    "automatic batch size": BATCH_SIZE,
    "checkpoint and resume": RESUME,
    "cross validation": CROSS_VALIDATION,
    "early stopping": EARLY_STOPPING,
    "metrics on several ranks": METRICS,
    "local SGD": LOCAL_SGD,
    "communication hook": COMM_HOOK,
    "profiler": PROFILER,
    "tracking": TRACKING,
    "classification, every schedule": CLASSIFICATION,
}
ON_TWO_RANKS_BY_DEFAULT = ("gradient accumulation", "metrics on several ranks", "checkpoint and resume")
LONGEST = "classification, every schedule"
CASES = [
    pytest.param(
        name,
        world,
        marks=pytest.mark.slow if (world == 2 and name not in ON_TWO_RANKS_BY_DEFAULT) or name == LONGEST else (),
        id=f"{name}-{world}".replace(" ", "_"),
    )
    for name in SCRIPTS
    for world in (1, 2)
]


def execute(text: str, folder: str, strict: bool) -> str:
    """One rank: run the text as a script in `folder` -> what it printed. `strict`: warnings are errors."""
    os.chdir(folder)
    sys.argv = ["script.py"]
    if os.environ["WORLD_SIZE"] == "1":
        # `python script.py`. Under torchrun one rank of Accelerate's has a group and a DDP of one (`gather` gives a
        # 0-d tensor a dimension); ours has neither.
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[variable]
    printed, end = io.StringIO(), dist.destroy_process_group
    if not strict:  # torch's own DDP may deadlock when it outlives its process group, as it does in a script
        dist.destroy_process_group = _later
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("error" if strict else "ignore")
        # torch's own, on both sides
        warnings.filterwarnings("ignore", "Warning. Profiler clears events at the end of each cycle", UserWarning)
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, "script.py", "exec"), names)
    names.clear()
    gc.collect()
    if dist.is_initialized():
        end()
    return printed.getvalue()


def _later(group: Any = None) -> None:
    pass


def compare(ours: Any, theirs: Any, where: str = "") -> set[float]:
    """Same structure and same values, floats up to TOLERANCE -> the floats."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        return set().union(*(compare(ours[key], theirs[key], f"{where}/{key}") for key in ours))
    if isinstance(ours, list):
        assert len(ours) == len(theirs), where
        pairs = enumerate(zip(ours, theirs, strict=True))
        return set().union(*(compare(one, two, f"{where}/{i}") for i, (one, two) in pairs))
    if isinstance(ours, float):
        assert abs(ours - theirs) <= TOLERANCE, (where, ours, theirs)
        return {ours}
    assert ours == theirs, where
    return set()


def run_both(name: str, world: int, tmp_path: Any) -> tuple[Any, Any]:
    """What the script prints with our imports, and with the library's."""
    text = SCRIPTS[name].replace("# common\n", COMMON)
    swapped = SWAPPED.sub("from nanofinetune import ", text)
    changed = [pair for pair in zip(text.splitlines(), swapped.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) >= 3 and all(line.startswith("from ") for pair in changed for line in pair)
    found = []
    for side, script in (("ours", swapped), ("theirs", text)):
        (folder := tmp_path / side).mkdir()
        printed = run_ranks(execute, world, script, str(folder), side == "ours", timeout=120)
        assert printed[1:] == [""] * (world - 1), "only the main process prints"
        found.append(json.loads(printed[0]))
    return found[0], found[1]


@pytest.mark.parametrize(("name", "world"), CASES)
def test_a_script_with_its_imports_changed_has_accelerates_losses(name, world, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate (extra `test`) is what the imports are changed from")
    ours, theirs = run_both(name, world, tmp_path)
    losses = compare(ours, theirs)
    assert len(losses) >= 8 and max(losses) - min(losses) > 0.1, "the losses must move, or equality says little"


def test_the_classification_script_has_every_schedule():
    assert re.findall(r'^    \("(\w+)", \d, ', CLASSIFICATION, re.MULTILINE) == list(SCHEDULES)
