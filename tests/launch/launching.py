"""What the tests of launch.sh share: calling it without this shell's own launch variables."""

import os
import subprocess
import sys

from helpers import ROOT

LAUNCH = ROOT / "launch.sh"


def launch_sh(*args: str, env: dict[str, str] | None = None, stdin: str = "", timeout: float = 90):
    """launch.sh with this Python, none of this shell's launch variables, and no launch.env but what `env` names."""
    variables = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    variables |= {"PYTHON": sys.executable, "NANOFINETUNE_LAUNCH_ENV": "/nonexistent", **(env or {})}
    return subprocess.run(
        ["bash", str(LAUNCH), *args], env=variables, input=stdin, text=True, capture_output=True, timeout=timeout
    )
