"""Read a local table strictly (csv, tsv, json, parquet, Excel), and find out from its cells what each column holds.

>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "reviews[1].csv")
...     _ = file.write_text('text,stars\\n"good, cheap",5\\nNone,1\\n')
...     table, kinds = read([file])
>>> table.to_pylist(), kinds
([{'text': 'good, cheap', 'stars': 5}, {'text': 'None', 'stars': 1}], {'text': 'text', 'stars': 'numbers'})

Underneath: `datasets.load_dataset` (datasets 5.2), called with "csv", "json" or "parquet" and data_files
  - takes a name as a pattern: data[1].csv reads data1.csv; here a name is a name;
  - knows a file by path and mtime, so new content under an old mtime stays unseen; here the file is read;
  - pandas, its csv reader, takes "None" as missing, surplus fields as an index and ";" as text; here "None" is text,
    surplus fields are refused, and separators told apart;
  - its quoting makes a lone quotation mark in a tsv swallow rows; here a tsv is quoted only if it must be.

Proof: test_every_kind_of_file_gives_the_same_rows_as_datasets, test_a_random_table_is_read_back_or_refused in
tests/data/test_files.py.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import tempfile  # noqa: F401  (the example above)
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from nanofinetune.data.unpack import bare, check_archive, name_inside, opened
from nanofinetune.ground.errors import UsageError, first_line

ENDINGS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet",
    ".xlsx": "xlsx",
}  # fmt: skip
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LONGEST = 1_000_000  # characters of a cell: a model reads a few thousand, and a tokenizer takes 100 bytes for each
LONGEST_LINE = 16 * LONGEST
LONGEST_LIST = 2**28  # characters of a json list, or of an object with one, which is held as a whole
MOST_COLUMNS = 5_000
MOST_ROWS = 100_000_000  # of a parquet file: a kilobyte can claim any number of equal rows
CELLS = 1_000_000  # that are Python objects at a time

BROKEN = "holds half of a surrogate pair, which is no character"  # said of a text, where `is_broken`
MIXED = "mixed types"  # so begins the kind of a column whose cells are of several kinds

Found = dict[str, tuple[int, int, Any]]  # kinds of the cells of a column -> how many, the row of the first, the first
Table = tuple[Any, dict[str, str]]  # a pyarrow.Table of the columns that can be used, and every column's kind


class Dialect(NamedTuple):
    """How the user says that a text file is written; None: it is found out."""

    separator: str | None = None
    encoding: str | None = None


FOUND_OUT = Dialect()


def dialect(separator: str | None = None, encoding: str | None = None) -> Dialect:
    """What --separator and --encoding say. Raises UsageError for what Python's csv and its codecs do not know."""
    if separator is not None:
        separator = {"tab": "\t", "\\t": "\t"}.get(separator, separator)
        if len(separator) != 1 or separator in '"\r\n ':
            raise UsageError(f"--separator {separator}: name one character, such as ; or |, or tab")
    if encoding is not None:
        try:
            "".encode(encoding)  # underneath: `codecs.lookup` also knows base64 and the like, which are no texts
            encoding = {"utf-8": "utf-8-sig"}.get(name := codecs.lookup(encoding).name, name)
        except (LookupError, ValueError) as error:
            text = "Python knows no such encoding; utf-8, utf-16, cp1252 and latin-1 are common"
            raise UsageError(f"--encoding {encoding}: {text}") from error
    return Dialect(separator, encoding)


def format_of(file: Path) -> str | None:
    """csv, tsv, json, parquet or xlsx, by the ending of the name, in capitals or not, .gz and the like left away.

    "zip" where only the archive itself can tell; None for any other.
    """
    name, packed = bare(file)
    known = ENDINGS.get(Path(name).suffix.lower())
    return "zip" if packed == ".zip" and known is None else known


def stem_of(file: Path) -> str:
    """The name without the endings that say what it is: train.csv.gz -> train."""
    name = bare(file)[0]
    return Path(name).stem if Path(name).suffix.lower() in ENDINGS else name


def format_inside(file: Path) -> str:
    """The format of a file, or of the file in an archive. Raises ValueError where it is none that can be read."""
    inside = Path(name_inside(file))
    found = format_of(inside)
    if found is None and format_of(file) in ("zip", None):
        raise ValueError(f"{inside.name} in it has no ending that is known: {', '.join(ENDINGS)}")
    return str(found or format_of(file))


def read(files: Sequence[Path], how: Dialect = FOUND_OUT) -> Table:
    """Files of one format, with the same columns -> (pyarrow.Table, kind of each column in the files' order).

    The table holds what can be used alone: columns of text and numbers, and of flat lists of these. A number's empty
    cell is null, a text's is "".

    Raises:
        UsageError: names the file, the line and what is wrong with it.
    """
    import pyarrow as pa

    readers = {
        "csv": _read_csv, "tsv": _read_tsv, "json": _read_json, "parquet": _read_parquet, "xlsx": _read_xlsx,
    }  # fmt: skip
    tables: list[Table] = []
    for file in files:
        with failing_in_one_line(file):
            if file.stat().st_size == 0:
                raise UsageError(f"--data {file}: the file is empty; write a header and rows into it")
            kind = format_inside(file)
            for flag, value, kinds in (
                ("--separator", how.separator, ("csv", "tsv")), ("--encoding", how.encoding, ("csv", "tsv", "json")),
            ):  # fmt: skip
                if value is not None and kind not in kinds:
                    raise UsageError(f"{flag} {value}: {file.name} is a {kind} file, which has none; leave it out")
            tables.append(readers[kind](file, how))
        if tables[-1][0].num_rows == 0:
            raise UsageError(f"--data {file}: the file has a header and no rows; add rows")
        if _alike(tables[-1][1]) != _alike(tables[0][1]):
            raise UsageError(f"--data {file}: its columns are not those of {files[0].name}; make them alike")
        with failing_in_one_line(file):
            ours, first = _classes_of(tables[-1][0].schema), _classes_of(tables[0][0].schema)
        # underneath: concat_tables keeps what the first file says of the columns, and 0 may be another class here
        for name in ours.keys() | first.keys():
            if ours.get(name) != first.get(name):
                what = f"its classes of {name} are not those of {files[0].name}"
                raise UsageError(f"--data {file}: {what}; make them alike")
    with failing_in_one_line(files[0]):
        names = tables[0][0].column_names
        return pa.concat_tables([t.select(names) for t, _ in tables], promote_options="permissive"), tables[0][1]


def _classes_of(schema: Any) -> dict[str, list[str]]:
    """The names of classes that `datasets` has written beside the columns, or their lists, of a parquet file."""
    import datasets

    features = datasets.Features.from_arrow_schema(schema)  # raises for what is no such writing
    items = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: item.names for name, item in items.items() if isinstance(item, datasets.ClassLabel)}


def _alike(kinds: Mapping[str, str]) -> dict[str, str]:
    """The kinds without the row in which a column's first odd cell is."""
    return {name: MIXED if kind.startswith(MIXED) else kind for name, kind in kinds.items()}


def kind_of(type_: Any) -> str:
    """What values of a pyarrow type are, in words. Only `text` and `numbers` can be used."""
    from pyarrow import types

    if types.is_dictionary(type_):
        return kind_of(type_.value_type)
    for words, *checks in (
        ("text", types.is_string, types.is_large_string, types.is_string_view),
        ("numbers", types.is_integer, types.is_floating, types.is_boolean, types.is_decimal),
        ("dates", types.is_temporal),
        ("lists", types.is_list, types.is_large_list, types.is_fixed_size_list),
        ("objects", types.is_struct, types.is_map),
        ("bytes", types.is_binary, types.is_large_binary, types.is_fixed_size_binary),
        ("nothing", types.is_null),
    ):
        if any(check(type_) for check in checks):
            return words
    return str(type_)


# --- csv and tsv ------------------------------------------------------------------------------------------------------


def _read_csv(file: Path, how: Dialect) -> Table:
    return _typed_table(strings_of(file, "csv", how)[0])


def _read_tsv(file: Path, how: Dialect) -> Table:
    return _typed_table(strings_of(file, "tsv", how)[0])


def strings_of(file: Path, kind: str, how: Dialect) -> tuple[dict[str, Any], str]:
    """All columns of a csv or tsv file as they are written, and what separates them.

    A tsv is read without quotes, as GLUE's own files are, which hold lone quotation marks; with them only if they are
    needed. In a csv quotes are quotes, and commas, semicolons, tabs and bars are told apart.
    """
    if kind == "csv":
        separator = how.separator or _find_separator(file, how)
        return _strings(file, how, delimiter=separator, strict=True), separator
    separator, quoted = how.separator or "\t", None
    with opened(file) as source:
        has_quotes = any(b'"' in block for block in iter(lambda: source.read(2**20), b""))
    if has_quotes:
        with suppress(UsageError):
            quoted = _strings(file, how, delimiter=separator, strict=True)
    try:
        plain = _strings(file, how, delimiter=separator, quoting=csv.QUOTE_NONE)
    except UsageError:
        if quoted is None:
            raise
        return quoted, separator
    return (plain if quoted is None or not _is_quoted(plain, quoted) else quoted), separator


def _find_separator(file: Path, how: Dialect) -> str:
    """The one of SEPARATORS that the header has; where it has several, the one that the rows have as often as it."""
    widths: dict[str, list[int]] = {}
    for mark in SEPARATORS:
        with _long_cells(), suppress(csv.Error), _lines(file, how) as (lines, named):
            if named:
                return named
            rows = filter(None, csv.reader(lines, delimiter=mark, strict=True))
            if (fields := len(next(rows, []))) > 1:
                widths[mark] = [fields, 0]  # until its rows have been read
                widths[mark] = [fields, *map(len, islice(rows, 1000))]
    if len(widths) < 2:
        return next(iter(widths), ",")
    alike = [mark for mark, found in widths.items() if len(set(found)) == 1]
    alike = alike or [mark for mark, found in widths.items() if found[0] in found[1:]]
    if len(alike) == 1:
        return alike[0]
    which = " or ".join(SEPARATORS[mark] for mark in alike or widths)
    raise UsageError(f"--data {file}: are its columns separated by {which}? Name one with --separator")


@contextmanager
def text_of(file: Path, how: Dialect, newline: str = "") -> Iterator[Any]:
    """The file as text: in UTF-8, in what its first bytes say, or in the encoding that the user named."""
    with opened(file) as source:
        marks = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
        found = how.encoding or marks.get(source.peek(2)[:2], "utf-8-sig")
        with io.TextIOWrapper(source, encoding=found, newline=newline) as text:
            yield text


@contextmanager
def _lines(file: Path, how: Dialect) -> Iterator[tuple[Iterator[str], str]]:
    """The lines of a csv or tsv file, and the separator that a first line `sep=;` of Excel's names, else ""."""
    with text_of(file, how) as source:
        lines = _bounded(file, source)
        first = next(lines, "")
        named = re.fullmatch(r"sep=(.)\s*", first)
        yield (lines, named[1]) if named else (chain([first], lines), "")


def _is_quoted(plain: Mapping[str, Any], quoted: Mapping[str, Any]) -> bool:
    """Of the two readings of a file: whether the header is quoted, or a cell holds marks that quoting has doubled."""
    import pyarrow.compute as pc

    if all(name.startswith('"') for name in plain):
        return True
    if [len(column) for column in plain.values()] != [len(column) for column in quoted.values()]:
        return False  # lone marks, between which whole rows are gone
    pairs = zip(plain.values(), quoted.values(), strict=True)
    return any(pc.any(pc.and_(pc.starts_with(p, '"'), pc.match_substring(q, '"'))).as_py() for p, q in pairs)


def _typed_table(columns: dict[str, Any]) -> Table:
    table, kinds = _table({name: typed(column) for name, column in columns.items()})
    return table, kinds | {name: "nothing" for name, column in columns.items() if column.unique().to_pylist() == [""]}


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _strings(file: Path, how: Dialect, **options: Any) -> dict[str, Any]:
    """The columns of a csv or tsv file as strings, with Python's csv and its options."""
    import pyarrow as pa

    try:
        with _long_cells(), _lines(file, how) as (lines, named):
            reader = csv.reader(lines, **options)
            header = next((row for row in reader if row), [])
            names = _column_names(file, header)
            chunks: list[list[Any]] = [[] for _ in names]
            for block in _blocks(file, reader, header, above=bool(named)):
                for cells, parts in zip(zip(*block, strict=True), chunks, strict=True):
                    parts.append(pa.array(cells, pa.string()))
    except csv.Error as error:
        text = f"line {reader.line_num}: {error}"
        if "field limit" in str(error):
            text = f"line {reader.line_num} holds a cell of more than {LONGEST:,} characters: unbalanced quotes?"
        elif "end of data" in str(error) or "expected after" in str(error):
            text += ": unbalanced quotes?"
        raise UsageError(f"--data {file}: it could not be read ({text}); correct the file") from error
    columns = {name: pa.chunked_array(parts, pa.string()) for name, parts in zip(names, chunks, strict=True)}
    for name, column in columns.items():
        _check_for_header(file, name, column)
    return columns


def _blocks(file: Path, reader: Any, header: list[str], above: int) -> Iterator[list[list[str]]]:
    """The rows below the header, some at a time, without blank lines, each with as many fields as the header.

    `above`: lines of the file that the reader has not seen.
    """
    line = reader.line_num + above
    while block := list(islice(reader, max(1, CELLS // len(header)))):
        if set(map(len, block)) != {len(header)} or header in block:
            for row in block:
                line += 1 + sum(cell.count("\n") for cell in row)
                if row == header:
                    raise UsageError(f"--data {file}: line {line} is the header again; remove it")
                if row and len(row) != len(header):
                    text = f"line {line} has {len(row)} fields and the header {len(header)}"
                    remedy = "fill it in"
                    if len(row) > len(header):
                        mark = SEPARATORS.get(reader.dialect.delimiter, "separators").removesuffix("s")
                        remedy = f"a text with a {mark} in it needs quotes around it"
                        if not any(row[len(header) :]):
                            remedy = f"remove the {mark} at its end, or name one more column in the header"
                    raise UsageError(f"--data {file}: it could not be read ({text}); {remedy}")
            block = [row for row in block if row]
        line = reader.line_num + above
        if block:
            yield block


def _column_names(file: Path, header: list[str]) -> list[str]:
    """The header's names; a column without one is called as pandas calls it. Refuses what is no header."""
    header = [name.strip() for name in header]
    if not any(header):
        raise UsageError(f"--data {file}: the file has no header; write a line of column names above the rows")
    given = [name for name in header if name]
    numbers = [name for name in given if _NUMBER.fullmatch(name)]
    if numbers and given != [str(i) for i in range(len(given))]:  # pandas counts columns that nobody named
        raise UsageError(
            f"--data {file}: is the first line a header? It holds the number {numbers[0]}; "
            "write a line of column names above the rows"
        )
    return _distinct(file, [name or f"Unnamed: {i}" for i, name in enumerate(header)])


def _check_for_header(file: Path, name: str, column: Any) -> None:
    """Refuse a column of a few words, each many times, of which its name is one: the first line was a row."""
    import pyarrow.compute as pc

    if not name.isdigit() and pc.any(pc.equal(column, name)).as_py() and 2 * len(column.unique()) <= len(column):
        raise UsageError(
            f"--data {file}: is the first line a header? {name} is a column's name and a value in that column; "
            "write a line of column names above the rows"
        )


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WHOLE = r"^\s*[+-]?\d+\s*$"
_FLOAT = rf"(?i)^\s*({_NUMBER.pattern}|[+-]?(nan|inf|infinity))\s*$"
_CODE = r"^\s*[+-]?0\d+\s*$"
_BOOLEAN = r"^(True|False|TRUE|FALSE|true|false)$"


def has_codes(column: Any) -> bool:
    """Whether a column of strings has a number with a zero in front: 01 is a name, and another one than 1."""
    import pyarrow.compute as pc

    return bool(pc.any(pc.match_substring_regex(column, _CODE)).as_py())


def typed(column: Any) -> Any:
    """A column of strings -> whole numbers, floats or booleans where every cell that is not empty is one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    filled = column.filter(pc.not_equal(column, ""))
    if len(filled) == 0:
        return column

    for pattern, type_ in ((_WHOLE, pa.int64()), (_FLOAT, pa.float64()), (_BOOLEAN, pa.bool_())):
        few, matches = filled.slice(0, 100), pc.match_substring_regex
        if pc.all(matches(few, pattern)).as_py() and pc.all(matches(filled, pattern)).as_py():
            if has_codes(filled):
                return column
            if type_ == pa.float64() and not pc.any(matches(filled, r"\d")).as_py():
                return column  # the words nan and inf, and no number
            cells = pc.utf8_ltrim(pc.utf8_trim_whitespace(column), "+")
            with suppress(pa.ArrowInvalid):  # whole numbers beyond 64 bits become floats
                return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells).cast(type_)
    return column


# --- json -------------------------------------------------------------------------------------------------------------


def _read_json(file: Path, how: Dialect) -> Table:
    """Objects, one a line, all in one list, or in a list under a key; or one object of columns."""
    columns: dict[str, list[Any]] = {}  # name -> an array, or Found, for each block
    lengths: list[int] = []
    with text_of(file, how, newline="\n") as source:
        rows = objects_of(file, source)
        first = next(rows, None)
        size = max(1, min(10_000, CELLS // max(1, len(first or ()))))
        block = [] if first is None else [first, *islice(rows, size - 1)]
        while block:
            names = dict.fromkeys(name for row in block for name in row)
            _distinct(file, [*columns, *(name for name in names if name not in columns)])
            cells: dict[str, list[Any]] = {name: [None] * len(block) for name in names}
            for i, row in enumerate(block):
                for name, value in row.items():
                    cells[name][i] = value
            for name, values in cells.items():
                part = _json_cells(file, name, values, sum(lengths))
                columns.setdefault(name, [None] * len(lengths)).append(part)
            lengths.append(len(block))
            for parts in columns.values():
                parts += [None] * (len(lengths) - len(parts))
            block = list(islice(rows, size))
    found = {name: _joined(parts, lengths) for name, parts in columns.items()}
    table, kinds = _table({name: column for name, column in found.items() if not isinstance(column, str)})
    return table, {name: column if isinstance(column, str) else kinds[name] for name, column in found.items()}


def objects_of(file: Path, source: Any) -> Iterator[dict[str, Any]]:
    """The rows of a json file that is open as text. Raises UsageError naming the line of what is none."""
    number, filled = 1, ((n, line) for n, line in enumerate(_bounded(file, source), 1) if line.strip())
    try:
        first = next(filled, None)
        if first is None:
            return
        number = first[0]
        if not _is_a_row(first[1]):
            whole = first[1] + source.read(max(0, LONGEST_LIST + 1 - len(first[1])))
            if len(whole) > LONGEST_LIST:
                text = f"one list or object of more than {LONGEST_LIST:,} characters, the most that is read as a whole"
                raise UsageError(f"--data {file}: it is {text}; write one row a line, as .jsonl")
            yield from _rows_in(file, _loads(whole))
            return
        second = next(filled, None)
        if second is None:
            only = _loads(first[1])
            if _is_columns(only) or _is_numbered(only) or any(map(_is_table, only.values())):
                yield from _rows_in(file, only)
                return
        for number, line in chain([first], [second] if second else (), filled):
            yield _an_object(file, f"line {number}", _loads(line))
    except RecursionError as error:
        text = f"line {number} has lists in lists in lists, too deep to read"
        raise UsageError(f"--data {file}: it could not be read ({text}); flatten them") from error
    except json.JSONDecodeError as error:
        text = f"line {number + error.lineno - 1}, column {error.colno}: {error.msg}"
        raise UsageError(f"--data {file}: it could not be read ({text}); correct the file") from error


class _Twice(dict[str, Any]):
    """An object that is written with one of its names twice."""

    name = ""


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found = _Twice(found)
        found.name = next(name for name in names if names.count(name) > 1)
    return found


_loads = json.JSONDecoder(object_pairs_hook=_as_dict).decode  # underneath: json.loads keeps the last of two values


def _is_a_row(line: str) -> bool:
    """Whether the first line is an object of its own: not a list, and not the beginning of an indented object."""
    return line.lstrip()[0] == "{" and line.rstrip()[-1] == "}"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_columns(whole: Any) -> bool:
    """Whether a file is one object of columns: lists of one length, or what pandas' to_json writes, {"row": cell}."""
    columns = list(whole.values()) if isinstance(whole, dict) else []
    if not columns or any(type(column) is not type(columns[0]) or not column for column in columns):
        return False
    if isinstance(columns[0], dict):
        return all(map(str.isdecimal, columns[0])) and all(column.keys() == columns[0].keys() for column in columns)
    alike = isinstance(columns[0], list) and all(len(column) == len(columns[0]) for column in columns)
    return alike and len(columns) > 1 and not any(map(_is_table, columns))


def _is_numbered(whole: Any) -> bool:
    """Whether a file is one object of rows under their numbers, as pandas' to_json(orient="index") writes it."""
    rows = whole if isinstance(whole, dict) else {}
    return bool(rows) and all(map(str.isdecimal, rows)) and all(isinstance(row, dict) for row in rows.values())


def _rows_in(file: Path, whole: Any) -> Iterator[dict[str, Any]]:
    """The rows of a list, of the one list of rows under a key, or of an object of columns or of rows."""
    if isinstance(whole, dict):
        for where, value in (("it", whole), *((f"its {name}", value) for name, value in whole.items())):
            _check_twice(file, where, value)
    if _is_columns(whole):
        columns = [column.values() if isinstance(column, dict) else column for column in whole.values()]
        whole = [dict(zip(whole, cells, strict=True)) for cells in zip(*columns, strict=True)]
    elif _is_numbered(whole):
        whole = list(whole.values())
    if isinstance(whole, dict):
        tables = [key for key, value in whole.items() if _is_table(value)]
        if len(tables) != 1:
            found = f"rows under {' and '.join(tables)}" if tables else "no list of rows under any key"
            raise UsageError(f'--data {file}: it holds {found}; write {{"data": [{{"text": ..., "label": ...}}, ...]}}')
        whole = whole[tables[0]]
    for number, row in enumerate(whole, 1):
        yield _an_object(file, f"row {number}", row)


def _an_object(file: Path, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        text = f"{where} is no object with the columns' names"
        raise UsageError(f'--data {file}: it could not be read ({text}); write {{"text": ..., "label": ...}}')
    _check_twice(file, where, row)
    return row


def _check_twice(file: Path, where: str, value: Any) -> None:
    if isinstance(value, _Twice):
        text = f"{where} has {value.name} twice"
        raise UsageError(f"--data {file}: it could not be read ({text}); leave one of them, or rename it")


def _json_cells(file: Path, name: str, values: list[Any], before: int) -> Any:
    """The values of one column in a block -> a pyarrow.Array, or what was found in them where they cannot be used.

    `before`: the rows above.
    """
    import pyarrow as pa

    types = set(map(type, values)) - {type(None)}
    if types == {str}:
        try:
            return pa.array(values, pa.string())
        except UnicodeEncodeError as error:
            row = next(i for i, value in enumerate(values, before + 1) if value and is_broken(value))
            text = f"row {row} of {name} {BROKEN}"
            raise UsageError(f"--data {file}: it could not be read ({text}); correct the file") from error
    if types == {bool}:
        return pa.array(values, pa.bool_())
    if types == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if types and types <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if not types:
        return pa.nulls(len(values))
    if types == {list}:
        with suppress(pa.ArrowException, UnicodeEncodeError, OverflowError):
            if {type(item) for value in values for item in value or ()} <= {str, int, float, bool}:
                return pa.array(values)
    return _found_in(values, before)


def _found_in(values: Iterable[Any], before: int) -> Found:
    found: Found = {}
    kinds = {str: "text", bool: "booleans", int: "numbers", float: "numbers", list: "lists", dict: "objects"}
    for row, value in enumerate(values, before + 1):
        if value is not None:
            kind = kinds.get(type(value), "dates")
            count, *first = found.get(kind, (0, row, value))
            found[kind] = count + 1, *first
    return found


def _joined(parts: list[Any], lengths: list[int]) -> Any:
    """The blocks of a column, None where a block lacks it -> one pyarrow.ChunkedArray, or what it holds in words."""
    import pyarrow as pa

    odd = [part for part in parts if isinstance(part, dict)]
    arrays = [pa.nulls(n) if part is None else part for part, n in zip(parts, lengths, strict=True)]
    types = {array.type for array in arrays if not isinstance(array, dict)} - {pa.null()}
    if types == {pa.int64(), pa.float64()}:
        types = {pa.float64()}
    kinds = {kind for part in odd for kind in part} | {kind_of(type_) for type_ in types}
    if kinds == {"lists"}:
        types = types - {pa.list_(pa.null())} or types  # empty ones
        types = {pa.list_(pa.float64())} if types == {pa.list_(pa.int64()), pa.list_(pa.float64())} else types
    if odd or len(types) > 1:
        alike = len(kinds) == 1 and (odd or kinds == {"lists"})
        return kinds.pop() if alike else _mixed(arrays, lengths)
    type_ = types.pop() if types else pa.null()
    return pa.chunked_array([array.cast(type_) for array in arrays], type_)


def _mixed(parts: list[Any], lengths: list[int]) -> str:
    """What most cells of a column are, whose cells are of several kinds, and the first that is something else."""
    import pyarrow.compute as pc

    counts, firsts, before = dict[str, int](), dict[str, tuple[int, Any]](), 0
    for part, length in zip(parts, lengths, strict=True):
        if not isinstance(part, dict):
            at, count = pc.index(pc.is_valid(part), True).as_py(), length - part.null_count
            kind = "booleans" if str(part.type) == "bool" else kind_of(part.type)
            part = {kind: (count, before + at + 1, part[at].as_py())} if count else {}
        for kind, (count, row, cell) in part.items():
            counts[kind] = counts.get(kind, 0) + count
            firsts.setdefault(kind, (row, cell))
        before += length
    most = max(counts, key=counts.__getitem__)
    row, cell = min((firsts[kind] for kind in firsts if kind != most), key=lambda first: first[0])
    shown = json.dumps(cell, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return f"{MIXED} ({most}, and {shown if len(shown) <= 40 else f'{shown[:40]}...'} in row {row:,})"


def is_broken(text: str) -> bool:
    """Whether a text is one that a tokenizer raises for: json and UTF-7 can hold what no other text can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# --- parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path, how: Dialect) -> Table:
    import pyarrow as pa
    from pyarrow import parquet, types

    with opened(file) as raw, parquet.ParquetFile(pa.BufferReader(raw.read()) if bare(file)[1] else raw) as source:
        schema, rows = source.schema_arrow, source.metadata.num_rows
        if rows > MOST_ROWS:
            raise UsageError(f"--data {file}: it has {rows:,} rows, more than {MOST_ROWS:,}, the most that is read")
        kinds = dict(zip(_distinct(file, schema.names), map(kind_of, schema.types), strict=True))
        table = source.read([name for name in schema.names if _can_be_used(schema.field(name).type)])
    for i, field in enumerate(table.schema):
        plain = field.type.value_type if types.is_dictionary(field.type) else field.type  # pandas' categories
        plain = pa.float64() if types.is_decimal(plain) or types.is_float16(plain) else plain
        if plain != field.type:
            table = table.set_column(i, field.name, table.column(i).cast(plain))
    # What pandas wrote beside the columns: the number of a row, as a rule, or what the user had made the index.
    index = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    return table, kinds | {name: "an index" for name in index if isinstance(name, str) and name in kinds}


# --- Excel ------------------------------------------------------------------------------------------------------------


def _read_xlsx(file: Path, how: Dialect) -> Table:
    header, rows = sheet_of(file)
    columns = [list(cells) for cells in zip(*rows, strict=True)] or [[] for _ in header]
    found = {name: _sheet_cells(file, name, cells) for name, cells in zip(header, columns, strict=True)}
    table, kinds = _table({name: column for name, column in found.items() if not isinstance(column, str)})
    for name, column in zip(table.column_names, table.columns, strict=True):
        if kind_of(column.type) == "text":
            _check_for_header(file, name, column)
    return table, {name: column if isinstance(column, str) else kinds[name] for name, column in found.items()}


def sheet_of(file: Path) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The names and the rows of the one sheet of a workbook that has any; a formula is its last value."""
    try:
        import openpyxl
    except ImportError as error:
        remedy = "install it (pip install 'nanofinetune[excel]'), or save the sheet as csv"
        raise UsageError(f"--data {file}: reading Excel files needs openpyxl; {remedy}") from error

    with opened(file) as raw:
        content = io.BytesIO(raw.read())
    check_archive(content, content.getbuffer().nbytes)
    book = openpyxl.load_workbook(content, read_only=True, data_only=True)
    sheets = {}
    for sheet in book.worksheets:
        rows = [tuple(row) for row in sheet.iter_rows(values_only=True) if any(cell is not None for cell in row)]
        if rows:
            sheets[sheet.title] = rows
    if len(sheets) != 1:
        shown = ", ".join(sheets) or "none"
        raise UsageError(f"--data {file}: one sheet with rows is read, and it has {len(sheets)} ({shown}); leave one")
    (header, *rows), width = next(iter(sheets.values())), 0
    width = max(max((i + 1 for i, cell in enumerate(row) if cell is not None), default=0) for row in [header, *rows])
    names = _column_names(file, ["" if cell is None else str(cell) for cell in header[:width]])
    return names, [(*row[:width], *[None] * (width - len(row))) for row in rows]


def _sheet_cells(file: Path, name: str, cells: list[Any]) -> Any:
    """The cells of a column, as those of json; beside a text a number is a text, and so is an empty cell."""
    types = set(map(type, cells)) - {type(None)}
    if str in types and types <= {str, int, float, bool}:
        cells = ["" if cell is None else str(cell) for cell in cells]
    return _joined([_json_cells(file, name, cells, 0)], [len(cells)])


# --- what all have in common ------------------------------------------------------------------------------------------


def _table(columns: Mapping[str, Any]) -> Table:
    import pyarrow as pa

    kinds = {name: kind_of(column.type) for name, column in columns.items()}
    return pa.table({name: column for name, column in columns.items() if _can_be_used(column.type)}), kinds


def _can_be_used(type_: Any) -> bool:
    """Whether a column of a pyarrow type can be a text or a label: text, numbers, and flat lists of these."""
    kind = kind_of(type_)
    return kind in ("text", "numbers") or (kind == "lists" and kind_of(type_.value_type) in ("text", "numbers"))


def _distinct(file: Path, names: list[str]) -> list[str]:
    if len(names) > MOST_COLUMNS:
        raise UsageError(f"--data {file}: it has more than {MOST_COLUMNS:,} columns, the most that is read; keep a few")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--data {file}: two of its columns are named {twice}; rename one")
    return names


def _bounded(file: Path, source: Any) -> Iterator[str]:
    """A file's lines. Raises UsageError for one that is too long, and has read no more of it; a json list is longer."""
    for number in count(1):
        line = source.readline(LONGEST_LINE)
        if len(line) == LONGEST_LINE and number == 1 and line.startswith("["):
            line += source.readline(LONGEST_LIST + 1 - len(line))
        elif len(line) == LONGEST_LINE:
            text = f"line {number} has more than {LONGEST_LINE:,} characters: is it text?"
            raise UsageError(f"--data {file}: it could not be read ({text}); correct the file")
        if not line:
            return
        yield line


@contextmanager
def failing_in_one_line(file: Path, flag: str = "--data") -> Iterator[None]:
    """Whatever a library raises becomes one line that names the file, and what it was given as."""
    try:
        yield
    except UsageError as error:
        if flag == "--data":
            raise
        raise UsageError(str(error).replace("--data", flag, 1)) from error
    except UnicodeDecodeError as error:
        known = error.encoding.upper() if error.encoding.startswith("utf") else error.encoding
        cause = f"byte 0x{error.object[error.start]:02x} is not {known.replace('UTF8', 'UTF-8')}"
        remedy = "name its encoding with --encoding, such as cp1252 or utf-16"
        raise UsageError(f"{flag} {file}: it could not be read ({cause}); {remedy}") from error
    except Exception as error:
        raise UsageError(f"{flag} {file}: it could not be read ({first_line(error)}); correct the file") from error
