"""Versions and machine, as result.json keeps them.

python -m pytest tests/ground/test_machine.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import torch
import transformers
from conftest import tiny_bert

from nanofinetune.ground.machine import machine, versions
from nanofinetune.run import result


def test_versions_are_those_of_the_modules():
    found = versions()
    for module in (torch, transformers, datasets, numpy):
        assert found[module.__name__].partition("+")[0] == module.__version__.partition("+")[0]
    assert all(type(value) is str for value in found.values()) and json.dumps(machine())


def test_a_run_keeps_its_versions_and_machine(tmp_path, tiny_tokenizer, monkeypatch):
    written: list[Path] = []
    monkeypatch.setattr(result, "write_report", written.append)
    evaluation = {"epoch": 1, "loss": 0.5, "accuracy": 0.5}
    args = SimpleNamespace(lr=0.1)
    result.save(tmp_path, tiny_bert(), tiny_tokenizer, {"saved_epoch": 1}, [evaluation], args)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["versions"] == versions() and saved["machine"] == machine()
    assert written == [tmp_path], "the page comes after result.json"
