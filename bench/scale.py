"""Cost against size: seconds and peak memory of the parts that grow with rows, classes or checkpoints.

    python bench/scale.py                                    every piece, at 10,000, 100,000 and 1,000,000 rows
    python bench/scale.py table --sizes 100000 --tree ../old     train.py of another checkout, too, in turns
    python bench/scale.py classes saves --repeats 5 --record scale

    table     a csv of N rows (two texts, a label in words), read and tokenized, cold and from the cache; with --tree
              also `train.py --max-steps 2`, the whole command, of both checkouts
    rows      N rows that are in memory already, tokenized
    evaluate  an evaluation of N rows with a model that costs nothing
    classes   20,000 rows of N classes: scores; with them a run of a tiny model, and its predictions
    saves     one save beside N kept checkpoints

Each case is a fresh process. Its memory is the most that it held beyond what it held before the work began. Sides take
turns, library and ours, `--repeats` times; shown is the median. The slope is the exponent of a power law through the
larger sizes: 1.0 is linear, 0 is constant. The last line of stdout is one JSON object. `--record NAME` writes
bench/records/DATE_cpu_NAME.json after each piece; other pieces in that file stay as they are.
"""

from __future__ import annotations

import json
import math
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from readme import earlier, record_base

from nanofinetune.ground.cli import MOST, Parser, number, run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.process import peak_rss_mb, seconds_since_start

ROOT = Path(__file__).resolve().parent.parent
ROWS, CLASSES, KEPT = (10_000, 100_000, 1_000_000), (10, 1_000, 10_000), (0, 100, 1_000)
CLASS_ROWS = 20_000  # of each number of classes: two of each of the most
SAVES = 5  # of which the median is the time of one
HELD_OUT, SEED = 0.1, 42  # as train.py holds them out
WORDS = ["the", "of", "a", "is", "that", "it", "was", "not", "film", "story", "people", "time", "good", "great", "poor"]
WORDS += [
    "music",
    "actor",
    "scene",
    "slow",
    "quick",
    "bright",
    "strange",
    "familiar",
    "ending",
    "almost",
    "performance",
]

Found = dict[str, float]  # what a process has measured: "seconds", "MiB" and more


# --- what is measured, each in a process of its own -------------------------------------------------------------------


@contextmanager
def measured(found: Found) -> Iterator[None]:
    """A `with` block whose seconds, processor seconds and memory beyond what is held at its beginning are found."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is held now
    memory, cpu, began = peak_rss_mb(), time.process_time(), time.perf_counter()
    yield
    found["seconds"] = time.perf_counter() - began
    found["processor seconds"] = time.process_time() - cpu
    found["MiB"] = peak_rss_mb() - memory


def table_ours(case: SimpleNamespace) -> Found:
    from nanofinetune.data.cache import load_tokens

    tokenizer, limit = tokenizer_of(case.model)
    found: Found = {}
    with measured(found), quiet():
        _, stores = load_tokens(case.file, None, None, SEED, tokenizer, limit)
    return found | {"rows": sum(map(len, stores.values())), "tokens": sum(map(tokens_of, stores.values()))}


def table_library(case: SimpleNamespace) -> Found:
    """The course's section "Processing the data" on a local file. What it has cached is in the case's folder."""
    tokenizer, limit = tokenizer_of(case.model)
    found: Found = {}

    def tokenize_function(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["one"], rows["two"], truncation=True, max_length=limit)

    with measured(found), quiet():
        import datasets

        datasets.disable_progress_bars()
        # The tokenizer's state is a part of what the cache goes by, and its first call changes that.
        tokenize_function({"one": ["a"], "two": ["b"]})
        rows = datasets.load_dataset("csv", data_files=case.file, split="train").class_encode_column("label")
        splits = rows.train_test_split(HELD_OUT, seed=SEED).map(tokenize_function, batched=True)
    tokens = 0 if case.cached else sum(len(ids) for split in splits.values() for ids in split["input_ids"])
    return found | {"rows": sum(map(len, splits.values())), "tokens": tokens}


def command(case: SimpleNamespace) -> Found:
    """train.py of the checkout `tree`, two updates: the whole process, with its imports.

    A dry run would do for the seconds, but leaves a checkpoint's weights on the disk until they are used.
    """
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "bench")]
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanofinetune"]:
        del sys.modules[name]  # another checkout has its own
    sys.path.insert(0, case.tree)
    sys.argv = ["train.py", "--model", case.model, "--data", case.file, "--max-steps", "2"]
    try:
        with quiet():
            runpy.run_path(str(Path(case.tree, "train.py")), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    came_from = Path(sys.modules["nanofinetune"].__file__ or "").parent.parent
    assert came_from.samefile(case.tree), f"{came_from} was measured in place of {case.tree}"
    return {"seconds": seconds_since_start(), "processor seconds": time.process_time(), "MiB": peak_rss_mb()}


def rows_of(count: int) -> Any:
    import datasets

    datasets.disable_progress_bars()
    made = list(texts(count))
    return datasets.Dataset.from_dict(
        {"one": [a for a, _ in made], "two": [b for _, b in made], "label": [i % 2 for i in range(count)]}
    )


def rows_ours(case: SimpleNamespace) -> Found:
    from nanofinetune.data.load import Data
    from nanofinetune.data.tokens import tokenize

    tokenizer, limit = tokenizer_of(case.model)
    data = Data("rows", {"train": rows_of(case.size)}, ("one", "two"), "label", ["0", "1"], ("accuracy",))
    found: Found = {}
    with measured(found), quiet():
        store = tokenize(data, tokenizer, limit)["train"]
    held = sum(flat.nbytes for flat, _ in store.ragged.values()) / 2**20
    return found | {"tokens": tokens_of(store), "times the tokens": found["MiB"] / held}


def rows_library(case: SimpleNamespace) -> Found:
    tokenizer, limit = tokenizer_of(case.model)
    rows, found = rows_of(case.size), Found()
    with measured(found):
        made = rows.map(
            lambda part: tokenizer(part["one"], part["two"], truncation=True, max_length=limit),
            batched=True, keep_in_memory=True, remove_columns=["one", "two"],
        )  # fmt: skip
    held = made.select_columns(tokenizer.model_input_names).data.nbytes / 2**20
    tokens = sum(len(ids) for ids in made["input_ids"])
    return found | {"tokens": tokens, "times the tokens": found["MiB"] / held}


def free_model(rows: int, classes: int) -> tuple[Any, Any]:
    """(a model that looks its answers up, a store whose rows say where they stand)."""
    import numpy as np
    import torch

    from nanofinetune.data.tokens import TokenStore

    generator = torch.Generator().manual_seed(SEED)
    answers = torch.randn(997, classes, generator=generator)

    class Free(torch.nn.Module):
        def forward(self, input_ids: Any, **_: Any) -> Any:
            return SimpleNamespace(logits=answers[input_ids[:, 0] % len(answers)])

    labels = torch.randint(classes, (rows,), generator=generator).numpy()
    ids = np.arange(rows, dtype=np.int32)
    return Free(), TokenStore({"input_ids": (ids, np.arange(rows + 1))}, labels)


def evaluate_ours(case: SimpleNamespace) -> Found:
    import train
    from nanofinetune import Accelerator, DataCollatorWithPadding
    from nanofinetune.run.answers import Answers
    from nanofinetune.run.evaluation import Evaluation
    from nanofinetune.run.scores import Scores

    model, store = free_model(case.size, 2)
    names, collator = ["no", "yes"], DataCollatorWithPadding(plain_tokenizer())
    told = SimpleNamespace(label_names=names, multi=False, texts=[["a"]] * min(case.size, 10_000))
    accelerator, found = Accelerator(cpu=True), Found()
    with measured(found), quiet():
        evaluation = Evaluation(Scores(("accuracy", "f1"), names), "rows", Answers(told, store.dense["label"]))
        scores = train.evaluate(accelerator, model, store, collator, 32, evaluation)
    return found | {name: scores[name] for name in ("accuracy", "f1", "macro_f1")}


def evaluate_library(case: SimpleNamespace) -> Found:
    """The course's evaluation, with `gather_for_metrics`, and scikit-learn's scores of what it has collected."""
    import accelerate
    import torch
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    model, store = free_model(case.size, 2)
    tokenizer, _ = tokenizer_of(case.model)
    accelerator, found = accelerate.Accelerator(cpu=True), Found()
    lists = [{"input_ids": [i], "label": label} for i, label in enumerate(store.dense["label"].tolist())]
    with measured(found):
        loader = accelerator.prepare(DataLoader(lists, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer)))  # type: ignore[arg-type]
        predictions, labels = [], []
        with torch.inference_mode():
            for batch in loader:
                both = model(batch["input_ids"]).logits.argmax(-1), batch["labels"]
                both = accelerator.gather_for_metrics(both)
                predictions.append(both[0])
                labels.append(both[1])
        true, said = torch.cat(labels).numpy(), torch.cat(predictions).numpy()
        scores = {"accuracy": accuracy_score(true, said), "f1": f1_score(true, said)}
        scores["macro_f1"] = f1_score(true, said, average="macro")
        confusion_matrix(true, said)
    return found | scores


def classes_ours(case: SimpleNamespace) -> Found:
    import torch

    from nanofinetune.run.scores import Scores

    true, said = labels_of(case.size)
    found: Found = {}
    with measured(found):
        scores = Scores(("accuracy",), [f"class {k}" for k in range(case.size)])
        for pair in zip(torch.tensor(said).split(32), torch.tensor(true).split(32), strict=True):
            scores.add_batch(predictions=pair[0], references=pair[1])
        values = scores.compute()
    return found | values


def classes_library(case: SimpleNamespace) -> Found:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    true, said = labels_of(case.size)
    found: Found = {}
    with measured(found):
        scores = {"accuracy": accuracy_score(true, said), "macro_f1": f1_score(true, said, average="macro")}
        precision_recall_fscore_support(true, said, zero_division=0)
        confusion_matrix(true, said)
    return found | scores


def labels_of(classes: int) -> tuple[list[int], list[int]]:
    """The true classes of CLASS_ROWS rows, and those that a classifier says: half are right."""
    draw = random.Random(SEED)
    true = [i % classes for i in range(CLASS_ROWS)]
    return true, [k if draw.random() < 0.5 else draw.randrange(classes) for k in true]


def run_ours(case: SimpleNamespace) -> Found:
    """One update of a tiny model on a table of so many classes, an evaluation, and all that --output gets."""
    import torch

    import train

    torch.set_num_threads(1)
    output = Path(case.folder, "run")
    sys.argv = ["train.py", "--model", case.model, "--data", case.file, "--task", "single", "--max-steps", "1"]
    sys.argv += ["--output", str(output)]
    found: Found = {}
    with measured(found), quiet() as said:
        train.main()
    sizes = {
        f"{file.name}, KiB": file.stat().st_size / 2**10 for file in map(output.joinpath, KEPT_FILES) if file.exists()
    }
    plan = said.getvalue().partition("\nepoch ")[0]
    return found | {"plan, KiB": len(plan) / 2**10, **sizes}


KEPT_FILES = ("result.json", "model/config.json", "report.html")


def predict_ours(case: SimpleNamespace) -> Found:
    """1,000 rows and their labels, told as predict.py tells them; the model's own time is not counted."""
    import numpy as np

    from nanofinetune.predict import Answers

    names = {k: f"class {k}" for k in range(case.size)}
    config = SimpleNamespace(problem_type="single_label_classification", num_labels=case.size, id2label=names)
    answers = Answers(SimpleNamespace(config=config))
    rows = np.random.default_rng(SEED).random((1_000, case.size), np.float32)
    found, lines = Found(), 0
    with measured(found):
        for row in rows:
            lines += len(answers.fields(row)) + len(answers.columns(row))
    return found | {"fields": lines}


def saves_ours(case: SimpleNamespace) -> Found:
    from nanofinetune.run.checkpoint import save

    model, optimizer = small_training()
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    parent = Path(case.folder, "checkpoints")
    save(parent / f"update-{0:08}", parts)
    for nth in range(1, case.size):
        shutil.copytree(parent / f"update-{0:08}", parent / f"update-{nth:08}")
    if not case.size:
        shutil.rmtree(parent / f"update-{0:08}")
    return several(lambda nth: save(parent / f"update-{case.size + nth:08}", parts, keep=case.size + 1))


def saves_library(case: SimpleNamespace) -> Found:
    import accelerate
    from accelerate.utils import ProjectConfiguration

    model, optimizer = small_training()
    project = ProjectConfiguration(case.folder, automatic_checkpoint_naming=True, total_limit=case.size + 1)
    accelerator = accelerate.Accelerator(cpu=True, project_config=project)
    accelerator.prepare(model, optimizer)
    accelerator.save_state()
    parent = Path(case.folder, "checkpoints")
    for nth in range(1, case.size):
        shutil.copytree(parent / "checkpoint_0", parent / f"checkpoint_{nth}")
    if not case.size:
        shutil.rmtree(parent / "checkpoint_0")
    project.iteration = case.size
    return several(lambda nth: accelerator.save_state())


def small_training() -> tuple[Any, Any]:
    import torch

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def several(save: Callable[[int], Any]) -> Found:
    """The median of SAVES after a first one, which looks at each folder that a run before it has left."""
    save(0)
    times, whole = [], Found()
    with measured(whole):
        for nth in range(1, SAVES + 1):
            began = time.perf_counter()
            save(nth)
            times.append(time.perf_counter() - began)
    return whole | {"seconds": statistics.median(times)}


# --- what they work on ------------------------------------------------------------------------------------------------


def texts(count: int) -> Iterator[tuple[str, str]]:
    """Pairs of 8 to 24 words each; no two rows are alike."""
    draw = random.Random(SEED)
    for i in range(count):
        one, two = (" ".join(draw.choices(WORDS, k=draw.randint(8, 24))) for _ in range(2))
        yield f"{one} {i}", f"{two}, {i % 1000}"


def write_table(file: Path, rows: int, classes: Sequence[str] = ("bad", "good", "neither")) -> None:
    with file.open("w") as target:
        target.write("one,two,label\n")
        for i, (one, two) in enumerate(texts(rows)):
            target.write(f'{one},"{two}",{classes[i % len(classes)]}\n')


def tokenizer_of(model: str) -> tuple[Any, int]:
    from nanofinetune.data.pretrained import import_library, length_limit, load_tokenizer

    import_library()
    tokenizer = load_tokenizer(model)
    return tokenizer, length_limit(model, tokenizer)


def plain_tokenizer() -> Any:
    """What padding reads from a tokenizer."""
    return SimpleNamespace(
        pad_token_id=0, pad_token_type_id=0, padding_side="right", model_max_length=8, model_input_names=["input_ids"]
    )


def save_tiny_model(folder: Path, model: str) -> str:
    """A random BERT of one layer, with the tokenizer of `model`: what a run costs beside its model."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer, _ = tokenizer_of(model)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokens_of(store: Any) -> int:
    return int(store.lengths.sum())


@contextmanager
def quiet() -> Iterator[StringIO]:
    with redirect_stdout(StringIO()) as said:
        yield said


# --- turns ------------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[SimpleNamespace], Found]] = {
    "table ours": table_ours, "table library": table_library, "command": command,
    "rows ours": rows_ours, "rows library": rows_library,
    "evaluate ours": evaluate_ours, "evaluate library": evaluate_library,
    "classes ours": classes_ours, "classes library": classes_library, "run ours": run_ours,
    "predict ours": predict_ours, "saves ours": saves_ours, "saves library": saves_library,
}  # fmt: skip
SIZES = {"table": ROWS, "rows": ROWS, "evaluate": ROWS, "classes": CLASSES, "saves": KEPT}
UNIT = {"table": "rows", "rows": "rows", "evaluate": "rows", "classes": "classes", "saves": "kept"}
SAME = {  # what both sides must agree on, and to what share
    "table": {"rows": 0.0}, "rows": {"tokens": 0.0}, "evaluate": dict.fromkeys(("accuracy", "f1", "macro_f1"), 1e-9),
    "classes": dict.fromkeys(("accuracy", "macro_f1"), 1e-9), "saves": {},
}  # fmt: skip


def in_a_process(name: str, **case: Any) -> Found:
    """A case in a fresh process. Raises SystemExit, with its last lines, where it fails."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(case["folder"], "datasets")),
        "NANOFINETUNE_CACHE": str(Path(case["folder"], "tokens")),
    }  # fmt: skip
    words = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"name": name, **case})]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=case["folder"], check=False)
    if done.returncode != 0:
        raise SystemExit(f"scale.py: {name} of {case['size']:,} failed:\n{done.stderr[-3000:]}")
    found: Found = json.loads(done.stdout.rstrip("\n").rpartition("\n")[2])
    return found


Measure = Callable[..., Found]
Turn = dict[str, dict[str, Found]]  # what: side: its figures


def table(size: int, model: str, tree: str | None, folder: Path, measure: Measure) -> Turn:
    """One turn of each side, cold and then from what it has cached."""
    write_table(folder / "table.csv", size)
    case = {"size": size, "model": model, "file": str(folder / "table.csv")}
    sides = {"library": "table library", "ours": "table ours"}
    found = {what: {} for what in ("cold", "cached")}  # type: Turn
    trees = {"ours": str(ROOT), "before": tree} if tree else {}
    for side, name in sides.items():
        (folder / side).mkdir()
        for what in found:
            found[what][side] = measure(name, **case, folder=str(folder / side), cached=what == "cached")
    for what in ("command, cold", "command, cached") if tree else ():
        found[what] = {}
    if tree:  # labels that an older checkout may take, too
        data = folder / "data"
        data.mkdir()
        write_table(data / "train.csv", size, ["0", "1", "2"])
        write_table(data / "validation.csv", 16, ["0", "1", "2"])  # evaluating is not what is measured
        case["file"] = str(data)
    for side, place in reversed(trees.items()):
        (folder / f"command-{side}").mkdir()
        for what in ("command, cold", "command, cached"):
            found[what][side] = measure("command", **case, folder=str(folder / f"command-{side}"), tree=place)
    return found


def plain(piece: str) -> Callable[..., Turn]:
    """A piece of two sides, library and ours, without a file."""

    def turn(size: int, model: str, tree: str | None, folder: Path, measure: Measure) -> Turn:
        found: dict[str, Found] = {}
        for side in ("library", "ours"):
            (folder / side).mkdir()
            found[side] = measure(f"{piece} {side}", size=size, model=model, folder=str(folder / side))
        return {"": found}

    return turn


def classes(size: int, model: str, tree: str | None, folder: Path, measure: Measure) -> Turn:
    found = {"scores": plain("classes")(size, model, tree, folder, measure)[""]}
    case = {"size": size, "model": save_tiny_model(folder / "tiny", model), "folder": str(folder)}
    write_table(folder / "table.csv", CLASS_ROWS, [f"class {k}" for k in range(size)])
    found["run"] = {"ours": measure("run ours", **case, file=str(folder / "table.csv"))}
    found["predict"] = {"ours": measure("predict ours", **case)}
    return found


PIECES: dict[str, Callable[..., Turn]] = {
    "table": table, "rows": plain("rows"), "evaluate": plain("evaluate"), "classes": classes, "saves": plain("saves"),
}  # fmt: skip


def compare(
    piece: str, sizes: Sequence[int], model: str, tree: str | None, repeats: int, measure: Measure = in_a_process
) -> list[dict[str, Any]]:
    """Rows of the record: what, unit, sizes, and for each side its medians; in the order in which they were found."""
    turns: dict[int, list[Turn]] = {}
    for size in sizes:
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="nanofinetune-scale-") as place:
                turns.setdefault(size, []).append(PIECES[piece](size, model, tree, Path(place), measure))
            check_same(piece, turns[size][-1])
    rows = []
    for what, sides in turns[sizes[0]][0].items():
        for figure in [name for name in next(reversed(sides.values())) if name not in ("rows", "tokens", *SAME[piece])]:
            row: dict[str, Any] = {"piece": piece, "what": what, "figure": figure, "of": UNIT[piece], "sizes": [*sizes]}
            for side in sides:
                found = [[turn[what][side].get(figure) for turn in turns[size]] for size in sizes]
                if None not in found[0]:
                    row[side] = [statistics.median(some) for some in found]  # type: ignore[type-var]
                    row[f"{side} slope"] = slope(sizes, row[side])
            rows.append(row)
    return rows


def check_same(piece: str, turn: Turn) -> None:
    """Both sides have done the same. Raises SystemExit naming what differs."""
    for what, sides in turn.items():
        for name, share in SAME[piece].items():
            values = {side: found[name] for side, found in sides.items() if name in found}
            if len(values) == 2 and not math.isclose(*values.values(), rel_tol=share):
                raise SystemExit(f"scale.py: {piece} {what}: {name} differs: {values}")


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float | None:
    """The exponent of a power law through the larger sizes: of three or more, all but the smallest; None of one.

    >>> slope([10, 100, 1000], [7.0, 1.0, 10.0])
    1.0
    """
    points = [(math.log(n), math.log(cost)) for n, cost in zip(sizes, costs, strict=True) if n > 0 and cost > 0]
    points = points[1:] if len(points) > 2 else points
    if len({x for x, _ in points}) < 2:
        return None
    x, y = (statistics.fmean(axis) for axis in zip(*points, strict=True))
    return round(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points), 6)


# --- the command line -------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row for people, a line a side."""
    head = " ".join(filter(None, (row["piece"], row["what"]))) + f": {row['figure']}"
    lines = [f"{head}, at {', '.join(f'{size:,}' for size in row['sizes'])} {row['of']}"]
    for side in ("library", "before", "ours"):
        if side in row:
            told = "" if row[f"{side} slope"] is None else f"  slope {row[f'{side} slope']:.2f}"
            lines.append(f"  {side:<8} {' '.join(f'{value:>10.4g}' for value in row[side])}{told}")
    return "\n".join(lines)


def merged(base: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with those pieces of an earlier one of the same file that were not measured again.

    Raises UsageError where the earlier one is of another machine, model or number of turns.
    """
    anew = {row["piece"] for row in record["rows"]}
    rows = earlier(base, record, ("machine", "model", "repeats")).get("rows", [])
    rows = [row for row in rows if row["piece"] not in anew] + record["rows"]
    return record | {"rows": sorted(rows, key=lambda row: list(PIECES).index(row["piece"]))}


def parse(argv: list[str] | None = None) -> Any:
    parser = Parser(prog="scale.py", description=__doc__)
    add, count = parser.add_argument, number(int, 0, MOST)
    add("pieces", metavar="PIECE", nargs="*", help=f"{', '.join(PIECES)} (default: all)")
    add("--sizes", metavar="N", nargs="+", type=count, help="in place of each piece's own, from the smallest on")
    add("--tree", metavar="DIR", help="another checkout of the project, whose train.py is measured too (table)")
    add("--model", metavar="DIR", help="whose tokenizer is used (default: the packaged checkpoint)")
    add("--repeats", metavar="N", type=number(int, 1), default=1, help="turns of each side (default 1)")
    add("--record", metavar="NAME", help="write bench/records/DATE_cpu_NAME.json")
    args = parser.parse_args(argv)
    for piece in args.pieces:
        if piece not in PIECES:
            raise UsageError(f"{piece}: there is no such piece; choose from {', '.join(PIECES)}")
    args.pieces = args.pieces or list(PIECES)
    for piece in args.pieces:
        least = {"classes": 2, "saves": 0}.get(piece, 20)
        if args.sizes and (sorted({*args.sizes}) != args.sizes or args.sizes[0] < least):
            said = " ".join(map(str, args.sizes))
            raise UsageError(f"--sizes {said}: {piece} takes numbers from {least} on, each greater than the one before")
    if args.tree is not None and not Path(args.tree, "train.py").is_file():
        raise UsageError(f"--tree {args.tree}: there is no train.py in it; name a checkout of the project")
    args.base = record_base(args.record, "cpu")
    return args


def main() -> None:
    if sys.argv[1:2] == ["--child"]:  # what `in_a_process` starts
        case = SimpleNamespace(**json.loads(sys.argv[2]))
        print(json.dumps(CASES[case.name](case)), flush=True)
        return
    args = parse()
    from pieces import absolute, check_model, machine, model_of, packaged_model, short

    model = absolute(model_of(args.model))
    check_model(model)
    tree = None if args.tree is None else str(Path(args.tree).resolve())
    record: dict[str, Any] = {
        "what": "scale", "machine": machine(), "model": short(model, packaged_model()), "repeats": args.repeats,
        "rows": [],
    }  # fmt: skip
    if args.base:
        merged(args.base, record)  # refuse now what would be refused after the measuring
    for piece in args.pieces:
        for row in compare(piece, args.sizes or SIZES[piece], model, tree, args.repeats):
            record["rows"].append(row)
            print(line(row), flush=True)
        if args.base:
            args.base.with_suffix(".json").write_text(json.dumps(merged(args.base, record), indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_main("scale.py", main))
