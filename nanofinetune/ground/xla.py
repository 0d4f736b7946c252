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
