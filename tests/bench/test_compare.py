"""bench/compare.py: both sides step through one run and agree; a one-line mistake in any piece is located.

    python -m pytest tests/bench/test_compare.py

Each mistake is put into one piece of this package, and the report must name the first step and tensor that it touches
and no other piece. The reference is the loop with transformers 5.23, accelerate 1.15 and torch 2.13.
"""

import json
import sys

import pytest
import torch
from conftest import ROOT, write_job

sys.path.insert(0, str(ROOT / "bench"))

import compare

pytest.importorskip("accelerate", reason="the side compared with (extra `bench`)")


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_tokenizer_dir):
    folder = tmp_path_factory.mktemp("compare")
    return compare.Job(*write_job(folder, tiny_tokenizer_dir, {"train": 80, "validation": 16}))


@pytest.fixture(autouse=True)
def accelerate_forgets():
    """Its state is the process's, and refuses a second precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def found(job, steps=6, adamw="loop", precision="no", tolerance=0.0):
    library, ours = (side(job, precision, adamw) for side in (compare.library_parts, compare.our_parts))
    return compare.first_difference(library, ours, steps, tolerance)


@pytest.mark.parametrize(
    ("adamw", "precision", "tolerance"),
    [("loop", "no", 0.0), ("foreach", "no", 0.0), ("default", "no", 1e-6), ("loop", "bf16", 0.0)],
)
def test_the_two_sides_agree(job, adamw, precision, tolerance):
    assert found(job, 10, adamw, precision, tolerance) is None


# piece -> (where the mistake goes, what replaces it, first step, part and tensor that must be named)
def wrong_padding(monkeypatch):
    original = compare.DataCollatorWithPadding._pad_values
    monkeypatch.setattr(
        compare.DataCollatorWithPadding, "_pad_values", lambda self: original(self) | {"token_type_ids": 1}
    )


def wrong_token(monkeypatch):
    original = compare.Job.our_data

    def our_data(self):
        stores = original(self)
        stores["train"].ragged["input_ids"][0][40] += 1  # one token of one row
        return stores

    monkeypatch.setattr(compare.Job, "our_data", our_data)


def wrong_division(monkeypatch):
    monkeypatch.setattr(compare.Accelerator, "_weigh", lambda self, loss: loss / 1.001)


def wrong_decay(monkeypatch):
    original = compare.AdamW.__init__

    def init(self, params, lr, **kwargs):
        original(self, params, lr=lr, weight_decay=0.0, **kwargs)

    monkeypatch.setattr(compare.AdamW, "__init__", init)


def wrong_epsilon(monkeypatch):
    original = compare.AdamW.__init__

    def init(self, params, lr, **kwargs):
        original(self, params, lr=lr, eps=1e-7, **kwargs)

    monkeypatch.setattr(compare.AdamW, "__init__", init)


def wrong_schedule(monkeypatch):
    original = compare.get_scheduler

    def one_more(name, optimizer, num_warmup_steps, num_training_steps):
        return original(name, optimizer, num_warmup_steps, num_training_steps + 1)

    monkeypatch.setattr(compare, "get_scheduler", one_more)


def wrong_ticking(monkeypatch):
    monkeypatch.setattr("nanofinetune.wrappers.AcceleratedScheduler.step", lambda self: None)


def forgotten_zero_grad(monkeypatch):
    monkeypatch.setattr("nanofinetune.wrappers.AcceleratedOptimizer.zero_grad", lambda self: None)


def wrong_order(monkeypatch):
    original = compare.BatchSampler

    def reversed_at_the_end(sampler, batch, drop_last):
        return original([*sampler[:16], *reversed(sampler[16:])], batch, drop_last)

    def our_parts(job, precision, adamw):
        with monkeypatch.context() as ours:
            ours.setattr(compare, "BatchSampler", reversed_at_the_end)
            parts = original_parts(job, precision, adamw)
            yield next(parts)  # until here the loader is made
        yield from parts

    original_parts = compare.our_parts
    monkeypatch.setattr(compare, "our_parts", our_parts)


def other_weights(monkeypatch):
    original, calls = compare.Job.classifier, []

    def classifier(self):
        model = original(self)
        calls.append(model)
        if len(calls) == 2:  # ours is made after the library's
            model.classifier.weight.data[0, 0] += 1e-6
        return model

    monkeypatch.setattr(compare.Job, "classifier", classifier)


@pytest.mark.parametrize(
    ("mistake", "step", "part", "tensor"),
    [
        (wrong_padding, 1, "batch", "token_type_ids"),
        (wrong_token, None, "batch", "input_ids"),
        (wrong_order, 3, "batch", "labels|input_ids"),
        (wrong_division, 1, "gradient", ""),
        (forgotten_zero_grad, 2, "gradient", ""),
        (wrong_schedule, 5, "learning rate", "of group 0"),
        (wrong_ticking, 2, "learning rate", "of group 0"),
        (wrong_decay, 2, "weight", ""),
        (wrong_epsilon, 2, "weight", ""),
        (other_weights, 0, "weight at the start", "classifier.weight"),
    ],
)
def test_a_mistake_of_one_line_is_located(mistake, step, part, tensor, job, monkeypatch):
    """The first update has learning rate 0 (warm-up), so that a wrong AdamW shows in the second."""
    mistake(monkeypatch)
    difference = found(job, steps=10)
    assert difference is not None, "the mistake went unseen"
    assert difference.part == part, str(difference)
    assert step is None or difference.step == step, str(difference)
    assert not tensor or difference.tensor in tensor.split("|"), str(difference)
    assert str(difference).endswith(compare.MADE_BY[part])


def test_the_default_forms_still_show_a_small_mistake(job, monkeypatch):
    """Within the tolerance of the fused kernel: a learning rate that is a thousandth too high."""
    original = compare.AdamW.__init__
    monkeypatch.setattr(
        compare.AdamW, "__init__", lambda self, params, lr, **options: original(self, params, lr=lr * 1.001, **options)
    )
    difference = found(job, adamw="default", tolerance=1e-6)
    assert difference is not None and (difference.step, difference.part) == (2, "learning rate"), str(difference)


def test_differences_in_words():
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.5]])
    assert compare.differ(one, other, 0.0) == "2 with the library and 2.5 with us at [0, 1]"
    assert compare.differ(one, other, 0.5) == ""
    assert compare.differ(one, torch.tensor([[1.0, float("nan")]]), 9.0).startswith("2 with the library and nan")
    assert compare.differ(one, other.int(), 9.0).startswith("(1, 2) torch.float32 with the library and (1, 2) torch.in")
    assert compare.differ(torch.tensor(1.0), torch.tensor(2.0), 0.0) == "1 with the library and 2 with us"
    library, ours = iter([("batch", {"a": one, "b": one})]), iter([("batch", {"a": one})])
    difference = compare.first_difference(library, ours, 1, 0.0)
    assert difference is not None and (difference.tensor, difference.how) == ("b", "only the library has it")


def test_more_steps_than_an_epoch_are_refused(job):
    with pytest.raises(compare.UsageError, match="--steps 99: an epoch has only 10 steps; choose fewer"):
        found(job, steps=99)


def test_the_command_ends_with_a_json_line_and_1_where_they_differ(job, monkeypatch, capsys):
    words = ["compare.py", "--model", job.model, "--data", job.data, "--steps", "2", "--adamw", "loop"]
    monkeypatch.setattr(sys, "argv", words)
    assert compare.run_main("compare.py", compare.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 steps: batches, losses, gradients, rates and weights agree, bit for bit"
    assert json.loads(lines[-1]) == {"steps": 2, "tolerance": 0.0, "difference": None}
    wrong_division(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["difference"]["part"] == "gradient"
