"""Can a stranger's word, file or folder do harm? Hostile command lines, checkpoints, cache files, models and data.

    python bench/fuzz.py                                       200 commands, 300 checkpoints, 500 caches, 100 files
    python bench/fuzz.py --only commands:17 caches:3           these alone, with all that they printed
    python bench/fuzz.py --json bench/records/NAME.json        keep the counts

Each case (bench/fuzzed.py makes them) must end in a right result, or in exit code 2 and one line on stderr that names
the thing. A traceback, a crash, a hang, a write outside of its place, code of a file that runs, or a wrong result is a
fault: it is printed, and the exit code is 1. "Right" is compared with undamaged runs: the same weights, bit for bit,
after a resume; the same tokens from a damaged cache; as many updates, lines or words as were asked for.

Each case is a process of its own, forked from this one, which has done the imports; in an empty folder, with limits of
memory, file size and time. What it writes is known from two sides: an audit hook of Python's, and the state of every
file around it before and after. Cases follow from --seed and their numbers.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzzed import JOB, KINDS, RUN, YARD, Case
from readme import counts, machine_text

from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError, first_line, shown

ROOT = Path(__file__).resolve().parent.parent
MEMORY, FILE = 4 * 2**30, 2**28  # bytes that a case may take beside the imports, and that a file of its may have
FAULTS = ("traceback", "crash", "hang", "write outside", "code run", "wrong result", "not one line")
HALTS = re.compile("the loss is not finite|out of memory")  # these end with exit code 1 and one line


# ---- what is run -----------------------------------------------------------------------------------------------------


def of_package(name: str) -> Callable[[list[str]], int]:
    """`python -m nanofinetune.NAME`, in this process."""

    def program(words: list[str]) -> int:
        module = importlib.import_module(f"nanofinetune.{name}")
        return run_main(f"nanofinetune.{name.partition('.')[0]}", module.main)

    return program


def of_script(name: str) -> Callable[[list[str]], int]:
    """`python NAME`, in this process: train.py or one of bench/."""

    def program(words: list[str]) -> int:
        module = importlib.import_module(name.removesuffix(".py"))
        return run_main(name, module.main)

    return program


def ours(words: list[str]) -> int:
    return importlib.import_module("ours").main()


def shell(*command: str) -> Callable[[list[str]], int]:
    def program(words: list[str]) -> int:
        os.environ["PYTHON"] = sys.executable
        os.execv(shutil.which(command[0]) or command[0], [*command, *words])

    return program


def load_tokens(words: list[str]) -> int:
    """What train.py does to get its tokens -> their digests as the last line."""
    from nanofinetune.data import cache, pretrained

    def main() -> None:
        model, data = words
        tokenizer = pretrained.load_tokenizer(model)
        limit = pretrained.length_limit(model, tokenizer)
        found, stores = cache.load_tokens(data, None, None, 42, tokenizer, limit)
        kept = {name: value for name, value in asdict(found).items() if name != "splits"}
        digests = {split: store.digest() for split, store in stores.items()}
        print(json.dumps({"tokens": digests, "data": kept, "rows": {s: len(store) for s, store in stores.items()}}))

    return run_main("load_tokens", main)


def load_state(words: list[str]) -> int:
    """An Accelerator that has trained a little loads a state -> what it held before and after, as the last line."""
    accelerator, _ = an_accelerator(updates=1)
    before, loaded = state_of(accelerator), True
    try:
        accelerator.load_state(words[0])
    except ValueError as error:
        print(f"load_state: {error}", file=sys.stderr)
        loaded = False
    after = state_of(accelerator)
    print(json.dumps({"loaded": loaded, "before": before, "after": after}))
    return 0 if loaded or before != after else 2


def an_accelerator(updates: int) -> tuple[Any, Any]:
    """A layer, AdamW, a schedule and a loader, prepared and trained for so many updates."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from nanofinetune import Accelerator, AdamW, get_scheduler, set_seed

    accelerator = Accelerator(cpu=True)
    set_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = get_scheduler("linear", optimizer, 0, 10)
    loader: Any = DataLoader(TensorDataset(torch.arange(24.0).reshape(8, 3)), batch_size=2, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    for _, (batch,) in zip(range(updates), loader, strict=False):
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return accelerator, model


def state_of(accelerator: Any) -> str:
    """A hash of all that a state holds."""
    from nanofinetune.run.checkpoint import pack, random_state

    things = {name: thing.state_dict() for name, thing in accelerator._prepared.stateful().items()}
    tree, tensors = pack(things | {"random": random_state()})
    whole = json.dumps(tree).encode() + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    return hashlib.sha256(whole).hexdigest()[:16]


BENCH = ("captured", "commands", "compare", "faults", "fuzz", "pieces", "quality", "throughput", "readme")
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "train.py": of_script("train.py"), "predict": of_package("predict"), "exercise": of_package("exercise"),
    "trace": of_package("trace.__main__"), "launch.sh": shell("bash", str(ROOT / "launch.sh")),
    "gpu.sh": shell("sh", str(ROOT / "bench" / "gpu.sh")), "ours.py": ours, "load_tokens": load_tokens,
    "load_state": load_state, **{f"{name}.py": of_script(f"{name}.py") for name in BENCH},
}  # fmt: skip
SAYS = {"predict": "nanofinetune.predict", "exercise": "nanofinetune.exercise", "trace": "nanofinetune.trace"}
STARTS = ("trace", "launch.sh", "gpu.sh")  # they may start other processes


# ---- one case, in a process of its own -------------------------------------------------------------------------------


class Stage:
    """Where a case plays: `own` is its own, and everything else must stay as it was."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.cwd, self.yard, self.outside, self.home = (place / name for name in ("own/cwd", "yard", "outside", "home"))

    def build(self) -> None:
        for folder in (self.cwd, self.yard, self.outside, self.home, self.place / "own/tmp", self.place / "own/cache"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.outside / "thesis.txt").write_text("mine\n")
        (self.outside / "folder").mkdir()
        (self.home / ".bashrc").write_text("echo > ran\n")

    def snapshot(self) -> dict[str, list[Any]]:
        """Every path around `own` -> what shows that it was written, replaced or lost."""
        found: dict[str, list[Any]] = {}
        for top in (self.yard, self.outside, self.home):
            for folder, folders, names in os.walk(top):
                for name in (*folders, *names):
                    path = os.path.join(folder, name)
                    status = os.lstat(path)
                    plain = [status.st_ino, status.st_size, status.st_mtime_ns]
                    found[os.path.relpath(path, self.place)] = [
                        status.st_mode, *([] if stat.S_ISDIR(status.st_mode) else plain)
                    ]  # fmt: skip
        return found

    def named(self, case: Case) -> list[str]:
        """Absolute places that the command line itself names to be written."""
        places = []
        for word in case.writes:
            with suppress(ValueError):
                text = word.replace("~", str(self.home), 1) if word.startswith("~") else word
                place = os.path.join(self.cwd, text)
                places += [os.path.realpath(place), os.path.normpath(place)]  # /dev/stdin is another one's elsewhere
        return places


def play(kind: str, nth: int, seed: int, stage: Stage, base: Path, shared: Path) -> NoReturn:
    """The case itself: make it, watch it, run it. Never returns."""
    code = 70
    try:
        faulthandler.disable()  # of a test's process
        os.setsid()  # what it starts ends with it
        warnings.resetwarnings()  # as in a new interpreter
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        stage.build()
        case = KINDS[kind](random.Random(f"{seed} {kind} {nth}"), stage.place, base, nth)
        (stage.place / "case.json").write_text(json.dumps(asdict(case)))
        (stage.place / "before.json").write_text(json.dumps(stage.snapshot()))
        redirect(case, stage)
        watch(case, stage, shared)
        sys.argv = [case.program, *case.words]
        code = PROGRAMS[case.program](case.words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # as the interpreter itself would end
        code = 1
        with suppress(BaseException):
            print(traceback.format_exc(), file=sys.stderr)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def redirect(case: Case, stage: Stage) -> None:
    """The three streams, the working folder and the environment that a shell would have given it."""
    for name in [name for name in os.environ if name.startswith(("NANOFINETUNE_", "SLURM", "PET_", "TORCHELASTIC"))]:
        del os.environ[name]
    os.environ.update(
        HOME=str(stage.home), TMPDIR=str(stage.place / "own/tmp"), NANOFINETUNE_CACHE=str(stage.place / "own/cache"),
        NANOFINETUNE_REPORT="no",  # drawing lists the fonts by a program: tests/report has the page's hostile files
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.environ.update(case.environment)
    tempfile.tempdir = None
    os.chdir(stage.cwd)
    if case.stdin is None:
        os.close(0)
        sys.stdin = None
    else:
        file = stage.place / "stdin"
        file.write_bytes(case.stdin.encode("latin-1"))
        os.dup2(os.open(file, os.O_RDONLY), 0)
        sys.stdin = open(0, errors="surrogateescape", closefd=False)  # noqa: SIM115
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        made = os.open(stage.place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(made, descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1,
           "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1}  # fmt: skip
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn", "pickle.find_class")


def watch(case: Case, stage: Stage, shared: Path) -> None:
    """Limits, and a hook that notes in a file what is done outside of the case's place."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    size = pages * resource.getpagesize() + MEMORY
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    notes = os.open(stage.place / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    allowed = [str(stage.place / "own"), str(shared), "/dev/null", "/dev/shm", *stage.named(case)]
    starts = case.program in STARTS

    def inside(path: Any, itself: bool = False) -> bool:
        """`itself`: not what it leads to, if it is a link."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor
        folder, name = os.path.split(os.fsdecode(path))
        place = os.path.join(os.path.realpath(folder), name) if itself else os.path.realpath(os.fsdecode(path))
        return any(place == root or place.startswith(root.rstrip("/") + "/") for root in allowed)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        said = ""
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & WRITING) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))
            if writes and not inside(path):
                said = f"write outside: opens {path!r}"
        elif event in CHANGES:
            for path in args[: CHANGES[event]]:
                if not inside(path, itself=True):
                    said = f"write outside: {event} {path!r}"
        elif event in STARTING and not starts:
            said = f"code run: {event} {str(args)[:200]}"
        if said:
            os.write(notes, (said.replace("\n", " ") + "\n").encode(errors="backslashreplace"))

    sys.addaudithook(hook)


# ---- what came of it -------------------------------------------------------------------------------------------------


@dataclass
class Ending:
    """How a case has ended."""

    code: int | None  # None: it was still running at its time limit
    seconds: float
    stage: Stage
    base: Path
    case: Case
    out: str
    err: str

    def last(self) -> dict[str, Any]:
        """The last line of stdout, which is JSON."""
        found = json.loads(self.out.rstrip("\n").rpartition("\n")[2])
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found

    def facts(self) -> dict[str, Any]:
        return json.loads((self.base / "facts.json").read_text())


def trained(end: Ending) -> str:
    """As many updates as were asked for, scores that can be, and the plan alone for a dry run."""
    from train import parse_arguments

    if "-h" in end.case.words or "--help" in end.case.words:
        return "" if end.out.startswith("usage") else "no help"
    words = end.case.words[end.case.program == "ours.py" :]
    args = parse_arguments(words)
    if args.dry_run:
        return "" if any(line.startswith("precision  ") for line in end.out.splitlines()) else "no plan"
    found = end.last()
    if args.data == f"{YARD}/data":
        rows = sum(1 for _ in (end.base / "data" / "train.jsonl").open())
        updates = args.max_steps or args.epochs * -(-rows // (args.batch_size * args.accumulate))
        if found["steps"] > updates or (found["steps"] < updates and args.patience is None):
            return f"{found['steps']} updates, and {updates} were asked for"
    scores = [found[name] for name in ("accuracy", "f1") if name in found]
    if not all(score is None or 0 <= score <= 1 for score in scores):
        return f"scores {scores}"
    if args.output is not None and not (end.stage.cwd / Path(args.output).expanduser() / "result.json").exists():
        return "no result.json"
    return ""


def same(end: Ending) -> str:
    """The scores and the loss of the undamaged run of the same job."""
    found, facts = end.last(), end.facts()["result"]
    names = ("steps", "loss", "accuracy", "f1", "padding")
    return next((f"{name} is {found[name]}, not {facts[name]}" for name in names if found[name] != facts[name]), "")


def finite(end: Ending) -> str:
    """Any result of train.py."""
    found = end.last()
    return "" if found["steps"] == 2 else f"{found['steps']} updates"


def predicted(end: Ending) -> str:
    """A label and a probability for each line."""
    if "-h" in end.case.words or "--help" in end.case.words:
        return "" if end.out.startswith("usage") else "no help"
    piped = "-" in end.case.words
    text = (end.case.stdin or "") if piped else end.case.facts["lines"]
    lines = text.encode("latin-1").decode().split("\n")  # universal newlines: a lone CR ends a line too
    lines = "\n".join(lines).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    given = end.out.split("\n")[:-1]
    if len(given) != len(lines):
        return f"{len(given)} lines for {len(lines)}"
    for line, row in zip(lines, given, strict=True):
        label, chance, rest = row.split("\t", 2)
        if rest != line or not label or not -1e30 < float(chance) < 1e30:
            return f"{row[:60]!r} for {line[:40]!r}"
    return ""


def rebuilt(end: Ending) -> str:
    """The list, or a file that compiles."""
    if "-h" in end.case.words or "--help" in end.case.words:
        return "" if end.out.startswith("usage") else "no help"
    found = re.search(r"^wrote (.*); fill it in", end.out, re.DOTALL)
    if found is None:
        return "" if re.search(r"^schedule +\d+ lines", end.out, re.MULTILINE) else "neither a list nor a file"
    compile((end.stage.cwd / found[1]).read_text(), "rebuilt", "exec")
    return ""


def traced(end: Ending) -> str:
    return "" if end.out.startswith(("usage", "rank")) or "\nwrote " in end.out else "no report"


def printed(end: Ending) -> str:
    """bash reads back the words that were given, in their order, at the end of the command."""
    if "usage" in end.out or end.out.startswith("launch.sh ["):
        return ""
    script = 'eval "set -- $(cat)"; printf "%s\\0" "$@"'
    done = subprocess.run(
        ["bash", "-c", script], input=end.out.encode(errors="surrogateescape"), capture_output=True, cwd=end.stage.cwd,
        timeout=60, check=False,
    )  # fmt: skip
    words = [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]
    asked = end.case.facts["words"]
    begin = next((i for i, word in enumerate(words) if word.endswith("train.py")), len(words)) + 1
    rest = words[begin:]  # words of launch.sh's own that it does not know, what was asked, --device and --precision
    found = any(rest[i : i + len(asked)] == asked for i in range(len(rest) - len(asked) + 1))
    return "" if found else f"{rest} for {asked}"


def configured(end: Ending) -> str:
    """Settings that launch.sh reads, and nothing else."""
    from nanofinetune.launch.config import QUESTIONS

    text = (end.stage.yard / "launch.env").read_text()
    known = {question.name for question in QUESTIONS}
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return next((f"{line!r} in launch.env" for line in lines if line.partition("=")[0] not in known), "")


def loaded(end: Ending) -> str:
    """The state that was saved."""
    found, facts = end.last(), end.facts()
    if not found["loaded"]:
        return "a refused state has been loaded in part"
    return "" if found["after"] == facts["state"] else "another state than the saved one"


def loads(end: Ending) -> str:
    """A state, whole."""
    return "" if end.last()["loaded"] else "a refused state has been loaded in part"


def tokens(end: Ending) -> str:
    """Those of the undamaged run, whose file this run has looked for too."""
    if set(os.listdir(end.stage.place / "own" / "cache")) - set(os.listdir(end.base / "cache")):
        return "another file than the damaged one was looked for"
    return "" if end.last() == end.facts()["tokens"] else "other tokens"


def weights(end: Ending) -> str:
    """The weights of the run that nobody has stopped, and a word about where it went on."""
    file = end.stage.cwd / "out" / "model" / "model.safetensors"
    if hashlib.sha256(file.read_bytes()).hexdigest() != end.facts()["weights"]:
        return "other weights than the uninterrupted run's"
    words = ("resumed after update", "from the start")
    return "" if any(word in end.out for word in words) else "it does not say where it went on"


RIGHT: dict[str, Callable[[Ending], str]] = {
    "trained": trained, "same": same, "any": finite, "predicted": predicted, "rebuilt": rebuilt, "traced": traced,
    "printed": printed, "configured": configured, "loaded": loaded, "loads": loads, "tokens": tokens,
    "weights": weights,
}  # fmt: skip
FILES = {"own", "yard", "outside", "home", "case.json", "before.json", "stdin", "stdout", "stderr", "notes"}


def judge(end: Ending) -> tuple[str, str]:
    """-> (one of FAULTS, or "right" or "one line"; what was seen)."""
    stage, case = end.stage, end.case
    if end.code is None:
        return "hang", f"still running after {end.seconds:.0f} s"
    if (stage.place / "ran").exists() or (stage.cwd / "ran").exists():
        return "code run", "the file that it makes is there"
    notes = (stage.place / "notes").read_text() if (stage.place / "notes").exists() else ""
    if notes:
        fault, _, what = notes.splitlines()[0].partition(": ")  # of the first one
        return fault, what
    if changed := changes(stage, case):
        return "write outside", changed
    if "Traceback (most recent call last)" in end.err or "panicked at" in end.err:
        return "traceback", next(reversed(end.err.split("\n\n")[0].strip().splitlines()), "")
    if end.code < 0:
        return "crash", signal.Signals(-end.code).name
    if end.code == 0 and case.right == "refused":
        if end.out.startswith("usage"):
            return "right", "help"
        return "wrong result", "it was not refused"
    if end.code == 0:
        try:
            reason = RIGHT[case.right](end)
        except Exception as error:
            reason = f"its output is no result ({type(error).__name__}: {first_line(error)})"
        return ("wrong result", reason) if reason else ("right", "")
    return one_line(end)


def changes(stage: Stage, case: Case) -> str:
    """What of the files around the case has changed; "" if nothing has."""
    strangers = sorted(set(os.listdir(stage.place)) - FILES)
    if strangers:
        return f"{strangers[0]} is new"
    before, after = json.loads((stage.place / "before.json").read_text()), stage.snapshot()
    named = [os.path.relpath(place, os.path.realpath(stage.place)) for place in stage.named(case)]
    for path in {**before, **after}:
        was, now = before.get(path), after.get(path)
        if was == now:
            continue
        below = [place for place in named if path == place or path.startswith(place + "/")]
        if was is None and (below or any(place.startswith(path + "/") for place in named)):
            continue  # a new file in a place that the command line names, or a folder on the way there
        if path in named and case.program in ("ours.py", "launch.sh", "trace"):
            continue  # a file that the user names is written over
        return f"{path} is {'new' if was is None else 'gone' if now is None else 'changed'}"
    return ""


def one_line(end: Ending) -> tuple[str, str]:
    """Whether a refusal is exit code 2 and one printable line, from this program, about something that was given."""
    lines = [line for line in end.err.split("\n") if line and not line.startswith(("note: ", "passed over: "))]
    if len(lines) != 1:
        return "not one line", f"exit {end.code}, {len(lines)} lines on stderr: {' / '.join(lines)[:200]}"
    line, name = lines[0], SAYS.get(end.case.program, end.case.program)
    if end.code != 2 and not (end.code == 1 and HALTS.search(line)):
        return "not one line", f"exit {end.code}: {line[:200]}"
    if not line.isprintable() or not all(
        c.isprintable() or c in "\t\n" for c in end.out if end.case.program != "predict"
    ):
        return "not one line", f"control characters: {line[:200]!r}"
    if not line.startswith((f"{name}: ", "train.py: " if name == "ours.py" else f"{name}: ")):
        return "not one line", f"it does not begin with {name}: {line[:200]}"
    given = [*end.case.words, *end.case.environment, *end.case.environment.values()]
    given += [" ".join(word.splitlines()) for word in given]
    things = [thing for word in given for part in {word, word.partition("=")[0]} if (thing := shown(part)[:15])]
    things += ["required", "empty", "answers", "stdin", "launch.env", "name the file", "unrecognized"]
    if not any(thing in line for thing in things) and not re.search(" --[a-z]", line):
        return "not one line", f"it names nothing that was given: {line[:200]}"
    return "one line", line


# ---- all of them -----------------------------------------------------------------------------------------------------


def fork(child: Callable[[], None]) -> int:
    """A process that calls `child` and ends -> its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts threads; ours hold no lock here
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return pid


def run_cases(
    cases: Iterable[tuple[str, int]], seed: int, work: Path, jobs: int, limit: float
) -> Iterator[tuple[str, int, Ending]]:
    """Run them, so many at a time -> each as it ends. Its folder is there until the next one is asked for."""
    base, waiting = work / "base", list(reversed(list(cases)))
    running: dict[int, tuple[str, int, Stage, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind, nth = waiting.pop()
                stage = Stage(work / f"case-{kind}-{nth}")
                stage.place.mkdir()
                pid = fork(lambda: play(kind, nth, seed, stage, base, work / "shared"))  # noqa: B023 (called at once)
                running[pid] = (kind, nth, stage, time.monotonic())
            time.sleep(0.005)
            for pid, (kind, nth, stage, began) in list(running.items()):
                seconds = time.monotonic() - began
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and seconds < limit:
                    continue
                del running[pid]
                end_session(pid)
                if not ended:
                    os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status) if ended else None
                yield kind, nth, ending(code, seconds, stage, base)
                shutil.rmtree(stage.place, ignore_errors=True)
    finally:  # interrupted
        for pid in running:
            end_session(pid)


def end_session(pid: int) -> None:
    """End a case's process, and what it has started: they are in a session of their own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def ending(code: int | None, seconds: float, stage: Stage, base: Path) -> Ending:
    try:
        case = Case(**json.loads((stage.place / "case.json").read_text()))
    except (OSError, ValueError):
        raise SystemExit(f"fuzz.py: {stage.place.name} could not be made") from None
    texts = []
    for name in ("stdout", "stderr"):
        file = stage.place / name
        texts.append(file.read_bytes()[: 2**24].decode(errors="surrogateescape") if file.exists() else "")
    return Ending(code, seconds, stage, base, case, *texts)


def prepare(work: Path) -> None:
    """work/base: a tiny model, data, and what undamaged runs make of them: what every case is compared with."""
    import faults

    base, stage = work / "base", Stage(work / "case-base")
    base.mkdir()
    (work / "shared").mkdir()
    made = {"train": 24, "validation": 12}

    def make() -> None:
        import torch

        torch.set_num_threads(1)
        faults.prepare(base, rows=made, width=16)
        stage.build()
        for name in ("model", "data"):
            shutil.copytree(base / name, stage.yard / name)
        redirect(Case("", [], stdin=""), stage)
        facts: dict[str, Any] = {}
        accelerator, _ = an_accelerator(updates=3)
        facts["state"] = state_of(accelerator)
        accelerator.save_state(base / "state" / "checkpoint_1")
        load_tokens([f"{YARD}/model", f"{YARD}/data"])
        facts["tokens"] = printed_last(stage)
        facts["cache file"] = next(file.name for file in (stage.place / "own/cache").iterdir())
        lines = (base / "data" / "train.jsonl").read_text().splitlines(keepends=True)
        shutil.copytree(base / "data", stage.yard / "other")
        (stage.yard / "other" / "train.jsonl").write_text("".join(lines[::-1]))
        load_tokens([f"{YARD}/model", f"{YARD}/other"])
        shutil.copytree(stage.place / "own/cache", base / "cache")
        for words in ([*JOB, "--max-steps", "2"], RUN):
            sys.argv = ["train.py", *words]
            if PROGRAMS["train.py"](words):
                os._exit(1)
            facts["result"] = facts.get("result") or printed_last(stage)
        out = stage.cwd / "out"
        facts["weights"] = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
        shutil.copytree(out / "model", base / "tuned")
        shutil.rmtree(out / "model")
        (out / "result.json").unlink()
        newest = max((out / "checkpoints").iterdir())
        shutil.rmtree(newest)  # as if it had been killed just before its end
        shutil.copytree(out, base / "run")
        (base / "facts.json").write_text(json.dumps(facts))

    _, status = os.waitpid(fork(make), 0)
    if status or not (base / "facts.json").exists():
        said = "".join(
            (stage.place / name).read_text() for name in ("stdout", "stderr") if (stage.place / name).exists()
        )
        raise SystemExit(f"fuzz.py: the undamaged runs failed:\n{said[-3000:]}")
    shutil.rmtree(stage.place)


def printed_last(stage: Stage) -> dict[str, Any]:
    sys.stdout.flush()
    return json.loads((stage.place / "stdout").read_text().rstrip("\n").rpartition("\n")[2])


def import_all() -> None:
    """What the cases need, once: a forked process has it already."""
    import torch

    torch.set_num_threads(1)
    for name in ("train", "datasets", "pyarrow.parquet", "ours", "faults", *BENCH):
        importlib.import_module(name)
    from nanofinetune.data.pretrained import import_library

    import_library()
    for name in ("predict", "exercise", "trace.__main__", "launch.config"):
        importlib.import_module(f"nanofinetune.{name}")
    from transformers import BertForSequenceClassification, BertTokenizerFast  # noqa: F401

    with suppress(ImportError):  # its first import in a home makes a folder there, and lists the fonts
        importlib.import_module("matplotlib.font_manager")


def fuzz(
    cases: Iterable[tuple[str, int]], seed: int, jobs: int, limit: float, whole: bool = False
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Run the cases -> ({kind: {how they ended: how many}}, a line for each fault). `whole`: print all they print."""
    ends: dict[str, Counter[str]] = {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder).resolve()
        prepare(work)
        for kind, nth, end in run_cases(cases, seed, work, jobs, limit):
            verdict, what = judge(end)
            ends.setdefault(kind, Counter())[verdict] += 1
            command = " ".join([end.case.program, *(shown(word, most=60) or "''" for word in end.case.words)])
            line = f"{kind}:{nth}: {verdict}: {shown(what, most=300)} ({shown(end.case.what, most=120)}; {command})"
            if verdict in FAULTS:
                faults.append(line.replace(folder, "PLACE"))
                print(faults[-1], file=sys.stderr, flush=True)
            if whole:
                print(f"{line}\n{json.dumps(asdict(end.case))}\nexit {end.code} after {end.seconds:.1f} s")
                print(f"--- stdout\n{end.out[-4000:]}\n--- stderr\n{end.err[-8000:]}", flush=True)
    return ends, faults


def table_of(record: dict[str, Any]) -> str:
    """The counts as a table in Markdown, and the machine."""
    return f"{counts(record['rows'])}\n\n{machine_text(record['machine'])}; {record['machine']['date']}."


def main() -> None:
    parser = Parser(prog="fuzz.py", description=__doc__)
    parser.add_argument("--seed", metavar="N", type=number(int, 0), default=0, help="of all cases (default 0)")
    for kind, count in (("commands", 200), ("checkpoints", 300), ("caches", 500), ("files", 100)):
        parser.add_argument(
            f"--{kind}", metavar="N", type=number(int, 0, 10**6), default=count, help=f"how many (default {count})"
        )
    parser.add_argument("--only", metavar="KIND:N", nargs="+", help="these cases alone, and all that they print")
    parser.add_argument("--jobs", metavar="N", type=number(int, 1, 1024), default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--limit", metavar="SECONDS", type=number(float, 0, 10**6, above=True), default=60.0,
                        help="that a case may take (default 60)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the record there, and a table beside it (.md)")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    cases = [(kind, nth) for kind in KINDS for nth in range(getattr(args, kind))]
    if args.only:
        cases = [named(word) for word in args.only]
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
    sys.dont_write_bytecode = True
    began = time.monotonic()
    import_all()
    gc.collect()
    gc.freeze()  # or each process copies what its collector looks at
    from pieces import machine

    ends, faults = fuzz(cases, args.seed, args.jobs, args.limit, whole=args.only is not None)
    rows = {kind: {name: ends[kind][name] for name in ("right", "one line", *FAULTS)} for kind in KINDS if kind in ends}
    record = {"what": "fuzz", "machine": machine(), "seed": args.seed, "rows": rows, "faults": faults}
    print(table_of(record))
    print(f"{len(cases)} cases in {time.monotonic() - began:.0f} s, {len(faults)} faults", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table_of(record) + "\n")
    print(json.dumps(record))
    if faults:
        sys.exit(1)


def named(word: str) -> tuple[str, int]:
    """commands:17 -> ("commands", 17)."""
    kind, _, nth = word.partition(":")
    if kind not in KINDS or not re.fullmatch("[0-9]{1,9}", nth):
        raise UsageError(
            f"--only {shown(word, most=60)}: name one of {', '.join(KINDS)} and a number, as in commands:17"
        )
    return kind, int(nth)


if __name__ == "__main__":
    sys.exit(run_main("fuzz.py", main))
