"""nanofinetune.dropin.operations against accelerate 1.15's functions of the same names, bit for bit.

python -m pytest tests/dropin/test_operations.py
"""

import collections
import io

import pytest
import torch
from helpers import run_ranks, run_world
from side_by_side import line, ours, raised, reset

import nanofinetune

Pair = collections.namedtuple("Pair", "a b")


def reference():
    return pytest.importorskip("accelerate.utils", reason="the reference, extra `test`")


def listed(data):
    """The same with lists for tensors, to be compared and sent."""
    if isinstance(data, torch.Tensor):
        return [str(data.dtype), data.tolist()]
    if isinstance(data, dict):
        return {key: listed(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [type(data).__name__, *map(listed, data)]
    return data


def collective_calls(library, rank):
    """One call of each kind, on nested containers; what it gives, or the type of what it raises."""
    tensor = torch.arange(4.0).view(2, 2) + 10 * rank
    nested = {"a": [tensor, torch.tensor(rank)], "b": Pair(torch.tensor([True, False]), tensor.half())}
    results = [library.gather(nested), library.gather(torch.tensor(5.0 + rank))]
    results += [library.reduce(tensor), library.reduce([tensor.long()], "sum"), library.reduce(tensor, reduction="max")]
    results += [library.broadcast({"x": tensor.clone()}, from_process=0), library.gather_object([("rank", rank)])]
    results += [library.broadcast_object_list([rank, {"a": rank}], from_process=0)]
    ragged = torch.ones(1 + rank, 2)
    results += [library.pad_across_processes({"x": ragged}, dim=0, pad_index=7, pad_first=True)["x"]]
    results += [
        library.pad_across_processes(ragged.T, dim=1, pad_index=-1),
        library.pad_across_processes(ragged, dim=5),
    ]
    library.wait_for_everyone()
    return listed(results)


def test_operations_match_accelerate():
    reset()
    __import__("accelerate").PartialState(cpu=True)
    assert collective_calls(nanofinetune, 0) == collective_calls(reference(), 0)


def on_two_ranks():
    accelerator = ours()
    reset()
    import accelerate

    accelerate.PartialState(cpu=True)
    found, expected = (
        collective_calls(library, accelerator.process_index) for library in (nanofinetune, accelerate.utils)
    )
    mixed = accelerator.gather(nanofinetune.gather(torch.tensor(accelerator.process_index))).tolist()
    bars = []
    for library in (nanofinetune, accelerate.utils):
        for settings in ({}, {"main_process_only": False}, {"disable": True}):
            file = io.StringIO()
            list(library.tqdm(range(3), file=file, **settings))
            bars.append("3/3" in file.getvalue())
    accelerator.end_training()
    return found, expected, mixed, bars


def test_operations_match_accelerate_on_two_ranks():
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    for rank, (found, expected, mixed, bars) in enumerate(run_ranks(on_two_ranks, 2)):
        assert found == expected
        assert mixed == [0, 1, 0, 1]
        assert bars[:3] == bars[3:] == [rank == 0, True, False]


DATA = [
    ["text", torch.ones(2)],
    torch.ones(2, 3),
    [torch.zeros(4, 1), "text", 3],
    {"a": Pair(torch.ones(2).half(), None), "b": (torch.ones(3).bfloat16(), [torch.arange(2)])},
    [],
]


@pytest.mark.parametrize("data", DATA, ids=["text", "tensor", "list", "nested", "empty"])
def test_containers_are_walked_as_in_accelerate(data):
    library = reference()
    assert listed(nanofinetune.convert_to_fp32(data)) == listed(library.convert_to_fp32(data))
    assert raised(nanofinetune.find_batch_size, data) == raised(library.find_batch_size, data)
    for found in (nanofinetune, library):
        moved = found.send_to_device(data, "meta")
        assert listed(found.recursively_apply(lambda tensor: tensor.device.type, moved)) == listed(
            library.recursively_apply(lambda tensor: "meta", data)
        )

    def double(tensor, factor, plus=0):
        return tensor * factor + plus

    def integer(leaf):
        return isinstance(leaf, int)

    outcomes = []
    for which in (nanofinetune, library):
        apply = which.recursively_apply
        outcomes.append(
            [
                listed(apply(double, data, 2, plus=1)),
                listed(apply(double, data, 5, test_type=integer)),
                listed(raised(apply, double, data, 2, error_on_other_type=True)),
            ]
        )
    assert outcomes[0] == outcomes[1]


def test_keys_can_stay_where_they_are_as_in_accelerate():
    data = {"a": torch.ones(1), "b": [{"a": torch.ones(1), "c": torch.ones(1)}], "d": None}
    for keys in ("a", ["a", "c"], None):
        places = []
        for library in (nanofinetune, reference()):
            moved = library.send_to_device(data, "meta", skip_keys=keys)
            assert list(moved) == list(data)
            places.append(library.recursively_apply(lambda tensor: tensor.device.type, moved))
        assert places[0] == places[1]


def test_a_batch_encoding_keeps_its_type_as_in_accelerate():
    encoding = pytest.importorskip("transformers").BatchEncoding({"input_ids": torch.ones(1, 2)})
    for library in (nanofinetune, reference()):
        assert type(library.send_to_device(encoding, torch.device("cpu"), non_blocking=True)) is type(encoding)


@pytest.mark.parametrize("dim", [0, 1])
def test_concatenate_matches_accelerate(dim):
    parts = [{"a": torch.full((2, 2), float(i)), "b": Pair([torch.ones(1, 1)], torch.zeros(1, 2))} for i in range(3)]
    assert listed(nanofinetune.concatenate(parts, dim)) == listed(reference().concatenate(parts, dim))
    for library in (nanofinetune, reference()):
        assert raised(library.concatenate, [1, 2]) is TypeError


def test_models_come_out_of_their_wrappers_as_in_accelerate():
    model = line()
    for library in (nanofinetune, reference()):
        extract = library.extract_model_from_parallel
        assert extract(model) is model and extract(torch.nn.DataParallel(model)) is model
    prepared = ours(mixed_precision="bf16").prepare(model)
    assert nanofinetune.extract_model_from_parallel(prepared, keep_fp32_wrapper=False) is model
    assert "forward" not in vars(model)


def test_arguments_without_effect_are_refused():
    with pytest.raises(NotImplementedError, match=r"scale=0.5 is not supported here"):
        nanofinetune.reduce(torch.ones(1), scale=0.5)
    with pytest.raises(NotImplementedError, match=r"recursive=True is not supported here"):
        nanofinetune.extract_model_from_parallel(line(), recursive=True)


def random_states(world):
    """Rank 1's states become rank 0's: torch's own, and a generator's."""
    torch.manual_seed(world.rank)
    generator = torch.Generator().manual_seed(7 + world.rank)
    nanofinetune.synchronize_rng_states(["torch", "generator"], generator)
    tensor = torch.tensor([3, 4]) if world.rank == 0 else None
    copied = nanofinetune.copy_tensor_to_devices(tensor)
    return torch.rand(2).tolist(), torch.rand(2, generator=generator).tolist(), copied.tolist()


def test_random_states_become_rank_0s_as_in_accelerate():
    zero, one = run_world(random_states, 2)
    torch.manual_seed(0)
    expected = torch.rand(2).tolist(), torch.rand(2, generator=torch.Generator().manual_seed(7)).tolist(), [3, 4]
    assert zero == one == expected
    for wrong in ("generator", "xla", None):
        with pytest.raises(ValueError, match="choose torch, cuda, or generator and pass one"):
            nanofinetune.synchronize_rng_state(wrong)
