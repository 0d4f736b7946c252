"""nanofinetune.dropin.local_sgd against accelerate 1.15's LocalSGD, each with its own Accelerator on two gloo ranks.

python -m pytest tests/dropin/test_local_sgd.py
"""

import gc

import pytest
import torch
from helpers import run_ranks
from side_by_side import line, ours, theirs

from nanofinetune import LocalSGD


def train(accelerator, kind, enabled=True, steps=5, fail_at=None):
    """The weights after each step, with rows of this rank's own."""
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = torch.randn(steps, 4, 3, generator=torch.Generator().manual_seed(accelerator.process_index))
    seen = []
    with kind(accelerator=accelerator, model=model, local_sgd_steps=2, enabled=enabled) as local_sgd:
        for i, batch in enumerate(data):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            seen.append(accelerator.unwrap_model(model).weight.tolist())
            if i == fail_at:
                raise KeyError("in the block")
    return [*seen, accelerator.unwrap_model(model).weight.tolist(), local_sgd.num_steps]


def on_two_ranks(failing):
    from accelerate.local_sgd import LocalSGD as TheirLocalSGD

    accelerator = ours()
    if failing:  # on this rank only: it must not wait for the other one, which goes on
        try:
            train(accelerator, LocalSGD, fail_at=0 if accelerator.process_index else None, steps=1)
            return "averaged"
        except (KeyError, RuntimeError) as error:
            return type(error).__name__
    found = [train(accelerator, LocalSGD, enabled) for enabled in (True, False)]
    expected = [train(theirs(), TheirLocalSGD, enabled) for enabled in (True, False)]
    gc.collect()
    accelerator.end_training()
    return found, expected


def test_local_sgd_matches_accelerate():
    """Bit for bit: the ranks' weights differ after an odd step, and agree after an even one and at the end."""
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    ranks = run_ranks(on_two_ranks, 2, False)
    for found, expected in ranks:
        assert found == expected
    (first, _), (second, _) = (found for found, _ in ranks)
    assert [one == two for one, two in zip(first, second, strict=True)] == [False, True] * 2 + [False, True, True]
    assert all(one == two for one, two in zip(*(found[1] for found, _ in ranks), strict=True))  # not enabled


def test_a_failing_rank_does_not_wait_for_the_others():
    assert run_ranks(on_two_ranks, 2, True)[1] == "KeyError"


def test_local_sgd_alone_changes_nothing():
    from accelerate.local_sgd import LocalSGD as TheirLocalSGD

    found = train(ours(), LocalSGD)
    assert found == train(theirs(), TheirLocalSGD)
    assert found == train(ours(), LocalSGD, enabled=False)


def test_a_number_of_steps_that_means_nothing_is_refused():
    """Accelerate divides by it later."""
    with pytest.raises(ValueError, match="local_sgd_steps is 0: it must be 1 or more"):
        LocalSGD(ours(), line(), local_sgd_steps=0)
