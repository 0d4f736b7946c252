"""Trackers: where a run's numbers go, beside the screen.

>>> class Lines(GeneralTracker):
...     name, requires_logging_directory, tracker = "lines", False, None
...     def log(self, values, step=None, **kwargs):
...         print(step, values)
>>> from types import SimpleNamespace
>>> accelerator = SimpleNamespace(is_main_process=True, log_with=[Lines()])
>>> init_trackers(accelerator, "a run")
>>> log(accelerator, {"loss": 0.5}, step=1)
1 {'loss': 0.5}

Underneath: `accelerate.tracking.GeneralTracker`, `accelerate.Accelerator.init_trackers`, `accelerate.Accelerator.log`
(accelerate 1.15).
  - Kept: names, arguments, "tensorboard", and any object with a method `log`. Rank 0 writes.
  - Left out: a class for each service. Pass an object of your own for those; another name is refused.

Proof: test_trackers_hear_what_accelerates_hear, test_unknown_trackers_are_refused_by_name in
tests/dropin/test_tracking.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


class GeneralTracker:
    """What a tracker may inherit from; all of it is optional (source: accelerate.tracking.GeneralTracker)."""

    main_process_only = True
    name = "tracker"
    requires_logging_directory = False

    def __init__(self, _blank: bool = False) -> None:
        pass

    def start(self) -> None:
        """Begin."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the run's settings."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keep these numbers of that step."""

    def finish(self) -> None:
        """End."""


class TensorBoardTracker(GeneralTracker):
    """Scalars and texts, in `logging_dir`/`run_name` (source: accelerate.tracking.TensorBoardTracker)."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "log_with='tensorboard' needs the package tensorboard: pip install tensorboard"
            ) from error
        self.tracker: Any = SummaryWriter(os.path.join(logging_dir, run_name), **kwargs)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.tracker.add_hparams(values, metric_dict={})
        self.tracker.flush()

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.tracker.add_scalar(name, value, global_step=step, **kwargs)
            elif isinstance(value, str):
                self.tracker.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, Mapping):
                self.tracker.add_scalars(name, value, global_step=step, **kwargs)
        self.tracker.flush()

    def finish(self) -> None:
        self.tracker.close()


def chosen(log_with: Any) -> list[Any]:
    """`log_with` as a list, checked. Raises NotImplementedError, with its name, for a service that is not here."""
    asked = [] if log_with is None else list(log_with) if isinstance(log_with, (list, tuple)) else [log_with]
    for each in asked:
        if not hasattr(each, "log") and each != "tensorboard":
            raise NotImplementedError(
                f"log_with={each!r} is not supported here: choose 'tensorboard', or pass an object with a method `log`"
            )
    return asked


def init_trackers(
    accelerator: Any, project_name: str, config: dict[str, Any] | None = None, init_kwargs: dict[str, Any] | None = None
) -> None:
    """Start what `log_with` named, and hand it `config`. `init_kwargs`: by the tracker's name, for its constructor.

    Raises ValueError where a tracker needs a folder and neither `project_dir` nor `logging_dir` was given.
    """
    trackers: list[Any] = []
    for each in accelerator.log_with if accelerator.is_main_process else ():
        if each == "tensorboard":
            if accelerator.logging_dir is None:
                raise ValueError("log_with='tensorboard' needs a folder: pass project_dir to the Accelerator")
            each = TensorBoardTracker(
                project_name, accelerator.logging_dir, **(init_kwargs or {}).get("tensorboard", {})
            )
        if hasattr(each, "start"):
            each.start()
        if config is not None and hasattr(each, "store_init_configuration"):
            each.store_init_configuration(config)
        trackers.append(each)
    accelerator.trackers = trackers


def log(
    accelerator: Any, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, Any] | None = None
) -> None:
    """Hand the numbers to every tracker. `log_kwargs`: by the tracker's name, for its `log`."""
    for tracker in getattr(accelerator, "trackers", ()):
        tracker.log(values, step=step, **(log_kwargs or {}).get(getattr(tracker, "name", ""), {}))


def get_tracker(accelerator: Any, name: str, unwrap: bool = False) -> Any:
    """The tracker of that name, or with `unwrap` what it wraps; on ranks without trackers one that does nothing."""
    trackers = getattr(accelerator, "trackers", [])
    if not trackers:
        return GeneralTracker(_blank=True)
    for tracker in trackers:
        if getattr(tracker, "name", "") == name:
            return tracker.tracker if unwrap else tracker
    raise ValueError(f"{name} is not an available tracker stored inside the `Accelerator`.")


def finish(accelerator: Any) -> None:
    """End every tracker, once."""
    trackers, accelerator.trackers = accelerator.trackers, []
    for tracker in trackers:
        if hasattr(tracker, "finish"):
            tracker.finish()
