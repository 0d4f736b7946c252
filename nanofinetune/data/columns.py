"""Which columns hold the texts and which one the label, and what its values mean: classes by name, or numbers.

>>> import datasets
>>> rows = datasets.Dataset.from_dict({"id": [7, 8, 9], "review": ["fine", "cold soup", "no"], "stars": [5, 1, 1]})
>>> find_columns(rows, kinds_of(rows), None)
(('review',), ('stars',))
>>> labels = read_labels({"train": rows}, ["stars"], None)
>>> labels.names, labels.values["train"].tolist(), labels.note
(['1', '5'], [1, 0, 0], 'the labels 1, 5 in stars are classes 0 to 1')

Underneath: `datasets.Dataset.remove_columns` and `datasets.Dataset.rename_column` (datasets 5.2), called by hand
  - the course names its columns itself; here they come from the user, the task table, or the only reading there is;
  - an index, an id, a date or the label in words is no text, and an index no label;
  - labels are checked first: transformers meets a gap in them as an index error or a NaN loss;
  - a class of another split is the same by name, not by number;
  - a refusal names columns, row and option.

Proof: test_columns_are_found_by_themselves, test_two_readings_are_refused in tests/data/test_columns.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from nanofinetune.data.files import LONGEST, MIXED, has_codes, kind_of, typed
from nanofinetune.data.multilabel import classes_of_columns, classes_of_lists
from nanofinetune.data.tasks import Task
from nanofinetune.ground.errors import UsageError

# Names that say what a column is, in lower case: a label for certain, and one if nothing else can be.
LABEL_NAMES = {"label", "labels", "class", "gold_label"}
WEAK_NAMES = {
    "target", "targets", "y", "quality", "sentiment", "category", "rating", "stars", "score", "emotion", "intent",
    "topic", "polarity",
}  # fmt: skip
NEITHER = {
    "id", "ids", "idx", "index", "key", "uid", "uuid", "guid", "url", "uri", "link", "href",
    "date", "datetime", "time", "timestamp", "year", "month", "day", "hour",
    "length", "len", "count", "price", "cost", "confidence", "conf", "probability", "prob", "split", "fold",
}  # fmt: skip
MOST_CLASSES = 1_000
FEW_NUMBERS = 20  # of a column of numbers, which may then well be classes

Kinds = Mapping[str, Mapping[str, str]]  # split -> column -> its kind


class Labels(NamedTuple):
    """What the label column means."""

    names: list[str] | None  # of the classes, by number; None: numbers to regress on
    values: dict[str, np.ndarray]  # split -> (rows,) int64 numbers of classes, or float32; (rows, classes) of 0.0, 1.0
    note: str  # how they were read, where that is not plain; else ""


def kinds_of(rows: Any) -> dict[str, str]:
    """The kind of each column of a datasets.Dataset: classes, text, numbers, dates, lists ..."""
    import datasets

    features = rows.features  # underneath: each look at it copies them all, which is slow for a thousand columns
    found = {field.name: kind_of(field.type) for field in features.arrow_schema}
    return found | {name: "classes" for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def find_columns(
    rows: Any,
    kinds: Mapping[str, str],
    task: Task | None,
    text_columns: Sequence[str] | None = None,
    label_columns: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """-> (one or two text columns, the label's): the user's, the task table's, or the only reading there is.

    Several label columns, which only the user can name, are one class each.

    Args:
        rows: the training split, a datasets.Dataset.
        kinds: of all its columns, and of those that it leaves out because they cannot be used.

    Raises:
        UsageError: there is no such column, or more than one reading; it names them, and the option to choose with.
    """
    for flag, asked in (("--text-columns", text_columns or ()), ("--label-column", label_columns or ())):
        for column in asked:
            if column not in kinds:
                raise UsageError(f"{flag} {column}: there is no such column; the data have {_listed(kinds)}")
        if len(set(asked)) < len(asked):
            raise UsageError(f"{flag} {' '.join(asked)}: one column twice; name it once, or another one")
    if text_columns and len(text_columns) > 2:
        raise UsageError(f"--text-columns {' '.join(text_columns)}: name one column or two")
    if task is not None:
        return task.text_columns, (task.label_column,)
    for column in text_columns or ():
        if kinds[column] != "text":
            raise UsageError(f"--text-columns {column}: the column holds {kinds[column]}, not text")
    others = {column: kind for column, kind in kinds.items() if column not in (text_columns or ())}
    labels = tuple(label_columns or [_find_label(rows, others, bool(text_columns))])
    for label in labels:
        if label in (text_columns or ()):
            raise UsageError(f"--label-column {label}: it is also named as a text column")
        if kinds[label] not in ("classes", "numbers", "text") and not _is_list_of_classes(rows, label):
            remedy = "labels are words, whole numbers or floats, or lists of 0 and 1 or of words"
            raise UsageError(f"--label-column {label}: it holds {kinds[label]}; {remedy}")
    return tuple(text_columns or _find_texts(rows, kinds, labels)), labels


def read_labels(splits: Mapping[str, Any], columns: Sequence[str], task: Task | None, kind: str = "auto") -> Labels:
    """The labels of all splits, checked, as numbers of classes or as floats.

    Whole numbers, booleans and words are classes, in their order; so are whole floats of at most 20 values (pandas
    writes 0.0 and 1.0 for labels with a gap). Other floats are regressed on. Several columns of 0 and 1, or one of
    lists, are classes of which a row may have any number. `kind` overrules: single, multi or regression.

    Raises:
        UsageError: a row without a label, one class only, or splits that do not agree.
    """
    import datasets

    column = columns[0]
    kinds = {key: kinds_of(split) for key, split in splits.items()}
    _check_kinds(splits, kinds, columns)
    types = {some[column] for some in kinds.values()}
    if len(columns) > 1 or "lists" in types:
        what = "several columns" if len(columns) > 1 else "lists"
        if kind in ("single", "regression"):
            raise UsageError(f"--task {kind}: the label is in {what}, which are several classes; name one column")
        return _several(splits, kinds, columns)
    if kind == "multi":
        found = f"{column} is one column of {types.pop()}"
        raise UsageError(
            f"--task multi: {found}; name several columns of 0 and 1, or one of lists, with --label-column"
        )

    cells = _label_cells(splits, kinds, column)
    _check_classes(cells, column, kind)
    features = {key: split.features[column] for key, split in splits.items()}
    named = {key: list(f.names) for key, f in features.items() if isinstance(f, datasets.ClassLabel)}
    cells, names, note = _by_name(cells, named, column, kind) if named else (cells, None, "")
    if names is not None:
        return Labels(names, _numbered(cells, range(len(names)), column), note)
    text = [key for key, values in cells.items() if values.dtype.kind == "O"]
    if text and len(text) < len(cells):
        some = _listed(map(repr, sorted(set(cells[text[0]]))), 4)
        other = next(key for key in cells if key not in text)
        raise UsageError(
            f"--label-column {column}: the labels of the {text[0]} split are text ({some}) and those of the {other} "
            "split numbers; write both alike"
        )
    if text and kind == "regression":
        shown = _listed(map(repr, sorted(set(cells["train"]))), 4)
        raise UsageError(f"--task regression: the labels in {column} are text ({shown}); name a column of numbers")
    labels = _words(cells, column, task) if text else _numbers(cells, column, task, kind)
    return labels._replace(note="; ".join(filter(None, [note, labels.note])))


def drop_unlabelled(splits: Mapping[str, Any], columns: Sequence[str]) -> tuple[dict[str, Any], str]:
    """-> (the splits without the rows that have no label; what was left out).

    No label is an empty one, NaN, NA or the like, or -1 among whole numbers. Raises UsageError for a split of which
    nothing is left.
    """
    import pyarrow as pa

    kept, counts, words = {}, [], set[str]()
    kinds = {key: kinds_of(rows) for key, rows in splits.items()}
    numbers = {column: _all_are_numbers(splits, kinds, column) for column in columns}
    for key, rows in splits.items():
        missing = np.zeros(len(rows), bool)
        for column in columns:
            cells = _cells(rows, column)
            lost = _is_missing(cells, numbers[column], also=-1)
            if kind_of(cells.type) == "text":
                words |= {word.strip() for word in cells.filter(pa.array(lost)).unique().to_pylist() if word}
            missing |= lost
        kept[key] = rows.select(np.flatnonzero(~missing)) if missing.any() else rows
        if missing.all():
            raise UsageError(f"--label-column {' '.join(columns)}: no row of the {key} split has a label; name another")
        if missing.any():
            counts.append(f"{missing.sum():,} of {len(rows):,} {key} rows")
    how = ", ".join(["empty", *sorted(words - {"", "-1"})])
    return kept, f"left out without a label ({how}, or -1): {' and '.join(counts)}" if counts else ""


def keep(rows: Any, kinds: Mapping[str, str], columns: Sequence[str], key: str) -> Any:
    """A split with these columns alone. Raises UsageError where it lacks one."""
    for column in columns:
        if column not in rows.column_names:
            if column in kinds:
                raise UsageError(f"--data: the column {column} of the {key} split holds {kinds[column]}")
            raise UsageError(f"--data: the {key} split has no column {column}; it has {_listed(kinds)}")
    return rows.select_columns(list(columns))


def check_texts(split: Any, columns: Sequence[str], key: str) -> None:
    """Refuse a split whose text columns hold anything but a text in every row."""
    import pyarrow.compute as pc

    for column, kind in ((column, kinds_of(split)[column]) for column in columns):
        if kind != "text":
            remedy = "write it as json lines or parquet, which tell them apart"
            raise UsageError(f"--text-columns {column}: the {key} split holds {kind}, not text; {remedy}")
        values = _cells(split, column)
        if values.null_count:
            row, count = values.to_pylist().index(None) + 1, f"{values.null_count} in all"
            raise UsageError(f"--text-columns {column}: row {row} of the {key} split has no text ({count}); fill it in")
        lengths = pc.utf8_length(values).to_numpy()
        if len(lengths) and lengths.max() > LONGEST:
            text = f"row {lengths.argmax() + 1} of the {key} split has {lengths.max():,} characters"
            raise UsageError(f"--text-columns {column}: {text}, more than {LONGEST:,}, the most that is read; cut it")


# --- which column is what ---------------------------------------------------------------------------------------------


def _find_label(rows: Any, kinds: Mapping[str, str], knows_texts: bool) -> str:
    """The column that is named like a label, whatever its type; else the only one whose values can be labels."""
    called = {column: "_".join(_words_of(column)) for column in kinds}
    named = [column for column in kinds if called[column] in LABEL_NAMES]
    if not named and (weak := [column for column in kinds if called[column] in WEAK_NAMES]):
        meant = [c for c in weak if not _is_prose(rows, c, kinds[c])] or weak
        named = meant + [c for c in kinds if c not in weak and _is_rival(rows, c, kinds, meant[0], knows_texts)]
    elif not named:
        if not knows_texts:
            _check_mixed(kinds)
        named = [column for column, kind in kinds.items() if _can_be_label(rows, column, kind)]
    if len(named) == 1:
        return named[0]
    if named:
        several = ", or all of them" if all(map(partial(_is_yes_or_no, rows), named)) else ""
        which = f"which column is the label, {_listed(named, last=' or ')}? Name it{several} with --label-column"
        raise UsageError(f"--data: {which}; the data have {_listed(kinds)}")
    raise UsageError(f"--data: which column is the label? Name it with --label-column; the data have {_listed(kinds)}")


def _is_rival(rows: Any, column: str, kinds: Mapping[str, str], named: str, knows_texts: bool) -> bool:
    """Whether a column could be the label as well as `named`, whose name is not certain: it has few values."""
    kind = kinds[column]
    if not _can_be_label(rows, column, kind):
        return False
    if kind.startswith(MIXED):
        return knows_texts or not kind.startswith(f"{MIXED} (text")
    if kind == "text" and not _are_numbers(_cells(rows, column)):  # without --text-columns it is asked as a text
        of_cells = kinds[named] in ("text", "numbers", "classes")
        return knows_texts and not (of_cells and _is_copy(rows, column, named))
    values = len(_cells(rows, column).unique()) if kind in ("text", "numbers") else 2
    return 2 <= values <= min(FEW_NUMBERS, len(rows) / 2)


def _is_prose(rows: Any, column: str, kind: str) -> bool:
    """Whether most cells are texts of their own."""
    return kind == "text" and 2 * len(_cells(rows, column).unique()) > len(rows)


def _check_mixed(kinds: Mapping[str, str]) -> None:
    """Refuse a column that would be a text but for a few cells: without it the others would be all there is."""
    for column, kind in kinds.items():
        if kind.startswith(f"{MIXED} (text") and not _is_neither(column):
            remedy = "mend that row and others like it, or name the text columns with --text-columns"
            raise UsageError(f"--data: the column {column} holds {kind}; {remedy}")


def _find_texts(rows: Any, kinds: Mapping[str, str], labels: Sequence[str]) -> list[str]:
    """The one or two columns that can only be text."""
    _check_mixed({column: kind for column, kind in kinds.items() if column not in labels})
    found = [c for c, kind in kinds.items() if kind == "text" and c not in labels and _can_be_text(rows, c)]
    found = [c for c in found if kinds[labels[0]] == "lists" or not _is_copy(rows, c, labels[0])]
    if not 1 <= len(found) <= 2:
        raise UsageError(
            f"--data has {len(found)} text columns beside the label ({_listed(found) or 'none'}): "
            "name one or two with --text-columns"
        )
    few = [c for c in found if _has_few_values(_cells(rows, c))]
    if len(found) == 2 and few:
        raise UsageError(
            f"--data: is {few[0]}, of a few values many times, a text? Name the text columns with --text-columns: "
            f"{' '.join(found)}, or one of them"
        )
    words = [c for c in found if not _has_sentences(_cells(rows, c))]
    if len(found) == 2 and len(words) == 1:
        raise UsageError(
            f"--data: is {words[0]}, single words without a space, a text, or a name, a file, a code? Name the text "
            f"columns with --text-columns: {' '.join(found)}, or one of them"
        )
    return found


def _words_of(column: str) -> list[str]:
    """reviewId, review_id, #1 ID -> [..., "id"]"""
    return re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", column).lower())


def _is_neither(column: str) -> bool:
    """Whether the name says that it is neither text nor label: an index, an id, a date ..."""
    words = _words_of(column)
    written_by_pandas = column.startswith(("Unnamed:", "__index_level_"))
    return not words or written_by_pandas or words[-1] in NEITHER or words[0] in ("id", "uuid", "url", "date")


def _can_be_label(rows: Any, column: str, kind: str) -> bool:
    if _is_neither(column):
        return False
    if kind == "classes" or kind.startswith(MIXED):  # the latter cannot be one, but may be meant
        return True
    if kind == "lists":
        return _is_list_of_classes(rows, column, words=False)  # lists of words are tokens, as a rule
    if kind not in ("text", "numbers"):
        return False
    cells = _cells(rows, column)
    if kind == "text" and not _are_numbers(cells):
        return _has_few_values(cells)
    cells = _as_numbers(cells).drop_null()  # a gap is a lost label, and said so when they are read
    counts_rows = "int" in str(cells.type) and len(cells) > 2 and len(cells.unique()) == len(cells)
    return len(cells) > 0 and not counts_rows


def _is_list_of_classes(rows: Any, column: str, words: bool = True) -> bool:
    """Whether it holds flat lists of 0 and 1, of numbers of classes, or, where they may be, of words."""
    import datasets
    import pyarrow.compute as pc

    if column not in rows.column_names or kind_of(rows.features.arrow_schema.field(column).type) != "lists":
        return False
    if isinstance(getattr(rows.features[column], "feature", None), datasets.ClassLabel):
        return True
    items = pc.list_flatten(_cells(rows, column).slice(0, 100))
    if kind_of(items.type) == "text":
        return words
    return kind_of(items.type) in ("numbers", "nothing") and set(items.to_pylist()) <= {0, 1}


def _is_yes_or_no(rows: Any, column: str) -> bool:
    """Whether a column of numbers holds 0 and 1 alone, as one of several classes does."""
    cells = _cells(rows, column) if column in rows.column_names else None
    return cells is not None and kind_of(cells.type) == "numbers" and set(cells.unique().to_pylist()) <= {0, 1}


_NO_LABEL = r"NA|N/A|NULL|NaN|\\N|#N/A|<NA>"  # how programs write that there is none; among words it may be one
_NONE_AMONG_WORDS = rf"^\s*({_NO_LABEL})?\s*$"
_NONE_AMONG_NUMBERS = rf"(?i)^\s*({_NO_LABEL}|none|\?)?\s*$"
_NO_TEXT = (
    rf"^\s*({_NO_LABEL}|[+-]?[\d.,]+%?"  # a number, or none
    r"|(https?://|www\.)\S+"
    r"|[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # a uuid
    r"|\d{4}-\d{1,2}-\d{1,2}([T ].*)?|\d{1,2}[./]\d{1,2}[./]\d{2,4}(\s.*)?)?\s*$"  # a date; or nothing
)


def _can_be_text(rows: Any, column: str) -> bool:
    """Whether some cell holds more than a number, an address, a uuid or a date."""
    import pyarrow.compute as pc

    if _is_neither(column):
        return False
    cells = _cells(rows, column).drop_null()
    if _are_numbers(cells) and len(_as_numbers(cells).drop_null()):  # some of which are NA, or they were no text
        return False
    first, rest = cells.slice(0, 100), cells.slice(100)  # mostly the first ones tell
    return not all(pc.all(pc.match_substring_regex(part, _NO_TEXT), min_count=0).as_py() for part in (first, rest))


# Not a word, but a sentence: a space within, or a long run of a script that has none.
_SENTENCE = r"\S\s+\S|[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]{6,}"


def _has_sentences(cells: Any) -> bool:
    """Whether some cell has several words."""
    import pyarrow.compute as pc

    first, rest = cells.slice(0, 100), cells.slice(100)  # mostly the first ones tell
    return any(pc.any(pc.match_substring_regex(part, _SENTENCE), min_count=0).as_py() for part in (first, rest))


def _are_numbers(cells: Any) -> bool:
    """Whether all cells are numbers, or True or False, but for those that say that there is none."""
    import pyarrow.compute as pc

    if kind_of(cells.type) != "text":
        return kind_of(cells.type) == "numbers"
    for part in (cells.slice(0, 100), cells):  # mostly the first ones tell
        words = part.unique().drop_null()
        words = words.filter(pc.invert(pc.match_substring_regex(words, _NONE_AMONG_NUMBERS)))
        if len(words) and kind_of(typed(words).type) != "numbers":
            return False
    return True


def _as_numbers(cells: Any) -> Any:
    """Cells that are numbers, in words or not -> the numbers, null where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if kind_of(cells.type) != "text":
        return cells
    cells = typed(pc.if_else(_none(cells, _NONE_AMONG_NUMBERS), "", cells))
    return pa.chunked_array([pa.nulls(len(cells), pa.float64())]) if kind_of(cells.type) == "text" else cells


def _none(cells: Any, pattern: str) -> Any:
    """Which cells are null, NaN, or a text of this pattern: a pyarrow.ChunkedArray of booleans."""
    import pyarrow.compute as pc

    missing = pc.is_null(cells, nan_is_null=True)
    if kind_of(cells.type) == "text":
        missing = pc.or_(missing, pc.fill_null(pc.match_substring_regex(cells, pattern), False))
    return missing


def _has_few_values(cells: Any) -> bool:
    """Whether they look like classes: 2 to 100 short values, each five times on average."""
    import pyarrow.compute as pc

    values = cells.unique().drop_null()
    few = 2 <= len(values) <= 100 and 5 * len(values) <= len(cells)
    return few and pc.max(pc.utf8_length(values)).as_py() <= 100


def _is_copy(rows: Any, column: str, label: str) -> bool:
    """Whether a text column says in words what the label says: each of its few values goes with one label."""
    texts, labels = _cells(rows, column), _cells(rows, label)
    pairs = set(zip(texts.to_pylist(), labels.to_pylist(), strict=True)) if len(texts.unique()) <= MOST_CLASSES else ()
    return 2 * len(pairs) <= len(texts) and len(pairs) == len(texts.unique()) == len(labels.unique())


# --- what the labels mean ---------------------------------------------------------------------------------------------


def _check_kinds(splits: Mapping[str, Any], kinds: Kinds, columns: Sequence[str]) -> None:
    """Refuse what is no label in some split, and lists where they cannot be."""
    for column in columns:
        found = {key: some[column] for key, some in kinds.items()}
        odd = [key for key, kind in found.items() if kind not in ("classes", "numbers", "text", "lists")]
        lists = [key for key, kind in found.items() if kind == "lists"]
        odd += [key for key in lists if kind_of(_cells(splits[key], column).type.value_type) in ("lists", "objects")]
        if odd:
            raise UsageError(f"--label-column {column}: the {odd[0]} split holds {found[odd[0]]}, which are no labels")
        if lists and len(columns) > 1:
            raise UsageError(f"--label-column {column}: it holds lists; of several columns each holds 0 and 1")
        if lists and len(lists) < len(found):
            other = next(key for key in found if key not in lists)
            text = f"the {other} split holds {found[other]} and the {lists[0]} split lists"
            raise UsageError(f"--label-column {column}: {text}; write both alike")


def _all_are_numbers(splits: Mapping[str, Any], kinds: Kinds, column: str) -> bool:
    """Whether the labels of all splits are numbers, in words or not, but for those that say that there is none."""
    alike = all(kinds[key][column] in ("numbers", "text") for key in splits)
    return alike and all(_are_numbers(_cells(split, column)) for split in splits.values())


def _check_missing(splits: Mapping[str, Any], kinds: Kinds, column: str) -> None:
    """Refuse the first row without a label."""
    numbers = _all_are_numbers(splits, kinds, column)
    for key, split in splits.items():
        kind, cells = kinds[key][column], _cells(split, column)
        missing = _is_missing(cells, numbers, also=-1 if kind == "classes" else None)  # of names, none is -1's
        if missing.any():
            row, count, where = int(missing.argmax()), f"{missing.sum():,} in all", f"--label-column {column}"
            if missing.all() and kind == "classes":
                raise UsageError(
                    f"{where}: every label of the {key} split is -1, the mark of a test set without labels"
                )
            word = (cells[row].as_py() or "").strip() if kind == "text" else ""
            remedy = "fill it in, or leave such rows out with --drop-unlabelled"
            text = f"row {row + 1} of the {key} split has no label ({'; '.join(filter(None, [word, count]))})"
            raise UsageError(f"{where}: {text}; {remedy}")


def _label_cells(splits: Mapping[str, Any], kinds: Kinds, column: str) -> dict[str, np.ndarray]:
    """Split -> (rows,) of int64, bool, float64 or, for words, object. Refuses the first row without a label."""
    import pyarrow as pa
    import pyarrow.compute as pc

    _check_missing(splits, kinds, column)
    found, booleans = {}, any(str(_cells(split, column).type) == "bool" for split in splits.values())
    for key, split in splits.items():
        cells = _cells(split, column)
        if kinds[key][column] == "text" and not has_codes(cells):
            for type_ in (pa.bool_(),) if booleans else (pa.int64(), pa.float64()):  # "0" and "1"
                with suppress(pa.ArrowInvalid):
                    cells = pc.utf8_trim_whitespace(cells).cast(type_)
                    break
        values: np.ndarray = cells.to_numpy()
        bad = np.flatnonzero(~np.isfinite(values)) if values.dtype.kind == "f" else np.array([])
        if len(bad):
            shown = f"row {bad[0] + 1} of the {key} split is {values[bad[0]]} ({len(bad)} in all)"
            raise UsageError(f"--label-column {column}: {shown}; write a number")
        dtype = {"i": np.int64, "u": np.int64, "f": np.float64}.get(values.dtype.kind, values.dtype)
        found[key] = values.astype(dtype, copy=False)
    return found


def _is_missing(cells: Any, numbers: bool, also: int | None) -> np.ndarray:
    """(rows,) bool: which labels are null, NaN, blank, or the whole number `also`.

    Among `numbers` NA, None or ? is no label either. Among words NA may be one, and with `also` it is none.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    blank = r"^\s*$" if also is None else _NONE_AMONG_WORDS
    missing = _none(cells, _NONE_AMONG_NUMBERS if numbers else blank)
    if numbers:
        cells = _as_numbers(cells)
    if also is not None and kind_of(cells.type) == "text":
        missing = pc.or_(missing, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(cells), str(also)), False))
    if also is not None and kind_of(cells.type) == "numbers" and str(cells.type) != "bool":
        if not pa.types.is_integer(cells.type):
            cells = cells.cast(pa.float64())  # underneath: of half a float, pyarrow knows no floor
            given = cells.filter(pc.invert(missing))
            if pc.any(pc.not_equal(pc.floor(given), given)).as_py():
                return np.asarray(missing.to_numpy(), bool)  # among fractions -1 is a number like any other
        missing = pc.or_(missing, pc.fill_null(pc.equal(cells, also), False))
    return np.asarray(missing.to_numpy(), bool)


def _by_name(
    cells: Mapping[str, np.ndarray], named: Mapping[str, list[str]], column: str, kind: str
) -> tuple[dict[str, np.ndarray], list[str] | None, str]:
    """Labels, and names of classes that some splits have -> (labels that mean the same in all, the names, a note).

    Names are None where the labels are what a table without names has: words, or numbers.
    """
    # underneath: datasets' class_encode_column numbers each split by itself, so that 0 is another class in each
    first, taken, notes = next(iter(named)), dict(cells), list[str]()
    plain = [key for key, values in cells.items() if key not in named and values.dtype.kind != "O"]
    differ = [key for key, names in named.items() if names != named[first]]
    numbers = [name for names in named.values() for i, name in enumerate(names) if _is_number(name) and name != str(i)]
    if kind == "regression" and all(map(_is_number, chain(*named.values()))):
        numbered = {key: _as_words(cells[key], names, key, column) for key, names in named.items()}
        return taken | {key: values.astype(np.float64) for key, values in numbered.items()}, None, ""
    if "train" not in named and cells["train"].dtype.kind == "O":
        return taken | {key: _as_words(cells[key], names, key, column) for key, names in named.items()}, None, ""
    if (plain and (numbers or differ)) or (kind == "regression" and differ):
        key, other = (plain[0], "has numbers") if plain else (differ[0], _listed(named[differ[0]], 4))
        text = f"the {first} split names its classes {_listed(named[first], 4)}, and the {key} split {other}"
        raise UsageError(f"--label-column {column}: {text}; write both alike")
    for key in plain:
        _as_words(cells[key], named[first], key, column)
        if named[first] != [str(i) for i in range(len(named[first]))]:
            notes.append(f"the numbers of the {key} split are the classes {_listed(named[first], 4)} in this order")
    if "train" not in named or kind == "regression":
        return taken, None, "; ".join(notes)
    all_names = list(named["train"])
    for key in (key for key in cells if key not in plain and named.get(key) != named["train"]):
        told = _as_words(cells[key], named[key], key, column) if key in named else cells[key]
        if new := sorted(set(told) - set(all_names)):
            all_names += new
            notes.append(f"the training split has no class {_listed(new, 4)}, which the {key} split has")
        taken[key] = _numbered({key: told}, all_names, column)[key]
    _as_words(cells["train"], named["train"], "train", column)
    return taken, all_names, "; ".join(notes)


def _is_number(word: str) -> bool:
    with suppress(ValueError):
        return np.isfinite(float(word))
    return False


def _as_words(values: np.ndarray, names: Sequence[str], key: str, column: str) -> np.ndarray:
    """Numbers of classes -> their names."""
    places = _numbered({key: values}, range(len(names)), column)[key]
    return np.array(names, object)[places]


def _check_classes(cells: Mapping[str, np.ndarray], column: str, kind: str) -> None:
    for key, values in cells.items():
        if len(values) and values.dtype.kind in "if" and (values == -1).all():
            which = "label" if key == "train" else f"label of the {key} split"
            raise UsageError(f"--label-column {column}: every {which} is -1, the mark of a test set without labels")
    train = cells["train"]
    classes = np.unique(train)
    if len(classes) == 1:
        raise UsageError(f"--label-column {column}: there is only one class ({classes[0]}) in the training split")
    is_number = kind == "regression" or (kind == "auto" and train.dtype.kind == "f")
    many = len(classes) > MOST_CLASSES and kind != "single"  # it may well be a number, but not if the user says so
    if not is_number and (many or len(classes) > max(10, len(train) / 2)):
        few = f"{len(classes):,} different labels in {len(train):,} rows are no classes"
        remedies = ["say that they are with --task single"] if 2 * len(classes) <= len(train) else []
        if train.dtype.kind != "O":
            remedies.append("predict a number with --task regression")
        elif all(re.fullmatch(r"[+-]?\d+,\d+", value) for value in classes):
            remedies.append(f"if {classes[0]} is a number, write it with a point")
        remedy = "".join(f", or {text}" for text in remedies)
        raise UsageError(f"--label-column {column}: {few}; name another column{remedy}")


def _words(cells: Mapping[str, np.ndarray], column: str, task: Task | None) -> Labels:
    names = sorted(set(cells["train"]).union(*cells.values()))
    notes = [_only_elsewhere(cells)]
    if lost := [repr(name) for name in names if re.fullmatch(_NONE_AMONG_WORDS, name)]:
        remedy = "if that means that there is no label, leave such rows out with --drop-unlabelled"
        notes.append(f"the labels hold {' and '.join(lost)}: {remedy}")
    others = [repr(name) for name in names if not _is_number(name)]
    if 0 < len(others) < len(names) / 2:
        notes.append(f"beside numbers the labels hold {_listed(others, 4)}, taken as classes too")
    if task is not None and task.label_names is not None and set(names) <= set(task.label_names):
        names = list(task.label_names)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(repr(name))
    twins = [" and ".join(some) for some in alike.values() if some[1:]]
    notes += [f"the labels {some} are classes of their own" for some in twins]
    return Labels(names, _numbered(cells, names, column), "; ".join(filter(None, notes[:5])))


def _numbers(cells: Mapping[str, np.ndarray], column: str, task: Task | None, kind: str) -> Labels:
    train, notes = cells["train"], []
    fractions = [key for key, values in cells.items() if values.dtype.kind == "f" and (values % 1 != 0).any()]
    is_regression = kind == "regression" or (kind == "auto" and task is not None and task.label_names is None)
    if is_regression or (kind == "auto" and train.dtype.kind == "f" and (fractions or len(np.unique(train)) > 20)):
        note = "" if is_regression else f"the labels in {column} are floats: a number is predicted, not a class"
        return Labels(None, {key: values.astype(np.float32) for key, values in cells.items()}, note)
    if train.dtype.kind == "f" and not fractions and kind == "auto":
        notes.append(f"the labels in {column} are whole floats, and taken as classes")
    elif fractions and kind == "auto":
        raise UsageError(
            f"--label-column {column}: the {fractions[0]} split holds floats and the training split whole numbers; "
            "write both as classes 0, 1, 2 ... or both as floats"
        )
    classes: list[Any] = np.unique(np.concatenate(list(cells.values()))).tolist()
    classes = [value if fractions else int(value) for value in classes]
    names = [str(bool(value)) if train.dtype.kind == "b" else str(value) for value in classes]
    if task is not None and task.label_names is not None and train.dtype.kind != "b":
        classes, names = list(range(len(task.label_names))), list(task.label_names)
    if classes != list(range(len(classes))):
        notes.append(f"the labels {_listed(names, 6)} in {column} are classes 0 to {len(names) - 1}")
        if classes[0] == -1 and (train >= -1).all():
            notes.append("if -1 means that there is no label, leave such rows out with --drop-unlabelled")
    if task is None:
        notes.append(_only_elsewhere(cells))
    return Labels(names, _numbered(cells, classes, column), "; ".join(filter(None, notes)))


def _only_elsewhere(cells: Mapping[str, np.ndarray]) -> str:
    """Which classes no training row has, in words."""
    known, found = set(cells["train"].tolist()), []
    for key, values in cells.items():
        if new := sorted(set(values.tolist()) - known):
            found.append(f"no training row has {_listed(map(str, new), 4)}, which the {key} split has")
    return "; ".join(found)


def _numbered(cells: Mapping[str, np.ndarray], classes: Sequence[Any], column: str) -> dict[str, np.ndarray]:
    """Each value -> its place among the classes, int64."""
    places, numbered = {value: i for i, value in enumerate(classes)}, {}
    for key, values in cells.items():
        found, inverse = np.unique(values, return_inverse=True)
        outside = [value for value in found.tolist() if value not in places]
        if outside:
            raise UsageError(
                f"--label-column {column}: the {key} split has the label {outside[0]}, which is not one of the "
                f"{len(places)} classes that the data set names"
            )
        numbered[key] = np.array([places[value] for value in found.tolist()], np.int64)[inverse]
    return numbered


def _several(splits: Mapping[str, Any], kinds: Kinds, columns: Sequence[str]) -> Labels:
    """Classes of which a row may have any number: see multilabel.py."""
    import datasets

    for column in columns:
        _check_missing(splits, kinds, column)
    if len(columns) > 1:
        cells = {key: {column: _cells(split, column) for column in columns} for key, split in splits.items()}
        names, values = classes_of_columns(cells)
    else:
        items = {key: getattr(split.features[columns[0]], "feature", None) for key, split in splits.items()}
        named = {key: list(item.names) for key, item in items.items() if isinstance(item, datasets.ClassLabel)}
        lists = {key: _cells(split, columns[0]) for key, split in splits.items()}
        names, values = classes_of_lists(lists, columns[0], named)
    empty = [name for name, count in zip(names, values["train"].sum(0), strict=True) if count == 0]
    note = f"no training row has {_listed(empty, 4)}" if empty else ""
    return Labels(names, values, note)


# --- small things -----------------------------------------------------------------------------------------------------


def _cells(rows: Any, column: str) -> Any:
    """A column of a datasets.Dataset -> pyarrow.ChunkedArray."""
    if rows._indices is None:  # underneath: a selection of one column copies the features of all, a thousand for each
        return rows.data.column(column)
    return rows.select_columns([column]).with_format("arrow")[:][column]


def _listed(names: Iterable[str], most: int = 12, last: str = ", ") -> str:
    """a, b, c; of more than `most` the first ones, and how many there are."""
    names = list(names)
    if len(names) > most:
        return f"{', '.join(names[:most])} ... ({len(names):,} in all)"
    return last.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else ", ".join(names)
