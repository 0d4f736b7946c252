"""nanofinetune.dropin.available against accelerate 1.15's functions of the same names, in this environment.

python -m pytest tests/dropin/test_available.py
"""

import importlib

import pytest

import nanofinetune
from nanofinetune.dropin import available

NAMES = [name for name in nanofinetune.LATE if nanofinetune.LATE[name] == "dropin.available"]
ELSEWHERE = {f"is_{name}_available" for name in available.ELSEWHERE}  # may be here, and accelerate may use them


@pytest.mark.parametrize("name", NAMES)
def test_answers_match_accelerate(name):
    reference = pytest.importorskip("accelerate.utils", reason="the reference, extra `test`")
    answer = getattr(nanofinetune, name)()
    assert isinstance(answer, bool)
    assert answer == bool(getattr(reference, name)()) or name in {*ELSEWHERE, "is_fp16_available"}


def test_fp16_is_available_where_an_accelerator_takes_it():
    """accelerate says yes on a CPU too, and then trains in fp32."""
    assert pytest.importorskip("accelerate.utils").is_fp16_available()
    try:
        nanofinetune.Accelerator(mixed_precision="fp16")
        taken = True
    except ValueError:
        taken = False
    assert nanofinetune.is_fp16_available() == taken


def test_every_name_can_be_imported():
    asked = {f"is_{name}_available" for name in [*available.PACKAGES, *available.ELSEWHERE]}
    functions = {name for name in vars(available) if name.startswith("is_") and name.endswith("_available")}
    assert set(NAMES) == asked | functions - {"is_available"}
    with pytest.raises(AttributeError, match="has no attribute 'is_nosuch_available'"):
        available.is_nosuch_available  # noqa: B018


def test_devices_that_are_not_supported_are_not_available():
    assert not any(getattr(nanofinetune, name)(True) for name in ELSEWHERE)


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """A folder `wandb`, which wandb itself leaves where a script runs."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert importlib.util.find_spec("wandb") is not None
    assert nanofinetune.is_wandb_available() == bool(list(importlib.metadata.Distribution.discover(name="wandb")))
