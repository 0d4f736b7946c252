"""From a name to splits: `glue/TASK`, a name on the Hub, a local file or folder, or `stdlib-pairs`.

>>> data = load_data("stdlib-pairs")
>>> {name: len(split) for name, split in data.splits.items()}
{'train': 3668, 'validation': 408}
>>> data.text_columns, data.label_names
(('sentence1', 'sentence2'), ['other', 'same'])

Underneath: `datasets.load_dataset` (datasets 5.2) still reads and caches
  - we add what the course does by hand: choose splits, columns and label names;
  - csv: its reader takes "None" and "NA" for missing; here they stay text;
  - tsv: its quoting swallows rows after a lone quotation mark, which GLUE's files have; here no tsv is quoted;
  - a single file is split: a tenth is held out for validation;
  - every failure is one line that names the file.

Proof: test_every_kind_of_file_gives_the_same_rows_as_datasets, test_glue_tsv_keeps_rows_that_pandas_quoting_loses in
tests/data/test_load.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanofinetune.data.columns import check_labels, check_texts, find_columns, keep
from nanofinetune.data.pretrained import hub_in_reach, looks_like_path
from nanofinetune.data.tasks import GLUE, Task, default_metrics
from nanofinetune.ground.errors import UsageError, first_line

DEFAULT_DATA = "glue/mrpc"


HELD_OUT = 0.1  # the share of a single file's rows that become its validation split


_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


_VALIDATION_NAMES = ("validation", "dev", "valid", "val", "validation_matched", "dev_matched")


_EXTRA_NAMES = ("validation_mismatched", "dev_mismatched")


@dataclass(frozen=True)
class Data:
    """A data set that is ready to be tokenized."""

    name: str
    splits: Mapping[str, Any]  # "train", then one or more validation splits, each a datasets.Dataset; cached: a range
    text_columns: tuple[str, ...]  # one or two
    label_column: str
    label_names: list[str] | None  # None: the label is a number to regress on
    metrics: tuple[str, ...]
    note: str = ""  # one line to show before training: a fallback, a held-out split


def load_data(
    name: str | None, text_columns: Sequence[str] | None = None, label_column: str | None = None, seed: int = 42
) -> Data:
    """Load `glue/TASK`, `stdlib-pairs`, a local file or folder, or a Hub name; None: the default or its fallback.

    Args:
        name: see above. A name that the user gave is never replaced by another.
        text_columns: one or two columns of text; found where not given.
        label_column: found where not given.
        seed: chooses the held-out rows of a single file.

    Raises:
        UsageError: nothing there, not readable, no validation split, columns or labels that cannot be used.
    """
    note = ""
    if name is None:
        name = DEFAULT_DATA
        try:
            splits = _load_glue("mrpc")
        except UsageError:
            if hub_in_reach():
                raise
            note = f"the Hub is out of reach and {name} is not cached: using stdlib-pairs instead"
            name = "stdlib-pairs"
    elif name.startswith("glue/") and not Path(name).exists():
        splits = _load_glue(name.removeprefix("glue/"))
    if name == "stdlib-pairs":
        splits = _load_stdlib_pairs()
    elif not name.startswith("glue/") or Path(name).exists():
        splits = _load_path(Path(name).expanduser()) if _is_path(name) else _load_hub(name)

    task = _task_of(name)
    columns = splits["train"].column_names
    if task is not None and not {*task.text_columns, task.label_column} <= set(columns):
        task = None  # a folder of the user's that only shares a task's name
    if task is not None and (text_columns or label_column):
        task = None
    texts, label = find_columns(splits["train"], task, text_columns, label_column)
    splits = {key: keep(split, (*texts, label), key) for key, split in splits.items()}
    names = check_labels(splits, label, task)
    for key, split in splits.items():
        check_texts(split, texts, key)
    if len(splits) == 1:  # not before now: an error above names a row of the file
        splits, note = _hold_out(splits["train"], name, seed)
    if task is not None and (task.label_names is None) != (names is None):
        task = None  # classes under a regression task's name, or the other way round
    metrics = task.metrics if task is not None else default_metrics(names)
    return Data(name, splits, texts, label, names, metrics, note)


def _task_of(name: str) -> Task | None:
    """The task whose name is the last part of a path or of a Hub name: ".../glue/cola" is scored as CoLA."""
    return GLUE.get(name.rstrip("/").rsplit("/", 1)[-1]) if "/" in name else None


def _is_path(name: str) -> bool:
    return Path(name).expanduser().exists() or looks_like_path(name) or Path(name).suffix in _READERS


def _load_glue(task: str) -> dict[str, Any]:
    if task not in GLUE:
        raise UsageError(f"--data glue/{task}: there is no such task; the GLUE tasks are {', '.join(sorted(GLUE))}")
    return _load_hub("nyu-mll/glue", task)


def _load_hub(name: str, config: str | None = None) -> dict[str, Any]:
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
        raise UsageError(f"--data {shown}: it could not be loaded ({_root_cause(error)})") from error
    task = GLUE[config] if config is not None else _task_of(name)
    asked = task.validation if task is not None else ()
    validation = [split for split in asked if split in loaded] or [s for s in ("validation",) if s in loaded]
    if "train" not in loaded or not validation:
        have = ", ".join(loaded)
        raise UsageError(
            f"--data {shown}: it needs a train and a validation split, and has {have}; export them to files"
        )
    return {split: loaded[split] for split in ("train", *validation)}


def _load_stdlib_pairs() -> dict[str, Any]:
    import datasets

    from nanofinetune.data import stdlib_pairs

    datasets.disable_progress_bars()
    label = datasets.ClassLabel(names=list(stdlib_pairs.LABEL_NAMES))
    return {
        key: datasets.Dataset.from_list(rows).cast_column("label", label) for key, rows in stdlib_pairs.load().items()
    }


def _load_path(path: Path) -> dict[str, Any]:
    """A local file -> one split, `train`; a folder with train.* and validation.* -> its splits."""
    if path.is_file():
        if path.suffix not in _READERS:
            kinds = "a .csv, .tsv, .jsonl, .json or .parquet file"
            raise UsageError(f"--data {path}: it is not {kinds}; rename or convert it")
        return {"train": _read([path], "train")}
    if not path.exists():
        raise UsageError(f"--data {path}: there is no such file or folder")
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    train = [file for file in files if _split_of(file) == "train"]
    if not train:
        shown = ", ".join(file.name for file in sorted(path.iterdir())[:6]) or "nothing"
        raise UsageError(
            f"--data {path}: the folder needs train.csv, .tsv, .jsonl, .json or .parquet; it holds {shown}"
        )
    validation = [file for file in files if _split_of(file) in _VALIDATION_NAMES]
    if not validation:
        raise UsageError(
            f"--data {path}: no validation split; put validation{train[0].suffix} beside {train[0].name}, "
            f"or name {train[0].name} itself to hold a tenth of it out"
        )
    if len({_split_of(file) for file in validation}) > 1:
        shown = " and ".join(file.name for file in validation)
        raise UsageError(f"--data {path}: {shown} are two validation splits; leave one of them in the folder")
    splits = {"train": _read(train, "train"), _split_of(validation[0]): _read(validation, "validation")}
    splits = {key.replace("dev", "validation"): split for key, split in splits.items()}
    extra = [file for file in files if _split_of(file) in _EXTRA_NAMES]
    if extra:
        splits["validation_mismatched"] = _read(extra, "validation_mismatched")
    return splits


def _hold_out(whole: Any, name: str, seed: int) -> tuple[dict[str, Any], str]:
    """The rows of a single file -> (nine tenths to train on and one to validate with, the line that says so)."""
    if len(whole) < 10:
        raise UsageError(f"--data {name}: {len(whole)} rows are too few to hold a tenth out; add some or name a folder")
    parts = whole.train_test_split(test_size=HELD_OUT, seed=seed)
    held_out = f"{len(parts['test']):,} of its {len(whole):,} rows are held out for validation"
    return {"train": parts["train"], "validation": parts["test"]}, f"{Path(name).name} is one file: {held_out}"


def _split_of(file: Path) -> str:
    """train.csv, train-00000-of-00001.parquet -> train."""
    return file.stem.split("-")[0].split(".")[0]


def _read(files: list[Path], split: str) -> Any:
    """Read files of one kind with `datasets` -> datasets.Dataset. Raises UsageError naming the first bad file."""
    import datasets

    if len({file.suffix for file in files}) > 1:
        shown = " and ".join(file.name for file in files)
        raise UsageError(f"--data {files[0].parent}: {shown} are one split twice; leave one kind of file in the folder")
    for file in files:
        if file.stat().st_size == 0:
            raise UsageError(f"--data {file}: the file is empty; write a header and rows into it")
    options: dict[str, Any] = {}
    if files[0].suffix in (".csv", ".tsv"):
        # underneath: pandas reads "NA", "null" and "None" as missing values, which loses the sentence "None".
        options = {"keep_default_na": False, "encoding": "utf-8"}
    if files[0].suffix == ".tsv":
        # underneath: GLUE's own TSV files hold lone quotation marks; with the default quoting the rows up to the next
        # one are swallowed without a word.
        options |= {"sep": "\t", "quoting": 3}  # 3 is csv.QUOTE_NONE
    datasets.disable_progress_bars()
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its reader logs the failing file at ERROR, then raises
    try:
        loaded = datasets.load_dataset(
            _READERS[files[0].suffix], data_files={split: [str(file) for file in files]}, split=split, **options
        )
    except Exception as error:
        cause = _root_cause(error)
        # underneath: this is what the readers say of a text file, and of a parquet file, without rows.
        if "corresponds to no data" in cause or "BatchSize must be greater than 0" in cause:
            raise UsageError(f"--data {files[0]}: the file has a header and no rows; add rows") from error
        raise UsageError(f"--data {files[0]}: it could not be read ({cause}); mend the file") from error
    finally:
        datasets.logging.set_verbosity(level)
    return loaded


def _root_cause(error: BaseException) -> str:
    """What really went wrong under the library's wrappers, in one line with the remedy where it is known."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} is not UTF-8: convert the file, for example with iconv"
    text = first_line(error)
    return f"{text}: unbalanced quotes?" if "EOF inside string" in text else text
