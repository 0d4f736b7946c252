"""The Accelerator: `prepare` wraps what a loop uses; `backward` makes N ranks and K micro-batches act as one batch.

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

A *window*: the micro-batches accumulated into one *update*. A *step* of N ranks: the N batches that they do at once.

    Accelerate's name                                  where the work is done
    prepare                                            here, wrappers.py, ranks/loader.py, ranks/ddp.py
    accumulate, backward                               here; ranks/loader.py says where an epoch ends
    gather_for_metrics, gather, reduce, ...            ranks/collectives.py; ranks/loader.py  remainder
    optimizer.step, scheduler.step                     wrappers.py, around step/optim.py and step/schedule.py
    save_state, load_state                             run/state.py, run/checkpoint.py
    Accelerator(...), device, process_index, ...       settings.py, ranks/world.py

Underneath: `accelerate.Accelerator` (accelerate 1.15).
  - Its state lives in dictionaries that all instances share; here it lives on the object.
  - Kept: names, arguments, order of results, a full window's gradient.
  - A short window is the mean over the rows it holds; Accelerate divides by `gradient_accumulation_steps`.
  - `uneven="mask"`: no row counts twice, so N ranks compute the gradient of one.
  - `gather_for_metrics` raises where Accelerate returns repeated rows.
  - Other backends are refused by name.

Proof: test_windows_match_accelerate_but_for_the_short_one, test_ranks_equal_one_process_where_accelerate_does_not in
tests/test_accelerator.py and tests/ranks/test_equal_ranks.py.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from nanofinetune import wrappers
from nanofinetune.dropin import ATTRIBUTES, METHODS, processes, saving, tracking
from nanofinetune.dropin.parallel import DistributedDataParallel
from nanofinetune.dropin.partial_state import type_of
from nanofinetune.ground.precision import PRECISIONS, checked_precision
from nanofinetune.ranks import collectives
from nanofinetune.ranks.loader import DataLoaderShard, Position, prepare_data_loader, skip_first_batches
from nanofinetune.ranks.world import TIMEOUT, shutdown
from nanofinetune.run import checkpoint, same, state
from nanofinetune.settings import (
    ABSENT,
    AutocastKwargs,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    accumulation_of,
    check_types,
    handlers_of,
    project_of,
    refuse,
    start_world,
)
from nanofinetune.wrappers import AcceleratedOptimizer, AcceleratedScheduler, MixedPrecisionForward


class Accelerator:
    """One training's ranks, precision and accumulation; several may exist at once.

    Args, where they are not Accelerate's:
        mixed_precision: "no", "bf16" or "fp16"; None is NANOFINETUNE_MIXED_PRECISION, `accelerate launch`'s, or "no".
        uneven: what completes the last step of an epoch on N > 1 ranks: "wrap" repeats rows as Accelerate's
            `even_batches` does, "mask" adds none. It needs batches that are mappings with a tensor "labels"; a rank
            without a row in that step computes a loss that may be NaN, and that `backward` weighs with zero.
        device: what `choose_device` takes. timeout: how long ranks wait for each other.
        kwargs_handlers: at most one of each kind that settings.py has.

    Raises NotImplementedError for an argument that is not supported, UsageError for a precision that the device does
    not have, AttributeError for a name in settings.ABSENT; each says what to use instead.
    """

    step: int  # micro-batches since the last epoch ended
    index_in_window: int | None  # of the current micro-batch; None outside of `accumulate`
    logging_dir: str | None  # this and the next are in dropin/attributes.py
    even_batches: bool
    # sync_gradients: whether the current micro-batch ends its window: ranks average, optimizers step
    sync_gradients, gradient_accumulation_steps, scaler, positions = (
        wrappers.Forwarded("gradient_state", name) for name in ("sync_gradients", "num_steps", "scaler", "positions")
    )

    # ---- what the loop calls -----------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare models, optimizers, loaders and schedulers, given in any order, and return them in that order.

        Anything else is returned as it came. `device_placement`: one for each argument, in place of the Accelerator's.
        """
        placed = [self.device_placement] * len(args) if device_placement is None else device_placement
        if len(placed) != len(args):
            raise ValueError(f"device_placement has {len(placed)} entries for {len(args)} objects: give one for each")
        result = list(args)
        kinds: tuple[tuple[type, Callable[..., Any]], ...] = (
            (nn.Module, self.prepare_model),  # first: optimizers follow their parameters to the device
            (DataLoader, self.prepare_data_loader),
            (torch.optim.Optimizer, self.prepare_optimizer),
            (LRScheduler, lambda scheduler, _: self.prepare_scheduler(scheduler)),  # last: it looks for its optimizer
        )
        for kind, prepare in kinds:
            for i in (i for i, obj in enumerate(args) if isinstance(obj, kind)):
                result[i] = prepare(args[i], placed[i])
        return result[0] if len(result) == 1 else tuple(result)

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """A `with` block around one micro-batch; a window ends after K of them, and with the loader."""
        at_end = self.gradient_state.end_of_dataloader and self.gradient_state.sync_with_dataloader
        self.index_in_window = self.step % self.gradient_accumulation_steps
        self.step = 0 if at_end else self.step + 1
        self.sync_gradients = at_end or self.step % self.gradient_accumulation_steps == 0
        with ExitStack() as stack:
            for model in () if self.sync_gradients or self.gradient_state.plugin.sync_each_batch else models:
                stack.enter_context(self.no_sync(model))
            try:
                yield
            finally:
                self.index_in_window = None

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Add this micro-batch's part to the gradients. `loss`: the mean over this rank's rows."""
        loss = self._weigh(loss)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward(**kwargs)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather one row, or one object, a sample; leave out the rows that only complete the last step.

        Raises RuntimeError where the loader cannot tell which these are, ValueError for anything but one row a sample.
        """
        leaves: list[Any] = []
        collectives.recursively_apply(leaves.append, input_data)
        objects = use_gather_object or not all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        position = self.position if self.use_distributed else None
        remainder = position.loader.remainder if position is not None and position.end_of_dataloader else 0
        if remainder < 0:
            raise RuntimeError(
                "gather_for_metrics: the sizes of the batches or of the data set are unknown, so the rows that complete"
                " the last step are unknown too: use gather, and leave them out yourself"
            )
        if position is None or remainder == 0:  # of one process anything comes back as it is
            return collectives.gather_object(input_data, self.world) if objects else self.gather(input_data)
        if objects:
            return collectives.gather_object(input_data, self.world)[:remainder]
        expected = position.loader.total_batch_size or 0
        if self.uneven == "mask":  # equal parts, of which the last ranks hold less
            expected = -(-remainder // self.num_processes) * self.num_processes
            input_data = self.pad_across_processes(input_data)
        trim = partial(collectives.first_rows, count=remainder, expected=expected)
        return collectives.recursively_apply(trim, self.gather(input_data))

    @property
    def position(self) -> Position | None:
        """Where the loop stands that got the latest batch, of those that are not over; None outside of any."""
        # underneath: Accelerate asks a global list, which a loader that was left by `break` never leaves
        return self.positions[-1] if self.positions else None

    def _weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times mine * N / (rows of the window): DDP's mean over N ranks is then the mean over all these rows.

        `loss` is a mean over this rank's `mine` rows. In a full window the factor is 1 / K, exactly as in Accelerate.
        """
        accumulated = self.gradient_accumulation_steps
        position = self.position
        rows = None if position is None else position.loader.rows_of_step(position.index)
        if position is None or rows is None or not self.gradient_state.sync_with_dataloader:
            return loss / accumulated
        mine, everyones = rows
        if mine == 0:  # the mean over nothing is NaN, but its gradient is 0; and the other ranks wait for this backward
            return loss * 0.0
        window = accumulated * everyones
        if self.index_in_window is not None:  # steps before the loader's first one, after a `break`, count as full ones
            loader, first = position.loader, position.index - self.index_in_window
            steps = map(loader.rows_of_step, range(first, min(first + accumulated, len(loader))))
            window = sum(step[1] for step in steps if step is not None)
        # underneath: Accelerate divides by `accumulated` here, however few micro-batches the epoch's last window holds
        return loss / (window / (mine * self.num_processes))

    # ---- how it begins and ends --------------------------------------------------------------------------------------

    def __init__(
        self, device_placement: bool = True, split_batches: bool = False, mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1, cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None, *, rng_types: list[str] | None = None,
        log_with: Any = None, project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        kwargs_handlers: list[Any] | None = None, step_scheduler_with_optimizer: bool = True,
        uneven: str = "wrap", device: str = "auto", timeout: timedelta = TIMEOUT, **unsupported: Any,
    ) -> None:  # fmt: skip
        refuse(**unsupported)
        if uneven not in ("wrap", "mask"):
            raise ValueError(f"uneven is {uneven!r}: it must be 'wrap' or 'mask'")
        if cpu and device not in ("auto", "cpu"):
            raise ValueError(f"cpu=True and device={device!r} contradict each other: pass one of them")
        accumulation = accumulation_of(gradient_accumulation_steps, gradient_accumulation_plugin)
        self.gradient_state = wrappers.GradientState(accumulation)
        self.project_configuration = project_of(project_config, project_dir)
        self.log_with, self.trackers = tracking.chosen(log_with, self.logging_dir), list[Any]()
        (self.autocast_handler, self.ddp_handler, self.scaler_handler, self.init_handler,
         self.profile_handler) = handlers_of(kwargs_handlers)  # fmt: skip
        self.world = start_world("cpu" if cpu else device, timeout, self.init_handler)
        self.device, self.num_processes = self.world.device, self.world.size
        self.process_index, self.local_process_index = self.world.rank, self.world.local_rank
        self.is_main_process, self.is_local_main_process = self.process_index == 0, self.local_process_index == 0
        self.is_last_process, self.use_distributed = self.world.rank == self.world.size - 1, self.world.size > 1
        self.distributed_type = type_of(self.world)
        self.mixed_precision = checked_precision(mixed_precision, self.device)
        if self.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type, **vars(self.scaler_handler))
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        self.split_batches = split_batches or self.dataloader_config.split_batches
        self.uneven, self.rng_types = uneven, rng_types
        self.device_placement, self.step_scheduler_with_optimizer = device_placement, step_scheduler_with_optimizer
        self.step, self.index_in_window = 0, None
        self.flag_tensor = torch.zeros((), dtype=torch.int64, device=self.device)
        self._prepared = state.Prepared()
        self._saver = checkpoint.Saver(lambda line: print(line, file=sys.stderr, flush=True))

    def end_training(self) -> None:
        """Destroy the process group, if this Accelerator made it. Belongs in a `finally`; may be called twice."""
        self._saver.wait()
        tracking.finish(self)
        self._prepared = state.Prepared()  # nothing of ours holds the group: see shutdown
        shutdown(self.world)

    __deepcopy__ = wrappers.not_copied

    def __getstate__(self) -> dict[str, Any]:  # without the thread that writes checkpoints: a pickled one cannot save
        return {name: value for name, value in vars(self).items() if name != "_saver"}

    # ---- prepare, one kind at a time ---------------------------------------------------------------------------------

    def prepare_model(self, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        """Autocast around `forward`, then the device, then DDP, which `evaluation_mode` leaves out."""
        if any(model is prepared for prepared in self._prepared.models):
            return model
        inner = self.unwrap_model(model)
        wrapped = inner is not model or isinstance(inner.forward, MixedPrecisionForward)
        if wrapped or any(inner is self.unwrap_model(prepared) for prepared in self._prepared.models):
            raise ValueError("this model is prepared already: pass what `prepare` returned, or unwrap_model it first")
        if self.mixed_precision != "no":
            settings = self.autocast_handler or AutocastKwargs()
            model.forward = MixedPrecisionForward(model, self.device.type, self.mixed_precision, settings)
        if self.device_placement if device_placement is None else device_placement:
            model.to(self.device)
        if self.use_distributed and not evaluation_mode and any(p.requires_grad for p in model.parameters()):
            model = DistributedDataParallel(model, on_send=self.world.calls.begin, **self.ddp_handler.arguments())
            self.ddp_handler.register_comm_hook(model)
        self._prepared.models.append(model)
        return model

    def prepare_data_loader(
        self, data_loader: DataLoader, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> DataLoaderShard:
        """This rank's loader. On N > 1 ranks a collective: the order is rank 0's."""
        if isinstance(data_loader, DataLoaderShard) and data_loader.positions is self.positions:
            return data_loader
        same.check_same(self.world, same.of_loader(data_loader), "prepare the same loader on all ranks")
        config = vars(self.dataloader_config) | {"split_batches": self.split_batches, "even_batches": self.even_batches}
        place = self.device_placement if device_placement is None else device_placement
        shard = prepare_data_loader(
            data_loader, self.device, self.num_processes, self.process_index, put_on_device=place,
            rng_types=self.rng_types, slice_fn_for_dispatch=slice_fn_for_dispatch,
            uneven=self.uneven, positions=self.positions, unlike=self._prepared.unlike, **config,
        )  # fmt: skip
        self._prepared.loaders.append(shard)
        return shard

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """An optimizer that steps only at the end of a window, and through the scaler where there is one."""
        if isinstance(optimizer, AcceleratedOptimizer):
            if optimizer.gradient_state is not self.gradient_state:
                raise ValueError("this optimizer is prepared already, by another Accelerator: pass its .optimizer")
            return optimizer
        place = self.device_placement if device_placement is None else device_placement
        if place and optimizer.state:  # loaded before the model moved
            optimizer.load_state_dict(optimizer.state_dict())
        self._prepared.optimizers.append(AcceleratedOptimizer(optimizer, self.gradient_state))
        return self._prepared.optimizers[-1]

    def prepare_scheduler(self, scheduler: LRScheduler) -> AcceleratedScheduler:
        """A schedule that ticks when its optimizer steps (those of all optimizers prepared, where it has another)."""
        own = [opt for opt in self._prepared.optimizers if scheduler.optimizer in (opt, opt.optimizer)]
        how = self.gradient_state, self.step_scheduler_with_optimizer, 1 if self.split_batches else self.num_processes
        self._prepared.schedulers.append(AcceleratedScheduler(scheduler, own or self._prepared.optimizers, *how))
        return self._prepared.schedulers[-1]

    def skip_first_batches(self, dataloader: DataLoader, num_batches: int = 0) -> DataLoader:
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model as it was given to `prepare`; `keep_fp32_wrapper=False` gives it its own `forward` back."""
        return wrappers.extract_model_from_parallel(model, keep_fp32_wrapper, keep_torch_compile)

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget what was prepared -> one None for each object, for the caller to assign to its names."""
        self._prepared, self.step = state.Prepared(), 0
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    clear = free_memory

    def forget(self, *objects: Any) -> None:
        """Let go of prepared models, optimizers, schedulers or loaders: `save_state` saves them no more."""
        self._prepared.forget(*objects)

    # ---- one accumulation window -------------------------------------------------------------------------------------

    def no_sync(self, model: Any) -> AbstractContextManager[None]:
        """A `with` block in which backward only accumulates, on each rank for itself."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide gradients by what fp16 multiplied the loss with: those of one optimizer, of a list, or of all."""
        if self.scaler is not None:
            several = isinstance(optimizer, (list, tuple))
            for each in optimizer if several else [optimizer] if optimizer else self._prepared.optimizers:
                self.scaler.unscale_(each.optimizer if isinstance(each, AcceleratedOptimizer) else each)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """torch's, on unscaled gradients; returns the norm that they had. Call it only if `sync_gradients`."""
        self.unscale_gradients()
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """torch's, on unscaled gradients. Call it only if `sync_gradients`."""
        self.unscale_gradients()
        nn.utils.clip_grad_value_(parameters, clip_value)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether an optimizer's last step did nothing, since fp16 gradients overflowed."""
        return any(optimizer.step_was_skipped for optimizer in self._prepared.optimizers)

    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager[Any]:
        """A `with` block that computes in `mixed_precision`; an AutocastKwargs replaces that of `kwargs_handlers`."""
        check_types([] if autocast_handler is None else [autocast_handler], AutocastKwargs)
        settings = autocast_handler or self.autocast_handler or AutocastKwargs()
        dtype = PRECISIONS[self.mixed_precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype, **vars(settings))

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Let `save_state` and `load_state` take care of these too: anything with `state_dict`, `load_state_dict`."""
        wrong = [type(obj).__name__ for obj in objects if not all(map(partial(hasattr, obj), state.METHODS))]
        if wrong:
            raise ValueError(
                f"register_for_checkpointing: {', '.join(wrong)} lacks one of {' and '.join(state.METHODS)}"
            )
        self._prepared.custom.extend(objects)

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True,
        *, keep: int | None = None, background: bool = False, **save_model_func_kwargs: Any,
    ) -> str:  # fmt: skip
        """Save all that was prepared or registered, and the random states, into a folder -> its path. A collective.

        `keep`: how many such folders stay. `background`: return as soon as the state is copied. An older checkpoint is
        replaced in one step; anything else in the folder stays, and raises FileExistsError. See run/state.py.
        """
        refuse(safe_serialization=None if safe_serialization else False, **save_model_func_kwargs)
        project = self.project_configuration
        if project.automatic_checkpoint_naming:
            output_dir = os.path.join(project.project_dir or ".", "checkpoints", f"checkpoint_{project.iteration}")
            keep = project.total_limit if keep is None else keep
        if output_dir is None:
            raise ValueError("save_state: name an output_dir, or choose automatic_checkpoint_naming")
        place, things = saving.call_hooks(self, "save_hooks", Path(output_dir))
        replace = not project.automatic_checkpoint_naming
        state.save(place, things, self.world, self._saver, keep, background, self.step, replace=replace)
        project.iteration += 1
        return str(Path(output_dir))

    def load_state(
        self, input_dir: str | os.PathLike[str] | None = None, load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:  # fmt: skip
        """Put all that was prepared or registered where `save_state` found it. A collective; see run/state.py.

        Without `input_dir`: the newest complete one that automatic naming made. A loader begins the epoch in which it
        was: skip what was read of it with `skip_first_batches`. A part of what was saved may be loaded.
        """
        refuse(load_kwargs=load_kwargs, **load_model_func_kwargs)
        project = self.project_configuration
        named = Path(project.project_dir or ".", "checkpoints")
        folder = state.newest(named, self.world) if input_dir is None else Path(input_dir)
        place, things = saving.call_hooks(self, "load_hooks", folder)
        self.step = state.load(place, things, self.world, self.step)
        if project.automatic_checkpoint_naming and checkpoint.series_of(folder) == state.SERIES:
            project.iteration = checkpoint.number_of(folder) + 1  # underneath: Accelerate begins at 0 again

    # ---- between ranks -----------------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        return collectives.gather(tensor, self.world)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        refuse(scale=None if scale == 1.0 else scale)  # underneath: Accelerate ignores it, except on a TPU
        return collectives.reduce(tensor, self.world, reduction)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        return collectives.pad_across_processes(tensor, self.world, dim, pad_index, pad_first)

    def wait_for_everyone(self) -> None:
        """Return when every rank has come here, and what `save_state` began in the background is written."""
        self._saver.wait()
        collectives.wait_for_everyone(self.world)

    main_process_first, local_main_process_first = processes.main_process_first, processes.local_main_process_first
    on_main_process, on_local_main_process = processes.on_main_process, processes.on_local_main_process
    print = processes.print_once_a_node

    if not TYPE_CHECKING:  # a type checker would take every name for known

        def __getattr__(self, name: str) -> Any:
            """The rest of Accelerate's names: functions of dropin/, whose first argument is the Accelerator."""
            if room := METHODS.get(name) or ATTRIBUTES.get(name):
                function = getattr(importlib.import_module(f"nanofinetune.dropin.{room}"), name)
                return partial(function, self) if name in METHODS else function(self)
            if name in ABSENT:
                raise AttributeError(f"Accelerator.{name} is not supported here: {ABSENT[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
