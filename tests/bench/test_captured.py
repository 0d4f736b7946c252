"""bench/captured.py and bench/gpu.sh as far as a CPU shows them: buckets, bookkeeping, the losses of an eager run.

    python -m pytest tests/bench/test_captured.py

In place of a CUDA graph stands one that runs its function again, on the tensors that it was captured with: what was not
copied into them, or not zeroed, shows in the losses. References: an eager loop with torch 2.13.
"""

import shlex
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, tiny_bert

sys.path.insert(0, str(ROOT / "bench"))

import captured
import throughput

from nanofinetune.step.collate import DataCollatorWithPadding
from nanofinetune.step.optim import AdamW


def again(function):
    """A fake graph: recording runs nothing, as a capture does; replaying runs the function on the same tensors."""
    return function


def made_batches(tokenizer, lengths=(8, 16, 24)):
    """12 batches of 4 rows and one of 3, of growing and falling lengths, padded to buckets."""
    generator = torch.Generator().manual_seed(0)
    collator = partial(captured.collate_to_fixed_length, tokenizer, lengths)
    found = []
    for i in range(13):
        rows = []
        for _ in range(4 if i < 12 else 3):
            n = int(torch.randint(3, (8, 16, 24)[i % 3] + 1, (1,), generator=generator))
            ids = torch.randint(5, 25, (n,), generator=generator).tolist()
            rows.append({"input_ids": ids, "attention_mask": [1] * n, "label": ids[0] % 2})
        found.append(collator(rows))
    return found


def losses_of(step_of, batches):
    model = tiny_bert().train()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    step = step_of(model)
    losses = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        losses.append(step(batch).item())
        optimizer.step()
        if step_of is eager:
            optimizer.zero_grad()
    return losses, step


def eager(model):
    def step(batch):
        loss = model(**batch).loss
        loss.backward()
        return loss

    return step


@pytest.mark.parametrize("most_shapes", [8, 2, 0])
def test_captured_steps_give_the_losses_of_an_eager_run(most_shapes, tiny_tokenizer):
    batches = made_batches(tiny_tokenizer)
    expected, _ = losses_of(eager, batches)
    found, step = losses_of(lambda model: captured.CapturedStep(model, 4, again, most_shapes=most_shapes), batches)
    assert found == expected and max(found) - min(found) > 0.03
    shapes = {tuple(batch["input_ids"].shape) for batch in batches if len(batch["labels"]) == 4}
    assert len(shapes) == 3 and len(step.graphs) == min(3, most_shapes)
    in_graphs = sum(tuple(batch["input_ids"].shape) in step.graphs for batch in batches)
    assert step.eager == len(batches) - in_graphs >= 1, "the short batch is never captured"


def test_each_shape_is_captured_once_and_gradients_keep_their_addresses(tiny_tokenizer):
    recorded, replayed = [], []

    def counting(function):
        def replay():
            replayed.append(function)
            function()

        recorded.append(function)
        return replay

    model = tiny_bert().train()
    step = captured.CapturedStep(model, 4, counting)
    before = [p.grad.data_ptr() for p in model.parameters()]
    batches = made_batches(tiny_tokenizer)
    for batch in batches * 2:
        kept = {name: tensor.clone() for name, tensor in batch.items()}
        step(batch)
        assert all(torch.equal(kept[name], batch[name]) for name in kept), "a batch is not written to"
    assert len(recorded) == 3 and len(replayed) == 24 and step.eager == 2
    assert [p.grad.data_ptr() for p in model.parameters()] == before


def test_a_graph_that_forgets_to_copy_its_inputs_would_be_seen(tiny_tokenizer, monkeypatch):
    batches = made_batches(tiny_tokenizer)
    expected, _ = losses_of(eager, batches)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, non_blocking=False: self)
    found, _ = losses_of(lambda model: captured.CapturedStep(model, 4, again), batches)
    assert found != expected


def test_other_columns_than_captured_are_refused(tiny_tokenizer):
    step = captured.CapturedStep(tiny_bert(), 4, again)
    batch = made_batches(tiny_tokenizer)[0]
    step(batch)
    with pytest.raises(ValueError, match="was captured with"):
        step({name: tensor for name, tensor in batch.items() if name != "attention_mask"})


def test_buckets_hold_equally_many_rows_and_every_length():
    lengths = torch.randint(10, 120, (3668,), generator=torch.Generator().manual_seed(0)).tolist()
    found = captured.buckets(lengths, limit=512)
    assert len(found) <= 8 and all(bucket % 8 == 0 for bucket in found) and found[-1] >= max(lengths)
    counts = [sum(low < n <= high for n in lengths) for low, high in zip((0, *found), found, strict=False)]
    assert max(counts) < 2 * 3668 / 8
    assert captured.buckets([508, 511], limit=510)[-1] == 510  # 512 positions would be too many
    assert captured.buckets([], limit=100) == (32, 64, 100)


def test_padding_to_a_bucket_only_adds_padding(tiny_tokenizer):
    rows = [{"input_ids": [7, 8, 9], "label": 1}, {"input_ids": [5], "label": 0}]
    plain = DataCollatorWithPadding(tiny_tokenizer)(rows)
    padded = captured.collate_to_fixed_length(tiny_tokenizer, (2, 8), rows)
    assert padded["input_ids"].shape == (2, 8)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(padded[name][:, :3], plain[name]) and not padded[name][:, 3:].any()


def test_without_cuda_the_command_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for device, message in (("cuda", "torch sees no CUDA device here"), ("cpu", "only CUDA has graphs; choose cuda")):
        monkeypatch.setattr(sys, "argv", ["captured.py", "--device", device])
        assert captured.run_main("captured.py", captured.main) == 2
        assert message in capsys.readouterr().err


def test_gpu_sh_prints_commands_that_the_scripts_take():
    script = ROOT / "bench" / "gpu.sh"
    done = subprocess.run(
        ["sh", script, "--print", "--data", "./mrpc"], capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = [line.split() for line in done.stdout.splitlines()]
    assert [line[3].rpartition("/")[2] for line in shown] == ["throughput.py", "captured.py", "captured.py"]
    assert all(line[-2:] == ["--data", "./mrpc"] for line in shown)
    args = throughput.parse(shown[0][4:])
    assert set(args.setups) <= set(throughput.setups(args.nproc, args.precision, args.steps)) and args.device == "cuda"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_gpu_sh_without_a_gpu_is_one_line_and_exit_2():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = subprocess.run(
        ["sh", ROOT / "bench" / "gpu.sh"], capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("gpu.sh: torch sees no CUDA device here"), done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("words", [[], ["--print"]])
@pytest.mark.parametrize("python", ["without-torch", "no-such-python"])
def test_gpu_sh_without_torch_is_one_line_and_exit_2(python, words, tmp_path):
    other = tmp_path / "without-torch"
    other.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')  # -S: without what is installed
    other.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "bench" / "gpu.sh", *words], capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / python)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"gpu.sh: {tmp_path / python} cannot import torch; name a python that can")
    assert done.stderr.count("\n") == 1, done.stderr
