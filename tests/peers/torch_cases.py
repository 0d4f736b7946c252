"""Run a case of torch's own tests of DistributedDataParallel, on gloo and a CPU, with a class of one's choice.

Most cases ask for GPUs, which they need for nothing but speed: here a GPU's number means the CPU.
"""

import contextlib
import os
import sys
import types
import unittest
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode


def internals() -> None:
    """Let torch.testing._internal be imported without expecttest, which is no dependency of torch itself."""
    stand_in: Any = types.ModuleType("expecttest")
    stand_in.TestCase, stand_in.ACCEPT = unittest.TestCase, False
    sys.modules.setdefault("expecttest", stand_in)


def cases() -> Any:
    """torch's module with its distributed tests, whose decorators skip nothing for want of a GPU."""
    os.environ.setdefault("BACKEND", "gloo")
    os.environ.setdefault("WORLD_SIZE", "2")
    internals()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.testing._internal.common_distributed as common

        decorators: Any = common
        decorators.skip_if_lt_x_gpu = lambda *args, **kwargs: lambda function: function
        decorators.skip_if_no_gpu = lambda function: function
        from torch.testing._internal.distributed import distributed_test
    return distributed_test


def _cpu(value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return "cpu" if is_number or (isinstance(value, (str, torch.device)) and str(value).startswith("cuda")) else value


class OnCPU(TorchFunctionMode):
    """Tensors that are made on, or moved to, a GPU stay on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu(kwargs["device"])
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*(map(_cpu, args) if func is torch.Tensor.to else args), **kwargs)


class _NoDevice(contextlib.nullcontext[None]):
    def __init__(self, device: Any = None) -> None:
        super().__init__()


def _put_in(peer: Any, ddp: Any) -> None:
    """`ddp` in the place of torch's class, without the numbers of its GPUs; and modules stay on the CPU."""
    init, to = ddp.__init__, nn.Module.to

    def without_devices(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device_ids", "output_device")}
        init(self, *args, **kwargs)

    ddp.__init__ = without_devices
    library: Any = nn.parallel
    library.DistributedDataParallel = ddp
    for name in {"DistributedDataParallel", "DDP"} & set(vars(peer)):
        setattr(peer, name, ddp)
    changed: Any = nn.Module
    changed.to = lambda self, *args, **kwargs: to(self, *map(_cpu, args), **{k: _cpu(v) for k, v in kwargs.items()})
    changed.cuda = lambda self, *args, **kwargs: self
    cuda: Any = torch.cuda
    cuda.set_device = cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_device, cuda.device = lambda: torch.device("cpu"), _NoDevice


def run_case(name: str, whose: str, folder: str) -> str:
    """In a rank without a group: what became of the case, "pass" or the error's type and first line."""
    os.environ.update(BACKEND="gloo", TEMP_DIR=folder, GLOO_SOCKET_IFNAME="lo")
    warnings.simplefilter("ignore")
    peer, rank = cases(), int(os.environ["RANK"])
    if whose == "ours":
        from nanofinetune import DistributedDataParallel as ours

        _put_in(peer, ours)
    else:
        _put_in(peer, nn.parallel.DistributedDataParallel)

    Case: Any = type("Case", (peer.TestDistBackend, peer.DistributedTest._DistTestBase), {})

    function = getattr(Case, name)
    if getattr(function, "__unittest_skip__", False):
        return f"skipped: {function.__unittest_skip_why__}"
    case: Any = Case.__new__(Case)
    unittest.TestCase.__init__(case, name)
    case.rank, case.file_name = rank, str(Path(folder, "store"))
    dist.init_process_group(
        "gloo", init_method=f"file://{case.file_name}", world_size=2, rank=rank, timeout=timedelta(seconds=60)
    )
    try:
        with OnCPU(), contextlib.redirect_stdout(None):
            function(case)
        return "pass"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
