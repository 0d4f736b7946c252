"""A run's faults on real ranks: whatever happens on one is known to all, in the same update. And what accelerate 1.15
does where memory runs out on one rank.

    OMP_NUM_THREADS=1 python -m pytest tests/run/test_run.py
"""

import json
import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from nanofinetune.accelerator import Accelerator
from nanofinetune.ranks.world import init_world, shutdown
from nanofinetune.run.resume import Start
from nanofinetune.run.run import Plan, Run, out_of_memory, smaller
from nanofinetune.settings import DataLoaderConfiguration
from nanofinetune.step.optim import AdamW
from nanofinetune.step.schedule import get_scheduler

ROWS = 24


def train(rows_per_step, loss_of=None, leave_out=lambda run: False, settle=None):
    """train.py's loop over one epoch of a linear model -> the Run when it is over, or the text of a RuntimeError.

    `loss_of(run, loss)` may change a loss or raise; a batch is not worked on where `leave_out(run)`; `settle(run,
    finite)` is told what the ranks have agreed on.
    """
    accelerator = Accelerator(
        cpu=True, uneven="mask", timeout=timedelta(seconds=20), step_scheduler_with_optimizer=True,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )  # fmt: skip
    torch.manual_seed(0)
    linear = nn.Linear(1, 1)
    data: Any = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(ROWS)]
    adamw = AdamW(linear.parameters(), lr=0.01)
    updates = ROWS // rows_per_step

    def new_loader(size: int) -> Any:
        return DataLoader(data, batch_size=size)

    args = SimpleNamespace(output=None, save_every=None, keep=2, on_nan="skip", seed=0, keep_best=None, patience=None)
    plan = Plan(args, ROWS, rows_per_step, 1, updates, Start(), {}, new_loader)
    model, optimizer, loader, scheduler = accelerator.prepare(
        linear, adamw, new_loader(rows_per_step), get_scheduler("linear", adamw, 0, updates)
    )
    run = Run(plan, accelerator, model, optimizer, scheduler, loader)
    original = run._settle

    def told() -> bool:
        finite = original()
        if settle is not None:
            settle(run, finite)
        return finite

    run._settle = told  # type: ignore[method-assign]
    try:
        with run:
            for epoch in run.epochs():
                for batch in run.batches(epoch):
                    if leave_out(run):
                        continue
                    with accelerator.accumulate(model), run.step():
                        loss = (model(batch["x"]) - batch["labels"]).pow(2).mean()
                        loss = loss if loss_of is None else loss_of(run, loss)
                        accelerator.backward(loss)
                        if run.agreed(loss):
                            optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                run.end_epoch({})
    except RuntimeError as error:
        return str(error)
    finally:
        accelerator.end_training()
    return run


def skipping():
    """Rank 1 leaves out its third batch of six -> what was agreed, and how the run ended on this rank."""
    agreed: list[tuple[int, bool, bool]] = []
    one = os.environ["RANK"] == "1"
    end = train(
        4,
        leave_out=lambda run: one and run.loader.batch_index == 2,
        settle=lambda run, finite: agreed.append((run.signal, finite, run.again)),
    )
    return agreed, end


def test_a_rank_that_skips_a_batch_is_found():
    """At that very update, on all ranks; without the check they would add up different batches' gradients."""
    for rank, (agreed, end) in enumerate(run_ranks(skipping, 2, timeout=60)):
        assert agreed == [(0, True, False)] * 2
        assert end.partition("\n")[0] == (
            f"the ranks are at different batches of this epoch, from 2 to 3, and rank {rank} is at {2 + rank}: a rank"
            " has skipped a batch or read one too many"
        )


def faults():
    """In one window rank 0 gets a signal, rank 1's loss is NaN and rank 2 runs out of memory; the next one is in order.

    -> (signal, finite, again) as agreed on; (rows a step, windows, updates, weight) at the end.
    """
    rank = int(os.environ["RANK"])
    agreed: list[tuple[int, bool, bool]] = []

    def loss_of(run, loss):
        if agreed:
            return loss
        if rank == 0:
            run.signals.number = 15
        if rank == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss * float("nan") if rank == 1 else loss

    def settle(run, finite):
        agreed.append((run.signal, finite, run.again))
        run.signals.number = 0

    run = train(6, loss_of, settle=settle)
    weight = run.accelerator.unwrap_model(run.model).weight.item()
    return agreed, (run.rows_per_step, run.accelerator.gradient_accumulation_steps, run.log.update, weight)


def undisturbed():
    run = train(6)
    return run.accelerator.unwrap_model(run.model).weight.item()


def test_all_ranks_hear_of_every_fault():
    """Each rank has another fault: all hear of all, read the rows again in half the batch, and end with one weight."""
    (weight, *_) = run_ranks(undisturbed, 3, timeout=60)
    for agreed, (*plan, found) in run_ranks(faults, 3, timeout=60):
        assert agreed[0] == (15, False, True)
        assert agreed[1:] == [(0, True, False)] * 4
        assert plan == [3, 2, 4]
        assert found == pytest.approx(weight, abs=1e-6)


# ---- memory ----


def test_out_of_memory_is_told_from_other_errors():
    """torch's own errors, raised for real on the CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(raised.value)
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    assert out_of_memory(MemoryError())


@pytest.mark.parametrize("rows", range(1, 40))
def test_smaller_keeps_rows_an_update(rows):
    part, accumulate = smaller(rows, 3)
    assert part * accumulate == rows * 3
    assert part < rows or rows == 1


def find_size():
    from accelerate.utils import find_executable_batch_size

    world = init_world("cpu", timedelta(seconds=20))
    tried = []

    @find_executable_batch_size(starting_batch_size=16)
    def train(batch_size):
        tried.append(batch_size)
        if world.rank == 1 and batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch_size

    found = train()
    shutdown(world)
    return found


@pytest.mark.slow
def test_accelerate_shrinks_one_rank_alone():
    """The trap: rank 0 goes on with 16 rows and rank 1 with fewer; their batches are no longer of one step."""
    pytest.importorskip("accelerate", reason="the reference of this test, extra `test`")
    assert run_ranks(find_size, 2, timeout=60)[0] == 16 != run_ranks(find_size, 2, timeout=60)[1]


# ---- bench/faults.py ----


@pytest.mark.first
@pytest.mark.slow
def test_every_killed_run_resumes_with_the_same_weights(tmp_path):
    """The table, with fewer kills: ours survives each fault; accelerate does not, as the table says."""
    pytest.importorskip("accelerate", reason="the other side of the table, extra `bench`")
    done = subprocess.run(
        [sys.executable, "bench/faults.py", "--kills", "10", "--json", str(tmp_path / "faults.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "faults.json").read_text())
    kills = record["kills"]["nanofinetune"]
    assert (kills["resumed"], kills["same weights"], kills["lost a checkpoint"]) == (10, 10, 0)
    ours = {name: found["nanofinetune"] for name, found in record["rows"].items()}
    theirs = {name: found["accelerate"] for name, found in record["rows"].items()}
    for kind in ("truncated", "has a flipped bit", "holds a malicious pickle"):
        assert ours[f"newest checkpoint {kind}"] == "passes over it, same weights"
        assert theirs[f"newest checkpoint {kind}"] != "passes over it, same weights"
    assert ours["disk full from the first save on"].startswith("training goes on to its end; said why")
    assert theirs["disk full from the first save on"].startswith("training ends")
    assert ours["SIGTERM on both ranks"] == "exit 143, saved at the update"
    assert theirs["SIGTERM on both ranks"] == "exit -15, nothing saved"
    for name in ("a rank is stopped (SIGSTOP)", "a rank skips a batch", "rank 0 fails in main_process_first"):
        assert ours[name].endswith("names the rank and the place")
        assert not theirs[name].endswith("names the rank and the place")
    assert (tmp_path / "faults.md").read_text().startswith("| fault | nanofinetune | accelerate |")
