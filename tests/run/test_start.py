"""Where a run begins: what lies about in its folders never stops it, and is never taken for its own.

    python -m pytest tests/run/test_start.py

No training here: the checkpoints hold a log's state alone. tests/run/test_resume.py trains.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script

from nanofinetune.ground.errors import UsageError
from nanofinetune.run import checkpoint
from nanofinetune.run.resume import IDENTITY, LATER, MAY_CHANGE, find_start, is_ours, take

ARGUMENTS = dict.fromkeys(IDENTITY)


def arguments(output, resume="auto"):
    return SimpleNamespace(**ARGUMENTS, batch_size=8, accumulate=1, output=str(output), resume=resume)


def state(update):
    """What a Log saves after that update, of a run with 80 rows."""
    run = {**ARGUMENTS, "batch_size": 8, "accumulate": 1, "world": 1, "fits": 8, "found": {"the model": "bert"}}
    place = {"epoch": 0, "rows": 8 * update, "losses": (1.5, 8 * update), "evaluations": []}
    log = {"run": run, "update": update, "examples": 8 * update, "seconds": 1.0, "first_step_seconds": 0.5, **place}
    return log


def save(output, number, **changes):
    folder = output / "checkpoints" / f"update-{number:08d}"
    checkpoint.save(folder, {"custom": state(number) | changes})
    return folder


PARTS_OF_OTHERS = {
    "an older schedule": ("scheduler", {"last_epoch": 3}, "its schedule is at update 3, and the run at 9"),
    "a later schedule": ("scheduler", {"last_epoch": 10}, "its schedule is at update 10, and the run at 9"),
    "another learning rate": (
        "scheduler",
        {"base_lrs": [1.0]},
        "its schedule has the learning rate 1.0, and the run 0.1",
    ),
    "another seed": ("loader", {"data_seed": 7}, "its loader has the seed 7, and the run 42"),
}


@pytest.mark.parametrize("part, changes, reason", PARTS_OF_OTHERS.values(), ids=PARTS_OF_OTHERS)
def test_a_part_of_another_checkpoint_is_passed_over_and_refused_by_name(part, changes, reason, tmp_path):
    """Its hashes fit: checkpoint.save makes them."""

    def save_parts(update, **parts):
        whole = state(update)
        whole["run"] |= {"lr": 0.1, "seed": 42}
        schedule, loader = {"last_epoch": update, "base_lrs": [0.1, 0.1]}, {"data_seed": 42, "epoch": 0, "rows": 0}
        own = {"custom": whole, "scheduler": schedule, "loader": loader}
        folder = tmp_path / "checkpoints" / f"update-{update:08d}"
        checkpoint.save(folder, {name: own[name] | parts.get(name, {}) for name in own})
        return folder

    asks = arguments(tmp_path)
    asks.lr, asks.seed = 0.1, 42
    older, newest = save_parts(5), save_parts(9, **{part: changes})
    start = find_start(asks)
    assert start.folder == older
    assert start.note.startswith(f"passed over {newest.name}: it cannot be: {reason}; resumed after update 5")
    asks.resume = str(newest)
    asks.output = str(tmp_path / "other")
    with pytest.raises(UsageError, match=f"it cannot be: {reason}; name another checkpoint"):
        find_start(asks)


def test_auto_takes_only_update_n(tmp_path):
    """A copy under another name, a folder of somebody's, other spellings of a number: none is the newest."""
    newest = save(tmp_path, 9)
    folders = newest.parent
    for name in ("backup-00000090", "update-00000090-copy-91", "old-update-92", "checkpoint_93", "94", "update-٩٥"):
        shutil.copytree(newest, folders / name)
    (folders / "update-96").write_text("a file")
    (folders / "update-97x").mkdir()
    start = find_start(arguments(tmp_path))
    assert start.folder == newest
    assert start.note == f"resumed after update 9, from {newest}"


def test_a_renamed_checkpoint_is_passed_over(tmp_path):
    newest = save(tmp_path, 9)
    shutil.copytree(newest, newest.parent / "update-00000090")
    start = find_start(arguments(tmp_path))
    assert start.folder == newest
    assert start.note.startswith(
        "passed over update-00000090: it has been renamed: it was saved after update 9; resumed"
    )


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def huge(path):
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk; reading it would take hours


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


DEEP = b'{"format": 1, "files": ' + b"[" * 200_000
MANY_DIGITS = b'{"format": ' + b"9" * 10_000 + b', "files": {}}'
DAMAGED = "its manifest.json is damaged"
SIDE_FILES = {
    "a manifest of deep brackets": ("manifest.json", lambda path: path.write_bytes(DEEP), DAMAGED),
    "a manifest of many digits": ("manifest.json", lambda path: path.write_bytes(MANY_DIGITS), DAMAGED),
    "a binary manifest": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), DAMAGED),
    "an empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), DAMAGED),
    "a FIFO for a manifest": ("manifest.json", fifo, DAMAGED),
    "a device for a manifest": ("manifest.json", device, DAMAGED),
    "a folder for a manifest": ("manifest.json", folder, DAMAGED),
    "a huge manifest": ("manifest.json", huge, DAMAGED),
    "a FIFO for a part": ("custom.json", fifo, "custom.json is not a plain file"),
    "a device for a part": ("custom.json", device, "custom.json is not a plain file"),
    "a folder for a part": ("custom.json", folder, "custom.json is not a plain file"),
    "a huge part": ("custom.json", huge, "custom.json has 1099511627776 bytes, and its manifest says"),
    "a FIFO beside it": ("pipe", fifo, "pipe does not belong to it"),
    "a huge file beside it": ("core", huge, "core does not belong to it"),
    "a name that no terminal shows": ("a\n\x1b[31m\udcff", Path.touch, r"a\n\x1b[31m\udcff does not belong to it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIDE_FILES)
def test_side_files_are_passed_over_with_the_reason(kind, tmp_path):
    name, make, reason = SIDE_FILES[kind]
    older, newest = save(tmp_path, 8), save(tmp_path, 9)
    make(newest / name)
    start = find_start(arguments(tmp_path))
    assert start.folder == older
    assert start.note.startswith(f"passed over update-00000009: {reason}")
    start.note.encode()  # and can be printed


def test_other_scripts_checkpoints_are_passed_over(tmp_path):
    older = save(tmp_path, 8)
    for update, parts in ((9, {"model": {}}), (10, {"custom": [1]}), (11, {"custom": {"update": 11}})):
        checkpoint.save(tmp_path / "checkpoints" / f"update-{update}", parts)
    start = find_start(arguments(tmp_path))
    assert start.folder == older
    assert start.note.count("train.py did not make it") == 3


# ---- whose --output is ----


def start_of(job, attempt, monkeypatch):
    """What torchrun tells a rank. Its folder is another for each job, and each of the job's starts has one in it."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(job / f"attempt_{attempt}" / "0" / "error.json"))


def test_a_restart_goes_on_only_where_its_own_job_has_begun(tmp_path, monkeypatch):
    """Its first start refused what is there, or ended before it looked: the next one refuses it as well."""
    job, later_job, old, new = (tmp_path / name for name in ("none_a", "none_b", "old", "new"))
    job.mkdir()
    later_job.mkdir()
    save(old, 9)
    for attempt in (0, 1, 2):
        start_of(job, attempt, monkeypatch)
        assert not is_ours(str(old))
        with pytest.raises(UsageError, match="it already holds checkpoints of an earlier run; name another folder, or"):
            find_start(arguments(old, None), is_ours(str(old)))
    start_of(job, 0, monkeypatch)
    take(new, find_start(arguments(new, None)))
    saved = save(new, 5)
    start_of(job, 1, monkeypatch)
    (tmp_path / "link").symlink_to(new)
    assert is_ours(str(new)) and is_ours(str(tmp_path / "link")) and not is_ours(str(old))
    assert find_start(arguments(new, None), is_ours(str(new))).folder == saved
    start_of(later_job, 1, monkeypatch)  # the same run id, and as a rule the same port
    assert not is_ours(str(new))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")  # torchrun --log-dir /dev/null
    assert not is_ours(str(new))
    take(new, find_start(arguments(new)))


def lines(*updates):
    return "".join(f'{{"step": {update}, "epoch": 1, "lr": 0.1, "loss": 0.5, "rows": 8}}\n' for update in updates)


def write_checkpoint(output):
    save(output, 30)


CHANGES = {
    "losses": lambda output: (output / "metrics.jsonl").write_text(lines(1, 2, 3)),
    "a checkpoint": write_checkpoint,
    "a result": lambda output: (output / "result.json").write_text("{}"),
    "a model": lambda output: (output / "model").mkdir(),
}


@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize("kind", CHANGES)
def test_what_another_run_writes_after_the_look_is_refused(kind, resumed, tmp_path):
    """Between the look and the first update the data are read, which may take minutes."""
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    if resumed:
        save(tmp_path, 9)
        (tmp_path / "metrics.jsonl").write_text(lines(1, 2))
    start = find_start(arguments(tmp_path, "auto" if resumed else None))
    (tmp_path / "a note of mine").write_text("this is nobody's output")
    if not resumed:
        (tmp_path / "metrics.jsonl").touch()  # as the lock does
    take(tmp_path, start)
    CHANGES[kind](tmp_path)
    with pytest.raises(UsageError, match=r"another run has written there since this one looked; start again, or name"):
        take(tmp_path, start)


def test_a_named_checkpoint_goes_on_only_where_its_own_run_is(tmp_path):
    """Else one file would hold two runs' losses, and --keep delete the other one's checkpoints."""
    named = save(tmp_path / "b", 100)
    save(tmp_path / "a", 50, run=state(50)["run"] | {"found": {"the hash of the training rows": "1", "the model": "m"}})
    line = r"a holds update-00000050 of another run; name another --output, or say auto to go on with that run$"
    with pytest.raises(UsageError, match=line):
        find_start(arguments(tmp_path / "a", str(named)))
    save(tmp_path / "same", 50)  # a copy of the run's folder, without its newest checkpoint
    assert find_start(arguments(tmp_path / "same", str(named))).folder == named
    more = state(50)["run"] | {"found": {"the model": "bert", "hidden_act of the model's config": "gelu"}}
    save(tmp_path / "newer", 50, run=more)  # by a version that looks at more
    assert find_start(arguments(tmp_path / "newer", str(named))).folder == named
    assert find_start(arguments(tmp_path / "b", str(named))).folder == named
    for name, updates in (("logged", (1, 2)), ("branch", (101, 102)), ("empty", ())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(lines(*updates))
        if name == "logged":
            with pytest.raises(UsageError, match="logged holds the losses from update 1 on of another run; name"):
                find_start(arguments(tmp_path / name, str(named)))
        else:  # this start's own, which ended before it saved
            assert find_start(arguments(tmp_path / name, str(named))).folder == named


# ---- --output ----


def test_a_link_to_nothing_is_one_line(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "link/run", "loop", "loop/run"):
        with pytest.raises(UsageError, match=rf"--output \S+{name}: \S+(link|loop) is a link to nothing; name another"):
            find_start(arguments(tmp_path / name, None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "loop"]


def to_nothing(path):
    path.symlink_to("nowhere")


UNREADABLE = r"cannot be read and written \(N"  # Not a directory, No such file
CHILDREN = {
    "a link to nothing for checkpoints": ("checkpoints", to_nothing, f"its checkpoints {UNREADABLE}"),
    "a file for checkpoints": ("checkpoints", Path.touch, f"its checkpoints {UNREADABLE}"),
    "a link to nothing for metrics": ("metrics.jsonl", to_nothing, f"its metrics.jsonl {UNREADABLE}"),
    "a FIFO for metrics": ("metrics.jsonl", fifo, "its metrics.jsonl is not a plain file"),
    "a device for metrics": ("metrics.jsonl", device, "its metrics.jsonl is not a plain file"),
    "a folder for metrics": ("metrics.jsonl", Path.mkdir, "its metrics.jsonl is not a plain file"),
    "a model of somebody's": ("model", Path.mkdir, "it holds a model, and no run that made it"),
    "a link to nothing for the result": ("result.json", to_nothing, "this run is complete"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHILDREN)
def test_what_cannot_be_written_is_one_line(kind, tmp_path):
    name, make, reason = CHILDREN[kind]
    make(tmp_path / name)
    with pytest.raises(UsageError, match=rf"--output \S+: {reason}"):
        find_start(arguments(tmp_path))
    with pytest.raises(UsageError, match=rf"--output \S+: it already holds {name} of an earlier run"):
        find_start(arguments(tmp_path, None))


WITHOUT_PERMISSION = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_start import arguments, find_start
from nanofinetune.ground.errors import UsageError
if os.geteuid() == 0:
    os.seteuid(65534)  # root may read everything
try:
    find_start(arguments(sys.argv[1]))
except UsageError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX'")
@pytest.mark.parametrize("mode", [0o000, 0o500], ids=["no permission", "no permission to write"])
def test_checkpoints_without_permission_are_one_line(mode):
    with tempfile.TemporaryDirectory() as name:  # not below pytest's own folder, which root alone may enter
        save(Path(name), 9)
        Path(name).chmod(0o777)
        Path(name, "checkpoints").chmod(mode)
        here = Path(__file__).parent
        command = [sys.executable, "-c", WITHOUT_PERMISSION, name, str(here), str(here.parent), str(here.parent.parent)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        finally:
            Path(name, "checkpoints").chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"--output {name}: its checkpoints cannot be read and written (Permission denied); name another folder\n"
    )


def test_a_home_of_nobody_is_one_line(tmp_path):
    for arguments_of in (arguments("~nobody-of-that-name/run", None), arguments(tmp_path, "~nobody-of-that-name/run")):
        with pytest.raises(UsageError, match=r"--(output|resume) ~nobody-of-that-name/run: this user has no home"):
            find_start(arguments_of)


@pytest.mark.parametrize(
    "saved, asked, same",
    [("linear", "linear", True), ("cosine", "linear", False), (None, "linear", True), (None, "cosine", False)],
)
def test_a_run_goes_on_with_its_schedule(saved, asked, same, tmp_path):
    """None: a checkpoint that was saved when there was no other schedule than linear."""
    run = state(9)["run"] | {"schedule": saved}
    if saved is None:
        del run["schedule"]
    folder = save(tmp_path, 9, run=run)
    asks = arguments(tmp_path)
    asks.schedule = asked
    if same:
        assert find_start(asks).folder == folder
        return
    with pytest.raises(
        UsageError, match=f"--schedule {asked}: the run to resume began with {saved or 'linear'}; use the same"
    ):
        find_start(asks)


train = load_script(ROOT / "train.py")


def parsed(*argv):
    return train.parse_arguments([*map(str, argv)])


def test_each_option_of_train_either_may_change_or_is_part_of_what_a_run_is():
    """A new option must be put into one of the two lists."""
    assert sorted(vars(parsed())) == sorted((*IDENTITY, *MAY_CHANGE))
    old = {name: value for name, value in vars(parsed()).items() if name in LATER}
    assert old == LATER, "what older runs did is the default"


OTHER_VALUES = {
    "model": "roberta-base", "data": "glue/cola", "max_length": 64, "text_columns": ["title", "body"],
    "label_column": "stars", "task": "multi", "drop_unlabelled": True, "separator": ";", "encoding": "cp1252",
    "epochs": 4, "max_steps": 9, "group_by_length": True, "lr": 0.1, "weight_decay": 0.01, "warmup_steps": 5,
    "schedule": "cosine", "clip_norm": 1.0, "precision": "bf16", "fast_dropout": True, "seed": 7, "uneven": "wrap",
    "class_weights": "balanced", "keep_best": "f1", "patience": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITY)
def test_an_argument_that_makes_another_run_is_refused_by_name(name, tmp_path):
    """Given now and not before, and the other way round."""
    flag = "--" + name.replace("_", "-")
    asks = parsed("--output", tmp_path, "--resume", "auto")
    before = {key: value for key, value in vars(asks).items() if key in IDENTITY}
    saved = save(tmp_path, 9, run=state(9)["run"] | before)
    assert find_start(asks).folder == saved
    setattr(asks, name, OTHER_VALUES[name])
    with pytest.raises(UsageError, match=rf"^{flag}\b.*: the run to resume began with .+; use the same$"):
        find_start(asks)
    shutil.rmtree(saved)
    save(tmp_path, 9, run=state(9)["run"] | before | {name: OTHER_VALUES[name]})
    setattr(asks, name, before[name])
    with pytest.raises(UsageError, match=rf"^(no )?{flag}\b.*: the run to resume began with .+; use the same$"):
        find_start(asks)


@pytest.mark.parametrize("name", LATER)
def test_a_checkpoint_from_before_an_option_existed_goes_on_only_without_it(name, tmp_path):
    asks = parsed("--output", tmp_path, "--resume", "auto")
    run = state(9)["run"] | {key: value for key, value in vars(asks).items() if key in IDENTITY}
    del run[name]
    saved = save(tmp_path, 9, run=run)
    assert find_start(asks).folder == saved
    setattr(asks, name, OTHER_VALUES[name])
    with pytest.raises(UsageError, match=": the run to resume began with "):
        find_start(asks)


def test_what_was_typed_is_said_as_it_is_typed(tmp_path):
    asks = parsed("--output", tmp_path, "--resume", "auto", "--text-columns", "a", "b")
    before = {key: value for key, value in vars(asks).items() if key in IDENTITY}
    lines = []
    for changes in ({"text_columns": ["a"]}, {"drop_unlabelled": True}, {"encoding": "cp1252"}):
        save(tmp_path, 9, run=state(9)["run"] | before | changes)
        with pytest.raises(UsageError) as refusal:
            find_start(asks)
        lines.append(str(refusal.value))
        shutil.rmtree(tmp_path / "checkpoints")
    assert lines == [
        "--text-columns a b: the run to resume began with a; use the same",
        "no --drop-unlabelled: the run to resume began with --drop-unlabelled; use the same",
        "no --encoding: the run to resume began with --encoding cp1252; use the same",
    ]
