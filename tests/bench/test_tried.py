"""bench/tried.py: each idea gives what is done now, and one that does not is refused. Never a time.

    python -m pytest tests/bench/test_tried.py
    python -m pytest tests/bench/test_tried.py -m slow      what needs processes of its own, or a compiler

References: what the idea would replace, of torch 2.13 and of ours, on a tiny model.
"""

import itertools
import json
import sys

import pytest
import torch
from conftest import ROOT, write_job
from programs import run_program

sys.path.insert(0, str(ROOT / "bench"))

import tried

ALONE = ("compiled", "pinned")  # slow


@pytest.fixture(scope="module")
def tiny_job(tmp_path_factory, tiny_tokenizer_dir):
    return tried.Job(*write_job(tmp_path_factory.mktemp("tried"), tiny_tokenizer_dir, {"train": 8, "validation": 8}))


@pytest.fixture
def untimed(monkeypatch):
    """A turn of each way, and no clock."""

    def interleave(now, idea, repeats):
        now(), idea()
        return [(4.0, 2.0)] * repeats

    monkeypatch.setattr(tried, "interleave", interleave)
    monkeypatch.setattr(tried, "STEPS", 1)


@pytest.mark.parametrize("idea", [name for name in tried.IDEAS if name not in ALONE])
def test_an_idea_matches_what_is_done_now(idea, tiny_job, untimed):
    if reason := tried.missing(idea):
        pytest.skip(reason)
    found = list(tried.IDEAS[idea](tiny_job, tiny_job.classifier().config, 5))
    assert [row.piece for row, _ in found] == [idea]
    assert all(times > 0 and tried.saved(row, times) == 2.0 * times for row, times in found)


@pytest.mark.parametrize(("factor", "column"), [(1.001, 0), (1.0, 1)])
def test_an_idea_with_another_result_is_refused(factor, column, monkeypatch):
    monkeypatch.setattr(tried, "interleave", lambda *_: pytest.fail("timed before the gate had refused"))
    now, other = [torch.ones(3), torch.ones(2)], [torch.ones(3) * factor, torch.ones(2 + column)]
    with pytest.raises(tried.NotEqual, match=f"x: result {column} of the idea is another one"):
        tried.beside("x", "a test", lambda: now, lambda: other, 5, 1)


@pytest.mark.parametrize("idea", ["flat", "backward"])
def test_another_learning_rate_is_refused(idea, tiny_job, untimed, monkeypatch):
    adamw, rates = tried.AdamW, itertools.chain([tried.LR], itertools.repeat(2 * tried.LR))
    monkeypatch.setattr(tried, "AdamW", lambda parameters, lr: adamw(parameters, lr=next(rates)))
    with pytest.raises(tried.NotEqual):
        list(tried.IDEAS[idea](tiny_job, tiny_job.classifier().config, 5))


def test_what_cannot_be_measured_is_said(tiny_job, monkeypatch, capsys):
    monkeypatch.setattr(tried.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["tried.py", "compiled", "--model", tiny_job.model])
    tried.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "compiled  skipped: torch.compile needs g++"
    assert json.loads(lines[-1])["skipped"] == {"compiled": "torch.compile needs g++"}


@pytest.mark.slow
@pytest.mark.parametrize("idea", ALONE)
def test_an_idea_in_a_process_of_its_own_matches_what_is_done_now(idea, tiny_job, tmp_path):
    if reason := tried.missing(idea):
        pytest.skip(reason)
    file = tmp_path / "tried.json"
    done = run_program([ROOT / "bench" / "tried.py", idea, "--model", tiny_job.model, "--json", file], timeout=400)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads(file.read_text())
    assert [row["piece"] for row in record["rows"]] == [idea] * (2 if idea == "compiled" else 1)
    for row in record["rows"]:
        assert len(row["turns"]) in (5, 25) and all(time > 0 for turn in row["turns"] for time in turn)
        assert (row["in_step"] is None) == (row["what"] == "its first call in a process")
