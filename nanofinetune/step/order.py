"""Which rows of the data set belong to this rank, and in which order: functions of integers, testable in one process.

>>> from torch.utils.data import BatchSampler
>>> batches = BatchSampler(range(5), batch_size=2, drop_last=False)  # [0 1] [2 3] [4]
>>> [list(BatchSamplerShard(batches, 2, rank)) for rank in (0, 1)]  # the end wraps to the epoch's first rows
[[[0, 1], [4, 0]], [[2, 3], [1, 2]]]
>>> [list(BatchSamplerShard(batches, 2, rank, uneven="mask")) for rank in (0, 1)]  # or holds padding rows
[[[0, 1], [4]], [[2, 3], [-1]]]

Underneath: `accelerate.data_loader.BatchSamplerShard` (accelerate 1.15) deals whole batches round-robin: rank r of N
takes batches r, r+N, ... and holds each back until the round of N is known to be full; the last round is dropped,
wrapped to the epoch's first rows, or left ragged. Said more simply: string all rows together, cut them into *steps* of
N x batch_size rows, give rank r the r-th slice of each step. That is `shard` below, for batches and for streams
(`accelerate.data_loader.IterableDatasetShard`) alike. MRPC on 4 ranks:

>>> train = BatchSampler(range(3668), batch_size=16, drop_last=True)
>>> len(train), len(BatchSamplerShard(train, 4, 0))  # 57 x 4 x 16 = 3648 of the 3668 rows
(229, 57)
>>> validation = BatchSampler(range(408), batch_size=32, drop_last=False)
>>> len(BatchSamplerShard(validation, 4, 0)), 408 % (4 * 32)  # the fourth step holds 24 real rows
(4, 24)

We differ on purpose. `accelerate.data_loader.SeedableRandomSampler` seeds with seed + epoch, so (seed, epoch 1) is the
order of (seed + 1, epoch 0), and it moves on only when exhausted, so that `break` repeats the order; here a hash mixes
the two, and the loader moves the epoch on. `accelerate.data_loader.SkipBatchSampler` forgets batch_size; ours keeps it.
A short batch that is not the last is an error (there, rows vanish). `uneven="mask"` is ours.
`transformers.trainer_pt_utils.LengthGroupedSampler` (transformers 5.23) sorts random blocks of at most 50 batches and
leaves the batches of a block in order; our blocks are a quarter of the rows and our batches shuffled.

Proof: test_shards_match_accelerate, test_dynamic_shards_match_accelerate, test_iterable_shards_match_accelerate,
test_mask_holds_exactly_the_single_process_batches, test_seedable_order_matches_torch_random_sampler,
test_seed_and_epoch_are_not_interchangeable_as_in_accelerate, test_skip_keeps_what_accelerate_loses,
test_a_short_batch_in_the_middle_raises_where_accelerate_loses_rows,
test_length_grouping_pads_no_more_than_transformers in tests/test_sampler.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from functools import cached_property
from itertools import chain, islice

import torch
from torch.utils.data import RandomSampler, Sampler


def mix(*ints: int) -> int:
    """Hash integers into one 63-bit seed: (seed, epoch + 1) has nothing in common with (seed + 1, epoch).

    >>> mix(42, 1) == mix(42, 1), mix(42, 1) == mix(43, 0), mix(42, 1) == mix(1, 42)
    (True, False, False)
    """
    digest = hashlib.blake2b(",".join(str(int(i)) for i in ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SeedableRandomSampler(RandomSampler):
    """A random order, a pure function of (data_seed, epoch): the same on every rank and for every number of ranks.

    Iterating changes nothing: the loader calls `set_epoch` when it *starts* an epoch. (Source:
    `accelerate.data_loader.SeedableRandomSampler`; it takes a `generator`, and then seeds it itself: ours takes none.)
    Draws with `replacement` and `num_samples` are those of torch's RandomSampler.

    >>> sampler = SeedableRandomSampler(range(5), data_seed=0)
    >>> list(sampler) == list(sampler), sorted(sampler)
    (True, [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        data_source: Sized,
        replacement: bool = False,
        num_samples: int | None = None,
        *,
        data_seed: int = 42,
        epoch: int = 0,
    ) -> None:
        super().__init__(data_source, replacement, num_samples)
        self.data_seed = data_seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # underneath: accelerate seeds with seed + epoch, and moves epoch on at the end, which `break` never reaches
        generator = _generator(self.data_seed, self.epoch)
        n = len(self.data_source)
        if self.replacement:
            return iter(torch.randint(n, (self.num_samples,), generator=generator, device="cpu").tolist())
        passes = -(-self.num_samples // n)
        order = chain.from_iterable(
            torch.randperm(n, generator=generator, device="cpu").tolist() for _ in range(passes)
        )
        return islice(order, self.num_samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """All there is to know: {"data_seed", "epoch"}."""
        return {"data_seed": self.data_seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self.data_seed, self.epoch = state["data_seed"], state["epoch"]


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length, in random order: a pure function of (seed, epoch), every row exactly once.

    Rows are shuffled and cut into four blocks, each block is sorted by length and cut into batches, and the batches
    are shuffled. The longest batch comes first, so that a lack of memory shows at once; the short one, if any, last.
    On N ranks give it the global batch size and shard with `split_batches=True`: then the ranks of one step work on
    equal lengths, and together on the very rows of a single process.

    Args:
        lengths: tokens of each row.
        batch_size: rows.

    >>> list(LengthGroupedBatchSampler(range(19), batch_size=2, seed=0))  # row i is i tokens long
    [[18, 15], [1, 0], [10, 4], [16, 11], [17, 14], [7, 6], [13, 12], [9, 8], [5, 2], [3]]
    """

    drop_last = False

    def __init__(self, lengths: Iterable[int], batch_size: int, seed: int = 42, epoch: int = 0) -> None:
        self.lengths = _lengths(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = _generator(self.seed, self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator, device="cpu").tolist()
        block_size = self.batch_size * -(-len(self) // 4)  # whole batches
        batches: list[list[int]] = []
        for block in _cut(rows, block_size):
            block.sort(key=self.lengths.__getitem__, reverse=True)
            batches += _cut(block, self.batch_size)
        short = [batches.pop()] if len(rows) % self.batch_size else []
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator, device="cpu").tolist()]
        if batches:
            longest = max(range(len(batches)), key=lambda i: self.lengths[batches[i][0]])
            batches[0], batches[longest] = batches[longest], batches[0]
        yield from batches + short

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration gives."""
        self.epoch = epoch


class RebatchedSampler(Sampler[list[int]]):
    """The rows of another batch sampler, in its order, in batches of another size.

    >>> list(RebatchedSampler([[5, 1], [0, 4], [2]], batch_size=3))
    [[5, 1, 0], [4, 2]]
    """

    drop_last = False

    def __init__(self, batch_sampler: Iterable[list[int]], batch_size: int) -> None:
        self.batch_sampler = batch_sampler
        self.batch_size = batch_size

    @cached_property
    def _count(self) -> int:
        """Rows of an epoch, the same in each: counted once, since a loader asks for its length at every batch."""
        return sum(map(len, self.batch_sampler))

    def __iter__(self) -> Iterator[list[int]]:
        return _cut(list(chain.from_iterable(self.batch_sampler)), self.batch_size)

    def __len__(self) -> int:
        return -(-self._count // self.batch_size)


class SortedBatchSampler(Sampler[list[int]]):
    """Batches by falling length, for evaluation: the least padding there can be, and a lack of memory shows at once.

    >>> list(SortedBatchSampler([3, 9, 5, 9, 1], batch_size=2))
    [[1, 3], [2, 0], [4]]
    """

    drop_last = False

    def __init__(self, lengths: Iterable[int], batch_size: int) -> None:
        self.lengths = _lengths(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return _cut(sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True), self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(seed, epoch))


def _lengths(lengths: Iterable[int]) -> list[int]:
    return lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)  # plain ints are the fastest sort keys


def _cut(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))
