"""All ranks of a run have been started with the same settings, or none of them trains.

>>> alone = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), backend=None)
>>> check_same(alone, {"--lr": 5e-5})
>>> difference([{"--lr": 5e-5}, {"--lr": 1e-3}])
'--lr: rank 0 has 5e-05, rank 1 has 0.001'

Underneath: `torch.nn.parallel.DistributedDataParallel` (torch 2.13) compares the parameters' shapes when it is built,
and overwrites every rank's values with rank 0's. Nothing compares what the script around it was told.
  - There ranks with different learning rates average their gradients and then drift apart; the run ends with code 0.
  - Here the ranks exchange their arguments before any long work. Later they exchange what they have loaded.
  - All ranks raise, with the first difference.

Proof: test_ranks_with_other_settings_are_refused, test_ddp_trains_on_with_two_learning_rates,
test_a_stream_of_which_each_rank_has_its_own_is_refused in tests/run/test_same.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.collectives import gather_object
from nanofinetune.ranks.world import World


def check_same(world: World, values: Mapping[str, Any], remedy: str = "start all ranks with the same") -> None:
    """Compare {name: value} over the ranks. A collective. Raises UsageError on all ranks, naming the first difference.

    A name is what the user knows the value by; two values are the same if they are printed alike.
    """
    if world.size > 1 and (text := difference(gather_object([dict(values)], world))):
        raise UsageError(f"{text}; {remedy}")


def difference(everyone: Sequence[Mapping[str, Any]]) -> str:
    """The first name under which two ranks have different values, with both values; "" if there is none."""
    names = dict.fromkeys(name for values in everyone for name in values)
    for name in names:
        first, *others = (_printed(values.get(name)) for values in everyone)
        for rank, other in enumerate(others, 1):
            if other != first:
                return f"{name}: rank 0 has {first}, rank {rank} has {other}"
    return ""


def told(arguments: Mapping[str, Any], version: str) -> dict[str, Any]:
    """What a rank was started with, for `check_same`: the arguments of the command line, and the package's version."""
    options = {"--" + name.replace("_", "-"): value for name, value in arguments.items()}
    return {"the version of nanofinetune": version, **options}


def of_loader(loader: DataLoader) -> dict[str, Any]:
    """What the ranks' loaders must have in common, for `check_same`: a rank that draws another order reads other rows.

    A stream has neither an order nor a length; of one from datasets, its shuffles can be seen, and its part of a split.
    """
    told: dict[str, Any] = {f"the loader's {name}": getattr(loader, name, None) for name in ("batch_size", "drop_last")}
    if not isinstance(loader, DataLoader):
        return told
    if isinstance(loader.dataset, IterableDataset):
        # underneath: shuffle() without a seed is another order on each rank; Accelerate lets rank 0 alone read a stream
        where = [str(generator.bit_generator.state) for generator in _generators(loader.dataset)]
        shuffle = f"one that begins at {zlib.crc32(' '.join(where).encode()):08x}" if where else "none"
        part = getattr(loader.dataset, "_distributed", None) or "all of it"
        return told | {"the stream's shuffle, which needs a seed": shuffle, "the stream's split_dataset_by_node": part}
    order: Any = getattr(loader.batch_sampler, "sampler", None) or loader.batch_sampler or loader.sampler
    return told | {"the loader's order": type(order).__name__, "the loader's rows": len(loader.dataset)}  # type: ignore[arg-type]


def _generators(thing: Any) -> Iterator[np.random.Generator]:
    """What a stream of datasets shuffles with, at whatever depth."""
    if isinstance(thing, np.random.Generator):
        yield thing
    elif isinstance(thing, (list, tuple)) or type(thing).__module__ == "datasets.iterable_dataset":
        for inner in thing if isinstance(thing, (list, tuple)) else vars(thing).values():
            yield from _generators(inner)


def loaded(world: World, found: Mapping[str, str], model: torch.nn.Module) -> dict[str, Any]:
    """What a rank has loaded, for `check_same`: what stands behind its arguments, and each tensor of the model.

    A tensor is its dtype, its shape and a checksum of its values. With one rank nothing is read.
    """
    if world.size == 1:
        return {}
    state = {f"the model's {name}": _checksum(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {**found, **state}


def _checksum(tensor: torch.Tensor) -> str:
    dense = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    # crc32, since this is about mistakes: a cryptographic hash of 110 million parameters takes several times as long
    number = zlib.crc32(dense.numpy().data)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with checksum {number:08x}"


def _printed(value: Any) -> str:
    return "nothing" if value is None else str(value)
