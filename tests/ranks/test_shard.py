"""ranks/shard.py beside accelerate 1.15's BatchSamplerShard, IterableDatasetShard and SkipBatchSampler.

Everything is whole numbers, so everything is compared by equality; every rank is computed in this one process.
Run: python -m pytest tests/ranks/test_shard.py
"""

import math
from itertools import chain

import pytest
from torch.utils.data import BatchSampler, IterableDataset

from nanofinetune.ranks.shard import PADDING, BatchSamplerShard, IterableDatasetShard, SkipBatchSampler, shard

SIZES, BATCH_SIZES, WORLDS = range(26), range(1, 5), range(1, 5)


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("accelerate.data_loader", reason="what these tests compare with (extra `test`)")


class VaryingBatches:
    """A batch sampler without `batch_size`: batch i has i % 3 + 1 rows."""

    def __init__(self, batches: int):
        starts = range(0, 3 * batches, 3)
        self.batches = [list(range(start, start + number % 3 + 1)) for number, start in enumerate(starts)]

    def __iter__(self):
        return iter([list(batch) for batch in self.batches])

    def __len__(self):
        return len(self.batches)


# ---- shards of batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("even_batches", [True, False])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_match_accelerate(reference, drop_last, split_batches, even_batches):
    compared = 0
    for n in SIZES:
        for batch_size in BATCH_SIZES:
            for world in WORLDS:
                if split_batches and batch_size % world:
                    continue
                for rank in range(world):
                    batches = BatchSampler(range(n), batch_size, drop_last)
                    ours = BatchSamplerShard(batches, world, rank, split_batches, even_batches)
                    theirs = reference.BatchSamplerShard(batches, world, rank, split_batches, even_batches)
                    case = (n, batch_size, world, rank)
                    assert list(ours) == list(theirs), case
                    assert len(ours) == len(theirs), case
                    assert ours.total_length == theirs.total_length, case
                    compared += 1
    assert compared >= 26 * 9


@pytest.mark.parametrize("even_batches", [True, False])
def test_dynamic_shards_match_accelerate(reference, even_batches):
    for count in range(12):
        for world in WORLDS:
            for rank in range(world):
                ours = BatchSamplerShard(VaryingBatches(count), world, rank, even_batches=even_batches)
                theirs = reference.BatchSamplerShard(VaryingBatches(count), world, rank, even_batches=even_batches)
                assert list(ours) == list(theirs), (count, world, rank)
                assert len(ours) == len(theirs), (count, world, rank)


def test_length_is_the_number_of_batches_except_where_accelerate_miscounts_too():
    for split_batches, even_batches in [(False, True), (False, False), (True, True), (True, False)]:
        for n in SIZES:
            for rank in range(2):
                batches = BatchSampler(range(n), 4, False)
                ours = BatchSamplerShard(batches, 2, rank, split_batches, even_batches)
                if split_batches and not even_batches and 0 < n % 4 <= 2 * rank:  # no row of the last batch is left
                    assert len(ours) == len(list(ours)) + 1
                else:
                    assert len(ours) == len(list(ours))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_split_that_does_not_divide_raises_in_both(reference, batch_size):
    batches = VaryingBatches(3) if batch_size is None else BatchSampler(range(9), batch_size, False)
    with pytest.raises(ValueError, match="round multiple of the number of processes"):
        reference.BatchSamplerShard(batches, 2, 0, split_batches=True)
    with pytest.raises(ValueError, match=f"2 equal parts and batch_size is {batch_size}: it must be a multiple of 2"):
        BatchSamplerShard(batches, 2, 0, split_batches=True)


def test_a_short_batch_in_the_middle_raises_where_accelerate_loses_rows(reference):
    class ShortInTheMiddle(list):
        batch_size = 2

    batches = ShortInTheMiddle([[0, 1], [2], [3, 4], [5, 6]])
    theirs = [row for rank in (0, 1) for batch in reference.BatchSamplerShard(batches, 2, rank) for row in batch]
    assert sorted(theirs) == [3, 4, 5, 6]  # 0, 1, 2 are gone
    with pytest.raises(ValueError, match="batch 1 has 1 rows and batch_size is 2: only the last batch may differ"):
        list(BatchSamplerShard(batches, 2, 0))
    with pytest.raises(ValueError, match="batch 0 has 3 rows and batch_size is 2"):
        list(BatchSamplerShard(ShortInTheMiddle([[0, 1, 2]]), 2, 0))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_processes": 2, "process_index": 2}, "process_index is 2: it must be from 0 to num_processes - 1 = 1"),
        ({"uneven": "drop"}, "uneven is 'drop': it must be 'wrap' or 'mask'"),
        ({"uneven": "mask", "even_batches": False}, "choose one"),
    ],
)
def test_contradictions_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        BatchSamplerShard(BatchSampler(range(4), 2, False), **arguments)


# ---- padding rows: uneven="mask" ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_mask_holds_exactly_the_single_process_batches(drop_last, split_batches):
    for n in SIZES:
        for per_rank in BATCH_SIZES:
            for world in WORLDS:
                total = per_rank * world
                alone = list(BatchSampler(range(n), total, drop_last))
                batches = BatchSampler(range(n), total if split_batches else per_rank, drop_last)
                shards = [BatchSamplerShard(batches, world, r, split_batches, uneven="mask") for r in range(world)]
                assert all(len(one) == len(alone) for one in shards), (n, per_rank, world)
                for single, *parts in zip(alone, *shards, strict=True):
                    # equal shapes, spread evenly: at least one row each, and no more than the largest share needs
                    assert {len(part) for part in parts} == {math.ceil(len(single) / world)}
                    gathered = list(chain(*parts))
                    assert gathered[: len(single)] == single  # in order, so trimming the tail is enough
                    assert set(gathered[len(single) :]) <= {PADDING}


def test_mask_gives_missing_dynamic_batches_one_padding_row():
    shards = [list(BatchSamplerShard(VaryingBatches(4), 3, rank, uneven="mask")) for rank in range(3)]
    assert shards == [[[0], [9]], [[3, 4], [PADDING]], [[6, 7, 8], [PADDING]]]


def test_shard_reads_no_further_than_the_step_it_gives():
    stream = iter(range(100))
    assert next(shard(stream, 2, 3, 1)) == [2, 3]
    assert next(stream) == 6


# ---- skipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1, 3, 9])
def test_skipped_batches_match_accelerate(reference, skip):
    batches = BatchSampler(range(10), 3, False)
    # a comprehension, since list() asks accelerate's for its length, which is negative where all is skipped
    assert list(SkipBatchSampler(batches, skip)) == [batch for batch in reference.SkipBatchSampler(batches, skip)]  # noqa: C416
    assert len(SkipBatchSampler(batches, skip)) == len(list(batches)[skip:])
    assert SkipBatchSampler(batches, skip).total_length == len(batches)


def test_skip_keeps_what_accelerate_loses(reference):
    batches = BatchSamplerShard(BatchSampler(range(10), 3, True), 2, 0)
    ours, theirs = SkipBatchSampler(batches, 1), reference.SkipBatchSampler(batches, 1)
    assert (ours.batch_size, ours.drop_last, ours.num_processes, ours.split_batches) == (3, True, 2, False)
    assert not any(hasattr(theirs, name) for name in ("batch_size", "drop_last", "num_processes"))
    with pytest.raises(ValueError, match="should return >= 0"):
        len(reference.SkipBatchSampler(batches, 5))
    assert len(SkipBatchSampler(batches, 5)) == 0
    with pytest.raises(ValueError, match="skip_batches is -1: it must be 0 or more"):
        SkipBatchSampler(batches, -1)


# ---- streams --------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n
        self.epoch = None

    def __iter__(self):
        return iter(range(self.n))

    def __len__(self):
        return self.n

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_iterable_shards_match_accelerate(reference, drop_last, split_batches):
    for n in SIZES:
        for batch_size in BATCH_SIZES:
            for world in WORLDS:
                if split_batches and batch_size % world:
                    continue
                for rank in range(world):
                    ours = IterableDatasetShard(Stream(n), batch_size, drop_last, world, rank, split_batches)
                    theirs = reference.IterableDatasetShard(
                        Stream(n), batch_size, drop_last, world, rank, split_batches
                    )
                    case = (n, batch_size, world, rank)
                    assert list(ours) == list(theirs), case
                    assert len(ours) == len(list(ours)), case
                    if not split_batches:
                        assert len(ours) == len(theirs), case


def test_iterable_split_where_accelerate_miscounts_and_loses_everything(reference):
    theirs = reference.IterableDatasetShard(Stream(4), 4, False, 2, 0, True)
    assert (len(theirs), len(list(theirs))) == (4, 2)
    # batch_size 1 on two ranks: each keeps 1 // 2 = 0 rows of every batch
    assert [list(reference.IterableDatasetShard(Stream(4), 1, False, 2, rank, True)) for rank in (0, 1)] == [[], []]
    with pytest.raises(ValueError, match="2 equal parts and batch_size is 1: it must be a multiple of 2"):
        IterableDatasetShard(Stream(4), 1, False, 2, 0, True)


def test_iterable_shard_passes_the_epoch_on():
    stream = Stream(3)
    IterableDatasetShard(stream).set_epoch(4)
    assert stream.epoch == 4
    IterableDatasetShard([1, 2]).set_epoch(4)  # what knows no epochs is left alone
