"""A logger that speaks once for all ranks, or for each of them in turn.

>>> logger = get_logger("example")
>>> logger.isEnabledFor(logging.CRITICAL)
True

Underneath: `accelerate.logging.get_logger`, `accelerate.logging.MultiProcessAdapter` (accelerate 1.15).
  - Kept: `main_process_only` (default True), `in_order`, `warning_once`, the prefix "[RANK 0]", ACCELERATE_LOG_LEVEL.
  - There an Accelerator must exist before the first line; here the environment says which rank this is.

Proof: test_get_logger_matches_accelerate, test_lines_in_order_come_from_every_rank in tests/dropin/test_logs.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from typing import Any

import torch.distributed as dist

from nanofinetune.ground.environment import read_environment


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """The logger of that name. `log_level`, or the variable ACCELERATE_LOG_LEVEL, sets its level and the root's."""
    log_level = log_level or os.environ.get("ACCELERATE_LOG_LEVEL")
    logger = logging.getLogger(name)
    if log_level is not None:
        logger.setLevel(log_level.upper())
        logger.root.setLevel(log_level.upper())
    return MultiProcessAdapter(logger, {})


class MultiProcessAdapter(logging.LoggerAdapter):
    """`main_process_only=False` lets every rank speak; `in_order=True` one after the other, which is a collective."""

    def __init__(self, logger: logging.Logger, extra: dict[str, Any]) -> None:
        super().__init__(logger, extra)
        self._said: set[str] = set()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs.setdefault("stacklevel", 2)
        return f"[RANK {_place()[0]}] {msg}", kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        only_main, in_order = kwargs.pop("main_process_only", True), kwargs.pop("in_order", False)
        if not self.isEnabledFor(level):
            return
        rank, size = _place()
        msg, kwargs = self.process(msg, kwargs)  # type: ignore[assignment]
        if not in_order and only_main and rank > 0:
            return
        for turn in range(size) if in_order and size > 1 else [rank]:
            if turn == rank:
                self.logger.log(level, msg, *args, **kwargs)
            if in_order and size > 1:
                dist.barrier()

    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """`warning`, the first time that this text comes."""
        text = repr((args, kwargs))
        if text not in self._said:
            self._said.add(text)
            self.warning(*args, **kwargs)


def _place() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launch = read_environment(os.environ)
    return launch.rank, 1  # before the ranks have met there is nobody to wait for
