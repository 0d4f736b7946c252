"""What `prepare` wraps things in: a forward under autocast, an optimizer and a schedule that wait for a window's end.

>>> from types import SimpleNamespace
>>> parameter = torch.nn.Parameter(torch.ones(1))
>>> inside_a_window = SimpleNamespace(sync_gradients=False, scaler=None)
>>> optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=1.0), inside_a_window)
>>> parameter.grad = torch.ones(1)
>>> optimizer.step()
>>> parameter.item()  # unchanged: the window goes on
1.0

Underneath: `accelerate.optimizer.AcceleratedOptimizer`, `accelerate.scheduler.AcceleratedScheduler`,
`accelerate.utils.operations.ConvertOutputsToFp32` (accelerate 1.15).
  - Kept: `step` and `zero_grad` do nothing inside a window; a schedule ticks once for each process.
  - fp16: a step was skipped if the scale fell. Accelerate asks whether `step` was called, which a fused optimizer's
    always is.
  - Each asks the Accelerator for `sync_gradients`; there that is a global.

Proof: test_fused_skip_is_seen_where_accelerate_misses_it, test_scheduler_ticks_match_accelerate in
tests/test_accelerator.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from nanofinetune.ground.precision import PRECISIONS
from nanofinetune.ranks.collectives import recursively_apply
from nanofinetune.settings import AutocastKwargs, refuse


class MixedPrecisionForward:
    """A model's forward under autocast, with float32 outputs, as losses and metrics need them.

    An object that holds the bound method, so that a copied model has a forward of its own.
    """

    def __init__(self, forward: Callable[..., Any], device_type: str, precision: str, settings: AutocastKwargs) -> None:
        functools.update_wrapper(self, forward)  # the signature: transformers asks it for the names of inputs
        self.forward, self.device_type, self.precision, self.settings = forward, device_type, precision, settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, PRECISIONS[self.precision], **vars(self.settings)):
            outputs = self.forward(*args, **kwargs)
        return recursively_apply(_to_float32, outputs)


class AcceleratedOptimizer(torch.optim.Optimizer):
    """`step` and `zero_grad` do nothing before the end of a window; all else is the wrapped optimizer's.

    It is a torch.optim.Optimizer so that schedules accept it, but has no groups and no state of its own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: Any) -> None:
        self.optimizer = optimizer
        self.accelerator = accelerator  # asked for `sync_gradients` and `scaler`
        self.step_was_skipped = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With a scaler: unscale, step unless a gradient is infinite or NaN, and set the next scale."""
        scaler = self.accelerator.scaler
        if not self.accelerator.sync_gradients:
            return None
        if scaler is None:
            return self.optimizer.step(closure)
        refuse(closure=closure)
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        # underneath: Accelerate asks whether `step` was called; a fused one always is, and skips by itself
        self.step_was_skipped = scaler.get_scale() < scale
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.accelerator.sync_gradients:
            self.optimizer.zero_grad(set_to_none)

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


class AcceleratedScheduler:
    """A schedule that ticks when its optimizers step, `num_processes` times, as if it counted one process's batches.

    underneath: so a schedule made for 1000 updates is over after 1000 / N of them. With `split_batches`, whose batches
    are one process's, it ticks once; with `step_scheduler_with_optimizer=False` once a call, whatever optimizers do.
    """

    def __init__(self, scheduler: LRScheduler, optimizers: list[AcceleratedOptimizer], accelerator: Any) -> None:
        self.scheduler = scheduler
        self.optimizers = optimizers
        self.accelerator = accelerator

    def step(self, *args: Any, **kwargs: Any) -> None:
        accelerator = self.accelerator
        if not accelerator.step_scheduler_with_optimizer:
            self.scheduler.step(*args, **kwargs)
        elif accelerator.sync_gradients and not any(optimizer.step_was_skipped for optimizer in self.optimizers):
            # underneath: once a process: a schedule counted with a prepared loader's length is over after 1 / N of it
            for _ in range(1 if accelerator.split_batches else accelerator.num_processes):
                # OneCycleLR raises past its end, which several ticks may overshoot
                if self.scheduler.last_epoch < getattr(self.scheduler, "total_steps", float("inf")):
                    self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[Any]:
        return self.scheduler.get_last_lr()

    def get_lr(self) -> list[Any]:
        return self.scheduler.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)


def _to_float32(leaf: Any) -> Any:
    is_half = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if is_half else leaf
