"""Every public name that a script can import from accelerate 1.15: it comes from nanofinetune, or says what to use.

python -m pytest tests/dropin/test_public_names.py
"""

import importlib
import types
import warnings

import pytest

import nanofinetune
from nanofinetune.dropin.absent import ABSENT

accelerate = pytest.importorskip("accelerate", reason="the reference, extra `test`")

MODULES = [
    "", ".accelerator", ".big_modeling", ".checkpointing", ".data_loader", ".hooks", ".inference", ".launchers",
    ".local_sgd", ".logging", ".memory_utils", ".optimizer", ".parallelism_config", ".scheduler", ".state", ".tracking",
    ".utils", ".utils.constants", ".utils.dataclasses", ".utils.environment", ".utils.imports", ".utils.launch",
    ".utils.memory", ".utils.modeling", ".utils.operations", ".utils.other", ".utils.random", ".utils.torch_xla",
    ".utils.tqdm", ".utils.transformer_engine", ".utils.versions",
]  # fmt: skip


def public_names(module):
    """The names that the module itself, or another of accelerate's, defines; and its constants."""
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ("accelerate" if name.isupper() else "")
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and home.startswith("accelerate"):
            yield name


def imported(name):
    """What `from nanofinetune import name` gives, or what it says."""
    found: dict[str, object] = {}
    try:
        exec(f"from nanofinetune import {name}", found)
    except ImportError as error:
        return str(error)
    return found[name]


@pytest.mark.parametrize("place", MODULES)
def test_every_name_of_accelerate_is_here_or_says_what_to_use(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference's own
        names = sorted(public_names(importlib.import_module(f"accelerate{place}")))
    silent = [name for name in names if str(imported(name)).startswith("cannot import name")]
    assert not silent, f"nanofinetune neither has these nor says what to use: {silent}"


def test_a_name_that_nobody_has_is_only_not_there():
    for name in ("Acceleratr", "is_nosuch_available"):
        assert imported(name).startswith(f"cannot import name '{name}' from 'nanofinetune'")
        assert not hasattr(nanofinetune, name)


def test_no_entry_is_for_nothing():
    """What LATE and ABSENT list are names of accelerate, and no name is in both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {name for place in MODULES for name in vars(importlib.import_module(f"accelerate{place}"))}
    optional = {"DummyOptim", "DummyScheduler", "HfDeepSpeedConfig"}  # there only beside deepspeed
    assert len(theirs) > 300 and not (nanofinetune.LATE.keys() | ABSENT.keys()) - theirs - optional
    assert not nanofinetune.LATE.keys() & ABSENT.keys()
