"""An Accelerator of each library for the tests in this folder, and what they are given to work on."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nanofinetune import Accelerator


def ours(**arguments):
    return Accelerator(cpu=True, **arguments)


def theirs(**arguments):
    """accelerate's, with its global state new. Skips the test where accelerate is not installed."""
    accelerate = pytest.importorskip("accelerate", reason="the reference of these tests, extra `test`")
    reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        return accelerate.Accelerator(cpu=True, **arguments)


def reset():
    """Forget accelerate's global state."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    GradientState._reset_state()
    AcceleratorState._reset_state()
    PartialState._reset_state()


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


def rows(count, batch_size, **settings):
    data = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch_size=batch_size, **settings)  # type: ignore[arg-type]


def raised(function, *arguments, **keywords):
    """The type of what the call raises, or its result."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        return type(error)
