"""A run that is stopped and goes on is the run that was not stopped: weights bit for bit, and each row once.

The reference is the run that was not stopped. Most runs call train.py's `main` in this process, or in forked ranks,
with a tiny model; the process sends itself a signal after an update of our choice. The last tests kill real processes
under torchrun.

    OMP_NUM_THREADS=1 python -m pytest tests/run/test_resume.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script, save_tiny_model
from helpers import run_ranks, run_torchrun
from safetensors.torch import load_file

from nanofinetune.ground.errors import UsageError
from nanofinetune.ground.progress import plural
from nanofinetune.run.result import closing
from nanofinetune.run.resume import IDENTITY, Start, run_of
from nanofinetune.run.run import Run
from nanofinetune.step.order import mix

train = load_script(ROOT / "train.py")


def call(*arguments, stop_after=None, seen=None, forward=None):
    """train.py's main with arguments -> its exit code.

    `stop_after`: this process gets SIGTERM after that update. `seen`: gets (epoch, update, rows) of each update of this
    rank. `forward`: called in place of each forward pass, with the original and the run's log.
    """
    begin, settle = Run.__init__, Run._settle
    patch = pytest.MonkeyPatch()

    def see(run):
        if seen is not None:
            rows = run.loader.sample_ids(run.batches_read - run.log.batches, run.batches_read)
            seen.append((run.log.epoch, run.log.update, rows))
        if run.log.update + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return settle(run)

    current: dict[str, Any] = {}

    def note(run, *args):
        begin(run, *args)
        current["log"] = run.log

    patch.setattr(Run, "__init__", note)
    patch.setattr(Run, "_settle", see)
    patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    if forward is not None:
        from transformers import BertForSequenceClassification as Bert

        original = Bert.forward

        def patched(model, *args, **kwargs):
            if "log" not in current:  # the trial before the first update
                return original(model, *args, **kwargs)
            return forward(original, model, current["log"], *args, **kwargs)

        patched.__module__ = Bert.__module__  # under a stranger's forward a lean encoder would compute the whole
        patch.setattr(Bert, "forward", patched)
    try:
        return train.run_main("train.py", train.main)
    finally:
        patch.undo()


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_run(one, other):
    """Two output folders hold the same run, bit for bit."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    results = [json.loads((output / "result.json").read_text()) for output in (one, other)]
    assert results[0]["evaluations"] == results[1]["evaluations"]


@pytest.fixture
def still_model(tmp_path, tiny_tokenizer_dir):
    """Without dropout, whose masks depend on the number of ranks."""
    return save_tiny_model(tmp_path / "still", tiny_tokenizer_dir, dropout=0.0)


CASES = {
    "plain": [],
    "accumulate, clip, warm-up": ["--accumulate", "3", "--clip-norm", "0.5", "--warmup-steps", "4"],
    "grouped by length": ["--group-by-length"],
    "bf16": ["--precision", "bf16"],
    "fast dropout": ["--fast-dropout"],
}


@pytest.mark.parametrize("case", CASES)
def test_resume_matches_the_uninterrupted_run(case, tiny_model, pairs, tmp_path):
    """Dropout on. Stopped in the first epoch, at the end of an epoch, in the last: three times in one run."""
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3", *CASES[case]]
    assert call(*arguments, "--output", tmp_path / "whole") == 0
    updates = len(losses(tmp_path / "whole"))
    parts = [*arguments, "--output", tmp_path / "parts", "--resume", "auto"]
    for update in (2, updates // 3, updates - 1):
        assert call(*parts, stop_after=update) == 143
        assert (tmp_path / "parts" / "checkpoints" / f"update-{update:08d}").is_dir()
    assert call(*parts) == 0
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_signal_saves_and_resume_continues(tiny_model, pairs, tmp_path, capfd):
    """One plain line on stderr; the last update too can be the one after which a run is stopped."""
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "5"]
    assert call(*arguments, "--output", tmp_path / "whole") == 0
    parts = [*arguments, "--output", tmp_path / "parts"]
    assert call(*parts, stop_after=5) == 143
    folder = tmp_path / "parts" / "checkpoints" / "update-00000005"
    assert (
        f"train.py: stopped by SIGTERM after update 5; saved {folder}; --resume auto goes on from there"
        in capfd.readouterr().err
    )
    assert call(*parts, "--resume", "auto") == 0
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert call("--model", tiny_model, "--data", pairs, stop_after=2) == 143
    assert "stopped by SIGTERM after update 2; nothing was saved" in capfd.readouterr().err


def test_a_resumed_run_says_of_which_updates_its_time_is(tiny_model, pairs, tmp_path):
    """In the same folder and in another: its seconds are those of the last start, its steps are the whole run's."""
    from nanofinetune.report.page import page
    from nanofinetune.report.read import read_run

    arguments = ["--model", tiny_model, "--data", pairs, "--epochs", "1"]
    assert call(*arguments, "--output", tmp_path / "out", stop_after=3) == 143
    saved = tmp_path / "out" / "checkpoints" / "update-00000003"
    for name, resume in (("branch", saved), ("out", "auto")):
        assert call(*arguments, "--output", tmp_path / name, "--resume", resume) == 0
        found = json.loads((tmp_path / name / "result.json").read_text())
        assert (found["steps"], found["resumed_after"]) == (8, 3)
        assert [update for update, _ in found["speed"]] == [3, 8] and found["speed"][0][1] < found["speed"][1][1]
        job = SimpleNamespace(validation={"validation": range(23)}, answers=SimpleNamespace(logits=None))
        lines = closing(found, job, SimpleNamespace(log=SimpleNamespace(kept={}), output=None), 80)  # type: ignore[arg-type]
        assert lines[2].startswith("           5 of 8 updates in ")
        assert "seconds since update 3<" in page([read_run(tmp_path / name)])
    assert call(*arguments, "--output", tmp_path / "whole") == 0
    assert "resumed_after" not in json.loads((tmp_path / "whole" / "result.json").read_text())


def test_damaged_newest_is_passed_over_with_the_reason(tiny_model, pairs, tmp_path, capfd):
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3", "--save-every", "2"]
    assert call(*arguments, "--output", tmp_path / "whole") == 0
    parts = [*arguments, "--output", tmp_path / "parts"]
    assert call(*parts, stop_after=8) == 143
    file = tmp_path / "parts" / "checkpoints" / "update-00000008" / "model.safetensors"
    bytes_of = bytearray(file.read_bytes())
    bytes_of[-1] ^= 1
    file.write_bytes(bytes_of)
    capfd.readouterr()
    assert call(*parts, "--resume", "auto") == 0
    shown = capfd.readouterr().out
    assert "note: passed over update-00000008: model.safetensors has been changed" in shown
    assert "resumed after update 6" in shown
    same_run(tmp_path / "whole", tmp_path / "parts")
    kept = sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir())
    assert kept == ["update-00000022", "update-00000024"]  # --keep 2


MISTAKES = {
    "another seed": (["--seed", "7"], "--seed 7: the run to resume began with 42; use the same"),
    "another learning rate": (["--lr", "1e-4"], "--lr 0.0001: the run to resume began with 0.001; use the same"),
    "another length": (["--epochs", "5"], "--epochs 5: the run to resume began with 3; use the same"),
    "another batch": (
        ["--batch-size", "4"],
        "--resume: the run has 8 rows an update, and 1 process x --batch-size 4 x --accumulate 1 are 4: choose"
        " values that give 8",
    ),
}


def test_resume_refuses_another_run(tiny_model, pairs, tmp_path, capfd):
    output = tmp_path / "out"
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3", "--output", output]
    assert call(*arguments, stop_after=3) == 143
    before = sorted(str(path) for path in output.rglob("*"))
    for options, line in MISTAKES.values():
        capfd.readouterr()
        assert call(*arguments, "--resume", "auto", *options) == 2
        assert capfd.readouterr().err.splitlines() == [f"train.py: {line}"]
    assert call(*arguments) == 2  # without --resume nothing is written over
    assert "it already holds metrics.jsonl, checkpoints of an earlier run" in capfd.readouterr().err
    for wrong in (tmp_path / "nowhere", tmp_path):
        assert call(*arguments, "--resume", wrong) == 2
        assert "there is no complete checkpoint; name a folder that holds one" in capfd.readouterr().err
    assert sorted(str(path) for path in output.rglob("*")) == before
    assert call(*arguments, "--resume", "auto", "--batch-size", "4", "--accumulate", "2") == 0  # 8 rows an update
    assert call(*arguments, "--resume", "auto") == 2
    assert "this run is complete" in capfd.readouterr().err


def test_resume_from_a_named_checkpoint_into_another_folder(tiny_model, pairs, tmp_path, capfd, monkeypatch):
    arguments = ["--model", tiny_model, "--data", pairs, "--save-every", "3", "--keep", "9"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    assert call(*arguments, "--output", tmp_path / "whole") == 0
    third = tmp_path / "whole" / "checkpoints" / "update-00000003"
    assert call(*arguments, "--resume", third, "--output", tmp_path / "branch") == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "branch")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")[3:]
    (tmp_path / "whole" / "result.json").unlink()
    assert call(*arguments, "--resume", third, "--output", tmp_path / "whole") == 2
    assert "holds later ones (update-00000024): say auto, or name another --output" in capfd.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the same command, started again by torchrun
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "0" / "error.json"))
    assert call(*arguments, "--resume", third, "--output", tmp_path / "whole") == 0
    assert "resumed after update 24" in capfd.readouterr().out


def test_resume_refuses_other_data_under_the_same_name(tiny_model, pairs, tmp_path, capfd):
    """The arguments are the same, and what they stand for is not: one label of one of the splits has changed."""
    copy = tmp_path / "pairs"
    shutil.copytree(pairs, copy)
    arguments = ["--model", tiny_model, "--data", copy, "--output", tmp_path / "out", "--resume", "auto"]
    assert call(*arguments, stop_after=3) == 143
    for split, rows in {"train": "training", "validation": "validation"}.items():
        file = next(path for path in copy.iterdir() if path.name.startswith(split))
        lines = file.read_text().splitlines()
        row = json.loads(lines[0])
        file.write_text("\n".join([json.dumps(row | {"label": 1 - row["label"]}), *lines[1:]]) + "\n")
        capfd.readouterr()
        assert call(*arguments) == 2
        was = r"is \w{16}, and the run began with \w{16}; use the same\n"
        assert re.fullmatch(f"train.py: --resume: the hash of the {rows} rows {was}", capfd.readouterr().err)
        file.write_text("\n".join(lines) + "\n")
    assert call(*arguments) == 0


CONFIG = {"hidden_act": "relu", "hidden_dropout_prob": 0.3, "num_attention_heads": 1, "layer_norm_eps": 1e-3}


def test_resume_refuses_a_config_that_computes_something_else(tiny_model, pairs, tmp_path, capfd):
    """Names and shapes of the weights are the same; what is neither computed with nor known may be another."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    arguments = ["--model", model, "--data", pairs, "--output", tmp_path / "out", "--resume", "auto"]
    assert call(*arguments, stop_after=3) == 143
    config = json.loads((model / "config.json").read_text())
    for name, value in CONFIG.items():
        (model / "config.json").write_text(json.dumps(config | {name: value}))
        capfd.readouterr()
        assert call(*arguments) == 2
        was = f"{name} of the model's config is {value}, and the run began with {config[name]}; use the same"
        assert capfd.readouterr().err == f"train.py: --resume: {was}\n"
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0.0", "architectures": ["B"]}))
    assert call(*arguments) == 0


def test_a_checkpoint_that_knows_less_of_the_config_goes_on():
    """One of before, or of a version of transformers that has a setting less, or one more."""
    found = {"the model": "bert", "hidden_act of the model's config": "gelu"}
    run = dict.fromkeys((*IDENTITY, "batch_size", "accumulate"), 1)
    for before, now in ((found, {"the model": "bert"}), ({"the model": "bert"}, found)):
        began = run_of(run, 1, before, Start())
        assert run_of({}, 1, now, Start(Path("update-1"), began)) == began


def test_resume_refuses_another_optimizer():
    began = run_of(dict.fromkeys((*IDENTITY, "batch_size", "accumulate"), 1), 1, {"the optimizer": "AdamW"}, Start())
    start = Start(Path("update-1"), began)
    assert run_of({}, 1, {"the optimizer": "AdamW"}, start) == began
    with pytest.raises(UsageError, match="the optimizer is Adafactor, and the run began with AdamW; use the same"):
        run_of({}, 1, {"the optimizer": "Adafactor"}, start)


def test_two_runs_do_not_write_into_one_folder(tiny_model, pairs, tmp_path, capfd):
    """A scheduler starts a job again while the old one is still saving."""
    fcntl = pytest.importorskip("fcntl", reason="locks of files are Unix'")
    arguments = ["--model", tiny_model, "--data", pairs, "--output", tmp_path / "out", "--resume", "auto"]
    assert call(*arguments, stop_after=3) == 143
    capfd.readouterr()
    with (tmp_path / "out" / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as a run does while it is alive
        assert call(*arguments) == 2
        line = (
            f"train.py: --output {tmp_path / 'out'}: another run is writing there at this moment; wait for its end, or"
        )
        assert capfd.readouterr().err == f"{line} name another folder\n"
    held: list[bool] = []

    def try_to_lock(original, model, log, *args, **kwargs):
        with (tmp_path / "out" / "metrics.jsonl").open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(True)
        return original(model, *args, **kwargs)

    assert call(*arguments, forward=try_to_lock) == 0
    assert held


def test_a_run_that_began_and_ended_meanwhile_is_not_written_over(tiny_model, pairs, tmp_path, capfd, monkeypatch):
    """Two starts with one --output: the second looks first, and reads its data while the other trains."""
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "2", "--output"]
    assert call(*arguments, tmp_path / "first") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*")}
    load = train.load

    def slowly(*args):
        shutil.copytree(tmp_path / "first", tmp_path / "out")
        return load(*args)

    monkeypatch.setattr(train, "load", slowly)
    capfd.readouterr()
    assert call(*arguments, tmp_path / "out") == 2
    why = "another run has written there since this one looked; start again, or name another folder"
    assert capfd.readouterr().err.splitlines()[-1] == f"train.py: --output {tmp_path / 'out'}: {why}"
    same_run(tmp_path / "first", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == set(before)


def test_a_folder_is_locked_until_the_result_is_written(tiny_model, pairs, tmp_path, monkeypatch):
    """A scheduler starts a job again while the old one is writing its model, after the last update."""
    fcntl = pytest.importorskip("fcntl", reason="locks of files are Unix'")
    from nanofinetune.run import result

    held, save = [], result.save

    def look(*args):
        with (tmp_path / "out" / "metrics.jsonl").open("a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(True)
        save(*args)

    monkeypatch.setattr(result, "save", look)
    assert call("--model", tiny_model, "--data", pairs, "--max-steps", "2", "--output", tmp_path / "out") == 0
    assert held
    with (tmp_path / "out" / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_full_disk_ends_no_training_and_loses_nothing(tiny_model, pairs, tmp_path, capfd):
    """A real one: losses and checkpoints are not written, the run goes on; the model is not, and one line says so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in Path(tiny_model).iterdir()) // 1024 * 16
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root, and a machine that lets root mount")
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3", "--save-every", "3"]
    arguments += ["--epochs", "8"]  # more lines of losses than a page has room for
    try:
        assert call(*arguments, "--output", tmp_path / "whole") == 0
        parts = [*arguments, "--output", disk / "out"]
        assert call(*parts, stop_after=6) == 143
        with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        capfd.readouterr()
        assert call(*parts, "--resume", "auto") == 1
        shown = capfd.readouterr().err
        assert f"note: {disk}/out/metrics.jsonl cannot be written (No space left on device); the training goes" in shown
        assert "update-00000009 was not saved: No space left on device; what was saved before is still there" in shown
        last = shown.splitlines()[-1]
        assert last.startswith(f"train.py: --output {disk}/out: the model cannot be written (")
        assert last.endswith("; make room, and --resume auto goes on from the newest checkpoint")
        (disk / "filler").unlink()
        assert call(*parts, "--resume", "auto") == 0
        assert "resumed after update 6" in capfd.readouterr().out
        same_run(tmp_path / "whole", disk / "out")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def on_ranks(arguments, stop_after):
    """One rank's (exit code, [(epoch, update, rows)])."""
    seen: list[tuple[int, int, list[int]]] = []
    return call(*arguments, stop_after=stop_after, seen=seen), seen


@pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped"])
@pytest.mark.parametrize(
    "before, after", [*(pytest.param(*ranks, marks=pytest.mark.slow) for ranks in ((2, 1), (4, 3))), (1, 2)]
)
def test_ranks_may_change_between_runs(before, after, grouped, still_model, pairs, tmp_path):
    """Stopped in the second epoch: each row once an epoch, and the loss curve of the uninterrupted run."""
    batch = {1: 12, 2: 6, 4: 3}[before]  # 12 rows an update
    arguments = ["--model", still_model, "--data", pairs, "--lr", "1e-3", "--batch-size", batch, "--epochs", "2"]
    arguments += ["--group-by-length"] if grouped else []
    arguments += ["--output", str(tmp_path / "parts")]
    whole = [*arguments[:-1], str(tmp_path / "whole")]
    assert all(code == 0 for code, _ in run_ranks(on_ranks, before, whole, None, timeout=240))
    stopped = run_ranks(on_ranks, before, arguments, 9, timeout=240)
    assert [code for code, _ in stopped] == [143] * before
    resumed = run_ranks(on_ranks, after, [*arguments, "--resume", "auto"], None, timeout=240)
    assert [code for code, _ in resumed] == [0] * after
    for epoch in range(2):
        used = [row for _, seen in (*stopped, *resumed) for at, _, rows in seen if at == epoch for row in rows]
        assert sorted(used) == list(range(61))
    assert torch.tensor(losses(tmp_path / "parts")).allclose(
        torch.tensor(losses(tmp_path / "whole")), rtol=0, atol=1e-5
    )


def seeds_of_forwards(arguments):
    """(update, what torch was seeded with) at each training batch of one rank."""
    seeds: list[tuple[int, int]] = []

    def note(original, model, log, *args, **kwargs):
        if model.training:
            seeds.append((log.update, torch.initial_seed()))
        return original(model, *args, **kwargs)

    return call(*arguments, forward=note), seeds


def test_dropout_is_a_function_of_seed_update_and_rank(tiny_model, pairs):
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "3", "--accumulate", "2"]
    ranks = run_ranks(seeds_of_forwards, 2, arguments, timeout=120)
    for rank, (code, seeds) in enumerate(ranks):
        assert code == 0
        assert seeds == [(update, mix(42, update, rank)) for update in (0, 0, 1, 1, 2, 2)]


def nan_once(original, model, log, *args, **kwargs):
    output = original(model, *args, **kwargs)
    if model.training and log.update == 2:
        output.loss = output.loss * float("nan")
    return output


def test_nonfinite_loss_is_named(tiny_model, pairs, tmp_path, capfd):
    """By update, rows and learning rate; nothing of it reaches the weights."""
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "5", "--output", tmp_path / "out"]
    seen: list[tuple[int, int, list[int]]] = []
    assert call(*arguments, forward=nan_once, seen=seen) == 1
    _, _, rows = seen[-1]
    line = (
        f"train.py: update 3: the loss is not finite (rank 0: rows {', '.join(map(str, rows))} of the training split;"
        " learning rate 3e-05); nothing was changed by it, and --on-nan skip leaves such updates out; saved"
        f" {tmp_path / 'out' / 'checkpoints' / 'update-00000002'}; --resume auto goes on from there"
    )
    assert capfd.readouterr().err.splitlines()[-1] == line
    again = [*arguments, "--resume", "auto"]
    assert call(*again, forward=nan_once) == 1  # at the same place, which is saved already
    assert capfd.readouterr().err.splitlines()[-1] == line
    assert call(*again, "--on-nan", "skip", forward=nan_once) == 0
    arguments[-1] = tmp_path / "skipped"
    assert call(*arguments, "--on-nan", "skip", forward=nan_once) == 0
    assert [loss is None for loss in losses(tmp_path / "skipped")] == [False, False, True, False, False]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "skipped").values())
    same_run(tmp_path / "skipped", tmp_path / "out")


def nan_on_one_rank(original, model, log, *args, **kwargs):
    if os.environ["RANK"] == "1":
        return nan_once(original, model, log, *args, **kwargs)
    return original(model, *args, **kwargs)


def stderr_of(arguments, forward):
    """(exit code, what this rank wrote on stderr)."""
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        code = call(*arguments, forward=forward)
        file.seek(0)
        return code, file.read()


@pytest.mark.slow
def test_nonfinite_loss_of_one_rank_ends_all_and_is_named(tiny_model, pairs, tmp_path):
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "5", "--output", str(tmp_path / "out")]
    (first, said), (second, silent) = run_ranks(stderr_of, 2, arguments, nan_on_one_rank, timeout=120)
    assert first == second == 1
    assert re.search(
        r"update 3: the loss is not finite \(rank 1: rows \d+(, \d+){7} of the training split; learn", said
    )
    assert f"saved {tmp_path / 'out' / 'checkpoints' / 'update-00000002'}; --resume auto goes on" in said
    assert "not finite" not in silent
    skipped = [*arguments[:-1], str(tmp_path / "skipped"), "--on-nan", "skip"]
    assert [code for code, _ in run_ranks(stderr_of, 2, skipped, nan_on_one_rank, timeout=120)] == [0, 0]
    rows = [json.loads(line)["rows"] for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [16, 16, 0, 13, 16]


def broken(original, model, log, *args, **kwargs):
    if model.training and log.update == 2:
        raise ZeroDivisionError("division by zero")
    return original(model, *args, **kwargs)


def test_an_exception_carries_the_rows_of_its_batch(tiny_model, pairs):
    """At the end of the traceback, which launch.sh shows last: what to look at first."""
    whole: list[tuple[int, int, list[int]]] = []
    assert call("--model", tiny_model, "--data", pairs, "--max-steps", 3, seen=whole) == 0
    with pytest.raises(ZeroDivisionError) as raised:
        call("--model", tiny_model, "--data", pairs, "--max-steps", 3, forward=broken)
    rows = ", ".join(map(str, whole[2][2]))
    assert raised.value.__notes__ == [f"rank 0, update 3: rows {rows} of the training split"]


def broken_in_evaluation(original, model, log, *args, **kwargs):
    if not model.training:
        raise ZeroDivisionError("division by zero")
    return original(model, *args, **kwargs)


def test_an_exception_in_evaluation_names_no_training_rows(tiny_model, pairs):
    with pytest.raises(ZeroDivisionError) as raised:
        call("--model", tiny_model, "--data", pairs, "--max-steps", 3, forward=broken_in_evaluation)
    assert raised.value.__notes__ == ["rank 0, in the evaluation after update 3"]


def last_rank():
    return os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)


def too_large(original, model, log, *args, **kwargs):
    """The last rank has memory for two rows."""
    if model.training and len(kwargs["labels"]) > 2 and last_rank():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return original(model, *args, **kwargs)


leftover: list[Any] = []  # of the backward that ran out of memory: a weak reference to what it held


def too_large_in_backward(original, model, log, *args, **kwargs):
    """The last rank runs out of memory when most of backward is done, its first buckets are on their way."""
    assert all(reference() is None for reference in leftover), "the next forward starts while the last one's is held"
    output = original(model, *args, **kwargs)
    if model.training and len(kwargs["labels"]) > 2 and last_rank():

        def fail(_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        for function in _graph(output.loss):
            if function.name() == "EmbeddingBackward0":
                function.register_prehook(fail)
        leftover.append(weakref.ref(output.loss))
    return output


def _graph(tensor):
    """Every function of a tensor's graph."""
    seen, open_ends = set(), [tensor.grad_fn]
    while open_ends:
        function = open_ends.pop()
        if function is not None and function not in seen:
            seen.add(function)
            open_ends += [following for following, _ in function.next_functions]
    return seen


def without_memory(arguments, forward=None):
    patch = pytest.MonkeyPatch()
    patch.setattr("nanofinetune.ranks.ddp.MIB", 2048)  # many buckets, also of a tiny model
    try:
        return stderr_of(arguments, forward)
    finally:
        patch.undo()
        leftover.clear()


@pytest.mark.parametrize("accumulate", [1, 3], ids=["plain", "accumulate"])  # 61 rows: the last window is short
@pytest.mark.parametrize("fails", [too_large, too_large_in_backward], ids=["forward", "backward"])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_out_of_memory_on_one_rank_shrinks_on_all(world, fails, accumulate, still_model, pairs, tmp_path):
    """From 8 rows to 2: twice a note, as many rows an update, the losses of the run that had memory."""
    arguments = ["--model", still_model, "--data", pairs, "--lr", "1e-3", "--epochs", "2", "--accumulate", accumulate]
    whole, small = ([*arguments, "--output", str(tmp_path / name)] for name in ("whole", "small"))
    assert run_ranks(without_memory, world, whole, timeout=240) == [(0, "")] * world
    found = run_ranks(without_memory, world, small, fails, timeout=240)
    assert [code for code, _ in found] == [0] * world
    notes = [line for _, said in found for line in said.splitlines() if line.startswith("note: out of memory")]
    assert notes == [
        f"note: out of memory: {plural(rows, 'row')} per process x {plural(world, 'process', 'processes')} x"
        f" {8 // rows * accumulate} accumulated"
        f" from here on, {8 * world * accumulate} rows an update as before"
        for rows in (4, 2)
    ]
    rows = [json.loads(line)["rows"] for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        json.loads(line)["rows"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert torch.tensor(losses(tmp_path / "small")).allclose(
        torch.tensor(losses(tmp_path / "whole")), rtol=0, atol=1e-5
    )


def test_resume_after_memory_ran_out_keeps_the_smaller_batch(tiny_model, pairs, tmp_path):
    """Dropout on: one row more or less in a batch would give other masks, and other weights."""
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3"]
    assert call(*arguments, "--output", tmp_path / "whole", forward=too_large) == 0
    parts = [*arguments, "--output", tmp_path / "parts"]
    assert call(*parts, stop_after=5, forward=too_large) == 143
    assert call(*parts, "--resume", "auto") == 0  # there is memory now: it goes on as it was
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_out_of_memory_with_one_row_saves_and_says_so(tiny_model, pairs, tmp_path, capfd):
    def never_enough(original, model, log, *args, **kwargs):
        if model.training and log.update == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, *args, **kwargs)

    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "5", "--output", tmp_path / "out"]
    assert call(*arguments, forward=never_enough) == 1
    folder = tmp_path / "out" / "checkpoints" / "update-00000002"
    assert capfd.readouterr().err.splitlines()[-1] == (
        "train.py: out of memory with one row a batch: choose a smaller model, or a device with more memory; saved"
        f" {folder}; --resume auto goes on from there"
    )
    assert call(*arguments, "--resume", "auto") == 0


KILLER = """
import os, signal, sys
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, {root!r})
import train
from nanofinetune.run.run import Run
settle = Run._settle
def killed(run):
    once = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
    if once and run.log.update == 7:
        os.kill({victim}, signal.{signal})
    return settle(run)
Run._settle = killed
sys.exit(train.run_main("train.py", train.main))
"""


@pytest.mark.slow
def test_a_killed_rank_restarts_the_group_which_resumes(tiny_model, pairs, tmp_path):
    """torchrun --max-restarts: without a word more the group goes on from the newest checkpoint, bit for bit."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(root=str(ROOT), victim="os.getpid()", signal="SIGKILL"))
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3", "--save-every", "3"]
    whole = [*arguments, "--output", str(tmp_path / "whole")]
    assert run_torchrun([ROOT / "train.py", *whole], 2).returncode == 0
    parts = [*arguments, "--output", str(tmp_path / "parts")]
    done = run_torchrun(["--max-restarts=2", script, *parts], 2, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "note: resumed after update 6" in done.stdout
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["refuses", "fails before it looks"])
def test_a_restart_never_takes_another_runs_folder(first, tiny_model, pairs, tmp_path):
    """torchrun repeats a mistake; its second start must not take the folder that the first one has refused."""
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "9", "--output", str(tmp_path / "old")]
    assert call(*arguments, stop_after=5) == 143
    before = {str(path): path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")}
    script = tmp_path / "late.py"
    fails = "import os\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': import no_such_module\n"
    script.write_text(
        (fails if first != "refuses" else "") + f"import runpy\nrunpy.run_path({str(ROOT / 'train.py')!r},"
    )
    with script.open("a") as file:
        file.write(" run_name='__main__')\n")
    done = run_torchrun(["--max-restarts=1", script, *arguments], 2, timeout=180)
    assert done.returncode != 0
    assert done.stderr.count("it already holds metrics.jsonl, checkpoints of an earlier run") == (
        2 if first == "refuses" else 1
    )
    assert {str(path): path.stat().st_mtime_ns for path in (tmp_path / "old").rglob("*")} == before


@pytest.mark.slow  # torchrun gives a rank half a minute to end, and a stopped one does not
def test_a_stopped_rank_restarts_the_group_which_resumes(tiny_model, pairs, tmp_path):
    """Only the time-out finds it: the others say which rank does not answer, and all begin at the newest checkpoint."""
    script = tmp_path / "stopper.py"
    script.write_text(KILLER.format(root=str(ROOT), victim="os.getpid()", signal="SIGSTOP"))
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3", "--save-every", "3", "--timeout", "10"]
    assert run_torchrun([ROOT / "train.py", *arguments, "--output", str(tmp_path / "whole")], 2).returncode == 0
    parts = [*arguments, "--output", str(tmp_path / "parts")]
    done = run_torchrun(["--max-restarts=2", script, *parts], 2, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 1 does not answer: it is stopped, or gone" in done.stderr
    assert "note: resumed after update 6" in done.stdout
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_sigterm_of_torchrun_saves_the_same_update_on_all_ranks(tiny_model, pairs, tmp_path):
    """What a scheduler sends: torchrun hands it on, and each rank finishes the update."""
    script = tmp_path / "stopper.py"
    script.write_text(KILLER.format(root=str(ROOT), victim="os.getppid()", signal="SIGTERM"))
    arguments = ["--model", tiny_model, "--data", pairs, "--lr", "1e-3"]
    assert run_torchrun([ROOT / "train.py", *arguments, "--output", str(tmp_path / "whole")], 2).returncode == 0
    parts = [*arguments, "--output", str(tmp_path / "parts")]
    done = run_torchrun([script, *parts], 2)
    assert done.returncode != 0
    assert done.stderr.count("SIGTERM: stopping after this update; once more to stop now") == 1
    found = re.search(
        r"train.py: stopped by SIGTERM after update (\d+); saved (\S+); --resume auto goes on", done.stderr
    )
    assert found and int(found[1]) >= 8 and found[2].endswith(f"update-{int(found[1]):08d}"), done.stderr[-3000:]
    again = run_torchrun([ROOT / "train.py", *parts, "--resume", "auto"], 2)
    assert again.returncode == 0, again.stderr[-3000:]
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_worker_whose_launcher_died_ends(tiny_model, pairs, tmp_path):
    import time

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += ["--model", tiny_model, "--data", pairs, "--epochs", "100000", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line.startswith("epoch 1"):
                break
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        workers = [int(pid) for pid in children.split()]
        assert len(workers) == 2
        launcher.kill()
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in workers if _runs(pid)]


def _runs(pid):
    """Whether a process lives; who waits for its exit code, where its parent is gone, is not our matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
