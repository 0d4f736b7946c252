"""Read a local table: csv, tsv, json lines or parquet, strictly, and find out from its cells what each column holds.

>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "reviews[1].csv")
...     _ = file.write_text('text,stars\\n"good, cheap",5\\nNone,1\\n')
...     table, kinds = read([file])
>>> table.to_pylist(), kinds
([{'text': 'good, cheap', 'stars': 5}, {'text': 'None', 'stars': 1}], {'text': 'text', 'stars': 'numbers'})

Underneath: `datasets.load_dataset` (datasets 5.2), called with "csv", "json" or "parquet" and data_files
  - takes a name as a pattern: data[1].csv reads data1.csv; here a name is a name;
  - knows a file by path and mtime, so new content under an old mtime stays unseen; here the file is read;
  - pandas, its csv reader, takes "None" as missing and surplus fields as an index; here "None" is text, and surplus
    fields are refused;
  - its quoting makes a lone quotation mark in a tsv swallow rows; here a tsv is quoted only if it must be.

Proof: test_every_kind_of_file_gives_the_same_rows_as_datasets, test_a_random_table_is_read_back_or_refused in
tests/data/test_files.py.
"""

from __future__ import annotations

import csv
import json
import re
import tempfile  # noqa: F401  (the example above)
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

from nanofinetune.ground.errors import UsageError, first_line

ENDINGS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
LONGEST = 1_000_000  # characters of a cell: a model reads a few thousand, and a tokenizer takes 100 bytes for each
LONGEST_LINE = 16 * LONGEST
MOST_COLUMNS = 5_000
MOST_ROWS = 100_000_000  # of a parquet file: a kilobyte can claim any number of equal rows
CELLS = 1_000_000  # that are Python objects at a time

Table = tuple[Any, dict[str, str]]  # a pyarrow.Table of the columns that can be used, and every column's kind


def format_of(file: Path) -> str | None:
    """csv, tsv, json or parquet, by the ending of the file's name in capitals or not; None for any other."""
    return ENDINGS.get(file.suffix.lower())


def read(files: Sequence[Path]) -> Table:
    """Files of one format, with the same columns -> (pyarrow.Table, kind of each column in the files' order).

    The table holds what can be used alone: columns of text and numbers. A number's empty cell is null, a text's is "".

    Raises:
        UsageError: names the file, the line and what is wrong with it.
    """
    import pyarrow as pa

    readers = {"csv": _read_csv, "tsv": _read_tsv, "json": _read_json, "parquet": _read_parquet}
    tables: list[Table] = []
    for file in files:
        with _failing_in_one_line(file):
            if file.stat().st_size == 0:
                raise UsageError(f"--data {file}: the file is empty; write a header and rows into it")
            tables.append(readers[str(format_of(file))](file))
        if tables[-1][0].num_rows == 0:
            raise UsageError(f"--data {file}: the file has a header and no rows; add rows")
        if tables[-1][1] != tables[0][1]:
            raise UsageError(f"--data {file}: its columns are not those of {files[0].name}; make them alike")
    with _failing_in_one_line(files[0]):
        names = tables[0][0].column_names
        return pa.concat_tables([t.select(names) for t, _ in tables], promote_options="permissive"), tables[0][1]


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


def _read_csv(file: Path) -> Table:
    return _typed_table(_strings(file, strict=True))


def _read_tsv(file: Path) -> Table:
    """Without quotes, as GLUE's own files are, which hold lone quotation marks; with them only if they are needed."""
    quoted = None
    with file.open("rb") as source:
        has_quotes = any(b'"' in block for block in iter(lambda: source.read(2**20), b""))
    if has_quotes:
        with suppress(UsageError):
            quoted = _strings(file, delimiter="\t", strict=True)
    try:
        plain = _strings(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    except UsageError:
        if quoted is None:
            raise
        return _typed_table(quoted)
    return _typed_table(plain if quoted is None or not _is_quoted(plain, quoted) else quoted)


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
    table, kinds = _table({name: _typed(column) for name, column in columns.items()})
    return table, kinds | {name: "nothing" for name, column in columns.items() if column.unique().to_pylist() == [""]}


def _strings(file: Path, **options: Any) -> dict[str, Any]:
    """The columns of a csv or tsv file as strings, with Python's csv and its options."""
    import pyarrow as pa

    before = csv.field_size_limit(LONGEST)
    try:
        with file.open(encoding="utf-8-sig", newline="") as source:
            reader = csv.reader(_lines(file, source), **options)
            header = next((row for row in reader if row), [])
            names = _column_names(file, header)
            chunks: list[list[Any]] = [[] for _ in names]
            for block in _blocks(file, reader, header):
                for cells, parts in zip(zip(*block, strict=True), chunks, strict=True):
                    parts.append(pa.array(cells, pa.string()))
    except csv.Error as error:
        text = f"line {reader.line_num}: {error}"
        if "field limit" in str(error):
            text = f"line {reader.line_num} holds a cell of more than {LONGEST:,} characters: unbalanced quotes?"
        elif "end of data" in str(error) or "expected after" in str(error):
            text += ": unbalanced quotes?"
        raise UsageError(f"--data {file}: it could not be read ({text}); correct the file") from error
    finally:
        csv.field_size_limit(before)
    columns = {name: pa.chunked_array(parts, pa.string()) for name, parts in zip(names, chunks, strict=True)}
    for name, column in columns.items():
        _check_for_header(file, name, column)
    return columns


def _blocks(file: Path, reader: Any, header: list[str]) -> Iterator[list[list[str]]]:
    """The rows below the header, some at a time, without blank lines, each with as many fields as the header."""
    line = reader.line_num
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
                        remedy = "a text with a comma in it needs quotes around it"
                    raise UsageError(f"--data {file}: it could not be read ({text}); {remedy}")
            block = [row for row in block if row]
        line = reader.line_num
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
_BOOLEAN = r"^(True|False|TRUE|FALSE|true|false)$"


def _typed(column: Any) -> Any:
    """A column of strings -> whole numbers, floats or booleans where every cell that is not empty is one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    filled = column.filter(pc.not_equal(column, ""))
    if len(filled) == 0:
        return column

    for pattern, type_ in ((_WHOLE, pa.int64()), (_FLOAT, pa.float64()), (_BOOLEAN, pa.bool_())):
        few, matches = filled.slice(0, 100), pc.match_substring_regex
        if pc.all(matches(few, pattern)).as_py() and pc.all(matches(filled, pattern)).as_py():
            if type_ == pa.float64() and not pc.any(matches(filled, r"\d")).as_py():
                return column  # the words nan and inf, and no number
            cells = pc.utf8_ltrim(pc.utf8_trim_whitespace(column), "+")
            with suppress(pa.ArrowInvalid):  # whole numbers beyond 64 bits become floats
                return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells).cast(type_)
    return column


# --- json -------------------------------------------------------------------------------------------------------------


def _read_json(file: Path) -> Table:
    """Objects, one a line or all in one list."""
    columns: dict[str, list[Any]] = {}  # name -> an array, or the kind of what cannot be used, for each block
    lengths: list[int] = []
    with file.open(encoding="utf-8-sig", newline="\n") as source:
        rows = _objects(file, source)
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


def _objects(file: Path, source: Any) -> Iterator[dict[str, Any]]:
    start = source.read(1)
    while start.isspace():
        start = source.read(1)
    try:
        number = 1
        if start == "[":
            source.seek(0)
            for number, row in enumerate(json.load(source), 1):
                yield _an_object(file, f"row {number}", row)
        elif start:
            source.seek(0)
            for number, line in enumerate(_lines(file, source), 1):
                if line.strip():
                    yield _an_object(file, f"line {number}", json.loads(line))
    except RecursionError as error:
        text = f"line {number} has lists in lists in lists, too deep to read"
        raise UsageError(f"--data {file}: it could not be read ({text}); flatten them") from error
    except json.JSONDecodeError as error:
        text = f"line {number + error.lineno - 1}, column {error.colno}: {error.msg}"
        raise UsageError(f"--data {file}: it could not be read ({text}); correct the file") from error


def _an_object(file: Path, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        text = f"{where} is no object with the columns' names"
        raise UsageError(f'--data {file}: it could not be read ({text}); write {{"text": ..., "label": ...}}')
    return row


def _json_cells(file: Path, name: str, values: list[Any], before: int) -> Any:
    """The values of one column in a block -> a pyarrow.Array, or what they are in words where they cannot be used."""
    import pyarrow as pa

    types = set(map(type, values)) - {type(None)}
    if types == {str}:
        try:
            return pa.array(values, pa.string())
        except UnicodeEncodeError as error:
            row = next(i for i, value in enumerate(values, before + 1) if value and _is_broken(value))
            text = f"row {row} of {name} holds half of a surrogate pair, which is no character"
            raise UsageError(f"--data {file}: it could not be read ({text}); correct the file") from error
    if types == {bool}:
        return pa.array(values, pa.bool_())
    if types == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if types and types <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if not types:
        return pa.nulls(len(values))
    return "lists" if types == {list} else "objects" if types == {dict} else "mixed types"


def _joined(parts: list[Any], lengths: list[int]) -> Any:
    """The blocks of a column, None where a block lacks it -> one pyarrow.ChunkedArray, or what it holds in words."""
    import pyarrow as pa

    odd = {part for part in parts if isinstance(part, str)}
    arrays = [pa.nulls(n) if part is None else part for part, n in zip(parts, lengths, strict=True)]
    types = {array.type for array in arrays if not isinstance(array, str)} - {pa.null()}
    if types == {pa.int64(), pa.float64()}:
        types = {pa.float64()}
    if odd:
        return odd.pop() if len(odd) == 1 and not types else "mixed types"
    if len(types) > 1:
        return "mixed types"
    type_ = types.pop() if types else pa.null()
    return pa.chunked_array([array.cast(type_) for array in arrays], type_)


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


# --- parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet, types

    with parquet.ParquetFile(file) as source:
        schema, rows = source.schema_arrow, source.metadata.num_rows
        if rows > MOST_ROWS:
            raise UsageError(f"--data {file}: it has {rows:,} rows, more than {MOST_ROWS:,}, the most that is read")
        kinds = dict(zip(_distinct(file, schema.names), map(kind_of, schema.types), strict=True))
        table = source.read([name for name, kind in kinds.items() if kind in ("text", "numbers")])
    for i, field in enumerate(table.schema):
        plain = field.type.value_type if types.is_dictionary(field.type) else field.type  # pandas' categories
        plain = pa.float64() if types.is_decimal(plain) or types.is_float16(plain) else plain
        if plain != field.type:
            table = table.set_column(i, field.name, table.column(i).cast(plain))
    # What pandas wrote beside the columns: the number of a row, as a rule, or what the user had made the index.
    index = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    return table, kinds | {name: "an index" for name in index if isinstance(name, str) and name in kinds}


# --- what all have in common ------------------------------------------------------------------------------------------


def _table(columns: Mapping[str, Any]) -> Table:
    import pyarrow as pa

    kinds = {name: kind_of(column.type) for name, column in columns.items()}
    return pa.table({name: columns[name] for name, kind in kinds.items() if kind in ("text", "numbers")}), kinds


def _distinct(file: Path, names: list[str]) -> list[str]:
    if len(names) > MOST_COLUMNS:
        raise UsageError(f"--data {file}: it has more than {MOST_COLUMNS:,} columns, the most that is read; keep a few")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--data {file}: two of its columns are named {twice}; rename one")
    return names


def _lines(file: Path, source: Any) -> Iterator[str]:
    """A file's lines. Raises UsageError for one that is too long, and has read no more of it."""
    for number in count(1):
        line = source.readline(LONGEST_LINE)
        if len(line) == LONGEST_LINE:
            text = f"line {number} has more than {LONGEST_LINE:,} characters: is it text?"
            raise UsageError(f"--data {file}: it could not be read ({text}); correct the file")
        if not line:
            return
        yield line


@contextmanager
def _failing_in_one_line(file: Path) -> Iterator[None]:
    """Whatever a library raises becomes one line that names the file."""
    try:
        yield
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        cause = f"byte 0x{error.object[error.start]:02x} is not UTF-8: convert the file, for example with iconv"
        raise UsageError(f"--data {file}: it could not be read ({cause})") from error
    except Exception as error:
        raise UsageError(f"--data {file}: it could not be read ({first_line(error)}); correct the file") from error
