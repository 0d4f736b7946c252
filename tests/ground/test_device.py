"""The choice of a device is torch's own (torch 2.13) and Accelerate's (accelerate 1.15). TPUs are played by stand-ins.

python -m pytest tests/ground/test_device.py
"""

import re
import sys

import pytest
import torch
from helpers import run_python

from nanofinetune.ground import device
from nanofinetune.ground.device import backend_for, choose_device
from nanofinetune.ground.errors import UsageError
from nanofinetune.step.optim import FUSED_DEVICES


def test_choose_device_matches_torch():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    chosen = accelerator if accelerator and accelerator.type in ("cuda", "mps", "tpu") else torch.device("cpu")
    assert choose_device("auto") == choose_device() == chosen
    assert choose_device(chosen.type) == chosen
    assert choose_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert choose_device("cuda:0") == torch.device("cuda:0")


def test_auto_matches_accelerate_partial_state():
    state = pytest.importorskip("accelerate.state", reason="the extra `test` (accelerate) is not installed")
    state.PartialState._reset_state()
    try:
        assert choose_device("auto").type == state.PartialState().device.type
    finally:
        state.PartialState._reset_state()


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(1, 0, "cuda"), (1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_takes_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setattr(device, "_sees_tpu", lambda: False)
    assert choose_device() == torch.device(chosen)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps:1", "tpu:0", "xla:1", "", "CUDA"])
def test_what_is_no_kind_of_device_is_refused(name):
    with pytest.raises(UsageError) as error:
        choose_device(name)
    assert str(error.value).startswith(
        f"--device {name}: there is no such device; choose auto, cpu, cuda, cuda:N, mps, tpu or xla"
    )


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"--device cuda: torch sees no CUDA device here; choose --device cpu"):
        choose_device("cuda")
    with pytest.raises(UsageError, match=r"--device mps: torch sees no Apple GPU here; choose --device cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"--device cuda:2: there are 2 CUDA devices, numbered from 0"):
        choose_device("cuda:2")


def test_no_tpu_here_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert refusal("tpu") == (
        "--device tpu: no TPU here: pip install torch-tpu on a machine that has one, or choose --device cpu"
    )
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    assert refusal("tpu") == "--device tpu: no TPU here: torch_tpu finds none, or choose --device cpu"
    monkeypatch.setitem(sys.modules, "torch_xla", None)  # what cannot be imported
    assert re.fullmatch(
        r"--device xla: no TPU here: torch_xla does not load \(.+\); pip install torch==2.9.1 torch-xla==2.9.0,"
        " or choose --device cpu",
        refusal("xla"),
    )


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as error:
        choose_device(name)
    return str(error.value)


def test_tpu_is_taken_where_torch_has_one_as_its_accelerator():
    code = """
        import torch
        torch.utils.rename_privateuse1_backend("tpu")  # for good, as torch_tpu does it: so in a process of its own
        from nanofinetune.ground.device import backend_for, choose_device
        seen = []
        def current_accelerator(check_available=False):
            seen.append(check_available)
            return torch.device("tpu")
        torch.accelerator.current_accelerator = current_accelerator
        torch.cuda.is_available = torch.backends.mps.is_available = lambda: False
        assert choose_device("tpu") == choose_device("auto") == torch.device("tpu")
        assert all(seen)  # a TPU that was compiled for and is not there does not count
        assert backend_for(torch.device("tpu")) == "tpu_dist"
    """
    run_python(code)


def test_backend_for_several_processes():
    assert backend_for(torch.device("cpu")) == "gloo"
    assert backend_for(torch.device("cuda:1")) == "nccl"
    with pytest.raises(
        UsageError, match=r"^--device mps is one device for one process: choose --device cpu for several$"
    ):
        backend_for(torch.device("mps"))
    for backend in ("gloo", "nccl"):
        assert backend in torch.distributed.Backend.backend_list


def test_the_fused_adamw_is_not_for_tpus():
    assert not FUSED_DEVICES & {"tpu", "xla"}
