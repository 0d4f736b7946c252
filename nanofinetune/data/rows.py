"""The rows of a table as they are, and the same rows written again with more columns: what predict reads and writes.

>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder, "reviews.csv")
...     _ = file.write_text('text;stars\\n"good; cheap";05\\n')
...     rows = read_rows(file)
...     with new_file(Path(folder, "out.csv")) as target:
...         write_rows(target, "csv", ([row | {"label": "yes"} for row in block] for block in rows.blocks), rows)
...     print(Path(folder, "out.csv").read_text(), end="")
text;stars;label
"good; cheap";05;yes

Underneath: `datasets.Dataset.to_csv` and `datasets.Dataset.to_parquet` (datasets 5.2), after `datasets.load_dataset`
  - there 05 becomes 5, and "NA" an empty cell; here every cell that nobody changes is written as it was read;
  - there a file that exists is written over; here it is refused, and a new one gets its name when it is complete.

Proof: test_a_table_is_written_as_it_was_read, test_nothing_that_exists_is_written_over in tests/data/test_rows.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from nanofinetune.data.files import (
    FOUND_OUT,
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
    names: list[str]  # of its columns; of json those of the first row
    blocks: Iterator[list[Row]]
    total: int | None  # rows, where that is known
    separator: str = ","  # of a csv or tsv file
    schema: Any = None  # of a parquet file, a pyarrow.Schema
    plain: bool = False  # a tsv file without quotes, none of whose cells needs them


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
            return Rows(kind, names, (rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)), len(rows))
        if kind == "parquet":
            from pyarrow import parquet

            with opened(file) as raw:
                source = parquet.ParquetFile(file if bare(file)[1] == "" else _in_memory(raw))
            schema, count = source.schema_arrow, source.metadata.num_rows
            batches = (batch.to_pylist() for batch in source.iter_batches(BLOCK))
            return Rows(kind, schema.names, _failing(file, batches), count, schema=schema)
        blocks = _failing(file, _objects(file, how))
        first = next(blocks, [])
        return Rows(kind, list(first[0]) if first else [], chain([first] if first else [], blocks), None)


def write_rows(target: Any, kind: str, blocks: Iterable[list[Row]], rows: Rows) -> None:
    """Write blocks of rows, those of `rows` with more columns, into a binary file that is open.

    A csv or tsv file gets the separator that was read. Raises UsageError for a column that only a later block has.
    """
    if kind == "parquet":
        _write_parquet(target, blocks, rows)
        return
    separator = "\t" if kind == "tsv" else rows.separator if rows.kind == "csv" else ","
    names: list[str] | None = None
    for block in blocks:
        if names is None:
            names = list(block[0])
            if kind != "jsonl":
                target.write(_line(names, separator, rows.plain and kind == "tsv"))
        for row in block:
            if kind == "jsonl":
                target.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
                continue
            if odd := [name for name in row if name not in names]:
                raise UsageError(f"a row has the column {odd[0]}, which the first has not; name an --output of .jsonl")
            target.write(_line([_cell(row.get(name)) for name in names], separator, rows.plain and kind == "tsv"))
    if names is None and kind != "jsonl":
        target.write(_line(rows.names, separator, rows.plain and kind == "tsv"))


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
    return Rows(kind, table.column_names, blocks, table.num_rows, separator, plain=plain)


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


def _write_parquet(target: Any, blocks: Iterable[list[Row]], rows: Rows) -> None:
    """Known columns keep the types that they had; new ones get those of the first block's values."""
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    for block in blocks:
        if writer is None:
            schema = pa.Table.from_pylist(block).schema
            for i, name in enumerate(schema.names):
                if rows.schema is not None and name in rows.schema.names:
                    schema = schema.set(i, rows.schema.field(name))
            writer = parquet.ParquetWriter(target, schema)
        try:
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(
                f"a parquet file cannot hold these rows ({first_line(error)}); name one of .jsonl"
            ) from error
    if writer is None:
        raise UsageError("there are no rows, and so no types for a parquet file; name an --output of .jsonl")
    writer.close()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "" if value is None else str(value)


def _line(cells: list[str], separator: str, plain: bool) -> bytes:
    """A row of a csv or tsv file, quoted where a reader needs it."""
    if plain:
        return ("\t".join(" ".join(cell.split("\t")) for cell in cells) + "\n").encode()
    text = io.StringIO(newline="")
    # underneath: csv quotes a lone carriage return only where it ends the lines, and readers take it for an end
    quoting: Any = csv.QUOTE_ALL if any("\r" in cell or "\n" in cell for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=separator, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue().encode()
