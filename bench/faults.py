"""What survives a fault? train.py and Accelerate's checkpointing recipe, killed, damaged, stopped: the same faults.

    python bench/faults.py                                     50 kills, then every other fault; a table, a JSON line
    python bench/faults.py --kills 4 --only kills              fewer
    python bench/faults.py --json bench/records/NAME.json      keep it

Ours is train.py with --save-every; theirs is `theirs` below: Accelerate's own example for checkpoints (save_state into
step_N, load the newest folder, `skip_first_batches`), with a seedable sampler. Both train a tiny BERT with dropout on
random pairs. Each rank (process of a run) is forked from a server that has done the imports. A kill is SIGKILL to all
of a run's ranks at a random moment, two times in seven during a save. "Same weights": the resumed run's final weights
equal the uninterrupted run's bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from readme import machine_text

from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError
from nanofinetune.launch.job import free_port

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, BATCH, SAVE_EVERY, WORDS = 2, 4, 5, [f"word{i}" for i in range(40)]
ROWS = {"train": 240, "validation": 24}
LIMIT = 60.0  # seconds that a run may take


# ---- the two sides ---------------------------------------------------------------------------------------------------


def patience(fault: str) -> int:
    """Seconds that ranks wait for each other: few in a fault where one of them never arrives."""
    return 5 if fault in ("stop", "skip", "first") else 60


def ours(work: Path, out: Path, world: int, resume: bool, fault: str) -> None:
    """train.py's main, in this process."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec and spec.loader
    train: Any = importlib.util.module_from_spec(spec)
    sys.modules["train"] = train
    spec.loader.exec_module(train)
    if fault in ("stop", "skip") and os.environ["RANK"] == "1":
        from nanofinetune.ranks.loader import DataLoaderShard

        iterate = DataLoaderShard.__iter__

        def faulty(loader: Any) -> Any:
            for number, batch in enumerate(iterate(loader)):
                if number == 7 and fault == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if number != 7 or fault != "skip":
                    yield batch

        DataLoaderShard.__iter__ = faulty  # type: ignore[method-assign]
    if fault == "first":
        from nanofinetune.run import resume as resume_module

        def fail(*_: Any) -> None:
            raise RuntimeError("no such data")

        resume_module.find_start = fail  # type: ignore[assignment]
    sys.argv = ["train.py", "--model", str(work / "model"), "--data", str(work / "data"), "--epochs", str(EPOCHS)]
    sys.argv += [
        "--batch-size",
        str(BATCH),
        "--output",
        str(out),
        "--save-every",
        str(SAVE_EVERY),
        "--timeout",
        str(patience(fault)),
    ]
    if fault == "other" and os.environ["RANK"] == "1":
        sys.argv += ["--lr", "1e-3"]
    if resume:
        sys.argv += ["--resume", "auto"]
    sys.exit(train.run_main("train.py", train.main))


def theirs(work: Path, out: Path, world: int, resume: bool, fault: str) -> None:
    """Accelerate's example examples/by_feature/checkpointing.py in our words, on the same model and data."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, set_seed
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=patience(fault)))],
    )  # fmt: skip
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    with accelerator.main_process_first():
        if fault == "first" and accelerator.is_main_process:
            raise RuntimeError("no such data")
        lines = (work / "data" / "train.jsonl").read_text().splitlines()
    rows: Any = [
        {**tokenizer(row["sentence1"], row["sentence2"]), "labels": row["label"]} for row in map(json.loads, lines)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(work / "model")
    loader = DataLoader(rows, shuffle=True, batch_size=BATCH, collate_fn=DataCollatorWithPadding(tokenizer))
    rate = 1e-3 if fault == "other" and os.environ["RANK"] == "1" else 5e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    updates = EPOCHS * len(loader)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=updates)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    count = Count()
    accelerator.register_for_checkpointing(count)
    done = first_epoch = first_step = 0
    folders = [folder for folder in out.glob("step_*") if folder.is_dir()] if resume else []
    if folders:
        newest = max(folders, key=lambda folder: folder.stat().st_ctime)
        accelerator.load_state(str(newest))
        done = int(newest.name.replace("step_", ""))
        first_epoch, first_step = divmod(done, len(loader))
    for epoch in range(first_epoch, EPOCHS):
        model.train()
        loader.set_epoch(epoch)
        skip = first_step if epoch == first_epoch else 0
        for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
            if os.environ["RANK"] == "1" and done == 7 and fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if os.environ["RANK"] == "1" and done == 7 and fault == "skip":
                fault = ""
                continue
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            count.updates = done
            if done % SAVE_EVERY == 0:
                accelerator.save_state(str(out / f"step_{done}"))
        accelerator.print(f"epoch {epoch}:", flush=True)
    accelerator.wait_for_everyone()
    accelerator.save_model(accelerator.unwrap_model(model), str(out / "model"))
    accelerator.end_training()


class Count:
    """A thing of the user's own that goes into accelerate's checkpoints, as its example registers one."""

    updates = 0

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


SIDES: dict[str, Callable[..., None]] = {"nanofinetune": ours, "accelerate": theirs}


# ---- processes -------------------------------------------------------------------------------------------------------


def rank_main(side: str, rank: int, world: int, port: int, work: str, out: str, resume: bool, fault: str) -> None:
    """One rank, from its first line to its last."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    screen = os.open(f"{out}.screen{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    if fault == "pipe":  # as in `train.py | head -1`: whoever read the output has gone
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    import torch

    torch.set_num_threads(1)
    if fault == "disk":  # no file may be larger than this: the model is not, the optimizer's state of two moments is
        size = int(1.5 * (Path(work) / "model" / "model.safetensors").stat().st_size)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    SIDES[side](Path(work), Path(out), world, resume, fault)


class Run:
    """The ranks of one run."""

    def __init__(self, side: str, work: Path, out: Path, world: int, resume: bool = False, fault: str = "") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "datasets", "accelerate", "nanofinetune.accelerator"])
        port = free_port()
        self.out = out
        self.began = time.monotonic()
        self.ranks = [
            context.Process(target=rank_main, args=(side, rank, world, port, str(work), str(out), resume, fault))
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def end(self, limit: float = LIMIT, count: int | None = None) -> tuple[list[int | None], float]:
        """Wait for all ranks, or `count` of them, `limit` seconds at most -> exit codes (None: still ran), seconds."""
        while time.monotonic() - self.began < limit:
            if sum(process.exitcode is not None for process in self.ranks) >= (count or len(self.ranks)):
                break
            time.sleep(0.02)
        seconds = time.monotonic() - self.began
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        return codes, seconds

    def screen(self) -> str:
        return "".join(Path(f"{self.out}.screen{rank}").read_text() for rank in range(len(self.ranks)))


def checkpoints(side: str, out: Path) -> list[Path]:
    """The folders that have a checkpoint's name, oldest first."""
    found = (out / "checkpoints").glob("update-*") if side == "nanofinetune" else out.glob("step_*")
    return sorted(found, key=lambda folder: int(folder.name[7 if side == "nanofinetune" else 5 :]))


def saving(side: str, out: Path, before: int) -> bool:
    """Whether a save is under way (theirs: its folder has just appeared)."""
    if side == "nanofinetune":
        folder = out / "checkpoints"
        return folder.is_dir() and any(name.startswith(".saving-") for name in os.listdir(folder))
    return len(checkpoints(side, out)) > before


def whole_checkpoint(side: str, folder: Path) -> bool:
    """Whether a checkpoint is complete. Theirs has no list of its files, so: whether each of them can be read."""
    import torch
    from safetensors.torch import load_file

    from nanofinetune.run.checkpoint import check

    if side == "nanofinetune":
        return not check(folder)
    try:
        load_file(folder / "model.safetensors")
        for name in ("optimizer.bin", "scheduler.bin"):
            torch.load(folder / name)
        for name in ("random_states_0.pkl", "custom_checkpoint_0.pkl"):  # written last
            torch.load(folder / name, weights_only=False)
    except Exception:
        return False
    return True


def weights(out: Path) -> bytes:
    file = out / "model" / "model.safetensors"
    return file.read_bytes() if file.exists() else b""


# ---- faults ----------------------------------------------------------------------------------------------------------


def kills(side: str, work: Path, number: int, dice: random.Random) -> dict[str, Any]:
    """Kill `number` runs, half on 1 rank and half on 2, two of seven while a save is under way, and resume each."""
    found = {"runs": number, "inside a save": 0, "resumed": 0, "same weights": 0, "lost a checkpoint": 0}
    whole, seconds = {}, {}
    for world in (1, 2):
        run = Run(side, work, work / f"{side}-whole-{world}", world)
        codes, seconds[world] = run.end()
        assert codes == [0] * world, run.screen()[-3000:]
        whole[world] = weights(run.out)
    for i in range(number):
        world, inside, out = 1 + i % 2, i % 7 in (2, 5), work / f"{side}-kill-{i}"
        run = Run(side, work, out, world)
        moment, update = run.began + dice.uniform(0.1, 0.95) * seconds[world], SAVE_EVERY * dice.randint(0, 20)
        while run.ranks[0].exitcode is None and (_latest(side, out) < update if inside else time.monotonic() < moment):
            time.sleep(0.002)
        before = len(checkpoints(side, out))
        while inside and run.ranks[0].exitcode is None and not saving(side, out, before):
            time.sleep(0.0002)
        had = checkpoints(side, out)
        if inside:
            time.sleep(dice.uniform(0, 0.005))
        alive = run.ranks[0].exitcode is None
        run.kill()
        # Ours leaves a folder with a name of its own. A half-written one of theirs looks like any other, so there every
        # kill that was meant to come during a save counts.
        left = any(path.name.startswith(".") for path in (out / "checkpoints").glob(".*ing-*"))
        found["inside a save"] += left if side == "nanofinetune" else inside and alive
        kept = had[-2:] if side == "nanofinetune" else had  # --keep 2
        found["lost a checkpoint"] += bool(had) and not any(whole_checkpoint(side, folder) for folder in kept)
        again = Run(side, work, out, world, resume=True)
        codes, _ = again.end()
        complete = "this run is complete" in again.screen()  # the kill came after its last line
        found["resumed"] += codes == [0] * world or complete
        found["same weights"] += weights(out) == whole[world] and (codes == [0] * world or complete)
        shutil.rmtree(out, ignore_errors=True)
    return found


def interrupted(side: str, work: Path, name: str) -> Path:
    """A run that was killed after three checkpoints, the newest of which is complete."""
    out = work / f"{side}-{name}"
    run = Run(side, work, out, 1)
    while len(checkpoints(side, out)) < (2 if side == "nanofinetune" else 4) or _latest(side, out) < 4 * SAVE_EVERY:
        if run.ranks[0].exitcode is not None:
            raise SystemExit(f"{side} ended too early:\n{run.screen()[-2000:]}")
        time.sleep(0.002)
    time.sleep(0.05)
    run.kill()
    while not whole_checkpoint(side, newest := checkpoints(side, out)[-1]):
        shutil.rmtree(newest)  # the kill came while it was written, which is another fault than the one to come
    return out


def _latest(side: str, out: Path) -> int:
    found = checkpoints(side, out)
    return int(found[-1].name[7 if side == "nanofinetune" else 5 :]) if found else 0


def damaged(side: str, work: Path, kind: str) -> str:
    """Resume where the newest checkpoint has truncated or bit-flipped weights, or a pickle that runs code."""
    out = interrupted(side, work, kind)
    newest = checkpoints(side, out)[-1]
    victim = work / f"{side} ran it"
    file = newest / "model.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "flipped":
        content = bytearray(file.read_bytes())
        content[-2] ^= 64
        file.write_bytes(content)
    else:
        target = newest / ("custom.json" if side == "nanofinetune" else "custom_checkpoint_0.pkl")
        assert target.exists(), f"{target} is not part of the checkpoint"
        target.write_bytes(pickle.dumps(_Touch(str(victim))))
    run = Run(side, work, out, 1, resume=True)
    codes, _ = run.end()
    if victim.exists():
        return "ran the code"
    if codes != [0]:
        return f"does not resume: {run.screen().strip().splitlines()[-1][:90]}"
    same = weights(out) == weights(work / f"{side}-whole-1")
    passed = "passes over it, " if "passed over" in run.screen() else "resumes from it, "
    return passed + ("same weights" if same else "other weights")


class _Touch:
    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.victim),))


def full_disk(side: str, work: Path) -> str:
    out = work / f"{side}-disk"
    run = Run(side, work, out, 1, fault="disk")
    codes, _ = run.end()
    said = [line for line in run.screen().splitlines() if "too large" in line.lower()]
    whole = [folder for folder in checkpoints(side, out) if folder.exists()]
    return (
        f"training {'goes on to its end' if codes == [0] else 'ends'}; {'said why' if said else 'does not say why'}; "
        + (f"{len(whole)} folder(s) that look like checkpoints")
    )


def terminated(side: str, work: Path, number: signal.Signals = signal.SIGTERM) -> str:
    out = work / f"{side}-{number.name}"
    run = Run(side, work, out, 2)
    while _latest(side, out) < 2 * SAVE_EVERY:
        if run.ranks[0].exitcode is not None:
            raise SystemExit(f"{side} ended too early:\n{run.screen()[-2000:]}")
        time.sleep(0.002)
    time.sleep(0.02)
    for process in run.ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)
    codes, _ = run.end()
    saved = "saved at the update" if f"stopped by {number.name} after update" in run.screen() else "nothing saved"
    return f"exit {codes[0]}, {saved}"


def hung(side: str, work: Path, fault: str) -> str:
    """Two ranks; one is stopped, or skips a batch, or fails in main_process_first. Time-out: 5 s on both sides."""
    out = work / f"{side}-{fault}"
    run = Run(side, work, out, 2, fault=fault)
    codes, seconds = run.end(limit=40, count=1 if fault == "stop" else 2)
    if all(code is None for code in codes):
        return "hangs (40 s)"
    if all(code == 0 for code in codes):
        return "goes unnoticed: exit 0"
    words = {
        "stop": "rank 1 does not answer",
        "skip": "a rank has skipped a batch",
        "first": "rank 0 failed with RuntimeError",
    }
    named = "names the rank and the place" if words[fault] in run.screen() else "names neither rank nor place"
    return f"ends after {seconds:.0f} s, {named}"


def broken_pipe(side: str, work: Path) -> str:
    out = work / f"{side}-pipe"
    codes, _ = Run(side, work, out, 1, fault="pipe").end()
    same = weights(out) == weights(work / f"{side}-whole-1")
    return f"exit {codes[0]}, {'same weights' if same else 'no model'}"


def other_rate(side: str, work: Path) -> str:
    """Rank 1 has another learning rate than rank 0."""
    run = Run(side, work, work / f"{side}-other", 2, fault="other")
    codes, _ = run.end()
    if codes == [0, 0]:
        return "goes unnoticed: exit 0"
    return f"exit {codes[0]}, {'names the option' if '--lr' in run.screen() else 'names nothing'}"


def odd_folder(side: str, work: Path) -> str:
    """Beside the checkpoints lies a copy that the user made, under a name that ends in a higher number."""
    out = interrupted(side, work, "odd")
    newest = checkpoints(side, out)[-1]
    copy = newest.parent / ("backup-00000090" if side == "nanofinetune" else "step_backup_90")
    shutil.copytree(newest, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    run = Run(side, work, out, 1, resume=True)
    codes, _ = run.end()
    if codes != [0]:
        return f"does not resume: {run.screen().strip().splitlines()[-1][:90]}"
    same = weights(out) == weights(work / f"{side}-whole-1")
    return f"resumes, {'same' if same else 'other'} weights; the folder is {'there' if copy.exists() else 'gone'}"


SAVES = """
import sys
from {package} import Accelerator
import torch
accelerator = Accelerator(cpu=True)
accelerator.prepare(torch.nn.Linear(1, 1))
accelerator.save_state(sys.argv[1])
accelerator.save_state(sys.argv[1])
print("saved twice")
"""


def own_folder(side: str, work: Path) -> str:
    """save_state into a folder that holds a file of the user's, and once more."""
    folder = work / f"{side}-own"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    command = [sys.executable, "-c", SAVES.format(package=side), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout.strip() or done.stderr.replace(f"{work}/", "").strip().splitlines()[-1][:90]
    return f"the file is {'there' if (folder / 'thesis.tex').exists() else 'gone'}; {said}"


def save_cost(repeats: int = 7) -> dict[str, Any]:
    """Seconds that a save of BERT's 22 million parameters and AdamW's state takes from training, taking turns."""
    import statistics

    import torch
    from torch import nn

    from nanofinetune.accelerator import Accelerator
    from nanofinetune.cpu.memory import keep_freed_memory
    from nanofinetune.step.optim import AdamW

    keep_freed_memory()  # as train.py does
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(*[nn.Linear(384, 384) for _ in range(150)])
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found: dict[str, list[float]] = {"in the background": [], "waiting for it": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for i in range(2 * repeats + 2):  # the first of each warms up
            kind = list(found)[i % 2]
            began = time.perf_counter()
            accelerator.save_state(Path(folder, f"update-{i}"), keep=1, background=kind == "in the background")
            found[kind].append(time.perf_counter() - began)
            accelerator._saver.wait()
    ratios = [a / b for a, b in zip(*(found[kind][1:] for kind in found), strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {kind: round(statistics.median(times[1:]), 4) for kind, times in found.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }


FAULTS: dict[str, Callable[[str, Path], str]] = {
    "newest checkpoint truncated": lambda side, work: damaged(side, work, "truncated"),
    "newest checkpoint has a flipped bit": lambda side, work: damaged(side, work, "flipped"),
    "newest checkpoint holds a malicious pickle": lambda side, work: damaged(side, work, "malicious"),
    "disk full from the first save on": full_disk,
    "SIGTERM on both ranks": terminated,
    "SIGHUP on both ranks": lambda side, work: terminated(side, work, signal.SIGHUP),
    "the reader of stdout has gone": broken_pipe,
    "rank 1 has another learning rate": other_rate,
    "a copied, damaged checkpoint under a higher number": odd_folder,
    "save_state into a folder of the user's": own_folder,
    "a rank is stopped (SIGSTOP)": lambda side, work: hung(side, work, "stop"),
    "a rank skips a batch": lambda side, work: hung(side, work, "skip"),
    "rank 0 fails in main_process_first": lambda side, work: hung(side, work, "first"),
}


# ---- the table -------------------------------------------------------------------------------------------------------


def prepare(work: Path, rows: Mapping[str, int] = ROWS, width: int = 64) -> None:
    """A tiny random BERT with dropout, its tokenizer, and random pairs: so many rows a split."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    dice = random.Random(0)
    (work / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(work / "vocab.txt"), model_max_length=64).save_pretrained(work / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(work / "model")
    (work / "data").mkdir()
    for split, count in rows.items():
        pairs = [[" ".join(dice.choices(WORDS, k=dice.randint(2, 9))) for _ in range(2)] for _ in range(count)]
        lines = [json.dumps({"sentence1": a, "sentence2": b, "label": dice.randint(0, 1)}) for a, b in pairs]
        (work / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = Parser(prog="faults.py", description=__doc__)
    parser.add_argument("--kills", type=number(int, 0), default=50, help="runs to kill, on each side (default 50)")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help=f"kills, or of: {'; '.join(FAULTS)}")
    parser.add_argument("--cost", action="store_true", help="time what a save takes from training, on a quiet machine")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default 0)")
    parser.add_argument("--json", type=Path, help="write the record there, and a table beside it (.md)")
    args = parser.parse_args()
    unknown = [name for name in args.only or () if name not in ("kills", *FAULTS)]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: choose kills, or of {'; '.join(FAULTS)}")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, in every run that this starts too
    from pieces import machine

    record: dict[str, Any] = {"what": "faults", "machine": machine(), "seed": args.seed, "rows": {}}
    if args.cost:
        record["save"] = save_cost()
        print(f"a save's cost on the training path: {record['save']}", file=sys.stderr, flush=True)
        args.sides = args.sides if args.only else []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        work = Path(folder)
        prepare(work)
        for side in args.sides:
            dice = random.Random(args.seed)
            count = args.kills if not args.only or "kills" in args.only else 0
            summary = kills(side, work, count, dice)
            if count:
                text = (
                    f"{summary['resumed']} of {count} resume, {summary['same weights']} with the same weights;"
                    f" {summary['inside a save']} were inside a save; {summary['lost a checkpoint']} lost a checkpoint"
                )
                name = f"{count} runs killed at random moments (SIGKILL), on 1 and 2 ranks"
                record["rows"].setdefault(name, {})[side] = text
                record.setdefault("kills", {})[side] = summary
                print(f"{side}: {name}: {text}", file=sys.stderr, flush=True)
            for name, fault in FAULTS.items():
                if args.only is None or name in args.only:
                    record["rows"].setdefault(name, {})[side] = fault(side, work)
                    print(f"{side}: {name}: {record['rows'][name][side]}", file=sys.stderr, flush=True)
    table = table_of(record)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table + "\n")
    print(json.dumps(record))


def table_of(record: dict[str, Any]) -> str:
    """The record as a table in Markdown."""
    sides = list(SIDES)
    lines = ["| fault | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides)]
    lines += [
        f"| {name} | " + " | ".join(found.get(side, "") for side in sides) + " |"
        for name, found in record["rows"].items()
    ]
    if "save" in record:
        save, seconds = record["save"], record["save"]["seconds"]
        lines += ["", (
            f"A save of {save['parameters']:,} parameters and AdamW's state takes {seconds['in the background']} s from"
            f" training, {seconds['waiting for it']} s where training waits for the disk: ratio {save['ratio']}."
        )]  # fmt: skip
    return "\n".join([*lines, "", f"{machine_text(record['machine'])}; {record['machine']['date']}."])


if __name__ == "__main__":
    sys.exit(run_main("faults.py", main))
