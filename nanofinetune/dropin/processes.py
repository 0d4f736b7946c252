"""Which process does what: decorators, a share of a list, a flag that every rank sees.

>>> from types import SimpleNamespace
>>> rank_1 = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
>>> with split_between_processes(rank_1, ["a", "b", "c"]) as part:
...     part
['c']
>>> on_main_process(rank_1, len)("abc") is None
True

Underneath: `accelerate.Accelerator.split_between_processes`, `accelerate.Accelerator.on_main_process`,
`accelerate.Accelerator.check_trigger` (accelerate 1.15).
  - Kept: names, arguments, results.
  - Accelerate's `split_between_processes` changes a dict that it is given; here it stays as it is.
  - What cannot be cut is refused; there every rank gets all of it.

Proof: test_each_decorator_runs_where_accelerates_does, test_split_between_processes_matches_accelerate in
tests/dropin/test_processes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from nanofinetune.ranks import collectives


@contextmanager
def split_between_processes(accelerator: Any, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
    """A `with` block whose value is this rank's part of a list, tuple, tensor or Dataset, or of each in a dict.

    `apply_padding` repeats the last item until all parts are equally long. Raises as part_of does.
    """
    place = accelerator.process_index, accelerator.num_processes, apply_padding
    if hasattr(inputs, "select") and hasattr(inputs, "column_names"):  # a Dataset
        yield (inputs if accelerator.num_processes == 1 else inputs.select(part_of([*range(len(inputs))], *place)))
    else:
        yield part_of(inputs, *place)


def main_process_first(accelerator: Any) -> AbstractContextManager[None]:
    """A `with` block that rank 0 runs before the others do. If it fails there, all ranks raise at once."""
    return collectives.main_process_first(accelerator.world)


def local_main_process_first(accelerator: Any) -> AbstractContextManager[None]:
    """A `with` block that the first rank of each node runs before all others do."""
    return collectives.local_main_process_first(accelerator.world)


def on_main_process(accelerator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the function runs on rank 0; elsewhere it does nothing and returns None."""
    return function if accelerator.is_main_process else _nothing


def on_local_main_process(accelerator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the function runs on the first rank of each node, and on no other."""
    return function if accelerator.is_local_main_process else _nothing


def on_last_process(accelerator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the function runs on the last rank, and on no other."""
    return function if accelerator.is_last_process else _nothing


def on_process(
    accelerator: Any, function: Callable[..., Any] | None = None, process_index: int | None = None
) -> Callable[..., Any]:
    """Decorator, with the number of a rank: the function runs there, and on no other; one process runs it anyway."""
    if process_index is None:
        raise ValueError("on_process: name the process_index on which the function is to run")
    if function is None:
        return lambda function: on_process(accelerator, function, process_index)
    return function if accelerator.process_index == process_index or not accelerator.use_distributed else _nothing


def on_local_process(
    accelerator: Any, function: Callable[..., Any] | None = None, local_process_index: int | None = None
) -> Callable[..., Any]:
    """Decorator, with the number of a rank on its node: the function runs there; one process runs it anyway."""
    if local_process_index is None:
        raise ValueError("on_local_process: name the local_process_index on which the function is to run")
    if function is None:
        return lambda function: on_local_process(accelerator, function, local_process_index)
    here = accelerator.local_process_index == local_process_index
    return function if here or not accelerator.use_distributed else _nothing


def print_once_a_node(accelerator: Any, *args: Any, **kwargs: Any) -> None:
    """Print once a node."""
    if accelerator.is_local_main_process:
        print(*args, **kwargs)


def set_trigger(accelerator: Any) -> None:
    """Raise a flag on this rank, which the next `check_trigger` sees on all."""
    accelerator.flag_tensor.fill_(1)


def check_trigger(accelerator: Any) -> bool:
    """Whether any rank has raised its flag; lowers all. A collective."""
    raised = accelerator.reduce(accelerator.flag_tensor).item() > 0
    accelerator.flag_tensor.zero_()
    return raised


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a function for another rank does on this one."""


def part_of(inputs: Any, rank: int, size: int, apply_padding: bool) -> Any:
    """Rank `rank`'s part of `size` nearly equal parts; the first ones take what is left over, one item each.

    Source: accelerate.PartialState.split_between_processes. Raises TypeError for what cannot be cut, ValueError for a
    dict of values that are not equally long.
    """
    if size == 1:
        return inputs
    if isinstance(inputs, dict):
        if len({len(values) for values in inputs.values()}) > 1:
            raise ValueError("split_between_processes: the values of the dict are not equally long")
        return {key: part_of(values, rank, size, apply_padding) for key, values in inputs.items()}
    if not isinstance(inputs, (list, tuple, torch.Tensor)):
        raise TypeError(f"split_between_processes: {type(inputs).__name__} is neither list, tuple, tensor nor dict")
    shorter, longer = divmod(len(inputs), size)
    begin = rank * shorter + min(rank, longer)
    indices = list(range(begin, begin + shorter + (rank < longer)))
    if apply_padding:
        indices += [len(inputs) - 1] * (shorter + (longer > 0) - len(indices))
    return inputs[indices] if isinstance(inputs, torch.Tensor) else type(inputs)(inputs[i] for i in indices)
