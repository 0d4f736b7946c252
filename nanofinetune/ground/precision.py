"""The precision of a run: the one that was asked for, checked against what the device can do.

>>> checked_precision("bf16", torch.device("cpu")), checked_precision("no", torch.device("cpu"))
('bf16', 'no')
>>> checked_precision("fp16", torch.device("cpu"))
Traceback (most recent call last):
nanofinetune.ground.errors.UsageError: mixed_precision is 'fp16', and a CPU has no half-precision training: ...

Underneath: `accelerate.state.AcceleratorState` (accelerate 1.15) resolves `mixed_precision`.
  - On a CPU it accepts "fp16", trains in fp32 without a word, and still reports "fp16". Here that is refused.
  - Kept: "no", "bf16" and "fp16", as an argument or as what `accelerate launch` says. Left out: "fp8".

Proof: test_mixed_precision_matches_accelerate, test_fp16_on_cpu_is_refused_where_accelerate_trains_fp32 in
tests/test_accelerator.py.
"""

from __future__ import annotations

import os

import torch

from nanofinetune.ground.errors import UsageError

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def checked_precision(name: str | None, device: torch.device) -> str:
    """The precision in force, checked against the device: the one named, else the environment's, else "no"."""
    for variable in ("NANOFINETUNE_MIXED_PRECISION", "ACCELERATE_MIXED_PRECISION"):
        name = name or os.environ.get(variable)
    name = name or "no"
    if name not in PRECISIONS:
        raise UsageError(f"mixed_precision is {name!r}: choose {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        # underneath: Accelerate trains in fp32 then, without a word, and still reports "fp16"
        raise UsageError("mixed_precision is 'fp16', and a CPU has no half-precision training: choose bf16, or a GPU")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"mixed_precision is 'bf16', which {torch.cuda.get_device_name(device)} lacks: choose fp16")
    return name
