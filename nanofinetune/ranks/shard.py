"""Which rows of the data set each rank gets: functions of whole numbers, which one process can test for all ranks.

>>> batches = BatchSampler(range(5), batch_size=2, drop_last=False)  # [0 1] [2 3] [4]
>>> [list(BatchSamplerShard(batches, 2, rank)) for rank in (0, 1)]  # the end wraps to the epoch's first rows
[[[0, 1], [4, 0]], [[2, 3], [1, 2]]]
>>> [list(BatchSamplerShard(batches, 2, rank, uneven="mask")) for rank in (0, 1)]  # or holds padding rows
[[[0, 1], [4]], [[2, 3], [-1]]]

Underneath: `accelerate.data_loader.BatchSamplerShard`, `accelerate.data_loader.IterableDatasetShard`,
`accelerate.data_loader.SkipBatchSampler` (accelerate 1.15).
  - The first deals batches in turn and holds each back until its round is full. Said more simply: string all rows
    together, cut them into *steps* of N x batch_size rows, and give rank r the r-th slice of each. That is `shard`
    below, for batches and streams alike.
  - A short batch before the last one raises; there its rows vanish.
  - Skipping keeps `batch_size`.
  - `uneven="mask"` is ours.

Proof: test_shards_match_accelerate, test_mask_holds_exactly_the_single_process_batches in tests/ranks/test_shard.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
from typing import TypeVar

from torch.utils.data import BatchSampler, IterableDataset

T = TypeVar("T")

# The index of a padding row. It counts for nothing; it only fills the batch of a rank that has run out of rows.
PADDING = -1


def steps(units: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut a stream into lists of `size` units; the last one may be shorter.

    >>> list(steps("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    stream = iter(units)
    while step := list(islice(stream, size)):
        yield step


def shard(
    units: Iterable[T], per_process: int, num_processes: int, process_index: int, *, drop_last: bool = False,
    uneven: str = "wrap", padding: T | None = None,
) -> Iterator[list[T]]:  # fmt: skip
    """Yield this rank's part of every step: a step is `num_processes * per_process` consecutive units, a part a slice.

    A short last step is left out with `drop_last`; else `uneven` says what becomes of it:
      "wrap"    it is filled up with the stream's first units, repeated as often as needed
      "mask"    it is spread over the ranks in equal parts, whose end is filled up with `padding`
      "ragged"  nothing is added: the last ranks get a shorter part, or none at all and one step less

    >>> [list(shard("abcdefg", 2, 2, rank)) for rank in (0, 1)]
    [[['a', 'b'], ['e', 'f']], [['c', 'd'], ['g', 'a']]]
    >>> [list(shard("abcdefg", 2, 2, rank, uneven="mask", padding="-")) for rank in (0, 1)]
    [[['a', 'b'], ['e', 'f']], [['c', 'd'], ['g', '-']]]
    >>> [list(shard("abcdefg", 2, 2, rank, uneven="ragged")) for rank in (0, 1)]
    [[['a', 'b'], ['e', 'f']], [['c', 'd'], ['g']]]
    """
    size = num_processes * per_process
    first: list[T] = []
    for step in steps(units, size):
        first = first or step
        if len(step) < size:
            if drop_last:
                return
            if uneven == "wrap":
                # underneath: with even_batches, training sees these rows twice; only gather_for_metrics cuts them off
                step = list(islice(chain(step, cycle(first)), size))
            elif uneven == "mask":
                # Equal parts, padding at the end: shapes agree, and gathering and trimming gives the rows in order.
                per_process = -(-len(step) // num_processes)
                step = step + [padding] * (num_processes * per_process - len(step))  # type: ignore[list-item]
        if part := step[process_index * per_process : (process_index + 1) * per_process]:
            yield part


class BatchSamplerShard(BatchSampler):
    """One rank's batches out of `batch_sampler`, any iterable of lists of row indices (source: accelerate's class).

    MRPC on 4 ranks:

    >>> train = BatchSampler(range(3668), batch_size=16, drop_last=True)
    >>> len(train), len(BatchSamplerShard(train, 4, 0))  # 57 x 4 x 16 = 3648 of the 3668 rows
    (229, 57)
    >>> validation = BatchSampler(range(408), batch_size=32, drop_last=False)
    >>> len(BatchSamplerShard(validation, 4, 0)), 408 % (4 * 32)  # the fourth step holds 24 real rows
    (4, 24)

    Args:
        batch_sampler: its `batch_size` (None or missing: batches vary in size), its `drop_last` (missing: False).
        num_processes, process_index: N and r, 0 <= r < N.
        split_batches: False: a step is N batches, and each rank gets one. True: a step is one batch, cut into N slices.
        even_batches: True gives all ranks equally many batches; False leaves the last step ragged.
        uneven: how `even_batches` is reached: "wrap" repeats the epoch's first rows; "mask" adds rows of index
            `PADDING`, only at the end of a batch; every rank has at least one row, real or padding, in every step.

    Batches that vary in size are never cut: "wrap" repeats the first ones, "mask" adds batches of one padding row.
    Raises ValueError for settings that contradict each other and, while iterating, for a short batch before the last.
    """

    def __init__(
        self, batch_sampler: Iterable[list[int]], num_processes: int = 1, process_index: int = 0,
        split_batches: bool = False, even_batches: bool = True, *, uneven: str = "wrap",
    ) -> None:  # fmt: skip
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.uneven = uneven
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last: bool = getattr(batch_sampler, "drop_last", False)
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"process_index is {process_index}: it must be from 0 to num_processes - 1 = {num_processes - 1}"
            )
        if uneven not in ("wrap", "mask"):
            raise ValueError(f"uneven is {uneven!r}: it must be 'wrap' or 'mask'")
        if uneven == "mask" and not even_batches:
            raise ValueError("uneven='mask' makes batches even and even_batches=False leaves them uneven: choose one")
        if split_batches:
            _check_split(self.batch_size, num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        uneven = self.uneven if self.even_batches else "ragged"
        if self.batch_size is None:
            for part in shard(
                self.batch_sampler, 1, self.num_processes, self.process_index,
                drop_last=self.drop_last, uneven=uneven, padding=[PADDING],
            ):  # fmt: skip
                yield from part  # one batch
        else:
            yield from shard(
                _rows(self.batch_sampler, self.batch_size),
                self.batch_size // self.num_processes if self.split_batches else self.batch_size,
                self.num_processes, self.process_index, drop_last=self.drop_last, uneven=uneven, padding=PADDING,
            )  # fmt: skip

    def __len__(self) -> int:
        batches = len(self.batch_sampler)  # type: ignore[arg-type]
        if self.split_batches:
            # underneath: one too many, in Accelerate as here, for a rank that a ragged last batch leaves out
            return batches
        if self.drop_last:
            return batches // self.num_processes
        # Where nothing is added, a short last step reaches rank r only if it has r + 1 batches.
        first = 0 if self.even_batches else self.process_index
        return -(-(batches - first) // self.num_processes)

    @property
    def total_length(self) -> int:
        """Batches of all ranks together."""
        return len(self.batch_sampler)  # type: ignore[arg-type]


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first `skip_batches` batches: their indices are drawn, their rows never read.

    Source: accelerate.data_loader.SkipBatchSampler. Raises ValueError for a negative number.
    """

    # underneath: accelerate's has no batch_size, drop_last or num_processes, so its loader no longer knows how many
    # rows of the last batch are real, and `gather_for_metrics` counts the repeated ones too.
    def __init__(self, batch_sampler: Iterable[list[int]], skip_batches: int = 0) -> None:
        if skip_batches < 0:
            raise ValueError(f"skip_batches is {skip_batches}: it must be 0 or more")
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches
        self.batch_size: int | None = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last: bool = getattr(batch_sampler, "drop_last", False)
        self.num_processes: int = getattr(batch_sampler, "num_processes", 1)
        self.split_batches: bool = getattr(batch_sampler, "split_batches", False)

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batch_sampler), self.skip_batches, None)

    def __len__(self) -> int:
        return max(0, len(self.batch_sampler) - self.skip_batches)  # type: ignore[arg-type]

    @property
    def total_length(self) -> int:
        """Batches before skipping."""
        return len(self.batch_sampler)  # type: ignore[arg-type]


class IterableDatasetShard(IterableDataset):
    """One rank's rows of a stream: every rank reads all of it and keeps its slice of each step (source: accelerate's).

    `batch_size` is a rank's, or with `split_batches` that of all ranks together. A short last step wraps to the first
    rows, or is left out with `drop_last`. Raises ValueError where `split_batches` cannot cut a batch into equal parts.

    >>> [list(IterableDatasetShard(range(5), 2, num_processes=2, process_index=rank)) for rank in (0, 1)]
    [[0, 1, 4, 0], [2, 3, 1, 2]]
    """

    def __init__(
        self, dataset: Iterable[object], batch_size: int = 1, drop_last: bool = False, num_processes: int = 1,
        process_index: int = 0, split_batches: bool = False,
    ) -> None:  # fmt: skip
        # underneath: accelerate accepts batch_size 1 on 2 ranks, and then each rank keeps 1 // 2 = 0 rows of a batch
        if split_batches:
            _check_split(batch_size, num_processes)
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.per_process = batch_size // num_processes if split_batches else batch_size

    def __iter__(self) -> Iterator[object]:
        parts = shard(self.dataset, self.per_process, self.num_processes, self.process_index, drop_last=self.drop_last)
        return chain.from_iterable(parts)

    def __len__(self) -> int:
        rows, size = len(self.dataset), self.num_processes * self.per_process  # type: ignore[arg-type]
        # underneath: accelerate counts steps of num_processes * batch_size rows with split_batches too: too many
        return (rows // size if self.drop_last else -(-rows // size)) * self.per_process

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the data set, where that knows epochs."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _check_split(batch_size: int | None, num_processes: int) -> None:
    """Raise where a batch cannot be cut into equal parts."""
    if batch_size is None or batch_size % num_processes:
        raise ValueError(
            f"split_batches cuts a batch into {num_processes} equal parts and batch_size is {batch_size}: "
            f"it must be a multiple of {num_processes}"
        )


def _rows(batches: Iterable[list[int]], batch_size: int) -> Iterator[int]:
    """String the rows of batches together, which `shard` may only do if all but the last batch are full."""
    short: int | None = None
    for number, batch in enumerate(batches):
        if short is not None or len(batch) > batch_size:
            wrong, rows = (number - 1, short) if short is not None else (number, len(batch))
            # underneath: accelerate drops the whole round of batches that such a batch ends
            raise ValueError(
                f"batch {wrong} has {rows} rows and batch_size is {batch_size}: only the last batch may differ; "
                "a batch sampler whose batches vary in size must not have a batch_size"
            )
        if len(batch) < batch_size:
            short = len(batch)
        yield from batch
