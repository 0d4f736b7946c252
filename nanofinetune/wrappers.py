"""What `prepare` returns: a model under autocast, an optimizer and a schedule that wait for an accumulation window.

>>> parameter, window = nn.Parameter(torch.ones(1)), GradientState(GradientAccumulationPlugin())
>>> optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=1.0), window)
>>> parameter.grad, window.sync_gradients = torch.ones(1), False
>>> optimizer.step()
>>> parameter.item()  # unchanged: the window goes on
1.0

Underneath: `accelerate.optimizer.AcceleratedOptimizer`, `accelerate.scheduler.AcceleratedScheduler`,
`accelerate.state.GradientState`, `accelerate.utils.operations.ConvertOutputsToFp32` (accelerate 1.15).
  - Kept: `step` and `zero_grad` do nothing inside a window; a schedule ticks once for each process.
  - fp16: a step was skipped if the scale fell. Accelerate asks whether `step` was called, which a fused optimizer's
    always is.
  - Each asks a GradientState, which the Accelerator made, for `sync_gradients`; there that is a global.
  - All can be pickled; there a model under autocast cannot.

Proof: test_fused_skip_is_seen_where_accelerate_misses_it, test_scheduler_ticks_match_accelerate in
tests/test_accelerator.py.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nanofinetune.ground.precision import PRECISIONS
from nanofinetune.ranks.collectives import recursively_apply
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.loader import DataLoaderShard, Positions
from nanofinetune.settings import AutocastKwargs, GradientAccumulationPlugin, refuse


class Forwarded:
    """An attribute that belongs to another object: `state = Forwarded("optimizer", "state")` is `optimizer.state`."""

    def __init__(self, holder: str, name: str) -> None:
        self.holder, self.name = holder, name

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        return self if obj is None else getattr(getattr(obj, self.holder), self.name)

    def __set__(self, obj: Any, value: Any) -> None:
        setattr(getattr(obj, self.holder), self.name, value)


def not_copied(self: Any, memo: dict[int, Any]) -> Any:
    """`__deepcopy__` of an object that stays the same in what is copied."""
    return self


class GradientState:
    """Where the window stands, for an Accelerator and all that it prepared (source: accelerate.state.GradientState).

    It holds none of them, so that an Accelerator that is deleted frees its models at once. A deep copy of it is the
    same object: a copied optimizer follows the same windows. A pickled one stands still.
    """

    sync_gradients = True  # whether the current micro-batch ends its window: ranks average, optimizers step
    scaler: torch.amp.GradScaler | None = None

    def __init__(self, plugin: GradientAccumulationPlugin) -> None:
        self.plugin = plugin
        self.num_steps = plugin.num_steps or 1
        self.positions = Positions()  # of the loops over the Accelerator's loaders; the latest batch's is last

    __deepcopy__ = not_copied

    @property
    def sync_with_dataloader(self) -> bool:
        return self.plugin.sync_with_dataloader

    @property
    def active_dataloader(self) -> DataLoaderShard | None:
        """The loader that gave the latest batch, of the loops that are not over."""
        return self.positions[-1].loader if self.positions else None

    @property
    def in_dataloader(self) -> bool:
        return bool(self.positions)

    @property
    def end_of_dataloader(self) -> bool:
        return bool(self.positions) and self.positions[-1].end_of_dataloader

    @property
    def remainder(self) -> int:
        """As DataLoaderShard.remainder; -1 outside of loops."""
        return -1 if self.active_dataloader is None else self.active_dataloader.remainder


class MixedPrecisionForward:
    """A model's forward under autocast, with float32 outputs, as losses and metrics need them.

    A copied or pickled model has a forward of its own. It holds the model weakly: else the model would hold itself.
    """

    def __init__(self, model: nn.Module, device_type: str, precision: str, settings: AutocastKwargs) -> None:
        self.device_type, self.precision, self.settings = device_type, precision, settings
        self._model = weakref.ref(model)
        self._other = model.__dict__.get("forward")  # in place of the class's own
        self.__doc__ = model.forward.__doc__

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's forward without autocast."""
        model = self._model()
        assert model is not None, "the model of this forward is gone"
        return self._other or type(model).forward.__get__(model)

    @property
    def __signature__(self) -> inspect.Signature:  # transformers asks it for the names of inputs
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, PRECISIONS[self.precision], **vars(self.settings)):
            outputs = self.forward(*args, **kwargs)
        return recursively_apply(_to_float32, outputs)

    def remove(self) -> None:
        """Give the model its own forward back."""
        model = self._model()
        if model is not None:
            del model.forward
            if self._other is not None:
                model.forward = self._other

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_model": weakref.ref(state["_model"])})


def extract_model_from_parallel(
    model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """The model inside DDP; `keep_fp32_wrapper=False` gives it its own `forward` back."""
    refuse(keep_torch_compile=None if keep_torch_compile else False, recursive=recursive or None)
    while isinstance(model, (DistributedDataParallel, nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if not keep_fp32_wrapper and isinstance(model.forward, MixedPrecisionForward):
        model.forward.remove()
    return model


class AcceleratedOptimizer(torch.optim.Optimizer):
    """`step` and `zero_grad` do nothing before the end of a window; all else is the wrapped optimizer's.

    It is a torch.optim.Optimizer so that schedules accept it, but has no groups and no state of its own.
    """

    state = Forwarded("optimizer", "state")
    param_groups = Forwarded("optimizer", "param_groups")
    defaults = Forwarded("optimizer", "defaults")

    def __init__(self, optimizer: torch.optim.Optimizer, gradient_state: GradientState) -> None:
        self.optimizer = optimizer
        self.gradient_state = gradient_state  # asked for `sync_gradients` and `scaler`
        self.step_was_skipped = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With a scaler: unscale, step unless a gradient is infinite or NaN, and set the next scale."""
        scaler = self.gradient_state.scaler
        if not self.gradient_state.sync_gradients:
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

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """The wrapped one's, which is told True for None; an optimizer without that argument takes None only."""
        if not self.gradient_state.sync_gradients:
            return
        if "set_to_none" in inspect.signature(self.optimizer.zero_grad).parameters:
            self.optimizer.zero_grad(set_to_none=True if set_to_none is None else set_to_none)
        elif set_to_none is None:
            self.optimizer.zero_grad()
        else:
            raise ValueError(
                f"zero_grad(set_to_none={set_to_none}): {type(self.optimizer).__name__}.zero_grad has no such argument:"
                " leave it out"
            )

    def train(self) -> None:
        """For schedule-free optimizers, which have modes; nothing for others."""
        getattr(self.optimizer, "train", _nothing)()

    def eval(self) -> None:
        """See `train`."""
        getattr(self.optimizer, "eval", _nothing)()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:  # torch's would take the groups and the state, which are not its own
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class AcceleratedScheduler:
    """A schedule that ticks when its optimizers step, `ticks` times: once a process, as if it counted one's batches.

    underneath: so a schedule made for 1000 updates is over after 1000 / N of them. With `split_batches`, whose batches
    are all processes', it ticks once; with `step_with_optimizer=False` once a call, whatever optimizers do.
    """

    def __init__(
        self, scheduler: LRScheduler, optimizers: list[AcceleratedOptimizer], gradient_state: GradientState,
        step_with_optimizer: bool = True, ticks: int = 1,
    ) -> None:  # fmt: skip
        self.scheduler = scheduler
        self.optimizers = optimizers
        self.gradient_state = gradient_state
        self.step_with_optimizer, self.ticks = step_with_optimizer, ticks

    def step(self, *args: Any, **kwargs: Any) -> None:
        if not self.step_with_optimizer:
            self.scheduler.step(*args, **kwargs)
        elif self.gradient_state.sync_gradients and not any(opt.step_was_skipped for opt in self.optimizers):
            total = getattr(self.scheduler, "total_steps", None)
            # underneath: once a process: a schedule counted with a prepared loader's length is over after 1 / N of it
            for _ in range(self.ticks):
                # OneCycleLR raises past its end, which several ticks may overshoot; a ChainedScheduler does not count
                if total is None or self.scheduler.last_epoch < total:
                    self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[Any]:
        return self.scheduler.get_last_lr()

    def get_lr(self) -> list[Any]:
        return self.scheduler.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)


def _nothing() -> None:
    pass


def _to_float32(leaf: Any) -> Any:
    is_half = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if is_half else leaf
