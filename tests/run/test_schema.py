"""A saved state that cannot be its object's is refused before anything is changed; torch's objects take it over.

    python -m pytest tests/run/test_schema.py

Its hashes fit: only what it says is wrong. The references are torch 2.13's `load_state_dict` and accelerate 1.15.
"""

import copy
import math
from typing import Any

import pytest
import torch
from test_start import arguments, save, state
from torch import nn
from torch.utils.data import DataLoader

from nanofinetune.accelerator import Accelerator
from nanofinetune.ground.errors import UsageError
from nanofinetune.run import checkpoint
from nanofinetune.run.log import Log
from nanofinetune.run.resume import Start, batch_plan, check_place, find_start
from nanofinetune.run.schema import misfit
from nanofinetune.step.optim import AdamW
from nanofinetune.step.schedule import get_scheduler


def training(optimizer_of=AdamW):
    """An Accelerator whose every kind of object has made three updates."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 3)
    optimizer = optimizer_of(model.parameters(), lr=0.1)
    rows: Any = DataLoader(torch.randn(12, 2), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, rows, get_scheduler("linear", optimizer, 2, 40)
    )
    log = Log(None, 40, accelerator, {})
    accelerator.register_for_checkpointing(log)
    for batch in loader:
        accelerator.backward(model(batch).pow(2).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.update += 1
    return accelerator, log


def everything(accelerator):
    """All states, and what the generators are."""
    things = accelerator._prepared.stateful()
    return checkpoint.pack([{name: thing.state_dict() for name, thing in things.items()}, checkpoint.random_state()])


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def put(*path):
    """A change of a state: what stands at the path becomes its last item."""
    *names, last, value = path

    def change(state):
        for name in names:
            state = state[name]
        state[last] = value

    return change


SHAPE = torch.zeros(2, 3)
WRONG = {  # part, what is changed in it, and the reason
    "a weight of another shape": ("model", put("weight", SHAPE), r"weight has the shape \[2, 3\], and here"),
    "a weight too few": ("model", lambda state: state.pop("bias"), "bias is missing"),
    "a weight too many": ("model", put("more", torch.zeros(1)), "more is not in the model here"),
    "a weight of whole numbers": ("model", put("bias", torch.ones(3, dtype=torch.int64)), "bias is torch.int64"),
    "a weight that is none": ("model", put("bias", [1, 2, 3]), "model is not what save_state writes"),
    "a moment of another shape": ("optimizer", put("state", 0, "exp_avg", SHAPE), "exp_avg of parameter 0 has"),
    "a negative second moment": ("optimizer", put("state", 1, "exp_avg_sq", -torch.ones(3)), "exp_avg_sq of parameter"),
    "a negative count": ("optimizer", put("state", 0, "step", torch.tensor(-1.0)), "step of parameter 0 is -1.0"),
    "a count that is NaN": ("optimizer", put("state", 0, "step", torch.tensor(math.nan)), "step of parameter 0 is nan"),
    "a state of no parameter": ("optimizer", put("state", 7, {}), "a state of parameter 7, which is in no group"),
    "a group too many": ("optimizer", lambda state: state["param_groups"].append({"params": []}), "its groups hold"),
    "one parameter twice": ("optimizer", put("param_groups", 0, "params", [0, 0]), "are not numbered one by one"),
    "a learning rate that is NaN": ("optimizer", put("param_groups", 0, "lr", math.nan), "lr is nan"),
    "a negative decay": ("optimizer", put("param_groups", 0, "weight_decay", -1.0), "weight_decay is -1.0"),
    "parameters of text": ("optimizer", put("param_groups", 0, "params", "ab"), "are not numbered"),
    "an optimizer without groups": ("optimizer", lambda state: state.pop("param_groups"), "optimizer is not what"),
    "a schedule that takes a method's place": ("scheduler", put("step", 1), "would replace Schedule.step"),
    "a negative update": ("scheduler", put("last_epoch", -2), "last_epoch is -2"),
    "other totals": ("scheduler", put("num_training_steps", 41), "num_training_steps is 40, but the saved schedule"),
    "an infinite learning rate": ("scheduler", put("_last_lr", [math.inf]), r"_last_lr is \[inf\]"),
    "a negative epoch": ("loader", put("epoch", -1), "epoch is -1"),
    "an epoch of 10**9 * 10**9": ("loader", put("epoch", 10**18), "epoch is 1000000000000000000"),
    "half a row": ("loader", put("rows", 0.5), "rows is 0.5"),
    "a seed of text": ("loader", put("data_seed", "42"), "data_seed is 42"),
    "a log with more fields": ("custom", put("accelerator", None), "it has other fields"),
    "a log with less": ("custom", lambda state: state.pop("rows"), "it has other fields"),
    "a log of a negative update": ("custom", put("update", -1), "update is -1"),
    "a log of another run": ("custom", put("update", 41), "update is 41, and this run has 40"),
    "a log of an update that is true": ("custom", put("update", True), "update is True"),
    "a log of NaN losses": ("custom", put("losses", (math.nan, 1.0)), r"losses is \(nan, 1.0\)"),
    "a log without its scores": ("custom", put("epoch", 10**9), "it has 0 evaluations of 1000000000 epochs"),
    "a step of text": ("random_states", put(0, "step", "6"), "step is 6"),
    "no random states": ("random_states", lambda state: state.clear(), "there is no random state"),
    "a short random state": ("random_states", put(0, "torch", torch.zeros(8).byte()), "random_states is not"),
    "a position behind numpy's state": (
        "random_states", lambda state: state[0].update(numpy=(*state[0]["numpy"][:2], 10**6, 0, 0.0)), "numpy's random"
    ),
    "Python's state of text": ("random_states", put(0, "python", (3, "abc", None)), "random_states is not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_state_that_does_not_fit_changes_nothing(kind, tmp_path):
    part, change, reason = WRONG[kind]
    accelerator, _ = training()
    accelerator.save_state(tmp_path / "right")
    parts = checkpoint.load(tmp_path / "right")
    accelerator.load_state(tmp_path / "right")
    change(parts[part])
    checkpoint.save(tmp_path / "wrong", parts)
    accelerator, _ = training()  # the same weights, other random numbers by now
    torch.rand(1)
    before = everything(accelerator)
    with pytest.raises(ValueError, match=rf"wrong does not fit: {part}.*{reason}"):
        accelerator.load_state(tmp_path / "wrong")
    assert same(before, everything(accelerator))


def test_torch_takes_over_what_is_refused_here():
    """A module keeps half of a state that it refuses; a schedule loses its method; an optimizer sees no shape."""
    model, optimizer = nn.Linear(2, 3), torch.optim.AdamW(nn.Linear(2, 3).parameters())
    state: Any = {"weight": torch.full((3, 2), 7.0), "bias": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        model.load_state_dict(state)
    assert (model.weight == 7.0).all()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = copy.deepcopy(schedule.state_dict()) | {"step": 1}
    schedule.load_state_dict(state)
    assert schedule.step == 1
    assert misfit("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, 1), state)
    state = optimizer.state_dict()
    state["state"] = {0: {"exp_avg": torch.zeros(9), "exp_avg_sq": torch.zeros(9), "step": torch.tensor(-1.0)}}
    optimizer.load_state_dict(state)
    assert misfit("optimizer", optimizer, state)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Adafactor", "RMSprop", "Rprop"])
def test_every_optimizers_own_state_fits(name, tmp_path):
    accelerator, _ = training(getattr(torch.optim, name))
    accelerator.save_state(tmp_path / "state")
    before = everything(accelerator)
    accelerator.load_state(tmp_path / "state")
    assert same(before, everything(accelerator))


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
    ],
)
def test_every_schedules_own_state_fits(make):
    schedule = make(torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1, momentum=0.9))
    assert misfit("scheduler", schedule, schedule.state_dict()) == ""


def test_the_callers_object_is_asked_and_may_refuse(tmp_path):
    class Mine:
        def state_dict(self):
            return {"count": 3}

        def load_state_dict(self, state):
            raise KeyError("count")

    accelerator, _ = training()
    accelerator.register_for_checkpointing(Mine())
    accelerator.save_state(tmp_path / "state")
    with pytest.raises(ValueError, match=r"state does not fit: custom_1 refuses its state \('count'\)"):
        accelerator.load_state(tmp_path / "state")


# ---- the log of train.py ----

RUN = state(9)["run"]
LOGS = {
    "a negative update": ({"update": -9}, "it cannot be: update is -9"),
    "an update of 10**30": ({"update": 10**30}, "it cannot be: update is 1000000000000000000000000000000"),
    "an epoch of 10**9": ({"epoch": 10**9}, "it cannot be: it has 0 evaluations of 1000000000 epochs"),
    "an unknown attribute": ({"save": 1}, "it cannot be: it has other fields"),
    "fits of 10**12": ({"run": RUN | {"fits": 10**12}}, "it cannot be: fits is 1000000000000"),
    "fits more than an update": ({"run": RUN | {"fits": 9}}, "it cannot be: fits is 9, and an update has fewer rows"),
    "no ranks": ({"run": RUN | {"world": 0}}, "it cannot be: world is 0"),
    "a batch of text": ({"run": RUN | {"batch_size": "8"}}, "it cannot be: batch_size is 8"),
    "a missing argument": ({"run": {"batch_size": 8}}, "it cannot be: its run has other arguments than train.py"),
    "a list for what was found": ({"run": RUN | {"found": []}}, "it cannot be: what its run has found is not text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_that_cannot_be_is_passed_over(kind, tmp_path):
    changes, reason = LOGS[kind]
    older = save(tmp_path, 8)
    newest = save(tmp_path, 9, **changes)
    start = find_start(arguments(tmp_path))
    assert start.folder == older
    assert start.note.startswith(f"passed over update-00000009: {reason}")
    with pytest.raises(UsageError, match=f"--resume {newest}: {reason}; name another checkpoint"):
        find_start(arguments(tmp_path / "new", str(newest)))


@pytest.mark.parametrize(
    "place, possible",
    [
        ((9, 0, 72), True), ((10, 0, 80), True), ((10, 1, 0), True), ((29, 2, 72), True), ((30, 2, 80), True),
        ((9, 0, 71), True), ((9, 0, 64), False), ((9, 1, 0), False), ((31, 3, 8), False), ((11, 0, 88), False),
    ],
)  # fmt: skip
def test_a_place_where_the_run_never_is_is_one_line(place, possible, tmp_path):
    """80 rows, 8 of them an update, three epochs."""
    start = Start(tmp_path, RUN, place=place)
    if possible:
        check_place(start, 80, 8, 30)
    else:
        with pytest.raises(UsageError, match=rf"it says update {place[0]} after {place[1]} epochs and {place[2]} rows"):
            check_place(start, 80, 8, 30)


@pytest.mark.parametrize("processes", range(1, 13))
def test_the_batch_is_the_largest_that_fits(processes):
    """Compared with trying one after the other."""
    for fits in range(1, 25):
        run = {"batch_size": 24, "accumulate": 2, "world": 3, "fits": fits}
        tried = next((part for part in range(fits, 0, -1) if 144 % (part * processes) == 0), 0)
        if tried:
            assert batch_plan(24, 2, processes, Start(run=run)) == (tried * processes, 144 // (tried * processes))
        else:
            with pytest.raises(UsageError, match="choose values that give 144"):
                batch_plan(24, 2, processes, Start(run=run))


def test_a_huge_batch_is_found_at_once():
    run = {"batch_size": 2**31, "accumulate": 2**31, "world": 1, "fits": 2**31 - 1}
    assert batch_plan(2**31, 2**31, 1, Start(run=run)) == (2**31, 2**31)
