"""Fine-tune BERT on GLUE with everything under the training loop written from scratch.

>>> from nanofinetune import metrics
>>> metric = metrics.load("glue", "mrpc")
>>> metric.compute(predictions=[1, 1, 0], references=[1, 0, 0])
{'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}

Underneath: `accelerate.Accelerator`, `transformers.DataCollatorWithPadding`, `torch.optim.AdamW`,
`transformers.get_scheduler` and `evaluate.load` are what the course imports; the names here are the same, so that only
the import lines change. Importing this package loads torch and numpy, and neither transformers nor datasets: those wait
until a model or data are named.

Proof: test_course_manual_loop_matches_the_libraries in tests/test_course.py,
test_importing_the_package_loads_neither_transformers_nor_datasets and
test_notebook_launcher_is_there_when_it_is_asked_for in tests/test_layers.py.
"""

from typing import TYPE_CHECKING, Any

from nanofinetune import metrics
from nanofinetune.accelerator import Accelerator
from nanofinetune.collate import DataCollatorWithPadding
from nanofinetune.ddp import DistributedDataParallel
from nanofinetune.distributed import set_seed
from nanofinetune.loader import skip_first_batches
from nanofinetune.optim import AdamW
from nanofinetune.schedule import get_scheduler

if TYPE_CHECKING:
    from nanofinetune.launch import notebook_launcher

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
    """What is imported when it is asked for: launch.py, which is run as a program too, and not from here as a copy."""
    if name != "notebook_launcher":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanofinetune.launch import notebook_launcher

    return notebook_launcher


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
