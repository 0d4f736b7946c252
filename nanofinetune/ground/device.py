"""The device seam: which device a run uses, what XLA wants otherwise, and what a process asks of its operating system.

>>> choose_device("cpu")
device(type='cpu')
>>> choose_device("gpu")
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: --device gpu: there is no such device; choose auto, cpu, cuda, cuda:N, mps, tpu or xla
>>> fixed_lengths(200)
(32, 64, 128, 200)

Underneath: `accelerate.state.PartialState` (accelerate 1.15) picks among a dozen backends by the environment and by
what imports; for XLA it wants one process a device, and its optimizer wrapper all-reduces their gradients. Here the
choice is one function, and one process drives all XLA devices. `tpu` is the native device of the package torch_tpu (for
torch 2.11 and up); `xla` is torch_xla (2.9 is the last, for torch 2.9 only), where operations are only recorded until
the step ends. No real TPU was used: `tpu` has never run, `xla` ran as 1, 2 and 4 XLA devices on a CPU.
`keep_freed_memory` has no counterpart there: glibc's malloc returns large blocks to the kernel when they are freed, and
gets them anew, zeroed page by page, a moment later. A training step frees and allocates the same blocks every time.

Proof: test_choose_device_matches_torch, test_auto_matches_accelerate_partial_state, test_no_tpu_here_is_one_line,
test_keep_freed_memory_stops_page_faults, test_peak_rss_matches_resource_usage and
test_seconds_since_start_includes_what_came_before_the_import in tests/test_device.py; in an environment of its own,
which tests/xla/environment.sh makes, test_steps_on_xla_match_the_cpu, test_fixed_lengths_bound_the_compilations and
test_torch_manual_seed_does_not_reach_xla in tests/xla/test_xla.py.
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

    Ask for `xla` before the first backward pass on the CPU. underneath: that pass sizes autograd's list of devices for
    good, and without XLA in it a later backward pass there is an internal assert of torch.

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
    # Not hasattr(torch, "tpu"): that is true wherever torch_tpu is installed.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == "tpu"
