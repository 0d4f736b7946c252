"""step/order.py beside accelerate 1.15's seedable sampler, torch's RandomSampler, transformers 5.23's length grouping.

Everything is whole numbers, so everything is compared by equality.
Run: python -m pytest tests/step/test_order.py
"""

import random
from itertools import chain

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from nanofinetune.step.order import LengthGroupedBatchSampler, SeedableRandomSampler, SortedBatchSampler, mix


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("accelerate.data_loader", reason="what these tests compare with (extra `test`)")


# ---- orders ---------------------------------------------------------------------------------------------------------


def test_mix_is_a_63_bit_function_of_every_integer_and_its_place():
    seeds = {mix(*key) for key in [(a, b) for a in range(40) for b in range(40)] + [(a,) for a in range(40)]}
    assert len(seeds) == 40 * 41
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61  # the whole range is used
    assert mix(True, 2) == mix(1, 2)


@pytest.mark.parametrize(
    ("n", "replacement", "num_samples"),
    [(1, False, None), (17, False, None), (5, False, 13), (5, True, 70), (40, True, None)],
)
def test_seedable_order_matches_torch_random_sampler(n, replacement, num_samples):
    ours = SeedableRandomSampler(range(n), replacement, num_samples, data_seed=7, epoch=3)
    generator = torch.Generator().manual_seed(mix(7, 3))
    theirs = RandomSampler(range(n), replacement, num_samples, generator)
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)


def test_seedable_order_is_a_pure_function_of_seed_and_epoch():
    sampler = SeedableRandomSampler(range(50), data_seed=1)
    first, again = iter(sampler), iter(sampler)
    next(first)
    torch.rand(3)  # the global generator is of no concern
    order = list(sampler)
    assert list(again) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    resumed = SeedableRandomSampler(range(50))
    resumed.load_state_dict(sampler.state_dict())
    assert sampler.state_dict() == {"data_seed": 1, "epoch": 1}
    assert list(resumed) == list(sampler)


def test_seed_and_epoch_are_not_interchangeable_as_in_accelerate(reference):
    def order(kind, seed, epoch):
        sampler = kind(range(30), data_seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(reference.SeedableRandomSampler, 42, 1) == order(reference.SeedableRandomSampler, 43, 0)
    assert order(SeedableRandomSampler, 42, 1) != order(SeedableRandomSampler, 43, 0)


# ---- lengths --------------------------------------------------------------------------------------------------------


def _padding(batches, lengths):
    """The fraction of a padded epoch that is padding."""
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def _sentence_lengths(n, seed):
    rng = random.Random(seed)
    return [min(128, 8 + int(rng.gammavariate(6, 7))) for _ in range(n)]


@pytest.mark.parametrize("n", [40, 333, 3668])
@pytest.mark.parametrize("batch_size", [8, 32])
def test_length_grouping_pads_no_more_than_transformers(n, batch_size):
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import LengthGroupedSampler

    ours, theirs = 0.0, 0.0
    for seed in range(5):
        lengths = _sentence_lengths(n, seed)
        ours += _padding(LengthGroupedBatchSampler(lengths, batch_size, seed), lengths)
        generator = torch.Generator().manual_seed(seed)
        sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
        theirs += _padding(BatchSampler(sampler, batch_size, False), lengths)
    assert ours <= theirs
    if n > 100:
        shuffled = BatchSampler(SeedableRandomSampler(range(n)), batch_size, False)
        assert ours / 5 < 0.75 * _padding(shuffled, lengths)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 31, 32, 100])
def test_length_grouping_gives_every_row_once_longest_first_short_last(n):
    lengths = _sentence_lengths(n, 0)
    sampler = LengthGroupedBatchSampler(torch.tensor(lengths), 4, seed=5)
    batches = list(sampler)
    assert sorted(chain(*batches)) == list(range(n))
    assert len(batches) == len(sampler)
    assert all(len(batch) == 4 for batch in batches[:-1])  # so BatchSamplerShard takes it
    if n >= 8 and n % 4 == 0:
        assert lengths[batches[0][0]] == max(lengths)


def test_length_grouping_is_a_pure_function_of_seed_and_epoch():
    lengths = _sentence_lengths(100, 0)
    sampler = LengthGroupedBatchSampler(lengths, 4, seed=5)
    order = list(sampler)
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert list(sampler) == list(LengthGroupedBatchSampler(lengths, 4, seed=5, epoch=1))
    assert list(sampler) != list(LengthGroupedBatchSampler(lengths, 4, seed=6, epoch=0))
    maxima = [max(lengths[row] for row in batch) for batch in order]
    assert maxima != sorted(maxima, reverse=True)  # shuffled, not one long descent


@pytest.mark.parametrize("n", [0, 1, 9, 333])
def test_sorted_batches_pad_least_and_fall_in_length(n):
    lengths = _sentence_lengths(n, 1)
    sampler = SortedBatchSampler(lengths, 4)
    rows = list(chain(*sampler))
    assert sorted(rows) == list(range(n))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert len(list(sampler)) == len(sampler)
    if n > 100:
        assert _padding(sampler, lengths) <= _padding(LengthGroupedBatchSampler(lengths, 4), lengths)


def test_a_generator_is_seeded_anew_for_each_epoch_as_accelerates_is():
    reference = pytest.importorskip(
        "accelerate.data_loader", reason="the reference, extra `test`"
    ).SeedableRandomSampler
    for kind in (SeedableRandomSampler, reference):
        generator = torch.Generator().manual_seed(99)
        with_one = kind(data_source=range(9), generator=generator, num_samples=9, data_seed=5)
        first = list(with_one)
        with_one.set_epoch(0)
        assert first == list(with_one) == list(kind(range(9), data_seed=5))
        assert generator.initial_seed() != 99
