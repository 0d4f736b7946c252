"""The facade: Accelerate's names for the pieces of the other files, and the little state that holds them together.

>>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
>>> model = nn.Linear(1, 1, bias=False)
>>> model, optimizer, loader = accelerator.prepare(
...     model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(torch.ones(6, 1), batch_size=1)
... )
>>> for row in loader:
...     with accelerator.accumulate(model):
...         accelerator.backward(model(row).mean())  # every row's gradient is 1, so a window's mean is 1 as well
...         if accelerator.sync_gradients:
...             print(model.weight.grad.item())  # Accelerate: 1.0, and 0.5 for the short window at the end
...         optimizer.step()
...         optimizer.zero_grad()
1.0
1.0

    Accelerate's name                                  where the work is done
    Accelerator(), device, process_index, ...          distributed.py  init_world, World
    prepare, prepare_model                             here (autocast), ddp.py  DistributedDataParallel
    prepare_data_loader, skip_first_batches            loader.py, sampler.py
    prepare_optimizer, optimizer.step                  here  AcceleratedOptimizer, around optim.py
    prepare_scheduler, scheduler.step                  here  AcceleratedScheduler, around schedule.py
    backward                                           here  _weigh; loader.py  rows_of_step
    accumulate, sync_gradients                         here; loader.py  running, end_of_dataloader
    no_sync                                            ddp.py
    clip_grad_norm_, clip_grad_value_                  torch.nn.utils, after the scaler's unscale_
    gather, reduce, pad_across_processes               distributed.py
    gather_for_metrics                                 distributed.py  gather; loader.py  remainder
    wait_for_everyone, main_process_first              distributed.py
    save_state, load_state                             here, which objects; checkpoint.py, how they are kept
    save, save_model, get_state_dict                   here, a few lines each
    end_training                                       distributed.py  shutdown

Underneath: `accelerate.Accelerator` (accelerate 1.15) keeps its state in dictionaries that all instances share
(`accelerate.state.PartialState`, `accelerate.state.AcceleratorState`, `accelerate.state.GradientState`) and wraps what
must wait for the end of an accumulation window: `accelerate.optimizer.AcceleratedOptimizer`,
`accelerate.scheduler.AcceleratedScheduler`. Kept: names, arguments, order of results, a full window's gradient, the
ticking of schedules; preparing twice changes nothing. Left out: other backends and precisions, plugins, trackers,
`torch.compile`; an argument or a method for one of them is refused by name. Different on purpose:
  - A window's gradient is the mean over the rows it really holds, the short window at an epoch's end included;
    Accelerate divides by `gradient_accumulation_steps`. Where nobody knows these rows beforehand (streams, batches that
    vary in size, `even_batches=False`), or the window (backward without `accumulate`), it is as in Accelerate.
  - With `uneven="mask"` no row counts twice, and ranks weigh as much as they have rows, so that N ranks compute the
    gradient of one. The loss given to `backward` must be the mean over the rank's rows for that.
  - `gather_for_metrics` raises where it cannot tell which rows are repeated; Accelerate returns them all.
  - In fp16 a step was skipped if the scale has fallen. Accelerate asks instead whether the optimizer's `step` was
    called: a fused one's always is, and skips by itself, so that Accelerate counts that step as done.
  - An inner loop left by `break` does not take the flush at its end from the outer one. fp16 on a CPU is refused.
  - `Accelerator(split_batches=True)` splits; in 1.15 only `dataloader_config` does, and the argument is ignored.

Proof: test_windows_match_accelerate_but_for_the_short_one, test_broken_inner_loop_keeps_the_outer_flush,
test_fused_skip_is_seen_where_accelerate_misses_it, test_scheduler_ticks_match_accelerate,
test_mixed_precision_matches_accelerate, test_fp16_on_cpu_is_refused_where_accelerate_trains_fp32,
test_accelerate_ignores_split_batches, test_kwargs_handlers_match_accelerate, test_gather_for_metrics_on_ranks,
test_public_names_and_signatures_match_accelerate, test_what_is_absent_says_what_to_use_instead,
test_save_and_get_state_dict_match_accelerate in tests/test_accelerator.py;
test_ranks_equal_one_process_where_accelerate_does_not, test_course_listing_matches_accelerate_under_torchrun in
tests/test_equal_ranks.py.
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
        self.accelerator = accelerator
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

    def __init__(
        self, scheduler: LRScheduler, optimizers: list[AcceleratedOptimizer], accelerator: Any
    ) -> None:
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
