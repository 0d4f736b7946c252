"""Local SGD: ranks train by themselves, and every few updates average their weights instead of every gradient.

>>> from types import SimpleNamespace
>>> alone = SimpleNamespace(use_distributed=False)
>>> with LocalSGD(alone, torch.nn.Linear(1, 1), local_sgd_steps=8) as local_sgd:
...     local_sgd.step()  # one process averages with nobody

Underneath: `accelerate.local_sgd.LocalSGD` (accelerate 1.15), after Stich (2018), "Local SGD Converges Fast and
Communicates Little".
  - Kept: `no_sync` around the whole block, the mean of the weights every `local_sgd_steps` steps and at the end.
  - There `param.data` is replaced by another tensor; here it is overwritten in place.

Proof: test_local_sgd_matches_accelerate, test_local_sgd_alone_changes_nothing in tests/dropin/test_local_sgd.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


class LocalSGD:
    """A `with` block without averaged gradients; call `step` after each optimizer step.

    Args:
        accelerator: an Accelerator.
        model: what its `prepare` returned.
        local_sgd_steps: updates between two averages.
        enabled: False leaves everything as it is.
    """

    def __init__(self, accelerator: Any, model: torch.nn.Module, local_sgd_steps: int, enabled: bool = True) -> None:
        if local_sgd_steps < 1:
            raise ValueError(f"local_sgd_steps is {local_sgd_steps}: it must be 1 or more")
        self.accelerator, self.model, self.local_sgd_steps = accelerator, model, local_sgd_steps
        self.enabled = enabled and accelerator.use_distributed
        self.num_steps = 0
        self._no_sync: AbstractContextManager[None] | None = None

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            self._no_sync = self.accelerator.no_sync(self.model)
            self._no_sync.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._no_sync is not None:
            if failure[0] is None:  # after an exception the other ranks may not be here
                self._average()
            self._no_sync.__exit__(*failure)

    def step(self) -> None:
        """Count one update; every `local_sgd_steps` of them, average the weights. A collective then."""
        self.num_steps += 1
        if self.enabled and self.num_steps % self.local_sgd_steps == 0:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        parameters = list(self.model.parameters())
        for parameter, mean in zip(parameters, self.accelerator.reduce(parameters, reduction="mean"), strict=True):
            parameter.copy_(mean)
