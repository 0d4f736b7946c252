"""Train two updates on two ranks and print what ran in them and when; draw the last one, write all for a viewer.

>>> world = Event("world", 0, 1, "rank 0 of 1, None, cpu, 2 threads", "")
>>> forward = Event("forward", 1, 2, "logits (8, 2) float32, 64 bytes", "", args={"shape": [8, 2]})
>>> batch = [Event("collate", 1, 1, "8 rows", ""), forward, Event("backward", 2, 2, "every gradient", "")]
>>> step = Event("optimizer", 2, 3, "AdamW: 40 tensors, 1,234 numbers, 4,936 bytes", "")
>>> title_of([[world, *batch, step, Event("zero_grad", 3, 4, "", "")]]).partition(", torch")[0]
'The last update: one process of 2 threads on cpu, 8 rows each, 1,234 parameters, 4,936 bytes'

Underneath: `accelerate.Accelerator.profile` (accelerate 1.15) is called from within your script.
  - Here the job is train.py itself, unchanged, started by launch.sh.
  - Arguments that are not this command's go to train.py.
  - Files are written over only if this command made them.

Proof: test_losses_are_those_of_an_unwatched_run, test_the_report_names_places_that_exist in tests/trace/test_trace.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from nanofinetune.ground.cli import MOST, Parser, number, run_main
from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.ground.names import place_of
from nanofinetune.trace.observe import ROOT, Event
from nanofinetune.trace.picture import MISSING, check_matplotlib, picture
from nanofinetune.trace.picture import OURS as picture_file
from nanofinetune.trace.timeline import OURS as timeline_file
from nanofinetune.trace.timeline import check, events_of, save, timeline
from nanofinetune.trace.told import Ranks, phases, told


def traced(arguments: Sequence[str], processes: int) -> Ranks:
    """Run launch.sh -n `processes` with train.py's `arguments`, observed -> the events of each rank.

    Raises:
        SystemExit: the job failed, and has said why; its exit code.
    """
    with tempfile.TemporaryDirectory(prefix="nanofinetune-trace-") as folder:
        script = Path(folder, "train.py")  # messages begin with its name
        script.write_text("from nanofinetune.trace.observe import rank\n\nrank()\n")
        environment = os.environ | {
            "PYTHON": sys.executable, "NANOFINETUNE_SCRIPT": str(script), "NANOFINETUNE_TRACE": folder,
            "NANOFINETUNE_LAUNCH_ENV": os.devnull, "NNODES": "1",  # launch.env or Kubeflow may speak of several
        }  # fmt: skip
        command = [str(ROOT / "launch.sh"), "-n", str(processes), "--", *arguments]
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the job would outlive this process
        try:
            code = subprocess.run(command, env=environment, check=False).returncode
        finally:
            signal.signal(signal.SIGTERM, before)
        if code:
            sys.exit(code)
        files = [Path(folder, f"{r}.json") for r in range(processes)]
        return [[Event(**event) for event in json.loads(file.read_text())] for file in files]


def main() -> None:
    """Train, then print what happened and draw the last update."""
    parser = Parser(prog="python -m nanofinetune.trace", description=__doc__)
    parser.add_argument(
        "-n", metavar="N", dest="processes", type=number(int, 1, MOST), default=2, help="ranks (default 2)"
    )
    parser.add_argument("--updates", metavar="N", type=number(int, 1, MOST), default=2, help="how many (default 2)")
    parser.add_argument("--picture", metavar="FILE", help="of the last update (default trace.svg; needs matplotlib)")
    parser.add_argument("--timeline", metavar="FILE", help="all of it as JSON, for ui.perfetto.dev or chrome://tracing")
    parser.epilog = "every other argument goes to train.py: --model, --data, --batch-size, --accumulate ..."
    args, others = parser.parse_known_args()
    if not (ROOT / "train.py").is_file():
        raise UsageError("train.py is not beside the package: clone the repository")
    drawn = args.picture is not None or importlib.util.find_spec("matplotlib") is not None
    if args.picture is not None:
        check_matplotlib(f"--picture {args.picture}")
    files = [("--picture", "trace.svg" if args.picture is None else args.picture, picture_file)] if drawn else []
    files += [("--timeline", args.timeline, timeline_file)] if args.timeline is not None else []
    for option, name, begins in files:
        check(place_of(option, name), begins, option)  # before the training
    if len({place_of(option, name).resolve() for option, name, _ in files}) < len(files):
        raise UsageError(f"--timeline {args.timeline}: this is the file of the picture; name another one")
    if "--dry-run" in others:
        raise UsageError("--dry-run: there is nothing to trace in a run that stops before its first step")
    if os.environ.get("NNODES", "1") != "1":
        raise UsageError(f"NNODES is {os.environ['NNODES']}: a trace is of the ranks of one machine; unset it")
    ranks = traced([*others, "--max-steps", str(args.updates)], args.processes)
    print("\n".join(map(shown, told(ranks))))
    title = title_of(ranks)
    print()
    whole = timeline(ranks, title)
    for option, name, begins in files:
        text = picture(*events_of(whole)) if option == "--picture" else whole
        save(place_of(option, name), text, begins, option)
    if drawn:
        print(f"wrote {shown(files[0][1])}: the last update, all ranks on one axis")
    else:
        print(f"no picture: {MISSING}")
    if args.timeline is not None:
        print(f"wrote {shown(args.timeline)}: open it in ui.perfetto.dev or chrome://tracing")


def title_of(ranks: Ranks) -> str:
    """What the picture shows, from what was measured."""
    updates = [[phase for name, phase in phases(events) if name.startswith("update")][-1] for events in ranks]
    of = {event.what: event.text for event in [*ranks[0], *updates[0]]}
    _, backend, device, threads = of["world"].split(", ")
    least, most = min(map(trained, updates)), max(map(trained, updates))
    rows, numbers = str(most) if least == most else f"{least} to {most}", of["optimizer"].split("tensors, ")[1]
    who = f"{len(ranks)} ranks of {threads} over {backend}" if len(ranks) > 1 else f"one process of {threads}"
    return (
        f"The last update: {who} on {device}, {rows} rows each,"
        f" {numbers.replace('numbers', 'parameters')}, torch {torch.__version__}"
    )


def trained(update: list[Event]) -> int:
    """How many rows one rank computed gradients for: not those fetched ahead, nor an evaluation's."""
    found, forward = 0, None
    for event in update:  # in order of time
        forward = event if event.what == "forward" else forward
        if event.what == "backward" and forward is not None:
            found += forward.args["shape"][0]
    return found


if __name__ == "__main__":
    sys.exit(run_main("nanofinetune.trace", main))
