"""Where a run begins: at its newest complete checkpoint, and only if it is the same run.

>>> batch_plan(8, 1, processes=2, start=Start())  # rows of a step of all ranks, and batches accumulated
(16, 1)
>>> start = Start(folder=Path("update-40"), run={"batch_size": 8, "accumulate": 1, "world": 2, "fits": 8})
>>> batch_plan(8, 1, processes=1, start=start)  # two ranks' run goes on with one: as many rows an update as before
(8, 2)

Underneath: `accelerate.Accelerator.load_state` (accelerate 1.15) loads a folder; the rest is the script's. Scripts read
epoch and batch from the folder's name, and call `accelerate.skip_first_batches`.
  - The order of the rows may have changed by then, and on another number of ranks as many batches are other rows.
  - Here the arguments, the data's hash and the model with its config must be those that the run began with; else an
    error names the difference. A folder with another run in it is refused.
  - The number of ranks may change: an update keeps its number of rows.

Proof: test_resume_matches_the_uninterrupted_run, test_resume_refuses_another_run in tests/run/test_resume.py.
"""

from __future__ import annotations

import math
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.ground.names import place_of
from nanofinetune.ground.progress import plural
from nanofinetune.ranks.collectives import agree, broadcast_object_list
from nanofinetune.run import answers, checkpoint, log
from nanofinetune.run.folders import MANIFEST
from nanofinetune.run.log import locked, occupied
from nanofinetune.run.schema import whole

# A resumed run is the same run, so these arguments must be what they were. (Batches may differ: see `batch_plan`.)
IDENTITY = (
    "model", "data", "max_length", "text_columns", "label_column", "task", "drop_unlabelled", "separator", "encoding",
    "epochs", "max_steps", "group_by_length", "lr", "weight_decay", "warmup_steps", "schedule", "clip_norm",
    "precision", "fast_dropout", "seed", "uneven", "class_weights", "keep_best", "patience",
)  # fmt: skip
# These may be others: into how many batches an update is cut, where it is computed, what is kept of it, how long to
# wait, and what to do about a loss that is not finite (a run that ended there can go on and leave it out).
MAY_CHANGE = (
    "batch_size", "accumulate", "eval_batch_size", "device", "output", "save_every", "keep", "resume", "dry_run",
    "on_nan", "timeout",
)  # fmt: skip
# Arguments that older checkpoints lack, and what their runs did.
LATER: dict[str, Any] = {"schedule": "linear", "task": "auto", "drop_unlabelled": False}
LATER |= dict.fromkeys(("max_length", "separator", "encoding", "class_weights", "keep_best", "patience"))

OUTPUTS = ("model", "metrics.jsonl", answers.FILE, "result.json", "checkpoints")  # what --output gets
COUNTS = ("batch_size", "accumulate", "world", "fits")  # fits: the rows of a process's batch that fitted into memory


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, with what `run_of` said of its run; or, without one, at the first update."""

    folder: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    place: tuple[int, int, int] = (0, 0, 0)  # updates; epochs that are over, and rows of the one that is not
    seen: Mapping[str, Any] | None = None  # what was in --output: `contents`

    @property
    def rows_per_step(self) -> int | None:
        """Rows of a step of all ranks when the run began: --group-by-length keeps groups of that size."""
        return self.run["batch_size"] * self.run["world"] if self.run else None


def run_of(arguments: Mapping[str, Any], processes: int, found: Mapping[str, Any], start: Start) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes, to be saved with it.

    Args:
        arguments: of the command line.
        found: what stands behind them, under the names that a user would understand: {"the model": ..., ...}.
        start: where the run begins.

    Raises UsageError if the run to resume found something else under the same arguments. Older checkpoints hold less of
    it than newer ones, and another version of transformers may no longer know a part of the model's config.
    """
    for name, was in start.run.get("found", {}).items():
        if found.get(name, was if name.endswith("of the model's config") else None) != was:
            raise UsageError(f"--resume: {name} is {found.get(name)}, and the run began with {was}; use the same")
    if start.run:
        return dict(start.run)
    run = {name: arguments[name] for name in (*IDENTITY, "batch_size", "accumulate")}
    return run | {"world": processes, "fits": run["batch_size"], "found": dict(found)}


def batch_plan(batch_size: int, accumulate: int, processes: int, start: Start) -> tuple[int, int]:
    """(rows of a step of all ranks, batches accumulated), so that an update has as many rows as when the run began.

    `batch_size`, in rows, is per process. Raises UsageError if these processes cannot share the rows equally.
    """
    if not start.run:
        return batch_size * processes, accumulate
    before = _rows_per_update(start.run)
    if (batch_size, accumulate) == (start.run["batch_size"], start.run["accumulate"]):
        # the largest batch that fits into memory, and of which a whole number makes a process's share of an update
        share, rest = divmod(before, processes)
        fewest = -(-share // start.run["fits"])
        batches = next((n for n in range(fewest, min(share, fewest + 10**6) + 1) if share % n == 0), 0)
        if batches and not rest:
            return share // batches * processes, batches
    if batch_size * processes * accumulate == before:
        return batch_size * processes, accumulate
    asked = f"{plural(processes, 'process', 'processes')} x --batch-size {batch_size}"
    raise UsageError(
        f"--resume: the run has {plural(before, 'row')} an update, and {asked} x"
        f" --accumulate {accumulate} are {batch_size * processes * accumulate}: choose values that give {before}"
    )


def common_start(args: Any, accelerator: Any) -> Start:
    """What --output and --resume ask for: rank 0 looks what is there, and tells the others."""
    if args.output is None and args.resume is None:
        return Start()
    # A node counts its own restarts, and knows what its own ranks have claimed: another one's may know of none.
    restarted = bool(agree([args.output is not None and is_ours(args.output)], accelerator.world)[0])
    with accelerator.main_process_first():
        found = [find_start(args, restarted) if accelerator.is_main_process else None]
    return broadcast_object_list(found, accelerator.world)[0]


def find_start(args: Any, restarted: bool = False) -> Start:
    """What --output and --resume ask for: the place to begin, once everything is known to exist and to be writable.

    `restarted`: the launcher has started these ranks again, and what --output holds is their own (`is_ours`).
    Raises UsageError, before any long work, if something would be overwritten or the run is another one.
    """
    restarted = restarted and args.output is not None
    output = None if args.output is None else place_of("--output", args.output)
    seen = None if output is None else contents(output)  # first: what comes after it is noticed, by `_claim` or `take`
    if output is not None:
        _claim(args.output, output, goes_on=restarted or args.resume is not None)
    if args.resume is None and not restarted:
        return Start(seen=seen)
    folder: Path | None = None
    passed_over: list[str] = []
    named = args.resume not in (None, "auto")
    if output is not None and (restarted or not named):  # a restarted run has saved newer ones than it was told of
        folder, passed_over = checkpoint.newest(output / "checkpoints", misfit=misfit)
    named = named and folder is None
    if named:
        folder, passed_over = _named(args.resume)
    if folder is None:
        note = "; ".join([*map(_skipped, passed_over), f"no checkpoint in {args.output}: from the start"])
        return Start(note=note, seen=seen)
    state = checkpoint.read_part(folder, "custom")
    run = LATER | state["run"]
    for name in IDENTITY:
        if run[name] != getattr(args, name):
            now, was = _given(name, getattr(args, name)), _given(name, run[name])
            was = was.removeprefix(now.partition(" ")[0] + " ")  # the flag is said once
            raise UsageError(f"{now}: the run to resume began with {was}; use the same")
    if output is not None and named:
        there = checkpoint.numbered(output / "checkpoints", "update-")
        later = [path for path in there if checkpoint.number_of(path) > checkpoint.number_of(folder)]
        if later and not all(checkpoint.check(path) for path in later):
            raise UsageError(
                f"--resume {args.resume}: {args.output} holds later ones ({later[0].name}): say auto, or name another"
                " --output"
            )
        if what := _of_another_run(output, folder, run, state["update"]):
            raise UsageError(
                f"--resume {args.resume}: {args.output} holds {what} of another run; name another --output, or say auto"
                " to go on with that run"
            )
    resumed = f"resumed after update {state['update']}, from {folder}"
    place = (state["update"], state["epoch"], state["rows"])
    return Start(folder, run, "; ".join([*map(_skipped, passed_over), resumed]), place, seen)


def misfit(folder: Path) -> str:
    """Why a complete checkpoint is not one that a run of train.py has saved under this name, "" if it is."""
    try:
        state = checkpoint.read_part(folder, "custom")
        run, update = state["run"], state["update"]
    except (KeyError, TypeError, ValueError):
        return "train.py did not make it"
    if reason := log.misfit(state) or _misfit_of_run(run) or _misfit_of_parts(folder, run, update):
        return f"it cannot be: {reason}"
    if re.fullmatch("update-[0-9]+", folder.name) and checkpoint.number_of(folder) != update:
        return f"it has been renamed: it was saved after update {update}"
    return ""


def _misfit_of_run(run: Mapping[str, Any]) -> str:
    """Why this cannot be what `run_of` returned."""
    if {*run, *LATER} != {*IDENTITY, *COUNTS, "found"}:
        return "its run has other arguments than train.py"
    for name in COUNTS:
        if not whole(run[name], 1, 2**31):
            return f"{name} is {str(run[name])[:40]}"
    if run["fits"] > run["batch_size"] * run["accumulate"] * run["world"]:
        return f"fits is {run['fits']}, and an update has fewer rows"
    found = run["found"]
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return "what its run has found is not text"
    return ""


def _misfit_of_parts(folder: Path, run: Mapping[str, Any], update: int) -> str:
    """Why the other parts cannot have been saved with this run: one of them may be another checkpoint's.

    A part that is missing is refused when the state is loaded.
    """
    scheduler, loader = (_part(folder, name) for name in ("scheduler", "loader"))
    at = scheduler.get("last_epoch", update)
    if at != update and not (run["precision"] == "fp16" and at < update):  # a skipped update does not move a schedule
        return f"its schedule is at update {at}, and the run at {update}"
    if peaks := [lr for lr in scheduler.get("base_lrs", ()) if lr != run["lr"]]:
        return f"its schedule has the learning rate {peaks[0]}, and the run {run['lr']}"
    # Batches grouped by length have a sampler of their own, whose seed the loader does not keep.
    if not run["group_by_length"] and (seed := loader.get("data_seed", run["seed"])) != run["seed"]:
        return f"its loader has the seed {seed}, and the run {run['seed']}"
    return ""


def _part(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        part = checkpoint.read_part(folder, name)
    except (OSError, KeyError, TypeError, ValueError):
        return {}
    return part if isinstance(part, Mapping) else {}


def check_place(start: Start, rows: int, rows_per_update: int, updates: int) -> None:
    """Raises UsageError if a run of so many updates cannot have been where its checkpoint says that it was."""
    if start.folder is None:
        return
    update, epoch, used = start.place
    an_epoch = math.ceil(rows / rows_per_update)
    if used > rows or update > updates or update != epoch * an_epoch + math.ceil(used / rows_per_update):
        place = f"update {update} after {epoch} epochs and {used} rows"
        raise UsageError(f"--resume {start.folder}: it says {place}, where this run never is; name another one")


# ---- What --output and --resume name ---------------------------------------------------------------------------------


def _given(name: str, value: Any) -> str:
    """An argument as it is typed: "--lr 0.1", "--group-by-length", "no --group-by-length"."""
    flag = "--" + name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return flag if value else f"no {flag}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _skipped(reason: str) -> str:
    return f"passed over {reason}"


def _named(resume: str) -> tuple[Path, list[str]]:
    """The checkpoint that --resume names, or the newest of the run that it names -> it, and what is passed over."""
    path = place_of("--resume", resume)
    try:
        if os.path.lexists(path / MANIFEST):
            if reason := checkpoint.check(path):
                raise UsageError(f"--resume {resume}: {reason}; name another one, or its parent folder for the newest")
            folder, passed_over = path, list[str]()
        else:
            inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            found, passed_over = checkpoint.newest(inside, misfit=misfit)
            if found is None:
                why = f" ({'; '.join(passed_over)})" if passed_over else ""
                raise UsageError(
                    f"--resume {resume}: there is no complete checkpoint{why}; name a folder that holds one"
                )
            folder = found
    except OSError as error:
        raise UsageError(f"--resume {resume}: it cannot be read ({error.strerror}); name another folder") from error
    if reason := misfit(folder):
        raise UsageError(f"--resume {resume}: {reason}; name another checkpoint")
    return folder, passed_over


def _of_another_run(output: Path, folder: Path, run: Mapping[str, Any], update: int) -> str:
    """What --output holds that the run of the named checkpoint did not make, "" if that run can go on there."""
    if os.path.realpath(folder.parent) == os.path.realpath(output / "checkpoints"):
        return ""
    own, _ = checkpoint.newest(output / "checkpoints", misfit=misfit)
    if own is not None:
        other = LATER | checkpoint.read_part(own, "custom")["run"]
        same = all(other[name] == run[name] for name in IDENTITY) and _rows_per_update(other) == _rows_per_update(run)
        for name in {*other["found"]} & {*run["found"]}:
            same = same and other["found"][name] == run["found"][name]
        return "" if same else own.name
    if _exists(output / "metrics.jsonl"):
        with (output / "metrics.jsonl").open("rb") as file:
            first = log.first_step(file)  # one that went on there from this checkpoint has logged later ones alone
        return f"the losses from update {first:,} on" if first is not None and first <= update else ""
    return ""


def _rows_per_update(run: Mapping[str, Any]) -> int:
    return run["batch_size"] * run["world"] * run["accumulate"]


# ---- Whose --output is ----------------------------------------------------------------------------------------------


def contents(output: Path) -> dict[str, Any]:
    """When and how large each thing is that a run makes there: it stays so as long as nobody writes."""
    paths = [output / name for name in OUTPUTS if name != "checkpoints"]
    with suppress(OSError):  # `_claim` says so
        paths += checkpoint.numbered(output / "checkpoints", "update-")
    found = {}
    for path in paths:
        with suppress(OSError):  # it is not there
            status = path.stat()
            found[path.name] = (status.st_size, status.st_mtime_ns)
    if found.get("metrics.jsonl", (0,))[0] == 0:
        found.pop("metrics.jsonl", None)  # the one that has just been made, to be locked
    return found


def take(output: Path | None, start: Start) -> None:
    """With metrics.jsonl locked: make sure that nobody has written there since `find_start` looked, and remember it.

    Loading may take minutes, in which another run can have begun and ended there.
    """
    if output is None or start.seen is None:
        return
    if contents(output) != start.seen:
        why = "another run has written there since this one looked"
        raise UsageError(f"--output {output}: {why}; start again, or name another folder")
    note = _note()
    if note is not None:
        with suppress(OSError), note.open("ab") as file:  # without it a restart refuses to go on by itself
            file.write(os.fsencode(os.path.realpath(output)) + b"\0")


def is_ours(output: str) -> bool:
    """Whether the launcher has started this process again, and an earlier start of the same job has taken --output.

    A restart alone does not make it ours: the start before may have refused what is there, or have ended too early.
    """
    note = _note()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or note is None or not note.is_file():
        return False
    return os.fsencode(os.path.realpath(place_of("--output", output))) in note.read_bytes().split(b"\0")


def _note() -> Path | None:
    """The file in which a node's ranks note what they have taken; None without a launcher that restarts."""
    # underneath: torchrun makes .../RUN_ID_random for itself, and in it attempt_N/LOCAL_RANK/error.json for each start.
    # The run id alone is "none" for all jobs, and the port mostly the same.
    job = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    known = re.fullmatch("attempt_[0-9]+", job.parent.parent.name)
    return job.parents[2] / "nanofinetune-outputs" if known else None


def _claim(name: str, output: Path, goes_on: bool) -> None:
    """Make sure, before any long work, that the folder can be written and holds nothing that would be overwritten."""
    try:
        there = [child for child in OUTPUTS if _exists(output / child)]
        if "result.json" in there and goes_on:
            raise UsageError(
                f"--output {name}: this run is complete, there is nothing to resume; its result.json says how it ended"
            )
        if there and not goes_on:
            raise UsageError(
                f"--output {name}: it already holds {', '.join(there)} of an earlier run; name another folder"
                + (", or go on with --resume auto" if "checkpoints" in there and "result.json" not in there else "")
            )
        if there and "metrics.jsonl" not in there and "checkpoints" not in there:  # what a run writes before the others
            what = "a model" if "model" in there else there[0]
            raise UsageError(f"--output {name}: it holds {what}, and no run that made it; name another folder")
        existing = _existing(name, output)
        tempfile.TemporaryFile(dir=existing).close()  # without a name; the folder itself is made later
    except OSError as error:
        raise UsageError(f"--output {name}: it cannot be written ({error.strerror}); name another folder") from error
    for child in there:
        try:
            _claim_child(name, output / child)
        except OSError as error:
            why = f"its {child} cannot be read and written ({error.strerror})"
            raise UsageError(f"--output {name}: {why}; name another folder") from error


def _claim_child(name: str, child: Path) -> None:
    """Make sure of one of the things that an earlier start of this run has left."""
    if child.name == "metrics.jsonl":
        if not stat.S_ISREG(child.stat().st_mode):  # opening a FIFO would wait for a reader
            raise UsageError(f"--output {name}: its metrics.jsonl is not a plain file; name another folder")
        with child.open("a") as file:
            if not locked(file):
                raise UsageError(occupied(name))
    elif child.name == answers.FILE:  # also what people call a data set's file
        begins = child.read_bytes()[:99] if stat.S_ISREG(child.stat().st_mode) else b""
        if not begins.startswith(answers.BEGINNING):
            raise UsageError(f"--output {name}: its {child.name} is not of a run's making; name another folder")
    else:
        os.listdir(child)
        tempfile.TemporaryFile(dir=child).close()  # without a name


def _exists(path: Path) -> bool:
    return os.path.lexists(path)  # a link to nothing is something too


def _existing(name: str, output: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    for folder in (output, *output.absolute().parents):
        if folder.exists():
            return folder
        if folder.is_symlink():
            raise UsageError(f"--output {name}: {shown(str(folder))} is a link to nothing; name another folder")
    return output
