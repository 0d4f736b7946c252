"""bench/quality.py --timed: its turns, what it keeps, its record and the table made from it. Never a time.

Run: python -m pytest tests/bench/test_quality.py
"""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import quality
import readme
import throughput


class Ended:
    """A process that has printed a result."""

    returncode = 0

    def __init__(self, result):
        self.result = result

    def communicate(self):
        return f"a line\n{json.dumps(self.result)}\n", None


@pytest.fixture
def started(monkeypatch):
    """Runs that end at once, and what was started: (side, its arguments, its cores)."""
    found = []

    def start(side, job, threads):
        found.append((side, job, threads))
        return Ended({"steps": 1377, "accuracy": 0.5 + len(found) / 100, "f1": 0.75})

    monkeypatch.setattr(quality, "start", start)
    return found


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch):
    """The best options of a CPU that has them, on any CPU."""
    monkeypatch.setattr(throughput, "has_bf16", lambda: True)


def test_sides_take_turns_and_each_has_its_best_options_and_all_cores(tmp_path, started, monkeypatch):
    monkeypatch.setattr(quality.os, "cpu_count", lambda: 6)
    runs = quality.run_timed(tmp_path, ["--model", "m"], [1, 2])
    assert [(side, job[-1]) for side, job, _ in started] == [
        ("nanofinetune", "5"), ("library", "5"),  # fill the caches
        ("nanofinetune", "1"), ("library", "1"), ("library", "2"), ("nanofinetune", "2"),
    ]  # fmt: skip
    best = throughput.setups([1], ["bf16"], 40)["best"]
    options = {"nanofinetune": best.ours, "library": best.library}
    for side, job, threads in started:
        assert job[:4] == ["--model", "m", "--precision", "bf16"] and threads == 6
        assert job[4:-2] == list(options[side])
    assert runs.keys() == {1, 2} and all(runs[seed][side]["wall"] >= 0 for seed in runs for side in quality.SCRIPTS)


def test_a_timed_run_that_is_there_is_not_repeated_and_a_trial_is_none(tmp_path, started):
    runs = quality.run_timed(tmp_path, ["--model", "m"], [1])
    assert len(started) == 4
    assert quality.run_timed(tmp_path, ["--model", "m"], [1]) == runs and len(started) == 4
    (tmp_path / "timed-library-1.json").unlink()
    assert quality.run_timed(tmp_path, ["--model", "m"], [1])[1]["nanofinetune"] == runs[1]["nanofinetune"]
    assert len(started) == 4 + 3, "the caches are filled again, then one run"
    quality.run_timed(tmp_path, ["--model", "m", "--max-steps", "9"], [1])
    assert len(started) == 7 + 4, "nine steps are another result than three epochs"
    quality.run_seed(tmp_path, ["--model", "m"], 1, list(quality.SCRIPTS))
    assert len(started) == 11 + 2, "what is timed runs alone, so it is another result, too"


def test_a_run_that_fails_is_named(tmp_path, started, monkeypatch):
    monkeypatch.setattr(Ended, "returncode", 3)
    with pytest.raises(SystemExit, match="nanofinetune's warm-up ended with 3"):
        quality.run_timed(tmp_path, [], [1])
    assert not list(tmp_path.iterdir())


def results(*walls):
    return {
        seed: {
            side: {"steps": 1377, "accuracy": 0.8, "f1": 0.85, "wall": wall * factor}
            for side, factor in (("nanofinetune", 1), ("library", 2))
        }
        for seed, wall in enumerate(walls, 1)
    }


def test_a_record_of_timed_runs_has_the_spread_of_times_and_scores():
    record = quality.summarise(results(100.0, 110.0, 120.0), "/somewhere/glue/mrpc")
    assert (record["what"], record["data"]) == ("quality", "glue/mrpc")
    ours, theirs = record["sides"]["nanofinetune"], record["sides"]["library"]
    assert ours["wall"] == {"seeds": {"1": 100.0, "2": 110.0, "3": 120.0}, "mean": 110.0, "std": 10.0}
    assert theirs["wall"]["mean"] == 220.0 and theirs["options"] == "--precision bf16 --fused --eval-batch-size 64"
    text = readme.time_to_quality(record, "x.json")
    assert "each side at its best, 1,377 updates" in text and text.splitlines()[0].endswith("; x.json.")
    assert (
        "| train.py | `--precision bf16 --group-by-length --fast-dropout` | 110.0 ± 10.0 (100.0, 110.0, 120.0) |"
        " 0.800 ± 0.000 (0.800, 0.800, 0.800) | 0.850 ± 0.000 (0.850, 0.850, 0.850) |"
    ) in text


def test_a_record_of_runs_side_by_side_has_no_times():
    runs = {seed: {s: {k: v for k, v in r.items() if k != "wall"} for s, r in each.items()} for seed, each in
            results(1.0, 2.0).items()}  # fmt: skip
    record = quality.summarise(runs, "glue/mrpc")
    assert record["what"] == "mrpc" and set(record["sides"]["library"]) == {"steps", "accuracy", "f1"}


def test_the_table_stands_in_the_documents_once_there_is_a_record(tmp_path, monkeypatch):
    source = max(readme.RECORDS.glob("*_mrpc.json"))
    (tmp_path / source.name).write_text(source.read_text())
    monkeypatch.setattr(readme, "RECORDS", tmp_path)
    before = readme.mrpc(tmp_path)
    assert "seconds to the scores" not in before
    record = quality.summarise(results(100.0, 110.0), "glue/mrpc")
    (tmp_path / "2026-01-02_cpu_quality.json").write_text(json.dumps(record))
    after = readme.mrpc(tmp_path)
    assert after.startswith(before) and "[2026-01-02_cpu_quality.json](2026-01-02_cpu_quality.json)" in after
