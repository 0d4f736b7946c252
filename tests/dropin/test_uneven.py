"""nanofinetune.dropin.uneven against accelerate 1.15's two methods and torch 2.13's Join, on two gloo ranks.

python -m pytest tests/dropin/test_uneven.py
"""

import gc
import warnings

import pytest
import torch
from helpers import run_ranks
from side_by_side import line, ours, theirs
from torch.distributed.algorithms import Join
from torch.utils.data import DataLoader


def joined(accelerator, even_batches):
    """Five rows in batches of two on two ranks: the weights after an epoch, and the rows that this rank saw."""
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.arange(15.0).view(5, 3) / 10
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    seen = []
    with accelerator.join_uneven_inputs([model], even_batches=even_batches):
        for batch in loader:
            seen.append(batch.tolist())
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen, accelerator.unwrap_model(model).weight.tolist(), loader.batch_sampler.even_batches


def triggered(accelerator):
    """The gradients after two backwards under `no_sync`, of which the second is told to average."""
    model = accelerator.prepare(line())
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(accelerator.process_index))
    with accelerator.no_sync(model):
        first, second = model(batch).square().mean(), model(batch * 2).square().mean()
        accelerator.backward(first)
        alone = accelerator.unwrap_model(model).weight.grad.tolist()
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(second)
    return alone, accelerator.unwrap_model(model).weight.grad.tolist()


def both_libraries(function, *arguments):
    accelerator = ours()
    found, expected = function(accelerator, *arguments), function(theirs(), *arguments)
    gc.collect()
    accelerator.end_training()
    return found, expected


def by_torch(batches):
    """The weights after the same epoch with torch's own DDP and Join."""
    model = torch.nn.parallel.DistributedDataParallel(line())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model], throw_on_early_termination=False):
        for batch in batches:
            model(torch.tensor(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.module.weight.tolist()


def joined_by_both(even_batches):
    accelerator = ours()
    found = joined(accelerator, even_batches)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        accelerates = joined(theirs(), even_batches)
    expected = by_torch(found[0])
    gc.collect()
    accelerator.end_training()
    return found, expected, accelerates, [str(warning.message) for warning in said]


@pytest.mark.parametrize("even_batches", [False, True])
def test_join_uneven_inputs_matches_torch_join_where_accelerate_leaves_cpus_out(even_batches):
    """Bit for bit; ranks without a batch take part, and `even_batches` is as it was after the block."""
    pytest.importorskip("accelerate", reason="accelerate (extra `test`) is what this is compared with")
    ranks = run_ranks(joined_by_both, 2, even_batches)
    for (_, weights, after), expected, _, said in ranks:
        assert weights == expected and after
        assert any("will have no effect" in line for line in said), "accelerate joins on CPUs now: compare with it"
    assert [len(found[0]) for found, *_ in ranks] == ([2, 2] if even_batches else [2, 1])
    assert [len(accelerates[0]) for _, _, accelerates, _ in ranks] == [2, 2]


def test_trigger_sync_in_backward_matches_accelerate():
    """Bit for bit: the ranks' gradients differ before the second backward, and agree after it."""
    pytest.importorskip("accelerate", reason="accelerate (extra `test`) is what this is compared with")
    ranks = run_ranks(both_libraries, 2, triggered)
    for found, expected in ranks:
        assert found == expected
    (first, _), (second, _) = ranks
    assert first[0] != second[0] and first[1] == second[1]
