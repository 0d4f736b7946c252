"""nanofinetune.dropin.batch_size against accelerate 1.15's find_executable_batch_size and release_memory.

python -m pytest tests/dropin/test_batch_size.py
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import run_ranks
from side_by_side import ours, raised, reset

import nanofinetune

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


def libraries():
    return nanofinetune, pytest.importorskip("accelerate.utils", reason="the reference, extra `test`")


MESSAGES = [
    OUT_OF_MEMORY,
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
]


@pytest.mark.parametrize(
    "message", [MESSAGES[0], *(pytest.param(text, marks=pytest.mark.slow) for text in MESSAGES[1:])]
)
@pytest.mark.parametrize("smaller", [None, "half"])
def test_find_executable_batch_size_matches_accelerate(message, smaller):
    """The sizes that are tried, by an error of each kind, on a first and a second call."""
    tried = []
    for library in libraries():
        sizes: list = []

        def half(sizes=sizes):
            return sizes[-1] // 2

        reduce_batch_size_fn = {"reduce_batch_size_fn": half} if smaller else {}

        @library.find_executable_batch_size(starting_batch_size=128, **reduce_batch_size_fn)
        def train(batch_size, limit, *, name, sizes=sizes):
            sizes.append(batch_size)
            if batch_size > limit:
                raise RuntimeError(message)
            return name, batch_size

        sizes.append(train(60, name="a"))
        sizes.append(train(100, name="b"))
        tried.append(sizes)
    assert tried[0] == tried[1]
    assert tried[0][0] == 128 and tried[0][-1][0] == "b"


def test_it_is_used_without_arguments_as_in_accelerate():
    for library in libraries():
        assert library.find_executable_batch_size(lambda batch_size: batch_size)() == 128
        assert library.find_executable_batch_size(lambda size, x=1: size + x, starting_batch_size=3)(2) == 5


@pytest.mark.slow
def test_misuse_and_other_errors_raise_as_in_accelerate():
    outcomes = []
    for library in libraries():

        def never(batch_size):
            raise RuntimeError(OUT_OF_MEMORY)

        def broken(batch_size):
            raise KeyError("other")

        find = library.find_executable_batch_size
        outcomes.append(
            [
                raised(find(never, starting_batch_size=16)),
                raised(find(broken)),
                raised(find(lambda batch_size: batch_size), 64),
                raised(find(lambda batch_size, x: batch_size), 64, 1),
            ]
        )
    assert outcomes[0] == outcomes[1] == [RuntimeError, KeyError, TypeError, TypeError]
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        nanofinetune.find_executable_batch_size(never, starting_batch_size=16)()
    with pytest.raises(TypeError, match="train is given its rows by the decorator: leave it out of the call"):

        @nanofinetune.find_executable_batch_size
        def train(rows):
            return rows

        train(8)
    with pytest.raises(TypeError, match="<lambda> must take the batch size as its first argument"):
        nanofinetune.find_executable_batch_size(lambda: 1)()
    assert nanofinetune.find_executable_batch_size(lambda *args: args)(1, 2) == (128, 1, 2)


class Activation:
    """Something large that a failed call leaves behind."""

    cycle: Any = None


def test_the_failed_call_is_freed_before_the_next_where_accelerates_is_not():
    """Accelerate collects while the error still holds the frames of the call, and with them what was allocated."""
    alive = []
    for library in libraries():
        seen: list[int] = []
        activations: list[Any] = []

        @library.find_executable_batch_size(starting_batch_size=10)
        def train(batch_size, seen=seen, activations=activations):
            seen.append(sum(reference() is not None for reference in activations))
            activation = Activation()
            activation.cycle = activation
            activations.append(weakref.ref(activation))
            if batch_size > 8:
                raise RuntimeError(OUT_OF_MEMORY)

        train()
        alive.append(seen)
    assert alive == [[0, 0, 0], [0, 1, 1]]
    gc.collect()


def test_release_memory_matches_accelerate():
    for library in libraries():
        one: Any = torch.ones(2)
        two: list[Any] = [Activation()]
        two.append(two)
        gone = weakref.ref(two[0])
        one, two = library.release_memory(one, two)
        assert one is None and two is None
        assert library.release_memory() == []
        gc.collect()
        assert gone() is None


def on_two_ranks(limits):
    """The sizes that each library tries where the ranks' memories differ. `limits`: rows that a rank can hold."""
    accelerator, tried = ours(), []
    reset()
    import accelerate

    accelerate.PartialState(cpu=True)
    for library in (nanofinetune, accelerate.utils):
        sizes: list = []

        @library.find_executable_batch_size(starting_batch_size=10)
        def train(batch_size, sizes=sizes):
            sizes.append(batch_size)
            if batch_size > limits[accelerator.process_index]:
                raise RuntimeError(OUT_OF_MEMORY)
            return batch_size

        sizes.append(train())
        tried.append(sizes)
    accelerator.end_training()
    return tried


@pytest.mark.slow
def test_all_ranks_try_again_where_accelerate_shrinks_one():
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    first, second = run_ranks(on_two_ranks, 2, (10, 8))
    assert [first[0], second[0]] == [[10, 9, 8, 8]] * 2
    assert [first[1], second[1]] == [[10, 10], [10, 9, 8, 8]]  # two ranks of one job, with other batches
