"""The rows of a table as they are, and the same rows written again with more columns: what predict reads and writes.

>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "reviews.csv")
...     _ = file.write_text('text;stars\\n"good; cheap";05\\n')
...     rows = read_rows(file)
...     with new_file(Path(folder, "out.csv")) as target:
...         labelled = ([row | {"label": "yes"} for row in block] for block in rows.blocks)
...         write_rows(target, "csv", labelled, rows, {"label": "yes"})
...     print(Path(folder, "out.csv").read_text(), end="")
text;stars;label
"good; cheap";05;yes

Underneath: `datasets.Dataset.to_csv` and `datasets.Dataset.to_parquet` (datasets 5.2), after `datasets.load_dataset`
  - there 05 becomes 5, and "NA" an empty cell; here every cell that nobody changes is written as it was read;
  - there a json column that only later rows have may be lost; here all are known before the first row is written;
  - there a file that exists is written over; here it is refused, and a new one gets its name when it is complete.

Proof: test_a_table_is_written_as_it_was_read, test_nothing_that_exists_is_written_over,
test_random_objects_are_written_and_read_back_or_refused in tests/data/test_rows.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from nanofinetune.data.files import (
    BROKEN,
    FOUND_OUT,
    MOST_COLUMNS,
    Dialect,
    failing_in_one_line,
    format_inside,
    objects_of,
    sheet_of,
    strings_of,
    text_of,
)
from nanofinetune.data.unpack import bare, opened
from nanofinetune.ground.errors import UsageError, first_line
from nanofinetune.ground.names import give_name

BLOCK = 4096  # rows that are Python objects at a time
WRITTEN = ("csv", "tsv", "jsonl", "parquet")
Row = dict[str, Any]


class Rows(NamedTuple):
    """A table that is being read."""

    kind: str  # csv, tsv, json, parquet, xlsx
    names: list[str]  # of its columns; of json all that any row has
    blocks: Iterator[list[Row]]
    total: int
    separator: str = ","  # of a csv or tsv file
    schema: Any = None  # a pyarrow.Schema, where the types are known
    plain: bool = False  # a tsv file without quotes, none of whose cells needs them
    again: Callable[[], Iterator[list[Row]]] = lambda: iter(())  # the blocks once more, to find out their types


def read_rows(file: Path, how: Dialect = FOUND_OUT) -> Rows:
    """Open a table and read its rows, cell by cell as they are written. Raises UsageError as `files.read` does."""
    with failing_in_one_line(file, "FILE"):
        if file.stat().st_size == 0:
            raise UsageError(f"FILE {file}: the file is empty; write a header and rows into it")
        kind = format_inside(file)
        if kind in ("csv", "tsv"):
            return _written(file, kind, how)
        if kind == "xlsx":
            names, cells = sheet_of(file)
            rows = [dict(zip(names, row, strict=True)) for row in cells]
            again = partial(_parts, rows)
            return Rows(kind, names, again(), len(rows), again=again)
        if kind == "parquet":
            from pyarrow import parquet

            with opened(file) as raw:
                source = parquet.ParquetFile(file if bare(file)[1] == "" else _in_memory(raw))
            schema = source.schema_arrow
            if twice := [name for name in schema.names if schema.names.count(name) > 1]:
                raise UsageError(f"FILE {file}: two of its columns are named {twice[0]}; rename one")
            batches = (batch.to_pylist() for batch in source.iter_batches(BLOCK))
            return Rows(kind, schema.names, _failing(file, batches), source.metadata.num_rows, schema=schema)
        found: dict[str, None] = {}
        total = 0
        for block in _objects(file, how):
            found |= dict.fromkeys(name for row in block for name in row)
            total += len(block)
        again = partial(_again, file, how, frozenset(found))
        return Rows(kind, list(found), again(), total, again=again)


def write_rows(target: Any, kind: str, blocks: Iterable[list[Row]], rows: Rows, more: Row | None = None) -> None:
    """Write blocks of rows, those of `rows` with more columns, into a binary file that is open.

    A csv or tsv file gets the separator that was read. `more`: a value of each new column. Raises UsageError for a
    cell that the format cannot hold; for parquet, as a rule, before the first block is asked for.
    """
    more = more or {}
    names = [*rows.names, *more]
    blocks = _within(blocks, frozenset(names), "a row has columns that are not the table's")
    if kind != "jsonl" and len(names) > MOST_COLUMNS:
        raise UsageError(
            f"the rows have {len(names):,} columns, more than {MOST_COLUMNS:,}; name an --output of .jsonl"
        )
    if kind == "parquet":
        _write_parquet(target, blocks, rows, more)
        return
    separator = "\t" if kind == "tsv" else rows.separator if rows.kind == "csv" else ","
    numbers, plain = count(1), rows.plain and kind == "tsv"
    line = partial(_line, separator=separator, plain=plain)
    for nth, block in enumerate(chain(blocks, [[]])):  # a table without rows has a header too
        if nth == 0 and kind != "jsonl":
            target.write(line(names, nth))
        for row, number in zip(block, numbers, strict=False):
            if kind == "jsonl":
                target.write(_object(row))
            else:
                target.write(line([_cell(row.get(name), name in more) for name in names], number))


@contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """A `with` block that writes a binary file, which has the name at its end, complete. What has it already stays.

    Raises UsageError where the name is taken, or nothing can be written there.
    """
    taken = f"--output {path}: it exists already, and is not written over; name another file"
    if os.path.lexists(path):
        raise UsageError(taken)
    try:
        number, draft = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise UsageError(f"--output {path}: it cannot be written ({error.strerror}); name another file") from error
    try:
        with open(number, "wb") as target:
            yield target
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(draft, 0o666 & ~umask)  # underneath: mkstemp makes what only its owner can read
        try:
            give_name(Path(draft), path)
        except FileExistsError as error:
            raise UsageError(taken) from error
    finally:
        with suppress(OSError):
            os.unlink(draft)


# --- private ----------------------------------------------------------------------------------------------------------


def _written(file: Path, kind: str, how: Dialect) -> Rows:
    """A csv or tsv file: all of it is read, and so found to be in order, before the first row is given."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns, separator = strings_of(file, kind, how)
    table = pa.table(columns)
    plain = kind == "tsv" and not any(
        pc.any(pc.match_substring_regex(column, r"[\t\r\n]"), min_count=0).as_py() for column in columns.values()
    )
    blocks = (table.slice(i, BLOCK).to_pylist() for i in range(0, table.num_rows, BLOCK))
    return Rows(kind, table.column_names, blocks, table.num_rows, separator, table.schema, plain)


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    return (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK))


def _again(file: Path, how: Dialect, names: frozenset[str]) -> Iterator[list[Row]]:
    """A json file's blocks once more, after its columns are known."""
    return _within(_failing(file, _objects(file, how)), names, f"FILE {file}: it was changed while it was read")


def _within(blocks: Iterable[list[Row]], names: frozenset[str], otherwise: str) -> Iterator[list[Row]]:
    """The blocks. Raises UsageError before a row of other columns, which would be lost or written over."""
    for block in blocks:
        for row in block:
            if not row.keys() <= names:
                raise UsageError(f"{otherwise}: one has the column {min(row.keys() - names)}; start again")
        yield block


def _objects(file: Path, how: Dialect) -> Iterator[list[Row]]:
    with text_of(file, how, newline="\n") as source:
        rows = objects_of(file, source)
        while block := list(islice(rows, BLOCK)):
            yield block


def _in_memory(raw: Any) -> Any:
    import pyarrow as pa

    return pa.BufferReader(raw.read())


def _failing(file: Path, blocks: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """The blocks; what a library raises on the way becomes one line that names the file."""
    while True:
        with failing_in_one_line(file, "FILE"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _write_parquet(target: Any, blocks: Iterable[list[Row]], rows: Rows, more: Row) -> None:
    """Known columns keep the types that they had; others get those of all their values."""
    import pyarrow as pa
    from pyarrow import parquet

    @contextmanager
    def refusing() -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, ArithmeticError, RecursionError, TypeError, ValueError) as error:
            remedy = "name an --output of .jsonl"
            raise UsageError(f"a parquet file cannot hold these rows ({first_line(error)}); {remedy}") from error

    with refusing():
        schema = _schema(rows)
        for name, value in more.items():
            schema = schema.append(pa.field(name, pa.array([value]).type))
        writer = parquet.ParquetWriter(target, schema)
    for block in blocks:
        with refusing():
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
    writer.close()


def _schema(rows: Rows) -> Any:
    """The types of all columns. Raises ValueError naming the column that has values of several."""
    import pyarrow as pa

    if rows.schema is not None:
        return rows.schema
    found = pa.schema([(name, pa.null()) for name in rows.names])
    for block in rows.again():
        fields = [pa.field(name, _type([row.get(name) for row in block], name)) for name in rows.names]
        found = pa.unify_schemas([found, pa.schema(fields)], promote_options="permissive")
    return found


def _type(values: Sequence[Any], name: str) -> Any:
    """The pyarrow type that holds all values of a column, so that they are read back as they are."""
    import pyarrow as pa

    # underneath: pyarrow makes 1.0 of True beside a float, and a day of a moment beside a day
    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) > 1 and kinds != {int, float}:
        raise ValueError(f"{name} has values of the types {' and '.join(sorted(kind.__name__ for kind in kinds))}")
    if kinds == {dict}:
        filled = [value for value in values if value is not None]
        names = dict.fromkeys(each for value in filled for each in value)
        return pa.struct([(each, _type([value.get(each) for value in filled], f"{name}.{each}")) for each in names])
    if kinds == {list}:
        return pa.list_(_type([item for value in values for item in value or ()], name))
    return pa.array(values).type


def _object(row: Row) -> bytes:
    """A row of a jsonl file. Half of a surrogate pair, which is no character, stays the escape that it was."""
    return json.dumps(row, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n"


def _cell(value: Any, ours: bool) -> str:
    """A cell of a csv or tsv file; the classes that a row has are listed, and the user's lists and objects are json."""
    if isinstance(value, list) and ours:
        return ", ".join(map(str, value))
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _line(cells: list[str], row: int, separator: str, plain: bool) -> bytes:
    """A row of a csv or tsv file, quoted where a reader needs it. Raises UsageError naming it for half a character."""
    if plain:
        line = "\t".join(re.sub(r"[\t\r\n]", " ", cell) for cell in cells) + "\n"
    else:
        text = io.StringIO(newline="")
        # underneath: csv quotes a lone carriage return only where it ends the lines, and readers take it for an end
        quoting: Any = csv.QUOTE_ALL if any("\r" in cell or "\n" in cell for cell in cells) else csv.QUOTE_MINIMAL
        csv.writer(text, delimiter=separator, lineterminator="\n", quoting=quoting).writerow(cells)
        line = text.getvalue()
    try:
        return line.encode()
    except UnicodeEncodeError as error:
        where = f"row {row}" if row else "a column's name"
        raise UsageError(f"{where} {BROKEN}; correct it, or name an --output of .jsonl") from error
