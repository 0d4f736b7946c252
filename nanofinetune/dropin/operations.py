"""Collectives without a World as an argument, as `accelerate.utils` has them: they find the ranks by themselves.

>>> reduce(torch.tensor([1.0, 2.0]), "sum")  # one process
tensor([1., 2.])

Underneath: `accelerate.utils.gather`, `accelerate.utils.reduce`, `accelerate.utils.broadcast`,
`accelerate.utils.gather_object`, `accelerate.utils.pad_across_processes`, `accelerate.utils.wait_for_everyone`,
`accelerate.utils.tqdm`, `accelerate.utils.send_to_device`, `accelerate.utils.recursively_apply` (accelerate 1.15).
  - Kept: names, arguments, results. `reduce` means "mean" unless told otherwise; the Accelerator's own means "sum".
  - The work is in ranks/collectives.py.

Proof: test_operations_match_accelerate, test_operations_match_accelerate_on_two_ranks in
tests/dropin/test_operations.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from nanofinetune.ground.environment import read_environment
from nanofinetune.ranks import collectives
from nanofinetune.ranks.world import World, init_world, rank_and_size
from nanofinetune.settings import refuse

DistributedOperationException = RuntimeError  # what a collective raises where the ranks disagree


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


def copy_tensor_to_devices(tensor: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor of the one rank that has one, on all ranks; others pass None."""
    world = _world()
    held = collectives.gather_object([None if tensor is None else tensor.cpu()], world)
    (found,) = (each for each in held if each is not None)
    return found.to(world.device)


def synchronize_rng_states(rng_types: list[str], generator: torch.Generator | None = None) -> None:
    """Give all ranks rank 0's random states: of "torch", "cuda" (each its device's) and the `generator`. A collective.

    Nothing here needs it: each rank computes the same order from (seed, epoch).
    """
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator)


def synchronize_rng_state(rng_type: str | None = None, generator: torch.Generator | None = None) -> None:
    """One of these. Raises ValueError for another, and for "generator" without one."""
    states: dict[str, Any] = {"torch": torch, "cuda": torch.cuda}
    if rng_type == "generator" and generator is not None:
        generator.set_state(broadcast_object_list([generator.get_state()])[0])
    elif rng_type in states:
        states[rng_type].set_rng_state(broadcast_object_list([states[rng_type].get_rng_state()])[0])
    else:
        raise ValueError(f"rng_type={rng_type!r}: choose torch, cuda, or generator and pass one")


def recursively_apply(
    func: Callable[..., Any], data: Any, *args: Any, test_type: Callable[[Any], bool] = torch.is_tensor,
    error_on_other_type: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """The container with `func(leaf, *args, **kwargs)` for each leaf that passes `test_type`; others as they are.

    Raises TypeError for these with `error_on_other_type`.
    """

    def apply(leaf: Any) -> Any:
        if test_type(leaf):
            return func(leaf, *args, **kwargs)
        if error_on_other_type:
            name = getattr(test_type, "__name__", test_type)
            raise TypeError(
                f"a {type(leaf).__name__} among nested lists, tuples and dicts: {name} must hold for each leaf"
            )
        return leaf

    return collectives.recursively_apply(apply, data)


def send_to_device(
    tensor: Any, device: torch.device | str | int, non_blocking: bool = False, skip_keys: str | list[str] | None = None
) -> Any:
    """Copy the tensors in nested tuples, lists and mappings; what is under one of `skip_keys` stays where it is."""
    skipped = [skip_keys] if isinstance(skip_keys, str) else skip_keys or []
    if hasattr(tensor, "to"):
        return tensor.to(device, non_blocking=True) if non_blocking else tensor.to(device)
    if isinstance(tensor, Mapping):
        kept = {key: tensor[key] for key in tensor if key in skipped}
        moved = {key: send_to_device(tensor[key], device, non_blocking, skipped) for key in tensor if key not in kept}
        kind: Any = type(tensor)
        return kind({key: kept.get(key, moved.get(key)) for key in tensor})
    if isinstance(tensor, (tuple, list)):
        return collectives.rebuilt(lambda item: send_to_device(item, device, non_blocking, skipped), tensor)
    return tensor


def convert_to_fp32(tensor: Any) -> Any:
    """Each leaf in half precision -> float32."""
    return recursively_apply(
        torch.Tensor.float,
        tensor,
        test_type=lambda leaf: getattr(leaf, "dtype", None) in (torch.float16, torch.bfloat16),
    )


def concatenate(data: Any, dim: int = 0) -> Any:
    """A list of containers -> one, with the tensors of each place joined along `dim`."""
    if isinstance(data[0], Mapping):
        return type(data[0])({key: concatenate([each[key] for each in data], dim) for key in data[0]})  # type: ignore[call-arg]
    if isinstance(data[0], (tuple, list)):
        parts = iter([concatenate([each[i] for each in data], dim) for i in range(len(data[0]))])
        return collectives.rebuilt(lambda _: next(parts), data[0])
    return torch.cat(data, dim=dim)


def find_batch_size(data: Any) -> int:
    """The length of the first leaf. Raises TypeError if that is no tensor, ValueError if there is no leaf."""
    leaves: list[Any] = []
    collectives.recursively_apply(leaves.append, data)
    if not leaves:
        raise ValueError("find_batch_size: the container is empty")
    if not isinstance(leaves[0], torch.Tensor):
        raise TypeError(f"find_batch_size: the first leaf is a {type(leaves[0]).__name__}, not a tensor")
    return len(leaves[0])


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """tqdm's bar, on the first rank of each node only."""
    from tqdm.auto import tqdm as bar

    silent = main_process_only and read_environment(os.environ).local_rank != 0
    return bar(*args, **kwargs | ({"disable": True} if silent else {}))


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python's `random`, numpy and torch on all devices (source: accelerate.utils.set_seed).

    `device_specific` adds the rank to `seed`. `deterministic` makes torch choose deterministic kernels, or raise.
    """
    # underneath: without device_specific all ranks draw the same dropout masks.
    if device_specific:
        seed += rank_and_size()[0]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def _world() -> World:
    return init_world("auto")
