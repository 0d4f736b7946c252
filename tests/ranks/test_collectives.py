"""ranks/collectives.py beside accelerate 1.15's operations, on real gloo ranks; all results bit for bit.

Run: OMP_NUM_THREADS=1 python -m pytest tests/ranks/test_collectives.py
"""

import collections
import contextlib
import dataclasses
import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks, run_world

from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.collectives import (
    CARRIED,
    SHORT,
    agree,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    local_main_process_first,
    main_process_first,
    pad_across_processes,
    reduce,
    wait_for_everyone,
)
from nanofinetune.ranks.world import World, init_world, shutdown

Point = collections.namedtuple("Point", "x y")
ALONE = World(0, 0, 1, 1, torch.device("cpu"), None)
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
]


# ---- collectives -----------------------------------------------------------------------------------------------------


def leaves(rank, dtype):
    """Tensors that differ by rank and share no memory: nested, 0-d, transposed, with gaps, empty."""
    generator = torch.Generator().manual_seed(rank)

    def draw():
        return torch.randint(0, 2 if dtype == torch.bool else 100, (3, 4), generator=generator).to(dtype)

    return {"a": [draw(), (draw().t(), draw()[0, 0])], "b": Point(draw()[:, ::2], draw()[:0]), 3: draw()[None]}


def same(ours, theirs):
    """The same containers and the same bits in them."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    else:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)


def gathered_alone():
    from accelerate import Accelerator as Theirs

    data = {"a": torch.tensor(2.0), "b": [torch.ones(3), torch.ones(2, 2)]}
    launched = init_world("cpu")
    expected = Theirs(cpu=True).gather(data)
    for world in (launched, init_world("cpu")):  # the second has adopted Accelerate's group of one
        same(gather(data, world), expected)
        assert gather(data, world)["a"].shape == (1,)
        with pytest.raises(TypeError, match="collectives take tensors"):
            gather(["text"], world)


def test_one_rank_under_torchrun_gathers_as_accelerate_does():
    """A 0-d tensor has a dimension then; without a launcher it has none, in both."""
    pytest.importorskip("accelerate", reason="what this is compared with")
    run_ranks(gathered_alone, 1)


def collectives_beside_accelerate(world):
    from accelerate import PartialState
    from accelerate.utils import operations as theirs

    assert PartialState(cpu=True).num_processes == world.size
    for dtype in DTYPES:
        data = leaves(world.rank, dtype)
        same(gather(data, world), theirs.gather(data))
        same(reduce(data, world, "max"), theirs.reduce(data, "max"))
        if dtype != torch.bool:
            same(reduce(data, world, "sum"), theirs.reduce(data, "sum"))
            same(reduce(data, world, "none"), theirs.reduce(data, "none"))
            same(reduce(data, world, "none"), reduce(data, world, "sum"))
        if dtype.is_floating_point:
            same(reduce(data, world), theirs.reduce(data))
        for source in range(world.size):
            copy = leaves(world.rank, dtype)
            result = broadcast(copy, world, source)
            reference = leaves(world.rank, dtype)
            del reference["b"]  # see below
            same({key: result[key] for key in reference}, theirs.broadcast(reference, source))
            same(copy, leaves(source, dtype))  # in place
            assert result["a"][0] is copy["a"][0]
    for dim in (0, 1, -1, 5):
        for first in (False, True):
            ragged = {"x": [torch.full((2 + world.rank, 4 - world.rank), 7)], "y": torch.ones(3)}
            same(pad_across_processes(ragged, world, dim, -100, first),
                 theirs.pad_across_processes(ragged, dim, -100, first))  # fmt: skip
    for objects in ([world.rank, "a"], [], ["only rank 0"] if world.rank == 0 else []):
        same_objects = gather_object(objects, world), theirs.gather_object(objects)
        assert same_objects[0] == same_objects[1]
    ours_list, their_list = [world.rank, {"a": world.rank}], [world.rank, {"a": world.rank}]
    assert broadcast_object_list(ours_list, world, 1) is ours_list
    assert ours_list == theirs.broadcast_object_list(their_list, 1) == [1, {"a": 1}]
    wait_for_everyone(world)

    # What Accelerate cannot do: dtypes that gloo has no name for; padding that keeps the dtype.
    short = torch.full((2,), world.rank, dtype=torch.int16)
    assert gather(short, world).tolist() == [rank for rank in range(world.size) for _ in range(2)]
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        theirs.gather(short)
    ragged_mask = torch.ones(1 + world.rank, dtype=torch.bool)
    padded = theirs.pad_across_processes(ragged_mask)
    assert padded.dtype == (torch.bool if world.rank == world.size - 1 else torch.int64)  # not gatherable
    assert pad_across_processes(ragged_mask, world).dtype == torch.bool
    # A tensor with gaps: gloo sends the first elements of its memory, gaps and all, and Accelerate lets it.
    gaps = [torch.arange(6.0).add(10 * world.rank)[::2] for _ in range(2)]
    assert broadcast(gaps[0], world).tolist() == [0, 2, 4]
    assert (theirs.broadcast(gaps[1]).tolist() == [0, 2, 4]) == (world.rank == 0)
    # ... and gradients do not flow through collectives.
    assert not gather(torch.ones(1, requires_grad=True), world).requires_grad


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_match_accelerate(world):
    pytest.importorskip("accelerate", reason="what this test compares with (extra `test`)")
    run_world(collectives_beside_accelerate, world)


def calls_of(action):
    """(what it returns, how many all-gathers it took)."""
    with patch.object(dist, "all_gather", side_effect=dist.all_gather) as all_gather:
        result = action()
    return result, all_gather.call_count


def messages_of_all_lengths(world):
    from accelerate import PartialState
    from accelerate.utils import operations as theirs

    assert PartialState(cpu=True).num_processes == world.size
    generator = torch.Generator().manual_seed(world.rank)
    for dtype in DTYPES:
        most = CARRIED // dtype.itemsize
        for length, gathers in ((1, 1), (most - 1, 1), (most, 1 + 2), (5 * most, 1 + 2), (0, 1)):
            pair = [torch.randint(0, 2, (length, 1), generator=generator).to(dtype), torch.ones(1, dtype=dtype)]
            found, taken = calls_of(lambda pair=pair: gather(pair, world))
            same(found, theirs.gather(pair))
            assert taken == gathers, (dtype, length)
    for data in (
        torch.tensor([float("nan"), float("inf"), -0.0]), torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(1).expand(100), torch.zeros(0), torch.zeros(3, 0), torch.full((), True), torch.ones(2) * 1j,
    ):  # fmt: skip
        found, expected = gather(data, world), theirs.gather(data)
        assert found.shape == expected.shape and found.is_contiguous() and found.untyped_storage().data_ptr() % 8 == 0
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    for shape in ((2,), ()):  # conjugated when it is read: its memory says something else
        lazy = (torch.full(shape, 1j) * (world.rank + 1)).conj()
        assert gather(lazy, world).tolist() == [-1j * (r + 1) for r in range(world.size) for _ in range(lazy.numel())]
        assert torch.equal(broadcast(lazy, world, 1), torch.full(shape, -2j))

    # An odd number of bytes before a leaf of eight: what comes back must be usable all the same.
    odd = {"flag": torch.ones(3, dtype=torch.bool), "none": torch.zeros(0, 4, dtype=torch.float64)}
    odd["value"] = torch.arange(2, dtype=torch.float64) + world.rank
    assert gather(odd, world)["none"].shape == (0, 4)
    assert gather(odd, world)["value"].add_(1).tolist() == [r + i + 1.0 for r in range(world.size) for i in range(2)]

    # Objects: one rank's may be long, and all get it in two calls; around the border of the first one.
    for length in (0, 1, SHORT - 100, SHORT, SHORT + 1, 2 * SHORT, 100_000):
        text = ["x" * length if world.rank == 1 else "y"]
        found, taken = calls_of(lambda text=text: gather_object(text, world))
        assert found == theirs.gather_object(text)
        assert taken == (1 if length < SHORT - 99 else 2), length


@pytest.mark.parametrize("world", [2, 3])
def test_short_messages_take_one_all_gather_and_match_accelerate(world):
    pytest.importorskip("accelerate", reason="what this test compares with (extra `test`)")
    run_world(messages_of_all_lengths, world)


def test_single_process_matches_accelerate():
    theirs = pytest.importorskip("accelerate.utils.operations", reason="what this test compares with (extra `test`)")
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        assert PartialState(cpu=True).num_processes == 1
        data = leaves(0, torch.int64)
        assert gather(data, ALONE) is data is theirs.gather(data)
        assert broadcast(data, ALONE) is data is theirs.broadcast(data)
        assert gather_object(data, ALONE) is data is theirs.gather_object(data)
        items = [1]
        assert broadcast_object_list(items, ALONE) is items is theirs.broadcast_object_list(items)
        for reduction in ("mean", "sum", "max", "none"):  # the mean of integers is refused only where there is one
            same(reduce(data, ALONE, reduction), theirs.reduce(data, reduction))
        assert reduce(data["a"][0], ALONE) is not data["a"][0]
        same(pad_across_processes(data, ALONE, 1), theirs.pad_across_processes(data, 1))
        assert pad_across_processes(data, ALONE)["a"][0] is data["a"][0] is theirs.pad_across_processes(data)["a"][0]
        for function in (reduce, pad_across_processes):
            with pytest.raises(TypeError, match="not str"):
                function(["text"], ALONE)
            with pytest.raises(TypeError):
                getattr(theirs, function.__name__)(["text"])
    finally:
        AcceleratorState._reset_state(True)
    wait_for_everyone(ALONE)
    with main_process_first(ALONE), local_main_process_first(ALONE):
        pass
    assert not ALONE.calls


def disagreements(world):
    r = world.rank

    def text(call, error=RuntimeError):
        with pytest.raises(error) as failure:
            call()
        dist.barrier()  # nobody hangs, and the next collective works
        return str(failure.value)

    texts = [
        text(lambda: gather(torch.zeros(2 + r, 3), world)),
        text(lambda: reduce({"logits": [torch.zeros(2, dtype=torch.int64 if r else torch.float32)]}, world)),
        text(lambda: gather([torch.zeros(2)] * (2 + r), world)),
        text(lambda: gather({"ab"[r]: torch.zeros(2)}, world)),
        text(lambda: pad_across_processes(torch.zeros([2] * (1 + r)), world)),
        text(lambda: broadcast_object_list([0] * (1 + r), world)),
        text(lambda: gather([3], world), TypeError),
        text(lambda: gather([3 if r else torch.zeros(())], world)),
        text(lambda: reduce(torch.zeros(2, dtype=torch.int64), world), ValueError),
        text(lambda: reduce(torch.zeros(2, dtype=torch.bool), world, "sum"), ValueError),
        text(lambda: reduce(torch.zeros(2), world, "min"), ValueError),
        text(lambda: broadcast(torch.zeros(2), world, 2), ValueError),
        text(lambda: broadcast(torch.zeros(2 + r), world)),
    ]
    texts.append(text(lambda: reduce(torch.zeros(2), world, "sum" if r else "mean")))
    texts.append(text(lambda: gather(torch.zeros(2), world) if r else wait_for_everyone(world)))
    texts.append(text(lambda: gather(torch.zeros(2), world)))  # of which rank 1 has now made one more
    return texts


def test_disagreement_raises_on_all_ranks():
    first, second = run_world(disagreements, 2)
    assert first == second
    expected = [
        "gather#1: rank 0 has data: float32@cpu [2, 3], rank 1 has data: float32@cpu [3, 3]; where only "
        "lengths differ, call pad_across_processes first",
        "reduce[mean]#1: rank 0 has data['logits'][0]: float32@cpu [2], rank 1 has data['logits'][0]: int64@cpu [2]",
        "gather#2: rank 0 has data: nothing [], rank 1 has data[2]: float32@cpu [2]",
        "gather#3: rank 0 has data['a']: float32@cpu [2], rank 1 has data['b']: float32@cpu [2]",
        "pad_across_processes#1: rank 0 has data: float32@cpu [2], rank 1 has data: float32@cpu [2, 2]",
        "broadcast_object_list[0]#1: the lists are of different lengths, by rank [1, 2]",
        "collectives take tensors in nested lists, tuples and dicts, not int",
        "rank 0 has data[0]: float32@cpu [], rank 1 has data[0]: int []",
        "reduce: there is no mean of torch.int64; convert it to float or int64 first",
        "reduce: there is no sum of torch.bool; convert it to float or int64 first",
        "reduction='min': choose mean, sum, max or none",
        "from_process=2: there are 2 ranks, numbered from 0",
        "rank 0 has data: float32@cpu [2], rank 1 has data: float32@cpu [3]",
        "the ranks are in different calls: rank 0 is at reduce[mean]#3, rank 1 is at reduce[sum]#2",
        "the ranks are in different calls: rank 0 is at wait_for_everyone#1, rank 1 is at gather#6; all must make",
        "the ranks are in different calls: rank 0 is at gather#6, rank 1 is at gather#7; all must make",
    ]
    for text, part in zip(first, expected, strict=True):
        assert part in text


def one_rank_is_late():
    world = init_world("cpu", timeout=timedelta(seconds=1))
    if world.rank == 1:
        time.sleep(2.5)
        return None
    started = time.monotonic()
    with pytest.raises(RuntimeError) as failure:
        gather(torch.zeros(1), world)
    return str(failure.value), time.monotonic() - started


def test_a_collective_on_some_ranks_only_ends_at_the_timeout_and_says_which():
    (text, seconds), _ = run_ranks(one_rank_is_late, 2)
    assert text.startswith("gather#1 on rank 0 of 2: another rank has ended or was not there in time: ")
    assert seconds < 2.4


def test_several_ranks_without_a_group():
    world = World(1, 1, 2, 2, torch.device("cpu"), "gloo")
    with pytest.raises(
        RuntimeError, match="gather: 2 ranks but no process group; call init_world first and shutdown last"
    ):
        gather(torch.zeros(1), world)


# ---- process control -------------------------------------------------------------------------------------------------


def first_and_failing():
    world = init_world("cpu", timeout=timedelta(seconds=2))
    log = []
    for block in (main_process_first, local_main_process_first):
        with block(world):
            if world.rank == 0:
                time.sleep(3)  # longer than ranks otherwise wait
            log.append(time.monotonic())
    texts, waited = [], 0.0
    for block in (main_process_first, local_main_process_first):
        started = time.monotonic()
        with pytest.raises(RuntimeError if world.rank else KeyError) as failure, block(world):
            assert world.rank == 0, "the others must not get here"
            raise KeyError("no such column")
        texts.append(str(failure.value))
        waited = max(waited, time.monotonic() - started)
    wait_for_everyone(world)
    with contextlib.suppress(ValueError), main_process_first(world):
        if world.rank == 1:
            raise ValueError("after rank 0: this one's own affair")
    shutdown(world)
    return log, texts, waited


def test_main_process_first_failure_reaches_all_ranks():
    (log0, own, _), (log1, heard, waited) = run_ranks(first_and_failing, 2)
    for mine, other in zip(log0, log1, strict=True):
        assert mine < other
    assert own == ["'no such column'"] * 2
    assert heard == [
        f"end of {name}#2: rank 0 failed with KeyError: 'no such column'"
        for name in ("main_process_first", "local_main_process_first")
    ]
    assert waited < 1.5


def first_meets_a_usage_error(world):
    with pytest.raises(UsageError) as failure, main_process_first(world):
        if world.rank == 0:
            raise UsageError("--data x.csv: there is no such file")
    return str(failure.value)


def test_main_process_first_tells_all_ranks_what_the_user_got_wrong():
    assert run_world(first_meets_a_usage_error, 2) == ["--data x.csv: there is no such file"] * 2


def blocks_in_blocks(world):
    order = []
    for outer in (main_process_first, local_main_process_first):
        for inner in (main_process_first, local_main_process_first):
            with outer(world), inner(world):
                time.sleep(0.2 * (world.rank == 0))
                order.append(time.monotonic())
    others = []
    for call in (lambda: gather(torch.zeros(1), world), lambda: wait_for_everyone(world), lambda: agree([1], world)):
        with pytest.raises(RuntimeError) as failure, main_process_first(world):
            call()
        others.append(str(failure.value))
    with main_process_first(world), contextlib.suppress(KeyError), local_main_process_first(world):
        raise KeyError("caught inside: no failure of the outer block")
    wait_for_everyone(world)
    return order, others


def test_a_block_in_a_block_keeps_the_turns_and_a_collective_in_it_is_refused():
    """Each waited for the other ranks, which wait for the outer block's end: for two hours, or in vain."""
    (first, own), (second, heard) = run_world(blocks_in_blocks, 2)
    assert len(first) == 4 and all(mine < other for mine, other in zip(first, second, strict=True))
    assert [text.partition("#")[0] for text in own] == [
        f"{name} inside main_process_first, where ranks wait for each other's end: call it after that"
        for name in ("gather", "wait_for_everyone", "agree")
    ]
    assert all("rank 0 failed with RuntimeError: " + mine in text for mine, text in zip(own, heard, strict=True))


def blocks_on_two_nodes(world):
    """Two ranks that believe to be on a node each: its local first one has another rank to wait for."""
    apart = dataclasses.replace(world, local_rank=0, local_size=1)
    with pytest.raises(RuntimeError) as failure, main_process_first(apart), local_main_process_first(apart):
        pytest.fail("not in two orders at once")
    return str(failure.value)


def test_two_kinds_of_blocks_on_several_nodes_are_refused():
    first, second = run_world(blocks_on_two_nodes, 2)
    assert first.startswith("local_main_process_first inside main_process_first, where ranks wait")
    assert second.endswith(first)


def accelerate_main_process_first():
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    from accelerate import PartialState

    state = PartialState(cpu=True)
    started = time.monotonic()
    try:
        with state.main_process_first():
            if state.is_main_process:
                raise KeyError("no such column")
    except KeyError:
        time.sleep(5)  # a program that cleans up, or catches what it can
    except RuntimeError as failure:
        return str(failure), time.monotonic() - started
    return "", 0.0


def test_accelerate_main_process_first_waits_for_the_timeout():
    pytest.importorskip("accelerate", reason="shows Accelerate itself (extra `test`)")
    _, (text, waited) = run_ranks(accelerate_main_process_first, 2)
    assert "Timed out waiting" in text and "no such column" not in text
    assert 1.8 < waited < 4.5  # not until rank 0's process has ended, and no word of its failure
