"""Ranks that run out of batches before others, and a backward that averages inside a window.

>>> from types import SimpleNamespace
>>> alone = SimpleNamespace(use_distributed=False)
>>> with join_uneven_inputs(alone, []):
...     pass  # one process waits for nobody
>>> with trigger_sync_in_backward(alone, torch.nn.Linear(1, 1)):
...     pass

Underneath: `accelerate.Accelerator.join_uneven_inputs`, `accelerate.Accelerator.trigger_sync_in_backward`
(accelerate 1.15), over `torch.distributed.algorithms.Join` (torch 2.13).
  - Kept: names, arguments, `even_batches` that holds for the block only.
  - Works on CPUs as well, where Accelerate warns and does nothing.
  - `Accelerator(uneven="mask")` needs neither: ranks get as many steps, and weigh as much as they have rows.

Proof: test_join_uneven_inputs_matches_torch_join_where_accelerate_leaves_cpus_out,
test_trigger_sync_in_backward_matches_accelerate in tests/dropin/test_uneven.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.algorithms import Join

from nanofinetune.dropin.parallel import DistributedDataParallel
from nanofinetune.ranks.shard import BatchSamplerShard


@contextmanager
def join_uneven_inputs(accelerator: Any, joinables: list[Any], even_batches: bool | None = None) -> Iterator[None]:
    """A `with` block in which ranks without batches take part in the others' backwards.

    `even_batches`: for the prepared loaders, in this block; None leaves them, and joins only if they are uneven.
    """
    if not accelerator.use_distributed:
        yield
        return
    shards = [loader.batch_sampler for loader in accelerator._prepared.loaders]
    shards = [shard for shard in shards if isinstance(shard, BatchSamplerShard)]
    before = [shard.even_batches for shard in shards]
    if even_batches is None:
        even_batches = accelerator.even_batches
    else:
        if len(shards) < len(accelerator._prepared.loaders):
            text = "join_uneven_inputs: even_batches is only supported for map-style datasets, not for streams"
            warnings.warn(text, stacklevel=3)
        for shard in shards:
            shard.even_batches = even_batches
    try:
        with Join(joinables, enable=not even_batches, throw_on_early_termination=False):
            yield
    finally:
        for shard, value in zip(shards, before, strict=True):
            shard.even_batches = value


@contextmanager
def trigger_sync_in_backward(accelerator: Any, model: torch.nn.Module) -> Iterator[None]:
    """A `with` block whose backwards average, although their forwards were run under `no_sync`.

    All of them, where Accelerate's averages the first one only.
    """
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_backward_grad_sync = model.require_backward_grad_sync, True
    model._expected = model._triggered = True
    try:
        yield
    finally:
        model._expected = model._triggered = False
        model.require_backward_grad_sync = before
