"""Accelerate's view of the ranks: which process this is, and what kind of job it belongs to.

>>> state = PartialState(cpu=True)
>>> state.num_processes, state.is_main_process, state.distributed_type == DistributedType.NO
(1, True, True)
>>> DistributedType.MULTI_CPU == "MULTI_CPU"
True

Underneath: `accelerate.state.PartialState`, `accelerate.state.AcceleratorState`, `accelerate.utils.DistributedType`
(accelerate 1.15).
  - There it is one dictionary that all instances share; here each is a view of a World, and starts one only where no
    process group exists yet.
  - Kept: names and values. Every kind of job has its name; only three of them exist here.

Proof: test_partial_state_matches_accelerate, test_distributed_type_matches_accelerate in tests/dropin/test_state.py.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch

from nanofinetune.dropin import processes
from nanofinetune.ranks import collectives
from nanofinetune.ranks.world import TIMEOUT, World, init_world, shutdown


class DistributedType(StrEnum):
    """The kind of job (source: accelerate.utils.DistributedType). Here a job is NO, MULTI_CPU or MULTI_GPU."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    MEGATRON_LM = "MEGATRON_LM"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"


def type_of(world: World) -> DistributedType:
    """What kind of job these ranks are."""
    if world.size == 1:
        return DistributedType.NO
    return DistributedType.MULTI_GPU if world.device.type == "cuda" else DistributedType.MULTI_CPU


class PartialState:
    """The ranks, without precision or accumulation (source: accelerate.PartialState).

    Args:
        cpu: choose the CPU where there is a GPU too.
        timeout: how long ranks wait for each other, where this makes the process group.
        world: the ranks to show; None finds or makes them.
    """

    def __init__(self, cpu: bool = False, *, timeout: timedelta = TIMEOUT, world: World | None = None) -> None:
        self.world = init_world("cpu" if cpu else "auto", timeout) if world is None else world

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def backend(self) -> str | None:
        return self.world.backend

    @property
    def num_processes(self) -> int:
        return self.world.size

    @property
    def process_index(self) -> int:
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        return self.world.local_rank

    @property
    def is_main_process(self) -> bool:
        return self.world.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.world.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        return self.world.rank == self.world.size - 1

    @property
    def use_distributed(self) -> bool:
        return self.world.size > 1

    @property
    def distributed_type(self) -> DistributedType:
        return type_of(self.world)

    @property
    def initialized(self) -> bool:
        return True

    def wait_for_everyone(self) -> None:
        collectives.wait_for_everyone(self.world)

    def destroy_process_group(self, group: Any = None) -> None:
        """End the process group, if this object made it."""
        if group is not None:
            raise NotImplementedError("group is not supported: leave it out, or call torch.distributed's function")
        shutdown(self.world)

    main_process_first, local_main_process_first = processes.main_process_first, processes.local_main_process_first
    on_main_process, on_local_main_process = processes.on_main_process, processes.on_local_main_process
    on_last_process, on_process = processes.on_last_process, processes.on_process
    on_local_process, split_between_processes = processes.on_local_process, processes.split_between_processes
    print = processes.print_once_a_node


class AcceleratorState(PartialState):
    """The same with the precision: what `Accelerator.state` is."""

    def __init__(self, world: World, mixed_precision: str) -> None:
        super().__init__(world=world)
        self.mixed_precision = mixed_precision
