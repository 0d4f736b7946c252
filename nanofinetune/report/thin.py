"""A log of any length in a few hundred buckets, which keep the lowest, the mean and the highest value.

>>> thinned = Thinned(columns=1, most=2)
>>> for loss in (1.0, 1.0, 1.0, 9.0, 1.0, 1.0):
...     thinned.add(np.array([[loss]]))
>>> buckets = thinned.buckets()
>>> buckets.high.ravel().tolist(), buckets.mean.ravel().tolist()  # the 9 is still there
([1.0, 9.0, 1.0], [1.0, 5.0, 1.0])

Underneath: `transformers.TrainingArguments` (transformers 5.23) has `logging_steps`: each 500th update is logged, as
the mean of those since the one before.
  - A mean hides the one update whose loss was a hundred times the others'. Here a bucket keeps its extremes.
  - How long a log is shows at its end. Buckets are as narrow as they can be, and join in pairs when they are too many.

Proof: test_buckets_are_numpys_of_the_whole_log, test_memory_does_not_grow_with_the_log in tests/report/test_thin.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


class Buckets(NamedTuple):
    """What is left of the columns: each table is (buckets, columns). NaN counts as nothing."""

    low: Table
    high: Table
    total: Table
    known: Table  # of values that are not NaN

    @property
    def mean(self) -> Table:
        return np.divide(self.total, self.known, out=np.full_like(self.total, np.nan), where=self.known > 0)


class Thinned:
    """Rows of numbers in the order in which they come. Its memory is that of `most` buckets, twice.

    Args:
        columns: numbers of a row.
        most: buckets. There are up to twice as many, and more than that only for a moment.
    """

    def __init__(self, columns: int, most: int = 400) -> None:
        self.most, self.width = most, 1  # rows of a bucket
        self._rest = np.empty((0, columns))  # rows that do not fill a bucket yet
        self._full = _joined(np.empty((0, columns)), 1)

    def add(self, rows: Table) -> None:
        """Add rows (n, columns)."""
        rows = np.concatenate([self._rest, rows])
        while len(rows) >= self.width:
            room = 2 * self.most - len(self._full.low)
            taken = min(room, len(rows) // self.width) * self.width
            self._full = _behind(self._full, _joined(rows[:taken], self.width))
            rows = rows[taken:]
            if len(self._full.low) == 2 * self.most:
                self._halve()
        self._rest = rows.copy()  # a copy: a part would keep the whole in memory

    def buckets(self) -> Buckets:
        """All buckets; the last one may hold fewer rows."""
        return _behind(self._full, _joined(self._rest, len(self._rest))) if len(self._rest) else self._full

    def _halve(self) -> None:
        """Join neighbours: an even number of buckets, all of one width."""
        low, high, total, known = self._full
        self._full = Buckets(
            np.fmin(low[::2], low[1::2]), np.fmax(high[::2], high[1::2]), total[::2] + total[1::2],
            known[::2] + known[1::2],
        )  # fmt: skip
        self.width *= 2


def _behind(one: Buckets, other: Buckets) -> Buckets:
    return Buckets(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


def _joined(rows: Table, width: int) -> Buckets:
    """Rows (buckets * width, columns) as buckets of that width."""
    grouped = rows.reshape(len(rows) // width, width, rows.shape[-1])
    there = ~np.isnan(grouped)
    return Buckets(
        np.fmin.reduce(grouped, axis=1), np.fmax.reduce(grouped, axis=1),
        np.where(there, grouped, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64),
    )  # fmt: skip
