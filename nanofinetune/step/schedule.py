"""The learning rate: each schedule is a pure function of (step, warmup, total), and one class applies it.

>>> [linear_factor(step, warmup=2, total=6) for step in range(8)]  # up from 0, then down to 0
[0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
>>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
>>> schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=2)
>>> for _ in range(2):
...     print(schedule.get_last_lr())
...     optimizer.step()
...     schedule.step()
[0.5]
[0.25]

Underneath: `transformers.get_scheduler` (transformers 5.23) gives a function of the step count to
`torch.optim.lr_scheduler.LambdaLR` (torch 2.13), which multiplies each group's `initial_lr` by it.
  - Kept: arguments, every learning rate exactly, the state dict (it loads both ways).
  - Different: name, totals and options are saved and compared at load; a total below 1, and whatever the library
    ignores, raise; a warm-up may be a ratio; a step past the end warns once.
  - Left out: other names (refused), `step(epoch)`, torch's warning for a `step` before `optimizer.step`.

Proof: test_schedules_match_transformers_get_scheduler, test_lambda_lr_state_dict_forgets_the_totals in
tests/step/test_schedule.py.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

# Each function returns the factor of the learning rate at update number `step`, counted from 0. An *update* is one step
# of the optimizer; `warmup` and `total` count updates too. The options after the star are transformers'.


def linear_factor(step: int, warmup: int, total: int) -> float:
    """0 → 1 over `warmup` updates, 1 → 0 from there to `total`, then 0."""
    if step < warmup:
        return step / warmup  # underneath: the first update of a warm-up has learning rate 0 and changes nothing
    return max(0.0, (total - step) / max(1, total - warmup))


def constant_factor(step: int, warmup: int, total: int) -> float:
    """1."""
    return 1.0


def constant_with_warmup_factor(step: int, warmup: int, total: int) -> float:
    """0 → 1 over `warmup` updates, then 1."""
    return step / warmup if step < warmup else 1.0


def cosine_factor(step: int, warmup: int, total: int, *, num_cycles: float = 0.5) -> float:
    """The warm-up, then `num_cycles` waves of a cosine up to `total`: half a wave falls from 1 to 0."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    # underneath: the wave goes on after `total`, so a run that is longer than planned speeds up again
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))


def cosine_with_restarts_factor(step: int, warmup: int, total: int, *, num_cycles: float = 1) -> float:
    """The warm-up, then `num_cycles` half waves, each from 1 to 0; 0 after `total`. Source: SGDR, arXiv 1608.03983."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def polynomial_factor(
    step: int, warmup: int, total: int, *, lr_init: float, lr_end: float = 1e-7, power: float = 1.0
) -> float:
    """The warm-up, then from learning rate `lr_init` (the optimizer's) to `lr_end`, as (1 - progress) ** power."""
    if step < warmup:
        return step / warmup
    if step > total or warmup == total:  # underneath: the library divides by zero where the two are equal
        return lr_end / lr_init
    remaining = 1 - (step - warmup) / (total - warmup)
    # underneath: lr_init is the optimizer's default, so a group with twice that rate ends at twice lr_end
    return ((lr_init - lr_end) * remaining**power + lr_end) / lr_init


def inverse_sqrt_factor(step: int, warmup: int, total: int, *, timescale: float | None = None) -> float:
    """The warm-up, then 1 / sqrt(1 + (step - warmup) / timescale). None: `warmup`, or 10,000 without a warm-up."""
    if step < warmup:
        return step / warmup
    timescale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + (timescale - warmup)) / timescale)


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": linear_factor,
    "constant": constant_factor,
    "constant_with_warmup": constant_with_warmup_factor,
    "cosine": cosine_factor,
    "cosine_with_restarts": cosine_with_restarts_factor,
    "polynomial": polynomial_factor,
    "inverse_sqrt": inverse_sqrt_factor,
}
# What the learning rate does after `total`. Schedules that are not here have no end, and need no total.
AFTER_THE_END = {
    "linear": "stays 0",
    "cosine": "follows the cosine, up again",
    "cosine_with_restarts": "stays 0",
    "polynomial": "stays at lr_end",
}


class Schedule(LRScheduler):
    """Sets each group's learning rate to its `initial_lr` times a factor. Call `step` after `optimizer.step`.

    It subclasses torch.optim.lr_scheduler.LRScheduler for one reason: accelerate.Accelerator.prepare and other trainers
    recognise a schedule by that, and silently pass through unprepared whatever they do not recognise. The base class
    provides `optimizer`, `base_lrs` (each group's `initial_lr`) and the first tick, at construction.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int | float,
        num_training_steps: int | float | None,
        name: str = "linear",
        **options: Any,
    ) -> None:
        """`name`: one of SCHEDULES. `options`: keyword arguments of its function.

        Raises ValueError for a total below 1 or missing, a warm-up that is neither count nor ratio, an option that the
        schedule does not take, a learning-rate tensor.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        _refuse_tensors(optimizer)
        self.name = name
        self.num_training_steps = _total(name, num_training_steps)
        self.num_warmup_steps = _warmup(name, num_warmup_steps, self.num_training_steps)
        self.options = _options(name, options, optimizer)
        self._warned_past_end = False
        # underneath: this constructor ticks once: it sets initial_lr, base_lrs and last_epoch = -1, then calls step()
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The factor at update number `step`, counted from 0."""
        return SCHEDULES[self.name](step, self.num_warmup_steps, self.num_training_steps, **self.options)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group at the current step."""
        factor = self.factor(self.last_epoch)
        return [base_lr * factor for base_lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Move on to the next update's learning rate. Warns once if that is past the end."""
        if epoch is not None:
            raise NotImplementedError(f"step(epoch={epoch}) is not supported: call step() once for each update")
        self._step_count += 1
        self.last_epoch += 1  # underneath: torch says "epoch" because schedules once ticked once per epoch
        total = self.num_training_steps if self.name in AFTER_THE_END else None
        if total is not None and self.last_epoch > total and not self._warned_past_end:
            self._warned_past_end = True
            warnings.warn(
                f"step {self.last_epoch} of a schedule made for {total}: the learning rate {AFTER_THE_END[self.name]}",
                stacklevel=2,
            )
        self._set_lr()

    def state_dict(self) -> dict[str, Any]:
        """LambdaLR's keys, and what the schedule was made with; plain numbers, strings, lists and dicts."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "_last_lr": list(self._last_lr),
            "lr_lambdas": [None] * len(self.base_lrs),  # LambdaLR.load_state_dict insists on it
            "name": self.name,
            "num_warmup_steps": self.num_warmup_steps,
            "num_training_steps": self.num_training_steps,
            "options": dict(self.options),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict of ours or of LambdaLR. Its `base_lrs` replace our own, as in LambdaLR.

        Sets the optimizer's learning rates too, so it does not matter which of the two is loaded first. Raises
        ValueError, and changes nothing, if the state is another schedule's or has another number of groups.
        """
        for what in ("name", "num_warmup_steps", "num_training_steps", "options"):
            if what == "num_training_steps" and self.name not in AFTER_THE_END:
                continue  # it makes no difference
            ours, saved = getattr(self, what), state_dict.get(what, getattr(self, what))
            if saved != ours:
                raise ValueError(f"{what} is {ours}, but the saved schedule was made with {saved}: resume with {saved}")
        step, base_lrs = state_dict["last_epoch"], list(state_dict["base_lrs"])
        if len(base_lrs) != len(self.base_lrs):
            raise ValueError(
                f"the saved schedule has {len(base_lrs)} parameter groups, the optimizer has {len(self.base_lrs)}"
            )
        lrs = [base_lr * self.factor(step) for base_lr in base_lrs]
        # underneath: LambdaLR saves no totals, but its saved learning rate shows whether they were the same.
        if lrs != list(state_dict["_last_lr"]):
            raise ValueError(
                f"the saved schedule has learning rates {list(state_dict['_last_lr'])} at step {step}, but {self.name} "
                f"with warm-up {self.num_warmup_steps} of {self.num_training_steps} steps gives {lrs}: "
                "resume with the same schedule and totals"
            )
        self.last_epoch, self._step_count, self.base_lrs = step, state_dict["_step_count"], base_lrs
        self._set_lr()

    def _set_lr(self) -> None:
        """Write the current learning rates into the optimizer's groups."""
        _refuse_tensors(self.optimizer)
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


def get_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int | float | None = None,
    num_training_steps: int | float | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> Schedule:
    """transformers.get_scheduler for the names in SCHEDULES (or the members of transformers.SchedulerType).

    `num_warmup_steps` counts updates, or, between 0 and 1, is a ratio of `num_training_steps` (rounded up).
    Raises ValueError for any other name, for a missing number that this schedule needs, and for an argument that would
    have no effect.
    """
    name = getattr(name, "value", name)  # underneath: a member of SchedulerType equals its name but has another hash
    if name not in SCHEDULES:
        raise ValueError(
            f"scheduler name is {name!r}: known are {', '.join(SCHEDULES)}; use transformers.get_scheduler for others"
        )
    if num_warmup_steps is None:
        if name != "constant":
            raise ValueError(f"num_warmup_steps is None: {name!r} needs a number, 0 for no warm-up")
        num_warmup_steps = 0
    return Schedule(optimizer, num_warmup_steps, num_training_steps, name, **(scheduler_specific_kwargs or {}))


# ---- Below: checks.


def _total(name: str, value: int | float | None) -> int | None:
    """num_training_steps, checked."""
    if value is None:
        if name in AFTER_THE_END:
            raise ValueError(f"num_training_steps is None: {name!r} needs the number of optimizer updates")
        return None
    total = _count("num_training_steps", value)
    if total < 1:
        raise ValueError(f"num_training_steps is {value}: it must be 1 or more, the number of optimizer updates")
    return total


def _warmup(name: str, value: int | float, total: int | None) -> int:
    """num_warmup_steps as a count, checked."""
    # underneath: transformers.TrainingArguments takes a ratio; get_scheduler reads 0.1 as a tenth of a step.
    if 0.0 < value < 1.0:
        if total is None:
            raise ValueError(f"num_warmup_steps is {value}, a ratio: this needs num_training_steps, and that is None")
        value = math.ceil(total * value)
    warmup = _count("num_warmup_steps", value)
    if warmup < 0:
        raise ValueError(f"num_warmup_steps is {value}: it must be 0 or more, or a ratio below 1")
    if warmup and name == "constant":  # underneath: the library ignores it
        raise ValueError(f"num_warmup_steps is {value}: 'constant' has no warm-up, use 'constant_with_warmup'")
    if total is not None and warmup > total:
        warnings.warn(
            f"num_warmup_steps is {warmup}, more than num_training_steps, which is {total}: the learning rate never "
            "reaches its peak",
            stacklevel=4,
        )
    return warmup


def _options(name: str, given: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All options of the schedule: those given, checked, and the defaults of the others."""
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    takes = [option for option in options if option != "lr_init"]
    if not given.keys() <= set(takes):  # underneath: 'constant' and 'constant_with_warmup' ignore all options
        raise ValueError(f"scheduler_specific_kwargs is {given}: {name!r} takes {', '.join(takes) or 'none'}")
    for option, value in given.items():
        if option == "timescale" and value is None:
            continue
        if not isinstance(value, Real) or not 0 <= float(value) < math.inf or (option == "timescale" and not value):
            least = "above 0" if option == "timescale" else "0 or more"
            raise ValueError(f"{option} is {value!r}: it must be a number, {least}")
    options |= given
    if "lr_init" in options:
        options["lr_init"] = optimizer.defaults["lr"]
        if not options["lr_init"] > options["lr_end"]:
            raise ValueError(
                f"lr_end is {options['lr_end']}: it must be below the optimizer's lr, {options['lr_init']}"
            )
    return options


def _refuse_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a group's learning rate is a tensor: a number in its place would leave out whoever else holds it."""
    if any(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups):
        raise ValueError("a learning rate of the optimizer is a tensor: a schedule needs Python numbers")


def _count(name: str, value: int | float) -> int:
    """`value` as an int. A float without a fraction will do: epochs * len(loader) may well be 30.0."""
    if not math.isfinite(value) or int(value) != value:
        raise ValueError(f"{name} is {value}: it must be a whole number of optimizer updates")
    return int(value)
