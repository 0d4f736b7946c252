"""Loading, column detection and the flat token store, against `datasets` 5.2 and pandas on the same files.

python -m pytest tests/test_data.py
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, WORDS

from nanofinetune import data as data_module
from nanofinetune import metrics
from nanofinetune.data.load import load_data
from nanofinetune.data.tasks import GLUE, Task, default_metrics
from nanofinetune.data.tokens import TokenStore, tokenize, tokenize_texts
from nanofinetune.ground.errors import UsageError
from nanofinetune.step.collate import DataCollatorWithPadding


def rows(n: int, seed: int = 0, pair: bool = True) -> list[dict]:
    """n rows of random words, labels 0 and 1."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        texts = {
            name: " ".join(rng.choice(WORDS, rng.integers(1, 12))) for name in ("sentence1", "sentence2")[: 1 + pair]
        }
        made.append({**texts, "label": int(i % 2), "idx": i})
    return made


def write(folder, kind: str, split: str, content: list[dict]) -> None:
    import datasets

    table = datasets.Dataset.from_list(content)
    path = folder / f"{split}.{kind}"
    if kind in ("csv", "tsv"):
        table.to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows_as_datasets(kind, tmp_path):
    train, validation = rows(20), rows(8, seed=1)
    write(tmp_path, kind, "train", train)
    write(tmp_path, kind, "validation", validation)
    data = load_data(str(tmp_path))
    assert data.text_columns == ("sentence1", "sentence2") and data.label_column == "label"
    assert data.label_names == ["0", "1"] and data.metrics == ("accuracy", "f1")
    for split, content in (("train", train), ("validation", validation)):
        assert data.splits[split].to_list() == [
            {k: row[k] for k in ("sentence1", "sentence2", "label")} for row in content
        ]


WITHOUT_DATASETS = """
import sys
from transformers import AutoTokenizer
from nanofinetune.data.tokens import load_tokens
folder, saved, library = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(saved)
data, stores = load_tokens(folder, None, None, 42, tokenizer, 16)
assert ("datasets" in sys.modules) == (library == "loads"), "a hit needs no library"
tokens = {key: [row["input_ids"].tolist() for row in store] for key, store in stores.items()}
print([data.name, list(data.splits), data.text_columns, data.label_names, data.metrics, data.note, tokens])
"""


def test_cached_tokens_are_the_loaded_ones_without_datasets(tmp_path, tiny_tokenizer_dir, monkeypatch):
    write(tmp_path, "jsonl", "train", rows(20))
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(tmp_path / "cache"))
    printed = []
    for library in ("loads", "does not"):
        words = [sys.executable, "-c", WITHOUT_DATASETS, str(tmp_path / "train.jsonl"), tiny_tokenizer_dir, library]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    assert printed[0] == printed[1] and "held out" in printed[0]


def test_a_cache_is_used_only_for_what_it_was_made_of(tmp_path, tiny_tokenizer, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    write(folder, "jsonl", "train", rows(20))
    write(folder, "jsonl", "validation", rows(8, seed=1))
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(cache))

    def load(max_length=16, seed=42):
        data, stores = data_module.load_tokens(str(folder), None, None, seed, tiny_tokenizer, max_length)
        assert [len(split) for split in data.splits.values()] == [len(store) for store in stores.values()]
        return type(next(iter(data.splits.values()))) is range, stores  # ranges: from the cache

    hit, loaded = load()
    assert not hit
    hit, cached = load()
    assert hit and list(cached) == list(loaded)
    for split, store in loaded.items():
        assert store.dense["label"].dtype == cached[split].dense["label"].dtype
        assert np.array_equal(store.dense["label"], cached[split].dense["label"])
        assert list(store.ragged) == list(cached[split].ragged)
        for column, (flat, offsets) in store.ragged.items():
            again, own_offsets = cached[split].ragged[column]
            assert again.dtype == flat.dtype and np.array_equal(again, flat) and np.array_equal(own_offsets, offsets)
        assert len({id(offsets) for _, offsets in cached[split].ragged.values()}) == 1  # the collator's fast way
    assert not load(max_length=8)[0] and not load(seed=7)[0]
    tiny_tokenizer.add_tokens(["zebra"])
    assert not load()[0] and load()[0]
    write(folder, "jsonl", "validation", rows(9, seed=2))
    hit, changed = load()
    assert not hit and len(changed["validation"]) == 9
    for file in cache.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:700])  # what a full disk leaves
    assert not load()[0] and load()[0]
    assert not list(cache.glob("*.part"))
    monkeypatch.setenv("NANOFINETUNE_CACHE", "")
    assert not load()[0]
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("NANOFINETUNE_CACHE", str(blocked))
    assert not load()[0], "no cache can be written: it works without"


def test_token_store_matches_datasets_rows(tmp_path, tiny_tokenizer):
    """Row by row and batch by batch, bitwise: the store against the torch-formatted data set of the course."""
    from transformers import DataCollatorWithPadding as TransformersCollator

    write(tmp_path, "parquet", "train", rows(50))
    write(tmp_path, "parquet", "validation", rows(11, seed=1))
    data = load_data(str(tmp_path))
    stores = tokenize(data, tiny_tokenizer, max_length=10)

    def encode(example):
        return tiny_tokenizer(example["sentence1"], example["sentence2"], truncation=True, max_length=10)

    for split, store in stores.items():
        reference = data.splits[split].map(encode, batched=True).remove_columns(["sentence1", "sentence2"])
        assert len(store) == len(reference)
        assert store.lengths.tolist() == [len(ids) for ids in reference["input_ids"]]
        for i, row in enumerate(reference):
            mine = store[i]
            assert {name: np.asarray(value).tolist() for name, value in mine.items()} == row
        batch = DataCollatorWithPadding(tiny_tokenizer)(store.__getitems__([3, 0, 7]))
        theirs = TransformersCollator(tiny_tokenizer)([reference[i] for i in (3, 0, 7)])
        assert list(batch) == list(theirs)
        for name, column in theirs.items():
            assert batch[name].equal(column), name


def test_token_store_holds_int32_and_one_offsets_array(tmp_path, tiny_tokenizer):
    write(tmp_path, "parquet", "train", rows(20))
    write(tmp_path, "parquet", "validation", rows(5))
    store = tokenize(load_data(str(tmp_path)), tiny_tokenizer, max_length=64)["train"]
    offsets = [column_offsets for _, column_offsets in store.ragged.values()]
    assert {flat.dtype for flat, _ in store.ragged.values()} == {np.dtype(np.int32)}
    assert all(other is offsets[0] for other in offsets)
    assert store.dense["label"].dtype == np.int64


def test_tokenization_is_cached_by_datasets_fingerprint(tmp_path, tiny_tokenizer_dir, monkeypatch):
    """The second run with a fresh tokenizer of its own reads the cache: its tokenizer is never called."""
    from transformers import AutoTokenizer

    write(tmp_path, "parquet", "train", rows(20))
    write(tmp_path, "parquet", "validation", rows(5))
    first = tokenize(load_data(str(tmp_path)), AutoTokenizer.from_pretrained(tiny_tokenizer_dir), max_length=16)

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: pytest.fail("tokenized again"))
    second = tokenize(load_data(str(tmp_path)), tokenizer, max_length=16)
    for split in ("train", "validation"):
        assert first[split].ragged["input_ids"][0].tolist() == second[split].ragged["input_ids"][0].tolist()


def test_glue_tsv_keeps_rows_that_pandas_quoting_loses(tmp_path):
    """GLUE's own TSV layout with lone quotation marks: pandas' default quoting swallows rows, we keep every one."""
    import pandas

    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    lines = [f"{i % 2}\t{i}\t{i}\t{chr(34) * (i in (2, 5))}the cat {i}\tthe dog\n" for i in range(9)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(header + "".join(lines))
    assert len(pandas.read_csv(tmp_path / "dev.tsv", sep="\t")) < len(lines)
    data = load_data(str(tmp_path))
    assert [len(split) for split in data.splits.values()] == [len(lines)] * 2
    assert data.text_columns == ("#1 String", "#2 String") and data.label_column == "Quality"
    assert data.splits["train"][2]["#1 String"] == '"the cat 2'
    assert list(data.splits) == ["train", "validation"]


def test_the_words_none_and_na_stay_text(tmp_path):
    content = [{"sentence": word, "label": i % 2} for i, word in enumerate(["None", "NA", "null", "nan", ""])]
    write(tmp_path, "csv", "train", content)
    write(tmp_path, "csv", "validation", content)
    assert load_data(str(tmp_path)).splits["train"]["sentence"][:] == ["None", "NA", "null", "nan", ""]


@pytest.mark.parametrize(
    ("row", "asked", "texts", "label"),
    [
        ({"text": "a", "label": 0}, {}, ("text",), "label"),
        ({"review": "a", "stars": 0}, {}, ("review",), "stars"),
        ({"id": 0, "a": "x", "b": "y", "target": 0}, {}, ("a", "b"), "target"),
        ({"a": "x", "b": "y", "c": "z", "label": 0}, {"text_columns": ["c", "a"]}, ("c", "a"), "label"),
        ({"a": "x", "n": 0, "m": 0}, {"label_column": "m"}, ("a",), "m"),
        ({"a": "x", "b": "y", "n": 0, "m": 0}, {"text_columns": ["b"], "label_column": "n"}, ("b",), "n"),
    ],
)
def test_columns_are_found_by_themselves(row, asked, texts, label, tmp_path):
    content = [
        {name: i % 2 if isinstance(value, int) else f"{value} {i}" for name, value in row.items()} for i in range(12)
    ]
    write(tmp_path, "jsonl", "train", content)
    write(tmp_path, "jsonl", "validation", content)
    data = load_data(str(tmp_path), **asked)
    assert (data.text_columns, data.label_column) == (texts, label)
    assert set(data.splits["train"].column_names) == {*texts, label}


def test_a_single_file_holds_a_tenth_out_by_the_seed(tmp_path):
    write(tmp_path, "csv", "reviews", rows(40, pair=False))
    name = str(tmp_path / "reviews.csv")
    data = load_data(name)
    assert [len(split) for split in data.splits.values()] == [36, 4]
    assert "4 of its 40 rows are held out" in data.note
    both = set(data.splits["train"]["sentence1"][:]) | set(data.splits["validation"]["sentence1"][:])
    assert both == {row["sentence1"] for row in rows(40, pair=False)}
    assert load_data(name).splits["validation"].to_list() == data.splits["validation"].to_list()
    assert load_data(name, seed=1).splits["validation"].to_list() != data.splits["validation"].to_list()


def test_float_labels_are_regression(tmp_path, tiny_tokenizer):
    content = [{"sentence": f"the cat {i}", "score": i / 7} for i in range(12)]
    write(tmp_path, "csv", "train", content)
    write(tmp_path, "csv", "validation", content)
    data = load_data(str(tmp_path))
    assert data.label_names is None and data.metrics == ("pearson", "spearmanr")
    store = tokenize(data, tiny_tokenizer, 16)["train"]
    assert store.dense["label"].dtype == np.float32
    np.testing.assert_array_equal(store.dense["label"], np.array([row["score"] for row in content], np.float32))


def test_mnli_files_give_both_validation_splits(tmp_path):
    content = [{"premise": f"the cat {i}", "hypothesis": "it sat", "label": i % 3} for i in range(12)]
    folder = tmp_path / "mnli"
    folder.mkdir()
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(folder, "jsonl", split, content)
    data = load_data(str(folder))
    assert list(data.splits) == ["train", *GLUE["mnli"].validation]
    assert data.label_names == list(GLUE["mnli"].label_names or ())


@pytest.mark.parametrize(("name", "train", "validation"), [("mrpc", 3668, 408), ("sst2", 67349, 872)])
def test_local_glue_matches_the_task_table(name, train, validation, glue_path):
    data, task = load_data(str(glue_path / name)), GLUE[name]
    found = data.text_columns, tuple(data.label_names or ()), data.metrics
    assert found == (task.text_columns, task.label_names, task.metrics)
    assert {key: len(split) for key, split in data.splits.items()} == {"train": train, "validation": validation}


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"])
def test_glue_tasks_match_the_metric_of_that_name(name):
    task = GLUE[name]
    assert metrics.load("glue", name).names == task.metrics
    assert (task.label_names is None) == (default_metrics(None) == task.metrics)


def of_the_hub(monkeypatch, splits):
    """Answer for the Hub, which the tests cannot reach, with `splits` of twelve rows."""
    import datasets

    content = [{"premise": f"the cat {i}", "hypothesis": "it sat", "label": i % 3} for i in range(12)]
    loaded = datasets.DatasetDict({split: datasets.Dataset.from_list(content) for split in splits})
    monkeypatch.setattr(data_module, "hub_in_reach", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)


@pytest.mark.parametrize(
    ("name", "splits", "scored"),
    [
        ("someone/mnli", ("train", *GLUE["mnli"].validation), [*GLUE["mnli"].validation]),
        ("someone/mnli", ("train", "validation_mismatched"), ["validation_mismatched"]),
        ("someone/mnli", ("train", "validation", "test"), ["validation"]),
        ("glue/mnli", ("train", "validation_matched"), ["validation_matched"]),
        ("someone/other", ("train", "validation"), ["validation"]),
        ("someone/own", ("train", "test"), ["test"]),
    ],
)
def test_a_hub_name_is_read_as_the_task_that_it_ends_in(name, splits, scored, monkeypatch):
    own = Task(("premise", "hypothesis"), ("a", "b", "c"), validation=("test",))
    monkeypatch.setitem(GLUE, "own", own)
    of_the_hub(monkeypatch, splits)
    data = load_data(name)
    assert list(data.splits) == ["train", *scored]
    names = GLUE[name.rpartition("/")[2]].label_names if name != "someone/other" else ("0", "1", "2")
    assert tuple(data.label_names or ()) == names


@pytest.mark.parametrize("name", ["someone/mnli-2", "mnli", "someone/other"])
def test_other_hub_names_need_a_split_called_validation(name, monkeypatch):
    of_the_hub(monkeypatch, ("train", "validation_matched"))
    with pytest.raises(UsageError, match="it needs a train and a validation split, and has train, validation_matched"):
        load_data(name)


def test_stdlib_pairs_have_the_columns_and_sizes_of_mrpc():
    data = load_data("stdlib-pairs")
    assert data.text_columns == GLUE["mrpc"].text_columns and len(data.label_names or ()) == 2
    assert [len(split) for split in data.splits.values()] == [3668, 408]


def test_tokenize_texts_matches_the_tokenizer(tiny_tokenizer):
    texts, pairs = ["the cat", "a big red dog", "it"], ["sat", "ran under the tree", "was small and old"]
    for second in (None, pairs):
        store = tokenize_texts(texts, second, tiny_tokenizer, max_length=9)
        reference = tiny_tokenizer(texts, second, truncation=True, max_length=9)
        for name, column in reference.items():
            assert [np.asarray(store[i][name]).tolist() for i in range(3)] == column


def test_a_row_index_below_zero_is_refused():
    store = TokenStore({"input_ids": (np.array([1, 2, 3], np.int32), np.array([0, 1, 3]))})
    with pytest.raises(IndexError, match="count from 0"):
        store.__getitems__([-1])


def test_the_default_falls_back_only_when_the_user_named_nothing():
    """No Hub in the tests: the default becomes stdlib-pairs and says so; the same name, given, is an error."""
    data = load_data(None)
    assert data.name == "stdlib-pairs" and "using stdlib-pairs instead" in data.note
    with pytest.raises(UsageError, match="the Hub is out of reach"):
        load_data("glue/mrpc")
