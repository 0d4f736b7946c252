"""Does it reach the same accuracy? train.py and bench/peer.py over several seeds, each run in a fresh process.

    python bench/quality.py --data PATH/glue/mrpc --seeds 1 2 3 --folder runs/quality --json bench/records/NAME.json

Each run's last line is kept in the folder, and a run that is there already is not repeated: after an interruption, the
same command goes on. For each seed both sides run at the same time, each on its share of the cores; nothing is timed.
Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"nanofinetune": ROOT / "train.py", "library": ROOT / "bench" / "peer.py"}


def run_seed(folder: Path, model: str, data: str, seed: int, sides: list[str]) -> dict[str, dict[str, Any]]:
    """Run the sides with one seed, at the same time -> {side: its result}."""
    threads = max(1, (os.cpu_count() or 2) // len(SCRIPTS))
    running = {}
    for side in sides:
        script = SCRIPTS[side]
        path = folder / f"{side}-{seed}.json"
        if not path.exists():
            command = [sys.executable, str(script), "--model", model, "--data", data, "--seed", str(seed)]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
            running[path] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for path, process in running.items():
        out, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"{path.stem} ended with {process.returncode}")
        path.write_text(out.splitlines()[-1] + "\n")
    return {side: json.loads((folder / f"{side}-{seed}.json").read_text()) for side in sides}


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
        for name in ("accuracy", "f1"):
            seeds = {seed: result[name] for seed, result in found.items()}
            std = statistics.stdev(seeds.values()) if len(seeds) > 1 else 0.0
            summary[name] = {"seeds": seeds, "mean": statistics.mean(seeds.values()), "std": std}
        record["sides"][side] = summary
    return record


def main() -> None:
    from pieces import model_of

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
    args = parser.parse_args()
    if other := set(args.peer_seeds or ()) - set(args.seeds):
        raise UsageError(f"--peer-seeds {min(other)}: it is none of --seeds")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    model = model_of(args.model)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--folder {args.folder}: it cannot be made ({error.strerror})") from error
    runs = {}
    for seed in args.seeds:
        sides = [side for side in SCRIPTS if side == "nanofinetune" or seed in (args.peer_seeds or args.seeds)]
        runs[seed] = run_seed(args.folder, model, args.data, seed, sides)
    record = summarise(runs, args.data)
    for side, scores in record["sides"].items():
        print(
            f"{side:<13}",
            *(f"{name} {scores[name]['mean']:.3f} ± {scores[name]['std']:.3f}" for name in ("accuracy", "f1")),
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_main("quality.py", main))
