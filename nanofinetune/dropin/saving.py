"""Save weights, or any object, without a whole checkpoint: rank 0 writes.

>>> from types import SimpleNamespace
>>> rank_1 = SimpleNamespace(is_main_process=False)
>>> save(rank_1, {"w": torch.zeros(1)}, "nowhere")  # another rank writes nothing

Underneath: `accelerate.Accelerator.save_model`, `accelerate.Accelerator.save`, `accelerate.Accelerator.get_state_dict`
(accelerate 1.15).
  - Kept: names, arguments, sharded safetensors files that `from_pretrained` loads.
  - Left out: pickled weights; `safe_serialization=False` is refused.

Proof: test_save_and_get_state_dict_match_accelerate, test_public_names_and_signatures_match_accelerate in
tests/test_accelerator.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
