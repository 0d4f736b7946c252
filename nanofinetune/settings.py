"""What an Accelerator can be told, and what it cannot: Accelerate's settings objects, and the names that are absent.

>>> autocast, ddp, scaler, process_group, profiler = handlers_of([AutocastKwargs(cache_enabled=False)])
>>> autocast, ddp.bucket_cap_mb
(AutocastKwargs(enabled=True, cache_enabled=False), 25)
>>> refuse(dynamo_backend="inductor")
Traceback (most recent call last):
NotImplementedError: dynamo_backend='inductor' is not supported here: leave it out, or use accelerate for it

Underneath: `accelerate.utils.DataLoaderConfiguration`, `accelerate.utils.ProjectConfiguration`,
`accelerate.utils.AutocastKwargs`, `accelerate.utils.GradScalerKwargs`, `accelerate.utils.InitProcessGroupKwargs`,
`accelerate.utils.DistributedDataParallelKwargs` (accelerate 1.15).
  - Kept: names, fields, defaults.
  - A field or handler that is not supported raises with its name; nothing is ignored.
  - ABSENT lists every other public name of `accelerate.Accelerator`, each with what to use instead.

Proof: test_kwargs_handlers_match_accelerate, test_what_is_absent_says_what_to_use_instead in tests/test_accelerator.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch

from nanofinetune.ground.environment import START, read_settings
from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.world import TIMEOUT, World, init_world, shutdown


class KwargsHandler:
    """What the settings for `Accelerator(kwargs_handlers=[...])` share (source: accelerate.utils.KwargsHandler)."""

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}


@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    """For `Accelerator(kwargs_handlers=[...])` (source: accelerate.utils.InitProcessGroupKwargs).

    `backend` must be the device's own, gloo or nccl; the default goes with both. `timeout` None is 10 minutes where
    that is nccl, the default, and else 30. `init_method` is read from the environment, so it stays None.
    """

    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.init_method is not None:
            raise NotImplementedError(f"init_method={self.init_method!r} is not supported: {START}")
        if self.timeout is None:
            self.timeout = timedelta(minutes=10 if self.backend == "nccl" else 30)


class DDPCommunicationHookType(StrEnum):
    """In what form gradients travel (source: accelerate.utils.DDPCommunicationHookType)."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    """For `Accelerator(kwargs_handlers=[...])` (source: accelerate.utils.DistributedDataParallelKwargs).

    comm_hook: "fp16", "bf16", or one of the PowerSGD (arXiv 1905.13727), whose own settings are comm_state_option.
    comm_wrapper: "fp16" or "bf16" around that hook. Kept at their defaults: dim, check_reduction.
    Gradients are views into buckets even where gradient_as_bucket_view is False, Accelerate's default; one that is kept
    stays as it is.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: float = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_state_option: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """What DistributedDataParallel is called with. Raises NotImplementedError for what it does not have."""
        for name in ("dim", "check_reduction"):
            if (value := getattr(self, name)) != getattr(DistributedDataParallelKwargs(), name):
                raise NotImplementedError(
                    f"DistributedDataParallelKwargs({name}={value!r}) is not supported: leave it out"
                )
        self._hook()
        return {
            "broadcast_buffers": None if self.broadcast_buffers else False,  # torch warns of either value
            # underneath: Accelerate hands on what differs from the defaults, so 25 leaves torch its small first bucket
            "bucket_cap_mb": None if self.bucket_cap_mb == 25 else self.bucket_cap_mb,
            "find_unused_parameters": self.find_unused_parameters,
            "static_graph": self.static_graph,
        }

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """Let gradients travel as `comm_hook` says (source: accelerate's method of this name)."""
        if (hook := self._hook()) is not None:
            from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

            state = PowerSGDState(None, **self.comm_state_option) if "power" in self.comm_hook else None
            model.register_comm_hook(state, hook)

    def _hook(self) -> Callable[..., Any] | None:
        """torch's hook of that name. Raises ValueError for another name, and for what would have no effect."""
        if self.comm_hook == "no":
            for name in ("comm_wrapper", "comm_state_option"):  # underneath: Accelerate ignores them
                if (value := getattr(self, name)) not in ("no", {}):
                    raise ValueError(f"{name}={value!r} goes with a comm_hook, and there is none: choose one")
            return None
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        hook = {
            "fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook,
            "power_sgd": powerSGD_hook.powerSGD_hook, "batched_power_sgd": powerSGD_hook.batched_powerSGD_hook,
        }.get(self.comm_hook)  # fmt: skip
        wrap = {
            "no": lambda hook: hook, "fp16": default_hooks.fp16_compress_wrapper,
            "bf16": default_hooks.bf16_compress_wrapper,
        }.get(self.comm_wrapper)  # fmt: skip
        if hook is None or wrap is None:
            raise ValueError(
                f"comm_hook={self.comm_hook!r}, comm_wrapper={self.comm_wrapper!r}: the hook is one of no, fp16, bf16,"
                " power_sgd, batched_power_sgd, its wrapper no, fp16 or bf16"
            )
        if self.comm_state_option and "power" not in self.comm_hook:
            raise ValueError(f"comm_state_option={self.comm_state_option} is PowerSGD's: choose it as comm_hook")
        return wrap(hook)


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
    logging_dir: str | None = None  # for trackers; None is project_dir
    automatic_checkpoint_naming: bool = False  # project_dir/checkpoints/checkpoint_0, checkpoint_1, ...
    total_limit: int | None = None  # how many of these stay
    iteration: int = 0  # the number of the next one
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | None = None) -> None:
        """Choose the project's folder, and that of the trackers if it has not been chosen."""
        self.project_dir = project_dir
        self.logging_dir = project_dir if self.logging_dir is None else self.logging_dir


@dataclass
class GradientAccumulationPlugin(KwargsHandler):
    """How micro-batches are accumulated (source: accelerate.utils.GradientAccumulationPlugin).

    num_steps: micro-batches of a window. sync_with_dataloader: an epoch's end ends a window too. sync_each_batch:
    average after each micro-batch, which takes more time and less memory. adjust_scheduler: changes no learning rate.
    """

    num_steps: int | None = None
    adjust_scheduler: bool = True
    sync_with_dataloader: bool = True
    sync_each_batch: bool = False


@dataclass
class AutocastKwargs(KwargsHandler):
    """What torch.autocast is told (source: accelerate.utils.AutocastKwargs)."""

    enabled: bool = True
    cache_enabled: bool | None = None


@dataclass
class GradScalerKwargs(KwargsHandler):
    """What torch.amp.GradScaler is told, for fp16 (source: accelerate.utils.GradScalerKwargs)."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True


class LoggerType(StrEnum):
    """Names for `log_with` (source: accelerate.utils.LoggerType). See dropin/tracking.py for those that are here."""

    ALL = "all"
    AIM = "aim"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    COMETML = "comet_ml"
    MLFLOW = "mlflow"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"


class RNGType(StrEnum):
    """Names for `rng_types` (source: accelerate.utils.RNGType). Others than these are another backend's."""

    TORCH = "torch"
    CUDA = "cuda"
    GENERATOR = "generator"


class PrecisionType(StrEnum):
    """Names for `mixed_precision` (source: accelerate.utils.PrecisionType). FP8 is refused when chosen."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass
class ProfileKwargs(KwargsHandler):
    """What torch.profiler.profile is told (source: accelerate.utils.ProfileKwargs).

    activities: "cpu", "cuda", "xpu", "mtia" or "hpu". schedule_option: torch.profiler.schedule's arguments.
    output_trace_dir: gets a Chrome trace of each rank.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def build(self) -> torch.profiler.profile:
        """The profiler, not yet started. Raises ValueError for an activity that torch does not have."""
        activities = None
        if self.activities is not None:
            known = {name.lower(): kind for name, kind in torch.profiler.ProfilerActivity.__members__.items()}
            for name in self.activities:
                if name not in known:
                    raise ValueError(f"ProfileKwargs(activities=[{name!r}]): choose among {', '.join(known)}")
            activities = [known[name] for name in self.activities]
        schedule = None if self.schedule_option is None else torch.profiler.schedule(**self.schedule_option)
        return torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes, profile_memory=self.profile_memory, with_stack=self.with_stack,
            with_flops=self.with_flops, with_modules=self.with_modules,
        )  # fmt: skip


# What accelerate.Accelerator has under a public name and this one has not -> what to do instead.
ABSENT = {
    name: instead
    for names, instead in (
        (
            "lomo_backward deepspeed_ulysses_dl_adapter verify_device_map maybe_context_parallel context_parallel_rank"
            " data_parallel_rank data_parallel_shard_rank pipeline_parallel_rank tensor_parallel_rank fp8_backend",
            "use accelerate for it",
        ),
    )
    for name in names.split()
}


HANDLERS = (AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs, ProfileKwargs)


def refuse(**arguments: Any) -> None:
    """Raise for an argument that is not None: Accelerate takes it, and this Accelerator does not."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not supported here: leave it out, or use accelerate for it")


def check_types(handlers: list[Any], *known: type) -> None:
    """Raise for a handler of any other type, by its name."""
    for handler in handlers:
        if type(handler) not in known:
            names = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in known)
            kind = type(handler)
            raise NotImplementedError(f"{kind.__module__}.{kind.__name__} is not supported here: choose among {names}")


def handlers_of(handlers: list[Any] | None) -> tuple[Any, Any, Any, Any, Any]:
    """`kwargs_handlers` -> autocast's, DDP's, the scaler's, the process group's and the profiler's, or their defaults.

    Raises ValueError for two of a kind, NotImplementedError for what is not supported.
    """
    given = handlers or []
    check_types(given, *HANDLERS)
    by_type: dict[type, Any] = {type(handler): handler for handler in given}
    if len(by_type) < len(given):
        raise ValueError("kwargs_handlers holds two of the same type: pass one of each")
    ddp = by_type.get(DistributedDataParallelKwargs, DistributedDataParallelKwargs())
    ddp.arguments()  # raises now for what is not supported
    scaler = by_type.get(GradScalerKwargs, GradScalerKwargs())
    return by_type.get(AutocastKwargs), ddp, scaler, by_type.get(InitProcessGroupKwargs), by_type.get(ProfileKwargs)


def accumulation_of(steps: int, plugin: GradientAccumulationPlugin | None) -> GradientAccumulationPlugin:
    """How to accumulate, from the number of steps, from the plugin or from what `accelerate launch` says.

    Raises ValueError where two of them are given and contradict each other.
    """
    if plugin is not None and steps != 1:
        raise ValueError(
            "gradient_accumulation_steps and gradient_accumulation_plugin contradict each other: pass one of them"
        )
    if plugin is None and (launched := read_settings(os.environ).accumulation) is not None:
        if steps not in (1, launched):  # underneath: Accelerate goes by the variable
            raise UsageError(
                f"gradient_accumulation_steps is {steps} and ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {launched}: "
                "unset one of them"
            )
        steps = launched
    plugin = plugin or GradientAccumulationPlugin(num_steps=steps)
    steps = 1 if plugin.num_steps is None else plugin.num_steps
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"gradient_accumulation_steps is {steps!r}: it must be 1 or more")
    return plugin


def project_of(
    configuration: ProjectConfiguration | None, project_dir: str | os.PathLike[str] | None
) -> ProjectConfiguration:
    """Where states go, from either argument."""
    configuration = configuration or ProjectConfiguration()
    if configuration.project_dir is None and project_dir is not None:
        configuration.set_directories(os.fspath(project_dir))
    refuse(save_on_each_node=configuration.save_on_each_node or None)
    return configuration


def start_world(device: str, timeout: timedelta, handler: InitProcessGroupKwargs | None) -> World:
    """`init_world`, as `timeout` or an InitProcessGroupKwargs says. Raises ValueError where these contradict it.

    "auto" is the CPU where `accelerate launch --cpu` says so.
    """
    if read_settings(os.environ).cpu and device == "auto":
        device = "cpu"
    if handler is None:
        return init_world(device, timeout)
    if timeout != TIMEOUT:
        raise ValueError("timeout and InitProcessGroupKwargs contradict each other: pass one of them")
    world = init_world(device, handler.timeout or timeout)
    if handler.backend not in (None, "nccl", world.backend or handler.backend):  # nccl, the default: gloo on a CPU
        shutdown(world)
        raise ValueError(f"backend={handler.backend!r}: on {world.device.type} it is {world.backend}; leave it out")
    return world
