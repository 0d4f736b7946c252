"""Save a run's state. A kill or a full disk never costs an older checkpoint, and damage is noticed when it is read.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> for update in (10, 20):
...     save(folder / f"update-{update}", {"model": {"w": torch.ones(2)}, "schedule": {"last_epoch": update}}, keep=2)
>>> sorted(file.name for file in (folder / "update-20").iterdir())
['manifest.json', 'model.safetensors', 'schedule.json']
>>> _ = (folder / "update-20" / "schedule.json").write_text("{}")  # someone edits the newest one
>>> newest(folder)
(PosixPath('.../update-10'), ['update-20: schedule.json has 2 bytes, and its manifest says 18'])
>>> load(folder / "update-10")["schedule"]
{'last_epoch': 10}

Underneath: `accelerate.checkpointing.save_accelerator_state` (accelerate 1.15) writes one file after another into the
folder itself; `accelerate.Accelerator.load_state` takes the highest number, and unpickles registered objects.
  - Kept: one folder a save, numbered, with weights that any safetensors reader takes.
  - Here a folder appears complete or not at all: folders.py. Only then older ones are deleted.
  - A folder whose files are not what its manifest says is passed over, with the reason.
  - No pickle: tensors are safetensors, the rest is JSON.

Proof: test_a_kill_at_every_file_operation_loses_nothing, test_malicious_pickle_is_refused_where_accelerate_runs_it in
tests/run/test_checkpoint.py.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanofinetune.ground.errors import first_line, shown
from nanofinetune.run.folders import check, delete, new_folder, read_manifest, restore
from nanofinetune.step.order import mix

NEWEST = 10  # checkpoints of which every file is looked at for every save; older ones once, unless files come or go

# ---- State as tensors and JSON ---------------------------------------------------------------------------------------


def pack(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state dict -> (JSON, {path: copy on the CPU}); the copies do not change while training goes on.

    Takes dicts, lists, tuples, tensors, numbers, text, None. Tied weights, which share one memory, are stored once.
    Where a path is taken ({"a": {"b": x}, "a.b": y}), the later tensor's gets a number.
    Raises TypeError, naming the place, for anything else.

    >>> pack({"betas": (0.9, 0.999), "state": {0: {"exp_avg": torch.zeros(1)}}})[0]
    {'betas': {'!tuple': [0.9, 0.999]}, 'state': {'!dict': [[0, {'exp_avg': {'!tensor': 'state.0.exp_avg'}}]]}}
    """
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[Any, str] = {}  # where a tensor's memory is -> its name in `tensors`
    read: list[torch.Tensor] = []  # kept alive, so that none gets the memory of one that a mapping made for us alone

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, np.generic):
            node = node.item()
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, torch.Tensor):
            read.append(node)
            key = (node.device, node.data_ptr(), node.dtype, node.shape, node.stride()) if node.numel() else len(read)
            if key not in stored:
                names = (path or "tensor", *(f"{path}#{k}" for k in range(2, len(tensors) + 2)))
                stored[key] = next(name for name in names if name not in tensors)
                copy = node.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
                tensors[stored[key]] = copy.contiguous()
            return {"!tensor": stored[key]}
        inner = path + "." if path else ""
        if isinstance(node, Mapping):
            if all(isinstance(name, str) and not name.startswith("!") for name in node):
                return {name: walk(value, f"{inner}{name}") for name, value in node.items()}
            return {"!dict": [[walk(name, path), walk(value, f"{inner}{name}")] for name, value in node.items()]}
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{inner}{i}") for i, value in enumerate(node)]
            return items if isinstance(node, list) else {"!tuple": items}
        raise TypeError(
            f"{path or 'the state'} is a {type(node).__name__}: a checkpoint holds tensors, numbers, text, lists, dicts"
        )

    return walk(tree, ""), tensors


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `pack`. Tensors that shared one memory share it again."""
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "!tensor" in tree:
        return tensors[tree["!tensor"]]
    if "!tuple" in tree:
        return tuple(unpack(item, tensors) for item in tree["!tuple"])
    if "!dict" in tree:
        return {unpack(name, tensors): unpack(value, tensors) for name, value in tree["!dict"]}
    return {name: unpack(value, tensors) for name, value in tree.items()}


# ---- Save ------------------------------------------------------------------------------------------------------------


def save(folder: Path, parts: Mapping[str, Any], keep: int | None = None) -> None:
    """Write one checkpoint, each part a file, then delete all but the newest `keep` in the same parent folder.

    A part is what `pack` takes. Without a tensor it becomes NAME.json, else NAME.safetensors with the rest in the
    header. Raises OSError if the disk does not take it; then everything is as it was before.
    """
    write(folder, {name: pack(part) for name, part in parts.items()}, keep)


def write(folder: Path, packed: Mapping[str, tuple[Any, dict[str, torch.Tensor]]], keep: int | None = None) -> None:
    """`save` for parts that are packed already."""
    files = {f"{name}.safetensors" if part[1] else f"{name}.json": part for name, part in packed.items()}
    with new_folder(folder, files) as draft:
        for name, (tree, tensors) in files.items():
            _write(draft / name, tree, tensors)
    # underneath: Accelerate deletes the oldest before it writes; with total_limit=1 a kill in between leaves none
    if keep is not None:
        _delete_older(folder, keep)


def _delete_older(folder: Path, keep: int) -> None:
    """Of the folders named like this one, with lower numbers, leave the newest `keep` - 1 that are complete."""
    left, newest_number = keep - 1, number_of(folder)
    for nth, (number, path) in enumerate(_numbered(folder.parent, series_of(folder))):
        if number < newest_number:
            if left > 0 and _is_complete(path, again=nth < NEWEST):
                left -= 1
            else:
                delete(path)  # it checks that it is ours


_complete: dict[Path, int] = {}  # folders that this process has found complete -> when a file in them last came or went


def _is_complete(folder: Path, again: bool) -> bool:
    """Whether every file is there with its size. `again`: look, even if this process has found it so before."""
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return False
    if again or _complete.get(folder) != changed:
        if check(folder, hashes=False):
            _complete.pop(folder, None)
            return False
        _complete[folder] = changed
    return True


class Saver:
    """Writes checkpoints in a thread, one at a time: the training waits only while its state is copied.

    A write that fails (a full disk) does not end the training: `report` is called with a line, older checkpoints stay.
    """

    def __init__(self, report: Any = print) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._report = report

    def save(self, folder: Path, parts: Mapping[str, Any], keep: int | None = None) -> None:
        """Wait until the previous write is done, copy the state, and return while the copy is written."""
        self.wait()
        packed = {name: pack(part) for name, part in parts.items()}
        self._pending = self._pool.submit(write, folder, packed, keep)
        self._pending.add_done_callback(lambda done: self._say(folder, done.exception()))

    def wait(self, raising: bool = False) -> bool:
        """Wait until nothing is being written -> whether the last write succeeded. `raising`: raise its failure."""
        pending, self._pending = self._pending, None
        failure = None if pending is None else pending.exception()
        if failure is not None and raising:
            raise failure
        return failure is None

    def _say(self, folder: Path, failure: BaseException | None) -> None:
        if failure is not None:
            why = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
            self._report(shown(f"{folder} was not saved: {why}; what was saved before is still there"))


# ---- Load ------------------------------------------------------------------------------------------------------------


def series_of(folder: Path) -> str:
    """A folder's name without the number that it ends in: "update-" of update-00000010."""
    return re.sub("[0-9]+$", "", folder.name)


def number_of(folder: Path) -> int:
    """The number that a folder's name ends in; -1 if there is none."""
    found = re.search("[0-9]+$", folder.name)
    return int(found[0]) if found else -1


def numbered(parent: Path, series: str) -> list[Path]:
    """The folders in `parent` whose names are the series' and a number, the highest first."""
    return [path for _, path in _numbered(parent, series)]


def _numbered(parent: Path, series: str) -> list[tuple[int, Path]]:
    if not parent.is_dir():
        return []
    form = re.compile(re.escape(series) + "([0-9]+)")
    with os.scandir(parent) as entries:
        named = [(form.fullmatch(entry.name), entry) for entry in entries]
        found = [(int(name[1]), entry.name) for name, entry in named if name and _is_dir(entry)]
    return [(number, parent / name) for number, name in sorted(found, key=itemgetter(0), reverse=True)]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one. `os.path`: `entry.is_dir` raises for a link that leads to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def newest(
    parent: Path, series: str = "update-", misfit: Callable[[Path], str] = lambda folder: ""
) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a series (None: there is none), and why each newer one is passed over.

    `misfit` says why a complete one is not to be taken, "" if it is.
    """
    passed_over: list[str] = []
    for path in numbered(parent, series):  # underneath: Accelerate takes the highest number, complete or not
        reason = check(path) or misfit(path)
        if not reason:
            return path, passed_over
        passed_over.append(f"{path.name}: {reason}")
    return None, passed_over


def load(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """{part: its state} of a checkpoint that is checked first; of the parts in `names`, or of all.

    Raises ValueError, with the reason, if it is damaged, or does not hold all of these parts.
    """
    restore(folder)
    if reason := check(folder):
        raise ValueError(f"{folder} is not a complete checkpoint: {reason}")
    files = {Path(name).stem: folder / name for name in read_manifest(folder)}
    names = list(files) if names is None else list(names)
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{folder} holds no {', '.join(missing)}: it holds {', '.join(files)}")
    return {name: _read(files[name]) for name in names}


def read_part(folder: Path, name: str) -> Any:
    """One part of a checkpoint that is known to be complete.

    Raises KeyError if it has no such part, ValueError if that is not what `pack` writes.
    """
    for suffix in (".json", ".safetensors"):
        if (folder / (name + suffix)).is_file():
            return _read(folder / (name + suffix))
    raise KeyError(name)


def _write(file: Path, tree: Any, tensors: dict[str, torch.Tensor]) -> None:
    if not tensors:
        file.write_text(json.dumps(tree))
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"tree": json.dumps(tree)})
    except SafetensorError as error:  # the system's error is only in its text
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error


def _read(file: Path) -> Any:
    from safetensors import safe_open

    try:
        if file.suffix == ".json":
            return unpack(json.loads(file.read_text()), {})
        with safe_open(file, framework="pt") as opened:  # neither format can carry code
            tree = json.loads(opened.metadata()["tree"])
            return unpack(tree, {name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors has its own, json others; and deep brackets are a RecursionError
        why = f"{file.name} is not what its name says ({first_line(error)})"
        raise ValueError(f"{file.parent} is not a checkpoint: {why}") from error


# ---- Random numbers --------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Where this process's generators are: Python's `random`, numpy's, torch's on the CPU and on each GPU."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy_state = (name, np.asarray(keys).tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Set this rank's generators to their saved states. Raises if one does not accept its state.

    A rank that did not exist at the save gets generators of its own, derived from rank 0's.
    """
    state = states[rank if rank < len(states) else 0]
    # underneath: Accelerate does this in a `try` that logs at level INFO: a failure looks like a restored state
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if rank >= len(states):
        seed = mix(int(torch.randint(2**62, ())), rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
