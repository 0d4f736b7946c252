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

import importlib
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

# The other names that a script imports from accelerate or its modules -> the file that has them here.
LATE = {
    name: module
    for module, names in {
        "launch.notebook": "notebook_launcher",
        "settings": "AutocastKwargs DDPCommunicationHookType DataLoaderConfiguration DistributedDataParallelKwargs"
        " GradScalerKwargs GradientAccumulationPlugin InitProcessGroupKwargs ProfileKwargs ProjectConfiguration",
        "dropin.state": "AcceleratorState DistributedType PartialState",
        "dropin.logs": "get_logger",
        "dropin.memory": "find_executable_batch_size release_memory",
        "dropin.local_sgd": "LocalSGD",
        "dropin.tracking": "GeneralTracker",
        "dropin.operations": "broadcast broadcast_object_list gather gather_object pad_across_processes reduce tqdm"
        " wait_for_everyone extract_model_from_parallel",
        "ranks.loader": "DataLoaderShard prepare_data_loader send_to_device",
        "ranks.shard": "BatchSamplerShard IterableDatasetShard SkipBatchSampler",
        "ranks.collectives": "recursively_apply",
        "step.order": "SeedableRandomSampler",
        "wrappers": "AcceleratedOptimizer AcceleratedScheduler",
    }.items()
    for name in names.split()
}
# What is another backend, or another library's work -> what to use.
ABSENT = {
    name: instead
    for names, instead in (
        ("DeepSpeedPlugin FullyShardedDataParallelPlugin MegatronLMPlugin ParallelismConfig TorchTensorParallelPlugin"
         " TorchDynamoPlugin FP8RecipeKwargs AORecipeKwargs TERecipeKwargs MSAMPRecipeKwargs prepare_pippy",
         "that is another backend: use accelerate for it"),
        ("init_empty_weights init_on_device dispatch_model cpu_offload cpu_offload_with_hook disk_offload"
         " infer_auto_device_map load_checkpoint_and_dispatch load_checkpoint_in_model",
         "models larger than a device are not handled here: use accelerate for it"),
        ("debug_launcher", "use notebook_launcher(function, args, num_processes=N), which works on a CPU too"),
        ("synchronize_rng_states synchronize_rng_state", "every rank computes the same order from (seed, epoch) here"),
        ("GradientState", "ask the Accelerator: sync_gradients; its loaders: end_of_dataloader, remainder"),
        ("DataLoaderDispatcher", "dispatching loaders are not handled here: let every rank read its own rows"),
    )
    for name in names.split()
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for; ImportError that says what to use where it is not here."""
    if name in LATE:
        return getattr(importlib.import_module(f"nanofinetune.{LATE[name]}"), name)
    if name in ABSENT:
        raise ImportError(f"nanofinetune has no {name}: {ABSENT[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *LATE})
