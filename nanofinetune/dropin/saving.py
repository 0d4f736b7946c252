"""Save weights, or any object, without a whole checkpoint: rank 0 writes.

>>> from types import SimpleNamespace
>>> rank_1 = SimpleNamespace(is_main_process=False)
>>> save(rank_1, {"w": torch.zeros(1)}, "nowhere")  # another rank writes nothing

Underneath: `accelerate.Accelerator.save_model`, `accelerate.Accelerator.save`, `accelerate.Accelerator.get_state_dict`,
`accelerate.Accelerator.register_save_state_pre_hook` (accelerate 1.15).
  - Kept: names, arguments, sharded files that `from_pretrained` loads, hooks before a save and a load.
  - A hook's files lie in the folder that it is given; the checkpoint then goes into its "state".
  - Nothing here unpickles.

Proof: test_save_model_writes_what_accelerate_writes, test_hooks_around_a_state_match_accelerate in
tests/dropin/test_saving.py.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def save_model(
    accelerator: Any, model: nn.Module, save_directory: str | os.PathLike[str], max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:  # fmt: skip
    """Save the weights alone, unwrapped, in files of at most `max_shard_size`: safetensors, or pickled ones."""
    if accelerator.is_main_process:
        from huggingface_hub import save_torch_state_dict

        os.makedirs(save_directory, exist_ok=True)
        state = accelerator.unwrap_model(model).state_dict()
        save_torch_state_dict(
            state, Path(save_directory), max_shard_size=max_shard_size, safe_serialization=safe_serialization
        )


def get_state_dict(accelerator: Any, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """A model's weights by name; those of the wrapper, whose names begin with "module.", without `unwrap`."""
    return (accelerator.unwrap_model(model) if unwrap else model).state_dict()


def save(accelerator: Any, obj: Any, f: Any, safe_serialization: bool = False) -> None:
    """torch.save on rank 0, or a dict of tensors as a safetensors file; of tensors that share memory the first one."""
    if accelerator.is_main_process and safe_serialization:
        from safetensors.torch import save_file

        first: dict[Any, str] = {}
        for name, tensor in obj.items():
            same = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
            first.setdefault(same, name)  # underneath: Accelerate drops all but one view of a memory, equal or not
        save_file({name: obj[name].contiguous() for name in first.values()}, f, metadata={"format": "pt"})
    elif accelerator.is_main_process:
        torch.save(obj, f)


def register_save_state_pre_hook(accelerator: Any, hook: Callable[..., None]) -> RemovableHandle:
    """Let `save_state` call `hook(models, weights, output_dir)` first, on every rank -> a handle with `remove()`.

    models: what was prepared, unwrapped. weights: their state dicts; what the hook changes there is saved so, and a
    model whose dict it takes out of the list is not saved. output_dir: an existing folder, a str.
    """
    return _register(accelerator, "save_hooks", hook)


def register_load_state_pre_hook(accelerator: Any, hook: Callable[..., None]) -> RemovableHandle:
    """Let `load_state` call `hook(models, input_dir)` first, on every rank -> a handle with `remove()`.

    A model that the hook takes out of the list is not loaded.
    """
    return _register(accelerator, "load_hooks", hook)


def call_hooks(accelerator: Any, kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Call the hooks for "save_hooks" or "load_hooks", in order -> where the checkpoint is, and the objects in it.

    With hooks it is in the folder's "state": a checkpoint's own folder holds nothing else.
    """
    things = accelerator._prepared.stateful(accelerator.scaler)
    hooks = list(accelerator.__dict__.get(kind, {}).values())
    place = folder / "state"
    if not hooks:
        return place if kind == "load_hooks" and place.is_dir() else folder, things
    names = [name for name in things if name.split("_")[0] == "model"]
    models = [things[name] for name in names]
    saved = [model.state_dict() for model in models] if kind == "save_hooks" else models
    left = list(saved)
    if kind == "save_hooks":
        if accelerator.project_configuration.automatic_checkpoint_naming:
            raise NotImplementedError("hooks and automatic_checkpoint_naming are not supported together: name a folder")
        folder.mkdir(parents=True, exist_ok=True)
    for hook in hooks:
        hook(*([list(models), left] if kind == "save_hooks" else [left]), str(folder))
    for name, state in zip(names, saved, strict=True):
        if not any(state is each for each in left):
            del things[name]
        elif kind == "save_hooks":
            things[name] = SimpleNamespace(state_dict=partial(dict, state))
    return place if kind == "save_hooks" or place.is_dir() else folder, things


def _register(accelerator: Any, kind: str, hook: Callable[..., None]) -> RemovableHandle:
    hooks = accelerator.__dict__.setdefault(kind, OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
