"""What Accelerate's scripts read from an Accelerator without a call, and ours keeps elsewhere.

>>> from types import SimpleNamespace
>>> multi_device(SimpleNamespace(use_distributed=True))
True

Underneath: `accelerate.Accelerator` (accelerate 1.15) has a property for each of these.
  - Each function here is one of them; an Accelerator calls it when its name is read.
  - `state` is a view of the World with the precision, made anew each time.

Proof: test_attributes_match_accelerate, test_what_is_absent_says_what_to_use_instead in
tests/dropin/test_attributes.py and tests/test_accelerator.py.
"""

from __future__ import annotations

import os
from typing import Any

from nanofinetune.dropin.state import AcceleratorState


def state(accelerator: Any) -> AcceleratorState:
    """The ranks and the precision."""
    return AcceleratorState(accelerator.world, accelerator.mixed_precision)


def project_dir(accelerator: Any) -> str | None:
    return accelerator.project_configuration.project_dir


def logging_dir(accelerator: Any) -> str | None:
    """Where trackers write: the folder named for it, or else that of the project."""
    configuration = accelerator.project_configuration
    found = configuration.logging_dir or configuration.project_dir
    return None if found is None else os.fspath(found)


def save_iteration(accelerator: Any) -> int:
    return accelerator.project_configuration.iteration


def multi_device(accelerator: Any) -> bool:
    return accelerator.use_distributed


def native_amp(accelerator: Any) -> bool:
    """Whether torch's own autocast is in use."""
    return accelerator.mixed_precision != "no"


def even_batches(accelerator: Any) -> bool:
    return accelerator.dataloader_config.even_batches


def non_blocking(accelerator: Any) -> bool:
    return accelerator.dataloader_config.non_blocking


def dispatch_batches(accelerator: Any) -> bool | None:
    return accelerator.dataloader_config.dispatch_batches


def use_seedable_sampler(accelerator: Any) -> bool:
    return accelerator.dataloader_config.use_seedable_sampler


def use_stateful_dataloader(accelerator: Any) -> bool:
    return accelerator.dataloader_config.use_stateful_dataloader
