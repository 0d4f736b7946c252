"""Try again with smaller batches when memory runs out, on all ranks alike.

>>> @find_executable_batch_size(starting_batch_size=10)
... def train(batch_size):
...     if batch_size > 8:
...         raise RuntimeError("CUDA out of memory")
...     return batch_size
>>> train()
8

Underneath: `accelerate.utils.find_executable_batch_size`, `accelerate.utils.release_memory` (accelerate 1.15).
  - Kept: names, arguments, nine tenths of the batch after each failure.
  - There each rank decides for itself, so that ranks go on with other batches; here all try again if one has to.
  - A rank that waits in a collective for one that failed learns of it by the time-out, as there.

Proof: test_find_executable_batch_size_matches_accelerate, test_all_ranks_try_again_where_accelerate_shrinks_one in
tests/dropin/test_batch_size.py.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nanofinetune.run.run import out_of_memory


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Decorator: call `function(batch_size, ...)`, again with less while some rank's memory runs out.

    Args:
        function: its first argument is the batch size.
        starting_batch_size: rows.
        reduce_batch_size_fn: () -> the next size; None takes nine tenths.

    Raises RuntimeError when the size has reached zero, TypeError where the caller passes a batch size.
    """
    if function is None:
        return lambda function: find_executable_batch_size(function, starting_batch_size, reduce_batch_size_fn)
    size = starting_batch_size

    @functools.wraps(function)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            if not parameters:
                raise TypeError(f"{function.__name__} must take the batch size as its first argument")
            if len(parameters) < len(args) + 1:
                name = next(iter(parameters)).name
                raise TypeError(f"{function.__name__} is given its {name} by the decorator: leave it out of the call")
        _free()
        while True:
            if size == 0:
                raise RuntimeError("No executable batch size found, reached zero.")
            failed, result = False, None
            try:
                result = function(size, *args, **kwargs)
            except Exception as error:
                # cuDNN says the second where a tensor is too large for it
                if not (out_of_memory(error) or "CUDNN_STATUS_NOT_SUPPORTED" in str(error)):
                    raise
                failed = True
            if not _on_any_rank(failed):
                return result
            result = None
            _free()  # underneath: Accelerate does it while the error's frames still hold the tensors
            size = int(size * 0.9) if reduce_batch_size_fn is None else reduce_batch_size_fn()

    return decorated


def release_memory(*objects: Any) -> list[None]:
    """One None for each object, for the caller to assign to its names; then memory that nobody holds is free."""
    count = len(objects)
    del objects
    _free()
    return [None] * count


def _on_any_rank(failed: bool) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return failed
    group = dist.new_group(backend="gloo")  # one of its own: the failed call may have left collectives half done
    flag = torch.tensor(int(failed))
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    dist.destroy_process_group(group)
    return bool(flag)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
