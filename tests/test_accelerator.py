"""nanofinetune.accelerator against accelerate 1.15's Accelerator, both in this process or on the same gloo ranks.

Bit for bit, except where we differ on purpose: there the test shows what accelerate does.

    OMP_NUM_THREADS=1 python -m pytest tests/test_accelerator.py
"""

import copy
import dataclasses
import gc
import inspect
import pickle
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import product
from operator import attrgetter
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from helpers import run_ranks
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from nanofinetune import accelerator as facade
from nanofinetune import settings
from nanofinetune.accelerator import Accelerator
from nanofinetune.dropin import ATTRIBUTES, METHODS
from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.loader import DataLoaderShard
from nanofinetune.settings import (
    ABSENT,
    AutocastKwargs,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
)
from nanofinetune.step.optim import AdamW
from nanofinetune.step.order import SeedableRandomSampler
from nanofinetune.step.schedule import get_scheduler
from nanofinetune.wrappers import AcceleratedOptimizer


def ours(**arguments):
    return Accelerator(cpu=True, **arguments)


def reset():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    GradientState._reset_state()
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def theirs():
    """Makes accelerate's Accelerator, each time with its global state new."""
    accelerate = pytest.importorskip("accelerate", reason="the reference of these tests, extra `test`")

    def make(**arguments):
        reset()
        return accelerate.Accelerator(cpu=True, **arguments)

    yield make
    reset()


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def plain(dataset, **settings):  # torch's DataLoader takes tensors and lists, but its annotations do not say so
    return DataLoader(dataset, **settings)


def loader_of(count, batch_size, **settings):
    data = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return plain(data, batch_size=batch_size, **settings)


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(torch.ones(self.count, 3))


# ---- windows --------------------------------------------------------------------------------------------------------


def updates(accelerator, dataloader, epochs=1, inner=None, leave_at=None, accumulate=True, skip=0, lr=0.1):
    """The gradient of every update, and the loader's step that ended its window."""
    model = line()
    model, optimizer, dataloader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr), dataloader)
    inner = () if inner is None else accelerator.prepare(inner)
    found = []
    for _ in range(epochs):
        for step, batch in enumerate(accelerator.skip_first_batches(dataloader, skip) if skip else dataloader):
            with accelerator.accumulate(model) if accumulate else nullcontext():
                accelerator.backward(model(batch).square().mean())
                if accelerator.sync_gradients:
                    found.append((step, model.weight.grad.clone()))
                optimizer.step()
                optimizer.zero_grad()
            for _ in inner:
                break
            if step == leave_at:
                break
    return found


def assert_same_updates(found, expected):
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, ours), (_, theirs) in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs), step


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [11, 12, 14, 15, 24])
def test_windows_match_accelerate_but_for_the_short_one(theirs, count, steps, drop_last):
    dataloader = loader_of(count, batch_size=3, drop_last=drop_last)
    found = updates(ours(gradient_accumulation_steps=steps), dataloader)
    expected = updates(theirs(gradient_accumulation_steps=steps), dataloader)
    whole = (count % 3 == 0 or drop_last or steps == 1) and len(dataloader) % steps == 0
    kept = len(found) if whole else len(found) - 1
    assert_same_updates(found[:kept], expected[:kept])
    if not whole:  # the mean over its rows, from the parameters that the updates before it made
        model, data = line(), dataloader.dataset[: len(dataloader) * 3]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for window in data.split(steps * 3):
            optimizer.zero_grad()
            model(window).square().mean().backward()
            optimizer.step()
        assert found[-1][0] == expected[-1][0] == len(dataloader) - 1
        torch.testing.assert_close(found[-1][1], model.weight.grad, rtol=1e-5, atol=1e-6)  # another order of sums
        assert not torch.allclose(expected[-1][1], model.weight.grad, rtol=0.01)


def test_accelerate_underweighs_the_short_window(theirs):
    def gradients(accelerator):
        model = nn.Linear(1, 1, bias=False)
        model, dataloader = accelerator.prepare(model, plain(torch.ones(6, 1)))
        for batch in dataloader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).mean())  # 1 for every row
                if accelerator.sync_gradients:
                    yield model.weight.grad.item()
                    model.weight.grad = None

    assert list(gradients(theirs(gradient_accumulation_steps=4))) == [1.0, 0.5]
    assert list(gradients(ours(gradient_accumulation_steps=4))) == [1.0, 1.0]


def test_broken_inner_loop_keeps_the_outer_flush(theirs):
    dataloader, inner = loader_of(21, 3), loader_of(9, 3)
    expected = updates(ours(gradient_accumulation_steps=4), dataloader, epochs=2)
    assert [step for step, _ in expected] == [3, 6, 3, 6]
    assert_same_updates(updates(ours(gradient_accumulation_steps=4), dataloader, epochs=2, inner=inner), expected)
    lost = updates(theirs(gradient_accumulation_steps=4), dataloader, epochs=2, inner=inner)
    assert [step for step, _ in lost] == [3, 0, 4]  # windows run over the epoch's end, and the last one never ends


def test_window_goes_on_after_break_as_in_accelerate(theirs):
    dataloader = loader_of(24, 3)
    arguments = {"dataloader": dataloader, "epochs": 3, "leave_at": 4}
    found = updates(ours(gradient_accumulation_steps=4), **arguments)
    assert [step for step, _ in found] == [3, 2, 1]
    # accelerate does the same if the loop that was left is not mistaken for the one that runs
    assert_same_updates(found, updates(theirs(gradient_accumulation_steps=4), **arguments))


def test_skipped_batches_keep_the_short_window_right():
    dataloader = loader_of(14, 3)
    whole = updates(ours(gradient_accumulation_steps=3), dataloader, lr=0.0)
    rest = updates(ours(gradient_accumulation_steps=3), dataloader, lr=0.0, skip=3)
    assert [step for step, _ in whole + rest] == [2, 4, 1]
    assert torch.equal(whole[1][1], rest[0][1])


@pytest.mark.parametrize("kind", ["stream", "varying batches", "no accumulate"])
def test_unknown_windows_are_as_in_accelerate(theirs, kind):
    dataloader = loader_of(10, 3)
    if kind == "stream":
        dataloader = plain(Stream(10), batch_size=3)
    elif kind == "varying batches":
        dataloader = plain(dataloader.dataset, batch_sampler=[[0], [1, 2], [3, 4, 5], [6], [7]])
    arguments = {"dataloader": dataloader, "accumulate": kind != "no accumulate"}
    config = {"gradient_accumulation_steps": 2}
    assert_same_updates(updates(ours(**config), **arguments), updates(theirs(**config), **arguments))


def test_backward_after_accumulate_is_as_without_it():
    accelerator = ours(gradient_accumulation_steps=4)
    model, dataloader = accelerator.prepare(line(), loader_of(15, 3))
    for batch in dataloader:
        with accelerator.accumulate(model):
            loss = model(batch).mean()
            inside = accelerator._weigh(loss)
        outside = accelerator._weigh(loss)
    assert (torch.equal(inside, loss), torch.equal(outside, loss / 4)) == (True, True)  # the last window is one batch


def test_backward_without_a_loader_is_as_in_accelerate(theirs):
    gradients = []
    for accelerator in (ours(gradient_accumulation_steps=3), theirs(gradient_accumulation_steps=3)):
        model = accelerator.prepare(line())
        accelerator.gradient_accumulation_steps = 7
        accelerator.backward(model(torch.ones(2, 3)).sum(), retain_graph=True)
        gradients.append(model.weight.grad)
    assert torch.equal(*gradients)


def test_rank_without_rows_adds_exact_zeros(monkeypatch):
    accelerator = ours()
    model, dataloader = accelerator.prepare(tiny_bert(), loader_of(4, 2))
    monkeypatch.setattr(DataLoaderShard, "rows_of_step", lambda self, index: (0, 5))
    for _ in dataloader:
        output = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([-100]))
        assert output.loss.isnan()
        accelerator.backward(output.loss)
    assert all((p.grad == 0).all() for p in model.parameters())


# ---- optimizers and schedules ---------------------------------------------------------------------------------------


def overflow(accelerator, optimizer_class, **arguments):
    """The state after a step whose gradient was infinite, and after one that was not: (skipped, moved, ticks)."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    weight = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], lr=0.5, **arguments)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    seen = []
    for factor in (float("inf"), 1.0):
        before = weight.detach().clone()
        accelerator.scaler.scale((weight * factor).sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        skipped = accelerator.optimizer_step_was_skipped
        seen.append((skipped, not torch.equal(before, weight.detach()), schedule.state_dict()["last_epoch"]))
    return seen


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamW])
@pytest.mark.parametrize("fused", [True, False])
def test_fused_skip_is_seen_where_accelerate_misses_it(theirs, optimizer_class, fused):
    right = [(True, False, 0), (False, True, 1)]
    assert overflow(ours(), optimizer_class, fused=fused) == right
    wrong = [(False, False, 1), (False, True, 2)]  # it did nothing, and the schedule went on all the same
    assert overflow(theirs(), optimizer_class, fused=fused) == (wrong if fused else right)


def test_prepared_optimizer_steps_like_the_one_it_wraps():
    accelerator = ours(gradient_accumulation_steps=2)
    weight = nn.Parameter(torch.ones(2))
    optimizer = accelerator.prepare(AdamW([weight], lr=0.1))
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    moved = []
    for _ in range(4):
        with accelerator.accumulate():
            before = weight.detach().clone()
            weight.grad = torch.ones(2)
            optimizer.step()
            moved.append(not torch.equal(before, weight.detach()))
            optimizer.zero_grad()
            assert (weight.grad is None) == accelerator.sync_gradients
    assert moved == [False, True, False, True]
    other = accelerator.prepare(torch.optim.AdamW([weight], lr=0.3))
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["lr"], other.state[weight]["step"].item(), other.defaults["lr"]) == (0.1, 2, 0.3)
    other.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(other.optimizer.param_groups) == 2
    accelerator.sync_gradients = True
    assert other.step(lambda: 5) == 5
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(NotImplementedError, match=r"closure=.* is not supported here"):
        other.step(lambda: 5)


class Choosing(torch.optim.SGD):
    """Its zero_grad has another default than torch's."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none)


class Plain(torch.optim.SGD):
    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none=False)


def test_zero_grad_matches_accelerate(theirs):
    for kind, arguments in product(
        (torch.optim.SGD, Choosing, Plain), ({}, *({"set_to_none": s} for s in (None, True, False)))
    ):
        results: list[Any] = []
        for accelerator in (ours(), theirs()):
            weight = nn.Parameter(torch.ones(1))
            optimizer = accelerator.prepare(kind([weight], lr=0.1))
            weight.grad = torch.ones(1)
            try:
                optimizer.zero_grad(**arguments)
            except ValueError as error:
                results.append(type(error))
            else:
                results.append(None if weight.grad is None else weight.grad.tolist())
        assert results[0] == results[1], (kind, arguments)
    with pytest.raises(ValueError, match=r"zero_grad\(set_to_none=False\): Plain\.zero_grad has no such argument"):
        ours().prepare(Plain([weight], lr=0.1)).zero_grad(set_to_none=False)


SCHEDULES: dict[str, Callable[[Any], Any]] = {  # ours, and all of torch's
    "linear": lambda o: get_scheduler("linear", o, 2, 50),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lrs.OneCycleLR(o, max_lr=1.0, total_steps=10),
    "multiplied": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lrs.StepLR(o, 3),
    "steps": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "constant": lambda o: lrs.ConstantLR(o, total_iters=4),
    "torch's linear": lambda o: lrs.LinearLR(o, total_iters=4),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, 7, 2.0),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 7),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.1, 1.0, 3, cycle_momentum=False),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "sequence": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.ExponentialLR(o, 0.9)], [4]),
    "chain": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, total_iters=4), lrs.ExponentialLR(o, 0.9)]),
}


# torch's, of a schedule that ticks with each micro-batch while its optimizer waits
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("split_batches", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_scheduler_ticks_match_accelerate(theirs, kind, with_optimizer, split_batches, steps):
    from accelerate.state import PartialState
    from accelerate.utils import DataLoaderConfiguration as TheirConfiguration

    def rates(accelerator, world):
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        schedule = SCHEDULES[kind](optimizer)
        set_world(accelerator, world)
        optimizer, schedule = accelerator.prepare(optimizer, schedule)
        seen = []
        for _ in range(6):
            with accelerator.accumulate():
                weight.grad = torch.ones(1)
                optimizer.step()
                schedule.step(*[1.0] * (kind == "plateau"))
                optimizer.zero_grad()
                seen.append(optimizer.param_groups[0]["lr"])
        return [*seen, schedule.get_last_lr()]

    def set_world(accelerator, world):
        if isinstance(accelerator, Accelerator):
            accelerator.num_processes = world
        else:
            PartialState._shared_state["num_processes"] = world

    config = {"step_scheduler_with_optimizer": with_optimizer, "gradient_accumulation_steps": steps}
    for world in (1, 3):
        expected = rates(theirs(dataloader_config=TheirConfiguration(split_batches=split_batches), **config), world)
        assert rates(ours(split_batches=split_batches, **config), world) == expected


@pytest.mark.parametrize("split_batches", [False, True])
def test_four_ranks_reach_a_rate_of_zero_after_a_quarter(theirs, split_batches):
    """A schedule over the 20 updates of the prepared loader: accelerate ticks it 4 times an update, whatever one says.

    Ours does the same, until it is told that batches, and so the count of updates, are those of all ranks together.
    """
    from accelerate.state import PartialState

    counts = []
    for accelerator in (theirs(split_batches=split_batches), ours(split_batches=split_batches)):
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        if isinstance(accelerator, Accelerator):
            accelerator.num_processes = 4
        else:
            PartialState._shared_state["num_processes"] = 4
        optimizer, schedule = accelerator.prepare(optimizer, get_scheduler("linear", optimizer, 0, 20))
        updates = 0
        while schedule.get_last_lr()[0] > 0:
            weight.grad = torch.ones(1)
            optimizer.step()
            schedule.step()
            updates += 1
        counts.append(updates)
    assert counts == [5, 20 if split_batches else 5]


def test_clipping_matches_accelerate_and_unscales(theirs):
    results = []
    for accelerator in (ours(), theirs()):
        model = accelerator.prepare(line())
        accelerator.backward(100 * model(torch.ones(4, 3)).sum())
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        accelerator.clip_grad_value_(model.parameters(), 0.3)
        results.append((norm, model.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])

    accelerator = ours()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = line()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(100 * model(torch.ones(4, 3)).sum())
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(results[0][0].item())
    for again in (None, optimizer, (optimizer,), optimizer.optimizer):  # that it was unscaled already shows it is found
        with pytest.raises(RuntimeError, match="has already been called"):
            accelerator.unscale_gradients(again)
    optimizer.step()
    assert not optimizer.step_was_skipped


# ---- precision ------------------------------------------------------------------------------------------------------


def test_mixed_precision_matches_accelerate(theirs):
    results = []
    for accelerator in (ours(mixed_precision="bf16"), theirs(mixed_precision="bf16")):
        model = accelerator.prepare(tiny_bert(dropout=0.0))
        output = model(input_ids=torch.arange(5, 17).view(2, 6), labels=torch.tensor([0, 1]))
        assert output.logits.dtype == output.loss.dtype == torch.float32
        accelerator.backward(output.loss)
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        results.append((type(output), output.logits, [p.grad for p in model.parameters()]))
    assert results[0][0] is results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))
    assert not torch.equal(results[0][1], tiny_bert(dropout=0.0)(torch.arange(5, 17).view(2, 6)).logits)


def test_wrapped_forward_can_be_undone_copied_and_pickled(theirs):
    accelerator = ours(mixed_precision="bf16")
    plain = tiny_bert().eval()
    model = accelerator.prepare(copy.deepcopy(plain))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    inputs = torch.arange(5, 11)[None]
    expected = model(inputs).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(inputs).logits, expected)
        with torch.no_grad():
            copied.classifier.weight.zero_()
            copied.classifier.bias.zero_()
        assert (copied(inputs).logits == 0).all()  # not the forward of the model that it was copied from
    assert accelerator.unwrap_model(model) is model
    assert torch.equal(model(inputs).logits, expected)
    assert torch.equal(accelerator.unwrap_model(model, keep_fp32_wrapper=False)(inputs).logits, plain(inputs).logits)
    # accelerate's comes out of the pickle without its precision
    model = theirs(mixed_precision="bf16").prepare(copy.deepcopy(plain))
    assert torch.equal(model(inputs).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs).logits, plain(inputs).logits)


def test_fp16_on_cpu_is_refused_where_accelerate_trains_fp32(theirs):
    accelerator = theirs(mixed_precision="fp16")
    model = accelerator.prepare(line())
    assert (accelerator.mixed_precision, accelerator.scaler, accelerator.native_amp) == ("fp16", None, False)
    assert torch.equal(model(torch.ones(1, 3)), line()(torch.ones(1, 3)))
    with pytest.raises(UsageError, match="mixed_precision is 'fp16', and a CPU has no half-precision training: choose"):
        ours(mixed_precision="fp16")


def test_precision_comes_from_the_argument_or_the_environment(monkeypatch):
    assert ours().mixed_precision == "no"
    monkeypatch.setenv("NANOFINETUNE_MIXED_PRECISION", "bf16")
    assert ours().mixed_precision == "bf16"
    assert ours(mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("NANOFINETUNE_MIXED_PRECISION", "fp8")
    with pytest.raises(UsageError, match="mixed_precision is 'fp8': choose no, bf16, fp16"):
        ours()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [True, False])
def test_fp16_trains_and_skips_on_cuda(fused):
    accelerator = Accelerator(mixed_precision="fp16")
    model = line()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, loader_of(6, 3))
    skipped = []
    for batch, factor in zip(dataloader, (1e6, 1e-6), strict=True):
        output = model(batch)
        assert output.dtype == torch.float32
        accelerator.backward(output.mean() * factor)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        before = model.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == accelerator.optimizer_step_was_skipped
        skipped.append(accelerator.optimizer_step_was_skipped)
    assert skipped == [True, False]


# ---- prepare --------------------------------------------------------------------------------------------------------


def test_prepare_keeps_order_and_passes_others_through():
    accelerator = ours()
    model, other = line(), object()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    dataloader = loader_of(4, 2)
    accelerator.prepare(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))  # not the schedule's
    result = accelerator.prepare(schedule, other, optimizer, dataloader, [model], None, model)
    kinds = [type(obj).__name__ for obj in result]
    assert kinds == [
        "AcceleratedScheduler",
        "object",
        "AcceleratedOptimizer",
        "DataLoaderShard",
        "list",
        "NoneType",
        "Linear",
    ]
    assert result[1] is other
    assert result[6] is model
    assert result[0].optimizers == [result[2]]
    assert accelerator.prepare(model) is model
    with pytest.raises(ValueError, match="device_placement has 1 entries for 2 objects: give one for each"):
        accelerator.prepare(model, other, device_placement=[True])


def test_preparing_twice_changes_nothing_and_two_accelerators_do_not_share(theirs):
    for accelerator in (ours(mixed_precision="bf16"), theirs(mixed_precision="bf16")):
        model = line()
        objects = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader_of(4, 2))
        assert all(a is b for a, b in zip(objects, accelerator.prepare(*objects), strict=True))
    first, second = ours(mixed_precision="bf16"), ours()
    model = line()
    model, optimizer, dataloader = first.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader_of(4, 2))
    for obj, text in (
        (model, "this model is prepared already: pass what `prepare` returned, or unwrap_model it first"),
        (optimizer, "this optimizer is prepared already, by another Accelerator: pass its .optimizer"),
        (dataloader, "this DataLoader is prepared already"),
    ):
        with pytest.raises(ValueError, match=text):
            second.prepare(obj)
    assert second.prepare(first.unwrap_model(model, keep_fp32_wrapper=False)) is model
    first.sync_gradients = False
    assert second.sync_gradients
    assert (first.mixed_precision, second.mixed_precision) == ("bf16", "no")
    reference = theirs(mixed_precision="bf16")
    with pytest.raises(ValueError, match="already been initialized"):
        type(reference)(cpu=True, mixed_precision="no")
    reference.gradient_state._set_sync_gradients(False)
    assert not type(reference)(cpu=True).sync_gradients


def test_random_sampler_becomes_ours():
    torch.manual_seed(7)
    prepared = ours().prepare(loader_of(4, 2, shuffle=True))
    assert type(prepared.batch_sampler.sampler) is SeedableRandomSampler
    assert prepared.batch_sampler.sampler.data_seed == 7
    seeded = ours(dataloader_config=DataLoaderConfiguration(data_seed=5)).prepare(loader_of(4, 2, shuffle=True))
    assert seeded.batch_sampler.sampler.data_seed == 5


def test_accelerate_ignores_split_batches(theirs):
    assert theirs(split_batches=True).split_batches is False
    assert ours(split_batches=True).split_batches is True
    assert ours(dataloader_config=DataLoaderConfiguration(split_batches=True)).split_batches is True


def test_placement_can_be_left_to_the_user(monkeypatch):
    accelerator = ours()
    accelerator.device = torch.device("meta")
    model, dataloader = accelerator.prepare(line(), loader_of(2, 1), device_placement=[False, True])
    assert model.weight.device.type == "cpu"
    assert [batch.device.type for batch in dataloader] == ["meta", "meta"]
    accelerator.device_placement = False
    assert [batch.device.type for batch in accelerator.prepare(loader_of(2, 1))] == ["cpu", "cpu"]
    assert accelerator.prepare_model(line(), device_placement=True).weight.device.type == "meta"


def test_free_memory_forgets():
    accelerator = ours()
    model = line()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.accumulate():
        pass
    assert accelerator.free_memory(model, optimizer) == [None, None]
    assert (accelerator.step, accelerator._prepared.models, accelerator._prepared.optimizers) == (0, [], [])


# ---- names ----------------------------------------------------------------------------------------------------------


def test_public_names_and_signatures_match_accelerate(theirs):
    added = {"world", "uneven", "forget", "position", "positions", "index_in_window", "accumulation"}
    reference, accelerator = theirs(), ours()
    names = {name for name in {*dir(accelerator), *METHODS, *ATTRIBUTES} if not name.startswith("_")} - added
    assert len(names) > 40
    assert {name for name in names if not hasattr(reference, name)} == set()
    for name in names:
        if callable(getattr(accelerator, name)):
            expected = inspect.signature(getattr(reference, name)).parameters
            if list(expected) == ["args", "kwargs"]:  # there a decorator hides them
                continue
            found = dict(inspect.signature(getattr(accelerator, name)).parameters)
            more = {"save_state": ["keep", "background"]}.get(name, [])  # keywords
            found = {key: parameter for key, parameter in found.items() if key not in more}
            assert list(found) == list(expected), name
            for parameter in found.values():
                default = expected[parameter.name].default
                if name in ("on_main_process", "on_local_main_process", "on_last_process"):  # there None, which raises
                    assert parameter.default is inspect.Parameter.empty and default in (None, inspect.Parameter.empty)
                elif default == {}:  # there a dictionary that all calls share
                    assert parameter.default is None
                else:
                    assert parameter.default == default, (name, parameter.name)


def test_what_is_absent_says_what_to_use_instead(theirs):
    """Every public name of accelerate's is here, or refused with a way out; and nothing that is here is refused."""
    accelerator = ours()
    public = {name for name in dir(theirs()) if not name.startswith("_")}
    assert len(public) > 100 and set(ABSENT) <= public
    for name in public:
        if name in ABSENT:
            text = f"^Accelerator.{name} is not supported here: {re.escape(ABSENT[name])}$"
            with pytest.raises(AttributeError, match=text):
                getattr(accelerator, name)
        else:
            assert hasattr(accelerator, name), name
    with pytest.raises(AttributeError, match="'Accelerator' object has no attribute 'nosuch'"):
        accelerator.nosuch  # noqa: B018


def test_save_and_get_state_dict_match_accelerate(theirs, tmp_path):
    loaded = {}
    for who, accelerator in (("ours", ours()), ("theirs", theirs())):
        state = accelerator.get_state_dict(accelerator.prepare(line()))
        assert list(state) == list(accelerator.get_state_dict(line(), unwrap=False)) == ["weight", "bias"]
        accelerator.save([state, {"epoch": 3}], tmp_path / f"{who}.pt")
        accelerator.save(state, tmp_path / f"{who}.safetensors", safe_serialization=True)
        loaded[who] = torch.load(tmp_path / f"{who}.pt", weights_only=True)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert loaded["ours"][1] == loaded["theirs"][1] == {"epoch": 3}
    for name, weights in loaded["theirs"][0].items():
        assert torch.equal(loaded["ours"][0][name], weights)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["on_main_process", "on_local_main_process", "on_last_process"])
def test_a_function_for_one_rank_runs_where_accelerates_does(where, rank, theirs):
    """Rank `rank` of two nodes with two ranks each, without the others: neither side talks to them here."""
    mine, reference = ours(), theirs()
    mine.is_main_process, mine.is_local_main_process, mine.is_last_process = rank == 0, rank % 2 == 0, rank == 3
    state = pytest.importorskip("accelerate").PartialState()  # the one of all instances, which `theirs` puts back
    state.process_index, state.local_process_index = rank, rank % 2
    state.num_processes, state.distributed_type = 4, "MULTI_CPU"
    found, expected = (getattr(each, where)(lambda x: x + 1)(1) for each in (mine, reference))
    assert found == expected and found in (2, None)


def test_clear_is_free_memory(theirs):
    for accelerator, held in ((ours(), "_prepared.models"), (theirs(), "_models")):
        model = accelerator.prepare(line())
        assert attrgetter(held)(accelerator) == [model]
        assert accelerator.clear(model) == [None] and attrgetter(held)(accelerator) == []


def test_constructor_matches_accelerate_and_refuses_the_rest_by_name(theirs):
    expected = dict(inspect.signature(type(theirs()).__init__).parameters)
    found = dict(inspect.signature(Accelerator.__init__).parameters)
    added = {"uneven", "device", "timeout", "unsupported"}
    positional = [name for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(expected)[: len(positional)]
    for name in set(found) - added - {"self", "split_batches"}:  # that one's default is an object that says nothing
        assert found[name].default == expected[name].default, name
    with pytest.raises(
        NotImplementedError, match=r"builtins.str is not supported here: choose among .*GradScalerKwargs"
    ):
        ours(kwargs_handlers="x")
    for name in set(expected) - set(found):
        with pytest.raises(NotImplementedError, match=f"{name}='x' is not supported here: leave it out"):
            ours(**{name: "x"})
        ours(**{name: expected[name].default})


@pytest.mark.parametrize(
    ("argument", "error", "text"),
    [
        ({"uneven": "drop"}, ValueError, "uneven is 'drop': it must be 'wrap' or 'mask'"),
        ({"device": "cuda"}, ValueError, "cpu=True and device='cuda' contradict each other"),
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps is 0: it must be 1 or more"),
        ({"gradient_accumulation_steps": 2.0}, ValueError, "gradient_accumulation_steps is 2.0: it must be 1 or more"),
        ({"mixed_precission": "bf16"}, NotImplementedError, "mixed_precission='bf16' is not supported here"),
    ],
)
def test_misuse_is_refused(argument, error, text):
    with pytest.raises(error, match=text):
        ours(**argument)


def test_arguments_without_effect_are_refused(theirs):
    accelerator = ours()
    assert theirs().reduce(torch.ones(1), scale=0.5).item() == 1.0
    with pytest.raises(NotImplementedError, match=r"scale=0.5 is not supported here"):
        accelerator.reduce(torch.ones(1), scale=0.5)
    with pytest.raises(NotImplementedError, match=r"keep_torch_compile=False is not supported here"):
        accelerator.unwrap_model(line(), keep_torch_compile=False)
    with pytest.raises(
        NotImplementedError, match=r"builtins.str is not supported here: choose among \S+AutocastKwargs$"
    ):
        accelerator.autocast("x")
    with pytest.raises(NotImplementedError, match=r"dispatch_batches=True is not supported here"):
        ours(dataloader_config=DataLoaderConfiguration(dispatch_batches=True)).prepare(loader_of(2, 1))


# ---- kwargs_handlers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs]
)
def test_kwargs_handlers_match_accelerate(kind):
    """The same fields, in the same order, with the same values by default."""
    reference = getattr(pytest.importorskip("accelerate.utils", reason="the reference, extra `test`"), kind.__name__)
    assert [field.name for field in dataclasses.fields(kind)] == [field.name for field in dataclasses.fields(reference)]
    for name, expected in vars(reference()).items():
        assert getattr(kind(), name) == getattr(expected, "value", expected), name
    if kind is InitProcessGroupKwargs:
        assert kind(backend="gloo").timeout == reference(backend="gloo").timeout


def test_communication_hooks_have_accelerates_names():
    theirs = pytest.importorskip("accelerate.utils", reason="the reference, extra `test`").DDPCommunicationHookType
    assert {hook.name: hook.value for hook in DDPCommunicationHookType} == {hook.name: hook.value for hook in theirs}
    for hook, wrapper in product(DDPCommunicationHookType, ("no", "fp16", "bf16")):
        if hook != "no" or wrapper == "no":
            ours(kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=hook, comm_wrapper=wrapper)])


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"dim": 1}, "dim=1.* is not supported"),
        ({"check_reduction": True}, "check_reduction=True.* is not supported"),
        ({"comm_wrapper": "fp16"}, "comm_wrapper='fp16' goes with a comm_hook, and there is none"),
        ({"comm_state_option": {"a": 1}}, "comm_state_option={'a': 1} goes with a comm_hook"),
        ({"comm_hook": "fp16", "comm_state_option": {"a": 1}}, "comm_state_option={'a': 1} is PowerSGD's"),
        ({"comm_hook": "fp8"}, "comm_hook='fp8', comm_wrapper=.*: the hook is one of no, fp16"),
        ({"comm_hook": "fp16", "comm_wrapper": "power_sgd"}, "comm_wrapper='power_sgd': the hook is one of no"),
    ],
)
def test_ddp_settings_without_effect_are_refused(setting, error):
    """Accelerate takes each of them without a word, and ignores it."""
    with pytest.raises((NotImplementedError, ValueError), match=error):
        ours(kwargs_handlers=[DistributedDataParallelKwargs(**setting)])


def test_other_handlers_are_refused_by_name():
    theirs = pytest.importorskip("accelerate.utils", reason="Accelerate's own handlers are refused, extra `test`")
    for handler in (theirs.ProfileKwargs(), theirs.DistributedDataParallelKwargs()):
        with pytest.raises(
            NotImplementedError, match=rf"accelerate\.\S+\.{type(handler).__name__} is not supported here"
        ):
            ours(kwargs_handlers=[handler])
    with pytest.raises(ValueError, match="two of the same type"):
        ours(kwargs_handlers=[GradScalerKwargs(), GradScalerKwargs(init_scale=1)])
    with pytest.raises(NotImplementedError, match=r"init_method='tcp://a:1' is not supported"):
        InitProcessGroupKwargs(init_method="tcp://a:1")
    with pytest.raises(ValueError, match="timeout and InitProcessGroupKwargs contradict each other"):
        ours(timeout=timedelta(1), kwargs_handlers=[InitProcessGroupKwargs()])


def test_autocast_handler_matches_accelerate(theirs):
    import accelerate.utils

    for options in ({}, {"enabled": False}, {"cache_enabled": False}):
        seen = []
        for make, kwargs in ((theirs, accelerate.utils.AutocastKwargs), (ours, AutocastKwargs)):
            accelerator = make(mixed_precision="bf16", kwargs_handlers=[kwargs(**options)])
            model = accelerator.prepare(line())
            handlers = [None, kwargs(enabled=False)]
            states = []
            for handler in handlers:
                with accelerator.autocast(handler):
                    states.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
            seen.append((states, model(torch.ones(2, 3)).tolist()))
        assert seen[0] == seen[1]


def test_scaler_and_group_get_their_settings(monkeypatch):
    monkeypatch.setattr(facade, "checked_precision", lambda name, device: "fp16")  # else refused: this is a CPU
    scaler = ours(kwargs_handlers=[GradScalerKwargs(8.0, 3.0, 0.25, 7)]).scaler
    found = (scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
    assert found == (8.0, 3.0, 0.25, 7)
    asked = []
    init_world = settings.init_world

    def listen(*args):
        asked.append(args)
        return init_world(*args)

    monkeypatch.setattr(settings, "init_world", listen)
    ours(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=5))])
    assert asked == [("cpu", timedelta(seconds=5))]


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = line(), line(1)

    def forward(self, x):
        return self.used(x)


def unused_through_the_facade():
    import accelerate.utils

    mine = ours(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, bucket_cap_mb=1)])
    reset()
    handler = accelerate.utils.DistributedDataParallelKwargs(find_unused_parameters=True, bucket_cap_mb=1)
    reference = accelerate.Accelerator(cpu=True, kwargs_handlers=[handler])
    grads = []
    for accelerator in (mine, reference):
        model = accelerator.prepare(Sometimes())
        accelerator.backward(model(torch.full((2, 3), 1.0 + mine.process_index)).square().mean())
        grads.append([None if p.grad is None else p.grad.tolist() for p in model.parameters()])
    strict = Accelerator(cpu=True).prepare(Sometimes())
    with pytest.raises(RuntimeError, match="no gradient for unused"):
        strict(torch.ones(2, 3)).sum().backward()
    reset()
    silent = accelerate.Accelerator(cpu=True).prepare(Sometimes())
    silent(torch.ones(2, 3)).sum().backward()  # accelerate, that is torch, says nothing until the next forward
    with pytest.raises(RuntimeError, match="Parameter indices which did not receive grad for rank") as numbered:
        silent(torch.ones(2, 3))
    compressed = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(comm_hook="bf16")])
    hook = compressed.prepare(line())._comm_hook[1].__name__
    with pytest.raises(ValueError, match="backend='mpi': on cpu it is gloo; leave it out"):
        Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="mpi")])
    text = str(numbered.value)
    del model, strict, silent, numbered
    gc.collect()
    mine.end_training()
    return grads, hook, text


@pytest.mark.slow
def test_find_unused_parameters_matches_accelerate_on_ranks():
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    for (mine, reference), hook, text in run_ranks(unused_through_the_facade, 2):
        assert mine == reference and mine[2:] == [None, None]
        assert hook == "bf16_compress_hook"
        assert "unused." not in text  # numbers, no name


def kept_by(make, precision, folder):
    """What is still there once an Accelerator that has trained, and all that it prepared, were deleted."""
    accelerator = make(cpu=True, mixed_precision=precision)
    model, rows = line(), DataLoader[torch.Tensor](list(torch.randn(8, 3)), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters())
    there = {"model": weakref.ref(model), "accelerator": weakref.ref(accelerator)}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    model, optimizer, rows, scheduler = accelerator.prepare(model, optimizer, rows, scheduler)
    for batch in rows:
        with accelerator.accumulate(model):
            loss = model(batch).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)
    del model, optimizer, rows, scheduler, batch, loss
    assert there["model"]() is not None, "the Accelerator keeps what it prepared"
    del accelerator
    return [name for name, reference in there.items() if reference() is not None]


def kept_by_both():
    from accelerate import Accelerator as Theirs

    warnings.simplefilter("ignore")  # theirs
    kept = []
    gc.collect()
    gc.disable()
    for precision in ("no", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            kept.append(kept_by(Accelerator, precision, folder))
            reset()
            kept.append(kept_by(Theirs, precision, folder))
    return kept


@pytest.mark.parametrize("world", [1, 2])
def test_deleting_the_accelerator_frees_the_model_where_accelerates_autocast_keeps_it(world):
    """Without the garbage collector: nothing of ours holds itself."""
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    assert run_ranks(kept_by_both, world) == [[[], [], [], ["model"]]] * world


# ---- one process ----------------------------------------------------------------------------------------------------


def test_one_process_matches_accelerate(theirs, capsys):
    reference, accelerator = theirs(), ours()
    for name in (
        "num_processes", "process_index", "local_process_index", "is_main_process", "is_local_main_process",
        "is_last_process", "use_distributed", "distributed_type", "device", "mixed_precision", "sync_gradients",
        "gradient_accumulation_steps", "optimizer_step_was_skipped", "split_batches", "scaler",
    ):  # fmt: skip
        assert getattr(accelerator, name) == getattr(reference, name), name
    tensor = torch.arange(3)
    for each in (accelerator, reference):
        assert torch.equal(each.gather(tensor), tensor)
        assert torch.equal(each.reduce(tensor), tensor)
        assert torch.equal(each.pad_across_processes(tensor), tensor)
        assert torch.equal(each.gather_for_metrics(tensor), tensor)
        assert each.gather_for_metrics(["a", "b"]) == ["a", "b"]
        assert not each.check_trigger()
        each.set_trigger()
        assert (each.check_trigger(), each.check_trigger()) == (True, False)
        with each.main_process_first(), each.local_main_process_first(), each.split_between_processes([1, 2]) as part:
            each.print(part, end="!")
        assert each.on_main_process(lambda x: x + 1)(1) == 2
        each.wait_for_everyone()
        with each.no_sync(line()):
            pass
        each.end_training()
    assert capsys.readouterr().out == "[1, 2]![1, 2]!"


def test_gather_for_metrics_of_one_process_gives_anything_back_as_accelerate_does(theirs):
    """At the end of a loader with a remainder too."""
    values = {"predicted": torch.ones(2), "text": ["a", "b"]}, 0.5, None, "text", ["one", "two", "three"]
    for accelerator in (ours(), theirs()):
        for batch in accelerator.prepare(DataLoader(torch.arange(5), batch_size=2)):  # type: ignore[arg-type]
            for value in values:
                # underneath: in the last step theirs cuts a text, or a list, to as many letters or items as it has rows
                if len(batch) == 2 or type(accelerator) is Accelerator or not isinstance(value, (str, list)):
                    assert accelerator.gather_for_metrics(value) is value


# ---- ranks ----------------------------------------------------------------------------------------------------------

WORLD = 3


def labelled(count):
    return [{"x": torch.tensor(float(i)), "labels": torch.tensor(i)} for i in range(count)]


def metrics_of(accelerator, count, skip=0):
    """What gather_for_metrics makes of an epoch: rows as tensors, as a nested container, and as objects."""
    dataloader = accelerator.prepare(plain(labelled(count), batch_size=2))
    dataloader = accelerator.skip_first_batches(dataloader, skip) if skip else dataloader
    tensors, nested, objects = [], [], []
    for batch in dataloader:
        tensors += accelerator.gather_for_metrics(batch["labels"]).tolist()
        nested += accelerator.gather_for_metrics({"a": [batch["labels"][:, None]]})["a"][0].flatten().tolist()
        objects += accelerator.gather_for_metrics([str(label) for label in batch["labels"].tolist()])
    return [tensors, nested, [int(item) for item in objects]]


def metrics_around_a_broken_loop(accelerator):
    """The rows of an epoch in each of whose steps another loop is left at its first batch."""
    outer, inner = (accelerator.prepare(plain(labelled(7), batch_size=2)) for _ in range(2))
    rows = []
    for batch in outer:
        for _ in inner:
            break
        rows += accelerator.gather_for_metrics(batch["labels"]).tolist()
    return rows


def raised(function):
    try:
        return function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def odd_metrics(accelerator):
    """What becomes of a value that is one a rank, and of a stream without a length."""

    def scalars():
        dataloader = accelerator.prepare(plain(labelled(7), batch_size=2))
        return [accelerator.gather_for_metrics(batch["x"].mean()).tolist() for batch in dataloader]

    def stream():
        dataloader = accelerator.prepare(plain(Stream(7), batch_size=2))
        return sum(len(accelerator.gather_for_metrics(batch)) for batch in dataloader)

    def objects(value):
        return [accelerator.gather_for_metrics(value) for _ in accelerator.prepare(plain(labelled(6), batch_size=2))]

    return {
        "scalars": raised(scalars), "stream": raised(stream),
        "dict": raised(partial(objects, {"predicted": torch.ones(2), "text": ["a", "b"]})),
        "number": raised(partial(objects, 0.5)),
    }  # fmt: skip


def parts_of(accelerator):
    """split_between_processes, with and without padding."""
    found = []
    for inputs in ([1, 2, 3, 4], (1, 2), {"a": [1, 2, 3, 4, 5], "b": list("abcde")}, torch.arange(8)):
        for apply_padding in (False, True):
            if isinstance(inputs, tuple) and apply_padding:
                continue  # accelerate adds a list to the tuple, and fails
            with accelerator.split_between_processes(copy.deepcopy(inputs), apply_padding) as part:
                found.append(part.tolist() if isinstance(part, torch.Tensor) else part)
    return found


def ask(accelerator):
    return {
        "metrics": {count: metrics_of(accelerator, count) for count in (2, 6, 7, 11, 12)},
        "skipped": metrics_of(accelerator, 7, skip=1),
        "odd": odd_metrics(accelerator),
        "broken": metrics_around_a_broken_loop(accelerator),
        "parts": parts_of(accelerator),
        "who": [
            accelerator.num_processes, accelerator.process_index, accelerator.local_process_index,
            accelerator.is_main_process, accelerator.is_last_process, accelerator.use_distributed,
            getattr(accelerator.distributed_type, "value", accelerator.distributed_type),
            accelerator.on_main_process(lambda: "main")(),
        ],
    }  # fmt: skip


def on_three_ranks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate's own
        import accelerate
        from accelerate.utils import DataLoaderConfiguration as TheirConfiguration

        theirs = ask(accelerate.Accelerator(cpu=True, dataloader_config=TheirConfiguration(dispatch_batches=False)))
    return {
        "theirs": theirs,
        "wrap": ask(ours()),
        "mask": {count: metrics_of(ours(uneven="mask"), count) for count in (1, 2, 6, 7, 10, 11, 12)},
        "more": more_on_ranks(),
    }


def more_on_ranks():
    accelerator = ours(gradient_accumulation_steps=2)
    rank = accelerator.process_index
    torch.manual_seed(rank)
    order = [batch.tolist() for batch in accelerator.prepare(plain(torch.arange(12), shuffle=True))]
    seeded = plain(torch.arange(12), shuffle=True, generator=torch.Generator().manual_seed(5))
    seeded_order = [batch.tolist() for batch in accelerator.prepare(seeded)]

    inner = line(seed=rank)
    model = accelerator.prepare(inner)
    assert isinstance(model, DistributedDataParallel)
    assert accelerator.unwrap_model(model) is inner
    assert accelerator.prepare(model) is model
    again = raised(lambda: accelerator.prepare(inner))
    frozen = line().requires_grad_(False)
    assert accelerator.prepare(frozen) is frozen
    evaluated = line()
    assert accelerator.prepare_model(evaluated, evaluation_mode=True) is evaluated

    grads = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 3), float(rank))).sum())
            grads.append(inner.weight.grad[0, 0].item())

    triggers = [accelerator.check_trigger()]
    if rank == 1:
        accelerator.set_trigger()
    triggers += [accelerator.check_trigger(), accelerator.check_trigger()]

    second = ours()
    second.end_training()  # the process group is the first one's
    assert accelerator.gather(torch.tensor(rank)).tolist() == [0, 1, 2]
    padded = accelerator.pad_across_processes(torch.ones(rank + 1)).tolist()
    reduced = accelerator.reduce(torch.tensor(1.0)).item()
    del model
    gc.collect()
    return {
        "order": order, "seeded": seeded_order, "weight": inner.weight.tolist(), "again": again,
        "grads": grads, "triggers": triggers, "padded": padded, "reduced": reduced,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    pytest.importorskip("accelerate", reason="the reference of these tests, extra `test`")
    return run_ranks(on_three_ranks, WORLD, timeout=170)


def test_gather_for_metrics_on_ranks(ranks):
    for rank in ranks:
        for count, found in rank["mask"].items():
            assert found == [list(range(count))] * 3
        for count, found in rank["wrap"]["metrics"].items():
            assert found == [list(range(count))] * 3
        assert rank["wrap"]["metrics"] == rank["theirs"]["metrics"]
        # after a skip accelerate no longer knows how many rows are real
        assert rank["wrap"]["skipped"] == [[6]] * 3
        assert rank["theirs"]["skipped"][0] == [6, 0, 1, 2, 3, 4]


def test_gather_for_metrics_raises_where_accelerate_does_not(ranks):
    for rank in ranks:
        theirs, found = rank["theirs"]["odd"], rank["wrap"]["odd"]
        assert [len(step) for step in theirs["scalars"]] == [3, 1]  # the last step's losses of two ranks are cut off
        assert theirs["stream"] == 12  # 7 rows and 5 repeated ones
        assert found["scalars"].startswith(
            "ValueError: gather_for_metrics got 3 rows in a last step of 6: give it one row"
        )
        assert found["stream"].startswith(
            "RuntimeError: gather_for_metrics: the sizes of the batches or of the data set"
        )
        assert theirs["dict"] == [["predicted", "text"] * 3]
        assert theirs["number"] == "TypeError: 'float' object is not iterable"
        for name, kind in (("dict", "dict"), ("number", "float")):
            assert found[name].startswith("TypeError: objects of several ranks are gathered as a list")
            assert f"not as a {kind}: pass one" in found[name]


def test_gather_for_metrics_survives_a_broken_inner_loop_where_accelerate_does_not(ranks):
    for rank in ranks:
        assert rank["wrap"]["broken"] == list(range(7))
        assert rank["theirs"]["broken"] == [*range(7), 0, 1, 2, 3, 4]  # repeated rows count


def test_ranks_and_their_parts_match_accelerate(ranks):
    for index, rank in enumerate(ranks):
        assert rank["wrap"]["who"] == rank["theirs"]["who"]
        assert rank["wrap"]["who"][:2] == [WORLD, index]
        assert rank["wrap"]["parts"] == rank["theirs"]["parts"]


def test_prepare_and_accumulate_on_ranks(ranks):
    torch.manual_seed(0)
    alone = [batch.tolist() for batch in ours().prepare(plain(torch.arange(12), shuffle=True))]
    found = [rank["more"] for rank in ranks]
    for name, expected in (("order", alone), ("seeded", [[i] for i in SeedableRandomSampler(range(12), data_seed=5)])):
        assert [batch for step in zip(*(rank[name] for rank in found), strict=True) for batch in step] == expected
    for index, rank in enumerate(found):
        assert rank["weight"] == line(seed=0).weight.tolist()
        assert rank["again"].startswith("ValueError: this model is prepared already")
        assert rank["grads"] == [index / 2, 1.0]  # first the rank's own half, then the mean over ranks of their sums
        assert rank["triggers"] == [False, True, False]
        assert rank["padded"] == [1.0] * (index + 1) + [0.0] * (2 - index)
        assert rank["reduced"] == 3.0


def test_split_between_processes_leaves_the_dict_as_it_is_where_accelerate_does_not(theirs):
    from accelerate.state import PartialState

    left = []
    for accelerator in (ours(), theirs()):
        if isinstance(accelerator, Accelerator):
            accelerator.num_processes = 2
        else:
            PartialState._shared_state["num_processes"] = 2
        inputs = {"a": [1, 2, 3, 4]}
        with accelerator.split_between_processes(inputs) as part:
            assert part == {"a": [1, 2]}
        left.append(inputs["a"])
    assert left == [[1, 2, 3, 4], [1, 2]]


def test_split_between_processes_refuses_what_it_cannot_split():
    accelerator = ours()
    accelerator.num_processes = 2
    for inputs, error, text in (
        ({"a": [1], "b": [1, 2]}, ValueError, "the values of the dict are not equally long"),
        (5, TypeError, "int is neither list, tuple, tensor nor dict"),
    ):
        with pytest.raises(error, match=text), accelerator.split_between_processes(inputs):
            pass
