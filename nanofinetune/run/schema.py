"""Whether a saved state can belong to an object: asked of all of them before any one is changed.

>>> misfit("model", torch.nn.Linear(2, 1), {"weight": torch.ones(3, 1), "bias": torch.ones(1)})
'weight has the shape [3, 1], and here it is [1, 2]'
>>> misfit("random_states", None, [{"python": 1}])
'random_states is not what save_state writes'

Underneath: `torch.nn.Module.load_state_dict`, `torch.optim.Optimizer.load_state_dict` and
`torch.optim.lr_scheduler.LRScheduler.load_state_dict` (torch 2.13), which `accelerate.Accelerator.load_state` calls in
turn.
  - A module copies the tensors that fit, and raises afterwards. A schedule takes over whatever attributes it is given.
    An optimizer looks at no tensor's shape.
  - Here each state is compared with the object's own first; the first difference is the reason that the user reads.
  - An object of the caller's may have a method `misfit(state)` for this.

Proof: test_a_state_that_does_not_fit_changes_nothing, test_random_damage_is_never_loaded in tests/run/test_schema.py
and tests/run/test_damage.py.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nanofinetune.step.schedule import Schedule

LIMIT = 2**53  # of counts: JSON readers of other languages know no greater whole numbers
LIKE_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # what optimizers keep in its shape


def misfit(name: str, thing: Any, state: Any) -> str:
    """Why `state` cannot be one of `thing`, "" if it can. `name`: of its part of a checkpoint, such as optimizer_1."""
    kind = name if name == "random_states" else name.partition("_")[0]
    try:
        reason = KINDS[kind](thing, state) if kind in KINDS else ""
        return reason or (thing.misfit(state) if hasattr(thing, "misfit") else "")
    except Exception:  # a mapping where a list should be, text where a number should be, ...
        return f"{name} is not what save_state writes"


def whole(value: Any, low: int = 0, high: int = LIMIT) -> bool:
    """Whether a value is a whole number from `low` to `high`."""
    return type(value) is int and low <= value <= high


def finite(value: Any, low: float = -math.inf) -> bool:
    """Whether a value is a number, not NaN or infinite, from `low` on."""
    return type(value) in (int, float) and math.isfinite(value) and value >= low


# ---- One function a kind ---------------------------------------------------------------------------------------------


def _model(module: Any, state: Mapping[str, Any]) -> str:
    own = module.state_dict()
    for name in own:
        if name not in state:
            return f"{name} is missing"
    for name, saved in state.items():
        if name not in own:
            return f"{name} is not in the model here"
        if isinstance(own[name], torch.Tensor):
            if own[name].shape != saved.shape:
                return f"{name} has the shape {list(saved.shape)}, and here it is {list(own[name].shape)}"
            if own[name].is_floating_point() != saved.is_floating_point():
                return f"{name} is {saved.dtype}, and here it is {own[name].dtype}"
    return ""


def _optimizer(optimizer: Any, state: Mapping[str, Any]) -> str:
    groups = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in state["param_groups"]]:
        return "its groups hold other numbers of parameters"
    for group in state["param_groups"]:
        for name in {"lr", "betas", "eps", "weight_decay"} & set(group):
            values = group[name] if isinstance(group[name], (list, tuple)) else [group[name]]
            if any(type(number) in (int, float) and not finite(number, low=0) for number in values):
                return f"{name} is {group[name]}"
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in groups for p in group["params"]), strict=True))
    if len(parameters) < len(numbers) or not all(whole(number) for number in numbers):
        return "its parameters are not numbered one by one"
    for number, kept in state["state"].items():
        if number not in parameters:
            return f"it has a state of parameter {number}, which is in no group"
        for name, value in kept.items():
            if name in LIKE_THE_PARAMETER and value is not None and value.shape != parameters[number].shape:
                shape = list(parameters[number].shape)
                return f"{name} of parameter {number} has the shape {list(value.shape)}, and here it is {shape}"
            if name in ("exp_avg_sq", "max_exp_avg_sq") and value.numel() and value.min() < 0:
                return f"{name} of parameter {number} is a mean of squares, and negative"
            if name == "step" and not finite(float(value), low=0):
                return f"step of parameter {number} is {float(value)}"
    return ""


def _scheduler(scheduler: Any, state: Mapping[str, Any]) -> str:
    own = getattr(scheduler, "scheduler", scheduler)
    for name in state:
        if name not in own.state_dict() and hasattr(type(own), name):
            return f"it would replace {type(own).__name__}.{name}"
    for name, low in (("last_epoch", -1), ("_step_count", 0)):
        if name in state and not whole(state[name], low):
            return f"{name} is {state[name]}"
    for name in ("base_lrs", "_last_lr"):
        if not all(isinstance(lr, torch.Tensor) or finite(lr) for lr in state.get(name, [])):
            return f"{name} is {state[name]}"
    if isinstance(own, Schedule):  # it checks the totals itself: let a copy do so
        trial = copy.copy(own)
        trial.optimizer = SimpleNamespace(param_groups=[dict(group) for group in own.optimizer.param_groups])  # type: ignore[assignment]
        try:
            trial.load_state_dict(dict(state))
        except ValueError as error:
            return str(error)
    return ""


def _loader(_: Any, state: Mapping[str, Any]) -> str:
    if not whole(state["epoch"], high=2**31):
        return f"epoch is {state['epoch']}"
    if state["rows"] is not None and not whole(state["rows"]):
        return f"rows is {state['rows']}"
    if not whole(state["data_seed"], -(2**63), 2**64 - 1):
        return f"data_seed is {state['data_seed']}"
    return ""


def _scaler(scaler: Any, state: Mapping[str, Any]) -> str:
    if set(state) != set(scaler.state_dict()):
        return "it has other entries than a GradScaler"
    return next((f"{name} is {value}" for name, value in state.items() if not finite(value, low=0)), "")


def _random_states(_: Any, states: list[Mapping[str, Any]]) -> str:
    """Generators of their own try the states."""
    if not states:
        return "there is no random state"
    for state in states:
        random.Random().setstate(state["python"])
        # underneath: numpy checks no position, and with a wrong one reads what lies behind the generator's memory
        name, keys, position, has_gauss, gauss = state["numpy"]
        if name != "MT19937" or not (whole(position, high=624) and whole(has_gauss, high=1) and finite(gauss)):
            return "numpy's random state is not one"
        np.random.RandomState().set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
        torch.Generator().set_state(state["torch"])
        if not all(cuda.dtype == torch.uint8 and cuda.ndim == 1 for cuda in state["cuda"]):
            return "the random state of a GPU is not one"
        if not whole(state.get("step", 0)):  # of the Accelerator; one of an earlier version has none
            return f"step is {state['step']}"
    return ""


KINDS: dict[str, Callable[[Any, Any], str]] = {
    "model": _model, "optimizer": _optimizer, "scheduler": _scheduler, "loader": _loader, "scaler": _scaler,
    "random_states": _random_states,
}  # fmt: skip
