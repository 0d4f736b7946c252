"""A checkpoint is complete or does not exist; and what accelerate 1.15 does after the same faults.

OMP_NUM_THREADS=1 python -m pytest tests/run/test_checkpoint.py
"""

import json
import os
import pickle
import random
import re
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from both_libraries import Ours, training
from conftest import calls, tiny_bert
from programs import run_program
from torch import nn

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


def parts(value=1.0):
    tied = torch.full((3, 2), value)
    return {
        "model": {"embedding.weight": tied, "head.weight": tied, "bias": torch.arange(3.0) * value},
        "scheduler": {"last_epoch": int(value), "_last_lr": [0.1 * value]},
    }


def same(one, other):
    """Trees of the same containers, types and values, tensors bit for bit."""
    assert type(one) is type(other) or (isinstance(one, dict) and isinstance(other, dict))  # an OrderedDict
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            same(first, second)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other or (one != one and other != other)


# ---- state as tensors and JSON ----


def adamw_state():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


TREES = {
    "an optimizer": adamw_state(),
    "a model": tiny_bert().state_dict(),
    "every dtype": {str(dtype): torch.ones(2, dtype=dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )},
    "shapes": [torch.zeros(()), torch.zeros(0), torch.zeros(2, 0, 3), torch.arange(6).reshape(2, 3).t()],
    "numbers": {"inf": float("inf"), "nan": float("nan"), "small": 5e-324, "large": 2**80, "none": None, "text": "a\n"},
    "keys that look like ours": {"!tensor": "a", "!dict": [1], 3: (4, (5,)), "dotted.key": {"x": torch.ones(1)}},
    "generators": {**checkpoint.random_state(), "torch generator": torch.Generator().get_state()},
    "empty": {"": {}, "list": [], "tuple": ()},
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_trees_match_torch_save(name, tmp_path):
    """What comes back is what torch.save and torch.load bring back."""
    torch.save(TREES[name], tmp_path / "reference.pt")
    reference = torch.load(tmp_path / "reference.pt", weights_only=True)
    checkpoint.save(tmp_path / "update-1", {"part": TREES[name]})
    same(checkpoint.load(tmp_path / "update-1")["part"], reference)
    same(checkpoint.read_part(tmp_path / "update-1", "part"), reference)


def test_trees_come_back_as_they_were(tmp_path):
    """numpy's numbers as Python's; tied tensors tied, stored once; nothing else is taken, and the place is named."""
    checkpoint.save(tmp_path / "update-1", parts() | {"numpy": {"mean": np.float64(0.5), "n": np.int32(3)}})
    loaded = checkpoint.load(tmp_path / "update-1")
    assert loaded["numpy"] == {"mean": 0.5, "n": 3} and type(loaded["numpy"]["mean"]) is float
    first, second = loaded["model"]["embedding.weight"], loaded["model"]["head.weight"]
    assert first.data_ptr() == second.data_ptr()
    from safetensors.torch import load_file

    assert sorted(load_file(tmp_path / "update-1" / "model.safetensors")) == ["bias", "embedding.weight"]
    with pytest.raises(TypeError, match=r"^hyper\.0\.path is a PosixPath: a checkpoint holds tensors, numbers, text"):
        checkpoint.pack({"hyper": [{"path": Path("/")}]})
    with pytest.raises(KeyError):
        checkpoint.read_part(tmp_path / "update-1", "optimizer")


SAME_PATHS = {
    "a dot in a name": lambda one, two: {"ema": {"w": one}, "ema.w": two},
    "the other way round": lambda one, two: {"ema.w": one, "ema": {"w": two}},
    "a number and its text": lambda one, two: {0: one, "0": two},
    "a list and a dict": lambda one, two: {"a": [one], "a.0": two},
    "a name that looks numbered": lambda one, two: {"a.b#2": 3 * one, "a": {"b": one}, "a.b": two},
}


@pytest.mark.parametrize("case", SAME_PATHS)
def test_two_tensors_whose_paths_are_the_same_come_back_as_torch_saves_them(case, tmp_path):
    """An empty one too, of which only the shape is known."""
    pairs = [(torch.ones(2), torch.full((2,), 2.0)), (torch.ones(0, 3), torch.ones(0, 5))]
    for k, pair in enumerate(pairs):
        state = SAME_PATHS[case](*pair)
        torch.save(state, tmp_path / "torch.bin")
        checkpoint.save(tmp_path / f"update-{k}", {"custom": state})
        same(checkpoint.load(tmp_path / f"update-{k}")["custom"], torch.load(tmp_path / "torch.bin", weights_only=True))


def test_tensors_that_a_mapping_makes_one_by_one_are_not_taken_for_tied():
    """Each is freed when the next is made, and that one may get its memory."""

    class Lazy(dict):
        def items(self):
            return ((name, torch.full((1,), value).expand(1000)) for name, value in super().items())

    made = Lazy({f"w{k}": float(k) for k in range(50)})
    tree, tensors = checkpoint.pack(made)
    assert {name: tensor[0].item() for name, tensor in checkpoint.unpack(tree, tensors).items()} == dict(made)


def test_random_states_match_the_generators():
    state = checkpoint.random_state()
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    for rank, equal in ((0, True), (1, False), (1, False)):  # rank 1 was not there
        checkpoint.set_random_state([checkpoint.unpack(*checkpoint.pack(state))], rank)
        again = [random.random(), np.random.rand(), torch.rand(1).item()]
        assert [a == b for a, b in zip(again, drawn, strict=True)] == [equal] * 3


def test_a_random_state_that_does_not_fit_raises_where_accelerate_says_nothing(accelerate, tmp_path, capfd):
    with pytest.raises(ValueError):
        checkpoint.set_random_state([checkpoint.random_state() | {"python": (3, (1, 2), None)}], 0)
    accelerator, *_ = training(accelerate, tmp_path)
    folder = tmp_path / "checkpoints" / "checkpoint_0"
    accelerator.save_state()
    (folder / "random_states_0.pkl").write_bytes(b"garbage")
    torch.manual_seed(5)
    accelerator.load_state(str(folder))
    assert torch.initial_seed() == 5  # nothing was restored
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert capfd.readouterr() == ("", "")


# ---- faults ----


KILLS = """
import os, signal, sys
from pathlib import Path
import torch
import safetensors.torch
from nanofinetune.run import checkpoint

folder = Path(sys.argv[1])
EVENTS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree"}

def state(update):
    return {"model": {"w": torch.full((1000,), float(update))}, "schedule": {"update": update}}

def save(update, kill_at):
    count = 0
    def operation(name):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def audit(event, args):
        if event in EVENTS and args and str(folder) in str(args[0]):
            operation(event)
    sys.addaudithook(audit)
    fsync, save_file = os.fsync, safetensors.torch.save_file
    def counted_fsync(descriptor):
        operation("before fsync")
        fsync(descriptor)
        operation("after fsync")
    def torn_save_file(tensors, file, metadata):
        save_file(tensors, file, metadata=metadata)
        whole = Path(file).read_bytes()
        Path(file).write_bytes(whole[: len(whole) // 2])
        operation("half of a file")
        Path(file).write_bytes(whole)
    os.fsync, safetensors.torch.save_file = counted_fsync, torn_save_file
    checkpoint.save(folder / f"update-{update}", state(update), keep=2)

for update in (1, 2):
    checkpoint.save(folder / f"update-{update}", state(update), keep=2)
for kill_at in range(1, 1000):
    update = 2 + kill_at
    before = checkpoint.newest(folder)[0].name
    child = os.fork()
    if child == 0:
        save(update, kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    newest, passed_over = checkpoint.newest(folder)
    assert newest.name in (before, f"update-{update}"), (kill_at, newest)
    assert checkpoint.load(newest)["schedule"]["update"] == int(newest.name[7:])
    assert not passed_over, passed_over  # what is half-done has no name that counts
    checkpoint.save(folder / f"update-{update}", state(update), keep=2)  # what a resumed run does next
    names = sorted(os.listdir(folder))
    assert len(names) == 2 and not [name for name in names if name.startswith(".")], names
    if status == 0:
        print(kill_at - 1)
        break
"""


def test_a_kill_at_every_file_operation_loses_nothing(tmp_path):
    """SIGKILL before each open, write, fsync, rename and remove of a save: the one before or the new one is whole."""
    done = run_program(["-c", KILLS, tmp_path / "checkpoints"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 30  # operations, each one killed at


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from nanofinetune.run import checkpoint

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
checkpoint.save(folder / "update-1", {"model": {"w": torch.zeros(1000)}}, keep=1)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
said = []
saver = checkpoint.Saver(said.append)
try:
    checkpoint.save(folder / "update-2", {"model": {"w": torch.ones(500_000)}}, keep=1)
    raise SystemExit("it was written")
except OSError as error:
    print(error.strerror)
saver.save(folder / "update-2", {"model": {"w": torch.ones(500_000)}}, keep=1)
assert not saver.wait()
assert len(said) == 1 and "update-2 was not saved" in said[0], said
assert said[0].endswith("what was saved before is still there"), said
assert sorted(path.name for path in folder.iterdir()) == ["update-1"], list(folder.iterdir())
assert checkpoint.load(folder / "update-1")["model"]["w"].sum() == 0
saver.save(folder / "update-2", {"model": {"w": torch.ones(2000)}}, keep=1)  # and when there is room again
assert saver.wait()
assert [path.name for path in folder.iterdir()] == ["update-2"]
"""


@pytest.mark.parametrize("kind", ["file size limit", "small tmpfs"])
def test_full_disk_keeps_what_was_there(kind, tmp_path):
    limit = "100000" if kind == "file size limit" else "0"
    if kind == "small tmpfs":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("mounting a small tmpfs needs root, and a machine that lets root mount")
    try:
        done = run_program(["-c", FULL, tmp_path / "checkpoints", limit], timeout=60)
    finally:
        if kind == "small tmpfs":
            subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == {"file size limit": "File too large", "small tmpfs": "No space left on device"}[kind]


def half(file):
    file.write_bytes(file.read_bytes()[:20])


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "truncated weights": ("model.safetensors", truncate, r"model\.safetensors has \d+ bytes, and its manifest says"),
    "a flipped bit": ("model.safetensors", flip, r"model\.safetensors has been changed: its hash is not the"),
    "a flipped bit in JSON": ("scheduler.json", flip, r"scheduler\.json has been changed"),
    "a missing file": ("scheduler.json", Path.unlink, r"scheduler\.json is missing"),
    "no manifest": ("manifest.json", Path.unlink, r"it has no manifest\.json: its save was interrupted"),
    "half a manifest": ("manifest.json", half, r"its manifest\.json is damaged"),
    "a list for a manifest": ("manifest.json", lambda file: file.write_text("[]"), r"its manifest\.json is damaged"),
    "another format": ("manifest.json", lambda file: file.write_text('{"format": 2}'), r"its format is 2, and this"),
    "a foreign file": ("extra.pkl", lambda file: file.write_bytes(b"x"), r"extra\.pkl does not belong to it"),
}  # fmt: skip


UNKNOWN = {  # what tells such a folder from one of ours, which would be replaced
    "no manifest": r"\w+\.\w+ in it is not ours",
    "half a manifest": r"its manifest\.json is damaged",
    "a list for a manifest": r"its manifest\.json is damaged",
    "another format": r"its format is 2",
    "a foreign file": r"extra\.pkl in it is not ours",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind, tmp_path):
    name, damage, reason = DAMAGE[kind]
    for update in (8, 9, 10):  # 10 is newer than 9, though not by its text
        checkpoint.save(tmp_path / f"update-{update}", parts(update))
    damage(tmp_path / "update-10" / name)
    found, passed_over = checkpoint.newest(tmp_path)
    assert found == tmp_path / "update-9"
    assert len(passed_over) == 1 and re.match(f"update-10: {reason}", passed_over[0])
    with pytest.raises(ValueError, match=f"update-10 is not a complete checkpoint: {reason}"):
        checkpoint.load(tmp_path / "update-10")
    content = {file.name: file.read_bytes() for file in (tmp_path / "update-10").iterdir()}
    try:
        checkpoint.save(tmp_path / "update-10", parts(10), keep=2)  # a run that resumed before it arrives there again
        assert checkpoint.newest(tmp_path) == (tmp_path / "update-10", [])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["update-10", "update-9"]
        assert kind not in UNKNOWN
    except FileExistsError as error:  # anybody may have made such a folder: it stays as it is
        assert re.search(
            f"update-10 exists and is no checkpoint of ours \\({UNKNOWN[kind]}.*\\): name another", str(error)
        )
        assert {file.name: file.read_bytes() for file in (tmp_path / "update-10").iterdir()} == content
        assert checkpoint.newest(tmp_path)[0] == tmp_path / "update-9"


@pytest.mark.parametrize("kind", ["a link to itself", "a link to nothing", "a file", "an empty folder", "a FIFO"])
def test_a_neighbour_of_a_higher_number_is_passed_over(kind, tmp_path):
    """`entry.is_dir` of os.scandir raises for a link that leads to itself; an empty folder may be deleted."""
    checkpoint.save(tmp_path / "update-9", parts(9))
    odd = tmp_path / "update-10"
    if kind.startswith("a link"):
        odd.symlink_to(odd if kind == "a link to itself" else tmp_path / "nothing")
    elif kind == "a FIFO":
        os.mkfifo(odd)
    else:
        odd.mkdir() if kind == "an empty folder" else odd.touch()
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "update-9"
    checkpoint.save(tmp_path / "update-11", parts(11), keep=2)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "update-11"
    assert os.path.lexists(odd) == (kind != "an empty folder"), "what is not ours stays"


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path):
    for update in (1, 2, 3):
        checkpoint.save(tmp_path / f"update-{update}", parts(update))
    truncate(tmp_path / "update-3" / "model.safetensors")
    checkpoint.save(tmp_path / "update-4", parts(4), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-2", "update-4"]


def test_accelerate_loads_a_flipped_bit_and_stops_at_a_partial_folder(accelerate, tmp_path, capfd):
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        accelerator, model, *_ = training(library, tmp_path / name)
        for _ in range(2):
            with torch.no_grad():
                accelerator.unwrap_model(model)[0].weight.add_(1.0)
            accelerator.save_state()
        newest = tmp_path / name / "checkpoints" / "checkpoint_1"
        before = {key: value.clone() for key, value in model.state_dict().items()}
        content = bytearray((newest / "model.safetensors").read_bytes())
        content[-2] ^= 64
        (newest / "model.safetensors").write_bytes(content)
        accelerator.load_state()
        after = model.state_dict()
        if library is Ours:
            assert torch.allclose(after["0.weight"], before["0.weight"] - 1.0)  # checkpoint_0's, and whole
        else:
            changed = [key for key in before if not torch.equal(after[key], before[key])]
            assert len(changed) == 1  # in silence
        for file in newest.iterdir():
            file.unlink()  # what a kill leaves just after the folder was made
        weight = accelerator.unwrap_model(model)[0].weight
        with torch.no_grad():
            weight.fill_(7.0)
        capfd.readouterr()
        if library is Ours:
            accelerator.load_state()
            assert torch.allclose(weight, before["0.weight"] - 1.0)
            assert "passed over: checkpoint_1: it has no manifest.json" in capfd.readouterr().err
        else:
            with pytest.raises(FileNotFoundError, match="checkpoint_1"):
                accelerator.load_state()
            assert (weight == 7.0).all()  # checkpoint_0 is whole, and is not tried


def test_accelerate_deletes_the_last_checkpoint_first(accelerate, tmp_path, monkeypatch):
    """The next save dies at its first file: there, with total_limit=1, nothing is left."""

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    import safetensors.torch

    for name, library in (("theirs", accelerate), ("ours", Ours)):
        accelerator, *_ = training(library, tmp_path / name, total_limit=1)
        accelerator.save_state()
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", die)
            patch.setattr(accelerate.accelerator, "save_accelerator_state", die)
            with pytest.raises(Killed):
                accelerator.save_state()
        left = [path for path in (tmp_path / name / "checkpoints").iterdir() if (path / "model.safetensors").exists()]
        assert [path.name for path in left] == (["checkpoint_0"] if library is Ours else [])


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def test_malicious_pickle_is_refused_where_accelerate_runs_it(accelerate, tmp_path):
    class Registered:
        def state_dict(self):
            return {"epoch": 1}

        def load_state_dict(self, state):
            pass

    for name, library in (("theirs", accelerate), ("ours", Ours)):
        victim = tmp_path / f"{name} was here"
        accelerator, *_ = training(library, tmp_path / name)
        accelerator.register_for_checkpointing(Registered())
        accelerator.save_state()
        folder = tmp_path / name / "checkpoints" / "checkpoint_0"
        if library is Ours:
            code = pickle.dumps(Malicious(victim))
            manifest = json.loads((folder / "manifest.json").read_text())
            for swapped in ("custom.json", "model.safetensors"):  # and a forged manifest, which agrees
                file = folder / swapped
                file.write_bytes(code)
                manifest["files"][swapped] = {"bytes": len(code), "sha256": folders.sha256(file)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(ValueError):
                accelerator.load_state(folder)
            assert not victim.exists()
        else:
            torch.save(Malicious(victim), folder / "custom_checkpoint_0.pkl")
            accelerator.load_state(str(folder))  # says nothing
            assert victim.exists()


# ---- the order, and what is kept ----


def test_the_order_of_a_save(tmp_path, monkeypatch):
    """Files, their syncs, the manifest, the folder, the rename, its folder; only then older ones go."""
    calls: list[str] = []

    def noting(word, function):
        def noted(*paths, **options):
            calls.append(re.sub("-[0-9a-f]{8}(?= |$)", "-*", " ".join([word, *(path.name for path in paths)])))
            return function(*paths, **options)

        return noted

    monkeypatch.setattr(folders, "_sync", noting("sync", folders._sync))
    for name in ("rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", noting("unlink", Path.unlink))
    checkpoint.save(tmp_path / "update-1", parts(1), keep=1)
    calls.clear()
    checkpoint.save(tmp_path / "update-2", parts(2), keep=1)
    assert (
        calls
        == textwrap.dedent(f"""\
        sync model.safetensors
        sync scheduler.json
        sync manifest.json.new
        replace manifest.json.new manifest.json
        sync .saving-update-2-*
        rename .saving-update-2-* update-2
        sync {tmp_path.name}
        rename update-1 .leaving-update-1-*
        unlink model.safetensors
        unlink scheduler.json
        unlink manifest.json.new
        unlink manifest.json
        rmdir .leaving-update-1-*""").splitlines()
    )


def test_keep_touches_only_its_own(tmp_path):
    """Folders of another name beside it, with a number at the end too, are nobody's old checkpoints."""
    for name in ("v1", "fold3", "update-x-1"):
        (tmp_path / name).mkdir()
    for update in (1, 2, 3):
        checkpoint.save(tmp_path / f"update-{update}", parts(update), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold3", "update-3", "update-x-1", "v1"]
    accelerator, *_ = training(Ours, tmp_path / "run", total_limit=0)
    with pytest.raises(ValueError, match=r"keep .or total_limit. is 0: it must be 1 or more"):
        accelerator.save_state()


def test_a_save_reads_the_manifests_of_what_has_changed(tmp_path, monkeypatch):
    """Of 60 that are kept: the newest ten for every save, older ones once, and one more of which a file has gone."""
    for update in range(60):
        checkpoint.save(tmp_path / f"update-{update}", {"part": {}})
    checkpoint.save(tmp_path / "update-60", parts(60), keep=61)  # the first look of this process
    read: list[str] = []
    original = folders.read_manifest

    def noted(folder):
        read.append(folder.name)
        return original(folder)

    monkeypatch.setattr(folders, "read_manifest", noted)
    checkpoint.save(tmp_path / "update-61", parts(61), keep=62)
    assert set(read) == {f"update-{update}" for update in range(52, 61)}
    read.clear()
    (tmp_path / "update-5" / "part.json").unlink()
    truncate(tmp_path / "update-60" / "model.safetensors")
    checkpoint.save(tmp_path / "update-62", parts(62), keep=61)
    names = {name for name in read if not name.startswith(".")}
    assert names == {f"update-{update}" for update in range(53, 62)} | {"update-5"}
    left = {int(path.name[7:]) for path in tmp_path.iterdir()}
    assert left == set(range(63)) - {5, 60}  # damaged ones do not count among those kept


def test_a_kept_checkpoint_costs_a_save_a_few_calls(tmp_path):
    """Each has to be looked at, since it counts to those that are kept; its files have not changed."""

    def work(kept: int) -> int:
        parent = tmp_path / str(kept)
        for update in range(kept):
            checkpoint.save(parent / f"update-{update:08}", {"schedule": {"last_epoch": update}})
        save = [parent / f"update-{kept + nth:08}" for nth in range(2)]
        checkpoint.save(save[0], parts(), keep=kept + 2)  # the first look is at every file
        return calls(lambda: checkpoint.save(save[1], parts(), keep=kept + 2))

    assert work(60) - work(30) <= 50 * 30  # it was 71 for each
