"""nanofinetune.dropin.partial_state against accelerate 1.15's PartialState, AcceleratorState and DistributedType.

python -m pytest tests/dropin/test_partial_state.py
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from side_by_side import ours, reset, theirs

from nanofinetune.dropin.partial_state import AcceleratorState, DistributedType, PartialState
from nanofinetune.ranks.world import TIMEOUT
from nanofinetune.settings import InitProcessGroupKwargs

NAMES = (
    "backend", "device", "distributed_type", "initialized", "is_last_process", "is_local_main_process",
    "is_main_process", "local_process_index", "num_processes", "process_index", "use_distributed",
)  # fmt: skip


def describe(state):
    with state.split_between_processes([1, 2, 3]) as part, state.main_process_first():
        pass
    with state.local_main_process_first():
        pass
    state.wait_for_everyone()
    values = [getattr(state, name) for name in NAMES]
    # underneath: accelerate's CPU has the number of the rank, modulo 1, on several ranks
    return [str(getattr(value, "value", value)).replace("cpu:0", "cpu") for value in values], part, shown(state)


def shown(state):
    return str(state).replace("cpu:0", "cpu")


def test_partial_state_matches_accelerate():
    reset()
    reference = pytest.importorskip("accelerate").PartialState(cpu=True)
    assert describe(PartialState(cpu=True)) == describe(reference)
    public = {name for name in dir(reference) if not name.startswith("_")}
    left_out = {"debug", "default_device", "fork_launched", "set_device"}
    assert {name for name in dir(PartialState(cpu=True)) if name[0] != "_"} == (public - left_out) | {"world"}


def on_two_ranks():
    first = PartialState(cpu=True, timeout=timedelta(seconds=50))
    mine, other = describe(first), describe(PartialState(cpu=True))
    reset()
    import accelerate

    reference = describe(accelerate.PartialState(cpu=True))
    accelerators = [shown(make().state) for make in (ours, theirs)]
    again = PartialState()  # another one than made the group ends it, as in accelerate
    group = dist.new_group([0, 1])
    again.destroy_process_group(group)
    assert dist.is_initialized()
    again.destroy_process_group()
    return mine, other, reference, accelerators, dist.is_initialized()


def test_partial_state_matches_accelerate_on_two_ranks():
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    for rank, (mine, other, reference, accelerators, left) in enumerate(run_ranks(on_two_ranks, 2)):
        assert mine == other == reference and not left
        assert accelerators[0] == accelerators[1]
        assert mine[1] == [[1, 2], [3]][rank]


def test_a_process_group_gets_the_settings_that_accelerate_takes(monkeypatch):
    asked = []

    def listen(*arguments):
        asked.append(arguments)
        return "a world"

    monkeypatch.setattr("nanofinetune.dropin.partial_state.start_world", listen)
    handler = InitProcessGroupKwargs(timeout=timedelta(seconds=3))
    PartialState(cpu=True, **handler.to_kwargs())
    PartialState()
    assert asked == [("cpu", TIMEOUT, handler), ("auto", TIMEOUT, None)]
    with pytest.raises(TypeError, match="tiemout"):
        PartialState(tiemout=3)


def test_distributed_type_matches_accelerate():
    """Members, values, and what is printed."""
    reference = pytest.importorskip("accelerate").DistributedType
    assert [(m.name, m.value, str(m)) for m in DistributedType] == [(m.name, m.value, str(m)) for m in reference]
    for name in ("NO", "MULTI_GPU", "XLA"):
        assert DistributedType[name] == name == reference[name]
    assert ours().distributed_type == DistributedType.NO == theirs().distributed_type


def test_accelerator_state_matches_accelerate():
    mine, reference = ours(mixed_precision="bf16").state, theirs(mixed_precision="bf16").state
    assert isinstance(mine, AcceleratorState)
    for name in ("mixed_precision", "num_processes", "deepspeed_plugin", "is_fsdp2", "device"):
        assert getattr(mine, name) == getattr(reference, name)
    assert repr(mine) == repr(reference)


def test_accelerator_state_of_nobody_shows_the_ranks_but_no_precision():
    """accelerate's is that of the first Accelerator, and raises where there is none."""
    reset()
    with pytest.raises(ValueError):
        pytest.importorskip("accelerate.state").AcceleratorState()
    state = AcceleratorState()
    assert (state.num_processes, state.process_index, state.device) == (1, 0, torch.device("cpu"))
    assert "Mixed precision" not in repr(state)
    with pytest.raises(RuntimeError, match=r"ask your Accelerator, `accelerator.mixed_precision`"):
        state.mixed_precision  # noqa: B018
    AcceleratorState._reset_state()  # of what is global there; here a new Accelerator may differ anyway
    assert ours(mixed_precision="bf16").state.mixed_precision == "bf16"


def test_states_of_two_accelerators_are_their_own_where_accelerates_are_one():
    one, two = ours(mixed_precision="bf16"), ours()
    assert (one.state.mixed_precision, two.state.mixed_precision) == ("bf16", "no")
    assert one.state.device == torch.device("cpu")
