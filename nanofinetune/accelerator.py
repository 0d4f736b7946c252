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

import builtins
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from nanofinetune import checkpoint, distributed
from nanofinetune.ddp import DistributedDataParallel, DistributedDataParallelKwargs
from nanofinetune.distributed import InitProcessGroupKwargs
from nanofinetune.errors import UsageError
from nanofinetune.loader import DataLoaderShard, Position, order_seed, prepare_data_loader, skip_first_batches

_STATEFUL = ("state_dict", "load_state_dict")
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class DataLoaderConfiguration:
    """What loader.prepare_data_loader is told (source: accelerate.utils.DataLoaderConfiguration)."""

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = True  # underneath: False there, and then one process has another order than two
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False


@dataclass
class ProjectConfiguration:
    """Where states go (source: accelerate.utils.ProjectConfiguration)."""

    project_dir: str | None = None
    logging_dir: str | None = None  # for trackers of the caller's
    automatic_checkpoint_naming: bool = False  # project_dir/checkpoints/checkpoint_0, checkpoint_1, ...
    total_limit: int | None = None  # how many of these stay
    iteration: int = 0  # the number of the next one
    save_on_each_node: bool = False


@dataclass
class AutocastKwargs:
    """What torch.autocast is told (source: accelerate.utils.AutocastKwargs)."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class GradScalerKwargs:
    """What torch.amp.GradScaler is told, for fp16 (source: accelerate.utils.GradScalerKwargs)."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


# What accelerate.Accelerator has under a public name and this one has not -> what to do instead.
ABSENT = {
    name: instead
    for names, instead in (
        ("init_trackers log get_tracker trackers log_with", "call the tracker's own library on rank 0"),
        ("profile profile_handler", "use torch.profiler, or python -m nanofinetune.trace"),
        ("register_save_state_pre_hook register_load_state_pre_hook", "use register_for_checkpointing"),
        ("join_uneven_inputs", "use Accelerator(uneven='mask')"),
        ("trigger_sync_in_backward", "let the last backward of a window be outside of no_sync"),
        ("on_process on_local_process", "ask for process_index or local_process_index"),
        ("state gradient_state", "ask the Accelerator itself: num_processes, sync_gradients, ..."),
        ("multi_device", "ask whether num_processes is above 1"),
        ("native_amp", "ask for mixed_precision or scaler"),
        (
            "dispatch_batches even_batches non_blocking use_seedable_sampler use_stateful_dataloader",
            "ask dataloader_config",
        ),
        ("project_dir logging_dir", "ask project_configuration"),
        ("save_iteration", "ask project_configuration.iteration"),
        (
            "fp8_backend fp8_enabled fp8_recipe_handler ao_recipe_handler te_recipe_handler msamp_recipe_handler"
            " has_fp8_handler delayed_fp8_autocast has_lomo_optimizer lomo_backward deepspeed_plugin"
            " deepspeed_ulysses_dl_adapter is_fsdp2 should_save_model verify_device_map torch_device_mesh"
            " parallelism_config is_composable_parallelism_enabled maybe_context_parallel context_parallel_rank"
            " data_parallel_rank data_parallel_shard_rank pipeline_parallel_rank tensor_parallel_rank",
            "use accelerate for it",
        ),
    )
    for name in names.split()
}
HANDLERS = (AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs)


class Accelerator:
    """One training's world, precision and accumulation; several may exist at once.

    Args, where they are not Accelerate's:
        mixed_precision: "no", "bf16" or "fp16"; None is the environment variable NANOFINETUNE_MIXED_PRECISION, or "no".
        uneven: what completes the last step of an epoch on N > 1 ranks: "wrap" repeats rows as Accelerate's
            `even_batches` does, "mask" adds none. It needs batches that are mappings with a tensor "labels"; a rank
            without a row in that step computes a loss that may be NaN, and that `backward` weighs with zero.
        device: what device.choose_device takes: "auto", "cpu", "cuda", "cuda:N", "mps", "tpu" or "xla".
        timeout: how long ranks wait for each other.
        kwargs_handlers: at most one each of AutocastKwargs and GradScalerKwargs (here), DistributedDataParallelKwargs
            (ddp.py) and InitProcessGroupKwargs (distributed.py).

    Raises NotImplementedError, with its name, for an argument of Accelerate's that is not supported, and UsageError for
    a precision that the device does not have. The methods and attributes of Accelerate's that are not here are the keys
    of ABSENT (trackers, `profile`, hooks around saving, `join_uneven_inputs`, `trigger_sync_in_backward`, `on_process`,
    `state` and what belongs to other backends): asked for, they raise AttributeError that says what to use instead.
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = False,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        *,
        rng_types: list[str] | None = None,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        kwargs_handlers: list[Any] | None = None,
        step_scheduler_with_optimizer: bool = True,
        uneven: str = "wrap",
        device: str = "auto",
        timeout: timedelta = distributed.TIMEOUT,
        **unsupported: Any,
    ) -> None:
        _refuse(**unsupported)
        if uneven not in ("wrap", "mask"):
            raise ValueError(f"uneven is {uneven!r}: it must be 'wrap' or 'mask'")
        if cpu and device not in ("auto", "cpu"):
            raise ValueError(f"cpu=True and device={device!r} contradict each other: pass one of them")
        if not isinstance(gradient_accumulation_steps, int) or gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps is {gradient_accumulation_steps!r}: it must be 1 or more")
        handlers = _by_type(kwargs_handlers or [])
        self.autocast_handler = handlers.get(AutocastKwargs)
        self.ddp_handler = handlers.get(DistributedDataParallelKwargs, DistributedDataParallelKwargs())
        self.ddp_handler.arguments()  # raises now for what is not supported
        self.scaler_handler = handlers.get(GradScalerKwargs, GradScalerKwargs())
        self.init_handler = handlers.get(InitProcessGroupKwargs)
        if self.init_handler is not None:
            if timeout != distributed.TIMEOUT:
                raise ValueError("timeout and InitProcessGroupKwargs contradict each other: pass one of them")
            timeout = self.init_handler.timeout
        self.world = world = distributed.init_world("cpu" if cpu else device, timeout)
        backend = self.init_handler.backend if self.init_handler is not None else None
        if backend not in (None, "nccl", world.backend or backend):  # nccl, the default, is gloo on a CPU, as there
            distributed.shutdown(world)
            raise ValueError(f"backend={backend!r}: on {world.device.type} it is {world.backend}; leave it out")
        self.device, self.num_processes = world.device, world.size
        self.process_index, self.local_process_index = world.rank, world.local_rank
        self.is_main_process, self.is_local_main_process = world.rank == 0, world.local_rank == 0
        self.is_last_process, self.use_distributed = world.rank == world.size - 1, world.size > 1
        multi = "MULTI_GPU" if world.device.type == "cuda" else "MULTI_CPU"
        self.distributed_type = multi if self.use_distributed else "NO"  # equal to accelerate.DistributedType

        self.mixed_precision = _precision(mixed_precision, world.device)
        self.scaler = (
            torch.amp.GradScaler(world.device.type, **vars(self.scaler_handler))
            if self.mixed_precision == "fp16"
            else None
        )
        self.device_placement = device_placement
        self.dataloader_config = dataloader_config or DataLoaderConfiguration()
        self.split_batches = split_batches or self.dataloader_config.split_batches
        self.uneven = uneven
        self.rng_types = rng_types
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.sync_gradients = True  # whether the current micro-batch ends its window: ranks average, optimizers step
        self.step = 0  # micro-batches since the last epoch ended
        self.flag_tensor = torch.zeros((), dtype=torch.int64, device=world.device)
        self._place: int | None = None  # of the current micro-batch in its window; None outside of `accumulate`
        self._running: dict[Position, DataLoaderShard] = {}  # this Accelerator's loaders enter their iterations
        self.project_configuration = project_config or ProjectConfiguration()
        self.project_configuration.project_dir = self.project_configuration.project_dir or _text(project_dir)
        _refuse(save_on_each_node=self.project_configuration.save_on_each_node or None)
        self._models: list[nn.Module] = []
        self._optimizers: list[AcceleratedOptimizer] = []
        self._schedulers: list[AcceleratedScheduler] = []
        self._loaders: list[DataLoaderShard] = []
        self._custom: list[Any] = []
        self._saver = checkpoint.Saver(lambda line: print(line, file=sys.stderr, flush=True))

    # ---- prepare -----------------------------------------------------------------------------------------------------

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare models, optimizers, loaders and schedulers, given in any order, and return them in that order.

        Anything else is returned as it came. `device_placement`: one for each argument, in place of the Accelerator's.
        """
        placed = [self.device_placement] * len(args) if device_placement is None else device_placement
        if len(placed) != len(args):
            raise ValueError(f"device_placement has {len(placed)} entries for {len(args)} objects: give one for each")
        result = list(args)
        for kind, prepare in (  # in this order: optimizers follow their parameters, a schedule looks for its optimizer
            (nn.Module, self.prepare_model),
            (DataLoader, self.prepare_data_loader),
            (torch.optim.Optimizer, self.prepare_optimizer),
            (LRScheduler, lambda scheduler, _: self.prepare_scheduler(scheduler)),
        ):
            for i, obj in enumerate(args):
                if isinstance(obj, kind):
                    result[i] = prepare(obj, placed[i])  # type: ignore[arg-type]
        return result[0] if len(result) == 1 else tuple(result)

    def prepare_model(self, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        """Autocast around `forward`, then the device, then DDP, which `evaluation_mode` leaves out."""
        if any(model is prepared for prepared in self._models):
            return model
        inner = self.unwrap_model(model)
        wrapped = inner is not model or isinstance(inner.forward, MixedPrecisionForward)
        if wrapped or any(inner is self.unwrap_model(prepared) for prepared in self._models):
            raise ValueError("this model is prepared already: pass what `prepare` returned, or unwrap_model it first")
        if self.mixed_precision != "no":
            model.forward = MixedPrecisionForward(
                model.forward, self.device.type, self.mixed_precision, self.autocast_handler or AutocastKwargs()
            )
        if self.device_placement if device_placement is None else device_placement:
            model.to(self.device)
        if self.use_distributed and not evaluation_mode and any(p.requires_grad for p in model.parameters()):
            model = DistributedDataParallel(model, on_send=self.world.calls.begin, **self.ddp_handler.arguments())
        self._models.append(model)
        return model

    def prepare_data_loader(
        self, data_loader: DataLoader, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> DataLoaderShard:
        """This rank's loader. On N > 1 ranks a collective: the order is rank 0's."""
        if isinstance(data_loader, DataLoaderShard) and data_loader.running is self._running:
            return data_loader
        settings = vars(self.dataloader_config) | {"split_batches": self.split_batches}
        if settings["data_seed"] is None and self.use_distributed:
            settings["data_seed"] = distributed.broadcast_object_list([_seed_of(data_loader)], self.world)[0]
        place = self.device_placement if device_placement is None else device_placement
        shard = prepare_data_loader(
            data_loader, self.device, self.num_processes, self.process_index, put_on_device=place,
            rng_types=self.rng_types, slice_fn_for_dispatch=slice_fn_for_dispatch,
            uneven=self.uneven, running=self._running, **settings,
        )  # fmt: skip
        self._loaders.append(shard)
        return shard

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """An optimizer that steps only at the end of a window, and through the scaler where there is one."""
        if isinstance(optimizer, AcceleratedOptimizer):
            if optimizer.accelerator is not self:
                raise ValueError("this optimizer is prepared already, by another Accelerator: pass its .optimizer")
            return optimizer
        place = self.device_placement if device_placement is None else device_placement
        if place and optimizer.state:  # loaded before the model moved
            optimizer.load_state_dict(optimizer.state_dict())
        self._optimizers.append(AcceleratedOptimizer(optimizer, self))
        return self._optimizers[-1]

    def prepare_scheduler(self, scheduler: LRScheduler) -> AcceleratedScheduler:
        """A schedule that ticks when its optimizer steps (those of all optimizers prepared, where it has another)."""
        own = [opt for opt in self._optimizers if scheduler.optimizer is opt or scheduler.optimizer is opt.optimizer]
        self._schedulers.append(AcceleratedScheduler(scheduler, own or self._optimizers, self))
        return self._schedulers[-1]

    def skip_first_batches(self, dataloader: DataLoader, num_batches: int = 0) -> DataLoader:
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(self, model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model as it was given to `prepare`; `keep_fp32_wrapper=False` gives it its own `forward` back."""
        _refuse(keep_torch_compile=None if keep_torch_compile else False)
        while isinstance(model, DistributedDataParallel):
            model = model.module
        if not keep_fp32_wrapper and isinstance(model.forward, MixedPrecisionForward):
            model.forward = model.forward.forward
        return model

    def free_memory(self, *objects: Any) -> list[None]:
        """Forget what was prepared -> one None for each object, for the caller to assign to its names."""
        self._models, self._optimizers, self._schedulers, self._loaders, self._custom = [], [], [], [], []
        self.step = 0
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    def clear(self, *objects: Any) -> list[None]:
        """The same as `free_memory`."""
        return self.free_memory(*objects)

    def forget(self, *objects: Any) -> None:
        """Let go of prepared models, optimizers, schedulers or loaders: `save_state` saves them no more."""
        prepared: tuple[list[Any], ...] = (self._models, self._optimizers, self._schedulers, self._loaders)
        for held in prepared:
            held[:] = [thing for thing in held if not any(thing is obj for obj in objects)]

    # ---- one accumulation window -------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """A `with` block around one micro-batch; a window ends after K of them, and with the loader."""
        position, _ = self._current()
        at_end = position is not None and position.end_of_dataloader
        self._place = self.step % self.gradient_accumulation_steps
        self.step = 0 if at_end else self.step + 1
        self.sync_gradients = at_end or self.step % self.gradient_accumulation_steps == 0
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(nullcontext() if self.sync_gradients else self.no_sync(model))
            try:
                yield
            finally:
                self._place = None

    def no_sync(self, model: Any) -> AbstractContextManager[None]:
        """A `with` block in which backward only accumulates, on each rank for itself."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Add this micro-batch's part to the gradients. `loss`: the mean over this rank's rows."""
        loss = self._weigh(loss)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward(**kwargs)

    def _weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, divided so that a window's losses, summed and averaged over ranks, are the mean over its rows.

        In a full window that is by K, bit for bit as in Accelerate.
        """
        accumulated = self.gradient_accumulation_steps
        position, shard = self._current()
        rows = None if shard is None else shard.rows_of_step(position.index)
        if rows is None:
            return loss / accumulated
        mine, everyones = rows
        if mine == 0:  # the mean over nothing is NaN, but its gradient is 0; and the other ranks wait for this backward
            return loss * 0.0
        window = accumulated * everyones
        if self._place is not None:  # steps before the loader's first one, after a `break`, count as full ones
            first = position.index - self._place
            window = sum(shard.rows_of_step(i)[1] for i in range(first, min(first + accumulated, len(shard))))
        # underneath: Accelerate divides by `accumulated` here, however few micro-batches the epoch's last window holds
        return loss / (window / (mine * self.num_processes))

    def _current(self) -> Any:
        """The iteration that gave the latest batch, of those that are not over, and its loader; or twice None."""
        # underneath: Accelerate asks a global list, which a loader that was left by `break` never leaves
        return next(reversed(self._running.items()), (None, None))

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide gradients by what fp16 multiplied the loss with: those of one optimizer, of a list, or of all."""
        if self.scaler is not None:
            chosen = (
                optimizer if isinstance(optimizer, (list, tuple)) else [optimizer] if optimizer else self._optimizers
            )
            for each in chosen:
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
        return any(optimizer.step_was_skipped for optimizer in self._optimizers)

    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager[Any]:
        """A `with` block that computes in `mixed_precision`; an AutocastKwargs replaces that of `kwargs_handlers`."""
        _check_types([] if autocast_handler is None else [autocast_handler], AutocastKwargs)
        settings = autocast_handler or self.autocast_handler or AutocastKwargs()
        dtype = PRECISIONS[self.mixed_precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype, **vars(settings))

    # ---- states ------------------------------------------------------------------------------------------------------

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Let `save_state` and `load_state` take care of these too: anything with `state_dict`, `load_state_dict`."""
        wrong = [type(obj).__name__ for obj in objects if not all(map(partial(hasattr, obj), _STATEFUL))]
        if wrong:
            raise ValueError(f"register_for_checkpointing: {', '.join(wrong)} lacks one of {' and '.join(_STATEFUL)}")
        self._custom.extend(objects)

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True,
        *, keep: int | None = None, background: bool = False, **save_model_func_kwargs: Any,
    ) -> str:  # fmt: skip
        """Save all that was prepared or registered, and the random states, into a folder -> its path. A collective.

        Rank 0 writes. `keep`, from 1 on, lets older folders beside it go, those named as it is but for the number at
        the end; with `background` this returns as soon as the state is copied, and a failure to write is a line on
        stderr. Raises ValueError for a folder of a whole checkpoint that is there already, OSError where it could not
        be written, TypeError for a state that a checkpoint does not take (on the other ranks, RuntimeError).
        """
        _refuse(safe_serialization=None if safe_serialization else False, **save_model_func_kwargs)
        project = self.project_configuration
        if project.automatic_checkpoint_naming:
            output_dir = os.path.join(project.project_dir or ".", "checkpoints", f"checkpoint_{project.iteration}")
            keep = project.total_limit if keep is None else keep
        if output_dir is None:
            raise ValueError("save_state: name an output_dir, or choose automatic_checkpoint_naming")
        folder = Path(output_dir)
        random_states = distributed.gather_object([checkpoint.random_state()], self.world)
        if keep is not None and keep < 1:
            raise ValueError(f"save_state: keep (or total_limit) is {keep}: it must be 1 or more")
        failure: Exception | None = None
        if self.is_main_process:
            try:
                parts = {name: thing.state_dict() for name, thing in self._stateful().items()}
                parts["random_states"] = random_states
                if folder.exists() and not checkpoint.check(folder):
                    raise ValueError(f"{folder} is there already: name another folder, or remove it")
                self._saver.save(folder, parts, keep)
                if not background:
                    self._saver.wait(raising=True)
            except Exception as error:  # whatever it is, the other ranks wait to hear of it
                failure = error
        failures = distributed.gather_object([str(failure or "")], self.world)
        if failure is not None:
            raise failure
        if failures[0]:
            raise RuntimeError(f"rank 0 could not save: {failures[0]}")
        project.iteration += 1
        return str(folder)

    def load_state(
        self, input_dir: str | os.PathLike[str] | None = None, load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:  # fmt: skip
        """Put all that was prepared or registered where `save_state` found it. A collective; all ranks read the folder.

        Without `input_dir`: the newest whole one of those that automatic naming made; what is passed over is printed,
        with the reason. The number of ranks may be another one. A loader begins the epoch in which it was: skip what
        was read of it with `skip_first_batches`.
        Raises (on all ranks) ValueError where the folder is not a whole checkpoint, or holds other objects.
        """
        _refuse(load_kwargs=load_kwargs, **load_model_func_kwargs)
        project, found = self.project_configuration, [_text(input_dir)]
        if input_dir is None and self.is_main_process:
            parent = Path(project.project_dir or ".", "checkpoints")
            newest, passed_over = checkpoint.newest(parent)
            for line in passed_over:
                print(f"passed over: {line}", file=sys.stderr)
            found = [_text(newest)]
        folder = distributed.broadcast_object_list(found, self.world)[0]
        if folder is None:
            raise ValueError(f"load_state: there is no whole checkpoint in {project.project_dir or '.'}/checkpoints")
        states, reason = {}, ""
        try:
            states = checkpoint.load(Path(folder))
            things = self._stateful()
            if odd := sorted({"random_states", *things} ^ set(states)):
                reason = f"{folder} and what was prepared differ in {', '.join(odd)}"
        except (OSError, ValueError) as error:
            reason = str(error)
        for rank, why in enumerate(distributed.gather_object([reason], self.world)):
            if why:
                raise ValueError(why if rank == self.process_index else f"rank {rank} cannot load: {why}")
        random_states = states.pop("random_states")
        for name, thing in things.items():
            thing.load_state_dict(states[name])
        checkpoint.set_random_state(random_states, self.process_index)
        if project.automatic_checkpoint_naming and (number := checkpoint.number_of(Path(folder))) >= 0:
            project.iteration = number + 1  # underneath: Accelerate begins at 0 again, over what is there

    def _stateful(self) -> dict[str, Any]:
        """Everything with a state, by the name of its part of a checkpoint: model, model_1, optimizer, ..."""
        kinds = {
            "model": [self.unwrap_model(model) for model in self._models],
            "optimizer": self._optimizers,
            "scheduler": self._schedulers,
            "loader": self._loaders,
            "scaler": [] if self.scaler is None else [self.scaler],
            "custom": self._custom,
        }
        return {f"{kind}_{i}" if i else kind: thing for kind, things in kinds.items() for i, thing in enumerate(things)}

    def save_model(
        self, model: nn.Module, save_directory: str | os.PathLike[str], max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Save the weights alone, unwrapped, in safetensors files of at most `max_shard_size`. Rank 0 writes."""
        _refuse(safe_serialization=None if safe_serialization else False)
        if self.is_main_process:
            from huggingface_hub import save_torch_state_dict

            os.makedirs(save_directory, exist_ok=True)
            state = self.unwrap_model(model).state_dict()
            save_torch_state_dict(state, Path(save_directory), max_shard_size=max_shard_size)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """A model's weights by name; those of the wrapper, whose names begin with "module.", without `unwrap`."""
        return (self.unwrap_model(model) if unwrap else model).state_dict()

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """torch.save on rank 0, or a dict of tensors that share no memory as a safetensors file."""
        if self.is_main_process and safe_serialization:
            from safetensors.torch import save_file

            save_file(obj, f, metadata={"format": "pt"})
        elif self.is_main_process:
            torch.save(obj, f)

    # ---- between ranks -----------------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        return distributed.gather(tensor, self.world)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        _refuse(scale=None if scale == 1.0 else scale)  # underneath: Accelerate ignores it, except on a TPU
        return distributed.reduce(tensor, self.world, reduction)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        return distributed.pad_across_processes(tensor, self.world, dim, pad_index, pad_first)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather one row, or one object, a sample; leave out the rows that only complete the last step.

        Raises RuntimeError where the loader cannot tell which these are, ValueError for anything but one row a sample.
        """
        leaves: list[Any] = []
        distributed.recursively_apply(leaves.append, input_data)
        objects = use_gather_object or not all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        position, shard = self._current()
        remainder = shard.remainder if shard is not None and position.end_of_dataloader and self.use_distributed else 0
        if remainder < 0:
            raise RuntimeError(
                "gather_for_metrics: the sizes of the batches or of the data set are unknown, so the rows that complete"
                " the last step are unknown too: use gather, and leave them out yourself"
            )
        if objects:
            return distributed.gather_object(input_data, self.world)[: remainder or None]
        if remainder == 0:
            return self.gather(input_data)
        expected = shard.total_batch_size
        if self.uneven == "mask":  # equal parts, of which the last ranks hold less
            expected = -(-remainder // self.num_processes) * self.num_processes
            input_data = self.pad_across_processes(input_data)
        return distributed.recursively_apply(lambda rows: _first(rows, remainder, expected), self.gather(input_data))

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """A `with` block whose value is this rank's part of a list, tuple or tensor, or of each in a dict.

        `apply_padding` repeats the last item until all parts are equally long.
        """
        yield _part(inputs, self.process_index, self.num_processes, apply_padding)

    def wait_for_everyone(self) -> None:
        """Return when every rank has come here, and what `save_state` began in the background is written."""
        self._saver.wait()
        distributed.wait_for_everyone(self.world)

    def main_process_first(self) -> AbstractContextManager[None]:
        return distributed.main_process_first(self.world)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        return distributed.local_main_process_first(self.world)

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on rank 0; elsewhere it does nothing and returns None."""
        return function if self.is_main_process else _nothing

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on the first rank of each node, and on no other."""
        return function if self.is_local_main_process else _nothing

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on the last rank, and on no other."""
        return function if self.is_last_process else _nothing

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once a node."""
        if self.is_local_main_process:
            builtins.print(*args, **kwargs)

    def set_trigger(self) -> None:
        """Raise a flag on this rank, which the next `check_trigger` sees on all."""
        self.flag_tensor.fill_(1)

    def check_trigger(self) -> bool:
        """Whether any rank has raised its flag; lowers all. A collective."""
        raised = self.reduce(self.flag_tensor).item() > 0
        self.flag_tensor.zero_()
        return raised

    def end_training(self) -> None:
        """Destroy the process group, if this Accelerator made it. Belongs in a `finally`; may be called twice."""
        self._saver.wait()
        self._models, self._optimizers = [], []  # nothing of ours holds the group: see shutdown
        distributed.shutdown(self.world)

    if not TYPE_CHECKING:  # a type checker would take every name for known

        def __getattr__(self, name: str) -> Any:
            if name in ABSENT:
                raise AttributeError(f"Accelerator.{name} is not supported here: {ABSENT[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


# ---- what prepare wraps things in ------------------------------------------------------------------------------------


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
        return distributed.recursively_apply(_to_float32, outputs)


class AcceleratedOptimizer(torch.optim.Optimizer):
    """`step` and `zero_grad` do nothing before the end of a window; all else is the wrapped optimizer's.

    It is a torch.optim.Optimizer so that schedules accept it, but has no groups and no state of its own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
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
        _refuse(closure=closure)
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
        self, scheduler: LRScheduler, optimizers: list[AcceleratedOptimizer], accelerator: Accelerator
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


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _refuse(**arguments: Any) -> None:
    """Raise for an argument that is not None: Accelerate takes it, and this Accelerator does not."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not supported here: leave it out, or use accelerate for it")


def _check_types(handlers: list[Any], *known: type) -> None:
    """Raise for a handler of any other type, by its name."""
    for handler in handlers:
        if type(handler) not in known:
            names = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in known)
            kind = type(handler)
            raise NotImplementedError(f"{kind.__module__}.{kind.__name__} is not supported here: choose among {names}")


def _by_type(handlers: list[Any]) -> dict[type, Any]:
    """{AutocastKwargs: the one of that type, ...}. Raises for a second one, and for what is not supported, by name."""
    _check_types(handlers, *HANDLERS)
    found = {type(handler): handler for handler in handlers}
    if len(found) < len(handlers):
        raise ValueError("kwargs_handlers holds two of the same type: pass one of each")
    return found


def _precision(name: str | None, device: torch.device) -> str:
    """The precision in force, checked against what the device can do."""
    name = name or os.environ.get("NANOFINETUNE_MIXED_PRECISION") or "no"
    if name not in PRECISIONS:
        raise UsageError(f"mixed_precision is {name!r}: choose no, bf16 or fp16")
    if name == "fp16" and device.type == "cpu":
        # underneath: Accelerate trains in fp32 then, without a word, and still reports "fp16"
        raise UsageError("mixed_precision is 'fp16', and a CPU has no half-precision training: choose bf16, or a GPU")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"mixed_precision is 'bf16', which {torch.cuda.get_device_name(device)} lacks: choose fp16")
    return name


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _seed_of(data_loader: DataLoader) -> int:
    """What decides a loader's order: its generator's seed, else torch's of this process."""
    sources = (getattr(data_loader.batch_sampler, "sampler", data_loader.sampler), data_loader.dataset)
    generators = [getattr(source, "generator", None) for source in sources]
    return order_seed(None, next((g for g in generators if isinstance(g, torch.Generator)), None), num_processes=1)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a function for another rank does on this one."""


def _to_float32(leaf: Any) -> Any:
    is_half = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if is_half else leaf


def _first(rows: torch.Tensor, count: int, expected: int) -> torch.Tensor:
    """(expected, ...) -> (count, ...)."""
    # underneath: Accelerate cuts whatever comes, one loss a rank too, and swallows it where that fails
    if len(rows) != expected:
        raise ValueError(
            f"gather_for_metrics got {len(rows)} rows in a last step of {expected}: give it one row a sample, and other"
            " values to gather or reduce"
        )
    return rows[:count]


def _part(inputs: Any, rank: int, size: int, apply_padding: bool) -> Any:
    """Rank `rank`'s part of `size` parts, of which the first are longer by one item where that must be."""
    if size == 1:
        return inputs
    if isinstance(inputs, dict):
        if len({len(values) for values in inputs.values()}) > 1:
            raise ValueError("split_between_processes: the values of the dict are not equally long")
        return {key: _part(values, rank, size, apply_padding) for key, values in inputs.items()}
    if not isinstance(inputs, (list, tuple, torch.Tensor)):
        raise TypeError(f"split_between_processes: {type(inputs).__name__} is neither list, tuple, tensor nor dict")
    shorter, longer = divmod(len(inputs), size)
    begin = rank * shorter + min(rank, longer)
    indices = list(range(begin, begin + shorter + (rank < longer)))
    if apply_padding:
        indices += [len(inputs) - 1] * (shorter + (longer > 0) - len(indices))
    return inputs[indices] if isinstance(inputs, torch.Tensor) else type(inputs)(inputs[i] for i in indices)
