"""save_state and load_state beside accelerate 1.15's, in one process and on ranks.

OMP_NUM_THREADS=1 python -m pytest tests/run/test_state.py
"""

import hashlib
import inspect
import json
import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from both_libraries import Ours, training
from helpers import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from nanofinetune.accelerator import Accelerator
from nanofinetune.run import checkpoint, watch
from nanofinetune.settings import ProjectConfiguration
from nanofinetune.step.optim import AdamW
from nanofinetune.step.schedule import get_scheduler


@pytest.fixture
def accelerate():
    """The library, without the state that all its instances share."""
    module = pytest.importorskip("accelerate", reason="accelerate (the extra `test`) is not installed")
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()
    yield module
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()


def test_state_methods_match_accelerate_signatures(accelerate):
    for name in ("save_state", "load_state", "save_model", "register_for_checkpointing"):
        theirs = [
            p.name
            for p in inspect.signature(getattr(accelerate.Accelerator, name)).parameters.values()
            if p.kind != p.VAR_KEYWORD
        ]
        ours = ["self", *inspect.signature(getattr(Accelerator(cpu=True), name)).parameters]
        assert [p for p in theirs if p not in ours] == []
    fields = accelerate.utils.ProjectConfiguration.__dataclass_fields__
    assert {name: field.default for name, field in fields.items()} == vars(ProjectConfiguration())


def five_and_five(folder, interrupted):
    """10 updates with dropout and a shuffled loader, in one go or with a new Accelerator after 5 -> the weights."""
    weights = None
    for first, last in ((0, 5), (5, 10)) if interrupted else ((0, 10),):
        torch.manual_seed(first + 3)  # a new process has other random numbers; the first one's count
        accelerator = Accelerator(cpu=True, project_dir=folder)
        model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = AdamW(model.parameters(), lr=0.05)
        scheduler = get_scheduler("linear", optimizer, 2, 40)
        generator = torch.Generator().manual_seed(11)
        rows: Any = torch.randn(12, 2, generator=generator)
        data: Any = DataLoader(rows, batch_size=2, shuffle=True, generator=generator)
        model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
        batches, done = iter(()), first
        if first:
            accelerator.load_state(os.path.join(folder, "five"))
            state = checkpoint.read_part(Path(folder, "five"), "loader")
            batches = iter(accelerator.skip_first_batches(data, state["rows"] // data.total_batch_size))
        while done < last:
            batch = next(batches, None)
            if batch is None:
                batches = iter(data)
                continue
            accelerator.backward(model(batch).pow(2).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            if done == 5 and interrupted:
                accelerator.save_state(os.path.join(folder, "five"))
        weights = [p.detach().clone() for p in accelerator.unwrap_model(model).parameters()]
        batches = iter(())
        accelerator.end_training()
    return weights


@pytest.mark.parametrize("world", [1, 2])
def test_loaded_state_continues_bit_for_bit(world, tmp_path):
    """Through the facade: model, AdamW, schedule, the loader's epoch, each rank's random numbers."""
    whole = run_ranks(five_and_five, world, str(tmp_path), False)
    parts_of = run_ranks(five_and_five, world, str(tmp_path), True)
    for rank in range(world):
        assert all(torch.equal(a, b) for a, b in zip(whole[rank], parts_of[rank], strict=True))


def test_accelerate_resumes_in_another_order(accelerate, tmp_path):
    """Saved in epoch 2 and loaded into a new Accelerator: there, an ordinary data set begins with epoch 0's order."""
    orders = {}
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        seen = {}
        for new in (False, True):
            if library is not Ours:
                accelerate.state.AcceleratorState._reset_state(True)
                settings = {
                    "dataloader_config": accelerate.utils.DataLoaderConfiguration(
                        use_seedable_sampler=True, data_seed=1
                    )
                }
            else:
                settings = {}
            accelerator = library.Accelerator(cpu=True, **settings)
            generator = torch.Generator().manual_seed(1)
            twelve: Any = torch.arange(12)
            loader = accelerator.prepare(DataLoader(twelve, batch_size=4, shuffle=True, generator=generator))
            if new:
                accelerator.load_state(str(tmp_path / name))
                seen["resumed"] = torch.cat(list(loader)).tolist()
                continue
            for epoch in range(3):
                if epoch == 2:
                    accelerator.save_state(str(tmp_path / name))
                seen[f"epoch {epoch}"] = torch.cat(list(loader)).tolist()
        orders[name] = seen
    assert orders["ours"]["resumed"] == orders["ours"]["epoch 2"]
    assert orders["ours"]["resumed"] != orders["ours"]["epoch 0"]
    assert orders["theirs"]["resumed"] == orders["theirs"]["epoch 0"]
    assert orders["theirs"]["resumed"] != orders["theirs"]["epoch 2"]


def test_a_broken_off_epoch_goes_on_where_accelerate_reads_rows_twice(accelerate, tmp_path):
    """Saved after 3 of 10 shuffled batches, and loaded with other random numbers: the rest of the rows, each once."""
    twenty: Any = torch.arange(20)
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        rows: list[int] = []
        for new in (False, True):
            if library is not Ours:
                accelerate.state.AcceleratorState._reset_state(True)
            torch.manual_seed(1 + new)
            accelerator = library.Accelerator(cpu=True)
            loader = accelerator.prepare(DataLoader(twenty, batch_size=2, shuffle=True))
            if new:
                accelerator.load_state(str(tmp_path / name))
                loader = accelerator.skip_first_batches(loader, 3)
            for step, batch in enumerate(loader):
                rows += batch.tolist()
                if step == 2 and not new:
                    accelerator.save_state(str(tmp_path / name))
                    break
        assert len(rows) == 20
        assert (sorted(rows) == list(range(20))) == (library is Ours)


def test_numbers_go_on_after_load_where_accelerate_begins_again(accelerate, tmp_path):
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        accelerator, *_ = training(library, tmp_path / name)
        for _ in range(2):
            accelerator.save_state()
        if library is not Ours:
            accelerate.state.AcceleratorState._reset_state(True)
        accelerator, *_ = training(library, tmp_path / name)
        accelerator.load_state()
        if library is Ours:
            assert accelerator.save_state().endswith("checkpoint_2")
        else:
            with pytest.raises(ValueError, match="already exists"):
                accelerator.save_state()


def window(accelerator, folder, load):
    """12 rows in windows of 4, with a stop after 6 -> the ends of windows after it, and the weights."""
    torch.manual_seed(0)
    model: Any = nn.Linear(2, 1)
    rows: Any = torch.arange(24.0).view(12, 2) / 10
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(rows, batch_size=1)
    )
    ends = []

    def train(batches):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            ends.append(accelerator.sync_gradients)
            yield

    if load != "in a new Accelerator":
        steps = train(loader)
        [next(steps) for _ in range(6)]
        accelerator.save_state(str(folder))
        steps.close()
    if load == "after going on":
        with accelerator.accumulate(model):
            pass
    optimizer.optimizer.zero_grad()  # gradients are in no checkpoint
    accelerator.load_state(str(folder))
    del ends[:]
    assert accelerator.step == 6
    list(train(accelerator.skip_first_batches(loader, 6)))
    return ends, [parameter.tolist() for parameter in model.parameters()]


def test_windows_go_on_where_they_were_saved_as_in_accelerate(accelerate, tmp_path):
    """In the process that saved, and in a new one: the next window ends after two more."""
    for load in ("at once", "after going on", "in a new Accelerator"):
        results = []
        for name, library in (("theirs", accelerate), ("ours", Ours)):
            if library is not Ours:
                accelerate.state.AcceleratorState._reset_state(True)
                accelerate.state.GradientState._reset_state()
            accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=4)
            results.append(window(accelerator, tmp_path / name, load))
        assert results[0] == results[1], load
        assert results[0][0] == [False, True, False, False, False, True]


def test_a_checkpoint_of_an_earlier_version_has_no_step_and_loads(tmp_path):
    accelerator, *_ = training(Ours, tmp_path)
    parts = checkpoint.load(Path(accelerator.save_state()))
    for state in parts["random_states"]:
        assert state.pop("step") == 0
    checkpoint.save(tmp_path / "earlier", parts)
    accelerator.step = 3
    accelerator.load_state(tmp_path / "earlier")
    assert accelerator.step == 3


def test_save_state_says_what_is_wrong(tmp_path):
    accelerator, model, *_ = training(Ours, tmp_path)
    accelerator.project_configuration.automatic_checkpoint_naming = False
    with pytest.raises(ValueError, match="name an output_dir, or choose automatic_checkpoint_naming"):
        accelerator.save_state()
    with pytest.raises(NotImplementedError, match="safe_serialization=False"):
        accelerator.save_state(tmp_path / "a", safe_serialization=False)
    with pytest.raises(ValueError, match="object lacks one of state_dict and load_state_dict"):
        accelerator.register_for_checkpointing(object())
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        accelerator.load_state()
    accelerator.save_state(tmp_path / "a")
    accelerator.prepare(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a holds no model_1: it holds model, optimizer, loader, random_states"):
        accelerator.load_state(tmp_path / "a")
    accelerator.save_model(model, tmp_path / "weights")
    from safetensors.torch import load_file

    assert sorted(load_file(tmp_path / "weights" / "model.safetensors")) == sorted(model.state_dict())


def test_what_a_folder_says_is_escaped_before_it_is_shown(tmp_path, capsys):
    """A terminal obeys what it is sent, and a manifest or a state may come from anybody."""
    accelerator, *_ = training(Ours, tmp_path)
    for _ in range(2):
        folder = Path(accelerator.save_state())
    manifest = json.loads((folder / "manifest.json").read_text())
    state = json.loads((folder / "loader.json").read_text())
    (folder / "loader.json").write_text(json.dumps(state | {"rows": "\x1b[2J"}))
    content = (folder / "loader.json").read_bytes()
    manifest["files"]["loader.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"rows is \\x1b\[2J$"):
        accelerator.load_state(folder)
    manifest["files"]["\x1b[2J"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r": \\x1b\[2J is missing$"):
        accelerator.load_state(folder)
    accelerator.load_state()
    assert capsys.readouterr().err == "passed over: checkpoint_1: \\x1b[2J is missing\n"


def test_background_save_holds_the_state_of_its_moment(tmp_path, monkeypatch):
    """The write is held up until training has gone on."""
    go_on = threading.Event()
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: go_on.wait(30) and write(*args))
    accelerator, model, *_ = training(Ours, tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder = accelerator.save_state(background=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not os.path.exists(folder)
    go_on.set()
    accelerator.end_training()  # waits
    saved = checkpoint.load(Path(folder))["model"]
    assert all(torch.equal(saved[key], before[key]) for key in before)


def test_a_part_is_loaded_as_accelerate_loads_it(accelerate, tmp_path):
    """The model alone, for an evaluation. With an object too many both raise; here its name is said."""
    for name, library in (("theirs", accelerate), ("ours", Ours)):
        accelerator, model, *_ = training(library, tmp_path / name)
        accelerator.save_state()
        folder = str(tmp_path / name / "checkpoints" / "checkpoint_0")
        if library is not Ours:
            accelerate.state.AcceleratorState._reset_state(True)
        alone = library.Accelerator(cpu=True)
        other = alone.prepare(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
        assert not torch.equal(other[0].weight, model[0].weight)
        alone.load_state(folder)
        assert torch.equal(other[0].weight, model[0].weight)
        second = alone.prepare(nn.Linear(2, 1))
        before = second.weight.detach().clone()
        with pytest.raises((ValueError, FileNotFoundError), match="holds no model_1" if library is Ours else "model_1"):
            alone.load_state(folder)
        assert torch.equal(second.weight, before)


# ---- on ranks ----


def prepared_on_a_rank():
    """A small training after three updates -> the Accelerator, what `prepare` returned, and a registered object."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)  # ranks draw different numbers from here on
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=0.05)
    rows: Any = torch.arange(24.0).reshape(12, 2)
    data: Any = DataLoader(rows, batch_size=2, shuffle=True)
    prepared = accelerator.prepare(model, optimizer, data, get_scheduler("linear", optimizer, 2, 40))
    model, optimizer, data, scheduler = prepared
    for batch in data:  # three batches a rank: an epoch
        accelerator.backward(model(batch).pow(2).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    counter = Counter()
    counter.count = 7
    accelerator.register_for_checkpointing(counter)
    return accelerator, prepared, counter


class Counter:
    """An object of the caller's."""

    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def snapshot(prepared, counter):
    """The state of all objects, and what the generators and the loader yield next."""
    model, optimizer, data, scheduler = prepared
    states = [model.module.state_dict(), optimizer.state_dict(), scheduler.state_dict(), data.state_dict()]
    drawn = torch.rand(3)
    epoch, order = data.iteration, torch.cat(list(data)).tolist()
    data.set_epoch(epoch)
    return checkpoint.pack([*states, counter.count, drawn, order])


def saved_and_loaded(folder):
    """-> this rank's snapshots: at the save, after two epochs more, after the load into new objects."""
    accelerator, prepared, counter = prepared_on_a_rank()
    accelerator.save_state(folder)
    found = [snapshot(prepared, counter)]
    accelerator.free_memory()
    accelerator, prepared, counter = prepared_on_a_rank()
    model, optimizer, data, scheduler = prepared
    for _ in range(2):
        for batch in data:
            accelerator.backward(model(batch).pow(2).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    counter.count = 0
    found.append(snapshot(prepared, counter))
    accelerator.load_state(folder)
    found.append(snapshot(prepared, counter))
    accelerator.end_training()
    return found


def test_save_state_and_load_state_on_ranks(tmp_path):
    """Weights, AdamW, schedule, the loader's epoch, a registered object and each rank's own generators, bit for bit."""
    by_rank = run_ranks(saved_and_loaded, 2, str(tmp_path / "state"))
    for saved, trained_on, loaded in by_rank:
        assert saved[0] == loaded[0] != trained_on[0]
        assert list(saved[1]) == list(loaded[1])
        assert all(torch.equal(saved[1][name], loaded[1][name]) for name in saved[1])
        assert not torch.equal(saved[1]["0.0.weight"], trained_on[1]["0.0.weight"])
    first, second = (saved[1]["5"] for saved, _, _ in by_rank)
    assert not torch.equal(first, second)  # the numbers that the ranks draw
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "custom.json", "loader.json", "manifest.json", "model.safetensors", "optimizer.safetensors",
        "random_states.safetensors", "scheduler.json",
    ]  # fmt: skip


def unsaved(folder):
    """-> what `save_state` raises on this rank, and what a collective afterwards returns."""
    accelerator, *_ = prepared_on_a_rank()
    with pytest.raises((OSError, RuntimeError)) as raised:
        accelerator.save_state(folder)
    total = accelerator.reduce(torch.ones(1)).item()
    accelerator.end_training()
    return type(raised.value).__name__, str(raised.value), total


def unloaded(folder):
    """-> what `load_state` raises on this rank; rank 1 alone does not see the folder."""
    accelerator, prepared, _ = prepared_on_a_rank()
    before = prepared[0].module[0].weight.detach().clone()
    with pytest.raises(ValueError) as raised:
        accelerator.load_state(folder + ("/nowhere" if accelerator.process_index == 1 else ""))
    unchanged = torch.equal(prepared[0].module[0].weight, before)
    accelerator.end_training()
    return str(raised.value), unchanged


def saved(folder):
    accelerator, *_ = prepared_on_a_rank()
    accelerator.save_state(folder)
    accelerator.end_training()


def test_a_failure_to_save_reaches_all_ranks(tmp_path):
    """Rank 0 finds a file where a folder should be: both ranks raise, and neither is left in a collective."""
    (tmp_path / "file").write_text("not a folder")
    first, second = run_ranks(unsaved, 2, str(tmp_path / "file" / "state"))
    assert first[0] in ("NotADirectoryError", "FileExistsError") and second[0] == "RuntimeError"
    assert second[1] == f"rank 0 could not save: {first[1]}"
    assert first[2] == second[2] == 2.0
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_failure_to_load_reaches_all_ranks(tmp_path):
    """A folder that one rank cannot read is loaded on none."""
    folder = str(tmp_path / "state")
    run_ranks(saved, 2, folder)
    (first, unchanged), (second, also) = run_ranks(unloaded, 2, folder)
    assert second.startswith(f"{folder}/nowhere is not a complete checkpoint: it has no manifest.json")
    assert first == f"rank 1 cannot load: {second}"
    assert unchanged and also


def alone(folder, method):
    """Rank 0 alone calls it, under is_main_process; rank 1 goes on to the next collective."""
    accelerator = Accelerator(cpu=True, timeout=timedelta(seconds=60))
    accelerator.prepare(nn.Linear(1, 1))
    accelerator.save_state(folder / "together")
    accelerator.load_state(folder / "together")
    watch.all_call.__defaults__ = (2.0,)  # in place of 20 s
    text = ""
    if accelerator.is_main_process:
        with pytest.raises(RuntimeError) as raised:
            getattr(accelerator, method)(folder / "together")
        text = str(raised.value)
    accelerator.wait_for_everyone()
    accelerator.save_state(folder / "after")  # the ranks still count alike
    accelerator.end_training()
    return text


@pytest.mark.parametrize("method", ["save_state", "load_state"])
def test_a_call_by_rank_0_alone_fails_by_name_and_not_after_the_time_out(method, tmp_path):
    text, _ = run_ranks(alone, 2, tmp_path, method)
    assert text == (f"{method}: rank 1 did not call it within 2 s; call it on all ranks, not under is_main_process")
    assert checkpoint.check(tmp_path / "after") == ""


def second_accelerator(folder):
    """Two of them in the caller's process group: the second counts its calls from the beginning."""
    torch.distributed.init_process_group("gloo")
    watch.all_call.__defaults__ = (2.0,)
    texts = []
    for turn in range(2):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(nn.Linear(1, 1))
        if turn == 0:
            accelerator.save_state(folder / "first")
        elif accelerator.is_main_process:
            with pytest.raises(RuntimeError) as raised:
                accelerator.save_state(folder / "second")
            texts.append(str(raised.value))
        accelerator.wait_for_everyone()
        accelerator.end_training()
    torch.distributed.destroy_process_group()
    return texts


def test_a_second_accelerator_is_not_taken_for_the_first(tmp_path):
    texts, _ = run_ranks(second_accelerator, 2, tmp_path)
    assert len(texts) == 1 and texts[0].startswith("save_state: rank 1 did not call it within 2 s")
