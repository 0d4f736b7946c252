"""The state of all ranks into one checkpoint, and back: which objects it holds, and how every rank learns of a failure.

>>> import torch
>>> prepared = Prepared()
>>> prepared.models += [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
>>> sorted(prepared.stateful())
['model', 'model_1']

Underneath: `accelerate.Accelerator.save_state`, `accelerate.checkpointing.save_accelerator_state` (accelerate 1.15).
  - Kept: each kind of object is numbered in the order in which it was prepared.
  - There every rank writes its own file of random states; here rank 0 writes them all, since one folder is one save.
  - There rank 0's failure leaves the others waiting; here all ranks raise, with its reason.
  - A call by rank 0 alone fails within seconds, and says so.
  - checkpoint.py puts the files on the disk.

Proof: test_windows_go_on_where_they_were_saved_as_in_accelerate, test_save_state_and_load_state_on_ranks,
test_a_failure_to_save_reaches_all_ranks in tests/run/test_state.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from nanofinetune.ground.errors import first_line, shown
from nanofinetune.ranks import collectives
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.world import World
from nanofinetune.run import checkpoint
from nanofinetune.run.folders import refusal
from nanofinetune.run.schema import misfit
from nanofinetune.run.watch import all_call
from nanofinetune.step.order import mix

METHODS = ("state_dict", "load_state_dict")  # what an object needs to be saved
SERIES = "checkpoint_"  # what automatic naming calls a folder, before its number


class Prepared:
    """Everything that an Accelerator has prepared or registered, by kind, in the order of the calls."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.optimizers: list[Any] = []
        self.schedulers: list[Any] = []
        self.loaders: list[Any] = []
        self.custom: list[Any] = []
        self.orders: list[tuple[int, Any]] = []  # of the loaders: each seed, and the generator that it came from

    def unlike(self, seed: int, source: Any) -> int:
        """`seed`, or where a loader draws from it already another one in its place. Two generators may be seeded alike.

        >>> prepared = Prepared()
        >>> prepared.unlike(42, None), prepared.unlike(42, None) == mix(42, 1)
        (42, True)
        """
        # underneath: two shuffled loaders of one seed would pair equal rows; torch's draw one after the other
        taken = {other for other, its in self.orders if source is None or its is None or source is its}
        own, number = seed, 0
        while own in taken:
            number += 1
            own = mix(seed, number)
        self.orders.append((own, source))
        return own

    def forget(self, *objects: Any) -> None:
        """Remove prepared objects; `custom` ones stay."""
        for held in (self.models, self.optimizers, self.schedulers, self.loaders):
            held[:] = [thing for thing in held if not any(thing is obj for obj in objects)]

    def stateful(self, scaler: Any = None) -> dict[str, Any]:
        """Everything with a state, by the name of its part of a checkpoint: model, model_1, optimizer, ..."""
        kinds = {
            "model": [model.module if isinstance(model, DistributedDataParallel) else model for model in self.models],
            "optimizer": self.optimizers,
            "scheduler": self.schedulers,
            "loader": self.loaders,
            "scaler": [] if scaler is None else [scaler],
            "custom": self.custom,
        }
        return {f"{kind}_{i}" if i else kind: thing for kind, things in kinds.items() for i, thing in enumerate(things)}


def save(
    folder: Path, things: dict[str, Any], world: World, saver: checkpoint.Saver, keep: int | None, background: bool,
    step: int, replace: bool = True,
) -> None:  # fmt: skip
    """Write the state of `things`, and every rank's random state, into the folder. A collective; rank 0 writes.

    `step`: where an Accelerator's windows stand; kept with the random states, as Accelerate does.
    An older checkpoint of ours is replaced, unless `replace` is False.
    Raises on rank 0 what `Accelerator.save_state` lists, and on the others RuntimeError with rank 0's reason.
    """
    all_call("save_state", world)
    random_states = collectives.gather_object([checkpoint.random_state() | {"step": step}], world)
    if keep is not None and keep < 1:
        raise ValueError(f"save_state: keep (or total_limit) is {keep}: it must be 1 or more")
    failure: Exception | None = None
    if world.rank == 0:
        try:
            parts = {name: thing.state_dict() for name, thing in things.items()}
            parts["random_states"] = random_states
            if reason := refusal(folder):
                raise FileExistsError(reason)
            if not replace and os.path.lexists(folder):
                # underneath: Accelerate numbers from 0 again after a restart, and refuses as well
                raise ValueError(f"{folder} exists already: call load_state first, or name another project_dir")
            saver.save(folder, parts, keep)
            if not background:
                saver.wait(raising=True)
        except Exception as error:  # any: the other ranks are waiting for the outcome
            failure = error
    failures = collectives.gather_object([str(failure or "")], world)
    if failure is not None:
        raise failure
    if failures[0]:
        raise RuntimeError(f"rank 0 could not save: {failures[0]}")


def newest(parent: Path, world: World) -> Path:
    """The newest complete checkpoint in `parent`, as rank 0 sees it; prints why each newer one is passed over."""
    found: list[Path | None] = [None]
    if world.rank == 0:
        found[0], passed_over = checkpoint.newest(parent, SERIES)
        for line in passed_over:
            print(f"passed over: {shown(line)}", file=sys.stderr)
    folder = collectives.broadcast_object_list(found, world)[0]
    if folder is None:
        raise ValueError(f"load_state: there is no complete checkpoint in {parent}")
    return folder


def load(folder: Path, things: dict[str, Any], world: World, step: int) -> int:
    """Give `things`, and this rank's random generators, their saved states -> the saved step. A collective.

    Every rank reads the folder. A checkpoint of an earlier version holds no step: then `step` comes back.
    The folder may hold more: for an evaluation, the model alone is prepared, and loaded.
    Raises ValueError, on all ranks and before anything is changed, if a rank cannot read it or it does not fit.
    """
    all_call("load_state", world)
    states, reason = {}, ""
    try:
        states = checkpoint.load(folder, ["random_states", *things])
        for name, thing in (*things.items(), ("random_states", None)):
            if why := misfit(name, thing, states[name]):
                reason = reason or f"{folder} does not fit: {name}: {why}"
    except (OSError, ValueError) as error:
        reason = str(error)
    reason = shown(reason)  # it may quote what the folder's author wrote
    for rank, why in enumerate(collectives.gather_object([reason], world)):
        if why:
            raise ValueError(why if rank == world.rank else f"rank {rank} cannot load: {why}")
    random_states = states.pop("random_states")
    for name, thing in things.items():
        try:
            thing.load_state_dict(states[name])
        except Exception as error:  # the same on all ranks: they have read the same
            raise ValueError(f"{folder} does not fit: {name} refuses its state ({first_line(error)})") from error
    checkpoint.set_random_state(random_states, world.rank)
    return random_states[0].get("step", step)  # the same on all ranks, of which there may be more now
