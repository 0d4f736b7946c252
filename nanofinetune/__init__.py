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
from nanofinetune.ranks.ddp import DistributedDataParallel
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
        " ProfileKwargs ProjectConfiguration",
        "dropin.partial_state": "AcceleratorState DistributedType PartialState",
        "dropin.logs": "MultiProcessAdapter get_logger",
        "dropin.batch_size": "find_executable_batch_size release_memory",
        "dropin.local_sgd": "LocalSGD",
        "dropin.tracking": "GeneralTracker TensorBoardTracker on_main_process register_tracker_class",
        "dropin.operations": "broadcast broadcast_object_list concatenate convert_to_fp32 find_batch_size gather"
        " gather_object pad_across_processes recursively_apply reduce send_to_device tqdm wait_for_everyone",
        "dropin.available": "is_bf16_available is_bnb_available is_boto3_available is_clearml_available"
        " is_comet_ml_available is_cuda_available is_datasets_available is_deepspeed_available is_dvclive_available"
        " is_fp16_available is_fp8_available is_hpu_available is_lomo_available is_matplotlib_available"
        " is_megatron_lm_available is_mlflow_available is_mlu_available is_mps_available is_msamp_available"
        " is_musa_available is_neuron_available is_npu_available is_pandas_available is_peft_available"
        " is_pytest_available is_sagemaker_available is_schedulefree_available is_sdaa_available is_swanlab_available"
        " is_tensorboard_available is_timm_available is_torch_xla_available is_torchvision_available"
        " is_trackio_available is_transformers_available is_triton_available is_wandb_available is_xccl_available"
        " is_xpu_available",
        "ranks.loader": "DataLoaderShard prepare_data_loader",
        "ranks.shard": "BatchSamplerShard IterableDatasetShard SkipBatchSampler",
        "step.order": "SeedableRandomSampler",
        "wrappers": "AcceleratedOptimizer AcceleratedScheduler extract_model_from_parallel",
    }.items()
    for name in names.split()
}
# What is another backend, or another library's work -> what to use.
ABSENT = {
    name: instead
    for names, instead in (
        ("DeepSpeedPlugin DeepSpeedSequenceParallelConfig DummyOptim DummyScheduler GatheredParameters"
         " HfDeepSpeedConfig FullyShardedDataParallelPlugin merge_fsdp_weights save_fsdp_model save_fsdp_optimizer"
         " load_fsdp_model load_fsdp_optimizer MegatronLMPlugin MegatronLMDummyDataLoader MegatronLMDummyScheduler"
         " AbstractTrainStep BertTrainStep GPTTrainStep T5TrainStep ParallelismConfig TorchContextParallelConfig"
         " TorchTensorParallelConfig TorchTensorParallelPlugin TorchDynamoPlugin DynamoBackend compile_regions"
         " FP8RecipeKwargs AORecipeKwargs TERecipeKwargs MSAMPRecipeKwargs BnbQuantizationConfig"
         " load_and_quantize_model prepare_pippy SageMakerDistributedType",
         "that is another backend: use accelerate for it"),
        ("init_empty_weights init_on_device dispatch_model cpu_offload cpu_offload_with_hook disk_offload"
         " infer_auto_device_map load_checkpoint_and_dispatch load_checkpoint_in_model align_module_device"
         " calculate_maximum_sizes compute_module_sizes find_tied_parameters get_balanced_memory get_max_memory"
         " load_state_dict offload_state_dict set_module_tensor_to_device",
         "models larger than a device are not handled here: use accelerate for it"),
        ("AimTracker ClearMLTracker CometMLTracker DVCLiveTracker MLflowTracker SwanLabTracker TrackioTracker"
         " WandBTracker", "pass log_with an object with a method `log` that calls the service"),
        ("debug_launcher", "use notebook_launcher(function, args, num_processes=N), which works on a CPU too"),
        ("RNGType synchronize_rng_states synchronize_rng_state",
         "every rank computes the same order from (seed, epoch) here"),
        ("GradientState", "there is one for each Accelerator: ask yours, `accelerator.gradient_state`"),
        ("is_initialized", "ask torch.distributed.is_initialized()"),
        ("DataLoaderDispatcher", "dispatching loaders are not handled here: let every rank read its own rows"),
        ("SkipDataLoader", "use skip_first_batches(dataloader, num_batches)"),
        ("save", "use the Accelerator's method: accelerator.save"),
        ("load", "use torch.load(file, weights_only=True)"),
        ("write_basic_config", "run ./launch.sh config"),
        ("convert_outputs_to_fp32 ConvertOutputsToFp32", "`prepare` does that to a model with mixed_precision"),
        ("is_compiled_module has_compiled_regions", "use hasattr(model, '_orig_mod')"),
        ("compare_versions is_torch_version", "use packaging.version.parse"),
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
