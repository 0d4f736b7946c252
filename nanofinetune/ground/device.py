"""Which device a run uses: the best one of this machine, or the one that is named, checked to be there.

>>> choose_device("cpu"), backend_for(torch.device("cpu"))
(device(type='cpu'), 'gloo')
>>> choose_device("gpu")
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: --device gpu: there is no such device; choose auto, cpu, cuda, ...

Underneath: `accelerate.state.PartialState` (accelerate 1.15) picks among a dozen backends, by environment variables and
by which packages can be imported.
  - Here the choice is one function. A device that is missing is an error of one line, never another device.
  - `tpu` is the native device of the package torch_tpu, for torch 2.11 and later. No real TPU was used: it has never
    run.
  - `xla` is the device of torch_xla; see ground/xla.py.

Proof: test_auto_matches_accelerate_partial_state, test_no_tpu_here_is_one_line in tests/ground/test_device.py.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch

from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.xla import xla_device

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "tpu": "tpu_dist"}  # torch.distributed's; torch_tpu registers its own


def choose_device(name: str = "auto") -> torch.device:
    """`auto` (cuda, else mps, else tpu, else cpu) or the device that is named, checked to be there.

    Ask for `xla` before the first backward pass on the CPU. underneath: that pass fixes the size of autograd's list of
    devices; if XLA is not in it by then, a later backward pass on XLA fails with an internal assert of torch.

    Raises:
        UsageError: a kind of device that does not exist, or that this machine does not have.
    """
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "tpu": _sees_tpu()}
        name = next((kind for kind in found if found[kind]), "cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|mps|tpu|xla|cuda(:[0-9]+)?", name):
        choices = "auto, cpu, cuda, cuda:N, mps, tpu or xla"
        raise UsageError(f"--device {name}: there is no such device; choose {choices}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here; choose --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {name}: torch sees no Apple GPU here; choose --device cpu")
    if kind == "tpu" and not _sees_tpu():
        why = "torch_tpu finds none" if find_spec("torch_tpu") else "pip install torch-tpu on a machine that has one"
        raise UsageError(f"--device tpu: no TPU here: {why}, or choose --device cpu")
    return xla_device() if kind == "xla" else torch.device(name)


def backend_for(device: torch.device) -> str:
    """The torch.distributed backend of several processes on such devices; UsageError where only one process can be."""
    if device.type == "xla":
        raise UsageError("--device xla: one process drives all XLA devices; start it with python, without torchrun")
    if device.type not in BACKENDS:
        raise UsageError(f"--device {device.type} is one device for one process: choose --device cpu for several")
    return BACKENDS[device.type]


def _sees_tpu() -> bool:
    # Not hasattr(torch, "tpu"): that is true wherever torch_tpu is installed, with or without a TPU.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == "tpu"
