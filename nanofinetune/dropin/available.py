"""Whether a package or a device is here: the `is_..._available` functions that scripts ask before they import.

>>> is_available("torch"), is_available("nosuchpackage")
(True, False)
>>> from nanofinetune import is_wandb_available
>>> is_wandb_available() == is_available("wandb")
True

Underneath: `accelerate.utils.is_wandb_available`, `accelerate.utils.is_bf16_available`, ... (accelerate 1.15).
  - A package counts as installed if it can be found and has metadata, so that a folder of that name does not pass.
  - Devices that an Accelerator cannot spread ranks over count as unavailable: NPU, MLU, XLA and others.

Proof: test_answers_match_accelerate, test_a_folder_is_no_package in tests/dropin/test_available.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

# is_NAME_available(), where the package has that name
NAMES = [
    "aim", "amdsmi", "boto3", "clearml", "comet_ml", "datasets", "deepspeed", "dvclive", "import_timer",
    "matplotlib", "mlflow", "pandas", "peft", "pynvml", "pytest", "sagemaker", "schedulefree", "swanlab", "timm",
    "torchao", "torchdata", "torchvision", "trackio", "transformers", "triton", "wandb",
]  # fmt: skip
# ... and where it has others, of which one is enough
PACKAGES = {name: (name,) for name in NAMES} | {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "bnb": ("bitsandbytes",),
    "lomo": ("lomo_optim",),
}
ELSEWHERE = ("hpu", "mlu", "musa", "neuron", "npu", "sdaa", "torch_xla", "xccl", "fp8", "msamp", "megatron_lm")


def is_available(package: str) -> bool:
    """Whether the package is installed."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def is_cuda_available() -> bool:
    return torch.cuda.is_available()


def is_mps_available() -> bool:
    return torch.backends.mps.is_available()


def is_xpu_available() -> bool:
    return torch.xpu.is_available()


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether `mixed_precision="bf16"` works; it always does on a CPU."""
    if is_cuda_available():
        return torch.cuda.is_bf16_supported()
    return not is_mps_available() or torch.backends.mps.is_macos_or_newer(14, 0)


def is_fp16_available() -> bool:
    """Whether `mixed_precision="fp16"` works: not on a CPU."""
    return is_cuda_available() or is_mps_available() or is_xpu_available()  # underneath: True there, and fp32 in truth


def __getattr__(name: str) -> Callable[..., bool]:
    asked = name.removeprefix("is_").removesuffix("_available")
    if asked in PACKAGES:
        return lambda: any(map(is_available, PACKAGES[asked]))
    if asked in ELSEWHERE:
        return lambda *args, **kwargs: False
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
