"""Our embedding against torch.nn.Embedding (torch 2.13): the same bits, in memory that is used again.

python -m pytest tests/cpu/test_embedding.py
"""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import tiny_bert
from helpers import run_world
from torch import nn

from nanofinetune.cpu.embedding import Embedding, use_row_gradients
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.naive_ddp import NaiveDDP
from nanofinetune.step.optim import AdamW

ROWS, WIDTH = 500, 8


def pair(seed=0, padding_idx=None, dtype=torch.float32, **options):
    """torch's embedding and ours, with equal weights."""
    torch.manual_seed(seed)
    library = nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx, dtype=dtype, **options)
    ours = Embedding(ROWS, WIDTH, padding_idx=padding_idx, dtype=dtype, **options)
    ours.load_state_dict(library.state_dict())
    return library, ours


def ids_of(step, shape=(4, 9)):
    """Token ids as a batch has them: many twice, row 0 (the padding) often."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 60, shape, generator=generator) * torch.randint(0, 9, shape, generator=generator)
    return ids.where(torch.rand(shape, generator=generator) > 0.2, 0)


def backward(module, ids, seed=0):
    """Forward and backward with a random gradient of the output."""
    out = module(ids)
    out.backward(torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed)))
    return out


def is_in_the_table(module):
    return module.weight.grad.data_ptr() == module.memory.table.data_ptr()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 7, -1])
@pytest.mark.parametrize("shape", [(4, 9), (1, 1), (3,), (), (0, 5), (2, 3, 4)], ids=str)
def test_gradients_match_torch_embedding(shape, padding_idx, dtype, threads):
    """Bit for bit, batch after batch: what one wrote is gone in the next."""
    library, ours = pair(padding_idx=padding_idx, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(4):
            ids = ids_of(step, shape)
            assert torch.equal(backward(library, ids, step), backward(ours, ids, step))
            assert torch.equal(library.weight.grad, ours.weight.grad)
            library.weight.grad = ours.weight.grad = None
    finally:
        torch.set_num_threads(before)


def test_the_table_is_used_again():
    _, ours = pair()
    places = set()
    for step in range(5):
        backward(ours, ids_of(step))
        assert is_in_the_table(ours), "autograd copied the gradient"
        places.add(ours.weight.grad.data_ptr())
        ours.weight.grad = None
    assert len(places) == 1


def test_only_the_rows_of_the_last_batch_are_cleared(monkeypatch):
    """The table is not written as a whole again: a mark that nobody can have made stays."""
    _, ours = pair()
    backward(ours, ids_of(0))
    ours.weight.grad.data[499] = 5.0  # past autograd, which the module's text forbids
    ours.weight.grad = None
    backward(ours, ids_of(1))
    assert ours.weight.grad[499].eq(5.0).all()


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_matches_torch_embedding(accumulate):
    library, ours = pair(padding_idx=0)
    for update in range(3):
        for step in range(accumulate):
            for module in (library, ours):
                backward(module, ids_of(10 * update + step), step)
        assert torch.equal(library.weight.grad, ours.weight.grad)
        library.weight.grad = ours.weight.grad = None


def test_zeroed_in_place_matches_torch_embedding():
    """zero_grad(set_to_none=False) keeps the gradient's memory: the next one is added to it."""
    library, ours = pair()
    for step in range(4):
        for module in (library, ours):
            backward(module, ids_of(step), step)
        assert torch.equal(library.weight.grad, ours.weight.grad)
        for module in (library, ours):
            module.zero_grad(set_to_none=False)


def test_used_twice_in_a_forward_matches_torch_embedding():
    library, ours = pair(padding_idx=0)
    for step in range(3):
        for module in (library, ours):
            module.weight.grad = None
            (module(ids_of(step)).sum() * 2 + module(ids_of(step + 1)).pow(2).sum()).backward()
        assert torch.equal(library.weight.grad, ours.weight.grad)


def test_tied_to_an_output_layer_matches_torch_embedding():
    """The weight gets a second gradient, of another kind, in the same backward."""
    library, ours = pair()
    for step in range(3):
        for module in (library, ours):
            module.weight.grad = None
            hidden = module(ids_of(step))
            (hidden @ module.weight.T).logsumexp(-1).sum().backward()
        assert torch.equal(library.weight.grad, ours.weight.grad)


def test_a_gradient_that_is_kept_stays_as_it_is():
    library, ours = pair()
    backward(library, ids_of(0), 0)
    backward(ours, ids_of(0), 0)
    kept, view = ours.weight.grad, ours.weight.grad[3:5]
    expected = library.weight.grad
    library.weight.grad = ours.weight.grad = None
    for step in (1, 2):
        backward(library, ids_of(step), step)
        backward(ours, ids_of(step), step)
        assert torch.equal(kept, expected) and torch.equal(library.weight.grad, ours.weight.grad)
        library.weight.grad = ours.weight.grad = None
    del kept
    backward(ours, ids_of(3), 3)  # the view alone holds the memory now
    assert torch.equal(view, expected[3:5])


@pytest.mark.parametrize(
    "write",
    [
        lambda grad: grad.add_(1),
        lambda grad: grad.fill_(2),
        lambda grad: grad[400:].copy_(torch.ones(100, WIDTH)),
        lambda grad: torch._foreach_add_([grad], 1.0),
        lambda grad: grad.detach().sub_(3),
        lambda grad: grad.mul_(float("nan")),
    ],
    ids=["add_", "fill_", "slice", "foreach", "detach", "clipped by a norm of NaN"],
)
def test_what_others_write_into_the_gradient_does_not_stay(write):
    library, ours = pair()
    for step in range(3):
        for module in (library, ours):
            module.weight.grad = None
            backward(module, ids_of(step), step)
        assert torch.equal(library.weight.grad, ours.weight.grad) and is_in_the_table(ours)
        write(ours.weight.grad)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, AdamW])
def test_training_matches_torch_embedding(kind):
    """Ten updates with clipping: weights bit for bit."""
    library, ours = pair(padding_idx=0)
    for module in (library, ours):
        optimizer = kind(module.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(10):
            backward(module, ids_of(step), step)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(library.weight, ours.weight)


def test_second_derivatives_match_torch_embedding():
    library, ours = pair()
    found = []
    for module in (library, ours):
        loss = module(ids_of(0)).pow(3).sum()
        (first,) = torch.autograd.grad(loss, module.weight, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), module.weight)[0])
    assert torch.equal(*found)


def test_autograd_grad_matches_torch_embedding():
    """torch.autograd.grad hands the gradient to the caller: the next call must not write into it."""
    library, ours = pair()
    kept = []
    for step in range(3):
        first, second = (
            torch.autograd.grad(module(ids_of(step)).pow(2).sum(), module.weight)[0] for module in (library, ours)
        )
        assert torch.equal(first, second)
        kept.append((first, second))
    assert all(torch.equal(first, second) for first, second in kept)


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_other_options_are_torchs_own(options):
    library, ours = pair(**options)
    for module in (library, ours):
        backward(module, ids_of(0))
    assert torch.equal(library.weight.grad.to_dense(), ours.weight.grad.to_dense())
    assert ours.memory.table is None and ours.weight.grad.is_sparse == library.weight.grad.is_sparse


def functional(module, ids):
    return torch.func.grad(lambda weight: torch.func.functional_call(module, {"weight": weight}, ids).sin().sum())(
        module.weight
    )


def vectorised(module, ids):
    return torch.vmap(module)(ids)


def exported(module, ids):
    return torch.export.export(module, (ids,)).module()(ids + 1)


def traced(module, ids):
    return torch.jit.trace(module, ids, check_trace=False)(ids + 1)


@pytest.mark.filterwarnings("ignore")  # the recorders' own
@pytest.mark.parametrize("record", [functional, vectorised, exported, traced])
def test_a_recorded_one_matches_torch_embedding(record):
    library, ours = pair()
    ids = ids_of(0)
    found = record(ours, ids)
    assert torch.equal(record(library, ids), found)
    if record in (exported, traced):
        backward(library, ids + 1)
        found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(0)))
        assert ours.weight.grad is None or torch.equal(ours.weight.grad, library.weight.grad)


def test_a_small_table_is_left_to_torch():
    _, ours = pair()
    backward(ours, ids_of(0, (4, 200)))
    assert ours.memory.table is None


def test_a_frozen_table_and_no_grad_match_torch_embedding():
    library, ours = pair()
    with torch.inference_mode():
        assert torch.equal(library(ids_of(0)), ours(ids_of(0)))
    ours.weight.requires_grad_(False)
    assert not ours(ids_of(0)).requires_grad


def test_a_copy_and_a_cast_have_memory_of_their_own():
    library, ours = pair()
    backward(ours, ids_of(0))
    other = copy.deepcopy(ours)
    other.weight.grad = ours.weight.grad = None
    backward(other, ids_of(1), 1)
    backward(library, ids_of(1), 1)
    assert torch.equal(other.weight.grad, library.weight.grad)
    assert other.memory.table.data_ptr() != ours.memory.table.data_ptr()
    other.weight.grad = None
    other.double(), library.double()
    library.weight.grad = None
    for module in (library, other):
        backward(module, ids_of(2), 2)
    assert torch.equal(other.weight.grad, library.weight.grad) and other.weight.grad.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_either_integer_type_match_torch_embedding(dtype):
    library, ours = pair()
    for module in (library, ours):
        backward(module, ids_of(0).to(dtype))
    assert torch.equal(library.weight.grad, ours.weight.grad) and is_in_the_table(ours)


def test_a_copy_made_after_a_write_begins_clean(tmp_path):
    library, ours = pair()
    backward(ours, ids_of(0))
    ours.weight.grad.add_(1)
    torch.save(ours, tmp_path / "embedding.pt")
    for other in (copy.deepcopy(ours), torch.load(tmp_path / "embedding.pt", weights_only=False)):
        other.weight.grad = library.weight.grad = None
        for module in (library, other):
            backward(module, ids_of(1), 1)
        assert torch.equal(library.weight.grad, other.weight.grad)


def test_a_model_matches_itself_with_torch_embeddings():
    """The whole of a BERT: same losses, same gradients, same names."""
    library, ours = tiny_bert(), tiny_bert()
    use_row_gradients(ours)
    assert list(library.state_dict()) == list(ours.state_dict())
    assert ours.get_input_embeddings().weight is next(ours.parameters())
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batch = {
            "input_ids": torch.randint(0, 32, (2, 4), generator=generator),
            "attention_mask": torch.ones(2, 4, dtype=torch.int64),
            "labels": torch.tensor([0, 1]),
        }
        losses = []
        for model in (library, ours):
            model.zero_grad()
            torch.manual_seed(step)
            loss = model.train()(**batch).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        for (name, one), other in zip(library.named_parameters(), ours.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None) and (
                one.grad is None or torch.equal(one.grad, other.grad)
            ), name
    assert is_in_the_table(ours.get_input_embeddings())


LARGE = partial(DistributedDataParallel, bucket_cap_mb=0.01)  # the table has a bucket of its own


def _two_ranks(world, wrap, window):
    """On each rank other rows: averaged gradients must have those of both, and nothing of the step before."""
    library, ours = pair(padding_idx=0)
    models = [wrap(nn.Sequential(module, nn.Linear(WIDTH, 2))) for module in (library, ours)]
    models[1].module[1].load_state_dict(models[0].module[1].state_dict())
    rank, seen = world.rank, []
    for step in range(6):
        found = []
        for model in models:
            if step % window == 0:
                model.zero_grad()
            with nullcontext() if (step + 1) % window == 0 else model.no_sync():
                backward(model, ids_of(100 * rank + step), step)
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        if (step + 1) % window == 0:
            seen.append(is_in_the_table(ours))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other), step
    assert ours.memory.table is not None
    assert any(seen) == (wrap is not DistributedDataParallel)  # which has copied it into a bucket


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    "wrap",
    [DistributedDataParallel, LARGE, NaiveDDP, nn.parallel.DistributedDataParallel],
    ids=["ours", "reduced in the table", "naive", "torch"],
)
def test_two_ranks_match_torch_embedding(wrap, window):
    run_world(_two_ranks, 2, wrap, window)
