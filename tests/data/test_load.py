"""Loading by name, against `datasets` 5.2 and pandas on the same files, and against our table of GLUE tasks.

python -m pytest tests/data/test_load.py
"""

import pytest
from tables import rows, write

from nanofinetune.data import load as load_module
from nanofinetune.data.load import load_data
from nanofinetune.data.tasks import GLUE, Task, default_metrics
from nanofinetune.ground.errors import UsageError
from nanofinetune.step import metrics


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


def test_held_out_rows_are_a_table_of_their_own_where_datasets_cuts_out_each_row(tmp_path):
    """One piece a split; the library's selection of rows comes in as many pieces as it has rows, whoever looks."""
    import datasets

    write(tmp_path, "csv", "reviews", rows(400, pair=False))
    splits = load_data(str(tmp_path / "reviews.csv")).splits
    reference = datasets.Dataset.from_list(rows(400, pair=False)).train_test_split(test_size=0.1, seed=42)
    for key, other in (("train", "train"), ("validation", "test")):
        texts = splits[key].with_format("arrow")[:]["sentence1"]
        assert texts.num_chunks == 1 and texts.to_pylist() == reference[other]["sentence1"][:]
        assert reference[other].with_format("arrow")[:]["sentence1"].num_chunks > len(texts) / 2


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.csv", "validation.csv"), ("TRAIN.csv", "Dev.csv"), ("training.csv", "val.csv"),
        ("train.csv", "valid.csv"),
        ("reviews_train.csv", "reviews_dev.csv"), ("train-reviews.csv", "eval-reviews.csv"),
        ("sst.train.csv", "sst.development.csv"), ("train_data.csv", "validation_data.csv"),
    ],
)  # fmt: skip
def test_splits_are_found_by_their_usual_names_and_nothing_else_is_read(train, validation, tmp_path):
    write(tmp_path, "csv", "x", rows(12))
    (tmp_path / "x.csv").rename(tmp_path / train)
    write(tmp_path, "csv", "y", rows(8, seed=1))
    (tmp_path / "y.csv").rename(tmp_path / validation)
    for other in ("test.csv", "labels.csv", "train_and_test.jsonl", "notes.txt", "trainer.csv", "devices.tsv"):
        (tmp_path / other).write_text("nothing that could be read")
    data = load_data(str(tmp_path))
    assert {key: len(split) for key, split in data.splits.items()} == {"train": 12, "validation": 8}


def test_a_test_split_is_not_taken_for_validation(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, "csv", split, rows(12))
    with pytest.raises(
        UsageError, match=r"no validation split \(test.csv is for the end, and not read\); put validation"
    ):
        load_data(str(tmp_path))


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train", "reviews_train", "validation"):
        write(tmp_path, "csv", name, rows(12))
    with pytest.raises(UsageError, match=r"reviews_train.csv and train.csv are one split twice"):
        load_data(str(tmp_path))


def test_mnli_files_give_both_validation_splits(tmp_path, monkeypatch):
    content = [{"premise": f"the cat {i}", "hypothesis": "it sat", "label": i % 3} for i in range(12)]
    folder = tmp_path / "mnli"
    folder.mkdir()
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(folder, "jsonl", split, content)
    monkeypatch.chdir(tmp_path)
    for name in (str(folder), "./mnli", "mnli", "mnli/"):
        data = load_data(name)
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
    monkeypatch.setattr(load_module, "hub_in_reach", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)


def test_a_cache_that_cannot_be_written_is_blamed(monkeypatch):
    """Where the Hub is there and the home is not: the data set is in order."""
    import datasets

    def load_dataset(*_):
        try:
            raise PermissionError(13, "Permission denied", "/proc/1/nobody")
        except OSError as error:
            raise RuntimeError("the library's own words") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # what it was, at the end
    monkeypatch.setattr(load_module, "hub_in_reach", lambda: True)
    with pytest.raises(UsageError, match=r"--data imdb: .*'/proc/1/nobody'\); if the cache .* set HF_HOME to a folder"):
        load_data("imdb")


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


@pytest.mark.slow
def test_the_default_falls_back_only_when_the_user_named_nothing():
    """No Hub in the tests: the default becomes stdlib-pairs and says so; the same name, given, is an error."""
    data = load_data(None)
    assert data.name == "stdlib-pairs" and "using stdlib-pairs instead" in data.note
    with pytest.raises(UsageError, match="the Hub is out of reach"):
        load_data("glue/mrpc")
