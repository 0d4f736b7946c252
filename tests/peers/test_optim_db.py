"""torch 2.13's own table of AdamW's arguments, its optim_db, run through our AdamW beside torch's: the same bits.

What AdamW here refuses stands in REFUSED, which is exact. So are the arguments that both must refuse.

    python -m pytest tests/peers/test_optim_db.py
"""

import warnings
from copy import deepcopy

import pytest
import torch
from torch_cases import internals

from nanofinetune.step.optim import AdamW

internals()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_optimizers
INFO = next(info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.AdamW)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# What is refused, by argument -> how the refusal begins.
REFUSED = {"differentiable": "differentiable is True: use torch.optim.AdamW"}


def inputs():
    """Each set of arguments: torch's table, times the forms that it has on a CPU."""
    return common_optimizers._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)


def refused(arguments):
    return next((name for name in REFUSED if arguments.get(name)), None)


def updated(kind, arguments, dtype, grouped):
    """The weights and the state after seven updates with gradients that change."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (4,), (), (2, 3, 2))
    weights = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02, "weight_decay": 0.5}]
    optimizer = kind(groups if grouped else weights, **deepcopy(arguments))
    for step in range(7):
        for i, weight in enumerate(weights):
            weight.grad = None if step == i else torch.randn(weight.shape, generator=generator).to(dtype)
        optimizer.step()
    return weights, optimizer.state_dict()


def counts():
    """-> how many cases there are, how many of them pass, and how many of the others have which reason."""
    sets = [each.kwargs for each in inputs() for _ in range(2 * len(DTYPES))]
    absent = sum(refused(arguments) is not None for arguments in sets)
    total = len(sets) + len(errors())
    return total, total - absent, {"refused": absent}


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", [each.kwargs for each in inputs()], ids=str)
def test_every_set_of_torchs_table_matches_torch_adamw(arguments, dtype, grouped):
    if name := refused(arguments):
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            updated(AdamW, arguments, dtype, grouped)
        return
    (weights, state), (expected, their_state) = (
        updated(kind, arguments, dtype, grouped) for kind in (AdamW, torch.optim.AdamW)
    )
    assert all(torch.equal(*pair) for pair in zip(weights, expected, strict=True))
    assert state["state"].keys() == their_state["state"].keys()
    for i, entries in state["state"].items():
        assert entries.keys() == their_state["state"][i].keys()
        assert all(torch.equal(entries[name], their_state["state"][i][name]) for name in entries)


def errors():
    return INFO.optim_error_inputs_func("cpu", torch.float32)


@pytest.mark.parametrize("number", range(len(errors())))
def test_what_torch_refuses_is_refused(number):
    """Each set of arguments that torch's table says must fail, or warn (a warning is an error in these tests)."""
    error = errors()[number]
    wrong = error.optimizer_error_input
    assert error.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
    parameters = [torch.nn.Parameter(torch.zeros(2))] if wrong.params is None else wrong.params
    with pytest.raises(error.error_type, match=error.error_regex):
        torch.optim.AdamW(parameters, **wrong.kwargs)
    with pytest.raises((error.error_type, NotImplementedError)):
        AdamW(parameters, **wrong.kwargs)
