"""From a name to batches' raw material: load the splits, find the columns, tokenize, keep the tokens flat.

>>> import numpy as np
>>> flat, offsets = np.array([101, 7, 102, 101, 102], np.int32), np.array([0, 3, 5])
>>> store = TokenStore({"input_ids": (flat, offsets)}, labels=np.array([1, 0]))
>>> len(store), store[1]["input_ids"].tolist(), store.lengths.tolist()
(2, [101, 102], [3, 2])
>>> rows = store.__getitems__([1, 0])  # what torch's DataLoader asks a data set for: a view, no copy
>>> len(rows), rows[0]["label"]
(2, 0)

Underneath: `datasets.load_dataset` and `datasets.Dataset.map` (datasets 5.2) still load and cache; this file replaces
what the course does by hand after them: `remove_columns`, `rename_column` and `set_format`. A torch-formatted
`datasets.Dataset` turns a row into one small tensor for each column, and the library's collator turns those into Python
lists and back. Here each model input is kept as one flat int32 array of all tokens and an array of offsets, and
`__getitems__` hands the collator a view of it. Columns come from the task table, from the user, or from the features,
where they leave one reading. Labels are checked before any long work: the library meets a gap, a text or a NaN in them
as an index error or a NaN loss. `datasets`' own cache saves the tokenizing, and not the import of itself, pandas and
pyarrow; `load_tokens` keeps the finished arrays of local data in a file of ours, for which none of these is needed.

Proof: test_cached_tokens_are_the_loaded_ones_without_datasets, test_a_cache_is_used_only_for_what_it_was_made_of,
test_token_store_matches_datasets_rows, test_glue_tsv_keeps_rows_that_pandas_quoting_loses,
test_columns_are_found_by_themselves and test_local_glue_matches_the_task_table in tests/test_data.py,
test_every_bad_input_gives_one_line_and_exit_2 in tests/test_bad_inputs.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from nanofinetune.collate import FlatRows
from nanofinetune.errors import UsageError, first_line
from nanofinetune.pretrained import hub_in_reach, looks_like_path
from nanofinetune.tasks import GLUE, Task, default_metrics

DEFAULT_DATA = "glue/mrpc"
HELD_OUT = 0.1  # the share of a single file's rows that become its validation split

_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_VALIDATION_NAMES = ("validation", "dev", "valid", "val", "validation_matched", "dev_matched")
_EXTRA_NAMES = ("validation_mismatched", "dev_mismatched")
_LABEL_NAMES = ("label", "labels", "target", "class", "score", "Quality")


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


class TokenStore(Dataset[dict[str, Any]]):
    """All tokens of a split: for each model input a flat int32 array and int64 offsets; beside them the labels.

    Args:
        ragged: model input name -> (flat (tokens,), offsets (rows + 1,)): row i is flat[offsets[i]:offsets[i + 1]].
        labels: (rows,) int64 class ids or float32 targets; None for text without labels.
    """

    def __init__(self, ragged: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: np.ndarray | None = None) -> None:
        self.ragged = dict(ragged)
        self.dense = {} if labels is None else {"label": labels}
        offsets = next(iter(self.ragged.values()))[1]
        self.lengths = np.diff(offsets)  # (rows,) tokens in each row

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """A hash of all tokens and labels: another one, where the data or the tokenizer has changed."""
        whole = hashlib.sha256()
        for name, (flat, offsets) in sorted(self.ragged.items()):
            whole.update(name.encode() + flat.tobytes() + offsets.tobytes())
        for name, column in sorted(self.dense.items()):
            whole.update(name.encode() + column.tobytes())
        return whole.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> FlatRows:
        # underneath: torch's DataLoader calls __getitems__ with a whole batch of indices where a data set has it.
        return FlatRows(self.ragged, self.dense, np.asarray(indices, dtype=np.int64))


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
    texts, label = _find_columns(splits["train"], task, text_columns, label_column)
    splits = {key: _keep(split, (*texts, label), key) for key, split in splits.items()}
    names = _check_labels(splits, label, task)
    for key, split in splits.items():
        _check_texts(split, texts, key)
    if len(splits) == 1:  # not before now: an error above names a row of the file
        splits, note = _hold_out(splits["train"], name, seed)
    if task is not None and (task.label_names is None) != (names is None):
        task = None  # classes under a regression task's name, or the other way round
    metrics = task.metrics if task is not None else default_metrics(names)
    return Data(name, splits, texts, label, names, metrics, note)


def _task_of(name: str) -> Task | None:
    """The task whose name is the last part of a path or of a Hub name: ".../glue/cola" is scored as CoLA."""
    return GLUE.get(name.rstrip("/").rsplit("/", 1)[-1]) if "/" in name else None


def tokenize(data: Data, tokenizer: Any, max_length: int) -> dict[str, TokenStore]:
    """Tokenize every split, cut to `max_length` tokens (the longer text of a pair first) -> split name -> TokenStore.

    `datasets` caches the result under a fingerprint of the data, the tokenizer and the arguments, where the data are on
    disk.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(*(rows[column] for column in data.text_columns), truncation=True, max_length=max_length))

    stores = {}
    for key, split in data.splits.items():
        drop = [column for column in split.column_names if column != data.label_column]
        stores[key] = _to_store(split.map(encode, batched=True, remove_columns=drop), data)
    return stores


def load_tokens(
    name: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    seed: int,
    tokenizer: Any,
    max_length: int,
) -> tuple[Data, dict[str, TokenStore]]:
    """`load_data` and `tokenize`, or what they gave for the same data and tokenizer before.

    Kept are local files and stdlib-pairs, in the folder that NANOFINETUNE_CACHE names (default ~/.cache/nanofinetune;
    empty: nothing is kept). The file's name is a hash of all that the result depends on: sizes and times of the data's
    files, the tokenizer, the arguments, this module. `Data.splits` then hold ranges, of which only the length counts.
    Raises what `load_data` raises.
    """
    key = _cache_key(name, text_columns, label_column, seed, tokenizer, max_length)
    if key is not None and (found := _read_cache(key)) is not None:
        return found
    data = load_data(name, text_columns, label_column, seed)
    stores = tokenize(data, tokenizer, max_length)
    if key is not None:
        _write_cache(key, data, stores)
    return data, stores


def tokenize_texts(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, max_length: int) -> TokenStore:
    """Tokenize plain strings (and their second sentences) into a TokenStore without labels: what prediction needs."""
    encoded = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=True, max_length=max_length)
    ragged = {}
    for column, rows in encoded.items():
        offsets = np.cumsum([0, *map(len, rows)])
        ragged[column] = (np.concatenate([np.asarray(row, np.int32) for row in rows]), offsets)
    return TokenStore(ragged)


# --- the cache of finished arrays -------------------------------------------------------------------------------------


def _cache_key(name: str | None, *arguments: Any) -> Path | None:
    """The file that holds, or will hold, the result; None where nothing is kept."""
    *_, tokenizer, max_length = arguments
    folder = os.environ.get("NANOFINETUNE_CACHE", str(Path("~/.cache/nanofinetune").expanduser()))
    if not folder or name is None or not hasattr(tokenizer, "backend_tokenizer"):
        return None  # a default's fallback may differ next time; a tokenizer in Python cannot be hashed
    path = Path(name).expanduser()
    here = Path(__file__).parent
    sources = [here / "data.py", here / "tasks.py"]
    if name == "stdlib-pairs":
        sources += [here / "stdlib_pairs.py", Path(os.__file__)]  # the library's own documentation, of this Python
    elif path.is_file():
        sources.append(path)
    elif path.is_dir():
        sources += sorted(file for file in path.iterdir() if file.is_file())
    else:
        return None  # the Hub's: only the library knows whether it has changed
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    texts, label, seed = arguments[:3]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}  # as the latest call left them; each call says what it wants
    tokens = [rules, *tokenizer.model_input_names, tokenizer.truncation_side, max_length]
    whole = [name, texts and list(texts), label, seed, tokens, stamps, version("datasets"), version("transformers")]
    return Path(folder, hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32] + ".npz")


def _read_cache(file: Path) -> tuple[Data, dict[str, TokenStore]] | None:
    """What `_write_cache` wrote; None where there is nothing, or nothing whole."""
    try:
        with (
            open(file, "rb") as raw,
            np.load(raw, allow_pickle=False) as held,
        ):  # given a name, it leaves a bad file open
            kept = json.loads(str(held["data"]))
            stores = {}
            for split, columns in kept.pop("columns").items():
                offsets = held[f"{split}/offsets"]
                ragged = {column: (held[f"{split}/{column}"], offsets) for column in columns}
                stores[split] = TokenStore(ragged, held[f"{split}/label"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    splits = {split: range(len(store)) for split, store in stores.items()}
    lists = {name: tuple(kept[name]) for name in ("text_columns", "metrics")}
    return Data(**kept | lists, splits=splits), stores


def _write_cache(file: Path, data: Data, stores: Mapping[str, TokenStore]) -> None:
    """Write beside the file and rename, so that no one reads half of it. Where that fails there is no cache."""
    arrays: dict[str, Any] = {}
    columns = {}
    for split, store in stores.items():
        offsets = next(iter(store.ragged.values()))[1]
        if any(other is not offsets for _, other in store.ragged.values()):
            return  # columns of different lengths: no model's inputs
        columns[split] = list(store.ragged)
        arrays |= {f"{split}/{name}": flat for name, (flat, _) in store.ragged.items()}
        arrays |= {f"{split}/offsets": offsets, f"{split}/label": store.dense["label"]}
    kept = asdict(replace(data, splits={})) | {"columns": columns}
    del kept["splits"]
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.savez(part, data=np.array(json.dumps(kept)), **arrays)
        os.replace(part.name, file)


# --- loading: each kind of name ---------------------------------------------------------------------------------------


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

    from nanofinetune import stdlib_pairs

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


# --- columns and labels -----------------------------------------------------------------------------------------------


def _find_columns(
    train: Any, task: Task | None, text_columns: Sequence[str] | None, label_column: str | None
) -> tuple[tuple[str, ...], str]:
    """-> (one or two text columns, label column): the user's, the task table's, or the only reading there is."""
    columns = train.column_names
    for flag, asked in (
        ("--text-columns", text_columns or ()),
        ("--label-column", [label_column] if label_column else ()),
    ):
        for column in asked:
            if column not in columns:
                raise UsageError(f"{flag} {column}: there is no such column; the data have {', '.join(columns)}")
    if text_columns and len(text_columns) > 2:
        raise UsageError(f"--text-columns {' '.join(text_columns)}: name one column or two")
    if text_columns and len(set(text_columns)) < len(text_columns):
        raise UsageError(f"--text-columns {' '.join(text_columns)}: one column twice; name it once, or another one")
    if task is not None:
        return task.text_columns, task.label_column

    text = [column for column in columns if _kind(train, column) == "text"]
    for column in text_columns or ():
        if column not in text:
            raise UsageError(f"--text-columns {column}: the column holds {_kind(train, column)}, not text")
    label = label_column or _only_label(train, [column for column in columns if column not in (text_columns or ())])
    if label in (text_columns or ()):
        raise UsageError(f"--label-column {label}: it is also named as a text column")
    found = tuple(text_columns or (column for column in text if column != label))
    if not 1 <= len(found) <= 2:
        raise UsageError(
            f"--data has {len(found)} text columns beside the label ({', '.join(found) or 'none'}): "
            "name one or two with --text-columns"
        )
    return found, label


def _only_label(train: Any, columns: list[str]) -> str:
    """The label column: one of the usual name, else the only column of numbers that is not an index."""
    named = [column for column in columns if column in _LABEL_NAMES]
    numbers = [
        c for c in columns if _kind(train, c) in ("numbers", "classes") and c.lower() not in ("idx", "id", "index")
    ]
    candidates = named if len(named) == 1 else numbers
    if len(candidates) != 1:
        raise UsageError(
            f"--data: which column is the label? Name it with --label-column; the data have {', '.join(columns)}"
        )
    return candidates[0]


def _kind(train: Any, column: str) -> str:
    """What a column holds, in words: text, classes, numbers, or the library's own name for anything else."""
    import datasets

    feature = train.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if dtype in ("string", "large_string", "string_view"):
        return "text"
    return "numbers" if dtype.startswith(("int", "uint", "float", "bool")) else str(dtype)


def _keep(split: Any, columns: Sequence[str], key: str) -> Any:
    missing = [column for column in columns if column not in split.column_names]
    if missing:
        raise UsageError(f"--data: the {key} split has no column {missing[0]}; it has {', '.join(split.column_names)}")
    return split.select_columns(list(columns))


def _check_labels(splits: Mapping[str, Any], column: str, task: Task | None) -> list[str] | None:
    """Check that every label can be trained on -> the class names, or None for regression."""
    import datasets

    for key, split in splits.items():
        kind = _kind(split, column)
        if kind == "text":
            values = split[column][:]
            if "" in values:  # a lost label, which makes a csv file's column one of text
                row = values.index("") + 1
                raise UsageError(f"--label-column {column}: row {row} of the {key} split has no label; fill it in")
            shown = ", ".join(map(repr, sorted(set(map(str, values)))[:4]))
            raise UsageError(
                f"--label-column {column}: the labels of the {key} split are text ({shown} ...); "
                "write them as 0, 1, 2 ... in the file, one number for each class"
            )
        if kind not in ("classes", "numbers"):
            raise UsageError(f"--label-column {column}: it holds {kind}; labels are whole numbers or floats")
    arrays = {key: _labels_of(split, column, key) for key, split in splits.items()}
    if arrays["train"].dtype.kind == "f":
        return None
    for key, array in arrays.items():
        if array.dtype.kind == "f":
            raise UsageError(
                f"--label-column {column}: the {key} split holds floats and the training split whole numbers; "
                "write both as classes 0, 1, 2 ... or both as floats"
            )
    classes = np.unique(arrays["train"])
    if classes[0] == -1 and len(classes) == 1:
        raise UsageError(f"--label-column {column}: every label is -1, the mark of a test set without labels")
    if len(classes) == 1:
        raise UsageError(f"--label-column {column}: there is only one class ({classes[0]}) in the training split")
    feature = splits["train"].features[column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if names is None and task is not None and task.label_names is not None:
        names = list(task.label_names)
    if names is None:
        if classes[0] != 0 or classes[-1] != len(classes) - 1:
            shown = ", ".join(map(str, classes[:6]))
            raise UsageError(
                f"--label-column {column}: the classes are {shown}; number them 0 to {len(classes) - 1} without gaps"
            )
        names = [str(value) for value in classes]
    for key, array in arrays.items():
        outside = array[(array < 0) | (array >= len(names))]
        if len(outside):
            raise UsageError(
                f"--label-column {column}: the {key} split has the label {outside[0]}, which is not one of the "
                f"{len(names)} classes of the training split"
            )
    return names


def _labels_of(split: Any, column: str, key: str) -> np.ndarray:
    """(rows,) int64 class ids or float32 targets. Raises UsageError naming the first row without a usable label."""
    table = split.with_format("arrow")[:][column]
    if table.null_count:
        row, count = table.to_pylist().index(None) + 1, f"{table.null_count} in all"
        raise UsageError(f"--label-column {column}: row {row} of the {key} split has no label ({count}); fill it in")
    values = table.to_numpy()
    if values.dtype.kind != "f":
        return values.astype(np.int64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        shown = f"row {bad[0] + 1} of the {key} split is {values[bad[0]]} ({len(bad)} in all)"
        raise UsageError(f"--label-column {column}: {shown}; write a number")
    return values.astype(np.float32)


def _check_texts(split: Any, columns: Sequence[str], key: str) -> None:
    for column in columns:
        kind = _kind(split, column)
        if kind != "text":
            remedy = "write it as json lines or parquet, which tell them apart"
            raise UsageError(f"--text-columns {column}: the {key} split holds {kind}, not text; {remedy}")
        values = split.with_format("arrow")[:][column]
        if values.null_count:
            row, count = values.to_pylist().index(None) + 1, f"{values.null_count} in all"
            raise UsageError(f"--text-columns {column}: row {row} of the {key} split has no text ({count}); fill it in")


def _to_store(encoded: Any, data: Data) -> TokenStore:
    """A tokenized datasets.Dataset -> TokenStore, straight from its Arrow buffers."""
    table = encoded.with_format("arrow")[:]
    ragged: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for column in encoded.column_names:
        if column != data.label_column:
            lists = table[column].combine_chunks()
            offsets = lists.offsets.to_numpy().astype(np.int64)
            flat = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]].astype(np.int32)
            # All inputs of a model have one value for each token: one offsets array serves them all.
            same = [other for _, other in ragged.values() if np.array_equal(other, offsets - offsets[0])]
            ragged[column] = (flat, same[0] if same else offsets - offsets[0])
    return TokenStore(ragged, _labels_of(encoded, data.label_column, "tokenized"))


def _root_cause(error: BaseException) -> str:
    """What really went wrong under the library's wrappers, in one line with the remedy where it is known."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} is not UTF-8: convert the file, for example with iconv"
    text = first_line(error)
    return f"{text}: unbalanced quotes?" if "EOF inside string" in text else text
