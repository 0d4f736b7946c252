"""The course's listings: run as written with the libraries, and again with only their import lines changed.

The listings below follow chapter 3 of the Hugging Face course (data preparation, the manual training loop, the
evaluation loop, the SST-2 exercise); `bert-base-uncased` and `glue` are folders in the directory that they run in, so
that the names in the text stay the course's. Both runs print every loss and the metrics, and must print the same (torch
2.13, transformers 5.23).

    python -m pytest tests/test_course.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, WORDS, save_tiny_model, tiny_bert
from programs import run_program

LIBRARY_IMPORTS = """
from torch.optim import AdamW
from transformers import DataCollatorWithPadding, get_scheduler
import fake_evaluate as evaluate
"""

OUR_IMPORTS = """
from nanofinetune import AdamW
from nanofinetune import DataCollatorWithPadding, get_scheduler
from nanofinetune import metrics as evaluate
"""

# What evaluate's GLUE script computes (the script itself is on the Hub only), with evaluate's interface.
FAKE_EVALUATE = """
from sklearn.metrics import accuracy_score, f1_score


class load:
    def __init__(self, path, config_name):
        self.config_name, self.predictions, self.references = config_name, [], []

    def add_batch(self, predictions, references):
        self.predictions += predictions.tolist()
        self.references += references.tolist()

    def compute(self):
        result = {"accuracy": float(accuracy_score(self.references, self.predictions))}
        if self.config_name == "mrpc":
            result["f1"] = float(f1_score(self.references, self.predictions))
        return result
"""

PREPARATION = """
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.manual_seed(0)
torch.set_num_threads(1)

raw_datasets = load_dataset("glue", "{task}")
checkpoint = "bert-base-uncased"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)


def tokenize_function(example):
    return tokenizer({texts}, truncation=True)


tokenized_datasets = raw_datasets.map(tokenize_function, batched=True)
data_collator = DataCollatorWithPadding(tokenizer=tokenizer)

tokenized_datasets = tokenized_datasets.remove_columns([{remove}, "idx"])
tokenized_datasets = tokenized_datasets.rename_column("label", "labels")
tokenized_datasets.set_format("torch")
tokenized_datasets["train"].column_names

train_dataloader = DataLoader(tokenized_datasets["train"], shuffle=True, batch_size=8, collate_fn=data_collator)
eval_dataloader = DataLoader(tokenized_datasets["validation"], batch_size=8, collate_fn=data_collator)

for batch in train_dataloader:
    break
print({{k: v.shape for k, v in batch.items()}})
"""

MANUAL_LOOP = """
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
outputs = model(**batch)
print(outputs.loss, outputs.logits.shape)

optimizer = AdamW(model.parameters(), lr=5e-5)

num_epochs = 3
num_training_steps = num_epochs * len(train_dataloader)
lr_scheduler = get_scheduler(
    "linear",
    optimizer=optimizer,
    num_warmup_steps=0,
    num_training_steps=num_training_steps,
)
print(num_training_steps)

device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
model.to(device)

from tqdm.auto import tqdm

progress_bar = tqdm(range(num_training_steps))

losses = []
model.train()
for epoch in range(num_epochs):
    for batch in train_dataloader:
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs.loss
        loss.backward()

        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        progress_bar.update(1)
        losses.append(loss.item())
"""

EVALUATION_LOOP = """
metric = evaluate.load("glue", "{task}")
model.eval()
for batch in eval_dataloader:
    batch = {{k: v.to(device) for k, v in batch.items()}}
    with torch.no_grad():
        outputs = model(**batch)

    logits = outputs.logits
    predictions = torch.argmax(logits, dim=-1)
    metric.add_batch(predictions=predictions, references=batch["labels"])

result = metric.compute()
"""

REPORT = """
import json
print(json.dumps({"losses": losses, "result": result, "lr": lr_scheduler.get_last_lr()}))
"""


@pytest.fixture(scope="module")
def course_folder(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A working directory that holds a model folder `bert-base-uncased` and a data set folder `glue`."""
    import datasets

    folder = tmp_path_factory.mktemp("course")
    save_tiny_model(folder / "bert-base-uncased", tiny_tokenizer_dir, dropout=0.1)
    rng = np.random.default_rng(0)
    configs = []
    for task, columns in (("mrpc", ("sentence1", "sentence2")), ("sst2", ("sentence",))):
        files = []
        for split, rows in (("train", 90), ("validation", 21)):
            content = [
                {
                    **{column: " ".join(rng.choice(WORDS, rng.integers(3, 20))) for column in columns},
                    "label": int(rng.random() < 0.6),
                    "idx": i,
                }
                for i in range(rows)
            ]
            path = folder / "glue" / task / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(content).to_parquet(path)
            files.append(f"  - split: {split}\n    path: {task}/{split}.parquet\n")
        configs.append(f"- config_name: {task}\n  data_files:\n{''.join(files)}")
    (folder / "glue" / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    (folder / "fake_evaluate.py").write_text(FAKE_EVALUATE)
    return folder


def run_listing(folder: Path, imports: str, listing: str) -> dict:
    """Run the text as a script in `folder` -> what its last line printed."""
    script = folder / "listing.py"
    script.write_text(imports + listing)
    done = run_program([script.name], cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(folder: Path, listing: str, steps: int) -> None:
    theirs, ours = (run_listing(folder, imports, listing) for imports in (LIBRARY_IMPORTS, OUR_IMPORTS))
    assert len(ours["losses"]) == steps
    # AdamW's default here is the fused kernel, torch's the loop: the same formula, other rounding.
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=0, atol=1e-5)
    assert ours["result"] == theirs["result"]
    assert ours["lr"] == theirs["lr"] == [0.0]


def test_course_manual_loop_matches_the_libraries(course_folder):
    pytest.importorskip("sklearn", reason="scikit-learn (extra `test`) is what evaluate's metric calls")
    texts = 'example["sentence1"], example["sentence2"]'
    preparation = PREPARATION.format(task="mrpc", texts=texts, remove='"sentence1", "sentence2"')
    listing = preparation + MANUAL_LOOP + EVALUATION_LOOP.format(task="mrpc") + REPORT
    compare(course_folder, listing, steps=3 * 12)


def test_course_sst2_exercise_matches_the_libraries(course_folder):
    pytest.importorskip("sklearn", reason="scikit-learn (extra `test`) is what evaluate's metric calls")
    preparation = PREPARATION.format(task="sst2", texts='example["sentence"]', remove='"sentence"')
    listing = preparation + MANUAL_LOOP + EVALUATION_LOOP.format(task="sst2") + REPORT
    compare(course_folder, listing, steps=3 * 12)


# What README's block leaves to compare: losses after the training, and the last rate.
AFTERWARDS = """
import json
model.eval()
with torch.no_grad():
    losses = [model(**batch).loss.item() for batch in eval_dl]
print(json.dumps({"losses": losses, "lr": lr_scheduler.get_last_lr()}))
"""


def test_readmes_loop_matches_the_libraries(course_folder):
    """README's first screen: the block of Python, with the imports of either side of the diff above it.

    Rows keep their order, since `prepare` shuffles by a seed of its own on purpose.
    """
    pytest.importorskip("accelerate", reason="accelerate (extra `test`) is what the imports are changed from")
    readme = (ROOT / "README.md").read_text()
    diff, loop = (readme.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("diff", "python"))
    texts = 'example["sentence1"], example["sentence2"]'
    preparation = PREPARATION.format(task="mrpc", texts=texts, remove='"sentence1", "sentence2"')
    preparation = preparation.replace("shuffle=True, ", "")
    found = []
    for side in "-+":
        imports = "\n".join(line[1:] for line in diff.splitlines() if line[0] == side)
        found.append(run_listing(course_folder, imports, preparation + loop + AFTERWARDS))
    theirs, ours = found
    assert len(ours["losses"]) == 3 and ours["lr"] == theirs["lr"] == [0.0]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=0, atol=1e-5)


def test_the_courses_own_import_line_no_longer_works():
    """`from transformers import AdamW`, which the course's older listings have, is gone from the library."""
    with pytest.raises(ImportError):
        from transformers import AdamW  # noqa: F401


@pytest.mark.parametrize(("form", "tolerance"), [("loop", 0.0), ("foreach", 0.0), ("fused", 1e-5)])
@pytest.mark.parametrize("size", ["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def test_thirty_losses_match_the_transformers_accelerate_torch_loop(size, form, tolerance, tiny_tokenizer, request):
    """Same weights, batches and dropout seeds: bit for bit with AdamW's loop and foreach forms on a CPU."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate (extra `test`) is the loop compared with")
    import torch
    import transformers

    from nanofinetune import Accelerator, AdamW, DataCollatorWithPadding, get_scheduler

    folder = request.getfixturevalue("packaged_model") if size == "packaged" else None
    rate = 5e-5 if folder else 3e-3

    def new_model():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification.from_pretrained(folder) if folder else tiny_bert()

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(30):
        rows = []
        for _ in range(8):
            ids = torch.randint(5, 25, (int(torch.randint(3, 30, (1,), generator=generator)),), generator=generator)
            rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "label": int(ids[0] % 2)})
        batches.append(rows)

    def run(accelerator, collator, optimizer_class, scheduler_of, **flags):
        model = new_model()
        optimizer = optimizer_class(model.parameters(), lr=rate, **flags)
        scheduler = scheduler_of("linear", optimizer=optimizer, num_warmup_steps=3, num_training_steps=30)
        model, optimizer = accelerator.prepare(model, optimizer)
        model.train()
        losses = []
        for step, rows in enumerate(batches):
            torch.manual_seed(step)
            loss = model(**collator(rows)).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    theirs = run(
        accelerate.Accelerator(cpu=True),
        transformers.DataCollatorWithPadding(tiny_tokenizer),
        torch.optim.AdamW,
        transformers.get_scheduler,
        foreach=form == "foreach",
    )
    ours = run(
        Accelerator(cpu=True),
        DataCollatorWithPadding(tiny_tokenizer),
        AdamW,
        get_scheduler,
        foreach=form == "foreach",
        fused=form == "fused",
    )
    assert len(ours) == 30 and max(ours) - min(ours) > 0.03, "the losses must move, or equality says little"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
