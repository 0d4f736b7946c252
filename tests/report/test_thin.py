"""Buckets of a log are numpy's minimum, mean and maximum of the whole log, however it arrives.

python -m pytest tests/report/test_thin.py
"""

import numpy as np
import pytest

from nanofinetune.report.thin import Thinned

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(1, 700), max_size=8), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_buckets_are_numpys_of_the_whole_log(sizes, most, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(size, 2)) for size in sizes]
    for part in parts:
        part[rng.random(part.shape) < 0.2] = np.nan
    thinned = Thinned(2, most)
    for part in parts:
        thinned.add(part)
    buckets, whole = thinned.buckets(), np.concatenate([np.empty((0, 2)), *parts])
    assert len(buckets.low) <= 2 * most
    for k in range(len(buckets.low)):
        rows = whole[k * thinned.width : (k + 1) * thinned.width]
        for column in range(2):
            values = rows[:, column][~np.isnan(rows[:, column])]
            found = [table[k, column] for table in (buckets.low, buckets.mean, buckets.high)]
            wanted = [values.min(), values.mean(), values.max()] if len(values) else [np.nan] * 3
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
            assert buckets.known[k, column] == len(values)
    assert thinned.width * len(buckets.low) >= len(whole), "every row is in a bucket"


def test_memory_does_not_grow_with_the_log():
    thinned = Thinned(6, most=100)
    for _ in range(50):
        thinned.add(np.ones((4000, 6)))
    assert len(thinned.buckets().low) <= 200
    assert thinned.buckets().known[:, 0].sum() == 200_000
    assert len(thinned._rest) < thinned.width


def test_a_spike_survives_where_a_mean_every_500_updates_hides_it():
    """`logging_steps=500` of transformers' Trainer is a mean; a loss of 50 in one update of 100,000 is 0.6 in it."""
    losses = np.full(100_000, 0.5)
    losses[31_234] = 50.0
    assert losses.reshape(-1, 500).mean(axis=1).max() < 0.6
    thinned = Thinned(1)
    thinned.add(losses[:, None])
    assert thinned.buckets().high.max() == 50.0
