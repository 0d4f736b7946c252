"""What an Accelerator can be told, and what it cannot: Accelerate's settings objects, and the names that are absent.

>>> autocast, ddp, scaler, process_group = handlers_of([AutocastKwargs(cache_enabled=False)])
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

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch

from nanofinetune.ranks.environment import START
from nanofinetune.ranks.world import TIMEOUT, World, init_world, shutdown


@dataclass
class InitProcessGroupKwargs:
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
    """In what gradients travel (source: accelerate.utils.DDPCommunicationHookType)."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass
class DistributedDataParallelKwargs:
    """For `Accelerator(kwargs_handlers=[...])` (source: accelerate.utils.DistributedDataParallelKwargs).

    Kept at their defaults: dim, check_reduction, comm_wrapper, comm_state_option, static_graph. Gradients are views
    into buckets whatever gradient_as_bucket_view is: False is Accelerate's default, and the values are the same.
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
        unsupported = ("dim", "check_reduction", "static_graph", "comm_wrapper", "comm_state_option")
        for name in unsupported:
            if (value := getattr(self, name)) != getattr(DistributedDataParallelKwargs(), name):
                raise NotImplementedError(
                    f"DistributedDataParallelKwargs({name}={value!r}) is not supported: leave it out"
                )
        dtypes: dict[Any, torch.dtype | None] = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
        if self.comm_hook not in dtypes:
            raise NotImplementedError(f"comm_hook={self.comm_hook!r} is not supported: choose no, fp16 or bf16")
        return {
            "broadcast_buffers": self.broadcast_buffers,
            # underneath: Accelerate hands on what differs from the defaults, so 25 leaves torch its small first bucket
            "bucket_cap_mb": None if self.bucket_cap_mb == 25 else self.bucket_cap_mb,
            "find_unused_parameters": self.find_unused_parameters,
            "comm_dtype": dtypes[self.comm_hook],
        }


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


def handlers_of(
    handlers: list[Any] | None,
) -> tuple[AutocastKwargs | None, DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs | None]:
    """`kwargs_handlers` -> the one of each kind, or its default. Raises for a second one, and an unsupported one."""
    given = handlers or []
    check_types(given, *HANDLERS)
    by_type = {type(handler): handler for handler in given}
    if len(by_type) < len(given):
        raise ValueError("kwargs_handlers holds two of the same type: pass one of each")
    ddp = by_type.get(DistributedDataParallelKwargs, DistributedDataParallelKwargs())
    ddp.arguments()  # raises now for what is not supported
    scaler = by_type.get(GradScalerKwargs, GradScalerKwargs())
    return by_type.get(AutocastKwargs), ddp, scaler, by_type.get(InitProcessGroupKwargs)


def start_world(device: str, timeout: timedelta, handler: InitProcessGroupKwargs | None) -> World:
    """`init_world`, as `timeout` or an InitProcessGroupKwargs says. Raises ValueError where these contradict it."""
    if handler is None:
        return init_world(device, timeout)
    if timeout != TIMEOUT:
        raise ValueError("timeout and InitProcessGroupKwargs contradict each other: pass one of them")
    world = init_world(device, handler.timeout or timeout)
    if handler.backend not in (None, "nccl", world.backend or handler.backend):  # nccl, the default: gloo on a CPU
        shutdown(world)
        raise ValueError(f"backend={handler.backend!r}: on {world.device.type} it is {world.backend}; leave it out")
    return world
