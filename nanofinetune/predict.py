"""Label lines of text with a fine-tuned model: `python -m nanofinetune.predict MODEL_DIR [FILE]`.

>>> split_line("a cat\\tthe cat", 1, 2), split_line("a cat", 7, 1)
(('a cat', 'the cat'), ('a cat',))

Underneath: transformers.TextClassificationPipeline (transformers 5.23)
  - runs one text at a time unless it is told a batch_size; here lines come in blocks, and each block is sorted by
    length into batches; the output keeps the order of the lines;
  - drops an empty second text, which in training was a text like any other; here it is one;
  - here a model that train.py saved knows whether it takes one text or two; with others the first line decides.

Proof: test_predict_matches_the_transformers_pipeline, test_an_empty_second_text_is_what_it_was_in_training in
tests/test_predict.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TextIO

import torch

from nanofinetune.data.files import LONGEST
from nanofinetune.data.pretrained import length_limit, load_tokenizer, load_trained
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
    return parts


@torch.inference_mode()
def predict(
    lines: list[tuple[str, ...]], model: Any, tokenizer: Any, limit: int, batch_size: int
) -> list[tuple[str, float]]:
    """Texts or pairs -> for each (label, probability), or ("score", value) from a regression model."""
    # underneath: the library's pipeline drops an empty second text, which in training was a text like any other
    pairs = [line[1] for line in lines] if len(lines[0]) == 2 else None
    store = tokenize_texts([line[0] for line in lines], pairs, tokenizer, limit)
    collate = DataCollatorWithPadding(tokenizer)
    found: list[tuple[str, float]] = [("", 0.0)] * len(lines)
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
        if model.config.num_labels == 1:
            answers = [("score", value) for value in logits.squeeze(-1).tolist()]
        else:
            chances, classes = logits.softmax(-1).max(-1)
            answers = [(model.config.id2label[k], p) for k, p in zip(classes.tolist(), chances.tolist(), strict=True)]
        for row, answer in zip(rows, answers, strict=True):
            found[row] = answer
    return found


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
            yield line.rstrip("\r\n")
        if not line or size >= CHARACTERS:
            return


def main() -> None:
    """Print `label TAB probability TAB line` for every line of the file or of stdin."""
    parser = Parser(prog="python -m nanofinetune.predict", description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL_DIR", help="a folder that train.py wrote: DIR/model of its --output DIR"
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="a text a line, a tab inside a pair (default -)"
    )
    parser.add_argument(
        "--batch-size", metavar="ROWS", type=number(int, 1, MOST), default=64, help="rows a batch (default 64)"
    )
    parser.add_argument(
        "--device", metavar="KIND", default="auto", help="auto, cpu, cuda, cuda:N or mps (default auto)"
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.file != "-" and not place_of("FILE", args.file).is_file():
        raise UsageError(f"{args.file}: there is no such file")
    model = load_trained(args.model).to(device)
    tokenizer = load_tokenizer(args.model)
    limit = length_limit(args.model, tokenizer)
    columns = getattr(model.config, "text_columns", None) or ()
    if not isinstance(columns, (list, tuple)) or len(columns) > 2:
        raise UsageError(f"model {args.model}: its config has text_columns {columns!r}, which are not one or two names")
    piped = args.file == "-"
    name = "stdin" if piped else args.file
    try:
        # stdin is opened again: Python's own has the locale's encoding, and in the C locale any byte passes
        with open(sys.stdin.fileno() if piped else name, encoding="utf-8", closefd=not piped) as source:
            for lines in read_lines(source, len(columns) if columns else None):
                answers = predict(lines, model, tokenizer, limit, args.batch_size)
                for line, (label, value) in zip(lines, answers, strict=True):
                    # as they are for another program; on a terminal they must not clear the screen
                    texts = [shown(text, most=len(text) + 2**16) for text in line] if sys.stdout.isatty() else line
                    print(shown(label), f"{value:.4f}", *texts, sep="\t")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file") from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"{name}: it cannot be read ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run_main("nanofinetune.predict", main))
