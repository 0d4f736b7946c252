"""Versions and machine, as result.json keeps them.

python -m pytest tests/ground/test_machine.py
"""

import json

import datasets
import numpy
import torch
import transformers
from conftest import ROOT, load_script

from nanofinetune.ground.machine import machine, versions


def test_versions_are_those_of_the_modules():
    found = versions()
    for module in (torch, transformers, datasets, numpy):
        assert found[module.__name__].partition("+")[0] == module.__version__.partition("+")[0]
    assert all(type(value) is str for value in found.values()) and json.dumps(machine())


def test_a_run_keeps_its_versions_and_machine(tiny_model, pairs, call_main, tmp_path):
    options = ("--model", tiny_model, "--data", pairs, "--max-steps", "1", "--output", tmp_path / "out")
    assert call_main(load_script(ROOT / "train.py"), *options)[0] == 0
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["versions"] == versions() and saved["machine"] == machine()
