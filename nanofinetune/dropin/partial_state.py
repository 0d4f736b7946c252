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
  - Kept: names, values, what is printed. Every kind of job has its name; only three of them exist here.
  - `AcceleratorState()` shows the ranks; each Accelerator has a precision of its own.

Proof: test_partial_state_matches_accelerate, test_distributed_type_matches_accelerate in
tests/dropin/test_partial_state.py.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from nanofinetune.dropin import processes
from nanofinetune.ranks import collectives
from nanofinetune.ranks.world import TIMEOUT, World, shutdown
from nanofinetune.settings import InitProcessGroupKwargs, start_world


class DistributedType(str, Enum):  # noqa: UP042 (a StrEnum prints otherwise)
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
        world: the ranks to show; None finds or makes them.
        kwargs: fields of InitProcessGroupKwargs, for the process group if this makes it.
    """

    def __init__(self, cpu: bool = False, *, world: World | None = None, **kwargs: Any) -> None:
        if world is None:
            world = start_world("cpu" if cpu else "auto", TIMEOUT, InitProcessGroupKwargs(**kwargs) if kwargs else None)
        self.world = world

    @staticmethod
    def _reset_state() -> None:
        """Nothing: there is no global state to forget, and a new Accelerator may have another precision."""

    def __repr__(self) -> str:
        backend = f"  Backend: {self.backend}" if self.backend else ""
        return (
            f"Distributed environment: {self.distributed_type!s}{backend}\nNum processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\nLocal process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

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
        """End a process group, or the one of all ranks, whoever made it."""
        if group is not None:
            dist.destroy_process_group(group)
        else:
            shutdown(replace(self.world, adopted=False))

    main_process_first, local_main_process_first = processes.main_process_first, processes.local_main_process_first
    on_main_process, on_local_main_process = processes.on_main_process, processes.on_local_main_process
    on_last_process, on_process = processes.on_last_process, processes.on_process
    on_local_process, split_between_processes = processes.on_local_process, processes.split_between_processes
    print = processes.print_once_a_node


class AcceleratorState(PartialState):
    """The same with the precision: what `Accelerator.state` is."""

    deepspeed_plugin, is_fsdp2 = None, False

    def __init__(self, mixed_precision: str | None = None, cpu: bool = False, *, world: World | None = None) -> None:
        """Without `mixed_precision` it shows the ranks alone: several Accelerators may have several precisions."""
        super().__init__(cpu, world=world)
        self._mixed_precision = mixed_precision

    @property
    def mixed_precision(self) -> str:
        # underneath: there the state of all Accelerators has the first one's
        if self._mixed_precision is None:
            raise RuntimeError("this AcceleratorState is nobody's: ask your Accelerator, `accelerator.mixed_precision`")
        return self._mixed_precision

    def __repr__(self) -> str:
        known = "" if self._mixed_precision is None else f"\nMixed precision type: {self._mixed_precision}\n"
        return super().__repr__() + known
