"""N ranks train as one process does; and the course's Accelerate listing runs here with only its imports changed.

The first against our own single process, with accelerate 1.15 on the same ranks and rows beside it; the second against
accelerate 1.15 under torchrun. On real gloo ranks, with a tiny BERT.

    OMP_NUM_THREADS=1 python -m pytest tests/ranks/test_equal_ranks.py
"""

import gc
import json
import random
import shutil
import textwrap
import warnings

import pytest
import torch
from conftest import WORDS, tiny_bert
from helpers import run_ranks, run_torchrun
from torch.utils.data import DataLoader

from nanofinetune.accelerator import Accelerator
from nanofinetune.step.optim import AdamW

# 101 rows are 8 steps of 12 and one of 5, which on 4 ranks is 2 + 2 + 1 + 0; windows of 4 steps leave a last one alone.
ROWS, BATCH, UPDATES = 101, 12, 40
# What the maths gives shows in float64; in float32 AdamW makes steps of full length out of rounding errors where the
# gradient ought to be 0 (attention does not depend on the bias of its keys), which is most of the difference there.
CASES = {
    "fp32": (torch.float32, 1, False),  # dtype, gradient_accumulation_steps, regression
    "fp32, accumulation": (torch.float32, 4, False),
    "fp64, accumulation": (torch.float64, 4, False),
    "fp64, accumulation, regression": (torch.float64, 4, True),
}
THEIRS = ("fp32", "fp64, accumulation")  # those that accelerate runs too


def rows(regression):
    """Sentences of 3 to 9 tokens with a label each, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(ROWS):
        tokens = torch.randint(5, 32, (3 + i % 7,), generator=generator)
        label = torch.randn((), generator=generator) if regression else torch.tensor(int(tokens[0]) % 2)
        made.append({"input_ids": tokens, "labels": label})
    return made


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(batch):
        ids[i, : len(row["input_ids"])], mask[i, : len(row["input_ids"])] = row["input_ids"], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([row["labels"] for row in batch])}


def start(regression, dtype=torch.float32):
    return tiny_bert(num_labels=1 if regression else 2, dropout=0.0).to(dtype).train()


def trained(accelerator, dtype, regression):
    """All parameters in one vector, after UPDATES updates; rows come in the order of the list."""
    data = rows(regression)
    if regression:
        data = [row | {"labels": row["labels"].to(dtype)} for row in data]
    model = start(regression, dtype)
    loader = DataLoader(data, batch_size=BATCH, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, AdamW(model.parameters(), lr=2e-4), loader)
    done = 0
    while done < UPDATES:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == UPDATES:
                break
    return vector(accelerator.unwrap_model(model))


def vector(model):
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def with_ours():
    result = {}
    for name, (dtype, steps, regression) in CASES.items():
        accelerator = Accelerator(cpu=True, split_batches=True, gradient_accumulation_steps=steps, uneven="mask")
        result[name] = trained(accelerator, dtype, regression)
    return result


def with_accelerate():
    from accelerate import Accelerator as Theirs
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DataLoaderConfiguration

    result = {}
    for name in THEIRS:
        dtype, steps, regression = CASES[name]
        # Theirs ignores split_batches=True.
        config = DataLoaderConfiguration(split_batches=True)
        accelerator = Theirs(cpu=True, gradient_accumulation_steps=steps, dataloader_config=config)
        result[name] = trained(accelerator, dtype, regression)
        GradientState._reset_state()
        AcceleratorState._reset_state()  # keeps the process group
    PartialState._reset_state()
    return result


def both():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate's, about threads
        theirs = with_accelerate()
    gc.collect()  # torch's DDP goes before the process group does
    return with_ours(), theirs


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    return with_ours()


def distance(ours, reference, moved=None):
    """The length of the difference, over that of the parameters, or of how far they moved."""
    return ((ours - reference).norm() / (reference if moved is None else reference - moved).norm()).item()


def assert_equal_to_one_process(ranks, alone):
    for name, (dtype, _, regression) in CASES.items():
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), name
        assert distance(ranks[0][name], alone[name]) < 1e-6, name
        if dtype == torch.float64:  # nothing but rounding in the last places, even over how far training went
            assert distance(ranks[0][name], alone[name], vector(start(regression))) < 1e-11, name


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(alone, world):
    assert_equal_to_one_process(run_ranks(with_ours, world, timeout=170), alone)


@pytest.mark.slow
def test_ranks_equal_one_process_where_accelerate_does_not(alone):
    pytest.importorskip("accelerate", reason="what this test compares with (extra `test`)")
    ranks = run_ranks(both, 2, timeout=170)
    assert_equal_to_one_process([ours for ours, _ in ranks], alone)

    theirs, theirs_alone = ranks[0][1], with_accelerate()
    for name in THEIRS:
        _, steps, regression = CASES[name]
        # Its two ranks repeat rows of the first batch: they end some hundredths of the way off its single process.
        assert distance(theirs[name], theirs_alone[name], vector(start(regression))) > 0.01, name
        # One process of ours is one of theirs, as long as no window is short.
        assert torch.equal(alone[name], theirs_alone[name]) == (steps == 1), name


# The course's "a full training", accelerated, with its prints and plots left out, and the places that it leaves to the
# reader filled in: a checkpoint, a data set, a metric that needs no network. Rows keep their order, since orders differ
# on purpose.
IMPORTS = {
    "accelerate": """
        from accelerate import Accelerator
        from torch.optim import AdamW
        from transformers import DataCollatorWithPadding, get_scheduler
    """,
    "nanofinetune": """
        from nanofinetune.accelerator import Accelerator
        from nanofinetune import AdamW, DataCollatorWithPadding, get_scheduler
    """,
}
LISTING = """
import json
import os
import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nanofinetune import metrics as evaluate

checkpoint, folder = sys.argv[1:]
torch.manual_seed(0)
raw_datasets = load_dataset("json", data_dir=f"{folder}/data", cache_dir=f"{folder}/cache{os.environ['RANK']}")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)


def tokenize_function(example):
    return tokenizer(example["sentence1"], example["sentence2"], truncation=True)


tokenized_datasets = raw_datasets.map(tokenize_function, batched=True)
tokenized_datasets = tokenized_datasets.remove_columns(["sentence1", "sentence2", "idx"])
tokenized_datasets = tokenized_datasets.rename_column("label", "labels")
tokenized_datasets.set_format("torch")
data_collator = DataCollatorWithPadding(tokenizer=tokenizer)
train_dataloader = DataLoader(tokenized_datasets["train"], batch_size=4, collate_fn=data_collator)
eval_dataloader = DataLoader(tokenized_datasets["validation"], batch_size=4, collate_fn=data_collator)

accelerator = Accelerator()
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
optimizer = AdamW(model.parameters(), lr=3e-5)

train_dl, eval_dl, model, optimizer = accelerator.prepare(train_dataloader, eval_dataloader, model, optimizer)

num_epochs = 3
num_training_steps = num_epochs * len(train_dl)
lr_scheduler = get_scheduler(
    "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=num_training_steps
)

losses, lrs = [], []
model.train()
for epoch in range(num_epochs):
    for batch in train_dl:
        outputs = model(**batch)
        loss = outputs.loss
        accelerator.backward(loss)
        losses.append(loss.item())

        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        lrs.append(lr_scheduler.get_last_lr()[0])

metric = evaluate.load("glue", "mrpc")
model.eval()
for batch in eval_dl:
    with torch.no_grad():
        outputs = model(**batch)
    predictions = outputs.logits.argmax(dim=-1)
    predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
    metric.add_batch(predictions=predictions, references=references)

report = {"losses": losses, "lrs": lrs, "rows": len(metric), "scores": metric.compute()}
report["ranks"] = [accelerator.process_index, accelerator.num_processes, accelerator.device.type]
with open(f"{folder}/report{accelerator.process_index}.txt", "w") as file:
    json.dump(report, file)
"""
# The library's listing leaves torch's DDP to the interpreter's end, which it aborts now and then ("terminate called
# without an active exception"): our side of it is `world._let_threads_finish`.
ENDING = {"accelerate": "\naccelerator.wait_for_everyone()\nos._exit(0)\n", "nanofinetune": ""}


@pytest.mark.slow
def test_course_listing_matches_accelerate_under_torchrun(tmp_path, tiny_tokenizer_dir):
    pytest.importorskip("accelerate", reason="what this test compares with (extra `test`)")
    pytest.importorskip("datasets", reason="the listing loads its data with it")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_tokenizer_dir, checkpoint)
    tiny_bert().save_pretrained(checkpoint)  # with dropout
    reports = {}
    for library, imports in IMPORTS.items():
        folder = tmp_path / library
        (folder / "data").mkdir(parents=True)
        draw = random.Random(0)
        for split, count in (("train", 77), ("validation", 21)):  # neither is a multiple of 8: both wrap
            sentences = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(2 * count)]
            lines = [
                {"sentence1": sentences[i], "sentence2": sentences[-1 - i], "label": draw.randint(0, 1), "idx": i}
                for i in range(count)
            ]
            (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        script = folder / "train.py"
        script.write_text(textwrap.dedent(imports) + LISTING + ENDING[library])
        # A machine without a GPU; there Accelerate would run two copies of one process without the second variable.
        done = run_torchrun(
            [script, checkpoint, folder], 2, env={"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        )
        assert done.returncode == 0, done.stderr
        reports[library] = [json.loads((folder / f"report{rank}.txt").read_text()) for rank in range(2)]

    for rank, (ours, theirs) in enumerate(zip(reports["nanofinetune"], reports["accelerate"], strict=True)):
        assert ours["ranks"] == theirs["ranks"] == [rank, 2, "cpu"]
        assert len(ours["losses"]) == len(theirs["losses"]) == 30
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5, rel=0)
        assert ours["lrs"] == theirs["lrs"]
        assert ours["rows"] == theirs["rows"] == 21
        assert ours["scores"] == theirs["scores"]
    assert reports["nanofinetune"][0]["losses"] != reports["nanofinetune"][1]["losses"]  # each rank has its own rows
