"""Trackers: where a run's numbers go, beside the screen.

>>> class Lines(GeneralTracker):
...     name, requires_logging_directory, tracker = "lines", False, None
...     def log(self, values, step=None, **kwargs):
...         print(step, values)
>>> from types import SimpleNamespace
>>> accelerator = SimpleNamespace(is_main_process=True, log_with=[Lines()], logging_dir=None)
>>> init_trackers(accelerator, "a run")
>>> log(accelerator, {"loss": 0.5}, step=1)
1 {'loss': 0.5}

Underneath: `accelerate.tracking.GeneralTracker`, `accelerate.tracking.register_tracker_class`,
`accelerate.Accelerator.init_trackers`, `accelerate.Accelerator.log` (accelerate 1.15).
  - Kept: names, arguments, "tensorboard", registered classes, and any object with a method `log`. Rank 0 writes.
  - Left out: a class for each service, and tensorboard's file of settings. Another name is refused.

Proof: test_trackers_hear_what_accelerates_hear, test_unknown_trackers_are_refused_by_name in
tests/dropin/test_tracking.py.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from nanofinetune.ground.environment import read_environment


def on_main_process(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a tracker's methods: on rank 0 only, unless its `main_process_only` is False."""

    @functools.wraps(method)
    def decorated(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "main_process_only", False) or _rank() == 0:
            return method(self, *args, **kwargs)
        return None

    return decorated


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
            if hasattr(value, "tolist"):  # a tensor, or numpy's
                value = value.tolist()
            if isinstance(value, (int, float)):
                self.tracker.add_scalar(name, value, global_step=step, **kwargs)
            elif isinstance(value, str):
                self.tracker.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, Mapping):
                self.tracker.add_scalars(name, value, global_step=step, **kwargs)
        self.tracker.flush()

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        for name, images in values.items():
            self.tracker.add_images(name, images, global_step=step, **kwargs)

    def finish(self) -> None:
        self.tracker.close()


CLASSES: dict[str, Any] = {"tensorboard": TensorBoardTracker}  # by the name that `log_with` takes


def register_tracker_class(tracker_class: type) -> None:
    """Let `log_with` name a class of yours, by its `name`.

    init_trackers calls it with the project's name, then the folder if it `requires_logging_directory`.
    """
    for attribute in ("name", "requires_logging_directory", "log"):
        if not isinstance(tracker_class, type) or getattr(tracker_class, attribute, "") in ("", None):
            raise ValueError(
                f"register_tracker_class: {tracker_class!r} must be a class with the attribute {attribute}"
            )
    CLASSES[tracker_class.name] = tracker_class  # type: ignore[attr-defined]


def chosen(log_with: Any, logging_dir: str | None) -> list[Any]:
    """`log_with` as a list of names and objects, checked. "all" is tensorboard, if it is installed.

    Raises NotImplementedError, with its name, for a service that is not here, ValueError where a folder is missing.
    """
    asked = [] if log_with is None else list(log_with) if isinstance(log_with, (list, tuple)) else [log_with]
    if "all" in asked:
        installed = importlib.util.find_spec("tensorboard") is not None
        asked = [each for each in asked if hasattr(each, "log")] + ["tensorboard"] * installed
        if not asked:
            print("log_with='all': tensorboard is not installed, so nothing is tracked", file=sys.stderr)
    for each in asked:
        if not hasattr(each, "log") and each not in CLASSES:
            raise NotImplementedError(
                f"log_with={str(each)!r} is not supported here: choose {' or '.join(CLASSES)}, or pass an object with a"
                " method `log`"
            )
        if not hasattr(each, "log") and CLASSES[each].requires_logging_directory and logging_dir is None:
            raise ValueError(f"log_with={str(each)!r} needs a folder: pass project_dir to the Accelerator")
    return list(dict.fromkeys(asked))


def init_trackers(
    accelerator: Any, project_name: str, config: dict[str, Any] | None = None, init_kwargs: dict[str, Any] | None = None
) -> None:
    """Start what `log_with` named, and hand it `config`. `init_kwargs`: by the tracker's name, for its constructor."""
    trackers: list[Any] = []
    for each in accelerator.log_with if accelerator.is_main_process else ():
        if not hasattr(each, "log"):
            kind = CLASSES[each]
            folder = [accelerator.logging_dir] if kind.requires_logging_directory else []
            each = kind(project_name, *folder, **(init_kwargs or {}).get(kind.name, {}))
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


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else read_environment(os.environ).rank
