"""ranks/loader.py beside accelerate 1.15's prepare_data_loader, DataLoaderShard and skip_first_batches.

Both take rank and number of ranks as integers, so every rank is computed in this one process and compared by equality.
Run: python -m pytest tests/ranks/test_loader.py
"""

import collections
import contextlib
import copy
import os
import pickle

import pytest
import torch
from helpers import run_ranks, run_world
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from nanofinetune import Accelerator
from nanofinetune.ranks.loader import (
    DataLoaderShard,
    look_ahead,
    prepare_data_loader,
    send_to_device,
    skip_first_batches,
)
from nanofinetune.settings import DataLoaderConfiguration
from nanofinetune.step.order import LengthGroupedBatchSampler, SeedableRandomSampler, SortedBatchSampler, mix


@pytest.fixture
def reference():
    module = pytest.importorskip("accelerate.data_loader", reason="what these tests compare with (extra `test`)")
    from accelerate.state import GradientState, PartialState

    PartialState(cpu=True)  # accelerate's loaders want its global state
    yield module
    GradientState._reset_state()
    PartialState._reset_state()


# Untyped on purpose: torch's DataLoader takes tensors and lists as data sets, but its annotations do not say so.
def plain(dataset, **settings):
    return DataLoader(dataset, **settings)


def prepare(dataloader, *arguments, **settings):
    return prepare_data_loader(dataloader, *arguments, **settings)


def skip(dataloader, count):
    return skip_first_batches(dataloader, count)


def theirs_prepared(reference, dataloader, **arguments):
    return reference.prepare_data_loader(dataloader, dispatch_batches=False, **arguments)


class Rows(Dataset):
    """n rows {"input_ids": [i, i], "labels": i % 2}; counts what is read."""

    def __init__(self, n):
        self.n = n
        self.read = []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        assert 0 <= index < self.n  # an index of -1 must not get this far
        self.read.append(index)
        return {"input_ids": torch.tensor([index, index]), "labels": index % 2}


class ManyRows(Rows):
    """Gives a whole batch at once, already collated, as a flat token store does."""

    def __getitems__(self, indices):
        rows = torch.tensor(indices)
        assert rows.min() >= 0
        return {"input_ids": rows[:, None].expand(-1, 2), "labels": rows % 2}

    __getitem__ = None  # type: ignore[assignment]


class Stream(IterableDataset):
    def __init__(self, n, generator=None):
        self.n = n
        self.generator = generator

    def __iter__(self):
        order = torch.arange(self.n) if self.generator is None else torch.randperm(self.n, generator=self.generator)
        return iter(order.tolist())


class SizedStream(Stream):
    def __len__(self):
        return self.n


def as_is(batch):
    return batch


def lists(loader):
    return [batch.tolist() for batch in loader]


def ranks(dataloader, world, **arguments):
    return [prepare(dataloader, num_processes=world, process_index=r, **arguments) for r in range(world)]


# ---- which rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("even_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_match_accelerate(reference, world, split_batches, even_batches, drop_last):
    for n in (0, 1, 5, 12, 13, 23, 24):
        for batch_size in {1, 3, 4, 12} if not split_batches else {world, 12}:
            dataloader = plain(torch.arange(n), batch_size=batch_size, drop_last=drop_last)
            for rank in range(world):
                arguments = {
                    "num_processes": world, "process_index": rank, "split_batches": split_batches,
                    "even_batches": even_batches,
                }  # fmt: skip
                ours = prepare(dataloader, **arguments)
                theirs = theirs_prepared(reference, dataloader, **arguments)
                case = (n, batch_size, rank)
                assert len(ours) == len(theirs), case
                assert ours.total_batch_size == theirs.total_batch_size, case
                assert ours.total_dataset_length == theirs.total_dataset_length, case
                expected = [(batch.tolist(), theirs.end_of_dataloader, theirs.remainder) for batch in theirs]
                if drop_last:  # -1 there, 0 here: nothing is to be trimmed
                    expected = [(rows, end, {-1: 0}[remainder]) for rows, end, remainder in expected]
                assert [(batch.tolist(), ours.end_of_dataloader, ours.remainder) for batch in ours] == expected, case


@pytest.mark.parametrize("as_sampler", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_custom_batch_samplers_match_accelerate(reference, world, as_sampler):
    class Varying:
        def __iter__(self):
            return iter([[0], [1, 2], [3, 4, 5], [6], [7, 8]])

        def __len__(self):
            return 5

    data = torch.arange(10)
    samplers = [BatchSampler(range(10), 3, False), Varying(), SortedBatchSampler(range(10), 4)]
    for sampler in samplers[:1] if as_sampler else samplers:
        settings = {"sampler": sampler, "batch_size": None} if as_sampler else {"batch_sampler": sampler}
        for rank in range(world):
            arguments = {"num_processes": world, "process_index": rank}
            ours = prepare(plain(data, **settings), **arguments)
            if as_sampler and world == 1:
                with pytest.raises(TypeError, match="multiple values for keyword argument 'batch_size'"):
                    theirs_prepared(reference, plain(data, **settings), **arguments)
                assert lists(ours) == lists(plain(data, **settings))
                continue
            theirs = theirs_prepared(reference, plain(data, **settings), **arguments)
            assert lists(ours) == lists(theirs)
            assert len(ours) == len(theirs)
    varying = prepare(plain(data, batch_sampler=Varying()), num_processes=2)
    assert (varying.total_batch_size, varying.remainder) == (None, -1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_iterable_batches_match_accelerate(reference, world, split_batches, drop_last):
    for n in (0, 1, 7, 12, 20):
        for kind in (Stream, SizedStream):
            dataloader = plain(kind(n), batch_size=6, drop_last=drop_last)
            for rank in range(world):
                arguments = {"num_processes": world, "process_index": rank, "split_batches": split_batches}
                ours = prepare(dataloader, **arguments)
                theirs = theirs_prepared(reference, dataloader, **arguments)
                expected = [(batch.tolist(), theirs.end_of_dataloader) for batch in theirs]
                assert [(batch.tolist(), ours.end_of_dataloader) for batch in ours] == expected
                if kind is SizedStream:
                    assert len(ours) == len(expected)


def test_stream_knows_its_remainder_where_accelerate_does_not(reference):
    dataloader = plain(SizedStream(7), batch_size=2)
    arguments = {"num_processes": 2, "process_index": 0}
    theirs = theirs_prepared(reference, dataloader, **arguments)
    ours = prepare(dataloader, **arguments)
    assert [theirs.remainder for _ in theirs] == [0, 0]  # so nobody trims the repeated row
    assert (ours.remainder, ours.total_batch_size, ours.total_dataset_length) == (3, 4, 7)
    assert prepare(plain(Stream(7), batch_size=2), **arguments).remainder == -1
    assert prepare(plain(SizedStream(7), batch_size=2, drop_last=True), **arguments).remainder == 0


def test_hub_data_sets_load_alike(reference):
    datasets = pytest.importorskip("datasets")
    columns = datasets.Dataset.from_dict({"x": list(range(11))})
    for data in (columns.with_format("torch"), columns.to_iterable_dataset().with_format("torch")):
        for rank in (0, 1):
            dataloader = plain(data, batch_size=2)
            arguments = {"num_processes": 2, "process_index": rank}
            ours, theirs = (
                prepare(dataloader, **arguments),
                theirs_prepared(reference, dataloader, **arguments),
            )
            assert [batch["x"].tolist() for batch in ours] == [batch["x"].tolist() for batch in theirs]


def test_worker_processes_give_the_same_batches():
    dataset = Rows(11)
    alone = [batch["input_ids"].tolist() for batch in ranks(plain(dataset, batch_size=2), 2, uneven="mask")[1]]
    dataloader = plain(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    loader = ranks(dataloader, 2, uneven="mask")[1]
    assert loader.num_workers == 2
    assert [(batch["input_ids"].tolist(), loader.valid_rows) for batch in loader] == [
        (rows, valid) for rows, valid in zip(alone, [2, 2, 1], strict=True)
    ]


def prepared_by_itself():
    """On each rank: what both libraries give where nobody says how many ranks there are."""
    from accelerate import PartialState
    from accelerate.data_loader import prepare_data_loader as theirs

    torch.distributed.init_process_group("gloo")
    assert PartialState(cpu=True).num_processes == 2
    dataloader = plain(torch.arange(11), batch_size=2)
    ours = lists(prepare(dataloader))
    ours_of_three = lists(prepare(dataloader, num_processes=3))
    by_theirs = lists(theirs(dataloader)), lists(theirs(dataloader, num_processes=3))
    assert (ours, ours_of_three) == by_theirs
    torch.distributed.destroy_process_group()
    return ours, lists(prepare(dataloader))  # without a group, under torchrun's variables


def test_ranks_share_the_rows_where_nobody_says_how_many_they_are_as_in_accelerate(reference):
    (zero, zero_before), (one, one_before) = run_ranks(prepared_by_itself, 2)
    assert (zero, one) == tuple(lists(loader) for loader in ranks(plain(torch.arange(11), batch_size=2), 2))
    assert (zero_before, one_before) == (zero, one)


# ---- order ----------------------------------------------------------------------------------------------------------


def test_shuffled_order_is_the_same_for_every_number_of_ranks_and_ignores_the_global_generator():
    dataloader = plain(torch.arange(24), batch_size=2, shuffle=True)
    torch.manual_seed(3)
    alone = lists(prepare(dataloader, data_seed=5))
    for world in (2, 3, 4):
        torch.manual_seed(world)
        parts = [lists(loader) for loader in ranks(dataloader, world, data_seed=5)]
        assert [batch for step in zip(*parts, strict=True) for batch in step] == alone
    assert [row for batch in alone for row in batch] == list(SeedableRandomSampler(range(24), data_seed=5))
    assert type(dataloader.sampler) is RandomSampler  # the user's loader stays as it is


def test_seed_comes_from_the_argument_the_generator_or_torch():
    def order(**settings):
        data_seed = settings.pop("data_seed", None)
        return lists(prepare(plain(torch.arange(24), shuffle=True, **settings), data_seed=data_seed))

    expected = [[row] for row in SeedableRandomSampler(range(24), data_seed=5)]
    assert order(data_seed=5) == expected
    assert order(generator=torch.Generator().manual_seed(5)) == expected
    torch.manual_seed(5)
    assert order() == expected


def shuffled_by_rank_0s_seed(world):
    torch.manual_seed(world.rank)
    loader: DataLoader = DataLoader(torch.arange(8), shuffle=True, batch_size=2)  # type: ignore[arg-type]
    return [batch.tolist() for batch in prepare_data_loader(loader)]


def test_ranks_in_a_group_shuffle_alike_without_a_seed_as_in_accelerate():
    """Together they see each row once, though their own seeds differ."""
    zero, one = run_world(shuffled_by_rank_0s_seed, 2)
    assert sorted(row for rows in zero + one for row in rows) == list(range(8))


def test_shuffling_on_several_ranks_without_a_common_seed_is_refused():
    with pytest.raises(ValueError, match="data_seed is None: every rank must draw the same order"):
        prepare(plain(torch.arange(4), shuffle=True), num_processes=2)


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(0, 24, 2)), WeightedRandomSampler([1.0] * 24, 12)],
    ids=lambda s: type(s).__name__,
)
def test_other_random_samplers_are_kept_and_draw_alike_on_every_rank(sampler):
    dataloader = plain(torch.arange(24), batch_size=2, sampler=sampler)
    alone = prepare(dataloader, data_seed=1)
    expected = lists(alone)
    assert lists(alone) != expected  # another epoch
    loaders = ranks(dataloader, 2, data_seed=1)
    for loader in loaders:
        loader.set_epoch(0)
    parts = [lists(loader) for loader in loaders]
    assert [batch for step in zip(*parts, strict=True) for batch in step] == expected
    assert type(loaders[0].batch_sampler.batch_sampler.sampler) is type(sampler)
    assert sampler.generator is None  # the user's sampler stays as it is
    generator = torch.Generator().manual_seed(mix(1, 0))
    if isinstance(sampler, SubsetRandomSampler):
        drawn = list(SubsetRandomSampler(sampler.indices, generator))
    else:
        drawn = list(WeightedRandomSampler([1.0] * 24, 12, generator=generator))
    assert [row for batch in expected for row in batch] == drawn


def two_orders(accelerator, make, sources=(None, None)):
    """The rows of two prepared loaders in lock-step, over two epochs: [(of one, of the other), ...] of each epoch."""
    first, second = accelerator.prepare(*(plain(torch.arange(24), batch_size=4, **make(each)) for each in sources))
    return [[(x.tolist(), y.tolist()) for x, y in zip(first, second, strict=True)] for _ in range(2)]


def paired(epochs):
    """In how many batches of all epochs the two loaders gave the same rows."""
    return sum(x == y for epoch in epochs for x, y in epoch)


RANDOM = {
    "shuffled": lambda generator: {"shuffle": True, "generator": generator},
    "subset": lambda generator: {"sampler": SubsetRandomSampler(range(24), generator)},
    "weighted": lambda generator: {"sampler": WeightedRandomSampler([1.0] * 24, 24, generator=generator)},
}


@pytest.mark.parametrize("kind", RANDOM)
def test_two_loaders_do_not_walk_in_lock_step_as_in_accelerate(reference, kind):
    from accelerate import Accelerator as Theirs

    torch.manual_seed(7)
    ours, theirs = (two_orders(make(cpu=True), RANDOM[kind]) for make in (Accelerator, Theirs))
    assert paired(ours) == paired(theirs) == 0
    torch.manual_seed(7)  # the same in another process, and the first loader is as if it were alone
    assert two_orders(Accelerator(cpu=True), RANDOM[kind]) == ours
    torch.manual_seed(7)
    alone = prepare(plain(torch.arange(24), batch_size=4, **RANDOM[kind](None)))
    assert [[x for x, _ in epoch] for epoch in ours] == [lists(alone), lists(alone)]
    config = DataLoaderConfiguration(data_seed=7)
    assert two_orders(Accelerator(cpu=True, dataloader_config=config), RANDOM[kind]) == ours


@pytest.mark.parametrize("kind", RANDOM)
def test_generators_that_were_seeded_alike_pair_rows_as_in_accelerate(reference, kind):
    from accelerate import Accelerator as Theirs

    for make in (Accelerator, Theirs):
        each = [torch.Generator().manual_seed(5) for _ in range(2)]
        assert paired(two_orders(make(cpu=True), RANDOM[kind], each)) == 12
        assert paired(two_orders(make(cpu=True), RANDOM[kind], each[:1] * 2)) == 0  # they share one


def test_a_further_loaders_order_outlives_a_copy_a_checkpoint_and_free_memory():
    def shuffled(accelerator, count):
        return accelerator.prepare(*(plain(torch.arange(24), batch_size=4, shuffle=True) for _ in range(count)))

    torch.manual_seed(7)
    accelerator = Accelerator(cpu=True)
    loader = shuffled(accelerator, 3)[2]
    copies = copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))
    saved = loader.state_dict()
    epochs = [lists(loader), lists(loader)]
    for again in copies:
        assert [lists(again), lists(again)] == epochs
    torch.manual_seed(8)
    other = shuffled(Accelerator(cpu=True), 1)  # of another number, in a process with another seed
    other.load_state_dict(saved)
    assert lists(skip(other, 2)) == epochs[0][2:] and lists(other) == epochs[1]
    torch.manual_seed(7)
    accelerator.free_memory()
    assert lists(shuffled(accelerator, 3)[2]) == epochs[0]


def two_orders_of_this_rank():
    torch.manual_seed(7 + int(os.environ["RANK"]))
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    return two_orders(accelerator, RANDOM["shuffled"])


def test_ranks_number_their_loaders_alike():
    zero, one = run_ranks(two_orders_of_this_rank, 2)
    torch.manual_seed(7)
    whole = two_orders(Accelerator(cpu=True), RANDOM["shuffled"])
    for parts, epoch in zip(zip(zero, one, strict=True), whole, strict=True):
        assert [(a + c, b + d) for (a, b), (c, d) in zip(*parts, strict=True)] == epoch


class Drawn(torch.utils.data.Sampler):
    """Shuffles with torch's global generator."""

    def __len__(self):
        return 24

    def __iter__(self):
        return iter(torch.randperm(24).tolist())


def drawn_by_both(rng_types):
    """Two epochs of this rank, whose random state is its own: here and in accelerate."""
    from accelerate import Accelerator as Theirs

    found = []
    for make in (Accelerator, Theirs):
        accelerator = make(cpu=True, rng_types=rng_types)
        loader = accelerator.prepare(plain(torch.arange(24), batch_size=4, sampler=Drawn()))
        torch.manual_seed(7 + accelerator.process_index)
        found.append([[row for rows in lists(loader) for row in rows] for _ in range(2)])
    return found


@pytest.mark.parametrize("rng_types", [None, ["torch", "generator"]], ids=["default", "torch"])
def test_a_sampler_that_draws_from_torch_matches_accelerate(rng_types):
    """Only with "torch" among rng_types do ranks of different random states share one order."""
    pytest.importorskip("accelerate", reason="what this is compared with")
    (ours, theirs), (ours_1, theirs_1) = run_ranks(drawn_by_both, 2, rng_types)
    assert (ours, ours_1) == (theirs, theirs_1)
    for zero, one in zip(ours, ours_1, strict=True):
        assert (sorted(zero + one) == list(range(24))) == (rng_types is not None)
    loader = prepare(plain(torch.arange(24), sampler=Drawn()), num_processes=2, rng_types=rng_types)
    assert skip(loader, 1).rng_types == loader.rng_types == (["torch"] if rng_types else [])


def test_stream_that_shuffles_is_reseeded_each_epoch_on_every_rank():
    def loaders():
        return [
            prepare(plain(Stream(8, torch.Generator()), batch_size=2), None, 2, rank, data_seed=9) for rank in range(2)
        ]

    first = [lists(loader) for loader in loaders()]
    assert sorted(row for part in first for batch in part for row in batch) == list(range(8))
    again = loaders()
    assert [lists(loader) for loader in again] == first
    assert [lists(loader) for loader in again] != first


def test_break_repeats_the_order_in_accelerate_only(reference):
    dataloader = plain(torch.arange(10), batch_size=2, shuffle=True)
    ours = prepare(dataloader, data_seed=42)
    theirs = theirs_prepared(reference, dataloader, data_seed=42, use_seedable_sampler=True)

    def first_batch(loader):
        for batch in loader:
            return batch.tolist()

    def order(epoch):
        return [*SeedableRandomSampler(range(10), data_seed=42, epoch=epoch)]

    def whole(loader):
        return [row for batch in lists(loader) for row in batch]

    their_orders = whole(theirs), whole(theirs)
    assert their_orders[0] != their_orders[1]  # an epoch that ends moves it on
    broken = first_batch(theirs)
    assert broken != their_orders[1][:2] and whole(theirs)[:2] == broken
    assert (first_batch(ours), whole(ours), first_batch(ours), ours.iteration) == (
        order(0)[:2], order(1), order(2)[:2], 3,
    )  # fmt: skip
    torch.manual_seed(42)  # accelerate's default, a sampler that draws a new seed each time, is not concerned
    default = theirs_prepared(reference, plain(torch.arange(1000), batch_size=2, shuffle=True))
    assert first_batch(default) != first_batch(default)


def test_set_epoch_reaches_the_batch_sampler_that_accelerate_misses(reference):
    class Epochs(Rows):
        def set_epoch(self, epoch):
            self.epoch = epoch

    grouped = LengthGroupedBatchSampler(range(1, 13), 2, seed=3)
    dataset = Epochs(12)
    loader = ranks(plain(dataset, batch_sampler=grouped), 2)[0]
    loader.set_epoch(4)
    assert (loader.iteration, grouped.epoch, dataset.epoch) == (4, 4, 4)
    assert len(list(loader)) == 3
    assert (loader.iteration, grouped.epoch, dataset.epoch) == (5, 4, 4)

    theirs = theirs_prepared(reference, plain(Rows(12), batch_sampler=grouped), num_processes=2, process_index=0)
    theirs.set_epoch(7)
    assert grouped.epoch == 4  # it stays in that epoch for good


# ---- where the iteration stands -------------------------------------------------------------------------------------


def test_look_ahead_fetches_one_and_only_one_ahead():
    source = iter(range(3))
    pairs = look_ahead(source)
    assert next(pairs) == (0, False)
    assert next(source) == 2
    assert list(pairs) == [(1, True)]
    assert list(look_ahead([])) == []


def test_remainder_counts_what_the_sampler_draws(reference):
    sampler = SubsetRandomSampler(range(5), torch.Generator())
    dataloader = plain(torch.arange(12), batch_size=2, sampler=sampler)
    theirs = theirs_prepared(reference, dataloader, num_processes=2, process_index=0)
    assert [theirs.remainder for _ in theirs] == [0, 0]  # 12 % 4, though 5 rows are drawn and 3 are repeated
    assert ranks(dataloader, 2)[0].remainder == 5 % 4
    # a batch sampler that drops: nothing is repeated, yet accelerate would trim the last step to 10 % 4 rows
    dataloader = plain(torch.arange(10), batch_sampler=BatchSampler(range(10), 4, True))
    theirs = theirs_prepared(reference, dataloader)
    assert [theirs.remainder for _ in theirs] == [2, 2]
    assert prepare(dataloader).remainder == 0


def test_flags_are_live_in_the_loop_and_clean_after_it():
    loader = prepare(plain(torch.arange(5), batch_size=2))

    def state():
        return loader.end_of_dataloader, loader.valid_rows

    assert [(state()) for _ in loader] == [(False, 2), (False, 2), (True, 1)]
    assert state() == (False, None)
    for batch in loader:
        if 4 in batch:
            assert state() == (True, 1)
            break
    assert state() == (False, None)
    with pytest.raises(KeyError):
        for _ in loader:
            raise KeyError
    assert state() == (False, None)
    assert len(list(loader)) == 3


def test_an_error_in_the_data_set_leaves_the_loader_clean():
    class Broken(Rows):
        def __getitem__(self, index):
            if index == 3:
                raise RuntimeError("row 3 is broken")
            return index

    loader = prepare(plain(Broken(6), batch_size=2))
    with pytest.raises(RuntimeError, match="row 3 is broken"):
        list(loader)
    assert (loader.end_of_dataloader, loader.valid_rows) == (False, None)


def test_loops_do_not_disturb_each_other(reference):
    data = torch.arange(4)
    outer, inner = (prepare(plain(data, batch_size=2)) for _ in range(2))
    ends = []
    for _ in outer:
        for _ in inner:
            break
        for _ in outer:  # even of the same loader
            pass
        ends.append((outer.end_of_dataloader, outer.valid_rows))
    assert ends == [(False, 2), (True, 2)]
    assert (outer.end_of_dataloader, inner.end_of_dataloader) == (False, False)

    abandoned = iter(outer)  # suspended at its last batch, and closed while another iteration runs
    assert [next(abandoned).tolist(), next(abandoned).tolist()] == [[0, 1], [2, 3]]
    for _ in outer:
        assert outer.end_of_dataloader == (abandoned is None)
        if abandoned is not None:
            abandoned.close()
            abandoned = None
    assert (outer.end_of_dataloader, outer.valid_rows) == (False, None)

    # accelerate: the broken inner loop stays the active one, so the outer loop never learns that it is at its end
    from accelerate.state import GradientState

    outer, inner = (theirs_prepared(reference, plain(data, batch_size=2)) for _ in range(2))
    ends = []
    for _ in outer:
        for _ in inner:
            break
        ends.append(GradientState().end_of_dataloader)
    assert ends == [False, False]


# ---- skipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_sampler", [False, True])
def test_skip_first_batches_keeps_what_accelerate_loses(reference, as_sampler):
    settings = {"sampler": BatchSampler(range(11), 2, False), "batch_size": None} if as_sampler else {"batch_size": 2}
    dataloader = plain(torch.arange(11), **settings)
    arguments = {"num_processes": 2, "process_index": 0, "device": torch.device("cpu"), "put_on_device": True}
    ours = prepare(dataloader, non_blocking=True, **arguments)
    theirs = theirs_prepared(reference, dataloader, non_blocking=True, **arguments)
    skipped, theirs_skipped = skip(ours, 1), reference.skip_first_batches(theirs, 1)
    assert lists(skipped) == lists(theirs_skipped) == [[4, 5], [8, 9]]
    assert len(skipped) == len(theirs_skipped) == 2
    assert (ours.remainder, skipped.remainder) == (3, 3)
    assert {theirs.remainder for _ in theirs} == {3}
    assert {theirs_skipped.remainder for _ in theirs_skipped} == {-1}
    assert (skipped.device, skipped._non_blocking) == (torch.device("cpu"), True)
    assert (theirs_skipped.device, theirs_skipped._non_blocking) == (torch.device("cpu"), False)
    assert [skipped.end_of_dataloader for _ in skipped] == [False, True]


def test_skipping_continues_the_epoch_and_then_moves_on():
    dataloader = plain(torch.arange(12), batch_size=2, shuffle=True)
    loader = ranks(dataloader, 2, data_seed=7)[1]
    epochs = [lists(loader) for _ in range(3)]
    loader.set_epoch(1)
    rest = skip(skip(loader, 1), 1)
    assert lists(rest) == epochs[1][2:]
    assert lists(loader) == epochs[2]  # the epoch that was finished is not run again
    rest.set_epoch(0)
    assert lists(rest) == epochs[0][2:]


def test_skipping_reads_no_row_of_a_data_set_but_discards_those_of_a_stream():
    dataset = Rows(8)
    rest = skip(prepare(plain(dataset, batch_size=2)), 3)
    assert len(list(rest)) == 1
    assert dataset.read == [6, 7]
    stream = prepare(plain(SizedStream(8), batch_size=2), num_processes=2, process_index=1)
    rest = skip(stream, 1)
    assert [(batch.tolist(), rest.end_of_dataloader) for batch in rest] == [([6, 7], True)]
    assert (len(rest), lists(skip(rest, 1)), len(skip(rest, 5))) == (1, [], 0)


@pytest.mark.parametrize("dataset", [torch.arange(7), Stream(7)], ids=["map", "stream"])
def test_skipping_in_a_plain_loader_matches_accelerate(reference, dataset):
    for count in (0, 1, 3):
        dataloader = plain(dataset, batch_size=2)
        assert lists(skip(dataloader, count)) == lists(reference.skip_first_batches(dataloader, count))


# ---- padding rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Rows, ManyRows])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_masked_ranks_together_hold_the_single_process_batches(kind, split_batches, world):
    collate = {"collate_fn": as_is} if kind is ManyRows else {}
    for n in (1, 2, 5, 13, 24):
        alone = plain(kind(n), batch_size=2 * world, **collate)
        dataloader = plain(kind(n), batch_size=2 * world if split_batches else 2, **collate)
        loaders = ranks(dataloader, world, split_batches=split_batches, uneven="mask")
        for single, *parts in zip(alone, *loaders, strict=True):
            assert all(set(part) == {"input_ids", "labels"} for part in parts)  # nothing that the model does not take
            valid = [loader.valid_rows for loader in loaders]
            assert sum(valid) == len(single["labels"])
            for name in ("input_ids", "labels"):
                rows = torch.cat([part[name][:count] for part, count in zip(parts, valid, strict=True)])
                assert torch.equal(rows, single[name])
            for part, count in zip(parts, valid, strict=True):
                assert len(part["labels"]) >= 1
                assert (part["labels"][count:] == -100).all()
                stand_in = part["input_ids"][0] if count else torch.zeros(2, dtype=torch.int64)
                assert (part["input_ids"][count:] == stand_in).all()
            gathered = torch.cat([part["labels"] for part in parts])  # as gather_for_metrics trims it
            end = loaders[0].remainder if loaders[0].end_of_dataloader and loaders[0].remainder else None
            assert torch.equal(gathered[:end], single["labels"])


@pytest.mark.parametrize("uneven", ["wrap", "mask"])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_of_step_are_known_beforehand(world, split_batches, uneven):
    for n in (1, 5, 13, 24):
        for drop_last in (False, True):
            dataloader = plain(Rows(n), batch_size=2 * world if split_batches else 2, drop_last=drop_last)
            loaders = ranks(dataloader, world, split_batches=split_batches, uneven=uneven)
            loaders = [skip(loader, 1) for loader in loaders] if n == 13 else loaders
            expected = [[loader.rows_of_step(i) for loader in loaders] for i in range(len(loaders[0]))]
            assert [[mine for mine, _ in step] for step in expected] == [
                [loader.valid_rows for loader in loaders] for _ in zip(*loaders, strict=True)
            ]
            assert all({rows for _, rows in step} == {sum(mine for mine, _ in step)} for step in expected)


def test_rows_of_step_are_not_guessed():
    class Unsized:
        batch_size = 2

        def __iter__(self):
            return iter([[0, 1], [2]])

    for dataloader, arguments in (
        (plain(Rows(3), batch_size=2), {"num_processes": 2, "even_batches": False}),
        (plain(SizedStream(3), batch_size=2), {}),
        (plain(Rows(3), batch_sampler=[[0], [1, 2]]), {}),
        (plain(Rows(3), batch_sampler=Unsized()), {}),
    ):
        assert prepare(dataloader, **arguments).rows_of_step(0) is None


def test_positions_are_those_of_the_loops_that_run_the_latest_last():
    positions: list = []
    outer, inner = (prepare(plain(torch.arange(4), batch_size=2), positions=positions) for _ in range(2))

    def running():
        return [position.loader for position in positions]

    for _ in outer:
        abandoned = iter(inner)
        next(abandoned)
        assert running() == [outer, inner]
        for _ in skip(inner, 1):
            assert len(positions) == 3
            break
        assert running() == [outer, inner]
        assert (positions[-1], positions[0]) == (inner.position, outer.position)
    assert running() == [inner]  # the loop that got the latest batch is last
    del abandoned
    assert positions == []


@pytest.mark.parametrize(
    "settings", [{"shuffle": True}, {"sampler": WeightedRandomSampler([1.0] * 13, 13)}], ids=["shuffled", "weighted"]
)
def test_sample_ids_are_the_rows_that_the_batches_hold(settings):
    dataloader = plain(Rows(13), batch_size=2, **settings)
    for loader in ranks(dataloader, 2, uneven="mask", data_seed=3):
        for _ in range(2):  # epochs of another order
            held, ids = [], []
            for batch in loader:
                i, valid = loader.batch_index, loader.valid_rows
                held.append(batch["input_ids"][:valid, 0].tolist())
                assert loader.sample_ids(i, i + 1) == held[-1]
                ids = loader.sample_ids(max(0, i - 1), i + 1)  # a window of two
                assert ids == [row for rows in held[-2:] for row in rows]
            assert ids
    assert prepare(plain(Stream(4), batch_size=2)).sample_ids(0, 1) == []


def test_masking_leaves_the_data_set_alone():
    labels = torch.tensor([1, 0, 1, 1])

    class View(Rows):
        def __getitems__(self, indices):
            return {"labels": labels[indices[0] : indices[0] + len(indices)]}

    for loader in ranks(plain(View(3), batch_size=2, collate_fn=as_is), 2, uneven="mask"):
        assert len(list(loader)) == 1
        assert len(loader.dataset) == 3
    assert labels.tolist() == [1, 0, 1, 1]


def test_masking_works_on_a_batch_encoding(tiny_tokenizer):
    from transformers import DataCollatorWithPadding

    rows = [{**tiny_tokenizer("the cat sat " * (i + 1)), "label": i} for i in range(3)]
    dataloader = plain(rows, batch_size=2, collate_fn=DataCollatorWithPadding(tiny_tokenizer))
    last = ranks(dataloader, 4, uneven="mask", device="cpu", put_on_device=True)[3]
    [batch] = list(last)
    assert type(batch).__name__ == "BatchEncoding"
    assert batch["labels"].tolist() == [-100]
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"]]


def test_mask_needs_labels():
    with pytest.raises(
        TypeError, match="uneven='mask' needs batches with a tensor 'labels' to mask: use uneven='wrap'"
    ):
        list(ranks(plain(torch.arange(4), batch_size=2), 2, uneven="mask")[0])


# ---- devices --------------------------------------------------------------------------------------------------------


def test_send_to_device_matches_accelerate(reference):
    from accelerate.utils import send_to_device as theirs

    Pair = collections.namedtuple("Pair", "left right")
    batch = {"a": [torch.ones(2), "text"], "b": Pair(torch.zeros(1), 3), "c": (torch.ones(1),)}
    ours, expected = send_to_device(batch, "meta"), theirs(batch, "meta")
    assert repr(ours) == repr(expected)
    assert ours["a"][0].device.type == "meta"
    assert type(ours["b"]) is Pair
    assert send_to_device({"a": torch.ones(1)}, "cpu", non_blocking=True)["a"].item() == 1


def test_batches_go_to_the_device_only_if_asked():
    dataloader = plain(torch.arange(4), batch_size=2)
    assert [batch.device.type for batch in prepare(dataloader, "meta")] == ["cpu", "cpu"]
    moved = prepare(dataloader, "meta", put_on_device=True)
    assert [(batch.device.type, moved.valid_rows) for batch in moved] == [("meta", 2), ("meta", 2)]


def test_cuda_copies_begin_one_batch_ahead_and_computation_waits_for_its_own(monkeypatch):
    """The calls and their order, on stand-ins for CUDA's stream and event; the next test runs them on a real device."""
    log = []

    class FakeStream:
        def __init__(self, device):
            self.copies = 0

        def record_event(self):
            self.copies += 1
            return self.copies - 1

    class Computation:
        def wait_event(self, event):
            log.append(f"wait {event}")

    class FakeBatch:
        def __init__(self, number):
            self.number = number

        def to(self, device, non_blocking):
            log.append(f"copy {self.number}")
            assert (device, non_blocking) == (torch.device("cuda"), True)
            return [self]

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computation())
    numbers = DataLoaderShard(
        Rows(3), "cuda", _non_blocking=True, collate_fn=lambda rows: FakeBatch(rows[0]["input_ids"][0])
    )
    for [batch] in numbers:
        log.append(f"use {batch.number}")
    assert log == ["copy 0", "copy 1", "wait 0", "use 0", "copy 2", "wait 1", "use 1", "wait 2", "use 2"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("non_blocking", [False, True])
def test_batches_arrive_whole_on_cuda(non_blocking):
    data = torch.arange(64.0)[:, None].expand(-1, 1 << 16).contiguous()
    dataloader = plain(data, batch_size=4)
    loader = prepare(dataloader, "cuda", put_on_device=True, non_blocking=non_blocking)
    assert loader.pin_memory == non_blocking
    busy = torch.ones(2048, 2048, device="cuda")
    total = torch.zeros((), device="cuda")
    for batch in loader:
        busy = busy @ busy * 0  # keep the compute stream behind the copies
        total += batch.sum() + busy.sum()
    assert total.item() == data.sum().item()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"dispatch_batches": True}, "dispatch_batches=True is not supported here"),
        ({"slice_fn_for_dispatch": print}, "slice_fn_for_dispatch is not supported here"),
        ({"use_stateful_dataloader": True}, "use_stateful_dataloader=True is not supported here"),
        ({"torch_device_mesh": object()}, "torch_device_mesh is not supported here"),
        ({"rng_types": ["generator", "xla"]}, r"rng_types=\['generator', 'xla'\] is not supported here"),
    ],
)
def test_what_is_not_supported_is_refused(argument, text):
    with pytest.raises(NotImplementedError, match=text):
        prepare(plain(torch.arange(4)), **argument)


def test_what_accelerate_takes_is_taken():
    arguments = {"rng_types": ["generator"], "dispatch_batches": False, "use_seedable_sampler": True}
    assert isinstance(prepare(plain(torch.arange(4)), **arguments), DataLoaderShard)


def test_what_does_not_change_the_order_is_said_once(monkeypatch, capsys):
    """Accelerate's other ways to shuffle: taken, with one line on stderr, and rows in the seeded order all the same."""
    monkeypatch.setattr("nanofinetune.ranks.loader._said", set())
    prepare(plain(torch.arange(9), sampler=Drawn()), use_seedable_sampler=False)  # of its order that is not true
    assert capsys.readouterr() == ("", "")
    orders = []
    for arguments in ({}, {"use_seedable_sampler": False, "rng_types": ["torch"]}, {"use_seedable_sampler": False}):
        prepared = prepare(plain(torch.arange(9), shuffle=True), data_seed=3, **arguments)
        orders.append([batch.item() for batch in prepared])
    assert orders[0] == orders[1] == orders[2]
    line = "use_seedable_sampler=False: the order is a function of (seed, epoch) all the same\n"
    assert capsys.readouterr() == ("", line)


def test_that_every_rank_reads_a_stream_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr("nanofinetune.ranks.loader._said", set())
    prepare(plain(Stream(4), batch_size=2))
    assert capsys.readouterr() == ("", "")
    for _ in range(2):
        ranks(plain(Stream(4), batch_size=2), 2)
    line = (
        "note: each rank reads the whole stream and keeps its part, so all must read the same: seed what shuffles it\n"
    )
    assert capsys.readouterr() == ("", line)


def test_misuse_is_refused():
    dataloader = plain(torch.arange(4), batch_size=2)
    with pytest.raises(TypeError, match="dataloader is a list: it must be a torch"):
        prepare([1, 2])
    with pytest.raises(ValueError, match="prepared already"):
        prepare(prepare(dataloader))
    with pytest.raises(ValueError, match="uneven is 'fill'"):
        prepare(dataloader, uneven="fill")
    with pytest.raises(ValueError, match="a DistributedSampler shards already"):
        prepare(plain(torch.arange(4), sampler=DistributedSampler(Rows(4), 2, 0)), num_processes=2)
    with pytest.raises(ValueError, match="batch_size=None, so nothing to share between ranks"):
        prepare(plain(torch.arange(4), batch_size=None))
    with pytest.raises(ValueError, match="a stream with batch_size=None has no steps"):
        prepare(plain(Stream(4), batch_size=None), num_processes=2)
    with pytest.raises(NotImplementedError, match="are not supported for a stream: it wraps"):
        prepare(plain(Stream(4), batch_size=2), num_processes=2, uneven="mask")
    with pytest.raises(NotImplementedError, match="needs the batch sampler as batch_sampler="):
        sampler = BatchSampler(range(4), 2, False)
        ranks(plain(torch.arange(4), sampler=sampler, batch_size=None), 2, uneven="mask")


@pytest.mark.parametrize("dataset", [torch.arange(8), Stream(8)], ids=["map", "stream"])
def test_split_that_does_not_divide_raises_in_both(reference, dataset):
    dataloader = plain(dataset, batch_size=3)
    with pytest.raises(ValueError, match="round multiple"):
        theirs_prepared(reference, dataloader, num_processes=2, process_index=0, split_batches=True)
    with pytest.raises(ValueError, match="it must be a multiple of 2"):
        prepare(dataloader, num_processes=2, split_batches=True)


def test_a_shuffled_loader_without_batches_is_refused_where_accelerate_stops_shuffling(reference):
    dataloader = plain(torch.arange(30), batch_size=None, shuffle=True)
    assert [row.item() for row in theirs_prepared(reference, dataloader)] == list(range(30))
    with pytest.raises(ValueError, match="give it a batch_size"):
        prepare(dataloader)
