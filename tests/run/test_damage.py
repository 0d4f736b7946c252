"""A checkpoint that was damaged at random is loaded as it was saved or not at all, with one line of reason.

    python -m pytest tests/run/test_damage.py            the same few cases each time
    HYPOTHESIS_PROFILE=long python -m pytest tests/run/test_damage.py

The reference is what was saved. tests/run/test_schema.py has a table of single wrong values.
"""

import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_schema import everything, same, training

from nanofinetune.run import checkpoint
from nanofinetune.run.folders import MANIFEST

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis (the extra `test`) is not installed")
st = pytest.importorskip("hypothesis.strategies")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small checkpoint, and an Accelerator that it fits."""
    accelerator, _ = training()
    folder = tmp_path_factory.mktemp("damage") / "saved"
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    return folder, accelerator


def spread(data):
    """Places all over a file: hypothesis itself prefers small numbers, which are all in a header."""
    return random.Random(data.draw(st.integers(0, 2**32), "seed"))


def flip(folder, data):
    """One to three bits of one file, the manifest included."""
    file = data.draw(st.sampled_from(sorted(folder.iterdir())), "file")
    content = bytearray(file.read_bytes())
    for bit in spread(data).sample(range(8 * len(content)), data.draw(st.integers(1, 3), "bits")):
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(folder, data):
    file = data.draw(st.sampled_from(sorted(folder.iterdir())), "file")
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1), "size")])


def lengthen(folder, data):
    file = data.draw(st.sampled_from(sorted(folder.iterdir())), "file")
    file.write_bytes(file.read_bytes() + data.draw(st.binary(min_size=1, max_size=9), "more"))


def swap(folder, data):
    one, other = data.draw(st.permutations(sorted(folder.iterdir())), "files")[:2]
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def delete(folder, data):
    data.draw(st.sampled_from(sorted(folder.iterdir())), "file").unlink()


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, swap, delete])
def test_random_damage_is_never_loaded(damage, saved):
    folder, accelerator = saved

    @hypothesis.given(data=st.data())
    def try_it(data):
        with tempfile.TemporaryDirectory() as parent:
            damaged = Path(parent, "damaged")
            shutil.copytree(folder, damaged)
            damage(damaged, data)
            attempt(accelerator, damaged, saved_as=folder)

    try_it()


def attempt(accelerator, damaged, saved_as=None):
    """Load it: it changes nothing and gives one line of reason; or it is what was saved (white space in a manifest)."""
    torch.rand(1)  # what is loaded by mistake would show in the generators too
    before = everything(accelerator)
    try:
        accelerator.load_state(damaged)
    except ValueError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error), str(error)
        assert same(before, everything(accelerator)), "a refused state has been loaded in part"
        return False
    if saved_as is not None:
        loaded = everything(accelerator)
        accelerator.load_state(saved_as)
        assert same(loaded, everything(accelerator)), "a damaged state has been loaded"
    return True


# ---- damage with hashes that fit ----

IMPOSSIBLE: list[Any] = [-(10**30), 10**30, -1, 0.5, float("nan"), float("inf"), "x", "", None, True, [], {}, [[]]]


def places(tree, path=()):
    """The paths of everything in a JSON tree but its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        if not (isinstance(value, list) and len(value) > 50):  # the 625 numbers of a generator: as one
            yield from places(value, (*path, key))


def rehash(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_random_values_with_hashes_that_fit_raise_one_line_or_nothing(saved):
    """A value that could be one of the object's is taken; whatever is not, is refused before anything is changed."""
    folder, accelerator = saved
    parts = {path.name: path for path in folder.glob("*.json") if path.name != MANIFEST}
    assert {"loader.json", "custom.json", "scheduler.json"} <= set(parts)
    refused = []

    @hypothesis.given(data=st.data())
    def try_it(data):
        with tempfile.TemporaryDirectory() as parent:
            damaged = Path(parent, "damaged")
            shutil.copytree(folder, damaged)
            file = damaged / data.draw(st.sampled_from(sorted(parts)), "part")
            tree = json.loads(file.read_text())
            *path, last = data.draw(st.sampled_from(list(places(tree))), "place")
            inner = tree
            for key in path:
                inner = inner[key]
            inner[last] = data.draw(st.sampled_from(IMPOSSIBLE), "value")
            file.write_text(json.dumps(tree))
            rehash(damaged)
            assert checkpoint.check(damaged) == ""
            refused.append(not attempt(accelerator, damaged))
            accelerator.load_state(folder)

    try_it()
    assert sum(refused) > len(refused) / 2


def test_damaged_tensors_with_hashes_that_fit_raise_one_line_or_nothing(saved):
    """Bytes of the headers and of the values of safetensors files."""
    folder, accelerator = saved

    @hypothesis.given(data=st.data())
    def try_it(data):
        with tempfile.TemporaryDirectory() as parent:
            damaged = Path(parent, "damaged")
            shutil.copytree(folder, damaged)
            file = data.draw(st.sampled_from(sorted(damaged.glob("*.safetensors"))), "file")
            content = bytearray(file.read_bytes())
            content[spread(data).randrange(len(content))] = data.draw(st.integers(0, 255), "byte")
            file.write_bytes(content)
            rehash(damaged)
            attempt(accelerator, damaged)
            accelerator.load_state(folder)

    try_it()
