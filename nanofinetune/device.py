"""The device seam: which device a run uses, what XLA wants otherwise, and what a process asks of its operating system.

>>> choose_device("cpu")
device(type='cpu')
>>> choose_device("gpu")
Traceback (most recent call last):
nanofinetune.errors.UsageError: --device gpu: there is no such device; choose auto, cpu, cuda, cuda:N, mps, tpu or xla
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

import ctypes
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from nanofinetune.errors import UsageError

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "tpu": "tpu_dist"}  # torch.distributed's; torch_tpu registers its own
_IMPORTED = time.monotonic()
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


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
    return _xla_device() if kind == "xla" else torch.device(name)


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


def _xla_device() -> torch.device:
    """torch_xla's device, with one process for all of them (SPMD), or a UsageError."""
    asked = os.environ.get("PJRT_DEVICE")  # torch_xla writes its own choice there
    try:
        import torch_xla
        from torch_xla import runtime
    except ImportError as error:
        why, pins = " ".join(str(error).split())[:80], "torch==2.9.1 torch-xla==2.9.0"
        raise UsageError(
            f"--device xla: no TPU here: torch_xla does not load ({why}); pip install {pins}, or choose --device cpu"
        ) from error
    if runtime.device_type() == "CPU" and asked != "CPU":  # underneath: it logs one line, and trains on the CPU
        raise UsageError("--device xla: no TPU here: torch_xla finds none; set PJRT_DEVICE=CPU to try XLA on the CPU")
    if runtime.process_count() > 1:
        raise UsageError(f"--device xla: {runtime.process_count()} hosts share this TPU; use a TPU of one host")
    if not runtime.is_spmd():
        runtime.use_spmd()
    return torch_xla.device()


# --- what XLA wants otherwise. On other devices end_step and spread_rows do nothing -----------------------------------


def spread_rows(batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Spread the rows of a batch, (B, ...) each and on the device, over all XLA devices. Before the forward pass.

    No one reduces gradients: the parameters are whole on every device, so XLA's partitioner has to put an all-reduce
    wherever a sum over rows crosses devices. Losses and updates are those of one device.
    """
    if device.type == "xla":
        from torch_xla import runtime
        from torch_xla.distributed import spmd

        count = runtime.global_runtime_device_count()
        mesh = spmd.Mesh(list(range(count)), (count,), ("rows",))
        for tensor in batch.values():
            spmd.mark_sharding(tensor, mesh, ("rows", *[None] * (tensor.ndim - 1)))


def end_step(device: torch.device) -> None:
    """Compile what was recorded since the last call, or find it compiled, and start it. After optimizer.zero_grad()."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def manual_seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed, for XLA's dropout too."""
    torch.manual_seed(seed)
    if device.type == "xla":  # underneath: it seeds the CPU, CUDA, MPS and native devices, and XLA is none of these
        import torch_xla

        torch_xla.manual_seed(seed)


def state_on_host(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, to be saved: XLA tensors have no memory to write. What is tied stays tied.

    What is on the CPU already is not copied.
    """
    held = module.state_dict(keep_vars=True)
    moved = {id(tensor): tensor.detach().cpu() for tensor in held.values()}
    return {name: moved[id(tensor)] for name, tensor in held.items()}


def fixed_lengths(limit: int) -> tuple[int, ...]:
    """32, 64, 128 ... and `limit`: pad each batch to the next of these, for XLA compiles anew for every shape."""
    if limit < 1:
        raise ValueError(f"limit is {limit}: it is the most tokens that a row may have, at least 1")
    return (*(2**k for k in range(5, limit.bit_length()) if 2**k < limit), limit)


# --- what a process asks of its operating system ----------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next step -> whether that could be told (glibc only).

    Call it once, before the first large allocation. The process keeps its peak memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block gets a mapping of its own (those are unmapped when freed), and the heap's end is never given back.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return [mallopt(option, value) for option, value in settings] == [1, 1, 1]


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the one that started it is gone; Linux only."""
    # underneath: whoever kills torchrun leaves its workers running.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG (prctl.h)


def peak_rss_mb(pid: int | None = None) -> float:
    """The most memory this process, or the one of that number, ever held, in MiB (0.0 where the system does not tell).

    Of another process only Linux tells, and only while it runs.
    """
    # underneath: on Linux ru_maxrss outlives exec, so a small process that a large one started (torchrun, a benchmark)
    # reports its parent's peak; VmHWM is its own.
    if found := re.search(r"VmHWM:\s*(\d+) kB", _read(f"/proc/{'self' if pid is None else pid}/status")):
        return int(found[1]) / 2**10
    if pid is not None:
        return 0.0
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def seconds_since_start() -> float:
    """Seconds since this process began, the start of the interpreter and all imports included (to 0.01 s).

    Only Linux tells when a process began; elsewhere it is seconds since this module was imported.
    """
    stat = _read("/proc/self/stat").rpartition(")")[2].split()  # what follows the name, which may hold anything
    if not stat or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.monotonic() - _IMPORTED
    began = int(stat[19]) / os.sysconf("SC_CLK_TCK")  # proc(5), field 22: starttime, in ticks since the machine booted
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def _read(path: str) -> str:
    """The text of one of the kernel's files, "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
