"""Label texts with a fine-tuned model: `python -m nanofinetune.predict MODEL_DIR [FILE]`.

A FILE of lines, or stdin, holds a text a line, a tab inside a pair: `label TAB probability TAB line` is printed for
each. A table (csv, tsv, jsonl, parquet, xlsx) is written again, with the columns label and probability. Without an
ending that says what it is, as stdin is, name its --format.

>>> split_line("a cat\\tthe cat", 1, 2), split_line("a cat", 7, 1)
(('a cat', 'the cat'), ('a cat',))

Underneath: transformers.TextClassificationPipeline (transformers 5.23)
  - runs one text at a time unless it is told a batch_size; here rows come in blocks, and each block is sorted by
    length into batches; the output keeps their order;
  - drops an empty second text, which in training was a text like any other; here it is one;
  - of one output gives a sigmoid, unless the config says that it is a regression's; here it is always the number;
  - here a model that train.py saved knows its columns; with others the first line decides.

Proof: test_predict_matches_the_transformers_pipeline, test_an_empty_second_text_is_what_it_was_in_training,
test_one_output_is_a_number_where_the_pipeline_may_give_a_sigmoid in tests/test_predict.py.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from nanofinetune.cpu.dropout import use_exact_dropout
from nanofinetune.cpu.lean import use_lean_encoder
from nanofinetune.data.files import BROKEN, LONGEST, dialect, format_of, is_broken
from nanofinetune.data.pretrained import import_library, length_limit, load_tokenizer, load_trained
from nanofinetune.data.rows import WRITTEN, Row, Rows, new_file, read_rows, write_rows
from nanofinetune.data.tokens import tokenize_texts
from nanofinetune.ground.cli import MOST, Parser, number, run_main
from nanofinetune.ground.device import choose_device
from nanofinetune.ground.errors import UsageError, first_line, shown
from nanofinetune.ground.names import place_of
from nanofinetune.step.collate import DataCollatorWithPadding
from nanofinetune.step.order import SortedBatchSampler

BLOCK = 4096  # lines, and
CHARACTERS = 4_000_000  # characters, that are held in memory at a time


def split_line(line: str, number: int, texts: int) -> tuple[str, ...]:
    """A line -> its text or its pair. Raises UsageError, with the line's number, for a wrong number of tabs."""
    parts = tuple(line.split("\t"))
    if len(parts) != texts:
        wanted = "one text and no tab" if texts == 1 else "two texts with one tab between them"
        raise UsageError(f"line {number} has {len(parts) - 1} tabs: the model takes {wanted}")
    if is_broken(line):
        raise UsageError(f"line {number} {BROKEN}; correct it")
    return parts


@torch.inference_mode()
def probabilities(lines: Sequence[tuple[str, ...]], model: Any, tokenizer: Any, limit: int, batch_size: int) -> Any:
    """Texts or pairs -> (rows, classes) float32: softmax, or sigmoid where a row may have several classes.

    From a regression model (rows, 1): the values. Raises UsageError where the model fails, or answers with NaN.
    """
    # underneath: the library's pipeline drops an empty second text, which in training was a text like any other
    pairs = [line[1] for line in lines] if len(lines[0]) == 2 else None
    store = tokenize_texts([line[0] for line in lines], pairs, tokenizer, limit)
    collate = DataCollatorWithPadding(tokenizer)
    found = np.empty((len(lines), model.config.num_labels), np.float32)
    for rows in SortedBatchSampler(store.lengths, batch_size):
        batch = collate(store.__getitems__(rows)).to(model.device)
        try:
            logits = model(**batch).logits.float()  # (B, classes)
        except Exception as error:  # its config says something that its code cannot do
            why = f"it fails on a batch of {len(rows)} rows ({first_line(error)})"
            remedy = "choose a smaller --batch-size, or another model"
            raise UsageError(f"model {model.name_or_path}: {why}; {remedy}") from error
        if not logits.isfinite().all():
            raise UsageError(f"model {model.name_or_path}: it answers with NaN or infinity; name another model")
        kind = kind_of(model)
        values = logits if kind == "regression" else logits.sigmoid() if kind == "multi" else logits.softmax(-1)
        found[rows] = values.cpu().numpy()
    return found


def predict(
    lines: Sequence[tuple[str, ...]], model: Any, tokenizer: Any, limit: int, batch_size: int
) -> list[tuple[str, float]]:
    """Texts or pairs -> for each (label, probability), or ("score", value) from a regression model."""
    found = probabilities(lines, model, tokenizer, limit, batch_size)
    if kind_of(model) == "regression":
        return [("score", value) for value in found[:, 0].tolist()]
    best = found.argmax(-1)
    return [(model.config.id2label[k], p) for k, p in zip(best.tolist(), found.max(-1).tolist(), strict=True)]


def kind_of(model: Any) -> str:
    """single, multi or regression: what a model predicts."""
    if model.config.problem_type == "multi_label_classification":
        return "multi"
    return "regression" if model.config.num_labels == 1 else "single"


class Answers:
    """How a row of probabilities is told: as columns of a table, or as the fields of a line.

    Args:
        every: also each class with its probability.
        thresholds: {class: probability}, "" for all others: from where a row has a class, if it may have several.
    """

    def __init__(self, model: Any, every: bool = False, thresholds: dict[str, float] | None = None) -> None:
        self.kind = kind_of(model)
        self.names = [str(model.config.id2label[k]) for k in range(model.config.num_labels)]
        self.every = every
        thresholds = {"": 0.5} | (thresholds or {})
        for name in thresholds:
            if name and name not in self.names:
                listed = ", ".join(self.names[:12])
                raise UsageError(f"--threshold {name}: the model has no such class; it has {listed}")
        if every and len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UsageError(f"--all: two of the model's classes are named {twice}; leave it out")
        self.thresholds = np.array([thresholds.get(name, thresholds[""]) for name in self.names], np.float32)

    def columns(self, row: np.ndarray) -> Row:
        """(classes,) -> {"label": ..., "probability": ...}; several classes are lists, a regression {"score": ...}."""
        if self.kind == "regression":
            return {"score": _digits(row[0])}
        has = self._has(row)
        told: Row = {"label": [self.names[k] for k in has], "probability": [_digits(row[k]) for k in has]}
        if self.kind == "single":
            told = {name: values[0] for name, values in told.items()}
        return told | {f"probability_{name}": _digits(value) for name, value in self._each(row)}

    def fields(self, row: np.ndarray) -> list[str]:
        """(classes,) -> label, probability, and with `every` class=probability for each: the fields of a line."""
        if self.kind == "regression":
            return ["score", f"{row[0]:.4f}"]
        has = self._has(row)
        told = [", ".join(shown(self.names[k]) for k in has), ", ".join(f"{_digits(row[k]):.4f}" for k in has)]
        return told + [f"{shown(name)}={value:.4f}" for name, value in self._each(row)]

    def _has(self, row: np.ndarray) -> list[int]:
        """The numbers of the classes that a row has: of a model of single labels one."""
        return [int(row.argmax())] if self.kind == "single" else np.flatnonzero(row > self.thresholds).tolist()

    def _each(self, row: np.ndarray) -> Iterable[tuple[str, float]]:
        """All classes and their probabilities, if they are asked for: there may be thousands."""
        return zip(self.names, row.tolist(), strict=True) if self.every else ()


def _digits(value: Any) -> float:
    return float(f"{float(value):.6g}")


# --- lines ------------------------------------------------------------------------------------------------------------


def read_lines(source: TextIO, texts: int | None) -> Iterator[list[tuple[str, ...]]]:
    """Blocks of lines, each split into its texts; `texts` None lets the first line decide.

    Raises UsageError for a line that is longer than a text can be in training.
    """
    seen = 0
    while block := list(_block(source, seen)):
        texts = texts or min(2, block[0].count("\t") + 1)
        yield [split_line(line, seen + i + 1, texts) for i, line in enumerate(block)]
        seen += len(block)


def _block(source: TextIO, seen: int) -> Iterator[str]:
    """The next lines, without what ends them, in so far as they are held at a time."""
    size = 0
    for nth in range(seen + 1, seen + BLOCK + 1):
        line = source.readline(LONGEST + 1)
        if len(line) > LONGEST and not line.endswith("\n"):
            raise UsageError(f"line {nth} has more than {LONGEST:,} characters, the most that is read; cut it")
        size += len(line)
        if line:
            yield line.removesuffix("\n").removesuffix("\r")
        if not line or size >= CHARACTERS:
            return


# --- tables -----------------------------------------------------------------------------------------------------------


def text_columns(rows: Rows, known: Sequence[str] | None, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The columns that hold the texts: those that the user names, else those that the model was trained on."""
    if asked and known and len(asked) != len(known):
        raise UsageError(f"--text-columns {' '.join(asked)}: the model was trained on {len(known)} ({' '.join(known)})")
    columns = tuple(asked or known or (rows.names if len(rows.names) == 1 else ()))
    if not 1 <= len(columns) <= 2:
        listed = ", ".join(rows.names[:12])
        raise UsageError(f"which columns are the texts? Name one or two with --text-columns; the table has {listed}")
    for column in columns:
        if column not in rows.names:
            listed = ", ".join(rows.names[:12])
            flag = f"--text-columns {column}" if asked else f"the model was trained on the column {column}"
            remedy = "name another" if asked else "name the text's with --text-columns"
            raise UsageError(f"{flag}: the table has {listed}; {remedy}")
    return columns


def texts_of(block: Sequence[Row], columns: Sequence[str], before: int) -> list[tuple[str, ...]]:
    """The texts of each row. Raises UsageError naming the row, counted from 1, that has none."""
    found: list[tuple[Any, ...]] = []
    for nth, row in enumerate(block, before + 1):
        texts = tuple(row.get(column) for column in columns)
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                what = "no text" if text is None else f"no text but {shown(repr(text), most=40)}"
                raise UsageError(f"row {nth} has {what} in the column {column}; fill it in")
            if len(text) > LONGEST:
                raise UsageError(f"row {nth} has {len(text):,} characters in {column}, more than {LONGEST:,}; cut it")
            if is_broken(text):
                raise UsageError(f"row {nth}, column {column}, {BROKEN}; correct it")
        found.append(texts)
    return found


def labelled(
    rows: Rows, columns: Sequence[str], answers: Answers, names: dict[str, str], ask: Any, bar: Any
) -> Iterator[list[Row]]:
    """The blocks of a table with the answers' columns at the end, under the names that `_free_names` gives."""
    before = 0
    for block in rows.blocks:
        found = ask(texts_of(_as_text(block, columns) if rows.kind == "xlsx" else block, columns, before))
        told = ({names[name]: value for name, value in answers.columns(row).items()} for row in found)
        yield [row | extra for row, extra in zip(block, told, strict=True)]
        before += len(block)
        bar.update(len(block))


def _as_text(block: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Excel makes a number of a text that looks like one, and nothing of an empty one."""
    return [row | {column: "" if row[column] is None else str(row[column]) for column in columns} for row in block]


def _free_names(wanted: list[str], taken: Sequence[str]) -> dict[str, str]:
    """{name: the name that it gets}; says so where it is another one."""
    names = {name: f"predicted_{name}" if name in taken else name for name in wanted}
    for name, new in names.items():
        if new in taken:
            raise UsageError(f"the table has the columns {name} and {new} already; rename one of them")
        if new != name:
            print(f"note: the table has a column {shown(name)}; the model's is {shown(new)}", file=sys.stderr)
    return names


# --- the command line -------------------------------------------------------------------------------------------------


def threshold(text: str) -> tuple[str, float]:
    """An argparse type: 0.3, for all classes, or toxic=0.3."""
    name, _, value = text.rpartition("=")
    return name, number(float, 0, 1)(value)


def parse_arguments() -> Any:
    """The command line."""
    parser = Parser(prog="python -m nanofinetune.predict", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="a folder that train.py wrote: DIR/model of its --output DIR")
    add("file", metavar="FILE", nargs="?", default="-", help="lines or a table, by its ending; - is stdin (default -)")
    add("--format", choices=WRITTEN, help="of a table on stdin, in a pipe, or without an ending that says it")
    add("--output", metavar="FILE", help="write there: a new .csv, .tsv, .jsonl or .parquet, or lines (default stdout)")
    add("--all", action="store_true", help="also the probability of every class")
    add("--threshold", metavar="P", nargs="+", type=threshold,
        help="0.3, or NAME=0.3: of a model of several classes a row, from where it has one (default 0.5)")  # fmt: skip
    add("--text-columns", metavar="COLUMN", nargs="+", help="of a table: one or two (default: the model's)")
    add("--separator", metavar="MARK", help="of a csv or tsv file: one character, or tab (default: found)")
    add("--encoding", metavar="NAME", help="of a text file, such as cp1252 (default: utf-8, or by its first bytes)")
    add("--batch-size", metavar="ROWS", type=number(int, 1, MOST), default=64, help="rows a batch (default 64)")
    add("--device", metavar="KIND", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    return parser.parse_args()


def main() -> None:
    """Label every line or row of the file or of stdin."""
    args = parse_arguments()
    path = None if args.file == "-" else place_of("FILE", args.file)
    _check_there(path, args.file)
    if args.format is None:
        label(args, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = _with_an_ending(path, Path(folder), args)
        try:
            label(args, file)
        except UsageError as error:  # the user knows it by another name
            raise UsageError(str(error).replace(str(file), "stdin" if path is None else args.file)) from error


def label(args: Any, path: Path | None) -> None:
    """What the command line asks for; `path` None is stdin with lines."""
    device, how = choose_device(args.device), dialect(args.separator, args.encoding)
    kind = _kind(path, args)
    output = None if args.output is None else place_of("--output", args.output)
    written = None if output is None else _written_as(output, kind)
    import_library()
    tokenizer = load_tokenizer(args.model)
    model = load_trained(args.model, tokenizer).to(device)
    known = getattr(model.config, "text_columns", None) or ()
    if not isinstance(known, (list, tuple)) or len(known) > 2 or not all(isinstance(name, str) for name in known):
        raise UsageError(f"model {args.model}: its config has text_columns {known!r}, which are not one or two names")
    limit = length_limit(args.model, tokenizer)
    if device.type == "cpu":
        use_exact_dropout(model)  # there is none here, but its attention is the one that the lean encoder calls
        use_lean_encoder(model)
    answers = Answers(model, args.all, dict(args.threshold or ()))
    if args.threshold and answers.kind != "multi":
        raise UsageError("--threshold: only for a model that gives a text any number of classes; leave it out")
    if args.all and answers.kind == "regression":
        raise UsageError("--all: the model predicts a number, and has no classes; leave it out")

    def ask(lines: Sequence[tuple[str, ...]]) -> Any:
        return probabilities(lines, model, tokenizer, limit, args.batch_size)

    if kind is not None and path is not None:
        rows = read_rows(path, how)
        columns = text_columns(rows, known, args.text_columns)
        more = answers.columns(np.full(len(answers.names), np.inf, np.float32))  # a row that has every class
        names = _free_names(list(more), rows.names)
        with _target(output) as target, _bar(args.output, rows.total) as bar:
            form = written or {"json": "jsonl", "tsv": "tsv"}.get(rows.kind, "csv")
            blocks = labelled(rows, columns, answers, names, ask, bar)
            write_rows(target, form, blocks, rows, {names[name]: value for name, value in more.items()})
        return
    with _target(output) as target, _bar(args.output, None) as bar:
        on_screen = _on_screen(args.output)
        for lines in _lines(path, how.encoding or "utf-8-sig", len(known) or None):
            for line, row in zip(lines, ask(lines), strict=True):
                # as they are for another program; on a terminal they must not clear the screen
                texts = [shown(text, most=len(text) + 2**16) for text in line] if on_screen else line
                target.write(("\t".join([*answers.fields(row), *texts]) + "\n").encode())
            target.flush()
            bar.update(len(lines))


def _check_there(path: Path | None, name: str) -> None:
    if path is not None and not path.exists():
        raise UsageError(f"{name}: there is no such file")
    if path is not None and path.is_dir():
        raise UsageError(f"{name}: it is a folder; name a file in it")


def _with_an_ending(path: Path | None, folder: Path, args: Any) -> Path:
    """The file under a name that ends as --format says; a copy of stdin or of a pipe, since a table is read twice."""
    name = "stdin" if path is None else path.name
    plain = path is not None and stat.S_ISREG(os.stat(path).st_mode)
    if path is not None and plain and format_of(path) is not None:
        raise UsageError(f"--format {args.format}: {args.file} says by its ending what it is; leave it out")
    file = folder / f"{name}.{args.format}"
    try:
        if path is not None and plain:
            file.symlink_to(path.absolute())
        else:
            raw = sys.stdin.fileno() if path is None else path
            with open(raw, "rb", closefd=path is not None) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
    except OSError as error:
        raise UsageError(f"{name}: it cannot be copied to be read ({error.strerror})") from error
    return file


def _kind(path: Path | None, args: Any) -> str | None:
    """The format of a table; None for lines."""
    kind = None if path is None else format_of(path)
    if kind is None:
        for flag, value in (("--separator", args.separator), ("--text-columns", args.text_columns)):
            if value:
                raise UsageError(f"{flag}: {args.file} holds lines by its ending, and no columns; leave it out")
    elif path is not None and not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{args.file}: a table is read more than once; for a pipe say which it is with --format")
    return kind


def _written_as(output: Path, kind: str | None) -> str:
    """The format of --output, by its ending; lines are lines under any name."""
    if os.path.lexists(output):
        raise UsageError(f"--output {output}: it exists already, and is not written over; name another file")
    ending = output.suffix.lower().removeprefix(".")
    if kind is not None and ending not in WRITTEN:
        raise UsageError(f"--output {output}: a table is written as {', '.join(f'.{name}' for name in WRITTEN)}")
    if kind is None and ending in WRITTEN:
        raise UsageError(f"--output {output}: the input holds lines, not a table; name a .txt file")
    return ending


def _target(output: Path | None) -> Any:
    """A binary file to write into: a new one, or stdout, whose own encoding may be any."""
    return new_file(output) if output is not None else nullcontext(_Stdout())


class _Stdout:
    """Stdout for UTF-8 bytes. A terminal that shows another encoding gets what it can show."""

    def write(self, content: bytes) -> None:
        stream = sys.stdout
        if getattr(stream, "buffer", None) is None:
            stream.write(content.decode())
        elif stream.isatty():
            encoding = stream.encoding or "utf-8"
            stream.write(content.decode().encode(encoding, "backslashreplace").decode(encoding))
        else:
            stream.flush()
            stream.buffer.write(content)

    def flush(self) -> None:
        sys.stdout.flush()


def _on_screen(output: str | None) -> bool:
    return output is None and sys.stdout.isatty()


def _bar(output: str | None, total: int | None) -> Any:
    """A progress bar on stderr, if that is a terminal on which nothing else is being written."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty() or _on_screen(output)
    return tqdm(total=total, unit=" rows", disable=hidden, dynamic_ncols=True)


def _lines(path: Path | None, encoding: str, texts: int | None) -> Iterator[list[tuple[str, ...]]]:
    """Blocks of lines of a file, a pipe or stdin. What cannot be read is one line."""
    name = "stdin" if path is None else str(path)
    try:
        # stdin is opened again: Python's own has the locale's encoding, and in the C locale any byte passes. Only "\n"
        # ends a line: a lone carriage return in a text, as old files have them, is a part of it.
        raw = sys.stdin.fileno() if path is None else path
        with open(raw, encoding=encoding, newline="\n", closefd=path is not None) as source:
            yield from read_lines(source, texts)
    except UnicodeDecodeError as error:
        known = "UTF-8" if encoding == "utf-8-sig" else encoding
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise UsageError(f"{name}: {byte} is not {known}; name its encoding with --encoding") from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"{name}: it cannot be read ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run_main("nanofinetune.predict", main))
