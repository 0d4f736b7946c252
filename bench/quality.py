"""Does it reach the same accuracy, and how soon? train.py and bench/peer.py over several seeds, in fresh processes.

    python bench/quality.py --data PATH/glue/mrpc --seeds 1 2 3 --folder runs/quality --json bench/records/NAME.json
    python bench/quality.py --data PATH/glue/mrpc --timed --json bench/records/DATE_cpu_quality.json

Each run's last line is kept in the folder, and a run that is there already is not repeated: after an interruption, the
same command goes on. For each seed both sides run at the same time, each on its share of the cores; nothing is timed.

With `--timed` each side takes the options of the setup `best` of bench/throughput.py, and the runs follow one another,
each on all cores, the sides in turns: who begins changes with each seed. The time is from the command to its end, so to
the scores. Both sides train a few steps before, which fills their caches.

Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # updates of the runs that fill the caches
SCRIPTS = {"nanofinetune": ROOT / "train.py", "library": ROOT / "bench" / "peer.py"}


def start(side: str, job: list[str], threads: int) -> subprocess.Popen[str]:
    """A run of one side, on so many cores."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS[side]), *job], stdout=subprocess.PIPE, text=True, env=environment
    )


def last_line(process: subprocess.Popen[str], name: str) -> str:
    """What a run prints last, when it has ended."""
    out, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with {process.returncode}")
    return out.splitlines()[-1]


def run_seed(folder: Path, job: list[str], seed: int, sides: list[str]) -> dict[str, dict[str, Any]]:
    """Run the sides with one seed, at the same time -> {side: its result}."""
    paths = {side: folder / f"{named(side, job)}-{seed}.json" for side in sides}
    threads = max(1, (os.cpu_count() or 2) // len(SCRIPTS))
    missing = [side for side, path in paths.items() if not path.exists()]
    running = {side: start(side, [*job, "--seed", str(seed)], threads) for side in missing}
    for side, process in running.items():
        paths[side].write_text(last_line(process, paths[side].stem) + "\n")
    return {side: json.loads(path.read_text()) for side, path in paths.items()}


def named(side: str, job: list[str]) -> str:
    """The name of a side's results: those of a few steps are no results of a whole run."""
    return f"{side}-{job[job.index('--max-steps') + 1]}-steps" if "--max-steps" in job else side


def best() -> dict[str, list[str]]:
    """The options of each side at its best: those that bench/throughput.py compares."""
    from throughput import setups

    setup = setups([1], ["bf16"], 40)["best"]
    each = {"nanofinetune": setup.ours, "library": setup.library}
    return {side: ["--precision", setup.precision, *options] for side, options in each.items()}


def run_timed(folder: Path, job: list[str], seeds: list[int]) -> dict[int, dict[str, dict[str, Any]]]:
    """Run both sides at their best, one after the other -> {seed: {side: its result, with `wall` in seconds}}."""
    options, cores = best(), os.cpu_count() or 1
    paths = {(seed, side): folder / f"timed-{named(side, job)}-{seed}.json" for seed, side in turns(seeds)}
    if not all(path.exists() for path in paths.values()):
        for side in SCRIPTS:
            last_line(start(side, [*job, *options[side], "--max-steps", str(WARM_UP)], cores), f"{side}'s warm-up")
    for (seed, side), path in paths.items():
        if not path.exists():
            began = time.time()
            line = last_line(start(side, [*job, *options[side], "--seed", str(seed)], cores), path.stem)
            path.write_text(json.dumps(json.loads(line) | {"wall": time.time() - began}) + "\n")
    return {seed: {side: json.loads(paths[seed, side].read_text()) for side in SCRIPTS} for seed in seeds}


def turns(seeds: list[int]) -> list[tuple[int, str]]:
    """Both sides of each seed; the one that began comes second with the next seed."""
    sides = list(SCRIPTS)
    return [(seed, side) for i, seed in enumerate(seeds) for side in (sides if i % 2 == 0 else sides[::-1])]


def summarise(runs: dict[int, dict[str, dict[str, Any]]], data: str) -> dict[str, Any]:
    """{seed: {side: result}} -> the record: scores of each seed, mean and standard deviation of each side."""
    from pieces import machine

    record: dict[str, Any] = {
        "what": "mrpc",
        "data": "/".join(Path(data).parts[-2:]),
        "machine": machine(),
        "sides": {},
    }
    for side in SCRIPTS:
        found = {str(seed): results[side] for seed, results in runs.items() if side in results}
        summary: dict[str, Any] = {"steps": next(iter(found.values()))["steps"]}
        timed = all("wall" in result for result in found.values())
        if timed:
            record["what"], summary["options"] = "quality", " ".join(best()[side])
        for name in ("accuracy", "f1", *(["wall"] if timed else [])):
            seeds = {seed: result[name] for seed, result in found.items()}
            std = statistics.stdev(seeds.values()) if len(seeds) > 1 else 0.0
            summary[name] = {"seeds": seeds, "mean": statistics.mean(seeds.values()), "std": std}
        record["sides"][side] = summary
    return record


def main() -> None:
    from pieces import Job, model_of

    parser = Parser(prog="quality.py", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder of the model (default: the packaged checkpoint)")
    add("--data", metavar="DIR", required=True, help="folder of MRPC as parquet")
    add("--seeds", metavar="N", type=number(int, 0), nargs="+", default=[1, 2, 3], help="(default 1 2 3)")
    add(
        "--peer-seeds", metavar="N", type=number(int, 0), nargs="+", help="those of them for the library (default: all)"
    )
    add("--folder", metavar="DIR", type=Path, default=Path("runs/quality"), help="where each run's result is kept")
    add("--json", metavar="FILE", type=Path, help="where the record is written")
    add("--timed", action="store_true", help="each side at its best, one after the other, with the time of each run")
    add("--max-steps", metavar="N", type=number(int, 1), help="a trial of so many updates instead of three epochs")
    args = parser.parse_args()
    if args.timed and args.peer_seeds:
        raise UsageError("--peer-seeds: with --timed both sides run with each seed; leave it out")
    if args.max_steps and args.json:
        raise UsageError(f"--json: {args.max_steps} updates are a trial and no record; leave --max-steps out")
    if other := set(args.peer_seeds or ()) - set(args.seeds):
        raise UsageError(f"--peer-seeds {min(other)}: it is none of --seeds")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    model = model_of(args.model)
    Job(model, args.data).check()
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--folder {args.folder}: it cannot be made ({error.strerror})") from error
    job = ["--model", model, "--data", args.data]
    job += ["--max-steps", str(args.max_steps)] if args.max_steps else []
    if args.timed:
        runs = run_timed(args.folder, job, args.seeds)
    else:
        runs = {}
        for seed in args.seeds:
            sides = [side for side in SCRIPTS if side == "nanofinetune" or seed in (args.peer_seeds or args.seeds)]
            runs[seed] = run_seed(args.folder, job, seed, sides)
    record = summarise(runs, args.data)
    for side, scores in record["sides"].items():
        cells = [f"{name} {scores[name]['mean']:.3f} ± {scores[name]['std']:.3f}" for name in ("accuracy", "f1")]
        if "wall" in scores:
            cells.append(f"{scores['wall']['mean']:.1f} ± {scores['wall']['std']:.1f} s to the scores")
        print(f"{side:<13}", *cells)
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_main("quality.py", main))
