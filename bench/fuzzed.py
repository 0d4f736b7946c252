"""The cases of bench/fuzz.py: command lines, checkpoints, cache files, models and data that someone might hand us.

    dice, place = random.Random("0 caches 7"), Path("an empty folder")
    KINDS["caches"](dice, place, base, 7)              fills the folder -> Case: what to run there, and what is right

A case is a function of its dice and its number. `place/yard` is what the program is given, `place/outside` must stay as
it is, `place/own/cwd` is where it runs and may write. What hostile code would do is to make `place/ran`, or `ran` in
the folder where it runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

YARD, OUTSIDE = "../../yard", "../../outside"  # as a program in own/cwd names them
CHECKPOINTS = "out/checkpoints"
JOB = ["--model", f"{YARD}/model", "--data", f"{YARD}/data", "--device", "cpu"]
RUN = [
    *JOB,
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--lr",
    "1e-3",
    "--save-every",
    "3",
    "--keep",
    "9",
    "--output",
    "out",
]


@dataclass
class Case:
    """What to run, with what around it, and what is right."""

    program: str  # a name in fuzz.PROGRAMS
    words: list[str]
    what: str = ""  # was done, in words
    right: str = "any"  # a name in fuzz.RIGHT: what exit 0 must mean; "refused": it must be 2
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str | None = None  # None: closed
    writes: list[str] = field(default_factory=list)  # places beside own/ that the command line itself names to write
    facts: dict[str, Any] = field(default_factory=dict)  # for `right`


# ---- words -----------------------------------------------------------------------------------------------------------

HOSTILE = (
    "", " ", "-", "--", "=", "-1", "0", "00", "-0", "+1", "1.0", "2.5", "nan", "-inf", "1e400", "1e-400", "0x10",
    "1_0", "\u0663", "9" * 30, "9" * 5000, "None", "True", "[]", "{}", "a b", "x\ny", "x\r", "\t", "\x1b[2J",
    "\x9b31m", "\u202e", "\ufeff", "\udcff", "\U0001f600", "%s%n", "{0.__class__}", "$(touch ran)", "`touch ran`",
    "; touch ran", "| touch ran", "a[$(touch ran)]", "'", '"', "\\", "*", "?", "~", "~nobody-of-this-name", ".", "..",
    "/", "//", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "../../outside", "../../outside/thesis.txt",
    "../../yard/model/config.json", "x" * 300, "y/" * 3000, "auto", "cpu", "cuda", "cuda:99", "glue/", "glue/nothing",
    "a/b", "--lr", "--model=", "@file", "file://x",
)  # fmt: skip
# train.py's options -> values that are right; "" stands for none. tests/bench/test_fuzz.py compares it with --help.
OPTIONS = {
    "--model": (f"{YARD}/model",), "--data": (f"{YARD}/data",), "--text-columns": ("sentence1",),
    "--label-column": ("label",), "--task": ("auto", "single", "multi", "regression"), "--drop-unlabelled": ("",),
    "--separator": (",", "tab"), "--encoding": ("utf-8", "cp1252"), "--max-length": ("8", "64"),
    "--class-weights": ("balanced",), "--patience": ("1",), "--keep-best": ("", "f1", "accuracy"),
    "--epochs": ("1", "2"), "--max-steps": ("1", "3"), "--batch-size": ("1", "4", "5"),
    "--eval-batch-size": ("1", "32"), "--accumulate": ("1", "2"), "--group-by-length": ("",), "--fast-dropout": ("",),
    "--lr": ("1e-3", "1e30", "5e-324"), "--weight-decay": ("0", "0.1"), "--warmup-steps": ("0", "1", "0.5"),
    "--schedule": ("linear", "constant", "cosine", "polynomial", "inverse_sqrt"), "--clip-norm": ("1", "1e-30"),
    "--device": ("cpu",), "--precision": ("no", "bf16"), "--seed": ("0", "9223372036854775807"),
    "--uneven": ("mask", "wrap"), "--output": ("out", "new/deep/out"), "--save-every": ("1",), "--keep": ("1", "2"),
    "--resume": ("auto",), "--dry-run": ("",), "--on-nan": ("stop", "skip"), "--timeout": ("60",),
}  # fmt: skip
VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "NANOFINETUNE_CACHE", "SLURM_PROCID",
    "TORCHELASTIC_RESTART_COUNT", "NANOFINETUNE_MIXED_PRECISION",
)  # fmt: skip
LAUNCH = (
    "NPROC_PER_NODE", "OMP_NUM_THREADS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
    "MAX_RESTARTS", "NANOFINETUNE_MIXED_PRECISION", "NANOFINETUNE_DEVICE", "SLURM_NTASKS", "SLURM_NNODES",
    "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_NODEID", "SLURM_JOB_NODELIST", "PET_NNODES", "RANK", "LOCAL_RANK",
)  # fmt: skip


def option(dice: random.Random, hostile: float) -> list[str]:
    """One option of train.py with a value, which is hostile that often."""
    name = dice.choice(list(OPTIONS))
    value = dice.choice(HOSTILE) if dice.random() < hostile else dice.choice(OPTIONS[name])
    if value == "" and "" in OPTIONS[name]:
        return [name]
    return [f"{name}={value}"] if dice.random() < 0.2 else [name, value]


def stdin_of(dice: random.Random) -> str | None:
    """Nothing, or the answer that some library might be waiting for."""
    return dice.choice((None, "", "y\n" * 50, "\x00\n\xff\n"))


def given_job(dice: random.Random, place: Path, base: Path) -> None:
    for name in ("model", "data", "tuned"):
        shutil.copytree(base / name, place / "yard" / name)


def of_train(dice: random.Random, place: Path, base: Path, program: str = "train.py") -> Case:
    given_job(dice, place, base)
    words = list(JOB)
    for _ in range(dice.randint(0, 4)):
        words += option(dice, hostile=0.4)
    chance = dice.random()
    if chance < 0.1:
        del words[dice.randrange(len(words))]
    elif chance < 0.2:
        words.insert(dice.randrange(len(words) + 1), dice.choice(HOSTILE))
    if not any(word.startswith("--max-steps") for word in words):
        words += ["--max-steps", dice.choice("12")]  # whatever the other options say, it ends soon
    environment = {}
    if dice.random() < 0.15:  # ranks that nobody has started are waited for: no number that could be one
        numbers = {"1.0", "1_0", "+1", "00", "-0", "\u0663", "9" * 30}
        environment = {dice.choice(VARIABLES): dice.choice([word for word in HOSTILE if word not in numbers])}
    outputs = [word.partition("=")[2] if word.startswith("--output=") else after
               for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("--output")]  # fmt: skip
    if environment.get("NANOFINETUNE_CACHE"):
        outputs.append(environment["NANOFINETUNE_CACHE"])
    if program == "ours.py":
        trace = dice.choice(("trace.json", *HOSTILE))
        words.insert(0, trace)
        outputs.append(trace)
    return Case(program, words, "options", "trained", environment, stdin_of(dice), outputs)


def of_predict(dice: random.Random, place: Path, base: Path) -> Case:
    given_job(dice, place, base)
    rows = [dice.choice(("word1 word2\tword3", "\t", "word1\t", "word9\t" + "word2 " * 500)) for _ in range(9)]
    chance = dice.random()
    if chance < 0.25:
        rows.insert(dice.randrange(9), dice.choice(("", "a\tb\tc", "no tab", "\x00\t\x00", "\ufeff\tb", "a\r\tb")))
    text = "\n".join(rows) + dice.choice(("", "\n", "\r\n"))
    content = text.encode()
    if chance > 0.75:
        content = content[:20] + dice.randbytes(9) + content[20:]
    (place / "yard" / "lines.txt").write_bytes(content)
    piped = dice.random() < 0.3
    words = [f"{YARD}/tuned", "-" if piped else f"{YARD}/lines.txt"]
    for _ in range(dice.randint(0, 2)):
        words += [dice.choice(("--batch-size", "--device")), dice.choice(("1", "64", "cpu", *HOSTILE))]
    if dice.random() < 0.4:
        words[dice.randrange(len(words))] = dice.choice(HOSTILE)
    stdin = content.decode("latin-1") if piped and dice.random() < 0.8 else stdin_of(dice)
    return Case(
        "predict", words, "lines and options", "predicted", stdin=stdin, facts={"lines": content.decode("latin-1")}
    )


def of_exercise(dice: random.Random, place: Path, base: Path) -> Case:
    words = dice.choice(([], ["schedule"], ["collate"], ["ddp"], [dice.choice(HOSTILE)]))
    writes = []
    if dice.random() < 0.7:
        target = dice.choice(("mine", "new/mine", ".", *HOSTILE))
        words = [*words, *dice.choice((["--to", target], [f"--to={target}"]))]
        writes = [target]
    if dice.random() < 0.3:
        words = [
            *words,
            *dice.choice((["--check", "none.py"], [dice.choice(HOSTILE)], ["--check", dice.choice(HOSTILE)])),
        ]
    return Case("exercise", list(words), "options", "rebuilt", stdin=stdin_of(dice), writes=writes)


def of_trace(dice: random.Random, place: Path, base: Path) -> Case:
    """Mostly what it refuses itself: a run of two ranks takes seconds."""
    given_job(dice, place, base)
    name = dice.choice(("-n", "--updates", "--picture", "--timeline"))
    odd = [name, dice.choice(HOSTILE)] if dice.random() < 0.7 else [dice.choice(HOSTILE)]
    words, writes = ["-n", "1", "--updates", "1", *JOB, *odd], odd[1:]
    if dice.random() < 0.5:
        words.append("--dry-run")
    return Case("trace", words, "options", "traced", stdin=stdin_of(dice), writes=writes)


def of_launch(dice: random.Random, place: Path, base: Path) -> Case:
    """launch.sh --print: whatever it is given, bash reads back the same words from what it prints."""
    own: list[str] = []
    if dice.random() < 0.5:
        value = dice.choice(("1", "2", *HOSTILE))
        own += dice.choice((["-n", value], [f"-n{value}"], ["--max-restarts", value], [f"--max-restarts={value}"]))
    words = [word for _ in range(dice.randint(0, 4)) for word in option(dice, hostile=0.6)]
    environment = {}
    for _ in range(dice.choice((0, 0, 1, 2))):
        environment[dice.choice(LAUNCH)] = dice.choice(("1", "2", "auto", "node[1-3]", *HOSTILE))
    settings = [
        f"{dice.choice((*LAUNCH, *HOSTILE))}={dice.choice(('1', *HOSTILE))}" for _ in range(dice.choice((0, 0, 3)))
    ]
    raw = "\n".join(settings).encode(errors="surrogateescape") + dice.choice((b"", b"\n", b"\x00\xff"))
    (place / "yard" / "launch.env").write_bytes(raw if settings else b"")
    environment["NANOFINETUNE_LAUNCH_ENV"] = f"{YARD}/launch.env"
    return Case("launch.sh", ["--print", *own, "--", *words], "options, variables, launch.env", "printed", environment,
                stdin_of(dice), facts={"words": words})  # fmt: skip


def of_config(dice: random.Random, place: Path, base: Path) -> Case:
    answers = [
        dice.choice(("", "1", "2", "auto", "cpu", "no", "yes", "0", "node", *HOSTILE))
        for _ in range(dice.randint(0, 30))
    ]
    if dice.random() < 0.3:
        (place / "yard" / "launch.env").write_text("NNODES=1\n")
    stdin = "\n".join(answer.encode(errors="surrogateescape").decode("latin-1") for answer in answers)
    words = ["config"] if dice.random() < 0.8 else ["config", dice.choice(HOSTILE)]
    environment = {"NANOFINETUNE_LAUNCH_ENV": f"{YARD}/launch.env"}
    return Case("launch.sh", words, "answers", "configured", environment, stdin, [f"{YARD}/launch.env"])


def of_bench(dice: random.Random, place: Path, base: Path) -> Case:
    """Command lines that these scripts cannot run: what they measure takes minutes."""
    script = dice.choice(
        ("captured", "commands", "compare", "faults", "fuzz", "pieces", "quality", "throughput", "readme", "gpu.sh")
    )
    bogus = (
        [f"--bogus{dice.choice(HOSTILE)}"] if dice.random() < 0.6 else ["--json", "no/such/folder/x.json", "--bogus"]
    )
    words = [*bogus, *(dice.choice(HOSTILE) for _ in range(dice.randint(0, 2)))]
    return Case(script if script == "gpu.sh" else f"{script}.py", words, "options", "refused", stdin=stdin_of(dice))


COMMANDS: tuple[Callable[[random.Random, Path, Path], Case], ...] = (
    of_train, of_predict, of_launch, of_exercise, of_train, of_bench, of_train, of_config, of_train, of_predict,
    of_train, of_launch, of_train, of_exercise, of_train, of_bench, of_train,
    lambda dice, place, base: of_train(dice, place, base, "ours.py"), of_train, of_trace,
)  # fmt: skip


def commands(dice: random.Random, place: Path, base: Path, number: int) -> Case:
    return COMMANDS[number % len(COMMANDS)](dice, place, base)


# ---- damage to files -------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 0.5, -(10**30), 10**30, float("nan"), float("inf"), "", "x", "\x1b[2J", "../../outside",
    [], {}, [[]], {"x": {}}, ["x"], "9" * 30, "$(touch ran)",
)  # fmt: skip
IMPOSSIBLE = tuple(value for value in ODD if value not in (0, 1, 0.5))  # where a count, a rate or a name is meant
DEEP = "[" * 100_000


class Touch:
    """A pickle of it makes a file when it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = str(victim)

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.victim),))


def a_pickle(place: Path) -> bytes:
    return pickle.dumps(Touch(place / "ran"))


def flip(dice: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    for bit in dice.sample(range(8 * len(content)), min(dice.randint(1, 3), 8 * len(content))):
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(dice: random.Random, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(max(1, len(content)))])


def lengthen(dice: random.Random, file: Path) -> None:
    file.write_bytes(file.read_bytes() + dice.randbytes(dice.randint(1, 99)))


def shuffle(dice: random.Random, file: Path) -> None:
    """One stretch of it is zeros, or another one's copy."""
    content, size = bytearray(file.read_bytes()), dice.randint(1, 99)
    begin, other = dice.randrange(max(1, len(content))), dice.randrange(max(1, len(content)))
    content[begin : begin + size] = dice.choice((bytes(size), content[other : other + size]))
    file.write_bytes(content)


def nothing_left(dice: random.Random, file: Path) -> None:
    file.write_bytes(b"")


def garbage(dice: random.Random, file: Path) -> None:
    file.write_bytes(dice.choice((b"{}", b"null", b"\x00" * 99, DEEP.encode(), b"PK\x03\x04", dice.randbytes(999))))


def delete(dice: random.Random, file: Path) -> None:
    file.unlink()


def as_pickle(dice: random.Random, file: Path) -> None:
    file.write_bytes(a_pickle(next(path for path in file.parents if path.name.startswith("case-"))))


def as_link(dice: random.Random, file: Path) -> None:
    """To itself, to nothing, to an endless device, or to a copy outside."""
    place = next(path for path in file.parents if path.name.startswith("case-"))
    copy = place / "outside" / file.name
    shutil.copy(file, copy)
    file.unlink()
    file.symlink_to(dice.choice((file, place / "outside" / "nothing", Path("/dev/zero"), copy, place / "outside")))


def as_fifo(dice: random.Random, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_folder(dice: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_giant(dice: random.Random, file: Path) -> None:
    """A gigabyte, of which the disk holds nothing."""
    os.truncate(file, 2**30)


ANY_FILE: tuple[Callable[[random.Random, Path], None], ...] = (
    flip, flip, flip, truncate, truncate, lengthen, shuffle, nothing_left, garbage, delete, as_pickle, as_link, as_fifo,
    as_folder, as_giant,
)  # fmt: skip


def places_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON tree but its root; a long list (a generator's state) counts as one."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        if not (isinstance(value, list) and len(value) > 50):
            yield from places_of(value, (*path, key))


def change_json(dice: random.Random, file: Path, values: tuple[Any, ...] = ODD) -> str:
    """Put an odd value somewhere into it -> what was done."""
    tree = json.loads(file.read_text())
    *path, last = dice.choice(list(places_of(tree)))
    inner = tree
    for key in path:
        inner = inner[key]
    inner[last] = dice.choice(values)
    file.write_text(json.dumps(tree))
    return f"{'.'.join(map(str, [*path, last]))} is {str(inner[last])[:40]!r}"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def rehash(folder: Path) -> None:
    """Let the manifest say what the files are: only a look at the values can find the damage."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def of_one_file(dice: random.Random, folder: Path) -> str:
    file, damage = dice.choice(sorted(folder.iterdir())), dice.choice(ANY_FILE)
    damage(dice, file)
    return f"{damage.__name__} {file.name}"


def of_two_files(dice: random.Random, folder: Path) -> str:
    one, other = dice.sample(sorted(folder.iterdir()), 2)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    return f"{one.name} and {other.name} are swapped"


def of_another_save(dice: random.Random, folder: Path) -> str:
    """A file of an older checkpoint, or all of them, in the place of this one's."""
    older = min(folder.parent.iterdir())
    name = dice.choice(sorted(path.name for path in folder.iterdir()))
    if dice.random() < 0.3:
        shutil.rmtree(folder)
        shutil.copytree(older, folder)
        return "it is a copy of an older one"
    shutil.copy(older / name, folder / name)
    if name == "custom.json":
        rehash(folder)  # the place in the data knows its update; whoever rehashes weights has made other weights
    return f"{name} is an older one's"


def with_a_stranger(dice: random.Random, folder: Path) -> str:
    name = dice.choice(
        ("notes.txt", ".hidden", "model.bin", "custom_checkpoint_0.pkl", "\x1b[2J", "a\nb", "manifest.json.new")
    )
    (folder / name).write_bytes(a_pickle(next(path for path in folder.parents if path.name.startswith("case-"))))
    return f"{name!r} is in it"


def with_other_manifest(dice: random.Random, folder: Path) -> str:
    if dice.random() < 0.7:
        return "manifest: " + change_json(dice, folder / "manifest.json")
    manifest = json.loads((folder / "manifest.json").read_text())
    name = dice.choice(("../../../../../outside/thesis.txt", "/etc/passwd", "", ".", "..", "a/b", "\x00", "x" * 999))
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return f"manifest: it names {name[:40]!r}"


def with_other_values(dice: random.Random, folder: Path) -> str:
    """A value that cannot be, with hashes that fit."""
    file = dice.choice([path for path in sorted(folder.glob("*.json")) if path.name != "manifest.json"])
    said = change_json(dice, file, IMPOSSIBLE)
    rehash(folder)
    return f"{file.name}, rehashed: {said}"


def with_other_format(dice: random.Random, folder: Path) -> str:
    """Something else than a checkpoint's file, with hashes that fit."""
    file = dice.choice([path for path in sorted(folder.iterdir()) if path.name != "manifest.json"])
    damage = dice.choice((garbage, truncate, as_pickle, nothing_left, lengthen))
    if file.suffix == ".json" and damage in (truncate, lengthen):
        damage = garbage
    damage(dice, file)
    rehash(folder)
    return f"{damage.__name__} {file.name}, rehashed"


def with_another_name(dice: random.Random, folder: Path) -> str:
    number = int(folder.name[7:])
    name = dice.choice((f"update-{number + 1:08d}", "update-" + "9" * 200, "update-\u0663", "update--1",
                        "UPDATE-00000099", f".saving-{folder.name}-0123abcd",
                        f".replaced-{folder.name}-0123abcd"))  # fmt: skip
    folder.rename(folder.parent / name)
    return f"it is called {name[:40]}"


def with_neighbours(dice: random.Random, folder: Path) -> str:
    """What lies beside the checkpoints, under a number above theirs."""
    place, name = (
        folder.parent / "update-99999999",
        dice.choice(("empty", "file", "link", "loop", "fifo", "deep", "many")),
    )
    if name == "empty":
        place.mkdir()
    elif name == "file":
        place.write_text("mine")
    elif name == "link":
        place.symlink_to(folder, target_is_directory=True)
    elif name == "loop":
        place.symlink_to(place)
    elif name == "fifo":
        os.mkfifo(place)
    elif name == "deep":
        place.mkdir()
        (place / "manifest.json").write_text(DEEP)
    else:
        for i in range(300):
            (folder.parent / f"update-{90000000 + i}").mkdir()
    return f"a neighbour of a higher number: {name}"


def of_the_output(dice: random.Random, folder: Path) -> str:
    """Not the checkpoint but what lies around it."""
    out = folder.parent.parent
    metrics, name = out / "metrics.jsonl", dice.choice(("flip", "fifo", "gone", "folder", "link", "parent", "stranger"))
    if name in ("fifo", "gone", "folder", "link"):
        content = metrics.read_bytes()
        metrics.unlink()
        if name == "fifo":
            os.mkfifo(metrics)
        elif name == "folder":
            metrics.mkdir()
        elif name == "link":
            (out.parent.parent.parent / "outside" / "metrics.jsonl").write_bytes(content)
            metrics.symlink_to(dice.choice((metrics, Path("/dev/full"), out / "nothing")))
    elif name == "flip":
        flip(dice, metrics)
    elif name == "stranger":
        metrics.write_bytes(b'{"step": 1e999, "epoch": ' + DEEP.encode() + b"\n\x00\xff\n" + metrics.read_bytes())
    else:
        shutil.rmtree(folder.parent)
        folder.parent.write_text("mine")
    return f"metrics.jsonl or checkpoints: {name}"


FOLDERS: tuple[Callable[[random.Random, Path], str], ...] = (
    of_one_file, of_one_file, of_one_file, of_one_file, of_two_files, of_another_save, with_a_stranger,
    with_other_manifest, with_other_manifest, with_other_values, with_other_values, with_other_format,
    with_another_name, with_neighbours, of_the_output,
)  # fmt: skip


def checkpoints(dice: random.Random, place: Path, base: Path, number: int) -> Case:
    """A run that was stopped, and its newest checkpoint damaged, or its two newest ones; or a state of save_state."""
    if number % 5 == 4:
        shutil.copytree(base / "state", place / "yard" / "state")
        changes = (
            of_one_file,
            of_two_files,
            with_a_stranger,
            with_other_manifest,
            with_other_values,
            with_other_format,
        )
        change = dice.choice(changes)
        what = change(dice, place / "yard" / "state" / "checkpoint_1")
        right = "loads" if change is with_other_values else "loaded"  # a value may be one that the object can have
        return Case("load_state", [f"{YARD}/state/checkpoint_1"], what, right, {}, stdin_of(dice))
    given_job(dice, place, base)
    shutil.copytree(base / "run", place / "own" / "cwd" / "out")
    folders = sorted((place / "own" / "cwd" / CHECKPOINTS).iterdir(), reverse=True)
    damage = FOLDERS[number % len(FOLDERS)]
    said = [damage(dice, folders[0])]
    if dice.random() < 0.3 and folders[1].is_dir():
        said.append("the older one: " + of_one_file(dice, folders[1]))
    resume = "auto" if dice.random() < 0.8 else dice.choice(("out", CHECKPOINTS, f"{CHECKPOINTS}/{folders[0].name}"))
    return Case("train.py", [*RUN, "--resume", resume], "; ".join(said), "weights", {}, stdin_of(dice))


# ---- cache files -----------------------------------------------------------------------------------------------------


def sealed(file: Path, content: bytes) -> None:
    """A cache file with a checksum that fits."""
    file.write_bytes(hashlib.sha256(file.stem.encode() + content).digest() + content)


def an_array(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def arrays_of(file: Path) -> tuple[dict[str, Any], list[Any]]:
    with file.open("rb") as raw:
        raw.seek(32)
        kept, arrays = json.loads(np.load(raw).tobytes()), []
        while raw.tell() < file.stat().st_size:
            arrays.append(np.load(raw))
    return kept, arrays


def other_words(dice: random.Random, file: Path) -> None:
    """Its JSON, changed, under a checksum that fits."""
    kept, arrays = arrays_of(file)
    name = dice.choice(list(kept))
    tree: Any = dice.choice((
        {key: kept[key] for key in kept if key != name}, kept | {"more": 1}, [],
        1, None, "x", {},
    ))  # fmt: skip
    words = dice.choice((json.dumps(tree).encode(), json.dumps(tree).encode(), DEEP.encode(), b"\xff", b""))
    sealed(file, b"".join([an_array(np.frombuffer(words, np.uint8)), *map(an_array, arrays)]))


def other_arrays(dice: random.Random, file: Path) -> None:
    """One of its arrays, changed so that it cannot be one, under a checksum that fits."""
    kept, arrays = arrays_of(file)
    which = dice.randrange(len(arrays))
    array = arrays[which]
    place = next(path for path in file.parents if path.name.startswith("case-"))
    parts = [an_array(np.frombuffer(json.dumps(kept).encode(), np.uint8)), *map(an_array, arrays)]
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }"
    header = (huge % 10**15).ljust(127) + b"\n"
    zipped = io.BytesIO()
    np.savez_compressed(zipped, array)
    parts[1 + which] = dice.choice((
        an_array(np.array([Touch(place / "ran")], object), allow_pickle=True), header, header[:60], zipped.getvalue(),
        an_array(array.reshape(1, -1)), an_array(array[:-1]), an_array(np.array(3)), an_array(array.astype(complex)),
        an_array(array.astype(str)), an_array(np.concatenate([array, array])), b"",
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    ))  # fmt: skip
    sealed(file, b"".join(parts))


def cut_short(dice: random.Random, file: Path) -> None:
    content = file.read_bytes()[32:]
    sealed(file, content[: dice.randrange(len(content))])


def another_ones(dice: random.Random, file: Path) -> None:
    """The whole and undamaged file of other data, under this one's name."""
    other = next(path for path in sorted(file.parent.glob("*.tokens")) if path != file)
    shutil.copy(other, file)


SEALED: tuple[Callable[[random.Random, Path], None], ...] = (other_words, other_arrays, cut_short, another_ones)


def caches(dice: random.Random, place: Path, base: Path, number: int) -> Case:
    """The tokens of a data set, kept before; their file is damaged. Every tenth time train.py reads it."""
    given_job(dice, place, base)
    shutil.copytree(base / "cache", place / "own" / "cache", dirs_exist_ok=True)
    facts = json.loads((base / "facts.json").read_text())
    file = place / "own" / "cache" / facts["cache file"]
    damage = dice.choice(SEALED) if number % 3 == 2 else dice.choice(ANY_FILE)
    damage(dice, file)
    words, what = [*JOB, "--max-steps", "2"], damage.__name__
    if number % 10 == 9:
        return Case("train.py", words, what, "same", {}, stdin_of(dice))
    return Case("load_tokens", [f"{YARD}/model", f"{YARD}/data"], what, "tokens", {}, stdin_of(dice))


# ---- models and data -------------------------------------------------------------------------------------------------


def in_json(dice: random.Random, folder: Path) -> str:
    file = dice.choice(sorted(folder.glob("*.json")))
    return f"{file.name}: {change_json(dice, file)}"


def in_config(dice: random.Random, folder: Path) -> str:
    return f"config.json: {change_json(dice, folder / 'config.json')}"


def in_a_file(dice: random.Random, folder: Path) -> str:
    file, damage = dice.choice(sorted(folder.iterdir())), dice.choice(ANY_FILE)
    damage(dice, file)
    return f"{damage.__name__} {file.name}"


def with_code(dice: random.Random, folder: Path) -> str:
    """A config or tokenizer that asks for code of the folder's own."""
    place = folder.parent.parent
    for name in (
        "code",
        "modeling_bert",
        "tokenization_bert",
        "configuration_bert",
        "conftest",
        "torch",
        "usercustomize",
    ):
        (folder / f"{name}.py").write_text(f"open({str(place / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    repository = dice.choice(("code", "code.py", "../code", "somebody/repository--code"))
    config["auto_map"] = dict.fromkeys(names, f"{repository}.Thing")
    config["model_type"] = dice.choice(("bert", "nosuchmodel", "vit"))
    config |= dice.choice(({}, {"attn_implementation": "somebody/code"}, {"custom_pipelines": {"text-classification": {
        "impl": "code.Thing", "pt": ["AutoModel"]}}}, {"quantization_config": {"quant_method": "code"}}))  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    if dice.random() < 0.5:
        tokenizer |= {"auto_map": {"AutoTokenizer": ["code.Thing", "code.Thing"]}, "tokenizer_class": "Thing"}
        tokenizer["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        file.write_text(json.dumps(tokenizer))
    return f"auto_map of a {config['model_type']}"


def with_pickles(dice: random.Random, folder: Path) -> str:
    """Pickles under the names that libraries have read, beside the weights or in their place."""
    content = a_pickle(folder.parent.parent)
    if dice.random() < 0.5:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
        content = packed.getvalue()
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "tf_model.h5", "spiece.model",
             "flax_model.msgpack", "adapter_model.bin", "vocab.pkl", "model.pt")  # fmt: skip
    for name in names:
        (folder / name).write_bytes(content)
    if dice.random() < 0.3:
        (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "../../outside", "peft_type": "LORA"})
        )
    if dice.random() < 0.5:
        (folder / "model.safetensors").unlink()
        return "pickles in place of the weights"
    return "pickles beside the weights"


def with_bomb(dice: random.Random, folder: Path) -> str:
    """A megabyte that unpacks to a gigabyte, or a header that promises more than there is."""
    if dice.random() < 0.5:
        (folder / "model.safetensors").unlink()
        with (
            zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("archive/data.pkl", "w", force_zip64=True) as entry,
        ):
            for _ in range(1024):
                entry.write(bytes(2**20))
        return "a zip bomb in place of the weights"
    header = {
        "bert.embeddings.word_embeddings.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
    }
    text = json.dumps(header).encode()
    size = dice.choice((len(text), 2**63, 2**31))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text)
    return "weights that promise more than they hold"


def with_weights_index(dice: random.Random, folder: Path) -> str:
    """An index that leads out of the folder."""
    (folder / "model.safetensors").rename(folder.parent.parent / "outside" / "model.safetensors")
    target = dice.choice(("../../outside/model.safetensors", "/dev/zero", "nothing.safetensors", "", "../model"))
    index = {"metadata": {}, "weight_map": {"classifier.weight": target}}
    (folder / "model.safetensors.index.json").write_text(dice.choice((json.dumps(index), DEEP, "null")))
    return f"an index of the weights that leads to {target!r}"


def in_another_encoding(dice: random.Random, folder: Path) -> str:
    file, encoding = dice.choice(sorted(folder.glob("*.json"))), dice.choice(("utf-16", "utf-8-sig", "utf-32"))
    file.write_bytes(file.read_text().encode(encoding))
    return f"{file.name} in {encoding}"


MODELS: tuple[Callable[[random.Random, Path], str], ...] = (
    in_config, in_json, in_config, in_json, in_a_file, with_code, with_pickles, with_bomb, with_weights_index,
    in_another_encoding,
)  # fmt: skip


def rows_of(base: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base / "data" / f"{split}.jsonl").read_text().splitlines()]


def written(rows: list[dict[str, Any]], ending: str) -> bytes:
    """The rows as csv, tsv, json lines or parquet."""
    if ending == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    mark = "," if ending == "csv" else "\t"
    return "".join(
        mark.join(map(str, cells)) + "\n" for cells in (list(rows[0]), *(row.values() for row in rows))
    ).encode()


def odd_rows(dice: random.Random, content: bytes, ending: str) -> tuple[bytes, str, str]:
    """The same rows in another form, or other ones -> (content, what was done, what is right)."""
    if ending == "parquet":
        return content, "nothing", "same"
    lines = content.split(b"\n")
    middle = dice.randrange(1, len(lines) - 1)
    esc = b"\\u001b[2J" if ending == "jsonl" else b"\x1b[2J\x9b\r"
    mark, many = b"\t" if ending == "tsv" else b",", b"9" * 30
    columns = mark.join(b"c%d" % i for i in range(10**6)) + b"\n"
    if ending == "jsonl":
        columns = json.dumps({f"c{i}": i for i in range(10**6)}).encode() + b"\n"

    def between(row: bytes) -> bytes:
        return b"\n".join([*lines[:middle], row, *lines[middle + 1 :]])

    choices: dict[str, tuple[bytes, str]] = {
        "a mark at its beginning": (b"\xef\xbb\xbf" + content, "same"),
        "lines that end in CR LF": (content.replace(b"\n", b"\r\n"), "same"),
        "lines that end in CR": (content.replace(b"\n", b"\r"), "same"),
        "blank lines": (content.replace(b"\n", b"\n\n"), "same"),
        "no end of its last line": (content[:-1], "same"),
        "utf-16": (content.decode().encode("utf-16"), "same"),
        "utf-32": (content.decode().encode("utf-32"), "refused"),
        "a NUL": (between(lines[middle][:15] + b"\x00" + lines[middle][15:]), "any"),
        "a byte that is not UTF-8": (content.replace(b"word1", b"word\xff", 1), "refused"),
        "a million columns": (columns + content, "refused"),
        "a million columns alone": (columns, "refused"),
        "terminal escapes": (content.replace(b"sentence1", b"sent" + esc).replace(b"label", b"lab" + esc), "any"),
        "a long cell": (content.replace(b"word2", b"w" * dice.choice((999_000, 1_000_001)), 1), "any"),
        "a quotation mark": (content.replace(b"word3", b'"word3', 1), "any"),
        "a row twice": (between(lines[middle] + b"\n" + lines[middle]), "any"),
        "a row cut": (between(lines[middle][: dice.randrange(20)]), "any"),
        "deep brackets": (content.replace(b"0", DEEP.encode(), 1), "any"),
        "a label beyond 64 bits": (content.replace(b"1}", many + b"}", 1).replace(b"1\n", many + b"\n"), "any"),
        "one class": (content.replace(b"1}", b"0}"), "any"),
        "no rows": (lines[0] + b"\n", "refused"),
        "nothing": (b"", "refused"),
    }  # fmt: skip
    what = dice.choice(list(choices))
    return choices[what][0], what, choices[what][1]


NAMES = ("data", "data[1]", "da*ta", "data?", "{a,b}", "$(touch ran)", "; touch ran", "da\x1b[2Jta", "da\nta", "-data",
         "d\u202ea", "da\udcffta", "%s", "a b", "glue", "hf:data", "data::zip", "d" * 200)  # fmt: skip


def of_data(dice: random.Random, place: Path, base: Path) -> tuple[str, str, str]:
    """A folder of data in the yard -> (what --data names, what was done, what is right)."""
    shutil.rmtree(place / "yard" / "data")
    name, ending = dice.choice(NAMES), dice.choice(("csv", "tsv", "jsonl", "parquet"))
    folder = place / "yard" / name
    folder.mkdir()
    train, validation = (written(rows_of(base, split), ending) for split in ("train", "validation"))
    train, what, right = odd_rows(dice, train, ending)
    file = folder / f"train.{ending}"
    file.write_bytes(train)
    (folder / f"validation.{ending}").write_bytes(validation)
    if ending == "parquet" or dice.random() < 0.3:
        damage = dice.choice(ANY_FILE)
        damage(dice, file)
        what, right = f"{what}; {damage.__name__}", "any"
    if dice.random() < 0.3:  # what libraries have taken for a recipe
        code = f"open({str(place / 'ran')!r}, 'w').close()\n"
        for script in (
            f"{name}.py".replace("/", ""),
            "data.py",
            "dataset_infos.json",
            "README.md",
            "state.json",
            "train.pkl",
        ):
            (folder / script).write_bytes(a_pickle(place) if script.endswith("pkl") else code.encode())
        what += "; a script beside it"
    (place / "yard" / "data1").mkdir()  # what data[1] means as a pattern
    (place / "yard" / "data1" / file.name).write_bytes(b"x\n")
    return f"{YARD}/{name}", f"{ending} in {name[:40]!r}: {what}", right


def files(dice: random.Random, place: Path, base: Path, number: int) -> Case:
    """A model's folder or a data set's, made to harm or to mislead."""
    given_job(dice, place, base)
    if number % 2:
        data, what, right = of_data(dice, place, base)
        words = [*JOB, "--max-steps", "2"]
        words[3] = data
        return Case("train.py", words, what, right, {}, stdin_of(dice))
    trick = MODELS[number // 2 % len(MODELS)]
    if number // 2 % 3 == 2:
        (place / "yard" / "lines.txt").write_text("word1\tword2\n" * 5)
        what = trick(dice, place / "yard" / "tuned")
        words = [f"{YARD}/tuned", f"{YARD}/lines.txt"]
        return Case("predict", words, what, "predicted", {}, stdin_of(dice), facts={"lines": "word1\tword2\n" * 5})
    what = trick(dice, place / "yard" / "model")
    right = "same" if "beside" in what or trick is with_code else "any"
    return Case("train.py", [*JOB, "--max-steps", "2"], what, right, {}, stdin_of(dice))


KINDS: dict[str, Callable[[random.Random, Path, Path, int], Case]] = {
    "commands": commands, "checkpoints": checkpoints, "caches": caches, "files": files,
}  # fmt: skip
