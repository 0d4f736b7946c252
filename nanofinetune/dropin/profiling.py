"""torch's profiler around a block, each rank's trace in a file of its own.

>>> from types import SimpleNamespace
>>> accelerator = SimpleNamespace(profile_handler=None, process_index=0)
>>> with profile(accelerator, ProfileKwargs(activities=["cpu"])) as profiler:
...     pass
>>> type(profiler).__name__
'profile'

Underneath: `accelerate.Accelerator.profile`, `accelerate.utils.ProfileKwargs` (accelerate 1.15), around
`torch.profiler.profile` (torch 2.13).
  - Kept: fields, names of files (profile_0.json, ...), the wait for all ranks after they are written.

Proof: test_profile_writes_what_accelerate_writes, test_profile_kwargs_match_accelerate in
tests/dropin/test_profiling.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nanofinetune.settings import ProfileKwargs


@contextmanager
def profile(accelerator: Any, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
    """A `with` block under torch's profiler, whose value is the profiler. With a folder for traces, a collective."""
    handler = profile_handler or accelerator.profile_handler or ProfileKwargs()
    with handler.build() as profiler:
        yield profiler
    if handler.output_trace_dir is not None:
        os.makedirs(handler.output_trace_dir, exist_ok=True)
        profiler.export_chrome_trace(
            os.path.join(handler.output_trace_dir, f"profile_{accelerator.process_index}.json")
        )
        accelerator.wait_for_everyone()
