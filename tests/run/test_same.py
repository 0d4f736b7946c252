"""Ranks that were started with different settings are refused on all ranks; torch's DDP trains on with them.

OMP_NUM_THREADS=1 python -m pytest tests/run/test_same.py
"""

import os
import re
import shutil
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script, save_tiny_model
from helpers import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from nanofinetune import Accelerator
from nanofinetune.ground.errors import UsageError
from nanofinetune.ranks.world import init_world, shutdown
from nanofinetune.run.same import _checksum, difference


def started(arguments, others):
    """train.py's main in this rank; rank 1 gets `others` as well -> what it raised."""
    rank = os.environ["RANK"]
    sys.argv = ["train.py", *arguments, *(others if rank == "1" else [])]
    train = load_script(ROOT / "train.py")
    try:
        train.main()
    except train.UsageError as error:
        return str(error)
    return ""


SETTINGS = {
    "--lr": (["--lr", "1e-3"], "--lr: rank 0 has 5e-05, rank 1 has 0.001"),
    "--seed": (["--seed", "7"], "--seed: rank 0 has 42, rank 1 has 7"),
    "--clip-norm": (["--clip-norm", "1"], "--clip-norm: rank 0 has nothing, rank 1 has 1.0"),
    "--dry-run": (["--dry-run"], "--dry-run: rank 0 has False, rank 1 has True"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_with_other_settings_are_refused(name, tiny_model, pairs):
    others, text = SETTINGS[name]
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "1", "--device", "cpu"]
    assert run_ranks(started, 2, arguments, others) == [f"{text}; start all ranks with the same"] * 2


def test_an_option_of_one_rank_alone_is_refused_before_the_ranks_part(tiny_model, pairs, tmp_path):
    """With --output rank 0 would enter a collective that rank 1 never enters."""
    arguments = ["--model", tiny_model, "--data", pairs, "--max-steps", "1", "--device", "cpu"]
    texts = run_ranks(started, 2, arguments, ["--output", str(tmp_path / "out")])
    assert len(set(texts)) == 1 and texts[0].startswith("--output: rank 0 has nothing, rank 1 has "), texts


def started_in(folders, change):
    """As `started`, with one command line: each rank in a working folder of its own."""
    os.chdir(folders[int(os.environ["RANK"])])
    return started(["--model", "model", "--data", "data", "--max-steps", "1", "--device", "cpu"], [])


@pytest.mark.parametrize(
    "what", ["data", *(pytest.param(what, marks=pytest.mark.slow) for what in ("weights", "nothing"))]
)
def test_other_files_behind_the_same_names_are_refused(what, tiny_tokenizer_dir, pairs, tmp_path):
    """Nodes have disks of their own, and so files of their own behind one command line."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        save_tiny_model(folder / "model", tiny_tokenizer_dir, seed=rank if what == "weights" else 0)
        shutil.copytree(pairs, folder / "data")
    if what == "data":
        file = folders[1] / "data" / "train.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([lines[1], lines[0], *lines[2:]]))
    texts = run_ranks(started_in, 2, folders, what)
    beginning = {
        "data": "the hash of the training rows: rank 0 has ",
        "weights": "the model's bert.embeddings.word_embeddings.weight: rank 0 has float32 [32, 32] with checksum ",
        "nothing": "",
    }[what]
    assert len(set(texts)) == 1 and texts[0].startswith(beginning) and bool(texts[0]) == bool(beginning), texts


def two_rates():
    """torch's own DDP, whose ranks step with rates of their own -> the weights at the end."""
    world = init_world("cpu")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if world.rank == 0 else 0.3)
    for _ in range(2):
        model(torch.ones(4, 2)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = model.module.weight.detach().clone()
    del model, optimizer
    shutdown(world)
    return weights


def test_ddp_trains_on_with_two_learning_rates():
    first, second = run_ranks(two_rates, 2)
    assert not torch.allclose(first, second)


def loader_of(rank, what):
    """A loader that is rank 1's own in one way."""
    rows = range(16 + (what == "rows") * rank)
    sizes = {"batch_size": 2 + (what == "batch_size") * rank, "drop_last": what == "drop_last" and rank == 1}
    return DataLoader(rows, shuffle=what != "order" or rank == 0, **sizes)  # type: ignore[arg-type]


def prepare_others(what):
    """What becomes of the ranks' other loaders, here and in Accelerate: an error's text, or the rows that came."""
    from accelerate import Accelerator as Theirs

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    with pytest.raises(UsageError) as refusal:
        accelerator.prepare(loader_of(rank, what))
    shared = accelerator.prepare(loader_of(0, what))  # they still agree on what comes next
    assert sum(len(batch) for batch in shared) == 8
    theirs: list[int] = []
    if what != "order":  # there a rank that shuffles sends its generator to one that does not wait for it
        theirs = [row for batch in Theirs(cpu=True).prepare(loader_of(rank, what)) for row in batch.tolist()]
    accelerator.end_training()
    return str(refusal.value), theirs


@pytest.mark.parametrize("what", ["order", "batch_size", "drop_last", "rows"])
def test_ranks_with_other_loaders_are_refused_where_accelerate_goes_on(what):
    """With other sizes of batches, Accelerate's ranks read some rows twice and others not at all."""
    pytest.importorskip("accelerate", reason="what this is compared with")
    (text, first), (same, second) = run_ranks(prepare_others, 2, what)
    assert text == same and re.fullmatch(
        rf"the loader's {what}: rank 0 has \w+, rank 1 has \w+; prepare the same loader on all ranks", text
    )
    if what == "batch_size":
        assert set(first) & set(second) and set(first + second) < set(range(16)), (first, second)


def stream_of(rank, what):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_dict({"row": list(range(10))}).to_iterable_dataset(2)
    if what == "split":
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(stream.with_format("torch"), rank, 2)
    return stream.shuffle(seed=None if what == "unseeded" else 3).map(dict).with_format("torch")


def prepare_streams(what):
    """What becomes of a stream here and in Accelerate: an error's text, or the rows of each batch."""
    from accelerate import Accelerator as Theirs

    found: list[Any] = []
    for make in (Accelerator, Theirs):
        accelerator = make(cpu=True)
        loader = DataLoader(stream_of(accelerator.process_index, what), batch_size=4)
        try:
            found.append([batch["row"].tolist() for batch in accelerator.prepare(loader)])
        except UsageError as error:
            found.append(str(error))
    return found


def test_a_seeded_stream_gives_each_row_once_but_for_its_last_step_unlike_accelerate():
    """Accelerate: rank 0 reads, the others get their slices, of the last step too. Here it wraps, as data sets do."""
    pytest.importorskip("accelerate", reason="what this is compared with")
    (ours, theirs), (ours_1, theirs_1) = run_ranks(prepare_streams, 2, "seeded")
    assert sorted(ours[0] + ours_1[0] + ours[1][:2]) == list(range(10))
    assert ours[1] + ours_1[1] == ours[1][:2] + ours[0] + ours_1[0][:2]
    assert [len(batch) for batch in theirs + theirs_1] == [4, 1, 4, 1]


@pytest.mark.parametrize("what", ["unseeded", "split"])
def test_a_stream_of_which_each_rank_has_its_own_is_refused(what):
    """Accelerate reads rank 0's alone: right for a shuffle without a seed, half of the rows for a split."""
    pytest.importorskip("accelerate", reason="what this is compared with")
    (text, theirs), (same, theirs_1) = run_ranks(prepare_streams, 2, what)
    begin = {"unseeded": r"the stream's shuffle, which needs a seed: rank 0 has one that begins at \w+, rank 1 has one",
             "split": r"the stream's split_dataset_by_node: rank 0 has \S*\(rank=0.*rank 1 has"}[what]  # fmt: skip
    assert text == same and re.match(begin, text) and text.endswith("; prepare the same loader on all ranks")
    rows = sorted(row for batch in theirs + theirs_1 for row in batch)
    assert (rows == list(range(10))) == (what == "unseeded")


# ---- without ranks ----


@pytest.mark.parametrize(
    "ranks, text",
    [
        ([{"a": 1}, {"a": 1}, {"a": 1}], ""),
        ([{"a": 1}, {"a": 1}, {"a": 2}], "a: rank 0 has 1, rank 2 has 2"),
        ([{"a": 1}, {"a": 1, "b": 3}], "b: rank 0 has nothing, rank 1 has 3"),
        ([{"a": 1, "b": 3}, {"b": 4}], "a: rank 0 has 1, rank 1 has nothing"),
    ],
)
def test_the_first_difference_is_named(ranks, text):
    assert difference(ranks) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_checksum_sees_one_changed_value(dtype):
    for tensor in (torch.ones(3, 4, dtype=dtype).T, torch.ones((), dtype=dtype)):
        other = tensor.clone()
        other[(0,) * tensor.ndim] = 0
        assert _checksum(tensor) == _checksum(tensor.contiguous()) != _checksum(other)
    assert _checksum(torch.ones(0, 3)).startswith("float32 [0, 3]")
