"""Run README's three commands as a newcomer does, in a fresh clone, and keep the last line that each prints.

    python bench/commands.py --json bench/records/NAME.json
    python bench/commands.py --only 3 --json bench/records/NAME.json     again the third alone; the others are kept

README shows these lines under its commands (bench/readme.py writes them there). The commands run one after the other:
the first makes the environment that the others use. Nothing is timed. Prints one JSON object as the last line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanofinetune.ground.cli import Parser, number, run_main
from nanofinetune.ground.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def commands(readme: str) -> list[str]:
    """README's first block of commands, without the lines that show what they print."""
    lines = readme.partition("```bash\n")[2].partition("```")[0].splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def portable(line: str) -> str:
    """The line without this machine's folders: of the path of a model, its last part.

    >>> portable('{"model": "/srv/lib/minilm", "steps": 3}')
    '{"model": ".../minilm", "steps": 3}'
    """
    return re.sub(r'"/[^"]*/([^"/]+)"', r'".../\1"', line)


def run(command: str, folder: Path) -> str:
    """Run one command line in the clone, its output shown as it comes -> the last line of its stdout."""
    activate = "" if ".venv/" in command else "source .venv/bin/activate && "
    words = ["bash", "-c", activate + command]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    if process.returncode != 0:
        raise SystemExit(f"{command}: it ended with {process.returncode}")
    return portable(last)


def main() -> None:
    from pieces import machine

    every = commands((ROOT / "README.md").read_text())
    parser = Parser(prog="commands.py", description=__doc__)
    add = parser.add_argument
    add("--json", metavar="FILE", type=Path, help="where the record is written")
    add("--only", metavar="N", type=number(int, 1, len(every)), nargs="+", help="these commands (default: all)")
    add("--clone", metavar="DIR", type=Path, help="a clone with its .venv that is there already (default: a fresh one)")
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    if args.clone and not (args.clone / ".venv" / "bin" / "python").exists():
        raise UsageError(f"--clone {args.clone}: there is no .venv/bin/python in it")
    before = json.loads(args.json.read_text())["rows"] if args.only and args.json and args.json.exists() else {}
    rows: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.clone
        if folder is None:
            folder = Path(temporary) / "nanofinetune"
            subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        for i, command in enumerate(every, start=1):
            if not args.only or i in args.only:
                rows[command] = run(command, folder)
            elif command in before:
                rows[command] = before[command]
    record: dict[str, Any] = {"what": "commands", "machine": machine(), "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_main("commands.py", main))
