"""Data parallelism in thirty lines: every rank holds the model, and the ranks average each gradient once it is there.

>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
>>> model = NaiveDDP(nn.Linear(2, 1))
>>> model(torch.ones(3, 2)).sum().backward()  # when this returns, gradients are the mean over the ranks
>>> model.module.weight.grad
tensor([[3., 3.]])
>>> dist.destroy_process_group()

Underneath: `torch.nn.parallel.DistributedDataParallel` (torch 2.13).
  - Kept: rank 0's weights and buffers at the start, the mean of each gradient over the ranks, `no_sync`.
  - Left out: buckets, overlap, unused parameters. ddp.py has all of these; here each parameter costs one blocking
    all-reduce.

Proof: test_gradients_match_torch_ddp, test_no_sync_matches_torch_ddp in tests/ranks/test_ddp.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class NaiveDDP(nn.Module):
    """Wrap `module`: same forward; after each backward outside `no_sync`, every `.grad` is the mean over the ranks.

    Every parameter must get a gradient on every rank, or the ranks wait for each other in vain.
    Source: torch.nn.parallel.DistributedDataParallel.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.require_backward_grad_sync, self._expected = True, False
        _broadcast([*module.parameters(), *module.buffers()])
        self._hook_parameters()

    def _hook_parameters(self) -> None:
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hook_parameters()  # underneath: copying or loading a parameter loses its hooks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.require_backward_grad_sync:
            _broadcast(self.module.buffers())  # BatchNorm's running statistics are rank 0's
            self._expected = True  # the next backward is this forward's, wherever it is called
        return self.module(*args, **kwargs)

    def _average(self, parameter: torch.Tensor) -> None:
        # The hook is given the parameter. Reducing that instead of its gradient would average the weights.
        if self._expected and parameter.grad is not None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            dist.all_reduce(parameter.grad.mul_(1 / dist.get_world_size()))

    def _end(self) -> None:
        self._expected = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block whose forwards have backwards that only add to each rank's own gradients."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before


def _broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite each tensor, in place, with rank 0's."""
    for tensor in tensors:
        values = tensor.detach().contiguous()
        # underneath: bytes, since gloo knows neither int16 nor float8
        dist.broadcast(values.reshape(-1).view(torch.uint8), src=0)
        # `.data`: unseen by autograd, which holds BatchNorm's buffers from the forward before and would complain.
        tensor.data.copy_(values)
