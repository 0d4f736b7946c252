"""What training on XLA devices needs and other devices do not: there, these functions do nothing more than torch does.

>>> fixed_lengths(200)  # a batch is padded to the next of these, so that XLA compiles few shapes
(32, 64, 128, 200)
>>> manual_seed(0, torch.device("cpu"))  # torch.manual_seed; on an XLA device its generator is seeded as well

Underneath: `accelerate.optimizer.AcceleratedOptimizer` (accelerate 1.15) expects one process per XLA device, and
all-reduces their gradients itself.
  - Here one process drives all devices: the rows of a batch are spread over them, and XLA's partitioner inserts the
    all-reduces.
  - XLA only records operations. `end_step` compiles and starts what was recorded, anew for every shape.
  - torch_xla 2.9, its last release, needs torch 2.9. It ran as 1, 2 and 4 XLA devices on a CPU, never on a TPU.

Proof: test_steps_on_xla_match_the_cpu, test_fixed_lengths_bound_the_compilations in tests/xla/test_xla.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nanofinetune.ground.errors import UsageError


def xla_device() -> torch.device:
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


def spread_rows(batch: Mapping[str, Tensor], device: torch.device) -> None:
    """Spread the rows of a batch, (B, ...) each and on the device, over all XLA devices. Before the forward pass.

    Every device holds all parameters, so XLA's partitioner inserts an all-reduce wherever a sum over rows crosses
    devices; nothing else reduces gradients. Losses and updates are those of one device.
    """
    if device.type == "xla":
        from torch_xla import runtime
        from torch_xla.distributed import spmd

        count = runtime.global_runtime_device_count()
        mesh = spmd.Mesh(list(range(count)), (count,), ("rows",))
        for tensor in batch.values():
            spmd.mark_sharding(tensor, mesh, ("rows", *[None] * (tensor.ndim - 1)))


def end_step(device: torch.device) -> None:
    """Compile what was recorded since the last call, unless it is compiled already, and start it: the end of a step."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def manual_seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed, which also seeds XLA's dropout."""
    torch.manual_seed(seed)
    if device.type == "xla":  # underneath: torch's seeds the CPU, CUDA, MPS and native devices; XLA is none of these
        import torch_xla

        torch_xla.manual_seed(seed)


def state_on_host(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, to be saved: XLA tensors have no memory to write. Tied weights stay tied.

    Tensors that are on the CPU already are not copied.
    """
    held = module.state_dict(keep_vars=True)
    moved = {id(tensor): tensor.detach().cpu() for tensor in held.values()}
    return {name: moved[id(tensor)] for name, tensor in held.items()}


def fixed_lengths(limit: int) -> tuple[int, ...]:
    """32, 64, 128 ... and `limit`, in tokens: pad each batch to the next of these, as XLA compiles each new shape."""
    if limit < 1:
        raise ValueError(f"limit is {limit}: it is the most tokens that a row may have, at least 1")
    return (*(2**k for k in range(5, limit.bit_length()) if 2**k < limit), limit)
