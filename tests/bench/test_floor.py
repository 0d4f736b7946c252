"""bench/floor.py: its floor, its arithmetic, its record and table; and, slowly, the real command. Never a time.

    python -m pytest tests/bench/test_floor.py
    python -m pytest tests/bench/test_floor.py -m slow    the three real programs on a tiny model

Reference: the parameters of transformers' own model.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_job
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(ROOT / "bench"))

import floor
import readme
from floor import MODEL, TORCH, WEIGHTS
from throughput import NotEqual, Place

TINY = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
FLOOR = {"first step": {TORCH: 2.0, MODEL: 3.0}, "memory": {TORCH: 200.0, MODEL: 100.0, WEIGHTS: 400.0}}


def take(side, setup, place, steps):
    """A run in place of `measure`: the peer's needs 10 s and 1000 MiB, ours 8 s and 900."""
    assert setup.same_work and setup.precision == "no"
    own = {"first step": 10.0, "memory": 1000.0} if side == "library" else {"first step": 8.0, "memory": 900.0}
    return own | {"losses": [0.7, 0.6, 0.5, 0.4, 0.3], "tokens": [1, 2, 3, 4, 5]}


@pytest.mark.slow
def test_the_floor_holds_four_times_the_parameters_of_transformers_model(tmp_path):
    config = BertConfig(**TINY)
    config.save_pretrained(tmp_path)
    found = floor.imports(str(tmp_path))
    assert set(found["first step"]) == {TORCH, MODEL} and min(found["first step"].values()) > 0
    assert set(found["memory"]) == {TORCH, MODEL, WEIGHTS} and found["memory"][TORCH] > 50
    size = sum(p.numel() for p in BertForSequenceClassification(config).parameters()) * torch.float32.itemsize
    assert found["memory"][WEIGHTS] == pytest.approx(4 * size / 2**20)


@pytest.mark.slow
def test_a_folder_without_a_model_ends_the_measuring(tmp_path):
    with pytest.raises(RuntimeError, match="class ended with 1"):
        floor.imports(str(tmp_path))


def test_a_turn_takes_one_process_of_each_kind_and_refuses_other_losses(monkeypatch):
    monkeypatch.setattr(floor, "imports", lambda model: FLOOR)
    place = Place("model", "data", "cpu", ROOT)
    assert floor.turn(place, 40, take) == {
        "first step": {"floor": FLOOR["first step"], "library": 10.0, "ours": 8.0},
        "memory": {"floor": FLOOR["memory"], "library": 1000.0, "ours": 900.0},
    }

    def other(side, *rest):
        return take(side, *rest) | ({"losses": [0.9, 0.6, 0.5, 0.4, 0.3]} if side == "ours" else {})

    with pytest.raises(NotEqual, match="the loss of step 1"):
        floor.turn(place, 40, other)


def taken():
    """Three turns; in the second everything takes twice as long."""
    return [
        {
            what: {
                "floor": {part: k * amount for part, amount in FLOOR[what].items()},
                "library": k * peer,
                "ours": own,
            }
            for what, peer, own in (("first step", 10.0, 8.0), ("memory", 1000.0, 900.0))
        }
        for k in (1.0, 2.0, 1.0)
    ]


def test_a_summary_has_medians_and_the_ratio_of_each_turn():
    found = floor.summary(taken())
    assert found["first step"] == {
        "unit": "s", "parts": FLOOR["first step"], "floor": 5.0, "library": 10.0, "ours": 8.0, "ratio": 0.8,
        "lowest ratio": 0.5,
    }  # fmt: skip
    assert (found["memory"]["floor"], found["memory"]["ratio"], found["memory"]["lowest ratio"]) == (700.0, 0.9, 0.7)
    assert "floor 5 s" in floor.lines(found)[0] and "floor / Accelerate 0.70" in floor.lines(found)[1]


def test_the_record_has_a_table_and_a_picture(tmp_path, monkeypatch):
    names = ("python", "torch", "transformers", "accelerate", "datasets")
    here = {"cpu": "a CPU", "cores": 2} | dict.fromkeys(names, "1.0")
    record = {"machine": here, "model": "m", "data": "d", "measures": floor.summary(taken()), "turns": taken()}
    monkeypatch.setattr(readme, "RECORDS", tmp_path)
    assert readme.floor(tmp_path) == ""
    (tmp_path / "2026-01-02_cpu_floor.json").write_text(json.dumps(record))
    floor.plot(record, tmp_path / "2026-01-02_cpu_floor.png")
    text = readme.floor(tmp_path)
    for row in (
        "| | first step | memory |", f"| {WEIGHTS} |  | 400 MiB |", "| **the floor** | 5 s | 700 MiB |",
        "| the floor / Accelerate | **0.50** | **0.70** |",
    ):  # fmt: skip
        assert row in text
    assert (tmp_path / "2026-01-02_cpu_floor.png").stat().st_size > 1000 and "(2026-01-02_cpu_floor.png)" in text


@pytest.mark.slow
def test_the_command_measures_all_three(tmp_path, tiny_tokenizer_dir):
    pytest.importorskip("accelerate", reason="the course's side (extra `bench`)")
    write_job(tmp_path, tiny_tokenizer_dir, {"train": 160, "validation": 30})
    words = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--turns", "1", "--steps", "5"]
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "floor.py", *map(str, words)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert list(record["measures"]) == ["first step", "memory"] and len(record["turns"]) == 1
    for row in record["measures"].values():
        assert min(row["parts"].values()) > 0 and row["ratio"] == row["ours"] / row["library"]
    memory = record["measures"]["memory"]  # the times are of a busy machine: another process may stand in a queue
    assert memory["floor"] < min(memory["ours"], memory["library"]) and memory["lowest ratio"] < memory["ratio"]
