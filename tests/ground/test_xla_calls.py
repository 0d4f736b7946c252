"""Which calls of torch_xla are made, in which order, and what is refused: with a stand-in for torch_xla. On the CPU the
functions are compared with torch's own. The real torch_xla is run by tests/xla/test_xla.py, in another environment.

    python -m pytest tests/ground/test_xla_calls.py
"""

import bisect
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from nanofinetune.ground.device import backend_for, choose_device
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.xla import end_step, fixed_lengths, manual_seed, spread_rows, state_on_host


@pytest.fixture
def fake_xla(monkeypatch):
    """A torch_xla with one host and four TPU devices; the names of what was called, in order, are in its `calls`."""
    calls: list[str] = []

    def first_device() -> torch.device:
        calls.append("device")
        return torch.device("xla:0")

    runtime = SimpleNamespace(
        device_type=lambda: "TPU",
        process_count=lambda: 1,
        is_spmd=lambda: "use_spmd" in calls,
        use_spmd=lambda: calls.append("use_spmd"),
    )
    package = SimpleNamespace(
        runtime=runtime,
        device=first_device,
        sync=lambda: calls.append("sync"),
        manual_seed=lambda seed: calls.append(f"seed {seed}"),
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "torch_xla", package)
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    return package


def test_xla_is_one_process_for_all_devices(fake_xla, monkeypatch):
    xla = choose_device("xla")
    assert xla == torch.device("xla:0")
    assert fake_xla.calls == ["use_spmd", "device"]  # in this order, else torch_xla warns and copies
    choose_device("xla")
    assert fake_xla.calls.count("use_spmd") == 1
    with pytest.raises(UsageError, match=r"^--device xla: one process drives all XLA devices; start it with python, w"):
        backend_for(xla)
    monkeypatch.setattr(fake_xla.runtime, "process_count", lambda: 2)
    assert refusal("xla") == "--device xla: 2 hosts share this TPU; use a TPU of one host"


def test_xla_on_the_cpu_has_to_be_asked_for(fake_xla, monkeypatch):
    monkeypatch.setattr(fake_xla.runtime, "device_type", lambda: "CPU")
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    assert refusal("xla") == (
        "--device xla: no TPU here: torch_xla finds none; set PJRT_DEVICE=CPU to try XLA on the CPU"
    )
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert choose_device("xla") == torch.device("xla:0")


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as error:
        choose_device(name)
    return str(error.value)


def test_steps_end_and_seeds_are_set_on_xla_only(fake_xla):
    for kind, calls in (("cpu", []), ("xla", ["sync", "seed 3"])):
        end_step(torch.device(kind))
        manual_seed(3, torch.device(kind))
        drawn = torch.rand(4)
        assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
        assert fake_xla.calls == calls
    spread_rows({"labels": torch.ones(3)}, torch.device("cpu"))  # would need torch_xla.distributed, which is not there


def test_state_on_host_matches_state_dict():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    expected, state = module.state_dict(), state_on_host(module)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert not state[name].requires_grad
    assert state["0.weight"] is state["2.weight"]


@pytest.mark.parametrize("limit", [1, 31, 32, 33, 64, 65, 100, 128, 511, 512, 513])
def test_fixed_lengths_at_most_double_a_length(limit):
    lengths = fixed_lengths(limit)
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == limit
    assert len(lengths) <= max(1, math.ceil(math.log2(limit)) - 4)  # so many shapes, and so many compilations
    for longest in range(1, limit + 1):
        padded = lengths[bisect.bisect_left(lengths, longest)]
        assert longest <= padded <= max(32, 2 * longest - 1)


def test_fixed_lengths_need_a_limit():
    with pytest.raises(ValueError, match=r"^limit is 0: it is the most tokens that a row may have, at least 1$"):
        fixed_lengths(0)
