"""The trial before the first update: it finds what cannot work, and leaves no trace in the run.

python -m pytest tests/run/test_trial.py
"""

import random
import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, tiny_bert
from helpers import run_ranks
from transformers import AutoConfig, AutoModelForSequenceClassification, BertForSequenceClassification

from nanofinetune import Accelerator, DataCollatorWithPadding
from nanofinetune.data.tokens import tokenize_texts
from nanofinetune.ground.errors import UsageError
from nanofinetune.run import trial as module
from nanofinetune.run.trial import longest, trial, unchanged

train = load_script(ROOT / "train.py")


@pytest.fixture
def run(call_main):
    """Call train.py's main -> (exit code, stdout, stderr)."""
    return partial(call_main, train)


def job_of(tokenizer, model=None) -> Any:
    """A job of three rows, the second of which is the longest."""
    store = tokenize_texts(["the cat", "the cat sat on the old red mat", "a dog"], None, tokenizer, 64)
    store.dense = {"label": np.array([0, 1, 1])}
    return SimpleNamespace(
        model=model or tiny_bert(), model_name="tiny", train=store, validation={"validation": store},
        collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip


def test_a_trial_changes_no_bit_of_the_run(run, tiny_model, pairs, tmp_path, monkeypatch):
    """Dropout, order and weights are those of a run without it."""
    for name in ("with", "without"):
        assert run("--model", tiny_model, "--data", pairs, "--output", tmp_path / name)[0] == 0
        monkeypatch.setattr(train, "trial", lambda *_: None)
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_a_trial_computes_the_longest_batch_once_and_leaves_nothing(tiny_tokenizer, monkeypatch):
    seen = []
    original = BertForSequenceClassification.forward

    def listen(self, **batch):
        seen.append((batch["input_ids"].shape, self.training))
        random.random(), np.random.random()
        return original(self, **batch)

    monkeypatch.setattr(BertForSequenceClassification, "forward", listen)
    job = job_of(tiny_tokenizer)
    job.model.eval()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    trial(Accelerator(cpu=True), job, 2)
    assert seen == [((2, 10), True)] and not job.model.training
    assert all(parameter.grad is None for parameter in job.model.parameters())
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert str(np.random.get_state()) == before[2]


def test_buffers_are_put_back():
    """A batch norm counts the batches that it has seen, even those of a trial."""
    model: Any = torch.nn.BatchNorm1d(2)
    with unchanged(model, torch.device("cpu")):
        model(torch.ones(3, 2))
        assert model.num_batches_tracked == 1
    assert model.num_batches_tracked == 0 and not model.running_mean.any()


def test_the_longest_rows_come_in_a_fixed_order():
    assert longest(np.array([1, 5, 5, 2, 5]), 3).tolist() == [1, 2, 4] and longest(np.array([1]), 8).tolist() == [0]


def test_what_fails_in_the_trial_is_one_line(run, tiny_tokenizer_dir, pairs, tmp_path):
    """X-MOD without a language loads, and its first forward raises: here before the folder of the run is made."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("xmod", vocab_size=32, pad_token_id=0, languages=["en_XX"], **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="Input language unknown"):
        model(input_ids=torch.tensor([[5]]))
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    code, _, err = run("--model", tmp_path / "model", "--data", pairs, "--output", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert (
        f"model {tmp_path / 'model'}: it cannot be trained on 8 rows of up to 28 tokens (ValueError: Input lang" in err
    )


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (
            IndexError("index out of range in self"),
            "it cannot be trained on 2 rows of up to 10 tokens (IndexError: index out",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory with one row of 10 tokens; choose a smaller --max-length",
        ),
    ],
)
def test_a_failure_names_the_rows_and_the_remedy(raised, why, tiny_tokenizer, monkeypatch):
    def fail(self, **batch):
        raise raised

    monkeypatch.setattr(BertForSequenceClassification, "forward", fail)
    with pytest.raises(UsageError) as caught:
        trial(Accelerator(cpu=True), job_of(tiny_tokenizer), 2)
    assert str(caught.value).startswith(f"model tiny: {why}")


def test_memory_for_one_row_is_enough(tiny_tokenizer, monkeypatch):
    """The run itself makes its batches smaller."""
    original, sizes = BertForSequenceClassification.forward, []

    def small(self, **batch):
        sizes.append(len(batch["input_ids"]))
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, **batch)

    monkeypatch.setattr(BertForSequenceClassification, "forward", small)
    trial(Accelerator(cpu=True), job_of(tiny_tokenizer), 3)
    assert sizes == [3, 1]


def test_tokens_beyond_the_table_are_named(tiny_tokenizer):
    """The longest batch need not hold the one row that has such a token; nor need the training rows."""
    job = job_of(tiny_tokenizer)
    flat, offsets = job.train.ragged["input_ids"]
    job.train.ragged["input_ids"] = np.where(np.arange(len(flat)) == 1, 32, flat), offsets
    with pytest.raises(
        UsageError, match=r"its tokenizer gives input_ids up to 32 \(train\), and the table has 32 rows; save"
    ):
        trial(Accelerator(cpu=True), job, 2)
    job = job_of(tiny_tokenizer)
    flat, offsets = job.train.ragged["token_type_ids"]
    job.train.ragged["token_type_ids"] = flat + 2, offsets
    with pytest.raises(UsageError, match=r"gives token_type_ids up to 2 \(train\), and the table has 2 rows"):
        trial(Accelerator(cpu=True), job, 2)


def test_a_config_that_cannot_be_saved_is_found_before_the_training(tiny_tokenizer):
    job = job_of(tiny_tokenizer)
    job.model.config.extra = object()
    with pytest.raises(TypeError):
        job.model.config.to_json_string()
    with pytest.raises(UsageError, match=r"its config cannot be saved .*; correct its config.json"):
        trial(Accelerator(cpu=True), job, 2)


def failing_on_rank_1(tokenizer_dir):
    from transformers import AutoTokenizer

    accelerator, job = Accelerator(cpu=True), job_of(AutoTokenizer.from_pretrained(tokenizer_dir))
    if accelerator.process_index == 1:
        job.model.forward = lambda **_: SimpleNamespace(loss=None)
    try:
        trial(accelerator, job, 4)
    except UsageError as error:
        return str(error)
    finally:
        accelerator.end_training()
    return ""


def test_all_ranks_hear_of_one_ranks_failure(tiny_tokenizer_dir):
    said = run_ranks(failing_on_rank_1, 2, tiny_tokenizer_dir)
    assert (
        said[0] == said[1] == "model tiny: it computes no loss from labels; choose a model for classification (rank 1)"
    )


def test_xla_compiles_no_program_for_the_trial(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_train_once", lambda *_: pytest.fail("it was tried"))
    accelerator: Any = SimpleNamespace(device=torch.device("xla"), num_processes=1, world=Accelerator(cpu=True).world)
    trial(accelerator, job_of(tiny_tokenizer), 2)
