"""nanofinetune.dropin.profiling and ProfileKwargs against accelerate 1.15's.

python -m pytest tests/dropin/test_profiling.py
"""

import dataclasses
import json
from typing import Any

import pytest
import torch
from helpers import run_ranks
from side_by_side import ours, theirs

from nanofinetune.settings import ProfileKwargs


def work(profiler, steps=1):
    for _ in range(steps):
        torch.ones(4, 4) @ torch.ones(4, 4)
        if steps > 1:
            profiler.step()


def libraries():
    return ((ours, ProfileKwargs), (theirs, pytest.importorskip("accelerate.utils").ProfileKwargs))


def test_profile_kwargs_match_accelerate():
    """Fields, defaults, and what torch's profiler is made of."""
    mine, reference = (kind for _, kind in libraries())
    assert [field.name for field in dataclasses.fields(mine)] == [field.name for field in dataclasses.fields(reference)]
    assert vars(mine()) == vars(reference())
    arguments = {
        "activities": ["cpu", "cuda"], "schedule_option": {"wait": 1, "warmup": 1, "active": 2},
        "record_shapes": True, "profile_memory": True, "with_stack": True, "with_flops": True, "with_modules": True,
    }  # fmt: skip
    built = []
    for kind in (mine, reference):
        profiler = kind(**arguments).build()
        plan = [profiler.schedule(step) for step in range(6)]
        names = ("activities", "record_shapes", "profile_memory", "with_stack", "with_flops", "with_modules")
        built.append([plan, *(getattr(profiler, name) for name in names)])
        with pytest.raises(ValueError, match="gpu"):
            kind(activities=["gpu"]).build()
    assert built[0] == built[1]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events at the end of each cycle:UserWarning")  # torch's
def test_profile_writes_what_accelerate_writes(tmp_path):
    seen = []
    for make, kind in libraries():
        calls: list[Any] = []
        folder = tmp_path / make.__name__
        plan = {"wait": 1, "warmup": 1, "active": 1, "repeat": 1}
        options = {"activities": ["cpu"], "schedule_option": plan, "on_trace_ready": calls.append}
        accelerator = make(kwargs_handlers=[kind(**options)])
        with accelerator.profile() as profiler:
            work(profiler, 5)
        with accelerator.profile(kind(activities=["cpu"], output_trace_dir=str(folder))) as another:
            work(another)
        names = [event["name"] for event in json.loads((folder / "profile_0.json").read_text())["traceEvents"]]
        keys = {event.key for event in another.key_averages()}
        seen.append((len(calls), [file.name for file in folder.iterdir()], "aten::mm" in names, "aten::mm" in keys))
    assert seen[0] == seen[1] == (1, ["profile_0.json"], True, True)


def on_two_ranks(folder):
    accelerator = ours(kwargs_handlers=[ProfileKwargs(activities=["cpu"], output_trace_dir=folder)])
    with accelerator.profile() as profiler:
        work(profiler)
    accelerator.end_training()


@pytest.mark.slow
def test_each_rank_writes_a_trace_of_its_own(tmp_path):
    run_ranks(on_two_ranks, 2, str(tmp_path / "traces"))
    assert sorted(file.name for file in (tmp_path / "traces").iterdir()) == ["profile_0.json", "profile_1.json"]
