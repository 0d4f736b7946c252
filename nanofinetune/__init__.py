"""Fine-tune BERT on GLUE with everything under the training loop written from scratch.

>>> from nanofinetune import metrics
>>> metric = metrics.load("glue", "mrpc")
>>> metric.compute(predictions=[1, 1, 0], references=[1, 0, 0])
{'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}

Subpackages, in reading order: `step` (one device), `ranks` (many processes), `accelerator` (the facade over both),
`run` (a long run), `data`, `cpu` (the same numbers, faster on a CPU), `launch`, `trace`, and `ground` under all.

Underneath: `accelerate.Accelerator`, `transformers.DataCollatorWithPadding`, `torch.optim.AdamW`,
`transformers.get_scheduler`, `evaluate.load`.
  - The course imports these; the names here are the same, so that only the import lines change.
  - Importing this package loads torch and numpy. transformers and datasets wait until a model or data are named.

Proof: test_course_manual_loop_matches_the_libraries in tests/test_course.py,
test_importing_the_package_loads_neither_transformers_nor_datasets in tests/test_layers.py.
"""

import importlib
from typing import TYPE_CHECKING, Any

import nanofinetune.ground.process  # noqa: F401 (before torch, which takes seconds: it notes who started us)

# isort: split
from nanofinetune.accelerator import Accelerator
from nanofinetune.dropin.operations import set_seed
from nanofinetune.dropin.parallel import DistributedDataParallel
from nanofinetune.ranks.loader import skip_first_batches
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
        " GradScalerKwargs GradientAccumulationPlugin InitProcessGroupKwargs KwargsHandler LoggerType PrecisionType"
        " ProfileKwargs ProjectConfiguration RNGType",
        "dropin.partial_state": "AcceleratorState DistributedType PartialState",
        "dropin.logs": "MultiProcessAdapter get_logger",
        "dropin.batch_size": "find_executable_batch_size release_memory",
        "dropin.local_sgd": "LocalSGD",
        "dropin.tracking": "GeneralTracker TensorBoardTracker on_main_process register_tracker_class",
        "dropin.operations": "DistributedOperationException broadcast broadcast_object_list concatenate"
        " convert_to_fp32 copy_tensor_to_devices find_batch_size gather gather_object pad_across_processes"
        " recursively_apply reduce send_to_device synchronize_rng_state synchronize_rng_states tqdm wait_for_everyone",
        "dropin.available": "is_aim_available is_amdsmi_available is_bf16_available is_bnb_available is_boto3_available"
        " is_clearml_available is_comet_ml_available is_cuda_available is_datasets_available"
        " is_deepspeed_available is_dvclive_available is_fp16_available is_fp8_available is_hpu_available"
        " is_import_timer_available is_lomo_available is_matplotlib_available is_megatron_lm_available"
        " is_mlflow_available is_mlu_available is_mps_available is_msamp_available is_musa_available"
        " is_neuron_available is_npu_available is_pandas_available is_peft_available is_pynvml_available"
        " is_pytest_available is_sagemaker_available is_schedulefree_available is_sdaa_available"
        " is_swanlab_available is_tensorboard_available is_timm_available is_torch_xla_available"
        " is_torchao_available is_torchdata_available is_torchvision_available is_trackio_available"
        " is_transformers_available is_triton_available is_wandb_available is_xccl_available"
        " is_xpu_available",
        "ranks.loader": "DataLoaderShard prepare_data_loader",
        "ranks.shard": "BatchSamplerShard IterableDatasetShard SkipBatchSampler",
        "step.order": "SeedableRandomSampler",
        "wrappers": "AcceleratedOptimizer AcceleratedScheduler extract_model_from_parallel",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for; ImportError that says what to use where it is not here."""
    if name in LATE:
        return getattr(importlib.import_module(f"nanofinetune.{LATE[name]}"), name)
    if instead := importlib.import_module("nanofinetune.dropin.absent").instead_of(name):
        raise ImportError(f"nanofinetune has no {name}: {instead}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *LATE})
