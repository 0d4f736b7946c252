"""Collectives without a World as an argument, as `accelerate.utils` has them: they find the ranks by themselves.

>>> reduce(torch.tensor([1.0, 2.0]), "sum")  # one process
tensor([1., 2.])

Underneath: `accelerate.utils.gather`, `accelerate.utils.reduce`, `accelerate.utils.broadcast`,
`accelerate.utils.gather_object`, `accelerate.utils.pad_across_processes`, `accelerate.utils.wait_for_everyone`,
`accelerate.utils.tqdm`, `accelerate.utils.extract_model_from_parallel` (accelerate 1.15).
  - Kept: names, arguments, results. `reduce` means "mean" unless told otherwise; the Accelerator's own means "sum".
  - The work is in ranks/collectives.py.

Proof: test_operations_match_accelerate, test_operations_match_accelerate_on_two_ranks in
tests/dropin/test_operations.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from nanofinetune.ground.environment import read_environment
from nanofinetune.ranks import collectives
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.world import World, init_world
from nanofinetune.settings import refuse
from nanofinetune.wrappers import MixedPrecisionForward


def gather(tensor: Any) -> Any:
    """Concatenate each leaf over the ranks."""
    return collectives.gather(tensor, _world())


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Reduce each leaf over the ranks: "mean", "sum", "max" or "none"."""
    refuse(scale=None if scale == 1.0 else scale)  # underneath: Accelerate ignores it, except on a TPU
    return collectives.reduce(tensor, _world(), reduction)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Give each leaf that rank's values."""
    return collectives.broadcast(tensor, _world(), from_process)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite the list's items with that rank's."""
    return collectives.broadcast_object_list(object_list, _world(), from_process)


def gather_object(object: Any) -> Any:  # noqa: A002 (Accelerate's name)
    """The ranks' lists, joined in rank order."""
    return collectives.gather_object(object, _world())


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Pad each leaf along `dim` to its greatest length on any rank."""
    return collectives.pad_across_processes(tensor, _world(), dim, pad_index, pad_first)


def wait_for_everyone() -> None:
    """Return once all ranks are here."""
    collectives.wait_for_everyone(_world())


def extract_model_from_parallel(
    model: Any, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> Any:
    """The model inside DDP; `keep_fp32_wrapper=False` gives it its own `forward` back."""
    refuse(keep_torch_compile=None if keep_torch_compile else False, recursive=recursive or None)
    while isinstance(model, (DistributedDataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = model.module
    if not keep_fp32_wrapper and isinstance(model.forward, MixedPrecisionForward):
        model.forward = model.forward.forward
    return model


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """tqdm's bar, on the first rank of each node only."""
    from tqdm.auto import tqdm as bar

    silent = main_process_only and read_environment(os.environ).local_rank != 0
    return bar(*args, **kwargs | ({"disable": True} if silent else {}))


def _world() -> World:
    return init_world("auto")
