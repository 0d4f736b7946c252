"""What Accelerate's scripts read from an Accelerator without a call, and ours keeps elsewhere.

>>> from types import SimpleNamespace
>>> native_amp(SimpleNamespace(mixed_precision="bf16"))
True

Underneath: `accelerate.Accelerator` (accelerate 1.15) has a property for each of these.
  - Each function here is one of them; an Accelerator calls it when its name is read.
  - `state` is a view of the World with the precision, made anew each time.
  - What belongs to another backend answers as without one: None or False.

Proof: test_attributes_match_accelerate, test_even_batches_can_be_set_as_in_accelerate in
tests/dropin/test_attributes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanofinetune.dropin.partial_state import AcceleratorState, DistributedType


def state(accelerator: Any) -> AcceleratorState:
    """The ranks and the precision."""
    return AcceleratorState(accelerator.mixed_precision, world=accelerator.world)


def project_dir(accelerator: Any) -> str | None:
    return accelerator.project_configuration.project_dir


def logging_dir(accelerator: Any) -> str | None:
    """Where trackers write: the folder named for it, or else that of the project."""
    return accelerator.project_configuration.logging_dir


def save_iteration(accelerator: Any) -> int:
    return accelerator.project_configuration.iteration


def multi_device(accelerator: Any) -> bool:
    """Whether there are several GPUs."""
    return accelerator.distributed_type == DistributedType.MULTI_GPU


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


def should_save_model(accelerator: Any) -> bool:
    return accelerator.is_local_main_process


def _always(answer: Any) -> Callable[[Any], Any]:
    return lambda accelerator: answer


deepspeed_plugin = parallelism_config = torch_device_mesh = _always(None)
fp8_recipe_handler = ao_recipe_handler = te_recipe_handler = msamp_recipe_handler = _always(None)
is_fsdp2 = is_composable_parallelism_enabled = has_lomo_optimizer = _always(False)
fp8_enabled = has_fp8_handler = delayed_fp8_autocast = _always(False)
