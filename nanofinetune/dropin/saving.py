"""Save weights, or any object, without a whole checkpoint: rank 0 writes.

>>> from types import SimpleNamespace
>>> rank_1 = SimpleNamespace(is_main_process=False)
>>> save(rank_1, {"w": torch.zeros(1)}, "nowhere")  # another rank writes nothing

Underneath: `accelerate.Accelerator.save_model`, `accelerate.Accelerator.save`, `accelerate.Accelerator.get_state_dict`,
`accelerate.Accelerator.register_save_state_pre_hook` (accelerate 1.15).
  - Kept: names, arguments, sharded safetensors files that `from_pretrained` loads, hooks before a save and a load.
  - A hook gets copies of the lists; taking a model out of them does not keep it from being saved.
  - Left out: pickled weights; `safe_serialization=False` is refused.

Proof: test_save_and_get_state_dict_match_accelerate, test_public_names_and_signatures_match_accelerate in
tests/test_accelerator.py.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nanofinetune.settings import refuse


def save_model(
    accelerator: Any, model: nn.Module, save_directory: str | os.PathLike[str], max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:  # fmt: skip
    """Save the weights alone, unwrapped, in safetensors files of at most `max_shard_size`. Rank 0 writes."""
    refuse(safe_serialization=None if safe_serialization else False)
    if accelerator.is_main_process:
        from huggingface_hub import save_torch_state_dict

        os.makedirs(save_directory, exist_ok=True)
        state = accelerator.unwrap_model(model).state_dict()
        save_torch_state_dict(state, Path(save_directory), max_shard_size=max_shard_size)


def get_state_dict(accelerator: Any, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """A model's weights by name; those of the wrapper, whose names begin with "module.", without `unwrap`."""
    return (accelerator.unwrap_model(model) if unwrap else model).state_dict()


def save(accelerator: Any, obj: Any, f: Any, safe_serialization: bool = False) -> None:
    """torch.save on rank 0, or a dict of tensors that share no memory as a safetensors file."""
    if accelerator.is_main_process and safe_serialization:
        from safetensors.torch import save_file

        save_file(obj, f, metadata={"format": "pt"})
    elif accelerator.is_main_process:
        torch.save(obj, f)


def register_save_state_pre_hook(accelerator: Any, hook: Callable[..., None]) -> RemovableHandle:
    """Let `save_state` call `hook(models, weights, output_dir)` first, on every rank -> a handle with `remove()`.

    models: what was prepared, unwrapped. weights: their state dicts. output_dir: a path.
    """
    return _register(accelerator, "save_hooks", hook)


def register_load_state_pre_hook(accelerator: Any, hook: Callable[..., None]) -> RemovableHandle:
    """Let `load_state` call `hook(models, input_dir)` first, on every rank -> a handle with `remove()`."""
    return _register(accelerator, "load_hooks", hook)


def call_hooks(accelerator: Any, kind: str, folder: str) -> None:
    """Call the hooks that were registered for "save_hooks" or "load_hooks", in that order."""
    if kind not in accelerator.__dict__:
        return
    models = [accelerator.unwrap_model(model) for model in accelerator._prepared.models]
    weights = [[model.state_dict() for model in models]] if kind == "save_hooks" else []
    for hook in list(accelerator.__dict__[kind].values()):
        hook(list(models), *weights, folder)


def _register(accelerator: Any, kind: str, hook: Callable[..., None]) -> RemovableHandle:
    hooks = accelerator.__dict__.setdefault(kind, OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
