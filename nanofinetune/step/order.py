"""In which order an epoch visits the rows of a data set: a pure function of (seed, epoch), the same on every rank.

>>> order = SeedableRandomSampler(range(6), data_seed=0)
>>> list(order), list(order)  # iterating changes nothing: the loader calls set_epoch when an epoch starts
([1, 4, 2, 5, 0, 3], [1, 4, 2, 5, 0, 3])
>>> order.set_epoch(1)
>>> list(order)
[0, 1, 5, 4, 2, 3]
>>> lengths = [3, 9, 5, 9, 1]  # tokens of each row
>>> list(SortedBatchSampler(lengths, batch_size=2))  # for evaluation: the longest first, and little padding
[[1, 3], [2, 0], [4]]

Underneath: `accelerate.data_loader.SeedableRandomSampler` (accelerate 1.15) and
`transformers.trainer_pt_utils.LengthGroupedSampler` (transformers 5.23).
  - There: accelerate seeds with seed + epoch, so (seed 0, epoch 1) is the order of (seed 1, epoch 0); after a `break`
    the next epoch repeats the order.
  - Different: a hash mixes seed and epoch, and the loader moves the epoch on.
  - Different: transformers sorts random blocks of up to 50 batches; here a block is a quarter of the rows, and batches
    are shuffled.

Proof: test_seed_and_epoch_are_not_interchangeable_as_in_accelerate, test_length_grouping_pads_no_more_than_transformers
in tests/step/test_order.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice

import torch
from torch.utils.data import RandomSampler, Sampler


def mix(*ints: int) -> int:
    """Hash integers into one 63-bit seed, so that (seed, epoch + 1) and (seed + 1, epoch) are unrelated.

    >>> mix(42, 1) == mix(42, 1), mix(42, 1) == mix(43, 0), mix(42, 1) == mix(1, 42)
    (True, False, False)
    """
    digest = hashlib.blake2b(",".join(str(int(i)) for i in ints).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SeedableRandomSampler(RandomSampler):
    """A random order, a pure function of (data_seed, epoch): the same on every rank, for any number of ranks.

    Iterating changes nothing: the loader calls `set_epoch` when it *starts* an epoch. With `replacement` and
    `num_samples` it draws as torch's RandomSampler does. A `generator` is seeded anew for each epoch, and draws it.
    Source: `accelerate.data_loader.SeedableRandomSampler`.

    >>> sampler = SeedableRandomSampler(range(5), data_seed=0)
    >>> list(sampler) == list(sampler), sorted(sampler)
    (True, [0, 1, 2, 3, 4])
    """

    def __init__(
        self, data_source: Sized, replacement: bool = False, num_samples: int | None = None,
        generator: torch.Generator | None = None, *, data_seed: int = 42, epoch: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(data_source, replacement, num_samples, generator)
        self.data_seed = data_seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # underneath: accelerate seeds with seed + epoch, and increments epoch at the end, which `break` never reaches
        generator = (self.generator or torch.Generator()).manual_seed(mix(self.data_seed, self.epoch))
        n = len(self.data_source)
        if self.replacement:
            return iter(torch.randint(n, (self.num_samples,), generator=generator, device="cpu").tolist())
        passes = -(-self.num_samples // n)
        order = chain.from_iterable(
            torch.randperm(n, generator=generator, device="cpu").tolist() for _ in range(passes)
        )
        return islice(order, self.num_samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Everything the order depends on: {"data_seed", "epoch"}."""
        return {"data_seed": self.data_seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from what `state_dict` returned."""
        self.data_seed, self.epoch = state["data_seed"], state["epoch"]


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches of rows of similar length, in random order: a pure function of (seed, epoch), every row exactly once.

    The rows are shuffled and cut into four blocks. Each block is sorted by length and cut into batches, and all batches
    are shuffled. The longest one comes first, so that running out of memory shows in the first step; the short one, if
    there is one, comes last.

    On N ranks give it the global batch size and shard it with `split_batches=True`. Then the N batches of one step have
    similar lengths, and hold the same rows as the one batch of a single process.

    Args:
        lengths: the number of tokens of each row.
        batch_size: in rows.

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
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
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
        """Choose the epoch whose batches the next iteration yields."""
        self.epoch = epoch


class SortedBatchSampler(Sampler[list[int]]):
    """Batches from the longest rows to the shortest, for evaluation: the least padding that batches can have.

    Running out of memory shows in the first batch.

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


def _lengths(lengths: Iterable[int]) -> list[int]:
    return lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)  # plain ints are the fastest sort keys


def _cut(rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """`rows` in lists of `size`; the last one may be shorter."""
    stream = iter(rows)
    while part := list(islice(stream, size)):
        yield part
