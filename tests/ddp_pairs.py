"""The same module wrapped by our DistributedDataParallel and by torch's, and what their gradients must be."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from nanofinetune.ranks.ddp import DistributedDataParallel

TorchDDP = nn.parallel.DistributedDataParallel
SMALL = 1e-4  # MiB: 104 bytes, nearly one bucket a parameter


def convolution():
    """With buffers: running statistics and an int64 count."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 11))


def batch(seed):
    """Rows and labels, as `seed` says."""
    torch.manual_seed(seed)
    return torch.randn(4, 3, 7, 7), torch.randint(0, 11, (4,))


def pair(rank, ours=DistributedDataParallel, make=convolution, **options):
    """The same module, with other weights on each rank, wrapped by us and by torch."""
    modules = []
    for _ in range(2):
        torch.manual_seed(1000 + rank)
        modules.append(make())
    return ours(modules[0], **options), TorchDDP(modules[1], **options)


def step(model, rows, labels):
    model.zero_grad()
    cross_entropy(model(rows), labels).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(ours, theirs, where=""):
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected), (where, got, expected)


def differs_between_ranks(tensors):
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return any(not torch.equal(other, flat) for other in everyone)
