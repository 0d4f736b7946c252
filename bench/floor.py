"""What no script can leave out of the time to the first step and of the peak memory, beside what both sides take.

    python bench/floor.py                                  on the packaged checkpoint and stdlib-pairs
    python bench/floor.py --data ./mrpc --record floor

Three kinds of fresh process take turns: one that only imports torch and transformers' class of the model; the course's
script with Accelerate; and train.py. The last two are the setup `fp32` of bench/throughput.py, with its gate.

    time    the floor is python's start and the two imports: both sides need that class before they can build a model
    memory  the floor is what the imports hold, and four times the weights: these, their gradients, AdamW's two moments

What a side takes beyond the floor is its own: reading data and weights, the first step; activations, and what malloc
keeps. `floor / Accelerate` is the lowest ratio that any script could reach. The last line of stdout is one JSON object.
`--record NAME` writes bench/records/DATE_cpu_NAME.json and .png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pieces import job_of, machine, run_gated, short
from readme import record_base
from throughput import GATE_STEPS, SIDES, Place, measure, need_equal_work, setups

from nanofinetune.data.pretrained import packaged_model
from nanofinetune.ground.cli import Parser, number

ROOT = Path(__file__).resolve().parent.parent
TORCH, MODEL, WEIGHTS = "importing torch", "importing transformers' model", "weights, gradients, moments"
UNITS = {"first step": "s", "memory": "MiB"}
COPIES = 4  # of the weights, in fp32: themselves, their gradients, AdamW's two moments

# Run by a fresh interpreter with a model's folder: the times at which it has imported, the peak memory by then, and
# the size of the weights.
IMPORTS = """
import json, sys, time
from nanofinetune.ground.process import peak_rss_mb
import torch
at = {"torch": (time.time(), peak_rss_mb())}
import transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)
build = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
at["model"] = (time.time(), peak_rss_mb())
with torch.device("meta"):
    weights = sum(p.numel() * p.element_size() for p in build(config).parameters()) / 2**20
print(json.dumps({**at, "weights": weights}))
"""


def imports(model: str) -> dict[str, dict[str, float]]:
    """What a process that only imports takes -> {measure: {part: seconds or MiB}}. Raises RuntimeError if it fails."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, model], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"importing {model}'s class ended with {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    (torch_at, torch_mb), (model_at, model_mb) = found["torch"], found["model"]
    return {
        "first step": {TORCH: torch_at - began, MODEL: model_at - torch_at},
        "memory": {TORCH: torch_mb, MODEL: model_mb - torch_mb, WEIGHTS: COPIES * found["weights"]},
    }


Turn = dict[str, dict[str, Any]]  # {measure: {"floor": {part: amount}, "library": amount, "ours": amount}}


def turn(place: Place, steps: int, take: Callable[..., dict[str, Any]] = measure) -> Turn:
    """One process of each kind, one after the other. Raises NotEqual where the sides' first losses differ."""
    setup, floor = setups([1], ["no"], steps)["fp32"], imports(place.model)
    sides = {side: take(side, setup, place, steps) for side in SIDES}
    need_equal_work(setup, sides["library"], sides["ours"])
    return {what: {"floor": floor[what]} | {side: sides[side][what] for side in SIDES} for what in UNITS}


def summary(taken: Sequence[Turn]) -> dict[str, Any]:
    """Medians over the turns -> {measure: parts of the floor, each side, and ours and the floor over the library's}."""
    found = {}
    for what, unit in UNITS.items():
        rows = [one[what] for one in taken]
        floors = [sum(row["floor"].values()) for row in rows]
        found[what] = {
            "unit": unit,
            "parts": {part: statistics.median(row["floor"][part] for row in rows) for part in rows[0]["floor"]},
            "floor": statistics.median(floors),
            **{side: statistics.median(row[side] for row in rows) for side in SIDES},
            "ratio": statistics.median(row["ours"] / row["library"] for row in rows),
            "lowest ratio": statistics.median(low / row["library"] for low, row in zip(floors, rows, strict=True)),
        }
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """What is printed."""
    text = []
    for what, row in found.items():
        parts = ", ".join(f"{part} {amount:.4g}" for part, amount in row["parts"].items())
        text.append(
            f"{what}: floor {row['floor']:.4g} {row['unit']} ({parts}); ours {row['ours']:.4g}, Accelerate"
            f" {row['library']:.4g}; ours / Accelerate {row['ratio']:.2f}, floor / Accelerate {row['lowest ratio']:.2f}"
        )
    return text


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Two panels, time and memory: for each side a bar of the floor's parts and of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 3.6), layout="constrained")
    names = {TORCH: "#4878a8", MODEL: "#7aa6c2", WEIGHTS: "#b0b0b0"}
    for axis, (what, row) in zip(axes, record["measures"].items(), strict=True):
        left = 0.0
        for part, amount in row["parts"].items():
            axis.barh([0, 1], amount, 0.6, left=left, color=names[part], label=part)
            left += amount
        own = [max(0.0, row[side] - left) for side in ("ours", "library")]
        axis.barh([0, 1], own, 0.6, left=left, color="#d08050", label="the script's own")
        axis.set_yticks([0, 1], ["train.py", "Accelerate"], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(f"{what}, {row['unit']}", fontsize=8)
    axes[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=4, fontsize=7)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def parse(argv: list[str] | None = None) -> Any:
    parser = Parser(prog="floor.py", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a folder or a name on the Hub (default: the packaged checkpoint)")
    add("--data", metavar="DIR", default="stdlib-pairs", help="what train.py takes (default stdlib-pairs)")
    add("--turns", metavar="N", type=number(int, 1), default=5, help="processes of each kind (default 5)")
    add("--steps", metavar="N", type=number(int, GATE_STEPS), default=40, help="updates of a run (default 40)")
    add("--record", metavar="NAME", help="write bench/records/DATE_cpu_NAME.{json,png}")
    args = parser.parse_args(argv)
    args.base = record_base(args.record, "cpu")
    return args


def main() -> None:
    args = parse()
    job = job_of(args.model, args.data)
    with tempfile.TemporaryDirectory(prefix="nanofinetune-floor-") as folder:
        place = Place(job.model, job.data, "cpu", Path(folder))
        turn(place, GATE_STEPS)  # fills the caches of both sides
        taken = [turn(place, args.steps) for _ in range(args.turns)]
    record = {
        "what": "floor", "machine": machine(), "model": short(job.model, packaged_model()),
        "data": short(job.data, None),
        "device": "cpu", "steps": args.steps, "measures": summary(taken), "turns": taken,
    }  # fmt: skip
    print("\n".join(lines(record["measures"])), flush=True)
    if args.base:
        args.base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        plot(record, args.base.with_suffix(".png"))
    print(json.dumps(record))


if __name__ == "__main__":
    run_gated("floor.py", main)
