"""nanofinetune.dropin.processes against accelerate 1.15's methods of the Accelerator and of PartialState.

Every place in a job of 1 to 4 processes is played in this one, since none of these functions talks to other ranks.

    python -m pytest tests/dropin/test_processes.py
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
from side_by_side import ours, theirs

from nanofinetune.dropin.partial_state import PartialState
from nanofinetune.ranks.world import World


def at(rank, size, per_node=2):
    """(our view, accelerate's) of rank `rank` of `size` ranks, so many on a node."""
    reference = theirs()
    from accelerate import PartialState as TheirState

    state = TheirState()
    state.process_index, state.local_process_index = rank, rank % per_node
    state.num_processes, state.distributed_type = size, "MULTI_CPU" if size > 1 else "NO"
    world = World(rank, rank % per_node, size, min(size, per_node), torch.device("cpu"), "gloo" if size > 1 else None)
    return PartialState(world=world), reference


PLACES = [(0, 1), (0, 2), (1, 2), (2, 4), (3, 4)]


@pytest.mark.parametrize(("rank", "size"), PLACES)
@pytest.mark.parametrize(
    ("decorator", "argument"),
    [
        ("on_main_process", {}),
        ("on_local_main_process", {}),
        ("on_last_process", {}),
        ("on_process", {"process_index": 1}),
        ("on_process", {"process_index": 3}),
        ("on_local_process", {"local_process_index": 1}),
    ],
)
def test_each_decorator_runs_where_accelerates_does(decorator, argument, rank, size):
    """Among others: one process runs what is meant for process 3."""
    results = []
    for each in at(rank, size):
        decorate = getattr(each, decorator)
        results.append(decorate(lambda x: x + 1, **argument)(1))
        if argument:
            results.append(decorate(**argument)(lambda x: x + 1)(1))
    assert len(set(results)) == 1 and results[0] in (2, None)


def test_a_decorator_without_a_number_is_refused():
    """Accelerate runs the function nowhere."""
    with pytest.raises(ValueError, match="name the process_index"):
        ours().on_process(print)
    with pytest.raises(ValueError, match="name the local_process_index"):
        ours().on_local_process(print)


def dataset():
    return pytest.importorskip("datasets").Dataset.from_dict({"x": [0, 1, 2, 3, 4]})


INPUTS = {
    "list": [1, 2, 3, 4, 5],
    "tuple": (1, 2, 3),
    "tensor": torch.arange(10).view(5, 2),
    "dict": {"a": [1, 2, 3], "b": torch.arange(3)},
    "few": ["only"],
    "Dataset": dataset,
}


def plain(part):
    if isinstance(part, dict):
        return {key: plain(value) for key, value in part.items()}
    if hasattr(part, "column_names"):
        return {"x": part["x"][:]}
    return part.tolist() if isinstance(part, torch.Tensor) else part


@pytest.mark.parametrize(("rank", "size"), PLACES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("padded", [False, True])
def test_split_between_processes_matches_accelerate(kind, padded, rank, size):
    inputs = INPUTS[kind]
    inputs = inputs() if callable(inputs) else inputs
    if padded and kind in ("tuple", "tensor", "dict") and size > 1:
        pytest.skip("accelerate adds a list to a tuple, and asks the other ranks about a tensor")
    parts = []
    for each in at(rank, size):
        with each.split_between_processes(copy.deepcopy(inputs), apply_padding=padded) as part:
            parts.append(plain(part))
    assert parts[0] == parts[1]
    if padded:
        rows: Any = parts[0]
        if kind == "Dataset":
            rows = rows["x"]
        assert len(rows) == -(-len(inputs) // size)  # type: ignore[arg-type]


def test_what_cannot_be_cut_is_refused_where_accelerate_hands_all_of_it_to_every_rank():
    mine, reference = at(1, 2)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: None)
        with reference.split_between_processes({1, 2, 3}) as part:
            assert part == {1, 2, 3}
    with (
        pytest.raises(TypeError, match="set is neither list, tuple, tensor nor dict"),
        mine.split_between_processes({1}),
    ):
        pass


def test_printing_is_for_one_rank_of_a_node(capsys):
    for rank, size in PLACES:
        for each in at(rank, size):
            each.print(rank, end=" ")
    assert capsys.readouterr().out == "0 0 0 0 2 2 "
