"""train.py with a stop-watch: the same program, whose losses, token counts and times go into a file.

    python bench/ours.py TRACE.json --model PATH --data PATH_OR_NAME --max-steps 40      the rest is train.py's

bench/throughput.py runs it beside bench/peer.py. Three things are watched and none is changed: the run's log, which
gets every loss (nanofinetune/run/log.py); the collator, which makes every batch; and train.py's `evaluate`. Rank 0
writes the file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from nanofinetune.data import job
from nanofinetune.ground.errors import shown
from nanofinetune.run import run as loop


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("ours.py: name the file for losses and times first; train.py's arguments come after it", file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    path = Path(name)
    if not path.absolute().parent.is_dir():
        print(f"ours.py: {shown(name)}: there is no such folder", file=sys.stderr)
        return 2
    losses: list[Any] = []
    tokens: list[int] = []  # of each of this rank's batches, without padding; evaluation's come after training's
    times: list[float] = []
    evaluations: list[float] = []
    scores: dict[str, Any] = {}

    class Log(loop.Log):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tokens.clear()  # of the batch that run/trial.py has tried before the run
            times.append(time.time())

        def add(self, loss: Any, rows: int) -> None:
            super().add(loss, rows)
            losses.append(loss.item())  # each one, as the course's loop does
            times.append(time.time())

    class Collator(job.DataCollatorWithPadding):
        def __call__(self, features: Any) -> Any:
            batch = super().__call__(features)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

    evaluate = train.evaluate

    def timed_evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
        began = time.time()
        found = evaluate(*args, **kwargs)
        evaluations.append(time.time() - began)
        scores.update(found)
        return found

    loop.Log, job.DataCollatorWithPadding = Log, Collator  # type: ignore[misc]
    train.evaluate = timed_evaluate
    code = train.run_main("train.py", train.main)
    if code == 0 and os.environ.get("RANK", "0") == "0":
        trace = {"losses": losses, "tokens": tokens[: len(losses)], "times": times, "evaluation": sum(evaluations)}
        path.write_text(json.dumps(trace | {name: scores.get(name) for name in ("accuracy", "f1")}))
    return code


if __name__ == "__main__":
    sys.exit(main())
