"""A page about runs: `python -m nanofinetune.report runs/a [runs/b ...]` writes report.html, for any browser.

It holds loss, learning rate and speed, scores, the confusion matrix, the classes, calibration, the hardest rows, the
plan, versions and machine; of several runs, side by side, what differs between their arguments.

>>> place([Path("runs/a")], None), place([Path("runs/a"), Path("runs/b")], None)
(PosixPath('runs/a/report.html'), PosixPath('report.html'))

Underneath: `transformers.TrainingArguments` (transformers 5.23) names services in `report_to`, which get a run's
numbers while it runs.
  - Here nothing leaves the machine: the folders that `train.py --output` made are read, and a file is written.

Proof: test_the_command_writes_one_page, test_what_the_user_got_wrong_is_one_line in tests/report/test_main.py.
"""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from nanofinetune.ground.cli import Parser, run_main
from nanofinetune.ground.errors import UsageError, shown
from nanofinetune.ground.names import place_of
from nanofinetune.report.style import LIGHT
from nanofinetune.report.write import NAME, report


def main() -> None:
    """Write a page, and say where it is."""
    parser = Parser(prog="python -m nanofinetune.report", description=__doc__)
    parser.add_argument("runs", metavar="DIR", nargs="+", help="a folder that `train.py --output` made")
    parser.add_argument(
        "--output", metavar="FILE", help=f"the page (default {NAME}: of one run in its folder, of several here)"
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    args = parser.parse_args()
    if len(args.runs) > len(LIGHT):
        raise UsageError(f"{len(args.runs)} runs: a page shows {len(LIGHT)} at most; name fewer")
    folders = [place_of("DIR", name) for name in args.runs]
    output = place(folders, None if args.output is None else place_of("--output", args.output))
    if output.is_dir():
        raise UsageError(f"--output {output}: this is a folder; name a file in it")
    if not output.absolute().parent.is_dir() and args.output is not None:
        raise UsageError(f"--output {output}: there is no such folder")
    report(folders, output)
    print(f"wrote {shown(str(output))}")
    if args.open and not webbrowser.open(output.absolute().as_uri()):
        print("note: --open: there is no browser here; open the file in one", file=sys.stderr)


def place(folders: Sequence[Path], output: Path | None) -> Path:
    """Where the page goes."""
    return output or (folders[0] / NAME if len(folders) == 1 else Path(NAME))


if __name__ == "__main__":
    sys.exit(run_main("nanofinetune.report", main))
