"""One small training under either library's Accelerator, for the tests that compare what they save and load."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from nanofinetune.accelerator import Accelerator
from nanofinetune.settings import ProjectConfiguration


class Ours:
    Accelerator = Accelerator


def training(library, folder, **project):
    """A small training under either library's Accelerator -> it, the model and the loader."""
    torch.manual_seed(0)
    configuration = library.utils.ProjectConfiguration if hasattr(library, "utils") else ProjectConfiguration
    accelerator = library.Accelerator(
        cpu=True, project_config=configuration(project_dir=str(folder), automatic_checkpoint_naming=True, **project)
    )
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    rows: Any = torch.randn(12, 2)
    data: Any = DataLoader(rows, batch_size=4, shuffle=True)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
