"""The world of one run: which rank this process is, the process group, and what the ranks say to each other.

>>> read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
...                   "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
Launch(launcher='torchrun', rank=3, local_rank=1, size=4, local_size=2, init_method='env://')
>>> first_host("rack[2-3]n[07-09,11],login1")
'rack2n07'

Underneath: `accelerate.state.PartialState`, `accelerate.utils.operations.gather`, `accelerate.utils.operations.reduce`,
`accelerate.utils.operations.broadcast`, `accelerate.utils.operations.pad_across_processes`,
`accelerate.utils.operations.gather_object`, `accelerate.utils.operations.broadcast_object_list` and
`accelerate.utils.set_seed` (accelerate 1.15). `PartialState` is one dictionary shared by all its instances and picks
among a dozen backends. Its collectives walk a nested container and call `torch.distributed` leaf by leaf; where the
ranks disagree about a shape they hang or return garbage. Kept: names, arguments, results, the early return at one
process. Left out: XLA, NPU and the rest. Different on purpose: (1) torchrun on a machine without a GPU is real training
over gloo, where Accelerate runs N silent copies; (2) before each collective the ranks exchange one small header (which
call, shapes, dtypes; it costs two short all-gathers), so that a disagreement raises on all ranks and says who holds
what; (3) ranks wait 5 minutes for each other, not gloo's 30; (4) a failure inside `main_process_first` reaches all
ranks at once; (5) the state is a `World` that is passed around, not a global; (6) the ranks of a restart meet each
other, and not what torchrun's store still knows of the dead ones.

Proof: test_read_environment_table, test_collectives_match_accelerate, test_single_process_matches_accelerate,
test_disagreement_raises_on_all_ranks, test_main_process_first_failure_reaches_all_ranks,
test_set_seed_matches_accelerate, test_torchrun_on_cpu_is_one_world_where_accelerate_runs_copies and
test_an_attempt_never_meets_the_dead in tests/test_distributed.py; test_restarted_ranks_meet_each_other in
tests/test_launch.py; test_two_nodes_restart_together in tests/test_nodes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

from nanofinetune.ranks.ddp import DistributedDataParallel
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
    into buckets even where gradient_as_bucket_view is False, Accelerate's default; one that is kept stays as it is.
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
        if self.comm_hook not in ("no", "fp16", "bf16"):
            raise NotImplementedError(f"comm_hook={self.comm_hook!r} is not supported: choose no, fp16 or bf16")
        return {
            "broadcast_buffers": self.broadcast_buffers,
            # underneath: Accelerate hands on what differs from the defaults, so 25 leaves torch its small first bucket
            "bucket_cap_mb": None if self.bucket_cap_mb == 25 else self.bucket_cap_mb,
            "find_unused_parameters": self.find_unused_parameters,
        }

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """Let gradients travel as `comm_hook` says (source: accelerate's method of this name)."""
        if self.comm_hook != "no":
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            hooks: dict[str, Any] = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
            model.register_comm_hook(None, hooks[self.comm_hook])


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
    """`kwargs_handlers` -> the one of each kind, or its default. Raises for a second one, and for what is not supported."""
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
    """`init_world`, as `timeout` or an InitProcessGroupKwargs says. Raises ValueError where these contradict the device."""
    if handler is None:
        return init_world(device, timeout)
    if timeout != TIMEOUT:
        raise ValueError("timeout and InitProcessGroupKwargs contradict each other: pass one of them")
    world = init_world(device, handler.timeout or timeout)
    if handler.backend not in (None, "nccl", world.backend or handler.backend):  # nccl, the default: gloo on a CPU
        shutdown(world)
        raise ValueError(f"backend={handler.backend!r}: on {world.device.type} it is {world.backend}; leave it out")
    return world
