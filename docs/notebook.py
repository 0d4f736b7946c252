"""Run examples/course.ipynb from top to bottom and keep what its cells put out.

    python docs/notebook.py

Nothing is written unless every cell has run. tests/test_course_notebook.py holds what is kept against the text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanofinetune.ground.cli import Parser, run_main  # noqa: E402

NOTEBOOK = ROOT / "examples" / "course.ipynb"
LIMIT = 900  # seconds for one cell, on a busy machine


def run(notebook: Any) -> None:
    """Run all cells in a kernel of this Python; their outputs replace those that are there.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    import nbclient

    client = nbclient.NotebookClient(notebook, timeout=LIMIT, record_timing=False)
    client.execute(cwd=str(NOTEBOOK.parent), env={**os.environ, "PYTHONPATH": str(ROOT)})


def main() -> None:
    """It takes no arguments, so a wrong one changes nothing."""
    Parser(prog="notebook.py", description=__doc__).parse_args()
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    sys.exit(run_main("notebook.py", main))
