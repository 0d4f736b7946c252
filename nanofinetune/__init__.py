"""Fine-tune BERT on GLUE with everything under the training loop written from scratch.

>>> from nanofinetune import metrics
>>> metric = metrics.load("glue", "mrpc")
>>> metric.compute(predictions=[1, 1, 0], references=[1, 0, 0])
{'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}

Rooms, in reading order: `step` (one device), `ranks` (many processes), `accelerator` (the facade over both), `run` (a
long run), `data`, `cpu` (the same numbers, faster on a CPU), `launch`, `trace`, and `ground` under all of them.

Underneath: `accelerate.Accelerator`, `transformers.DataCollatorWithPadding`, `torch.optim.AdamW`,
`transformers.get_scheduler`, `evaluate.load`.
  - The course imports these; the names here are the same, so that only the import lines change.
  - Importing this package loads torch and numpy. transformers and datasets wait until a model or data are named.

Proof: test_course_manual_loop_matches_the_libraries in tests/test_course.py,
test_importing_the_package_loads_neither_transformers_nor_datasets in tests/test_layers.py.
"""

from typing import TYPE_CHECKING, Any

from nanofinetune.accelerator import Accelerator
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.loader import skip_first_batches
from nanofinetune.ranks.world import set_seed
from nanofinetune.step import metrics
from nanofinetune.step.collate import DataCollatorWithPadding
from nanofinetune.step.optim import AdamW
from nanofinetune.step.schedule import get_scheduler

if TYPE_CHECKING:
    from nanofinetune.launch.notebook import notebook_launcher

__all__ = [
    "Accelerator",
    "AdamW",
    "DataCollatorWithPadding",
    "DistributedDataParallel",
    "get_scheduler",
    "metrics",
    "notebook_launcher",
    "set_seed",
    "skip_first_batches",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: a launcher is no part of training."""
    if name != "notebook_launcher":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanofinetune.launch.notebook import notebook_launcher

    return notebook_launcher


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
