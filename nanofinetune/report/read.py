"""What a run has left in its folder, read with little trust: each file may be missing, damaged or somebody else's.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> line = '{"step": 1, "epoch": 1, "lr": 0.1, "loss": 0.7, "rows": 8}'
>>> _ = (folder / "metrics.jsonl").write_text(line + chr(10) + "hello")
>>> run = read_run(folder)
>>> run.updates, run.log.mean[:, LOSS].tolist(), run.remarks[0]
(1, [0.7], 'metrics.jsonl: 1 line(s) are not of a log and are left out')

Underneath: `transformers.Trainer` (transformers 5.23) keeps its whole `log_history` in trainer_state.json, which one
`json.load` reads.
  - Here lines are read one by one, each up to a limit, and forgotten once they are counted.
  - What cannot be read is said on the page, and the rest of the run is shown.

Proof: test_any_files_give_a_page_or_one_line, test_a_running_run_has_a_page_too in tests/report/test_read.py and
tests/report/test_page.py.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.report.judge import Judged
from nanofinetune.report.thin import Buckets, Table, Thinned

FILES = ("metrics.jsonl", "result.json", "validation.jsonl")
STEP, LR, LOSS, ROWS, TOOK, SPEED = range(6)  # columns of a log; TOOK, SPEED: seconds, and rows a second
UNTIMED = itemgetter("step", "epoch", "lr", "loss", "rows")  # of a line
NUMBERS = itemgetter("step", "epoch", "lr", "loss", "rows", "seconds")
LARGEST = 2**25  # bytes of result.json; a hundred epochs of a hundred classes have 15 million
LONGEST = 2**18  # bytes of a line; 4,000 characters have 48 thousand at most
MOST_ROWS = 10_000  # of validation.jsonl
MOST_BYTES = 2**29  # of validation.jsonl
BLOCK = 2**19  # bytes that are in memory at a time
HIGHEST = 1e30  # of any number; a drawing's axis knows no greater ones


@dataclass
class Record:
    """What is known of one run."""

    name: str
    result: dict[str, Any] = field(default_factory=dict)  # result.json
    log: Buckets = field(default_factory=lambda: Thinned(6).buckets())  # metrics.jsonl, thinned
    updates: int = 0  # lines of it
    left_out: int = 0  # updates whose loss was not finite
    epochs: list[int] = field(default_factory=list)  # the first update of each; the first hundred
    judged: Judged = field(default_factory=lambda: Judged([]))  # validation.jsonl
    remarks: list[str] = field(default_factory=list)  # what could not be read

    @property
    def times(self) -> Table:
        """(update, seconds of training until it), (n, 2), of a result.json that has them; (0, 2) of any other."""
        found = self.result.get("speed")
        try:
            table = np.array(found[:MOST_ROWS] if isinstance(found, list) else [], dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            table = np.empty(0)
        if table.ndim == 2 and table.shape[1] == 2 and (np.diff(table, axis=0, prepend=0.0) > 0).all():
            return table[(table <= HIGHEST).all(axis=1)]
        return np.empty((0, 2))

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The scores of each epoch."""
        found = self.result.get("evaluations")
        return [scores for scores in found if isinstance(scores, dict)] if isinstance(found, list) else []


def read_run(folder: Path, name: str = "") -> Record:
    """All that a page shows of a run. Raises UsageError where there is no file of a run."""
    if not folder.is_dir() or not any(_there(folder / file) for file in FILES):
        what = f"holds no {', '.join(FILES[:2])} or {FILES[2]}" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"{folder}: {what}; name a folder that `train.py --output` made")
    run = Record(name or folder.resolve().name or str(folder))
    for file, read in zip(FILES, (_read_log, _read_result, _read_rows), strict=True):
        try:
            read(folder / file, run)
        except FileNotFoundError:
            run.remarks.append(f"{file} is not there" + (": the run has not ended" if file == "result.json" else ""))
        except OSError as error:
            run.remarks.append(f"{file} cannot be read ({error.strerror})")
        except ValueError as error:
            run.remarks.append(f"{file}: {error}")
    return run


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def _read_log(path: Path, run: Record) -> None:
    strange, gap, thinned = 0, 0.0, Thinned(6)
    last, epoch, rows, since = -1.0, 0.0, 0.0, 0.0  # of the lines so far: step, epoch; and see `_speeds`
    with _opened(path) as file:
        for chunk in _blocks(file):
            table, missing = _numbers(chunk)  # (n, 6): step, epoch, lr, loss, rows, seconds
            strange += missing
            steps = table[:, 0]  # those that do not go up are no log's
            rising = steps > np.maximum.accumulate(np.concatenate([[last], steps[:-1]]))
            strange += int((~rising).sum())
            table = table[rising]
            if not len(table):
                continue
            if last >= 0:  # a run that went on in another folder begins its log there
                gap += float(table[0, 0]) - last - 1
            gap += float(table[-1, 0] - table[0, 0]) - len(table) + 1
            last = float(table[-1, 0])
            step, epochs, lr, loss, done, seconds = table.T
            for k in np.flatnonzero(np.diff(epochs, prepend=epoch) > 0)[: 100 - len(run.epochs)]:
                run.epochs.append(int(step[k]))
            epoch = max(epoch, float(epochs.max()))
            run.updates += len(table)
            run.left_out += int(np.isnan(loss).sum())
            took, speed, rows, since = _speeds(done, seconds, rows, since)
            thinned.add(np.stack([step, lr, loss, done, took, speed], axis=1))
    run.log = thinned.buckets()
    if strange:
        run.remarks.append(f"metrics.jsonl: {strange:,} line(s) are not of a log and are left out")
    if gap >= 1:
        run.remarks.append(f"metrics.jsonl: {gap:,.0f} update(s) between its lines are missing")


def _speeds(done: Table, seconds: Table, rows: float, since: float) -> tuple[Table, Table, float, float]:
    """Seconds since the line before, and rows a second, where the clock has moved on; NaN elsewhere.

    Several lines may have one time: it is that of all their rows. `rows`, `since`: not counted yet, from earlier lines.
    """
    took, speed = np.full(len(done), np.nan), np.full(len(done), np.nan)
    moved = np.flatnonzero(seconds > np.fmax.accumulate(np.concatenate([[since], seconds[:-1]])))
    total = rows + np.cumsum(done)
    took[moved] = np.diff(seconds[moved], prepend=since)
    speed[moved] = np.diff(total[moved], prepend=0.0) / took[moved]
    if len(moved):
        rows, since = float(total[-1] - total[moved[-1]]), float(seconds[moved[-1]])
    else:
        rows = float(total[-1])
    return took, np.where(speed <= HIGHEST, speed, np.nan), rows, since


def _numbers(lines: Sequence[bytes]) -> tuple[Table, int]:
    """Lines -> (table (n, 6) of those that are a log's, how many are not)."""
    try:  # all at once, which is what a log of ours allows
        text = b"[" + b",".join(lines) + b"]"
        items = json.loads(text)
        if not len(items) == len(lines) == text.count(b"{"):
            raise ValueError
    except (ValueError, RecursionError):
        items = [_parsed(line) for line in lines]
    try:  # all at once, and most of the time it is so
        rows = list(map(NUMBERS if any("seconds" in item for item in items) else UNTIMED, items))
        table = np.array(rows, dtype=np.float64)
        if set(map(type, chain.from_iterable(rows))) <= {int, float} and ((table >= 0) & (table <= HIGHEST)).all():
            untimed = np.full((len(table), 6 - table.shape[1]), np.nan)
            return np.concatenate([table, untimed], axis=1), 0
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        pass
    found = [row for row in map(_row, items) if row is not None]
    return np.array(found, dtype=np.float64).reshape(-1, 6), len(items) - len(found)


def _row(item: Any) -> tuple[float, ...] | None:
    """The numbers of a line of ours, None of anything else."""
    try:
        loss, seconds = item["loss"], item.get("seconds", math.nan)
        row = (item["step"], item["epoch"], item["lr"], math.nan if loss is None else loss, item["rows"], seconds)
    except (TypeError, KeyError, AttributeError):
        return None
    for value in row[:3] + row[4:5]:
        if type(value) not in (int, float) or not 0 <= value <= HIGHEST:
            return None
    if type(row[3]) not in (int, float) or abs(row[3]) > HIGHEST or (loss is not None and row[3] != row[3]):
        return None
    return row if type(seconds) in (int, float) and not (seconds < 0 or seconds > HIGHEST) else None


# ---- result.json and validation.jsonl --------------------------------------------------------------------------------


def _read_result(path: Path, run: Record) -> None:
    with _opened(path) as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST // 2**20} MiB, and is not read")
    result = _parsed(text)
    if not isinstance(result, dict):
        raise ValueError("it is damaged, or no run's")
    run.result = result


def _read_rows(path: Path, run: Record) -> None:
    judged, strange, read = Judged(_classes(run, path.parent)), 0, 0
    with _opened(path) as file:
        for number, line in enumerate(chain.from_iterable(_blocks(file))):
            read += len(line)
            if number >= MOST_ROWS or read > MOST_BYTES:
                run.remarks.append(f"validation.jsonl: it goes on after {number:,} rows, which are what is shown")
                break
            row = _parsed(line)
            strange += not (isinstance(row, dict) and judged.add(row))
    run.judged = judged
    if strange:
        run.remarks.append(f"validation.jsonl: {strange:,} line(s) do not fit the others and are left out")


def _classes(run: Record, folder: Path) -> list[str]:
    """The classes' names in the model's order: as result.json has them, else as the saved model's config does."""
    with suppress(TypeError, KeyError):
        names = [one["label"] if isinstance(one, dict) else one for one in run.result["classes"]]
        return names if all(type(name) is str for name in names) else []
    with suppress(OSError, ValueError, TypeError, KeyError), _opened(folder / "model" / "config.json") as file:
        names = json.loads(file.read(2**22))["id2label"]
        return [str(names[str(k)]) for k in range(len(names))]
    return []


# ---- any file --------------------------------------------------------------------------------------------------------


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _opened(path: Path) -> IO[bytes]:
    """A plain file. Raises ValueError for a pipe or a device, whose end may never come."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a plain file")
    return path.open("rb")


def _blocks(file: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines of a file, many at a time, without empty ones. Of one that is too long a `?` is left."""
    rest = b""
    while block := file.read(BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        rest = rest[: LONGEST + 1]
        yield [line if len(line) <= LONGEST else b"?" for line in lines if line and not line.isspace()]
    if rest and not rest.isspace():
        yield [rest if len(rest) <= LONGEST else b"?"]


def _parsed(text: bytes) -> Any:
    """The value of a JSON text, None where there is none; deep brackets and endless numbers are none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each run, each one another: the folder's own, or the path where two have the same."""
    own = [shown(folder.resolve().name or str(folder), most=60) for folder in folders]
    return [
        name if own.count(name) == 1 else shown(str(folder), most=60) for name, folder in zip(own, folders, strict=True)
    ]
