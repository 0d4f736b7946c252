"""The course's job with what a user would take instead, and with train.py, in turns, each turn a fresh process.

    python bench/throughput.py                            every setup, on the packaged checkpoint and stdlib-pairs
    python bench/throughput.py fp32 bf16 --data ./mrpc --record speed
    python bench/throughput.py best trainerbest fabricbest --pairs 9 --steps 100

The peers: Accelerate (bench/peer.py), transformers' Trainer (bench/peer_trainer.py), Lightning Fabric
(bench/peer_fabric.py), and for prediction transformers' pipeline (bench/peer_pipeline.py).

Before a setup is timed, both sides run a few steps with the same initial weights, batches and dropout seeds, and their
losses have to agree; otherwise nothing is timed, the difference is named and the exit code is 1. Then they take turns.
A pair's ratio is the peer's time over ours: above 1 we are faster. For memory and for the time to the first step it is
ours over the peer's: below 1 is better. Shown are the median, the lowest and the highest ratio.

Each run gives all figures of its setup: time per 1,000 tokens (padding does not count), evaluation, time from the
command to the end of the first step, and the peak memory of the process and its children. Of prediction: the time from
the command to its end, and memory; there the labels and probabilities of all rows have to agree, in each pair.

The last line of stdout is one JSON object. `--record NAME` writes bench/records/DATE_DEVICE_NAME.json, .md and .png;
setups that are in today's record already and not measured again stay in it, each with its own pairs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from made import ENCODERS, SEED, SIZES, bert_of, encoder_of, pairs_of, rows_of, with_head
from pieces import NotEqual, has_bf16, job_of, machine, run_gated, short
from readme import earlier, machine_text, measured, peer_of, reached, record_base

from nanofinetune.data.pretrained import packaged_model
from nanofinetune.ground.cli import Parser, number
from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.process import peak_rss_mb

ROOT = Path(__file__).resolve().parent.parent
GATE_STEPS = 5  # whose losses both sides must agree on
WARM_UP = 4  # steps of a run that do not count for the time of a step
SIDES = ("library", "ours")  # as records call them
OURS = ROOT / "bench" / "ours.py"


@dataclass(frozen=True)
class Peer:
    """What train.py is compared with."""

    script: str  # in bench/
    needs: dict[str, str]  # module -> the package that brings it
    options: tuple[str, ...] = ()  # that each run of it gets


SKLEARN = {"sklearn": "scikit-learn"}
# Trainer spares biases and LayerNorm as train.py does, and both get the rate that is AdamW's default in the others.
PEERS = {
    "Accelerate": Peer("peer.py", {"accelerate": "accelerate"} | SKLEARN),
    "Trainer": Peer("peer_trainer.py", {"accelerate": "accelerate"} | SKLEARN, ("--weight-decay", "0.01")),
    "Fabric": Peer("peer_fabric.py", {"lightning_fabric": "lightning-fabric"} | SKLEARN),
    "pipeline": Peer("peer_pipeline.py", {}),  # predicts; all others train
}
# How far the losses of equal work may lie apart. In fp32 the two AdamW forms round differently, and train.py decays no
# bias and no LayerNorm; in bf16 such a difference in the seventh digit of a weight may turn over its third.
TOLERANCE = {"no": 2e-5, "bf16": 5e-3}
# The first loss is computed before any update: there only the batch, the weights and dropout count. A kernel may add in
# another order where rows are fewer, as train.py's are: with AMX the first losses of bf16 lie 4e-6 apart, those of fp32
# agree in all digits. Another dropout mask moves them by 5e-3.
FIRST = {"no": 1e-6, "bf16": 1e-4}
ALIKE = 1e-5  # how far two probabilities of a prediction may lie apart


@dataclass(frozen=True)
class Setup:
    """What both sides are asked to do."""

    name: str
    what: str
    precision: str = "no"
    nproc: int = 1
    batch: int = 8
    steps: int = 40
    same_work: bool = True
    library: tuple[str, ...] = ()  # options of the peer's script
    ours: tuple[str, ...] = ()  # options of train.py
    targets: tuple[tuple[str, str], ...] = ()  # (measure, target)
    length: int = 0  # tokens of every row of made-up data; 0: the data as they are
    size: str = ""  # of a model with random weights; "": the model as it is
    peer: str = "Accelerate"  # a key of PEERS
    encoder: str = ""  # another model with random weights: a key of ENCODERS

    @property
    def predicts(self) -> bool:
        return self.peer == "pipeline"


# measure -> (what, unit)
MEASURES = {
    "step": ("1,000 tokens of training", "ms"),
    "evaluation": ("evaluation", "s"),
    "first step": ("command to first step", "s"),
    "whole": ("command to end", "s"),  # of a prediction
    "memory": ("peak memory, process tree", "MiB"),
}
OURS_OVER_THEIRS = ("first step", "memory")  # whose ratio is ours over the library's
BEST = ("--group-by-length", "--fast-dropout")  # train.py's own choice


def best_precision(device: str = "cpu") -> tuple[str, str]:
    """The faster precision there, for either side -> (the value of --precision, its name)."""
    return ("bf16", "bf16") if device == "cuda" or has_bf16() else ("no", "fp32")


def setups(nproc: Sequence[int], precisions: Sequence[str], steps: int, device: str = "cpu") -> dict[str, Setup]:
    """All that can be measured, by name."""
    equal = "the same work"
    found: list[Setup] = []
    whole = (("evaluation", ">= 1.5"), ("first step", "<= 0.6"), ("memory", "<= 0.7"))
    if "no" in precisions and 1 in nproc:
        fp32 = Setup("fp32", f"{equal}, fp32", targets=(("step", ">= 1.8"), *whole))
        found += [fp32, *(replace(fp32, name=peer.lower(), peer=peer, targets=()) for peer in ("Trainer", "Fabric"))]
    if "bf16" in precisions and 1 in nproc:
        found.append(Setup("bf16", f"{equal}, bf16", "bf16", targets=(("step", ">= 2.1"),)))
        precision, named = best_precision(device)
        best = Setup(
            "best", f"best against best, {named}", precision, same_work=False, ours=BEST,
            library=("--fused", "--eval-batch-size", "64"), targets=(("step", ">= 2.2"),),
        )  # fmt: skip
        trainers = ("--group-by-length", "--eval-batch-size", "64")
        found += [
            best, replace(best, name="bestplain", what=f"best against {named} as the course has it", library=()),
            replace(best, name="trainerbest", peer="Trainer", library=trainers, targets=(("step", ">= 1.5"),)),
            replace(best, name="fabricbest", peer="Fabric", targets=(("step", ">= 1.5"),)),
        ]  # fmt: skip
    for n in nproc:
        if n > 1:
            target = ">= 1.8" if n == 2 else ">= 1.2"
            found.append(Setup(f"ranks{n}", f"{equal}, fp32, {n} processes", nproc=n, targets=(("step", target),)))
    if "no" in precisions and 1 in nproc:
        for kind in ENCODERS:
            name, targets = kind.replace("-", ""), (("step", ">= 1.4"),)
            found.append(Setup(name, f"{equal}, fp32, {kind}", encoder=kind, targets=targets))
        pairs = Setup("predict", "prediction of a file of pairs", peer="pipeline", targets=(("whole", ">= 1.6"),))
        found.append(pairs)
    cost = Setup("", "", length=64)
    for batch in (4, 8, 16, 32):
        found.append(replace(cost, name=f"batch{batch}", what=f"batches of {batch} rows of 64 tokens", batch=batch))
    for length in (32, 128, 256):
        found.append(replace(cost, name=f"length{length}", what=f"8 rows of {length} tokens", length=length))
    for size in SIZES:
        name = "size" + size.replace(" ", "")
        found.append(replace(cost, name=name, what=f"8 rows of 64 tokens, {size} model", size=size))
    for n in (2, 4):
        if n in nproc:
            found.append(replace(cost, name=f"nproc{n}", what=f"{n} processes of 8 rows of 64 tokens", nproc=n))
    return {s.name: replace(s, steps=steps if not s.length else max(GATE_STEPS + WARM_UP, steps // 4)) for s in found}


def missing(setup: Setup) -> str:
    """What to install for the setup's peer; "" where all is there."""
    absent = [package for module, package in PEERS[setup.peer].needs.items() if find_spec(module) is None]
    return f"{setup.peer} needs {' and '.join(absent)}: pip install {' '.join(absent)}" if absent else ""


def slow(setup: Setup, device: str) -> str:
    """Why a setup is measured only when it is named; "" for all others."""
    emulated = setup.precision == "bf16" and best_precision(device)[0] != "bf16"
    return "this CPU has no bf16 instructions, so a step takes seconds; name it to measure it" if emulated else ""


# --- one run of one side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the runs find model and data, which device they use, and where they may write."""

    model: str
    data: str
    device: str
    folder: Path


def command(side: str, setup: Setup, place: Place, steps: int, trace: Path) -> list[str]:
    """The command line of one run, whose losses and times, or answers, go into `trace`."""
    peer, here = PEERS[setup.peer], ["--cpu"] if place.device == "cpu" else []
    if setup.predicts:
        asked = [with_head(place.model, place.folder), pairs_of(place.data, place.folder)]
        if side == "library":
            return [sys.executable, str(ROOT / "bench" / peer.script), *asked, str(trace), *here]
        options = ["--text-columns", "sentence1", "sentence2", "--device", place.device, "--output", str(trace)]
        return [sys.executable, "-m", "nanofinetune.predict", *asked, *options]
    model = place.model
    if setup.size:
        model = bert_of(setup.size, model, place.folder)
    elif setup.encoder:
        model = encoder_of(setup.encoder, model, place.folder)
    data = rows_of(setup.length, place.folder) if setup.length else place.data
    launch = [sys.executable]
    if setup.nproc > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setup.nproc}"]
    common = ["--model", model, "--data", data, "--seed", str(SEED), "--max-steps", str(steps), "--batch-size"]
    common += [str(setup.batch), "--precision", setup.precision]
    if side == "library":
        same = ["--same-work"] if setup.same_work else []
        options = ["--trace", str(trace), *common, *peer.options, *setup.library, *same, *here]
        return [*launch, str(ROOT / "bench" / peer.script), *options]
    # AdamW's own default in the course's listing; on biases and LayerNorm, too, which train.py leaves out.
    options = [str(trace), *common, *setup.ours, "--weight-decay", "0.01", "--device", place.device]
    options += ["--uneven", "wrap"] if setup.nproc > 1 else []
    return [*launch, str(OURS), *options]


def measure(side: str, setup: Setup, place: Place, steps: int) -> dict[str, Any]:
    """Run one side in fresh processes -> its figures, and its losses or answers."""
    trace = place.folder / f"{side}.{'jsonl' if setup.predicts else 'json'}"
    trace.unlink(missing_ok=True)
    threads = max(1, (os.cpu_count() or 1) // setup.nproc)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(place.folder / "cache"), "NANOFINETUNE_CACHE": str(place.folder / "tokens"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with open(place.folder / f"{side}.log", "w+") as log:
        line = command(side, setup, place, steps, trace)
        began = time.time()
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, cwd=place.folder)
        peak = watch(process)
        seconds = time.time() - began
        if process.returncode != 0 or not trace.exists():
            log.seek(0)
            last = "\n".join(log.read().splitlines()[-15:])
            raise RuntimeError(f"{setup.name}: {side} ended with {process.returncode}:\n{last}")
    if setup.predicts:
        answers = [json.loads(row) for row in trace.read_text().splitlines()]
        return {"whole": seconds, "memory": peak, "answers": [(row["label"], row["probability"]) for row in answers]}
    return figures(json.loads(trace.read_text()), began, peak)


def figures(trace: dict[str, Any], began: float, peak: float) -> dict[str, Any]:
    """The four measures of a run, from what it wrote (times in seconds since 1970) and what was seen from outside."""
    times, tokens = trace["times"], trace["tokens"]
    warm = min(WARM_UP, len(tokens) - 1)
    seconds, counted = times[-1] - times[warm], len(tokens) - warm
    return {
        "step": seconds * 1e6 / sum(tokens[warm:]),
        "ms a step": seconds * 1e3 / counted,
        "evaluation": trace["evaluation"],
        "first step": times[1] - began,
        "memory": peak,
        "losses": trace["losses"],
        "tokens": tokens[:GATE_STEPS],  # without padding
        "scores": {name: trace[name] for name in ("accuracy", "f1")},
    }


def watch(process: subprocess.Popen[Any], interval: float = 0.05) -> float:
    """Wait for a process -> the sum of the peaks of it and its descendants, in MiB, where that was highest."""
    most = 0.0
    while process.poll() is None:
        most = max(most, sum(peak_rss_mb(pid) for pid in tree(process.pid)))
        time.sleep(interval)
    return most


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants, as far as they still run (Linux)."""
    yield pid
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = tasks.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from tree(int(child))


# --- the gate, and the pairs ------------------------------------------------------------------------------------------

Measure = Callable[[str, Setup, Place, int], dict[str, Any]]


def need_equal_work(setup: Setup, library: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise NotEqual where the first losses, or any answers, lie further apart than rounding explains."""
    if setup.predicts:
        need_equal_answers(setup, library["answers"], ours["answers"])
        return
    pairs = list(zip(library["losses"][:GATE_STEPS], ours["losses"][:GATE_STEPS], strict=True))
    if not pairs:
        raise NotEqual(f"{setup.name}: no step was taken")
    for step, (a, b) in enumerate(pairs, 1):
        if not abs(a - b) <= (FIRST if step == 1 else TOLERANCE)[setup.precision]:
            who = f"{a:.7f} with {setup.peer} and {b:.7f} with us"
            raise NotEqual(f"{setup.name}: the loss of step {step} is {who}")
    theirs, found = (side["tokens"][:GATE_STEPS] for side in (library, ours))
    if theirs != found:  # then time per token means nothing
        raise NotEqual(f"{setup.name}: the first steps have {theirs} tokens with {setup.peer} and {found} with us")


Answer = tuple[str, float]  # label, probability


def need_equal_answers(setup: Setup, library: Sequence[Answer], ours: Sequence[Answer]) -> None:
    """Raise NotEqual where two predictions differ in a label, or in a probability by more than ALIKE."""
    if not library or len(library) != len(ours):
        raise NotEqual(f"{setup.name}: {setup.peer} answers for {len(library)} rows, and we for {len(ours)}")
    for row, ((label, p), (our_label, our_p)) in enumerate(zip(library, ours, strict=True), 1):
        if label != our_label or not abs(p - our_p) <= ALIKE:
            who = f"{label} ({p:.6f}) with {setup.peer} and {our_label} ({our_p:.6f}) with us"
            raise NotEqual(f"{setup.name}: row {row} is {who}")


def compare(setup: Setup, place: Place, pairs: int, take: Measure = measure) -> dict[str, Any]:
    """Gate, then so many pairs in strict turns -> the setup's part of the record."""
    # The gate's runs also fill the caches of both sides. For them weights and batches are equal even where the work
    # of the setup differs on purpose.
    gate = replace(setup, same_work=True, library=(), ours=())
    first = {side: take(side, gate, place, GATE_STEPS) for side in SIDES}
    need_equal_work(gate, first["library"], first["ours"])
    taken: list[dict[str, Any]] = []
    for _ in range(pairs):
        pair = {side: take(side, setup, place, setup.steps) for side in SIDES}
        if setup.same_work:
            need_equal_work(setup, pair["library"], pair["ours"])
        taken.append(pair)
    if setup.predicts:  # a record keeps how many rows there were, not what each of them got
        taken = [{side: found | {"answers": len(found["answers"])} for side, found in pair.items()} for pair in taken]
    return {
        "setup": asdict(setup),
        "gate": {side: compared(found) for side, found in first.items()},
        "pairs": taken,
        "rows": rows(setup, taken),
    }


def compared(found: dict[str, Any]) -> list[float]:
    """What a record keeps of a side's run in the gate: losses, or the first probabilities."""
    return found["losses"] if "losses" in found else [p for _, p in found["answers"][:GATE_STEPS]]


def rows(setup: Setup, taken: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's lines of a setup: for each measure both medians, and the ratio pair by pair."""
    targets, found = dict(setup.targets), []
    for name, (what, unit) in MEASURES.items():
        if setup.length and name != "step":
            continue  # 16 rows to evaluate: only the step is measured
        if any(name not in pair[side] for pair in taken for side in SIDES):
            continue  # of another job
        sides = {side: [pair[side][name] for pair in taken] for side in SIDES}
        if not all(sides["library"]) or not all(sides["ours"]):
            continue  # the system does not tell
        ratios = [a / b for a, b in zip(sides["library"], sides["ours"], strict=True)]
        if name in OURS_OVER_THEIRS:
            ratios = [1 / ratio for ratio in ratios]
        found.append({
            "setup": setup.name, "measure": name, "what": f"{setup.what}: {what}", "unit": unit,
            "library": statistics.median(sides["library"]), "ours": statistics.median(sides["ours"]),
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "target": targets.get(name, ""),
        })  # fmt: skip
    return found


# --- the report -------------------------------------------------------------------------------------------------------

HEADER = f"{'peer':<11} {'what':<66} {'the peer':>12} {'ours':>12}  {'ratio (lowest to highest)':<26} target"


def line(peer: str, row: dict[str, Any]) -> str:
    values = " ".join(f"{row[side]:>8.4g} {row['unit']:<3}" for side in SIDES)
    ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    return f"{peer:<11} {row['what']:<66} {values}  {ratio:<26} {row['target']}".rstrip()


def markdown(record: dict[str, Any], picture: str) -> str:
    """The report of a record: made from it alone, so that it can be made again."""
    peers = list(dict.fromkeys(map(peer_of, record["setups"].values())))
    text = [
        f"# Throughput: {', '.join(peers)} and nanofinetune, {record['machine']['date']}",
        "",
        f"{machine_text(record['machine'])};"
        f" model {record['model']}, data {record['data']}, device {record['device']}.",
        "Each pair is a run of either side in fresh processes, in turns. A ratio above 1 is ours ahead; of memory and"
        " of the time to the first step it is ours over the peer's, and below 1 is ours ahead.",
        "",
        "| peer | what | the peer | ours | ratio | target | reached | pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in record["setups"].values():
        for row in found["rows"]:
            cells = f"{measured(row)} | {row['target']} | {reached(row)} | {len(found['pairs'])}"
            text.append(f"| {peer_of(found)} | {row['what']} | {cells} |")
    text += ["", f"![ratios and costs]({picture})", "", "## Settings and losses", ""]
    for name, found in record["setups"].items():
        setup, peer = found["setup"], peer_of(found)
        options = {side: " ".join(setup[side]) or "none" for side in SIDES}
        gate = {side: ", ".join(f"{value:.5f}" for value in found["gate"][side]) for side in SIDES}
        if peer == "pipeline":
            text += [
                f"- **{name}** ({found['measured']}): {found['pairs'][0]['ours']['answers']:,} rows.",
                f"  First probabilities: {peer} {gate['library']}; ours {gate['ours']}.",
            ]
            continue
        ends = {side: statistics.median(pair[side]["losses"][-1] for pair in found["pairs"]) for side in SIDES}
        text += [
            f"- **{name}** ({found['measured']}): {setup['nproc']} process(es), batch {setup['batch']},"
            f" precision {setup['precision']}, {setup['steps']} steps, the first {WARM_UP} left out;"
            f" options: {peer} {options['library']}, ours {options['ours']}.",
            f"  Gate: {peer} {gate['library']}; ours {gate['ours']}."
            f" Last loss: {peer} {ends['library']:.5f}, ours {ends['ours']:.5f}.",
        ]
    return "\n".join(text) + "\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Two panels, times and memory: ours as a share of the peer's, so that shorter bars are better in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(peer_of(found), row) for found in record["setups"].values() for row in found["rows"]]
    panels = {
        "time, ours / the peer's": [(peer, row) for peer, row in rows if row["unit"] != "MiB"],
        "memory, ours / the peer's": [(peer, row) for peer, row in rows if row["unit"] == "MiB"],
    }
    counts = [max(1, len(shown)) for shown in panels.values()]
    figure, axes = pyplot.subplots(
        2, 1, figsize=(9, 1.6 + 0.24 * sum(counts)), height_ratios=counts, layout="constrained", sharex=True
    )
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        shares = [share(row) for _, row in shown]
        middles = [middle for middle, _, _ in shares]
        errors = [[middle - low for middle, low, _ in shares], [high - middle for middle, _, high in shares]]
        axis.barh(range(len(shown)), middles, xerr=errors, color="#4878a8", capsize=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title}: below 1 ours ahead", fontsize=9)
        axis.set_yticks(range(len(shown)), [f"{peer}, {row['what']}" for peer, row in shown], fontsize=7)
        axis.invert_yaxis()
    axes[-1].set_xlim(left=0)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def share(row: dict[str, Any]) -> tuple[float, float, float]:
    """Ours over the peer's: median, lowest, highest."""
    if row["measure"] in OURS_OVER_THEIRS:
        return row["ratio"], row["low"], row["high"]
    return 1 / row["ratio"], 1 / row["high"], 1 / row["low"]


def write(record: dict[str, Any], base: Path) -> None:
    """base.json, base.md and base.png."""
    base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, base.with_suffix(".png"))
    base.with_suffix(".md").write_text(markdown(record, base.with_suffix(".png").name))


def merged(base: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with those setups of an earlier one of the same file that were not measured again."""
    setups = earlier(base, record, ("machine", "model", "data", "device")).get("setups", {})
    return record | {"setups": setups | record["setups"]}


# --- the command line -------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [number(int, 1)(part) for part in text.split(",")]


def parse(argv: list[str] | None = None) -> Any:
    parser = Parser(prog="throughput.py", description=__doc__)
    add = parser.add_argument
    add("setups", metavar="SETUP", nargs="*", help="fp32, bf16, best ... (default: all; --list names them)")
    add("--list", action="store_true", help="name the setups and stop")
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    add("--data", metavar="DIR", default="stdlib-pairs", help="what train.py takes (default stdlib-pairs)")
    add("--nproc", metavar="N,N", type=numbers, default=[1, 2, 4], help="numbers of processes (default 1,2,4)")
    add("--precision", metavar="KIND,KIND", default="no,bf16", help="no, bf16 or both (default no,bf16)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides (default cpu)")
    add("--pairs", metavar="N", type=number(int, 1), default=5, help="runs of either side that count (default 5)")
    add("--steps", metavar="N", type=number(int, GATE_STEPS + WARM_UP), default=40, help="updates a run (default 40)")
    add("--quick", action="store_true", help="one pair of few steps: whether it works, not how fast it is")
    add("--record", metavar="NAME", help="write bench/records/DATE_DEVICE_NAME.{json,md,png}")
    args = parser.parse_args(argv)
    args.precision = args.precision.split(",")
    for precision in args.precision:
        if precision not in TOLERANCE:
            raise UsageError(f"--precision {precision}: choose no, bf16 or no,bf16")
    if args.quick:
        args.pairs, args.steps = 1, GATE_STEPS + WARM_UP
        if args.record:
            raise UsageError("--record: a quick run is no measurement; leave --quick out")
    args.base = record_base(args.record, args.device)
    return args


def main() -> None:
    args = parse()
    known = setups(args.nproc, args.precision, args.steps, args.device)
    if args.list:
        print("\n".join(f"{setup.name:<12} {setup.peer:<11} {setup.what}" for setup in known.values()))
        return
    for name in args.setups:
        if name not in known:
            raise UsageError(f"{name}: there is no such setup; choose from {', '.join(known)}")
        if why := missing(known[name]):
            raise UsageError(f"{name}: {why}")
    job = job_of(args.model, args.data)
    record = {
        "what": "throughput", "machine": machine(), "model": short(job.model, packaged_model()),
        "data": short(job.data, None), "device": args.device, "setups": {},
    }  # fmt: skip
    if args.base:
        merged(args.base, record)  # refuse now what would be refused after the measuring
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="nanofinetune-bench-") as folder:
        place = Place(job.model, job.data, args.device, Path(folder))
        for name in args.setups or known:
            if why := missing(known[name]) or ("" if args.setups else slow(known[name], args.device)):
                print(f"{name}: left out; {why}", file=sys.stderr, flush=True)
                continue
            found = compare(known[name], place, args.pairs)
            record["setups"][name] = found | {"measured": time.strftime("%Y-%m-%d %H:%M")}
            for row in found["rows"]:
                print(line(known[name].peer, row), flush=True)
            if args.base:
                write(merged(args.base, record), args.base)
    print(json.dumps(record))


if __name__ == "__main__":
    run_gated("throughput.py", main)
