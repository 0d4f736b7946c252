"""What a run's numbers depend on besides its arguments: the versions of the libraries, and the machine.

>>> versions()["python"] == platform.python_version(), machine()["cores"] >= 1
(True, True)

Underneath: `torch.utils.collect_env` (torch 2.13) starts a dozen programs to find out.
  - Here nothing is started or imported: versions are those of the installed packages, the processor's name is the
    kernel's.

Proof: test_versions_are_those_of_the_modules, test_a_run_keeps_its_versions_and_machine in
tests/ground/test_machine.py.
"""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy", "nanofinetune")


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """The processor, how many cores this process may use, and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": processor(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def processor() -> str:
    """Its name, as the kernel has it."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()
