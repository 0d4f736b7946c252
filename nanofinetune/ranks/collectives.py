"""What the ranks tell each other: gather, reduce and broadcast, for tensors in nested containers and for objects.

>>> alone = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), backend=None)
>>> gather({"loss": torch.tensor([2.0])}, alone)  # on N ranks: N values, in rank order
{'loss': tensor([2.])}

Underneath: `accelerate.utils.operations.gather`, `accelerate.utils.operations.reduce`,
`accelerate.utils.operations.broadcast`, `accelerate.utils.operations.pad_across_processes`,
`accelerate.utils.operations.gather_object`, `accelerate.utils.operations.broadcast_object_list` (accelerate 1.15).
  - They walk a container and call torch.distributed leaf by leaf. Where ranks disagree about a shape, they hang or
    return garbage.
  - Kept: names, arguments, results, the early return on one process.
  - Before each call the ranks exchange one small header: which call, which shapes and dtypes. A disagreement raises on
    all ranks, and says who holds what. Small leaves of a `gather` travel with it.
  - A failure inside `main_process_first` reaches all ranks at once.

Proof: test_collectives_match_accelerate, test_short_messages_take_one_all_gather_and_match_accelerate,
test_disagreement_raises_on_all_ranks in tests/ranks/test_collectives.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.world import World

SHORT = 1016  # bytes of a message that travel in the first all-gather; with their number they are 1 KiB
CARRIED = 512  # bytes of leaves, at most, that travel with the header

# `data` is a tensor, or a nested list, tuple, named tuple or dict of tensors. At size 1 each call returns at once.
# At other sizes each raises, on all ranks: RuntimeError where the ranks are in different calls, or disagree about
# containers, dtypes or shapes; TypeError where a leaf is not a tensor. The header costs one short all-gather, and where
# the leaves of a `gather` are few bytes it takes them along.


def gather(data: Any, world: World) -> Any:
    """Concatenate each leaf over the ranks, in rank order: (n, ...) on each -> (size * n, ...) on all, detached.

    Source: accelerate.utils.operations.gather, as the next functions are accelerate's of the same name.
    """
    if world.size == 1:
        # underneath: what a launcher has started alone gathers as N ranks do, so a 0-d tensor gets a dimension
        ranks_of_one = world.launched or world.adopted
        return recursively_apply(lambda leaf: torch.atleast_1d(_tensor(leaf)), data) if ranks_of_one else data
    carried = _agree("gather", data, world, carry=True)[1]
    place = 0

    def gather_one(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal place
        row, wire = _wire(tensor)
        if carried is None:
            result = wire.new_empty(world.size, wire.numel())
            dist.all_gather(list(result.unbind()), wire)
        else:  # the header brought it: (size, bytes of all leaves)
            place, begin = place + wire.numel(), place
            # a copy begins at its own start: no view of eight bytes each begins at the third, not even an empty one
            result = carried[:, begin:place].clone(memory_format=torch.contiguous_format)
        return result.reshape(-1).view(row.dtype).view(world.size * row.shape[0], *row.shape[1:])

    return recursively_apply(gather_one, data)


def reduce(data: Any, world: World, reduction: str = "mean") -> Any:
    """Reduce each leaf over the ranks, into a new, detached tensor: "mean", "sum", "max" or "none".

    Raises (on all ranks): ValueError for another reduction, for a sum or mean of bools and for a mean of integers.
    """
    if reduction not in ("mean", "sum", "max", "none"):
        raise ValueError(f"reduction={reduction!r}: choose mean, sum, max or none")
    if world.size == 1:
        return recursively_apply(lambda tensor: _tensor(tensor).clone(), data)
    _agree(f"reduce[{reduction}]", data, world)

    def reduce_one(tensor: torch.Tensor) -> torch.Tensor:
        countable = tensor.is_floating_point() or tensor.is_complex() or reduction != "mean"
        if reduction != "max" and (tensor.dtype == torch.bool or not countable):
            raise ValueError(f"reduce: there is no {reduction} of {tensor.dtype}; convert it to float or int64 first")
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        # underneath: Accelerate's "none" sums over the ranks as well; only at size 1 does it do nothing.
        dist.all_reduce(result, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
        return result.div_(world.size) if reduction == "mean" else result

    return recursively_apply(reduce_one, data)


def broadcast(data: Any, world: World, from_process: int = 0) -> Any:
    """Overwrite each leaf, in place, with that of rank `from_process`; return the container with the same tensors."""
    if world.size == 1:
        return data
    _check_rank(from_process, world)
    _agree(f"broadcast[{from_process}]", data, world)

    def broadcast_one(tensor: torch.Tensor) -> torch.Tensor:
        # underneath: gloo sends memory from the tensor's first element on. Accelerate hands it tensors with gaps too,
        # and then the wrong elements travel. So send a dense copy, which for a contiguous tensor is the tensor itself.
        row, wire = _wire(tensor)
        dist.broadcast(wire, src=from_process)
        if row.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(row.view_as(tensor))
        return tensor

    return recursively_apply(broadcast_one, data)


def agree(flags: Sequence[int], world: World, name: str = "agree") -> list[int]:
    """The greatest of each flag over all ranks, on all ranks: one short all-reduce, cheap enough for every update.

    It goes without the header that the other calls exchange.
    """
    if world.size == 1:
        return list(flags)
    world.calls.begin(name)
    greatest = torch.tensor(flags, dtype=torch.int64, device=world.device)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.tolist()


def pad_across_processes(data: Any, world: World, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Pad each leaf along `dim` to its greatest length on any rank, so that `gather` can take it.

    (..., n, ...) -> (..., max n, ...), same dtype. A leaf without such a dimension, or long enough, stays as it is.
    """
    if world.size == 1:
        return recursively_apply(_tensor, data)
    everyone, _ = _agree("pad_across_processes", data, world, ragged=True)
    shapes = iter(zip(*([shape for _, _, shape in leaves] for leaves in everyone), strict=True))  # a leaf's, by rank

    def pad_one(tensor: torch.Tensor) -> torch.Tensor:
        by_rank = next(shapes)
        if not -tensor.ndim <= dim < tensor.ndim:
            return tensor
        length, longest = tensor.shape[dim], max(shape[dim] for shape in by_rank)
        if length == longest:
            return tensor
        size = list(tensor.shape)
        size[dim] = longest
        # underneath: Accelerate pads with `zeros + pad_index`, which makes bool int64, and only on the ranks that pad.
        padded = tensor.new_full(size, pad_index)
        padded.narrow(dim, longest - length if pad_first else 0, length).copy_(tensor)
        return padded

    return recursively_apply(pad_one, data)


def gather_object(objects: Any, world: World) -> Any:
    """The ranks' lists of picklable objects, joined in rank order, on all ranks.

    Raises TypeError for a mapping, of which only the keys would arrive, and for what holds no objects.
    """
    if world.size == 1:
        return objects
    if isinstance(objects, Mapping) or not hasattr(objects, "__iter__"):
        raise TypeError(f"objects of several ranks are gathered as a list, not as a {type(objects).__name__}: pass one")
    # underneath: one level is flattened, so a string falls apart into its letters. Pass a list.
    return [item for part in _meet("gather_object", world, objects)[1] for item in part]


def broadcast_object_list(object_list: list[Any], world: World, from_process: int = 0) -> list[Any]:
    """Overwrite the list's items, in place, with those of rank `from_process`; return the list."""
    if world.size == 1:
        return object_list
    _check_rank(from_process, world)
    label, lengths = _meet(f"broadcast_object_list[{from_process}]", world, len(object_list))
    if len(set(lengths)) > 1:
        raise RuntimeError(f"{label}: the lists are of different lengths, by rank {lengths}")
    dist.broadcast_object_list(object_list, src=from_process)
    return object_list


def wait_for_everyone(world: World) -> None:
    """Return once all ranks have called this."""
    if world.size > 1:
        _meet("wait_for_everyone", world, None)


def main_process_first(world: World, timeout: timedelta = timedelta(hours=2)) -> AbstractContextManager[None]:
    """A `with` block that rank 0 runs before the others do. If it fails there, all ranks raise at once.

    `timeout` is this call's own: the first pass over a data set may take longer than ranks otherwise wait.
    """
    return _goes_first(world.rank == 0, "main_process_first", world, timeout)


def local_main_process_first(world: World, timeout: timedelta = timedelta(hours=2)) -> AbstractContextManager[None]:
    """A `with` block that the first rank of each node runs before all others do. If one of them fails, all raise."""
    return _goes_first(world.local_rank == 0, "local_main_process_first", world, timeout)


def first_rows(rows: torch.Tensor, count: int, expected: int) -> torch.Tensor:
    """(expected, ...) -> (count, ...): a gathered last step without the rows that only filled it up.

    Source: accelerate.Accelerator.gather_for_metrics. Raises ValueError where there is not one row a sample.
    """
    # underneath: Accelerate cuts whatever it is given, even one loss a rank, and hides it when that fails
    if len(rows) != expected:
        raise ValueError(
            f"gather_for_metrics got {len(rows)} rows in a last step of {expected}: give it one row a sample, and other"
            " values to gather or reduce"
        )
    return rows[:count]


# ---- Containers -----------------------------------------------------------------------------------------------------


def recursively_apply(function: Callable[[Any], Any], data: Any) -> Any:
    """`data`'s container with `function` applied to each leaf, in the order of `_describe`."""
    if isinstance(data, (tuple, list, Mapping)):
        return rebuilt(lambda item: recursively_apply(function, item), data)
    return function(data)


def rebuilt(function: Callable[[Any], Any], container: Any) -> Any:
    """A list, tuple or mapping of the same type, with `function` applied to each of its items."""
    kind: Any = type(container)
    if isinstance(container, Mapping):
        return kind({key: function(item) for key, item in container.items()})
    items = [function(item) for item in container]
    return kind(*items) if hasattr(container, "_fields") else kind(items)  # a namedtuple takes its fields


# ---- How a call is agreed upon --------------------------------------------------------------------------------------


@contextmanager
def _goes_first(first: bool, name: str, world: World, timeout: timedelta) -> Iterator[None]:
    inside = world.calls.inside  # of another such block: there the ranks go in turns already
    if world.size == 1 or (inside and (inside == name or world.local_size == world.size)):
        yield
        return
    _meet(name, world, None)  # all ranks are here, so from now on only the work in the block takes time
    patient = dist.new_group(backend="gloo", timeout=timeout)

    def hear_from_the_first(failure: BaseException | None = None) -> None:
        world.calls.inside = ""
        who = f"rank {world.rank} failed with {type(failure).__name__}: {failure}"
        told = None if failure is None else (who, str(failure) if isinstance(failure, UsageError) else "")
        label, heard = _meet(f"end of {name}", world, told, patient)
        failures = [pair for pair in heard if pair]
        if failure is None and failures:
            for _, what_the_user_got_wrong in failures:
                if what_the_user_got_wrong:  # a mistake in the call, so the same line on every rank
                    raise UsageError(what_the_user_got_wrong)
            raise RuntimeError(f"{label}: {'; '.join(text for text, _ in failures)}")

    try:
        if not first:
            hear_from_the_first()
        world.calls.inside = name
        # underneath: Accelerate has no `try` here: the other ranks wait until rank 0's process ends, or time out.
        try:
            yield
        except BaseException as failure:
            if first:
                hear_from_the_first(failure)
            raise
        if first:
            hear_from_the_first()
    finally:
        world.calls.inside = ""
        dist.destroy_process_group(patient)


def _meet(name: str, world: World, payload: Any, group: dist.ProcessGroup | None = None) -> tuple[str, list[Any]]:
    """Wait until all ranks are in this same call -> its label ("gather#12"), and every rank's payload in rank order."""
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: {world.size} ranks but no process group; call init_world first and shutdown last")
    label = world.calls.begin(name)
    try:
        everyone = _exchange((label, payload), world, group)
    except RuntimeError as failure:
        who = f"{label} on rank {world.rank} of {world.size}"
        raise RuntimeError(f"{who}: another rank has ended or was not there in time: {failure}") from failure
    if len({label for label, _ in everyone}) > 1:
        places = ", ".join(f"rank {rank} is at {label}" for rank, (label, _) in enumerate(everyone))
        raise RuntimeError(
            f"the ranks are in different calls: {places}; all must make the same calls in the same order"
        )
    return label, [payload for _, payload in everyone]


def _exchange(message: Any, world: World, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's picklable message, in rank order: in one all-gather where all are short, in two where one is not."""
    if dist.get_backend(group) != "gloo":
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, message, group=group)
        return everyone

    def all_gather(mine: bytes, size: int) -> list[bytes]:
        wire = _as_tensor(mine.ljust(size, b"\0"))
        parts = wire.new_empty(world.size, size)
        dist.all_gather(list(parts.unbind()), wire, group)
        return [part.numpy().tobytes() for part in parts]

    # underneath: torch's all_gather_object gathers the lengths first, and only then the bytes
    text = pickle.dumps(message)
    firsts = all_gather(len(text).to_bytes(8, "little") + text[:SHORT], 8 + SHORT)
    lengths = [int.from_bytes(first[:8], "little") for first in firsts]
    longest = max(lengths) - SHORT
    rests = all_gather(text[SHORT:], longest) if longest > 0 else [b""] * world.size
    return [pickle.loads((f[8:] + rest)[:length]) for f, rest, length in zip(firsts, rests, lengths, strict=True)]


Leaves = list[tuple[str, str, Any]]  # of each: path, dtype@device, shape


def _agree(
    name: str, data: Any, world: World, ragged: bool = False, carry: bool = False
) -> tuple[list[Leaves], torch.Tensor | None]:
    """Check that the ranks hold the same leaves -> every rank's, and their bytes (size, n) where these came along.

    With `ragged`, lengths may differ. With `carry`, the bytes of few and small leaves come along; else there is None.
    """
    label, met = _meet(name, world, (list(_describe(data)), _few_bytes(data) if carry else None))
    everyone = [leaves for leaves, _ in met]
    for leaf in zip_longest(*everyone, fillvalue=("", "nothing", ())):
        if len({(path, kind, len(shape) if ragged else shape) for path, kind, shape in leaf}) > 1:
            held = [
                f"rank {rank} has data{path}: {kind} {list(shape)}" for rank, (path, kind, shape) in enumerate(leaf)
            ]
            remedy = "" if ragged else "; where only lengths differ, call pad_across_processes first"
            raise RuntimeError(f"{label}: {', '.join(held)}{remedy}")
    recursively_apply(_tensor, data)  # raises for other leaves, now that all ranks are known to hold them
    bytes_by_rank = [part for _, part in met]
    return everyone, None if None in bytes_by_rank else _as_tensor(b"".join(bytes_by_rank)).view(world.size, -1)


def _few_bytes(data: Any) -> bytes | None:
    """All leaves, one after the other, if they are dense tensors on a CPU of at most CARRIED bytes together."""
    leaves: list[Any] = []
    recursively_apply(leaves.append, data)
    if not all(isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.layout == torch.strided for x in leaves):
        return None
    if not 0 < sum(leaf.nbytes for leaf in leaves) <= CARRIED:
        return None
    return b"".join(_wire(leaf)[1].numpy().tobytes() for leaf in leaves)


def _wire(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf as it travels: (n, ...), detached and dense; and its bytes, since gloo knows neither int16 nor float8."""
    row = tensor.detach().resolve_conj().resolve_neg().contiguous()
    row = row[None] if row.ndim == 0 else row  # underneath: so a 0-d tensor comes back as (size,)
    return row, row.reshape(-1).view(torch.uint8)


def _as_tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _describe(data: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(data, (tuple, list)):
        for index, item in enumerate(data):
            yield from _describe(item, f"{path}[{index}]")
    elif isinstance(data, Mapping):
        for key, item in data.items():
            yield from _describe(item, f"{path}[{key!r}]")
    elif isinstance(data, torch.Tensor):
        yield path, f"{str(data.dtype).removeprefix('torch.')}@{data.device.type}", tuple(data.shape)
    else:
        yield path, type(data).__name__, ()


def _tensor(leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"collectives take tensors in nested lists, tuples and dicts, not {type(leaf).__name__}")
    return leaf


def _check_rank(rank: int, world: World) -> None:
    if not 0 <= rank < world.size:
        raise ValueError(f"from_process={rank}: there are {world.size} ranks, numbered from 0")
