"""nanofinetune.dropin.saving against accelerate 1.15's methods: bytes of files, names of files, what hooks are given.

python -m pytest tests/dropin/test_saving.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from helpers import run_ranks
from side_by_side import line, ours, rows, theirs
from torch import nn

from nanofinetune.settings import ProjectConfiguration


class Tied(nn.Module):
    """Two names for one weight, as BERT's with a language modelling head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.apart = nn.Linear(2, 2)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickled"])
@pytest.mark.parametrize("size", ["10GB", "20KB"], ids=["whole", "sharded"])
def test_save_model_writes_what_accelerate_writes(size, safe, tmp_path):
    """Names of files, the index, tensors."""
    folders = []
    for make in (ours, theirs):
        folders.append(folder := tmp_path / make.__name__)
        accelerator = make(mixed_precision="bf16")
        model = accelerator.prepare(tiny_bert())
        accelerator.save_model(model, folder, max_shard_size=size, safe_serialization=safe)
    names = [sorted(os.listdir(folder)) for folder in folders]
    assert names[0] == names[1] and (len(names[0]) > 3) == (size == "20KB")
    for name in names[0]:
        mine, reference = (folder / name for folder in folders)
        if name.endswith(".json"):
            weights = [json.loads(file.read_text())["weight_map"] for file in (mine, reference)]
            assert weights[0] == weights[1]
        elif safe:
            assert mine.read_bytes() == reference.read_bytes()
        else:
            ours_, theirs_ = (torch.load(file, weights_only=True) for file in (mine, reference))
            assert list(ours_) == list(theirs_) and all(torch.equal(ours_[key], theirs_[key]) for key in ours_)


def test_files_of_the_save_before_go_where_accelerate_leaves_them(tmp_path):
    """from_pretrained may take these for the newest."""
    left = []
    for make in (ours, theirs):
        accelerator, model = make(), tiny_bert()
        for size in ("20KB", "10GB"):
            accelerator.save_model(model, tmp_path / make.__name__, max_shard_size=size)
        left.append(sorted(os.listdir(tmp_path / make.__name__)))
    assert left[0] == ["model.safetensors"]
    assert "model.safetensors.index.json" in left[1] and len(left[1]) > 4


def test_saved_weights_are_loaded_by_transformers(tmp_path):
    from transformers import BertForSequenceClassification

    model = ours().prepare(tiny_bert())
    ours().save_model(model, tmp_path, max_shard_size="20KB")
    model.config.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_tied_weights_are_saved_once_as_in_accelerate(tmp_path):
    for make in (ours, theirs):
        torch.manual_seed(0)
        make().save(Tied().state_dict(), tmp_path / make.__name__, safe_serialization=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_two_views_of_a_memory_are_saved_where_accelerate_loses_one(tmp_path):
    from collections import OrderedDict

    from safetensors.torch import load_file

    flat = torch.arange(4.0)
    views = OrderedDict(a=flat[:2], b=flat[2:])
    theirs().save(views, tmp_path / "theirs", safe_serialization=True)
    assert list(load_file(tmp_path / "theirs")) == ["a"]
    views = OrderedDict(a=flat[:2], b=flat[2:])  # theirs has taken one out of it
    ours().save(views, tmp_path / "ours", safe_serialization=True)
    assert {name: value.tolist() for name, value in load_file(tmp_path / "ours").items()} == {"a": [0, 1], "b": [2, 3]}


def hooks_of(accelerator, log, written):
    """Hooks as diffusers' examples have them: write one model in another format, and keep it from the rest."""

    def save(models, weights, output_dir):
        log.append(("save", [type(model).__name__ for model in models], len(weights), os.path.isdir(output_dir)))
        for i, model in enumerate(models):
            if isinstance(accelerator.unwrap_model(model), Tied):
                torch.save(model.state_dict(), Path(output_dir, "tied.pt"))
                written.append(weights.pop(i))

    def load(models, input_dir):
        log.append(("load", [type(model).__name__ for model in models]))
        for i, model in reversed(list(enumerate(models))):
            if isinstance(model, Tied):
                model.load_state_dict(torch.load(Path(input_dir, "tied.pt"), weights_only=True))
                models.pop(i)

    return accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)


def test_hooks_around_a_state_match_accelerate(tmp_path):
    seen = []
    for make in (ours, theirs):
        accelerator, folder = make(), tmp_path / make.__name__
        log: list[Any] = []
        written: list[Any] = []
        plain, tied = line(), Tied()
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        plain, tied, optimizer = accelerator.prepare(plain, tied, optimizer)
        handles = hooks_of(accelerator, log, written)
        kept = [model.state_dict()[name].clone() for model, name in ((plain, "weight"), (tied, "first.weight"))]
        accelerator.save_state(str(folder))
        with torch.no_grad():
            plain.weight.zero_()
            tied.first.weight.zero_()
        accelerator.load_state(str(folder))
        back = [torch.equal(kept[0], plain.weight), torch.equal(kept[1], tied.first.weight)]
        models = [file.name for file in folder.rglob("*.safetensors") if "model" in file.name]
        assert (folder / "tied.pt").is_file() and len(written) == 1
        for handle in handles:
            handle.remove()
        accelerator.save_state(str(folder / "again"))
        seen.append((log, back, models))
    assert seen[0] == seen[1]
    assert seen[0] == (
        [("save", ["Linear", "Tied"], 2, True), ("load", ["Linear", "Tied"])],
        [True, True],
        ["model.safetensors"],
    )


def test_what_a_hook_changes_in_the_weights_is_saved_as_in_accelerate(tmp_path):
    from safetensors.torch import load_file

    files = []
    for make in (ours, theirs):
        accelerator = make()
        accelerator.prepare(line())
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights[0].pop("bias"))
        accelerator.save_state(str(tmp_path / make.__name__))
        (file,) = (tmp_path / make.__name__).rglob("model.safetensors")
        files.append({name: value.tolist() for name, value in load_file(file).items()})
    assert files[0] == files[1] and list(files[0]) == ["weight"]


def test_a_state_saved_with_hooks_can_be_saved_again_and_loaded_without(tmp_path):
    accelerator = ours()
    model, _ = accelerator.prepare(line(), rows(4, 2))
    handle = accelerator.register_save_state_pre_hook(lambda models, weights, folder: Path(folder, "mine").touch())
    saved = model.weight.detach().clone()
    accelerator.save_state(tmp_path / "a")
    handle.remove()
    with torch.no_grad():
        model.weight.zero_()
    accelerator.load_state(tmp_path / "a")
    assert torch.equal(model.weight, saved) and (tmp_path / "a" / "mine").is_file()


def test_hooks_and_numbered_folders_are_refused_together(tmp_path):
    accelerator = ours(project_config=ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True))
    accelerator.prepare(line())
    accelerator.register_save_state_pre_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="hooks and automatic_checkpoint_naming are not supported together"):
        accelerator.save_state()


def on_two_ranks(folder):
    accelerator = ours()
    model = accelerator.prepare(line())
    called = []

    def hook(models, weights, output_dir):
        called.append(type(models[0]).__name__)
        if accelerator.is_main_process:
            Path(output_dir, "written").touch()
            weights.pop()

    accelerator.register_save_state_pre_hook(hook)
    accelerator.save_state(f"{folder}/a")
    accelerator.save_model(model, f"{folder}/b")
    accelerator.save({"rank": accelerator.process_index}, f"{folder}/c.pt")
    accelerator.wait_for_everyone()
    state = list(accelerator.get_state_dict(model)), list(accelerator.get_state_dict(model, unwrap=False))
    del model
    accelerator.end_training()
    return called, state


def test_rank_0_writes_and_every_rank_calls_its_hooks(tmp_path):
    for called, state in run_ranks(on_two_ranks, 2, str(tmp_path)):
        assert called == ["Linear"]
        assert state == (["weight", "bias"], ["module.weight", "module.bias"])
    assert (tmp_path / "a" / "written").is_file() and not list((tmp_path / "a").rglob("model*"))
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["model.safetensors"]
    assert torch.load(tmp_path / "c.pt", weights_only=True) == {"rank": 0}
