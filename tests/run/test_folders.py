"""Nothing that we did not make is ever deleted or replaced, and what we made is replaced in one step.

    OMP_NUM_THREADS=1 python -m pytest tests/run/test_folders.py

Compared with what accelerate 1.15 leaves of the same folders.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from both_libraries import Ours, training
from programs import run_program

from nanofinetune.run import checkpoint, folders


@pytest.fixture
def accelerate():
    """The library, without the state that all its instances share."""
    module = pytest.importorskip("accelerate", reason="accelerate (the extra `test`) is not installed")
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()
    yield module
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()


def content(folder):
    """Every file below a folder, hidden ones too, with its bytes; links with their target, folders with None."""
    found = {}
    for root, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(root, name)
            what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = what
    return found


def project(folder):
    """A folder of somebody's work."""
    (folder / "runs" / "epoch_0").mkdir(parents=True)
    (folder / "train.py").write_text("my work")
    (folder / "runs" / "epoch_0" / "model.bin").write_text("my weights")
    return folder


def test_save_state_into_a_project_leaves_it_as_it_is(accelerate, tmp_path):
    """There, the state's files are put beside the project's; here, an error of one line names what is in the way."""
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        folder = project(tmp_path / name)
        before = content(folder)
        accelerator, *_ = training(library, tmp_path / f"{name} run")
        accelerator.project_configuration.automatic_checkpoint_naming = False
        if library is Ours:
            with pytest.raises(FileExistsError, match=r"exists and is no checkpoint of ours \(\S+ in it is not ours"):
                accelerator.save_state(folder)
            with pytest.raises(FileExistsError, match="is no checkpoint of ours"):
                accelerator.save_state(folder, background=True)
            assert content(folder) == before
        else:
            accelerator.save_state(str(folder))
            assert before.items() < content(folder).items()


def test_an_empty_folder_is_filled_as_accelerate_fills_it(accelerate, tmp_path):
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        accelerator, *_ = training(library, tmp_path / f"{name} run")
        accelerator.project_configuration.automatic_checkpoint_naming = False
        (tmp_path / name).mkdir()
        accelerator.save_state(str(tmp_path / name))
        assert (tmp_path / name / "model.safetensors").exists()


def test_saving_twice_replaces_as_accelerate_does(accelerate, tmp_path):
    """`save_state("last")` after each epoch; but not what automatic naming has numbered, there or here."""
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        accelerator, model, *_ = training(library, tmp_path / f"{name} run")
        accelerator.project_configuration.automatic_checkpoint_naming = False
        for value in (1.0, 2.0):
            with torch.no_grad():
                accelerator.unwrap_model(model)[0].weight.fill_(value)
            accelerator.save_state(str(tmp_path / name))
        with torch.no_grad():
            accelerator.unwrap_model(model)[0].weight.fill_(3.0)
        accelerator.load_state(str(tmp_path / name))
        assert (accelerator.unwrap_model(model)[0].weight == 2.0).all()
        accelerator.project_configuration.automatic_checkpoint_naming = True
        accelerator.save_state()
        accelerator.project_configuration.iteration -= 1
        with pytest.raises(ValueError, match="exists"):
            accelerator.save_state()
    assert folders.check(tmp_path / "ours") == ""


# ---- what is in the way: name -> what makes it ----


def plain_file(folder):
    folder.write_text("mine")


def link(folder):
    folder.parent.joinpath("elsewhere").mkdir()
    folder.symlink_to("elsewhere")


def dangling(folder):
    folder.symlink_to("nowhere")


def nested(folder):
    checkpoint.save(folder, {"part": {}})
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine")


def notes(folder):
    checkpoint.save(folder, {"part": {}})
    (folder / "notes.txt").write_text("mine")


def link_inside(folder):
    checkpoint.save(folder, {"part": {}})
    folder.parent.joinpath("precious.json").write_text("mine")
    (folder / "part.json").unlink()
    (folder / "part.json").symlink_to("../precious.json")


def forged(folder):
    """A manifest that names a file outside."""
    folder.mkdir()
    folder.parent.joinpath("precious.json").write_text("mine")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {"../precious.json": {}}}))


def transformers_model(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("mine")
    (folder / "manifest.json").write_text(json.dumps({"name": "my web app"}))


IN_THE_WAY = (
    plain_file, link, dangling, nested, notes, link_inside, forged, transformers_model, project,
)  # fmt: skip


@pytest.mark.parametrize("make", IN_THE_WAY)
def test_what_is_not_ours_is_never_deleted(make, tmp_path):
    """By saving over it, by `keep`, or by deleting it: not a byte of it changes."""
    make(tmp_path / "update-1")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="update-1 exists and is no checkpoint of ours"):
        checkpoint.save(tmp_path / "update-1", {"part": {}}, keep=1)
    assert content(tmp_path) == before
    folders.delete(tmp_path / "update-1")
    folders.sweep(tmp_path)
    assert content(tmp_path) == before
    checkpoint.save(tmp_path / "update-2", {"part": {}}, keep=1)
    after = content(tmp_path)
    assert {name: text for name, text in after.items() if not name.startswith("update-2")} == before
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "update-2"


def test_a_sweep_takes_only_what_a_kill_left_of_ours(tmp_path):
    """Names of another form stay, and so does what holds anything else, or is being written by another process."""
    for name in (".saving-update-1", ".leaving-notes", ".saving-update-1-0123456", ".saving-update-1-0123456g"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / ".saving-update-1-01234567").mkdir()
    (tmp_path / ".saving-update-1-01234567" / "mine.txt").write_text("mine")
    (tmp_path / ".leaving-update-1-01234568").write_text("mine")
    (tmp_path / ".leaving-update-1-01234569").symlink_to(".saving-update-1")
    before = content(tmp_path)
    folders.sweep(tmp_path)
    assert content(tmp_path) == before
    checkpoint.save(tmp_path / "update-1", {"part": {}})
    shutil.copytree(tmp_path / "update-1", tmp_path / ".leaving-update-0-0123456a")
    shutil.copytree(tmp_path / "update-1", tmp_path / ".saving-update-0-0123456b")
    (tmp_path / ".saving-update-0-0123456c").mkdir()  # the kill came before its first file
    (tmp_path / ".saving-update-0-0123456d").mkdir()
    (tmp_path / ".saving-update-0-0123456d" / "manifest.json").touch()  # and here before its first byte
    ours = [path for path in tmp_path.iterdir() if "update-0" in path.name]
    assert len(ours) == 4
    held = [folders._lock(path) for path in ours]
    folders.sweep(tmp_path)
    assert all(path.is_dir() for path in ours)  # this process is writing them
    for descriptor in held:
        assert descriptor is not None
        os.close(descriptor)
    folders.sweep(tmp_path)
    assert not any(path.exists() for path in ours)
    assert content(tmp_path).items() >= before.items()


def test_two_runs_save_into_one_folder_at_the_same_time(tmp_path):
    """The sweep of one does not take the half-written checkpoint of the other."""
    with folders.new_folder(tmp_path / "one", ["w.json"]) as draft:
        checkpoint.save(tmp_path / "other", {"part": {}})
        (draft / "w.json").write_text("1")
    assert folders.check(tmp_path / "one") == folders.check(tmp_path / "other") == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from nanofinetune.run import checkpoint, folders

folder, at_once = Path(sys.argv[1]), sys.argv[2] == "at once"
if not at_once:
    folders._exchange = lambda one, other: False  # as on macOS, or on NFS

def save(value, kill_at=0):
    count = 0
    def audit(event, args):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and str(folder.parent) in str(args[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if kill_at:
        sys.addaudithook(audit)
    checkpoint.save(folder, {"model": {"w": torch.full((10,), float(value))}})

save(0)
value, gaps = 0, 0
for kill_at in range(1, 1000):
    child = os.fork()
    if child == 0:
        save(kill_at, kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    gaps += not folder.exists()
    found = checkpoint.load(folder)["model"]["w"][0].item()
    assert found in (value, kill_at), (found, value, kill_at)
    save(kill_at)
    value = kill_at
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], list(folder.parent.iterdir())
    if status == 0:
        break
print(kill_at, gaps)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["at once", "in two renames"])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(how, tmp_path):
    """SIGKILL before each file operation of `save_state("last")`. Where folders cannot swap names, `load` mends it."""
    done = run_program(["-c", KILLED, tmp_path / "run" / "last", how], timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    operations, gaps = map(int, done.stdout.split())
    assert operations > 12
    assert gaps == (0 if how == "at once" and sys.platform == "linux" else 1)


def test_keep_deletes_only_what_is_ours(tmp_path):
    """Somebody's own epoch_0 and epoch_1 beside a script's `save_state("epoch_2", keep=1)`."""
    for name in ("epoch_0", "epoch_1"):
        project(tmp_path / name)
    before = content(tmp_path)
    checkpoint.save(tmp_path / "epoch_2", {"part": {}}, keep=1)
    checkpoint.save(tmp_path / "epoch_3", {"part": {}}, keep=1)
    assert {name: text for name, text in content(tmp_path).items() if not name.startswith("epoch_3")} == before
    checkpoint.save(tmp_path / "last", {"part": {}}, keep=1)  # without a number there is nothing older
    checkpoint.save(tmp_path / "last", {"part": {}}, keep=1)


def test_a_new_checkpoint_stays_whatever_is_newer(tmp_path):
    """A run that went back to an older one saves beside newer ones."""
    for update in (1, 2, 8, 9):
        checkpoint.save(tmp_path / f"update-{update}", {"part": {}})
    checkpoint.save(tmp_path / "update-3", {"part": {}}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-3", "update-8", "update-9"]


def test_a_stopped_save_leaves_no_lock(tmp_path):
    """The lock ends with its process, however that ends."""
    code = (
        "import os, sys; from pathlib import Path; from nanofinetune.run import folders\n"
        "with folders.new_folder(Path(sys.argv[1]), ['w.json']):\n    os.kill(os.getpid(), 9)"
    )
    done = run_program(["-c", code, tmp_path / "update-1"])
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    folders.sweep(tmp_path)
    assert not list(tmp_path.iterdir())
