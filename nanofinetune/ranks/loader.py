"""Iterate a torch DataLoader as one of N ranks: this rank's batches, one fetched ahead, on this rank's device.

>>> loader = prepare_data_loader(DataLoader(torch.arange(5), batch_size=2), num_processes=2, process_index=1)
>>> for batch in loader:  # the last step of the two ranks holds one row, so rank 1 gets repeated ones
...     print(batch.tolist(), loader.end_of_dataloader, loader.remainder)
[2, 3] False 1
[1, 2] True 1

Underneath: `accelerate.data_loader.prepare_data_loader`, `accelerate.data_loader.DataLoaderShard` (accelerate 1.15).
  - They fetch one batch ahead, to know *before* they hand out the last batch that it is the last. There that flag is a
    global; here it is on the loader.
  - A shuffled order depends on (seed, epoch) alone, for any number of ranks. An Accelerator gives each loader a seed of
    its own. The epoch moves on when a loop starts, so `break` repeats nothing.
  - `remainder` counts what the sampler draws, and survives a skip.
  - Every rank reads a stream; there rank 0 does, and sends the others their slices.
  - Refused: `dispatch_batches=True`, stateful loaders, device meshes.

Proof: test_batches_match_accelerate, test_break_repeats_the_order_in_accelerate_only,
test_two_loaders_do_not_walk_in_lock_step_as_in_accelerate in tests/ranks/test_loader.py.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from nanofinetune.ranks.collectives import rebuilt
from nanofinetune.ranks.shard import PADDING, BatchSamplerShard, IterableDatasetShard, SkipBatchSampler
from nanofinetune.ranks.world import rank_and_size
from nanofinetune.step.order import SeedableRandomSampler, mix

T = TypeVar("T")
ORDER = "use_seedable_sampler=False: the order is a function of (seed, epoch) all the same"
STREAM = "note: each rank reads the whole stream and keeps its part, so all must read the same: seed what shuffles it"
_said: set[str] = set()  # what prepare_data_loader has told the user: once is enough
_RANDOM: dict[str, Any] = {"torch": torch, "cuda": torch.cuda}  # rng_types: whose random state ranks may share


def look_ahead(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it is the last one; to know that, fetch the next item first.

    >>> list(look_ahead("abc"))
    [('a', False), ('b', False), ('c', True)]
    """
    stream = iter(items)
    for current in islice(stream, 1):
        for following in stream:
            yield current, False
            current = following
        yield current, True


def send_to_device(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Copy the tensors in nested tuples, lists and mappings (source: accelerate.utils.send_to_device)."""
    if hasattr(batch, "to"):  # a tensor, or a BatchEncoding, which moves its own tensors and keeps its type
        return batch.to(device, non_blocking=True) if non_blocking else batch.to(device)
    if isinstance(batch, (tuple, list, Mapping)):
        return rebuilt(lambda item: send_to_device(item, device, non_blocking), batch)
    return batch


@dataclass(eq=False)
class Position:
    """Where one loop over a loader stands. Each loop has its own, so loops over one loader may be nested."""

    loader: DataLoaderShard
    index: int = -1  # of the current batch
    end_of_dataloader: bool = False
    valid_rows: int | None = None


class Positions(list[Position]):
    """What loaders may share. A deep copy is the same list: a copied loader still tells where it stands."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        return self


class DataLoaderShard(DataLoader):
    """A DataLoader that looks one batch ahead and knows where it stands (source: accelerate's class of this name).

    Args:
        dataset: as torch's DataLoader takes it, like every further keyword.
        device: where batches go; None leaves them where they are.
        synchronized_generator: reseeded from (data_seed, epoch) at the start of every epoch.
        skip_batches: batches to read and throw away, for streams. For other data sets use `SkipBatchSampler`, which
            does not read them.
        iteration: the epoch that the next loop runs.
        continues: the loader whose epoch this one finishes; it moves on to the next epoch together with this one.
        rng_types: "torch", "cuda": every loop begins with rank 0's random state, on all ranks. A collective.
        positions: a list that loaders may share. While a loop over one of them lasts, its `Position` is in it; the loop
            that got the latest batch is last.

    Inside a loop, `end_of_dataloader` says whether the current batch is the last one, and `valid_rows` how many of its
    rows are not padding rows (None where nothing in it is a tensor). Outside they are False and None.
    """

    def __init__(
        self, dataset: Any, device: torch.device | str | None = None,
        synchronized_generator: torch.Generator | None = None, skip_batches: int = 0, _non_blocking: bool = False,
        iteration: int = 0, *, data_seed: int = 0, continues: DataLoaderShard | None = None,
        positions: list[Position] | None = None, rng_types: Iterable[str] = (), **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(dataset, **kwargs)
        self.device = None if device is None else torch.device(device)
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.iteration = iteration
        self.data_seed = data_seed
        self._non_blocking = _non_blocking
        self._continues, self.rng_types = continues, rng_types
        self.positions = Positions() if positions is None else positions

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.set_epoch(self.iteration)
        # underneath: accelerate moves on only after the last batch, so after `break` a seedable one repeats its order
        self.iteration += 1
        if self._continues is not None:
            self._continues.iteration = self.iteration
        for kind in self.rng_types:
            dist.broadcast_object_list(state := [_RANDOM[kind].get_rng_state()])
            _RANDOM[kind].set_rng_state(state[0])
        copies = _Copies(self.device, self._non_blocking)
        batches = ((copies.start(batch), valid_rows) for batch, valid_rows in self._fetch())
        here = Position(self)
        try:
            for (copy_of_batch, valid_rows), last in look_ahead(batches):
                here.index, here.end_of_dataloader, here.valid_rows = here.index + 1, last, valid_rows
                if here in self.positions:
                    self.positions.remove(here)
                self.positions.append(here)
                yield copies.wait(*copy_of_batch)
        finally:  # of `break`, of an exception, and of the last batch
            if here in self.positions:
                self.positions.remove(here)

    def _fetch(self) -> Iterator[tuple[Any, int | None]]:
        """Batches as the workers collate them, each with its number of rows that are not padding."""
        for fetched in islice(super().__iter__(), self.skip_batches, None):
            yield fetched if isinstance(self.dataset, _PaddedRows) else (fetched, _row_count(fetched))

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next loop runs, for the samplers, the data set and the generator."""
        self.iteration = epoch
        # underneath: accelerate looks for a `sampler` only, and so misses a user's own batch sampler on N > 1 ranks
        for source in [*_samplers(self), self.dataset]:
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)
        if self.synchronized_generator is not None:
            self.synchronized_generator.manual_seed(mix(self.data_seed, epoch))

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is: its epoch, and how many rows of it all ranks have been given (0 between epochs)."""
        # underneath: accelerate saves the sampler of streams only: elsewhere a seedable one resumes in epoch 0's order,
        # and any other in an arbitrary order
        seed = next((node.data_seed for node in _samplers(self) if hasattr(node, "data_seed")), self.data_seed)
        state = {"epoch": self.iteration, "rows": 0, "data_seed": seed}
        for position in self.positions:
            loader = position.loader
            if self in (loader, loader._continues):
                skipped = loader.skip_batches + sum(getattr(node, "skip_batches", 0) for node in _samplers(loader))
                total, steps = self.total_batch_size, skipped + position.index + 1
                short = total - self.remainder if total and position.end_of_dataloader and self.remainder > 0 else 0
                state |= {"epoch": self.iteration - 1, "rows": None if total is None else steps * total - short}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next loop run the epoch of `state`, from its first row; `skip_first_batches` skips what is done."""
        self.data_seed = state["data_seed"]
        for node in _samplers(self):
            if hasattr(node, "data_seed"):
                node.data_seed = state["data_seed"]
        self.set_epoch(state["epoch"])

    def sample_ids(self, first: int, last: int) -> list[int]:
        """Row numbers in the data set of batches `first` to `last` - 1 of the epoch that is running; [] for a stream.

        This rank's batches, counted from 0, from where the loop began.
        """
        if isinstance(self.dataset, IterableDataset):
            return []
        generator = self.synchronized_generator or torch.Generator()
        state = generator.get_state()  # of a sampler that draws: let it draw the same again, and then go on
        generator.manual_seed(mix(self.data_seed, self.iteration - 1))
        batches = list(islice(iter(_batch_sampler(self)), max(0, first), last))
        generator.set_state(state)
        return [row for batch in batches for row in batch if row != PADDING]

    @property
    def position(self) -> Position:
        """Of the loops over this loader, the one that got the latest batch; a new Position outside of any loop."""
        # underneath: accelerate keeps one flag on the loader; a second loop inside a loop over it leaves the flag set
        return next((position for position in reversed(self.positions) if position.loader is self), Position(self))

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the current batch is the last one of this epoch."""
        return self.position.end_of_dataloader

    @property
    def batch_index(self) -> int:
        """The number of the current batch, counted from 0 where this loop began; -1 outside of any loop."""
        return self.position.index

    @property
    def valid_rows(self) -> int | None:
        """How many rows of this rank's current batch are no padding rows; fewer than all only with `uneven="mask"`."""
        return self.position.valid_rows

    def rows_of_step(self, index: int) -> tuple[int, int] | None:
        """Rows of step `index` of an epoch that are no padding rows: (this rank's, all ranks'). Repeated rows count.

        None where that cannot be known beforehand: for streams, batches that vary in size, and `even_batches=False`.
        """
        alone = BatchSamplerShard([], uneven="mask")  # one process adds no rows
        ranks = next((node for node in _samplers(self) if isinstance(node, BatchSamplerShard)), alone)
        total, remainder = self.total_batch_size, self.remainder
        if isinstance(self.dataset, IterableDataset) or total is None or remainder < 0 or not ranks.even_batches:
            return None
        try:
            last = len(self) - 1
        except TypeError:  # a batch sampler without a length
            return None
        rows = remainder if index == last and remainder > 0 and ranks.uneven == "mask" else total
        part = -(-rows // ranks.num_processes)
        return min(part, max(0, rows - ranks.process_index * part)), rows

    @property
    def total_batch_size(self) -> int | None:
        """Rows of a full step of all ranks together; None where batches vary in size."""
        source = self._step_source
        size = getattr(source, "batch_size", None)
        if size is None or getattr(source, "split_batches", False):
            return size
        return size * getattr(source, "num_processes", 1)

    @property
    def total_dataset_length(self) -> int:
        """Rows of the data set (of a stream: of all ranks together)."""
        dataset = self._whole_dataset
        return dataset.total_length if hasattr(dataset, "total_length") else len(dataset)

    @property
    def remainder(self) -> int:
        """Real rows of the epoch's last step, all ranks together. 0: it is full or left out. -1: it is not known."""
        if getattr(self._step_source, "drop_last", False):
            return 0
        drawn = self._whole_dataset
        if not isinstance(self.dataset, IterableDataset):
            # underneath: accelerate takes len(dataset), which is not what a SubsetRandomSampler draws
            drawn = next((node.sampler for node in _samplers(self) if hasattr(node, "sampler")), drawn)
        total = self.total_batch_size
        return len(drawn) % total if total is not None and isinstance(drawn, Sized) else -1

    @property
    def _whole_dataset(self) -> Any:
        return self.dataset.dataset if isinstance(self.dataset, IterableDatasetShard) else self.dataset

    @property
    def _step_source(self) -> Any:
        """The object that has batch_size, num_processes, split_batches and drop_last."""
        return self.dataset if isinstance(self.dataset, IterableDatasetShard) else _batch_sampler(self)


def prepare_data_loader(
    dataloader: DataLoader, device: torch.device | str | None = None, num_processes: int | None = None,
    process_index: int | None = None, split_batches: bool = False, put_on_device: bool = False,
    rng_types: list[str] | None = None, dispatch_batches: bool | None = None, even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None, use_seedable_sampler: bool = True,
    data_seed: int | None = None, non_blocking: bool = False, use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None, *, uneven: str = "wrap", positions: list[Position] | None = None,
    unlike: Callable[[int, torch.Generator | None], int] = lambda seed, source: seed,
) -> DataLoaderShard:  # fmt: skip
    """Make the loader of one rank (source: accelerate.data_loader.prepare_data_loader). `dataloader` stays as it is.

    Args:
        device, put_on_device: batches go to `device` if `put_on_device`.
        num_processes, process_index: N and r; None: those of the process group, or else of the environment. Every rank
            must call with equal loaders.
        split_batches: False: `dataloader.batch_size` is one rank's. True: it is that of all ranks together.
        even_batches, uneven: what becomes of a short last step on N > 1 ranks, see `BatchSamplerShard`. With "mask" the
            batch must be a mapping with a tensor "labels". A rank that has no real row gets row 0 with label -100
            (-100.0 in a regression, whose loss does not skip it: give that row weight zero).
        data_seed: decides the order. None: that of the sampler's `generator`, else torch's global one, rank 0's.
            Without a process group N > 1 ranks refuse None where a sampler without generator shuffles.
        unlike: makes a seed and the generator that it came from (None: no generator) into a seed of this loader's own.
            Without it, which an Accelerator gives, shuffled loaders of one seed walk in lock-step.
        use_seedable_sampler: changes nothing, which is said once: the order is always a function of (seed, epoch), for
            any number of ranks.
        rng_types: "generator" is always so. "torch" and "cuda" see `DataLoaderShard`: for a sampler without generator,
            whose order is its own, on ranks whose random states differ.
        non_blocking: on CUDA, pin batches and copy them on a stream of their own.
        positions: see `DataLoaderShard`.

    Every rank reads all of a stream, which is said once. Raises NotImplementedError for what only accelerate's can do.
    """
    if not isinstance(dataloader, DataLoader):
        raise TypeError(f"dataloader is a {type(dataloader).__name__}: it must be a torch.utils.data.DataLoader")
    if isinstance(dataloader, DataLoaderShard):
        raise ValueError("this DataLoader is prepared already: preparing it again would shard the shard")
    if num_processes is None or process_index is None:
        rank, size = rank_and_size()
        num_processes = size if num_processes is None else num_processes
        process_index = rank if process_index is None else process_index
    for name, refused in {
        "dispatch_batches=True": dispatch_batches,
        "slice_fn_for_dispatch": slice_fn_for_dispatch is not None,
        "use_stateful_dataloader=True": use_stateful_dataloader or hasattr(dataloader, "load_state_dict"),
        "torch_device_mesh": torch_device_mesh is not None,
        f"rng_types={rng_types}": not {*(rng_types or ())} <= {"generator", *_RANDOM},
    }.items():
        if refused:
            raise NotImplementedError(f"{name} is not supported here: use accelerate's prepare_data_loader for it")
    dataset: Any = dataloader.dataset

    def own_seed(generator: torch.Generator | None) -> int:
        _say_once(ORDER, process_index == 0 and not use_seedable_sampler)
        return unlike(order_seed(data_seed, generator, num_processes), generator if data_seed is None else None)

    settings = _settings(dataloader)
    if isinstance(dataset, IterableDataset):
        generator = getattr(dataset, "generator", None)
        seed = 0 if generator is None else own_seed(generator)
        batch_size = dataloader.batch_size
        if num_processes > 1:
            _say_once(STREAM, process_index == 0)
            if batch_size is None:
                raise ValueError(
                    "a stream with batch_size=None has no steps that ranks could share: give it a batch_size"
                )
            if uneven == "mask" or not even_batches:
                raise NotImplementedError(
                    "uneven='mask' and even_batches=False are not supported for a stream: it wraps"
                )
            dataset = IterableDatasetShard(
                dataset, batch_size, dataloader.drop_last, num_processes, process_index, split_batches
            )
            batch_size = dataset.per_process
        settings |= {"batch_size": batch_size, "drop_last": dataloader.drop_last}
    else:
        batch_sampler, generator, seed = _seeded(_batch_sampler(dataloader), own_seed)
        shard = BatchSamplerShard(
            batch_sampler, num_processes, process_index, split_batches, even_batches, uneven=uneven
        )
        settings |= _batches_from(dataloader, shard if num_processes > 1 else batch_sampler)
        if num_processes > 1 and uneven == "mask":
            if dataloader.batch_sampler is None:
                raise NotImplementedError("uneven='mask' needs the batch sampler as batch_sampler=, not as sampler=")
            dataset, settings["collate_fn"] = _PaddedRows(dataset), _MaskLabels(dataloader.collate_fn)

    device = torch.device(device) if put_on_device and device is not None else None
    if non_blocking and device is not None and device.type == "cuda":
        settings["pin_memory"] = True  # only a copy from pinned memory runs beside the computation
    settings["rng_types"] = [kind for kind in rng_types or () if kind in _RANDOM and num_processes > 1]
    return DataLoaderShard(dataset, device, generator, 0, non_blocking, data_seed=seed, positions=positions, **settings)


def skip_first_batches(dataloader: DataLoader, num_batches: int = 0) -> DataLoader:
    """A loader of the same epoch without its first `num_batches` batches (source: accelerate's of this name).

    For a data set with a length their indices are drawn and their rows not read; a stream has to read them. The new
    loader keeps the device, what is known about the last step, and the epoch that `dataloader` would run next. Once it
    has begun that epoch, `dataloader` goes on with the one after.
    """
    settings, skip_batches = _settings(dataloader), 0
    if isinstance(dataloader.dataset, IterableDataset):
        settings |= {"batch_size": dataloader.batch_size, "drop_last": dataloader.drop_last}
        skip_batches = num_batches
    else:
        settings |= _batches_from(dataloader, SkipBatchSampler(_batch_sampler(dataloader), num_batches))
    if isinstance(dataloader, DataLoaderShard):
        return DataLoaderShard(
            dataloader.dataset, dataloader.device, dataloader.synchronized_generator,
            dataloader.skip_batches + skip_batches, dataloader._non_blocking, dataloader.iteration,
            continues=dataloader if dataloader._continues is None else dataloader._continues,
            data_seed=dataloader.data_seed, positions=dataloader.positions, rng_types=dataloader.rng_types, **settings,
        )  # fmt: skip
    if skip_batches:
        return DataLoaderShard(dataloader.dataset, skip_batches=skip_batches, **settings)
    return DataLoader(dataloader.dataset, **settings)


def order_seed(data_seed: int | None, generator: torch.Generator | None, num_processes: int) -> int:
    """The seed of an order: the one given, else the generator's, else torch's, on N ranks rank 0's (a collective).

    Raises ValueError for N ranks without a process group in which they could tell each other.
    """
    if data_seed is not None:
        return data_seed
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    if num_processes > 1 and dist.is_initialized():
        dist.broadcast_object_list(first := [seed])
        return first[0]
    if num_processes > 1 and generator is None:
        raise ValueError(
            "data_seed is None: every rank must draw the same order, so give all of them the same data_seed, "
            "or give the sampler a generator with the same seed"
        )
    return seed


class _Copies:
    """Copies batches to the device; with `non_blocking` on CUDA, on a stream of its own, beside the computation."""

    def __init__(self, device: torch.device | None, non_blocking: bool) -> None:
        self.device = device
        # On CUDA only: for other devices batches are not pinned, and on MPS a copy may outlive what it reads.
        own_stream = non_blocking and device is not None and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if own_stream else None

    def start(self, batch: Any) -> tuple[Any, torch.cuda.Event | None]:
        """Start copying -> the batch, and an event that is reached when the copy is complete."""
        if self.device is None:
            return batch, None
        with torch.cuda.stream(self.stream):  # changes nothing where that is None
            batch = send_to_device(batch, self.device, self.stream is not None)
        return batch, None if self.stream is None else self.stream.record_event()

    def wait(self, batch: Any, copied: torch.cuda.Event | None) -> Any:
        """Let the computation wait for the copy (the host does not), and the memory for the computation."""
        if copied is not None:
            computation = torch.cuda.current_stream(self.device)
            computation.wait_event(copied)
            for tensor in _tensors(batch):
                tensor.record_stream(computation)  # else the allocator gives it to the next copy while it is in use
        return batch


class _PaddedRows(Dataset):
    """Gives the real rows of a batch and how many they are; where there are none, row 0 as a padding row.

    Padding rows beside real ones are left out: they would only cost time, and distort the mean of a regression's loss.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> tuple[Any, int]:
        valid = sum(index != PADDING for index in indices)
        indices = indices[:valid] or [0]
        fetch_many = getattr(self.dataset, "__getitems__", None)
        return (fetch_many(indices) if fetch_many else [self.dataset[index] for index in indices]), valid

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class _MaskLabels:
    """Collate, then set the label of a padding row to -100, which cross entropy skips."""

    collate_fn: Callable[[Any], Any]

    def __call__(self, fetched: tuple[Any, int]) -> tuple[Any, int]:
        rows, valid = fetched
        batch = self.collate_fn(rows)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor):
            raise TypeError("uneven='mask' needs batches with a tensor 'labels' to mask: use uneven='wrap' for others")
        if valid < len(labels):
            labels = labels.clone()  # [rows]; the collate function may have given a view of the data set
            labels[valid:] = -100
            batch["labels"] = labels
        return batch, valid


def _seeded(batch_sampler: Any, own_seed: Callable[[Any], int]) -> tuple[Any, torch.Generator | None, int]:
    """-> a batch sampler whose order depends on (seed, epoch) only, the generator to reseed for that, and the seed."""
    sampler: Any = getattr(batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        raise ValueError("a DistributedSampler shards already and `prepare` would shard its shard: use a RandomSampler")
    if isinstance(sampler, SeedableRandomSampler) or not hasattr(sampler, "generator"):
        return batch_sampler, None, 0
    seed = own_seed(sampler.generator)
    generator = None
    if type(sampler) is RandomSampler:
        sampler = SeedableRandomSampler(sampler.data_source, sampler.replacement, sampler._num_samples, data_seed=seed)
    else:  # any other is kept, and draws from a generator of ours
        sampler, generator = copy.copy(sampler), torch.Generator()
        sampler.generator = generator
    batch_sampler = copy.copy(batch_sampler)
    batch_sampler.sampler = sampler
    return batch_sampler, generator, seed


def _say_once(line: str, where: bool) -> None:
    if where and line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)


def _batch_sampler(dataloader: DataLoader) -> Any:
    """The object that yields lists of indices: the batch sampler, or a sampler that is one (batch_size=None)."""
    if dataloader.batch_sampler is not None:
        return dataloader.batch_sampler
    if isinstance(dataloader.sampler, BatchSampler) or isinstance(dataloader.dataset, IterableDataset):
        return dataloader.sampler
    # underneath: accelerate rebuilds such a loader without its sampler, so a shuffled one is no longer shuffled
    raise ValueError("this DataLoader has batch_size=None, so nothing to share between ranks: give it a batch_size")


def _batches_from(dataloader: DataLoader, batch_sampler: Any) -> dict[str, Any]:
    """The DataLoader arguments that put `batch_sampler` where `dataloader` has its own."""
    if dataloader.batch_sampler is None:
        return {"sampler": batch_sampler, "batch_size": None}
    return {"batch_sampler": batch_sampler}


def _samplers(dataloader: DataLoader) -> list[Any]:
    """The batch sampler, what it wraps, and so on down to the innermost sampler."""
    found = [_batch_sampler(dataloader)]
    while (inner := getattr(found[-1], "batch_sampler", getattr(found[-1], "sampler", None))) is not None:
        found.append(inner)
    return found


def _settings(dataloader: DataLoader) -> dict[str, Any]:
    """The arguments of a DataLoader that do not decide which rows it reads."""
    names = (
        "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
        "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
    )  # fmt: skip
    return {name: getattr(dataloader, name) for name in names}


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _row_count(batch: Any) -> int | None:
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim > 0), None)
