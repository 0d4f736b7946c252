"""nanofinetune.dropin.attributes against the properties of accelerate 1.15's Accelerator, with the same arguments.

python -m pytest tests/dropin/test_attributes.py
"""

import dataclasses

import pytest
import torch
from side_by_side import ours, rows, theirs

from nanofinetune.dropin import ATTRIBUTES
from nanofinetune.settings import DataLoaderConfiguration, ProjectConfiguration

ARGUMENTS = [{}, {"mixed_precision": "bf16"}, {"project_dir": "a/b"}]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_match_accelerate(name, arguments):
    found, expected = getattr(ours(**arguments), name), getattr(theirs(**arguments), name)
    if name == "use_seedable_sampler":  # ours always has one
        assert (found, expected) == (True, False)
    elif name == "state":
        assert str(found) == str(expected)
    else:
        assert found == expected and type(found) is type(expected)


def test_what_a_configuration_says_is_read_as_in_accelerate():
    utils = pytest.importorskip("accelerate.utils")
    seen = []
    for make, project, loading in (
        (ours, ProjectConfiguration, DataLoaderConfiguration),
        (theirs, utils.ProjectConfiguration, utils.DataLoaderConfiguration),
    ):
        accelerator = make(
            project_config=project(project_dir="p", logging_dir="p/logs", iteration=3),
            dataloader_config=loading(even_batches=False, non_blocking=True),
        )
        names = ("project_dir", "logging_dir", "save_iteration", "even_batches", "non_blocking")
        seen.append([getattr(accelerator, name) for name in names])
    assert seen[0] == seen[1] == ["p", "p/logs", 3, False, True]


@pytest.mark.parametrize("given", [{}, {"project_dir": "p"}, {"project_dir": "p", "logging_dir": "q"}], ids=str)
def test_project_configuration_matches_accelerate(given):
    reference = pytest.importorskip("accelerate.utils").ProjectConfiguration
    mine, theirs_ = ProjectConfiguration(**given), reference(**given)
    assert dataclasses.asdict(mine) == dataclasses.asdict(theirs_)
    for each in (mine, theirs_):
        each.set_directories("other")
    assert dataclasses.asdict(mine) == dataclasses.asdict(theirs_)


def test_even_batches_can_be_set_as_in_accelerate():
    """`accelerator.even_batches = False` reaches the loaders that are prepared after it."""
    for accelerator in (ours(), theirs()):
        assert accelerator.even_batches
        accelerator.even_batches = False
        assert accelerator.even_batches is False
    mine = ours()
    mine.even_batches, mine.num_processes, mine.use_distributed = False, 2, False
    assert mine.prepare(rows(5, 1)).batch_sampler.even_batches is False


def test_gradient_state_is_read_as_in_accelerate():
    """In a loop, in the loop inside it, and outside."""

    def read(accelerator):
        outer, inner = accelerator.prepare(rows(5, 2), rows(3, 2))
        seen = []

        def look():
            state = accelerator.gradient_state
            active = {id(outer): "outer", id(inner): "inner"}.get(id(state.active_dataloader))
            seen.append((state.in_dataloader, active, state.end_of_dataloader, state.remainder, state.num_steps))

        look()
        for step, _ in enumerate(outer):
            look()
            if step == 1:
                for _ in inner:
                    look()
                look()
        look()
        accelerator.gradient_accumulation_steps = 7
        look()
        accelerator.sync_gradients = False
        return seen, accelerator.gradient_state.sync_gradients, accelerator.gradient_state.sync_with_dataloader

    assert read(ours(gradient_accumulation_steps=2)) == read(theirs(gradient_accumulation_steps=2))


def test_a_name_that_is_nowhere_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Accelerator' object has no attribute 'staet'"):
        ours().staet  # noqa: B018
    assert isinstance(ours().device, torch.device)
