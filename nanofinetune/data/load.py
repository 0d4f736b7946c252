"""From a name to splits: `glue/TASK`, a name on the Hub, a local file or folder, or `stdlib-pairs`.

>>> data = load_data("stdlib-pairs")
>>> {name: len(split) for name, split in data.splits.items()}
{'train': 3668, 'validation': 408}
>>> data.text_columns, data.label_names
(('sentence1', 'sentence2'), ['other', 'same'])

Underneath: `datasets.load_dataset` (datasets 5.2) still gets and caches what is on the Hub
  - we add what the course does by hand: choose splits, columns and label names;
  - a local file is read by files.py, and nothing of it is cached here;
  - a single file is split: a tenth is held out for validation, by `datasets.Dataset.train_test_split`;
  - what gives the answer away is said (leaks.py);
  - the default data set, where the Hub is out of reach, becomes stdlib-pairs, and a note says so; data that the user
    named are never replaced.

Proof: test_a_single_file_holds_a_tenth_out_by_the_seed, test_a_hub_name_is_read_as_the_task_that_it_ends_in in
tests/data/test_load.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanofinetune.data import columns as rules
from nanofinetune.data.columns import check_texts, find_columns, keep, kinds_of, read_labels
from nanofinetune.data.files import Dialect, dialect, failing_in_one_line, format_of, read, stem_of
from nanofinetune.data.leaks import leaks
from nanofinetune.data.multilabel import METRICS
from nanofinetune.data.pretrained import hub_in_reach, looks_like_path
from nanofinetune.data.tasks import GLUE, Task, default_metrics
from nanofinetune.ground.errors import UsageError, first_line
from nanofinetune.ground.names import check_hub_name, oddity, place_of

DEFAULT_DATA = "glue/mrpc"
LABELS = "labels"  # the column that several are put into
FIRST_ROWS, FIRST_CHARACTERS = 10_000, 2_000  # of the first validation split, and of each of its texts: `Data.texts`
MOST_GATHERED = 2**31  # bytes of a table: pyarrow counts the characters of a column in 31 bits
HELD_OUT = 0.1  # the share of a single file's rows that become its validation split

# How people spell a split's name.
_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "validation_matched": ("validation_matched", "dev_matched"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
    "test": ("test", "testing", "tst"),
}

Split = tuple[Any, dict[str, str]]  # a datasets.Dataset, and the kind of every column that the file or data set has


@dataclass(frozen=True)
class Data:
    """A data set that is ready to be tokenized."""

    name: str
    splits: Mapping[str, Any]  # "train", then validation splits: each a datasets.Dataset, or a range if from the cache
    text_columns: tuple[str, ...]  # one or two
    label_column: str  # of several columns with a class each: LABELS
    label_names: list[str] | None  # None: the label is a number to regress on
    metrics: tuple[str, ...]
    note: str = ""  # one line to show before training: a fallback, a held-out split, how labels were read
    multi: bool = False  # a row may have any number of the classes: labels are (rows, classes) of 0.0 and 1.0
    texts: Sequence[Sequence[str]] = ()  # beginnings of the first validation split's first rows, to show them again


def load_data(
    name: str | None,
    text_columns: Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    seed: int = 42,
    *,
    task: str = "auto",
    drop_unlabelled: bool = False,
    separator: str | None = None,
    encoding: str | None = None,
) -> Data:
    """Load `glue/TASK`, `stdlib-pairs`, a local file or folder, or a Hub name; None: the default or its fallback.

    Args:
        name: see above. A name that the user gave is never replaced by another.
        text_columns: one or two columns of text; found where not given.
        label_column: found where not given; several are a class each, of 0 and 1.
        seed: chooses the held-out rows of a single file.
        task: what labels are, whatever they look like: single, multi, regression; auto looks at them.
        drop_unlabelled: leave rows without a label out, which are refused otherwise.
        separator: of the columns of a csv or tsv file; encoding: of a text file. Found out where not given.

    Raises:
        UsageError: nothing there, not readable, no validation split, columns or labels that cannot be used.
    """
    label_columns = [label_column] if isinstance(label_column, str) else label_column
    name, loaded, fallback = _load(name, dialect(separator, encoding))
    known = _task_of(name)
    train, kinds = loaded["train"]
    if known is not None and not {*known.text_columns, known.label_column} <= set(train.column_names):
        known = None  # the user's own folder, which happens to have a task's name
    if known is not None and (text_columns or label_columns):
        known = None
    texts, columns = find_columns(train, kinds, known, text_columns, label_columns)
    splits = {key: keep(rows, kinds, (*texts, *columns), key) for key, (rows, kinds) in loaded.items()}
    splits, left_out = rules.drop_unlabelled(splits, columns) if drop_unlabelled else (splits, "")
    labels = read_labels(splits, columns, known, task)
    multi = labels.values["train"].ndim == 2
    label = columns[0] if len(columns) == 1 else LABELS
    for key, rows in splits.items():
        check_texts(rows, texts, key)
        splits[key] = _with_labels(rows, texts, label, labels.values[key])
    held_out = ""
    if len(splits) == 1:  # not before now: an error above names a row of the file
        splits, held_out = _hold_out(splits["train"], name, seed)
    if known is not None and (known.label_names is None) != (labels.names is None):
        known = None  # classes under the name of a regression task, or the reverse
    metrics = known.metrics if known is not None else METRICS if multi else default_metrics(labels.names)
    answers = leaks(splits, texts, label_values(splits["train"], label), labels.names)
    notes = [fallback, left_out, labels.note, held_out, *answers]
    note = "; ".join(filter(None, notes))
    return Data(name, splits, texts, label, labels.names, metrics, note, multi, _beginnings(splits, texts))


def _beginnings(splits: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """The texts of the first rows of the first validation split, cut."""
    rows = next((rows for key, rows in splits.items() if key != "train"), None)
    if rows is None:
        return []
    found, most = list[list[str]](), min(len(rows), FIRST_ROWS)
    for begin in range(0, most, 100):  # a few at a time: a text may be long
        block = rows[begin : min(begin + 100, most)]
        pairs = zip(*(block[column] for column in columns), strict=True)
        found += [[text[:FIRST_CHARACTERS] for text in texts] for texts in pairs]
    return found


def label_values(rows: Any, column: str) -> np.ndarray:
    """The labels of a split: (rows,) int64 or float32, or (rows, classes) float32."""
    import pyarrow as pa

    cells = rows.select_columns([column]).with_format("arrow")[:][column]
    if not pa.types.is_fixed_size_list(cells.type):
        values: np.ndarray = cells.to_numpy()
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
    flat = np.concatenate([np.empty(0, np.float32), *(chunk.flatten().to_numpy() for chunk in cells.chunks)])
    return flat.astype(np.float32).reshape(-1, cells.type.list_size)


def _task_of(name: str) -> Task | None:
    """The task whose name is the last part of a path or of a Hub name: ".../glue/cola" is scored as CoLA."""
    return GLUE.get(name.rstrip("/").rsplit("/", 1)[-1]) if "/" in name or Path(name).is_dir() else None


def _load(name: str | None, how: Dialect) -> tuple[str, dict[str, Split], str]:
    """-> (the name that is really used, its splits, a note on a fallback)."""
    note = ""
    if name is None or not _is_local(name):
        for flag, value in (("--separator", how.separator), ("--encoding", how.encoding)):
            if value is not None:
                raise UsageError(f"{flag} {value}: only for a csv or tsv file or a folder of them; leave it out")
    if name is None:
        try:
            return DEFAULT_DATA, _load_glue(DEFAULT_DATA.removeprefix("glue/")), ""
        except UsageError:
            if hub_in_reach():
                raise
            note = f"the Hub is out of reach and {DEFAULT_DATA} is not cached: using stdlib-pairs instead"
            name = "stdlib-pairs"
    if name == "stdlib-pairs":
        return name, _load_stdlib_pairs(), note
    place = place_of("--data", name)
    if name.startswith("glue/") and not place.exists():
        return name, _load_glue(name.removeprefix("glue/")), ""
    if _is_local(name):
        return name, _load_path(place, how), ""
    check_hub_name("--data", name)
    return name, _load_hub(name), ""


def _with_labels(rows: Any, texts: Sequence[str], column: str, values: np.ndarray) -> Any:
    """The texts with these labels; the very same rows where they have them already."""
    import datasets
    import pyarrow as pa

    if values.ndim == 1:
        old = rows.select_columns([column]).with_format("numpy")[:][column]
        if old.dtype.kind == values.dtype.kind and (values.dtype.kind == "f" or np.array_equal(old, values)):
            return rows
        cells = pa.array(values)
    else:
        cells = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    table = rows.select_columns(list(texts)).with_format("arrow")[:].replace_schema_metadata(None)
    table = table.append_column(column, cells)
    made_of = f"{rows._fingerprint} {column} {values.dtype}".encode() + values.tobytes()
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=hashlib.sha256(made_of).hexdigest()[:16])


# --- each kind of name ------------------------------------------------------------------------------------------------


def _is_local(name: str) -> bool:
    place = place_of("--data", name)
    return place.exists() or looks_like_path(name) or format_of(place) is not None


def _load_glue(task: str) -> dict[str, Split]:
    if task not in GLUE:
        raise UsageError(f"--data glue/{task}: there is no such task; the GLUE tasks are {', '.join(sorted(GLUE))}")
    return _load_hub("nyu-mll/glue", task)


def _load_hub(name: str, config: str | None = None) -> dict[str, Split]:
    """A data set of the Hub's -> its training and validation splits: those of its task, else `validation`."""
    import datasets

    shown = f"glue/{config}" if name == "nyu-mll/glue" else name
    reachable = hub_in_reach()
    datasets.config.HF_HUB_OFFLINE = not reachable  # underneath: read once at import, like huggingface_hub's own
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:
        if not reachable:
            message = "the Hub is out of reach and the data set is not in the cache; name a local file or folder"
            raise UsageError(f"--data {shown}: {message}") from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # what went wrong under the library's wrappers
        remedy = ""
        if isinstance(cause, OSError) and cause.filename and cause.errno in (errno.EACCES, errno.EROFS, errno.ENOENT):
            remedy = "; if the cache cannot be written, set HF_HOME to a folder that can"
        raise UsageError(f"--data {shown}: it could not be loaded ({first_line(cause)}){remedy}") from error
    task = GLUE[config] if config is not None else _task_of(name)
    asked = task.validation if task is not None else ()
    validation = [split for split in asked if split in loaded] or [s for s in ("validation",) if s in loaded]
    if "train" not in loaded or not validation:
        have = ", ".join(loaded)
        raise UsageError(
            f"--data {shown}: it needs a train and a validation split, and has {have}; export them to files"
        )
    return {key: (loaded[key], kinds_of(loaded[key])) for key in ("train", *validation)}


def _load_stdlib_pairs() -> dict[str, Split]:
    import datasets

    from nanofinetune.data import stdlib_pairs

    datasets.disable_progress_bars()
    label = datasets.ClassLabel(names=list(stdlib_pairs.LABEL_NAMES))
    made = {key: datasets.Dataset.from_list(rows) for key, rows in stdlib_pairs.load().items()}
    named = {key: rows.cast_column("label", label) for key, rows in made.items()}
    return {key: (rows, kinds_of(rows)) for key, rows in named.items()}


def _load_path(path: Path, how: Dialect) -> dict[str, Split]:
    """A local file -> one split, `train`; a folder with train.* and validation.* -> its splits."""
    if path.is_file():
        if format_of(path) is None:
            kinds = "a .csv, .tsv, .jsonl, .json, .parquet or .xlsx file, or one of these in .gz, .bz2, .xz or .zip"
            raise UsageError(f"--data {path}: it is not {kinds}; rename or convert it")
        return {"train": _read([path], how)}
    if not path.exists():
        raise UsageError(f"--data {path}: there is no such file or folder")
    if odd := oddity(path):
        raise UsageError(f"--data {path}: it is {odd}, and data are read more than once; write them into a file")
    files = sorted(file for file in path.iterdir() if format_of(file) is not None)
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file), []).append(file)
    train = found.get("train")
    if not train:
        shown = ", ".join(file.name for file in sorted(path.iterdir())[:6]) or "nothing"
        raise UsageError(
            f"--data {path}: the folder needs train.csv, .tsv, .jsonl, .json, .parquet or .xlsx; it holds {shown}"
        )
    names = [name for name in ("validation", "validation_matched") if name in found]
    if not names:
        test = f" ({found['test'][0].name} is for the end, and not read)" if "test" in found else ""
        ending = train[0].name.removeprefix(stem_of(train[0]))
        raise UsageError(
            f"--data {path}: no validation split{test}; put validation{ending} beside {train[0].name}, "
            f"or name {train[0].name} itself to hold a tenth of it out"
        )
    if len(names) > 1:
        shown = " and ".join(file.name for name in names for file in found[name])
        raise UsageError(f"--data {path}: {shown} are two validation splits; leave one of them in the folder")
    splits = {name: found[name] for name in ("train", *names, "validation_mismatched") if name in found}
    for parts in splits.values():
        _check_parts(path, parts)
    return {key: _read(parts, how) for key, parts in splits.items()}


def _hold_out(whole: Any, name: str, seed: int) -> tuple[dict[str, Any], str]:
    """The rows of a single file -> (nine tenths to train on and one to validate with, the line that says so)."""
    if len(whole) < 10:
        raise UsageError(f"--data {name}: {len(whole)} rows are too few to hold a tenth out; add some or name a folder")
    parts = whole.train_test_split(test_size=HELD_OUT, seed=seed)
    held_out = f"{len(parts['test']):,} of its {len(whole):,} rows are held out for validation"
    splits = {"train": _gathered(parts["train"]), "validation": _gathered(parts["test"])}
    return splits, f"{Path(name).name} is one file: {held_out}"


def _gathered(rows: Any) -> Any:
    """A selection of rows as a table of its own."""
    import datasets

    # underneath: datasets keeps a list of row numbers, and each later look at the rows cuts them out one by one
    table = rows.data.table
    if rows._indices is None or table.nbytes >= MOST_GATHERED:
        return rows
    table = table.combine_chunks().take(rows._indices.column(0).combine_chunks())
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=rows._fingerprint)


def _split_of(file: Path) -> str:
    """train.csv, train-00000-of-00001.parquet, reviews_train.csv.gz -> train; "" for a name that says none, or two."""
    name = re.sub(r"-\d+-of-\d+$", "", stem_of(file).lower())
    words = [word for word in re.split(r"[-_. ]+", name) if word]
    for split, spelt in _SPELLINGS.items():
        if "_".join(words) in spelt:
            return split
    ends = {split for split, spelt in _SPELLINGS.items() for word in words[:1] + words[-1:] if word in spelt}
    return ends.pop() if len(ends) == 1 else ""


def _check_parts(folder: Path, files: list[Path]) -> None:
    """Several files are one split only if their names say so: ...-00000-of-00002 and ...-00001-of-00002."""
    parts = [re.search(r"-(\d+)-of-(\d+)$", stem_of(file)) for file in files]
    numbers = [(int(part[1]), int(part[2])) for part in parts if part is not None]
    if len(files) > 1 and (len(numbers) < len(files) or len({file.suffix for file in files}) > 1):
        shown = " and ".join(file.name for file in files)
        raise UsageError(f"--data {folder}: {shown} are one split twice; leave one of them in the folder")
    if numbers and numbers != [(i, len(files)) for i in range(len(files))]:
        shown = ", ".join(file.name for file in files)
        raise UsageError(f"--data {folder}: {shown} are not all parts of the split; put the others beside them")


def _read(files: list[Path], how: Dialect) -> Split:
    """The files of one split, by files.py -> (datasets.Dataset, kinds of the columns)."""
    import datasets

    datasets.disable_progress_bars()
    for file in files:
        if not file.is_file():
            raise UsageError(f"--data {file}: it is {oddity(file) or 'a folder'}; put a plain file there")
    table, kinds = read(files, how)
    with failing_in_one_line(files[0]):  # it reads what a parquet file says of its columns
        # underneath: without a fingerprint of its own, datasets would hash the whole table to make one
        rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=os.urandom(8).hex())
    return rows, kinds | {name: kind for name, kind in kinds_of(rows).items() if kind == "classes"}
