"""nanofinetune.dropin.tracking against accelerate 1.15's trackers: the same objects and classes are given to both.

tensorboard's writer is replaced by one that lists what it is told, except where tensorboard is installed.

    python -m pytest tests/dropin/test_tracking.py
"""

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import run_ranks
from side_by_side import ours, reset, theirs

from nanofinetune import GeneralTracker
from nanofinetune.dropin import tracking
from nanofinetune.dropin.available import is_available
from nanofinetune.settings import LoggerType


def tracker_class(library, everywhere=False):
    """A tracker as a script writes it, with the library's base class and decorator."""

    class Listing(library.GeneralTracker):  # type: ignore[name-defined]
        name = "listing"
        requires_logging_directory = False
        main_process_only = not everywhere

        def __init__(self, *arguments, **settings):
            super().__init__()
            self.heard: list[Any] = [("made", arguments, settings)]

        @property
        def tracker(self):
            return self.heard

        @library.on_main_process
        def store_init_configuration(self, values):
            self.heard.append(("config", values))

        @library.on_main_process
        def log(self, values, step=None, **kwargs):
            self.heard.append((step, values, kwargs))

        @library.on_main_process
        def finish(self):
            self.heard.append("finished")

    return Listing


def libraries():
    return (
        (ours, tracking),
        (theirs, pytest.importorskip("accelerate.tracking", reason="the reference, extra `test`")),
    )


def script(accelerator, end=True):
    accelerator.init_trackers("a run", config={"lr": 0.1}, init_kwargs={"listing": {"colour": "red"}})
    accelerator.log({"loss": 0.5, "note": "text"}, step=1)
    accelerator.log({"loss": 0.25}, log_kwargs={"listing": {"tags": ["a"]}, "other": {}})
    heard = accelerator.get_tracker("listing", unwrap=True)
    if end:
        accelerator.end_training()
    return heard


def test_trackers_hear_what_accelerates_hear():
    """An object that the script made, alone and in a list."""
    heard = []
    for make, library in libraries():
        for wrap in (lambda tracker: tracker, lambda tracker: [tracker]):
            accelerator = make(log_with=wrap(tracker_class(library)()))
            heard.append(script(accelerator))
            assert accelerator.trackers == [] or make is theirs
    assert all(each == heard[0] for each in heard)
    assert heard[0] == [
        ("made", (), {}), ("config", {"lr": 0.1}), (1, {"loss": 0.5, "note": "text"}, {}),
        (None, {"loss": 0.25}, {"tags": ["a"]}), "finished",
    ]  # fmt: skip


@pytest.mark.parametrize("folder", [False, True])
def test_a_registered_class_is_made_as_in_accelerate(folder, request, tmp_path):
    heard = []
    for make, library in libraries():
        table = library.CLASSES if library is tracking else library.LOGGER_TYPE_TO_CLASS
        request.addfinalizer(partial(table.pop, "listing"))
        kind = tracker_class(library)
        kind.requires_logging_directory = folder
        library.register_tracker_class(kind)
        if folder:
            with pytest.raises(ValueError, match=r"needs a folder|requires a `logging_dir`"):
                make(log_with="listing")
        heard.append(script(make(log_with=["listing", "listing"], project_dir=str(tmp_path))))
    assert heard[0] == heard[1]
    assert heard[0][0] == ("made", ("a run", str(tmp_path)) if folder else ("a run",), {"colour": "red"})


@pytest.mark.parametrize("wrong", [3, object, type("NoName", (GeneralTracker,), {"name": ""})], ids=str)
def test_a_class_that_cannot_be_registered_raises_in_both(wrong):
    for _, library in libraries():
        with pytest.raises(ValueError):
            library.register_tracker_class(wrong)


@pytest.mark.parametrize("asked", ["wandb", LoggerType.MLFLOW, ["listing"], 3], ids=str)
def test_unknown_trackers_are_refused_by_name(asked):
    name = str(asked[0] if isinstance(asked, list) else asked)
    with pytest.raises(
        NotImplementedError, match=f"log_with='{name}' is not supported here: choose tensorboard, or pass"
    ):
        ours(log_with=asked)


def test_a_tracker_that_nobody_has_raises_in_both():
    for make, library in libraries():
        accelerator = make(log_with=tracker_class(library)())
        assert vars(accelerator.get_tracker("listing")) == {}  # before init_trackers: one that does nothing
        accelerator.init_trackers("a run")
        with pytest.raises(ValueError, match="other is not an available tracker"):
            accelerator.get_tracker("other")


def on_two_ranks():
    heard = []
    accelerator = ours()
    reset()
    for make, library in libraries():
        for everywhere in (False, True):
            script(make(log_with=(tracker := tracker_class(library, everywhere)())), end=False)
            heard.append(tracker.heard)
    accelerator.end_training()
    return heard


def test_trackers_on_two_ranks_hear_what_accelerates_hear():
    """Rank 0 is the one that logs, whatever `main_process_only` says of the tracker's own methods."""
    pytest.importorskip("accelerate", reason="the reference, extra `test`")
    for rank, heard in enumerate(run_ranks(on_two_ranks, 2)):
        assert heard[:2] == heard[2:]
        assert [len(each) for each in heard[:2]] == ([4, 4] if rank == 0 else [1, 1])


class Writer:
    """Lists the calls, without their order of flushes."""

    def __init__(self, *arguments, **settings):
        CALLS.append(("made", arguments, settings))

    def __getattr__(self, name):
        return lambda *arguments, **settings: CALLS.append((name, arguments, settings))


CALLS: list = []


@pytest.fixture
def writer(monkeypatch):
    """A tensorboard for both libraries."""
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    reference = pytest.importorskip("accelerate.tracking", reason="the reference, extra `test`")
    monkeypatch.setattr(reference, "_available_trackers", [reference.LoggerType.TENSORBOARD])


def test_tensorboard_is_told_what_accelerates_tells_it(writer, tmp_path):
    told = []
    for make in (ours, theirs):
        CALLS.clear()
        accelerator = make(log_with="tensorboard", project_dir=tmp_path / make.__name__)
        settings = {"tensorboard": {"flush_secs": 60}}
        accelerator.init_trackers("a run", config={"lr": 0.1, "name": "x"}, init_kwargs=settings)
        accelerator.log({"loss": 0.5, "step": 3, "note": "text", "both": {"a": 1.0, "b": 2.0}}, step=7)
        accelerator.log({"tensor": torch.tensor(0.25), "half": torch.tensor(0.5, dtype=torch.bfloat16)})
        accelerator.log({"ignored": [1, 2]}, log_kwargs={"tensorboard": {"walltime": 5.0}})
        accelerator.get_tracker("tensorboard").log_images({"picture": "pixels"}, step=1)
        accelerator.end_training()
        told.append([call for call in CALLS if call[0] != "flush"])
    mine, reference = (
        [str(call).replace(make.__name__, "who") for call in each]
        for make, each in zip((ours, theirs), told, strict=True)
    )
    assert mine == reference and len(mine) == 10
    # it writes the settings into a file of its own as well
    assert not (tmp_path / "ours").exists() and list((tmp_path / "theirs").rglob("hparams.yml"))


def test_all_is_tensorboard_where_it_is_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    mine = tracker_class(tracking)()
    assert ours(log_with=["all", mine]).log_with == [mine] and capsys.readouterr().err == ""
    assert ours(log_with=LoggerType.ALL).log_with == []
    assert capsys.readouterr().err == "log_with='all': tensorboard is not installed, so nothing is tracked\n"
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: "found")
    assert ours(log_with="all", project_dir=tmp_path).log_with == ["tensorboard"]
    with pytest.raises(ValueError, match="log_with='tensorboard' needs a folder: pass project_dir"):
        ours(log_with="all")


@pytest.mark.skipif(is_available("tensorboard"), reason="tensorboard is installed")
def test_a_missing_tensorboard_is_said_where_accelerate_tracks_nothing(tmp_path):
    with pytest.warns(UserWarning, match="no supported trackers are currently installed"):
        pytest.importorskip("accelerate").Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator = ours(log_with="tensorboard", project_dir=str(tmp_path))
    with pytest.raises(ImportError, match="needs the package tensorboard: pip install tensorboard"):
        accelerator.init_trackers("a run")


@pytest.mark.skipif(not is_available("tensorboard"), reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboards_files_hold_what_was_logged(tmp_path):
    accelerator = ours(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("a run", config={"lr": 0.1})
    for step in range(3):
        accelerator.log({"loss": 1 / (1 + step)}, step=step)
    accelerator.end_training()
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(tmp_path / "a run")).Reload().Scalars("loss")
    assert [(event.step, round(event.value, 4)) for event in found] == [(0, 1.0), (1, 0.5), (2, 0.3333)]
