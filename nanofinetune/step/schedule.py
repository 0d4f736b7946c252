"""The learning rate: a linear rise from 0, then a linear fall back to 0.

>>> [linear_factor(step, warmup=2, total=6) for step in range(8)]
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
  - Different: the totals are saved and compared at load; a total below 1 raises; a warm-up may be a ratio; a step past
    the end and a warm-up longer than the training each warn once.
  - Left out: all other schedules, `step(epoch)`, torch's warning for a first `step` before `optimizer.step`.

Proof: test_linear_schedule_matches_transformers_get_scheduler, test_lambda_lr_state_dict_forgets_the_totals in
tests/step/test_schedule.py.
"""

import math
import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


def linear_factor(step: int, warmup: int, total: int) -> float:
    """The factor of the learning rate at update number `step`, counted from 0. An *update* is one optimizer step.

    0 → 1 over `warmup` updates, 1 → 0 from there to `total`, then 0.
    """
    if step < warmup:
        return step / warmup  # underneath: the first update of a warm-up has learning rate 0 and changes nothing
    return max(0.0, (total - step) / max(1, total - warmup))


class LinearSchedule(LRScheduler):
    """Sets each group's learning rate to its `initial_lr` times `linear_factor`. Call `step` after `optimizer.step`.

    It subclasses torch.optim.lr_scheduler.LRScheduler for one reason: accelerate.Accelerator.prepare and other trainers
    recognise a schedule by that, and silently pass through unprepared whatever they do not recognise. The base class
    provides `optimizer`, `base_lrs` (each group's `initial_lr`) and the first tick, at construction.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self, optimizer: torch.optim.Optimizer, num_warmup_steps: int | float, num_training_steps: int | float
    ) -> None:
        """Raises ValueError for a total below 1, a warm-up that is neither count nor ratio, a learning-rate tensor."""
        self.num_training_steps = _count("num_training_steps", num_training_steps)
        if self.num_training_steps < 1:
            raise ValueError(
                f"num_training_steps is {num_training_steps}: it must be 1 or more, the number of optimizer updates"
            )
        # underneath: transformers.TrainingArguments takes a ratio; get_scheduler reads 0.1 as a tenth of a step.
        if 0.0 < num_warmup_steps < 1.0:
            num_warmup_steps = math.ceil(self.num_training_steps * num_warmup_steps)
        self.num_warmup_steps = _count("num_warmup_steps", num_warmup_steps)
        if self.num_warmup_steps < 0:
            raise ValueError(f"num_warmup_steps is {num_warmup_steps}: it must be 0 or more, or a ratio below 1")
        if self.num_warmup_steps > self.num_training_steps:
            warnings.warn(
                f"num_warmup_steps is {self.num_warmup_steps}, more than num_training_steps, which is "
                f"{self.num_training_steps}: the learning rate never reaches its peak",
                stacklevel=2,
            )
        if any(isinstance(group["lr"], torch.Tensor) for group in getattr(optimizer, "param_groups", [])):
            raise ValueError("a learning rate of the optimizer is a tensor: LinearSchedule needs Python numbers")
        self._warned_past_end = False
        # underneath: this constructor ticks once: it sets initial_lr, base_lrs and last_epoch = -1, then calls step()
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group at the current step."""
        factor = linear_factor(self.last_epoch, self.num_warmup_steps, self.num_training_steps)
        return [base_lr * factor for base_lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Move on to the next update's learning rate. Warns once if that is past the end."""
        if epoch is not None:
            raise NotImplementedError(f"step(epoch={epoch}) is not supported: call step() once for each update")
        self._step_count += 1
        self.last_epoch += 1  # underneath: torch says "epoch" because schedules once ticked once per epoch
        if self.last_epoch > self.num_training_steps and not self._warned_past_end:
            self._warned_past_end = True
            warnings.warn(
                f"step {self.last_epoch} of a schedule made for {self.num_training_steps}: the learning rate stays 0",
                stacklevel=2,
            )
        self._set_lr()

    def state_dict(self) -> dict[str, Any]:
        """LambdaLR's keys and the two totals, in plain numbers and lists."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": list(self.base_lrs),
            "_last_lr": list(self._last_lr),
            "lr_lambdas": [None] * len(self.base_lrs),  # LambdaLR.load_state_dict insists on it
            "num_warmup_steps": self.num_warmup_steps,
            "num_training_steps": self.num_training_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict of ours or of LambdaLR. Its `base_lrs` replace our own, as in LambdaLR.

        Sets the optimizer's learning rates too, so it does not matter which of the two is loaded first. Raises
        ValueError, and changes nothing, if the state has other totals or another number of groups.
        """
        for name in ("num_warmup_steps", "num_training_steps"):
            ours, saved = getattr(self, name), state_dict.get(name, getattr(self, name))
            if saved != ours:
                raise ValueError(f"{name} is {ours}, but the saved schedule was made with {saved}: resume with {saved}")
        step, base_lrs = state_dict["last_epoch"], list(state_dict["base_lrs"])
        if len(base_lrs) != len(self.base_lrs):
            raise ValueError(
                f"the saved schedule has {len(base_lrs)} parameter groups, the optimizer has {len(self.base_lrs)}"
            )
        factor = linear_factor(step, self.num_warmup_steps, self.num_training_steps)
        lrs = [base_lr * factor for base_lr in base_lrs]
        # underneath: LambdaLR saves no totals, but its saved learning rate shows whether they were the same.
        if lrs != list(state_dict["_last_lr"]):
            raise ValueError(
                f"the saved schedule has learning rates {list(state_dict['_last_lr'])} at step {step}, but warm-up "
                f"{self.num_warmup_steps} of {self.num_training_steps} steps gives {lrs}: resume with the same totals"
            )
        self.last_epoch, self._step_count, self.base_lrs = step, state_dict["_step_count"], base_lrs
        self._set_lr()

    def _set_lr(self) -> None:
        """Write the current learning rates into the optimizer's groups."""
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


def get_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int | float | None = None,
    num_training_steps: int | float | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LinearSchedule:
    """transformers.get_scheduler for `name` "linear" (or transformers.SchedulerType.LINEAR, which equals it).

    `num_warmup_steps` counts updates, or, between 0 and 1, is a ratio of `num_training_steps` (rounded up).
    Raises ValueError for any other name, a missing number or a non-empty `scheduler_specific_kwargs`.
    """
    if name != "linear":
        raise ValueError(f"scheduler name is {getattr(name, 'value', name)!r}: the only one here is 'linear'")
    if scheduler_specific_kwargs:
        raise ValueError(f"scheduler_specific_kwargs is {scheduler_specific_kwargs}: 'linear' takes none")
    if num_warmup_steps is None:
        raise ValueError("num_warmup_steps is None: 'linear' needs a number, 0 for no warm-up")
    if num_training_steps is None:
        raise ValueError("num_training_steps is None: 'linear' needs the number of optimizer updates")
    return LinearSchedule(optimizer, num_warmup_steps, num_training_steps)


def _count(name: str, value: int | float) -> int:
    """`value` as an int. A float without a fraction will do: epochs * len(loader) may well be 30.0."""
    if not math.isfinite(value) or int(value) != value:
        raise ValueError(f"{name} is {value}: it must be a whole number of optimizer updates")
    return int(value)
